"""Healing: factors descend towards the original's outputs, and only where held-out data agree."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnx_lowrank import compress
from onnx_lowrank.errors import InputError, Terminated
from onnx_lowrank.fitting.batches import joined
from onnx_lowrank.fitting.heal import HealPlan, heal
from onnx_lowrank.graph.elements import install
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.numerics.adam import Adam, schedule
from onnx_lowrank.numerics.arrays import Array
from tests.helpers.healing import error, factored, healed, opener, parted, perceptron, samples
from tests.helpers.models import parse


def test_factors_and_biases_are_trained() -> None:
    _, _, trained = factored(perceptron())
    assert sorted(trained) == ["b1", "first.lowrank_A", "first.lowrank_B"]


def test_healing_brings_fresh_samples_closer(tmp_path: Path) -> None:
    proto = perceptron()
    original, model, trained = factored(proto)
    feeds = samples(60)
    fresh = [{"x": np.random.default_rng(99).normal(size=(200, 24)).astype(np.float32)}]
    before = error(model, original, fresh)
    shown: list[tuple[int, float]] = []
    steps: list[int] = []
    found = heal(
        model,
        original,
        trained,
        *parted(feeds),
        None,
        opener,
        HealPlan(steps=200, rate=1e-2),
        steps.append,
        lambda step, now: shown.append((step, now)),
    )
    assert sum(steps) == 200
    assert shown[0] == (0, found.error_before)
    assert found.error_after == min(now for _, now in shown) < 0.8 * found.error_before
    assert (found.best_step, found.error_after) in shown
    assert found.samples + found.held_out == 60
    assert not found.notes
    with Spool(tmp_path) as spool:
        install(model, found.arrays, spool)
        after = error(model, original, fresh)
    assert after < 0.8 * before
    assert after == pytest.approx(found.error_after, rel=0.25)


def test_the_model_is_not_changed() -> None:
    proto = perceptron()
    original, model, trained = factored(proto)
    before = [ir.to_proto(one).SerializeToString() for one in (model, original)]
    heal(model, original, trained, *parted(samples(10)), None, opener, HealPlan(3), lambda _: None)
    assert [ir.to_proto(one).SerializeToString() for one in (model, original)] == before


def test_it_is_deterministic() -> None:
    first, second = (healed(perceptron(), samples(20), HealPlan(20, rate=1e-2)) for _ in range(2))
    assert first.error_after == second.error_after
    for name, array in first.arrays.items():
        np.testing.assert_array_equal(array, second.arrays[name])


def test_a_rate_that_only_harms_changes_nothing() -> None:
    found = healed(perceptron(), samples(20), HealPlan(10, rate=30.0))
    assert found.best_step == 0
    assert not found.arrays
    assert found.error_after == found.error_before
    assert any("the factors stay" in note for note in found.notes)


def test_an_interruption_keeps_the_best_so_far() -> None:
    def interrupted(step: int, _: float) -> None:
        if step >= 60:
            raise KeyboardInterrupt

    ticks: list[int] = []
    original, model, trained = factored(perceptron())
    found = heal(
        model, original, trained, *parted(samples(40)), None, opener, HealPlan(120, rate=1e-2),
        ticks.append, interrupted,
    )  # fmt: skip
    assert found.steps == 60
    assert 0 < found.best_step <= 60
    assert found.error_after < found.error_before
    assert set(found.arrays) == set(trained)
    assert any("interrupted after step 60 of 120" in note for note in found.notes)
    assert sum(ticks) == 120


def test_termination_is_no_interruption() -> None:
    def terminated(step: int, _: float) -> None:
        if step:
            raise Terminated

    with pytest.raises(Terminated):
        healed(perceptron(), samples(20), HealPlan(20), show=terminated)


def test_sixteen_bits_descend_in_thirty_two_and_come_back() -> None:
    proto = perceptron("float16")
    found = healed(proto, samples(40, dtype=np.float16), HealPlan(100, rate=1e-2))
    assert found.error_after < 0.9 * found.error_before
    assert {array.dtype for array in found.arrays.values()} == {np.dtype(np.float16)}


def test_a_value_inside_counts_too() -> None:
    found = healed(perceptron(), samples(20), HealPlan(5, at=("a",)))
    assert found.values == ("y", "a")


def test_a_value_that_only_one_model_has_is_refused() -> None:
    with pytest.raises(InputError, match=r"heal_at='nowhere': the original model has no such"):
        healed(perceptron(), samples(20), HealPlan(5, at=("nowhere",)))
    original, model, trained = factored(perceptron())
    inner = next(v.name for n in model.graph for v in n.outputs if "lowrank" in (v.name or ""))
    plan = HealPlan(1, (inner or "",))
    with pytest.raises(InputError, match=r"heal_at=.*: the original model has no such"):
        heal(model, original, trained, *parted(samples(4)), None, opener, plan, lambda _: None)


def test_one_sample_is_too_few() -> None:
    with pytest.raises(InputError, match="expected two samples or more"):
        compress(perceptron(), rank=8, min_gain=0.0, calibration=samples(1), heal=5, bench=False)


def test_an_output_without_factors_is_refused() -> None:
    original, model, _ = factored(perceptron())
    with pytest.raises(InputError, match="no output of the model is a float that depends"):
        heal(model, original, (), *parted(samples(4)), None, opener, HealPlan(1), lambda _: None)


def test_masked_rows_do_not_count() -> None:
    proto = parse(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        agraph (float[B,T,24] x, float[B,T] attention_mask) => (float[B,T,6] y) {
            [first] h = MatMul (x, W1)
            a = Tanh (h)
            y = MatMul (a, W2)
        }
        """,
        {
            "W1": np.random.default_rng(0).normal(size=(24, 32)).astype(np.float32) / 5,
            "W2": np.random.default_rng(1).normal(size=(32, 6)).astype(np.float32) / 5,
        },
    )
    rng = np.random.default_rng(2)
    mask = np.array([[1, 1, 0], [1, 0, 0]], np.float32)
    clean = [
        {"x": rng.normal(size=(2, 3, 24)).astype(np.float32), "attention_mask": mask}
        for _ in range(8)
    ]
    dirty = [
        {**feed, "x": np.where(mask[..., None] == 0, np.float32(1e3), feed["x"])} for feed in clean
    ]
    original, model, trained = factored(proto)
    found = [
        heal(
            model,
            original,
            trained,
            *parted(feeds),
            "attention_mask",
            opener,
            HealPlan(6),
            lambda _: None,
        )
        for feeds in (clean, dirty)
    ]
    assert found[0].error_before == pytest.approx(found[1].error_before, rel=1e-5)
    assert found[0].error_after == pytest.approx(found[1].error_after, rel=1e-4)


