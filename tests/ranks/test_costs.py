"""The latency of each kind of layer, measured alone, and the file that keeps it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank.errors import InputError
from onnx_lowrank.maps.formats import Format, Variant
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.ranks import break_even
from onnx_lowrank.ranks import cost_file
from onnx_lowrank.ranks.costs import (
    CostTable,
    measure_costs,
    measured_ranks,
    plan_costs,
)
from onnx_lowrank.ranks.formats import Formats
from onnx_lowrank.ranks.microbench import (
    Limits,
    Rounds,
    clock_for,
    serialized,
    session_timer,
)
from onnx_lowrank.ranks.times import CostKey, Place, Times
from onnx_lowrank.runtime.session import open_session
from tests.helpers.models import (
    TEXT_TYPES,
    op_types,
    parse,
    run_ort,
    uniform,
)
from tests.helpers.timed import (
    F32,
    HEAD,
    HERE,
    QUICK,
    groups_of,
    measured,
    planned,
    product,
    sized,
)

# --- the little models

NODES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    # the node, its inputs (shapes, or values), its constants, and its operator
    "right": ("y = MatMul(x, W)", {"x": (2, 3, 24)}, {"W": (24, 20)}, "MatMul"),
    "left": ("y = MatMul(W, x)", {"x": (24, 3)}, {"W": (20, 24)}, "MatMul"),
    "batch": ("y = MatMul(x, W)", {"x": (4, 3, 24)}, {"W": (4, 24, 20)}, "MatMul"),
    "gemm": (
        "y = Gemm<alpha=0.5, transA=1, transB=1>(x, W, b)",
        {"x": (24, 3)},
        {"W": (20, 24), "b": (20,)},
        "Gemm",
    ),
    "computed bias": ("y = Gemm(x, W, c)", {"x": (3, 24), "c": (20,)}, {"W": (24, 20)}, "Gemm"),
    "einsum": ('y = Einsum<equation="bi,io->bo">(x, W)', {"x": (3, 24)}, {"W": (24, 20)}, "Einsum"),
    "fused": (
        "y = com.microsoft.FusedMatMul<transB=1>(x, W)",
        {"x": (3, 24)},
        {"W": (20, 24)},
        "FusedMatMul",
    ),
    "conv": ("y = Conv<pads=[1,1,1,1]>(x, W)", {"x": (1, 8, 6, 5)}, {"W": (9, 8, 3, 3)}, "Conv"),
    "lstm": (
        "y, _h, _c = LSTM<hidden_size=8>(x, W, R, , lengths)",
        {"x": (4, 2, 24), "lengths": np.array([4, 2], np.int32)},
        {"W": (1, 32, 24), "R": (1, 32, 8)},
        "LSTM",
    ),
    "gather": (
        "y = Gather(W, x)",
        {"x": np.array([[3, 39], [0, 7]])},
        {"W": (40, 24)},
        "Gather",
    ),
    "attention": (
        "y = com.microsoft.Attention<num_heads=2>(x, W, b, mask)",
        {"x": (1, 5, 24), "mask": np.ones((1, 5), np.int32)},
        {"W": (24, 48), "b": (48,)},
        "Attention",
    ),
}


def lone(case: str) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A model in which the node stands behind others that hide types and sizes, and a sample."""
    rng = np.random.default_rng(1)
    node, inputs, weights, _ = NODES[case]
    feed = {
        f"in_{name}": uniform(size, rng) if isinstance(size, tuple) else size
        for name, size in inputs.items()
    }
    # Where forms need a rank or a size the model tells it, else it tells nothing.
    told = case in ("batch", "conv")
    declared = []
    for name, array in feed.items():
        sizes = [str(size) if told else f"{name}_{axis}" for axis, size in enumerate(array.shape)]
        kind = {"float32": "float"}.get(array.dtype.name, array.dtype.name)
        declared.append(f"{kind}[{', '.join(sizes)}] {name}")
    ahead = "\n".join(f"{name} = Identity(in_{name})" for name in inputs)
    proto = parse(
        f"{HEAD} g ({', '.join(declared)}) => (float[] y) {{ {ahead}\n{node} }}",
        {name: uniform(shape, rng) for name, shape in weights.items()},
    )
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    return proto, feed


