"""Moments that are saved, and loaded in another run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank import InputError, Result, UsageError
from onnx_lowrank.fitting.statistics_file import load
from onnx_lowrank.graph.fingerprint import fingerprint
from onnx_lowrank.numerics.arrays import Array
from tests.helpers.calibrated import (
    HEAD,
    narrow,
    texts,
)
from tests.helpers.models import factored, parse, uniform


def initializers(result: Result) -> Iterator[tuple[str, Array]]:
    for name, value in result.model.graph.initializers.items():
        assert value.const_value is not None
        yield name, value.const_value.numpy()


def test_loaded_statistics_give_the_same(
    shared: onnx.ModelProto,
    rng: np.random.Generator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "moments.npz"
    feeds = texts(rng, 12)
    first = factored(shared, rank=2, calibration=feeds, save_stats=path)
    assert [item.name for item in tmp_path.iterdir()] == ["moments.npz"]

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("samples were run")

    monkeypatch.setattr("onnx_lowrank.compression.calibrated.gather", refuse)
    second = factored(shared, rank=2, load_stats=path)
    for (name, one), (other, two) in itertools.zip_longest(
        initializers(first), initializers(second)
    ):
        assert name == other
        np.testing.assert_array_equal(one, two)
    assert second.report.layers == first.report.layers
    assert first.report.calibration == second.report.calibration
    assert any("moments of 9 samples" in note for note in second.report.notes)
    third = factored(shared, energy=0.5, rank_multiple=1, load_stats=path)
    (*_, layer) = [layer for layer in third.report.layers if layer.status == "factored"]
    assert layer.energy_of == "output"


def test_statistics_of_tokens_and_slices(rng: np.random.Generator, tmp_path: Path) -> None:
    proto = parse(
        f"{HEAD} g (int64[3, 4] ids) => (float[3, 4, 8] y) {{"
        "x = Gather(E, ids) y = MatMul(x, W) }",
        {"E": uniform((20, 8), rng), "W": uniform((3, 8, 8), rng)},
    )
    feeds = [{"ids": rng.integers(0, 20, (3, 4))} for _ in range(6)]
    options: dict[str, Any] = {"rank": 2, "ops": ("all",)}
    path = tmp_path / "moments.npz"
    first = factored(proto, calibration=feeds, save_stats=path, **options)
    second = factored(proto, load_stats=path, **options)
    assert [layer.slices for layer in first.report.layers] == [1, 3]
    assert dict(initializers(first)).keys() == dict(initializers(second)).keys()
    for (_, one), (_, two) in zip(initializers(first), initializers(second), strict=True):
        np.testing.assert_array_equal(one, two)


def test_statistics_of_another_model(
    linear: onnx.ModelProto, rng: np.random.Generator, tmp_path: Path
) -> None:
    path = tmp_path / "moments.npz"
    onnx.save(linear, tmp_path / "one.onnx")
    factored(tmp_path / "one.onnx", rank=3, calibration=narrow(rng, 4), save_stats=path)
    other = onnx.ModelProto()
    other.CopyFrom(linear)
    trained = np.array(onnx.numpy_helper.to_array(linear.graph.initializer[0])) * 1.5
    other.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(trained, "W"))
    onnx.save(other, tmp_path / "two.onnx")
    with pytest.raises(InputError, match=r"belongs to another model, .*one\.onnx.*two\.onnx"):
        factored(tmp_path / "two.onnx", rank=3, load_stats=path)


SIGNIFICANT = """<ir_version: 8, opset_import: ["" : 17]> g (float[n, 32] x) => (float[n, 8] y) {
    h = LeakyRelu <alpha = 0.5> (x)
    k = Identity(h)
    y = MatMul(k, W)
}"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("LeakyRelu", "Elu"),
        ("alpha = 0.5", "alpha = 0.25"),
        ("Identity(h)", "Identity(x)"),
        ('"" : 17', '"" : 16'),
    ],
)
def test_the_fingerprint_is_of_the_graph_too(old: str, new: str) -> None:
    """The same weights after another operator, attribute, topology or opset are another model."""
    weights = {"W": uniform((32, 8), np.random.default_rng(0))}
    one, two = (
        ir.from_proto(parse(text, weights)) for text in (SIGNIFICANT, SIGNIFICANT.replace(old, new))
    )
    assert fingerprint(one) != fingerprint(two)
    one.graph[0].name, one.graph[0].doc_string = "renamed", "described"
    assert fingerprint(one) == fingerprint(ir.from_proto(parse(SIGNIFICANT, weights)))


def test_the_fingerprint_reads_subgraphs_and_functions() -> None:
    text = """<ir_version: 10, opset_import: ["" : 18, "own" : 1]>
    g (float[n] x, bool c) => (float[n] y) {
        h = own.f(x)
        y = If(c) <then_branch = t () => (float[n] a) { a = Neg(h) },
                   else_branch = e () => (float[n] b) { b = Abs(h) }>
    }
    <domain: "own", opset_import: ["" : 18]> f (u) => (v) { v = Exp(u) }"""
    models = [text, text.replace("Neg", "Ceil"), text.replace("Exp", "Log")]
    assert len({fingerprint(ir.from_proto(onnx.parser.parse_model(t))) for t in models}) == 3


