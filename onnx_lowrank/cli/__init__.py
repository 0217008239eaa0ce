"""The command `onnx-lowrank`: its verbs (one a module), options, tables and progress."""

from onnx_lowrank.cli.program import main

__all__ = ["main"]
