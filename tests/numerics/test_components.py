"""Leading components: by one reduction, and by a sketch, against what numpy finds."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from onnx_lowrank.numerics import components
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.components import Components
from onnx_lowrank.numerics.factors import relative_error, squared_singular_values
from onnx_lowrank.numerics.lapack import Tridiagonal
from onnx_lowrank.numerics.moments import Moments
from onnx_lowrank.numerics.output_pca import output_energies
from onnx_lowrank.numerics.ranks import energy_at, energy_rank
from onnx_lowrank.numerics.sketch import sketch
from onnx_lowrank.numerics.spectrum import squared_norm
from onnx_lowrank.numerics.stacks import fitted_pair


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def with_values(m: int, n: int, values: Array, rng: np.random.Generator) -> Array:
    """A float32 matrix with these singular values."""
    left = np.linalg.qr(rng.standard_normal((m, len(values))))[0]
    right = np.linalg.qr(rng.standard_normal((n, len(values))))[0]
    return np.asarray((left * values) @ right.T, np.float32)


@pytest.mark.parametrize("size", [1, 2, 3, 17, 120])
def test_one_reduction_gives_values_and_any_number_of_vectors(
    size: int, rng: np.random.Generator
) -> None:
    half = rng.standard_normal((size + 2, size))
    square = half.T @ half
    expected = np.linalg.eigvalsh(square)[::-1]
    reduced = Tridiagonal(square.copy())
    np.testing.assert_allclose(reduced.values(), expected, rtol=1e-10, atol=1e-12 * expected[0])
    for count in {1, (size + 1) // 2, size}:
        values, vectors = reduced.leading(count)
        np.testing.assert_allclose(values, expected[:count], rtol=1e-9, atol=1e-11 * expected[0])
        np.testing.assert_allclose(square @ vectors, vectors * values, atol=1e-9 * expected[0])
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(count), atol=1e-10)


def test_equal_eigenvalues_have_orthonormal_vectors() -> None:
    values, vectors = Tridiagonal(np.diag(np.repeat([4.0, 1.0, 0.0], 10))).leading(20)
    np.testing.assert_allclose(values, np.repeat([4.0, 1.0], 10))
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(20), atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 63, 64, 65, 66, 150])
def test_one_reduction_in_float32(size: int, rng: np.random.Generator) -> None:
    half = rng.standard_normal((size + 2, size)).astype(np.float32)
    square = half.T @ half
    expected = np.linalg.eigvalsh(square.astype(np.float64))[::-1]
    reduced = Tridiagonal(square.copy())
    np.testing.assert_allclose(reduced.values(), expected, atol=2e-6 * expected[0])
    for count in (size, 1, (size + 1) // 2):
        values, vectors = reduced.leading(count)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(values, expected[:count], atol=2e-6 * expected[0])
        np.testing.assert_allclose(square @ vectors, vectors * values, atol=1e-5 * expected[0])
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(count), atol=1e-5)


SLOW: dict[str, Callable[[Array], Array]] = {
    "power": lambda i: (i + 1.0) ** -0.65,
    "flat": np.ones_like,
    "one large": lambda i: np.where(i < 1, 30.0, 1.0),
    "a step": lambda i: np.where(i < 60, 1.0, 0.05),
    "exponential": lambda i: np.exp(-i / 50.0),
}


@pytest.mark.parametrize("kind", SLOW)
@pytest.mark.parametrize("shape", [(96, 96), (200, 300), (4096, 128)])
def test_float32_moves_energies_by_a_quarter_of_what_is_allowed(
    kind: str, shape: tuple[int, int], rng: np.random.Generator
) -> None:
    matrix = with_values(*shape, SLOW[kind](np.arange(float(min(shape)))), rng)
    matrix += np.float32(0.1 * np.abs(matrix).mean())  # rounding of one sign
    exact, rounded = Components(matrix), Components(matrix, energy=0.5)
    count = int((exact.squares > components.NOISE * exact.squares[0]).sum())
    tails = [np.cumsum(own.squares[::-1])[::-1][:count] for own in (exact, rounded)]
    allowed = components.SURE[0] * tails[0][0] + components.SURE[1] * exact.squares[0]
    assert np.abs(tails[0] - tails[1]).max() <= 0.25 * allowed


@pytest.mark.parametrize("kind", SLOW)
@pytest.mark.parametrize("shape", [(96, 96), (200, 300)])
@pytest.mark.parametrize("by", ["weight", "output"])
def test_ranks_are_those_of_float64_at_any_energy(
    kind: str, shape: tuple[int, int], by: str, rng: np.random.Generator
) -> None:
    matrix = with_values(*shape, SLOW[kind](np.arange(float(min(shape)))), rng)
    moments = None
    if by == "output":
        inputs = rng.standard_normal((900, shape[0])) * np.geomspace(3.0, 0.1, shape[0])
        moments = Moments(inputs.T @ inputs / 900, np.zeros(shape[0]), 900)
    exact = Components(matrix, moments)
    tails = np.append(np.cumsum(exact.squares[::-1])[::-1], 0.0) / exact.squares.sum()
    energies = [0.5, 0.8, 0.95, 0.99, 0.9999]
    energies += [1.0 - tails[k] for k in (3, 20, 60)]  # on the edge between two ranks
    energies += [1.0 - tails[k] + sign * 1e-7 for k in (3, 20) for sign in (1, -1)]
    for energy in energies:
        found = Components(matrix, moments, energy=energy)
        rank = energy_rank(exact.squares, energy)
        # On an edge two runs in float64 may differ.
        assert energy_rank(found.squares, energy) in (
            rank,
            energy_rank(exact.squares, energy + 1e-12),
            energy_rank(exact.squares, energy - 1e-12),
        )
        basis = found.basis(rank)
        assert basis.rank == rank
        pairs = [own.pair(matrix, rank, np.float32) for own in (basis, exact.basis(rank))]
        inputs_of = Moments(np.eye(shape[0]), np.zeros(shape[0]), 1) if moments is None else moments
        lost = [output_energies(matrix, *pair, inputs_of) for pair in pairs]
        assert lost[0][0] <= lost[1][0] * 1.0001 + 1e-9 * lost[1][1]


@pytest.mark.parametrize("by", ["weight", "output"])
def test_near_an_edge_the_energies_of_its_vectors_settle_the_rank(
    by: str, rng: np.random.Generator
) -> None:
    matrix = with_values(200, 160, SLOW["power"](np.arange(160.0)), rng)
    moments = None if by == "weight" else Moments(np.eye(200) * 2.0, np.zeros(200), 10**6)
    exact = Components(matrix, moments).squares
    total = exact.sum()
    for rank in (5, 30, 70):
        edge = 1.0 - exact[rank:].sum() / total
        for step in (-1e-6, 1e-6, -2e-7, 2e-7):  # far nearer than float32's values are known to be
            found = Components(matrix, moments, energy=edge + step)
            assert found.basis(3).vectors.dtype == np.float32
            assert energy_rank(found.squares, edge + step) == rank + (step > 0)
            held = np.cumsum(found.squares)[: rank + 1]
            assert (
                np.abs(held - np.cumsum(exact)[: rank + 1]).max() <= 0.1 * components.FINE * total
            )
            assert found.squares.sum() == pytest.approx(total, rel=1e-9)
        found = Components(matrix, moments, energy=edge + 1e-9)
        assert found.basis(3).vectors.dtype == np.float64
        assert energy_rank(found.squares, edge + 1e-9) == rank + 1


def test_what_a_bias_adds_counts_for_the_share(rng: np.random.Generator) -> None:
    matrix = with_values(96, 96, SLOW["power"](np.arange(96.0)), rng)
    exact = Components(matrix).squares
    for beside in (0.5, 3.0):
        whole = exact.copy()
        whole[0] += beside
        energy = 1.0 - whole[30:].sum() / whole.sum() + 1e-8
        found = Components(matrix, energy=energy, beside=beside).squares.copy()
        found[0] += beside
        assert energy_rank(found, energy) == energy_rank(whole, energy)


def test_where_float32_serves_and_where_not(rng: np.random.Generator) -> None:
    matrix = with_values(96, 96, SLOW["power"](np.arange(96.0)), rng)
    whole = Components(matrix).memory
    half = Components(matrix, energy=0.9)
    assert half.basis(3).vectors.dtype == np.float32
    assert half.memory <= whole
    assert Components(matrix, rank=20).basis(20).vectors.dtype == np.float32
    low = with_values(96, 96, np.geomspace(1.0, 1e-3, 8), rng)
    scaled = [(matrix * np.float32(10.0**power)) for power in (20, -15)]
    for odd in (
        Components(matrix),
        Components(matrix, energy=0.9999),
        Components(low, rank=8),  # what is lost is rounding
        *(Components(own, energy=0.9) for own in scaled),  # squares beyond float32
    ):
        assert odd.basis(3).vectors.dtype == np.float64


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((2, 3)),
        np.zeros((0, 0)),
        np.eye(3, dtype=np.float16),
        np.eye(3, order="F"),
        np.zeros((3, 6))[:, ::2],
    ],
)
def test_what_cannot_be_reduced_in_place_is_refused(bad: Array) -> None:
    with pytest.raises(ValueError, match="square array of float64 or float32 in C order"):
        Tridiagonal(bad)


DECAYING: dict[str, Callable[[Array], Array]] = {
    "exponential": lambda i: np.exp(-i / 12.0),
    "power": lambda i: 1.0 / (i + 1.0),
    "a step": lambda i: np.where(i < 18, 1.0, 0.03),
    "in pairs": lambda i: 0.8 ** (i // 2),
}


@pytest.mark.parametrize(
    ("kind", "shape", "dtype"),
    [
        *((kind, (520, 520), np.float32) for kind in DECAYING),
        ("power", (600, 520), np.float32),
        ("power", (520, 600), np.float32),
        ("exponential", (520, 600), np.float16),
        ("exponential", (600, 520), ml_dtypes.bfloat16),
    ],
)
def test_a_sketch_finds_the_rank_and_loses_no_more_than_the_best_pair(
    kind: str, shape: tuple[int, int], dtype: npt.DTypeLike, rng: np.random.Generator
) -> None:
    matrix = with_values(*shape, DECAYING[kind](np.arange(520.0)), rng).astype(dtype)
    exact = squared_singular_values(matrix[None])
    found = sketch(matrix, energy=0.95)
    assert found is not None
    total = float(exact.sum())
    assert found.squares.sum() + found.rest == pytest.approx(total, rel=1e-5)
    known = len(found.squares)
    # Never more than there is, and of what is lost hardly more than the best pair loses.
    assert (np.cumsum(found.squares) <= np.cumsum(exact)[:known] * (1 + 1e-5)).all()
    rank, best = energy_rank(found.squares, 0.95, found.rest), energy_rank(exact, 0.95)
    assert rank == best
    first, second = found.basis.pair(matrix, rank, np.float32)
    lost = relative_error(matrix[None], first[None], second[None]) ** 2
    assert lost <= 0.05
    assert lost <= 1.002 * (1.0 - energy_at(exact, rank))
    assert lost == pytest.approx(1.0 - energy_at(found.squares, rank, found.rest), rel=2e-3)


@pytest.mark.parametrize("kind", ["exponential", "power"])
def test_a_sketch_of_a_given_rank(kind: str, rng: np.random.Generator) -> None:
    matrix = with_values(520, 520, DECAYING[kind](np.arange(520.0)), rng)
    exact = squared_singular_values(matrix[None])
    found = sketch(matrix, rank=25)
    assert found is not None
    first, second = fitted_pair(matrix[None], None, 25, np.float32)
    lost = relative_error(matrix[None], first, second) ** 2
    assert lost <= 1.002 * (1.0 - energy_at(exact, 25))


def test_a_sketch_is_the_same_every_time(rng: np.random.Generator) -> None:
    matrix = with_values(520, 520, DECAYING["power"](np.arange(520.0)), rng)
    one, other = sketch(matrix, energy=0.9), sketch(matrix, energy=0.9)
    assert one is not None
    assert other is not None
    np.testing.assert_array_equal(one.basis.vectors, other.basis.vectors)


def test_no_sketch_where_a_reduction_is_sooner_done_or_more_exact(
    rng: np.random.Generator,
) -> None:
    flat = rng.standard_normal((520, 520)).astype(np.float32)
    assert sketch(flat, energy=0.95) is None  # too many are needed
    assert sketch(flat[:, :64], energy=0.5) is None  # too small
    assert sketch(flat.astype(np.float64), energy=0.05) is None
    assert sketch(np.zeros((520, 520), np.float32), energy=0.95) is None
    low = with_values(520, 520, np.geomspace(1.0, 1e-4, 12), rng)
    assert sketch(low, energy=1.0 - 1e-7) is None  # what is lost is rounding in float32
    assert sketch(low, rank=12) is None
    flat[3, 5] = np.nan
    assert sketch(flat, rank=5) is None


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_squared_norm(dtype: npt.DTypeLike, rng: np.random.Generator) -> None:
    matrix = rng.standard_normal((130, 77)).astype(dtype)
    expected = float(np.square(matrix.astype(np.float64)).sum())
    for view in (matrix, matrix.T, matrix[::2], np.asfortranarray(matrix)):
        share = float(np.square(view.astype(np.float64)).sum())
        assert squared_norm(view) == pytest.approx(share, rel=1e-6)
    assert squared_norm(matrix[:0]) == 0.0
    assert expected > 0.0
    for bad in (np.nan, np.inf):
        matrix[100, 7] = bad
        assert not np.isfinite(squared_norm(matrix))


def test_components_of_an_empty_matrix() -> None:
    found = Components(np.zeros((0, 4), np.float32))
    assert found.squares.shape == (0,)
    assert found.memory == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (600, 520)])
@pytest.mark.parametrize("scale", [1e-33, 1e18, 1e25, 1e36])
def test_weights_whose_squares_are_beyond_float32(
    scale: float, shape: tuple[int, int], rng: np.random.Generator
) -> None:
    values = 0.9 ** np.arange(30.0)
    left = np.linalg.qr(rng.standard_normal((shape[0], 30)))[0]
    right = np.linalg.qr(rng.standard_normal((shape[1], 30)))[0]
    matrix = ((left * (values * scale)) @ right.T).astype(np.float32)
    first, second = fitted_pair(matrix[None], None, 8, np.float32)
    off = matrix - first[0].astype(np.float64) @ second[0].astype(np.float64)
    best = float(np.linalg.norm(values[8:])) * scale
    assert np.linalg.norm(off) == pytest.approx(best, rel=0.01)
