"""Pack a job for `onnx_lowrank.targets.runner`, and read what it found.

The layout of the folder is described there.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np

from onnx_lowrank.errors import InputError
from onnx_lowrank.files import is_file
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.targets import runner
from onnx_lowrank.targets.base import (
    Job,
    Outcome,
)

__all__ = ["Parcel", "model_files", "own_provider", "packed", "read_json", "read_result"]

# Types that numpy does not know, by the name that ONNX Runtime gives them.
_SMALL: dict[str, np.dtype[Any]] = {
    "tensor(bfloat16)": np.dtype(ml_dtypes.bfloat16),
    "tensor(float8e4m3fn)": np.dtype(ml_dtypes.float8_e4m3fn),
    "tensor(float8e4m3fnuz)": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "tensor(float8e5m2)": np.dtype(ml_dtypes.float8_e5m2),
    "tensor(float8e5m2fnuz)": np.dtype(ml_dtypes.float8_e5m2fnuz),
}


@dataclass(frozen=True)
class Parcel:
    """A job on disk.

    Attributes:
        folder: holds everything but the models.
        files: (name in the job's folder, file here) of everything that a copy needs.
    """

    folder: Path
    files: tuple[tuple[str, Path], ...]

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for _, path in self.files)


@contextlib.contextmanager
def packed(
    models: Sequence[Path],
    feeds: Sequence[Feed],
    job: Job,
    *,
    in_place: bool = False,
    provider: str = "cpu",
    python: Sequence[str] | None = None,
    isolate: bool = True,
    repeats: int = 0,
) -> Iterator[Parcel]:
    """A folder with the job, which is gone afterwards.

    Args:
        models: the models; their external data are found.
        feeds: the samples.
        job: what is wanted.
        in_place: whether the job names the models where they are, instead of in its folder.
        provider: execution provider, in any of its spellings.
        python: words that start a Python for the children; None for the one that runs them.
        isolate: whether each model is loaded in a process of its own.
        repeats: runs between marks, of which an emulator counts the instructions; 0 for none.

    Raises:
        InputError: a model or its data cannot be read, or there is no sample.
    """
    if not len(feeds):
        raise InputError("expected at least one sample, got none")
    with tempfile.TemporaryDirectory(prefix="onnx-lowrank-") as name:
        folder = Path(name)
        carried: list[tuple[str, Path]] = []
        places = []
        for number, model in enumerate(models):
            if in_place:
                places.append(str(model.resolve()))
                continue
            parts = model_files(model)
            places.append(f"model{number}/{parts[0][0]}")
            carried += [(f"model{number}/{inside}", path) for inside, path in parts]
        content = {
            **asdict(job),
            "models": places,
            "feeds": [_write_feed(folder, number, feed) for number, feed in enumerate(feeds)],
            "provider": provider,
            "options": {},
            "python": None if python is None else list(python),
            "isolate": isolate,
            "repeats": repeats,
        }
        (folder / "job.json").write_text(json.dumps(content), encoding="utf-8")
        (folder / "runner.py").write_bytes(Path(runner.__file__).read_bytes())
        own = sorted(path for path in folder.iterdir())
        yield Parcel(folder, (*((path.name, path) for path in own), *carried))


def model_files(model: Path) -> list[tuple[str, Path]]:
    """A model's file and its external data, by their names in its folder.

    Raises:
        InputError: the model is not there, or its data are not in its folder.
    """
    import onnx

    from onnx_lowrank.graph.serialize import data_locations

    if not is_file(model):
        raise InputError(f"{model}: no such file")
    found: dict[str, Path] = {model.name: model}
    try:
        proto = onnx.load(model, load_external_data=False)
    except Exception:  # in ONNX Runtime's own format, or what the target will refuse
        return list(found.items())
    for location in sorted(data_locations(proto)):
        inside = PurePosixPath(location)
        if inside.is_absolute() or ".." in inside.parts:
            raise InputError(
                f"{model}: expected external data in the model's folder, got {location}"
            )
        found[str(inside)] = model.parent / inside
    for path in found.values():
        if not is_file(path):
            raise InputError(f"{model}: external data file {path} is missing")
    return list(found.items())


def _write_feed(folder: Path, number: int, feed: Feed) -> dict[str, Any]:
    file = f"feed{number}.npz"
    names = {dtype: name for name, dtype in _SMALL.items()}
    arrays: dict[str, Array] = {}
    inputs = []
    for place, (name, array) in enumerate(feed.items()):
        array = np.asarray(array, order="C")
        if array.dtype == object and not all(isinstance(item, str) for item in array.flat):
            raise InputError(
                f"input {name!r}: expected a tensor, got a sequence of tensors, which is not sent "
                "to other machines"
            )
        kind = names.get(array.dtype)
        inputs.append({"name": name, "type": kind or array.dtype.name})
        if kind is not None:
            array = array.view(np.uint16 if array.dtype.itemsize == 2 else np.uint8)
        elif array.dtype.kind == "O":
            array = array.astype(np.str_)
        arrays[str(place)] = array
    np.savez(folder / file, **arrays)  # type: ignore[arg-type]
    return {"file": file, "inputs": inputs}


def read_json(path: Path, where: str) -> Any:
    """The content of a file that a runner wrote.

    Args:
        path: the file.
        where: begins the message of an error.

    Raises:
        InputError: it is not there, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: expected a result, {path.name}: {error}") from error


def read_result(folder: Path, where: str) -> tuple[Outcome, ...]:
    """What a runner left in its folder ``result``.

    Args:
        folder: that folder.
        where: begins the message of an error.

    Raises:
        InputError: the runner could run nothing, or its result cannot be read.
    """
    result = read_json(folder / "result.json", where)
    try:
        if result["fault"] is not None:
            raise InputError(f"{where}: {result['fault']}")
        return tuple(_outcome(folder, entry, result.get("half")) for entry in result["models"])
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise InputError(f"{where}: the result cannot be read: {error!r}") from error


def _outcome(folder: Path, entry: Mapping[str, Any], half: bool | None) -> Outcome:
    nodes = entry.get("nodes")
    return Outcome(
        outputs=tuple(_read_outputs(folder, sample) for sample in entry["outputs"]),
        times_ns=tuple(entry.get("times_ns", ())),
        load_ns=entry.get("load_ns"),
        first_ns=entry.get("first_ns"),
        peak_bytes=entry.get("peak_bytes"),
        nodes=None if nodes is None else {key: tuple(names) for key, names in nodes.items()},
        error=entry.get("error"),
        notes=tuple(entry["notes"]),
        half=half,
    )


def _read_outputs(folder: Path, sample: Mapping[str, Any]) -> Feed:
    outputs: dict[str, Array] = {}
    with np.load(folder / Path(sample["file"]).name, allow_pickle=False) as data:
        for place, item in enumerate(sample["outputs"]):
            array = data[str(place)]
            small = _SMALL.get(item["type"])
            if small is not None:
                array = array.view(small)
            elif array.dtype.kind == "U":
                array = array.astype(object)
            outputs[item["name"]] = array
    return outputs


def own_provider(name: str, outcomes: Sequence[Outcome] = ()) -> str:
    """Key of `Outcome.nodes` for a provider that was named in any of its spellings.

    Args:
        name: as the user wrote it.
        outcomes: what ran with it, which may know how it is written.
    """
    suffix = "executionprovider"
    wanted = name.lower().removesuffix(suffix)
    if wanted == "cpu":
        return "CPUExecutionProvider"
    for outcome in outcomes:
        for provider in outcome.nodes or ():
            if provider.lower().removesuffix(suffix) == wanted:
                return provider
    return name if name.lower().endswith(suffix) else f"{name}ExecutionProvider"
