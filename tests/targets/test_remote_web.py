"""onnxruntime-web in Node and in a browser."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest

from onnx_lowrank.errors import InputError, UsageError
from onnx_lowrank.targets import all_offers, open_target
from onnx_lowrank.targets.base import Job
from tests.helpers.models import (
    distance,
    linear_model,
    parse,
    run_ort,
    uniform,
)
from tests.helpers.remote import (
    assert_outputs,
    feeds_for,
    silent,
    two_models,
)

OFFERS = {offer.name: offer for offer in all_offers()}
web = pytest.mark.web


def needs(name: str) -> pytest.MarkDecorator:
    offer = OFFERS[name]
    return pytest.mark.skipif(not offer.usable, reason=f"{name}: {offer.found}")


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders go; the tests look whether anything stays."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def run(name: str, models: list[Path], feeds: Any, job: Job | None = None) -> Any:
    return open_target(name).run(models, feeds, job or Job(threads=1), silent)


@web
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("web", marks=needs("web")),
        pytest.param("web-chromium", marks=needs("web-chromium")),
    ],
)
def test_wasm(
    name: str, tmp_path: Path, temporary: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    models, feeds = two_models(tmp_path), feeds_for()
    apart, broken = tmp_path / "apart.onnx", tmp_path / "broken.onnx"
    onnx.save(
        onnx.load(models[0]), apart, save_as_external_data=True, location="w", size_threshold=0
    )
    broken.write_bytes(b"not a model")
    done: list[int] = []
    target = open_target(name)
    assert not target.emulated
    job = Job(iterations=5, threads=1)
    *outcomes, bad = target.run([*models, apart, broken], feeds, job, done.append)
    assert_outputs(tuple(outcomes), [*models, apart], feeds)
    assert sum(done) == 3 * len(feeds) + 5
    for outcome in outcomes:
        assert len(outcome.times_ns) == 5
        assert all(time >= 0 for time in outcome.times_ns)
        assert outcome.load_ns is not None
        assert outcome.first_ns is not None
        assert (outcome.peak_bytes is not None) == (name == "web")
        assert outcome.nodes is not None
        assert outcome.nodes["CPUExecutionProvider"][0] == "fc"
        assert outcome.half is False
    assert capfd.readouterr() == ("", "")
    assert bad.error is not None
    assert bad.nodes is None
    assert bad.times_ns == ()
    assert not any(temporary.iterdir())


@web
@needs("web")
def test_types_and_threads_in_node(tmp_path: Path) -> None:
    path = tmp_path / "types.onnx"
    model = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        g (int64[N] i, bool[N] b, float16[N] h, double[N] d, uint8[N] u, string[N] s)
        => (int64[N] io, bool[N] bo, float16[N] ho, double[N] do, uint8[N] uo, string[N] so) {
            io = Add(i, i)
            bo = Not(b)
            ho = Add(h, h)
            do = Add(d, d)
            uo = Identity(u)
            so = Identity(s)
        }"""
    )
    onnx.save(model, path)
    feed = {
        "i": np.array([1, -(2**40)]),
        "b": np.array([True, False]),
        "h": np.array([0.5, -3], np.float16),
        "d": np.array([1e-200, 2]),
        "u": np.array([0, 255], np.uint8),
        "s": np.array(["ä", ""], dtype=object),
    }
    (outcome,) = run("web", [path], [feed], Job(threads=2))
    assert outcome.error is None
    for name, expected in run_ort(model, feed).items():
        found = outcome.outputs[0][name]
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


@web
@needs("web")
def test_errors_in_node(tmp_path: Path, temporary: Path) -> None:
    models = two_models(tmp_path)
    with pytest.raises(InputError, match="input 'x': onnxruntime-web has no bfloat16"):
        run("web", models, [{"x": np.ones((1, 16), ml_dtypes.bfloat16)}])
    with pytest.raises(InputError, match="not done within 2 s"):
        run("web", models, feeds_for(), Job(iterations=10**9, seconds=2))
    (outcome,) = run("web", models[:1], [{"other": np.ones((1, 16), np.float32)}])
    assert "x" in str(outcome.error)

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_target("web").run(models, feeds_for(), Job(), interrupt)
    assert not any(temporary.iterdir())


@web
@needs("web-webgpu")
def test_webgpu_in_software(tmp_path: Path, temporary: Path) -> None:
    """Outputs and nodes but no times; what WebGPU does not take is named, or an error."""
    rng = np.random.default_rng(4)
    paths = [tmp_path / "all.onnx", tmp_path / "part.onnx"]
    weight = uniform((16, 4), rng)
    onnx.save(linear_model(weight, bias=uniform((4,), rng)), paths[0])
    part = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 16] x) => (int64[2, K] y) {
            p = MatMul(x, W)
            y = NonZero(p)
        }""",
        {"W": weight},
    )
    part.graph.node[0].name, part.graph.node[1].name = "product", "where"
    onnx.save(part, paths[1])
    feeds = feeds_for(samples=1)
    target = open_target("web-webgpu")
    assert target.emulated
    taken, partly = target.run(paths, feeds, Job(iterations=3), silent)
    assert distance(taken.outputs[0]["y"], run_ort(onnx.load(paths[0]), feeds[0])["y"]) < 1e-5
    assert list(taken.nodes or {}) == [target.own] == ["WebGpuExecutionProvider"]
    assert partly.nodes is not None
    assert "product" in partly.nodes["WebGpuExecutionProvider"]
    assert "where" in partly.nodes["CPUExecutionProvider"]
    for outcome in (taken, partly):
        assert outcome.error is None
        assert outcome.times_ns == ()
        assert outcome.load_ns is outcome.first_ns is None
        assert any("swiftshader" in note for note in outcome.notes)
    (strict,) = target.run(paths[1:], feeds, Job(strict=True), silent)
    assert "fallback to CPU EP has been explicitly disabled" in str(strict.error)
    assert not any(temporary.iterdir())


@web
@needs("web-chromium")
def test_errors_in_a_browser(
    tmp_path: Path,
    temporary: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    models = two_models(tmp_path)

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_target("web-chromium").run(models, feeds_for(), Job(), interrupt)
    with pytest.raises(InputError, match="not done within 6 s"):
        run("web-chromium", models, feeds_for(), Job(iterations=10**9, seconds=6))
    browser = tmp_path / "browser"
    browser.write_text("#!/bin/sh\necho no display >&2\nexit 7\n")
    browser.chmod(0o755)
    monkeypatch.setenv("ONNX_LOWRANK_BROWSER", str(browser))
    with pytest.raises(InputError, match="the browser ended with status 7: no display"):
        run("web-chromium", models, feeds_for())
    assert capfd.readouterr() == ("", "")
    assert not any(temporary.iterdir())


def test_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNX_LOWRANK_WEB", str(tmp_path))
    monkeypatch.setenv("ONNX_LOWRANK_BROWSER", "no-such-browser")
    monkeypatch.setattr(
        "onnx_lowrank.targets.web.packages", lambda *names: f"apt-get install {' '.join(names)}"
    )
    with pytest.raises(InputError, match=r"no onnxruntime-web in .*; .*providers --install web"):
        open_target("web")
    with pytest.raises(InputError, match=r"no chromium on the PATH and .*apt-get install chromium"):
        open_target("web-webgpu")
    with pytest.raises(UsageError, match="web takes no options"):
        open_target("web?threads=1")
