"""The verbs: what each job of the command is, and which options of the table it has.

As light as the table: ``--help`` reads both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from onnx_lowrank.compression.headings import OUTPUT, RUNS, SAMPLES
from onnx_lowrank.compression.option import Option, check_relations, check_values
from onnx_lowrank.compression.options import OPTIONS

__all__ = [
    "BENCH",
    "CHECK",
    "COMPRESS",
    "INSPECT",
    "PROVIDERS",
    "RECORDED",
    "SETTINGS",
    "SUPPORT",
    "SWEEP",
    "VERBS",
    "Verb",
    "spelling",
]

# What only the command compress, or only other verbs have.
_COMMAND = ("external_data", "report_path", "force", "verbose", "all_rows", "quiet")
_OTHER = ("shares", "out", "targets", "fix_shapes", "strict", "iterations", "warmup", "nodes",
          "before", "sort", "min_speedup", "install")  # fmt: skip

SETTINGS = tuple(o for o in OPTIONS.values() if o.name not in (*_COMMAND, *_OTHER))
"""What `compress` takes beside the model."""
# What says how a run is done, or where things are, and nothing of the result.
_PASSING = {"allow_slower", "dry_run", "time_limit"}
_PLACES = ("path", "paths", "samples", "metric", "recipe")
# Of the check, and of what factors are judged by.
_DECIDING = {"judge_at"}
RECORDED = tuple(
    o
    for o in SETTINGS
    if (o.group != RUNS or o.name in _DECIDING) and o.kind not in _PLACES and o.name not in _PASSING
)
"""What a recipe holds of a run's options: with a recipe none of them is given."""


@dataclass(frozen=True)
class Verb:
    """A job of the command, and the function of the same name.

    Attributes:
        name: of both.
        help: what it does.
        example: a line that one could type.
        options: in the order of the help.
    """

    name: str
    help: str
    example: str
    options: tuple[Option, ...] = field(default=())

    def option(self, name: str) -> Option:
        """One option as this verb has it."""
        return next(option for option in self.options if option.name == name)

    def check(self, values: Mapping[str, Any]) -> None:
        """Check the arguments of the function: each, and what they need or exclude.

        Raises:
            UsageError: a value is out of its range, lacks another one, or excludes one.
        """
        check_values(self.arguments, values)
        check_relations(self.arguments, values)

    @property
    def arguments(self) -> tuple[Option, ...]:
        """The options that the function takes."""
        return tuple(option for option in self.options if option.function)


def _options(*names: str | Option) -> tuple[Option, ...]:
    return tuple(OPTIONS[name] if isinstance(name, str) else name for name in names)


# A sweep has goals of its own, always checks, and gives up no point.
_NOT_SWEPT = {
    *(
        "metric",
        "uniform",
        "objective",
        "allow_slower",
        "max_error",
        "check",
        "dry_run",
        "save_recipe",
    ),
    *(option.name for option in SETTINGS if option.goal),
}
_SWEPT_DEFAULTS: dict[str, dict[str, Any]] = {
    "samples": {"shown": "16"},
    "effort": {"default": "quick", "shown": ""},
}
_SWEPT = tuple(
    replace(option, **_SWEPT_DEFAULTS.get(option.name, {}))
    for option in SETTINGS
    if option.name not in _NOT_SWEPT
)
_TARGETS = _options(
    "targets",
    replace(OPTIONS["data"], help="Samples, as in the main job."),
    replace(OPTIONS["samples"], help="How many samples to use.", default=16, shown=""),
    *("seed", "input_shapes", "dims", "fix_shapes", "strict", "custom_ops", "verbose"),
)
_QUIET = OPTIONS["quiet"]
# What gives samples.
_LOOKED = ("data", "calibration", "load_stats")
_OWN_THREADS = "each target's own"

