"""The cost table: how long every linear map takes, dense and as a pair, on one place.

Maps that look the same to the runtime (form, attributes, shapes and types of all inputs) share one
`CostKey` and are measured once, alone, dense and at a few ranks; ranks in between are interpolated.
The same is done in every number format that their weights may have.
Keys are plain values, so a table that was measured on a board steers a run on a workstation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from onnx_lowrank.errors import InputError
from onnx_lowrank.graph.constant import FLOATS, Constant
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.walk import node_name
from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.formats import Format, Variant, folded
from onnx_lowrank.maps.forms.base import Site
from onnx_lowrank.numerics.ranks import break_even
from onnx_lowrank.progress import Advance
from onnx_lowrank.ranks.formats import ONLY_FLOATS, Formats
from onnx_lowrank.ranks.microbench import (
    Limits,
    Timer,
    alignment,
    compare,
    serialized,
)
from onnx_lowrank.ranks.specimen import Specimen
from onnx_lowrank.ranks.times import CostKey, FormatTimes, Place, Times
from onnx_lowrank.runtime.taps import Run, Seen, look

__all__ = ["CostPlan", "CostTable", "measure_costs", "plan_costs"]

# Where a pair is measured: shares of the break-even rank, on the multiple below.
_SHARES = (0.25, 0.5, 0.75, 0.9)
_MULTIPLE = 8
# Half-widths above this are worth a note.
_CERTAIN = 0.05
# A weight above this does not fit into the protobuf that the map alone is loaded from.
_LARGEST = 1_000_000_000


@dataclass(frozen=True, eq=False)
class CostPlan:
    """What there is to measure for a model.

    Attributes:
        keys: map -> what its time depends on.
        specimens: one map of each key.
        unknown: name of a map whose time cannot be told -> why.
        formats: those that a map of a key may have.
    """

    keys: Mapping[Site, CostKey]
    specimens: Mapping[CostKey, Specimen]
    unknown: Mapping[str, str]
    formats: Mapping[CostKey, Formats] = field(default_factory=dict)

    def missing(self, table: CostTable | None, place: Place) -> tuple[CostKey, ...]:
        """The keys to measure: those that a table lacks, if it is of this place."""
        if table is None:
            return tuple(self.specimens)
        if not _same(table.place, place):
            return ()
        return tuple(key for key in self.specimens if not self._holds(table.times.get(key), key))

    def _holds(self, times: Times | None, key: CostKey) -> bool:
        if times is None:
            return False
        dense, pairs = _timed_formats(self.formats.get(key, ONLY_FLOATS))
        return all(times.of(form) for form in dense) and all(times.at(1, form) for form in pairs)


def _same(one: Place, other: Place) -> bool:
    """Whether times can be compared; another version of the runtime is noted, not refused."""
    return (one.provider, one.threads, one.processor) == (
        other.provider,
        other.threads,
        other.processor,
    )


@dataclass(frozen=True, eq=False)
class CostTable:
    """Times on one place, for the maps of one model.

    Attributes:
        place: where they were taken.
        times: key -> times.
        keys: map of the model -> key; empty in a table that was just loaded.
        unknown: name of a map without times -> why.
    """

    place: Place
    times: Mapping[CostKey, Times]
    keys: Mapping[Site, CostKey] = field(default_factory=dict)
    unknown: Mapping[str, str] = field(default_factory=dict)

    def dense(self, group: Group) -> float | None:
        """Nanoseconds of a group's nodes as they are; None where one of them is not known."""
        return self._sum(group, lambda times: times.dense_ns)

    def pair(self, group: Group, rank: int, leads: bool = True) -> float | None:
        """Nanoseconds of a group's nodes as pairs of a rank; None where one is not known.

        Without ``leads`` the first product is another group's.  Pairs were timed as a whole; the
        second product is taken to have the share of the time that it has of the work, n/(m+n).
        """
        return self._pair(group, rank, None, leads)

    def time(self, group: Group, variant: Variant, leads: bool = True) -> float | None:
        """Nanoseconds of a group's nodes as a variant; None where one is not known.

        Args:
            group: the group.
            variant: what its layers become.
            leads: as for `pair`.
        """
        rank, form = variant.rank, variant.format
        if form is not None and folded(group) and not form.integers:
            form = None  # floats by the time it runs
        if form is None:
            return self.dense(group) if rank is None else self.pair(group, rank, leads)
        if rank is None:
            return self._sum(group, lambda times: times.dense(form))
        return self._pair(group, rank, form, leads)

    def _pair(self, group: Group, rank: int, form: Format | None, leads: bool) -> float | None:
        time = self._sum(group, lambda times: times.at(rank, form))
        _, m, n = group.shape
        return time if time is None or leads else time * n / (m + n)

    def of(self, site: Site) -> Times | None:
        """The times of one map; None where they are not known."""
        key = self.keys.get(site)
        return None if key is None else self.times.get(key)

    def multiple(self, group: Group) -> int | None:
        """The multiple on which a group's rank should be; None where that is not known."""
        found = self._of(group)
        if found is None:
            return None
        return max((t.multiple for t in found if t.multiple is not None), default=None)

    def notes(self) -> tuple[str, ...]:
        """What the user should know: what has no time, and how certain the others are."""
        notes = [f"{name} has no known latency: {why}" for name, why in self.unknown.items()]
        used = {key: node_name(site.node) for site, key in self.keys.items() if key in self.times}
        noisy = [key for key in used if self.times[key].noise > _CERTAIN]
        if noisy:
            worst = max(noisy, key=lambda key: self.times[key].noise)
            notes.append(
                f"latency of {len(noisy)} of {len(used)} kinds of layers is uncertain, by up to "
                f"{100 * self.times[worst].noise:.0f} % ({used[worst]}): the machine was busy"
            )
        return tuple(notes)

    def _of(self, group: Group) -> list[Times] | None:
        found = [self.of(member.site) for member in group.members]
        times = [one for one in found if one is not None]
        return times if len(times) == len(found) else None

    def _sum(self, group: Group, what: Callable[[Times], float | None]) -> float | None:
        found = self._of(group)
        if found is None:
            return None
        parts = [what(times) for times in found]
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None


