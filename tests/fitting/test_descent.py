"""The descent: rates that are tried, how often it is judged, and how it spends the time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from onnx_lowrank.fitting.descent import Descent, HealPlan
from onnx_lowrank.numerics.adam import Adam, schedule
from onnx_lowrank.numerics.arrays import Array

TARGET = np.linspace(0.5, 1.5, 40).astype(np.float32)
START = TARGET + np.random.default_rng(0).normal(size=40).astype(np.float32) / 30
RATES = (2.5e-4, 1e-3, 4e-3, 1.2e-2)


@dataclass
class Valley:
    """A quadratic whose gradients are noisy; stands for the model, its batches and its judge.

    ``seconds`` is the time by its clock, of which a step takes one.
    """

    judges: int = 1
    noise: float = 0.0
    seconds: float = 0.0
    asked: int = 0
    steps: int = 0
    rounds: list[int] = field(default_factory=list)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(3))

    def error(self, arrays: dict[str, Array]) -> float:
        self.asked += 1
        return float(np.linalg.norm(arrays["w"] - TARGET))

    def __len__(self) -> int:
        return self.judges

    def inputs(self, _: int) -> dict[str, Array]:
        return {}

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        self.steps += 1
        self.seconds += 1.0
        noise = self.noise * self.rng.normal(size=40)
        return {"slope": (feed["w"] - TARGET + noise).astype(np.float32)}

    def load(self) -> None:
        return None

    def save(self, state: Callable[[], Any]) -> None:
        self.rounds.append(state().place.steps)

    def descent(self, plan: HealPlan) -> Descent:
        own: Any = self
        gradients: Any = SimpleNamespace(outputs={"w": "slope"})
        adam = Adam({"w": START}, plan.rate or 1e-3)
        return Descent(adam, gradients, self.run, own, own, plan, lambda _: None, None, own)


def reached(rate: float, noise: float) -> float:
    """The error after the few steps that a trial has."""
    valley, adam = Valley(noise=noise), Adam({"w": START}, rate)
    for step in range(12):
        adam.step({"w": valley.run({"w": adam.arrays["w"]})["slope"]}, schedule(step, 12))
    return valley.error(dict(adam.arrays))


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5])
def test_the_largest_rate_that_helps_is_found(noise: float) -> None:
    errors = [reached(rate, noise) for rate in RATES]
    before = float(np.linalg.norm(START - TARGET))
    helping = [n for n, error in enumerate(errors) if error < before]
    assert helping == list(range(len(helping)))
    valley = Valley(noise=noise)
    descent = valley.descent(HealPlan(1, rate=None))
    descent.go()
    assert descent.rate == RATES[max(len(helping) - 1, 0)]
    # One that harms ends the search, and a round of one step follows.
    assert valley.steps == 12 * min(len(helping) + 1, len(RATES)) + 1


def test_what_trials_reached_is_kept() -> None:
    descent = Valley().descent(HealPlan(1, rate=None))
    before = descent.before
    descent.go()
    assert descent.best_step in (12, 13)
    assert descent.best <= min(reached(rate, 0.0) for rate in RATES) < before


def test_batches_that_judge_are_asked_as_often_as_they_are_cheap() -> None:
    few, many = Valley(judges=1), Valley(judges=30)
    for valley in (few, many):
        valley.descent(HealPlan(120)).go()
    assert few.asked == 1 + 12 + 2  # the start, and two early ones
    assert many.asked == 1 + 3 + 2


def test_a_round_takes_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    valley = Valley()
    clock = SimpleNamespace(monotonic=lambda: valley.seconds)
    monkeypatch.setattr("onnx_lowrank.fitting.descent.time", clock)
    valley.descent(HealPlan(100, rate=None, rounds=6, until=100.0)).go()
    assert valley.rounds[0] == math.floor(0.8 * (100.0 - 12 * len(RATES)))
    assert valley.seconds <= 100.0
