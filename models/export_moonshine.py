"""Make floats of Moonshine's encoder: python models/export_moonshine.py moonshine --out DIR.

Moonshine tiny reads English speech.  Its package holds the encoder with weights of 8 bits; what is
written here computes in floats with the numbers that those integers stand for.  The decoder and the
tokenizer stay as they are: the encoder is judged by the words that they read out of it.

Input ``input_values`` (batch, samples at 16 kHz in -1..1); output ``last_hidden_state``
(batch, frames, 288).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import wave
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper

__all__ = ["Floats", "main"]

# The shipped encoder rounds what each layer gets as well, so the two are near and not equal
# (relative L2 error on a sentence).
_NEAR = 0.1


class Floats:
    """Makes products of floats of a model's products with constant integers, in place.

    ``MatMulInteger(DynamicQuantizeLinear(x), q, …, z) · (sx · s)``  ->  ``MatMul(x, s · (q − z))``
    ``Conv(x, s · Cast(q) + z)``                                     ->  ``Conv(x, W)``
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self._graph = model.graph
        self._stored = {tensor.name: tensor for tensor in self._graph.initializer}
        self._made: dict[str, NodeProto] = {
            name: node for node in self._graph.node for name in node.output
        }
        self._read: dict[str, NodeProto] = {
            name: node for node in self._graph.node for name in node.input
        }

    def make(self) -> int:
        """Replace them; how many weights became floats.

        Raises:
            ValueError: a product is written in another way than these two.
        """
        count = 0
        for place, node in enumerate(self._graph.node):
            if node.op_type == "MatMulInteger":
                scaled = self._product(node)
                self._graph.node[place].CopyFrom(scaled)
                count += 1
            elif node.op_type == "Conv" and node.input[1] not in self._stored:
                node.input[1] = self._store(node.input[1], self._computed(node.input[1]))
                count += 1
        self._clear()
        return count

    def _product(self, node: NodeProto) -> NodeProto:
        """The MatMul that takes the place of a product of integers, and of the Mul behind it."""
        rounded, codes, _, zero = node.input
        cast = self._only_reader(node.output[0], "Cast")
        scaled = self._only_reader(cast.output[0], "Mul")
        (both,) = set(scaled.input) - set(cast.output)
        scales = set(self._made[both].input) & self._stored.keys()
        quantizer = self._made[rounded]
        if quantizer.op_type != "DynamicQuantizeLinear" or len(scales) != 1:
            raise ValueError(f"{node.name}: expected a rounded input and one constant scale")
        weight = self._computed(scales.pop()) * (self._computed(codes) - self._computed(zero))
        name = self._store(codes, np.asarray(weight, np.float32))
        output = scaled.output[0]
        scaled.output[0] = f"{output}_unused"
        return helper.make_node("MatMul", [quantizer.input[0], name], [output], node.name)

    def _only_reader(self, name: str, operator: str) -> NodeProto:
        node = self._read.get(name)
        if node is None or node.op_type != operator:
            kind = "nothing" if node is None else node.op_type
            raise ValueError(f"{name}: expected {operator} behind it, got {kind}")
        return node

    def _computed(self, name: str) -> NDArray[np.float32]:
        """What is computed of constants alone."""
        if name in self._stored:
            return numpy_helper.to_array(self._stored[name]).astype(np.float32)
        node = self._made[name]
        parts = [self._computed(part) for part in node.input]
        if node.op_type == "Cast":
            return parts[0]
        if node.op_type not in ("Add", "Mul"):
            raise ValueError(f"{name}: expected Cast, Mul or Add of constants, got {node.op_type}")
        combined = np.multiply if node.op_type == "Mul" else np.add
        return np.asarray(combined(*parts), np.float32)

    def _store(self, name: str, array: NDArray[np.float32]) -> str:
        own = f"{name}_float"
        self._graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), own))
        return own

    def _clear(self) -> None:
        """Remove what nothing reads any more."""
        kept = {output.name for output in self._graph.output}
        nodes = []
        for node in reversed(self._graph.node):
            if kept.intersection(node.output):
                kept.update(node.input)
                nodes.append(node)
        nodes.reverse()
        tensors = [tensor for tensor in self._graph.initializer if tensor.name in kept]
        del self._graph.node[:], self._graph.initializer[:], self._graph.value_info[:]
        self._graph.node.extend(nodes)
        self._graph.initializer.extend(tensors)


def sentence(path: Path) -> NDArray[np.float32]:
    """The sound of a file of 16 kHz, one channel and 16 bits, as the model's input."""
    with wave.open(str(path)) as file:
        sound = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    return np.asarray(sound[np.newaxis] / 32768, np.float32)


def hidden(path: Path, sound: NDArray[np.float32]) -> NDArray[np.float32]:
    """The encoder's output."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"input_values": sound})[0])


def main() -> int:
    """Write the encoder beside its decoder and tokenizer, and compare it with the shipped one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["moonshine"])
    parser.add_argument("--cache", type=Path, required=True, help="where moonshine-int8 is")
    parser.add_argument("--out", type=Path, required=True, help="directory to write into")
    options = parser.parse_args()
    shipped = options.cache / "moonshine-int8.onnx"
    model = onnx.load(shipped)
    count = Floats(model).make()
    onnx.checker.check_model(model, full_check=True)
    path = options.out / f"{options.name}.onnx"
    onnx.save(model, path)
    for suffix, source in (
        (".decoder.onnx", "moonshine-int8.decoder.onnx"),
        (".tokenizer.json", "moonshine-tokenizer.json"),
    ):
        shutil.copyfile(options.cache / source, options.out / f"{options.name}{suffix}")

    sound = sentence(options.cache / "moonshine-tokenizer.wav")
    expected, found = hidden(shipped, sound), hidden(path, sound)
    apart = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    if not apart <= _NEAR:
        sys.exit(f"the encoder of floats is {apart:.2g} from the shipped one, expected {_NEAR}")
    print(f"{count} weights made floats; {apart:.1%} from the encoder of integers on a sentence")
    return 0


if __name__ == "__main__":
    sys.exit(main())
