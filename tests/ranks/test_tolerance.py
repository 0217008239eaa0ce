"""A tolerance uses what it allows: a smooth loss, all samples, steps ahead and back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import pytest

from onnx_lowrank import Result, compress
from onnx_lowrank.compression.settings import Settings
from onnx_lowrank.evaluation.metrics import Metric
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.knapsack import Item
from onnx_lowrank.ranks.budget_strategies import Tolerance
from onnx_lowrank.ranks.goals import Budget
from onnx_lowrank.ranks.search import Searching
from onnx_lowrank.ranks.strategy import Measured, Plan
from onnx_lowrank.schema.measures import Judged
from tests.helpers.models import parse

STEPS = 100


class _Searching:
    """Steps of one layer whose loss on the search samples is theirs by a function."""

    def __init__(self, loss: Callable[[int], float]) -> None:
        costs = np.arange(STEPS, -1, -1.0)
        item = Item(costs, np.arange(STEPS + 1.0) ** 2 / STEPS**2)
        self.ladders = SimpleNamespace(priced=lambda _: SimpleNamespace(items=[item]))
        self.stages = lambda _: contextlib.nullcontext()
        self.said: list[str] = []
        self.say = self.said.append
        self._loss = loss

    def loss(self, _priced: Any, solution: Any, _metric: Any) -> float:
        return self._loss(solution.picks[0])

    def plan(self, _priced: Any, solution: Any) -> Plan:
        return Plan({}, float(solution.picks[0]))

    def dense(self, _reason: str) -> Plan:
        return Plan({}, 0.0)


def settled(
    searched: Callable[[int], float],
    judged: Callable[[int], float],
    expected: Callable[[int], float] | None = None,
    limit: float = 0.02,
) -> tuple[list[int], list[str]]:
    """The steps that are assembled, the accepted one last, and what is said."""
    searching = _Searching(searched)
    strategy = Tolerance(cast(Searching, searching), Budget("tolerance", limit), lambda *_: 0.0)
    plan: Plan | None = strategy.first()
    tried: list[int] = []
    while plan is not None:
        at = int(plan.damage or 0)
        tried.append(at)
        found = Judged(judged(at), 1.0, 1.0, 10, expected=expected(at) if expected else None)
        plan = strategy.revise(plan, Measured(1, found, None))
    return tried, searching.said


def test_a_search_that_was_too_careful_is_made_up_for() -> None:
    """The search samples lose three times what others do: a step ahead uses the rest."""
    tried, _ = settled(lambda at: 0.0012 * at, lambda at: 0.0004 * at)
    assert 0.0004 * tried[0] < 0.008
    assert 0.8 * 0.02 < 0.0004 * tried[-1] <= 0.02
    assert len(tried) <= 4


def test_a_step_too_far_goes_back_to_the_one_that_held() -> None:
    """The loss leaps beyond step 30: what held is taken, whatever was tried after it."""
    tried, said = settled(lambda at: 0.0009 * at, lambda at: 0.0003 * at if at < 31 else 0.5)
    assert max(tried) > 30
    assert tried[-1] == max(at for at in tried if at < 31)
    assert len(tried) <= 6
    assert not said


def test_where_others_lose_more_it_steps_back() -> None:
    tried, _ = settled(lambda at: 0.0002 * at, lambda at: 0.0006 * at)
    assert 0.0006 * tried[-1] <= 0.02
    assert 0.0006 * tried[-1] > 0.75 * 0.02


def test_what_holds_nowhere_is_dense_and_said() -> None:
    tried, said = settled(lambda at: 0.0002 * at, lambda _: 0.5)
    assert tried[-1] == 0
    assert said == ["tolerance=0.02: nothing that was tried held on unseen samples"]


def test_a_loss_of_no_row_is_no_reason_to_go_far() -> None:
    """Of a few rows none changes; their margins say that some of many would."""
    tried, _ = settled(lambda at: 0.0005 * at, lambda _: 0.0, lambda at: 0.0005 * at)
    assert len(tried) == 1


def rows(
    noise: float, shrink: float = 1.0, count: int = 4000, seed: int = 0
) -> tuple[Array, Array]:
    """Scores of an original and of a model whose scores are off by noise, shape [count, 5]."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(count, 5))
    return scores, shrink * scores + noise * rng.normal(size=(count, 5))


