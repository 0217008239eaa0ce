"""Runs that are fitted to samples: which ones, what they say, what comes of it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxruntime.quantization import CalibrationDataReader

from onnx_lowrank import (
    InputError,
    Result,
    UsageError,
    compress,
)
from onnx_lowrank.fitting.gather import gather
from onnx_lowrank.numerics.arrays import Feed
from tests.helpers.calibrated import (
    narrow,
    texts,
)
from tests.helpers.models import (
    distance,
    factored,
    run_ort,
    uniform,
)
from tests.helpers.places import CACHE

MINILM = CACHE / "minilm-l6.onnx"


def judged(result: Result, before: onnx.ModelProto, feeds: Sequence[Feed]) -> float:
    after = ir.to_proto(result.model)
    return float(
        np.mean([distance(run_ort(after, f)["y"], run_ort(before, f)["y"]) for f in feeds])
    )


def test_a_calibrated_result_is_closer(linear: onnx.ModelProto, rng: np.random.Generator) -> None:
    feeds, others = narrow(rng, 20), narrow(rng, 4)
    plain = factored(linear, rank=6)
    fitted = factored(linear, rank=6, calibration=feeds)
    assert judged(fitted, linear, others) < 0.1 * judged(plain, linear, others)
    (layer,) = fitted.report.layers
    assert layer.output_error == pytest.approx(judged(fitted, linear, others), rel=0.3)


def test_the_report_says_what_the_energy_is(
    linear: onnx.ModelProto, rng: np.random.Generator
) -> None:
    result = factored(linear, energy=0.99, rank_multiple=1, calibration=narrow(rng, 20))
    (layer,) = result.report.layers
    assert layer.energy_of == "output"
    assert layer.rank is not None
    assert layer.rank <= 5
    assert layer.energy is not None
    assert layer.energy >= 0.99
    assert layer.predicted_error == pytest.approx(np.sqrt(1 - layer.energy))
    assert layer.output_error == pytest.approx(layer.predicted_error, rel=0.3)
    made = result.report.calibration
    assert made is not None
    assert (made.data, made.samples, made.held_out) == ("a list of feeds", 15, 5)
    assert (made.mask, made.layers, made.missing) == (None, 1, {})
    assert result.report.to_dict()["calibration"]["samples"] == 15
    plain = factored(linear, energy=0.99, rank_multiple=1)
    (layer,) = plain.report.layers
    assert (layer.energy_of, layer.predicted_error, plain.report.calibration) == (
        "weight",
        None,
        None,
    )


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: Sequence[Feed]) -> None:
        self.feeds = iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self.feeds, None)


def written(folder: Path, feeds: Sequence[Feed]) -> Path:
    folder.mkdir()
    for index, feed in enumerate(feeds):
        np.savez(folder / f"{index:03}.npz", allow_pickle=False, **feed)
    return folder


def test_every_kind_of_source_gives_the_same(
    linear: onnx.ModelProto,
    rng: np.random.Generator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    feeds = narrow(rng, 8, rows=1)
    folder = written(tmp_path / "feeds", feeds)
    stack = tmp_path / "stack.npz"
    np.savez(stack, x=np.concatenate([feed["x"] for feed in feeds]))
    code = (
        "import numpy as np\nfrom pathlib import Path\n"
        f"def feeds():\n    for p in sorted(Path({str(folder)!r}).glob('*.npz')):\n"
        "        yield dict(np.load(p))\n"
    )
    (tmp_path / "calibration_feeds.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    sources: list[Any] = [
        feeds,
        folder,
        str(stack),
        iter(feeds),
        (feed for feed in feeds),
        Reader(feeds),
        f"{tmp_path}/calibration_feeds.py:feeds",
        "calibration_feeds:feeds",
    ]
    results = [factored(linear, rank=3, dims={"N": 1}, calibration=source) for source in sources]
    sys.modules.pop("calibration_feeds", None)
    assert sys.path == before
    for result in results:
        made = result.report.calibration
        assert made is not None
        assert (made.samples, made.held_out) == (6, 2)
        for name, value in results[0].model.graph.initializers.items():
            other = result.model.graph.initializers[name].const_value
            assert value.const_value is not None
            assert other is not None
            np.testing.assert_array_equal(value.const_value.numpy(), other.numpy())


CODE = """
import numpy as np
def late():
    yield {"x": np.zeros((1, 32), np.float32)}
    raise ValueError("two\\nlines")
def early(): raise KeyError("gone")
def leaves(): raise SystemExit(3)
def number(): return 5
def nothing(): return []
def one(): return {"x": np.zeros((1, 32), np.float32)}
def wrong(): return [{"z": np.zeros((1, 32), np.float32)}]
def wide(): return [{"x": np.zeros((1, 33), np.float32)}]
def text(): return [{"x": np.array([["a"]])}]
several = []
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("late", "ValueError: two lines$"),
        ("early", "KeyError: 'gone'$"),
        ("leaves", "SystemExit: 3$"),
        ("number", "expected an iterable of feeds or a CalibrationDataReader, got int"),
        ("nothing", "expected at least one sample, got none"),
        ("one", "expected a mapping from input names to arrays, or .* for x, got str"),
        ("wrong", r"sample 0: expected arrays \[x\], got \[z\]"),
        ("wide", r"sample 0: input 'x': axis 1 is fixed to 32 in the model, got 33"),
        ("text", "sample 0: input 'x': expected float32, got <U1"),
        ("several", "TypeError: 'list' object is not callable"),
        ("absent", "AttributeError: .* has no attribute 'absent'"),
    ],
)
def test_what_a_callable_does_wrong_is_one_line(
    name: str, message: str, linear: onnx.ModelProto, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(CODE)
    with pytest.raises(InputError, match=message) as caught:
        factored(linear, rank=3, calibration=f"{tmp_path}/own.py:{name}")
    assert "\n" not in str(caught.value)
    assert "own.py" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent.py:feeds", "no such file absent.py"),
        ("no.such.module:feeds", "ModuleNotFoundError: No module named 'no'"),
        ("absent.npz", "calibration='absent.npz': no such file or folder"),
    ],
)
def test_sources_that_are_not_there(source: str, message: str, linear: onnx.ModelProto) -> None:
    with pytest.raises(InputError, match=message):
        factored(linear, rank=3, calibration=source)


