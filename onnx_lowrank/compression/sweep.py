"""Sweep: the trade-off of size and speed against error, at several budgets in one run.

What does not depend on the budget, the statistics and the layers' damage, is measured once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from onnx_lowrank.compression.candidates import Candidates
from onnx_lowrank.compression.context import Context
from onnx_lowrank.compression.int8 import beside_int8
from onnx_lowrank.compression.option import check_values
from onnx_lowrank.compression.origin import command_line, origin_of
from onnx_lowrank.compression.places import read_files, side_outputs
from onnx_lowrank.compression.plan import searching_for
from onnx_lowrank.compression.prepare import prepare
from onnx_lowrank.compression.result import Destination
from onnx_lowrank.compression.settings import Settings
from onnx_lowrank.compression.stages import MADE, stages_before
from onnx_lowrank.compression.summary import by_chance, layers, seen_damage, totals
from onnx_lowrank.compression.sweep_report import Point, SweepReport
from onnx_lowrank.compression.verbs import COMPRESS, SETTINGS, SWEEP
from onnx_lowrank.compression.workplace import workplace
from onnx_lowrank.data.sources import SampleSource
from onnx_lowrank.errors import InputError, UsageError, named
from onnx_lowrank.evaluation.metrics import Metric, Score
from onnx_lowrank.evaluation.outputs import worst_error
from onnx_lowrank.files import Output, check_outputs, workspace
from onnx_lowrank.graph.load import ModelLike, load
from onnx_lowrank.graph.walk import elements
from onnx_lowrank.progress import Progress, Silent, Stages
from onnx_lowrank.ranks.budget_strategies import Keep
from onnx_lowrank.ranks.goals import Budget
from onnx_lowrank.ranks.macs import Macs
from onnx_lowrank.ranks.prepared import Prepared
from onnx_lowrank.ranks.search import Searching
from onnx_lowrank.ranks.strategy import Plan, Unreachable
from onnx_lowrank.runtime.memory import Watch
from onnx_lowrank.runtime.rehearsal import with_custom_ops
from onnx_lowrank.runtime.session import OrtLog
from onnx_lowrank.schema.json_report import tool_name

__all__ = ["settings_of", "sweep"]


def sweep(
    model: ModelLike,
    *,
    shares: Sequence[float] = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4),
    metric: str | Score | None = None,
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
    effort: str = "quick",
    time_limit: float | str | None = None,
    fisher: bool = False,
    refit: bool = False,
    heal: int = 0,
    heal_at: Sequence[str] = (),
    save_stats: str | os.PathLike[str] | None = None,
    load_stats: str | os.PathLike[str] | None = None,
    judge_at: Sequence[str] = (),
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
    simplify: bool = True,
    models: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: Progress | None = None,
    log: OrtLog | None = None,
    outputs: Sequence[Output] = (),
) -> SweepReport:
    """Compress a model at several budgets.

    Args:
        model: as for `onnx_lowrank.compress`; it is not changed.
        shares: shares of the linear parameters to keep.
        metric: a further measure of the loss, as in the main job. The function itself does as well.
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
        samples: how many samples to judge with. Default: 16.
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
            helps no more. What does not help on samples kept aside is dropped.
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
        simplify: False: do not run onnxsim first.
        models: folder for the models, ``keep-0.80.onnx`` and so on; None keeps none.
        force: overwrite models there.
        progress: shows the stages.
        log: collects ONNX Runtime's messages.
        outputs: what the caller writes of the curve, checked with the rest before the work.

    Raises:
        InputError: the model or the data are not what they should be, the model does not run, or
            a file cannot or must not be written.
        UsageError: an option is out of its range.
    """
    options = dict(locals())
    settings = settings_of(options)
    judged = settings.metric_given
    if judged is not None:
        judged.load()
    budgets = [Budget("keep", share) for share in sorted(set(shares), reverse=True)]
    stages = Stages(progress or Silent())
    stages.plan(stages_before(settings))
    with stages("load"):
        source = load(model)
        _ = source.described  # its digest is of the file that was read
    inputs = read_files(source, settings)
    places = {}
    if models is not None:
        shown = (1.0, *(budget.value for budget in budgets))
        places = {keep: Destination(_model_path(Path(models), keep), force=force) for keep in shown}
    written = [*(place.output for place in places.values()), *side_outputs(settings), *outputs]
    check_outputs(written, inputs)
    home = workspace(None if models is None else Path(models))
    work_in = workplace(settings, source, written)
    with home as folder, with_custom_ops(settings.custom_ops), work_in as (crew, pieces):
        context = Context(source, settings, folder, stages, log or OrtLog(), crew, pieces)
        with Watch(context.trial.memory) as watch:
            prepared = prepare(context)
            if not context.runs():
                why = context.trial.unavailable or "neither check nor timing may run it"
                raise InputError(f"sweep needs a model that runs: {why}")
            searching, table = searching_for(context, prepared, timed=False)
            making = _Sweep(context, prepared, judged, places, inputs)
            stages.plan(MADE, f"point 1 of {len(budgets) + 1}")
            points, missed = [making.point(1.0, searching.dense("the point without pairs"))], []
            for number, budget in enumerate(budgets, 2):
                stages.plan(MADE, f"point {number} of {len(budgets) + 1}")
                try:
                    plan, last = _planned(searching, budget), number == len(budgets) + 1
                    points.append(making.point(budget.value, plan, beside=last))
                except Unreachable as error:
                    missed.append(str(error))
        context.say_exceeded(watch)
        held = context.trial.samples
        notes = [*context.notes, *context.trial.notes, *(table.notes() if table else ())]
        notes += _by_chance(points)
        logged = context.log.summary()
        notes += [] if logged is None else [logged]
        if pieces is not None:
            notes += pieces.summary()
            pieces.finished()
        return SweepReport(
            tool=tool_name(),
            input=None if source.path is None else str(source.path),
            metric=None if judged is None else judged.text,
            data=held.source,
            samples=len(held.feeds),
            provider=context.trial.provider.full,
            threads=context.trial.threads,
            points=tuple(points),
            missed=tuple(missed),
            notes=tuple(notes),
            file=source.described,
            settings={**settings.to_dict(), "keep": None},
            origin=origin_of(
                SWEEP,
                {**options, "models": models is not None, "out": models or "curve"},
                (source.path,),
            ),
        )


def _model_path(folder: Path, keep: float) -> Path:
    short = f"{keep:.2f}"
    return folder / f"keep-{short if float(short) == keep else f'{keep:g}'}.onnx"


def settings_of(options: Mapping[str, Any]) -> Settings:
    """The settings of a sweep's arguments.

    Raises:
        UsageError: an option is out of its range, or is of no use here.
    """
    check_values(SWEEP.arguments, options)
    shares = options["shares"]
    if not shares:
        raise UsageError(f"{named('shares')}: expected at least one share to keep, got none")
    for name in ("save_costs", "load_costs"):
        if options[name] is not None and options["rank_multiple"] != "auto":
            raise UsageError(f"{named(name)} needs {named('rank_multiple', 'auto')}")
    own = {option.name for option in SETTINGS}
    given = {name: value for name, value in options.items() if name in own}
    return Settings.of({**given, "keep": shares[0]})


def _planned(searching: Searching, budget: Budget) -> Plan:
    return Keep(searching, budget).first()


def _by_chance(points: Sequence[Point]) -> list[str]:
    """The first point whose damage may be off by chance, and which other ones are so too."""
    found = {}
    for point in points:
        one = (point.predicted_damage, point.predicted_error)
        chance = by_chance(one, (point.damage, point.damage_error))
        if chance is not None:
            found[f"{point.keep:g}"] = chance
    if not found:
        return []
    shares = list(found)
    more = f" (so too at {', '.join(shares[1:])})" if shares[1:] else ""
    return [f"at {named('shares')} {shares[0]}{more}: {found[shares[0]]}"]


class _Sweep:
    """Makes the points."""

    def __init__(
        self,
        context: Context,
        prepared: Prepared,
        metric: Metric | None,
        places: Mapping[float, Destination],
        inputs: tuple[Path, ...],
    ) -> None:
        self._context, self._metric = context, metric
        self._candidates, self._prepared = Candidates(context, prepared), prepared
        self._places, self._inputs = places, inputs
        self._macs: Macs | None = prepared.macs

    def point(self, keep: float, plan: Plan, *, beside: bool = False) -> Point:
        """Assemble and measure one budget.

        Args:
            keep: the share of the linear parameters.
            plan: what becomes of the layers.
            beside: whether a note puts it beside int8 alone.
        """
        destination = self._places.get(keep)
        found = self._candidates.make(
            plan, self._metric, destination, more=True, goal={"keep": keep}
        )
        check = self._candidates.check()
        if beside:
            hint = beside_int8(self._context, self._prepared, found, check)
            self._context.say(None if hint is None else f"at {named('shares')} {keep:g}: {hint}")
        assembled, latency = found.assembled, found.measured.latency
        rows = layers(assembled.decisions, assembled.errors, self._macs, assembled.rounded)
        parameters = elements(assembled.model)
        sums = totals(assembled.decisions, rows, self._macs, parameters, parameters)
        outputs = [output for provider in check.providers for output in provider.outputs]
        cosines = [output.cosine for output in outputs if output.cosine is not None]
        if destination is not None:
            destination.commit(assembled.files, self._inputs)
        return Point(
            keep=keep,
            bytes=found.measured.bytes,
            parameters=parameters,
            linear_parameters=sums.linear_parameters_after,
            macs=sums.macs_after,
            speedup=None if latency is None else latency.speedup.median,
            certain=None if latency is None else latency.speedup.certain,
            verdict=None if latency is None else latency.speedup.verdict,
            predicted_damage=plan.damage,
            summed_damage=plan.summed,
            damage=seen_damage(check.damage, assembled.decisions),
            error=worst_error(check.providers)[1] if outputs else math.nan,
            cosine=min(cosines, default=None),
            loss=found.measured.loss,
            model=None if destination is None else str(destination.path),
            command=self._command(keep) if plan.factored else None,
            predicted_error=plan.error,
            damage_error=check.damage_error,
        )

    def _command(self, keep: float) -> str | None:
        """The main job that makes a point; a sweep gives none up for being slower."""
        options = {**self._context.settings.values(), "keep": keep, "allow_slower": True}
        out = _model_path(Path(), keep)
        return command_line(COMPRESS, options, (self._context.source.path, out))
