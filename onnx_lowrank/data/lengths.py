"""Lengths: inputs that say how long another one is, such as the ``lengths`` of a speech encoder.

They are known by name, type and shape: whole numbers, one for each sample, with ``len`` or
``length`` among the words of their name.  The axis that they are the size of is the only one that
may have any size, of the input whose name theirs begins with, or of all inputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnx_lowrank.data.declared import InputSpec

__all__ = ["Length", "lengths_of"]

_LENGTH = re.compile(r"(?<![a-z])(?:len|lens|length|lengths|seqlen|seqlens)(?![a-z])")
# Limits of a search and what is behind it are no sizes of an axis that is fed.
_OTHER = re.compile(
    r"(?<![a-z])(?:min|max|minimum|maximum|past|total|new|hop|win|step|cache)(?![a-z])"
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


@dataclass(frozen=True)
class Length:
    """The size of an axis.

    Attributes:
        of: the input that has the axis.
        axis: its number.
        size: as it is assumed.
    """

    of: str
    axis: int
    size: int

    def __str__(self) -> str:
        return f"{self.size}, the size of axis {self.axis} of {self.of}"


def lengths_of(
    specs: Sequence[InputSpec], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Length]:
    """The inputs that are lengths, and of what; what is not clear is left out.

    Args:
        specs: all inputs.
        shapes: their sizes.
    """
    named = [spec for spec in specs if _is_length(spec)]
    others = [spec for spec in specs if spec.drawn and spec not in named and spec.name in shapes]
    found = {}
    for spec in named:
        own = _words(spec.name)
        near = [other for other in others if own.startswith(_words(other.name))]
        axes = _axes(near) or _axes(others)
        if len(axes) == 1:
            ((of, axis),) = axes
            found[spec.name] = Length(of, axis, shapes[of][axis])
    return found


def _is_length(spec: InputSpec) -> bool:
    if not spec.drawn or spec.dtype.kind not in "iu" or spec.dtype.itemsize < 4:
        return False
    alone = spec.shape is not None and len(spec.shape) < 3 and set(spec.shape[1:]) <= {1}
    words = _words(spec.name)
    return alone and bool(_LENGTH.search(words)) and not _OTHER.search(words)


def _axes(specs: Sequence[InputSpec]) -> list[tuple[str, int]]:
    """Axes of any size but the first one, which holds the samples; those of one name count once."""
    found: dict[object, tuple[str, int]] = {}
    for spec in specs:
        for axis, size in enumerate(spec.shape or ()):
            if axis and not isinstance(size, int):
                found.setdefault(size or (spec.name, axis), (spec.name, axis))
    return list(found.values())


def _words(name: str) -> str:
    return _CAMEL.sub("_", name).lower()
