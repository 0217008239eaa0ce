"""Phrases: how messages count things, list names and write them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

__all__ = ["THREE", "by_reason", "counted", "listed", "near_names", "printable", "size"]

THREE = 0.9995
"""From here on a number is 1 in three digits."""


def counted(number: int, noun: str) -> str:
    """Such as "1 node" or "3 nodes"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def listed(names: Sequence[str], most: int) -> str:
    """The first names, and how many more there are: "a, b and 3 more"."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def near_names(name: str, known: Iterable[str]) -> str:
    """What a message says about an unknown name: the nearest known ones, or the first ones."""
    names = list(known)
    if not names:
        return "there are none"
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(repr(item) for item in near) + "?"
    return f"there are {listed([repr(item) for item in names], 10)}"


def by_reason(left: Mapping[str, str], what: str) -> list[str]:
    """One sentence for each reason, such as "not refitted: a, b and 3 more: …".

    Args:
        left: name of a layer -> the reason.
        what: such as "not refitted".
    """
    names: dict[str, list[str]] = {}
    for name, why in left.items():
        names.setdefault(why, []).append(name)
    return [f"{what}: {listed(own, 4)}: {why}" for why, own in names.items()]


def size(number: float) -> str:
    """Bytes, such as "3.36 MB"."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if number >= THREE * 10**power:
            return f"{number / 10**power:.3g} {unit}"
    return f"{number:,.0f} B"


def printable(text: str) -> str:
    r"""A text on one line, with signs that are not seen written out, such as ``\u202e``.

    Some move the cursor, change colours or turn the direction of what follows.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
