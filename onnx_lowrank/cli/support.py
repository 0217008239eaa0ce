"""``support``: what each execution provider would take of a model."""

from __future__ import annotations

from pathlib import Path

import click

from onnx_lowrank.cli.options import reader_may_leave, report, shapes
from onnx_lowrank.cli.reports import ReportFile

__all__ = ["command"]


@click.command("support")
@click.argument("model", metavar="MODEL", type=click.Path(path_type=Path))
@click.option(
    "--before",
    metavar="ORIGINAL",
    type=click.Path(path_type=Path),
    help="The model that MODEL was made from, judged beside it.",
)
@shapes
@click.option("--nodes", is_flag=True, help="Name every node that is left to the CPU.")
@report("Write the whole result, every node, as JSON.")
def command(
    model: Path,
    *,
    before: Path | None,
    input_shape: tuple[str, ...],
    dim: tuple[str, ...],
    nodes: bool,
    report_path: Path | None,
) -> None:
    """Say which nodes NNAPI, CoreML, XNNPACK, QNN, WebGPU and OpenVINO would take, and why not."""
    from onnx_lowrank.cli.console import output_console
    from onnx_lowrank.cli.tables import print_support
    from onnx_lowrank.data.shapes import parse_dims, parse_input_shapes
    from onnx_lowrank.targets.support import support_of

    written = ReportFile(report_path)
    sizes = parse_input_shapes(input_shape), parse_dims(dim)
    found = support_of(model, before, *sizes, written.outputs)
    written.write(found)
    with reader_may_leave(kept=report_path is not None):
        print_support(found, output_console(report_path), every=nodes)
