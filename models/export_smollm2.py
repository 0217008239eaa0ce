"""Export SmolLM2-135M-Instruct from its GGUF file: python models/export_smollm2.py NAME --out DIR.

The decoder is written out below, so that no other package decides what the graph looks like.
Input ``input_ids`` (batch, length); output ``logits`` (batch, length, 49152), of the token that
follows each one.  The weights are those of the package, 4 bits each, as floats: the embedding
table is stored once and is the matrix of the last layer too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from gguf import GGUFReader, dequantize
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from windows import windows

__all__ = ["Decoder", "load", "main", "tokenizer_of"]

LAYERS, WIDTH, HEADS, SHARED, INNER = 30, 576, 9, 3, 1536  # SHARED: heads of keys and values
VOCABULARY, EPSILON, BASE = 49152, 1e-5, 100_000.0
SIZE = WIDTH // HEADS  # of a head
OPSET = 17
WINDOWS = 512  # of the data that is written beside the model


class Norm(nn.Module):
    """Division by the root of the mean square."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., WIDTH) to the same shape."""
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

    def __init__(self) -> None:
        super().__init__()
        self.norm_attention = Norm()
        self.query = Linear(WIDTH, HEADS * SIZE)
        self.key = Linear(WIDTH, SHARED * SIZE)
        self.value = Linear(WIDTH, SHARED * SIZE)
        self.projection = Linear(HEADS * SIZE, WIDTH)
        self.norm_mlp = Norm()
        self.gate = Linear(WIDTH, INNER)
        self.up = Linear(WIDTH, INNER)
        self.down = Linear(INNER, WIDTH)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor, bias: Tensor) -> Tensor:
        """Map tokens (batch, length, WIDTH); cosine and sine (length, SIZE) turn by position."""
        batch, length, _ = x.shape

        def split(y: Tensor, heads: int) -> Tensor:  # (batch, heads, length, SIZE)
            return y.reshape(batch, length, heads, SIZE).transpose(1, 2)

        def turned(y: Tensor) -> Tensor:
            halves = torch.cat((-y[..., SIZE // 2 :], y[..., : SIZE // 2]), dim=-1)
            return y * cosine + halves * sine

        def spread(y: Tensor) -> Tensor:  # each head of keys and values serves several queries
            wide = y[:, :, None].expand(batch, SHARED, HEADS // SHARED, length, SIZE)
            return wide.reshape(batch, HEADS, length, SIZE)

        normed = self.norm_attention(x)
        query = turned(split(self.query(normed), HEADS))
        key = spread(turned(split(self.key(normed), SHARED)))
        value = spread(split(self.value(normed), SHARED))
        scores = query @ key.transpose(-2, -1) * SIZE**-0.5 + bias
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, length, WIDTH)
        x = x + self.projection(mixed)
        normed = self.norm_mlp(x)
        added: Tensor = self.down(nn.functional.silu(self.gate(normed)) * self.up(normed))
        return x + added


class Decoder(nn.Module):
    """The Llama decoder, whose last matrix is its table of embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = Norm()
        powers = torch.arange(0, SIZE, 2, dtype=torch.float64) / SIZE
        self.register_buffer("rates", (BASE**-powers).float(), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Map token ids (batch, length) of int64 to logits (batch, length, VOCABULARY)."""
        places = torch.arange(input_ids.shape[1])
        angles = places[:, None].float() * self.rates
        angles = torch.cat((angles, angles), dim=-1)
        bias = torch.where(places[None, :] > places[:, None], -1e9, 0.0)
        x = self.words(input_ids)
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin(), bias)
        logits: Tensor = self.norm(x) @ self.words.weight.T
        return logits


def load(reader: GGUFReader) -> Decoder:
    """The decoder with the weights of a GGUF file."""
    stored = {tensor.name: tensor for tensor in reader.tensors}

    def floats(name: str) -> Tensor:
        tensor = stored[f"{name}.weight"]
        return torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), np.float32))

    def halved(rows: Tensor, heads: int) -> Tensor:
        # The file has the two numbers that are turned together side by side; here they are in
        # the two halves of a head.
        return rows.reshape(heads, SIZE // 2, 2, -1).transpose(1, 2).reshape(rows.shape)

    names = {"query": "attn_q", "key": "attn_k", "value": "attn_v", "projection": "attn_output"}
    names |= {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
    state = {"words.weight": floats("token_embd"), "norm.weight": floats("output_norm")}
    for index in range(LAYERS):
        ours, theirs = f"layers.{index}", f"blk.{index}"
        state[f"{ours}.norm_attention.weight"] = floats(f"{theirs}.attn_norm")
        state[f"{ours}.norm_mlp.weight"] = floats(f"{theirs}.ffn_norm")
        for own, name in names.items():
            rows = floats(f"{theirs}.{name}")
            heads = {"query": HEADS, "key": SHARED}.get(own)
            state[f"{ours}.{own}.weight"] = (rows if heads is None else halved(rows, heads)).T
    decoder = Decoder()
    decoder.eval()
    decoder.load_state_dict(state)
    return decoder


def tokenizer_of(reader: GGUFReader) -> Tokenizer:
    """The byte-level tokenizer of a GGUF file; each digit is a token."""
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = reader.fields["tokenizer.ggml.merges"].contents()
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    pairs = [tuple(merge.split(" ")) for merge in merges]
    model = models.BPE({token: place for place, token in enumerate(tokens)}, pairs)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([t for t, kind in zip(tokens, kinds, strict=True) if kind == 3])
    return tokenizer


def perplexity(session: ort.InferenceSession, data: Mapping[str, NDArray[np.int64]]) -> float:
    """``exp`` of the mean surprise at the next token."""
    surprise = []
    for ids in data["input_ids"]:
        (logits,) = session.run(None, {"input_ids": ids[np.newaxis]})
        shares = torch.from_numpy(logits[0, :-1]).log_softmax(-1).numpy()
        surprise.append(-np.take_along_axis(shares, ids[1:, np.newaxis], axis=-1).mean())
    return float(np.exp(np.mean(surprise)))


def main() -> int:
    """Export, write the data, and compare ONNX Runtime with torch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--cache", type=Path, required=True, help="where NAME-weights is")
    parser.add_argument("--out", type=Path, required=True, help="directory to write into")
    options = parser.parse_args()
    reader = GGUFReader(options.cache / f"{options.name}-weights.gguf")
    tokenizer = tokenizer_of(reader)
    data = windows(tokenizer, "a", "z", WINDOWS)
    decoder = load(reader)
    path = options.out / f"{options.name}.onnx"
    ids = torch.from_numpy(data["input_ids"])
    torch.onnx.export(
        decoder,
        (ids[:2, :16],),
        path,
        input_names=["input_ids"],
        output_names=["logits"],
        opset_version=OPSET,
        dynamic_axes={name: {0: "batch", 1: "length"} for name in ("input_ids", "logits")},
        do_constant_folding=False,  # else the table is stored twice
        dynamo=False,
    )
    np.savez(options.out / f"{options.name}.data.npz", allow_pickle=False, **data)
    tokenizer.save(str(options.out / f"{options.name}.tokenizer.json"))

    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch, length in ((1, 17), (3, 64)):  # neither is the exported example's shape
        (logits,) = session.run(None, {"input_ids": data["input_ids"][:batch, :length]})
        with torch.inference_mode():
            expected = decoder(ids[:batch, :length]).numpy()
        worst = max(worst, float(np.abs(logits - expected).max()))
    if worst > 1e-2:
        sys.exit(f"ONNX Runtime's logits are {worst:.2g} from torch's, expected at most 0.01")
    found = perplexity(session, {name: array[:4] for name, array in data.items()})
    print(f"ONNX Runtime's logits at most {worst:.1e} from torch's; perplexity {found:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
