"""What an option is: its value's kind and range, its texts, and what it needs or excludes."""

from __future__ import annotations

import math
import numbers
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Literal

from onnx_lowrank.errors import UsageError, named

__all__ = ["Option", "check_relations", "check_values", "marked"]

Kind = Literal[
    "switch",  # True where it is given
    "off",  # a switch that the command turns off: --no-check is check=False
    "number",
    "whole",
    "wholes",  # repeatable
    "choice",
    "choices",  # a text of some, separated by commas
    "text",
    "texts",  # repeatable
    "list",  # separated by commas
    "numbers",  # separated by commas
    "path",
    "paths",  # repeatable
    "model",  # a path; for a function also a model in memory
    "samples",  # a path or a callable's place; for a function also arrays
    "recipe",  # a path; for a function also a recipe in memory
    "metric",  # a name or a callable's place; for a function also a callable
    "executor",  # an address; for a function also a concurrent.futures.Executor
    "size",  # bytes, or a text with a unit
    "time",  # milliseconds, or a text with a unit
    "multiple",  # a whole number or "auto"
    "shapes",  # input -> sizes
    "dims",  # dimension -> size
]

# Argument's type by kind, where an option does not have another.
_TYPES: dict[Kind, str] = {
    "switch": "bool",
    "off": "bool",
    "number": "float | None",
    "whole": "int | None",
    "wholes": "Sequence[int]",
    "choice": "str | None",
    "choices": "str | None",
    "text": "str | None",
    "texts": "Sequence[str]",
    "list": "Sequence[str] | None",
    "numbers": "Sequence[float]",
    "path": "str | os.PathLike[str] | None",
    "paths": "Sequence[str | os.PathLike[str]]",
    "model": "ModelLike | None",
    "samples": "SampleSource | None",
    "recipe": "str | os.PathLike[str] | Recipe | None",
    "metric": "str | Score",
    "executor": "str | Executor | None",
    "size": "int | str | None",
    "time": "float | str | None",
    "multiple": "int | str | None",
    "shapes": "Mapping[str, Sequence[int]] | None",
    "dims": "Mapping[str, int] | None",
}


