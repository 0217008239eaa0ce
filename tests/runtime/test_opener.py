"""Models that are made on the way meet ONNX Runtime in a child first, like the user's own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank.errors import CrashError, InputError
from onnx_lowrank.runtime import opener as opening
from onnx_lowrank.runtime.log import OrtLog
from onnx_lowrank.runtime.memory import Memory
from onnx_lowrank.runtime.opener import Opener
from onnx_lowrank.runtime.session import open_session
from onnx_lowrank.runtime.taps import look, tapped
from onnx_lowrank.targets import local
from tests.helpers.models import parse

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")

# ONNX Runtime divides by the length of the frame.
FRAMES = """<ir_version: 8, opset_import: ["": 17]>
    g (float[1, 8, 1] x, int64 length) => (float[a, b, c, d] y) {
        step = Constant<value = int64 {1}> ()
        before = Neg (x)
        framed = STFT (before, step, , length)
        y = Neg (framed)
    }"""
# Crashes where it is folded, and not where it is run: the branch is not taken.
FOLDED = """<ir_version: 8, opset_import: ["": 17]>
    g (float[1, 8, 1] x, bool c) => (float[a, b, d] y) {
        y = If (c) <
            then_branch = t () => (float[a, b, d] p) {
                still = ConstantOfShape <value = float[1] {1.0}> (sizes)
                framed = STFT (still, one, , zero)
                first = Constant <value = int64[1] {3}> ()
                p = ReduceSum <keepdims = 0> (framed, first)
            },
            else_branch = e () => (float[a, b, d] q) { q = Neg (x) }
        >
    }"""
SIGNAL = np.ones((1, 8, 1), np.float32)


@pytest.fixture
def opener(tmp_path: Path) -> Iterator[Opener]:
    yield Opener(tmp_path, 1, OrtLog(), {})
    assert not list(tmp_path.rglob("*.onnx"))  # no run leaves models behind


def frames() -> ir.Model:
    return ir.from_proto(parse(FRAMES, {}))


def feed(length: int) -> dict[str, np.ndarray]:
    return {"x": SIGNAL, "length": np.array(length)}


def test_a_runner_gives_outputs_and_ignores_what_it_is_not_asked(opener: Opener) -> None:
    run = opener.runner(frames())
    for length in (4, 8):
        assert run({**feed(length), "other": SIGNAL})["y"].shape == (
            1,
            9 - length,
            length // 2 + 1,
            2,
        )
    assert not opener.notes


def test_a_protobuf_runs_too(opener: Opener) -> None:
    assert opener.runner(parse(FRAMES, {}), optimize=False)(feed(4))["y"].shape == (1, 5, 3, 2)


def test_weights_of_a_large_protobuf_lie_beside_it(
    opener: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "BESIDE", 100)
    text = """<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 40] x) => (float[N, 70] y) { y = MatMul(x, w) }"""
    w, x = np.ones((40, 70), np.float32), np.ones((9, 40), np.float32)
    run = opener.runner(parse(text, {"w": w}))
    assert sorted(path.suffix for path in tmp_path.rglob("*.*")) == [".data", ".onnx"]
    np.testing.assert_array_equal(run({"x": x})["y"], x @ w)


@pytest.mark.parametrize("most", [0, 1 << 28])
def test_weights_of_large_models_are_not_copied(
    opener: Opener, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = list[Any]()

    def noted(*arguments: Any, **more: Any) -> Any:
        given.append(more["packed"])
        return open_session(*arguments, **more)

    monkeypatch.setattr(opening, "open_session", noted)
    monkeypatch.setattr(opening, "UNPACKED", most)
    rng = np.random.default_rng(0)
    text = """<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 40] x) => (float[N, 70] y) { y = MatMul(x, w) }"""
    w = rng.standard_normal((40, 70)).astype(np.float32)
    x = rng.standard_normal((9, 40)).astype(np.float32)
    run = opener.runner(ir.from_proto(parse(text, {"w": w})))
    np.testing.assert_allclose(run({"x": x})["y"], x @ w, rtol=1e-4, atol=1e-5)
    assert given == [bool(most)]


def test_a_crash_of_a_model_made_on_the_way_is_an_error(opener: Opener) -> None:
    with pytest.raises(CrashError, match=r"activations as outputs: .*SIGFPE.*'framed' \(STFT\)"):
        tapped(frames(), ["framed"], opener.runner)(feed(0))
    with pytest.raises(CrashError, match="SIGFPE"):
        look(frames(), ["framed"], lambda copy: opener.runner(copy)(feed(0)))


def test_a_crash_of_a_layer_alone_is_an_error(opener: Opener) -> None:
    data = frames_bytes()
    with pytest.raises(CrashError, match=r"a layer alone: .*SIGFPE.*'framed' \(STFT\)"):
        opener.alone(data, feed(0))
    session = opener.alone(data, feed(4))
    assert opener.run(session, feed(4), "it")["y"].shape == (1, 5, 3, 2)


def frames_bytes() -> bytes:
    return bytes(parse(FRAMES, {}).SerializeToString())


def test_what_crashes_where_it_is_optimized_runs_without(opener: Opener) -> None:
    model = parse(FOLDED, {"sizes": np.array([1, 8, 1]), "one": np.array(1), "zero": np.array(0)})
    values = {"x": SIGNAL, "c": np.array(False)}
    assert np.array_equal(opener.runner(model)(values)["y"], -SIGNAL)
    assert [note for note in opener.notes if "without its graph optimizations" in note]
    with pytest.raises(CrashError, match="SIGFPE"):
        opener.made(ir.from_proto(model), "the result")


def test_what_is_said_against_a_model_is_said_once_it_is_loaded(opener: Opener) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17, "own": 1]>'
        "g (float[2] x) => (float[2] y) { y = own.Unknown (x) }"
    )
    run = opener.runner(model)
    for _ in range(2):
        with pytest.raises(InputError, match="does not load it"):
            run({"x": np.ones(2, np.float32)})


def test_a_provider_that_crashes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert local.refusal("cpu") is None
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[1, 4] x) => (float[a, b, c, d] y) {'
        " s = Constant<value = int64[3] {1, 4, 1}> () r = Reshape (x, s)"
        " one = Constant<value = int64 {1}> () none = Constant<value = int64 {0}> ()"
        " y = STFT (r, one, , none) }"
    )
    monkeypatch.setattr(local, "probe", lambda: model.SerializeToString())
    assert "SIGFPE" in (local.refusal("cpu") or "")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files of which sessions are opened."""
    found = list[Path]()

    def noted(model: Path, **more: Any) -> Any:
        found.append(model)
        return open_session(model, **more)

    monkeypatch.setattr(opening, "open_session", noted)
    return found


