"""Goals: what decides the ranks, in the user's own units.

A `Goal` is asked of each layer: an energy, a rank or a share.  A `Budget` is asked of the whole
model; the goal then only limits the ranks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from onnx_lowrank.errors import UsageError, named
from onnx_lowrank.evaluation.metrics import Metric
from onnx_lowrank.maps.find import Group

__all__ = ["OBJECTIVES", "Budget", "Goal", "budget_of", "milliseconds_of", "seconds_of", "size_of"]

RELATIVE_L2 = Metric()
BudgetKind = Literal["keep", "max-size", "tolerance", "speedup", "max-latency"]
Objective = Literal["size", "macs", "latency"]
OBJECTIVES: tuple[Objective, ...] = ("size", "macs", "latency")

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SIZE = re.compile(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmg]i?)?b?\s*", re.IGNORECASE)
_TIME = re.compile(r"\s*([0-9.]+(?:e-?[0-9]+)?)\s*(us|µs|ms|s)?\s*", re.IGNORECASE)
_DURATION = re.compile(r"\s*([0-9.]+)\s*(s|min|m|h)?\s*", re.IGNORECASE)
_LONG = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
# A text without a unit below this was meant in another unit: no model is that small.
_LEAST_BYTES = 1000
_SECONDS = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "": 1.0, "s": 1e3}


@dataclass(frozen=True)
class Goal:
    """How ranks are chosen: by an energy, a rank, a share to keep, or a budget for all layers.

    Attributes:
        energy: share of the squared singular values, or with calibration samples of the layer's
            output energy, to hold, in (0, 1].
        rank: the rank, taken as it is.
        keep: share of a layer's parameters that the pair may have, in (0, 1].
        min_gain: a pair has at most ``1 − min_gain`` of the parameters of its weight.
        rank_multiple: chosen ranks are rounded to a multiple of this.
        budget: whether a `Budget` chooses, and only the limits count.
    """

    energy: float | None = None
    rank: int | None = None
    keep: float | None = None
    min_gain: float = 0.1
    rank_multiple: int = 8
    budget: bool = False

    def __post_init__(self) -> None:
        goals = (self.energy, self.rank, self.keep)
        assert sum(goal is not None for goal in goals) + self.budget == 1

    @property
    def needs_spectrum(self) -> bool:
        """Whether the choice depends on the singular values; a given rank does not."""
        return self.rank is None

    def largest(self, group: Group) -> int:
        """Largest rank that the gain limit allows for a group."""
        share = 1.0 - self.min_gain
        if group.others:  # the weight itself stays beside the pair
            share -= 1.0
        return group.largest(share)


@dataclass(frozen=True)
class Budget:
    """What is asked of the whole model.

    Attributes:
        kind: "keep", a share of the linear layers' parameters; "max-size", bytes of OUT;
            "tolerance", the largest loss of the metric; "speedup", a ratio to the original's
            latency; "max-latency", milliseconds.
        value: how much.
        objective: what is minimized within a tolerance.
        metric: the metric that a tolerance limits.
        most_bytes: of OUT, beside a tolerance; None without that limit.
    """

    kind: BudgetKind
    value: float
    objective: Objective = "latency"
    metric: Metric = RELATIVE_L2
    most_bytes: int | None = None

    @property
    def option(self) -> str:
        """As one would type it."""
        if self.kind == "max-size":
            return f"--max-size {self.value:.0f}"
        unit = "ms" if self.kind == "max-latency" else ""
        text = f"--{self.kind} {self.value:g}{unit}"
        return text if self.most_bytes is None else f"{text} --max-size {self.most_bytes}"

    @property
    def size_limit(self) -> int | None:
        """Bytes that OUT may have; None where they are not limited."""
        return int(self.value) if self.kind == "max-size" else self.most_bytes

    @property
    def named(self) -> str:
        """As a message names it."""
        value: float | str = int(self.value) if self.value == int(self.value) else self.value
        shown = f"{self.value:g}ms" if self.kind == "max-latency" else value
        return named(self.kind.replace("-", "_"), shown)

    @property
    def timed(self) -> bool:
        """Whether it depends on latency."""
        if self.kind == "tolerance":
            return self.objective == "latency"
        return self.kind in ("speedup", "max-latency")


def budget_of(
    *,
    keep: float | None,
    max_size: int | str | None,
    tolerance: float | None,
    speedup: float | None,
    max_latency: float | str | None,
    objective: str | None,
    metric: Metric,
) -> Budget | None:
    """The budget among these options, None if there is none.

    Raises:
        UsageError: a text is no size or no time.
    """
    if keep is not None:
        return Budget("keep", keep)
    size = None if max_size is None else size_of(max_size)
    if tolerance is not None:
        chosen: Objective = next((o for o in OBJECTIVES if o == objective), "latency")
        return Budget("tolerance", tolerance, chosen, metric, size)
    if size is not None:
        return Budget("max-size", size)
    if speedup is not None:
        return Budget("speedup", speedup)
    if max_latency is not None:
        return Budget("max-latency", milliseconds_of(max_latency))
    return None


def size_of(text: int | str, name: str = "max_size") -> int:
    """Bytes of ``20MB``, ``1.5 GiB``, ``800k`` or a plain number.

    Args:
        text: the size.
        name: of the option, for messages.

    Raises:
        UsageError: it is no size, or a text without a unit that is smaller than any model.
    """
    found = _SIZE.fullmatch(str(text))
    number = _number(found.group(1)) if found else None
    option = named(name)
    if found is None or number is None or number <= 0 or isinstance(text, bool):
        raise UsageError(f"{option}: expected bytes such as 20MB or 1.5GiB, got {text!r}")
    if isinstance(text, str) and number < _LEAST_BYTES and found.group(1) == text.strip():
        raise UsageError(
            f"{option}: expected bytes such as 20MB, got {number:g} bytes; did you mean "
            f"{number:g}MB?"
        )
    return int(number * _UNITS[(found.group(2) or "").lower()])


def milliseconds_of(text: float | str) -> float:
    """Milliseconds of ``5ms``, ``800us``, ``0.2s`` or a plain number of milliseconds.

    Raises:
        UsageError: it is no time.
    """
    found = _TIME.fullmatch(str(text))
    number = _number(found.group(1)) if found else None
    if found is None or number is None or number <= 0 or isinstance(text, bool):
        raise UsageError(
            f"{named('max_latency')}: expected a time such as 5ms or 800us, got {text!r}"
        )
    return number * _SECONDS[(found.group(2) or "").lower()]


def seconds_of(text: float | str, name: str) -> float:
    """Seconds of ``90s``, ``10m``, ``1.5h`` or a plain number of seconds.

    Args:
        text: the time.
        name: of the option, for messages.

    Raises:
        UsageError: it is no time.
    """
    found = _DURATION.fullmatch(str(text))
    number = _number(found.group(1)) if found else None
    if found is None or number is None or number <= 0 or isinstance(text, bool):
        raise UsageError(f"{named(name)}: expected a time such as 90s, 10m or 2h, got {text!r}")
    return number * _LONG[(found.group(2) or "s").lower()]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
