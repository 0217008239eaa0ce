"""``providers``: where a model can be run."""

from __future__ import annotations

import click

__all__ = ["command"]


@click.command("providers")
def command() -> None:
    """List the execution providers of the installed ONNX Runtime."""
    import onnxruntime as ort

    click.echo(f"onnxruntime {ort.__version__}")
    for provider in ort.get_available_providers():
        click.echo(f"  {provider.removesuffix('ExecutionProvider').lower():<12} {provider}")
