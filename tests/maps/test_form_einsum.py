"""Einsum: the nodes that it becomes, and the same outputs."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx
import onnx.helper
import pytest

from onnx_lowrank.numerics.arrays import Array
from tests.helpers.cases import (
    OPSETS,
    RANK,
    Case,
    check,
    declared,
)
from tests.helpers.models import (
    as_proto,
    assert_same,
    factored,
    known_rank,
    op_types,
    parse,
    uniform,
)

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


@pytest.mark.parametrize("name", EINSUM)
def test_einsum(name: str, rng: np.random.Generator) -> None:
    case = EINSUM[name]
    before = case.model(rng)
    after = check(case, rng)
    if case.ops[0] == "MatMul":
        assert after.graph.node[-1].attribute == before.graph.node[-1].attribute


REFUSED_EINSUM = {
    "a diagonal of the weight": ("bd,ddf->bf", (3, 16), (16, 16, 12), (3, 12), "diagonal"),
    "a diagonal of the activation": ("dd,df->f", (16, 16), (16, 12), (12,), "diagonal"),
    "a sum over the activation": ("bsd,df->bf", (3, 5, 16), (16, 12), (3, 12), "sums an axis"),
    "a sum over the weight": ("bd,dfk->bf", (3, 16), (16, 12, 6), (3, 12), "sums an axis"),
    "nothing contracted": ("bd,df->bdf", (3, 16), (16, 12), (3, 16, 12), "no matrix product"),
    "nothing new": ("bd,d->b", (3, 16), (16,), (3,), "no matrix product"),
    "dots in the weight": ("bd,d...->b...", (3, 16), (16, 12), (3, 12), "dots in its constant"),
}


@pytest.mark.parametrize("name", REFUSED_EINSUM)
def test_einsum_refused(name: str, rng: np.random.Generator) -> None:
    equation, x, shape, y, reason = REFUSED_EINSUM[name]
    model = parse(
        f"""<ir_version: 8, opset_import: {OPSETS}>
        one ({declared({"x": x})}) => ({declared({"y": y})})
        {{ y = Einsum <equation = "{equation}"> (x, W) }}""",
        {"W": uniform(shape, rng)},
    )
    result = factored(model, rank=1)
    (layer,) = result.report.layers
    assert (layer.status, layer.form, layer.off) == ("dense", "einsum", False)
    assert reason in layer.reason
    assert equation in layer.reason
    assert op_types(result.model) == ["Einsum"]


def test_einsum_of_three_is_refused(rng: np.random.Generator) -> None:
    model = parse(
        f"""<ir_version: 8, opset_import: {OPSETS}>
        one (float[3, 16] x, float[12, 5] z) => (float[3, 5] y)
        {{ y = Einsum <equation = "bd,df,fs->bs"> (x, W, z) }}""",
        {"W": known_rank(16, 12, RANK, rng)},
    )
    (layer,) = factored(model, rank=1).report.layers
    assert "has 3 operands; two are handled" in layer.reason


def test_einsum_with_too_few_letters_for_its_constant(rng: np.random.Generator) -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        one (float[3, 16] x) => (float y) { y = Einsum <equation = "bd,df->bf"> (x, W) }""",
        {"W": uniform((16, 12, 2), rng)},
    )
    (layer,) = factored(model, rank=1).report.layers
    assert "'df' for a constant of 3 axes" in layer.reason


def test_einsum_with_an_axis_that_is_stretched(rng: np.random.Generator) -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        one (float[1, 5, 16] x) => (float[3, 5, 12] y)
        { y = Einsum <equation = "ebd,edf->ebf"> (x, W) }""",
        {"W": known_rank(16, 12, RANK, rng, batch=(3,))},
    )
    after = as_proto(factored(model, rank=RANK).model)
    assert op_types(after) == ["Einsum", "Einsum"]
    onnx.checker.check_model(after)
    assert_same(model, after, {"x": uniform((1, 5, 16), rng)})
