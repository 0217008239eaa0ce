"""The runner that is copied to other places, here on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from onnx_lowrank.errors import InputError
from onnx_lowrank.runtime.session import open_session
from onnx_lowrank.runtime.session import run as run_session
from onnx_lowrank.targets import runner
from onnx_lowrank.targets.base import Job, Outcome
from onnx_lowrank.targets.packing import own_provider, packed, read_result
from tests.helpers.models import linear_model, parse, uniform
from tests.helpers.remote import assert_outputs, feeds_for, two_models


def run(models: list[Path], feeds: Any, job: Job, **settings: Any) -> tuple[Outcome, ...]:
    with packed(models, feeds, job, in_place=True, **settings) as parcel:
        runner.run(parcel.folder, lambda _: None)
        return read_result(parcel.folder / "result", "here")


def test_as_a_program(tmp_path: Path) -> None:
    """As an app's runner is called: the folder is all it gets."""
    models, feeds = two_models(tmp_path), feeds_for()
    with packed(models, feeds, Job(iterations=4, threads=1)) as parcel:
        for name, path in parcel.files:
            copy = tmp_path / "copy" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
        assert parcel.bytes == sum(path.stat().st_size for _, path in parcel.files)
    program = tmp_path / "copy" / "runner.py"
    subprocess.run([sys.executable, program, "run", program.parent], check=True, cwd=tmp_path)
    outcomes = read_result(tmp_path / "copy" / "result", "here")
    assert_outputs(outcomes, models, feeds)
    assert [len(outcome.times_ns) for outcome in outcomes] == [4, 4]


def killing(folder: Path, words: str) -> list[str]:
    """A Python that dies when it is started with these words."""
    path = folder / "python"
    path.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "\n'
        "import os, runpy, signal, sys\n"
        "sys.argv = sys.argv[1:]\n"
        f"if ' '.join(sys.argv[3:]) == '{words}':\n"
        "    import json\n"
        "    folder = sys.argv[2] + '/result'\n"
        "    open(folder + '/machine.json', 'w').write(json.dumps({}))\n"
        "    os.kill(os.getpid(), signal.SIGSEGV)\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        '" "$@"\n'
    )
    path.chmod(0o755)
    return [str(path)]


@pytest.mark.parametrize(("isolate", "words"), [(True, "solo 1"), (False, "solo 0 1 2")])
def test_a_crash_costs_no_other_model(tmp_path: Path, isolate: bool, words: str) -> None:
    models, feeds = two_models(tmp_path), feeds_for()
    models.append(models[0])
    python = killing(tmp_path, words)
    job = Job(iterations=3, threads=1)
    outcomes = run(models, feeds, job, python=python, isolate=isolate)
    if isolate:
        assert outcomes[1].error == "the process died of SIGSEGV"
        outcomes, models = (outcomes[0], outcomes[2]), [models[0], models[2]]
    assert_outputs(outcomes, models, feeds)
    assert all(len(outcome.times_ns) == 3 for outcome in outcomes)


def test_a_crash_while_timing(tmp_path: Path) -> None:
    models, feeds = two_models(tmp_path), feeds_for()
    job = Job(iterations=3, threads=1)
    for outcome in run(models, feeds, job, python=killing(tmp_path, "timing 0 1")):
        assert outcome.error == "timing: the process died of SIGSEGV"
        assert len(outcome.outputs) == len(feeds)


def test_faults(tmp_path: Path) -> None:
    models, feeds = two_models(tmp_path), feeds_for()
    with pytest.raises(InputError, match=r"here: .* has no onnxruntime: No module named 'numpy'"):
        run(models, feeds, Job(), python=[sys.executable, "-I", "-S"])
    with pytest.raises(InputError, match="here: cannot start /nowhere: No such file"):
        run(models, feeds, Job(), python=["/nowhere"])
    with pytest.raises(InputError, match=r"onnxruntime does not start with .* status 3: oh no"):
        run(models, feeds, Job(), python=["/bin/sh", "-c", "echo oh no >&2; exit 3"])
    with pytest.raises(InputError, match="has no provider 'qnn2'"):
        run(models, feeds, Job(), provider="qnn2")
    with pytest.raises(InputError, match="not done within 4 s"):
        run(models, feeds, Job(iterations=10**9, seconds=4, outputs=False))
    with pytest.raises(InputError, match="expected at least one sample"):
        run(models, [], Job())
    with pytest.raises(InputError, match="no such file"), packed([tmp_path / "no"], feeds, Job()):
        pass


def test_small_floats_and_strings(tmp_path: Path) -> None:
    for number, (text, feed) in enumerate(
        (
            (
                """g (bfloat16[N] b, float8e4m3fn[N] e)
                => (float[N] bo, bfloat16[N] bb, float8e4m3fn[N] eo) {
                    bo = Cast<to = 1>(b)
                    bb = Identity(b)
                    eo = Identity(e)
                }""",
                {
                    "b": np.array([1.5, -3], ml_dtypes.bfloat16),
                    "e": np.array([0.5, 2], ml_dtypes.float8_e4m3fn),
                },
            ),
            (
                "g (string[N] s) => (string[N] so) { so = Identity(s) }",
                {"s": np.array(["ä", "x\ty"], dtype=object)},
            ),
        )
    ):
        path = tmp_path / f"{number}.onnx"
        onnx.save(parse(f'<ir_version: 9, opset_import: ["": 19]> {text}'), path)
        expected = run_session(open_session(path, threads=1), feed, "here")
        (outcome,) = run([path], [feed], Job(iterations=1, threads=1))
        assert outcome.error is None
        (found,) = outcome.outputs
        assert list(found) == list(expected)
        for name, array in expected.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)


