"""Convolution with ungrouped constant weights ``W[N, C, k…]``, off by default.

Channels:  ``Conv(X, W, b)  ->  Conv1×1(Conv(X, V), U, b)``    with ``V[r, C, k…]``, ``U[N, r, 1…]``
Spatial:   ``Conv(X, W, b)  ->  Conv(Conv(X, V), U, b)``       with ``V[r, C, kh, 1]``,
                                                               ``U[N, r, 1, kw]``

Channels: W is read as ``[C·k…, N]``; V keeps strides, pads and dilations, U is 1×1 and takes the
bias.  Spatial (Jaderberg et al., BMVC 2014): W is read as ``[C·kh, kw·N]``; V takes the vertical
strides, pads and dilations, U the horizontal ones.  Both are offered for a k×k kernel; the
cheaper one is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_lowrank.graph.constant import Constant, Unusable
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.walk import attribute
from onnx_lowrank.maps.emit import Emitter, Pair
from onnx_lowrank.maps.forms.base import (
    Cost,
    Dims,
    Form,
    Refusal,
    Site,
)
from onnx_lowrank.numerics.arrays import Array

__all__ = ["ConvChannels", "ConvSpatial"]

# Patches of one sample that enter the moments; neighbouring ones say much the same.
_PATCHES = 1024
_TARGETS = frozenset({("", "Conv")})
# Attributes with one value for each spatial axis, and what each is without effect.
_NEUTRAL = {"kernel_shape": 1, "strides": 1, "dilations": 1}


def _weight(node: ir.Node, constants: Constants) -> Constant | Refusal | None:
    weight = constants.resolve(node.inputs[1])
    if weight is None:
        return None
    if isinstance(weight, Unusable):
        return Refusal.of(weight)
    groups = attribute(node, "group", 1)
    if groups != 1:
        kind = "depthwise" if weight.shape[1] == 1 else "grouped"
        return Refusal.because(
            weight,
            f"{kind} convolution: its {groups} groups are small maps already",
        )
    return weight


def _axes(node: ir.Node, spatial: int) -> dict[str, list[int]]:
    """strides, dilations and pads with their defaults written out."""
    values = {
        name: list(node.attributes[name].as_ints()) if name in node.attributes else [1] * spatial
        for name in ("strides", "dilations")
    }
    pads = node.attributes.get("pads")
    values["pads"] = [0] * (2 * spatial) if pads is None else list(pads.as_ints())
    return values


def _with(node: ir.Node, values: dict[str, Sequence[int]], *, padded: bool) -> list[ir.Attr]:
    """Attributes of a convolution; auto_pad is carried along where this one pads."""
    attributes = [ir.AttrInt64s(name, list(numbers)) for name, numbers in values.items()]
    auto = node.attributes.get("auto_pad")
    if auto is not None and padded and auto.as_string() != "NOTSET":
        attributes = [a for a in attributes if a.name != "pads"]
        attributes.append(ir.AttrString("auto_pad", auto.as_string()))
    return attributes


def _set(node: ir.Node, attributes: Sequence[ir.Attr]) -> None:
    for name in ("kernel_shape", "strides", "dilations", "pads", "auto_pad"):
        node.attributes.pop(name, None)
    for item in attributes:
        node.attributes[item.name] = item


class ConvChannels(Form):
    """``Conv1×1(Conv(X, V), U, b)``."""

    name = "conv"
    ops = "conv"
    default = False
    targets: ClassVar[frozenset[tuple[str, str]]] = _TARGETS

    def match(self, node: ir.Node, constants: Constants) -> Site | Refusal | None:
        """An ungrouped Conv with a constant weight and any kernel."""
        weight = _weight(node, constants)
        if isinstance(weight, Refusal):
            own = constants.resolve(node.inputs[1])
            site = self._site(node, own) if isinstance(own, Constant) else None
            return replace(weight, site=site) if isinstance(site, Site) else weight
        return weight if weight is None else self._site(node, weight)

    def _site(self, node: ir.Node, weight: Constant) -> Site | Refusal:
        n, m = weight.shape[0], math.prod(weight.shape[1:])
        return self.site(node, 1, weight, weight.reshape(1, n, m).transpose(0, 2, 1))

    def vectors(self, site: Site, array: Array) -> Array:
        """The patches of X under the kernel (im2col), at most `_PATCHES` of a sample."""
        return _patches(site.node, array, site.operand.shape[2:]).reshape(1, -1, site.m)

    def mapped(self, site: Site, constants: Constants) -> Callable[[Array], Array] | None:
        """The output without its bias at the places of the patches."""
        added = site.node.inputs[2] if len(site.node.inputs) > 2 else None
        bias = None if added is None else constants.resolve(added)
        if added is not None and not isinstance(bias, Constant):
            return None
        constant = bias.numpy().astype(np.float32) if isinstance(bias, Constant) else np.zeros(1)

        def read(output: Array) -> Array:
            rows = np.moveaxis(output, 1, -1).reshape(-1, site.n)  # [places, N]
            return np.asarray(rows[_chosen(len(rows))] - constant)

        return read

    def bias(self, site: Site, constants: Constants) -> Constant | None:
        """The node's own."""
        found = constants.resolve(site.node.inputs[2]) if len(site.node.inputs) > 2 else None
        return found if isinstance(found, Constant) and found.shape == (site.n,) else None

    def reading(self, site: Site) -> Hashable:
        """Kernel, strides, dilations and pads."""
        return _geometry(site.node, site.operand.shape[2:])

    def rewrite(self, site: Site, pair: Pair, emit: Emitter) -> None:
        """V keeps everything but the bias, U is 1×1."""
        node = site.node
        n, channels, *kernel = site.operand.shape
        spatial = len(kernel)
        values = {"kernel_shape": kernel, **_axes(node, spatial)}
        first = pair.first.transpose(0, 2, 1).reshape(pair.rank, channels, *kernel)
        hidden = emit.node(
            "Conv",
            [node.inputs[0], emit.factor(first)],
            shape=_hidden_shape(node.outputs[0], pair.rank),
            attributes=_with(node, dict(values), padded=True),
        )
        second = pair.second.transpose(0, 2, 1).reshape(n, pair.rank, *[1] * spatial)
        emit.replace(0, hidden)
        emit.replace(1, emit.factor(second))
        _set(node, [ir.AttrInt64s(name, [v] * spatial) for name, v in _NEUTRAL.items()])