def plan_costs(
    groups: Sequence[Group],
    model: ir.Model,
    run: Run,
    formats: Mapping[Group, Formats] | None = None,
) -> CostPlan:
    """See which maps there are to measure, from one run of the model.

    Args:
        groups: the maps.
        model: their model; it is not changed.
        run: runs a model on one sample (its sizes are those that are measured).
        formats: those that the maps may have.

    Raises:
        InputError: from ``run``.
    """
    groups = list(groups)
    paired = [group.members[0].site.node for group in groups if group.heads]
    groups = [group for group in groups if not group.heads]
    sites = [member.site for group in groups for member in group.members]
    outer = [site for site in sites if site.node.graph is model.graph]
    unknown = {
        node_name(site.node): "it is inside a subgraph or a function"
        for site in sites
        if site.node.graph is not model.graph
    }
    own = {
        m.site: _apart((formats or {}).get(group, ONLY_FLOATS), floats=folded(group))
        for group in groups
        for m in group.members
    }
    for node in paired:
        unknown[node_name(node)] = "maps that are narrowed together are not timed together"
    seen = _seen(outer, model, run)
    constants = Constants(model, force_inputs=True)
    keys: dict[Site, CostKey] = {}
    specimens: dict[CostKey, Specimen] = {}
    of_key: dict[CostKey, Formats] = {}
    for site in outer:
        if site.operand.size * site.operand.dtype.itemsize > _LARGEST:
            name = node_name(site.node)
            unknown[name] = f"its weight is above {_LARGEST / 1e9:.0f} GB"
            continue
        key = _key(site, constants, seen)
        keys[site] = key
        specimens.setdefault(key, Specimen(site, model, seen))
        of_key[key] = of_key.get(key, ONLY_FLOATS).joined(own[site])
    return CostPlan(keys, specimens, unknown, of_key)


def _apart(own: Formats, *, floats: bool) -> Formats:
    """The formats with times of their own: where blocks are floats when it runs, only others."""
    if not floats:
        return own
    parts = (own.dense, own.pairs)
    return Formats(*(tuple(f for f in part if f is None or f.integers) for part in parts))


def _seen(sites: Sequence[Site], model: ir.Model, run: Run) -> Seen:
    """Shapes of all that the nodes read and write; contents of what is read and is no float.

    Row numbers, lengths and masks decide how much there is to do, and whether it runs at all.
    """
    read = {
        value
        for site in sites
        for index, value in enumerate(site.node.inputs)
        if value is not None and index != site.index
    }
    written = {value for site in sites for value in site.node.outputs}
    contents = {value.name or "" for value in read if value.dtype not in FLOATS}
    names = {value.name or "" for value in read | written if value.name}
    return look(model, names, run, contents) if names else Seen({}, {})


