"""The aarch64 build of ONNX Runtime in an emulator, also as a board behind ssh."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import QuantType, quantize_dynamic

from onnx_lowrank.errors import InputError, UsageError
from onnx_lowrank.targets import all_offers, open_target
from onnx_lowrank.targets.base import Job
from onnx_lowrank.targets.qemu import guest_command
from tests.helpers.models import (
    distance,
    factored,
    known_rank,
    linear_model,
    parse,
    run_ort,
    uniform,
)
from tests.helpers.remote import (
    Sshd,
    assert_outputs,
    feeds_for,
    serving,
    silent,
    two_models,
)

OFFER = next(offer for offer in all_offers() if offer.name == "qemu-arm64")
emulated = pytest.mark.skipif(not OFFER.usable, reason=f"qemu-arm64: {OFFER.found}")
arm64 = pytest.mark.arm64


@arm64
@emulated
def test_outputs_and_instructions(tmp_path: Path) -> None:
    """A pair of rank 8 for a matrix of rank 8: the same outputs for fewer instructions."""
    rng = np.random.default_rng(2)
    model = linear_model(known_rank(256, 256, 8, rng))
    result = factored(model, rank=8)
    paths = [tmp_path / "before.onnx", tmp_path / "after.onnx", tmp_path / "broken.onnx"]
    onnx.save(model, paths[0])
    result.save(paths[1])
    paths[2].write_bytes(b"")
    # So many rows that the few hundred instructions of a call around them are far below a percent.
    feeds = [{"x": uniform((64, 256), rng)} for _ in range(2)]
    target = open_target("qemu-arm64")
    assert target.emulated
    done: list[int] = []
    *outcomes, broken = target.run(paths, feeds, Job(iterations=5), done.append)
    assert_outputs(tuple(outcomes), paths[:2], feeds)
    assert len(done) == 4
    before, after = (outcome.costs["instructions"] for outcome in outcomes)
    assert before > 2 * after > 0
    for outcome in outcomes:
        assert outcome.times_ns == ()
        assert outcome.load_ns is outcome.first_ns is outcome.peak_bytes is None
        assert outcome.half is True
        assert outcome.nodes is not None
        assert list(outcome.nodes) == ["CPUExecutionProvider"]
    assert broken.error is not None
    assert not broken.costs
    # The count is that of the models, not of the day.
    again, _ = target.run(paths[1::-1], feeds[:1], Job(outputs=False), silent)
    assert again.outputs == ()
    assert again.costs["instructions"] == pytest.approx(after, rel=0.01)


@arm64
@emulated
@pytest.mark.parametrize(("cpu", "half"), [("cortex-a76", True), ("cortex-a53", False)])
def test_float16_and_int8(tmp_path: Path, cpu: str, half: bool) -> None:
    """One CPU computes in float16, the other turns it into float32 as x86 does."""
    rng = np.random.default_rng(3)
    weight, x = uniform((1024, 64), rng), uniform((2, 1024), rng)
    half_path, int8_path = tmp_path / "half.onnx", tmp_path / "int8.onnx"
    short = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 1024] x) => (float[N, 64] y) {
            s = Cast<to = 10>(x)
            p = MatMul(s, W)
            y = Cast<to = 1>(p)
        }""",
        {"W": weight.astype(np.float16)},
    )
    onnx.save(short, half_path)
    onnx.save(linear_model(weight), tmp_path / "full.onnx")
    quantize_dynamic(tmp_path / "full.onnx", int8_path, weight_type=QuantType.QUInt8)
    feeds = [{"x": x}]
    target = open_target(f"qemu-arm64?cpu={cpu}")
    of_half, of_int8 = target.run([half_path, int8_path], feeds, Job(), silent)
    assert of_half.error is None
    assert of_half.half is half
    exact = (x.astype(np.float16).astype(np.float64) @ weight.astype(np.float16)).astype(np.float32)
    here = distance(run_ort(short, feeds[0])["y"], exact)
    there = distance(of_half.outputs[0]["y"], exact)
    assert there > 2 * here if half else there == pytest.approx(here, rel=0.2)
    assert_outputs((of_int8,), [int8_path], feeds)


@arm64
@emulated
def test_names_that_are_refused() -> None:
    with pytest.raises(UsageError, match=r"expected a CPU of cortex-a53, .* got 'z80'"):
        open_target("qemu-arm64?cpu=z80")
    with pytest.raises(UsageError, match="expected an option of cpu"):
        open_target("qemu-arm64?speed=1")


def test_not_set_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNX_LOWRANK_ARM64", str(tmp_path))
    with pytest.raises(InputError, match=r"not set up, .*providers --install qemu-arm64"):
        open_target("qemu-arm64")
    offer = next(offer for offer in all_offers() if offer.name == "qemu-arm64")
    assert not offer.usable
    assert offer.install is not None
    assert "providers --install qemu-arm64" in offer.install


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with serving(tmp_path_factory.mktemp("board")) as server:
        yield server


@arm64
@pytest.mark.ssh
@emulated
def test_a_board_behind_ssh(sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of a real ARM board's way but the wire: its Python is the emulated one."""
    monkeypatch.setenv("ONNX_LOWRANK_SSH", sshd.arguments)
    python = tmp_path / "python"
    command = " ".join(guest_command("cortex-a76"))
    python.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    python.chmod(0o755)
    models, feeds = two_models(tmp_path)[:1], feeds_for()
    job = Job(iterations=3, threads=1)
    outcomes = open_target(sshd.name(f"python={python}")).run(models, feeds, job, silent)
    assert_outputs(outcomes, models, feeds)
    (outcome,) = outcomes
    assert len(outcome.times_ns) == 3
    assert outcome.peak_bytes
    assert outcome.half is True
    assert any("aarch64" in note for note in outcome.notes)
    assert not any(sshd.board.iterdir())
