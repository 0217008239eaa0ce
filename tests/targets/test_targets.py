"""Execution providers of this machine as targets: what they answer, and what goes wrong."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from onnx_lowrank.errors import InputError, UsageError
from onnx_lowrank.runtime import plugins
from onnx_lowrank.runtime.assignment import assignment, assignment_text
from onnx_lowrank.runtime.plugins import PLUGINS, Plugin
from onnx_lowrank.runtime.providers import (
    CPU,
    Provider,
    built_in,
    resolve_provider,
)
from onnx_lowrank.targets import all_offers, local, open_target
from onnx_lowrank.targets.base import Job, Outcome
from onnx_lowrank.targets.local import EmulatedTarget, LocalTarget
from onnx_lowrank.targets.memory import Peak, measure_peak
from tests.helpers.models import parse
from tests.helpers.targets import (
    EMULATED,
    PLUGIN_PARAMS,
    pair,
    require,
    save,
    two_layers,
)

FEEDS = [{"x": np.full((4, 32), value, np.float32)} for value in (0.5, -1.0)]


def run_one(target: str, path: Path, **job: Any) -> Outcome:
    (outcome,) = open_target(target).run([path], FEEDS, Job(**job), lambda _: None)
    return outcome


def test_cpu_gives_outputs_times_and_memory(tmp_path: Path) -> None:
    before, after = pair(tmp_path)
    steps: list[int] = []
    target = open_target("cpu")
    outcomes = target.run([before, after], FEEDS, Job(iterations=7, threads=1), steps.append)
    for outcome in outcomes:
        assert outcome.error is None
        assert [row["y"].shape for row in outcome.outputs] == [(4, 32)] * 2
        assert len(outcome.times_ns) == 7
        assert min(outcome.times_ns) > 0
        assert outcome.load_ns
        assert outcome.first_ns
        assert outcome.peak_bytes
        assert 10e6 < outcome.peak_bytes < 10e9
        assert outcome.nodes is not None
        assert list(outcome.nodes) == ["CPUExecutionProvider"]
    ratio = outcomes[1].outputs[0]["y"] / outcomes[0].outputs[0]["y"]
    assert np.allclose(ratio, 1.001, rtol=1e-4)
    assert sum(steps) == 2 * 2 + 7
    assert not target.emulated


def test_job_without_outputs_or_times(tmp_path: Path) -> None:
    outcome = run_one("cpu", pair(tmp_path)[0], outputs=False)
    assert (outcome.outputs, outcome.times_ns, outcome.peak_bytes) == ((), (), None)
    assert outcome.first_ns
    with pytest.raises(InputError, match="cpu: expected at least one sample"):
        open_target("cpu").run([tmp_path / "a.onnx"], [], Job(), lambda _: None)


def test_job_that_has_no_time_left(tmp_path: Path) -> None:
    outcome = run_one("cpu", pair(tmp_path)[0], seconds=0.0)
    assert outcome.error == "a.onnx: not done within 0 s"


def test_one_model_fails_and_the_other_runs(tmp_path: Path) -> None:
    good = pair(tmp_path)[0]
    wide = save(two_layers(5), tmp_path / "wide.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"nothing")
    job = Job(iterations=3, threads=1)
    outcomes = open_target("cpu").run([wide, good, broken], FEEDS, job, lambda _: None)
    assert "wide.onnx: ONNX Runtime does not run it" in (outcomes[0].error or "")
    assert outcomes[1].error is None
    assert len(outcomes[1].times_ns) == 3
    assert "does not load it on CPUExecutionProvider" in (outcomes[2].error or "")
    assert not any("\n" in (outcome.error or "") for outcome in outcomes)


@pytest.mark.parametrize("name", PLUGIN_PARAMS)
def test_plugin_takes_all_nodes(name: str, tmp_path: Path) -> None:
    require(name)
    path = pair(tmp_path)[0]
    outcome = run_one(name, path, strict=True, iterations=3)
    assert outcome.error is None
    provider = PLUGINS[name].provider
    assert outcome.nodes is not None
    assert list(outcome.nodes) == [provider]
    assert len(outcome.nodes[provider]) == 3  # the first MatMul and its Add are one
    expected = run_one("cpu", path)
    for found, exact in zip(outcome.outputs, expected.outputs, strict=True):
        assert np.abs(found["y"] - exact["y"]).max() <= 5e-3 * np.abs(exact["y"]).max()
    target = open_target(name)
    assert target.emulated == PLUGINS[name].emulated
    if target.emulated:
        assert (outcome.times_ns, outcome.load_ns, outcome.first_ns) == ((), None, None)
        assert outcome.peak_bytes is None
    else:
        assert len(outcome.times_ns) == 3
        assert outcome.peak_bytes


@pytest.mark.qnn
def test_qnn_context_is_a_repeatable_cost(tmp_path: Path) -> None:
    require("qnn")
    path = save(two_layers(), tmp_path / "m.onnx")
    wide = save(two_layers(hidden=1024), tmp_path / "wide.onnx")
    first, second, larger = (run_one("qnn", p).costs["context_bytes"] for p in (path, path, wide))
    assert first == second
    assert larger > first > 0


@pytest.mark.qnn
def test_session_that_falls_back(tmp_path: Path) -> None:
    require("qnn")
    path = save(two_layers("N"), tmp_path / "dynamic.onnx")
    outcome = run_one("qnn", path)
    assert outcome.error is None
    assert outcome.nodes is not None
    assert list(outcome.nodes) == ["CPUExecutionProvider"]
    assert outcome.costs == {}
    strict = run_one("qnn", path, strict=True)
    assert strict.outputs == ()
    assert "0 of 3 nodes on QNN; left to the CPU: " in (strict.error or "")
    assert "relu (Relu)" in (strict.error or "")


@pytest.mark.webgpu
def test_run_that_raises_after_a_session_was_built(tmp_path: Path) -> None:
    require("webgpu")
    if not PLUGINS["webgpu"].emulated:
        pytest.skip("this GPU may compute float16; SwiftShader does not")
    path = save(two_layers(kind="float16"), tmp_path / "half.onnx")
    feeds = [{"x": np.ones((4, 32), np.float16)}]
    target = open_target("webgpu")
    (outcome,) = target.run([path], feeds, Job(strict=True), lambda _: None)
    assert "half.onnx: ONNX Runtime does not run it" in (outcome.error or "")
    assert outcome.nodes is not None
    assert list(outcome.nodes) == ["WebGpuExecutionProvider"]
    assert outcome.outputs == ()


# A provider that answers wrongly, whatever is installed


@pytest.fixture
def other() -> LocalTarget:
    """The CPU under another name: everything is judged as for a provider that is not the CPU."""
    return LocalTarget("other", Provider("cpu", CPU.full, "Other"))


def nan_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    from onnx_lowrank.runtime import session as runtime

    real, seen = runtime.run, [0]

    def run(session: Any, feeds: Any, what: str) -> dict[str, Any]:
        seen[0] += 1
        outputs = real(session, feeds, what)
        if seen[0] == calls:
            outputs["y"][0, :3] = np.nan
        return outputs

    monkeypatch.setattr(runtime, "run", run)


def test_nan_where_the_cpu_gives_numbers(
    other: LocalTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pair(tmp_path)[0]
    nan_after(monkeypatch, 2)
    (outcome,) = other.run([path], FEEDS, Job(), lambda _: None)
    assert outcome.error == (
        "a.onnx: CPUExecutionProvider runs it and gives NaN or Inf in 3 of 128 values of output "
        "'y', where the CPU gives numbers"
    )
    assert outcome.outputs == ()


def test_nan_that_the_model_itself_gives_is_no_error(other: LocalTarget, tmp_path: Path) -> None:
    model = parse(
        '<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) { y = Log(x) }'
    )
    path = save(model, tmp_path / "log.onnx")
    feeds = [{"x": np.array([-1, 1], np.float32)}]
    (outcome,) = other.run([path], feeds, Job(), lambda _: None)
    assert outcome.error is None
    assert np.isnan(outcome.outputs[0]["y"]).tolist() == [True, False]


def test_provider_that_crashes_does_not_take_us_along(
    other: LocalTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnx_lowrank.targets import memory

    crash = Peak(crash="the process crashed with SIGSEGV")
    monkeypatch.setattr(memory, "measure_peak", lambda *_: crash)
    (outcome,) = other.run([pair(tmp_path)[0]], FEEDS, Job(), lambda _: None)
    assert outcome.error == "a.onnx: the process crashed with SIGSEGV on CPUExecutionProvider"


def test_peak_memory_grows_with_the_model_and_reports_crashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = save(two_layers(), tmp_path / "small.onnx")
    large = save(two_layers(hidden=200_000), tmp_path / "large.onnx")  # 51 MB of weights
    peaks = [measure_peak(path, "cpu", FEEDS[0], 1).bytes for path in (small, large)]
    assert peaks[0]
    assert peaks[1]
    assert peaks[1] - peaks[0] > 40e6
    assert measure_peak(tmp_path / "missing.onnx", "cpu", FEEDS[0], 1) == Peak()
    late = measure_peak(small, "cpu", FEEDS[0], 1, seconds=0.001)
    assert late.crash == "loading and running it once took longer than 0.001 s"
    killer = tmp_path / "python"
    killer.write_text("#!/bin/sh\nkill -SEGV $$\n")
    killer.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(killer))
    assert measure_peak(small, "cpu", FEEDS[0], 1).crash == "the process crashed with SIGSEGV"


# Names, and plugins that are not as they should be


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is registered; what the test registers is forgotten."""
    monkeypatch.setattr(plugins, "registered", set())


