"""Convolutions: the nodes that they become, and the same outputs."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from onnx_lowrank.numerics.arrays import Array
from tests.helpers.cases import (
    RANK,
    Case,
    Shape,
    attributes,
    check,
    node_protos,
)
from tests.helpers.models import (
    assert_same,
    factored,
    known_rank,
    op_types,
    parse,
    uniform,
)


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
    assert layer.reason == f"off; ops={name!r} turns it on"
    assert node_protos(result.model) == node_protos(model)
    totals = result.report.totals
    assert (totals.linear_parameters_before, totals.linear_parameters_after) == (0, 0)
    assert factored(model, rank=RANK, ops=("all",)).report.layers[0].status == "factored"
    assert factored(model, rank=RANK, ops=(name,)).report.layers[0].status == "factored"
    assert factored(model, rank=RANK, ops=("default", "matmul")).report.layers[0].off
