"""Maps around a width in integers: moments of what is left of it, and what stands in full width."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnx_lowrank.fitting.rounded_maps import Width, inputs_of, rounded_maps
from onnx_lowrank.fitting.statistics import Statistics
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.maps.find import Group, find
from onnx_lowrank.maps.formats import Format
from onnx_lowrank.maps.forms import all_forms, chosen_forms
from onnx_lowrank.maps.pair import Errors, Factors
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.moments import Moments
from tests.helpers.models import parse

HEADS, SIZE, RANK = 3, 16, 8


def group(rng: np.random.Generator) -> Group:
    """Hidden units between two maps."""
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,24] x) => (float[N,20] y) {
            h = MatMul (x, A)
            r = Relu (h)
            y = MatMul (r, B)
        }""",
        {
            "A": rng.standard_normal((24, HEADS * SIZE)).astype(np.float32),
            "B": rng.standard_normal((HEADS * SIZE, 20)).astype(np.float32),
        },
    )
    loaded = ir.from_proto(model)
    (found,) = find(loaded, Constants(loaded), all_forms(), chosen_forms(("hidden",))).groups
    return found


def moments(rows: Array) -> Moments:
    return Moments(rows.T @ rows / len(rows), rows.mean(0), len(rows), rows.mean(0))


def test_moments_of_what_is_left(rng: np.random.Generator) -> None:
    rows = rng.standard_normal((500, HEADS * SIZE)) + 0.3
    first = rng.standard_normal((HEADS, SIZE, RANK))
    by_head = np.concatenate([rows[:, SIZE * e :][:, :SIZE] @ first[e] for e in range(HEADS)], 1)
    units = np.array([1, 5, 30])
    for width, left in ((Width(first, None), by_head), (Width(None, units), rows[:, units])):
        found, exact = width.moments(moments(rows)), moments(left)
        np.testing.assert_allclose(found.second, exact.second)
        np.testing.assert_allclose(found.mean, exact.mean)
        assert found.centre is not None
        np.testing.assert_allclose(found.centre, exact.mean)
        assert found.rows == 500


@pytest.mark.parametrize("bits", [8, 4])
def test_in_full_width_it_computes_what_narrower_maps_do(
    bits: int, rng: np.random.Generator
) -> None:
    own = group(rng)
    x = rng.standard_normal((2000, 24))
    a, b = (one.matrix.numpy()[0] for one in own.maps)
    h = np.maximum(x @ a, 0.0)
    known = {own.maps[0]: (moments(x),), own.maps[1]: (moments(h),)}
    statistics = Statistics({g: (Moments(m.second, m.mean, m.rows),) for g, (m,) in known.items()})
    units = np.sort(rng.permutation(HEADS * SIZE)[:32])
    first = np.zeros((1, HEADS * SIZE, 32), np.float32)
    first[0, units, np.arange(32)] = 1.0
    second = np.linalg.lstsq(h[:, units], h @ b, rcond=None)[0][None].astype(np.float32)
    pair = Factors(first, second, Errors(0.0))
    form = Format(8 if bits == 8 else 4, 32)
    constants = rounded_maps(own, form, pair, statistics)
    wide_a, wide_b = constants["A"], constants["B"]
    left = np.setdiff1d(np.arange(HEADS * SIZE), units)
    assert not wide_b[left].any()
    np.testing.assert_allclose(wide_a[:, left], a[:, left], atol=1e-6)
    exact = np.maximum(x @ a[:, units], 0.0) @ second[0]
    found = np.maximum(x @ wide_a, 0.0) @ wide_b
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < {8: 0.01, 4: 0.12}[bits]
    assert len(np.unique(wide_b[units[:32], 0])) <= 2**bits


def test_without_samples_nothing_is_known_of_inputs(rng: np.random.Generator) -> None:
    own = group(rng)
    width = Width(None, np.arange(4))
    assert inputs_of(Statistics(), own.maps[-1], width) == (None, None)
