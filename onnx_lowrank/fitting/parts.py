"""Parts: samples whose moments are summed together, and what the moments are for.

The samples of a part depend on their number alone, so that the sums are the same to the last bit
wherever they are made.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from onnx_lowrank.data.samples import Lazy
from onnx_lowrank.numerics.arrays import Feed

__all__ = ["KINDS", "Kind", "Part", "parts_of"]

Kind = Literal["fit", "aside", "held"]
"""What samples are for: factors are fitted to them; that too, but a search judges with them; they
are held out and judge."""
KINDS: tuple[Kind, ...] = get_args(Kind)
"""All kinds, in the order in which they are summed."""

# Samples of a part, at least, and how many parts a kind has, at most.
_PART, _PARTS = 16, 8


@dataclass(frozen=True, eq=False)
class Part:
    """Samples that are summed together.

    Attributes:
        kind: what they are for.
        numbers: which they are, among those to fit to or those that are held out.
        feeds: the samples.
    """

    kind: Kind
    numbers: tuple[int, ...]
    feeds: Sequence[Feed]

    def where(self, numbers: Sequence[int]) -> str:
        """How a message calls some of its samples; the numbers count from 0 in the part."""
        own = sorted(self.numbers[number] for number in numbers)
        several = f"samples {own[0]}–{own[-1]}"
        text = f"sample {own[0]}" if len(own) == 1 else several
        return f"held-out {text}" if self.kind == "held" else f"{text} of those to fit to"


def parts_of(
    fit: Sequence[Feed], held: Sequence[Feed], aside: Collection[int] = ()
) -> tuple[Part, ...]:
    """The samples in parts; none is read.

    Args:
        fit: samples to fit to.
        held: samples to judge with.
        aside: numbers of those to fit to that a search judges with.
    """
    apart = frozenset(aside)
    numbers: dict[Kind, list[int]] = {
        "fit": [number for number in range(len(fit)) if number not in apart],
        "aside": sorted(apart),
        "held": list(range(len(held))),
    }
    return tuple(
        part
        for kind in KINDS
        for part in _split(kind, numbers[kind], held if kind == "held" else fit)
    )


def _split(kind: Kind, numbers: Sequence[int], feeds: Sequence[Feed]) -> list[Part]:
    size = max(_PART, -(-len(numbers) // _PARTS))
    starts = range(0, len(numbers), size)
    return [_part(kind, tuple(numbers[start : start + size]), feeds) for start in starts]


def _part(kind: Kind, numbers: tuple[int, ...], feeds: Sequence[Feed]) -> Part:
    return Part(kind, numbers, Lazy(len(numbers), lambda index: feeds[numbers[index]]))