@pytest.mark.parametrize(
    "name", ["ssh://board", "ssh://me@board?ep=qnn", "ssh:board", "adb:1?colour=red"]
)
def test_the_kind_of_a_name_decides_before_a_provider_is_loaded(name: str, tmp_path: Path) -> None:
    """A remote target needs no execution provider of this machine, so none is loaded for it."""
    for program in ("ssh", "adb"):
        (tmp_path / program).touch(mode=0o755)
    code = (
        "import sys\n"
        "from onnx_lowrank.errors import LowRankError\n"
        "from onnx_lowrank.targets import open_target\n"
        "try:\n    open_target(sys.argv[1])\n"
        "except LowRankError as error:\n    assert 'no such target' not in str(error)\n"
        "print([name for name in sys.modules if name.startswith('onnxruntime')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, name],
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_no_provider_is_asked_for_a_remote_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(local, "create", asked.append)
    with pytest.raises(UsageError, match=r"expected ssh://"):
        open_target("ssh:board")
    assert not asked
    with pytest.raises(InputError, match="no such target"):
        open_target("warp9")
    assert asked == ["warp9"]


def test_unknown_target() -> None:
    with pytest.raises(InputError, match=r"targets='warp9': no such target; expected .*cpu, "):
        open_target("warp9")
    with pytest.raises(InputError, match=r"ep='warp9': .* expected one of cpu, .*openvino"):
        resolve_provider("warp9")


def test_plugin_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    names = {plugin.module for plugin in PLUGINS.values()}
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name in names else real(name, *rest),
    )
    for module in (plugins, local):
        monkeypatch.setattr(module, "no_use", lambda _: None)  # whatever this processor is
    with pytest.raises(InputError) as caught:
        open_target("openvino")
    said, _, command = str(caught.value).partition("; ")
    assert said == "ep='openvino': not installed"
    # The plugin itself is named: this package may be in no index.
    assert re.fullmatch(r"pip install .*'onnxruntime-ep-openvino\b[^']*'.*", command)
    assert "onnx-lowrank" not in command
    offers = {offer.name: offer for offer in all_offers()}
    assert not offers["qnn"].usable
    assert offers["qnn"].version is None
    assert offers["qnn"].found == "onnxruntime-qnn is not installed"
    assert offers["qnn"].install is not None
    assert "onnxruntime-qnn" in offers["qnn"].install
    assert offers["cpu"].usable
    assert offers["cpu"].version == ort.__version__
    assert offers["cpu"].times == "real"


