"""Report files: which kinds there are, by the ending of the name, and writing them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onnx_lowrank.errors import UsageError, named
from onnx_lowrank.files import Output, write_text, written_through

if TYPE_CHECKING:
    from onnx_lowrank.schema.json_report import JsonReport

__all__ = ["ENDINGS", "JSON", "ReportFiles"]

JSON = (".json",)
"""What every result can be written as, and what a pipe gets."""
ENDINGS = (*JSON, ".html", ".md", ".csv")
"""What the results of most verbs can be written as: the table of `onnx_lowrank.reports.writers`,
which is not imported before there is a result."""


@dataclass(frozen=True)
class ReportFiles:
    """The files of ``--report``, or none.

    Attributes:
        paths: where they are written.
        endings: of the names that this result can have.

    Raises:
        UsageError: the name of a regular file ends in none of them.
    """

    paths: tuple[Path, ...]
    endings: tuple[str, ...] = ENDINGS

    def __post_init__(self) -> None:
        for path in self.paths:
            if not written_through(path) and path.suffix.lower() not in self.endings:
                raise UsageError(
                    f"{named('report_path', path)}: expected a name with "
                    f"{' or '.join(self.endings)}"
                )

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The files among everything that a run writes."""
        return tuple(Output(path, "report_path") for path in self.paths)

    def write(self, report: JsonReport) -> None:
        """Write the report as often as that is wanted.

        Raises:
            InputError: a file cannot be written.
        """
        if not self.paths:
            return
        from onnx_lowrank.reports.writers import text_of

        texts = {path: text_of(report, self._ending(path)) for path in self.paths}
        for output in self.outputs:
            write_text(output, texts[output.path])

    def _ending(self, path: Path) -> str:
        """Of a file's name; what goes into a pipe has the first one."""
        ending = path.suffix.lower()
        return ending if ending in self.endings else self.endings[0]
