"""Fisher information of texts without their padding."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnx_lowrank.data.joining import APART, Joining
from onnx_lowrank.fitting.output_gradients import felt
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.maps.find import find
from onnx_lowrank.maps.forms import all_forms, chosen_forms
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.runtime.taps import Runner
from tests.helpers.models import parse, run_ort, uniform

TEXT = """<ir_version: 8, opset_import: ["": 17]>
g (float[B, T, 6] x, int64[B, T] mask) => (float[B, 7] y) {
    h = MatMul(x, V) t = Tanh(h) k = MatMul(t, W)
    whole = Cast<to = 1>(mask) c = Unsqueeze(whole, two)
    counted = Mul(k, c) y = ReduceSum<keepdims = 0>(counted, one)
}"""


def test_what_is_felt_is_the_same_without_padding(rng: np.random.Generator) -> None:
    weights = {"V": uniform((6, 8), rng), "W": uniform((8, 7), rng)}
    proto = parse(TEXT, {**weights, "one": np.array([1]), "two": np.array([2])})
    feeds: list[dict[str, Array]] = [
        {
            "x": uniform((1, 16, 6), rng),
            "mask": (np.arange(16) < rng.integers(1, 8))[None].astype(np.int64),
        }
        for _ in range(64)
    ]
    found, tokens = [], []
    for cut in (APART, Joining(8, "mask", {"x": 1, "mask": 1})):
        model, count = ir.from_proto(proto), [0]

        def opened(copy: ir.Model, count: list[int] = count) -> Runner:
            made = ir.to_proto(copy)
            names = {value.name for value in made.graph.input}

            def run(feed: Feed) -> Feed:
                count[0] += feed["mask"].size if "mask" in feed else 0
                return run_ort(made, {name: a for name, a in feed.items() if name in names})

            return run

        constants = Constants(model, False)
        groups = find(model, constants, all_forms(), chosen_forms(None)).groups
        own = felt(
            model, constants, groups, feeds, "mask", opened, lambda _: None, 0, 512, joining=cut
        )
        assert not own.left
        found.append({group.matrix.name: fisher for group, fisher in own.found.items()})
        tokens.append(count[0])
    assert tokens[1] < 0.7 * tokens[0]
    for name, alone in found[0].items():
        other = found[1][name]
        assert alone.root is not None
        assert other.root is not None
        # Other batches draw other directions.
        exact, near = alone.root @ alone.root.T, other.root @ other.root.T
        assert np.linalg.norm(near - exact) < 0.25 * np.linalg.norm(exact)