def fake(monkeypatch: pytest.MonkeyPatch, library: str) -> Plugin:
    plugin = Plugin("fake", "Fake", "FakeExecutionProvider", "fake_plugin", "fake-plugin")
    monkeypatch.setitem(PLUGINS, "fake", plugin)
    module = SimpleNamespace(get_library_path=lambda: library)
    monkeypatch.setattr(plugins, "plugin_version", lambda _: "1.0")
    monkeypatch.setattr(importlib, "import_module", lambda _: module)
    return plugin


@pytest.mark.usefixtures("fresh")
def test_plugin_that_cannot_be_registered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake(monkeypatch, str(tmp_path / "missing.so"))
    with pytest.raises(InputError, match=r"ep='fake': fake-plugin 1\.0 cannot be registered with"):
        resolve_provider("fake")


@pytest.mark.usefixtures("fresh")
def test_plugin_that_offers_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "unused")
    monkeypatch.setattr(ort, "register_execution_provider_library", lambda *_: None)
    with pytest.raises(InputError, match="ep='fake': the plugin offers no device on this machine"):
        resolve_provider("fake")
    needy = replace(PLUGINS["fake"], needs="a fake processor")
    monkeypatch.setitem(PLUGINS, "fake", needy)
    with pytest.raises(InputError, match=r"which has .*; it needs a fake processor$"):
        resolve_provider("fake")
    # ONNX Runtime lists a registered plugin among its own providers; a session on that name alone
    # would run on the CPU.
    monkeypatch.setattr(
        ort,
        "get_available_providers",
        lambda: ["FakeExecutionProvider", "FakeExecutionProvider.AUTO", "CPUExecutionProvider"],
    )
    assert list(built_in()) == ["cpu"]