@pytest.mark.parametrize("case", NODES)
def test_the_map_alone_is_the_models_node(case: str) -> None:
    proto, feed = lone(case)
    plan, groups = planned(proto, feed)
    assert not plan.unknown
    assert set(plan.keys) == {member.site for group in groups for member in group.members}
    whole = run_ort(proto, feed)["y"]
    for key, specimen in plan.specimens.items():
        dense = specimen.dense()
        assert op_types(dense) == [NODES[case][3]]
        given = specimen.feed()
        # What is no float comes from the run itself: lengths, masks, row numbers.
        for name, array in given.items():
            if array.dtype.kind == "i":
                np.testing.assert_array_equal(array, feed[f"in_{name}"])
            assert array.shape == feed[f"in_{name}"].shape
        before = run_ort(dense, given)
        assert before["y"].shape == whole.shape
        rank = max(1, int(break_even(*key.shape[1:])) // 2)
        pair = specimen.pair(rank)
        after = run_ort(pair, given)
        assert after["y"].shape == whole.shape
        assert len(op_types(pair)) > 1
        slices, m, n = key.shape
        kept = {"b", "R"}
        sizes = [
            int(np.prod(t.dims))
            for t in ir.to_proto(pair).graph.initializer
            if t.name not in kept and t.data_type == onnx.TensorProto.FLOAT
        ]
        assert sum(sizes) == slices * rank * (m + n)


def test_a_weight_behind_a_chain_is_an_initializer_of_the_map() -> None:
    proto = parse(
        f"""{HEAD} g (float[3, 24] x) => (float[3, 20] y) {{
            h = Cast<to=1>(W)
            t = Transpose<perm=[1, 0]>(h)
            y = MatMul(x, t)
        }}""",
        {"W": np.ones((20, 24), np.float16)},
    )
    plan, _ = planned(proto, {"x": np.ones((3, 24), F32)})
    (specimen,) = plan.specimens.values()
    dense = ir.to_proto(specimen.dense())
    assert [list(t.dims) for t in dense.graph.initializer] == [[24, 20]]
    assert dense.graph.initializer[0].data_type == onnx.TensorProto.FLOAT
    assert op_types(specimen.dense()) == ["MatMul"]


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_float_types(dtype: Any) -> None:
    kind = TEXT_TYPES[np.dtype(dtype)]
    proto = parse(
        f"{HEAD} g ({kind}[N, 24] x) => ({kind}[N, 20] y) {{ y = MatMul(x, W) }}",
        {"W": np.ones((24, 20), dtype)},
    )
    model = ir.from_proto(proto)
    # ONNX Runtime's CPU has no bfloat16: the shapes that it would show, by hand.
    shapes = {"x": (3, 24), "y": (3, 20)}

    def run(copy: ir.Model) -> dict[str, Array]:
        return {
            output.name or "": np.array(shapes[node.inputs[0].name or ""])
            for node in copy.graph
            for output in node.outputs
            if node.op_type == "Shape" and node.inputs[0] is not None
        }

    plan = plan_costs(groups_of(model), model, run)
    (key,), (specimen,) = plan.specimens, plan.specimens.values()
    assert key.inputs[1] == f"{ir.DataType.from_numpy(np.dtype(dtype)).name.lower()}[24, 20] weight"
    assert specimen.feed()["x"].dtype == dtype
    for name, shape in (("A", (24, 4)), ("B", (4, 20))):
        factor = specimen.pair(4).graph.initializers[f"map.lowrank_{name}"].const_value
        assert factor is not None
        assert factor.numpy().shape == shape
        assert factor.numpy().dtype == dtype


def test_maps_that_look_the_same_are_one_key() -> None:
    plan, groups = planned(product(24, 24, layers=3), {"x": np.ones((5, 24), F32)})
    assert len(groups) == 3
    assert list(plan.specimens) == [
        CostKey("matmul-right", "MatMul", ("float[5, 24]", "float[24, 24] weight"), (1, 24, 24))
    ]
    other, _ = planned(product(24, 24), {"x": np.ones((6, 24), F32)})
    assert not set(other.specimens) & set(plan.specimens)


def test_attributes_and_constants_are_in_the_key() -> None:
    found = set()
    for node in ("Gemm(x, W)", "Gemm(x, W, b)", "Gemm<transB=1>(x, W)"):
        proto = parse(
            f"{HEAD} g (float[5, 24] x) => (float[5, 24] y) {{ y = {node} }}",
            {"W": np.ones((24, 24), F32), "b": np.ones(24, F32)},
        )
        found |= set(planned(proto, {"x": np.ones((5, 24), F32)})[0].specimens)
    assert len(found) == 3


# --- the table


def test_measured_ranks() -> None:
    assert measured_ranks(384, 384) == (48, 96, 144, 168)
    assert measured_ranks(20, 24) == (2, 5, 8)
    assert measured_ranks(1, 5) == (1,)


def test_times_of_dense_and_pairs() -> None:
    table, (group,) = measured(product(96, 64), {"x": np.ones((5, 96), F32)})
    assert table.dense(group) == 96 * 64
    for rank in (1, 8, 13, 24, 34, 60):  # below, between and above what was measured
        assert table.pair(group, rank) == pytest.approx(rank * (96 + 64))
        assert table.pair(group, rank, leads=False) == pytest.approx(rank * 64)
    assert table.place == HERE
    assert table.notes() == ()


def test_a_shared_weight_costs_the_sum_of_its_nodes() -> None:
    proto = parse(
        f"""{HEAD} g (int64[2, 3] i) => (float[2, 3, 40] y) {{
            e = Gather(E, i)
            t = Transpose<perm=[1, 0]>(E)
            y = MatMul(e, t)
        }}""",
        {"E": uniform((40, 24), np.random.default_rng(0))},
    )
    table, (group,) = measured(proto, {"i": np.zeros((2, 3), np.int64)})
    assert [member.transposed for member in group.members] == [False, True]
    assert table.dense(group) == 2 * 40 * 24
    assert table.pair(group, 8) == pytest.approx(2 * 8 * (40 + 24))
    alone = CostTable(table.place, table.times, dict(list(table.keys.items())[:1]))
    assert alone.dense(group) is None
    assert alone.pair(group, 8) is None


def test_a_node_in_a_subgraph_has_no_time() -> None:
    proto = parse(
        f"""{HEAD} g (float[3, 24] x, bool c) => (float[3, 24] y) {{
            h = MatMul(x, W)
            y = If (c) <
                then_branch = t () => (float[3, 24] a) {{ a = MatMul(h, V) }},
                else_branch = e () => (float[3, 24] b) {{ b = Identity(h) }}
            >
        }}""",
        {"W": np.ones((24, 24), F32), "V": np.ones((24, 24), F32)},
    )
    proto.graph.node[1].attribute[0].g.node[0].name = "inner"
    table, groups = measured(proto, {"x": np.ones((3, 24), F32), "c": np.array(True)})
    outer, inner = sorted(groups, key=lambda group: group.matrix.name == "V")
    assert table.dense(outer) == 24 * 24
    assert table.dense(inner) is None
    assert list(table.notes()) == [
        "inner has no known latency: it is inside a subgraph or a function"
    ]


def test_a_map_that_does_not_run_alone_is_said() -> None:
    table, (group,) = measured(
        product(96, 64), {"x": np.ones((5, 96), F32)}, timer=sized(fail=lambda _: True)
    )
    assert table.dense(group) is None
    assert "the map alone: no" in table.notes()[0]


def test_progress_counts_the_keys() -> None:
    plan, _ = planned(product(24, 24, layers=3), {"x": np.ones((5, 24), F32)})
    done: list[int] = []
    measure_costs(plan, sized(), HERE, done.append, limits=QUICK)
    assert done == [1] * len(plan.missing(None, HERE)) == [1]


def test_a_known_table_is_completed_here_and_only_here() -> None:
    feed = {"x": np.ones((5, 24), F32)}
    known, _ = measured(product(24, 24), feed)
    key = next(iter(known.times))
    known = CostTable(HERE, {key: Times(7.0, (8,), (3.0,), (0.0,), 9)})
    both = parse(
        f"""{HEAD} g (float[5, 24] x) => (float[5, 40] y) {{
            h = MatMul(x, W)
            y = MatMul(h, V)
        }}""",
        {"W": np.ones((24, 24), F32), "V": np.ones((24, 40), F32)},
    )
    both.graph.node[1].name = "wide"
    here, groups = measured(both, feed, table=known)
    first, second = sorted(groups, key=lambda group: group.matrix.name == "V")
    assert (here.dense(first), here.pair(first, 5)) == (7.0, 3.0)
    assert here.dense(second) == 24 * 40
    for other in (
        Place("CPUExecutionProvider", 4, "a CPU", "1.0"),
        Place("CPUExecutionProvider", 1, "a board", "1.0"),
        Place("QNNExecutionProvider", 1, "a CPU", "1.0"),
    ):
        there, groups = measured(both, feed, table=CostTable(other, known.times))
        first, second = sorted(groups, key=lambda group: group.matrix.name == "V")
        assert there.place == other
        assert there.dense(first) == 7.0
        assert there.dense(second) is None
        assert there.notes() == (
            f"wide has no known latency: the cost table of {other} does not hold it",
        )


def test_real_times() -> None:
    plan, groups = planned(product(96, 64, layers=1), {"x": np.ones((5, 96), F32)})
    timer = session_timer(lambda data, _: open_session(data, threads=1))
    place = Place.here("CPUExecutionProvider", 1)
    table = measure_costs(plan, timer, place, lambda _: None, limits=Limits(most=10, enough=5))
    (times,) = table.times.values()
    assert times.dense_ns > 0
    assert len(times.pair_ns) == len(times.ranks) == 4
    assert min(times.pair_ns) > 0
    assert 5 <= times.rounds <= 10
    assert place.processor
    assert (table.dense(groups[0]) or 0) > 0


def test_one_thread_is_timed_by_its_own_clock() -> None:
    assert clock_for("CPUExecutionProvider", 1) is time.thread_time_ns
    assert clock_for("CPUExecutionProvider", 2) is time.perf_counter_ns
    assert clock_for("CUDAExecutionProvider", 1) is time.perf_counter_ns


def test_the_timer_reads_its_clock_around_every_run() -> None:
    ticks = iter(range(0, 10**6, 7))
    plan, _ = planned(product(24, 20), {"x": np.ones((5, 24), F32)})
    (specimen,) = plan.specimens.values()
    timer = session_timer(lambda data, _: open_session(data, threads=1), lambda: next(ticks))
    rounds = timer([serialized(specimen.dense()), serialized(specimen.pair(4))], specimen.feed())
    assert rounds(3).tolist() == [[7, 7]] * 3
    assert next(ticks) == 7 * 2 * 6


# --- the file


def test_saved_and_loaded(tmp_path: Path) -> None:
    feed = {"x": np.ones((5, 96), F32)}
    table, (group,) = measured(product(96, 64), feed)
    cost_file.save(tmp_path / "c.json", table)
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]
    loaded = cost_file.load(tmp_path / "c.json")
    assert (loaded.place, loaded.times) == (table.place, dict(table.times))
    assert loaded.dense(group) is None  # which maps of which model is not in the file

    def never(models: Sequence[bytes], feed: Mapping[str, Array]) -> Rounds:
        raise AssertionError("nothing is left to measure")

    again, (group,) = measured(product(96, 64), feed, table=loaded, timer=never)
    assert again.dense(group) == 96 * 64
    assert again.pair(group, 11) == pytest.approx(11 * (96 + 64))


