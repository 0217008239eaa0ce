"""The decision on one layer as plain values, for every report that shows layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Layer", "LayerSpectrum", "Status", "achieved_error"]

Status = Literal["factored", "dense"]


def achieved_error(layer: Layer) -> float | None:
    """Of the outputs on held-out samples where there are any, else of the weight."""
    return layer.output_error if layer.energy_of != "weight" else layer.weight_error


@dataclass(frozen=True)
class LayerSpectrum:
    """What each further unit of rank adds to a layer, at no more than 64 of its ranks.

    Attributes:
        of: what it is the energy of, see `Layer.energy_of`.
        full: the largest rank there is, min(m, n).
        break_even: the rank at which a pair has as many parameters as the matrix.
        ranks: rising, from 1; they end below ``full`` where only the leading components are known.
        values: the singular value at each of these ranks over the largest one.
        energy: the share of the energy that each of these ranks holds.
    """

    of: Literal["weight", "output", "fisher"]
    full: int
    break_even: float
    ranks: tuple[int, ...]
    values: tuple[float, ...]
    energy: tuple[float, ...]


@dataclass(frozen=True)
class Layer:
    """The decision on one linear map, and its reason.

    Attributes:
        name: the node's name, or its first output's where it has none.
        op_type: the node's operator.
        form: how the constant linear map stands in the graph, such as ``matmul-right``.
        weight: name of the constant.
        shape: (m, n), in × out: the map is ``x[m] -> x @ W[m, n]``; None where it is not known.
        slices: how many such matrices the constant holds (1 but for batched weights).
        status: "factored" or "dense" (left as it was).
        rank: rank k of the pair ``A[m, k] @ B[k, n]``; None where dense.
        reason: one sentence, with its numbers.
        parameters_before: elements of W.
        parameters_after: elements of A and B together, or of W where dense.
        energy: share of the energy that the rank holds; None where dense.
        energy_of: of what: "weight", the squared singular values of W, or "output", the second
            moments of ``x W`` over calibration samples, or "fisher", these weighted by their effect
            on the model's outputs.
        predicted_error: relative error of the layer's output, ``√(1 − energy)``, where the energy
            is the output's, in the same coordinates; else None.
        output_error: the same as achieved on held-out samples; None without them.
        weight_error: ``‖W − A·B‖ / ‖W‖`` (Frobenius), from the factors as stored; None where dense.
        macs_before: multiply-accumulates of one inference with the checked input shapes, or None.
        macs_after: the same for the pair.
        shared: how many further layers read the same constant.
        off: whether its form was not chosen; such layers count in no sum of linear
            parameters.
        first_factor_of: name of the layer whose pair holds the first factor that this one shares,
            and with which it counts; None where it has its own.
        refit: relative error of what the layer should give in the compressed model, before and
            after its refit, on samples that the refit was not made with; None where not refitted.
        format: in which integers its weights are stored, such as "4 bits, blocks of 32, + rank 8":
            so many weights of a column share a scale, and a pair of that rank corrects the
            rounding; None for floats.
        rounding_error: relative error of the layer's output that the rounding adds, on the samples
            that it was made with, or without samples of the weight; of maps around a width the root
            of the sum of their squares; None for floats.
        scope: the module of the network around the node, such as ``blocks.0.mlp``, where torch's
            exporter wrote it; else None.
        spectrum: what its ranks hold; None where the goal did not ask for it.
        bytes_before: bytes of W as stored; None where they are not known.
        bytes_after: the same of what is stored in its place.
        ms_before: milliseconds of the layer by itself; None where layers were not timed.
        ms_after: the same as it is in the result, between measured ranks on a straight line.
    """

    name: str
    op_type: str
    form: str
    weight: str
    shape: tuple[int, int] | None
    slices: int
    status: Status
    rank: int | None
    reason: str
    parameters_before: int
    parameters_after: int
    energy: float | None = None
    energy_of: Literal["weight", "output", "fisher"] = "weight"
    predicted_error: float | None = None
    output_error: float | None = None
    weight_error: float | None = None
    macs_before: int | None = None
    macs_after: int | None = None
    shared: int = 0
    off: bool = False
    refit: tuple[float, float] | None = None
    first_factor_of: str | None = None
    format: str | None = None
    rounding_error: float | None = None
    scope: str | None = None
    spectrum: LayerSpectrum | None = None
    bytes_before: int | None = None
    bytes_after: int | None = None
    ms_before: float | None = None
    ms_after: float | None = None
