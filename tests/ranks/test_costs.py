"""The latency of each kind of layer, measured alone."""

from __future__ import annotations

import time

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank.ranks.costs import CostTable, measure_costs, measured_ranks
from onnx_lowrank.ranks.microbench import Limits, clock_for, serialized, session_timer
from onnx_lowrank.ranks.times import Place, Times
from onnx_lowrank.runtime.session import open_session
from tests.helpers.models import op_types, parse, uniform
from tests.helpers.timed import F32, HEAD, HERE, QUICK, measured, planned, product, sized


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


def test_a_model_is_serialized_as_it_is() -> None:
    model = ir.from_proto(product(4, 3))
    assert op_types(onnx.load_from_string(serialized(model))) == ["MatMul", "Relu"]
