"""Convolutions: the nodes that they become, and the same outputs."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.cases import (
    RANK,
    Case,
    attributes,
    check,
    node_protos,
)
from tests.helpers.form_cases import CONV, conv, spatial
from tests.helpers.models import (
    assert_same,
    factored,
    known_rank,
    op_types,
    parse,
    uniform,
)

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
