"""The models of ONNX's own backend tests: a result has their face, and computes what they store."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.numpy_helper
import pytest
from onnx.backend.test.case.node import collect_testcases
from onnx.backend.test.case.test_case import TestCase
from onnxruntime.capi import onnxruntime_pybind11_state as failures

from onnx_lowrank.errors import InputError
from onnx_lowrank.numerics.arrays import Array
from tests.helpers.models import as_proto, factored, run_ort

FOLDERS = sorted(
    path.parent
    for kind in ("pytorch-converted", "pytorch-operator")
    for path in (Path(onnx.__file__).parent / "backend/test/data" / kind).glob("*/model.onnx")
)
# Pairs of full rank compute the same; integers nearly.
WAYS: dict[str, tuple[float, dict[str, Any]]] = {
    "pairs": (1e-3, {"energy": 1.0, "min_gain": -1, "allow_slower": True}),
    "8 bits": (0.05, {"energy": 1.0, "weights": "8", "activations": "int8"}),
    "4 bits": (0.3, {"energy": 1.0, "weights": "4"}),
}
# Operators with a constant that is a linear map.
MAPS = ("Conv", "Einsum", "Gather", "Gemm", "GRU", "LSTM", "MatMul", "RNN")


def stored(folder: Path, stem: str) -> list[Array]:
    files = sorted((folder / "test_data_set_0").glob(f"{stem}_*.pb"))
    return [onnx.numpy_helper.to_array(onnx.load_tensor(str(file))) for file in files]


def face(value: onnx.ValueInfoProto) -> tuple[str, bytes]:
    return value.name, value.type.SerializeToString()


def judged(
    before: onnx.ModelProto, feeds: dict[str, Array], expected: list[Array], way: str
) -> int:
    """How many layers changed, in a result that holds what it has to."""
    limit, options = WAYS[way]
    try:
        result = factored(before, ops=["all"], constant_inputs=True, **options)
    except InputError:
        assert before.opset_import[0].version < 7  # of which none is raised to have integers
        return 0
    after = as_proto(result.model)
    onnx.checker.check_model(after, full_check=True)
    assert [face(value) for value in after.graph.output] == [
        face(value) for value in before.graph.output
    ]
    left = {value.name for value in after.graph.input}
    assert left >= feeds.keys()  # before IR version 4 weights are inputs as well
    assert [face(value) for value in after.graph.input] == [
        face(value) for value in before.graph.input if value.name in left
    ]
    found = run_ort(after, feeds)
    for wanted, got in zip(expected, found.values(), strict=True):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        lost = np.isnan(wanted.astype(float))  # what they compute of negative numbers
        np.testing.assert_array_equal(np.isnan(got.astype(float)), lost)
        exact = np.where(lost, 0.0, wanted.astype(float))
        off = np.linalg.norm(np.where(lost, 0.0, got.astype(float)) - exact)
        assert off <= limit * max(1e-6, float(np.linalg.norm(exact)))
    return sum(row.status == "factored" or row.format is not None for row in result.report.layers)


def runs(model: onnx.ModelProto, feeds: dict[str, Array]) -> bool:
    """Whether ONNX Runtime takes the model at all; it has no kernels for some old operators."""
    try:
        run_ort(model, feeds)
    except (failures.Fail, failures.InvalidGraph, failures.NotImplemented):
        return False
    except RuntimeError:  # it takes no arrays of bfloat16
        if not any(array.dtype == ml_dtypes.bfloat16 for array in feeds.values()):
            raise
        return False
    return True


# They are too small, or too old, for integers to save anything.
@pytest.mark.parametrize(("way", "least"), [("pairs", 5), ("8 bits", 0)])
def test_models_of_folders(way: str, least: int) -> None:
    ran, changed = 0, 0
    for folder in FOLDERS:
        model = onnx.load(folder / "model.onnx")
        weights = {tensor.name for tensor in model.graph.initializer}
        names = [value.name for value in model.graph.input if value.name not in weights]
        feeds = dict(zip(names, stored(folder, "input"), strict=True))
        if runs(model, feeds):
            ran += 1
            changed += judged(model, feeds, stored(folder, "output"), way) > 0
    assert ran >= 80
    assert changed >= least


def of_a_map(model: onnx.ModelProto) -> bool:
    return len(model.graph.node) == 1 and model.graph.node[0].op_type in MAPS


@pytest.fixture(scope="module")
def cases() -> Sequence[TestCase]:
    """Those of single nodes with a linear map; making them calls every case there is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of cases that compute with infinity
        found = collect_testcases(None)
    return [case for case in found if case.model is not None and of_a_map(case.model)]


@pytest.mark.slow
@pytest.mark.parametrize(("way", "least"), [("pairs", 5), ("8 bits", 1), ("4 bits", 1)])
def test_nodes_whose_weights_are_constant(way: str, least: int, cases: Sequence[TestCase]) -> None:
    """Every input but one is made a constant, in turn the last and the first ones."""
    ran, changed = 0, 0
    for case in cases:
        assert case.model is not None
        assert case.data_sets is not None
        given = case.model.graph.input
        inputs, expected = case.data_sets[0]
        known = dict(zip([value.name for value in given], map(np.asarray, inputs), strict=True))
        for fed in (value.name for value in given[:2]):
            model = onnx.ModelProto()
            model.CopyFrom(case.model)
            del model.graph.input[:]
            model.graph.input.extend(value for value in given if value.name == fed)
            model.graph.initializer.extend(
                onnx.numpy_helper.from_array(array, name)
                for name, array in known.items()
                if name != fed
            )
            feeds = {fed: known[fed]}
            if runs(model, feeds):
                ran += 1
                changed += judged(model, feeds, [np.asarray(own) for own in expected], way) > 0
    assert ran >= 60
    assert changed >= least
