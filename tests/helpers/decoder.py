"""A small decoder as exporters write it: grouped queries, a cache and a tied head."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnx_lowrank.numerics.arrays import Array, Feed

__all__ = ["WORDS", "decoder_feeds", "decoder_model"]

WORDS, WIDTH, HEADS, GROUPS, SIZE, LAYERS = 96, 32, 4, 2, 8, 2


def decoder_model(seed: int = 0) -> onnx.ModelProto:
    """Inputs ``input_ids [batch, tokens]``, ``attention_mask [batch, total]`` and a cache of
    ``past.I.key`` and ``past.I.value [batch, 2, past, 8]``; outputs ``logits`` and the cache after.
    """
    rng = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, Array] = {}

    def weight(name: str, m: int, n: int) -> str:
        # Singular values that fall slowly, as those of trained layers do.
        u, _, vt = np.linalg.svd(rng.standard_normal((m, n)), full_matrices=False)
        s = np.exp(-np.arange(min(m, n)) / 10.0)
        constants[name] = (u * s @ vt * 4.0).astype(np.float32)
        return name

    def const(name: str, array: object, dtype: type = np.int64) -> str:
        constants[name] = np.asarray(array, dtype)
        return name

    def op(kind: str, *inputs: str, out: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, list(inputs), [out], name=out, **attributes))
        return out

    def heads(value: str, count: int, name: str) -> str:
        shape = const(f"{name}/shape", [0, 0, count, SIZE])
        split = op("Reshape", value, shape, out=f"{name}/split")
        return op("Transpose", split, out=f"{name}/heads", perm=[0, 2, 1, 3])

    zero, one = const("zero", 0), const("one", 1)
    constants["table"] = rng.standard_normal((WORDS, WIDTH)).astype(np.float32)
    x = op("Gather", "table", "input_ids", out="embedded")
    tokens = op("Gather", op("Shape", "input_ids", out="ids/shape"), one, out="tokens")
    total = op("Gather", op("Shape", "attention_mask", out="mask/shape"), one, out="total")
    past = op("Sub", total, tokens, out="past")
    keys = op("Range", zero, total, one, out="keys")  # [total]
    queries = op("Range", past, total, one, out="queries")  # [tokens]
    column = op("Unsqueeze", queries, const("axis1", [1]), out="queries/column")
    seen = op("LessOrEqual", keys, column, out="seen")  # [tokens, total]
    real = op("Cast", "attention_mask", out="real", to=TensorProto.BOOL)
    real = op("Unsqueeze", real, const("axes12", [1, 2]), out="real/rows")
    allowed = op("And", seen, real, out="allowed")  # [batch, 1, tokens, total]
    low = const("low", -1e4, np.float32)
    bias = op("Where", allowed, const("none", 0.0, np.float32), low, out="bias")
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
    ]
    outputs = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "tokens", WORDS])
    ]
    for layer in range(LAYERS):
        n = f"layer{layer}"
        scale = const(f"{n}/norm/scale", np.ones(WIDTH), np.float32)
        h = op("LayerNormalization", x, scale, out=f"{n}/norm")
        q = heads(
            op("MatMul", h, weight(f"{n}/Wq", WIDTH, HEADS * SIZE), out=f"{n}/q"), HEADS, f"{n}/q"
        )
        cache = {}
        for part in ("key", "value"):
            w = weight(f"{n}/W{part}", WIDTH, GROUPS * SIZE)
            own = heads(op("MatMul", h, w, out=f"{n}/{part}"), GROUPS, f"{n}/{part}")
            old, new = f"past.{layer}.{part}", f"present.{layer}.{part}"
            shape: list[str | int | None] = ["batch", GROUPS, "past", SIZE]
            inputs.append(helper.make_tensor_value_info(old, TensorProto.FLOAT, shape))
            shape = ["batch", GROUPS, "total", SIZE]
            outputs.append(helper.make_tensor_value_info(new, TensorProto.FLOAT, shape))
            op("Concat", old, own, out=new, axis=2)
            # Every group of keys serves two heads of queries.
            wide = op("Unsqueeze", new, const(f"{n}/{part}/axis", [2]), out=f"{n}/{part}/wide")
            reps = const(f"{n}/{part}/reps", [1, 1, HEADS // GROUPS, 1, 1])
            tiled = op("Tile", wide, reps, out=f"{n}/{part}/tiled")
            flat = const(f"{n}/{part}/flat", [0, HEADS, -1, SIZE])
            cache[part] = op("Reshape", tiled, flat, out=f"{n}/{part}/repeated")
        kt = op("Transpose", cache["key"], out=f"{n}/key/t", perm=[0, 1, 3, 2])
        scores = op("MatMul", q, kt, out=f"{n}/scores")
        root = const(f"{n}/root", SIZE**-0.5, np.float32)
        scaled = op("Add", op("Mul", scores, root, out=f"{n}/scaled"), bias, out=f"{n}/biased")
        mixed = op(
            "MatMul", op("Softmax", scaled, out=f"{n}/p", axis=-1), cache["value"], out=f"{n}/m"
        )
        back = op("Transpose", mixed, out=f"{n}/m/t", perm=[0, 2, 1, 3])
        joined = op("Reshape", back, const(f"{n}/join", [0, 0, WIDTH]), out=f"{n}/joined")
        o = op("MatMul", joined, weight(f"{n}/Wo", WIDTH, WIDTH), out=f"{n}/o")
        x = op("Add", x, o, out=f"{n}/after")
        up = op("MatMul", x, weight(f"{n}/Wup", WIDTH, 64), out=f"{n}/up")
        act = op("Relu", up, out=f"{n}/act")
        down = op("MatMul", act, weight(f"{n}/Wdown", 64, WIDTH), out=f"{n}/down")
        x = op("Add", x, down, out=f"{n}/out")
    scale = const("norm/scale", np.ones(WIDTH), np.float32)
    x = op("LayerNormalization", x, scale, out="norm")
    op("MatMul", x, op("Transpose", "table", out="head", perm=[1, 0]), out="logits")
    graph = helper.make_graph(
        nodes,
        "decoder",
        inputs,
        outputs,
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def decoder_feeds(count: int, tokens: int, past: int = 0, seed: int = 0) -> list[Feed]:
    """Feeds of one sequence each; every other one ends in padding where there is room."""
    rng = np.random.default_rng(seed)
    feeds: list[Feed] = []
    for number in range(count):
        mask = np.ones((1, past + tokens), np.int64)
        if tokens > 3 and number % 2:
            mask[:, past + tokens - 2 :] = 0
        feed: dict[str, Array] = {
            "input_ids": rng.integers(0, WORDS, (1, tokens)),
            "attention_mask": mask,
        }
        for layer in range(LAYERS):
            for part in ("key", "value"):
                shape = (1, GROUPS, past, SIZE)
                feed[f"past.{layer}.{part}"] = rng.standard_normal(shape).astype(np.float32)
        feeds.append(feed)
    return feeds
