"""Probe: a model whose weights can be exchanged between runs without another session.

The weights of its groups become inputs of the graph.  A pair is judged by feeding its product in
the weight's place, integers by feeding what they stand for: that computes what the nodes that are
written compute, with the graph as it was.  Where products may round their inputs or results,
switches do the same with the operators that are written (`onnx_lowrank.ranks.switches`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from onnx_lowrank.data.joining import APART, Joining
from onnx_lowrank.evaluation.joinable import same_values
from onnx_lowrank.evaluation.outputs import MeanDamage, mean_damage
from onnx_lowrank.evaluation.reading import PLAIN, Reading
from onnx_lowrank.evaluation.watched import watched
from onnx_lowrank.fitting.static import StaticSteps
from onnx_lowrank.graph.fingerprint import fingerprint
from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.formats import Format
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.ranks.switches import switched
from onnx_lowrank.runtime.kept import heads_of
from onnx_lowrank.runtime.memory import Memory
from onnx_lowrank.runtime.pieces import Pieces, remembered
from onnx_lowrank.runtime.shelf import Shelf, Values
from onnx_lowrank.runtime.taps import OpenModel, Runner, give_out

__all__ = ["Probe"]

# Wide values of samples that are compared again and again stay as they are, up to so many bytes.
_KNOWN = 1 << 28
# Weights stay read where so many times their bytes may still be held.
_ROOM = 8


class Probe:
    """Runs a model on samples with pairs in place of weights and biases.

    Attributes:
        model: as it is.
        groups: whose weights can be exchanged: those of the main graph.
        asked: all that were to be exchanged.
        feeds: the samples.
        watched: what is compared to tell a damage.
        rows: of what is compared in the sample with fewest of them; the last axis is a row's.
        open_model: makes a runner of a model.
        static: steps of what is rounded with ranges that are known before; None without any.
    """

    def __init__(
        self,
        model: ir.Model,
        groups: Sequence[Group],
        feeds: Sequence[Feed],
        open_model: OpenModel,
        reading: Reading = PLAIN,
        by_classes: bool = False,
        memory: Memory | None = None,
        rounding: Mapping[Group, Format] | None = None,
        static: StaticSteps | None = None,
        pieces: Pieces | None = None,
        joining: Joining = APART,
    ) -> None:
        """Open the session and run the reference.

        Args:
            model: the model; it is not changed.
            groups: whose weights are to be exchanged.
            feeds: samples, at least one.
            open_model: makes a runner of a model.
            reading: what is known of the outputs.
            by_classes: whether damage is measured at shares of classes (see `watched`).
            memory: what may be held; outputs that do not fit wait in files, and of wide ones only
                what they are made of is kept (`onnx_lowrank.runtime.kept`).
            rounding: groups whose inputs may be rounded (see `rounds`), and in which format.
            static: steps of what is rounded with ranges that are known before.
            pieces: where damages of an earlier run are; default: nowhere.
            joining: how samples go together in one run; what they give is looked at.

        Raises:
            InputError: the model does not run.
        """
        self.model, self.open_model, self.static = model, open_model, static
        copy = model.clone()
        self._switches = switched(model, copy, rounding or {}, static)
        self.asked = frozenset(groups)
        self.groups = tuple(g for g in groups if _is_open(model, g))
        self._dense = {
            constant.name: constant.tensor
            for group in self.groups
            for constant in (group.matrix, group.bias)
            if constant is not None
        }
        for name in self._dense:
            _open_weight(copy, name)
        nodes = _nodes(groups)
        self.watched = watched(model, nodes, reading, by_classes)
        give_out(copy, self.watched.inside)
        wanted = self.watched.outputs | self.watched.inside
        self._heads = heads_of(copy, wanted, open_model, frozenset(self._dense))
        give_out(copy, set(self._heads.narrow.values()) - wanted)
        self.feeds = tuple(feeds)
        self._pieces, self._identity = pieces, ""
        if pieces is not None:
            weights = [tensor.numpy() for tensor in self._dense.values()]
            reads = reading, by_classes, [node.outputs[0].name for node in nodes]
            ways = joining.size > 1, joining.cuts
            self._identity = pieces.key(
                fingerprint(copy, whole=True), list(self._dense), weights, *reads, ways, self.feeds
            )
        self._run: Runner = open_model(copy)
        self._known: dict[int, Feed] = {}
        self._shelf, self._joining = Shelf(memory), joining
        self._arrays = self._read(memory)
        self._before = self._kept(joining.shortened(self.feeds))
        self._reference = None if joining.cuts else self._before
        self.rows = max(1, min(map(self._rows, self._before), default=1))
        self._joining = self._seen(joining)

    def serves(
        self,
        model: ir.Model,
        groups: Sequence[Group],
        feeds: Sequence[Feed],
        reading: Reading = PLAIN,
        by_classes: bool = False,
    ) -> bool:
        """Whether it does what a probe of the same run would do that is made of these.

        Args:
            model: the model.
            groups: whose weights are to be exchanged.
            feeds: samples.
            reading: what is known of the outputs.
            by_classes: whether damage is measured at shares of classes.
        """
        if model is not self.model or self._switches or not self.asked.issuperset(groups):
            return False
        if len(feeds) != len(self.feeds) or not all(map(_alike, feeds, self.feeds)):
            return False
        seen = watched(model, _nodes(groups), reading, by_classes)
        own = self.watched
        return (seen.outputs, seen.instead, by_classes) == (
            own.outputs,
            own.instead,
            own.by_classes,
        )

    def rounds(self, group: Group) -> dict[str, Array]:
        """Constants, as for `outputs`, that let products round what they multiply.

        Args:
            group: of the products; one that was named as such at the start.
        """
        return {self._switches[own]: np.array(True) for own in group.alone}

    @property
    def reference(self) -> Iterator[Feed]:
        """Outputs with the weights as they are, of every sample in turn."""
        if self._reference is None:  # what is compared is of shorter ones
            self._reference = self._kept(self.feeds)
        return map(self._given, map(self._whole, self._reference))

    def outputs(
        self, constants: Mapping[str, Array], feeds: Sequence[Feed] | None = None
    ) -> Iterator[Feed]:
        """Outputs of every sample in turn.

        Args:
            constants: elements in place of those of constants of the groups, by name (see
                `onnx_lowrank.maps.pair.constants_of`); the others stay as they are.
            feeds: other samples than the probe's.
        """
        return map(self._given, self._values(constants, feeds))

    def damage(self, constants: Mapping[str, Array], most: int | None = None) -> float | None:
        """Mean of `Watched.damage` over the samples; None where none of them can be compared.

        Args:
            constants: as for `outputs`.
            most: run only so many samples, which lie evenly among all, the same ones every time.
        """
        return self.measured(constants, most).mean

    def measured(self, constants: Mapping[str, Array], most: int | None = None) -> MeanDamage:
        """The same with its standard error; arguments as for `damage`."""
        return mean_damage(self.damages(constants, self.places(most)))

    def places(self, most: int | None = None) -> tuple[int, ...]:
        """Numbers of so many samples that lie evenly among all, rising; default: of all."""
        count = len(self.feeds)
        if most is None or most >= count:
            return tuple(range(count))
        return tuple(sorted({int(place) for place in np.linspace(0, count - 1, most)}))

    def damages(
        self, constants: Mapping[str, Array], places: Sequence[int]
    ) -> Sequence[float | None]:
        """`Watched.damage` of each of these samples; None where it cannot be compared.

        Args:
            constants: as for `outputs`.
            places: numbers of samples.
        """
        found = remembered(
            self._pieces,
            "damage",
            lambda: (self._identity, constants, list(places)),
            lambda: {"damages": self._damages(constants, places)},
        )
        return found["damages"]

    def further(
        self, constants: Mapping[str, Array], feeds: Sequence[Feed]
    ) -> Iterator[float | None]:
        """`Watched.damage` of each of other samples; the reference is run anew.

        Args:
            constants: as for `outputs`.
            feeds: the samples.
        """
        short = self._joining.shortened(feeds)
        runs = zip(short, self._values({}, short), self._values(constants, short), strict=True)
        for feed, before, after in runs:
            yield self.watched.damage(before, after, feed)

    def _damages(self, constants: Mapping[str, Array], places: Sequence[int]) -> list[float | None]:
        weights, found = self._weights(constants), dict[int, float | None]()
        for numbers in self._joining.runs([self.feeds[place] for place in places]):
            own = [places[number] for number in numbers]
            after = self._run({**weights, **self._joining.joined([self.feeds[p] for p in own])})
            for row, place in enumerate(own):
                before, feed = self._reference_of(place), self._joining.short(self.feeds[place])
                given = after if len(own) == 1 else self._joining.of(after, row, before)
                found[place] = self.watched.damage(before, given, feed)
        return [found[place] for place in places]

    def _seen(self, joining: Joining) -> Joining:
        """The same, one by one if what is compared shows a difference or cannot be told apart."""
        runs = joining.runs(self.feeds)
        own = next((numbers for numbers in runs if len(numbers) > 1), None)
        if own is None:
            return joining
        before = [self._reference_of(place) for place in own]
        after = self._run({**self._weights({}), **joining.joined([self.feeds[p] for p in own])})
        for row, values in enumerate(before):
            # Each has samples along axis 0: a part of another shape is refused here.
            alone = all(array.ndim and array.shape[0] == 1 for array in values.values())
            split = alone and all(after[name].shape[:1] == (len(own),) for name in values)
            if not split or not same_values(self.model, values, joining.of(after, row, values)):
                return replace(joining, size=1)
        return joining

    def _reference_of(self, sample: int) -> Feed:
        """All that is compared with a sample's outputs; what is wide is not made anew each time."""
        if self._heads.run is None:
            return self._before[sample]
        if sample not in self._known:
            found = self._whole(self._before[sample])
            size = sum(array.nbytes for values in self._known.values() for array in values.values())
            if size + sum(array.nbytes for array in found.values()) > _KNOWN:
                return found
            self._known[sample] = found
        return self._known[sample]

    def damages_of(self, model: ir.Model) -> list[float | None]:
        """`damages` of all samples, of another model that gives the same values; it is changed.

        Args:
            model: the probe's, with other nodes in place of some.
        """
        give_out(model, self.watched.inside)
        run, short = self.open_model(model), self._joining.shortened(self.feeds)
        return [
            self.watched.damage(self._whole(before), run(feed), feed)
            for feed, before in zip(short, self._before, strict=True)
        ]

    def damage_of(self, model: ir.Model) -> float | None:
        """Their mean."""
        return mean_damage(self.damages_of(model)).mean

    def _kept(self, feeds: Sequence[Feed]) -> tuple[Values, ...]:
        """What is kept of the values of samples, with the weights as they are."""
        found = self._values({}, feeds)
        return tuple(self._shelf.values(self._narrow(values)) for values in found)

    def _narrow(self, values: Feed) -> Feed:
        """What is kept of the values: in place of wide ones what they are made of."""
        kept = self._heads.read(values)
        return {name: array for name, array in values.items() if name in kept}

    def _whole(self, values: Feed) -> Feed:
        weights = {name: self._dense[name].numpy() for name in self._heads.weights}
        return self._heads.whole(values, weights)

    def _rows(self, values: Values) -> int:
        names = self._heads.read(self.watched.values)
        shapes = [values.shape(name) for name in values if name in names]
        return min((math.prod(shape[:-1]) for shape in shapes), default=1)

    def _given(self, values: Feed) -> Feed:
        """The outputs among the values."""
        return {name: array for name, array in values.items() if name in self.watched.outputs}

    def _values(
        self, constants: Mapping[str, Array], feeds: Sequence[Feed] | None = None
    ) -> Iterator[Feed]:
        """Outputs, and what stands for them, of every sample in turn."""
        weights = self._weights(constants)
        for feed in self.feeds if feeds is None else feeds:
            yield self._run({**weights, **feed})

    def _read(self, memory: Memory | None) -> dict[str, Array]:
        """The weights as they are, where memory allows: those of one file are copied each time."""
        room = None if memory is None else memory.room()
        if room is not None and room < _ROOM * sum(t.nbytes for t in self._dense.values()):
            return {}
        return {name: tensor.numpy() for name, tensor in self._dense.items()}

    def _weights(self, constants: Mapping[str, Array]) -> dict[str, Array]:
        """All that stands for weights, with elements in place of some."""
        weights = dict(self._arrays)
        weights |= {n: t.numpy() for n, t in self._dense.items() if n not in weights}
        weights |= dict.fromkeys(self._switches.values(), np.array(False))
        return weights | dict(constants)


