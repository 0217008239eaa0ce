"""The images that are drawn for the models that read text, and how their outputs are read."""

from __future__ import annotations

import importlib.util
import secrets
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from onnx_lowrank.runtime.session import open_session, run
from tests.helpers.places import ROOT

TASKS = ("captcha", "ppocrv5-rec")


def drawn() -> ModuleType:
    for name in ("captcha", "matplotlib", "PIL"):
        pytest.importorskip(name, reason=f"{name} is not installed: it is of the extra 'exporters'")
    return _drawn()


@cache
def _drawn() -> ModuleType:
    path = ROOT / "models" / "drawn.py"
    spec = importlib.util.spec_from_file_location("drawn", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["drawn"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def one_hot(texts: list[list[int]], classes: int) -> Any:
    return np.eye(classes, dtype=np.float32)[np.array(texts)]


@pytest.mark.parametrize(
    ("name", "shape", "low", "high"),
    [("captcha", (3, 60, 160), 0, 255), ("ppocrv5-rec", (3, 48, 320), -1, 1)],
)
def test_a_seed_gives_the_same_images_again_and_another_seed_others(
    name: str, shape: tuple[int, ...], low: float, high: float
) -> None:
    task = drawn().TASKS[name]
    one, again, other = task.draw(6, 5), task.draw(6, 5), task.draw(6, 6)
    assert one.texts == again.texts
    np.testing.assert_array_equal(one.images, again.images)
    assert one.texts != other.texts
    assert one.images.shape == (6, *shape)
    assert one.images.dtype == np.float32
    assert low <= one.images.min() < one.images.max() <= high
    # More of them begin with the same ones.
    assert task.draw(8, 5).texts[:6] == one.texts


def test_drawing_captchas_gives_the_package_its_own_randomness_back() -> None:
    module = drawn()
    module.captchas(1, 0)
    assert module.captcha.image.secrets is secrets


def test_captchas_hold_only_characters_that_the_model_knows() -> None:
    texts = drawn().captchas(40, 1).texts
    assert {len(text) for text in texts} == {4, 5}
    assert not set("".join(texts)) & set("01IO_")


def test_clean_lines_have_no_noise_and_hard_ones_do() -> None:
    module = drawn()
    clean, hard = module.lines(4, 3, 0.0), module.lines(4, 3)
    for image, noisy in zip(clean.images, hard.images, strict=True):
        # The upper left corner is paper.
        assert np.ptp(image[:, :2, :2]) == 0
        assert len(np.unique(noisy)) > len(np.unique(image))


def test_lines_are_padded_on_the_right_with_zeros() -> None:
    module = drawn()
    images = module.lines(40, 2).images
    ends = [np.flatnonzero(np.any(image != 0, axis=(0, 1))).max() + 1 for image in images]
    assert min(ends) < 320
    assert all(not image[:, :, end:].any() for image, end in zip(images, ends, strict=True))


def test_the_captcha_reader_joins_repetitions_and_leaves_out_blanks_and_the_last_step() -> None:
    module = drawn()
    blank = 36
    steps = [10, 10, blank, 10, 35, 2, 2, *[blank] * 12, 9]
    assert module.read_captchas(one_hot([steps], 37).transpose(1, 0, 2)) == ["AAZ2"]
    # Where "0" is the best, the second best counts.
    logits = one_hot([[0] * 20], 37)
    logits[:, :, 11] = 0.5
    assert module.read_captchas(logits.transpose(1, 0, 2)) == ["B"]


def test_the_line_reader_knows_spaces_and_refuses_another_number_of_classes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = drawn()
    # A line separator is a character like others.
    (tmp_path / "ppocrv5-rec.keys.txt").write_text("blank\na\nb\n\u2028\n \n", encoding="utf-8")
    monkeypatch.setattr(module, "CACHE", tmp_path)
    assert module.read_lines(one_hot([[1, 1, 0, 1, 4, 2, 3], [0] * 7], 5)) == ["aa b\u2028", ""]
    with pytest.raises(ValueError, match="5 characters for 6 classes"):
        module.read_lines(one_hot([[0]], 6))


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_the_models_read_most_of_what_is_drawn(name: str) -> None:
    module = drawn()
    task = module.TASKS[name]
    if not task.model.is_file():
        pytest.skip(f"{name} is not here: python models/get.py {name}")
    session = open_session(task.model)

    def model(feed: dict[str, Any]) -> Any:
        return next(iter(run(session, feed, name).values()))

    share = module.exact(task, task.draw(64, 7), model)
    assert 0.6 < share < 1.0
