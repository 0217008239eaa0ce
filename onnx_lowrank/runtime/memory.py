"""How much memory is free, and how much a piece of work takes; known on Linux only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

__all__ = ["available", "growth"]

Answer = TypeVar("Answer")

STATUS, RESET, SYSTEM = (
    Path("/proc/self/status"),
    Path("/proc/self/clear_refs"),
    Path("/proc/meminfo"),
)


def available() -> int | None:
    """Bytes that the system can hand out without swapping; None where it does not tell."""
    return _field(SYSTEM, "MemAvailable")


def growth(work: Callable[[], Answer]) -> tuple[Answer, int | None]:
    """Do some work, and by how many bytes the process was larger meanwhile.

    Returns:
        what the work gives, and the bytes; None where the system does not tell.
    """
    try:
        RESET.write_text("5", encoding="ascii")  # the largest size so far is forgotten
    except OSError:
        return work(), None
    before = _field(STATUS, "VmRSS")
    answer = work()
    largest = _field(STATUS, "VmHWM")
    if before is None or largest is None:
        return answer, None
    return answer, max(largest - before, 0)


def _field(path: Path, name: str) -> int | None:
    """A field of a file of lines such as ``VmRSS:  1234 kB``, in bytes."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None