# --- which samples calibrate, which judge


def seen(model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """The report, and the first element of each sample that was fitted to, and that judged."""
    parts: list[list[float]] = []

    def spy(*arguments: Any, **options: Any) -> Any:
        parts.extend([float(feed["x"].flat[0]) for feed in part] for part in arguments[3:5])
        return gather(*arguments, **options)

    monkeypatch.setattr("onnx_lowrank.compression.calibrated.gather", spy)
    report = factored(model, rank=3, dims={"N": 1}, effort="quick", **options).report
    return report, parts


@pytest.fixture
def numbered(tmp_path: Path, rng: np.random.Generator) -> Path:
    x = uniform((40, 32), rng)
    x[:, 0] = np.arange(40)
    np.savez(tmp_path / "data.npz", x=x)
    return tmp_path / "data.npz"


def test_data_alone_serve_both(
    linear: onnx.ModelProto, numbered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, (fit, held) = seen(linear, monkeypatch, data=numbered, samples=8)
    assert (len(fit), len(held)) == (32, 8)
    assert not set(fit) & set(held)
    assert any("32 samples calibrate, 8 others judge" in note for note in report.notes)
    again = seen(linear, monkeypatch, data=numbered, samples=8)[1]
    assert again == [fit, held]


def test_the_same_file_twice_is_split(
    linear: onnx.ModelProto, numbered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(numbered.parent)
    _, (fit, held) = seen(linear, monkeypatch, data=numbered, calibration="data.npz")
    assert not set(fit) & set(held)
    assert len(fit) + len(held) == 40


def test_calibrate_alone_is_split(
    linear: onnx.ModelProto, numbered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (fit, held) = seen(linear, monkeypatch, calibration=numbered, calibration_samples=10)
    assert not set(fit) & set(held)
    assert len(fit) == 10


def test_both_are_taken_as_they_are(
    linear: onnx.ModelProto,
    numbered: Path,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    feeds = [{"x": np.full((1, 32), -number, np.float32)} for number in range(1, 6)]
    report, (fit, held) = seen(linear, monkeypatch, data=numbered, calibration=feeds, samples=4)
    assert fit == [-1, -2, -3, -4, -5]
    assert len(held) == 4
    assert min(held) >= 0
    assert report.calibration.data == "a list of feeds"


def test_one_sample(linear: onnx.ModelProto, tmp_path: Path, rng: np.random.Generator) -> None:
    np.savez(tmp_path / "one.npz", x=uniform((1, 32), rng))
    options: dict[str, Any] = {"rank": 3, "dims": {"N": 1}}
    report = factored(linear, data=tmp_path / "one.npz", **options).report
    assert report.calibration is None
    assert any("the sample judges" in note for note in report.notes)
    report = factored(linear, calibration=tmp_path / "one.npz", **options).report
    assert report.calibration is not None
    assert any("the check is too optimistic" in note for note in report.notes)


def test_no_calibrate(linear: onnx.ModelProto, numbered: Path) -> None:
    report = factored(linear, rank=3, dims={"N": 1}, data=numbered, calibrate=False).report
    assert report.calibration is None
    with pytest.raises(UsageError, match="exclude each other"):
        factored(linear, calibration=numbered, calibrate=False)


def test_lengths_may_differ(shared: onnx.ModelProto, rng: np.random.Generator) -> None:
    result = factored(shared, rank=2, calibration=texts(rng, 12), check=True)
    made = result.report.calibration
    assert made is not None
    assert (made.layers, made.mask) == (4, "attention_mask")
    assert any("'attention_mask' is 0 are left out" in note for note in result.report.notes)


# --- a real model


@pytest.mark.slow
@pytest.mark.skipif(not MINILM.exists(), reason="models/cache/minilm-l6.onnx is not there")
def test_a_sentence_encoder_keeps_its_meaning() -> None:
    options: dict[str, Any] = {
        "keep": 0.8,
        "uniform": True,  # ranks chosen by measured damage would hide the difference
        "data": MINILM.with_suffix(".data.npz"),
        "samples": 64,
        "bench": False,
    }
    fitted, plain = (compress(MINILM, calibrate=value, **options).report for value in (True, False))
    assert fitted.totals == dataclasses.replace(plain.totals)
    cosines = [r.check.providers[0].outputs[0].cosine or 0 for r in (fitted, plain) if r.check]
    assert cosines[0] >= 0.85
    assert cosines[1] < 0.75
    ratios = [
        layer.output_error / layer.predicted_error
        for layer in fitted.layers
        if layer.output_error is not None and layer.predicted_error is not None
    ]
    assert len(ratios) == 36
    assert 0.7 < np.median(ratios) < 1.5, ratios  # single layers are further off
