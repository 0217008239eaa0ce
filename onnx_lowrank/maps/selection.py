"""Selection: which linear maps the user names, by globs on node names and torch scopes."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from onnx_lowrank.errors import InputError, named
from onnx_lowrank.graph.scopes import scopes_of
from onnx_lowrank.graph.walk import node_name

__all__ = ["Selection"]


@dataclass(frozen=True)
class Selection:
    """Which nodes may be factored: globs on a node's name or its torch scopes.

    Attributes:
        include: nothing else is factored, where there are any.
        exclude: these are not.
        left: name of a node that no glob leaves out -> why it is left out all the same.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)

    def named(self, nodes: Iterable[ir.Node]) -> list[ir.Node]:
        """The nodes that a glob matches."""
        globs = (*self.include, *self.exclude)
        return [node for node in nodes if _match(globs, _labels(node)) is not None]

    def carried(self, merged: Mapping[ir.Node, ir.Node]) -> Selection:
        """The selection for a model in which nodes were merged into others.

        Args:
            merged: node -> what it was merged into, which stays where either is to stay.
        """
        left = {
            node_name(node): f"{node_name(old)!r} is merged into it: {reason}"
            for old, node in merged.items()
            if (reason := self.reason(old)) is not None and self.reason(node) is None
        }
        return replace(self, left={**self.left, **left})

    def check(self, nodes: Iterable[ir.Node]) -> None:
        """Raise InputError for a glob that matches none of the linear maps."""
        labels = {label: None for node in nodes for label in _labels(node)}
        for option, globs in (("include", self.include), ("exclude", self.exclude)):
            for glob in globs:
                if any(fnmatch.fnmatchcase(label, glob) for label in labels):
                    continue
                near = difflib.get_close_matches(glob, labels, n=3, cutoff=0.3)
                near = near or list(labels)[:3]
                names = ", ".join(repr(label) for label in near) or "none in this model"
                raise InputError(
                    f"{named(option, glob)}: expected the name or scope of a linear map, "
                    f"matched none; near names: {names}"
                )

    def excluded(self, node: ir.Node) -> str | None:
        """Why the user left the node out; None where no glob of ``exclude`` matches it."""
        glob = _match(self.exclude, _labels(node))
        return None if glob is None else f"left out by {named('exclude', glob)}"

    def reason(self, node: ir.Node) -> str | None:
        """Why the node is left out; None if it is chosen."""
        labels = _labels(node)
        if self.include and not _match(self.include, labels):
            return f"no glob of {named('include')} matches it"
        return self.excluded(node) or self.left.get(node_name(node))


def _match(globs: Sequence[str], labels: Sequence[str]) -> str | None:
    return next((g for g in globs if any(fnmatch.fnmatchcase(label, g) for label in labels)), None)


def _labels(node: ir.Node) -> list[str]:
    """The node's name, and the module scopes that torch's dynamo exporter writes."""
    return [node_name(node), *scopes_of(node)]
