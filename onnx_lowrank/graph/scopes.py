"""Scopes: the modules of a network around a node, as torch's dynamo exporter writes them."""

from __future__ import annotations

import ast

import onnx_ir as ir

__all__ = ["module_of", "scopes_of"]

_SCOPES = "pkg.torch.onnx.name_scopes"


def scopes_of(node: ir.Node) -> tuple[str, ...]:
    """From the outermost module to the innermost, and last what the exporter calls the node."""
    written = node.metadata_props.get(_SCOPES)
    if not written:
        return ()
    try:
        parsed = ast.literal_eval(written)
    except (SyntaxError, ValueError):
        parsed = [written]
    if not isinstance(parsed, list | tuple):
        parsed = [parsed]
    return tuple(str(scope) for scope in parsed if scope)


def module_of(node: ir.Node) -> str | None:
    """The innermost module around a node, such as "blocks.0.mlp"; None where it is not written."""
    scopes = scopes_of(node)
    if len(scopes) < 2:
        return None
    outer, last = scopes[-2:]
    return last if last.startswith(f"{outer}.") else outer
