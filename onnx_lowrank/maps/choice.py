"""What was measured of a matrix, its chosen rank and format, and the parameters that result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.formats import Format, bytes_in
from onnx_lowrank.maps.forms import Site
from onnx_lowrank.numerics.ranks import energy_at, energy_rank

__all__ = [
    "STAYS",
    "Choice",
    "Decision",
    "Joint",
    "Spectrum",
    "linear_bytes",
    "linear_parameters",
    "removed_parameters",
]


STAYS = "weights stay floats: "
"""How the reason begins why a layer has no format."""

EnergyOf = Literal["weight", "output", "fisher"]


@dataclass(frozen=True, eq=False)
class Spectrum:
    """What is known of a group's matrix.

    Attributes:
        squares: squared singular values, falling, summed over the slices, of all min(m, n)
            components or of the leading ones; None where the goal does not ask for them.
        finite: whether all elements are.
        of: what the squares are the energy of: the "weight" itself, or its "output" on samples
            (see `onnx_lowrank.numerics.output_pca`).
        rest: what the squares of the components that are not in ``squares`` add up to.
    """

    squares: npt.NDArray[np.float64] | None
    finite: bool
    of: EnergyOf = "weight"
    rest: float = 0.0

    def needed(self, energy: float) -> int:
        """The smallest rank that holds a share of the energy; there have to be squares."""
        assert self.squares is not None
        return energy_rank(self.squares, energy, self.rest)

    def held(self, rank: int) -> float | None:
        """The share of the energy that a rank holds; None without squares, or beyond them."""
        if self.squares is None or (self.rest and rank > len(self.squares)):
            return None
        return energy_at(self.squares, rank, self.rest)


@dataclass(frozen=True, eq=False)
class Joint:
    """Groups that read one activation in one way and share their first factor.

    Their matrices stand side by side, ``[s₁W₁ | … | sₚWₚ] ≈ A·[s₁B₁ | … | sₚBₚ]``.

    Attributes:
        groups: at least two; A counts with the first one's pair.
        scales: s, by group: how strongly its errors change the model's outputs.
    """

    groups: tuple[Group, ...]
    scales: tuple[float, ...]


@dataclass(frozen=True)
class Choice:
    """The rank of a group, or None to leave it dense, with the reason."""

    rank: int | None
    reason: str
    energy: float | None = None
    needed: int | None = None
    """The rank that the goal asked for before limits, where it was measured."""
    of: EnergyOf = "weight"
    """What the energy is the energy of."""
    joint: Joint | None = None
    """The groups that it shares its first factor with, itself among them; None if it does not."""
    leads: bool = True
    """Whether its first factor counts as its own."""
    excluded: bool = False
    """Whether it counts in no share of the linear parameters: the user left it out, or it is half
    of a pair that the model has already."""
    format: Format | None = None
    """In which integers its weights are stored; None leaves them floats."""

    @property
    def changed(self) -> bool:
        """Whether the layer is another one than in IN."""
        return self.rank is not None or self.format is not None

    def parameters(self, group: Group) -> int:
        """Parameters of the group's pair, or of its matrix where dense."""
        if self.rank is None:
            return group.elements
        return group.pair_elements(self.rank, leads=self.leads)

    def bytes(self, group: Group) -> int:
        """Bytes of the same as they are stored."""
        if self.format is None:
            size = int(self.parameters(group) * group.matrix.tensor.dtype.itemsize)
            whole = group.others and self.rank is not None  # the weight stays beside the pair
            return size + (group.matrix.tensor.nbytes if whole else 0)
        return bytes_in(self.format, group, self.rank, leads=self.leads)


@dataclass(frozen=True, eq=False)
class Decision:
    """The decision on one linear map.

    Attributes:
        node: the node.
        form: name of its form.
        site: where it can be factored; None where the form refused.
        group: the group it belongs to; None where it is refused or off.
        choice: the rank and the reason.
        weight: the constant's name.
        size: the constant's elements.
        shape: (m, n), None if not known.
        slices: matrices in the constant.
        off: whether its form was not chosen.
    """

    node: ir.Node
    form: str
    site: Site | None
    group: Group | None
    choice: Choice
    weight: str
    size: int
    shape: tuple[int, int] | None
    slices: int
    off: bool = False


def linear_parameters(decisions: Sequence[Decision]) -> tuple[int, int]:
    """Parameters of the linear layers that may be factored, before and after.

    Forms that were not chosen and layers that the user left out do not count.  Nor does a weight
    that something else reads too, as an embedding reads the matrix of a tied head: it stays beside
    any pair, so that there is nothing of it to take out.
    """
    counted = [decision for decision in _counted(decisions) if not _tied(decision)]
    before = sum(decision.size for decision in counted)
    return before, before - sum(removed_parameters(decision) for decision in counted)


def linear_bytes(decisions: Sequence[Decision], stored: Mapping[str, int] | None = None) -> int:
    """Bytes of the weights of the same layers in IN; what no site is known of is float32.

    Args:
        decisions: one for every linear map.
        stored: name of a weight -> its bytes where IN holds it in another way.
    """
    total = 0
    for decision in _counted(decisions):
        if stored and decision.weight in stored:
            total += stored[decision.weight]
            continue
        site = decision.site
        each = 4 if site is None else site.operand.tensor.dtype.itemsize
        total += int(decision.size * each)
    return total


def _tied(decision: Decision) -> bool:
    """Whether a weight that is left as it is has to stay for other nodes' sake."""
    return bool(decision.group and decision.group.others) and decision.choice.rank is None


def _counted(decisions: Sequence[Decision]) -> list[Decision]:
    """One decision for each weight that counts."""
    found = []
    seen: set[object] = set()
    # A refusal knows its weight by name only, so it is counted after the layers of that weight.
    for decision in sorted(decisions, key=lambda decision: decision.group is None):
        key = decision.weight if decision.group is None else decision.group.matrix.root
        if key in seen or decision.off or decision.choice.excluded:
            continue
        seen |= {key, decision.weight}
        found.append(decision)
    return found


def removed_parameters(decision: Decision) -> int:
    """Parameters that a decision takes out of the model."""
    if decision.choice.rank is None or decision.shape is None or decision.group is None:
        return 0
    pair = decision.choice.parameters(decision.group)
    return -pair if decision.group.others else decision.size - pair
