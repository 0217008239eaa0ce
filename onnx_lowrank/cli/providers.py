"""``providers``: where a model can be run, and what that needs."""

from __future__ import annotations

from typing import Any

import click

from onnx_lowrank.cli.options import command_of, reader_may_leave, terminal_progress, values_of
from onnx_lowrank.compression.verbs import PROVIDERS

__all__ = ["command"]


@command_of(PROVIDERS)
def command(**options: Any) -> None:
    """List where a model can be run, or install what a target needs."""
    wanted = values_of(PROVIDERS, options)["install"]
    if wanted:
        from onnx_lowrank.targets.installing import install

        for name in wanted:
            install(name, click.echo)
        return
    from onnx_lowrank.cli.screen import output_screen
    from onnx_lowrank.cli.tables import print_offers
    from onnx_lowrank.compression.judging import providers

    offers = providers(progress=terminal_progress())
    with reader_may_leave():
        print_offers(offers, output_screen())
