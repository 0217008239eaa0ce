"""What is wanted of number formats: by the user, and by the targets that a result is for."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from onnx_lowrank.errors import UsageError, named
from onnx_lowrank.graph.wishes import WISHES
from onnx_lowrank.maps.formats import (
    Format,
)
from onnx_lowrank.runtime.providers import short_name

__all__ = [
    "KINDS",
    "OPS",
    "FormatWishes",
    "offered",
    "quantized_ops",
]

KINDS = ("fp32", "8", "4")
"""What ``weights`` may name, beside auto."""

OPS = ("conv", "einsum", "gather", "gemm", "gru", "lstm", "matmul", "rnn")
"""Forms whose weights may be integers."""

# Of 8 bits where inputs may be rounded too, in each run or with ranges of samples: they come first.
_DYNAMIC = Format(8, 0, activations="dynamic")
_STATIC = Format(8, 0, activations="static")


@dataclass(frozen=True)
class FormatWishes:
    """What the user wants of formats.

    Attributes:
        kinds: of `KINDS`, in their order.
        ops: forms whose weights may be integers.
        integers: the format of products whose inputs may be rounded to 8 bits too; None without.
        blocks: whether integers may stand in blocks with a scale each.
        own: name of a weight -> its only kind; others stay floats.  None where all have ``kinds``.
        fused: whether products with blocks are MatMulNBits nodes, where they can be.
        zeros: whether blocks of 4 bits that products multiply with have zero points.
    """

    kinds: tuple[str, ...] = ("fp32",)
    ops: frozenset[str] = frozenset(OPS)
    integers: Format | None = None
    blocks: bool = True
    own: Mapping[str, str] | None = None
    fused: bool = False
    zeros: bool = True

    def kinds_of(self, name: str) -> tuple[str, ...]:
        """The kinds that the weight of a name may have."""
        return self.kinds if self.own is None else (self.own.get(name, "fp32"),)

    @property
    def wanted(self) -> bool:
        """Whether anything but floats may be chosen."""
        return self.kinds != ("fp32",)

    @property
    def forced(self) -> bool:
        """Whether floats are only for what has no format."""
        return "fp32" not in self.kinds

    @property
    def single(self) -> bool:
        """Whether there is no kind to choose."""
        return len(self.kinds) == 1


def offered(weights: str, activations: str, targets: Collection[str | None]) -> FormatWishes:
    """What numbers a run may choose from: the one place that knows targets.

    Args:
        weights: kinds, separated by commas, or auto: all that the targets run well.
        activations: float or int8.
        targets: names of what the result is shaped for and runs on, as the user or ONNX Runtime
            writes them; None for no one's.

    Raises:
        UsageError: a target does not take what was asked for by name, or no weights may have the
            8 bits that integers are multiplied with.
    """
    names = sorted({short_name(target) for target in targets if target} & WISHES.keys())
    integers = None if activations == "float" else _integers(activations, names)
    without = [name for name in names if not WISHES[name].blocks]
    given = {part.strip() for part in weights.split(",")}
    # Where there are no blocks 8 bits are those of whole columns.
    most = KINDS if not without else ("fp32",) if integers is None else ("fp32", "8")
    if "auto" not in given and not given.issubset(most):
        hint = ""
        if integers is None and given <= {"fp32", "8"} and WISHES[without[0]].static_int8:
            hint = f", or {named('activations', 'int8')} beside 8"
        raise UsageError(
            f"{named('weights', weights)}: target {without[0]} takes no weights in blocks of "
            f"integers; expected {', '.join(most)} or auto{hint}"
        )
    kinds = most if "auto" in given else tuple(kind for kind in KINDS if kind in given)
    if integers is not None and "8" not in kinds:
        option = named("activations", activations)
        raise UsageError(
            f"{option} needs 8 among {named('weights')}, or auto: integers are multiplied with "
            f"weights of 8 bits; got {', '.join(kinds)}"
        )
    zeros = all(WISHES[name].zeros for name in names)
    return FormatWishes(kinds, integers=integers, blocks=not without, zeros=zeros)


def _integers(activations: str, names: Sequence[str]) -> Format:
    """The format of products whose inputs are integers too, on targets of these names.

    What takes no ranges of each run takes those of samples, which all others run as well.

    Raises:
        UsageError: a target takes neither.
    """
    static = [name for name in names if not WISHES[name].dynamic_int8]
    without = [name for name in static if not WISHES[name].static_int8]
    if without:
        raise UsageError(
            f"{named('activations', activations)}: target {without[0]} multiplies no integers; "
            f"expected {named('activations', 'float')}"
        )
    if not static:
        return _DYNAMIC
    return dataclasses.replace(_STATIC, channels=all(WISHES[name].channels for name in static))


def quantized_ops(names: Sequence[str] | None) -> frozenset[str]:
    """The forms whose weights may be integers.

    Args:
        names: as the user gives them; None for the default, which is all of them.

    Raises:
        UsageError: one is neither "all", "default" nor a form with formats.
    """
    found: set[str] = set()
    for name in ("default",) if names is None else names:
        if name in ("all", "default"):
            found |= set(OPS)
        elif name in OPS:
            found.add(name)
        else:
            raise UsageError(
                f"{named('quantize_ops')}: expected all, default or some of {', '.join(OPS)}, "
                f"whose weights may be integers; got {name!r}"
            )
    return frozenset(found)
