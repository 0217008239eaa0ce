"""Tests of the package `onnx_lowrank.schema`."""
