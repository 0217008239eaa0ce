"""Sample files, and what the inputs of a model ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from onnx_lowrank.data.declared import InputSpec
from onnx_lowrank.data.loading import load_samples
from onnx_lowrank.data.samples import Samples
from onnx_lowrank.data.shapes import concrete_shapes

__all__ = ["F32", "I64", "TEXT", "X", "load", "named", "npz", "rows"]

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
X = (InputSpec("x", F32, ("n", 2)),)
TEXT = (
    InputSpec("ids", I64, ("batch", "seq")),
    InputSpec("mask", I64, ("batch", "seq")),
)


def load(
    path: Path,
    specs: Sequence[InputSpec] = X,
    *,
    limit: int = 100,
    seed: int = 0,
    dims: Mapping[str, int] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    outputs: Sequence[str] = ("y",),
) -> Samples:
    sizes = concrete_shapes(specs, shapes or {}, dims or {})
    return load_samples(path, specs, sizes, limit=limit, seed=seed, outputs=named(*outputs))


def named(*names: str) -> tuple[InputSpec, ...]:
    """Outputs of which only the name matters."""
    return tuple(InputSpec(name, F32, None) for name in names)


def npz(path: Path, **arrays: npt.ArrayLike) -> Path:
    np.savez(path, allow_pickle=True, **arrays)
    return path


def rows(count: int, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[np.float32]:
    return np.arange(count * 2).reshape(count, 2).astype(dtype)
