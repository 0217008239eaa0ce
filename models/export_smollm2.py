"""Export SmolLM2-135M-Instruct from its GGUF file: python models/export_smollm2.py NAME --out DIR.

Input ``input_ids`` (batch, length); output ``logits`` (batch, length, 49152), of the token that
follows each one.  The weights are those of the package, 4 bits each, as floats: the embedding
table is stored once and is the matrix of the last layer too.

A NAME that ends in ``-cache`` is run step by step (see `llama`).
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
from llama import Decoder, Sizes, export, step
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from windows import windows

__all__ = ["load", "main", "tokenizer_of"]

WINDOWS = 512  # of the data that is written beside the model


def load(reader: GGUFReader) -> Decoder:
    """The decoder with the weights of a GGUF file."""
    sizes = Sizes()
    stored = {tensor.name: tensor for tensor in reader.tensors}

    def floats(name: str) -> Tensor:
        tensor = stored[f"{name}.weight"]
        return torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), np.float32))

    def halved(rows: Tensor, heads: int) -> Tensor:
        # The file has the two numbers that are turned together side by side; here they are in
        # the two halves of a head.
        return rows.reshape(heads, sizes.head // 2, 2, -1).transpose(1, 2).reshape(rows.shape)

    names = {"query": "attn_q", "key": "attn_k", "value": "attn_v", "projection": "attn_output"}
    names |= {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
    state = {"words.weight": floats("token_embd"), "norm.weight": floats("output_norm")}
    for index in range(sizes.layers):
        ours, theirs = f"layers.{index}", f"blk.{index}"
        state[f"{ours}.norm_attention.weight"] = floats(f"{theirs}.attn_norm")
        state[f"{ours}.norm_mlp.weight"] = floats(f"{theirs}.ffn_norm")
        for own, name in names.items():
            rows = floats(f"{theirs}.{name}")
            heads = {"query": sizes.heads, "key": sizes.shared}.get(own)
            state[f"{ours}.{own}.weight"] = (rows if heads is None else halved(rows, heads)).T
    decoder = Decoder(sizes)
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


def perplexity(
    session: ort.InferenceSession, data: Mapping[str, NDArray[np.int64]], sizes: Sizes | None
) -> float:
    """``exp`` of the mean surprise at the next token; sizes as for `_logits`."""
    surprise = []
    for ids in data["input_ids"]:
        logits = _logits(session, ids[np.newaxis], sizes)
        shares = torch.from_numpy(logits[0, :-1]).log_softmax(-1).numpy()
        surprise.append(-np.take_along_axis(shares, ids[1:, np.newaxis], axis=-1).mean())
    return float(np.exp(np.mean(surprise)))


def _logits(
    session: ort.InferenceSession, ids: NDArray[np.int64], sizes: Sizes | None
) -> NDArray[np.float32]:
    """The logits of tokens (batch, length), in two steps where sizes are of one with a cache."""
    if sizes is None:
        (logits,) = session.run(None, {"input_ids": ids})
        return np.asarray(logits)
    names, found, outputs = [own.name for own in session.get_outputs()], [], None
    for tokens in (ids[:, :-1], ids[:, -1:]):
        given = session.run(None, step(tokens, outputs, sizes))
        outputs = dict(zip(names, given, strict=True))
        found.append(outputs["logits"])
    return np.concatenate(found, axis=1)


def main() -> int:
    """Export, write the data, and compare ONNX Runtime with torch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--cache", type=Path, required=True, help="where NAME-weights is")
    parser.add_argument("--out", type=Path, required=True, help="directory to write into")
    options = parser.parse_args()
    cache = options.name.endswith("-cache")
    weights = f"{options.name.removesuffix('-cache')}-weights.gguf"
    reader = GGUFReader(options.cache / weights)
    tokenizer = tokenizer_of(reader)
    data = windows(tokenizer, "a", "z", WINDOWS)
    decoder = load(reader)
    path = options.out / f"{options.name}.onnx"
    ids = torch.from_numpy(data["input_ids"])
    export(decoder, path, cache)
    if not cache:
        np.savez(options.out / f"{options.name}.data.npz", allow_pickle=False, **data)
    tokenizer.save(str(options.out / f"{options.name}.tokenizer.json"))

    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch, length in ((1, 17), (3, 64)):  # neither is the exported example's shape
        logits = _logits(
            session, data["input_ids"][:batch, :length], decoder.sizes if cache else None
        )
        with torch.inference_mode():
            expected = decoder(ids[:batch, :length]).numpy()
        worst = max(worst, float(np.abs(logits - expected).max()))
    if worst > 1e-2:
        sys.exit(f"ONNX Runtime's logits are {worst:.2g} from torch's, expected at most 0.01")
    few = {name: array[:4] for name, array in data.items()}
    found = perplexity(session, few, decoder.sizes if cache else None)
    print(f"ONNX Runtime's logits at most {worst:.1e} from torch's; perplexity {found:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
