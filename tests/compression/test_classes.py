"""Goals with kl and perplexity, on a decoder with a cache: first steps and later ones together."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnx_lowrank import compress
from onnx_lowrank.errors import InputError, UsageError
from onnx_lowrank.evaluation.metrics import Metric
from onnx_lowrank.evaluation.reading import Reading
from onnx_lowrank.numerics.arrays import Feed
from tests.helpers.decoder import decoder_feeds, decoder_model


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
