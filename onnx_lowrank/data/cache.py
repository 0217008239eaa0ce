"""Caches: what decoders hand on from one step to the next, as exporters name it.

A decoder that is run step by step reads what earlier tokens left (``past_key_values.0.key``) and
gives it with the new tokens behind (``present.0.key``).  There are two such outputs a layer, and
one of logits.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

import onnx_ir as ir

from onnx_lowrank.numerics.arrays import Array, Feed

__all__ = ["PAST", "cache_outputs", "new_tokens", "output_shares"]

PAST = re.compile(r"^past")
"""How names of inputs begin that hold what earlier tokens left."""
_PRESENT = re.compile(r"^present")


def cache_outputs(model: ir.Model) -> frozenset[str]:
    """The outputs that hold what the tokens left, for the next step; none without such inputs."""
    graph = model.graph
    if not any(PAST.search(value.name or "") for value in graph.inputs):
        return frozenset()
    return frozenset(v.name for v in graph.outputs if v.name and _PRESENT.search(v.name))


def new_tokens(feed: Feed, mask: Array) -> int | None:
    """How many of the last columns of a mask are those of a step's tokens; None where all are.

    The mask of a step covers the cache and the new tokens: ``[batch, past + tokens]``.

    Args:
        feed: a sample; a cache has the tokens as its last axis but one.
        mask: one of its inputs, shape [batch, tokens] or longer.
    """
    past = {own.shape[-2] for name, own in feed.items() if PAST.search(name) and own.ndim > 2}
    if mask.ndim != 2 or len(past) != 1:
        return None
    count = int(mask.shape[1]) - past.pop()
    if not 0 < count < mask.shape[1]:
        return None
    lead = len(mask), count
    others = (own for name, own in feed.items() if own is not mask and not PAST.search(name))
    return count if any(own.shape[:2] == lead for own in others) else None


def output_shares(names: Iterable[str], cache: Collection[str]) -> dict[str, float]:
    """What the error of each output counts, 1 together: all of a cache count as one output.

    Args:
        names: of outputs.
        cache: those that are a cache, and others.
    """
    names = list(dict.fromkeys(names))
    held = sum(name in cache for name in names)
    parts = len(names) - held + bool(held)
    return {name: 1.0 / parts / (held if name in cache else 1) for name in names}
