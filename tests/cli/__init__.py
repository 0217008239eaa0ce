"""Tests of the package `onnx_lowrank.cli`."""
