"""The graphs around each form that stands in a table: tested as they are, and inside functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from onnx_lowrank.numerics.arrays import Array
from tests.helpers.cases import (
    RANK,
    Case,
    Shape,
)
from tests.helpers.models import (
    known_rank,
)

# --- convolutions


def kernel(n: int, channels: int, *sizes: int) -> Callable[[np.random.Generator], Array]:
    """W[n, channels, sizes…] whose matrix [channels·sizes, n] is of rank 4."""

    def make(rng: np.random.Generator) -> Array:
        array = known_rank(channels * math.prod(sizes), n, RANK, rng).T
        return np.ascontiguousarray(array.reshape(n, channels, *sizes))

    return make


def spatial(n: int, channels: int, height: int, width: int) -> Callable[..., Array]:
    """W[n, channels, height, width] whose matrix [channels·height, width·n] is of rank 4."""

    def make(rng: np.random.Generator) -> Array:
        array = known_rank(channels * height, width * n, RANK, rng)
        array = array.reshape(channels, height, width, n).transpose(3, 0, 1, 2)
        return np.ascontiguousarray(array)

    return make


def conv(
    settings: str,
    x: Shape,
    y: tuple[int, ...],
    sizes: tuple[int, ...],
    *,
    form: str = "conv",
    bias: bool = True,
    reference: bool = True,
) -> Case:
    channels, n = x[1], y[1]
    assert isinstance(channels, int)
    if form == "conv":
        weight, shape = kernel(n, channels, *sizes), (channels * math.prod(sizes), n)
    else:
        height, width = sizes
        weight, shape = spatial(n, channels, height, width), (channels * height, width * n)
    return Case(
        f"y = Conv {f'<{settings}>' if settings else ''} (x, W{', b' if bias else ''})",
        x,
        y,
        weight,
        ("Conv", "Conv"),
        form,
        shape,
        math.prod(y) * channels * math.prod(sizes),
        more={"b": (n,)} if bias else {},
        arguments=("conv",),
        reference=reference,
    )


CONV = {
    "1×1": conv("", (2, 16, 5, 6), (2, 12, 5, 6), (1, 1)),
    "1×1, no bias": conv("", (2, 16, 5, 6), (2, 12, 5, 6), (1, 1), bias=False),
    "1×1, stride": conv("strides = [2, 3]", (1, 16, 5, 7), (1, 12, 3, 3), (1, 1)),
    "1×1, pads": conv("pads = [1, 0, 2, 1]", (1, 16, 5, 6), (1, 12, 8, 7), (1, 1)),
    "1×1, written out": conv(
        'kernel_shape = [1, 1], group = 1, auto_pad = "NOTSET", dilations = [1, 1]',
        (1, 16, 5, 6),
        (1, 12, 5, 6),
        (1, 1),
    ),
    "1-D": conv("pads = [1, 2], strides = [2]", (2, 16, 9), (2, 12, 5), (3,)),
    "1-D, dilated": conv("dilations = [3]", (2, 16, 9), (2, 12, 3), (3,)),
    "3-D": conv("pads = [1, 0, 0, 0, 1, 0]", (1, 16, 3, 4, 4), (1, 12, 2, 3, 4), (3, 3, 1)),
    "k×1": conv("", (1, 16, 5, 6), (1, 12, 3, 6), (3, 1)),
    "1×k": conv("", (1, 16, 5, 6), (1, 12, 5, 4), (1, 3)),
    # The channels' pair of 3×3 has RANK·(9·4 + 64) numbers, the spatial one RANK·(12 + 192).
    "3×3": conv("", (1, 4, 7, 8), (1, 64, 5, 6), (3, 3)),
    "3×3, pads": conv("pads = [0, 2, 1, 1]", (1, 4, 7, 8), (1, 64, 6, 9), (3, 3)),
    "3×3, strides": conv("strides = [2, 1]", (1, 4, 7, 8), (1, 64, 3, 6), (3, 3)),
    "3×3, dilations": conv("dilations = [2, 3]", (1, 4, 7, 8), (1, 64, 3, 2), (3, 3)),
    "3×3, same, upper": conv(
        'auto_pad = "SAME_UPPER", strides = [2, 2]', (1, 4, 7, 8), (1, 64, 4, 4), (3, 3)
    ),
    "3×3, same, lower": conv(
        'auto_pad = "SAME_LOWER", strides = [2, 2]', (1, 4, 7, 8), (1, 64, 4, 4), (3, 3)
    ),
    "2×4, same, lower": conv('auto_pad = "SAME_LOWER"', (1, 4, 7, 8), (1, 64, 7, 8), (2, 4)),
    "3×3, valid": conv('auto_pad = "VALID"', (1, 4, 7, 8), (1, 64, 5, 6), (3, 3)),
}


# --- Einsum


SIZES = {"b": 3, "s": 5, "d": 16, "h": 4, "k": 6, "f": 12, "e": 3, "D": 16, "F": 12, "c": 4}


def lettered(w: str, batch: str, contracted: str, new: str) -> Callable[..., Array]:
    """A constant with these letters whose matrices [batch, contracted, new] are of rank 4."""

    def make(rng: np.random.Generator) -> Array:
        m, n = (math.prod(SIZES[c] for c in part) for part in (contracted, new))
        stack = known_rank(m, n, RANK, rng, batch=[SIZES[c] for c in batch])
        order = batch + contracted + new
        array = stack.reshape([SIZES[c] for c in order])
        return np.ascontiguousarray(array.transpose([order.index(c) for c in w]))

    return make


def einsum(
    equation: str,
    *,
    parts: tuple[str, str, str],
    plain: bool,
    x: str | None = None,
    y: str | None = None,
    macs: int,
    reference: bool = True,
) -> Case:
    """A case; ``x`` and ``y`` are letters of the shapes where the equation has dots."""
    left, _, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    w = next(i for i, term in enumerate(terms) if sorted(term) == sorted("".join(parts)))
    x_letters = x or terms[1 - w]
    batch, contracted, new = parts
    return Case(
        f'y = Einsum <equation = "{equation}"> ({"W, x" if w == 0 else "x, W"})',
        tuple(SIZES[c] for c in x_letters),
        tuple(SIZES[c] for c in y or result),
        lettered(terms[w], batch, contracted, new),
        ("MatMul" if plain else "Einsum", "Einsum"),
        "einsum",
        (math.prod(SIZES[c] for c in contracted), math.prod(SIZES[c] for c in new)),
        macs,
        slices=math.prod(SIZES[c] for c in batch),
        reference=reference,
    )


EINSUM = {
    "heads": einsum("bsd,dhk->bshk", parts=("", "d", "hk"), plain=True, macs=15 * 16 * 24),
    "heads, other order": einsum("bsd,hdk->bhsk", parts=("", "d", "hk"), plain=True, macs=5760),
    "dots": einsum(
        "...d,df->...f", parts=("", "d", "f"), plain=True, x="bsd", y="bsf", macs=15 * 16 * 12
    ),
    "dots, weight first": einsum(
        "df,...d->...f", parts=("", "d", "f"), plain=True, x="bsd", y="bsf", macs=2880
    ),
    "dots that stand for nothing": einsum(
        "...d,df->...f", parts=("", "d", "f"), plain=True, x="d", y="f", macs=192
    ),
    "dots and a letter that is not last": einsum(
        "d...,df->...f", parts=("", "d", "f"), plain=False, x="dbs", y="bsf", macs=2880
    ),
    "dots in the middle": einsum(
        "b...dk,df->b...fk", parts=("", "d", "f"), plain=False, x="bsdk", y="bsfk", macs=17280
    ),
    "not last": einsum("bds,df->bfs", parts=("", "d", "f"), plain=False, macs=2880),
    "not last, weight first": einsum("fd,bds->bfs", parts=("", "d", "f"), plain=False, macs=2880),
    "two contracted": einsum("bshk,hkd->bsd", parts=("", "hk", "d"), plain=False, macs=5760),
    "two contracted, apart": einsum("hbks,dkh->sdb", parts=("", "kh", "d"), plain=False, macs=5760),
    "batch": einsum("ebd,edf->ebf", parts=("e", "d", "f"), plain=False, macs=9 * 16 * 12),
    "batch, transposed": einsum("bed,fde->bfe", parts=("e", "d", "f"), plain=False, macs=1728),
    "two batch letters": einsum(
        "ehbd,hdfe->ebhf", parts=("he", "d", "f"), plain=False, macs=36 * 192
    ),
    "batch and two new": einsum("ebd,edhk->ebhk", parts=("e", "d", "hk"), plain=False, macs=3456),
    "implicit": einsum("bsd,df", parts=("", "d", "f"), plain=True, y="bfs", macs=2880),
    "implicit, not last": einsum("dbs,df", parts=("", "d", "f"), plain=False, y="bfs", macs=2880),
    "implicit, dots": einsum(
        "d...,df", parts=("", "d", "f"), plain=False, x="dbs", y="bsf", macs=2880
    ),
    "upper case": einsum("bsD,DF->bsF", parts=("", "D", "F"), plain=True, macs=2880),
    "upper and lower case": einsum("bDd,DF->bdF", parts=("", "D", "F"), plain=False, macs=9216),
    "spaces": einsum(
        " b s d , d h k -> b s h k ",
        parts=("", "d", "hk"),
        plain=True,
        macs=5760,
        reference=False,  # numpy refuses the space in front
    ),
    "spaces, two Einsums": einsum(
        "b d s, d f -> b f s", parts=("", "d", "f"), plain=False, macs=2880
    ),
    "the letter of the rank is taken": einsum(
        "ads,df->afs".replace("a", "b"), parts=("", "d", "f"), plain=False, macs=2880
    ),
}


# --- embeddings


V, D = 40, 16


def embedding(indices: str, y: Shape, *, axis: str = "", feed: Any) -> Case:
    rows = math.prod(size for size in y[:-1] if isinstance(size, int))
    return Case(
        f"z = Gather {axis} (W, i)\n y = Add(z, x)",
        (1,),
        y,
        lambda rng: known_rank(V, D, RANK, rng),
        ("Gather", "MatMul", "Add"),
        "gather",
        (V, D),
        0 * rows,
        inputs={"i": indices},
        outputs={"z": y},
        feeds={"i": np.array(feed)},
        arguments=("gather",),
    )


GATHER = {
    "scalar": embedding("int64", (D,), feed=np.int64(7)),
    "vector": embedding("int64[5]", (5, D), feed=[0, 39, 3, 3, 12]),
    "matrix": embedding("int64[2, 3]", (2, 3, D), feed=[[0, 39, 3], [3, 12, 1]]),
    "int32": embedding("int32[2]", (2, D), feed=np.array([1, 2], np.int32)),
    "negative indices": embedding("int64[2]", (2, D), feed=[-1, -40]),
    "axis 0": embedding("int64[2]", (2, D), axis="<axis = 0>", feed=[1, 2]),
    "axis -2": embedding("int64[2]", (2, D), axis="<axis = -2>", feed=[1, 2]),
}


# --- ONNX Runtime's own operators


def fused_matmul(
    side: str, *, trans_a: int = 0, trans_b: int = 0, batch: tuple[int, ...] = ()
) -> Case:
    m, n, rows = 16, 12, 5
    left = side == "left"
    rows_axis = (rows,)
    turn_x = trans_b if left else trans_a
    turn_w = trans_a if left else trans_b
    x = (m, *rows_axis) if left != bool(turn_x) else (*rows_axis, m)
    y = (n, rows) if left else (rows, n)

    def weight(rng: np.random.Generator) -> Array:
        array = known_rank(m, n, RANK, rng, batch=batch)
        return array if left == bool(turn_w) else np.ascontiguousarray(array.swapaxes(-1, -2))

    slices = math.prod(batch)
    return Case(
        f"y = com.microsoft.FusedMatMul <alpha = 0.5, transA = {trans_a}, transB = {trans_b}> "
        f"({'W, x' if left else 'x, W'})",
        (*batch, *x),
        (*batch, *y),
        weight,
        ("FusedMatMul" if turn_x else "MatMul", "FusedMatMul"),
        f"fused-matmul-{side}",
        (m, n),
        slices * rows * m * n,
        slices=slices,
        reference=False,
    )


FUSED_MATMUL = {
    f"{side}, transA={trans_a}, transB={trans_b}, batch {batch}": fused_matmul(
        side, trans_a=trans_a, trans_b=trans_b, batch=batch
    )
    for side in ("left", "right")
    for trans_a in (0, 1)
    for trans_b in (0, 1)
    for batch in ((), (3,), (2, 3))
}


# --- recurrent cells


GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


STEPS, BATCH, HIDDEN = 5, 3, 8


def recurrent(
    op: str,
    *,
    directions: int = 1,
    bias: bool = False,
    lengths: bool = False,
    initial: bool = False,
    batch_first: bool = False,
    settings: str = "",
    reference: bool = True,
) -> Case:
    gates = GATES[op] * (HIDDEN if op != "RNN" else 16)
    hidden = HIDDEN if op != "RNN" else 16
    names = ["x", "W", "R", "B" if bias else "", "lengths" if lengths else ""]
    more: dict[str, tuple[int, ...]] = {"R": (directions, gates, hidden)}
    if bias:
        more["B"] = (directions, 2 * gates)
    if initial:
        names.append("h0")
        more["h0"] = (BATCH, directions, hidden) if batch_first else (directions, BATCH, hidden)
        if op == "LSTM":
            names.append("c0")
            more["c0"] = more["h0"]
    while names[-1] == "":
        names.pop()
    direction = "bidirectional" if directions == 2 else "forward"
    text = f'hidden_size = {hidden}, direction = "{direction}", layout = {int(batch_first)}'
    head = (BATCH, STEPS) if batch_first else (STEPS, BATCH)
    y = (*head, directions, hidden) if batch_first else (STEPS, directions, BATCH, hidden)
    arguments = ", ".join(name or '""' for name in names)
    return Case(
        f"y = {op} <{text}{', ' * bool(settings)}{settings}> ({arguments})",
        (*head, 16),
        y,
        lambda rng: known_rank(16, directions * gates, RANK, rng).T.reshape(directions, gates, 16),
        ("MatMul", op),
        op.lower(),
        (16, directions * gates),
        STEPS * BATCH * directions * gates * (16 + hidden),
        more=more,
        inputs={"lengths": f"int32[{BATCH}]"} if lengths else {},
        feeds={"lengths": np.array([5, 2, 3], np.int32)} if lengths else {},
        arguments=(op.lower(),),
        reference=reference,
    )


# onnx.reference ignores sequence_lens, and its cells run one way only.
CELLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "bidirectional": {"directions": 2, "bias": True, "reference": False},
    "sequence_lens": {"lengths": True, "reference": False},
    "initial states": {"bias": True, "initial": True},
    "everything": {
        "directions": 2,
        "bias": True,
        "lengths": True,
        "initial": True,
        "reference": False,
    },
}
RECURRENT = {
    f"{op}, {name}": recurrent(op, **options) for op in GATES for name, options in CELLS.items()
}


RECURRENT["GRU, linear_before_reset"] = recurrent(
    "GRU", bias=True, settings="linear_before_reset = 1"
)
