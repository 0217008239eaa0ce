"""A compressed model in memory, and where one is written."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from onnx_lowrank.errors import InputError
from onnx_lowrank.files import workspace
from onnx_lowrank.graph.save import (
    ExternalData,
    check_target,
    commit,
    write,
    written_bytes,
)
from onnx_lowrank.report import Report

__all__ = ["Destination", "Result"]


@dataclass(frozen=True, eq=False)
class Result:
    """A compressed model and what is known about it.

    Attributes:
        model: the model; large factors are memory-mapped.
        report: everything that was decided and measured.
        sources: the files that it was made from, which are never overwritten.
    """

    model: ir.Model
    report: Report
    sources: tuple[Path, ...] = ()

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        external_data: ExternalData = "auto",
        force: bool = False,
    ) -> Report:
        """Write the model, whole or not at all.

        Args:
            path: where to.
            external_data: "always" puts weights beside the model in ``<path>.data``, "never"
                into it, "auto" beside it above 1.5 GB.
            force: overwrite an existing file.

        Returns:
            The report with the file that was written.

        Raises:
            InputError: the place cannot be written.
            UsageError: "never" for a model above 2 GiB.
        """
        target = Destination(Path(path), external_data, force)
        target.check(self.sources)
        with target.workspace() as folder:
            files = target.write(self.model, folder)
            size = written_bytes(files)
            commit(files, target.path)
        output = dataclasses.replace(self.report.output, path=str(target.path), bytes=size)
        return dataclasses.replace(self.report, output=output)


@dataclass(frozen=True)
class Destination:
    """Where a model is to be written."""

    path: Path
    external_data: ExternalData = "auto"
    force: bool = False

    def check(self, inputs: Sequence[Path]) -> None:
        """Raise InputError where it cannot or must not be written."""
        check_target(self.path, force=self.force, inputs=tuple(inputs))

    def workspace(self) -> contextlib.AbstractContextManager[Path]:
        """A folder on the same file system, for a rename at the end."""
        return workspace(self.path.parent)

    def write(self, model: ir.Model, folder: Path) -> tuple[Path, ...]:
        """Write the model into the folder under its final name."""
        try:
            return write(model, folder, self.path.name, self.external_data)
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror or error}; nothing written") from error
