"""Stages of a refit: the layers that can be refitted, by the inputs that they read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_lowrank.data.mask import spread_mask
from onnx_lowrank.fitting.statistics import Statistics
from onnx_lowrank.graph.constant import Constant
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.walk import node_name, only_sum
from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.forms import Site
from onnx_lowrank.maps.pair import Factors
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.numerics.fisher import Fisher
from onnx_lowrank.numerics.ridge import Regression

__all__ = ["Reader", "RefitLayer", "RefitStage", "refit_layers", "refit_stages"]


@dataclass(frozen=True, eq=False)
class Reader:
    """A node of the main graph that multiplies with a weight to refit."""

    site: Site
    value: str
    residual: str | None
    read: Callable[[Array], Array]

    @property
    def output(self) -> str:
        """The name of what the node gives."""
        return self.site.node.outputs[0].name or ""

    def rows(
        self, before: Feed, after: Feed, mask: npt.NDArray[np.bool_] | None
    ) -> tuple[Array, Array]:
        """One sample's rows: what the compressed model multiplies, and what it should get."""
        wanted, stream = before[self.output], self.residual
        if stream is not None and stream in after:
            aimed = before[stream]
            # The target is the original sum: the layer compensates the drift of the stream.
            if aimed.shape == wanted.shape:
                wanted = wanted + (aimed - after[stream])
        activation = after[self.value]
        rows = self.site.form.vectors(self.site, activation)[0]
        target = self.read(wanted)
        spread = None if mask is None else spread_mask(mask, activation.shape)
        if spread is not None:
            chosen = self.site.form.vectors(self.site, spread)[0].any(axis=-1)
            rows, target = rows[chosen], target[chosen]
        return rows, target


@dataclass(frozen=True, eq=False)
class RefitLayer:
    """A group that can be refitted, and what reads its weight, in the order of the nodes."""

    group: Group
    readers: tuple[Reader, ...]
    fisher: Fisher

    @property
    def key(self) -> tuple[str, ...]:
        """Layers with the same inputs are refitted together."""
        return tuple(reader.value for reader in self.readers)

    def regression(self) -> Regression:
        """Without rows yet."""
        _, m, n = self.group.shape
        return Regression(m, n, biased=self.group.bias is not None, fisher=self.fisher)


@dataclass(frozen=True, eq=False)
class RefitStage:
    """Layers that read the same inputs.

    Attributes:
        layers: the layers, with equally many readers each.
        places: for each reader, where the first layer's stands in the graph, and where the last
            one's ends.
    """

    layers: tuple[RefitLayer, ...]
    places: tuple[tuple[int, int], ...]

    def compared(self, start: int = 0) -> list[str]:
        """Values of the original that readers from one on compare with."""
        readers = [reader for layer in self.layers for reader in layer.readers[start:]]
        return [r.output for r in readers] + [r.residual for r in readers if r.residual]


def refit_layers(
    model: ir.Model,
    constants: Constants,
    factors: Mapping[Group, Factors],
    statistics: Statistics,
) -> tuple[list[RefitLayer], dict[str, str]]:
    """What can be refitted, and by the name of its first node why something else cannot."""
    layers, left = [], {}
    for group in factors:
        sites = [member.site for member in group.members]
        graphs = {*(site.node.graph for site in sites), group.matrix.root.graph}
        name = node_name(sites[0].node)
        if factors[group].shared:
            left[name] = "it shares its first factor"
        elif group.inner is not None:
            left[name] = "a width is narrowed in front of it"
        elif any(member.transposed for member in group.members):
            left[name] = "its weight is also read transposed"
        elif graphs != {model.graph}:
            left[name] = "it is inside a subgraph or function"
        elif None in (readers := [_reader(site, constants) for site in sites]):
            form = sites[readers.index(None)].form.name
            left[name] = f"form {form} does not tell what its node adds to x·W"
        else:
            own = tuple(reader for reader in readers if reader is not None)
            layers.append(RefitLayer(group, own, statistics.coordinates(group)))
    return layers, left


def _reader(site: Site, constants: Constants) -> Reader | None:
    value, read = site.form.activation(site), site.form.mapped(site, constants)
    if value is None or value.name is None or read is None:
        return None
    return Reader(site, value.name, _residual(site.node.outputs[0], constants), read)


def _residual(output: ir.Value, constants: Constants) -> str | None:
    """The other operand where an output, perhaps with a bias, is added to a stream."""
    for _ in range(2):
        behind = only_sum(output)
        if behind is None:
            return None
        node, other = behind
        if other.name is None or other.graph is not node.graph:
            return None
        if not isinstance(constants.resolve(other), Constant):
            return other.name
        output = node.outputs[0]
    return None


def refit_stages(
    layers: Sequence[RefitLayer], positions: Mapping[ir.Node, int]
) -> list[RefitStage]:
    """Layers by the activations that they read, in the order of the first of these."""
    together: dict[tuple[str, ...], list[RefitLayer]] = {}
    for layer in layers:
        together.setdefault(layer.key, []).append(layer)
    stages = []
    for stage in together.values():
        steps = zip(*(layer.readers for layer in stage), strict=True)
        places = [[positions[reader.site.node] for reader in step] for step in steps]
        stages.append(RefitStage(tuple(stage), tuple((min(own), max(own) + 1) for own in places)))
    return sorted(stages, key=lambda stage: stage.places[0][0])
