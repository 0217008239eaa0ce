"""In which numbers the weights of a linear map are stored.

``x @ W``  ->  ``x @ DequantizeLinear(q, s)``  with blocks along the axis that is summed over
``x @ W``  ->  ``x @ DequantizeLinear(q, s, z)``  of 4 bits, where the least and the largest weight
of a block are seldom as far from 0
``x @ W``  ->  ``x @ DequantizeLinear(q, s) + (x @ A) @ B``  with a pair that corrects the rounding

That is what ONNX Runtime makes MatMulNBits of, by itself; it needs opset 21.  That node itself is
written by `onnx_lowrank.maps.nbits`.  Products whose inputs are integers too are in
`onnx_lowrank.maps.dynamic` and `onnx_lowrank.maps.static`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir

from onnx_lowrank.graph.walk import attribute, float_attribute, node_name
from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.folded import FOLDED, PRODUCTS
from onnx_lowrank.maps.nbits import in_one_node, kernel_block
from onnx_lowrank.numerics.blocks import Bits, Blocks

__all__ = [
    "CORRECTION",
    "OPSET",
    "SMALLEST",
    "Activations",
    "Format",
    "Variant",
    "block_for",
    "bytes_in",
    "correctable",
    "first_opset",
    "folded",
    "fusable",
    "no_format",
    "products",
    "suited",
]

OPSET = 21
"""The first one whose DequantizeLinear knows blocks and 4 bits."""

# Of products by what they multiply with, and of tables by their bits.
_OPSETS = {"float": OPSET, "dynamic": 11, "static": 13}
_TABLE_OPSETS = {8: 11, 6: 18, 4: 18}
# Of weights that are cast and multiplied, by their bits.
_FOLDED_OPSETS = {8: 11, 4: OPSET}

SMALLEST = 16
"""The smallest block of the kernels that multiply with one."""
Activations = Literal["float", "dynamic", "static"]
# Bytes of the nodes and names that make floats of integers.
_FOLDING = 1000


@dataclass(frozen=True)
class Format:
    """Integers in blocks.

    Attributes:
        bits: of a weight.
        block: weights of a column that share a scale; of a table the elements of a row that do.  0
            of a whole column.
        correction: rank of the pair that corrects the rounding, in 8 bits itself; 0 without.
        table: whether the weight is a table of rows that are gathered.
        activations: what the weight is multiplied with: floats, or integers of 8 bits whose range
            is found in every run ("dynamic"), or on samples before ("static").
        signed: whether the integers of a whole column are stored with a sign.
        channels: whether each whole column has a scale, or all of them one.
        fused: whether a product with blocks is one node, MatMulNBits of ONNX Runtime; and the
            Gather of a table, GatherBlockQuantized.
        zeros: whether each block has a zero point too.
    """

    bits: Bits
    block: int
    correction: int = 0
    table: bool = False
    activations: Activations = "float"
    signed: bool = True
    channels: bool = True
    fused: bool = False
    zeros: bool = False

    def __str__(self) -> str:
        if self.table and self.bits == 8 and not self.fused:
            return "8 bits, a scale for each row"
        if not self.block and not self.integers:
            return f"{self.bits} bits, a scale for each output"
        if self.dynamic:
            text = f"{self.bits} bits per channel, inputs in 8 bits"
            return text if self.signed else f"{text}, unsigned"
        if self.static:
            each = "per channel" if self.channels else "with one scale"
            return f"{self.bits} bits {each}, inputs and results in 8 bits"
        text = f"{self.bits} bits, blocks of {self.block}"
        text = f"{text}, + rank {self.correction}" if self.correction else text
        kernel = "GatherBlockQuantized" if self.table else "MatMulNBits"
        return f"{text}, {kernel}" if self.fused else text

    @property
    def dynamic(self) -> bool:
        """Whether inputs are rounded to integers in every run."""
        return self.activations == "dynamic"

    @property
    def static(self) -> bool:
        """Whether inputs and results are rounded to integers of ranges that are known before."""
        return self.activations == "static"

    @property
    def integers(self) -> bool:
        """Whether products multiply integers: their inputs are rounded too."""
        return self.activations != "float"

    @property
    def opset(self) -> int:
        """The first opset that has its operators, those of products with a weight."""
        if self.table and not self.fused:
            return _TABLE_OPSETS[self.bits]
        return 1 if self.fused else _OPSETS[self.activations]

    def rows(self, m: int) -> int:
        """How many of m weights of a column share a scale."""
        return suited(self.block, m) if self.block else m

    def bytes(self, m: int, n: int, rank: int | None = None, *, leads: bool = True) -> int:
        """Bytes of a weight ``[m, n]``, or of its pair: codes, scales in float16, zero points.

        Args:
            m: inputs, or rows of a table.
            n: outputs, or elements of a row.
            rank: of the pair; None for the weight itself.
            leads: whether the first factor counts.
        """
        if self.table:
            scale = 4 if self.fused else 2
            return m * (n * self.bits // 8 + scale * -(-n // self.block))
        if rank is not None:
            return (self.bytes(m, rank) if leads else 0) + self.bytes(rank, n)
        if m < SMALLEST and (self.block or self.integers):
            return 4 * m * n
        if not self.block:
            return m * n + (4 if self.integers else 2) * (n if self.channels else 1)
        size = self._coded(m, n, self.bits, suited(self.block, m))
        if self.zeros:
            size += self._zeros(-(-m // suited(self.block, m)), n)
        if self.correction:
            a, b = CORRECTION, suited(CORRECTION.block, self.correction)
            size += self._coded(m, self.correction, a.bits, suited(a.block, m))
            size += self._coded(self.correction, n, a.bits, b)
        return size

    def stored(self, codes: Blocks) -> int:
        """Bytes of codes as they are written, with their scales and zero points."""
        if not self.fused:
            return codes.nbytes
        zeros = 0 if codes.zeros is None else self._zeros(*codes.scales.shape)
        return self._coded(*codes.shape, codes.bits, kernel_block(codes)) + zeros

    @property
    def corrected_by(self) -> Format:
        """The format of the pair that corrects the rounding."""
        return replace(CORRECTION, fused=self.fused)

    def _zeros(self, groups: int, n: int) -> int:
        if self.fused:  # whole bytes for each column
            return n * -(-groups * self.bits // 8)
        return -(-groups * n * self.bits // 8)

    def _coded(self, m: int, n: int, bits: int, block: int) -> int:
        if self.fused:  # whole blocks, and scales in float32
            groups = -(-m // block)
            return groups * n * (block * bits // 8 + 4)
        return -(-m * n * bits // 8) + 2 * -(-m // block) * n


CORRECTION = Format(bits=8, block=128)
"""Of the pair that corrects a rounding."""


@dataclass(frozen=True)
class Variant:
    """What a layer may become.

    Attributes:
        rank: of its pair; None leaves it dense.
        format: in which integers its weights are stored; None leaves them floats.
    """

    rank: int | None = None
    format: Format | None = None


def suited(block: int, rows: int) -> int:
    """The block for so many rows: a power of two that they fill."""
    while block > max(rows, SMALLEST):
        block //= 2
    return block


def block_for(block: int, group: Group) -> int:
    """The block that the format of a group names; each of several maps may have a smaller one."""
    return block if group.maps else suited(block, group.shape[1])


def no_format(group: Group, model: ir.Model) -> str | None:
    """Why the weights of a group stay floats; None where they need not.

    Args:
        group: the group.
        model: its model.
    """
    if group.maps:
        whys = ((own, no_format(own, model)) for own in group.maps)
        named = (f"{node_name(o.members[0].site.node)}: {why}" for o, why in whys if why)
        return next(named, None)
    slices, m, n = group.shape
    for member in group.members:
        site = member.site
        if site.form.name not in PRODUCTS | FOLDED:
            return f"form {site.form.name} has no number format"
        if (site.form.name in PRODUCTS) != products(group):
            return "one weight is read by nodes that multiply with integers and by others"
        if site.node.graph is not model.graph:
            return "it is inside a subgraph or function, where weights stay floats"
        if member.transposed:
            return "its weight is also read transposed"
    if slices > 1:
        return "a batch of weights has no number format"
    if group.matrix.dtype is not ir.DataType.FLOAT:
        return f"its weight is read as {group.matrix.dtype.name.lower()}; formats are for float32"
    if group.others:
        return f"{group.matrix.name} is also read by {group.others[0]}: the floats would stay"
    if not group.elements:
        return f"{m}×{n} is empty"
    if m < SMALLEST and products(group):
        return f"{m}×{n} is narrower than a block of {SMALLEST}"
    least = Format(8, 0 if m < SMALLEST else 128)
    if not products(group) and 4 * m * n <= least.bytes(m, n) + _FOLDING:
        return f"{m}×{n} is so small that integers save nothing"
    return None


def products(group: Group) -> bool:
    """Whether the nodes of a group are ``x @ W`` or a Gemm, which kernels of integers are for."""
    return all(own.members[0].site.form.name in PRODUCTS for own in group.alone)


def folded(group: Group) -> bool:
    """Whether a runtime makes floats of a group's blocks once, so that its speed is theirs.

    ONNX Runtime fuses a DequantizeLinear with a product only where nothing else reads it.
    """
    return not products(group) or len({member.site.node for member in group.members}) > 1


def first_opset(group: Group, form: Format) -> int:
    """The first opset that has the operators which a format of a group is written with."""
    if form.table or form.integers or not folded(group):
        return form.opset
    return _FOLDED_OPSETS[form.bits]


def correctable(group: Group) -> bool:
    """Whether ``(x·A)·B`` can be added to what the nodes of a group compute."""
    if folded(group) or group.maps:
        return False
    nodes = [member.site.node for member in group.members]
    plain = (
        attribute(n, "transA", 0) == 0 and float_attribute(n, "alpha", 1.0) == 1.0 for n in nodes
    )
    return all(plain)


def fusable(group: Group) -> bool:
    """Whether the nodes of a group can be one node each with their codes, MatMulNBits."""
    return not folded(group) and all(
        in_one_node([member.site.node for member in own.members], own.shape[2])
        for own in group.alone
    )


def bytes_in(form: Format, group: Group, rank: int | None = None, *, leads: bool = True) -> int:
    """Bytes of a group's weights in a format.

    Args:
        form: the format.
        group: the group.
        rank: of its pair, or of the width between its maps; None leaves it as it is.
        leads: whether the first factor counts.
    """
    slices, m, n = group.shape
    if not group.maps:
        return form.bytes(m, n, rank, leads=leads)
    width = slices * (m if rank is None else rank)
    size = form.bytes(width, n)
    for first in group.maps[:-1]:
        _, read, given = first.shape
        size += form.bytes(read, given // (slices * m) * width)
    return size
