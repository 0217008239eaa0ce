"""Every form beyond MatMul and Gemm: the nodes that it becomes, and the same outputs.

The weights are exactly of rank 4 as their form reads them, so a pair of rank 4 is the same map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.helper
import onnx_ir as ir
import pytest

from onnx_lowrank import Result
from tests.models import (
    as_proto,
    assert_same,
    assert_valid,
    factored,
    known_rank,
    op_types,
    parameters,
    parse,
    uniform,
)

Array = npt.NDArray[Any]
Shape = tuple[int | str, ...]

RANK = 4
OPSETS = '["": 17, "com.microsoft": 1]'


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def declared(values: Mapping[str, Shape | str]) -> str:
    """Inputs or outputs as ONNX text: a shape of floats, or the type and shape written out."""
    return ", ".join(
        f"{shape if isinstance(shape, str) else 'float' + str(list(shape)).replace(chr(39), '')}"
        f" {name}"
        for name, shape in values.items()
    )


@dataclass(frozen=True)
class Case:
    """A graph around one node with a constant W.

    ``macs`` are those of the whole graph as it is, counted by hand.
    """

    node: str
    x: Shape
    y: Shape
    weight: Callable[[np.random.Generator], Array]
    ops: tuple[str, ...]
    form: str
    shape: tuple[int, int]
    macs: int
    slices: int = 1
    more: dict[str, tuple[int, ...]] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    feeds: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, Shape | str] = field(default_factory=dict)
    arguments: tuple[str, ...] | None = None  # ops= of compress
    reference: bool = True
    opsets: str = OPSETS
    within: float | None = None

    def model(self, rng: np.random.Generator) -> onnx.ModelProto:
        return parse(
            f"""<ir_version: 8, opset_import: {self.opsets}>
            one ({declared({"x": self.x, **self.inputs})})
            => ({declared({"y": self.y, **self.outputs})}) {{ {self.node} }}""",
            {
                "W": self.weight(rng),
                **{name: uniform(shape, rng) for name, shape in self.more.items()},
            },
        )

    def fed(self, rng: np.random.Generator) -> dict[str, Array]:
        sizes = [3 if isinstance(size, str) else size for size in self.x]
        return {"x": uniform(sizes, rng), **self.feeds}


def check(case: Case, rng: np.random.Generator) -> onnx.ModelProto:
    """Factor it at its rank and compare everything that can be; the result."""
    model = case.model(rng)
    assert np.prod(model.graph.initializer[0].dims) == case.slices * math.prod(case.shape)
    dims = {axis: 3 for axis in case.x if isinstance(axis, str)}
    options = {"check": True, "samples": 1, "dims": dims}
    result = factored(model, rank=RANK, ops=case.arguments, **options)
    (layer,) = result.report.layers
    assert (layer.status, layer.form, layer.rank) == ("factored", case.form, RANK), layer.reason
    assert (layer.slices, layer.shape) == (case.slices, case.shape)
    pair = case.slices * RANK * sum(case.shape)
    assert (layer.parameters_before, layer.parameters_after) == (
        case.slices * math.prod(case.shape),
        pair,
    )
    after = as_proto(result.model)
    assert tuple(op_types(after)) == case.ops
    assert parameters(model) - parameters(after) == layer.parameters_before - pair
    assert "W" not in {tensor.name for tensor in after.graph.initializer}
    assert after.graph.node[-1].output == model.graph.node[-1].output
    assert after.graph.node[-1].name == model.graph.node[-1].name
    assert_valid(after)
    feeds = case.fed(rng)
    assert_same(model, after, feeds, in_reference=case.reference, within=case.within)
    totals = result.report.totals
    assert totals.macs_before == case.macs
    # The pair's cost is a form's own sum; counted on the result it has to be the same.
    again = factored(after, rank=RANK, exclude=["*"], ops=("all",), **options)
    assert again.report.totals.macs_before == totals.macs_after
    return after


def node_protos(model: onnx.ModelProto | ir.Model) -> list[onnx.NodeProto]:
    """The nodes of the main graph; a domain may be left out or empty, which is the same."""
    proto = onnx.ModelProto()
    proto.CopyFrom(as_proto(model))
    for node in proto.graph.node:
        if not node.domain:
            node.ClearField("domain")
    return list(proto.graph.node)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


# --- Einsum

SIZES = {"b": 3, "s": 5, "d": 16, "h": 4, "k": 6, "f": 12, "e": 3, "D": 16, "F": 12, "c": 4}


def lettered(w: str, batch: str, contracted: str, new: str) -> Callable[..., Array]:
    """A constant with these letters whose matrices [batch, contracted, new] are of rank 4."""

    def make(rng: np.random.Generator) -> Array:
        m, n = (math.prod(SIZES[c] for c in part) for part in (contracted, new))
        stack = known_rank(m, n, RANK, rng, batch=[SIZES[c] for c in batch])
        order = batch + contracted + new
        array = stack.reshape([SIZES[c] for c in order])
        return np.ascontiguousarray(array.transpose([order.index(c) for c in w]))

    return make


def einsum(
    equation: str,
    *,
    parts: tuple[str, str, str],
    plain: bool,
    x: str | None = None,
    y: str | None = None,
    macs: int,
    reference: bool = True,
) -> Case:
    """A case; ``x`` and ``y`` are letters of the shapes where the equation has dots."""
    left, _, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    w = next(i for i, term in enumerate(terms) if sorted(term) == sorted("".join(parts)))
    x_letters = x or terms[1 - w]
    batch, contracted, new = parts
    return Case(
        f'y = Einsum <equation = "{equation}"> ({"W, x" if w == 0 else "x, W"})',
        tuple(SIZES[c] for c in x_letters),
        tuple(SIZES[c] for c in y or result),
        lettered(terms[w], batch, contracted, new),
        ("MatMul" if plain else "Einsum", "Einsum"),
        "einsum",
        (math.prod(SIZES[c] for c in contracted), math.prod(SIZES[c] for c in new)),
        macs,
        slices=math.prod(SIZES[c] for c in batch),
        reference=reference,
    )


EINSUM = {
    "heads": einsum("bsd,dhk->bshk", parts=("", "d", "hk"), plain=True, macs=15 * 16 * 24),
    "heads, other order": einsum("bsd,hdk->bhsk", parts=("", "d", "hk"), plain=True, macs=5760),
    "dots": einsum(
        "...d,df->...f", parts=("", "d", "f"), plain=True, x="bsd", y="bsf", macs=15 * 16 * 12
    ),
    "dots, weight first": einsum(
        "df,...d->...f", parts=("", "d", "f"), plain=True, x="bsd", y="bsf", macs=2880
    ),
    "dots that stand for nothing": einsum(
        "...d,df->...f", parts=("", "d", "f"), plain=True, x="d", y="f", macs=192
    ),
    "dots and a letter that is not last": einsum(
        "d...,df->...f", parts=("", "d", "f"), plain=False, x="dbs", y="bsf", macs=2880
    ),
    "dots in the middle": einsum(
        "b...dk,df->b...fk", parts=("", "d", "f"), plain=False, x="bsdk", y="bsfk", macs=17280
    ),
    "not last": einsum("bds,df->bfs", parts=("", "d", "f"), plain=False, macs=2880),
    "not last, weight first": einsum("fd,bds->bfs", parts=("", "d", "f"), plain=False, macs=2880),
    "two contracted": einsum("bshk,hkd->bsd", parts=("", "hk", "d"), plain=False, macs=5760),
    "two contracted, apart": einsum("hbks,dkh->sdb", parts=("", "kh", "d"), plain=False, macs=5760),
    "batch": einsum("ebd,edf->ebf", parts=("e", "d", "f"), plain=False, macs=9 * 16 * 12),
    "batch, transposed": einsum("bed,fde->bfe", parts=("e", "d", "f"), plain=False, macs=1728),
    "two batch letters": einsum(
        "ehbd,hdfe->ebhf", parts=("he", "d", "f"), plain=False, macs=36 * 192
    ),
    "batch and two new": einsum("ebd,edhk->ebhk", parts=("e", "d", "hk"), plain=False, macs=3456),
    "implicit": einsum("bsd,df", parts=("", "d", "f"), plain=True, y="bfs", macs=2880),
    "implicit, not last": einsum("dbs,df", parts=("", "d", "f"), plain=False, y="bfs", macs=2880),
    "implicit, dots": einsum(
        "d...,df", parts=("", "d", "f"), plain=False, x="dbs", y="bsf", macs=2880
    ),
    "upper case": einsum("bsD,DF->bsF", parts=("", "D", "F"), plain=True, macs=2880),
    "upper and lower case": einsum("bDd,DF->bdF", parts=("", "D", "F"), plain=False, macs=9216),
    "spaces": einsum(
        " b s d , d h k -> b s h k ",
        parts=("", "d", "hk"),
        plain=True,
        macs=5760,
        reference=False,  # numpy refuses the space in front
    ),
    "spaces, two Einsums": einsum(
        "b d s, d f -> b f s", parts=("", "d", "f"), plain=False, macs=2880
    ),
    "the letter of the rank is taken": einsum(
        "ads,df->afs".replace("a", "b"), parts=("", "d", "f"), plain=False, macs=2880
    ),
}


@pytest.mark.parametrize("name", EINSUM)
def test_einsum(name: str, rng: np.random.Generator) -> None:
    case = EINSUM[name]
    before = case.model(rng)
    after = check(case, rng)
    if case.ops[0] == "MatMul":
        assert after.graph.node[-1].attribute == before.graph.node[-1].attribute


REFUSED_EINSUM = {
    "a diagonal of the weight": ("bd,ddf->bf", (3, 16), (16, 16, 12), (3, 12), "diagonal"),
    "a diagonal of the activation": ("dd,df->f", (16, 16), (16, 12), (12,), "diagonal"),
    "a sum over the activation": ("bsd,df->bf", (3, 5, 16), (16, 12), (3, 12), "sums an axis"),
    "a sum over the weight": ("bd,dfk->bf", (3, 16), (16, 12, 6), (3, 12), "sums an axis"),
    "nothing contracted": ("bd,df->bdf", (3, 16), (16, 12), (3, 16, 12), "no matrix product"),
    "nothing new": ("bd,d->b", (3, 16), (16,), (3,), "no matrix product"),
    "dots in the weight": ("bd,d...->b...", (3, 16), (16, 12), (3, 12), "dots in its constant"),
}


@pytest.mark.parametrize("name", REFUSED_EINSUM)
def test_einsum_refused(name: str, rng: np.random.Generator) -> None:
    equation, x, shape, y, reason = REFUSED_EINSUM[name]
    model = parse(
        f"""<ir_version: 8, opset_import: {OPSETS}>
        one ({declared({"x": x})}) => ({declared({"y": y})})
        {{ y = Einsum <equation = "{equation}"> (x, W) }}""",
        {"W": uniform(shape, rng)},
    )
    result = factored(model, rank=1)
    (layer,) = result.report.layers
    assert (layer.status, layer.form, layer.off) == ("dense", "einsum", False)
    assert reason in layer.reason
    assert equation in layer.reason
    assert op_types(result.model) == ["Einsum"]


def test_einsum_of_three_is_refused(rng: np.random.Generator) -> None:
    model = parse(
        f"""<ir_version: 8, opset_import: {OPSETS}>
        one (float[3, 16] x, float[12, 5] z) => (float[3, 5] y)
        {{ y = Einsum <equation = "bd,df,fs->bs"> (x, W, z) }}""",
        {"W": known_rank(16, 12, RANK, rng)},
    )
    (layer,) = factored(model, rank=1).report.layers
    assert "has 3 operands; two are handled" in layer.reason


def test_einsum_with_too_few_letters_for_its_constant(rng: np.random.Generator) -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        one (float[3, 16] x) => (float y) { y = Einsum <equation = "bd,df->bf"> (x, W) }""",
        {"W": uniform((16, 12, 2), rng)},
    )
    (layer,) = factored(model, rank=1).report.layers
    assert "'df' for a constant of 3 axes" in layer.reason


