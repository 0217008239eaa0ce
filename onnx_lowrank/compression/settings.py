"""The options of a run: one frozen value, checked at the door."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from onnx_lowrank.data.sources import SampleSource, source_name
from onnx_lowrank.errors import UsageError
from onnx_lowrank.graph.shape_for import WISHES, Wishes
from onnx_lowrank.maps.find import Selection
from onnx_lowrank.maps.forms import chosen_forms
from onnx_lowrank.ranks.goals import Budget, Goal, budget_of, only_goal

__all__ = ["DEFAULT_CALIBRATION_SAMPLES", "DEFAULT_ENERGY", "DEFAULT_SAMPLES", "Settings"]

DEFAULT_ENERGY = 0.95
DEFAULT_SAMPLES = 16
DEFAULT_CALIBRATION_SAMPLES = 256


@dataclass(frozen=True)
class Settings:
    """Everything that `onnx_lowrank.compress` takes beside the model; see there.

    Raises:
        UsageError: a value is out of its range, or two exclude each other.
    """

    energy: float | None = None
    rank: int | None = None
    keep: float | None = None
    uniform: bool = False
    max_size: int | str | None = None
    tolerance: float | None = None
    speedup: float | None = None
    max_latency: float | str | None = None
    metric: str = "relative-l2"
    objective: str | None = None
    labels: str | os.PathLike[str] | None = None
    save_costs: str | os.PathLike[str] | None = None
    load_costs: str | os.PathLike[str] | None = None
    allow_slower: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    ops: tuple[str, ...] | None = None
    constant_inputs: bool = False
    min_gain: float = 0.1
    rank_multiple: int | str | None = None
    shape_for: str | None = None
    input_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    dims: Mapping[str, int] = field(default_factory=dict)
    data: str | os.PathLike[str] | None = None
    samples: int = DEFAULT_SAMPLES
    calibration: SampleSource | None = None
    calibration_samples: int = DEFAULT_CALIBRATION_SAMPLES
    calibrate: bool = True
    mask: str | None = None
    fisher: bool = False
    refit: bool = False
    save_stats: str | os.PathLike[str] | None = None
    load_stats: str | os.PathLike[str] | None = None
    heal: int = 0
    heal_at: tuple[str, ...] = ()
    seed: int = 0
    max_error: float | None = None
    simplify: bool = True
    check: bool = True
    bench: bool = True
    threads: int | None = None
    ep: str = "cpu"
    dry_run: bool = False

    def __post_init__(self) -> None:
        goals = {
            "energy": self.energy,
            "rank": self.rank,
            "keep": self.keep,
            "max-size": self.max_size,
            "tolerance": self.tolerance,
            "speedup": self.speedup,
            "max-latency": self.max_latency,
        }
        only_goal(goals)
        if all(value is None for value in goals.values()):
            object.__setattr__(self, "energy", DEFAULT_ENERGY)
        self._check_shape()
        _ = self.goal, self.budget, chosen_forms(self.ops)
        self._check_budget()
        for name, least in (
            ("samples", 1),
            ("calibration_samples", 1),
            ("heal", 0),
            ("seed", 0),
            ("threads", 1),
        ):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= least):
                option = name.replace("_", "-")
                raise UsageError(f"--{option}: expected a whole number from {least}, got {value!r}")
        if self.calibration is not None and not self.calibrate:
            raise UsageError("--calibrate and --no-calibrate exclude each other")
        for name, given in (("fisher", self.fisher), ("refit", self.refit)):
            known = name == "fisher" and self.load_stats is not None
            if given and not known and self.calibration is None and self.data is None:
                raise UsageError(f"--{name} needs samples: --calibrate or --data")
            if given and not self.calibrate:
                raise UsageError(f"--{name} and --no-calibrate exclude each other")
        self._check_statistics()
        self._check_healing()
        if self.max_error is not None:
            if not (math.isfinite(self.max_error) and self.max_error >= 0):
                raise UsageError(
                    f"--max-error: expected a finite number from 0, got {self.max_error!r}"
                )
            if not self.check:
                raise UsageError("--max-error needs the check that --no-check leaves out")
            if self.dry_run:
                raise UsageError("--max-error needs the check that --dry-run leaves out")

    def _check_shape(self) -> None:
        """Settle the multiple of the ranks, which the target may set."""
        if self.shape_for is not None and self.shape_for not in WISHES:
            raise UsageError(f"--for: expected one of {', '.join(WISHES)}, got {self.shape_for!r}")
        if self.rank_multiple is None:
            wishes = Wishes() if self.shape_for is None else WISHES[self.shape_for]
            object.__setattr__(self, "rank_multiple", wishes.rank_multiple)
        elif self.rank_multiple == "auto" and (self.budget is None or not self.bench):
            raise UsageError(
                "--rank-multiple auto needs a goal for the whole model, such as --keep, and the "
                "timing that --no-bench leaves out"
            )

    def _check_budget(self) -> None:
        budget = self.budget
        if self.uniform and self.keep is None:
            raise UsageError("--uniform says how --keep is spread, which is not given")
        if budget is None or budget.kind == "keep":
            return
        if budget.kind in ("speedup", "max-latency") and not self.bench:
            raise UsageError(f"--{budget.kind} and --no-bench exclude each other")
        if budget.kind == "tolerance" and not self.check:
            raise UsageError("--tolerance and --no-check exclude each other")
        if self.dry_run and budget.kind in ("speedup", "max-latency"):
            raise UsageError(f"--{budget.kind} and --dry-run exclude each other")

    def _check_statistics(self) -> None:
        if self.load_stats is not None:
            for name, given in (
                ("save-stats", self.save_stats is not None),
                ("calibrate", self.calibration is not None),
                ("mask", self.mask is not None),
                ("no-calibrate", not self.calibrate),
            ):
                if given:
                    raise UsageError(f"--load-stats and --{name} exclude each other")
        if self.save_stats is not None:
            if not self.calibrate:
                raise UsageError("--save-stats and --no-calibrate exclude each other")
            if self.calibration is None and self.data is None:
                raise UsageError("--save-stats needs samples: --calibrate or --data")

    def _check_healing(self) -> None:
        if self.heal_at and not self.heal:
            raise UsageError("--heal-at needs --heal")
        if not self.heal:
            return
        if self.calibration is None and self.data is None:
            raise UsageError("--heal needs samples: --calibrate or --data")
        for name, given in (("dry-run", self.dry_run), ("no-calibrate", not self.calibrate)):
            if given:
                raise UsageError(f"--heal and --{name} exclude each other")

    @property
    def goal(self) -> Goal:
        """How ranks are chosen."""
        multiple = Wishes().rank_multiple if self.rank_multiple == "auto" else self.rank_multiple
        if not isinstance(multiple, int):
            raise UsageError(
                f"--rank-multiple: expected a whole number or auto, got {self.rank_multiple!r}"
            )
        keep = self.keep if self.uniform else None
        budget = self.budget is not None
        return Goal(self.energy, self.rank, keep, self.min_gain, multiple, budget)

    @property
    def budget(self) -> Budget | None:
        """The goal for the whole model; None where every layer is chosen for itself."""
        return budget_of(
            keep=None if self.uniform else self.keep,
            max_size=self.max_size,
            tolerance=self.tolerance,
            speedup=self.speedup,
            max_latency=self.max_latency,
            objective=self.objective,
            metric=self.metric,
        )

    @property
    def selection(self) -> Selection:
        """Which nodes may be factored."""
        return Selection(self.include, self.exclude)

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values, for the report."""
        plain = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        plain["calibration"] = None if self.calibration is None else source_name(self.calibration)
        for name in ("data", "labels", "save_stats", "load_stats", "save_costs", "load_costs"):
            path = getattr(self, name)
            plain[name] = None if path is None else os.fspath(path)
        return plain
