"""Files that are no ONNX model, and external data whose place is wrong: one clear line each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_lowrank import InputError
from onnx_lowrank.graph.load import load
from tests.helpers.models import linear_model, uniform


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("m.onnx", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS"),
        ("m.pt", b"PK\x03\x04" + bytes(60), "torch.onnx.export"),
        ("m.pth", b"\x80\x02}q\x00.", "torch.onnx.export"),
        ("m.tflite", bytes(4) + b"TFL3" + bytes(60), "TensorFlow Lite"),
        ("m.ort", bytes(4) + b"ORTM" + bytes(60), "ORT format"),
        ("m.h5", b"\x89HDF\r\n" + bytes(60), "tf2onnx"),
        ("m.onnx", b"<!DOCTYPE html><html></html>", "web page"),
        ("m.safetensors", b"\x10" + bytes(7) + b"{}" + b" " * 50, "weights without a graph"),
    ],
)
def test_what_else_a_file_is(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match="expected an ONNX model, got") as caught:
        load(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("offset", "abc", "expected the offset .* got 'abc'"),
        ("offset", "-5", "expected the offset .* got '-5'"),
        ("length", "1e3", "expected the length .* got '1e3'"),
        ("offset", "99999999", "expected 100016383 bytes"),
        ("location", "", "expected the name of a file"),
        ("location", "a\0b", "expected external data in the model's folder"),
    ],
)
def test_the_place_of_external_data(
    key: str, value: str, said: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    path = tmp_path / "in.onnx"
    onnx.save(
        linear_model(uniform((64, 64), rng)),
        path,
        save_as_external_data=True,
        location="in.bin",
        size_threshold=0,
    )
    model = onnx.load(path, load_external_data=False)
    (tensor,) = model.graph.initializer
    kept = [(entry.key, entry.value) for entry in tensor.external_data if entry.key != key]
    del tensor.external_data[:]
    for name, text in (*kept, (key, value)):
        entry = tensor.external_data.add()
        entry.key, entry.value = name, text
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=said) as caught:
        load(path)
    assert "initializer 'W'" in str(caught.value)
