"""Files: may a file be written here, and writing it whole or not at all.

A run names everything that it writes as an `Output` and has all of them checked at once, against
each other and against everything that it reads, before the work begins.  A regular file is written
beside its place and renamed.  A link that exists is followed.  A device, a pipe or a descriptor
such as ``/dev/stdout`` is written through: it has no place that a rename could take.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from onnx_lowrank.errors import InputError, named

__all__ = [
    "Output",
    "atomic",
    "check_outputs",
    "copy_beside",
    "digest",
    "exists",
    "is_file",
    "is_standard_output",
    "pending",
    "place",
    "resolved",
    "same_file",
    "unfinished",
    "workspace",
    "write_text",
    "written_through",
]

_PREFIX = ".onnx-lowrank-"
_LINKS = 40  # as many as Linux follows
_DESCRIPTORS = re.compile(r"/proc/(\d+)(?:/task/\d+)?/fd|/dev/fd")


@dataclass(frozen=True)
class Output:
    """A file that a run is going to write.

    Attributes:
        path: where to.
        option: the argument that named it, such as "save_stats"; empty for the result itself.
        force: whether a regular file that stands there may be replaced.
        beside: names of further files that may be written in its folder.
    """

    path: Path
    option: str = ""
    force: bool = True
    beside: tuple[str, ...] = ()

    def __str__(self) -> str:
        return named(self.option, self.path) if self.option else str(self.path)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The file and those beside it."""
        return self.path, *(resolved(self.path).with_name(name) for name in self.beside)


def check_outputs(outputs: Sequence[Output], inputs: Iterable[Path]) -> None:
    """Refuse places that cannot or must not be written.

    Args:
        outputs: everything that the run writes.
        inputs: every file that it reads.

    Raises:
        InputError: naming the place and what is wrong with it.
    """
    read = tuple(inputs)
    for output in outputs:
        _check_place(output)
        for source in read:
            if same_file(output.path, source):
                raise InputError(f"{output}: would overwrite the input {source}")
        if not output.force and not written_through(output.path) and output.path.exists():
            raise InputError(f"{output}: exists; {named('force', True)} overwrites it")
    # A device such as /dev/null may be written twice.
    kept = [output for output in outputs if not output.path.is_char_device()]
    for number, output in enumerate(kept):
        for other in kept[:number]:
            if any(same_file(one, two) for one in output.paths for two in other.paths):
                raise InputError(f"{output}: would overwrite {other}, which this run writes too")


def _check_place(output: Output) -> None:
    """Check one place by itself.

    Raises:
        InputError: it cannot be written.
    """
    path = output.path
    try:
        found = os.stat(path)  # noqa: PTH116 - Path.stat is the same, but for the errors
    except ValueError as error:
        raise InputError(f"{str(path)!r}: expected a file name, got one with a NUL") from error
    except FileNotFoundError:
        found = None
    except NotADirectoryError as error:
        raise InputError(f"{output}: folder {path.parent} does not exist") from error
    except OSError as error:
        raise InputError(f"{output}: cannot be written: {error.strerror or error}") from error
    if found is None and path.is_symlink():
        raise InputError(
            f"{output}: expected a file or a new name, got a link to {path.readlink()}, "
            "which does not exist"
        )
    if found is not None and stat.S_ISDIR(found.st_mode):
        raise InputError(f"{output}: expected a file to write, got a folder; it cannot be written")
    if written_through(path):
        if found is None or not os.access(path, os.W_OK):
            raise InputError(f"{output}: cannot be written")
        return
    folder = resolved(path).parent
    if not folder.is_dir():
        raise InputError(f"{output}: folder {folder} does not exist")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{output}: folder {folder} cannot be written")


def same_file(one: Path, other: Path) -> bool:
    """Whether two names lead to one file, which need not exist."""
    try:
        return one.samefile(other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)
    except ValueError:  # a NUL: no such file
        return False


