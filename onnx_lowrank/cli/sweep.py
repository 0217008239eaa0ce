"""``sweep``: the trade-off curve of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnx_lowrank.cli.options import (
    listed,
    plain,
    reader_may_leave,
    running,
    samples,
    selection,
    shapes,
    terminal_progress,
)
from onnx_lowrank.errors import UsageError

__all__ = ["command"]


@click.command("sweep")
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.option(
    "--out",
    metavar="DIR",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for sweep.json, sweep.csv and sweep.png.",
)
@click.option(
    "--budgets",
    metavar="LIST",
    help="Shares of the linear parameters to keep.  [default: 0.9,0.8,0.7,0.6,0.5,0.4]",
)
@click.option("--models", is_flag=True, help="Keep the models, as DIR/keep-0.80.onnx.")
@click.option("--metric", help="A further measure of the loss, as in the main job.")
@selection
@shapes
@samples
@running
@click.option("--force", is_flag=True, help="Overwrite what is in DIR.")
def command(
    source: Path,
    *,
    out: Path,
    budgets: str | None,
    models: bool,
    metric: str | None,
    force: bool,
    **options: Any,
) -> None:
    """Compress IN at several budgets: size, MACs and latency against error, in one run."""
    from onnx_lowrank.cli.console import output_console
    from onnx_lowrank.cli.curve import curve_outputs, print_curve, write_curve
    from onnx_lowrank.compression.sweep import SHARES, sweep
    from onnx_lowrank.runtime.session import OrtLog

    shares = SHARES if budgets is None else tuple(_share(part) for part in listed(budgets) or ())
    outputs = curve_outputs(out, force=force)
    curve = sweep(
        source,
        shares=shares,
        metric=metric,
        models=out if models else None,
        force=force,
        progress=terminal_progress(),
        log=OrtLog(),
        outputs=outputs,
        **plain(options),
    )
    written = write_curve(curve, outputs)
    with reader_may_leave(kept=True):
        print_curve(curve, written, output_console())


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--budgets: expected shares such as 0.8, got {text!r}") from None
