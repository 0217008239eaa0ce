"""Recipes of a small model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tests.helpers.models import factored, parse

__all__ = ["SHAPES", "TEXT", "D", "fill", "layer", "of_rank_9"]

D = 48
# Three maps of one activation, two layers behind, one of them with a bias.
TEXT = f"""<ir_version: 8, opset_import: ["": 17]>
    g (float[batch, {D}] x) => (float[batch, 40] y) {{
        [q] q = MatMul(x, Wq)
        [k] k = MatMul(x, Wk)
        [v] v = MatMul(x, Wv)
        a = Tanh(q)
        b = Mul(a, k)
        c = Add(b, v)
        [up] d = Gemm(c, Wu, bu)
        e = Relu(d)
        [down] y = MatMul(e, Wd)
    }}"""
SHAPES = {"Wq": (D, D), "Wk": (D, D), "Wv": (D, D), "Wu": (D, 96), "Wd": (96, 40), "bu": (96,)}


def fill(place: Path) -> Path:
    """A model with weights of falling spectra, and samples that do not fill the space."""
    rng, weights = np.random.default_rng(3), {}
    for name, shape in SHAPES.items():
        weight = rng.standard_normal(shape)
        if len(shape) == 2:
            u, s, v = np.linalg.svd(weight, full_matrices=False)
            weight = (u * s * 0.9 ** np.arange(len(s))) @ v
        weights[name] = weight.astype(np.float32)
    common = weights["Wq"]  # the three of one activation read much the same of it
    for name in ("Wk", "Wv"):
        turn = np.linalg.qr(rng.standard_normal((D, D)))[0]
        weights[name] = (common @ turn + 0.02 * weights[name]).astype(np.float32)
    onnx.save(parse(TEXT, weights), place / "in.onnx")
    mix = rng.standard_normal((20, D)) / 4
    x = rng.standard_normal((400, 20)) @ mix + 0.05 * rng.standard_normal((400, D))
    np.savez(place / "data.npz", x=x.astype(np.float32))
    return place


def of_rank_9(folder: Path, path: Path) -> Path:
    """A recipe with a rank of 9 in every layer."""
    factored(folder / "in.onnx", rank=9, save_recipe=path)
    return path


def layer(plain: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(own for own in plain["layers"] if own["name"] == name)
    return found
