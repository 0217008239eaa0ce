from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from onnx_lowrank.errors import InputError
from onnx_lowrank.runtime import log as ortlog
from onnx_lowrank.runtime.providers import resolve_provider
from onnx_lowrank.runtime.session import (
    OrtLog,
    default_threads,
    open_session,
    prepare,
    run,
)

WARNS = """<ir_version: 8, opset_import: ["" : 18]>
    g (float[N, 4] x) => (float[N, 5] y) <float[4] w = {1, 2, 3, 4}> { y = Add(x, w) }"""


def proto(text: str) -> bytes:
    return bytes(ir.to_proto(ir.from_onnx_text(text)).SerializeToString())


IDENTITY = proto(
    '<ir_version: 8, opset_import: ["" : 18]> g (float[N, 2] x) => (float[N, 2] y) '
    "{ y = Identity(x) }"
)


@pytest.mark.parametrize("name", ["cpu", "CPU", "CPUExecutionProvider", "cpuexecutionprovider"])
def test_provider_names(name: str) -> None:
    assert resolve_provider(name).full == "CPUExecutionProvider"


@pytest.mark.parametrize("name", ["warp9", "", "ExecutionProvider"])
def test_provider_that_is_not_there(name: str) -> None:
    with pytest.raises(InputError, match=r"ep=.* has no such execution provider; expected .*cpu"):
        resolve_provider(name)


