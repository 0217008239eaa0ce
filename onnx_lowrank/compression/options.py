"""The options: name, type, range, default, help and group of each, once.

Those that the main job lacks stand in `onnx_lowrank.compression.verb_options`.  From both are made
the command's options and its help, the checks of `Settings`, the report's ``settings``, the
arguments of the public functions and the reference page (``tools/write_options.py`` writes the last
two).  Nothing heavy is imported: ``--help`` reads it.

In a help text ``{data}`` stands for an option, as ``--data`` for the command and ``data`` for a
function; ``{IN}`` and ``{OUT}`` for the models.
"""

from __future__ import annotations

from collections.abc import Mapping

from onnx_lowrank.compression.headings import FITTING, GOAL, LAYERS, OUTPUT, RUNS, SAMPLES
from onnx_lowrank.compression.option import Option
from onnx_lowrank.compression.verb_options import OF_OTHER_VERBS

__all__ = ["OPTIONS"]

_FITTED = ("calibration", "data")

_TABLE = (
    # Goal
    Option(
        "energy", "number",
        "Smallest rank whose squared singular values hold this share of their sum, above 0 and up "
        "to 1.",
        GOAL, goal=True, shown="0.95", above=0, most=1,
    ),
    Option(
        "rank", "whole",
        "Instead of {energy}: this rank for every layer, taken as it is.",
        GOAL, goal=True, least=1,
    ),
    Option(
        "keep", "number",
        "Instead of {energy}: the share of the linear layers' parameters to keep over the whole "
        "model, with ranks of the least damage to the outputs.  With {weights} the share of their "
        "bytes.",
        GOAL, goal=True, above=0, most=1,
    ),
    Option(
        "uniform", "switch",
        "With {keep}: the same share of every layer.",
        GOAL, default=False, needs=("keep",),
    ),
    Option(
        "max_size", "size",
        "Instead of {energy}: bytes of {OUT} with external data.  Beside {tolerance} a limit of "
        "both.",
        GOAL, goal=True, beside=("tolerance",), metavar="20MB",
        also="A whole number is bytes; a text has a unit, such as '20MB'.",
    ),
    Option(
        "tolerance", "number",
        "Instead of {energy}: the fastest (see {objective}) model whose held-out error by {metric} "
        "stays within this.",
        GOAL, goal=True, least=0, excludes=("check",),
    ),
    Option(
        "metric", "metric",
        "What {tolerance} means, and what the result is judged by: relative-l2, cosine, top1, kl, "
        "perplexity, or file.py:function of outputs, reference outputs and labels that returns a "
        "score.  With kl and perplexity damage and {heal} are of the shares of classes too.",
        GOAL, type_="str | Score | None", shown="relative-l2",
        also="The function itself does as well.", excludes=("check",),
    ),
    Option(
        "objective", "choice",
        "What to minimize within {tolerance}.",
        GOAL, shown="latency", choices=("latency", "size", "macs"), needs=("tolerance",),
    ),
    Option(
        "speedup", "number",
        "Instead of {energy}: the speedup over {IN} to reach.",
        GOAL, goal=True, above=0, excludes=("bench", "dry_run"),
    ),
    Option(
        "max_latency", "time",
        "Instead of {energy}: latency of one inference.",
        GOAL, goal=True, metavar="5ms", excludes=("bench", "dry_run"),
        also="A number is milliseconds; a text has a unit, such as '5ms'.",
    ),
    Option(
        "recipe", "recipe",
        "Instead of {energy}: the layers' ranks that {save_recipe} wrote, or those of a model that "
        "this tool made; nothing is searched, and no time decides.",
        GOAL, goal=True, metavar="FILE",
        also="A `Result.recipe` does as well.",
    ),
    Option(
        "allow_slower", "switch",
        "Keep the pairs even if they make the model slower than {IN}.",
        GOAL, default=False,
    ),
    # Layers
    Option(
        "include", "texts",
        "Factor only nodes whose name or torch scope matches; repeatable.",
        LAYERS, default=(), metavar="GLOB",
    ),
    Option(
        "exclude", "texts",
        "Leave nodes dense whose name or torch scope matches; repeatable.",
        LAYERS, default=(), metavar="GLOB",
    ),
    Option(
        "ops", "list",
        "Forms to factor, separated by commas: default, all, or names as inspect lists them.",
        LAYERS, metavar="LIST",
    ),
    Option(
        "constant_inputs", "switch",
        "Treat weights that are also graph inputs as constants.",
        LAYERS, default=False,
    ),
    Option(
        "min_gain", "number",
        "Replace a layer only if the pair saves this share of its parameters.",
        LAYERS, default=0.1, least=-1, below=1,
    ),
    Option(
        "rank_multiple", "multiple",
        "Round chosen ranks to a multiple: for {energy} up where {min_gain} allows, for {keep} "
        "down; auto: the fastest multiple of each layer, measured on this machine.",
        LAYERS, shown="8, or the multiple of {shape_for}'s target", metavar="M", least=1,
    ),
    Option(
        "shape_for", "choice",
        "Shape {OUT} for cpu, arm, qnn, nnapi, coreml, webgpu or xnnpack: ranks, fixed sizes, 2-D "
        "products, Gemm or MatMul.",
        LAYERS, shown="portable", flag="--for", metavar="TARGET",
        choices=("cpu", "arm", "qnn", "nnapi", "coreml", "webgpu", "xnnpack"),
    ),
    Option(
        "weights", "choices",
        "Numbers in which weights and embeddings may be stored: fp32, as they are; "
        "8 or 4 bits in blocks with a scale each, which takes opset 21; several, separated by "
        "commas, to choose from for each layer; auto: all that {shape_for}'s target runs well.",
        LAYERS, default="fp32", type_="str", metavar="FORMATS",
        choices=("auto", "fp32", "8", "4"),
    ),
    Option(
        "activations", "choice",
        "Numbers that weights of 8 bits may be multiplied with: float; int8: what MatMul and Gemm "
        "read is rounded to 8 bits where that pays, in every run, or with ranges of the samples "
        "where {shape_for}'s target wants that (qnn, nnapi).",
        LAYERS, default="float", metavar="FORMAT", choices=("float", "int8"), needs=("weights",),
    ),
    Option(
        "operators", "choice",
        "Operators of products with weights in blocks: onnx, DequantizeLinear of the standard, "
        "which ONNX Runtime fuses; microsoft, its own MatMulNBits, which needs no newer opset and "
        "is known to few other runtimes.",
        LAYERS, default="onnx", metavar="DOMAIN", choices=("onnx", "microsoft"), needs=("weights",),
    ),
    Option(
        "requantize", "switch",
        "Factor and round weights too that {IN} holds as integers: they become floats first. "
        "{weights} fp32 then stands for as many bits as a weight had.",
        LAYERS, default=False,
    ),
    Option(
        "quantize_ops", "list",
        "Forms whose weights {weights} may store as integers, as for {ops}: default, all, or some "
        "of matmul, gemm, gather, conv, lstm, gru, rnn and einsum.",
        LAYERS, metavar="LIST", needs=("weights",),
    ),
    # Samples
    Option(
        "data", "samples",
        "Samples for the check: .npz (an array for each input, axis 0 the samples), .npy, a folder "
        "of .npz feeds or of test_data_set_*.",
        SAMPLES, shown="seeded random input",
        also="A mapping from inputs to arrays is read as an .npz is; an iterable, such as a list "
        "or a DataLoader, gives one feed at a time, of which the first ones are taken.",
    ),
    Option(
        "labels", "path",
        "Labels of the samples for {metric}: .npy, .npz, .txt or .csv.",
        SAMPLES, shown="in {data}",
    ),
    Option(
        "samples", "whole",
        "How many samples to judge with.",
        SAMPLES, shown="16; with {tolerance} up to 256 of {data}", least=1,
    ),
    Option(
        "seed", "whole",
        "Seed of random input and of the choice of samples.",
        SAMPLES, default=0, least=0,
    ),
    Option(
        "input_shapes", "shapes",
        "Concrete shape of an input, to run the model with; repeatable.",
        SAMPLES, flag="--input-shape", metavar="NAME:1,128",
    ),
    Option(
        "dims", "dims",
        "Size of a symbolic dimension, to run the model with; repeatable.",
        SAMPLES, flag="--dim", metavar="NAME=1",
    ),
    # Fitting
    Option(
        "calibration", "samples",
        "Samples to fit the factors to: as {data}, or module:callable or file.py:callable that "
        "returns an iterable of feeds.  Without it a part of {data} is used, the rest judges.",
        FITTING, flag="--calibrate", metavar="SOURCE", excludes=("calibrate",),
        also="A CalibrationDataReader does as well.",
    ),
    Option(
        "calibration_samples", "whole", "How many samples to fit to.",
        FITTING, default=256, least=1,
    ),
    Option(
        "calibrate", "off",
        "Fit to the weights alone, even where {data} is given.",
        FITTING, default=True,
    ),
    Option(
        "mask", "text",
        "Input whose zeros mark padding, which counts nowhere.",
        FITTING, shown="attention_mask", metavar="INPUT",
    ),
    Option(
        "effort", "choice",
        "Ways to more accuracy at the same ranks: quick fits once; standard tries Fisher "
        "information and a refit where there are samples enough; thorough also heals until that "
        "helps no more. What does not help on samples kept aside is dropped.",
        FITTING, shown="standard; quick where {fisher}, {refit} or {heal} is given",
        choices=("quick", "standard", "thorough"),
    ),
    Option(
        "time_limit", "time",
        "From the start of the run: no step of {effort} begins later, and healing ends.",
        FITTING, metavar="10m",
        also="A number is seconds; a text has a unit, such as '10m'.",
    ),
    Option(
        "fisher", "switch",
        "Weight each layer's errors by their effect on the model's outputs (Fisher information, by "
        "derivatives).",
        FITTING, default=False, needs=(*_FITTED, "load_stats"), excludes=("calibrate",),
    ),
    Option(
        "refit", "switch",
        "Fit each layer again: from its inputs in the compressed model to its outputs in the "
        "original.",
        FITTING, default=False, needs=_FITTED, excludes=("calibrate",),
    ),
    Option(
        "heal", "whole",
        "Steps of gradient descent on the factors against the original's outputs, on the samples "
        "to fit to.",
        FITTING, default=0, shown="none", least=0, needs=_FITTED,
        excludes=("dry_run", "calibrate"),
    ),
    Option(
        "heal_at", "texts",
        "A value inside the model that {heal} compares beside the outputs, with the same name in "
        "both models; repeatable.",
        FITTING, default=(), shown="bottlenecks behind the factored layers", metavar="NAME",
        needs=("heal",),
    ),
    Option(
        "save_stats", "path",
        "Write the calibration statistics (.npz), for runs with other budgets.",
        FITTING, metavar="FILE", needs=_FITTED, excludes=("calibrate",),
    ),
    Option(
        "load_stats", "path",
        "Fit to the statistics that {save_stats} wrote for this model, without samples to fit to.",
        FITTING, metavar="FILE", excludes=("save_stats", "calibration", "mask", "calibrate"),
    ),
    # Check and timing
    Option(
        "judge_at", "texts",
        "A value inside the model, or a node, that counts as an output wherever outputs are "
        "compared: for damage, check, metrics, {heal} and {fisher}; repeatable.",
        RUNS, default=(), metavar="NAME",
    ),
    Option(
        "max_error", "number",
        "Gate: exit 3 and write nothing if the mean relative L2 error of an output is above.",
        RUNS, least=0, excludes=("check", "dry_run"),
        also="A function raises GateError.",
    ),
    Option("check", "off", "Do not compare outputs.", RUNS, default=True),
    Option("bench", "off", "Do not time.", RUNS, default=True),
    Option(
        "threads", "whole", "Intra-op threads of check and timing.",
        RUNS, shown="physical cores", least=1,
    ),
    Option("ep", "text", "Execution provider of check and timing.", RUNS, default="cpu"),
    Option(
        "custom_ops", "paths",
        "A library of custom operators that the model uses, which every session registers; "
        "repeatable.",
        RUNS, default=(), metavar="FILE",
    ),
    Option(
        "memory", "size",
        "Memory that the process may hold: batches get smaller, fewer layers are worked on at "
        "once, what waits goes into files, and onnxsim is left out where it would take more.",
        RUNS, shown="half of what is free", metavar="4GB",
        also="A whole number is bytes; a text has a unit, such as '4GB'.",
    ),
    Option(
        "work", "path",
        "Keep finished work in this folder: moments, spectra, factors, damage, refits and the last "
        "step of healing. If a run ends early, the same command goes on from there. If you change "
        "the model, the samples or an option, what depends on it is done anew.",
        RUNS, metavar="DIR",
    ),
    Option(
        "executor", "executor",
        "Hand spectra, factors and the moments of samples to a running Dask cluster: "
        "dask://HOST:PORT of its scheduler.",
        RUNS, shown="this process", metavar="ADDRESS",
        also="Any `concurrent.futures.Executor` does as well.",
    ),
    Option(
        "device", "text",
        "Where spectra and factors are computed: cpu, or an accelerator by its name in torch, such "
        "as cuda or cuda:1.",
        RUNS, default="cpu", metavar="NAME",
    ),
    Option(
        "save_costs", "path",
        "Write the measured latencies of single layers (JSON), for runs on other machines.",
        RUNS, metavar="FILE",
    ),
    Option(
        "load_costs", "path",
        "Read the latencies of single layers, such as a board's, instead of measuring them.",
        RUNS, metavar="FILE",
    ),
    # Output
    Option(
        "save_recipe", "path",
        "Write what became of every layer (JSON), for the same result again ({recipe}), for a "
        "review, or to change a rank by hand.",
        OUTPUT, metavar="FILE",
    ),
    Option("simplify", "off", "Do not run onnxsim first.", OUTPUT, default=True),
    Option("dry_run", "switch", "Decide and print, write nothing.", OUTPUT, default=False),
    Option(
        "external_data", "choice",
        "Weights beside the model in OUT.data; auto: above 1.5 GB.",
        OUTPUT, default="auto", choices=("auto", "always", "never"), function=False,
    ),
    Option(
        "report_path", "paths",
        "Write the result: all of it as JSON (.json), a page (.html), Markdown (.md) or a table "
        "(.csv), by the file's ending; repeatable.",
        OUTPUT, default=(), flag="--report", metavar="FILE", function=False,
    ),
    Option("force", "switch", "Overwrite OUT.", OUTPUT, default=False, function=False),
    Option(
        "verbose", "switch", "Show ONNX Runtime's own messages.",
        OUTPUT, default=False, function=False,
    ),
    Option(
        "all_rows", "switch", "Show every row of a table, also on a terminal.",
        OUTPUT, default=False, function=False,
    ),
    Option(
        "quiet", "switch", "Print nothing but errors; files are written all the same.",
        OUTPUT, default=False, function=False, aliases=("-q",), excludes=("verbose", "all_rows"),
    ),
)  # fmt: skip

OPTIONS: Mapping[str, Option] = {option.name: option for option in (*_TABLE, *OF_OTHER_VERBS)}
"""Name -> option; some verbs change the text of one."""
