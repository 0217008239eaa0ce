"""``support``: what each execution provider would take of a model."""

from __future__ import annotations

from pathlib import Path

import click

from onnx_lowrank.commands.base import reader_may_leave

__all__ = ["command"]


@click.command("support")
@click.argument("model", metavar="MODEL", type=click.Path(path_type=Path))
@click.option(
    "--before",
    metavar="ORIGINAL",
    type=click.Path(path_type=Path),
    help="The model that MODEL was made from, judged beside it.",
)
@click.option(
    "--input-shape",
    multiple=True,
    metavar="NAME:1,128",
    help="Judge with this shape of an input; repeatable.",
)
@click.option(
    "--dim",
    multiple=True,
    metavar="NAME=1",
    help="Judge with this size of a symbolic dimension; repeatable.",
)
@click.option("--nodes", is_flag=True, help="Name every node that is left to the CPU.")
@click.option(
    "--report",
    "report_path",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write the whole result, every node, as JSON.",
)
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
    from onnx_lowrank.console import output_console
    from onnx_lowrank.save import check_report_target, write_text
    from onnx_lowrank.shapes import parse_dims, parse_input_shapes
    from onnx_lowrank.supported import print_support, support_of

    if report_path is not None:
        check_report_target(report_path, (model,) if before is None else (model, before))
    report = support_of(model, before, parse_input_shapes(input_shape), parse_dims(dim))
    if report_path is not None:
        write_text(report_path, report.to_json() + "\n")
    with reader_may_leave():
        print_support(report, output_console(), every=nodes)
