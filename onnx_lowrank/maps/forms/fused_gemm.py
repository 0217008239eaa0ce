"""com.microsoft.FusedGemm: a Gemm with an activation behind it.

``f(α·X'·W' + β·C)  ->  f(α·(X' @ A)·B + β·C)``

Exactly as Gemm; the activation stays with the node, which is the second of the pair.
"""

from __future__ import annotations

from typing import ClassVar

from onnx_lowrank.maps.forms.gemm import GemmLeft, GemmRight

__all__ = ["FusedGemmLeft", "FusedGemmRight"]

_TARGETS = frozenset({("com.microsoft", "FusedGemm")})


class FusedGemmRight(GemmRight):
    """``f(α·X'·W' + β·C)``."""

    name = "fused-gemm-right"
    ops = "fused-gemm"
    targets: ClassVar[frozenset[tuple[str, str]]] = _TARGETS


class FusedGemmLeft(GemmLeft):
    """``f(α·W'·X' + β·C)``."""

    name = "fused-gemm-left"
    ops = "fused-gemm"
    targets: ClassVar[frozenset[tuple[str, str]]] = _TARGETS
