"""Spectra, ranks and pairs by torch: those of the processor, here with torch's own cpu."""

from __future__ import annotations

import builtins
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from onnx_lowrank.errors import InputError
from onnx_lowrank.numerics import components
from onnx_lowrank.numerics.accelerator import Accelerator
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.components import Components
from onnx_lowrank.numerics.moments import Moments
from onnx_lowrank.numerics.ranks import energy_rank
from onnx_lowrank.numerics.stacks import fitted_pair

FALLING: dict[str, Callable[[Array], Array]] = {
    "power": lambda i: (i + 1.0) ** -0.65,
    "flat": np.ones_like,
    "a step": lambda i: np.where(i < 60, 1.0, 0.05),
    "exponential": lambda i: np.exp(-i / 50.0),
}


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", reason="torch is not installed")


def drawn(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> Array:
    values = FALLING[kind](np.arange(float(min(shape))))
    left = np.linalg.qr(rng.standard_normal((shape[0], len(values))))[0]
    right = np.linalg.qr(rng.standard_normal((shape[1], len(values))))[0]
    return np.asarray((left * values) @ right.T, np.float32)


def moments_of(m: int, rng: np.random.Generator) -> Moments:
    inputs = rng.standard_normal((900, m)) * np.geomspace(3.0, 0.1, m)
    return Moments(inputs.T @ inputs / 900, np.zeros(m), 900)


@pytest.mark.parametrize("kind", FALLING)
@pytest.mark.parametrize("shape", [(96, 96), (300, 200), (200, 300)])
@pytest.mark.parametrize("by", ["weight", "output"])
@pytest.mark.usefixtures("torch")
def test_ranks_and_pairs_are_those_of_the_processor(
    kind: str, shape: tuple[int, int], by: str, rng: np.random.Generator
) -> None:
    matrix = drawn(kind, shape, rng)
    own = None if by == "weight" else moments_of(shape[0], rng)
    engine = Accelerator("torch:cpu")
    here, there = Components(matrix, own), Components(matrix, own, engine=engine)
    np.testing.assert_allclose(there.squares, here.squares, atol=1e-12 * here.squares[0])
    tails = np.append(np.cumsum(here.squares[::-1])[::-1], 0.0) / here.squares.sum()
    edges = [1.0 - tails[k] + sign * 1e-7 for k in (3, 20) for sign in (1, -1)]
    for energy in (0.5, 0.8, 0.95, 0.99, *edges):
        found = Components(matrix, own, energy=energy, engine=engine)
        assert energy_rank(found.squares, energy) == energy_rank(here.squares, energy)
    given = None if own is None else [own]
    for rank in (5, 60):  # no component beside the last one is as strong
        if kind == "flat" or (kind == "a step" and rank == 5):
            continue
        products = [
            np.matmul(*fitted_pair(matrix[None], given, rank, np.float32, engine=device)[:2])
            for device in (engine, Accelerator("torch:cpu"))
        ]
        plain = np.matmul(*fitted_pair(matrix[None], given, rank, np.float32))
        scale = np.linalg.norm(plain)
        assert np.linalg.norm(products[0] - plain) <= 2e-4 * scale
        np.testing.assert_array_equal(*products)


@pytest.mark.parametrize("kind", FALLING)
@pytest.mark.parametrize("shape", [(96, 96), (4096, 128)])
@pytest.mark.usefixtures("torch")
def test_float32_moves_energies_by_less_than_the_bound(
    kind: str, shape: tuple[int, int], rng: np.random.Generator
) -> None:
    matrix = drawn(kind, shape, rng)
    matrix += np.float32(0.1 * np.abs(matrix).mean())
    exact = Components(matrix)
    rounded = Components(matrix, energy=0.5, engine=Accelerator("torch:cpu"))
    count = int((exact.squares > components.NOISE * exact.squares[0]).sum())
    tails = [np.cumsum(own.squares[::-1])[::-1][:count] for own in (exact, rounded)]
    allowed = components.SURE[0] * tails[0][0] + components.SURE[1] * exact.squares[0]
    assert np.abs(tails[0] - tails[1]).max() <= 0.5 * allowed


def test_a_device_that_is_not_there(torch: Any) -> None:
    for device in ("nonsense", "", "meta", "cuda:9"):
        why = rf"device='{re.escape(device)}': expected cpu, or a device that torch can use"
        with pytest.raises(InputError, match=why) as caught:
            Accelerator(device)
        assert "\n" not in str(caught.value)


def test_products_that_are_rounded_more(torch: Any) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(InputError, match=r"set_float32_matmul_precision.*got 'high'"):
            Accelerator("torch:cpu")
    finally:
        torch.set_float32_matmul_precision(before)


def test_memory_that_is_not_there(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Accelerator("torch:cpu")

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("out of memory\nTried to allocate")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    with pytest.raises(InputError, match=r"device='torch:cpu': out of memory$"):
        engine.reduce(np.eye(3))


def test_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def refuse(name: str, *given: Any, **more: Any) -> Any:
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'")
        return plain(name, *given, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InputError, match=r"device='cuda'.*pip install 'onnx-lowrank\[gpu\]'"):
        Accelerator("cuda")
