"""Models for the tests: small, written as ONNX text, with weights of exactly known rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx.checker
import onnx.helper
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
from onnx.reference import ReferenceEvaluator

from onnx_lowrank import Result, compress
from onnx_lowrank.numerics.arrays import Array

__all__ = [
    "ROUNDING",
    "TEXT_TYPES",
    "all_graph_protos",
    "all_node_protos",
    "as_proto",
    "assert_same",
    "assert_valid",
    "distance",
    "factored",
    "known_rank",
    "linear_model",
    "op_types",
    "parameters",
    "parse",
    "run_ort",
    "run_reference",
    "uniform",
    "unsigned",
]

AnyModel = onnx.ModelProto | ir.Model

# Names of element types in ONNX text.
TEXT_TYPES: dict[np.dtype[Any], str] = {
    np.dtype(np.float32): "float",
    np.dtype(np.float64): "double",
    np.dtype(np.float16): "float16",
    np.dtype(ml_dtypes.bfloat16): "bfloat16",
}


def known_rank(
    m: int,
    n: int,
    r: int,
    rng: np.random.Generator,
    dtype: npt.DTypeLike = np.float32,
    *,
    batch: Sequence[int] = (),
    scale: float = 1.0,
) -> Array:
    """A matrix ``[*batch, m, n]`` whose slices are exactly of rank r in the type.

    It is the product of integer factors with entries in -1, 0, 1 and a unit triangle in each, so
    no element exceeds r and nothing is rounded.

    Args:
        m: rows.
        n: columns.
        r: rank, at most ``min(m, n)``.
        rng: randomness.
        dtype: type of the result; bfloat16 holds integers up to 256, so r must not exceed that.
        batch: leading dimensions.
        scale: a power of two to multiply by.
    """
    slices = []
    for _ in range(int(np.prod(batch, dtype=int))):
        left = rng.integers(-1, 2, (m, r))
        right = rng.integers(-1, 2, (r, n))
        left[:r] = np.tril(left[:r], -1) + np.eye(r, dtype=int)
        right[:, :r] = np.triu(right[:, :r], 1) + np.eye(r, dtype=int)
        slices.append(rng.permutation(left) @ rng.permutation(right, axis=1))
    exact = np.reshape(slices, (*batch, m, n)) * scale
    array = exact.astype(dtype)
    assert (array.astype(np.float64) == exact).all()
    return array


def uniform(
    shape: Sequence[int], rng: np.random.Generator, dtype: npt.DTypeLike = np.float32
) -> Array:
    """Numbers between -1 and 1."""
    return rng.uniform(-1, 1, tuple(shape)).astype(dtype)


def parse(text: str, weights: Mapping[str, Array] | None = None) -> onnx.ModelProto:
    """A model from ONNX text, with these initializers added to the main graph."""
    model = onnx.parser.parse_model(text)
    for name, array in (weights or {}).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


def linear_model(
    weight: Array,
    *,
    bias: Array | None = None,
    rows: int | str = "N",
    opset: int = 17,
    ir_version: int = 8,
    name: str = "fc",
) -> onnx.ModelProto:
    """``y[rows, n] = x[rows, m] @ W[m, n]``, and ``+ b`` with a bias.

    The node is called ``name``, its weight "W", its input "x" and the model's output "y".
    """
    m, n = weight.shape
    kind = TEXT_TYPES[weight.dtype]
    product = "y" if bias is None else "product"
    add = "" if bias is None else "y = Add(product, b)"
    model = parse(
        f"""<ir_version: {ir_version}, opset_import: ["": {opset}]>
        linear ({kind}[{rows}, {m}] x) => ({kind}[{rows}, {n}] y) {{
            {product} = MatMul(x, W)
            {add}
        }}""",
        {"W": weight} if bias is None else {"W": weight, "b": bias},
    )
    model.graph.node[0].name = name
    return model


def factored(model: AnyModel | Path, **options: Any) -> Result:
    """`compress` without simplification and timing, and without the check unless asked for."""
    return compress(model, **{"simplify": False, "check": False, "bench": False, **options})


def as_proto(model: AnyModel) -> onnx.ModelProto:
    """The model as a protobuf."""
    return ir.to_proto(model) if isinstance(model, ir.Model) else model


def run_ort(
    model: AnyModel, feeds: Mapping[str, Array], *, optimize: bool = True
) -> dict[str, Array]:
    """The outputs by name in ONNX Runtime on the CPU."""
    options = ort.SessionOptions()
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(
        as_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def run_reference(model: AnyModel, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs by name in ONNX's own reference implementation."""
    evaluator = ReferenceEvaluator(as_proto(model))
    return dict(zip(evaluator.output_names, evaluator.run(None, dict(feeds)), strict=True))


