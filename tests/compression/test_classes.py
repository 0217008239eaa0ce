"""Goals with kl and perplexity, on a decoder with a cache: first steps and later ones together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from scipy.special import log_softmax

from onnx_lowrank import compress
from onnx_lowrank.errors import InputError, UsageError
from onnx_lowrank.evaluation.metrics import Metric
from onnx_lowrank.evaluation.reading import Reading
from onnx_lowrank.fitting.output_gradients import felt
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.maps.find import find
from onnx_lowrank.maps.forms import all_forms
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.runtime.taps import Runner
from tests.helpers.decoder import decoder_feeds, decoder_model
from tests.helpers.models import known_rank, linear_model, parse


def both(count: int, seed: int = 0) -> list[Feed]:
    first = decoder_feeds(count, 10, seed=seed)
    return [*first, *decoder_feeds(count, 1, past=7, seed=seed + 1)]


@pytest.fixture(scope="module")
def prefill() -> list[Feed]:
    return both(24)


def test_damage_is_the_divergence_and_predicted(prefill: list[Feed]) -> None:
    result = compress(
        decoder_model(), keep=0.85, data=prefill, metric="kl", bench=False, simplify=False
    )
    goal, judged = result.report.goal, result.report.judged
    assert goal is not None
    assert judged is not None
    assert goal.damage_of == "classes"
    assert judged.metric == "kl"
    assert goal.achieved_damage == pytest.approx(judged.loss)
    assert goal.predicted_damage is not None
    assert 0.5 < goal.predicted_damage / judged.loss < 2.0
    assert goal.metric is None  # no tolerance limits it


def test_ranks_by_divergence_change_the_classes_less(prefill: list[Feed]) -> None:
    """The caches count for the relative error of the outputs, not for the classes."""
    unseen, reading = both(24, seed=90), Reading(classifiers=frozenset({"logits"}))
    original = logits(decoder_model(), unseen)
    found = []
    for metric in (None, "kl"):
        result = compress(
            decoder_model(), keep=0.85, data=prefill, metric=metric, bench=False, simplify=False
        )
        after = logits(result.model, unseen)
        found.append(Metric.parse("kl").evaluate(after, original, reading=reading))
    assert found[1] < found[0]


def logits(model: onnx.ModelProto | ir.Model, feeds: list[Feed]) -> list[Feed]:
    proto = model if isinstance(model, onnx.ModelProto) else ir.to_proto(model)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return [{"logits": session.run(["logits"], feed)[0]} for feed in feeds]


def test_a_rank_is_judged_as_well(prefill: list[Feed]) -> None:
    result = compress(
        decoder_model(), rank=8, data=prefill, metric="kl", bench=False, simplify=False
    )
    assert result.report.goal is None
    assert result.report.judged is not None
    assert result.report.judged.loss > 0.0


def test_a_tolerance_of_a_perplexity_holds(prefill: list[Feed]) -> None:
    result = compress(
        decoder_model(),
        tolerance=0.2,
        metric="perplexity",
        objective="size",
        data=prefill,
        bench=False,
        simplify=False,
    )
    goal, judged = result.report.goal, result.report.judged
    assert goal is not None
    assert judged is not None
    assert goal.metric == judged.metric == "perplexity"
    assert goal.loss == judged.loss <= 0.2
    assert judged.after / judged.before - 1 == pytest.approx(judged.loss)
    assert any(layer.rank is not None for layer in result.report.layers)


def test_a_metric_needs_a_model_that_runs() -> None:
    feeds = [{**feed, "input_ids": feed["input_ids"] + 1000} for feed in both(2)]  # out of range
    with pytest.raises(InputError, match=r"indices element out of data bounds"):
        compress(decoder_model(), data=feeds, metric="kl", rank=8, simplify=False)
    with pytest.raises(UsageError, match=r"metric=… and check=False exclude each other"):
        compress(decoder_model(), metric="kl", check=False)


def test_healing_brings_the_classes_closer(prefill: list[Feed]) -> None:
    plain, healed = (
        compress(
            decoder_model(), keep=0.7, uniform=True, data=prefill, metric="kl", heal=steps,
            bench=False, simplify=False,
        ).report
        for steps in (0, 120)
    )  # fmt: skip
    healing = healed.healing
    assert healing is not None
    assert healing.error_of == "classes"
    assert "logits" in healing.values
    assert not [name for name in healing.values if name.startswith("present")]
    assert healing.error_after < healing.error_before
    assert plain.judged is not None
    assert healed.judged is not None
    assert healed.judged.loss < 0.9 * plain.judged.loss


def opener(model: ir.Model | onnx.ModelProto, *, optimize: bool = True) -> Runner:
    proto = model if isinstance(model, onnx.ModelProto) else ir.to_proto(model)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feed: dict(zip(names, session.run(names, dict(feed)), strict=True))


def test_fisher_information_of_the_classes(rng: np.random.Generator) -> None:
    """Errors that a softmax does not show are not felt: all logits of a row moved alike."""
    model = ir.from_proto(linear_model(rng.normal(size=(12, 20)).astype(np.float32)))
    constants = Constants(model)
    (group,) = find(model, constants, all_forms()).groups
    feeds = [{"x": rng.normal(size=(8, 12)).astype(np.float32)} for _ in range(40)]
    ones, shares = np.ones(20) / np.sqrt(20), []
    for logits in ((), tuple(value.name or "" for value in model.graph.outputs)):
        found = felt(model, constants, [group], feeds, None, opener, lambda _: None, logits=logits)
        root = found.found[group].turned(np.eye(20))  # Lᵀ
        weights = root.T @ root  # G
        shares.append(float(ones @ weights @ ones / np.trace(weights)))
    assert shares[1] < 0.5 * shares[0]


def test_statistics_know_what_they_are_of(prefill: list[Feed], tmp_path: Path) -> None:
    file = tmp_path / "stats.npz"
    given: dict[str, Any] = {"bench": False, "simplify": False, "keep": 0.8}
    compress(decoder_model(), data=prefill, metric="kl", save_stats=file, **given)
    same, other = (
        compress(decoder_model(), data=prefill, metric=metric, load_stats=file, **given)
        for metric in ("kl", None)
    )
    said = f"{file}: damage in it is of something else than metric=… says"
    assert said not in same.report.notes
    assert said in other.report.notes


def test_a_value_inside_is_no_row_of_classes(prefill: list[Feed]) -> None:
    """It counts as an output, but not where shares of classes are compared."""
    reports = [
        compress(
            decoder_model(), keep=0.85, data=prefill, metric="kl", bench=False, simplify=False,
            judge_at=at,
        ).report
        for at in ((), ("norm",))
    ]  # fmt: skip
    for report in reports:
        assert report.goal is not None
        assert report.judged is not None
        assert report.goal.achieved_damage == pytest.approx(report.judged.loss)
    assert [layer.rank for layer in reports[0].layers] == [
        layer.rank for layer in reports[1].layers
    ]


def test_a_pointer_into_the_tokens_has_its_mask_among_the_classes() -> None:
    rng = np.random.default_rng(0)
    model = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[batch, 8, 12] x, int64[batch, 8] attention_mask) => (float[batch, 8] y) {
            h = MatMul(x, V)
            s = MatMul(h, w)
            last = Constant<value = int64[1] {2}>()
            y = Squeeze(s, last)
        }""",
        {"V": known_rank(12, 12, 8, rng), "w": rng.normal(size=(12, 1)).astype("f4")},
    )
    feeds = []
    for _ in range(24):
        mask = np.ones((1, 8), np.int64)
        mask[:, 6:] = 0
        x = rng.normal(size=(1, 8, 12)).astype("f4")
        feeds.append({"x": x, "attention_mask": mask, "labels": np.array([1])})
    data = [{name: feed[name] for name in ("x", "attention_mask")} for feed in feeds]
    options: dict[str, Any] = {"rank": 4, "data": data, "bench": False, "simplify": False}
    result = compress(model, metric="kl", min_gain=-1, heal=8, **options)
    assert result.report.judged is not None
    original, found = logits_of(model, data), logits_of(result.model, data)
    p, q = (log_softmax(np.concatenate(array).astype(np.float64), axis=-1) for array in (
        original[-16:], found[-16:]
    ))  # fmt: skip
    assert np.isfinite(result.report.judged.loss)
    assert (np.exp(p) * (p - q)).sum(axis=-1).mean() > 0.0


def logits_of(model: onnx.ModelProto | ir.Model, feeds: Sequence[Feed]) -> list[Array]:
    proto = model if isinstance(model, onnx.ModelProto) else ir.to_proto(model)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = {given.name for given in session.get_inputs()}
    return [session.run(None, {k: v for k, v in feed.items() if k in names})[0] for feed in feeds]