def test_session_options(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(IDENTITY)
    session = open_session(path, threads=1, optimize=False)
    options = session.get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    assert open_session(IDENTITY).get_session_options().intra_op_num_threads == default_threads()


def test_default_threads_are_ours() -> None:
    assert 1 <= default_threads() <= (os.cpu_count() or 1)


def test_model_that_does_not_load(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the model in memory: ONNX Runtime does not load it"):
        open_session(b"no model")
    path = tmp_path / "missing.onnx"
    with pytest.raises(InputError, match=r"missing\.onnx: ONNX Runtime does not load it") as caught:
        open_session(path)
    assert "\n" not in str(caught.value)
    assert "[ONNXRuntimeError]" not in str(caught.value)


def test_run_by_name_and_its_errors() -> None:
    session = open_session(IDENTITY)
    x = np.ones((3, 2), np.float32)
    assert np.array_equal(run(session, {"x": x}, "m")["y"], x)
    assert np.array_equal(run(session, {"x": x.T.copy().T}, "m")["y"], x)
    for feeds in ({"x": np.ones((3, 3), np.float32)}, {"x": x.astype(np.float64)}, {"z": x}, {}):
        with pytest.raises(InputError, match="model 7: ONNX Runtime does not run it") as caught:
            run(session, feeds, "model 7")
        assert "\n" not in str(caught.value)


def test_bfloat16_in_and_out() -> None:
    session = open_session(
        proto(
            '<ir_version: 8, opset_import: ["" : 18]> g (bfloat16[N, 2] x, float[1] a) => '
            "(bfloat16[N, 2] y, float[N, 2] z, float[1] b) "
            "{ y = Identity(x) z = Cast<to = 1>(x) b = Identity(a) }"
        )
    )
    x = np.arange(6).reshape(3, 2).astype(ml_dtypes.bfloat16)
    outputs = run(session, {"x": x, "a": np.ones(1, np.float32)}, "m")
    assert outputs["y"].dtype == x.dtype
    assert np.array_equal(outputs["y"], x)
    assert np.array_equal(outputs["z"], x.astype(np.float32))
    assert outputs["b"] == 1


def test_float16_and_strings() -> None:
    session = open_session(
        proto(
            '<ir_version: 8, opset_import: ["" : 18]> g (float16[N] x, string[N] t) => '
            "(float16[N] y, string[N] u) { y = Identity(x) u = Identity(t) }"
        )
    )
    feeds = {"x": np.ones(2, np.float16), "t": np.array(["a", "ö"], object)}
    outputs = run(session, feeds, "m")
    assert outputs["y"].dtype == np.float16
    assert outputs["u"].tolist() == ["a", "ö"]
    assert outputs["u"].dtype == object


def test_zipmap_becomes_an_array() -> None:
    kind = onnx.TypeProto()
    kind.sequence_type.elem_type.map_type.key_type = TensorProto.INT64
    value = kind.sequence_type.elem_type.map_type.value_type
    value.tensor_type.elem_type = TensorProto.FLOAT
    node = helper.make_node("ZipMap", ["x"], ["z"], domain="ai.onnx.ml", classlabels_int64s=[7, 3])
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [onnx.ValueInfoProto(name="z", type=kind)],
    )
    opsets = [helper.make_opsetid("ai.onnx.ml", 1), helper.make_opsetid("", 13)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    session = open_session(model.SerializeToString())
    x = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
    assert np.array_equal(run(session, {"x": x}, "m")["z"], x[:, ::-1])  # keys sorted: 3, 7


def test_types_that_no_array_holds_are_named() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (int4[2] y)'
        " { y = Cast <to = 22> (x) }"
    )
    session = open_session(model.SerializeToString(), threads=1)
    with pytest.raises(InputError, match=r"^it: output 'y' is int4, which .* in no array; check="):
        run(session, {"x": np.ones(2, np.float32)}, "it")


def test_sequence_of_tensors_is_flattened() -> None:
    session = open_session(
        proto(
            '<ir_version: 8, opset_import: ["" : 18]> g (float[2] x, float[3] z) => '
            "(seq(float[?]) s) { s = SequenceConstruct(x, z) }"
        )
    )
    feeds = {"x": np.zeros(2, np.float32), "z": np.ones(3, np.float32)}
    assert run(session, feeds, "m")["s"].tolist() == [0, 0, 1, 1, 1]


def test_prepare_can_be_called_again() -> None:
    call = prepare(open_session(IDENTITY), {"x": np.ones((1, 2), np.float32)})
    assert np.array_equal(call()[0], call()[0])


def test_log_collects_warnings(capfd: pytest.CaptureFixture[str]) -> None:
    log = OrtLog()
    assert log.summary() is None
    with log.capture("my loading"):
        os.write(2, b"before\n")
        open_session(proto(WARNS), log=log)  # captures again, inside
        os.write(2, b"and after")
    assert capfd.readouterr().err == "before\nand after"
    assert log.counts == {"warning": len(log.lines)}
    assert log.lines[0].severity == "warning"
    assert log.lines[0].what == "my loading"
    assert "MergeShapeInfo" in log.lines[0].text
    assert "\x1b" not in log.lines[0].text
    assert log.summary() == (
        f"{len(log.lines)} ONNX Runtime warning{'s' * (len(log.lines) > 1)}, shown with --verbose"
    )


def test_session_without_log_writes_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    open_session(proto(WARNS))
    assert "MergeShapeInfo" in capfd.readouterr().err


def test_log_forms(capfd: pytest.CaptureFixture[str]) -> None:
    log = OrtLog()
    stamp = b"2026-01-31 12:00:00.123456 "
    with log.capture("w"):
        os.write(2, b"\x1b[1;31m" + stamp + b"[E:onnxruntime:, a.cc:1 F] two\n lines\x1b[m\n")
        os.write(2, b"kept [W:onnxruntime is no record\n")
        os.write(2, stamp + b"[W:onnxruntime:Default, b.cc:2 G] plain\nkept too\n")
        os.write(2, b"\xff\n")
    assert [line.severity for line in log.lines] == ["error", "warning"]
    assert log.lines[0].text.endswith("[E:onnxruntime:, a.cc:1 F] two lines")
    assert log.lines[1].text.endswith("plain")
    assert log.summary() == "1 ONNX Runtime warning and 1 ONNX Runtime error, shown with --verbose"
    assert capfd.readouterr().err.startswith("kept [W:onnxruntime is no record\nkept too\n")


def test_log_restores_after_an_exception(capfd: pytest.CaptureFixture[str]) -> None:
    log = OrtLog()

    def fail() -> None:
        with log.capture("w"):
            os.write(2, b"inside\n")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    os.write(2, b"outside\n")
    assert capfd.readouterr().err == "inside\noutside\n"
    with log.capture("again"):
        pass


def test_two_logs_nest(capfd: pytest.CaptureFixture[str]) -> None:
    outer, inner = OrtLog(), OrtLog()
    with outer.capture("outer"):
        open_session(proto(WARNS), log=inner)
    assert inner.lines
    assert not outer.lines
    assert capfd.readouterr().err == ""


CLOSED = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("ortlog", {path!r})
ortlog = sys.modules["ortlog"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ortlog)
{close}
log = ortlog.OrtLog()
with log.capture("x"):
    os.write(2, b"2026-01-31 12:00:00.1 [W:onnxruntime:, a.cc:1 F] text\\nelse\\n")
file = open({path!r}, "rb")
print(len(log.lines), file.fileno() == 2)
"""


@pytest.mark.parametrize(
    ("close", "rest"),
    [
        ("os.close(2)", ""),
        ("os.close(2); os.close(0)", ""),
        ("sys.stderr = None", "else\n"),
        ("sys.stderr.close()", "else\n"),  # closes the object, not the descriptor
    ],
)
def test_log_without_standard_error(close: str, rest: str) -> None:
    # The module alone: ONNX Runtime's own threads open files, which may get the descriptor.
    code = CLOSED.format(close=close, path=ortlog.__file__)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False"]
    assert done.stderr == rest


def test_log_with_closed_sys_stderr(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stream = (tmp_path / "x").open("w")
    stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    log = OrtLog()
    open_session(proto(WARNS), log=log)
    assert log.lines


def test_captures_of_several_threads() -> None:
    """Each one sees its own records, and both descriptors are what they were at the end."""
    before = [os.fstat(number) for number in (1, 2)]
    logs = [OrtLog() for _ in range(4)]

    def work(log: OrtLog) -> None:
        for _ in range(20):
            with log.capture("loading"), ortlog.quiet_stdout():
                os.write(2, b"2026-01-31 12:00:00.123 [W:onnxruntime:, graph.cc:1 f] text\n")

    threads = [threading.Thread(target=work, args=(log,)) for log in logs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(log.counts["warning"] >= 20 for log in logs)
    for number, old in zip((1, 2), before, strict=True):
        assert os.path.samestat(os.fstat(number), old)


def test_the_last_of_several_captures_gives_standard_error_back(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The first to begin is the first to end, as in threads that overlap."""
    one, two = (OrtLog().capture(name) for name in ("one", "two"))
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    os.write(2, b"between\n")
    assert capfd.readouterr().err == ""
    two.__exit__(None, None, None)
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "between\nafter\n"