def _nodes(groups: Sequence[Group]) -> list[ir.Node]:
    return [member.site.node for group in groups for member in group.members]


def _alike(feed: Feed, other: Feed) -> bool:
    """Whether two samples are seen to hold the same; of sequences only the same arrays are."""
    return feed.keys() == other.keys() and all(
        array is other[name]
        or (array.dtype == other[name].dtype != object and np.array_equal(array, other[name]))
        for name, array in feed.items()
    )


def _is_open(model: ir.Model, group: Group) -> bool:
    root = group.matrix.root
    producer = root.producer()
    graph = root.graph if producer is None else producer.graph
    return graph is model.graph and not root.is_graph_output()


def _open_weight(model: ir.Model, name: str) -> None:
    """Make a constant of the main graph an input."""
    graph = model.graph
    if name in graph.initializers:
        value = graph.initializers.pop(name)
        value.const_value = None
        if not value.is_graph_input():
            graph.inputs.append(value)
        return
    node = next(node for node in graph if any(v.name == name for v in node.outputs))
    old = node.outputs[0]
    tensor = ir.convenience.get_const_tensor(old)
    assert tensor is not None
    shape = ir.Shape([int(size) for size in tensor.numpy().shape])
    new = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape)
    old.name = f"{name}_constant"
    old.replace_all_uses_with(new)
    graph.remove(node, safe=True)
    graph.inputs.append(new)
