"""The headings under which help and reference list the options, each with an example.

Nothing heavy is imported: ``--help`` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["FITTING", "GOAL", "GROUPS", "LAYERS", "OUTPUT", "RUNS", "SAMPLES"]

GOAL, LAYERS, SAMPLES = "Goal", "Layers", "Samples"
FITTING, RUNS, OUTPUT = "Fitting", "Check and timing", "Output"

GROUPS: Mapping[str, str] = {
    GOAL: "onnx-lowrank in.onnx out.onnx --tolerance 0.02 --data samples.npz",
    LAYERS: "onnx-lowrank in.onnx out.onnx --include 'encoder.*' --for qnn",
    SAMPLES: "onnx-lowrank in.onnx out.onnx --data samples.npz --dim batch=1",
    FITTING: "onnx-lowrank in.onnx out.onnx --calibrate samples.npz --refit --heal 200",
    RUNS: "onnx-lowrank in.onnx out.onnx --max-error 0.05 --threads 4",
    OUTPUT: "onnx-lowrank in.onnx out.onnx --report report.html --force",
}
"""Heading of a group -> an example of it."""