def test_what_is_not_finite_is_said(tmp_path: Path) -> None:
    path = tmp_path / "log.onnx"
    model = parse(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N] x) => (float[N] y) { y = Log(x) }'
    )
    onnx.save(model, path)
    bad = {"x": np.array([-1, 1], np.float32)}
    (outcome,) = run([path], [bad, bad], Job(outputs=False))
    assert outcome.notes == ("output 'y' holds NaN or Inf",)
    assert outcome.outputs == ()
    assert outcome.peak_bytes is not None
    assert outcome.load_ns is not None


def test_memory_is_that_of_one_model(tmp_path: Path) -> None:
    """A model of 64 MB shows in its own figure and in no other's, nor does that of the tests."""
    ballast = np.ones(2**27, np.uint8)  # this process is large
    small = two_models(tmp_path)[0]
    big = tmp_path / "big.onnx"
    weight = np.zeros((16, 2**20), np.float32)
    onnx.save(linear_model(weight), big)
    outcomes = run([small, big, small], feeds_for(), Job(outputs=False))
    first, middle, last = (outcome.peak_bytes or 0 for outcome in outcomes)
    assert middle > first + weight.nbytes
    assert abs(first - last) < weight.nbytes // 2
    del ballast


def test_old_versions_tell_the_nodes_in_a_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = two_models(tmp_path)[0]
    with packed([path], feeds_for(), Job(threads=1), in_place=True) as parcel:
        (parcel.folder / "result").mkdir()
        job = json.loads((parcel.folder / "job.json").read_text())
        model = runner.Model(parcel.folder, job, 0)
        base = ort.InferenceSession.__mro__[1]
        monkeypatch.delattr(base, "get_provider_graph_assignment_info")
        model.solo(lambda: None)
        assert list(model.found["nodes"]) == ["CPUExecutionProvider"]
        assert "fc" in model.found["nodes"]["CPUExecutionProvider"][0]


def test_the_order_of_the_timing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    class Fake:
        def __init__(self, folder: Path, job: Any, index: int) -> None:
            self.index = index

        def load(self) -> None:
            pass

        def prepare(self, feed: Any) -> Any:
            return lambda: calls.append(self.index)

    monkeypatch.setattr(runner, "Model", Fake)
    monkeypatch.setattr(runner, "feed_of", lambda folder, job, number: {})
    (tmp_path / "result").mkdir()
    runner.child_timing(tmp_path, {"feeds": [0], "warmup": 0, "iterations": 6}, [0, 1, 2])
    assert calls[3:] == [0, 1, 2, 2, 1, 0, 1, 2, 0, 0, 2, 1, 2, 0, 1, 1, 0, 2]
    found = json.loads((tmp_path / "result" / "timing.json").read_text())
    assert {key: len(times) for key, times in found.items()} == {"0": 6, "1": 6, "2": 6}


def test_usage(capfd: pytest.CaptureFixture[str]) -> None:
    assert runner.main([]) == 2
    assert "usage: runner.py run FOLDER" in capfd.readouterr().err


def test_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    run(two_models(tmp_path), feeds_for(), Job(threads=1))
    assert not any(folder.iterdir())


def test_external_data_elsewhere_is_refused(tmp_path: Path) -> None:
    model = linear_model(uniform((2, 2), np.random.default_rng(0)))
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w", size_threshold=0)
    proto = onnx.load(path, load_external_data=False)
    proto.graph.initializer[0].external_data[0].value = "../w"
    path.write_bytes(proto.SerializeToString())
    with (
        pytest.raises(InputError, match=r"expected external data in the model's folder, got \.\."),
        packed([path], feeds_for(), Job()),
    ):
        pass
    proto.graph.initializer[0].external_data[0].value = "gone"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match="gone is missing"), packed([path], feeds_for(), Job()):
        pass


def test_a_provider_that_takes_no_node(tmp_path: Path) -> None:
    """Azure's is in every wheel and takes only operators of its own."""
    models, feeds = two_models(tmp_path)[:1], feeds_for()
    (fell_back,) = run(models, feeds, Job(threads=1), provider="azure")
    assert_outputs((fell_back,), models, feeds)
    assert list(fell_back.nodes or {}) == ["CPUExecutionProvider"]
    assert fell_back.half is None
    (strict,) = run(models, feeds, Job(threads=1, strict=True), provider="azure")
    assert "fallback to CPU EP has been explicitly disabled" in str(strict.error)
    assert strict.outputs == ()


def test_spellings_of_a_provider() -> None:
    ran = Outcome(nodes={"CPUExecutionProvider": (), "NnapiExecutionProvider": ("n",)})
    assert own_provider("CPU") == "CPUExecutionProvider"
    assert own_provider("nnapi", [ran]) == "NnapiExecutionProvider"
    assert own_provider("qnn", [ran]) == "qnnExecutionProvider"
    assert own_provider("QNNExecutionProvider") == "QNNExecutionProvider"
