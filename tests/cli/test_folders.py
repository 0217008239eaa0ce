"""A folder in, a folder out, as optimum leaves one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.helpers.commands import call
from tests.helpers.targets import save, two_layers

FAST = ("--rank", 8, "--no-simplify", "--no-bench", "--no-check")


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    folder = tmp_path / "exported"
    (folder / "onnx").mkdir(parents=True)
    save(two_layers(), folder / "model.onnx")
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "onnx" / "vocab.txt").write_text("word")
    (folder / ".cache").write_text("hidden")
    return folder


def names(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_everything_but_the_model_is_copied(exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call(exported, out, *FAST) == 0
    assert names(out) == {"model.onnx", "config.json", "tokenizer.json", "onnx/vocab.txt"}
    assert (out / "config.json").read_text() == '{"a": 1}'
    assert len(onnx.load(out / "model.onnx").graph.node) == 6  # both maps are pairs


def test_external_data_are_the_results_own(exported: Path, tmp_path: Path) -> None:
    onnx.save(
        two_layers(), exported / "model.onnx", save_as_external_data=True,
        location="model.onnx_data", size_threshold=0,
    )  # fmt: skip
    out = tmp_path / "out"
    assert call(exported, out, *FAST, "--external-data", "always") == 0
    assert "model.onnx_data" not in names(out)
    assert "model.onnx.data" in names(out)


def test_the_name_stays(exported: Path, tmp_path: Path) -> None:
    (exported / "model.onnx").rename(exported / "encoder.onnx")
    assert call(exported, tmp_path / "out", *FAST) == 0
    assert (tmp_path / "out" / "encoder.onnx").is_file()


def test_model_onnx_among_several(exported: Path, tmp_path: Path) -> None:
    before = save(two_layers(hidden=64), exported / "decoder.onnx").read_bytes()
    assert call(exported, tmp_path / "out", *FAST) == 0
    assert (tmp_path / "out" / "decoder.onnx").read_bytes() == before


def test_samples_in_the_folder_stay_there(exported: Path, tmp_path: Path) -> None:
    """A run may read them from there; they are no part of the model."""
    x = np.random.default_rng(0).standard_normal((8, 32)).astype(np.float32)
    np.savez(exported / "data.npz", x=x)
    args = ("--rank", 8, "--no-simplify", "--no-bench", "--data", exported / "data.npz")
    assert call(exported, tmp_path / "out", *args) == 0
    assert "data.npz" not in names(tmp_path / "out")


@pytest.mark.parametrize("remove", ["model.onnx", None])
def test_no_model_or_several(
    remove: str | None, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if remove is None:
        (exported / "model.onnx").rename(exported / "a.onnx")
        save(two_layers(), exported / "b.onnx")
    else:
        (exported / remove).unlink()
    assert call(exported, tmp_path / "out", *FAST) == 1
    got = "got none" if remove else "got a.onnx, b.onnx"
    error = capsys.readouterr().err
    assert "expected one .onnx file in the folder" in error
    assert got in error
    assert not (tmp_path / "out").exists()


def test_what_is_there_stays_without_force(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("mine")
    assert call(exported, out, *FAST) == 1
    assert "exists; --force overwrites what is in it" in capsys.readouterr().err
    assert names(out) == {"config.json"}
    assert call(exported, out, *FAST, "--force") == 0
    assert (out / "config.json").read_text() == '{"a": 1}'


@pytest.mark.parametrize(
    ("args", "code"), [(("--dry-run",), 0), (("--ops", "nothing"), 2), (("--data", "no.npz"), 1)]
)
def test_no_empty_folder_is_left(
    args: tuple[str, ...], code: int, exported: Path, tmp_path: Path
) -> None:
    assert call(exported, tmp_path / "out", "--rank", 8, "--no-simplify", *args) == code
    assert not (tmp_path / "out").exists()


def test_a_gate_that_is_missed_writes_nothing(exported: Path, tmp_path: Path) -> None:
    args = ("--rank", 1, "--no-simplify", "--no-bench", "--max-error", 1e-6)
    assert call(exported, tmp_path / "out", *args) == 3
    assert not (tmp_path / "out").exists()


def test_out_is_another_folder(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(exported, exported, *FAST) == 1
    assert "would overwrite the input" in capsys.readouterr().err
    file = tmp_path / "out.onnx"
    file.write_text("")
    assert call(exported, file, *FAST, "--force") == 1
    assert "expected a folder" in capsys.readouterr().err
    assert call(exported, exported / "small", *FAST) == 0  # inside: not copied into itself
    assert "small" not in {Path(name).parts[0] for name in names(exported / "small")}
    deep = exported / "onnx" / "small"
    assert call(exported, deep, *FAST) == 0
    assert call(exported, deep, *FAST, "--force") == 0
    assert not [name for name in names(deep) if name.startswith("onnx/small")]
