"""Models that are damaged, malformed or refused: one line each, and nothing is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx.parser
import pytest

from onnx_lowrank import LowRankError, compress
from tests.helpers.commands import (
    QUICK,
    call,
    names,
    one_line,
)
from tests.helpers.models import known_rank, linear_model

PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x10\x00\x00\x00\x10\x08\x06\x00\x00\x00"


def linear(seed: int = 0, m: int = 64, n: int = 48) -> onnx.ModelProto:
    return linear_model(known_rank(m, n, min(m, n, 4), np.random.default_rng(seed)))


def refused(model: onnx.ModelProto | bytes, folder: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """The error that a model gives; nothing else may happen."""
    path = folder / "in.onnx"
    data = model if isinstance(model, bytes) else model.SerializeToString()
    path.write_bytes(data)
    before = names(folder)
    assert call(path, folder / "out.onnx", *QUICK) == 1
    assert names(folder) == before
    assert path.read_bytes() == data
    text = one_line(capfd.readouterr().err)
    assert str(path) in text
    return text


def test_a_missing_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for verb in ([], ["inspect"]):
        args = [*verb, tmp_path / "nosuch.onnx", *([] if verb else [tmp_path / "out.onnx"])]
        assert call(*args) == 1
        assert "nosuch.onnx: no such file" in one_line(capfd.readouterr().err)
    assert not names(tmp_path)


def test_a_folder_as_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert call(tmp_path, tmp_path / "out.onnx") == 1
    assert "folder" in one_line(capfd.readouterr().err)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello, this is text\n", PNG, b'{"json": 1}', b"\x00" * 100, b"\n", b"\x08\x08"],
    ids=["empty", "text", "png", "json", "zeros", "newline", "version only"],
)
def test_a_file_that_is_not_onnx(
    content: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "expected an ONNX model" in refused(content, tmp_path, capfd)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98, 0.999])
def test_a_truncated_file(share: float, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = linear().SerializeToString()
    refused(data[: int(share * len(data))], tmp_path, capfd)


def test_a_file_cut_at_any_byte_is_never_an_internal_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = linear(m=2, n=3).SerializeToString()
    path = tmp_path / "in.onnx"
    for size in range(len(data)):
        path.write_bytes(data[:size])
        code = call(path, tmp_path / "out.onnx", "--dry-run", "--no-simplify")
        text = capfd.readouterr().err
        assert (code, bool(text)) in ((0, False), (1, True)), (size, text)
        if text:
            one_line(text)


def test_weights_shorter_than_their_shape(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = linear()
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]
    assert "expected 12288 bytes" in refused(model, tmp_path, capfd)


def test_typed_weights_shorter_than_their_shape(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = linear()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.float_data.extend([1.0] * 10)
    assert "expected 3072 numbers" in refused(model, tmp_path, capfd)


def with_external_data(folder: Path) -> Path:
    path = folder / "in.onnx"
    onnx.save(linear(), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    return path


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        (lambda data: data.unlink(), "w.bin is missing"),
        (lambda data: os.truncate(data, 1000), "it has 1000"),
        (lambda data: os.truncate(data, 0), "it has 0"),
        (lambda data: (data.unlink(), data.mkdir()), "w.bin"),
    ],
    ids=["missing", "short", "empty", "folder"],
)
def test_external_data_missing_or_too_short(
    change: Callable[[Path], object],
    needle: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = with_external_data(tmp_path)
    change(tmp_path / "w.bin")
    text = refused(path.read_bytes(), tmp_path, capfd)
    assert needle in text
    assert "'W'" in text


@pytest.mark.parametrize("location", ["../w.bin", "/etc/hostname", "a/../../w.bin", ".."])
def test_external_data_outside_the_folder(
    location: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = with_external_data(folder)
    (folder / "w.bin").rename(tmp_path / "w.bin")
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    assert "in the model's folder" in refused(model, folder, capfd)


@pytest.mark.parametrize("key", ["offset", "length"])
@pytest.mark.parametrize("value", ["-1", "abc", "99999999999999999999"])
def test_nonsense_about_external_data(
    key: str, value: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(with_external_data(tmp_path), load_external_data=False)
    entries = model.graph.initializer[0].external_data
    for entry in [entry for entry in entries if entry.key == key]:
        entries.remove(entry)
    entry = entries.add()
    entry.key, entry.value = key, value
    refused(model, tmp_path, capfd)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("perm", "node 't' (Transpose): attribute 'perm': expected type INTS, got INT"),
        ("equation", "node 'e' (Einsum): expected attribute 'equation', got none"),
        ("untyped", "node 't' (Transpose): attribute 'perm': expected type INTS, got UNDEFINED"),
        ("inputs", "node 't' (Transpose): expected at least 1 inputs, got 0"),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_attributes_that_are_not_their_operators(
    change: str, message: str, inside: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    body = '(x) => (y) { t = Transpose <perm = [1, 0]> (x) y = Einsum <equation = "ab->ba"> (t) }'
    head = '<ir_version: 9, opset_import: ["": 17, "own": 1]> '
    whole = body.replace("x", "float[2, 2] x", 1).replace("y", "float[2, 2] y", 1)
    call = "main (float[2, 2] x) => (float[2, 2] y) { y = own.f (x) }"
    function = f'{call} <domain: "own", opset_import: ["": 17]> f {body}'
    model = onnx.parser.parse_model(head + (function if inside else f"main {whole}"))
    if inside:
        del model.functions[0].opset_import[:]  # which says no less of its nodes
    nodes = model.functions[0].node if inside else model.graph.node
    for node, name in zip(nodes, "te", strict=True):
        node.name = name
    if change == "equation":
        del nodes[1].attribute[:]
    elif change == "inputs":
        del nodes[0].input[:]
    elif change == "perm":
        nodes[0].attribute[0].CopyFrom(onnx.helper.make_attribute("perm", 1))
    else:
        nodes[0].attribute[0].ClearField("type")
    assert message in refused(model, tmp_path, capfd)


def test_an_opset_beyond_all_numbers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = linear()
    model.opset_import[0].version = 2**40
    refused(model, tmp_path, capfd)


@pytest.mark.parametrize("size", [2**31, 2**50])
def test_an_input_that_memory_hardly_holds(size: int, tmp_path: Path) -> None:
    model = linear()
    axis = model.graph.input[0].type.tensor_type.shape.dim[0]
    axis.Clear()
    axis.dim_value = size
    onnx.save(model, tmp_path / "in.onnx")
    found = compress(tmp_path / "in.onnx", simplify=False)
    (note,) = [note for note in found.report.notes if "neither checked" in note]
    assert "expected at most 2 GiB to make at random" in note
    assert str(size) in note


def test_an_input_without_an_element_type(tmp_path: Path) -> None:
    model = linear()
    model.graph.input[0].type.tensor_type.ClearField("elem_type")
    onnx.save(model, tmp_path / "in.onnx")
    with pytest.raises(LowRankError, match="x"):
        compress(tmp_path / "in.onnx", simplify=False)


def test_training_info(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = linear()
    model.training_info.add().algorithm.name = "train"
    assert "training_info" in refused(model, tmp_path, capfd)


def dangling_input(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "nosuch"


def dangling_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "nosuch"


def cycle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "y"


def output_twice(model: onnx.ModelProto) -> None:
    model.graph.node.append(model.graph.node[0])


def no_type(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_type = 0


def unknown_type(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_type = 99


def negative_size(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = -64


@pytest.mark.parametrize(
    ("damage", "needle"),
    [
        (dangling_input, "node 'fc' reads 'nosuch', which nothing gives"),
        (dangling_output, "graph 'linear' reads 'nosuch', which nothing gives"),
        (cycle, "cycle"),
        (output_twice, "'y' twice"),
        (no_type, "'W': expected an element type"),
        (unknown_type, "99"),
        (negative_size, "[-64, 48]"),
    ],
)
def test_a_malformed_graph(
    damage: Callable[[onnx.ModelProto], None],
    needle: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = linear()
    damage(model)
    assert needle in refused(model, tmp_path, capfd)
