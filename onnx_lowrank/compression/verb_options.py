"""Options that other verbs have and the main job lacks; see `onnx_lowrank.compression.options`.

Nothing heavy is imported: ``--help`` reads it.
"""

from __future__ import annotations

from onnx_lowrank.compression.headings import GOAL, LAYERS, OUTPUT, RUNS, SAMPLES
from onnx_lowrank.compression.option import Option

__all__ = ["OF_OTHER_VERBS"]

OF_OTHER_VERBS = (
    Option(
        "shares", "numbers",
        "Shares of the linear parameters to keep.",
        GOAL, default=(0.9, 0.8, 0.7, 0.6, 0.5, 0.4), flag="--budgets", metavar="LIST",
        above=0, most=1,
    ),
    Option(
        "out", "path", "Folder for sweep.json, sweep.csv and sweep.png.",
        OUTPUT, metavar="DIR", function=False, required=True,
    ),
    Option(
        "targets", "texts", "Where to run, as providers lists it; repeatable.",
        RUNS, default=("cpu",), flag="--target", aliases=("--ep",), metavar="NAME",
    ),
    Option(
        "fix_shapes", "switch", "Run copies whose inputs have fixed sizes, as QNN and NNAPI need.",
        SAMPLES, default=False,
    ),
    Option(
        "strict", "switch", "A node that a target leaves to the CPU is an error.",
        RUNS, default=False,
    ),
    Option(
        "min_speedup", "number",
        "Exit 3 if the last model is surely not so many times as fast as the first, which is by "
        "the whole 95 % interval, on any target.",
        RUNS, above=0, also="A function says so in the report's ``missed``.",
    ),
    Option("iterations", "whole", "Timed runs of each model.", RUNS, default=50, least=1),
    Option("warmup", "whole", "Runs of each model before.", RUNS, default=5, least=0),
    Option(
        "nodes", "switch", "Name every node that is left to the CPU.",
        OUTPUT, default=False, function=False,
    ),
    Option(
        "sort", "choice",
        "Order of the rows: of the graph, by name, by parameters (most first), by rank at energy "
        "0.95 over break-even (least first), or by the energy that half of the parameters hold "
        "(most first).",
        OUTPUT, default="graph", metavar="BY", function=False,
        choices=("graph", "name", "parameters", "rank", "energy"),
    ),
    Option(
        "install", "texts",
        "Install what a target needs, packages into this Python and the rest into the user's "
        "cache: openvino, qnn, webgpu, qemu-arm64 or web; repeatable.",
        OUTPUT, default=(), metavar="NAME", function=False,
    ),
    Option(
        "before", "model", "The model that MODEL was made from, judged beside it.",
        LAYERS, metavar="ORIGINAL",
    ),
)  # fmt: skip
