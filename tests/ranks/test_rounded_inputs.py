"""What kernels lose by their inputs: measured for the layers that are chosen, where it counts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest

from onnx_lowrank.evaluation.outputs import MeanDamage
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.maps.choice import Choice
from onnx_lowrank.maps.find import Group, find
from onnx_lowrank.maps.formats import Format
from onnx_lowrank.maps.forms import all_forms, chosen_forms
from onnx_lowrank.numerics.arrays import Feed
from onnx_lowrank.ranks.probe import Probe
from onnx_lowrank.ranks.rounded_inputs import lost_by_inputs, seen_inputs
from onnx_lowrank.runtime.taps import Runner
from tests.helpers.models import parse, run_ort, uniform

# What a kernel that rounds its inputs adds to its output, as a share of each number, so that the
# test needs no processor that has one.
OFF = {"y": 0.3, "z": 0.1}
BLOCKS = Format(8, 32)


class Counted:
    """A probe of two layers, and how often a model with integers ran."""

    def __init__(self, rng: np.random.Generator) -> None:
        proto = parse(
            """<ir_version: 10, opset_import: ["": 21]>
            g (float[N, 64] x) => (float[N, 32] y, float[N, 32] z) {
                [a] y = MatMul(x, A)
                [b] z = MatMul(x, B)
            }""",
            {"A": uniform((64, 32), rng), "B": uniform((64, 32), rng)},
        )
        model = ir.from_proto(proto)
        self.runs = 0
        self.groups = find(model, Constants(model, False), all_forms(), chosen_forms(None)).groups
        feeds = [{"x": uniform((4, 64), rng)} for _ in range(3)]
        self.probe = Probe(model, self.groups, feeds, self.opened)

    def opened(self, copy: ir.Model) -> Runner:
        made = ir.to_proto(copy)
        names = {value.name for value in made.graph.input}
        written = {node.output[0] for node in made.graph.node if node.op_type == "DequantizeLinear"}
        rounds = {
            node.output[0]
            for node in made.graph.node
            if node.op_type == "MatMul" and node.input[1] in written
        }

        def run(feed: Feed) -> Feed:
            self.runs += bool(written)
            found = run_ort(made, {name: feed[name] for name in names})
            return {n: a * (1.0 + OFF[n]) if n in rounds else a for n, a in found.items()}

        return run


def estimate(choices: Mapping[Group, Choice]) -> float:
    """The same for every layer, twice of a pair."""
    return sum(2.0 if own.rank else 1.0 for own in choices.values() if own.format)


@pytest.fixture
def counted(rng: np.random.Generator) -> Counted:
    return Counted(rng)


def test_the_layers_that_are_chosen_are_measured(counted: Counted) -> None:
    a, b = counted.groups
    stays, stored = Choice(None, ""), Choice(None, "", format=BLOCKS)
    for one, other, off in ((a, b, OFF["y"]), (b, a, OFF["z"])):
        found = seen_inputs({one: stored, other: stays}, estimate, 0.0, counted.probe)
        assert found.mean == pytest.approx(off**2 / 2, rel=0.1)  # the mean of two outputs
        assert found.error is not None
        assert found.error < 0.1 * off**2
    both = seen_inputs({a: stored, b: stored}, estimate, 0.0, counted.probe)
    assert both.mean == pytest.approx((OFF["y"] ** 2 + OFF["z"] ** 2) / 2, rel=0.1)
    pair = seen_inputs(
        {a: Choice(8, "", format=BLOCKS), b: stays}, estimate, 0.0, counted.probe
    )  # its weight stands in whole
    assert pair.mean == pytest.approx(2.0 * OFF["y"] ** 2 / 2, rel=0.1)


def test_what_does_not_count_is_estimated(counted: Counted) -> None:
    a, b = counted.groups
    choices = {a: Choice(None, "", format=BLOCKS), b: Choice(None, "")}
    assert seen_inputs(choices, estimate, 10.0, counted.probe) == MeanDamage(1.0)
    floats = dict.fromkeys((a, b), Choice(None, ""))
    assert seen_inputs(floats, estimate, 0.0, counted.probe) == MeanDamage(0.0)
    kernels = Format(8, 0, activations="dynamic")  # the probe's runs show what these round
    choices = {a: Choice(None, "", format=kernels), b: Choice(None, "")}
    assert seen_inputs(choices, lambda _: 0.0, 0.0, counted.probe) == MeanDamage(0.0)
    assert lost_by_inputs({}, counted.probe) == MeanDamage(0.0)
    assert counted.runs == 0


def test_what_the_runs_do_not_tell_is_estimated(
    counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = counted.groups
    monkeypatch.setitem(OFF, "y", np.inf)
    choices = {a: Choice(None, "", format=BLOCKS), b: Choice(None, "")}
    assert seen_inputs(choices, estimate, 0.0, counted.probe) == MeanDamage(1.0)
    assert counted.runs