class ConvSpatial(Form):
    """``Conv[1×kw](Conv[kh×1](X, V), U, b)``."""

    name = "conv-spatial"
    ops = "conv"
    default = False
    targets: ClassVar[frozenset[tuple[str, str]]] = _TARGETS

    def match(self, node: ir.Node, constants: Constants) -> Site | Refusal | None:
        """An ungrouped two-dimensional Conv whose kernel is larger than 1 both ways."""
        weight = _weight(node, constants)
        if not isinstance(weight, Constant) or len(weight.shape) != 4:
            return None  # the other form answers for it
        n, channels, height, width = weight.shape
        if height == 1 or width == 1:
            return None
        matrix = weight.transpose(1, 2, 3, 0).reshape(1, channels * height, width * n)
        return self.site(node, 1, weight, matrix)

    def vectors(self, site: Site, array: Array) -> Array:
        """The columns of X under the kernel's height, from the patches under all of it."""
        _, channels, height, width = site.operand.shape
        patches = _patches(site.node, array, (height, width))
        columns = patches.reshape(-1, channels, height, width)[..., width // 2]
        return columns.reshape(1, -1, site.m)

    def reading(self, site: Site) -> Hashable:
        """Kernel, strides, dilations and pads."""
        return ("vertical", _geometry(site.node, site.operand.shape[2:]))

    def rewrite(self, site: Site, pair: Pair, emit: Emitter) -> None:
        """V works vertically, U horizontally."""
        node = site.node
        n, channels, height, width = site.operand.shape
        axes = _axes(node, 2)
        top, left, bottom, right = axes["pads"]
        vertical = {
            "kernel_shape": [height, 1],
            "strides": [axes["strides"][0], 1],
            "dilations": [axes["dilations"][0], 1],
            "pads": [top, 0, bottom, 0],
        }
        horizontal = {
            "kernel_shape": [1, width],
            "strides": [1, axes["strides"][1]],
            "dilations": [1, axes["dilations"][1]],
            "pads": [0, left, 0, right],
        }
        # A[C·kh, r] -> V[r, C, kh, 1]
        first = pair.first.transpose(0, 2, 1).reshape(pair.rank, channels, height, 1)
        hidden = emit.node(
            "Conv",
            [node.inputs[0], emit.factor(first)],
            shape=_vertical_shape(node, pair.rank),
            attributes=_with(node, dict(vertical), padded=True),
        )
        # B[r, kw·N] -> U[N, r, 1, kw]
        second = pair.second.reshape(pair.rank, width, n).transpose(2, 0, 1)
        emit.replace(0, hidden)
        emit.replace(1, emit.factor(second.reshape(n, pair.rank, 1, width)))
        _set(node, _with(node, dict(horizontal), padded=True))

    def cost(self, site: Site, dims: Callable[[ir.Value], Dims | None]) -> Cost | None:
        """V runs at the height of the output and the width of the input."""
        out, x = dims(site.node.outputs[0]), site.node.inputs[0]
        source = None if x is None else dims(x)
        if out is None or source is None or None in out or None in source:
            return None
        batch, _, height, width = (d or 0 for d in out)
        places = batch * height * width
        vertical = batch * height * (source[3] or 0)
        return Cost(places * site.operand.size, vertical * site.m, places * site.n)


def _geometry(node: ir.Node, kernel: Sequence[int]) -> Hashable:
    axes = _axes(node, len(kernel))
    auto = node.attributes["auto_pad"].as_string() if "auto_pad" in node.attributes else ""
    return ("patches", *kernel, auto, *(tuple(axes[name]) for name in sorted(axes)))


def _patches(node: ir.Node, array: Array, kernel: Sequence[int]) -> Array:
    """im2col: what lies under the kernel at every place, shape [places, C·k…], zeros as padding.

    Of more than `_PATCHES` places evenly spread ones are taken.
    """
    spatial = len(kernel)
    axes = _axes(node, spatial)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, axes["dilations"], strict=True)]
    pads = [(axes["pads"][i], axes["pads"][i + spatial]) for i in range(spatial)]
    auto = node.attributes["auto_pad"].as_string() if "auto_pad" in node.attributes else ""
    if auto.startswith("SAME"):
        pads = []
        for size, stride, span in zip(array.shape[2:], axes["strides"], reach, strict=True):
            total = max((-(-size // stride) - 1) * stride + span - size, 0)
            half = total // 2
            pads.append((total - half, half) if auto == "SAME_LOWER" else (half, total - half))
    elif auto == "VALID":
        pads = [(0, 0)] * spatial
    padded = np.pad(array, [(0, 0), (0, 0), *pads])
    windows = np.lib.stride_tricks.sliding_window_view(
        padded, reach, axis=tuple(range(2, 2 + spatial))
    )  # [B, C, places…, reach…]
    steps = [slice(None, None, stride) for stride in axes["strides"]]
    holes = [slice(None, None, dilation) for dilation in axes["dilations"]]
    windows = windows[(slice(None), slice(None), *steps, *holes)]
    places = np.moveaxis(windows, 1, 1 + spatial)  # [B, places…, C, k…]
    shape = places.shape[: 1 + spatial]
    chosen = _chosen(math.prod(shape))
    return places[np.unravel_index(chosen, shape)].reshape(len(chosen), -1)


def _chosen(count: int) -> npt.NDArray[np.int64]:
    """The places that count: at most `_PATCHES`, one at random out of each of so many parts."""
    if count <= _PATCHES:
        return np.arange(count)
    jitter = np.random.default_rng(count).random(_PATCHES)
    return ((np.arange(_PATCHES) + jitter) * (count / _PATCHES)).astype(np.int64)


def _hidden_shape(output: ir.Value, rank: int) -> ir.Shape | None:
    if output.shape is None or len(output.shape) < 2:  # too narrow for a convolution: wrong
        return None
    dims = list(output.shape)
    dims[1] = rank
    return ir.Shape(dims)


def _vertical_shape(node: ir.Node, rank: int) -> ir.Shape | None:
    x, output = node.inputs[0], node.outputs[0].shape
    if x is None or x.shape is None or output is None:
        return None
    return ir.Shape([output[0], rank, output[2], x.shape[3]])
