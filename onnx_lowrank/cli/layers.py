"""The table of the layers: one row each, and what is said of many at once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from onnx_lowrank.cli.grid import Column, Grid
from onnx_lowrank.cli.screen import Screen
from onnx_lowrank.cli.tables import alike, with_same_weight
from onnx_lowrank.phrases import counted, listed
from onnx_lowrank.schema.layer import Layer

__all__ = ["labels", "print_cut", "print_layers"]

# Reasons that a narrow terminal cuts are told whole below the table, if they are no more.
_REASONS = 3
# So many layers that are left for one reason have one line together.
_MANY = 5
# Groups of layers with one first factor that are named.
_LEADERS = 4
_DENSE = "dense: "


class _Named(Protocol):
    """What has a name in the graph, and may have one in the network."""

    @property
    def name(self) -> str: ...

    @property
    def op_type(self) -> str: ...

    @property
    def scope(self) -> str | None: ...


def print_layers(layers: Sequence[Layer], screen: Screen) -> None:
    """The decision on every layer; where there are too many, on the largest ones."""
    factored = sum(layer.status == "factored" for layer in layers)
    off: dict[tuple[str, str], list[Layer]] = {}
    for layer in layers:
        if layer.off and not layer.format:
            off.setdefault((layer.form, _of_each(layer).partition(": ")[0]), []).append(layer)
    layers = [layer for layer in layers if not layer.off or layer.format]
    kinds = {layer.energy_of for layer in layers}
    what = ", energy and error of the outputs" if factored and kinds != {"weight"} else ""
    what += ", weighted by Fisher information" if factored and "fisher" in kinds else ""
    screen.line(f"{counted(len(layers), 'linear map')}, {factored} factored{what}", "bold")
    left = {} if screen.every else _left(layers, piped=screen.width is None)
    told = {layer.name for own in left.values() for layer in own}
    rows = list(alike([layer for layer in layers if layer.name not in told], _fate))
    shown = rows
    if screen.rows is not None and len(rows) > screen.rows:
        largest = sorted(rows, key=lambda row: -row[0].parameters_before)[: screen.rows]
        kept = {id(row) for row in largest}
        shown = [row for row in rows if id(row) in kept]
    if shown:
        laid = screen.table(_grid(shown, layers, piped=screen.width is None))
        print_cut(list(laid.cut.values()), screen)
    if len(shown) < len(rows):
        names = {layer.name for layer, _ in shown} | told
        screen.line(_rest([layer for layer, _ in rows if layer.name not in names], layers))
    _print_shared(layers, screen)
    for (form, reason), own in left.items():
        screen.line(f"{len(own)} more left dense ({form}): {reason}; --all-rows shows them", "dim")
    for (form, reason), own in off.items():
        text = reason if len(own) > 1 else own[0].reason.partition(": ")[0]
        screen.line(f"{len(own)} more left dense ({form}): {text}", "dim")


def _left(layers: Sequence[Layer], *, piped: bool) -> dict[tuple[str, str], list[Layer]]:
    """Form and reason -> the layers that are left for it, where these are many.

    Args:
        layers: all that have rows.
        piped: whether only what is said of a weight itself counts, such as that it is integers:
            of layers that had a choice a pipe has every row.
    """
    found: dict[tuple[str, str], list[Layer]] = {}
    for layer in layers:
        if layer.status == "factored" or layer.format:
            continue
        reason = _of_each(layer)
        if reason != layer.reason or not piped:
            found.setdefault((layer.form, reason.removeprefix(_DENSE)), []).append(layer)
    return {key: own for key, own in found.items() if len(own) >= _MANY}


def _of_each(layer: Layer) -> str:
    """The reason; what is said of the layer's weight is said so that it fits others as well."""
    own = f"{layer.weight} "
    if not layer.reason.startswith(own):
        return layer.reason
    return f"each weight {layer.reason.removeprefix(own)}"


def _grid(rows: Sequence[tuple[Layer, int]], layers: Sequence[Layer], *, piped: bool) -> Grid:
    """The table; in a pipe with the names of the nodes, and where these stand."""
    scoped = piped and any(layer.scope for layer in layers)
    formats = any(layer.format for layer in layers)
    own = {layer.name: layer.name for layer in layers} if piped else labels(layers)
    columns = [
        Column("layer", left=True, least=20),
        *([Column("scope", left=True)] if scoped else []),
        Column("form", left=True, leave=3),
        Column("m×n"),
        *([Column("format", left=True, leave=1)] if formats else []),
        *map(Column, ("rank", "kept")),
        Column("energy", leave=2),
        Column("error"),
    ]
    grid = Grid(columns)
    for layer, more in rows:
        cells = [
            with_same_weight(own[layer.name], more),
            *([layer.scope or ""] if scoped else []),
            layer.form,
            _shape(layer),
            *([_format(layer, piped=piped)] if formats else []),
        ]
        if layer.rank is None:
            grid.add(*cells, rest=_DENSE + _reason(layer).removeprefix(_DENSE))
        else:
            energy = "" if layer.energy is None else f"{layer.energy:.4f}"
            grid.add(*cells, str(layer.rank), f"{_share(layer):.2f}", energy, _error(layer))
    return grid


