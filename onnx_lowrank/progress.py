"""Progress of long work: what a stage is called, and how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

__all__ = ["Advance", "Progress", "Silent", "Stages"]

Advance = Callable[[int], None]


class Progress(Protocol):
    """Shows the stages of a run."""

    def plan(self, names: Sequence[str], part: str = "") -> None:
        """Say which stages come, in their order; others that come are parts of these.

        Args:
            names: the stages.
            part: of what they are a part that comes several times, such as "budget 2 of 6".
        """

    def stage(self, name: str, total: int | None) -> AbstractContextManager[Advance]:
        """Show a stage while the block runs.

        Args:
            name: what is being done.
            total: units of work, None where they are not known.

        Returns:
            A context whose value is called with the number of units just done.
        """

    def detail(self, text: str) -> None:
        """Show a detail of the running stage, in place of the one before."""


class Silent:
    """Shows nothing."""

    def plan(self, names: Sequence[str], part: str = "") -> None:
        """Show nothing."""

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Advance]:  # noqa: ARG002
        """Show nothing."""
        yield lambda _: None

    def detail(self, text: str) -> None:
        """Show nothing."""


class Stages:
    """Times the stages of a run while it shows them.

    Attributes:
        seconds: wall time by stage; a repeated stage adds to its time.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.seconds: dict[str, float] = {}

    def plan(self, names: Sequence[str], part: str = "") -> None:
        """Say which stages come; see `Progress.plan`."""
        self._progress.plan(names, part)

    def detail(self, text: str) -> None:
        """Show a detail of the running stage."""
        self._progress.detail(text)

    @contextmanager
    def __call__(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """Run a stage."""
        start = time.perf_counter()
        try:
            with self._progress.stage(name, total) as advance:
                yield advance
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