def test_single_samples_of_equal_shape_are_joined() -> None:
    model = ir.from_proto(perceptron())
    single = samples(5, rows=1)

    def sizes(taken: ir.Model, feeds: list[dict[str, Array]]) -> list[int]:
        (found,), notes = joined(taken, [feeds], 2, lambda feed: feed)
        assert not notes
        rows = [feed["x"] for feed in feeds]
        np.testing.assert_array_equal(
            np.concatenate([feed["x"] for feed in found]), np.concatenate(rows)
        )
        return [feed["x"].shape[0] for feed in found]

    assert sizes(model, single) == [2, 2, 1]
    assert sizes(model, samples(3, rows=4)) == [4, 4, 4]
    assert sizes(ir.from_proto(perceptron(batch="1")), single) == [1] * 5


@pytest.mark.parametrize("rows", [1, 4])
def test_less_memory_is_told_where_samples_would_be_joined(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples that are whole batches stay as they are, whatever the memory."""
    monkeypatch.setattr("onnx_lowrank.fitting.heal.batch_size", lambda *_: 6)
    notes = healed(perceptron(), samples(20, rows=rows), HealPlan(2)).notes
    assert any("6 samples at a time, not 16: memory" in note for note in notes) == (rows == 1)


def test_a_model_for_single_samples_descends_on_single_samples() -> None:
    """Its input may have any size, but a Reshape inside asks for one row."""
    proto = parse(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        agraph (float[N,24] x) => (float[1,32] y) {
            shape = Constant <value = int64[2] {1, 24}> ()
            h = Reshape (x, shape)
            [first] y = MatMul (h, W)
        }
        """,
        {"W": np.random.default_rng(0).normal(size=(24, 32)).astype(np.float32)},
    )
    found = healed(proto, samples(10, rows=1), HealPlan(3))
    assert (found.samples, found.held_out) == (9, 1)
    assert any("one sample at a time" in note for note in found.notes)


def test_adam_takes_the_steps_of_its_paper() -> None:
    rng = np.random.default_rng(3)
    start = {"a": rng.normal(size=(50, 3)), "b": rng.normal(size=7)}
    adam = Adam(start, 0.1)
    want = {name: array.astype(np.float64) for name, array in start.items()}
    first = {name: np.zeros_like(array) for name, array in want.items()}
    second = {name: np.zeros_like(array) for name, array in want.items()}
    rate = {name: 0.1 * np.sqrt(np.mean(array**2)) for name, array in want.items()}
    for step in range(1, 6):
        slopes = {name: rng.normal(size=array.shape) for name, array in want.items()}
        adam.step({name: slope.astype(np.float32) for name, slope in slopes.items()}, 0.5)
        for name, slope in slopes.items():
            first[name] = 0.9 * first[name] + 0.1 * slope
            second[name] = 0.99 * second[name] + 0.01 * slope**2
            mean, square = first[name] / (1 - 0.9**step), second[name] / (1 - 0.99**step)
            want[name] -= 0.5 * rate[name] * mean / np.sqrt(square)
    for name, array in want.items():
        np.testing.assert_allclose(adam.arrays[name], array, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(adam.copy()[name], adam.arrays[name])


def test_the_rate_rises_and_falls() -> None:
    shares = [schedule(step, 100) for step in range(100)]
    assert shares[0] < shares[5] < shares[10] == max(shares)
    assert all(a > b for a, b in itertools.pairwise(shares[10:]))
    assert 0 < shares[-1] < 0.01
    assert schedule(0, 1) > 0
