"""Public functions on one model: one for each job, with the names and defaults of the command.

Every error that is raised on purpose is a `LowRankError`: `UsageError` for an argument,
`InputError` for a model, data or the machine.  The arguments are written by
``tools/write_options.py`` from the table of the options.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace

from onnx_lowrank.compression import verbs
from onnx_lowrank.compression.inspection import Inspection, inspect_model
from onnx_lowrank.compression.origin import origin_of
from onnx_lowrank.compression.result import Result
from onnx_lowrank.compression.run import execute
from onnx_lowrank.compression.settings import Settings
from onnx_lowrank.data.sources import SampleSource
from onnx_lowrank.evaluation.metrics import Score
from onnx_lowrank.files import Output
from onnx_lowrank.graph.load import ModelLike
from onnx_lowrank.progress import Progress, Silent
from onnx_lowrank.ranks.recipe import Recipe
from onnx_lowrank.runtime.session import OrtLog

__all__ = ["compress", "inspect"]


def compress(
    model: ModelLike,
    *,
    energy: float | None = None,
    rank: int | None = None,
    keep: float | None = None,
    uniform: bool = False,
    max_size: int | str | None = None,
    tolerance: float | None = None,
    metric: str | Score | None = None,
    objective: str | None = None,
    speedup: float | None = None,
    max_latency: float | str | None = None,
    recipe: str | os.PathLike[str] | Recipe | None = None,
    allow_slower: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    ops: Sequence[str] | None = None,
    constant_inputs: bool = False,
    min_gain: float = 0.1,
    rank_multiple: int | str | None = None,
    shape_for: str | None = None,
    weights: str = "fp32",
    activations: str = "float",
    operators: str = "onnx",
    requantize: bool = False,
    quantize_ops: Sequence[str] | None = None,
    data: SampleSource | None = None,
    labels: str | os.PathLike[str] | None = None,
    samples: int | None = None,
    seed: int = 0,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    dims: Mapping[str, int] | None = None,
    calibration: SampleSource | None = None,
    calibration_samples: int = 256,
    calibrate: bool = True,
    mask: str | None = None,
    effort: str | None = None,
    time_limit: float | str | None = None,
    fisher: bool = False,
    refit: bool = False,
    heal: int = 0,
    heal_at: Sequence[str] = (),
    save_stats: str | os.PathLike[str] | None = None,
    load_stats: str | os.PathLike[str] | None = None,
    judge_at: Sequence[str] = (),
    max_error: float | None = None,
    check: bool = True,
    bench: bool = True,
    threads: int | None = None,
    ep: str = "cpu",
    custom_ops: Sequence[str | os.PathLike[str]] = (),
    memory: int | str | None = None,
    work: str | os.PathLike[str] | None = None,
    executor: str | Executor | None = None,
    device: str = "cpu",
    save_costs: str | os.PathLike[str] | None = None,
    load_costs: str | os.PathLike[str] | None = None,
    save_recipe: str | os.PathLike[str] | None = None,
    simplify: bool = True,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Replace the constant linear maps of a model by pairs of smaller ones.

    Names and defaults are those of the command ``onnx-lowrank``.

    Args:
        model: a path, the bytes of a file, a protobuf, an `onnx_ir.Model` or a
            `torch.onnx.ONNXProgram`; it is not changed.
        energy: smallest rank whose squared singular values hold this share of their sum, above 0
            and up to 1. Default: 0.95.
        rank: instead of ``energy``: this rank for every layer, taken as it is.
        keep: instead of ``energy``: the share of the linear layers' parameters to keep over the
            whole model, with ranks of the least damage to the outputs.  With ``weights`` the share
            of their bytes.
        uniform: with ``keep``: the same share of every layer.
        max_size: instead of ``energy``: bytes of the result with external data.  Beside
            ``tolerance`` a limit of both. A whole number is bytes; a text has a unit, such as
            '20MB'.
        tolerance: instead of ``energy``: the fastest (see ``objective``) model whose held-out error
            by ``metric`` stays within this.
        metric: what ``tolerance`` means, and what the result is judged by: relative-l2, cosine,
            top1, kl, perplexity, or file.py:function of outputs, reference outputs and labels that
            returns a score.  With kl and perplexity damage and ``heal`` are of the shares of
            classes too. The function itself does as well. Default: relative-l2.
        objective: what to minimize within ``tolerance``. Default: latency.
        speedup: instead of ``energy``: the speedup over the original to reach.
        max_latency: instead of ``energy``: latency of one inference. A number is milliseconds; a
            text has a unit, such as '5ms'.
        recipe: instead of ``energy``: the layers' ranks that ``save_recipe`` wrote, or those of a
            model that this tool made; nothing is searched, and no time decides. A `Result.recipe`
            does as well.
        allow_slower: keep the pairs even if they make the model slower than the original.
        include: factor only nodes whose name or torch scope matches.
        exclude: leave nodes dense whose name or torch scope matches.
        ops: forms to factor: default, all, or names as inspect lists them.
        constant_inputs: treat weights that are also graph inputs as constants.
        min_gain: replace a layer only if the pair saves this share of its parameters.
        rank_multiple: round chosen ranks to a multiple: for ``energy`` up where ``min_gain``
            allows, for ``keep`` down; auto: the fastest multiple of each layer, measured on this
            machine. Default: 8, or the multiple of ``shape_for``'s target.
        shape_for: shape the result for cpu, arm, qnn, nnapi, coreml, webgpu or xnnpack: ranks,
            fixed sizes, 2-D products, Gemm or MatMul. Default: portable.
        weights: numbers in which weights and embeddings may be stored: fp32, as they are; 8 or 4
            bits in blocks with a scale each, which takes opset 21; several, to choose from for each
            layer; auto: all that ``shape_for``'s target runs well.
        activations: numbers that weights of 8 bits may be multiplied with: float; int8: what MatMul
            and Gemm read is rounded to 8 bits where that pays, in every run, or with ranges of the
            samples where ``shape_for``'s target wants that (qnn, nnapi).
        operators: operators of products with weights in blocks: onnx, DequantizeLinear of the
            standard, which ONNX Runtime fuses; microsoft, its own MatMulNBits, which needs no newer
            opset and is known to few other runtimes.
        requantize: factor and round weights too that the original holds as integers: they become
            floats first. ``weights`` fp32 then stands for as many bits as a weight had.
        quantize_ops: forms whose weights ``weights`` may store as integers, as for ``ops``:
            default, all, or some of matmul, gemm, gather, conv, lstm, gru, rnn and einsum.
        data: samples for the check: .npz (an array for each input, axis 0 the samples), .npy, a
            folder of .npz feeds or of test_data_set_*. A mapping from inputs to arrays is read as
            an .npz is; an iterable, such as a list or a DataLoader, gives one feed at a time, of
            which the first ones are taken. Default: seeded random input.
        labels: labels of the samples for ``metric``: .npy, .npz, .txt or .csv. Default: in
            ``data``.
        samples: how many samples to judge with. Default: 16; with ``tolerance`` up to 256 of
            ``data``.
        seed: seed of random input and of the choice of samples.
        input_shapes: concrete shape of an input, to run the model with.
        dims: size of a symbolic dimension, to run the model with.
        calibration: samples to fit the factors to: as ``data``, or module:callable or
            file.py:callable that returns an iterable of feeds.  Without it a part of ``data`` is
            used, the rest judges. A CalibrationDataReader does as well.
        calibration_samples: how many samples to fit to.
        calibrate: False: fit to the weights alone, even where ``data`` is given.
        mask: input whose zeros mark padding, which counts nowhere. Default: attention_mask.
        effort: ways to more accuracy at the same ranks: quick fits once; standard tries Fisher
            information and a refit where there are samples enough; thorough also heals until that
            helps no more. What does not help on samples kept aside is dropped. Default: standard;
            quick where ``fisher``, ``refit`` or ``heal`` is given.
        time_limit: from the start of the run: no step of ``effort`` begins later, and healing ends.
            A number is seconds; a text has a unit, such as '10m'.
        fisher: weight each layer's errors by their effect on the model's outputs (Fisher
            information, by derivatives).
        refit: fit each layer again: from its inputs in the compressed model to its outputs in the
            original.
        heal: steps of gradient descent on the factors against the original's outputs, on the
            samples to fit to. Default: none.
        heal_at: a value inside the model that ``heal`` compares beside the outputs, with the same
            name in both models. Default: bottlenecks behind the factored layers.
        save_stats: write the calibration statistics (.npz), for runs with other budgets.
        load_stats: fit to the statistics that ``save_stats`` wrote for this model, without samples
            to fit to.
        judge_at: a value inside the model, or a node, that counts as an output wherever outputs are
            compared: for damage, check, metrics, ``heal`` and ``fisher``.
        max_error: gate: exit 3 and write nothing if the mean relative L2 error of an output is
            above. A function raises GateError.
        check: False: do not compare outputs.
        bench: False: do not time.
        threads: intra-op threads of check and timing. Default: physical cores.
        ep: execution provider of check and timing.
        custom_ops: a library of custom operators that the model uses, which every session
            registers.
        memory: memory that the process may hold: batches get smaller, fewer layers are worked on at
            once, what waits goes into files, and onnxsim is left out where it would take more. A
            whole number is bytes; a text has a unit, such as '4GB'. Default: half of what is free.
        work: keep finished work in this folder: moments, spectra, factors, damage, refits and the
            last step of healing. If a run ends early, the same command goes on from there. If you
            change the model, the samples or an option, what depends on it is done anew.
        executor: hand spectra, factors and the moments of samples to a running Dask cluster:
            dask://HOST:PORT of its scheduler. Any `concurrent.futures.Executor` does as well.
            Default: this process.
        device: where spectra and factors are computed: cpu, or an accelerator by its name in torch,
            such as cuda or cuda:1.
        save_costs: write the measured latencies of single layers (JSON), for runs on other
            machines.
        load_costs: read the latencies of single layers, such as a board's, instead of measuring
            them.
        save_recipe: write what became of every layer (JSON), for the same result again
            (``recipe``), for a review, or to change a rank by hand.
        simplify: False: do not run onnxsim first.
        dry_run: decide and print, write nothing.
        progress: shows the stages; default: nothing is shown.

    Returns:
        The compressed model and the report.

    Raises:
        InputError: the model or the data are not what they should be.
        UsageError: an option is out of its range, or two exclude each other.
        GateError: ``max_error`` or another goal was missed; the report is attached.
    """
    options = dict(locals())
    del options["model"], options["progress"]
    return execute(model, Settings.of(options), None, progress or Silent(), OrtLog())


