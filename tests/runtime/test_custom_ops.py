"""``--custom-ops``: every session knows the library, and what is no library is one line."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_lowrank import InputError, UsageError, bench, check, compress, sweep
from onnx_lowrank.runtime.custom_ops import known, libraries
from onnx_lowrank.runtime.rehearsal import with_custom_ops
from tests.helpers.commands import QUICK, call, error, litter
from tests.helpers.models import known_rank, linear_model, parse, uniform

# A library that has no operators, and either writes down who registers it, or crashes.
_SOURCE = """
#include <stdio.h>
#include <unistd.h>
void *RegisterCustomOps(void *options, const void *api) {
    FILE *file = fopen("LOG", "a");
    if (file == NULL) __builtin_trap();
    fprintf(file, "%d\\n", (int)getpid());
    fclose(file);
    return NULL;
}
"""


def compiled(folder: Path, log: Path) -> Path:
    """The library; it crashes where the log cannot be written."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    source, library = folder / "ops.c", folder / "ops here.so"
    source.write_text(_SOURCE.replace("LOG", str(log)))
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True)
    return library


@pytest.fixture
def contrib() -> Path:
    """A library with the operators of ``ai.onnx.contrib``."""
    if importlib.util.find_spec("onnxruntime_extensions") is None:
        pytest.skip("onnxruntime-extensions is not installed")
    module = importlib.import_module("onnxruntime_extensions")
    return Path(module.get_library_path())


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain.onnx"
    onnx.save(linear_model(known_rank(32, 24, 4, np.random.default_rng(0))), path)
    return path


@pytest.fixture
def custom(tmp_path: Path) -> Path:
    """Two layers around an operator that ONNX Runtime does not have."""
    rng = np.random.default_rng(0)
    model = parse(
        """<ir_version: 8, opset_import: ["": 17, "ai.onnx.contrib": 1]>
        g (float[N, 64] x) => (float[N, 40] y) {
            h = MatMul(x, W)
            n, p = ai.onnx.contrib.NegPos(h)
            m = Mul(n, s)
            a = Add(m, p)
            y = MatMul(a, V)
        }""",
        {
            "W": known_rank(64, 64, 4, rng, scale=0.125),
            "V": known_rank(64, 40, 4, rng, scale=0.125),
            "s": np.full(64, 0.25, np.float32),
        },
    )
    path = tmp_path / "custom.onnx"
    onnx.save(model, path)
    np.savez(tmp_path / "data.npz", x=uniform((40, 64), rng))
    return path


def test_every_process_that_opens_a_session_registers_it(plain: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    library = compiled(tmp_path, log)
    found = compress(plain, rank=4, bench=False, custom_ops=[library], samples=2)
    assert found.report.settings["custom_ops"] == (str(library),)
    who = log.read_text().split()
    assert len(set(who)) >= 2  # this process and its child
    log.unlink()
    found.save(tmp_path / "out.onnx")
    assert not log.exists()
    bench(plain, tmp_path / "out.onnx", iterations=1, samples=1, custom_ops=[library])
    assert len(set(log.read_text().split())) == 4  # and a process for each model's memory
    assert libraries() == ()


def test_a_library_that_crashes_is_one_line(plain: Path, tmp_path: Path) -> None:
    library = compiled(tmp_path, tmp_path / "nowhere" / "log.txt")
    with pytest.raises(
        InputError, match=r"custom_ops=.*ops here.so.*crashes \(SIG\w+\) while it registers"
    ):
        check(plain, plain, custom_ops=[library])


def test_what_is_no_library_names_the_file(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, before = tmp_path / "out.onnx", litter(tmp_path)
    for path, why in (
        (tmp_path / "none.so", "got no such file"),
        (tmp_path, "got no such file"),
        (plain, "Failed to load library"),
    ):
        assert call(plain, out, *QUICK, "--custom-ops", path) == 1
        message = error(capsys)
        assert f"--custom-ops {path}: expected a library" in message
        assert why in message
    assert litter(tmp_path) == before
    with pytest.raises(InputError, match="provider of this machine with custom_ops"):
        check(plain, plain, targets=["web"], custom_ops=[compiled(tmp_path, tmp_path / "log.txt")])
    with pytest.raises(UsageError, match="custom_ops=…: expected a sequence"):
        compress(plain, custom_ops="ops.so")


def test_the_library_is_in_force_in_its_block_only(tmp_path: Path) -> None:
    library = compiled(tmp_path, tmp_path / "log.txt")
    with with_custom_ops([library]):
        assert libraries() == (library,)
        with known(()):
            assert libraries() == ()
        assert libraries() == (library,)
    assert libraries() == ()


def test_an_unknown_operator_says_what_names_its_library(
    custom: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("check", custom, custom) == 1
    assert "NegPos(-1) is not a registered function/op; --custom-ops names" in error(capsys)


def test_a_model_with_custom_operators_is_fitted_and_judged(
    custom: Path, contrib: Path, tmp_path: Path
) -> None:
    data, out = tmp_path / "data.npz", tmp_path / "out.onnx"
    result = compress(custom, keep=0.5, data=data, bench=False, custom_ops=[contrib])
    assert result.report.check is not None
    assert result.report.check.providers[0].outputs[0].relative_l2 < 1e-5
    assert result.report.calibration is not None
    assert not any("not simplified" in note for note in result.report.notes)
    assert [layer.rank is not None for layer in result.report.layers] == [True, True]
    result.save(out)
    report = check(custom, out, custom_ops=[contrib], samples=2)
    assert report.targets[0].outputs[0].relative_l2 < 1e-5
    assert bench(custom, out, custom_ops=[contrib], iterations=2, samples=1).errors == ()
    points = sweep(custom, shares=(0.5,), data=data, bench=False, custom_ops=[contrib]).points
    assert len(points) == 2
