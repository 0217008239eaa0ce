"""Samples that are gathered several at a time, without their padding."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank import InputError
from onnx_lowrank.data.joining import APART, Joining
from onnx_lowrank.data.samples import Lazy
from onnx_lowrank.fitting import passes
from onnx_lowrank.fitting.gather import gather
from onnx_lowrank.fitting.statistics import Gathered, Gathering
from onnx_lowrank.fitting.streams import MomentsKey
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.maps.find import find
from onnx_lowrank.maps.forms import all_forms, chosen_forms
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.runtime import memory
from onnx_lowrank.runtime.memory import Memory
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
    return dict(found.whole), shapes


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
    with pytest.raises(InputError, match=r"in sample 6 of those to fit to$"):
        gathered(attention(rng), feeds, (), TOGETHER)


def test_samples_that_are_kept_aside_are_summed_apart_and_together(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory and in files alike, with one run of each sample."""
    fit, held, aside = texts(rng, 21), texts(rng, 5), [2, 9, 20]
    model = ir.from_proto(attention(rng))
    groups = find(model, Constants(model, False), all_forms(), chosen_forms(("all",))).groups
    runs = list[Feed]()

    def opened(copy: ir.Model) -> Runner:
        made = ir.to_proto(copy)

        def run(feed: Feed) -> Feed:
            runs.append(feed)
            return run_ort(made, {value.name: feed[value.name] for value in made.graph.input})

        return run

    def found(own: Sequence[Feed], apart: Sequence[int] = ()) -> Gathering:
        return gather(model, groups, opened, own, held, MASK, lambda _: None, aside=apart)

    rest = [feed for number, feed in enumerate(fit) if number not in aside]
    whole, without, alone = found(fit), found(rest), found([fit[number] for number in aside])
    assert whole.apart is None
    for most in (1 << 30, 100):
        monkeypatch.setattr(passes, "MEMORY", most)
        runs.clear()
        together = found(fit, aside)
        assert len(runs) == 26 * (1 if most > 100 else len(whole.whole))
        assert together.apart is not None
        same(together.whole, whole.whole)
        same(together.apart[0], without.whole)
        for key, own in together.apart[1].items():
            same({key: Gathered(own.fit, ())}, {key: Gathered(alone.whole[key].fit, ())})
            assert own.held == (None,) * len(own.fit)


def same(found: Mapping[MomentsKey, Gathered], wanted: Mapping[MomentsKey, Gathered]) -> None:
    """Moments that are alike."""
    assert found.keys() == wanted.keys()
    for key, own in found.items():
        both = (*own.fit, *own.held), (*wanted[key].fit, *wanted[key].held)
        for one, other in zip(*both, strict=True):
            assert one is not None
            assert other is not None
            assert one.rows == other.rows
            np.testing.assert_allclose(one.second, other.second, rtol=1e-5, atol=1e-8)


def test_samples_are_read_one_by_one(rng: np.random.Generator) -> None:
    """Those of files would else be in memory all at once, whatever the limit is."""
    alive, most = weakref.WeakSet[Sample](), [0]

    def made(_: int) -> Feed:
        sample = Sample(texts(rng, 1)[0])
        alive.add(sample)
        most[0] = max(most[0], len(alive))
        return sample

    feeds = Lazy(40, made)
    gathered(attention(rng), feeds, Lazy(5, made), APART)
    assert 0 < most[0] < 5


class Sample(dict[str, Array]):
    """One that is counted while it is there."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def test_what_does_not_fit_is_named_before_a_sample_runs(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sums of one layer count, where the limit is the user's."""
    for module in (memory, passes):
        monkeypatch.setattr(module, "held", lambda: 0)
    proto = parse(
        '<ir_version: 8, opset_import: ["": 17]>'
        "g (float[N, 300] x) => (float[N, 2] y) { h = Tanh(x) y = MatMul(h, W) }",
        {"W": uniform((300, 2), rng)},
    )
    model, runs = ir.from_proto(proto), list[Feed]()
    groups = find(model, Constants(model, False), all_forms(), chosen_forms(("all",))).groups

    def opened(copy: ir.Model) -> Runner:
        def run(feed: Feed) -> Feed:
            runs.append(feed)
            return run_ort(ir.to_proto(copy), feed)

        return run

    feeds = [{"x": uniform((4, 300), rng)} for _ in range(3)]
    tried = functools.partial(gather, model, groups, opened, feeds, (), None, lambda _: None)
    with pytest.raises(InputError, match=r"the input of '.*' in sample 0, with its moments, takes"):
        tried(Memory(1_000_000, given=True))
    assert len(runs) == 1  # which only asks for shapes
    assert tried(Memory(1_000_000)).whole
    assert tried(Memory(2_000_000, given=True)).whole
