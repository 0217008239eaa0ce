"""Wishes: the form of a graph that each kind of target runs best."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["WISHES", "Wishes"]


@dataclass(frozen=True)
class Wishes:
    """The form of a graph that a target runs best.

    Attributes:
        rank_multiple: multiple of ranks on which its kernels are fastest.
        fixed: whether all sizes must be known.
        plain: Gemm with α = β = 1, transA = 0 and a weight that is an initializer.
        matrices: products of two axes.
        bias: Gemm with a bias, and only with one.
        right: the constant on the right, or a convolution.
        blocks: whether it runs weights of integers in blocks with a scale each.
        zeros: whether a zero point for each block of 4 bits costs no time in its products.
        dynamic_int8: whether it runs products of integers whose inputs are quantized in each run.
        static_int8: whether it wants products of integers between QuantizeLinear and
            DequantizeLinear.
        channels: whether the weights of these may have a scale for each column.
    """

    rank_multiple: int = 8
    fixed: bool = False
    plain: bool = False
    matrices: bool = False
    bias: bool = False
    right: bool = False
    blocks: bool = False
    zeros: bool = False
    dynamic_int8: bool = False
    static_int8: bool = False
    channels: bool = False


WISHES: dict[str, Wishes] = {
    "cpu": Wishes(rank_multiple=16, blocks=True, zeros=True, dynamic_int8=True),
    "arm": Wishes(rank_multiple=16, blocks=True, dynamic_int8=True),
    "qnn": Wishes(rank_multiple=32, fixed=True, plain=True, static_int8=True, channels=True),
    "nnapi": Wishes(fixed=True, plain=True, matrices=True, bias=True, right=True, static_int8=True),
    "coreml": Wishes(fixed=True, plain=True, matrices=True, bias=True, right=True),
    "webgpu": Wishes(rank_multiple=4, blocks=True),
    # XNNPACK's Gemm takes the number of rows from the model.
    "xnnpack": Wishes(16, fixed=True, plain=True, matrices=True, bias=True, right=True),
}
"""By the name of the target."""