# What a value is, for messages; of numbers the range says it.
_EXPECTED: dict[Kind, str] = {
    "text": "a text",
    "texts": "texts",
    "list": "texts",
    "executor": "dask://HOST:PORT, or for a function a concurrent.futures.Executor",
    "path": "a path",
    "paths": "paths",
    "dims": "a mapping from dimensions to whole numbers from 0",
    "shapes": "a mapping from inputs to sequences of whole numbers from 0",
}


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: of the argument.
        kind: what its value is.
        help: what it does, with other options in braces.
        group: under which heading the command's help lists it.
        default: of the argument; None where the run decides.
        type_: of the argument, where the kind does not tell.
        shown: what the help says of the default, where the value does not tell.
        flag: the command's option; without one ``--name`` or ``--no-name``.
        aliases: other flags that mean the same.
        metavar: what the help shows for the value.
        choices: the values there are.
        above: the value is above this.
        least: the value is at least this.
        most: the value is at most this.
        below: the value is below this.
        also: what only a function takes; follows the help in its documentation.
        needs: one of these has to be given too.
        excludes: these must not be given.
        goal: whether it is what a run aims at, of which there is one.
        beside: goals beside which it is a limit instead.
        function: whether the functions take it; else it is the command's alone.
        required: whether the command asks for it.
    """

    name: str
    kind: Kind
    help: str
    group: str
    default: Any = None
    type_: str = ""
    shown: str = ""
    flag: str = ""
    aliases: tuple[str, ...] = ()
    metavar: str = ""
    choices: tuple[str, ...] = ()
    above: float = -math.inf
    least: float = -math.inf
    most: float = math.inf
    below: float = math.inf
    also: str = ""
    needs: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    goal: bool = False
    beside: tuple[str, ...] = ()
    function: bool = True
    required: bool = False

    @property
    def option(self) -> str:
        """As one types it."""
        words = self.name.replace("_", "-")
        return self.flag or ("--no-" if self.kind == "off" else "--") + words

    @property
    def type(self) -> str:
        """The argument's type."""
        plain = self.type_ or _TYPES[self.kind]
        whole_or_number = self.kind in ("whole", "number", "choice", "choices", "text", "path")
        if whole_or_number and self.default is not None:
            return plain.removesuffix(" | None")
        return plain

    @property
    def expected(self) -> str:
        """The values that it takes, for messages and the reference."""
        if self.kind in ("switch", "off"):
            return "True or False"
        if self.choices:
            how = "one of" if self.kind == "choice" else "some, separated by commas, of"
            return f"{how} {', '.join(self.choices)}"
        if self.kind in _EXPECTED:
            return _EXPECTED[self.kind]
        if self.kind not in ("number", "whole", "wholes", "numbers", "multiple"):
            return ""
        bounds = [
            f"{word} {limit:g}"
            for word, limit in (
                ("above", self.above),
                ("from", self.least),
                ("up to", self.most),
                ("below", self.below),
            )
            if math.isfinite(limit)
        ]
        noun = "a number" if self.kind in ("number", "numbers") else "a whole number"
        text = " ".join([noun, " and ".join(bounds)]).strip()
        return f"{text} or auto" if self.kind == "multiple" else text

    def given(self, value: Any) -> bool:
        """Whether a value is another one than the default."""
        if self.kind in ("shapes", "dims"):
            return bool(value)
        if self.kind in ("samples", "metric") and not isinstance(value, str):
            return value is not None  # arrays are not compared
        return bool(value is not None and value != self.default)

    def admits(self, value: Any) -> bool:
        """Whether a value is of the option's kind and in its range."""
        match self.kind:
            case "switch" | "off":
                return isinstance(value, bool)
            case "number" | "numbers":
                plain = isinstance(value, numbers.Real) and not isinstance(value, bool)
                return plain and self._within(float(value))
            case "whole" | "wholes":
                return _whole(value) and self._within(value)
            case "multiple":
                return value == "auto" or (_whole(value) and self._within(value))
            case "choice":
                return value in self.choices
            case "choices":
                return isinstance(value, str) and all(
                    part.strip() in self.choices for part in value.split(",")
                )
            case "text" | "texts" | "list":
                return isinstance(value, str)
            case "executor":
                return isinstance(value, str | Executor)
            case "path" | "paths":
                return isinstance(value, str | os.PathLike)
            case "dims":
                return isinstance(value, Mapping) and all(map(_size, value.values()))
            case "shapes":
                return isinstance(value, Mapping) and all(
                    isinstance(sizes, Sequence) and all(map(_size, sizes))
                    for sizes in value.values()
                )
        return True

    def _within(self, value: float) -> bool:
        inside = self.least <= value <= self.most and self.above < value < self.below
        return math.isfinite(value) and inside

    def check(self, value: Any) -> None:
        """Raise UsageError where a value is none that the option takes."""
        several = self.kind in ("wholes", "texts", "list", "numbers", "paths")
        if value is None and (self.default is None or several):
            return
        if several and (isinstance(value, str | bytes) or not isinstance(value, Sequence)):
            raise UsageError(f"{named(self.name)}: expected a sequence, got {value!r}")
        for item in value if several else (value,):
            if not self.admits(item):
                raise UsageError(
                    f"{named(self.name)}: expected {self.expected}, got {item!r}{self._hint(item)}"
                )

    def _hint(self, value: Any) -> str:
        """A share that looks like a percentage."""
        share = self.most == 1 and isinstance(value, numbers.Real) and 1 < float(value) <= 100
        return f"; did you mean {float(value) / 100:g}?" if share else ""

    def text(self, write: Callable[[str], str]) -> str:
        """The help text, with every reference written by a function."""
        return _referring(self.help, write)

    def default_text(self, write: Callable[[str], str]) -> str:
        """The default as the help says it; "" where there is none to say."""
        if self.shown:
            return _referring(self.shown, write)
        if self.default is None or self.default == () or isinstance(self.default, bool):
            return ""
        several = isinstance(self.default, tuple)
        return ",".join(map(str, self.default)) if several else str(self.default)


def _referring(text: str, write: Callable[[str], str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda found: write(found[1]), text)


def _whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _size(value: Any) -> bool:
    return _whole(value) and value >= 0


def marked(option: Option) -> str:
    """An option that is given, in a message."""
    if option.kind in ("switch", "off"):
        return named(option.name, option.kind == "switch")
    return named(option.name)


def check_values(options: Sequence[Option], values: Mapping[str, Any]) -> None:
    """Raise UsageError where a value is none that its option takes.

    Args:
        options: of one verb.
        values: name -> value, of all of them.
    """
    for option in options:
        option.check(values[option.name])


def check_relations(options: Sequence[Option], values: Mapping[str, Any]) -> None:
    """Raise UsageError where an option that is given lacks another, or excludes one.

    Args:
        options: of one verb.
        values: name -> value, of all of them.
    """
    known = {option.name: option for option in options}
    there = {name for name, option in known.items() if option.given(values[name])}
    aims = (own for own in options if own.goal and own.name in there)
    goals = [marked(own) for own in aims if not there.intersection(own.beside)]
    if len(goals) > 1:
        raise UsageError(f"expected one goal, got {' and '.join(goals)}: they exclude each other")
    for option in options:
        if option.name not in there:
            continue
        needed = [known[name] for name in option.needs if name in known]
        if needed and not any(other.name in there for other in needed):
            raise UsageError(f"{marked(option)} needs {' or '.join(map(marked, needed))}")
        for name in option.excludes:
            if name in there:
                raise UsageError(f"{marked(option)} and {marked(known[name])} exclude each other")
