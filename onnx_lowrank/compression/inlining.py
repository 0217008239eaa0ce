"""Inlining: which calls of functions are inlined, so that the weights that they give are found."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.inline import call_of, given_weights, inline
from onnx_lowrank.graph.load import LoadedModel
from onnx_lowrank.maps.find import Refused, find
from onnx_lowrank.maps.forms import all_forms

__all__ = ["with_weights_in_sight"]


def with_weights_in_sight(source: LoadedModel, *, constant_inputs: bool = False) -> LoadedModel:
    """A model whose calls stand as the nodes of their functions where that shows a linear map.

    Args:
        source: the model; it is not changed.
        constant_inputs: whether inputs that have a default value are constants.

    Returns:
        A model of the same name and size; the same one where there is no such call.
    """
    if not source.model.functions:
        return source
    model = _inlined(source.model, None, constant_inputs)
    if model is None:
        return source
    finding = find(model, Constants(model, constant_inputs), all_forms())
    shown = {
        call
        for entry in finding.entries
        if not isinstance(entry, Refused) and (call := call_of(entry.node)) is not None
    }
    model = _inlined(source.model, shown, constant_inputs) if shown else None
    return source if model is None else dataclasses.replace(source, model=model, path=None)


def _inlined(original: ir.Model, wanted: set[str] | None, constant_inputs: bool) -> ir.Model | None:
    """A copy in which calls are inlined, those within them too; None where there is none.

    Args:
        original: the model.
        wanted: the calls, by their first outputs; None for all.
        constant_inputs: whether inputs that have a default value are constants.
    """
    model, some = original.clone(), False
    while True:
        calls = [
            node
            for node in given_weights(model, Constants(model, constant_inputs))
            if wanted is None or (call_of(node) or node.outputs[0].name) in wanted
        ]
        if not calls:
            return model if some else None
        inline(model, calls)
        some = True
