"""A Llama decoder in torch, without or with a cache, and its export to ONNX.

It is written out here, so that no other package decides what the graph looks like.  With a cache
inputs and outputs have the names that optimum gives: ``input_ids`` (batch, length),
``attention_mask`` (batch, total), and for every layer ``past_key_values.0.key`` and ``.value``
(batch, shared, past, head); ``logits``, and ``present.0.key`` and ``.value``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = ["Decoder", "Sizes", "export", "step"]

EPSILON, BASE = 1e-5, 100_000.0
OPSET = 17


@dataclass(frozen=True)
class Sizes:
    """Of a decoder; the defaults are SmolLM2-135M's."""

    layers: int = 30
    width: int = 576
    heads: int = 9
    shared: int = 3  # heads of keys and values
    inner: int = 1536
    words: int = 49152

    @property
    def head(self) -> int:
        """The width of a head."""
        return self.width // self.heads


class Norm(nn.Module):
    """Division by the root of the mean square."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to the same shape."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON) * self.weight


class Linear(nn.Module):
    """A product with a matrix (inputs, outputs), without a transposition in the graph."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs)."""
        return x @ self.weight


class Layer(nn.Module):
    """A Llama layer: attention and gated MLP, each behind a normalisation."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self._sizes = sizes.width, sizes.heads, sizes.shared, sizes.head
        width, shared = sizes.width, sizes.shared * sizes.head
        self.norm_attention = Norm(width)
        self.query = Linear(width, width)
        self.key = Linear(width, shared)
        self.value = Linear(width, shared)
        self.projection = Linear(width, width)
        self.norm_mlp = Norm(width)
        self.gate = Linear(width, sizes.inner)
        self.up = Linear(width, sizes.inner)
        self.down = Linear(sizes.inner, width)

    def forward(
        self, x: Tensor, cosine: Tensor, sine: Tensor, bias: Tensor, cache: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Map tokens (batch, length, width); cosine and sine (length, head) turn by position.

        The cache, keys and values (batch, shared, past, head) or nothing, comes back with those
        of these tokens behind.
        """
        batch, length, _ = x.shape
        width, heads, shared, size = self._sizes

        def split(y: Tensor, heads: int) -> Tensor:  # (batch, heads, length, size)
            return y.reshape(batch, length, heads, size).transpose(1, 2)

        def turned(y: Tensor) -> Tensor:
            halves = torch.cat((-y[..., size // 2 :], y[..., : size // 2]), dim=-1)
            return y * cosine + halves * sine

        def spread(y: Tensor) -> Tensor:  # each head of keys and values serves several queries
            wide = y[:, :, None].expand(batch, shared, heads // shared, total, size)
            return wide.reshape(batch, heads, total, size)

        normed = self.norm_attention(x)
        query = turned(split(self.query(normed), heads))
        present = [turned(split(self.key(normed), shared)), split(self.value(normed), shared)]
        if cache:
            present = [torch.cat(both, dim=2) for both in zip(cache, present, strict=True)]
        total = present[0].shape[2] if cache else length
        key, value = map(spread, present)
        scores = query @ key.transpose(-2, -1) * size**-0.5 + bias
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, length, width)
        x = x + self.projection(mixed)
        normed = self.norm_mlp(x)
        added: Tensor = self.down(nn.functional.silu(self.gate(normed)) * self.up(normed))
        return x + added, present


class Decoder(nn.Module):
    """The Llama decoder, whose last matrix is its table of embeddings."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.words = nn.Embedding(sizes.words, sizes.width)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.norm = Norm(sizes.width)
        powers = torch.arange(0, sizes.head, 2, dtype=torch.float64) / sizes.head
        self.register_buffer("rates", (BASE**-powers).float(), persistent=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *past: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        """Map token ids (batch, length) of int64 to logits (batch, length, words).

        With a mask (batch, past + length), whose zeros are padding, and the keys and values of
        each layer (batch, shared, past, head) of the tokens before, those behind the step follow.
        """
        places = torch.arange(input_ids.shape[1])
        keys = places
        if attention_mask is not None:
            keys = torch.arange(attention_mask.shape[1])
            places = places + past[0].shape[2]
        angles = places[:, None].float() * self.rates
        angles = torch.cat((angles, angles), dim=-1)
        bias = torch.where(keys[None, :] > places[:, None], -1e9, 0.0)
        if attention_mask is not None:
            bias = bias + torch.where(attention_mask[:, None, None, :] == 0, -1e9, 0.0)
        x, present = self.words(input_ids), list[Tensor]()
        for index, layer in enumerate(self.layers):
            cache = list(past[2 * index : 2 * index + 2])
            x, behind = layer(x, angles.cos(), angles.sin(), bias, cache)
            present += behind
        logits: Tensor = self.norm(x) @ self.words.weight.T
        return logits if attention_mask is None else (logits, *present)


def step(
    ids: NDArray[np.int64], past: Mapping[str, NDArray[np.float32]] | None, sizes: Sizes
) -> dict[str, NDArray[np.int64] | NDArray[np.float32]]:
    """The inputs of one step of a decoder with a cache.

    Args:
        ids: the new tokens (batch, length).
        past: the outputs of the step before; None for the first one.
        sizes: of the decoder.
    """
    feed: dict[str, NDArray[np.int64] | NDArray[np.float32]] = {"input_ids": ids}
    empty = np.zeros((len(ids), sizes.shared, 0, sizes.head), np.float32)
    for name in _parts(sizes):
        own = empty if past is None else past[f"present.{name}"]
        feed[f"past_key_values.{name}"] = own
    total = own.shape[2] + ids.shape[1]
    feed["attention_mask"] = np.ones((len(ids), total), np.int64)
    return feed


def export(decoder: Decoder, path: Path, cache: bool) -> None:
    """Write a decoder as ONNX, with a cache or without one."""
    ids = torch.arange(32).reshape(2, 16) % decoder.sizes.words
    given: tuple[Tensor, ...] = (ids,)
    inputs, outputs = ["input_ids"], ["logits"]
    axes = {name: {0: "batch", 1: "length"} for name in ("input_ids", "logits")}
    if cache:
        parts, sizes = _parts(decoder.sizes), decoder.sizes
        past = torch.zeros(2, sizes.shared, 4, sizes.head)
        given = (ids, torch.ones(2, 20, dtype=torch.int64), *[past] * len(parts))
        axes["attention_mask"] = {0: "batch", 1: "total"}
        for end, names, size in (
            ("past_key_values", inputs, "past"),
            ("present", outputs, "total"),
        ):
            if end == "past_key_values":
                names.append("attention_mask")
            names += [f"{end}.{part}" for part in parts]
            axes |= {f"{end}.{part}": {0: "batch", 2: size} for part in parts}
    torch.onnx.export(
        decoder,
        given,
        path,
        input_names=inputs,
        output_names=outputs,
        opset_version=OPSET,
        dynamic_axes=axes,
        do_constant_folding=False,  # else the table is stored twice
        dynamo=False,
    )


def _parts(sizes: Sizes) -> list[str]:
    return [f"{index}.{part}" for index in range(sizes.layers) for part in ("key", "value")]
