"""Labelled images for the two models that read text, drawn from a seed.

The captchas are the package ``captcha``'s own, in the size, channel order and characters that the
model ``captcha`` was trained for.  The lines of text for ``ppocrv5-rec`` are drawn here, in fonts
that travel in the package ``matplotlib``; they are turned, blurred and noisy until the model reads
about four fifths of them.  One seed gives the same images wherever the packages have the same
versions.  Calibration and judging take different seeds.
"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import captcha.image
import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

__all__ = [
    "CAPTCHA",
    "LINES",
    "TASKS",
    "Drawn",
    "Task",
    "captchas",
    "exact",
    "feeds",
    "lines",
    "read_captchas",
    "read_lines",
]

CACHE = Path(__file__).resolve().parent / "cache"
BATCH = 16

# The classes of the captcha model.  It was not taught 0, 1, I and O, which are hard to tell apart.
CAPTCHA_LABELS = string.digits + string.ascii_uppercase + "_"
CAPTCHA_ALPHABET = "".join(label for label in CAPTCHA_LABELS if label not in "01IO_")
CAPTCHA_LENGTHS = (4, 4, 5)  # longer ones are squeezed and much harder
CAPTCHA_SIZE = (160, 60)  # width, height

LINE_HEIGHT, LINE_WIDTH = 48, 320
LINE_HARDNESS = 1.25
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
)
_VOCABULARY = """
air answer art bank board body book bridge business car case change child city company corner
country day door education engine evening event face fact family father field force friend
game garden girl glass government group hand harbour head health history home hour house
idea information island job journey kind kitchen law letter level life light line machine
market member minute moment money month morning mother mountain music name nation night
number office order paper parent party people person picture place point power president
problem program question reason report research result right river road room school season
service side state station story street student study summer system table teacher team thing
time town train tree village voice war water week window winter woman word work world year
"""
WORDS = tuple(_VOCABULARY.split())


@dataclass(frozen=True)
class Drawn:
    """Images as a model takes them (N, 3, H, W), and what is written on each."""

    images: NDArray[np.float32]
    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Task:
    """A model that reads text, the images for it, and how its output is read.

    Attributes:
        name: of the model in ``models/cache``.
        input: the name of its input.
        draw: count, seed -> that many labelled images.
        read: output of one batch -> the text of each of its images.
    """

    name: str
    input: str
    draw: Callable[[int, int], Drawn]
    read: Callable[[NDArray[np.floating]], list[str]]

    @property
    def model(self) -> Path:
        """Where the model is; see ``models/get.py``."""
        return CACHE / f"{self.name}.onnx"


class _Dice(random.Random):
    """Seeded stand-in for the module ``secrets``, as far as the package ``captcha`` uses it."""

    def randbelow(self, below: int) -> int:
        return self.randrange(below)

    def randbits(self, bits: int) -> int:
        return self.getrandbits(bits)


def captchas(count: int, seed: int) -> Drawn:
    """Captchas of 4 or 5 characters: (count, 3, 60, 160), blue first, values from 0 to 255."""
    dice = _Dice(seed)
    width, height = CAPTCHA_SIZE
    drawer = captcha.image.ImageCaptcha(width, height)
    images = np.empty((count, 3, height, width), np.float32)
    texts = []
    # The package takes its randomness from the operating system and offers no seed.
    with mock.patch.object(captcha.image, "secrets", dice):
        for index in range(count):
            text = "".join(dice.choices(CAPTCHA_ALPHABET, k=dice.choice(CAPTCHA_LENGTHS)))
            pixels = np.asarray(drawer.generate_image(text), np.float32)
            images[index] = pixels[:, :, ::-1].transpose(2, 0, 1)
            texts.append(text)
    return Drawn(images, tuple(texts))


def read_captchas(logits: NDArray[np.floating]) -> list[str]:
    """The texts that the captcha model means by its output (20, N, 37).

    As the package that brings the model does it: greedily, without the class "0", for which the
    model has no training, and without the last of the 20 steps.
    """
    best = logits[:-1, :, 1:].argmax(axis=2).T + 1
    return [_collapsed(row, CAPTCHA_LABELS, CAPTCHA_LABELS.index("_")) for row in best]


def lines(count: int, seed: int, hardness: float = LINE_HARDNESS) -> Drawn:
    """Lines of text in Latin letters: (count, 3, 48, 320), values from -1 to 1, padded with 0.

    Args:
        count: how many.
        seed: of texts and images.
        hardness: how far they are turned and blurred and how noisy they are; 0 is clean.
    """
    dice = random.Random(seed)
    noise = np.random.default_rng(seed)
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    images = np.zeros((count, 3, LINE_HEIGHT, LINE_WIDTH), np.float32)
    texts = []
    for index in range(count):
        text = _text(dice)
        font = ImageFont.truetype(fonts / f"{dice.choice(FONTS)}.ttf", dice.randint(15, 28))
        image = _line(text, font, dice, noise, hardness)
        # Lines keep their proportions and are squeezed only where they would not fit.
        width = min(LINE_WIDTH, math.ceil(LINE_HEIGHT * image.width / image.height))
        scaled = image.resize((width, LINE_HEIGHT), Image.Resampling.BILINEAR)
        images[index, :, :, :width] = np.asarray(scaled, np.float32) / 127.5 - 1
        texts.append(text)
    return Drawn(images, tuple(texts))


def read_lines(probabilities: NDArray[np.floating]) -> list[str]:
    """The texts that PP-OCRv5 means by its output (N, steps, 18385); class 0 is the blank."""
    file = CACHE / "ppocrv5-rec.keys.txt"
    # Some of the characters break lines too, in the eyes of str.splitlines.
    labels = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if len(labels) != probabilities.shape[2]:
        raise ValueError(f"{file}: {len(labels)} characters for {probabilities.shape[2]} classes")
    return [_collapsed(row, labels, 0) for row in probabilities.argmax(axis=2)]


def _collapsed(best: NDArray[np.integer], labels: Sequence[str], blank: int) -> str:
    """What a row of classes (steps,) means in CTC: repetitions are one, blanks nothing."""
    starts = np.flatnonzero(np.diff(best, prepend=-1))
    return "".join(labels[best[step]] for step in starts if best[step] != blank)


def _text(dice: random.Random) -> str:
    """One or two words, a date, a price or a code."""
    kind = dice.choices(("words", "date", "price", "code"), (0.5, 0.15, 0.15, 0.2))[0]
    if kind == "date":
        return f"{dice.randint(1, 28):02d}/{dice.randint(1, 12):02d}/{dice.randint(1950, 2030)}"
    if kind == "price":
        amount = f"{dice.randint(1, 999)}.{dice.randint(0, 99):02d}"
        return f"{dice.choice(WORDS)} {dice.choice('$€£')}{amount}"
    if kind == "code":
        return "".join(dice.choices(CAPTCHA_ALPHABET, k=dice.randint(6, 10)))
    text = " ".join(dice.sample(WORDS, dice.randint(1, 2)))
    return dice.choices((text, text.title(), text.upper()), (0.6, 0.3, 0.1))[0]


def _line(
    text: str,
    font: ImageFont.FreeTypeFont,
    dice: random.Random,
    noise: np.random.Generator,
    hardness: float,
) -> Image.Image:
    """A grey image of one line of text, dark on light."""
    left, top, right, bottom = (math.floor(edge) for edge in font.getbbox(text))
    margin = dice.randint(2, 6)
    paper = dice.randint(170, 255)
    ink = dice.randint(0, paper - 80)
    image = Image.new("L", (right - left + 2 * margin, bottom - top + 2 * margin), paper)
    ImageDraw.Draw(image).text((margin - left, margin - top), text, font=font, fill=ink)
    angle = dice.uniform(-2, 2) * hardness
    image = image.rotate(angle, Image.Resampling.BICUBIC, expand=True, fillcolor=paper)
    image = image.filter(ImageFilter.GaussianBlur(dice.uniform(0, 1) * hardness))
    grey = np.asarray(image, np.float32)
    pixels = grey + noise.normal(0, dice.uniform(0, 30) * hardness, grey.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


CAPTCHA = Task("captcha", "image", captchas, read_captchas)
LINES = Task("ppocrv5-rec", "x", lines, read_lines)
TASKS: Mapping[str, Task] = {task.name: task for task in (CAPTCHA, LINES)}


def feeds(task: Task, drawn: Drawn, batch: int = BATCH) -> list[dict[str, NDArray[np.float32]]]:
    """What to run the model with, in batches; the last one may be smaller."""
    return [
        {task.input: drawn.images[start : start + batch]} for start in range(0, len(drawn), batch)
    ]


def exact(
    task: Task,
    drawn: Drawn,
    run: Callable[[dict[str, NDArray[np.float32]]], NDArray[np.floating]],
) -> float:
    """Share of the images that are read without a mistake.

    Args:
        task: how outputs are read.
        drawn: the images.
        run: the model, from a batch of `feeds` to its output.
    """
    # Each output is read at once: those of PP-OCRv5 are 3 MB an image.
    read = [text for feed in feeds(task, drawn) for text in task.read(run(feed))]
    right = [one == other for one, other in zip(drawn.texts, read, strict=True)]
    return sum(right) / len(right)
