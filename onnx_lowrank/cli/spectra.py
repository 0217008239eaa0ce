"""What a person sees of an inspection: the linear maps, what they need, and what budgets give."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from onnx_lowrank.cli.grid import Column, Grid
from onnx_lowrank.cli.layers import labels, print_cut
from onnx_lowrank.cli.screen import Screen
from onnx_lowrank.cli.tables import alike, with_same_weight
from onnx_lowrank.compression.inspection import Inspected, Inspection
from onnx_lowrank.compression.provenance import provenance_line
from onnx_lowrank.phrases import counted, listed

__all__ = ["in_order", "print_inspection"]

# The energy by whose rank rows are sorted.
_SORTED_AT = 0.95


def in_order(inspection: Inspection, by: str) -> Inspection:
    """An inspection with its linear maps in another order.

    Args:
        inspection: in the order of the graph.
        by: "graph", "name", "parameters" (most first), "rank" (at energy 0.95 over break-even,
            least first) or "energy" (what half of the parameters hold, most first); what cannot be
            factored comes last.
    """
    at = inspection.energies.index(_SORTED_AT)

    def rank(row: Inspected) -> float:
        return row.ranks[at] / row.break_even if row.ranks and row.break_even else math.inf

    keys: Mapping[str, Callable[[Inspected], Any]] = {
        "name": lambda row: row.name,
        "parameters": lambda row: -row.parameters,
        "rank": rank,
        "energy": lambda row: math.inf if row.half is None else -row.half,
    }
    if by not in keys:
        return inspection
    return replace(inspection, entries=tuple(sorted(inspection.entries, key=keys[by])))


def print_inspection(inspection: Inspection, screen: Screen) -> None:
    """The linear maps, what is not handled, and what budgets would give."""
    screen.line(f"{inspection.path}: {inspection.parameters:,} parameters")
    if inspection.recipe is not None:
        screen.line(provenance_line(inspection.recipe))
    if inspection.entries:
        _print_maps(inspection, screen)
    for row in inspection.others:
        screen.line(
            f"not handled: {row.weight} {_size(row.shape)}, "
            f"{_percent(row.parameters, inspection.parameters)} of the parameters, "
            f"{row.reason}"
        )
    _print_budgets(inspection, screen)
    screen.notes(inspection.missed, "missed")
    screen.notes(inspection.notes)


def _print_maps(inspection: Inspection, screen: Screen) -> None:
    rows = inspection.entries
    maps = len({(row.name, row.weight) for row in rows})
    screen.line(f"{counted(maps, 'linear map')} with a constant weight", "bold")
    outputs = any(row.ranks and row.energy_of == "output" for row in rows)
    mixed = outputs and any(row.ranks and row.energy_of == "weight" for row in rows)
    piped = screen.width is None
    scoped = piped and any(row.scope for row in rows)
    own = {row.name: row.name for row in rows} if piped else labels(rows)
    columns = [
        Column("layer", left=True, least=20),
        *([Column("scope", left=True)] if scoped else []),
        Column("form", left=True, leave=6),
        Column("m×n"),
        Column("of model", leave=3),
        *([Column("energy of", left=True, leave=5)] if mixed else []),
        Column("break-even", leave=4),
        *_rank_columns(inspection.energies),
        Column("half holds", leave=1),
    ]
    grid = Grid(columns)
    noted: dict[str, list[str]] = {}
    for row, more in alike(rows, lambda row: replace(row, name="", scope=None)):
        cells = [
            with_same_weight(own[row.name], more),
            *([row.scope or ""] if scoped else []),
            row.form,
            _size(row.shape),
            _percent(row.parameters, inspection.parameters),
        ]
        if not row.ranks or row.break_even is None:
            grid.add(*cells, rest=row.reason)
            continue
        grid.add(
            *cells,
            *([row.energy_of] if mixed else []),
            f"{row.break_even:.1f}",
            *(f"{rank} ({rank / row.break_even:.2f})" for rank in row.ranks),
            "" if row.half is None else f"{row.half:.4f}",
            rest=row.reason if piped else "",
        )
        alone = mixed and row.energy_of == "weight"
        reason = "; ".join(part for part in ("by its weight alone" * alone, row.reason) if part)
        if reason:
            noted.setdefault(reason, []).append(own[row.name])
    of = "the outputs" if outputs else "the weight"
    screen.line(
        f"rank that holds so much of the energy of {of} (over break-even); energy that half of "
        "the parameters hold"
    )
    laid = screen.table(grid)
    print_cut(list(laid.cut.values()), screen)
    for reason, names in () if piped else noted.items():
        screen.line(f"{listed(list(dict.fromkeys(names)), 2)}: {reason}", "dim")


def _rank_columns(energies: Sequence[float]) -> list[Column]:
    """The outer energies go first where there is no room."""
    leave = [2, *[0] * (len(energies) - 2), 2]
    return [Column(f"at {e:g}", leave=n) for e, n in zip(energies, leave, strict=True)]


def _print_budgets(inspection: Inspection, screen: Screen) -> None:
    if not inspection.budgets:
        return
    screen.line("what --keep would give, predicted", "bold")
    grid = Grid(
        [
            *(Column("keep"), Column("factored", leave=2), Column("linear parameters", leave=3)),
            *(Column("bytes"), Column("MACs", leave=1), Column("damage", leave=4)),
            Column("error"),
        ]
    )
    for budget in inspection.budgets:
        damage = budget.damage
        grid.add(
            f"{budget.keep:g}",
            str(budget.factored),
            f"{budget.linear_parameters:,}",
            f"{budget.bytes:,}",
            "?" if budget.macs is None else f"{budget.macs:,}",
            "" if damage is None else f"{damage:.3g}",
            "" if damage is None else f"{math.sqrt(damage):.3g}",
        )
    screen.table(grid)
    screen.line(
        "damage: mean relative square error of the outputs on samples of the search; error: its "
        "root, about the relative L2 error",
        "dim",
    )


def _size(shape: tuple[int, ...] | None) -> str:
    if shape is None:
        return "?"
    if len(shape) == 3 and shape[0] == 1:
        shape = shape[1:]
    return "×".join(str(d) for d in shape) if math.prod(shape) >= 0 else ""


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""