def _reason(layer: Layer) -> str:
    """The reason without the format, which the column before has already."""
    known = f"weights in {layer.format}"
    text = layer.reason.removesuffix(f"; {known}")
    return text.replace(f"{known}, ", "") if layer.format else text


def labels(layers: Iterable[_Named]) -> Mapping[str, str]:
    """Name of a layer -> what it is called on a terminal: its module, where the name says nothing.

    ``node_MatMul_92`` and ``MatMul_92`` say nothing.  ``--include`` and ``--exclude`` take modules
    as well as names.
    """
    found = {
        layer.name: layer.scope
        if layer.scope and _says_nothing(layer.name, layer.op_type)
        else layer.name
        for layer in layers
    }
    uses = Counter(found.values())
    return {name: label if uses[label] == 1 else name for name, label in found.items()}


def _says_nothing(name: str, op_type: str) -> bool:
    return bool(re.fullmatch(rf"node_\w+|/?{re.escape(op_type)}(_\d+)*", name, re.IGNORECASE))


def print_cut(texts: Sequence[str], screen: Screen) -> None:
    """Texts that a table had to cut, each once, or where they are whole."""
    different = list(dict.fromkeys(texts))
    if len(different) <= _REASONS:
        for text in different:
            screen.line(text, "dim")
    else:
        screen.line("reasons are cut here; --report and a pipe have them whole", "dim")


def _rest(rest: Sequence[Layer], layers: Sequence[Layer]) -> str:
    """One line on the layers that have no row."""
    factored = [layer for layer in rest if layer.rank is not None]
    before = sum(layer.parameters_before for layer in layers)
    share = sum(layer.parameters_before for layer in rest) / before if before else 0.0
    text = (
        f"{len(rest)} more with {100 * share:.2g} % of these parameters: {len(factored)} "
        f"factored, {len(rest) - len(factored)} dense"
    )
    errors = [(error, layer.name) for layer in factored if (error := _figure(layer)) is not None]
    if errors:
        worst, name = max(errors)
        text += f", errors up to {worst:.3g} at {name}"
    return f"{text}; --all-rows shows them"


def _print_shared(layers: Sequence[Layer], screen: Screen) -> None:
    """Which layers share a first factor."""
    leaders = list(dict.fromkeys(y.first_factor_of for y in layers if y.first_factor_of))
    for leader in leaders[:_LEADERS]:
        names = [layer.name for layer in layers if layer.first_factor_of == leader]
        screen.line(
            f"{listed(names, 4)}: first factor shared with {leader}, where it counts", "dim"
        )
    if len(leaders) > _LEADERS:
        more = counted(len(leaders) - _LEADERS, "more first factor")
        screen.line(f"{more} shared by several layers: see the report", "dim")


def _fate(layer: Layer) -> tuple[object, ...]:
    """What layers that read one weight and fare alike have in common; others stand alone."""
    alone = None if layer.shared else layer.name
    return layer.weight, layer.form, layer.shape, layer.rank, layer.format, layer.reason, alone


def _error(layer: Layer) -> str:
    error = _figure(layer)
    return "" if error is None else f"{error:.3g}"


def _figure(layer: Layer) -> float | None:
    """Error of the outputs on held-out samples where they were fitted to, else of the weight."""
    fitted = layer.energy_of != "weight"
    error = layer.output_error if fitted else layer.weight_error
    return layer.predicted_error if error is None and fitted else error


def _format(layer: Layer, *, piped: bool) -> str:
    """As it is written, or on a terminal such as "4 bits/32"; a note has it in words."""
    text = layer.format or ""
    if piped:
        return text
    for long, short in ((", blocks of ", "/"), (", a scale for each row", "/row"), (", +", " +")):
        text = text.replace(long, short)
    return text


def _shape(layer: Layer) -> str:
    if layer.shape is None:
        return "?"
    text = f"{layer.shape[0]}×{layer.shape[1]}"
    return f"{layer.slices}×({text})" if layer.slices > 1 else text


def _share(layer: Layer) -> float:
    return layer.parameters_after / layer.parameters_before if layer.parameters_before else 1.0
