"""``inspect``: what a model holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnx_lowrank.cli.options import command_of, reader_may_leave, terminal_progress, values_of
from onnx_lowrank.compression.verbs import INSPECT

__all__ = ["command"]


@command_of(INSPECT)
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
def command(source: Path, **options: Any) -> None:
    """List every linear map of IN."""
    from onnx_lowrank.cli.console import output_console
    from onnx_lowrank.cli.tables import print_inspection
    from onnx_lowrank.compression.api import inspect

    found = inspect(source, **values_of(INSPECT, options), progress=terminal_progress())
    with reader_may_leave():
        print_inspection(found, output_console())