def judged(before: Array, after: Array, labels: Array | None = None) -> Judged:
    meter = Metric.parse("top1").meter()
    for n in range(0, len(before), 20):
        rows = slice(n, n + 20)
        meter.add({"p": after[rows]}, {"p": before[rows]}, None if labels is None else labels[rows])
    return meter.result()


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("shrink", [1.0, 0.5])
def test_margins_tell_the_share_of_rows_that_change(noise: float, shrink: float) -> None:
    before, after = rows(noise * shrink, shrink)
    found = judged(before, after)
    assert found.expected == pytest.approx(found.loss, rel=0.15, abs=0.002)
    parts = [judged(before[n : n + 80], after[n : n + 80]) for n in range(0, len(before), 80)]
    expected = [part.expected or 0.0 for part in parts]
    assert np.mean(expected) == pytest.approx(found.loss, rel=0.2, abs=0.003)
    assert np.std(expected) < 0.85 * np.std([part.loss for part in parts])


def test_margins_of_labels() -> None:
    """Rows that were wrong may become right: the loss is what is left of both."""
    before, after = rows(0.4)
    labels = before.argmax(-1)
    wrong = np.random.default_rng(1).random(len(labels)) < 0.3
    labels[wrong] = np.argsort(before[wrong], axis=-1)[:, -2]
    found = judged(before, after, labels)
    assert found.before == pytest.approx(0.7, abs=0.03)
    assert found.expected == pytest.approx(found.loss, abs=0.015)
    assert judged(before, before).expected == 0.0


CLASSIFIER = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 48] x) => (float[N, 10] logits) {
    h = MatMul(x, W) a = Tanh(h) g1 = MatMul(a, V) b = Relu(g1) logits = MatMul(b, U)
}"""


def classifier() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    decay = np.diag(0.85 ** np.arange(48))
    weights = {}
    for name in ("W", "V"):
        left, right = (np.linalg.qr(rng.normal(size=(48, 48)))[0] for _ in range(2))
        weights[name] = (4 * left @ decay @ right).astype("f4")
    weights["U"] = rng.normal(size=(48, 10)).astype("f4")
    return parse(CLASSIFIER, weights)


def images(count: int, seed: int) -> dict[str, Array]:
    return {"x": np.random.default_rng(seed).normal(size=(count, 48)).astype("f4")}


def within(count: int) -> Result:
    options: dict[str, Any] = {"metric": "top1", "objective": "size", "rank_multiple": 1}
    return compress(
        classifier(), data=images(count, 1), tolerance=0.03, bench=False, simplify=False, **options
    )


def test_few_samples_and_many_come_to_about_the_same() -> None:
    """Of 12 rows of a search one is 8 %; the margins tell where 3 % are."""
    shares = []
    for count in (80, 900):
        report = within(count).report
        totals, found = report.totals, report.judged
        assert found is not None
        assert found.loss <= 0.03
        shares.append(totals.linear_parameters_after / totals.linear_parameters_before)
    assert shares[1] < 0.9
    assert shares[0] < 1.15 * shares[1]


def test_samples_that_are_left_take_part_in_the_search() -> None:
    report = within(900).report
    assert report.goal is not None
    assert report.judged is not None
    assert report.judged.samples == 192  # a quarter of the 768 that are read
    assert report.goal.samples == 32 + 320
    assert any(
        "256 samples calibrate, 192 others judge, 320 more take part in the search" in note
        for note in report.notes
    )


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 16),
        ({"tolerance": 0.1}, 16),  # random input
        ({"tolerance": 0.1, "data": "x.npz"}, 256),
        ({"tolerance": 0.1, "data": "x.npz", "samples": 20}, 20),
        ({"keep": 0.5, "data": "x.npz"}, 16),
    ],
)
def test_how_many_samples_judge(options: dict[str, Any], count: int) -> None:
    assert Settings(**options).judging == count


def test_batches_count_by_their_rows() -> None:
    """Of 400 batches of 16 rows 16 judge and 21 more search; every sample has one part."""
    x = np.random.default_rng(1).normal(size=(400, 16, 48)).astype("f4")
    given: dict[str, Any] = {
        "metric": "top1", "tolerance": 0.05, "objective": "size", "rank_multiple": 1,
        "bench": False, "simplify": False, "calibration_samples": 40,
    }  # fmt: skip
    report = compress(classifier(), data=[{"x": own} for own in x], **given).report
    assert report.judged is not None
    assert report.judged.samples == 16
    assert any(
        "40 samples calibrate, 16 others judge, 21 more take part in the search" in note
        for note in report.notes
    )
    other = {"x": np.concatenate(x[200:300])}
    apart = compress(classifier(), data=other, calibration={"x": np.concatenate(x[:100])}, **given)
    assert apart.report.judged is not None
    assert apart.report.judged.samples == 256
    assert apart.report.goal is not None
    assert apart.report.goal.samples == 8 + 256