def inspect(
    model: ModelLike,
    *,
    shares: Sequence[float] = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4),
    ops: Sequence[str] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    constant_inputs: bool = False,
    data: SampleSource | None = None,
    samples: int | None = None,
    seed: int = 0,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    dims: Mapping[str, int] | None = None,
    calibration: SampleSource | None = None,
    calibration_samples: int = 256,
    mask: str | None = None,
    save_stats: str | os.PathLike[str] | None = None,
    load_stats: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    judge_at: Sequence[str] = (),
    custom_ops: Sequence[str | os.PathLike[str]] = (),
    simplify: bool = True,
    progress: Progress | None = None,
    log: OrtLog | None = None,
    outputs: Sequence[Output] = (),
) -> Inspection:
    """Find every linear map of a model and the ranks that it needs; nothing is made.

    Without samples, of the model as it is.  With samples, as a run sees it: simplified, the ranks
    are those for what the layers multiply, and budgets for the whole model are tried.

    Args:
        model: as for `compress`.
        shares: shares of the linear parameters to keep: what each would give; an empty list tries
            none, which is faster.
        ops: forms to fit to samples and to spend ``shares`` on: default, all, or names; all others
            are listed by their weights alone.
        include: factor only nodes whose name or torch scope matches.
        exclude: leave nodes dense whose name or torch scope matches.
        constant_inputs: as in the main job.
        data: samples, as in the main job: the ranks are those for what the layers multiply.
            Default: none, the weights alone.
        samples: how many samples judge. Default: 16.
        seed: seed of random input and of the choice of samples.
        input_shapes: concrete shape of an input, to run the model with.
        dims: size of a symbolic dimension, to run the model with.
        calibration: samples to fit to, as in the main job.  Without it a part of ``data`` is used.
            A CalibrationDataReader does as well.
        calibration_samples: how many samples to fit to.
        mask: input whose zeros mark padding, which counts nowhere. Default: attention_mask.
        save_stats: write the calibration statistics (.npz), for runs with other budgets.
        load_stats: use the statistics that ``save_stats`` wrote for this model.
        threads: intra-op threads. Default: physical cores.
        judge_at: a value inside the model, or a node, that counts as an output where damage is
            measured.
        custom_ops: a library of custom operators that the model uses, which every session
            registers.
        simplify: False: with samples: do not run onnxsim first.
        progress: shows the stages; default: nothing is shown.
        log: collects ONNX Runtime's messages.
        outputs: what the caller writes of the result, checked before the work.

    Returns:
        The linear maps, the large constants that none reads, and what the budgets would give.

    Raises:
        InputError: the model cannot be read, or the samples do not fit it.
        UsageError: an option is not of its type or out of its range.
    """
    values = dict(locals())
    verbs.INSPECT.check(values)
    own = {option.name for option in verbs.INSPECT.arguments} - {"shares"}
    given = {name: value for name, value in values.items() if name in own}
    shares = values["shares"]
    settings = Settings.of(
        {
            **given,
            **({"keep": max(shares)} if shares else {}),
            "bench": False,
            "dry_run": True,
        }
    )
    found = inspect_model(model, settings, shares, progress or Silent(), log or OrtLog(), outputs)
    return replace(found, origin=origin_of(verbs.INSPECT, values, (model,)))
