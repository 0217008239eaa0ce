"""The decoder of models/llama.py, small: with a cache, grouped queries and a tied head."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnx_lowrank import Result, compress
from onnx_lowrank.numerics.arrays import Feed
from tests.helpers.places import ROOT

torch = pytest.importorskip("torch")
sys.path.append(str(ROOT / "models"))

import llama  # noqa: E402

SIZES = llama.Sizes(layers=2, width=64, heads=4, shared=2, inner=96, words=160)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Without a cache, and with one."""
    torch.manual_seed(0)
    decoder = llama.Decoder(SIZES).eval()
    with torch.no_grad():
        for name, weight in decoder.named_parameters():
            if weight.dim() == 2 and "words" not in name:
                u, _, vt = torch.linalg.svd(torch.randn(*weight.shape), full_matrices=False)
                weight.copy_(3.0 * u @ torch.diag(torch.exp(-torch.arange(u.shape[1]) / 12.0)) @ vt)
    folder = tmp_path_factory.mktemp("decoder")
    found = {}
    for cache in (False, True):
        found[cache] = folder / f"decoder-{cache}.onnx"
        llama.export(decoder, found[cache], cache)
    return found


def steps(path: Path | bytes, ids: Any, lengths: list[int]) -> tuple[list[Feed], list[Feed]]:
    """Tokens in steps of some lengths: the inputs and the outputs of each."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names, past, start = [own.name for own in session.get_outputs()], None, 0
    feeds, outputs = list[Feed](), list[Feed]()
    for length in lengths:
        feeds.append(llama.step(ids[:, start : start + length], past, SIZES))
        past = dict(zip(names, session.run(None, feeds[-1]), strict=True))
        outputs.append(past)
        start += length
    return feeds, outputs


def test_steps_give_what_the_whole_gives(exported: dict[bool, Path]) -> None:
    ids = np.random.default_rng(0).integers(0, SIZES.words, (2, 12))
    session = ort.InferenceSession(exported[False], providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"input_ids": ids})
    _, outputs = steps(exported[True], ids, [7, 1, 1, 3])
    found = np.concatenate([own["logits"] for own in outputs], axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    names = [value.name for value in onnx.load(exported[True]).graph.input]
    assert names[:3] == ["input_ids", "attention_mask", "past_key_values.0.key"]


def texts(path: Path, count: int, first: int) -> list[Feed]:
    """First steps of so many tokens, and each of the two that follow."""
    rng = np.random.default_rng(1)
    found = []
    for _ in range(count):
        ids = rng.integers(0, SIZES.words, (1, first + 2))
        found += steps(path, ids, [first, 1, 1])[0]
    return found


@pytest.fixture(scope="module")
def mixed(exported: dict[bool, Path]) -> list[Feed]:
    return texts(exported[True], 20, 9)


def compressed(path: Path, feeds: list[Feed], **more: Any) -> Result:
    return compress(path, data=feeds, bench=False, simplify=False, **{"keep": 0.75, **more})


def drift(before: Path, after: Result, lengths: list[int]) -> float:
    """Mean divergence of the classes over sequences of the model's own, run in steps."""
    model = ir.to_proto(after.model).SerializeToString()
    rng, found = np.random.default_rng(7), []
    for _ in range(6):
        ids = rng.integers(0, SIZES.words, (1, sum(lengths)))
        both = [steps(own, ids, lengths)[1] for own in (before, model)]
        for one, other in zip(*both, strict=True):
            p, q = (torch.tensor(own["logits"]).log_softmax(-1).numpy() for own in (one, other))
            found.append((np.exp(p) * (p - q)).sum(-1).mean())
    return float(np.mean(found))


# Enough for healing to gain: of fewer the fit leaves it nothing that holds for others.
@pytest.mark.parametrize(("metric", "count", "first"), [(None, 40, 24), ("kl", 60, 9)])
def test_first_and_later_steps_end_to_end(
    exported: dict[bool, Path], metric: str | None, count: int, first: int
) -> None:
    feeds = texts(exported[True], count, first)
    result = compressed(exported[True], feeds, metric=metric, fisher=True, refit=True, heal=24)
    report = result.report
    assert any(layer.rank is not None for layer in report.layers)
    assert report.calibration is not None
    assert not report.calibration.missing
    assert report.healing is not None
    assert report.healing.best_step > 0
    assert report.healing.error_after < 0.995 * report.healing.error_before
    assert report.check is not None
    assert len(report.check.providers[0].outputs) == 5
    assert not [note for note in report.notes if "without" in note and "Fisher" in note]
    said = (
        "present.0.key, present.0.value and 2 more are a cache: together they count as one output"
    )
    assert any(note.startswith(said) for note in report.notes) == (metric is None)
    assert [v.name for v in result.model.graph.inputs] == [
        v.name for v in ir.load(exported[True]).graph.inputs
    ]
    blind = compressed(exported[True], feeds, uniform=True, calibrate=False)
    apart = [drift(exported[True], own, [5, 1, 1]) for own in (result, blind)]
    assert apart[0] < 0.75 * apart[1], apart


def test_calibration_on_both_kinds_of_steps(exported: dict[bool, Path], mixed: list[Feed]) -> None:
    """Rows of first and of later steps are in the moments of a layer."""
    result = compressed(exported[True], mixed, keep=None, rank=12, calibration_samples=30)
    assert result.report.calibration is not None
    assert result.report.calibration.samples == 30
    assert {feed["input_ids"].shape[1] for feed in mixed} == {9, 1}
    assert result.report.calibration.mask == "attention_mask"


def test_a_cache_does_not_drown_the_logits(exported: dict[bool, Path], mixed: list[Feed]) -> None:
    """Four outputs of a cache and one of logits: their errors count half and half."""
    report = compressed(exported[True], mixed, keep=None, rank=12, metric="relative-l2").report
    assert report.check is not None
    assert report.judged is not None
    errors = {own.name: own.relative_l2 for own in report.check.providers[0].outputs}
    logits = errors.pop("logits")
    assert report.judged.loss == pytest.approx((logits + np.mean(list(errors.values()))) / 2)


def test_gated_units_are_left_out(exported: dict[bool, Path], mixed: list[Feed]) -> None:
    options: dict[str, Any] = {"metric": "kl", "effort": "quick", "keep": 0.7}
    narrow = compressed(exported[True], mixed, ops=("default", "hidden"), **options)
    rows = [layer for layer in narrow.report.layers if layer.form == "hidden"]
    assert [row.parameters_before for row in rows] == [3 * SIZES.width * SIZES.inner] * 2
    assert any(row.rank is not None for row in rows)
    assert narrow.report.totals.linear_parameters_after <= (
        0.7 * narrow.report.totals.linear_parameters_before
    )
    whole, steps_of_one = (drift(exported[True], narrow, own) for own in ([7], [1] * 7))
    assert 0.0 < whole < 1.0
    assert steps_of_one == pytest.approx(whole, rel=1e-3)


def test_a_tied_table_of_integers(exported: dict[bool, Path], mixed: list[Feed]) -> None:
    options: dict[str, Any] = {"keep": None, "energy": 1.0, "effort": "quick", "metric": "kl"}
    result = compressed(exported[True], mixed, weights="8", **options)
    stored = result.model.graph.initializers
    assert "words.weight" not in stored
    (codes,) = (v for name, v in stored.items() if name == "words.weight.codes")
    assert codes.const_value is not None
    assert codes.const_value.nbytes == SIZES.words * SIZES.width
    assert result.report.output.bytes < 0.45 * result.report.input.bytes
    assert 0.0 < drift(exported[True], result, [5, 1, 1]) < 0.01