EIGHT, FOUR = Format(8, 128), Format(4, 32)


def test_times_of_formats(tmp_path: Path) -> None:
    """The timer counts elements of constants: codes, and a scale for each block of a column."""
    feed = {"x": np.ones((5, 128), F32)}
    own = Formats((None, EIGHT, FOUR, Format(4, 32, 8)), (None, EIGHT))
    table, (group,) = measured(product(128, 64), feed, own)
    assert table.time(group, Variant()) == 128 * 64
    assert table.time(group, Variant(None, EIGHT)) == 128 * 64 + 64
    assert table.time(group, Variant(None, FOUR)) == 128 * 64 + 4 * 64
    assert table.time(group, Variant(32)) == pytest.approx(32 * (128 + 64))
    paired = table.time(group, Variant(32, EIGHT))
    assert paired == pytest.approx(32 * (128 + 64) + 32 + 64)
    assert table.time(group, Variant(32, EIGHT), leads=False) == pytest.approx((paired or 0) / 3)
    assert table.time(group, Variant(32, FOUR)) is None  # was not asked for
    corrected = table.time(group, Variant(None, Format(4, 32, 8)))
    assert corrected == pytest.approx(128 * 64 + 4 * 64 + 8 * (128 + 64), rel=0.05)
    cost_file.save(tmp_path / "c.json", table)
    loaded = cost_file.load(tmp_path / "c.json")
    assert loaded.times == dict(table.times)

    def never(models: Sequence[bytes], feed: Mapping[str, Array]) -> Rounds:
        raise AssertionError("nothing is left to measure")

    again, (group,) = measured(product(128, 64), feed, own, table=loaded, timer=never)
    assert again.time(group, Variant(None, FOUR)) == 128 * 64 + 4 * 64
    floats, (group,) = measured(product(128, 64), feed)
    more, (group,) = measured(product(128, 64), feed, own, table=floats)  # lacks the formats
    assert more.time(group, Variant(None, FOUR)) == 128 * 64 + 4 * 64


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"save_costs=.*none.c\.json"):
        cost_file.save(tmp_path / "none" / "c.json", CostTable(HERE, {}))


