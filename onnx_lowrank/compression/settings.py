"""The options of a run: one frozen value, checked when it is made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from onnx_lowrank.compression.option import check_relations, check_values
from onnx_lowrank.compression.options import OPTIONS
from onnx_lowrank.compression.verbs import SETTINGS
from onnx_lowrank.data.sources import SampleSource, source_name
from onnx_lowrank.errors import UsageError, named
from onnx_lowrank.evaluation.metrics import Metric, Score
from onnx_lowrank.graph.wishes import WISHES, Wishes
from onnx_lowrank.maps.forms import chosen_forms
from onnx_lowrank.maps.selection import Selection
from onnx_lowrank.ranks.format_wishes import FormatWishes, offered, quantized_ops
from onnx_lowrank.ranks.goals import Budget, Goal, budget_of, seconds_of, size_of
from onnx_lowrank.ranks.recipe import Recipe
from onnx_lowrank.runtime.cluster import scheduler_of
from onnx_lowrank.schema.report import DamageOf

__all__ = ["Settings"]

_ENERGY = 0.95
# How many samples judge: by default, and where there is a limit of the loss.
_SAMPLES, _LIMITED = 16, 256


@dataclass(frozen=True)
class Settings:
    """Everything that `onnx_lowrank.compress` takes beside the model; see there.

    The fields are written by ``tools/write_options.py`` from the table of the options.

    Raises:
        UsageError: a value is out of its range, or two exclude each other.
    """

    energy: float | None = None
    rank: int | None = None
    keep: float | None = None
    uniform: bool = False
    max_size: int | str | None = None
    tolerance: float | None = None
    metric: str | Score | None = None
    objective: str | None = None
    speedup: float | None = None
    max_latency: float | str | None = None
    recipe: str | os.PathLike[str] | Recipe | None = None
    allow_slower: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    ops: tuple[str, ...] | None = None
    constant_inputs: bool = False
    min_gain: float = 0.1
    rank_multiple: int | str | None = None
    shape_for: str | None = None
    weights: str = "fp32"
    activations: str = "float"
    operators: str = "onnx"
    requantize: bool = False
    quantize_ops: tuple[str, ...] | None = None
    data: SampleSource | None = None
    labels: str | os.PathLike[str] | None = None
    samples: int | None = None
    seed: int = 0
    input_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    dims: Mapping[str, int] = field(default_factory=dict)
    calibration: SampleSource | None = None
    calibration_samples: int = 256
    calibrate: bool = True
    mask: str | None = None
    effort: str | None = None
    time_limit: float | str | None = None
    fisher: bool = False
    refit: bool = False
    heal: int = 0
    heal_at: tuple[str, ...] = ()
    save_stats: str | os.PathLike[str] | None = None
    load_stats: str | os.PathLike[str] | None = None
    judge_at: tuple[str, ...] = ()
    max_error: float | None = None
    check: bool = True
    bench: bool = True
    threads: int | None = None
    ep: str = "cpu"
    custom_ops: tuple[str | os.PathLike[str], ...] = ()
    memory: int | str | None = None
    work: str | os.PathLike[str] | None = None
    executor: str | Executor | None = None
    device: str = "cpu"
    save_costs: str | os.PathLike[str] | None = None
    load_costs: str | os.PathLike[str] | None = None
    save_recipe: str | os.PathLike[str] | None = None
    simplify: bool = True
    dry_run: bool = False

    def __post_init__(self) -> None:
        values = self.values()
        check_values(SETTINGS, values)
        check_relations(SETTINGS, values)
        if not any(values[option.name] is not None for option in SETTINGS if option.goal):
            object.__setattr__(self, "energy", _ENERGY)
        if self.rank_multiple is None:
            wishes = Wishes() if self.shape_for is None else WISHES[self.shape_for]
            object.__setattr__(self, "rank_multiple", wishes.rank_multiple)
        _ = chosen_forms(self.ops), self.metric_used, self.budget
        _ = self.memory_limit, self.time_limit_seconds
        if isinstance(self.executor, str):
            scheduler_of(self.executor)
        if not self.quantized.single and self.budget is None and self.recipe is None:
            raise UsageError(
                f"{named('weights', self.weights)} needs a goal for the whole model to choose by, "
                f"such as {named('max_size')}; expected that or one format"
            )
        if self.rank_multiple == "auto" and (self.budget is None or not self.bench):
            raise UsageError(
                f"{named('rank_multiple', 'auto')} needs a goal for the whole model, such as "
                f"{named('keep')}, and the timing that {named('bench', False)} leaves out"
            )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """The settings of a function's arguments, as they were given.

        Raises:
            UsageError: as the class does.
        """
        stored = dict(values)
        for name, value in values.items():
            option = OPTIONS[name]
            option.check(value)
            match option.kind:
                case "texts" | "list" | "paths":
                    stored[name] = None if value is None else tuple(value)
                case "shapes":
                    stored[name] = {key: tuple(sizes) for key, sizes in (value or {}).items()}
                case "dims":
                    stored[name] = dict(value or {})
        return cls(**stored)

    def values(self) -> dict[str, Any]:
        """Every option as it is in force."""
        return {option.name: getattr(self, option.name) for option in SETTINGS}

    def carrying(self, recipe: Recipe, values: Mapping[str, Any]) -> Settings:
        """The settings of a run that carries out a recipe.

        Args:
            recipe: the recipe.
            values: the options that it holds beside its goal.
        """
        return Settings.of({**self.values(), **values, "recipe": recipe})

    def typed(self) -> dict[str, Any]:
        """Every option as it was given, without those that a recipe holds."""
        values = self.values()
        if isinstance(self.recipe, Recipe):
            values |= {name: OPTIONS[name].default for name in self.recipe.settings}
            values["recipe"] = self.recipe if self.recipe.path is None else self.recipe.path
        return values

    @property
    def searched(self) -> bool:
        """Whether a search finds the ranks, or found those of the recipe.

        Then factors are fitted to some of the samples first, and to the others, too, afterwards.
        """
        if isinstance(self.recipe, Recipe):
            return self.recipe.searched
        return self.budget is not None

    @property
    def limited(self) -> bool:
        """Whether the loss has a limit, or had one where a recipe's ranks were found."""
        if isinstance(self.recipe, Recipe):
            return self.recipe.goal.get("tolerance") is not None
        return self.tolerance is not None

    @property
    def judging(self) -> int:
        """How many samples judge, at most; a limit of the loss wants more than a look at it."""
        real = self.data is not None or self.calibration is not None
        return self.samples or (_LIMITED if real and self.limited else _SAMPLES)

    @property
    def keeps_aside(self) -> bool:
        """Whether factors are fitted without some samples first, which then judge."""
        return self.searched or self.effort_used != "quick"

    @property
    def goal(self) -> Goal:
        """How ranks are chosen; of a recipe, by what its layers were measured."""
        if isinstance(self.recipe, Recipe):
            return self.recipe.limits(self.min_gain)
        multiple = self.rank_multiple
        if not isinstance(multiple, int):  # auto: measured where there is a choice
            multiple = Wishes().rank_multiple
        keep = self.keep if self.uniform else None
        budget = self.budget is not None
        return Goal(self.energy, self.rank, keep, self.min_gain, multiple, budget)

    @cached_property
    def budget(self) -> Budget | None:
        """The goal for the whole model; None where every layer is chosen for itself."""
        return budget_of(
            keep=None if self.uniform else self.keep,
            max_size=self.max_size,
            tolerance=self.tolerance,
            speedup=self.speedup,
            max_latency=self.max_latency,
            objective=self.objective,
            metric=self.metric_used,
        )

    @property
    def memory_limit(self) -> int | None:
        """Bytes that may be held; None where the user set no limit."""
        return None if self.memory is None else size_of(self.memory, "memory")

    @property
    def effort_used(self) -> str:
        """How much is tried: what was asked for, else standard where no method was named."""
        named_one = self.fisher or self.refit or self.heal
        return self.effort or ("quick" if named_one else "standard")

    @property
    def heals(self) -> bool:
        """Whether healing is asked for, by its steps or by the effort."""
        return bool(self.heal) or self.effort_used == "thorough"

    @property
    def time_limit_seconds(self) -> float | None:
        """From the start of the run; None without a limit."""
        return None if self.time_limit is None else seconds_of(self.time_limit, "time_limit")

    @cached_property
    def metric_used(self) -> Metric:
        """What a tolerance limits; one object for the whole run, which loads a function once."""
        return Metric() if self.metric is None else Metric.parse(self.metric)

    @property
    def metric_given(self) -> Metric | None:
        """What the user wants the result judged by; None if that was not said."""
        return None if self.metric is None else self.metric_used

    @property
    def damage_of(self) -> DamageOf:
        """What damage is measured at."""
        return "classes" if self.metric_used.of_classes else "outputs"

    @cached_property
    def quantized(self) -> FormatWishes:
        """In which numbers weights may be stored."""
        targets = self.shape_for, self.ep
        kept = self.requantize and self.weights == OPTIONS["weights"].default
        found = offered("8" if kept else self.weights, self.activations, targets)
        own: dict[str, str] | None = {} if kept else None
        ops, fused = quantized_ops(self.quantize_ops), self.operators == "microsoft"
        if fused and not found.blocks:
            raise UsageError(
                f"{named('operators', self.operators)}: the target takes no weights in blocks of "
                f"integers, which MatMulNBits has; expected {named('operators', 'onnx')}"
            )
        return replace(found, ops=ops, own=own, fused=fused)

    @property
    def selection(self) -> Selection:
        """Which nodes may be factored."""
        return Selection(self.include, self.exclude)

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values, for the report."""
        plain = self.values()
        for option in SETTINGS:
            value = plain[option.name]
            if value is not None and option.kind == "samples":
                plain[option.name] = source_name(value)
            elif option.kind == "executor" and isinstance(value, Executor):
                plain[option.name] = type(value).__name__
            elif isinstance(value, Recipe):
                plain[option.name] = None if value.path is None else str(value.path)
            elif value is not None and option.kind in ("path", "recipe"):
                plain[option.name] = os.fspath(value)
            elif option.kind == "paths":
                plain[option.name] = tuple(os.fspath(path) for path in value)
        return {**plain, "metric": None if self.metric is None else self.metric_used.text}
