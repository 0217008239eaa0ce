"""Distances of two sets of classes: Kullback-Leibler divergence, and the surprise at the right one.

Rows are logits, or shares that add up to 1.  They are read a block at a time: the logits of a
language model are the largest arrays of all.  Logits of at most 32 bits are compared in float32, in
an order of the work that loses next to nothing; what is not finite there, and all else, is in
double precision.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from onnx_lowrank.numerics.arrays import Array

__all__ = ["are_shares", "divergences", "surprises"]

# Elements of a block of rows.
BLOCK = 1 << 18
# Rows of shares add up to 1 within this, also in float16.
_SLACK = 5e-3
_LEAST = float(np.finfo(np.float64).tiny)
# Bytes of an element of float32.
_NARROW = 4


def are_shares(rows: Array) -> bool:
    """Whether every row holds shares: numbers from 0 that add up to 1.

    Args:
        rows: shape [rows, classes].
    """
    for part in _blocks(rows):
        block = rows[part].astype(np.float64)
        with np.errstate(invalid="ignore"):
            total = block.sum(axis=-1)
            if not (np.all(block >= 0.0) and np.all(np.abs(total - 1.0) <= _SLACK)):
                return False
    return bool(len(rows))


def divergences(reference: Array, found: Array, shares: bool = False) -> npt.NDArray[np.float64]:
    """``Σ p (log p − log q)`` of every row in nats, of p by the reference and q by the other one.

    Infinite where only one of the two rows holds NaN, or the other one's logits rule out a class
    that the reference does not.  A share of 0 is taken for the smallest number, as rounding
    makes zeros of small shares.

    Args:
        reference: shape [rows, classes].
        found: the same shape.
        shares: whether rows are p and q themselves; else they are logits.

    Returns:
        shape [rows].
    """
    result = np.empty(len(reference))
    narrow = not shares and max(array.dtype.itemsize for array in (reference, found)) <= _NARROW
    for part in _blocks(reference):
        if narrow:
            a, b = (array[part].astype(np.float32, copy=False) for array in (reference, found))
            own = _near(a, b)
            if np.isfinite(own).all():
                result[part] = own
                continue
        log_p, log_q = (_logarithms(array[part], shares) for array in (reference, found))
        p = np.exp(log_p)
        with np.errstate(invalid="ignore"):
            terms = np.where(p > 0.0, p * (log_p - log_q), 0.0)
        own = terms.sum(axis=-1)
        odd = [np.isnan(log).any(axis=-1) for log in (log_p, log_q)]
        # Rounding makes rows that are the same slightly negative.
        result[part] = np.where(odd[0] | odd[1], np.inf, np.maximum(own, 0.0))
        result[part][odd[0] & odd[1]] = 0.0
    return result


def surprises(
    rows: Array, classes: npt.NDArray[np.int64], shares: bool = False
) -> npt.NDArray[np.float64]:
    """``−log p`` of one class of every row, in nats; infinite where the row holds NaN.

    Args:
        rows: shape [rows, classes].
        classes: shape [rows].
        shares: whether rows are p themselves; else they are logits.

    Returns:
        shape [rows].
    """
    result = np.empty(len(rows))
    for part in _blocks(rows):
        log_p = _logarithms(rows[part], shares)
        own = -np.take_along_axis(log_p, classes[part][:, np.newaxis], axis=-1)[:, 0]
        result[part] = np.where(np.isnan(own), np.inf, own)
    return result


def _blocks(rows: Array) -> Iterator[slice]:
    step = max(1, BLOCK // max(rows.shape[-1], 1))
    return (slice(start, start + step) for start in range(0, len(rows), step))


def _near(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """The divergences of rows of logits, of what they differ by.

    With p = softmax a and t = b − a − c, for any c that the rows have in common, the divergence is
    log Σ p eᵗ − Σ p t = log(1 + Σ p (eᵗ − 1 − t) + Σ p t) − Σ p t.  With c the mean of b − a over p
    the last sum is near 0, and the terms of the first are not below 0: nothing cancels.
    """
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        p = np.exp(a - a.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        t = b - a
        t -= (p * t).sum(axis=-1, keepdims=True)
        mean = (p * t).sum(axis=-1, dtype=np.float64)
        bent = np.expm1(t)
        bent -= t
        bent *= p
        found = np.log1p(bent.sum(axis=-1, dtype=np.float64) + mean) - mean
        return np.asarray(np.maximum(found, 0.0))


def _logarithms(rows: Array, shares: bool) -> npt.NDArray[np.float64]:
    wide = rows.astype(np.float64)
    if shares:
        return np.asarray(np.log(np.maximum(wide, _LEAST)))
    with np.errstate(invalid="ignore"):
        wide -= wide.max(axis=-1, keepdims=True)
        wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide
