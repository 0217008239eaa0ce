"""Models that other tools have quantized: ONNX Runtime's own, and one of weights alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from onnx_lowrank.numerics.arrays import Array, Feed
from tests.helpers.models import parse

__all__ = ["WAYS", "float_model", "images", "quantized"]

WAYS = ("dynamic", "unsigned", "qdq", "operators", "nbits", "nbits8", "shifted")
"""Names of the ways."""


def weight(rng: np.random.Generator, *shape: int) -> Array:
    """Numbers of rank 8 and a little noise, of about unit gain."""
    n, m = shape[0], int(np.prod(shape[1:]))
    own = rng.standard_normal((n, 8)) @ rng.standard_normal((8, m)) / 8**0.5
    own += 0.02 * rng.standard_normal((n, m))
    return np.asarray(own.reshape(shape) / m**0.5, np.float32)


def float_model(rng: np.random.Generator) -> onnx.ModelProto:
    """A convolution behind which a Relu stands, a MatMul and a Gemm."""
    return parse(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[N,16,8,8] x) => (float[N,96] y) {
            [c] a = Conv <pads=[1,1,1,1]> (x, W1, b1)
            r = Relu (a)
            p = GlobalAveragePool (r)
            f = Flatten (p)
            [m] h = MatMul (f, W2)
            t = Tanh (h)
            [g] y = Gemm <transB=1> (t, W3, b3)
        }""",
        {
            "W1": weight(rng, 128, 16, 3, 3),
            "b1": (rng.standard_normal(128) / 4).astype(np.float32),
            "W2": 8 * weight(rng, 128, 160),
            "W3": weight(rng, 96, 160),
            "b3": rng.standard_normal(96).astype(np.float32),
        },
    )


def images(rng: np.random.Generator, count: int = 16) -> list[Feed]:
    """Samples for it."""
    return [{"x": rng.standard_normal((2, 16, 8, 8)).astype(np.float32)} for _ in range(count)]


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: list[Feed]) -> None:
        self._feeds: Iterator[Feed] = iter(feeds)

    def get_next(self) -> Any:
        return next(self._feeds, None)


def quantized(model: onnx.ModelProto, way: str, feeds: list[Feed], folder: Path) -> Path:
    """The file of a model that was quantized in one of `WAYS`."""
    logging.getLogger().disabled = True
    try:
        return _quantized(model, way, feeds, folder)
    finally:
        logging.getLogger().disabled = False


def _quantized(model: onnx.ModelProto, way: str, feeds: list[Feed], folder: Path) -> Path:
    source, path = folder / "float.onnx", folder / f"{way}.onnx"
    onnx.save(model, source)
    if way == "dynamic":
        quantize_dynamic(source, path)
    elif way == "unsigned":
        quantize_dynamic(source, path, per_channel=True, weight_type=QuantType.QUInt8)
    elif way in ("qdq", "operators"):
        kind = QuantFormat.QDQ if way == "qdq" else QuantFormat.QOperator
        quantize_static(source, path, _Reader(feeds), quant_format=kind, per_channel=True)
    elif way == "shifted":
        onnx.save(_shifted(model), path)
    else:
        bits = 8 if way == "nbits8" else 4
        tool = MatMulNBitsQuantizer(
            onnx.load(source), bits=bits, block_size=32, is_symmetric=way == "nbits8"
        )
        tool.process()
        tool.model.save_model_to_file(str(path))
    return path


def _shifted(model: onnx.ModelProto) -> onnx.ModelProto:
    """Each weight as ``Cast(q) · s + m``, where the codes are spread from its least to its largest.

    So tools write them that shrink a file for a download and let a runtime compute in floats.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    made = []
    for tensor in [own for own in graph.initializer if len(own.dims) > 1]:
        values = onnx.numpy_helper.to_array(tensor)
        step = np.float32((values.max() - values.min()) / 255)
        middle = np.float32(values.min() + 128 * step)
        codes = np.clip(np.round((values - middle) / step), -128, 127).astype(np.int8)
        name = tensor.name
        graph.initializer.remove(tensor)
        for suffix, array in (("_quantized", codes), ("_scale", step), ("_middle", middle)):
            own = onnx.numpy_helper.from_array(np.asarray(array), name + suffix)
            graph.initializer.append(own)
        for operator, given, output in (
            ("Cast", [f"{name}_quantized"], f"{name}_cast"),
            ("Mul", [f"{name}_cast", f"{name}_scale"], f"{name}_product"),
            ("Add", [f"{name}_middle", f"{name}_product"], name),
        ):
            more: dict[str, Any] = {"to": onnx.TensorProto.FLOAT} if operator == "Cast" else {}
            made.append(onnx.helper.make_node(operator, given, [output], output, **more))
    nodes = [*made, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return changed