def test_a_limit_that_is_used_up_closes_other_runners(
    opened: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are opened again, but not for ever: two that take turns stay open."""
    monkeypatch.setattr(Memory, "room", lambda _: 0)
    opener = Opener(tmp_path, 1, OrtLog(), {}, Memory(1, given=True))
    one, other = opener.runner(frames()), opener.runner(frames())
    before = one(feed(4))["y"]
    for _ in range(8):
        for run in (one, other):
            np.testing.assert_array_equal(run(feed(4))["y"], before)
    assert len(opened) == 2 * 5
    assert len(set(opened)) == 2
    del one, other, run
    assert not list(tmp_path.rglob("*.onnx"))


def test_a_limit_that_is_far_closes_nothing(opened: list[Path], tmp_path: Path) -> None:
    opener = Opener(tmp_path, 1, OrtLog(), {}, Memory(1 << 50, given=True))
    runs = [opener.runner(frames()) for _ in range(2)]
    for run in (*runs, *runs):
        run(feed(4))
    assert len(opened) == 2


def test_what_rests_gives_room_and_is_opened_again(
    opened: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = [100]
    monkeypatch.setattr(Memory, "room", lambda _: room[0])
    limited, free = (
        Opener(tmp_path, 1, OrtLog(), {}, Memory(80, given)) for given in (True, False)
    )
    for own, most, times in ((limited, 100, 1), (limited, 30, 2), (free, 30, 1)):
        opened.clear()
        room[0] = 1 << 40
        run = own.runner(frames())
        run(feed(4))
        room[0] = most
        own.rest()
        run(feed(4))
        assert len(opened) == times