def resolved(path: Path) -> Path:
    """The file that a link leads to; any other path as it is."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else path  # noqa: PTH114


def written_through(path: Path) -> bool:
    """Whether a path is a device, a pipe, a socket or an open descriptor, not a regular file."""
    if _descriptor(path) is not None:
        return True
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def _descriptor(path: Path) -> int | None:
    """The descriptor of this process that a path such as ``/dev/stdout`` names; or None."""
    for _ in range(_LINKS):
        folder = _DESCRIPTORS.fullmatch(os.path.realpath(path.parent))
        if folder is not None and path.name.isdecimal():
            own = folder[1] is None or int(folder[1]) == os.getpid()
            return int(path.name) if own else None
        if not os.path.islink(path):  # noqa: PTH114 - for names that no file system takes
            return None
        path = path.parent / path.readlink()
    return None


def digest(files: Iterable[Path]) -> str:
    """SHA-256 of files, one after the other, in hexadecimal: what ``cat … | sha256sum`` prints.

    Raises:
        InputError: one cannot be read.
    """
    found = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    found.update(block)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    return found.hexdigest()


def exists(path: Path) -> bool:
    """As `Path.exists`, for any text: a name that no file system takes does not exist."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_file(path: Path) -> bool:
    """As `Path.is_file`, for any text: a name that no file system takes is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_standard_output(path: Path) -> bool:
    """Whether a path leads to where this process's standard output goes, other than a device."""
    try:
        found, own = path.stat(), os.fstat(1)
    except (OSError, ValueError):
        return False
    return os.path.samestat(found, own) and not stat.S_ISCHR(own.st_mode)


_PENDING: list[None] = []  # one entry for each; a list is safe with several threads


def pending() -> bool:
    """Whether there is a workspace or an unfinished file that has to be removed before the end."""
    return bool(_PENDING)


@contextmanager
def _unfinished() -> Iterator[None]:
    _PENDING.append(None)
    try:
        yield
    finally:
        _PENDING.pop()


@contextmanager
def workspace(folder: Path | None) -> Iterator[Path]:
    """A hidden folder that is removed afterwards.

    Args:
        folder: where it is made; None for the system's folder of temporary files.

    Raises:
        InputError: it cannot be made; or an operation of the block on a file fails, as on a full
            disk.
    """
    with _unfinished(), _one_line(None if folder is None else str(folder)):
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _one_line(name: str | None) -> Iterator[None]:
    """Turn an `OSError` into one line that names a file or a folder."""
    try:
        yield
    except OSError as error:
        where = name or tempfile.gettempdir()
        if error.filename is not None and _PREFIX not in os.fsdecode(error.filename):
            where = os.fsdecode(error.filename)
        why = f"{where}: {error.strerror or error}; nothing written"
        raise InputError(why) from error


@contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """A new file that takes the place of ``path`` when the block ends, and not if it fails.

    Raises:
        OSError: it cannot be written.
    """
    folder = Path(tempfile.gettempdir()) if written_through(path) else resolved(path).parent
    beside = folder / f"{_PREFIX}{secrets.token_hex(8)}"
    with _unfinished():
        try:
            with beside.open("xb") as file:
                yield file
            place(beside, path)
        finally:
            beside.unlink(missing_ok=True)


def unfinished(name: str) -> bool:
    """Whether a file or a folder is one that a run had not finished when it was killed."""
    return name.startswith(_PREFIX)


def copy_beside(source: Path, target: Path, without: Sequence[Path]) -> None:
    """Copy the files of a folder and its folders into another one, each whole or not at all.

    Args:
        source: the folder.
        target: the other one, which is there.
        without: files that are not copied.

    Raises:
        OSError: a file cannot be read or written.
    """
    own = target.resolve()
    for file in sorted(source.rglob("*")):
        inside = file.relative_to(source)
        hidden = any(part.startswith(".") for part in inside.parts)
        if hidden or not file.is_file() or file.resolve().is_relative_to(own):
            continue
        if any(same_file(file, other) for other in without):
            continue
        copy_of = target / inside
        copy_of.parent.mkdir(parents=True, exist_ok=True)
        with atomic(copy_of) as copy, file.open("rb") as original:
            shutil.copyfileobj(original, copy)


def place(file: Path, path: Path) -> None:
    """Move a finished file to its place: by one rename, or through what is not a regular file.

    Args:
        file: the file, on the file system of ``path`` if that is a regular file or a new name.
        path: its place.

    Raises:
        OSError: the place cannot be written.
    """
    if not written_through(path):
        os.replace(file, resolved(path))  # noqa: PTH105 - Path.replace is the same
        return
    number = _descriptor(path)
    if number is not None and sys.stdout is not None:
        with contextlib.suppress(OSError, ValueError):  # earlier output must be written first
            sys.stdout.flush()
    with (
        file.open("rb") as content,
        path.open("wb") if number is None else os.fdopen(os.dup(number), "wb") as through,
    ):
        shutil.copyfileobj(content, through, 1 << 20)
    file.unlink()


def write_text(output: Output, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    try:
        with atomic(output.path) as file:
            file.write(text.encode("utf-8", errors="backslashreplace"))
    except OSError as error:
        raise InputError(f"{output}: {error.strerror or error}") from error
