"""Timing in turns: noise, and the multiples of ranks that a kernel likes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.ranks.microbench import (
    Limits,
    Rounds,
    alignment,
    compare,
)
from onnx_lowrank.ranks.specimen import Specimen
from tests.helpers.timed import (
    F32,
    QUICK,
    measured,
    planned,
    product,
    sized,
)


def rounds_of(ratios: Sequence[float], noise: float) -> tuple[Rounds, list[int]]:
    generator = np.random.default_rng(0)
    asked: list[int] = []

    def rounds(count: int) -> npt.NDArray[np.float64]:
        asked.append(count)
        drift = generator.uniform(1, 3, (count, 1))  # a busy machine slows all models of a round
        own = 1 + noise * generator.standard_normal((count, len(ratios) + 1))
        return np.asarray(1e5 * drift * np.array([1.0, *ratios]) * own)

    return rounds, asked


def test_ratios_do_not_suffer_from_what_slows_a_whole_round() -> None:
    rounds, asked = rounds_of([0.5, 2.0], 0.0)
    timing = compare(rounds, Limits(fewest=5, enough=15, most=100, seconds=1e9))
    assert timing.ratios == pytest.approx((0.5, 2.0))
    assert timing.noise == pytest.approx(0)
    assert timing.rounds == sum(asked) == 15


def test_noise_asks_for_more_rounds_up_to_a_limit() -> None:
    limits = Limits(fewest=5, enough=15, most=95, seconds=1e9, width=0.03)
    rounds, asked = rounds_of([0.5], 0.05)
    timing = compare(rounds, limits)
    assert 15 < timing.rounds < 95
    assert timing.noise <= 0.03
    assert timing.ratios[0] == pytest.approx(0.5, rel=0.05)
    rounds, asked = rounds_of([0.5], 0.3)
    timing = compare(rounds, limits)
    assert timing.rounds == sum(asked) == 95
    assert timing.noise > 0.03


def test_no_further_rounds_after_the_time() -> None:
    rounds, _ = rounds_of([0.5], 0.5)
    assert compare(rounds, Limits(fewest=5, seconds=0.0)).rounds == 5


def test_the_interval_holds_the_truth() -> None:
    inside = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        noise = generator.lognormal(0, 0.1, (25, 2))
        timing = compare(lambda _, n=noise: n, Limits(fewest=25, enough=1, most=1))  # type: ignore[misc]
        inside += abs(timing.ratios[0] - 1) <= 1.5 * timing.widths[0] * timing.ratios[0]
    assert inside >= 180


def test_uncertain_times_are_said() -> None:
    options = {"timer": sized(noise=0.4), "limits": Limits(most=25, seconds=1e9)}
    table, _ = measured(product(96, 64), {"x": np.ones((5, 96), F32)}, **options)
    (note,) = table.notes()
    assert "latency of 1 of 1 kinds of layers is uncertain, by up to" in note


# --- alignment


def staircase(step: int, noise: float = 0.0) -> Any:
    """A timer on which a rank costs what the next multiple costs, and a dense map 100."""
    generator = np.random.default_rng(0)

    def cost(data: bytes) -> float:
        factors = [t for t in onnx.load_from_string(data).graph.initializer if "_A" in t.name]
        return 10.0 + -(-factors[0].dims[1] // step) * step if factors else 100.0

    def timer(models: Sequence[bytes], feed: Mapping[str, Array]) -> Rounds:
        base = np.array([cost(data) for data in models])
        return lambda count: base * (1 + noise * generator.standard_normal((count, len(base))))

    return timer


def square(size: int) -> Specimen:
    plan, _ = planned(product(size, size), {"x": np.ones((1, size), F32)})
    return next(iter(plan.specimens.values()))


@pytest.mark.parametrize(
    ("size", "step", "multiple"),
    [
        (128, 1, 1),
        (128, 4, 4),
        (128, 8, 8),
        (128, 16, 16),
        (128, 32, 32),
        (48, 16, 16),  # too small to tell 32 from 16
        (48, 8, 8),
        (20, 8, 8),
        (20, 4, 4),
    ],
)
def test_the_multiple_that_a_kernel_likes(size: int, step: int, multiple: int) -> None:
    found = alignment(square(size), staircase(step), Limits(most=15))
    assert found is not None
    assert found.multiple == multiple


def test_what_cannot_be_told_is_not_told() -> None:
    assert alignment(square(128), staircase(8, noise=0.5), Limits(most=15)) is None
    assert alignment(square(12), staircase(8), QUICK) is None


def test_multiples_in_the_table() -> None:
    feed = {"x": np.ones((1, 128), F32)}
    table, (group,) = measured(product(128, 128), feed, timer=staircase(16), multiples=True)
    assert table.multiple(group) == 16
    table, (group,) = measured(product(128, 128), feed)
    assert table.multiple(group) is None
