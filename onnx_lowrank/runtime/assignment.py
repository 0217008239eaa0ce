"""Which node a session gave to which execution provider, read back from the session."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from onnx_lowrank.phrases import counted, listed

if TYPE_CHECKING:
    import onnxruntime as ort


__all__ = [
    "PROVIDER_SUFFIX",
    "RECORD",
    "assignment",
    "assignment_text",
    "nodes_elsewhere",
]

RECORD = "session.record_ep_graph_assignment_info"
"""The session's option without which it does not remember."""

Nodes = Mapping[str, tuple[str, ...]]
_NAMED = 6
PROVIDER_SUFFIX = "ExecutionProvider"


def assignment(session: ort.InferenceSession) -> dict[str, tuple[str, ...]] | None:
    """Provider -> the nodes that it took, after ONNX Runtime's own fusions.

    None where this ONNX Runtime does not tell.  A node is called by its name and operator.
    """
    info = getattr(session, "get_provider_graph_assignment_info", None)
    if info is None:
        return None
    found: dict[str, list[str]] = {}
    for group in info():
        names = (f"{node.name} ({node.op_type})".strip() for node in group.get_nodes())
        found.setdefault(str(group.ep_name), []).extend(names)
    return {provider: tuple(names) for provider, names in found.items()}


def nodes_elsewhere(nodes: Nodes, provider: str) -> list[str]:
    """Names of the nodes that another provider than the given one (its full name) took."""
    return [name for other, names in nodes.items() if other != provider for name in names]


def assignment_text(nodes: Nodes, provider: str, title: str) -> str:
    """Such as "14 of 14 nodes on QNN", or with the names of the others.

    Args:
        nodes: from `assignment`.
        provider: full name of the provider that was asked for.
        title: how to call it.
    """
    own = len(nodes.get(provider, ()))
    others = nodes_elsewhere(nodes, provider)
    total = own + len(others)
    text = f"{own} of {counted(total, 'node')} on {title}"
    return f"{text}; left to the CPU: {_with_kinds(others)}" if others else text


def _with_kinds(names: Sequence[str]) -> str:
    shown = listed(names, _NAMED)
    if len(names) <= _NAMED:
        return shown
    rest = Counter(name.rpartition("(")[2].rstrip(")") for name in names[_NAMED:])
    kinds = ", ".join(f"{count} {kind}" for kind, count in rest.most_common())
    return f"{shown} ({kinds})"
