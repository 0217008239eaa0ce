"""Report files: which kinds there are, by the ending of the name, and writing one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_lowrank.errors import UsageError, named
from onnx_lowrank.files import Output, write_text, written_through

if TYPE_CHECKING:
    from onnx_lowrank.report import JsonReport

__all__ = ["JSON", "ReportFile", "Writers"]

Writers = Mapping[str, Callable[[Any], str]]
"""Ending of the file's name -> the text of a report."""


def _json(report: JsonReport) -> str:
    return report.to_json() + "\n"


JSON: Writers = {".json": _json}
"""What every report can be written as; the first of several is what a pipe gets."""


@dataclass(frozen=True)
class ReportFile:
    """The file of ``--report``, or none.

    Attributes:
        path: where it is written; None for no report.
        writers: the kinds that this report can have.

    Raises:
        UsageError: the name of a regular file ends in none of them.
    """

    path: Path | None
    writers: Writers = field(default_factory=lambda: JSON)

    def __post_init__(self) -> None:
        if self.path is None or written_through(self.path):
            return
        if self.path.suffix.lower() not in self.writers:
            raise UsageError(
                f"{named('report_path', self.path)}: expected a name with "
                f"{' or '.join(self.writers)}"
            )

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The file among everything that a run writes."""
        return () if self.path is None else (Output(self.path, "report_path"),)

    def write(self, report: JsonReport) -> None:
        """Write the report, if that is wanted.

        Raises:
            InputError: the file cannot be written.
        """
        for output in self.outputs:
            text = self.writers.get(output.path.suffix.lower(), next(iter(self.writers.values())))
            write_text(output, text(report))
