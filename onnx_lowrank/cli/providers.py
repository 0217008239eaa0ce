"""``providers``: where a model can be run."""

from __future__ import annotations

from onnx_lowrank.cli.options import command_of, reader_may_leave, terminal_progress
from onnx_lowrank.compression.verbs import PROVIDERS

__all__ = ["command"]


@command_of(PROVIDERS)
def command() -> None:
    """List where a model can be run."""
    from onnx_lowrank.cli.screen import output_screen
    from onnx_lowrank.cli.tables import print_offers
    from onnx_lowrank.compression.api import providers

    offers = providers(progress=terminal_progress())
    with reader_may_leave():
        print_offers(offers, output_screen())
