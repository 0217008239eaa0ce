"""``providers``: where a model can be run."""

from __future__ import annotations

import click

from onnx_lowrank.cli.options import reader_may_leave, terminal_progress

__all__ = ["command"]


@click.command("providers")
def command() -> None:
    """List where a model can be run: what is usable here, and how to get the rest."""
    from onnx_lowrank.cli.console import output_console
    from onnx_lowrank.cli.tables import print_offers
    from onnx_lowrank.progress import Stages
    from onnx_lowrank.targets import all_offers

    with Stages(terminal_progress())("look"):
        offers = all_offers()
    with reader_may_leave():
        print_offers(offers, output_console())
