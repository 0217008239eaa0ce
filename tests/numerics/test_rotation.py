"""The rotation of the rank axis: the product stays, channels are alike."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.factors import balanced_pair
from onnx_lowrank.numerics.joint import joint_pair
from onnx_lowrank.numerics.moments import Moments
from onnx_lowrank.numerics.output_pca import output_pair
from onnx_lowrank.numerics.rotation import rotated_first, rotated_second

RANKS = [1, 2, 3, 16, 63, 240]


def kurtosis(array: Array) -> float:
    """Fourth moment over the squared second one: 3 for normal numbers."""
    return float(np.mean(array**4) / np.mean(array**2) ** 2)


def falling(rng: np.random.Generator, m: int, n: int, power: float = 1.0) -> Array:
    """A matrix whose singular values fall steeply."""
    left = np.linalg.qr(rng.standard_normal((m, m)))[0]
    right = np.linalg.qr(rng.standard_normal((n, n)))[0]
    size = min(m, n)
    values = (1.0 + np.arange(size)) ** -power
    return np.asarray((left[:, :size] * values) @ right[:size])


@pytest.mark.parametrize("rank", RANKS)
def test_it_is_orthogonal_and_the_same_for_both_factors(rank: int) -> None:
    turned, back = rotated_first(np.eye(rank)), rotated_second(np.eye(rank))
    np.testing.assert_allclose(turned @ turned.T, np.eye(rank), atol=1e-13)
    np.testing.assert_allclose(turned, back.T, atol=1e-13)
    np.testing.assert_array_equal(turned, rotated_first(np.eye(rank)))


@pytest.mark.parametrize("side", [(300, 200), (200, 300)])
@pytest.mark.parametrize("sampled", [True, False])
def test_channels_of_a_pair_are_alike(
    side: tuple[int, int], sampled: bool, rng: np.random.Generator
) -> None:
    matrix, rank = falling(rng, *side), 96
    second = np.cov(
        rng.standard_normal((2000, side[0])) * np.linspace(0.1, 2, side[0]), rowvar=False
    )
    own = Moments(second, np.zeros(side[0]), 2000)
    if sampled:
        first, other = output_pair(matrix, own, rank, np.float64)
    else:
        first, other = (part[0] for part in balanced_pair(matrix[None], rank, np.float64))
    for lengths in (
        np.linalg.norm(first, axis=0),
        np.linalg.norm(other, axis=1),
        np.sqrt(np.einsum("mk,mk->k", first, own.applied(first))),  # of the bottleneck
    ):
        assert lengths.max() < 3 * lengths.min()
    assert kurtosis(first) < 6
    assert kurtosis(other) < 6


def test_neighbouring_channels_have_nothing_in_common(rng: np.random.Generator) -> None:
    """What saturates in 16 bits is the sum of the products of two neighbours."""
    first, second = (
        part[0] for part in balanced_pair(falling(rng, 300, 200)[None], 96, np.float64)
    )
    for rows in (first.T, second):
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        alike = np.einsum("kn,kn->k", rows[:-1], rows[1:])
        assert abs(alike.mean()) < 0.15


def test_a_shared_first_factor_has_one_rotation(rng: np.random.Generator) -> None:
    matrices = [falling(rng, 60, n) for n in (30, 50)]
    own = Moments(np.eye(60), np.zeros(60), 1000)
    first, seconds = joint_pair(matrices, [1.0, 3.0], own, 60, np.float64)
    for matrix, second in zip(matrices, seconds, strict=True):
        np.testing.assert_allclose(first @ second, matrix, atol=1e-12)
    assert kurtosis(first) < 6
