"""Samples that are gathered several at a time, without their padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank import InputError
from onnx_lowrank.data.joining import APART, Joining
from onnx_lowrank.fitting.gather import gather
from onnx_lowrank.fitting.statistics import Gathered
from onnx_lowrank.fitting.streams import MomentsKey
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.maps.find import find
from onnx_lowrank.maps.forms import all_forms, chosen_forms
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.runtime.taps import Runner
from tests.helpers.calibrated import attention
from tests.helpers.models import parse, run_ort, uniform

MASK = "attention_mask"
TOGETHER = Joining(4, MASK, {"x": 1, MASK: 1})


def texts(rng: np.random.Generator, count: int, whole: int = 24) -> list[dict[str, Array]]:
    """Texts of other lengths, padded to one; NaN, which nothing counts, as padding."""
    found = []
    for _ in range(count):
        mask = (np.arange(whole) < rng.integers(1, whole // 2))[None]
        x = np.where(mask[..., None], uniform((1, whole, 6), rng), np.float32(np.nan))
        found.append({"x": x, MASK: mask.astype(np.int64)})
    return found


def gathered(
    proto: onnx.ModelProto, fit: Sequence[Feed], held: Sequence[Feed], joining: Joining
) -> tuple[dict[MomentsKey, Gathered], list[tuple[int, ...]]]:
    """The moments, and the shapes of x in all runs."""
    model, shapes = ir.from_proto(proto), list[tuple[int, ...]]()
    groups = find(model, Constants(model, False), all_forms(), chosen_forms(("all",))).groups

    def opened(copy: ir.Model) -> Runner:
        made = ir.to_proto(copy)

        def counted(feed: Feed) -> Feed:
            shapes.append(feed["x"].shape)
            return run_ort(made, {value.name: feed[value.name] for value in made.graph.input})

        return counted

    mask = MASK if MASK in fit[0] else None
    found = gather(
        model,
        groups,
        opened,
        fit,
        held,
        mask,
        lambda _: None,
        must_fit=False,
        joining=joining,
    )
    return found, shapes


def test_moments_are_those_of_samples_one_by_one(rng: np.random.Generator) -> None:
    fit, held = texts(rng, 21), texts(rng, 5)
    proto = attention(rng)
    alone, runs = gathered(proto, fit, held, APART)
    together, fewer = gathered(proto, fit, held, TOGETHER)
    assert len(runs) == 26
    assert len(fewer) < 13
    assert max(shape[1] for shape in fewer[1:]) <= 24
    assert sum(shape[0] * shape[1] for shape in fewer) < 26 * 24 / 2
    assert together.keys() == alone.keys()
    for key, own in alone.items():
        for before, after in ((own.fit, together[key].fit), (own.held, together[key].held)):
            for one, other in zip(before, after, strict=True):
                assert one is not None
                assert other is not None
                assert one.rows == other.rows
                np.testing.assert_allclose(one.second, other.second, rtol=1e-5, atol=1e-8)
                np.testing.assert_allclose(one.mean, other.mean, rtol=1e-5, atol=1e-8)


def test_a_mask_that_fits_by_chance_when_it_is_cut_leaves_nothing_out(
    rng: np.random.Generator,
) -> None:
    """Six heads are no tokens, also of texts of six."""
    proto = parse(
        '<ir_version: 8, opset_import: ["": 17]>'
        "g (float[B, T, 6] x) => (float[B, 6, T, 4] y) {"
        "a = Constant<value = int64[1] {3}>() b = Unsqueeze(x, a)"
        "h = Transpose<perm = [0, 2, 1, 3]>(b) y = MatMul(h, W) }",
        {"W": uniform((1, 4), rng)},
    )
    mask = np.array([[1, 0, 1, 1, 1, 1, 0, 0, 0]])
    feeds = [{"x": uniform((1, 9, 6), rng), MASK: mask} for _ in range(3)]
    found, _ = gathered(proto, feeds, (), TOGETHER)
    ((moments,),) = [own.fit for own in found.values()]
    assert moments is not None
    assert moments.rows == 3 * 6 * 6


def test_the_sample_that_is_not_finite_is_named(rng: np.random.Generator) -> None:
    feeds = texts(rng, 8)
    feeds[5]["x"][0, 0, 0] = np.inf  # Tanh makes 1 of it, unless it is NaN
    feeds[6]["x"][0, 0, 0] = np.nan
    with pytest.raises(InputError, match=r"in sample 6$"):
        gathered(attention(rng), feeds, (), TOGETHER)
