"""Find: every constant linear map of a model, and which of them share a constant."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import onnx_ir as ir

from onnx_lowrank.errors import named
from onnx_lowrank.graph.constant import FLOATS, Constant
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.references import unresolved
from onnx_lowrank.graph.walk import all_nodes, node_name, operator
from onnx_lowrank.maps.chains import chained
from onnx_lowrank.maps.forms import Form, Refusal, Site
from onnx_lowrank.maps.forms.inner import Inner, InnerForm, plain_map
from onnx_lowrank.maps.swapped import swapped
from onnx_lowrank.numerics.ranks import break_even, largest_rank

__all__ = ["Factorable", "Finding", "Group", "Member", "Refused", "find"]


@dataclass(frozen=True, eq=False)
class Refused:
    """A constant linear map that is left as it is whatever its numbers say.

    Attributes:
        node: the node.
        form: how the map stands there.
        refusal: why.
        site: how it could be factored, or at least stored in integers; None where neither can be.
        off: whether its form was not chosen.
        paired: "half" of a pair that is there already, which counts in no share; "head" of one
            that counts with its second map; else "".
    """

    node: ir.Node
    form: Form
    refusal: Refusal
    site: Site | None = None
    off: bool = False
    paired: Literal["", "half", "head"] = ""


@dataclass(frozen=True, eq=False)
class Factorable:
    """The ways in which one node can be factored, at least one."""

    sites: tuple[Site, ...]

    @property
    def node(self) -> ir.Node:
        """The node."""
        return self.sites[0].node


@dataclass(frozen=True, eq=False)
class Member:
    """A site of a group; ``transposed`` where it reads the group's matrix the other way."""

    site: Site
    transposed: bool