def _content() -> dict[str, Any]:
    return {
        "version": 1,
        "place": {"provider": "p", "threads": 1, "processor": "c", "runtime": "1"},
        "maps": [
            {
                "form": "matmul-right",
                "node": "MatMul",
                "inputs": ["float[1, 9]", "float[9, 9] weight"],
                "shape": [1, 9, 9],
                "dense_ns": 10.0,
                "ranks": [1, 4],
                "pair_ns": [3.0, 9.0],
                "widths": [0.1, 0.1],
                "rounds": 15,
                "multiple": None,
            }
        ],
    }


def test_a_file_of_another_hand(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps(_content()))
    (times,) = cost_file.load(tmp_path / "c.json").times.values()
    assert times == Times(10.0, (1, 4), (3.0, 9.0), (0.1, 0.1), 15)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("version",), 2, "expected version 1 of the format, got 2"),
        (("place", "threads"), "two", "'threads': expected a whole number from 1, got 'two'"),
        (("place",), None, "load_costs"),
        (("maps",), {}, "'maps' is no list"),
        (("maps", 0, "ranks"), [4, 1], r"map 0: 'ranks': expected rising whole numbers"),
        (("maps", 0, "ranks"), [], r"map 0: 'ranks'"),
        (("maps", 0, "pair_ns"), [1.0], "map 0: 'pair_ns': expected 2 finite numbers"),
        (("maps", 0, "pair_ns"), [0, 1], "map 0: 'pair_ns': expected numbers above 0"),
        (("maps", 0, "dense_ns"), -1, "map 0: 'dense_ns'"),
        (("maps", 0, "dense_ns"), float("nan"), "map 0: 'dense_ns'"),
        (("maps", 0, "shape"), [9, 9], "map 0: 'shape': expected 3 whole numbers"),
        (("maps", 0, "node"), 3, "map 0: 'node': expected text, got 3"),
        (("maps", 0), 3, "map 0: "),
    ],
)
def test_a_damaged_file(tmp_path: Path, where: tuple[Any, ...], value: Any, message: str) -> None:
    content: Any = _content()
    inner = content
    for step in where[:-1]:
        inner = inner[step]
    inner[where[-1]] = value
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message) as caught:
        cost_file.load(tmp_path / "c.json")
    assert str(caught.value).startswith(f"load_costs='{tmp_path / 'c.json'}': ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "expected JSON"), ("[]", "got something else"), ("{}", "got something else")],
)
def test_no_cost_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(InputError, match=message):
        cost_file.load(tmp_path / "c.json")
    with pytest.raises(InputError, match=r"none.json': cannot be read"):
        cost_file.load(tmp_path / "none.json")


def test_a_model_is_serialized_as_it_is() -> None:
    model = ir.from_proto(product(4, 3))
    assert op_types(onnx.load_from_string(serialized(model))) == ["MatMul", "Relu"]
