"""Recorded speech: how it is parted, read out of its packages, and how wrong words are counted."""

from __future__ import annotations

import gzip
import importlib
import io
import shutil
import subprocess
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.places import ROOT

sys.path.insert(0, str(ROOT / "models"))


@pytest.fixture
def speech() -> Any:
    pytest.importorskip("tokenizers", reason="tokenizers is not installed: extra 'exporters'")
    return importlib.import_module("speech")


@pytest.mark.parametrize(
    ("said", "read", "count"),
    [
        ("press one now", "press one now", 0),
        ("press one now", "press now", 1),
        ("press now", "press one now", 1),
        ("press one now", "dress one now", 1),
        ("press one now", "", 3),
        ("", "press", 1),
        ("a b c d", "b c d e", 2),
    ],
)
def test_wrong_words_are_the_least_number_of_changes(
    speech: Any, said: str, read: str, count: int
) -> None:
    assert speech.mistakes(said.split(), read.split()) == count


def test_case_punctuation_and_digits_do_not_count(speech: Any) -> None:
    wanted = ["please", "press", "two", "or", "star", "don't", "call", "forward"]
    assert speech.words("Please press 2, or *: DON’T call-forward!") == wanted
    assert speech.words("dial 500") == ["dial", "500"]


def prompt(speech: Any, name: str, seconds: float, text: str) -> Any:
    sound = np.full(int(seconds * speech.RATE), 0.1, np.float32)
    return speech.Prompt(name, sound, text)


def test_no_prompt_both_calibrates_and_judges(speech: Any) -> None:
    recorded = [
        prompt(speech, "conf-full", 1.5, "That conference is full."),
        prompt(speech, "demo", 40.0, "A very long text indeed."),
        prompt(speech, "vm-full", 1.7, "That mailbox is full."),
        *(prompt(speech, f"digits/{n}", 0.8, str(n)) for n in range(9)),
    ]
    assert [one.name for one in speech.sentences(recorded)] == ["conf-full"]
    sounds = speech.sounds(recorded)
    # Nine short ones of 0.8 s fill one of 2 s and one of 3 s; the last two are too few.
    lengths = sorted(round(len(sound) / speech.RATE, 2) for sound in sounds)
    assert lengths == [1.7, 2.4, 3.2]


def wav(samples: Any, rate: int) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(np.asarray(samples, "<i2").tobytes())
    return file.getvalue()


def package(files: dict[str, bytes], name: str, folder: Path) -> Path:
    tree = folder / name
    for path, content in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(content)
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN" / "control").write_text(
        f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: a\n"
    )
    made = folder / f"{name}.deb"
    command = ["dpkg-deb", "--build", "--root-owner-group", str(tree), str(made)]
    subprocess.run(command, check=True, capture_output=True)
    return made


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb here")
def test_prompts_come_with_their_texts(speech: Any, tmp_path: Path) -> None:
    tone = 8000 * np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
    texts = "; a comment\nvm-a: Hello, you.\nbeep: [a tone]\nquiet: (1 second of silence)\n"
    folder = "usr/share/asterisk/sounds/en_US_f_Allison"
    names = ("vm-a", "beep", "quiet", "unknown")
    sounds = {f"{folder}/{name}.wav": wav(tone, 8000) for name in names}
    package(sounds, "prompts", tmp_path)
    own = {"usr/share/doc/a/core-sounds-en.txt.gz": gzip.compress(texts.encode())}
    package(own, "prompts.texts", tmp_path)
    (found,) = speech.prompts(tmp_path)
    assert (found.name, found.text, found.seconds) == ("vm-a", "Hello, you.", 1.0)
    middle = found.sound[4000:12000]
    assert middle.dtype == np.float32
    wanted = 8000 / 32768 * np.sin(2 * np.pi * 440 * np.arange(4000, 12000) / 16000)
    np.testing.assert_allclose(middle, wanted, atol=2e-3)