def op_types(model: AnyModel) -> list[str]:
    """The operators of the main graph in order, without Constant nodes."""
    return [node.op_type for node in as_proto(model).graph.node if node.op_type != "Constant"]


def all_graph_protos(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph and every subgraph of it and of the functions."""

    def below(nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
        for node in nodes:
            for attribute in node.attribute:
                for graph in (
                    *([attribute.g] if attribute.HasField("g") else []),
                    *attribute.graphs,
                ):
                    yield graph
                    yield from below(graph.node)

    yield model.graph
    yield from below(model.graph.node)
    for function in model.functions:
        yield from below(function.node)


def all_node_protos(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node of the model, wherever it is."""
    for graph in all_graph_protos(model):
        yield from graph.node
    for function in model.functions:
        yield from function.node


def parameters(model: AnyModel, *, integers: bool = False) -> int:
    """Elements of all initializers and Constant tensors, counted without the package.

    Vectors of int64, which are shapes and axes, count only if asked for.
    """
    proto = as_proto(model)
    held = [tensor for graph in all_graph_protos(proto) for tensor in graph.initializer]
    held += [
        attribute.t
        for node in all_node_protos(proto)
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.HasField("t")
    ]
    return sum(
        int(np.prod(tensor.dims, dtype=int))
        for tensor in held
        if integers or tensor.data_type != onnx.TensorProto.INT64
    )


# Relative L2 distance that rounding makes where a weight's rank is exactly that of its pair.
ROUNDING: dict[np.dtype[Any], float] = {
    np.dtype(np.float32): 2e-6,
    np.dtype(np.float64): 1e-14,
    np.dtype(np.float16): 4e-3,
    np.dtype(ml_dtypes.bfloat16): 3e-2,
}


def distance(after: Array, before: Array) -> float:
    """``‖after − before‖ / ‖before‖``; both must have one shape and type."""
    assert after.shape == before.shape
    assert after.dtype == before.dtype
    exact = before.astype(np.float64).ravel()
    return float(np.linalg.norm(after.astype(np.float64).ravel() - exact) / np.linalg.norm(exact))


def assert_valid(model: AnyModel) -> None:
    """It passes onnx.checker, and every value between its nodes has a type and a shape."""
    proto = as_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    known = {value.name: value.type.tensor_type for value in proto.graph.value_info}
    known |= {value.name: value.type.tensor_type for value in proto.graph.output}
    for node in proto.graph.node:
        for name in node.output:
            assert name in known, f"{name} has no value_info"
            assert known[name].elem_type, f"{name} has no type"
            assert known[name].HasField("shape"), f"{name} has no shape"


def assert_same(
    before: AnyModel,
    after: AnyModel,
    feeds: Mapping[str, Array],
    *,
    within: float | None = None,
    in_ort: bool = True,
    in_reference: bool = True,
) -> None:
    """Both models give the same outputs, in ONNX Runtime and in onnx.reference.

    Args:
        before: the original.
        after: the result.
        feeds: inputs by name.
        within: relative L2 distance; default: what rounding makes in the output's type.
        in_ort: judge in ONNX Runtime.
        in_reference: judge in onnx.reference.
    """
    for run, wanted in ((run_ort, in_ort), (run_reference, in_reference)):
        if not wanted:
            continue
        expected, found = run(before, feeds), run(after, feeds)
        assert list(found) == list(expected)
        for name, array in expected.items():
            assert array.astype(np.float64).any(), f"{name} is all zeros: nothing is compared"
            off = distance(found[name], array)
            limit = ROUNDING[array.dtype] if within is None else within
            assert off <= limit, f"{name} is off by {off:.3g} in {run.__name__}"


def unsigned(model: AnyModel) -> onnx.ModelProto:
    """A copy of a model without what it says of the run that made it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(as_proto(model))
    kept = [entry for entry in copy.metadata_props if not entry.key.startswith("onnx_lowrank.")]
    del copy.metadata_props[:]
    copy.metadata_props.extend(kept)
    return copy
