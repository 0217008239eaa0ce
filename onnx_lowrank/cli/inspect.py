"""``inspect``: what a model holds."""

from __future__ import annotations

from pathlib import Path

import click

from onnx_lowrank.cli.options import reader_may_leave, terminal_progress

__all__ = ["command"]


@click.command("inspect")
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.option("--constant-inputs", is_flag=True, help="As in the main job.")
def command(source: Path, constant_inputs: bool) -> None:
    """List every linear map of IN: form, shape, ranks at several energies, and what is left out."""
    from onnx_lowrank.cli.console import output_console
    from onnx_lowrank.cli.tables import print_inspection
    from onnx_lowrank.compression.inspection import inspect_model

    progress = terminal_progress()
    inspection = inspect_model(source, constant_inputs, progress)
    with reader_may_leave():
        print_inspection(inspection, output_console())
