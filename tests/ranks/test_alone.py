"""The damage of a layer alone: on how many samples it is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import pytest

from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.ranks.alone import Halves, alone
from onnx_lowrank.ranks.probe import Probe


@dataclass
class Played:
    """A probe whose damages are known before.

    Attributes:
        known: by sample.
        rows: of a sample.
        ran: samples that were run, in this order.
    """

    known: Sequence[float | None]
    rows: int = 1
    ran: list[int] = field(default_factory=list)

    @property
    def feeds(self) -> Sequence[float | None]:
        return self.known

    def places(self, most: int | None = None) -> tuple[int, ...]:
        return Probe.places(cast(Probe, self), most)

    def damages(
        self, constants: Mapping[str, Array], places: Sequence[int]
    ) -> Sequence[float | None]:
        self.ran += places
        return [self.known[place] for place in places]

    def damage(self, constants: Mapping[str, Array], most: int | None = None) -> float | None:
        found = [own for own in self.damages(constants, self.places(most)) if own is not None]
        return float(np.mean(found)) if found else None


def measured(
    probe: Played,
    measurements: int = 36,
    most: int | None = 12,
    halves: Halves | None = None,
) -> float | None:
    return alone(cast(Probe, probe), {}, measurements, most, halves or Halves())


def test_where_samples_agree_half_of_them_are_enough() -> None:
    probe = Played([1.0 + 0.3 * (number % 2) for number in range(32)])
    assert measured(probe) == pytest.approx(1.15, abs=0.15)
    assert probe.ran == [0, 5, 11, 16, 22, 28]


def test_where_they_do_not_all_are_run_once() -> None:
    values: list[float | None] = [0.1] * 32
    values[11] = 9.0
    probe = Played(values)
    chosen = probe.places(12)
    assert measured(probe) == pytest.approx((9.0 + 11 * 0.1) / 12)
    assert sorted(probe.ran) == list(chosen)
    assert len(set(probe.ran)) == 12


def test_where_layers_hardly_ever_agree_no_half_is_run_first() -> None:
    values: list[float | None] = [0.1, 9.0] * 16
    values[:] = sorted(values, key=lambda own: own or 0.0)
    halves, probe = Halves(), Played(values)
    for _ in range(4):
        probe.ran.clear()
        measured(probe, halves=halves)
        assert probe.ran != sorted(probe.ran)  # a half, and the other one
    probe.ran.clear()
    measured(probe, halves=halves)
    assert probe.ran == list(probe.places(12))
    assert (halves.tried, halves.enough) == (4, 0)
    agreeing, other = Played([1.0] * 32), Halves()
    for _ in range(9):
        measured(agreeing, halves=other)
    assert len(agreeing.ran) == 9 * 6


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_of_few_samples_all_are_run(count: int) -> None:
    probe = Played([2.0] * count)
    assert measured(probe) == 2.0
    assert sorted(probe.ran) == list(range(count))


def test_what_they_do_not_show_others_may() -> None:
    probe = Played([0.0] * 31 + [0.5])
    probe.known = [*[0.0] * 30, 0.5, 0.0]
    assert measured(probe) == pytest.approx(0.5 / 32)
    assert set(probe.ran) == set(range(32))


def test_samples_that_cannot_be_compared_are_left_out() -> None:
    probe = Played([None, 1.0] * 16)
    assert measured(probe) == 1.0
    assert measured(Played([None] * 32)) is None


def test_without_a_limit_all_are_run_at_once() -> None:
    probe = Played([1.0] * 20)
    assert alone(cast(Probe, probe), {}, 3) == 1.0
    assert probe.ran == list(range(20))