@dataclass(frozen=True, eq=False)
class Group:
    """The sites that read one constant as one matrix, which is factored once.

    Attributes:
        members: the sites.
        matrix: the constant as the first of them reads it, ``W[e, m, n]``.
        others: names of whatever else reads the constant and so keeps it in the model.
        bias: the constant of n elements that is added to the products of its one site, and to
            nothing else; None if there is none.
        heads: the first map ``A[l, m]`` of the pair whose second one this group is: a pair of a
            lower rank r takes the place of both, ``r·(l + n)`` elements for ``m·(l + n)``.
            Where a width is in front, all maps that make it.
        inner: the width between these maps, where something that is no map is between them; None
            where nothing is.
        maps: with heads each of the maps by itself, which is stored by itself; the last one last.
    """

    members: tuple[Member, ...]
    matrix: Constant
    others: tuple[str, ...]
    bias: Constant | None = None
    heads: tuple[Site, ...] = ()
    inner: Inner | None = None
    maps: tuple[Group, ...] = ()

    @property
    def alone(self) -> tuple[Group, ...]:
        """The maps of a width or of a pair that is there already, else the group itself."""
        return self.maps or (self,)

    @property
    def selects(self) -> bool:
        """Whether a rank is how many elements of the width are kept."""
        return self.inner is not None and self.inner.selects

    @property
    def shape(self) -> tuple[int, int, int]:
        """(e, m, n) of the matrix."""
        slices, m, n = self.matrix.shape
        return slices, m, n

    @property
    def mapped(self) -> tuple[int, int]:
        """Inputs and outputs of what a pair takes the place of."""
        slices, m, n = self.shape
        lead = sum(head.m * (head.n // (slices * m)) for head in self.heads)
        return (lead if self.heads else m), n

    @property
    def elements(self) -> int:
        """Of what stands there now."""
        slices, m, n = self.shape
        return self.pair_elements(m) if self.heads else slices * m * n

    def pair_elements(self, rank: int, *, leads: bool = True) -> int:
        """Of a pair; without ``leads`` its first factor counts with another group."""
        inputs, outputs = self.mapped
        return self.shape[0] * rank * ((inputs if leads else 0) + outputs)

    @property
    def break_even(self) -> float:
        """The rank at which a pair is as large as what stands there now."""
        _, m, n = self.shape
        return float(m) if self.heads else break_even(m, n)

    def largest(self, share: float) -> int:
        """The largest rank whose pair has at most a share of the elements that stand there now."""
        _, m, n = self.shape
        if not self.heads:
            return largest_rank(m, n, share)
        most = m - 1 if self.selects else min(n, m - 1)
        return max(0, min(most, math.floor(share * m + 1e-9)))


@dataclass(frozen=True, eq=False)
class Finding:
    """All linear maps of a model.

    Attributes:
        entries: in the order of its nodes.
        groups: those of them that may be factored.
        off: of those that are not factored, because their form was not chosen or is none that can
            be, and whose weights may yet be stored in integers.
        wide: name of a map -> why the width in front of it stays as it is, of forms that were
            chosen.
    """

    entries: tuple[Factorable | Refused, ...]
    groups: tuple[Group, ...]
    off: tuple[Group, ...] = ()
    wide: Mapping[str, str] = field(default_factory=dict)


def find(
    model: ir.Model,
    constants: Constants,
    forms: Sequence[Form],
    chosen: Collection[Form] | None = None,
) -> Finding:
    """Look at every node of the main graph, the subgraphs and the functions.

    Args:
        model: the model.
        constants: resolver of its constants.
        forms: the forms to look for.
        chosen: those whose sites may be factored; default: all that stand for one map.
    """
    if chosen is None:
        chosen = [form for form in forms if not isinstance(form, InnerForm)]
    by_target: dict[tuple[str, str], list[Form]] = {}
    for form in forms:
        for target in form.targets:
            by_target.setdefault(target, []).append(form)
    names = {form.name for form in chosen}
    entries: list[Factorable | Refused] = []
    wide: dict[str, str] = {}
    for node in all_nodes(model):
        possible = by_target.get(operator(node), ())
        if open_ := unresolved(node):
            refusal = _depends_on_call(node, open_, constants)
            matches: list[tuple[Form, Site | Refusal]] = (
                [] if refusal is None else [(form, refusal) for form in possible]
            )
        else:
            matches = [
                (form, match)
                for form in possible
                if (match := form.match(node, constants)) is not None
            ]
        for form, match in matches:
            if isinstance(form, InnerForm) and isinstance(match, Refusal) and form.name in names:
                wide[node_name(node)] = match.reason
        # It may be a map by itself all the same.
        matches = [
            (form, match)
            for form, match in matches
            if isinstance(match, Site) or not isinstance(form, InnerForm)
        ]
        if matches:
            entries.append(_entry(node, matches, chosen))
    entries, inners = _with_inner(entries, constants)
    entries, heads = _without_chains(entries, constants, inners)
    sites = [site for e in entries if isinstance(e, Factorable) for site in e.sites]
    refused = [e for e in entries if isinstance(e, Refused) and not e.paired]
    off = [e.site for e in refused if e.site is not None and (e.off or e.refusal.site is e.site)]
    off = [site for site in off if not site.form.indices]  # for tables see `maps.tables`
    groups = tuple(_groups(sites, constants, heads, inners))
    return Finding(tuple(entries), groups, tuple(_groups(off, constants, {}, {})), wide)


def _with_inner(
    entries: Sequence[Factorable | Refused], constants: Constants
) -> tuple[list[Factorable | Refused], dict[ir.Node, Inner]]:
    """Maps with a width between them are one: the last has no other way, the first go with it.

    No map is in two of them.

    Returns:
        The entries, and by last node what is between it and the first maps.
    """
    known = {
        entry.node: entry
        for entry in entries
        if isinstance(entry, Factorable) or (entry.off and entry.site is not None)
    }
    inners: dict[ir.Node, Inner] = {}
    firsts: dict[ir.Node, ir.Node] = {}
    for node, entry in known.items():
        for site in entry.sites if isinstance(entry, Factorable) else ():
            if not isinstance(site.form, InnerForm) or node in firsts:
                continue
            width = site.form.width(site, constants)
            own = [first.node for first in width.firsts]
            if all(n in known and n not in inners and n not in firsts for n in own):
                inners[node] = width
                firsts |= dict.fromkeys(own, node)
    found: list[Factorable | Refused] = []
    for entry in entries:
        sites = entry.sites if isinstance(entry, Factorable) else ()
        narrowable = tuple(site for site in sites if isinstance(site.form, InnerForm))
        if entry.node in inners:
            found.append(Factorable(narrowable))
        elif entry.node in firsts:
            why = f"makes the width in front of {node_name(firsts[entry.node])!r}, counts with it"
            found.append(_refused(entry, why, "head"))
        elif not narrowable:
            found.append(entry)
        elif len(narrowable) < len(sites):
            found.append(Factorable(tuple(site for site in sites if site not in narrowable)))
        else:
            why = "the map that makes the width in front of it has another such width"
            found.append(_refused(entry, why))
    return found, inners


def _without_chains(
    entries: Sequence[Factorable | Refused],
    constants: Constants,
    inners: Mapping[ir.Node, Inner],
) -> tuple[list[Factorable | Refused], Mapping[ir.Node, Site]]:
    """Maps that are half of a pair already are refused, and those whose adapter is fed.

    Those with a width in front are none of a pair without one.

    Returns:
        The entries, and of pairs that can have a lower rank second node -> first map.
    """
    sites: list[Site] = []
    apart = {*inners, *(first.node for inner in inners.values() for first in inner.firsts)}
    for entry in entries:
        if isinstance(entry, Factorable):
            sites += () if entry.node in apart else entry.sites
        elif entry.site not in (None, entry.refusal.site) and entry.node not in apart:
            assert entry.site is not None
            sites.append(entry.site)
    chains, fed = chained(sites, constants), swapped(sites, constants)
    usable = {entry.node for entry in entries if isinstance(entry, Factorable)}
    heads = {
        second: first
        for second, first in chains.heads.items()
        if {second, first.node} <= usable and not {second, first.node} & fed.keys()
    }
    with_second = {first.node: second for second, first in heads.items()}
    kept: list[Factorable | Refused] = []
    for entry in entries:
        if isinstance(entry, Refused):
            kept.append(entry)
        elif entry.node in fed:
            kept.append(_refused(entry, fed[entry.node]))
        elif entry.node in chains.left:
            kept.append(_refused(entry, chains.left[entry.node], "half"))
        elif entry.node in with_second:
            second = node_name(with_second[entry.node])
            why = f"is the first map of a pair with {second!r}, with which it counts"
            kept.append(_refused(entry, why, "head"))
        else:
            kept.append(entry)
    return kept, heads


def _refused(
    entry: Factorable | Refused, reason: str, paired: Literal["", "half", "head"] = ""
) -> Refused:
    """A map that is left although it could be factored."""
    site = entry.sites[0] if isinstance(entry, Factorable) else entry.site
    assert site is not None
    constant = site.operand
    refusal = Refusal.because(constant, reason)
    return Refused(entry.node, site.form, refusal, site, paired=paired)


def _entry(
    node: ir.Node, matches: Sequence[tuple[Form, Site | Refusal]], chosen: Collection[Form]
) -> Factorable | Refused:
    names = {form.name for form in chosen}
    sites = [match for _, match in matches if isinstance(match, Site)]
    usable = tuple(site for site in sites if site.form.name in names)
    if usable:
        return Factorable(usable)
    if sites:
        site = next((own for own in sites if not isinstance(own.form, InnerForm)), sites[0])
        constant = site.operand
        ops = site.form.ops
        refusal = Refusal.because(constant, f"off; {named('ops', ops)} turns it on")
        return Refused(node, site.form, refusal, site, off=True)
    form, refused = matches[0]
    assert isinstance(refused, Refusal)
    return Refused(node, form, refused, refused.site, off=form.name not in names)


def _depends_on_call(node: ir.Node, names: Sequence[str], constants: Constants) -> Refusal | None:
    """Why a node of a function is left whose attributes only a call knows; None: no constant."""
    for value in node.inputs:
        found = constants.resolve(value)
        if isinstance(found, Constant) and len(found.shape) > 1:
            return Refusal.because(
                found,
                f"its {', '.join(names)} depends on the call of the function around it",
            )
    return None


def _groups(
    sites: Sequence[Site],
    constants: Constants,
    heads: Mapping[ir.Node, Site],
    inners: Mapping[ir.Node, Inner],
) -> Iterator[Group]:
    """Sites by constant and matrix; a transposed reading counts as the same matrix."""
    groups: dict[Hashable, list[Member]] = {}
    for site in sites:
        root = site.matrix.root
        straight: Hashable = (root, site.matrix.layout.key)
        turned: Hashable = (root, site.matrix.transpose(0, 2, 1).layout.key)
        if straight not in groups and turned in groups:
            groups[turned].append(Member(site, True))
        else:
            groups.setdefault(straight, []).append(Member(site, False))
    for members in groups.values():
        own = {(id(member.site.node), member.site.index) for member in members}
        root = members[0].site.matrix.root
        others = dict.fromkeys(
            "the graph's outputs" if node is None else node_name(node)
            for node, index in constants.readers(root)
            if node is None or (id(node), index) not in own
        )
        inner, head = inners.get(members[0].site.node), heads.get(members[0].site.node)
        firsts = inner.firsts if inner is not None else () if head is None else (head,)
        yield Group(
            tuple(members),
            members[0].site.matrix,
            tuple(others),
            _bias(members, constants),
            firsts,
            inner,
            _maps(firsts, members[0].site.node, constants) if firsts else (),
        )


def _maps(firsts: Sequence[Site], last: ir.Node, constants: Constants) -> tuple[Group, ...]:
    """The maps around a width, each as a plain product by itself; each is the only reader."""
    found = [plain_map(node, constants) for node in (*(site.node for site in firsts), last)]
    sites = [site for site in found if site is not None]
    assert len(sites) == len(found)  # no others have a width between them
    alone = ([Member(site, False)] for site in sites)
    return tuple(Group(tuple(own), own[0].site.matrix, (), _bias(own, constants)) for own in alone)


def _bias(members: Sequence[Member], constants: Constants) -> Constant | None:
    site = members[0].site
    if len(members) > 1 or members[0].transposed or site.slices > 1:
        return None
    found = site.form.bias(site, constants)
    if found is None or found.dtype not in FLOATS or found.tensor.dtype not in FLOATS:
        return None
    root = found.root
    readers = [node for node, _ in constants.readers(root)]
    producer = root.producer()
    owner = root.graph if producer is None else producer.graph
    alone = len(readers) == 1 and readers[0] is not None and len(list(root.uses())) == 1
    # In a function or a body of a loop it may be added more than once.
    return found if alone and owner is site.node.graph is constants.model.graph else None