def test_einsum_with_an_axis_that_is_stretched(rng: np.random.Generator) -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        one (float[1, 5, 16] x) => (float[3, 5, 12] y)
        { y = Einsum <equation = "ebd,edf->ebf"> (x, W) }""",
        {"W": known_rank(16, 12, RANK, rng, batch=(3,))},
    )
    after = as_proto(factored(model, rank=RANK).model)
    assert op_types(after) == ["Einsum", "Einsum"]
    onnx.checker.check_model(after)
    assert_same(model, after, {"x": uniform((1, 5, 16), rng)})


# --- Conv


def kernel(n: int, channels: int, *sizes: int) -> Callable[[np.random.Generator], Array]:
    """W[n, channels, sizes…] whose matrix [channels·sizes, n] is of rank 4."""

    def make(rng: np.random.Generator) -> Array:
        array = known_rank(channels * math.prod(sizes), n, RANK, rng).T
        return np.ascontiguousarray(array.reshape(n, channels, *sizes))

    return make


def spatial(n: int, channels: int, height: int, width: int) -> Callable[..., Array]:
    """W[n, channels, height, width] whose matrix [channels·height, width·n] is of rank 4."""

    def make(rng: np.random.Generator) -> Array:
        array = known_rank(channels * height, width * n, RANK, rng)
        array = array.reshape(channels, height, width, n).transpose(3, 0, 1, 2)
        return np.ascontiguousarray(array)

    return make


def conv(
    settings: str,
    x: Shape,
    y: tuple[int, ...],
    sizes: tuple[int, ...],
    *,
    form: str = "conv",
    bias: bool = True,
    reference: bool = True,
) -> Case:
    channels, n = x[1], y[1]
    assert isinstance(channels, int)
    if form == "conv":
        weight, shape = kernel(n, channels, *sizes), (channels * math.prod(sizes), n)
    else:
        height, width = sizes
        weight, shape = spatial(n, channels, height, width), (channels * height, width * n)
    return Case(
        f"y = Conv {f'<{settings}>' if settings else ''} (x, W{', b' if bias else ''})",
        x,
        y,
        weight,
        ("Conv", "Conv"),
        form,
        shape,
        math.prod(y) * channels * math.prod(sizes),
        more={"b": (n,)} if bias else {},
        arguments=("conv",),
        reference=reference,
    )


CONV = {
    "1×1": conv("", (2, 16, 5, 6), (2, 12, 5, 6), (1, 1)),
    "1×1, no bias": conv("", (2, 16, 5, 6), (2, 12, 5, 6), (1, 1), bias=False),
    "1×1, stride": conv("strides = [2, 3]", (1, 16, 5, 7), (1, 12, 3, 3), (1, 1)),
    "1×1, pads": conv("pads = [1, 0, 2, 1]", (1, 16, 5, 6), (1, 12, 8, 7), (1, 1)),
    "1×1, written out": conv(
        'kernel_shape = [1, 1], group = 1, auto_pad = "NOTSET", dilations = [1, 1]',
        (1, 16, 5, 6),
        (1, 12, 5, 6),
        (1, 1),
    ),
    "1-D": conv("pads = [1, 2], strides = [2]", (2, 16, 9), (2, 12, 5), (3,)),
    "1-D, dilated": conv("dilations = [3]", (2, 16, 9), (2, 12, 3), (3,)),
    "3-D": conv("pads = [1, 0, 0, 0, 1, 0]", (1, 16, 3, 4, 4), (1, 12, 2, 3, 4), (3, 3, 1)),
    "k×1": conv("", (1, 16, 5, 6), (1, 12, 3, 6), (3, 1)),
    "1×k": conv("", (1, 16, 5, 6), (1, 12, 5, 4), (1, 3)),
    # The channels' pair of 3×3 has RANK·(9·4 + 64) numbers, the spatial one RANK·(12 + 192).
    "3×3": conv("", (1, 4, 7, 8), (1, 64, 5, 6), (3, 3)),
    "3×3, pads": conv("pads = [0, 2, 1, 1]", (1, 4, 7, 8), (1, 64, 6, 9), (3, 3)),
    "3×3, strides": conv("strides = [2, 1]", (1, 4, 7, 8), (1, 64, 3, 6), (3, 3)),
    "3×3, dilations": conv("dilations = [2, 3]", (1, 4, 7, 8), (1, 64, 3, 2), (3, 3)),
    "3×3, same, upper": conv(
        'auto_pad = "SAME_UPPER", strides = [2, 2]', (1, 4, 7, 8), (1, 64, 4, 4), (3, 3)
    ),
    "3×3, same, lower": conv(
        'auto_pad = "SAME_LOWER", strides = [2, 2]', (1, 4, 7, 8), (1, 64, 4, 4), (3, 3)
    ),
    "2×4, same, lower": conv('auto_pad = "SAME_LOWER"', (1, 4, 7, 8), (1, 64, 7, 8), (2, 4)),
    "3×3, valid": conv('auto_pad = "VALID"', (1, 4, 7, 8), (1, 64, 5, 6), (3, 3)),
}
# More channels than outputs, and tall kernels: the spatial pair has fewer numbers.
SPATIAL = {
    "plain": conv("", (1, 16, 9, 8), (1, 6, 3, 7), (7, 2)),
    "no bias": conv("", (1, 16, 9, 8), (1, 6, 3, 7), (7, 2), bias=False),
    "pads": conv("pads = [3, 0, 1, 1]", (1, 16, 9, 8), (1, 6, 7, 8), (7, 2)),
    "strides": conv("strides = [2, 3]", (2, 16, 9, 8), (2, 6, 2, 3), (7, 2)),
    "pads, strides, dilations": conv(
        "pads = [4, 1, 3, 2], strides = [3, 2], dilations = [2, 3]",
        (1, 16, 9, 8),
        (1, 6, 2, 4),
        (7, 2),
    ),
    "same, upper": conv(
        'auto_pad = "SAME_UPPER", strides = [2, 3]', (1, 16, 9, 8), (1, 6, 5, 3), (7, 2)
    ),
    "same, lower": conv(
        'auto_pad = "SAME_LOWER", strides = [2, 1]', (1, 16, 9, 8), (1, 6, 5, 8), (7, 2)
    ),
    "valid": conv('auto_pad = "VALID", strides = [1, 2]', (1, 16, 9, 8), (1, 6, 3, 4), (7, 2)),
}
SPATIAL = {
    name: Case(
        **{
            **vars(case),
            "weight": spatial(6, 16, 7, 2),
            "form": "conv-spatial",
            "shape": (16 * 7, 2 * 6),
        }
    )
    for name, case in SPATIAL.items()
}


@pytest.mark.parametrize("name", CONV)
def test_conv(name: str, rng: np.random.Generator) -> None:
    case = CONV[name]
    after = check(case, rng)
    first, second = after.graph.node
    assert list(second.input[2:]) == (["b"] if case.more else [])
    axes = len(case.x) - 2
    neutral = {"strides": [1] * axes, "dilations": [1] * axes, "kernel_shape": [1] * axes}
    kept = {k: v for k, v in attributes(second).items() if k not in ("group",)}
    assert kept == neutral
    assert len(first.input) == 2


@pytest.mark.parametrize("name", SPATIAL)
def test_spatial_conv(name: str, rng: np.random.Generator) -> None:
    after = check(SPATIAL[name], rng)
    first, second = after.graph.node
    assert attributes(first)["kernel_shape"] == [7, 1]
    assert attributes(second)["kernel_shape"] == [1, 2]


@pytest.mark.parametrize(("n", "channels", "form"), [(64, 4, "conv"), (4, 64, "conv-spatial")])
def test_the_cheaper_way_is_taken(
    n: int, channels: int, form: str, rng: np.random.Generator
) -> None:
    # 3×1 of one filter, outer product over everything: rank 1 both ways.
    ones = np.ones((n, channels, 5, 2), np.float32)
    model = parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        one (float[1, {channels}, 7, 7] x) => (float[1, {n}, 3, 6] y) {{ y = Conv(x, W) }}""",
        {"W": ones},
    )
    result = factored(model, energy=0.999, rank_multiple=1, ops=("conv",))
    (layer,) = result.report.layers
    assert (layer.form, layer.rank) == (form, 1)
    expected = {"conv": channels * 10 + n, "conv-spatial": channels * 5 + n * 2}
    assert layer.parameters_after == expected[form] == min(expected.values())
    assert_same(model, result.model, {"x": uniform((1, channels, 7, 7), rng)})