def test_webgpu_takes_swiftshader_only_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("VK_DRIVER_FILES", raising=False)
    monkeypatch.setenv("VK_ICD_FILENAMES", "/x/vk_swiftshader_icd.json")
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))
    assert plugins.software_gpu() == Path("/x/vk_swiftshader_icd.json")
    monkeypatch.setenv("VK_ICD_FILENAMES", "/x/radeon.json")
    assert plugins.software_gpu() is None
    monkeypatch.delenv("VK_ICD_FILENAMES")
    monkeypatch.setattr(plugins, "browser_folders", lambda: [tmp_path])
    assert plugins.software_gpu() is None
    (tmp_path / "vk_swiftshader_icd.json").touch()
    assert plugins.software_gpu() == tmp_path / "vk_swiftshader_icd.json"
    monkeypatch.setattr(Path, "glob", lambda *_: iter([Path("/dev/dri/renderD128")]))
    assert plugins.software_gpu() is None


def test_offers_name_what_was_found() -> None:
    offers = {offer.name: offer for offer in local.offers()}
    assert next(iter(offers)) == "cpu"
    assert set(PLUGINS) <= set(offers)
    for name, offer in offers.items():
        assert offer.times == ("emulated" if name in PLUGINS and PLUGINS[name].emulated else "real")
        if not offer.usable:
            assert offer.found
    assert "qnn" in EMULATED


def test_assignment_texts() -> None:
    nodes = {"Q": tuple(f"n{i} (MatMul)" for i in range(14))}
    assert assignment_text(nodes, "Q", "QNN") == "14 of 14 nodes on QNN"
    rest = ("a (Relu)", "b (Add)", "c (Add)", "d (Add)", "e (Mul)", "f (Mul)", "g (Mul)", "h (Sub)")
    text = assignment_text({**nodes, "CPU": rest}, "Q", "QNN")
    assert text == (
        "14 of 22 nodes on QNN; left to the CPU: a (Relu), b (Add), c (Add), d (Add), e (Mul), "
        "f (Mul) and 2 more (1 Mul, 1 Sub)"
    )
    assert assignment(object()) is None


def test_emulated_targets_are_never_timed(tmp_path: Path) -> None:
    target = EmulatedTarget("slow", Provider("cpu", CPU.full, "Slow", emulated=True))
    (outcome,) = target.run([pair(tmp_path)[0]], FEEDS, Job(iterations=5), lambda _: None)
    assert outcome.error is None
    assert (outcome.times_ns, outcome.load_ns, outcome.first_ns) == ((), None, None)
    assert len(outcome.outputs) == 2
