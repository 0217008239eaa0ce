"""LSTM, GRU and RNN: the weights of the input, off by default.

``LSTM(X, W, R, …)  ->  LSTM(X @ A, W', R, …)``        with ``W[d, g·H, I]``, ``W'[d, g·H, r]``

All gates of both directions read the same X, so they share one projection: W is read as
``[I, d·g·H]``.  The recurrent weights R cannot be factored this way: their input is the state.
"""

from __future__ import annotations

from typing import ClassVar

from onnx_lowrank.graph.constant import Constant
from onnx_lowrank.maps.emit import Factor, Pair
from onnx_lowrank.maps.forms.base import Site
from onnx_lowrank.maps.forms.projected import Projected

__all__ = ["Gru", "Lstm", "Rnn"]


class _Recurrent(Projected):
    """A recurrent cell with constant input weights."""

    default = False

    def matrix(self, weight: Constant) -> Constant:
        """``[I, d·g·H]``."""
        directions, gates, inputs = weight.shape
        return weight.reshape(1, directions * gates, inputs).transpose(0, 2, 1)

    def second(self, site: Site, pair: Pair) -> Factor:
        """``W'[d, g·H, r]``."""
        directions, gates, _ = site.operand.shape
        return pair.second.transpose(0, 2, 1).reshape(directions, gates, pair.rank)


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