def _key(site: Site, constants: Constants, seen: Seen) -> CostKey:
    node = site.node
    inputs = []
    for index, value in enumerate(node.inputs):
        if value is None:
            inputs.append("")
        elif index == site.index:
            inputs.append(_described(site.operand.dtype, site.operand.shape, " weight"))
        else:
            known = constants.resolve(value)
            if isinstance(known, Constant):
                inputs.append(_described(known.dtype, known.shape, " constant"))
            else:
                name = value.name or ""
                array = seen.contents.get(name)
                dtype = value.dtype if array is None else ir.DataType.from_numpy(array.dtype)
                inputs.append(_described(dtype, seen.shapes[name], ""))
    operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    attributes = [f"{item.name}={item.value}" for _, item in sorted(node.attributes.items())]
    return CostKey(
        form=site.form.name,
        node=" ".join([operator, *attributes]),
        inputs=tuple(inputs),
        shape=(site.slices, site.m, site.n),
    )


def _described(dtype: ir.DataType | None, shape: Sequence[int], role: str) -> str:
    name = "" if dtype is None else dtype.name.lower()
    return f"{name}{list(shape)}{role}"


def measure_costs(
    plan: CostPlan,
    timer: Timer,
    place: Place,
    advance: Advance,
    table: CostTable | None = None,
    *,
    multiples: bool = False,
    limits: Limits | None = None,
) -> CostTable:
    """Measure what a plan asks for.

    Args:
        plan: from `plan_costs`.
        timer: times models (see `onnx_lowrank.ranks.microbench.session_timer`).
        place: where it times them.
        advance: called with 1 after each key of ``plan.missing(table, place)``.
        table: times that are known already.  Those of another place are used as they are, and
            what they lack is not known: times of two machines do not go together.
        multiples: measure which multiple the ranks should be on, too.
        limits: of one comparison; default: those of `Limits`.

    Returns:
        The table of the model; its place is the known table's, if there is one.
    """
    limits = limits or Limits()
    times = dict(table.times) if table is not None else {}
    failed: dict[CostKey, str] = {}
    for key in plan.missing(table, place):
        try:
            own = plan.formats.get(key, ONLY_FLOATS)
            times[key] = _measured(plan.specimens[key], own, timer, limits, multiples)
        except InputError as error:
            failed[key] = str(error)
        advance(1)
    unknown = dict(plan.unknown)
    for site, key in plan.keys.items():
        if key not in times:
            where = "" if table is None else f" the cost table of {table.place} does not hold it"
            unknown[node_name(site.node)] = failed.get(key, where.strip())
    return CostTable(place if table is None else table.place, times, plan.keys, unknown)


def _measured(
    specimen: Specimen, formats: Formats, timer: Timer, limits: Limits, multiples: bool
) -> Times:
    ranks = measured_ranks(specimen.site.m, specimen.site.n)
    dense, pairs = _timed_formats(formats)
    models = [
        specimen.dense(),
        *(specimen.pair(rank) for rank in ranks),
        *(specimen.quantized(form) for form in dense),
        *(specimen.quantized(form, rank) for form in pairs for rank in ranks),
    ]
    timing = compare(timer([serialized(model) for model in models], specimen.feed()), limits)
    likes = alignment(specimen, timer, limits) if multiples else None
    times = [timing.base_ns * ratio for ratio in timing.ratios]
    count = len(ranks)
    behind = dict(zip(dense, times[count:], strict=False))
    factors = {
        form: tuple(times[start : start + count])
        for form, start in zip(
            pairs, range(count + len(dense), len(times) + 1, count or 1), strict=False
        )
    }
    return Times(
        dense_ns=timing.base_ns,
        ranks=ranks,
        pair_ns=tuple(times[:count]),
        widths=timing.widths[:count],
        rounds=timing.rounds,
        multiple=None if likes is None else likes.multiple,
        formats=tuple(
            FormatTimes(
                form.bits, form.block, behind[form], factors.get(form, ()), form.activations
            )
            for form in dense
        ),
    )


def _timed_formats(formats: Formats) -> tuple[tuple[Format, ...], tuple[Format, ...]]:
    """The formats to time: of dense weights, and which of them of pairs too."""
    pairs = dict.fromkeys(form for form in formats.pairs if form is not None)
    corrected = (form for form in formats.dense if form is not None and form.correction)
    pairs |= dict.fromkeys(form.corrected_by for form in corrected)
    dense = [replace(form, correction=0) for form in formats.dense if form is not None]
    return tuple(dict.fromkeys([*dense, *pairs])), tuple(pairs)


def measured_ranks(m: int, n: int) -> tuple[int, ...]:
    """The ranks at which a pair of ``W[m, n]`` is measured, rising; at least rank 1."""
    wanted = [max(1, int(share * break_even(m, n))) for share in _SHARES]
    return tuple(sorted({rank // _MULTIPLE * _MULTIPLE or rank for rank in wanted}))