COMPRESS = Verb(
    "compress",
    "Compress IN into OUT.",
    "onnx-lowrank model.onnx small.onnx --energy 0.95",
    (*SETTINGS, *_options(*_COMMAND)),
)
SWEEP = Verb(
    "sweep",
    "Compress IN at several budgets: size, MACs and latency against error, in one run.",
    "onnx-lowrank sweep model.onnx --out curve --data samples.npz",
    (
        OPTIONS["out"],
        OPTIONS["shares"],
        Option(
            "models", "switch", "Keep the models, as DIR/keep-0.80.onnx.",
            OUTPUT, default=False, function=False,
        ),
        replace(
            OPTIONS["metric"], type_="str | Score | None", default=None, needs=(),
            shown="", help="A further measure of the loss, as in the main job.",
        ),
        *_SWEPT,
        OPTIONS["report_path"],
        replace(OPTIONS["force"], help="Overwrite what is in DIR."),
        OPTIONS["verbose"],
        _QUIET,
    ),
)  # fmt: skip
CHECK = Verb(
    "check",
    "Compare the outputs of B with those of A on every target, and each with the CPU.",
    "onnx-lowrank check model.onnx small.onnx --data samples.npz",
    (
        *_TARGETS,
        replace(
            OPTIONS["mask"],
            group=SAMPLES,
            help="Input whose zeros mark padding, which counts nowhere.",
        ),
        replace(
            OPTIONS["judge_at"],
            help="A value inside both models, or a node of A, that is compared as an output is; "
            "repeatable.",
        ),
        replace(
            OPTIONS["metric"],
            group=RUNS,
            shown="",
            excludes=(),
            help="Judge B by this as well: relative-l2, cosine, top1, kl, perplexity, or "
            "file.py:function, as in the main job.",
        ),
        replace(OPTIONS["labels"], needs=("metric",)),
        replace(OPTIONS["threads"], help="Intra-op threads.", shown=_OWN_THREADS),
        replace(
            OPTIONS["max_error"],
            help="Exit 3 if the mean relative L2 error of an output is above, on any target.",
            also="A function says so in the report's ``missed``.",
            excludes=(),
        ),
        replace(
            OPTIONS["max_size"],
            group=RUNS,
            goal=False,
            help="Exit 3 if B is larger, with external data.",
            also="A function says so in the report's ``missed``. A whole number is bytes; a text "
            "has a unit, such as '20MB'.",
        ),
        *_options("report_path", "all_rows", "quiet"),
    ),
)
BENCH = Verb(
    "bench",
    "Time models in turns on every target, and measure their memory.",
    "onnx-lowrank bench model.onnx small.onnx --threads 1 --threads 4",
    (
        *_TARGETS,
        replace(
            OPTIONS["threads"], kind="wholes", default=(), help="Intra-op threads; repeatable.",
            shown=_OWN_THREADS,
        ),
        *_options("iterations", "warmup", "min_speedup", "report_path"),
        _QUIET,
    ),
)  # fmt: skip
INSPECT = Verb(
    "inspect",
    "List every linear map of IN: form, shape, ranks at several energies, and what is left out.",
    "onnx-lowrank inspect model.onnx --data samples.npz",
    (
        replace(
            OPTIONS["shares"],
            help="Shares of the linear parameters to keep: what each would give; an empty list "
            "tries none, which is faster.",
            needs=_LOOKED,
        ),
        replace(
            OPTIONS["ops"],
            help="Forms to fit to samples and to spend {shares} on: default, all, or names; all "
            "others are listed by their weights alone.",
        ),
        *_options("include", "exclude"),
        replace(OPTIONS["constant_inputs"], help="As in the main job."),
        replace(
            OPTIONS["data"],
            help="Samples, as in the main job: the ranks are those for what the layers multiply.",
            also="", shown="none, the weights alone",
        ),
        replace(OPTIONS["samples"], help="How many samples judge.", shown="16"),
        *_options("seed", "input_shapes", "dims"),
        replace(
            OPTIONS["calibration"], excludes=(),
            help="Samples to fit to, as in the main job.  Without it a part of {data} is used.",
        ),
        *_options("calibration_samples", "mask", "save_stats"),
        replace(
            OPTIONS["load_stats"],
            help="Use the statistics that {save_stats} wrote for this model.",
        ),
        replace(OPTIONS["threads"], help="Intra-op threads."),
        replace(
            OPTIONS["judge_at"],
            help="A value inside the model, or a node, that counts as an output where damage is "
            "measured; repeatable.",
        ),
        *_options("custom_ops"),
        replace(OPTIONS["simplify"], help="With samples: do not run onnxsim first."),
        *_options("sort", "report_path", "verbose"),
        _QUIET,
    ),
)  # fmt: skip
SUPPORT = Verb(
    "support",
    "Say which nodes NNAPI, CoreML, XNNPACK, QNN, WebGPU and OpenVINO would take, and why not.",
    "onnx-lowrank support small.onnx --before model.onnx --dim batch=1",
    (
        *_options("before", "input_shapes", "dims", "nodes"),
        replace(OPTIONS["report_path"], help="Write every node as JSON (.json); repeatable."),
        _QUIET,
    ),
)
PROVIDERS = Verb(
    "providers",
    "List where a model can be run: what is usable here, and how to get the rest.",
    "onnx-lowrank providers --install web",
    _options("install"),
)
VERBS = (COMPRESS, BENCH, CHECK, INSPECT, PROVIDERS, SUPPORT, SWEEP)

_FLAGS = {o.name: o.option for verb in VERBS for o in verb.options} | {
    name: option.option for name, option in OPTIONS.items()
}


def spelling(name: str, value: tuple[Any, ...]) -> str:
    """How the command writes an option in a message (see `onnx_lowrank.errors.named`)."""
    switch = not value or isinstance(value[0], bool)
    return _FLAGS[name] if switch else f"{_FLAGS[name]} {value[0]}"
