"""Export all-MiniLM-L6-v2 from its safetensors: python models/export_minilm.py NAME --out DIR.

The encoder is written out below, so that no other package decides what the graph looks like.
Inputs ``input_ids`` and ``attention_mask`` (batch, length); output ``sentence_embedding``
(batch, 384): the mean of the vectors of the tokens that the mask holds, at Euclidean length 1.
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

__all__ = ["SentenceEncoder", "load", "main"]

LAYERS, WIDTH, HEADS, INNER = 6, 384, 12, 1536
VOCABULARY, POSITIONS, EPSILON = 30522, 512, 1e-12
OPSETS = {"minilm-l6": 17, "minilm-l6-dynamo": 20}
SENTENCES, LENGTH = 256, 64  # of the data that is written beside the model


class Layer(nn.Module):
    """A BERT layer: attention and MLP, each followed by its normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.projection = nn.Linear(WIDTH, WIDTH)
        self.norm_attention = nn.LayerNorm(WIDTH, EPSILON)
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)
        self.norm_mlp = nn.LayerNorm(WIDTH, EPSILON)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Map tokens (batch, length, WIDTH); the bias (batch, 1, 1, length) goes on the scores."""
        batch, length, _ = x.shape

        def split(y: Tensor) -> Tensor:  # (batch, HEADS, length, WIDTH / HEADS)
            return y.reshape(batch, length, HEADS, WIDTH // HEADS).transpose(1, 2)

        query, key, value = split(self.query(x)), split(self.key(x)), split(self.value(x))
        scores = query @ key.transpose(-2, -1) * (WIDTH // HEADS) ** -0.5 + bias
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, length, WIDTH)
        x = self.norm_attention(x + self.projection(mixed))
        normed: Tensor = self.norm_mlp(x + self.down(nn.functional.gelu(self.up(x))))
        return normed


class SentenceEncoder(nn.Module):
    """The BERT encoder with mean pooling and normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(POSITIONS, WIDTH)
        self.types = nn.Embedding(2, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, EPSILON)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map token ids and mask, both (batch, length) of int64, to (batch, WIDTH)."""
        places = torch.arange(input_ids.shape[1])
        x = self.words(input_ids) + self.positions(places) + self.types.weight[0]
        x = self.norm(x)
        mask = attention_mask.to(x.dtype)
        bias = (1 - mask[:, None, None, :]) * -1e4
        for layer in self.layers:
            x = layer(x, bias)
        weights = mask[:, :, None]
        mean = (x * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(mean, dim=1)


def load(path: Path) -> SentenceEncoder:
    """The encoder with the weights of a safetensors file that has BERT's names."""
    renamed = {
        "words": "embeddings.word_embeddings",
        "positions": "embeddings.position_embeddings",
        "types": "embeddings.token_type_embeddings",
        "norm": "embeddings.LayerNorm",
    }
    for index in range(LAYERS):
        ours, theirs = f"layers.{index}", f"encoder.layer.{index}"
        renamed |= {
            f"{ours}.query": f"{theirs}.attention.self.query",
            f"{ours}.key": f"{theirs}.attention.self.key",
            f"{ours}.value": f"{theirs}.attention.self.value",
            f"{ours}.projection": f"{theirs}.attention.output.dense",
            f"{ours}.norm_attention": f"{theirs}.attention.output.LayerNorm",
            f"{ours}.up": f"{theirs}.intermediate.dense",
            f"{ours}.down": f"{theirs}.output.dense",
            f"{ours}.norm_mlp": f"{theirs}.output.LayerNorm",
        }
    tensors = load_file(path)
    encoder = SentenceEncoder()
    encoder.eval()
    state = {}
    for name in encoder.state_dict():
        module, _, parameter = name.rpartition(".")
        state[name] = tensors[f"{renamed[module]}.{parameter}"]
    encoder.load_state_dict(state)
    return encoder


def export(name: str, encoder: SentenceEncoder, example: tuple[Tensor, Tensor], path: Path) -> None:
    """Write the encoder with dynamic batch and length."""
    inputs, outputs = ["input_ids", "attention_mask"], ["sentence_embedding"]
    if name.endswith("-dynamo"):
        shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=POSITIONS)}
        torch.onnx.export(
            encoder,
            example,
            path,
            input_names=inputs,
            output_names=outputs,
            opset_version=OPSETS[name],
            dynamic_shapes=(shape, shape),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    else:
        axes = {key: {0: "batch", 1: "length"} for key in inputs} | {outputs[0]: {0: "batch"}}
        torch.onnx.export(
            encoder,
            example,
            path,
            input_names=inputs,
            output_names=outputs,
            opset_version=OPSETS[name],
            dynamic_axes=axes,
            dynamo=False,
        )


def sentences(count: int) -> list[str]:
    """First paragraphs of docstrings of the standard library, in a fixed random order."""
    found: set[str] = set()
    for file in sorted(Path(os.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                paragraph = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if len(paragraph) >= 40:
                    found.add(paragraph)
    return [str(one) for one in np.random.default_rng(0).permutation(sorted(found))[:count]]


def tokenize(path: Path, texts: list[str]) -> dict[str, NDArray[np.int64]]:
    """The model's inputs for these texts, cut and padded to LENGTH tokens."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    encodings = tokenizer.encode_batch(texts)
    return {
        "input_ids": np.array([encoding.ids for encoding in encodings], np.int64),
        "attention_mask": np.array([encoding.attention_mask for encoding in encodings], np.int64),
    }


def main() -> int:
    """Export, write the data, and compare ONNX Runtime with torch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=OPSETS)
    parser.add_argument("--cache", type=Path, required=True, help="where minilm-l6-weights is")
    parser.add_argument("--out", type=Path, required=True, help="directory to write into")
    options = parser.parse_args()
    tokenizer = options.cache / "minilm-l6-weights.tokenizer.json"
    data = tokenize(tokenizer, sentences(SENTENCES))
    encoder = load(options.cache / "minilm-l6-weights.safetensors")
    ids, mask = (torch.from_numpy(data[name]) for name in ("input_ids", "attention_mask"))
    path = options.out / f"{options.name}.onnx"
    export(options.name, encoder, (ids[:2], mask[:2]), path)
    np.savez(options.out / f"{options.name}.data.npz", allow_pickle=False, **data)
    shutil.copyfile(tokenizer, options.out / f"{options.name}.tokenizer.json")

    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch, length in ((1, 17), (32, LENGTH)):  # neither is the exported example's shape
        feed = {name: array[:batch, :length] for name, array in data.items()}
        embedding = np.asarray(session.run(None, feed)[0])
        with torch.inference_mode():
            expected = encoder(ids[:batch, :length], mask[:batch, :length]).numpy()
        worst = max(worst, float(np.abs(embedding - expected).max()))
    if worst > 1e-4:
        sys.exit(f"ONNX Runtime's embedding is {worst:.2g} from torch's, expected at most 1e-4")
    print(f"ONNX Runtime's embedding at most {worst:.1e} from torch's, on two shapes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
