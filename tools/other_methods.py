"""Ways of others to make pairs, written here again from their papers, for comparison.

A row ``x`` of a layer's inputs is mapped to ``x·W``, ``W[m, n]``; ``C = E[xᵀx]``.  Each way gets
the rank, so that all of them are compared at the same parameters of every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import scipy.linalg
from threadpoolctl import threadpool_limits

from onnx_lowrank.data.mask import kept_rows
from onnx_lowrank.fitting.refit_stages import refit_layers, refit_stages
from onnx_lowrank.fitting.segments import OpenProto, Walk
from onnx_lowrank.fitting.statistics import Statistics
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.pair import Errors, Factors
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.numerics.moments import Moments
from onnx_lowrank.runtime.memory import Memory
from onnx_lowrank.runtime.shelf import Shelf

__all__ = ["WAYS", "Way", "aa_svd", "by_layer"]

Float64 = npt.NDArray[np.float64]
Pair = tuple[Float64, Float64, Float64 | None]
Way = Callable[[Float64, Moments, int], Pair]

_TINY = 1e-10  # share of the mean eigenvalue that is added to C where it has to be inverted


def fwsvd(weight: Float64, moments: Moments, rank: int) -> Pair:
    """FWSVD: the rows of W weighed by the root of their Fisher information.

    Y.-C. Hsu et al., "Language model compression with weighted low-rank factorization", ICLR 2022.
    The gradient at W is that of the output times the input; with both taken as independent, the
    information of row i is ``E[x_i²]`` but for a factor of the whole layer.
    """
    second = np.diag(moments.second)
    root = np.sqrt(np.maximum(second, 1e-12 * second.sum()))[:, None]
    first, last = _cut(root * weight, rank)
    return first / root, last, None


def svd_llm(weight: Float64, moments: Moments, rank: int) -> Pair:
    """SVD-LLM: the whitened weight ``Sᵀ·W`` is truncated, ``S·Sᵀ = C`` by Cholesky.

    X. Wang et al., "SVD-LLM: truncation-aware singular value decomposition for large language model
    compression", ICLR 2025.
    """
    root = scipy.linalg.cholesky(_raised(moments.second), lower=True)
    first, last = _cut(root.T @ weight, rank)
    return scipy.linalg.solve_triangular(root.T, first, lower=False), last, None


def svd_llm_v2(weight: Float64, moments: Moments, rank: int) -> Pair:
    """SVD-LLM v2: the same with the root of C by its own decomposition, not by Cholesky.

    X. Wang et al., "SVD-LLM V2: optimizing singular value truncation for large language model
    compression", NAACL 2025.  Its other half gives layers of one kind different ranks; here all
    have the same share.
    """
    vectors, values, _ = scipy.linalg.svd(_raised(moments.second))
    root = np.sqrt(values)
    first, last = _cut(root[:, None] * (vectors.T @ weight), rank)
    return vectors @ (first / root[:, None]), last, None


def lite_asr(weight: Float64, moments: Moments, rank: int) -> Pair:
    """LiteASR: the outputs less their mean on their principal components; a bias adds the mean.

    K. Kamahori et al., "LiteASR: efficient automatic speech recognition with low-rank
    approximation", EMNLP 2025.
    """
    mean = moments.mean
    spread = weight.T @ (moments.second - np.outer(mean, mean)) @ weight
    _, vectors = scipy.linalg.eigh(spread)
    basis = vectors[:, ::-1][:, :rank]
    first = weight @ basis
    return first, basis.T, mean @ weight - (mean @ first) @ basis.T


WAYS: Mapping[str, Way] = {
    "FWSVD": fwsvd,
    "SVD-LLM": svd_llm,
    "SVD-LLM v2": svd_llm_v2,
    "LiteASR": lite_asr,
}


def by_layer(
    way: Way, ranks: Mapping[Group, int], moments: Mapping[Group, Moments]
) -> dict[Group, Factors]:
    """The pairs of all layers, each fitted to the original's own inputs.

    Args:
        way: of `WAYS`.
        ranks: of the layers.
        moments: of what the original multiplies with them.
    """
    pairs = {}
    for group, rank in ranks.items():
        weight = group.matrix.numpy()[0].astype(np.float64)
        with threadpool_limits(1, user_api="blas"):  # two threads are far slower here
            pairs[group] = _stored(group, way(weight, moments[group], rank))
    return pairs


@dataclass
class _Sums:
    """``X̂ᵀX̂`` and ``X̂ᵀY`` of a layer: what the compressed model gives it, what it should make."""

    seen: Float64
    crossed: Float64


def aa_svd(
    model: ir.Model,
    ranks: Mapping[Group, int],
    feeds: Sequence[Feed],
    mask: str | None,
    opened: OpenProto,
    memory: Memory | None = None,
) -> dict[Group, Factors]:
    """AA-SVD: ``‖X·W − X̂·W′‖`` is least, X̂ what the layers before give after their compression.

    A. K. Sinha, F. Fleuret, "AA-SVD: anchored and adaptive SVD for large language model
    compression", arXiv 2604.02119, 2026: with ``X̂ᵀX̂ = S·Sᵀ`` the pair is ``S⁻ᵀ`` times the
    truncated ``S⁻¹·X̂ᵀ·(X·W)``.  Its second half, gradient descent on one block after the other, is
    not here.

    Args:
        model: the original; it is not changed.
        ranks: of all layers that become pairs.
        feeds: samples.
        mask: input whose zeros mark rows that do not count.
        opened: makes a runner of a model.
        memory: what may be held; values that wait and do not fit are in files.
    """
    blank = {
        group: Factors(np.empty(0), np.empty(0), Errors(0.0))  # only says what is asked for
        for group in ranks
    }
    layers, left = refit_layers(model, Constants(model, False), blank, Statistics())
    assert not left, left
    positions = {node: index for index, node in enumerate(model.graph)}
    stages = refit_stages(layers, positions)
    original = Walk(model, feeds, opened, Shelf(memory))
    compressed = original.fork()
    masks = [kept_rows(feed, mask) for feed in feeds]
    pairs: dict[Group, Factors] = {}
    for number, stage in enumerate(stages):
        ((start, end),) = stage.places
        compressed.advance(start)
        original.advance(end, [name for later in stages[number:] for name in later.compared()])
        for layer in stage.layers:
            _, m, n = layer.group.shape
            sums = _Sums(np.zeros((m, m)), np.zeros((m, n)))
            (reader,) = layer.readers
            for before, after, keep in zip(original.live, compressed.live, masks, strict=True):
                # Without the residual stream: the target is the layer's own output.
                x, y = reader.rows(before, {reader.value: after[reader.value]}, keep)
                sums.seen += x.T @ x
                sums.crossed += x.T @ y
            pairs[layer.group] = _stored(layer.group, _anchored(sums, ranks[layer.group]))
            for name, array in pairs[layer.group].constants(layer.group).items():
                compressed.replace(name, array)
    return pairs


def _anchored(sums: _Sums, rank: int) -> Pair:
    with threadpool_limits(1, user_api="blas"):
        root = scipy.linalg.cholesky(_raised(sums.seen), lower=True)
        target = scipy.linalg.solve_triangular(root, sums.crossed, lower=True)
        first, last = _cut(target, rank)
        return scipy.linalg.solve_triangular(root.T, first, lower=False), last, None


def _raised(second: Float64) -> Float64:
    """A matrix of second moments that has an inverse."""
    return np.asarray(second + _TINY * np.trace(second) / len(second) * np.eye(len(second)))


def _cut(matrix: Float64, rank: int) -> tuple[Float64, Float64]:
    """The truncated singular value decomposition as a pair, the singular values shared evenly."""
    u, values, vt = scipy.linalg.svd(matrix, full_matrices=False)
    half = np.sqrt(values[:rank])
    return u[:, :rank] * half, half[:, None] * vt[:rank]


def _stored(group: Group, pair: Pair) -> Factors:
    first, last, shift = pair
    stacks: list[Array] = [part.astype(np.float32)[None] for part in (first, last)]
    return Factors(stacks[0], stacks[1], Errors(0.0), shift=None if group.bias is None else shift)
