"""Pieces: finished pieces of work in a folder, so that a run that was ended can go on.

Each piece is a file named by what it is and by a digest of all that it was made from, so that it
can be taken where that is the same, and nowhere else: nothing in the folder can be out of date.
Files are written whole or not at all; one that is damaged is made again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from onnx_lowrank.errors import InputError, named
from onnx_lowrank.files import atomic, unfinished
from onnx_lowrank.numerics.contents import content_of
from onnx_lowrank.phrases import counted, listed
from onnx_lowrank.runtime.archive import BROKEN, read_archive, read_header, write_archive

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = ["Bookmark", "Pieces", "opened", "remembered"]

Answer = TypeVar("Answer")

SECONDS = 20.0
"""How often a state that goes on changing is kept."""

_BEGUN, _LOCK = "onnx-lowrank-work.json", "onnx-lowrank-work.lock"
_PIECE = re.compile(r"[a-z_]+-[0-9a-f]{40}\.npz")
_VERSION = 1


class Pieces:
    """The pieces of one folder, which no other run uses.

    Attributes:
        notes: what the user should know.
    """

    def __init__(self, folder: Path, program: Mapping[str, str], classes: Iterable[type]) -> None:
        """Use the pieces of a folder.

        Args:
            folder: it is there, and it is ours.
            program: versions of what computes.
            classes: of what may be in a piece.
        """
        self._folder, self._program = folder, dict(program)
        self._classes = tuple(classes)
        self._used: set[str] = set()
        self._taken: list[str] = []
        self._made: set[str] = set()
        self._damaged: list[str] = []
        self._full: str | None = None
        self._keys: dict[int, str] = {}
        self.notes: list[str] = []

    def key(self, *parts: Any) -> str:
        """A digest of all that a piece is made from, the versions of the program among it."""
        return content_of(self._program, *parts)

    def load(self, kind: str, key: str) -> Any:
        """A piece; None where there is none, or a damaged one."""
        name = f"{kind}-{key}.npz"
        path = self._folder / name
        self._used.add(name)
        try:
            if not path.exists():
                return None
            header = read_header(path)
            if (header["kind"], header["key"], header["version"]) != (kind, key, _VERSION):
                raise ValueError("another piece")
            found = read_archive(path, self._classes)
        except BROKEN:
            self._damaged.append(name)
            return None
        if name not in self._made:
            self._taken.append(name)
        return found

    def save(self, kind: str, key: str, value: Any) -> None:
        """Keep a piece; where there is no room for it, that is noted."""
        name = f"{kind}-{key}.npz"
        self._used.add(name)
        self._made.add(name)
        if self._full is not None:
            return
        try:
            with atomic(self._folder / name) as file:
                header = {"kind": kind, "key": key, "version": _VERSION}
                write_archive(file, header, value, self._classes)
        except OSError as error:
            self._full = error.strerror or str(error)

    def drop(self, kind: str, key: str) -> None:
        """Remove a piece that is of no use any more."""
        (self._folder / f"{kind}-{key}.npz").unlink(missing_ok=True)

    def find(self, work: Callable[[Any], Any], given: Any) -> Any:
        """The answer of work that was done before (see `onnx_lowrank.numerics.crew.Keeper`)."""
        key = self.key(work.__module__, work.__qualname__, given)
        found = self.load(work.__name__, key)
        if found is None:
            self._keys[id(given)] = key
        return found

    def store(self, work: Callable[[Any], Any], given: Any, answer: Any) -> None:
        """Keep an answer."""
        self.save(work.__name__, self._keys.pop(id(given)), answer)

    def summary(self) -> list[str]:
        """What the user should know of the folder, for the report."""
        option, notes = named("work", self._folder), list(self.notes)
        if self._taken:
            pieces = counted(len(self._taken), "piece")
            notes.append(f"{option}: taken from an earlier run: {pieces} of finished work")
        if self._damaged:
            names = listed(sorted(set(self._damaged)), 3)
            notes.append(f"{option}: damaged, and made again: {names}")
        if self._full is not None:
            notes.append(f"{option}: not all was kept there: {self._full}")
        return notes

    def finished(self) -> None:
        """Remove the pieces that this run had no use for: the run is done."""
        for path in self._folder.iterdir():
            if _PIECE.fullmatch(path.name) and path.name not in self._used:
                path.unlink(missing_ok=True)


class Bookmark:
    """A state of work that goes on changing, of which the newest one is kept."""

    def __init__(self, pieces: Pieces, kind: str, key: str) -> None:
        """A place in a folder."""
        self._pieces, self._kind, self._key = pieces, kind, key
        self._saved = time.monotonic()

    def load(self) -> Any:
        """The newest state; None without."""
        return self._pieces.load(self._kind, self._key)

    def save(self, state: Callable[[], Any]) -> None:
        """Keep a state, unless one was kept a moment ago."""
        if time.monotonic() - self._saved >= SECONDS:
            self._pieces.save(self._kind, self._key, state())
            self._saved = time.monotonic()

    def drop(self) -> None:
        """The work is done."""
        self._pieces.drop(self._kind, self._key)


def remembered(
    pieces: Pieces | None,
    kind: str,
    parts: Callable[[], Sequence[Any]],
    compute: Callable[[], Answer],
) -> Answer:
    """What is computed, or was by an earlier run; never None.

    Args:
        pieces: where pieces are; None computes it.
        kind: what it is, in small letters.
        parts: all that it is made from.
        compute: makes it.
    """
    if pieces is None:
        return compute()
    key = pieces.key(kind, *parts())
    found: Answer | None = pieces.load(kind, key)
    if found is None:
        found = compute()
        pieces.save(kind, key, found)
    return found


@contextlib.contextmanager
def opened(
    folder: Path,
    begun: Mapping[str, Any],
    program: Mapping[str, str],
    classes: Iterable[type],
) -> Iterator[Pieces]:
    """The pieces in a folder, which is made where it is not there.

    Args:
        folder: new, empty, or made by an earlier run.
        begun: what is worked on, as plain values: where it is another thing than the last time,
            a note says so.
        program: versions of what computes.
        classes: of what may be in a piece.

    Raises:
        InputError: it holds what no run put there, another run uses it, or it cannot be written.
    """
    option = named("work", folder)
    try:
        folder.mkdir(exist_ok=True)
        names = sorted(path.name for path in folder.iterdir())
    except FileNotFoundError as error:
        raise InputError(f"{option}: folder {folder.parent} does not exist") from error
    except FileExistsError as error:
        raise InputError(f"{option}: expected a folder, got a file") from error
    except OSError as error:
        raise InputError(f"{option}: {error.strerror or error}") from error
    own = {_BEGUN, _LOCK}
    foreign = [
        name
        for name in names
        if name not in own and not _PIECE.fullmatch(name) and not unfinished(name)
    ]
    if foreign:
        raise InputError(
            f"{option}: expected a new or empty folder, or one of an earlier run, got one with "
            f"{listed(foreign, 3)}"
        )
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_locked(folder / _LOCK, option))
            for name in filter(unfinished, names):
                _removed(folder / name)
            pieces = Pieces(folder, program, classes)
            _compared(pieces, folder / _BEGUN, {**begun, "program": dict(program)}, option)
        except OSError as error:
            raise InputError(f"{option}: {error.strerror or error}") from error
        yield pieces


def _removed(path: Path) -> None:
    """Remove what a run that was killed left unfinished."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _compared(pieces: Pieces, path: Path, begun: Mapping[str, Any], option: str) -> None:
    """Note what has changed since the folder was used last, and write down what it is now."""
    text = json.dumps(begun, indent=1, default=str)
    now = json.loads(text)
    before: Any = None
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            pieces.notes.append(f"{option}: {path.name} is damaged, and is written again")
    if isinstance(before, dict) and before != now:
        changed = []
        for name in now:
            old, new = before.get(name), now[name]
            if old == new:
                continue
            if isinstance(old, dict) and isinstance(new, dict):
                inner = [key for key in (*new, *old) if old.get(key) != new.get(key)]
                changed.append(f"{name} ({listed(list(dict.fromkeys(inner)), 4)})")
            else:
                changed.append(name)
        pieces.notes.append(
            f"{option}: changed since the last run there: {listed(changed, 4)}; what depends on "
            "that is made again"
        )
    if before != now:
        with atomic(path) as file:
            file.write(text.encode())


@contextlib.contextmanager
def _locked(path: Path, option: str) -> Iterator[None]:
    """A lock that goes with the process, however it ends.

    Raises:
        InputError: another process has it.
    """
    with path.open("a+b") as file:
        try:
            _lock(file)
        except OSError as error:
            file.seek(0)
            number = file.read(20).decode(errors="replace").strip()
            who = f" (process {number})" if number.isdecimal() else ""
            raise InputError(
                f"{option}: another run works there{who}; expected a folder that no other run uses"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()).encode())
        file.flush()
        yield


if sys.platform == "win32":

    def _lock(file: IO[bytes]) -> None:
        file.seek(1 << 20)  # behind what others read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

else:

    def _lock(file: IO[bytes]) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