@pytest.mark.parametrize(
    ("groups", "shape", "kind"), [(2, (12, 8, 3, 3), "grouped"), (16, (16, 1, 3, 3), "depthwise")]
)
@pytest.mark.parametrize("ops", [None, ("conv",), ("all",)])
def test_groups_are_left_alone(
    groups: int,
    shape: tuple[int, ...],
    kind: str,
    ops: tuple[str, ...] | None,
    rng: np.random.Generator,
) -> None:
    model = parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        one (float[1, 16, 7, 7] x) => (float[1, {shape[0]}, 5, 5] y)
        {{ y = Conv <group = {groups}> (x, W) }}""",
        {"W": uniform(shape, rng)},
    )
    result = factored(model, rank=1, ops=ops)
    (layer,) = result.report.layers
    assert (layer.status, layer.form, layer.off) == ("dense", "conv", ops is None)
    assert f"{kind} convolution: its {groups} groups" in layer.reason
    assert op_types(result.model) == ["Conv"]


OFF = {
    "conv": CONV["3×3"],
    "gather": Case(
        "y = Gather(W, i)",
        (),
        (5, 16),
        lambda rng: known_rank(40, 16, RANK, rng),
        (),
        "gather",
        (40, 16),
        0,
        inputs={"i": "int64[5]"},
    ),
    "lstm": Case(
        "y, h, c = LSTM <hidden_size = 8> (x, W, R)",
        (5, 3, 16),
        (5, 1, 3, 8),
        lambda rng: known_rank(32, 16, RANK, rng)[None],
        (),
        "lstm",
        (16, 32),
        0,
        more={"R": (1, 32, 8)},
    ),
}


@pytest.mark.parametrize("name", OFF)
def test_off_by_default_with_a_hint(name: str, rng: np.random.Generator) -> None:
    case = OFF[name]
    model = case.model(rng)
    result = factored(model, rank=RANK)
    (layer,) = result.report.layers
    assert (layer.status, layer.form, layer.shape, layer.off) == (
        "dense",
        case.form,
        case.shape,
        True,
    )
    assert layer.reason == f"off; --ops {name} turns it on"
    assert node_protos(result.model) == node_protos(model)
    totals = result.report.totals
    assert (totals.linear_parameters_before, totals.linear_parameters_after) == (0, 0)
    assert factored(model, rank=RANK, ops=("all",)).report.layers[0].status == "factored"
    assert factored(model, rank=RANK, ops=(name,)).report.layers[0].status == "factored"
    assert factored(model, rank=RANK, ops=("default", "matmul")).report.layers[0].off


# --- Gather

V, D = 40, 16


def embedding(indices: str, y: Shape, *, axis: str = "", feed: Any) -> Case:
    rows = math.prod(size for size in y[:-1] if isinstance(size, int))
    return Case(
        f"z = Gather {axis} (W, i)\n y = Add(z, x)",
        (1,),
        y,
        lambda rng: known_rank(V, D, RANK, rng),
        ("Gather", "MatMul", "Add"),
        "gather",
        (V, D),
        0 * rows,
        inputs={"i": indices},
        outputs={"z": y},
        feeds={"i": np.array(feed)},
        arguments=("gather",),
    )


GATHER = {
    "scalar": embedding("int64", (D,), feed=np.int64(7)),
    "vector": embedding("int64[5]", (5, D), feed=[0, 39, 3, 3, 12]),
    "matrix": embedding("int64[2, 3]", (2, 3, D), feed=[[0, 39, 3], [3, 12, 1]]),
    "int32": embedding("int32[2]", (2, D), feed=np.array([1, 2], np.int32)),
    "negative indices": embedding("int64[2]", (2, D), feed=[-1, -40]),
    "axis 0": embedding("int64[2]", (2, D), axis="<axis = 0>", feed=[1, 2]),
    "axis -2": embedding("int64[2]", (2, D), axis="<axis = -2>", feed=[1, 2]),
}


@pytest.mark.parametrize("name", GATHER)
def test_gather(name: str, rng: np.random.Generator) -> None:
    case = GATHER[name]
    model = case.model(rng)
    result = factored(model, rank=RANK, ops=("gather",), check=True, samples=1)
    (layer,) = result.report.layers
    after = as_proto(result.model)
    assert (layer.status, layer.form, layer.shape) == ("factored", "gather", (V, D))
    assert tuple(op_types(after)) == case.ops
    assert parameters(after) == RANK * (V + D)
    assert_valid(after)
    assert_same(model, after, case.fed(rng))
    rows = max(case.feeds["i"].size, 1)
    assert layer.macs_before == 0
    assert layer.macs_after == rows * RANK * D
    assert result.report.totals.macs_after == rows * RANK * D


@pytest.mark.parametrize(
    ("nodes", "shape", "y"),
    [
        ("y = Gather <axis = 1> (W, i)", (V, D), (V, 5)),
        ("y = Gather(W, i)", (V, 4, D), (5, 4, D)),
        ("y = Gather(W, i)", (V,), (5,)),
    ],
)
def test_what_is_no_embedding(
    nodes: str, shape: tuple[int, ...], y: Shape, rng: np.random.Generator
) -> None:
    model = parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        one (int64[5] i) => ({declared({"y": y})}) {{ {nodes} }}""",
        {"W": uniform(shape, rng)},
    )
    result = factored(model, rank=1, ops=("all",))
    assert result.report.layers == ()
    assert node_protos(result.model) == node_protos(model)