def test_statistics_of_the_same_weights_in_another_graph(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    weights = {"W": uniform((32, 8), rng)}
    for name in ("Relu", "Tanh"):
        text = SIGNIFICANT.replace("LeakyRelu <alpha = 0.5>", name)
        onnx.save(parse(text, weights), tmp_path / f"{name}.onnx")
    path = tmp_path / "moments.npz"
    feeds = [{"x": uniform((4, 32), rng)} for _ in range(4)]
    factored(tmp_path / "Tanh.onnx", rank=3, calibration=feeds, save_stats=path)
    with pytest.raises(InputError, match=r"belongs to another model, .*Tanh\.onnx: its operators"):
        factored(tmp_path / "Relu.onnx", rank=3, load_stats=path)


def test_layers_that_the_file_does_not_hold(
    shared: onnx.ModelProto, rng: np.random.Generator, tmp_path: Path
) -> None:
    for index, node in enumerate(shared.graph.node):
        node.name = f"{node.op_type}-{index}"
    path = tmp_path / "moments.npz"
    factored(shared, rank=2, include=("MatMul*",), calibration=texts(rng, 12), save_stats=path)
    made = factored(shared, rank=2, load_stats=path).report.calibration
    assert made is not None
    assert list(made.missing) == ["Gemm-6"]
    assert "do not hold" in made.missing["Gemm-6"]


def test_files_that_are_no_statistics(linear: onnx.ModelProto, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        factored(linear, rank=3, load_stats=tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("text")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.savez(tmp_path / "objects.npz", header=np.array([{}], object))
    for name in ("text", "other", "objects"):
        with pytest.raises(InputError, match="expected statistics that save_stats=… wrote"):
            factored(linear, rank=3, load_stats=tmp_path / f"{name}.npz")


def test_where_statistics_cannot_go(
    linear: onnx.ModelProto, rng: np.random.Generator, tmp_path: Path
) -> None:
    onnx.save(linear, tmp_path / "one.onnx")
    options: dict[str, Any] = {"rank": 3, "calibration": narrow(rng, 4)}
    for path, message in (
        (tmp_path / "no" / "moments.npz", "does not exist"),
        (tmp_path, "cannot be written"),
        (tmp_path / "one.onnx", "would overwrite the input"),
    ):
        with pytest.raises(InputError, match=message):
            factored(tmp_path / "one.onnx", save_stats=path, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"load_stats": "a", "save_stats": "b", "data": "c"},
        {"load_stats": "a", "calibration": "b"},
        {"load_stats": "a", "calibrate": False},
        {"save_stats": "a"},
        {"save_stats": "a", "data": "b", "calibrate": False},
    ],
)
def test_options_that_exclude_each_other(
    linear: onnx.ModelProto, options: Mapping[str, Any]
) -> None:
    with pytest.raises(UsageError, match=r"(load|save)_stats=…"):
        factored(linear, rank=3, **options)


def test_the_fingerprint_knows_names_shapes_and_elements(linear: onnx.ModelProto) -> None:
    def of(change: Any) -> str:
        proto = onnx.ModelProto()
        proto.CopyFrom(linear)
        array = np.array(onnx.numpy_helper.to_array(proto.graph.initializer[0]))
        name, array = change("W", array)
        proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(array, name))
        return fingerprint(ir.from_proto(proto))

    same = of(lambda name, array: (name, array))
    assert same == fingerprint(ir.from_proto(linear))
    others = [
        of(lambda name, array: ("V", array)),
        of(lambda name, array: (name, array.T)),
        of(lambda name, array: (name, array.astype(np.float64))),
        of(lambda name, array: (name, array + 1)),
    ]
    assert len({same, *others}) == 5


def test_fisher_information_is_saved_too(
    shared: onnx.ModelProto,
    rng: np.random.Generator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, feeds = tmp_path / "moments.npz", texts(rng, 12)
    first = factored(shared, rank=2, calibration=feeds, fisher=True, save_stats=path)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("samples were run")

    monkeypatch.setattr("onnx_lowrank.compression.calibrated.felt", refuse)
    second = factored(shared, rank=2, fisher=True, load_stats=path)
    pairs = itertools.zip_longest(initializers(first), initializers(second))
    for (name, one), (other, two) in pairs:
        assert name == other
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)
    assert {layer.energy_of for layer in second.report.layers} >= {"fisher"}
    third = factored(shared, rank=2, load_stats=path)
    assert {layer.energy_of for layer in third.report.layers} == {"output"}


def test_statistics_without_fisher_information(
    shared: onnx.ModelProto, rng: np.random.Generator, tmp_path: Path
) -> None:
    path = tmp_path / "moments.npz"
    factored(shared, rank=2, calibration=texts(rng, 12), save_stats=path)
    with pytest.raises(InputError, match="holds no Fisher information; expected what save_stats=…"):
        factored(shared, rank=2, fisher=True, load_stats=path)


def test_the_damage_of_the_layers_is_not_measured_again(
    shared: onnx.ModelProto,
    rng: np.random.Generator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "moments.npz"
    settings = {"rank_multiple": 1, "min_gain": 0.0, "check": True, "bench": False}
    feeds = texts(rng, 12)
    first = factored(shared, keep=0.9, data=feeds, save_stats=path, **settings)
    assert first.report.goal is not None

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a layer was measured")

    curves = load(path, ir.from_proto(shared), "model").curves
    assert curves
    for curve in curves.values():
        assert (np.diff(curve.tails) <= 0.0).all()
    monkeypatch.setattr("onnx_lowrank.ranks.damage.lost_energies", refuse)
    second = factored(shared, keep=0.9, load_stats=path, **settings)
    assert second.report.goal is not None
    assert second.report.goal.summed_damage == pytest.approx(first.report.goal.summed_damage)
    ranks = [layer.rank for layer in first.report.layers]
    assert [layer.rank for layer in second.report.layers] == ranks
    # With factors that are fitted to something else it is another damage.
    monkeypatch.undo()
    assert factored(shared, keep=0.9, load_stats=path, fisher=True, **settings).report.goal
