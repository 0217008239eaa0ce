"""Tests of the package `onnx_lowrank.reports`."""