HEADS = {
    "Transpose": ("T = Transpose(W)\n y = MatMul(h, T)", {}),
    "Gemm transB": ("y = Gemm <transB = 1> (h, W, b)", {"b": (V,)}),
    "Gemm of a Transpose": ("T = Transpose(W)\n y = Gemm(h, T)", {}),
}


def language_model(
    head: str, rng: np.random.Generator, *, copy: bool = False
) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """Embedding, one nonlinearity, and a head that reads the same table, or its own copy."""
    nodes, more = HEADS.get(head, ("y = MatMul(h, copy)", {}))
    table = known_rank(V, D, RANK, rng)
    weights = {"W": table, **{name: uniform(shape, rng) for name, shape in more.items()}}
    if copy:
        weights["copy"] = np.ascontiguousarray(table.T)
    model = parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        lm (int64[N] i) => (float[N, {V}] y) {{
            e = Gather(W, i)
            h = Tanh(e)
            {nodes}
        }}""",
        weights,
    )
    model = onnx.shape_inference.infer_shapes(model)
    return model, {"i": rng.integers(0, V, 6)}


def statuses(result: Result) -> list[tuple[str, str]]:
    return [(layer.form, layer.status) for layer in result.report.layers]


@pytest.mark.parametrize("head", HEADS)
def test_a_tied_head_shares_the_tables_factors(head: str, rng: np.random.Generator) -> None:
    model, feeds = language_model(head, rng)
    result = factored(model, rank=RANK, ops=("default", "gather"))
    after = as_proto(result.model)
    assert [status for _, status in statuses(result)] == ["factored", "factored"]
    assert [layer.shared for layer in result.report.layers] == [1, 1]
    biases = sum(tensor.dims[0] for tensor in model.graph.initializer if tensor.name == "b")
    assert parameters(after) == RANK * (V + D) + biases
    assert "W" not in {tensor.name for tensor in after.graph.initializer}
    assert after.ByteSize() < model.ByteSize()
    totals = result.report.totals
    assert (totals.linear_parameters_before, totals.linear_parameters_after) == (
        V * D,
        RANK * (V + D),
    )
    assert_valid(after)
    assert_same(model, after, feeds)


@pytest.mark.parametrize("head", HEADS)
def test_a_tied_head_alone_is_left_dense(head: str, rng: np.random.Generator) -> None:
    model, _ = language_model(head, rng)
    result = factored(model, rank=RANK)
    embedding_layer, head_layer = result.report.layers
    assert embedding_layer.off
    assert head_layer.status == "dense"
    assert "W is also read by e" in head_layer.reason
    assert "would stay" in head_layer.reason
    assert node_protos(result.model) == node_protos(model)


@pytest.mark.parametrize("ops", [None, ("gather",), ("all",)])
def test_a_head_with_a_copy_of_its_own(
    ops: tuple[str, ...] | None, rng: np.random.Generator
) -> None:
    model, feeds = language_model("copy", rng, copy=True)
    result = factored(model, rank=RANK, ops=ops)
    by_ops: dict[tuple[str, ...] | None, list[str]] = {
        None: ["dense", "factored"],
        ("gather",): ["factored", "dense"],
        ("all",): ["factored", "factored"],
    }
    expected = by_ops[ops]
    assert [status for form, status in statuses(result)] == expected
    pairs = expected.count("factored")
    assert parameters(result.model) == pairs * RANK * (V + D) + (2 - pairs) * V * D
    assert_valid(result.model)
    assert_same(model, result.model, feeds)


# --- LSTM, GRU, RNN

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
STEPS, BATCH, HIDDEN = 5, 3, 8


def recurrent(
    op: str,
    *,
    directions: int = 1,
    bias: bool = False,
    lengths: bool = False,
    initial: bool = False,
    batch_first: bool = False,
    settings: str = "",
    reference: bool = True,
) -> Case:
    gates = GATES[op] * (HIDDEN if op != "RNN" else 16)
    hidden = HIDDEN if op != "RNN" else 16
    names = ["x", "W", "R", "B" if bias else "", "lengths" if lengths else ""]
    more: dict[str, tuple[int, ...]] = {"R": (directions, gates, hidden)}
    if bias:
        more["B"] = (directions, 2 * gates)
    if initial:
        names.append("h0")
        more["h0"] = (BATCH, directions, hidden) if batch_first else (directions, BATCH, hidden)
        if op == "LSTM":
            names.append("c0")
            more["c0"] = more["h0"]
    while names[-1] == "":
        names.pop()
    direction = "bidirectional" if directions == 2 else "forward"
    text = f'hidden_size = {hidden}, direction = "{direction}", layout = {int(batch_first)}'
    head = (BATCH, STEPS) if batch_first else (STEPS, BATCH)
    y = (*head, directions, hidden) if batch_first else (STEPS, directions, BATCH, hidden)
    arguments = ", ".join(name or '""' for name in names)
    return Case(
        f"y = {op} <{text}{', ' * bool(settings)}{settings}> ({arguments})",
        (*head, 16),
        y,
        lambda rng: known_rank(16, directions * gates, RANK, rng).T.reshape(directions, gates, 16),
        ("MatMul", op),
        op.lower(),
        (16, directions * gates),
        STEPS * BATCH * directions * gates * (16 + hidden),
        more=more,
        inputs={"lengths": f"int32[{BATCH}]"} if lengths else {},
        feeds={"lengths": np.array([5, 2, 3], np.int32)} if lengths else {},
        arguments=(op.lower(),),
        reference=reference,
    )


# onnx.reference ignores sequence_lens, and its cells run one way only.
CELLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "bidirectional": {"directions": 2, "bias": True, "reference": False},
    "sequence_lens": {"lengths": True, "reference": False},
    "initial states": {"bias": True, "initial": True},
    "everything": {
        "directions": 2,
        "bias": True,
        "lengths": True,
        "initial": True,
        "reference": False,
    },
}
RECURRENT = {
    f"{op}, {name}": recurrent(op, **options) for op in GATES for name, options in CELLS.items()
}
RECURRENT["GRU, linear_before_reset"] = recurrent(
    "GRU", bias=True, settings="linear_before_reset = 1"
)


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent(name: str, rng: np.random.Generator) -> None:
    case = RECURRENT[name]
    after = check(Case(**{**vars(case), "within": 1e-5}), rng)
    before = case.model(rng)
    assert after.graph.node[-1].attribute == before.graph.node[-1].attribute
    assert after.graph.node[-1].input[2:] == before.graph.node[-1].input[2:]


@pytest.mark.parametrize("op", GATES)
def test_batch_first(op: str, rng: np.random.Generator) -> None:
    # ONNX Runtime has no layout = 1; onnx.reference has, for one direction.
    case = recurrent(op, batch_first=True, bias=True)
    model = case.model(rng)
    result = factored(model, rank=RANK, ops=(op.lower(),))
    assert op_types(result.model) == ["MatMul", op]
    assert_valid(result.model)
    assert_same(model, result.model, case.fed(rng), in_ort=False, within=1e-5)


# --- com.microsoft


def fused_matmul(
    side: str, *, trans_a: int = 0, trans_b: int = 0, batch: tuple[int, ...] = ()
) -> Case:
    m, n, rows = 16, 12, 5
    left = side == "left"
    rows_axis = (rows,)
    turn_x = trans_b if left else trans_a
    turn_w = trans_a if left else trans_b
    x = (m, *rows_axis) if left != bool(turn_x) else (*rows_axis, m)
    y = (n, rows) if left else (rows, n)

    def weight(rng: np.random.Generator) -> Array:
        array = known_rank(m, n, RANK, rng, batch=batch)
        return array if left == bool(turn_w) else np.ascontiguousarray(array.swapaxes(-1, -2))

    slices = math.prod(batch)
    return Case(
        f"y = com.microsoft.FusedMatMul <alpha = 0.5, transA = {trans_a}, transB = {trans_b}> "
        f"({'W, x' if left else 'x, W'})",
        (*batch, *x),
        (*batch, *y),
        weight,
        ("FusedMatMul" if turn_x else "MatMul", "FusedMatMul"),
        f"fused-matmul-{side}",
        (m, n),
        slices * rows * m * n,
        slices=slices,
        reference=False,
    )


FUSED_MATMUL = {
    f"{side}, transA={trans_a}, transB={trans_b}, batch {batch}": fused_matmul(
        side, trans_a=trans_a, trans_b=trans_b, batch=batch
    )
    for side in ("left", "right")
    for trans_a in (0, 1)
    for trans_b in (0, 1)
    for batch in ((), (3,), (2, 3))
}


@pytest.mark.parametrize("name", FUSED_MATMUL)
def test_fused_matmul(name: str, rng: np.random.Generator) -> None:
    after = check(FUSED_MATMUL[name], rng)
    first, second = after.graph.node
    assert attributes(second)["alpha"] == 0.5
    assert "alpha" not in attributes(first)


@pytest.mark.parametrize("name", ["transBatchA", "transBatchB"])
def test_fused_matmul_that_reorders_batches_is_refused(name: str, rng: np.random.Generator) -> None:
    model = parse(
        f"""<ir_version: 8, opset_import: {OPSETS}>
        one (float[3, 5, 16] x) => (float y)
        {{ y = com.microsoft.FusedMatMul <{name} = 1> (x, W) }}""",
        {"W": known_rank(16, 12, RANK, rng, batch=(3,))},
    )
    (layer,) = factored(model, rank=RANK).report.layers
    assert (layer.status, layer.reason) == ("dense", "transBatchA or transBatchB is set")


@pytest.mark.parametrize("activation", ["Relu", "LeakyRelu", "Tanh", "Sigmoid"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("turned", [0, 1])
def test_fused_gemm(activation: str, side: str, turned: int, rng: np.random.Generator) -> None:
    # Both operands are given transposed, or neither is.
    m, n, rows = 16, 12, 5
    left = side == "left"
    x, y = ((m, rows), (n, rows)) if left else ((rows, m), (rows, n))
    x = x[::-1] if turned else x
    slope = ", activation_alpha = 0.25" if activation == "LeakyRelu" else ""

    def weight(rng: np.random.Generator) -> Array:
        array = known_rank(m, n, RANK, rng)
        return np.ascontiguousarray(array if left == bool(turned) else array.T)

    case = Case(
        f"y = com.microsoft.FusedGemm <alpha = 0.5, beta = 2.0, transA = {turned}, "
        f'transB = {turned}, activation = "{activation}"{slope}> '
        f"({'W, x' if left else 'x, W'}, C)",
        x,
        y,
        weight,
        ("Transpose", "MatMul", "FusedGemm") if turned else ("MatMul", "FusedGemm"),
        f"fused-gemm-{side}",
        (m, n),
        rows * m * n,
        more={"C": (y[1],)},
        reference=False,
    )
    after = check(case, rng)
    kept = attributes(after.graph.node[-1])
    assert kept["activation"] == activation.encode()
    assert (kept["alpha"], kept["beta"]) == (0.5, 2.0)


@pytest.mark.parametrize("mask", ["", "int32[2]", "int32[2, 5]"])
@pytest.mark.parametrize("sizes", [None, (8, 8, 16)])
def test_attention(mask: str, sizes: tuple[int, int, int] | None, rng: np.random.Generator) -> None:
    queries, keys, values = sizes or (16, 16, 16)
    packed = queries + keys + values
    split = "" if sizes is None else f", qkv_hidden_sizes = [{queries}, {keys}, {values}]"
    lengths = np.array([5, 3], np.int32)
    case = Case(
        f"y = com.microsoft.Attention <num_heads = 4{split}> (x, W, b{', mask' * bool(mask)})",
        (2, 5, 16),
        (2, 5, values),
        lambda rng: known_rank(16, packed, RANK, rng),
        ("MatMul", "Attention"),
        "attention",
        (16, packed),
        2 * 5 * 16 * packed + 2 * 5 * 5 * (queries + values),
        more={"b": (packed,)},
        inputs={"mask": mask} if mask else {},
        feeds={
            "mask": lengths
            if mask == "int32[2]"
            else (np.arange(5) < lengths[:, None]).astype(np.int32)
        }
        if mask
        else {},
        reference=False,
        within=1e-5,
    )
    after = check(case, rng)
    before = case.model(rng)
    assert after.graph.node[-1].attribute == before.graph.node[-1].attribute
    assert after.graph.node[-1].input[2:] == before.graph.node[-1].input[2:]


# --- quantized weights: named, and left alone


def integers(*shape: int) -> Callable[[np.random.Generator], Array]:
    return lambda rng: rng.integers(-4, 5, shape).astype(np.int8)


QUANTIZED: dict[str, tuple[str, str, Callable[[np.random.Generator], Array]]] = {
    "MatMulInteger": ("int8[3, 16] x", "y = MatMulInteger(x, W)", integers(16, 12)),
    "QLinearMatMul": (
        "int8[3, 16] x",
        "y = QLinearMatMul(x, one, zero, W, one, zero, one, zero)",
        integers(16, 12),
    ),
    "ConvInteger": ("int8[1, 16, 5, 5] x", "y = ConvInteger(x, W)", integers(12, 16, 3, 3)),
    "QLinearConv": (
        "int8[1, 16, 5, 5] x",
        "y = QLinearConv(x, one, zero, W, one, zero, one, zero)",
        integers(12, 16, 3, 3),
    ),
    "DequantizeLinear": (
        "float[3, 16] x",
        "w = DequantizeLinear(W, one, zero)\n y = MatMul(x, w)",
        integers(16, 12),
    ),
    "DequantizeLinear, Transpose": (
        "float[3, 16] x",
        "w = DequantizeLinear(W, one, zero)\n t = Transpose(w)\n y = MatMul(x, t)",
        integers(12, 16),
    ),
    "DequantizeLinear, Gemm": (
        "float[3, 16] x",
        "w = DequantizeLinear(W, one, zero)\n y = Gemm <transB = 1> (x, w)",
        integers(12, 16),
    ),
    "DequantizeLinear, Conv": (
        "float[1, 16, 5, 5] x",
        "w = DequantizeLinear(W, one, zero)\n y = Conv(x, w)",
        integers(12, 16, 3, 3),
    ),
    "DequantizeLinear, Einsum": (
        "float[3, 16] x",
        'w = DequantizeLinear(W, one, zero)\n y = Einsum <equation = "bd,df->bf"> (x, w)',
        integers(16, 12),
    ),
    "MatMulNBits": (
        "float[3, 32] x",
        "y = com.microsoft.MatMulNBits <K = 32, N = 12, bits = 4, block_size = 32> (x, W, scale)",
        lambda rng: rng.integers(0, 256, (12, 1, 16)).astype(np.uint8),
    ),
    "DynamicQuantizeMatMul": (
        "float[3, 16] x",
        "y = com.microsoft.DynamicQuantizeMatMul(x, W, one, zero)",
        integers(16, 12),
    ),
    "MatMulIntegerToFloat": (
        "int8[3, 16] x",
        "y = com.microsoft.MatMulIntegerToFloat(x, W, one, one, zero, zero)",
        integers(16, 12),
    ),
    "QGemm": (
        "int8[3, 16] x",
        "y = com.microsoft.QGemm(x, one, zero, W, one, zero, none, one, zero)",
        integers(16, 12),
    ),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_weights_are_left_alone(name: str, rng: np.random.Generator) -> None:
    x, nodes, weight = QUANTIZED[name]
    result_type = "int32" if "Integer(" in nodes else "int8" if "QLinear" in nodes else "float"
    result_type = "int8" if "QGemm" in nodes else result_type
    nodes = nodes.replace("none", '""')
    model = parse(
        f"""<ir_version: 8, opset_import: {OPSETS}>
        one ({x}) => ({result_type} y) {{ {nodes} }}""",
        {
            "W": weight(rng),
            "one": np.array(0.5, np.float32),
            "zero": np.array(0, np.int8),
            "scale": np.ones(12, np.float32),
        },
    )
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    result = factored(model, rank=1, ops=("all",), check=True, samples=1)
    (layer,) = result.report.layers
    assert (layer.status, layer.weight) == ("dense", "W")
    assert "W is quantized" in layer.reason
    assert "factor the float model first, then quantize" in layer.reason
    after = as_proto(result.model)
    assert node_protos(after) == node_protos(model)
    assert after.graph.initializer == model.graph.initializer
    if name == "MatMulNBits":
        assert layer.shape == (32, 12)
    if "Conv" not in name:
        assert result.report.totals.macs_before in (3 * 16 * 12, 3 * 32 * 12)
    assert not any("MACs not counted" in note for note in result.report.notes)


def test_linear_models_of_classical_machine_learning(rng: np.random.Generator) -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["": 17, "ai.onnx.ml": 3]>
        one (float[3, 4] x) => (int64[3] y, float[3, 3] scores) {
            y, scores = ai.onnx.ml.LinearClassifier <
                coefficients = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 1.0, 2.0, 3.0],
                intercepts = [0.0, 1.0, 2.0], classlabels_ints = [0, 1, 2]> (x)
        }"""
    )
    model.graph.node[0].name = "classifier"
    result = factored(model, rank=1)
    (layer,) = result.report.layers
    assert (layer.status, layer.form) == ("dense", "ml-linear")
    assert layer.weight == "classifier.coefficients"
    assert "its 12 coefficients are an attribute of the node" in layer.reason
    assert result.report.totals.linear_parameters_before == 0 == result.report.input.parameters
    assert node_protos(result.model) == node_protos(model)


