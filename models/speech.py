"""Recorded speech with its texts for Moonshine, and how it is read and counted.

The recordings are the prompts of a telephone exchange in Debian's packages
``asterisk-core-sounds-en-wav`` and ``asterisk-core-sounds-en`` (the texts): one speaker, 8 kHz,
brought to 16 kHz here.  Prompts of the voice mailbox and those of a word or two calibrate, all
others judge, so that no sentence of one set has a near twin in the other.

Words are counted as the word error rate counts them: the least number of words put in, left out or
changed, over the number of words said.  Case, punctuation and hyphens do not count, and a number up
to ten is the same in digits.
"""

from __future__ import annotations

import gzip
import io
import re
import subprocess
import tarfile
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from scipy.signal import resample_poly
from tokenizers import Tokenizer

__all__ = ["RATE", "Prompt", "Reader", "mistakes", "prompts", "sentences", "sounds", "words"]

CACHE = Path(__file__).resolve().parent / "cache"
RATE = 16000
# Of the recordings, in Hz.
_RECORDED = 8000
_SOUNDS = "en_US_f_Allison/"
_TEXTS = "core-sounds-en.txt.gz"
# A text in brackets tells of tones or of silence.
_HEARD = r"\[|^\("
# A shorter prompt, or one of fewer words, is one of a few that a program says in a row.
_SHORTEST, _FEWEST = 1.0, 3
# Seconds that the model was made for.
_LONGEST = 30.0
# Short prompts are joined up to such lengths in turn, in seconds.
_JOINED = (2.0, 3.0, 4.5, 7.0)
_MAILBOX = "vm-"
_FIRST, _LAST = 1, 2
# Tokens of a second of speech, at most; more of them repeat themselves.
_TOKENS_A_SECOND = 6.5
_UP_TO_FIVE = ("zero", "one", "two", "three", "four", "five")
_NUMBERS = dict(enumerate((*_UP_TO_FIVE, "six", "seven", "eight", "nine", "ten")))

Sound = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Prompt:
    """A recording.

    Attributes:
        name: that of its file, without the suffix.
        sound: shape [samples] at 16 kHz, -1..1.
        text: what is said.
    """

    name: str
    sound: Sound
    text: str

    @property
    def seconds(self) -> float:
        """Its length."""
        return len(self.sound) / RATE


def prompts(cache: Path = CACHE) -> list[Prompt]:
    """All recordings of speech, by name."""
    texts = dict(_texts(cache / "prompts.texts.deb"))
    found = []
    for path, content in _files(cache / "prompts.deb", ".wav"):
        name = path.partition(_SOUNDS)[2].removesuffix(".wav")
        text = texts.get(name, "")
        if text and not re.search(_HEARD, text):
            found.append(Prompt(name, _sound(content), text))
    return sorted(found, key=lambda prompt: prompt.name)


def sentences(recorded: Sequence[Prompt]) -> list[Prompt]:
    """Those that judge: whole sentences, none of the voice mailbox."""
    return [one for one in recorded if _whole(one) and not one.name.startswith(_MAILBOX)]


def sounds(recorded: Sequence[Prompt]) -> list[Sound]:
    """Sounds to calibrate with: the voice mailbox, and short prompts joined, in a random order."""
    long = [one.sound for one in recorded if _whole(one) and one.name.startswith(_MAILBOX)]
    short = [one for one in recorded if one.seconds < _SHORTEST or len(words(one.text)) < _FEWEST]
    random = np.random.default_rng(0)
    joined: list[Sound] = []
    parts: list[Sound] = []
    for place in random.permutation(len(short)):
        parts.append(short[place].sound)
        if sum(map(len, parts)) >= _JOINED[len(joined) % len(_JOINED)] * RATE:
            joined.append(np.concatenate(parts))
            parts = []
    every = long + joined
    return [every[place] for place in random.permutation(len(every))]


def _whole(prompt: Prompt) -> bool:
    return _SHORTEST <= prompt.seconds <= _LONGEST and len(words(prompt.text)) >= _FEWEST


class Reader:
    """Reads words out of what an encoder of Moonshine makes of a sound."""

    def __init__(self, cache: Path = CACHE) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(
            cache / "moonshine.decoder.onnx", options, providers=["CPUExecutionProvider"]
        )
        self._tokenizer = Tokenizer.from_file(str(cache / "moonshine.tokenizer.json"))
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._empty = {
            own.name: np.zeros((1, own.shape[1], 0, own.shape[3]), np.float32)
            for own in self._session.get_inputs()
            if own.name.startswith("past_key_values")
        }

    def read(self, hidden: Sound, seconds: float) -> str:
        """The text, by the likeliest token each time.

        Args:
            hidden: shape [1, frames, width], the encoder's output.
            seconds: length of the sound, which bounds that of the text.
        """
        past, ids, last = dict(self._empty), [], _FIRST
        for step in range(int(seconds * _TOKENS_A_SECOND) + 3):
            feed = {
                "input_ids": np.array([[last]], np.int64),
                "encoder_hidden_states": hidden,
                "use_cache_branch": np.array([step > 0]),
                **past,
            }
            found = dict(zip(self._outputs, self._session.run(None, feed), strict=True))
            last = int(np.asarray(found["logits"])[0, -1].argmax())
            if last == _LAST:
                break
            ids.append(last)
            for name in past:  # what was made of the encoder's output stays
                if step == 0 or ".decoder." in name:
                    past[name] = found[name.replace("past_key_values", "present")]
        return str(self._tokenizer.decode(ids))


def words(text: str) -> list[str]:
    """The words of a text as they are compared."""
    whole = text.lower().replace("’", "'").replace("*", " star ").replace("#", " pound ")
    bare = re.sub(r"[^a-z0-9' ]", " ", whole)
    return [_NUMBERS.get(int(word), word) if word.isdigit() else word for word in bare.split()]


def mistakes(said: Sequence[str], read: Sequence[str]) -> int:
    """The least number of words put in, left out or changed between two texts."""
    row = list(range(len(read) + 1))
    for count, word in enumerate(said, 1):
        before, row[0] = row[0], count
        for place, other in enumerate(read, 1):
            changed = before + (word != other)
            before = row[place]
            row[place] = min(changed, before + 1, row[place - 1] + 1)
    return row[-1]


def _texts(package: Path) -> Iterator[tuple[str, str]]:
    for _, content in _files(package, _TEXTS):
        for line in gzip.decompress(content).decode("utf-8").splitlines():
            name, between, text = line.partition(": ")
            if between and not line.startswith(";"):
                yield name, text.strip()


def _files(package: Path, suffix: str) -> Iterator[tuple[str, bytes]]:
    """Files of a Debian package whose names end so."""
    run = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(run.stdout)) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            if content is not None and member.name.endswith(suffix):
                yield member.name, content.read()


def _sound(content: bytes) -> Sound:
    with wave.open(io.BytesIO(content)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    return np.asarray(resample_poly(samples / 32768, RATE // _RECORDED, 1), np.float32)
