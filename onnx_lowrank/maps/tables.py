"""Tables of embeddings in 8, 6 or 4 bits: rows are gathered as integers and scaled behind.

8 bits  ``Gather(E, i)  ->  Cast(Gather(q, i)) · Cast(Gather(s, i))``     a scale for each row
4 bits  the same with two codes in a byte, the halves of a row, and a scale for 32 or 16 of a row
6 bits  the upper 4 bits in the same way, then the lower 2 with four in a byte, the quarters

A runtime that meets a DequantizeLinear before the Gather dequantizes the whole table at every
call; this way it never does.  No operator newer than opset 18 is used.

Where a product reads the same table, as the head of a decoder does that is tied to its embeddings,
it reads what all rows of the same integers stand for: ``E  ->  Cast(q) · Cast(s)``.  That is
constant, so a runtime makes floats of it once, while it loads the model.  A single ``x @ Eᵀ`` of
8 bits reads ``DequantizeLinear(q, s)`` from opset 21 on: ONNX Runtime makes one node of both that
multiplies with the integers (of blocks, or before that opset, it does not, and dequantizes the
whole table at every call).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.edits import become, node_before
from onnx_lowrank.graph.fixed import opset_of
from onnx_lowrank.graph.names import Names
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.graph.walk import node_name, operator
from onnx_lowrank.maps.block_tables import tied_products, write_blocks
from onnx_lowrank.maps.emit import Storage
from onnx_lowrank.maps.find import Finding, Group, Member, Refused
from onnx_lowrank.maps.formats import OPSET, Format
from onnx_lowrank.maps.forms import Site
from onnx_lowrank.maps.rewrite import remove_unread
from onnx_lowrank.maps.selection import Selection
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.blocks import Bits, Blocks, round_blocks

__all__ = [
    "Tables",
    "find_tables",
    "table_codes",
    "table_formats",
    "write_table",
]

_FLOAT = ir.DataType.FLOAT
# Elements of a row with one scale, by bits; of 6 bits the largest that divides the row.
_BLOCKS, _WIDE = (32, 16), (64, 32, 16)
# The same of 8 bits where one node gathers them.
_FUSED = (128, 64, 32, 16)


@dataclass(frozen=True, eq=False)
class Tables:
    """The tables of a model.

    Attributes:
        sites: the Gathers whose tables may be integers, by the name of the table.
        groups: the same tables as groups: those of the finding where it may factor them.  Others
            of a group are the products that read its table too.
        left: name of another table -> why it stays floats.
    """

    sites: Mapping[str, tuple[Site, ...]] = field(default_factory=dict)
    groups: Mapping[str, Group] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)


def find_tables(
    finding: Finding, model: ir.Model, constants: Constants, selection: Selection
) -> Tables:
    """Tables of rows that are gathered, and read by products at most besides.

    Args:
        finding: the linear maps.
        model: their model.
        constants: resolver of its constants.
        selection: which nodes may be changed at all.
    """
    sites: dict[str, list[Site]] = {}
    for entry in finding.entries:
        own = (entry.site,) if isinstance(entry, Refused) else entry.sites
        for site in own:
            if site is not None and site.form.indices:
                sites.setdefault(site.matrix.name, []).append(site)
    found, groups, left = {}, {}, {}
    group_of = {member.site: group for group in finding.groups for member in group.members}
    for name, members in sites.items():
        nodes = [site.node for site in members]
        readers = [node for node, _ in constants.readers(members[0].matrix.root)]
        others = [node for node in dict.fromkeys(readers) if node not in nodes]
        why = _left(members, model, selection) or _left_by(others, finding, model, selection)
        group = group_of.get(members[0])
        if group is None:
            names = tuple(node_name(node) for node in others if node is not None)
            gathers = tuple(Member(site, transposed=False) for site in members)
            group = Group(gathers, members[0].matrix, names)
        elif not group.members[0].site.form.indices:
            why = why or f"{node_name(group.members[0].site.node)} reads it before it is gathered"
        if why is None:
            found[name], groups[name] = tuple(members), group
        else:
            left[name] = why
    return Tables(found, groups, left)


def table_formats(width: int, bits: Bits, *, fused: bool = False) -> tuple[Format, ...]:
    """The formats of rows of so many elements, the smallest first.

    In 4 bits both halves of a row, which share its bytes, consist of whole blocks; where they
    cannot it has 8 bits.  Not every row can have 6 bits.

    Args:
        width: elements of a row.
        bits: of an element.
        fused: whether one node gathers them, which wants whole blocks and knows no 6 bits; rows
            that are no multiple of 16 have none of these.
    """
    if fused:
        blocks = [own for own in (_BLOCKS if bits == 4 else _FUSED) if width % own == 0]
        blocks = blocks if bits == 4 else blocks[:1]
        return tuple(Format(bits, b, table=True, fused=True) for b in blocks) if bits != 6 else ()
    if bits == 6:
        wide = (block for block in _WIDE if width % block == 0)
        return tuple(Format(6, block, table=True) for block in wide)[:1]
    blocks = [block for block in _BLOCKS if bits == 4 and width % (2 * block) == 0]
    found = tuple(Format(4, block, table=True) for block in blocks)
    return found or (Format(8, width, table=True),)


def table_codes(rows: Array, form: Format) -> Blocks:
    """Codes of a table ``[V, D]``, of its transpose.

    Args:
        rows: the table.
        form: from `table_formats`.
    """
    return round_blocks(rows.T, form.bits, form.block)


def _left(sites: Sequence[Site], model: ir.Model, selection: Selection) -> str | None:
    """Why a table stays floats; None where it need not."""
    table = sites[0].matrix
    nodes = [site.node for site in sites]
    reasons = [selection.reason(node) for node in nodes]
    why = next((reason for reason in reasons if reason is not None), None)
    if why is not None:
        return why
    if any(node.graph is not model.graph for node in nodes):
        return "it is read inside a subgraph or function"
    if table.dtype is not ir.DataType.FLOAT or table.tensor.dtype is not ir.DataType.FLOAT:
        return f"it holds {table.tensor.dtype.name.lower()}; formats are for float32"
    if len({site.matrix.layout.key for site in sites}) > 1:
        return "it is read in several ways"
    if not table.size:
        return "it is empty"
    if not np.isfinite(table.numpy()).all():
        return "it holds NaN or Inf"
    return None


def _left_by(
    others: Sequence[ir.Node | None], finding: Finding, model: ir.Model, selection: Selection
) -> str | None:
    """Why a table stays floats for the sake of what reads it besides; None where it need not."""
    maps = {
        entry.node
        for entry in finding.entries
        if not isinstance(entry, Refused) or entry.site is not None
    }
    for node in others:
        if node is None:
            return "it is also read by the graph's outputs: the floats would stay"
        name = node_name(node)
        if node not in maps or node.graph is not model.graph:
            return f"it is also read by {name}: the floats would stay"
        if (why := selection.reason(node)) is not None:
            return f"{name} reads it too: {why}"
    return None


def write_table(
    model: ir.Model, sites: Sequence[Site], codes: Blocks, form: Format, spool: Spool
) -> None:
    """Let Gathers, and products that read the same table, read integers; the table goes.

    Args:
        model: the model; its graph is changed.
        sites: the Gathers of one table.
        codes: of its transpose, from `table_codes`.
        form: from `table_formats`.
        spool: where the integers wait until they are saved.
    """
    table = sites[0].matrix
    width, count = codes.shape
    storage = Storage(model, Names(model), spool)
    if form.fused:
        products = tied_products(sites, model.graph)
        assert products is not None  # else it has no such format
        write_blocks(sites, products, codes, storage, model.opset_imports)
        remove_unread(table.root)
        return
    graph, in_node = model.graph, table.root.producer() is not None
    base = table.name
    if form.bits == 8:
        stored: Array = np.ascontiguousarray(codes.codes.T)
    else:
        stored = _packed((codes.codes.T + (1 << form.bits - 1)).astype(np.uint8), form.bits)
    scales = np.ascontiguousarray(codes.scales.T)  # [V, D / block]
    q = storage.store(graph, stored, f"{base}.codes", in_node=in_node)
    s = storage.store(graph, scales, f"{base}.scales", in_node=in_node)
    for site in sites:
        _Rows(site.node, storage, width, form.block).gathered(q, s, form.bits)
    users = {use.node for use in table.root.uses()}
    first = next((node for node in graph if node in users), None)
    if first is not None:
        alone = form.bits == 8 and _fuses(model, table.root)
        whole = _Rows(first, storage, width, form.block).whole(q, s, form.bits, alone)
        whole.shape = ir.Shape([count, width])
        table.root.replace_all_uses_with(whole)
    remove_unread(table.root)


def _fuses(model: ir.Model, table: ir.Value) -> bool:
    """Whether all that reads a table is one ``x @ Eᵀ`` that a runtime fuses."""
    turned = [use.node for use in table.uses()]
    if opset_of(model) < OPSET or [operator(node) for node in turned] != [("", "Transpose")]:
        return False
    product = turned[0].outputs[0].uses()
    return [(operator(use.node), use.idx) for use in product] == [(("", "MatMul"), 1)]


def _packed(codes: Array, bits: Bits) -> Array:
    """Codes from 0, shape [V, D], as rows of bytes."""
    if bits == 6:
        return np.concatenate([_together(codes >> 2, 4), _together(codes & 3, 2)], axis=1)
    return _together(codes, bits)


def _together(codes: Array, bits: int) -> Array:
    """Parts of rows in the same bytes, the first one lowest."""
    parts = np.split(codes, 8 // bits, axis=1)
    shifted = [part << bits * place for place, part in enumerate(parts)]
    return np.asarray(np.bitwise_or.reduce(shifted), np.uint8)


class _Rows:
    """The nodes that stand for one Gather, or for all rows; they come before a node."""

    def __init__(self, node: ir.Node, storage: Storage, width: int, block: int) -> None:
        self._before, self._storage, self._width, self._block = node, storage, width, block
        self._base = node_name(node)

    def gathered(self, codes: ir.Value, scales: ir.Value, bits: Bits) -> None:
        """Let the node, a Gather, give rows of what integers stand for."""
        indices = self._before.inputs[1]
        assert indices is not None
        half = scales.dtype
        if bits == 8:
            q = self._cast(self._node("Gather", [codes, indices], ir.DataType.INT8))
            s = self._cast(self._node("Gather", [scales, indices], half))
            become(self._before, "Mul", [q, s])
            return
        flat = self._node("Reshape", [indices, self._integers([-1])], indices.dtype)
        packed = self._node("Gather", [codes, flat], ir.DataType.UINT8)
        values = self._blocks(packed, self._node("Gather", [scales, flat], half), bits)
        sizes = self._node("Shape", [indices], ir.DataType.INT64)
        axis = [ir.AttrInt64("axis", 0)]
        ends = [sizes, self._integers([self._width])]
        final = self._node("Concat", ends, ir.DataType.INT64, axis)
        # Where there are no indices a size is 0, which else means that the input's is taken.
        become(self._before, "Reshape", [values, final], [ir.AttrInt64("allowzero", 1)])

    def whole(self, codes: ir.Value, scales: ir.Value, bits: Bits, alone: bool) -> ir.Value:
        """What all rows stand for, shape [V, D]; of 8 bits alone with a node that is fused."""
        if bits == 8 and alone:
            each = self._node("Reshape", [self._cast(scales), self._integers([-1])], _FLOAT)
            axis = [ir.AttrInt64("axis", 0)]
            return self._node("DequantizeLinear", [codes, each], _FLOAT, axis)
        if bits == 8:
            return self._node("Mul", [self._cast(codes), self._cast(scales)], _FLOAT)
        shape = self._integers([-1, self._width])
        return self._node("Reshape", [self._blocks(codes, scales, bits), shape], _FLOAT)

    def _blocks(self, packed: ir.Value, scales: ir.Value, bits: Bits) -> ir.Value:
        """What rows of bytes stand for, shape [N, D / block, block]."""
        width, block, kind = self._width, self._block, _FLOAT
        both = self._unpacked(packed, bits)
        middle = np.float32(1 << bits - 1).reshape(1)
        zero = self._storage.store(self._graph, middle, f"{self._base}.zero", in_node=False)
        centred = self._node("Sub", [self._cast(both), zero], kind)
        shape = self._integers([-1, width // block, block])
        blocks = self._node("Reshape", [centred, shape], kind)
        wide = self._integers([-1, width // block, 1])
        s = self._node("Reshape", [self._cast(scales), wide], kind)
        return self._node("Mul", [blocks, s], kind)

    def _unpacked(self, packed: ir.Value, bits: Bits) -> ir.Value:
        """Codes from 0 of rows of bytes."""
        if bits != 6:
            return self._apart(packed, bits)
        sizes = self._integers([self._width // 2, self._width // 4])
        axis = [ir.AttrInt64("axis", 1)]
        upper, lower = self._nodes("Split", [packed, sizes], ir.DataType.UINT8, axis, 2)
        high, low = self._apart(upper, 4), self._apart(lower, 2)
        return self._bits("BitwiseOr", self._shift(high, 2, "LEFT"), low)

    def _apart(self, packed: ir.Value, bits: int) -> ir.Value:
        """What `_together` put in the same bytes, one part behind the other."""
        mask, parts = self._byte((1 << bits) - 1), []
        for place in range(0, 8, bits):
            part = self._shift(packed, place, "RIGHT") if place else packed
            parts.append(part if place + bits == 8 else self._bits("BitwiseAnd", part, mask))
        return self._node("Concat", parts, ir.DataType.UINT8, [ir.AttrInt64("axis", 1)])

    def _shift(self, value: ir.Value, places: int, direction: str) -> ir.Value:
        how = [ir.AttrString("direction", direction)]
        return self._node("BitShift", [value, self._byte(places)], ir.DataType.UINT8, how)

    def _bits(self, op_type: str, one: ir.Value, other: ir.Value) -> ir.Value:
        return self._node(op_type, [one, other], ir.DataType.UINT8)

    @property
    def _graph(self) -> ir.Graph:
        graph = self._before.graph
        assert isinstance(graph, ir.Graph)
        return graph

    def _cast(self, value: ir.Value) -> ir.Value:
        to = [ir.AttrInt64("to", int(_FLOAT))]
        return self._node("Cast", [value], _FLOAT, to)

    def _integers(self, values: Sequence[int]) -> ir.Value:
        array = np.array(values, np.int64)
        return self._storage.store(self._graph, array, f"{self._base}.shape", in_node=False)

    def _byte(self, value: int) -> ir.Value:
        return self._storage.store(
            self._graph, np.array([value], np.uint8), f"{self._base}.byte", in_node=False
        )

    def _node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        dtype: ir.DataType | None,
        attributes: Sequence[ir.Attr] = (),
    ) -> ir.Value:
        """The output of a new node."""
        return self._nodes(op_type, inputs, dtype, attributes)[0]

    def _nodes(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        dtype: ir.DataType | None,
        attributes: Sequence[ir.Attr] = (),
        outputs: int = 1,
    ) -> tuple[ir.Value, ...]:
        made = node_before(
            *(self._before, op_type, inputs, self._storage.new_name),
            attributes=attributes,
            dtype=dtype,
            outputs=outputs,
        )
        return tuple(made.outputs)