# --- MACs of operators that have no form, or that stand where they cannot be counted


COUNTS = {
    "ConvTranspose": (
        "float[2, 3, 4, 5] x",
        "y = ConvTranspose(x, W)",
        (3, 6, 2, 2),
        2 * 3 * 4 * 5 * 6 * 2 * 2,
    ),
    "grouped ConvTranspose": (
        "float[2, 4, 4, 5] x",
        "y = ConvTranspose <group = 2> (x, W)",
        (4, 3, 2, 2),
        2 * 4 * 4 * 5 * 3 * 2 * 2,
    ),
    "grouped Conv": (
        "float[2, 4, 4, 5] x",
        "y = Conv <group = 2> (x, W)",
        (6, 2, 2, 2),
        2 * 6 * 3 * 4 * 2 * 2 * 2,
    ),
    "FusedConv": (
        "float[2, 4, 4, 5] x",
        'y = com.microsoft.FusedConv <activation = "Relu"> (x, W)',
        (6, 4, 2, 2),
        2 * 6 * 3 * 4 * 4 * 2 * 2,
    ),
    "a MatMul of two activations": ("float[2, 3, 4] x", "t = Transpose <perm = [0, 2, 1]> (x)\n"
                                    "y = MatMul(x, t)", (1,), 2 * 3 * 4 * 3),
    "an Einsum of three": (
        "float[3, 4] x",
        'y = Einsum <equation = "ab,bc,ad->cd"> (x, W, x)',
        (4, 5),
        3 * 4 * 5 * 4,
    ),
    "an Einsum of one": ("float[3, 4] x", 'y = Einsum <equation = "ab->ba"> (x)', (1,), 0),
    "nothing": ("float[3, 4] x", "y = Relu(x)", (1,), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_macs(name: str, rng: np.random.Generator) -> None:
    x, nodes, shape, macs = COUNTS[name]
    model = parse(
        f"""<ir_version: 8, opset_import: {OPSETS}>
        one ({x}) => (float y) {{ {nodes} }}""",
        {"W": uniform(shape, rng)},
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    result = factored(model, rank=1, exclude=(), check=True, samples=1)
    assert result.report.totals.macs_before == macs


def test_macs_within_a_function_of_a_function_are_not_guessed(rng: np.random.Generator) -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["": 17, "f": 1]>
        one (float[3, 16] x) => (float[3, 12] y) { z = f.outer(x)  y = MatMul(z, W) }
        <domain: "f", opset_import: ["": 17, "f": 1]>
        outer (a) => (b) { b = f.inner(a) }
        <domain: "f", opset_import: ["": 17]>
        inner (a) => (b) { t = Transpose(a)  g = MatMul(a, t)  b = MatMul(g, a) }""",
        {"W": known_rank(16, 12, RANK, rng)},
    )
    result = factored(model, rank=RANK, check=True, samples=1)
    assert result.report.totals.macs_before is None
    assert result.report.layers[0].macs_before == 3 * 16 * 12
    assert result.report.layers[0].macs_after == 3 * RANK * (16 + 12)
    assert any("MACs not counted" in note for note in result.report.notes)


def test_a_weight_that_one_node_refuses_counts_once(rng: np.random.Generator) -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        one (float[3, 16] x) => (float[3, 12] y, float[3, 12] z) {
            y = MatMul(x, W)
            z = Einsum <equation = "bd,df,bd->bf"> (x, W, x)
        }""",
        {"W": known_rank(16, 12, RANK, rng)},
    )
    result = factored(model, rank=RANK)
    assert [layer.status for layer in result.report.layers] == ["dense", "dense"]
    assert result.report.totals.linear_parameters_before == 16 * 12


# --- choosing forms


def test_ops_of_compress_choose_forms(rng: np.random.Generator) -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        one (int64[5] i, float[5, 16] x) => (float[5, 12] a, float[5, 12] b, float[5, 12] c,
                                             float[5, 16] e) {
            e = Gather(T, i)
            a = MatMul(x, M)
            b = Gemm(x, G)
            c = Einsum <equation = "bd,df->bf"> (x, E)
        }""",
        {
            "T": known_rank(40, 16, RANK, rng),
            **{name: known_rank(16, 12, RANK, rng) for name in "MGE"},
        },
    )
    on = {
        None: {"M", "G", "E"},
        ("default",): {"M", "G", "E"},
        ("all",): {"T", "M", "G", "E"},
        ("gemm",): {"G"},
        ("matmul", "gather"): {"T", "M"},
        ("default", "gather"): {"T", "M", "G", "E"},
        ("conv",): set[str](),
    }
    for ops, weights in on.items():
        result = factored(model, rank=RANK, ops=ops)
        chosen = {layer.weight for layer in result.report.layers if layer.status == "factored"}
        assert chosen == weights, ops
        left = {tensor.name for tensor in as_proto(result.model).graph.initializer}
        assert {"T", "M", "G", "E"} - weights <= left, ops
        feeds = {"i": rng.integers(0, 40, 5), "x": uniform((5, 16), rng)}
        assert_same(model, result.model, feeds)
