"""Damage to models: mutations of a protobuf's fields and bytes, the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

__all__ = ["aged", "damaged", "victims"]

_NUMBERS = (0, 1, -1, 2, 7, 99, 2**31 - 1, -(2**31), 2**40)
_TEXTS = ("", "x", "W", "nosuch", "a\0b", "é" * 3, "MatMul", "com.microsoft", "../up")

_TEXT = {
    "branch": """<ir_version: 8, opset_import: ["": 17]>
        two (float[n, 8] x, bool c) => (float[n, 8] y) {
            h = MatMul (x, W)
            g = Gemm <transB = 1, alpha = 0.5> (h, V, b)
            y = If (c) <
                then_branch = g () => (float[n, 8] p) { p = MatMul (g, V) },
                else_branch = g () => (float[n, 8] q) { q = Identity (g) }
            >
        }""",
    "function": """<ir_version: 9, opset_import: ["": 17, "own": 1]>
        main (float[n, 8] x) => (float[n, 8] y) { h = own.linear <t = 1> (x, W)
                                                  y = own.twice (h) }
        <domain: "own", opset_import: ["": 17]>
        linear <t> (x, w) => (z) { z = Gemm <transB: int = @t> (x, w) }
        <domain: "own", opset_import: ["": 17]>
        twice (x) => (z) {
            k = Constant <value = float[8, 2] {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7}> ()
            t = Transpose <perm = [1, 0]> (k)
            m = MatMul (x, k)
            r = Relu (m)
            z = MatMul (r, t)
        }""",
    "forms": """<ir_version: 8, opset_import: ["": 17]>
        many (float[2, 8, 4, 4] x, int64[3] i) => (float[2, 6, 4, 4] y, float[3, 8] e,
                                                   float[3, 8] s) {
            y = Conv <kernel_shape = [1, 1]> (x, K)
            e = Gather (W, i)
            c = Cast <to = 1> (W)
            r = Reshape (c, shape)
            s = Einsum <equation = "ab,bc->ac"> (e, r)
        }""",
    "loop": """<ir_version: 8, opset_import: ["": 17]>
        loop (int64 n, bool c, float[2, 8] x) => (float[2, 8] y) {
            y = Loop (n, c, x) <body = b (int64 i, bool d, float[2, 8] v)
                                    => (bool e, float[2, 8] w) {
                e = Identity (d)
                w = MatMul (v, W)
            }>
        }""",
}


def victims() -> dict[str, onnx.ModelProto]:
    """Little models with most things that a model can have; W, V and the rest are 8 by 8."""
    found = {}
    for name, text in _TEXT.items():
        model = onnx.parser.parse_model(text)
        used = {value for node in _nodes(model) for value in node.input}
        for weight in sorted(used & {"W", "V", "b", "K", "shape"}):
            sizes = {"b": [8], "K": [6, 8, 1, 1], "shape": [2]}.get(weight, [8, 8])
            count = 1
            for size in sizes:
                count *= size
            if weight == "shape":
                tensor = onnx.helper.make_tensor(weight, onnx.TensorProto.INT64, sizes, [8, 8])
            else:
                numbers = [((7 * k) % 11 - 5) / 4 for k in range(count)]
                tensor = onnx.helper.make_tensor(weight, onnx.TensorProto.FLOAT, sizes, numbers)
            model.graph.initializer.append(tensor)
        onnx.checker.check_model(model)
        found[name] = model
    return found


def aged(model: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """A model as of another IR version and another opset, which may not fit its nodes.

    Args:
        model: it is not changed.
        seed: which versions.
    """
    rng = random.Random(seed)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.ir_version = rng.choice([*range(3, 13), model.ir_version])
    opset = rng.choice([*range(7, 25), *[17] * 6])
    for imports in (copy.opset_import, *(function.opset_import for function in copy.functions)):
        for entry in imports:
            if not entry.domain:
                entry.version = opset
    return copy


def damaged(model: onnx.ModelProto, seed: int) -> bytes:
    """The bytes of a model with one to three things wrong.

    Args:
        model: it is not changed.
        seed: which damage.
    """
    rng = random.Random(seed)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if rng.random() < 0.1:
        data = bytearray(copy.SerializeToString())
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data[: rng.randint(len(data) // 2, len(data))])
    for _ in range(rng.randint(1, 3)):
        messages = list(_messages(copy))
        _mutate(rng.choice(messages), rng)
    return bytes(copy.SerializeToString())


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for message in _messages(model):
        if isinstance(message, onnx.NodeProto):
            yield message


def _messages(message: Message) -> Iterator[Message]:
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for item in value if field.is_repeated else (value,):
                yield from _messages(item)


def _mutate(message: Message, rng: random.Random) -> None:
    fields = list(message.DESCRIPTOR.fields)
    there = [field for field, _ in message.ListFields()]
    field = rng.choice(there if there and rng.random() < 0.8 else fields)
    if field.is_repeated:
        _mutate_list(message, field, getattr(message, field.name), rng)
    elif field.message_type is not None or rng.random() < 0.3:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, _value(field, getattr(message, field.name), rng))


def _mutate_list(message: Message, field: FieldDescriptor, items: Any, rng: random.Random) -> None:
    way = rng.randrange(4)
    if not len(items) or way == 0:
        if field.message_type is not None:
            items.add()
        else:
            items.append(_value(field, None, rng))
    elif way == 1:
        del items[rng.randrange(len(items))]
    elif way == 2:
        items.append(items[rng.randrange(len(items))])
    elif field.message_type is not None:
        message.ClearField(field.name)
    else:
        place = rng.randrange(len(items))
        items[place] = _value(field, items[place], rng)


def _value(field: FieldDescriptor, old: Any, rng: random.Random) -> Any:
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING:
        text = rng.choice(_TEXTS)
        return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return rng.choice([value.number for value in field.enum_type.values])
    if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return rng.choice((0.0, -1.5, float("nan"), float("inf"), 1e30))
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return not old
    number = rng.choice(_NUMBERS)
    if kind in (FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_UINT64):
        number = abs(number)
    if kind in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_UINT32):
        number = max(min(number, 2**31 - 1), -(2**31))
    return number
