"""LSTM, GRU and RNN: the weights of the input, off by default.

``LSTM(X, W, R, …)  ->  LSTM(X @ A, W', R, …)``        with ``W[d, g·H, I]``, ``W'[d, g·H, r]``

All gates of both directions read the same X, so they share one projection: W is read as
``[I, d·g·H]``.  The recurrent weights R cannot be factored this way: their input is the state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from onnx_lowrank.constants import Constants, Unusable
from onnx_lowrank.forms.base import Dims, Form, Refusal, Site

if TYPE_CHECKING:
    from onnx_lowrank.emit import Emitter, Pair

__all__ = ["Gru", "Lstm", "Rnn"]


class _Recurrent(Form):
    """A recurrent cell with constant input weights."""

    default = False

    def match(self, node: ir.Node, constants: Constants) -> Site | Refusal | None:
        """The cell's input weights."""
        weight = constants.resolve(node.inputs[1])
        if weight is None:
            return None
        if isinstance(weight, Unusable):
            return Refusal.of(weight)
        directions, gates, inputs = weight.shape
        matrix = weight.reshape(1, directions * gates, inputs).transpose(0, 2, 1)
        return self.site(node, 1, weight, matrix)

    def rewrite(self, site: Site, pair: Pair, emit: Emitter) -> None:
        """A projection before the cell."""
        directions, gates, inputs = site.operand.shape
        x = site.node.inputs[0]
        assert x is not None
        shape = None if x.shape is None else ir.Shape([*list(x.shape)[:-1], pair.rank])
        hidden = emit.node(
            "MatMul", [x, emit.factor(pair.first.reshape(inputs, pair.rank))], shape=shape
        )
        second = pair.second.transpose(0, 2, 1).reshape(directions, gates, pair.rank)
        emit.replace(0, hidden)
        emit.replace(1, emit.factor(second))

    def rows(self, site: Site, dims: Callable[[ir.Value], Dims | None]) -> int | None:
        """Steps times batch."""
        x = site.node.inputs[0]
        shape = None if x is None else dims(x)
        if shape is None or None in shape:
            return None
        return math.prod(d or 0 for d in shape[:-1])


class Lstm(_Recurrent):
    """The input weights of an LSTM."""

    name = ops = "lstm"
    targets: ClassVar[frozenset[tuple[str, str]]] = frozenset({("", "LSTM")})


class Gru(_Recurrent):
    """The input weights of a GRU."""

    name = ops = "gru"
    targets: ClassVar[frozenset[tuple[str, str]]] = frozenset({("", "GRU")})


class Rnn(_Recurrent):
    """The input weights of a plain RNN."""

    name = ops = "rnn"
    targets: ClassVar[frozenset[tuple[str, str]]] = frozenset({("", "RNN")})
