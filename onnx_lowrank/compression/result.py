"""A compressed model in memory, and where one is written."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from onnx_lowrank.errors import InputError, UsageError, named
from onnx_lowrank.files import (
    Output,
    check_outputs,
    copy_beside,
    resolved,
    same_file,
    workspace,
    written_through,
)
from onnx_lowrank.graph.save import (
    ExternalData,
    commit,
    data_name,
    free_data_name,
    write,
    written_bytes,
)
from onnx_lowrank.ranks.recipe import Recipe
from onnx_lowrank.schema.report import Report

__all__ = ["Destination", "Result"]


@dataclass(frozen=True, eq=False)
class Result:
    """A compressed model and what is known about it.

    Attributes:
        model: the model; large factors are memory-mapped.
        report: everything that was decided and measured.
        sources: the files that it was made from, which are never overwritten.
        recipe: what became of every layer; `onnx_lowrank.compress` carries it out again.
    """

    model: ir.Model
    report: Report
    sources: tuple[Path, ...]
    recipe: Recipe

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
            external_data: "always" puts weights beside the model in ``<path>.data``, or in
                ``<path>.1.data`` and so on where that stands already; "never" into it; "auto"
                beside it above 1.5 GB.
            force: overwrite an existing file.

        Returns:
            The report with the file that was written.

        Raises:
            InputError: the place cannot be written.
            UsageError: "never" for a model above 2 GiB, or "always" where nothing can stand
                beside the model: at a pipe, or at a link into another folder.
        """
        target = Destination(Path(path), external_data, force)
        target.check(self.sources)
        with target.workspace() as folder:
            files = target.write(self.model, folder)
            size = written_bytes(files)
            target.commit(files, self.sources)
        output = dataclasses.replace(self.report.output, path=str(target.path), bytes=size)
        return dataclasses.replace(self.report, output=output)


@dataclass(frozen=True)
class Destination:
    """Where a model is to be written.

    Attributes:
        path: the model's file.
        external_data: whether weights stand beside it.
        force: whether a file that stands there may be replaced.
        beside: a folder whose files are copied beside the model, but for those that the run reads;
            None for none.
    """

    path: Path
    external_data: ExternalData = "auto"
    force: bool = False
    beside: Path | None = None

    @property
    def output(self) -> Output:
        """The place among everything that a run writes."""
        beside = () if self._alone else (data_name(resolved(self.path).name),)
        return Output(self.path, force=self.force, beside=beside)

    @property
    def _alone(self) -> bool:
        """Whether no data file can stand beside the model and be found there.

        ONNX Runtime looks for it in the folder of the name that it gets, which for a link may be
        another one than the model's own.
        """
        folder = resolved(self.path).parent
        return written_through(self.path) or not same_file(self.path.parent, folder)

    def check(self, inputs: Sequence[Path], others: Sequence[Output] = ()) -> None:
        """Check the place, and everything else that the run writes, before the work.

        Args:
            inputs: every file that the run reads.
            others: the other files that it writes.

        Raises:
            InputError: a place cannot or must not be written.
            UsageError: weights cannot stand beside the model there.
        """
        check_outputs((self.output, *others), inputs)
        if self.external_data == "always" and self._alone:
            raise UsageError(
                f"{named('external_data', 'always')}: expected a file in the folder of "
                f"{self.path}, got a link to another folder, a pipe or a device"
            )

    def workspace(self) -> contextlib.AbstractContextManager[Path]:
        """A folder on the same file system, for a rename at the end."""
        return workspace(None if written_through(self.path) else resolved(self.path).parent)

    def write(self, model: ir.Model, folder: Path) -> tuple[Path, ...]:
        """Write the model into the folder, ready for `commit`."""
        name = resolved(self.path).name
        external = "never" if self._alone else self.external_data
        try:
            return write(model, folder, name, external, free_data_name(self.path))
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror or error}; nothing written") from error

    def commit(self, files: tuple[Path, ...], inputs: Sequence[Path]) -> None:
        """Move what `write` wrote to its place; the files that the run reads stay.

        Raises:
            InputError: the place cannot be written; what stood there is as it was.
        """
        try:
            if self.beside is not None:
                copy_beside(self.beside, self.path.parent, inputs)
            commit(files, self.path, inputs)
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror or error}; nothing written") from error
