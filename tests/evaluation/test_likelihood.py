"""kl and perplexity: against the plain formula, with masks, labels and next tokens."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from scipy.special import log_softmax

from onnx_lowrank.errors import InputError
from onnx_lowrank.evaluation.likelihood import next_tokens
from onnx_lowrank.evaluation.metrics import Metric
from onnx_lowrank.evaluation.reading import Reading
from onnx_lowrank.numerics.arrays import Array

KL, PERPLEXITY = Metric.parse("kl"), Metric.parse("perplexity")
LOGITS = Reading(classifiers=frozenset({"y"}), masked=frozenset({"y"}))


def rows(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return (3.0 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def plain_kl(before: Array, after: Array) -> Array:
    p, q = (log_softmax(array.astype(np.float64), axis=-1) for array in (before, after))
    return np.asarray((np.exp(p) * (p - q)).sum(axis=-1))


def test_divergence_is_the_mean_over_samples_of_the_means_over_rows() -> None:
    before = [rows(1, 5, 7), rows(1, 2, 7, seed=1)]
    after = [rows(1, 5, 7, seed=2), rows(1, 2, 7, seed=3)]
    meter = KL.meter(LOGITS)
    for one, other in zip(before, after, strict=True):
        meter.add({"y": other}, {"y": one})
    each = [plain_kl(one, other).mean() for one, other in zip(before, after, strict=True)]
    judged = meter.result()
    assert judged.loss == judged.after == pytest.approx(np.mean(each), rel=1e-6)
    assert judged.before == 0.0
    assert judged.standard_error == pytest.approx(np.std(each, ddof=1) / math.sqrt(2))
    assert not KL.higher_is_better


def test_padding_counts_nowhere() -> None:
    before, after = rows(2, 3, 7), rows(2, 3, 7, seed=1)
    keep = np.array([[True, True, False], [True, False, False]])
    wrong = after.copy()
    wrong[~keep] = 99.0
    figures = []
    for found in (after, wrong):
        meter = KL.meter(LOGITS)
        meter.add({"y": found}, {"y": before}, None, keep)
        figures.append(meter.result().loss)
    assert figures[0] == figures[1] == pytest.approx(plain_kl(before, after)[keep].mean())


def test_shares_are_read_as_shares() -> None:
    before, after = rows(4, 5), rows(4, 5, seed=1)
    shares = [np.exp(log_softmax(array, axis=-1)) for array in (after, before)]
    assert KL.evaluate([{"y": shares[0]}], [{"y": shares[1]}], reading=LOGITS) == pytest.approx(
        plain_kl(before, after).mean(), rel=1e-5
    )


def test_perplexity_of_labels_is_exp_of_the_mean_surprise() -> None:
    before, after = rows(1, 6, 9), rows(1, 6, 9, seed=1)
    labels = np.array([[3, 1, -1, 8, 0, -1]])
    judged_rows = labels[0] >= 0
    expected = [
        math.exp(
            -log_softmax(array[0].astype(np.float64), axis=-1)[judged_rows][
                np.arange(4), labels[0][judged_rows]
            ].mean()
        )
        for array in (before, after)
    ]
    meter = PERPLEXITY.meter(LOGITS)
    meter.add({"y": after}, {"y": before}, labels)
    judged = meter.result()
    assert [judged.before, judged.after] == pytest.approx(expected, rel=1e-6)
    assert judged.loss == pytest.approx(expected[1] / expected[0] - 1.0)
    assert judged.standard_error is None  # one sample does not tell


def test_standard_error_of_a_perplexity_is_what_other_samples_show() -> None:
    rng = np.random.default_rng(0)

    def drawn(count: int) -> tuple[float, float]:
        meter = PERPLEXITY.meter(LOGITS)
        for _ in range(count):
            size = int(rng.integers(2, 9))
            before = rng.standard_normal((1, size, 4))
            after = before + 0.3 * rng.standard_normal(before.shape)
            meter.add({"y": after}, {"y": before}, rng.integers(0, 4, (1, size)))
        judged = meter.result()
        assert judged.standard_error is not None
        return judged.loss, judged.standard_error

    found = np.array([drawn(40) for _ in range(60)])
    assert 0.7 < found[:, 0].std() / found[:, 1].mean() < 1.4


def test_the_labels_are_the_next_tokens() -> None:
    feed = {
        "input_ids": np.array([[5, 6, 7, 8], [1, 2, 3, 9]]),
        "attention_mask": np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]),  # a cache of two
        "position_ids": np.arange(8).reshape(2, 4),
    }
    labels = PERPLEXITY.labels(feed, None, "attention_mask")
    assert labels is not None
    assert labels.tolist() == [[6, 7, 8, -1], [2, 3, -1, -1]]
    given = np.zeros((2, 4))
    assert PERPLEXITY.labels(feed, given, None) is given
    assert KL.labels(feed, None, None) is None


def test_one_input_of_whole_numbers_is_the_tokens_whatever_its_name() -> None:
    feed: dict[str, Array] = {"words": np.array([[4, 5]]), "x": np.zeros((1, 2), np.float32)}
    assert next_tokens(feed, None, "metric").tolist() == [[5, -1]]
    with pytest.raises(InputError, match=r"expected labels, or one input of token ids .* got x"):
        next_tokens({"x": feed["x"]}, None, "metric")
    with pytest.raises(InputError, match=r"got words .*, others"):
        next_tokens({**feed, "others": feed["words"]}, None, "metric")


@pytest.mark.parametrize("metric", [KL, PERPLEXITY])
def test_nan_is_no_small_loss(metric: Metric) -> None:
    before = rows(1, 2, 5)
    after = before.copy()
    after[0, 1, 2] = np.nan
    meter = metric.meter(LOGITS)
    meter.add({"y": after}, {"y": before}, np.array([[1, 2]]))
    assert meter.result().loss == math.inf


@pytest.mark.parametrize("metric", [KL, PERPLEXITY])
def test_what_is_no_row_of_classes_is_named(metric: Metric) -> None:
    outputs = {"a": np.zeros((1, 3), np.float32), "b": np.zeros((1, 3), np.float32)}
    with pytest.raises(InputError, match=r"sample 0: expected one output .rows, classes."):
        metric.meter().add(outputs, outputs, np.zeros((1,)))
    with pytest.raises(InputError, match=r"output 'y': expected shape \[1, 3\], got shape"):
        metric.meter().add({"y": np.zeros((1, 4))}, {"y": np.zeros((1, 3))}, np.zeros((1,)))


def test_an_only_output_is_taken_for_classes_and_said() -> None:
    meter = KL.meter()
    meter.add({"y": rows(1, 3)}, {"y": rows(1, 3)})
    assert any("taken for a classifier's" in note for note in meter.notes)
    assert meter.result().loss == 0.0


def test_no_rows_that_count() -> None:
    meter = PERPLEXITY.meter(LOGITS)
    meter.add({"y": rows(1, 1, 5)}, {"y": rows(1, 1, 5)}, np.array([[-1]]))
    with pytest.raises(InputError, match="expected rows with labels, got none"):
        meter.result()


def test_an_original_that_rules_the_right_class_out_cannot_be_judged() -> None:
    before, after = rows(1, 2, 5), rows(1, 2, 5, seed=1)
    before[0, 0, 1] = -np.inf
    meter = PERPLEXITY.meter(LOGITS)
    meter.add({"y": after}, {"y": before}, np.array([[2, 2]]))
    assert math.isfinite(meter.result().loss)
    other = PERPLEXITY.meter(LOGITS)
    other.add({"y": after}, {"y": before}, np.array([[1, 2]]))
    with pytest.raises(InputError, match=r"its perplexity is infinite"):
        other.result()


def test_the_tokens_of_a_decoder_come_before_those_of_its_encoder() -> None:
    feed = {
        "input_ids": np.array([[5, 6, 7, 8]]),
        "attention_mask": np.array([[1, 1, 0, 0]]),
        "decoder_input_ids": np.array([[0, 1, 2, 3]]),
    }
    assert next_tokens(feed, "attention_mask", "metric").tolist() == [[1, 2, 3, -1]]
    feed["decoder_attention_mask"] = np.array([[1, 1, 1, 0]])
    assert next_tokens(feed, "attention_mask", "metric").tolist() == [[1, 2, -1, -1]]


def test_a_mask_over_the_classes_takes_no_rows_apart() -> None:
    """Scores of positions: the last axis is the mask's own."""
    reading = Reading(classifiers=frozenset({"y"}), masked=frozenset({"y"}))
    before, after = rows(2, 6), rows(2, 6, seed=1)
    keep = np.array([[True] * 6, [True] * 3 + [False] * 3])
    meter = KL.meter(reading)
    meter.add({"y": after}, {"y": before}, None, keep)
    assert meter.result().loss == pytest.approx(plain_kl(before, after).mean())
    other = PERPLEXITY.meter(reading)
    other.add({"y": after}, {"y": before}, np.array([1, 2]), keep)
    assert math.isfinite(other.result().loss)
