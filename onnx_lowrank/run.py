"""The run: load → simplify → find → measure → choose → rewrite → check → report."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import onnx
import onnx_ir as ir

from onnx_lowrank import statistics_file
from onnx_lowrank.calibrate import Statistics, find_mask, gather, statistics_of
from onnx_lowrank.check import worst_error
from onnx_lowrank.choose import Choice, Decision, choose, decide, settle, worth_measuring
from onnx_lowrank.constants import Constants
from onnx_lowrank.errors import GateError, InputError
from onnx_lowrank.find import Finding, Group, find
from onnx_lowrank.forms import all_forms, chosen_forms
from onnx_lowrank.forms.base import node_name
from onnx_lowrank.heal import HealPlan, heal
from onnx_lowrank.load import Source, load
from onnx_lowrank.macs import Macs, count_macs
from onnx_lowrank.measure import measure
from onnx_lowrank.progress import Progress, Stages
from onnx_lowrank.report import REPORT_VERSION, Calibration, Check, File, Healing, Latency, Report
from onnx_lowrank.result import Destination, Result
from onnx_lowrank.rewrite import Errors, rewrite
from onnx_lowrank.runtime import OrtLog
from onnx_lowrank.save import check_embeddable, commit, workspace, written_bytes
from onnx_lowrank.settings import Settings
from onnx_lowrank.simplify import SIZE_LIMIT
from onnx_lowrank.simplify import simplify as simplify_model
from onnx_lowrank.spool import Spool
from onnx_lowrank.statistics_file import SavedStatistics, check_statistics_target, fingerprint
from onnx_lowrank.summary import layers, nothing_gained, removed_parameters, totals
from onnx_lowrank.trained import constant_names, install, trainable
from onnx_lowrank.trial import Trial
from onnx_lowrank.validity import invalid
from onnx_lowrank.walk import elements, stored_bytes

__all__ = ["TIMED_PAIRS", "execute"]

TIMED_PAIRS = 40
LOAD_LIMIT = 500_000_000


def execute(
    model: str | os.PathLike[str] | onnx.ModelProto | ir.Model,
    settings: Settings,
    target: Destination | None,
    progress: Progress,
    log: OrtLog,
) -> Result:
    """Run all stages; with a target, write the result there at the end.

    Args:
        model: the model.
        settings: the options.
        target: where the result goes; None keeps it in memory.
        progress: shows the stages.
        log: collects ONNX Runtime's messages.

    Raises:
        As `compress` does.
    """
    stages = Stages(progress)
    with stages("load"):
        source = load(model)
    if target is not None:
        place = dataclasses.replace(target, force=True) if settings.dry_run else target
        place.check(source.files)
    if settings.save_stats is not None:
        own = () if target is None else (target.path,)
        check_statistics_target(Path(settings.save_stats), (*source.files, *own))
    with contextlib.ExitStack() as stack:
        home = workspace(None) if target is None or settings.dry_run else target.workspace()
        folder = stack.enter_context(home)
        try:
            return _Run(source, settings, target, folder, stages, log).result()
        except OSError as error:
            name = source.name if target is None else str(target.path)
            raise InputError(f"{name}: {error.strerror or error}; nothing written") from error


class _Run:
    """One run's stages in order; what one finds the next one reads."""

    def __init__(
        self,
        source: Source,
        settings: Settings,
        target: Destination | None,
        folder: Path,
        stages: Stages,
        log: OrtLog,
    ) -> None:
        self.source, self.settings, self.target = source, settings, target
        self.folder, self.stages, self.log = folder, stages, log
        self.trial = Trial(source, settings, folder, log)
        self.notes: list[str] = []
        self.statistics = Statistics()
        self.calibration: Calibration | None = None
        self.healing: Healing | None = None

    def result(self) -> Result:
        """Go through the stages; nothing is written before the last line but one."""
        settings = self.settings
        before = File(_text(self.source.path), self.source.bytes, elements(self.source.model))
        model = self._simplified()
        finding, choices = self._decisions(model)
        decisions = decide(finding, choices)
        macs = self._macs(model, finding)
        self._say(nothing_gained(decisions))
        if settings.dry_run:
            parameters, size = _predicted(model, decisions)
            after = File(None, size, parameters)
            report = self._report(before, after, decisions, {}, macs, None, ())
            return Result(model, report, self.source.files)
        ranked = [group for group, choice in choices.items() if choice.rank is not None]
        _, size = _predicted(model, decisions)
        if self.target is not None and self.target.external_data == "never":
            check_embeddable(size)  # before the work is done
        work = sum(group.matrix.size for group in ranked)
        known = constant_names(model)
        with Spool(self.folder) as spool:
            with self.stages("rewrite", work) as advance:
                errors = rewrite(model, choices, self.statistics, spool, advance)
            if settings.heal:
                self.healing = self._healed(model, known, spool)
        with self.stages("write"):
            files = self._written(model)
        check, latency = self._checked(files[-1])
        after = File(None, written_bytes(files), elements(model))
        report = self._report(before, after, decisions, errors, macs, check, latency)
        self._gate(report)
        if self.target is None:
            return Result(model, report, self.source.files)
        commit(files, self.target.path)
        after = dataclasses.replace(after, path=str(self.target.path))
        return Result(model, dataclasses.replace(report, output=after), self.source.files)

    def _say(self, note: str | None) -> None:
        if note is not None:
            self.notes.append(note)

    def _simplified(self) -> ir.Model:
        """A model to work on: simplified, or a copy of the original and a note that says why."""
        source = self.source
        if not self.settings.simplify:
            return source.model.clone()
        with self.stages("simplify"):
            model, why = simplify_model(source, self.folder, self._compared)
        self._say(why)
        return source.model.clone() if model is source.model else model

    def _compared(self, path: Path) -> str | None:
        if self.settings.check:
            return self.trial.differs(path)
        self._say("simplified, but not compared with the original (--no-check)")
        return None

    def _decisions(self, model: ir.Model) -> tuple[Finding, dict[Group, Choice]]:
        settings = self.settings
        goal, selection = settings.goal, settings.selection
        with self.stages("find"):
            constants = Constants(model, settings.constant_inputs)
            finding = find(model, constants, all_forms(), chosen_forms(settings.ops))
            selection.check(entry.node for entry in finding.entries)
            choices = {group: worth_measuring(group, goal, selection) for group in finding.groups}
        undecided = [group for group, choice in choices.items() if choice is None]
        self.statistics = self._calibrated(model, undecided)
        with self.stages("measure", sum(group.matrix.size for group in undecided)) as advance:
            measured = measure(undecided, self.statistics.fit, advance, spectra=goal.needs_spectrum)
        with self.stages("choose"):
            chosen = {
                group: choice or choose(group, measured[group], goal)
                for group, choice in choices.items()
            }
            return finding, settle(finding, chosen, goal)

    def _calibrated(self, model: ir.Model, groups: Sequence[Group]) -> Statistics:
        """Moments of what the groups' weights are multiplied with, where there are samples."""
        if not groups:
            return Statistics()
        load = self.settings.load_stats is not None
        saved = self._loaded() if load else self._gathered(model, groups)
        if saved is None:
            return Statistics()
        if self.settings.save_stats is not None:
            statistics_file.save(Path(self.settings.save_stats), saved)
        found = statistics_of(model, groups, saved.gathered)
        self.notes.extend(found.notes)
        names = {node_name(g.members[0].site.node): why for g, why in found.missing.items()}
        self.calibration = Calibration(
            data=saved.data,
            samples=saved.samples,
            held_out=saved.held_out,
            mask=saved.mask,
            layers=len(found.fit),
            missing=names,
        )
        for name, why in names.items():
            self._say(f"{name} is fitted to its weight alone: {why}")
        return found

    def _loaded(self) -> SavedStatistics:
        """Moments of an earlier run."""
        path = Path(os.fspath(self.settings.load_stats or ""))
        with self.stages("calibrate"):
            saved = statistics_file.load(path, self.source.model, self.source.name)
        self._say(f"{path}: moments of {saved.samples} samples of {saved.data} are used")
        return saved

    def _gathered(self, model: ir.Model, groups: Sequence[Group]) -> SavedStatistics | None:
        """Moments of the samples; None where there are none to fit to."""
        settings, trial = self.settings, self.trial
        source = settings.calibration if settings.calibration is not None else settings.data
        if source is None or not settings.calibrate:
            return None
        with self.stages("prepare"):
            unavailable = trial.unavailable
        if unavailable is not None:
            if settings.calibration is not None:
                raise InputError(f"--calibrate: {unavailable}")
            return None
        samples = trial.calibration
        if samples is None:
            return None
        mask = settings.mask or find_mask(samples.feeds[0])
        held = trial.samples.feeds
        with self.stages("calibrate", len(samples.feeds) + len(held)) as advance:
            gathered = gather(
                model,
                groups,
                trial.runner,
                samples.feeds,
                held,
                mask,
                advance,
                self.folder,
                must_fit=settings.mask is not None,
            )
        if mask is not None:
            self._say(f"rows where input {mask!r} is 0 are left out of the calibration")
        return SavedStatistics(
            model=fingerprint(self.source.model),
            name=self.source.name,
            data=samples.source,
            samples=len(samples.feeds),
            held_out=len(held),
            mask=mask,
            gathered=gathered,
        )

    def _healed(self, model: ir.Model, known: frozenset[str], spool: Spool) -> Healing | None:
        """Gradient descent on the factors, in place; None where none can be reached."""
        settings, trial = self.settings, self.trial
        trained = trainable(model, known)
        if not trained:
            self._say("nothing to heal: no layer of the main graph was factored")
            return None
        with self.stages("prepare"):
            unavailable = trial.unavailable
        if unavailable is not None:
            raise InputError(f"--heal: {unavailable}")
        samples = trial.calibration
        if samples is None:
            raise InputError("--heal: expected two samples or more, one of them to judge with")
        start = time.perf_counter()
        with self.stages("heal", settings.heal) as advance:
            found = heal(
                model,
                self.source.model,
                trained,
                samples.feeds,
                settings.mask or find_mask(samples.feeds[0]),
                trial.runner,
                HealPlan(settings.heal, settings.heal_at, seed=settings.seed),
                advance,
                lambda _, error: self.stages.detail(f"held-out error {error:.4g}"),
            )
            install(model, found.arrays, spool)
        self.notes.extend(found.notes)
        if found.arrays:
            self._say("the errors of single layers are those before healing")
        return Healing(
            steps=found.steps,
            best_step=found.best_step,
            error_before=found.error_before,
            error_after=found.error_after,
            batches=found.samples,
            held_out=found.held_out,
            values=found.values,
            trained=len(found.arrays),
            seconds=time.perf_counter() - start,
        )

    def _macs(self, model: ir.Model, finding: Finding) -> Macs | None:
        """Multiply-accumulates, where the model is run at all."""
        if not self._runs():
            return None
        if stored_bytes(model) > SIZE_LIMIT:
            self._say(f"MACs not counted: the model is above {SIZE_LIMIT / 1e9:.0f} GB")
            return None
        with self.stages("count"):
            try:
                macs = count_macs(model, finding, self.trial.outputs)
            except InputError as error:
                self._say(f"MACs not counted: {error}")
                return None
        if macs.total is None:
            self._say("MACs not counted: part of the work is inside a subgraph or a function")
        return macs

    def _runs(self) -> bool:
        """Whether the model can and may be run in ONNX Runtime."""
        if not (self.settings.check or self.settings.bench):
            return False
        with self.stages("prepare"):
            unavailable = self.trial.unavailable
        if unavailable is None:
            return True
        if self.settings.max_error is not None:
            raise InputError(f"--max-error cannot be judged: {unavailable}")
        note = f"neither checked nor timed: {unavailable}"
        if note not in self.notes:
            self._say(note)
        return False

    def _written(self, model: ir.Model) -> tuple[Path, ...]:
        """The result in the workspace, valid ONNX."""
        target = self.target or Destination(Path("model.onnx"))
        files = target.write(model, self.folder)
        wrong = invalid(model)
        if wrong is not None:
            if invalid(self.source.model) is None:
                raise InputError(f"{self.source.name}: the result is not valid ONNX: {wrong}")
            self._say(f"the input does not pass onnx.checker, nor does the result: {wrong}")
        return files

    def _checked(self, path: Path) -> tuple[Check | None, tuple[Latency, ...]]:
        """Check and timing of the written result, which at least has to load."""
        settings, trial = self.settings, self.trial
        if not self._runs():
            wanted = settings.check or settings.bench
            if not wanted and self.source.bytes > LOAD_LIMIT:
                # ONNX Runtime would hold all of it, which is more than the rest of the run takes.
                self._say(f"not loaded in ONNX Runtime: above {LOAD_LIMIT // 10**6} MB, --no-check")
                return None, ()
            with self.stages("check"):
                note = trial.loads(path)
            if not wanted:  # else it is said already
                self._say(note)
            return None, ()
        candidate = trial.open(path)
        check, latency = None, ()
        if settings.check:
            with self.stages("check", len(trial.samples.feeds)) as advance:
                check = trial.check(candidate, advance)
        if settings.bench:
            with self.stages("bench", TIMED_PAIRS) as advance:
                return check, (trial.time(candidate, TIMED_PAIRS, advance),)
        return check, latency

    def _report(
        self,
        before: File,
        after: File,
        decisions: Sequence[Decision],
        errors: Mapping[Group, Errors],
        macs: Macs | None,
        check: Check | None,
        latency: tuple[Latency, ...],
    ) -> Report:
        rows = layers(decisions, errors, macs)
        notes = [*self.notes, *self.trial.notes]
        summary = self.log.summary()
        return Report(
            version=REPORT_VERSION,
            tool=f"onnx-lowrank {version('onnx-lowrank')}",
            input=before,
            output=after,
            layers=rows,
            totals=totals(decisions, rows, macs, before.parameters, after.parameters),
            calibration=self.calibration,
            healing=self.healing,
            check=check,
            latency=latency,
            settings=self.settings.to_dict(),
            seconds=dict(self.stages.seconds),
            notes=tuple(notes if summary is None else [*notes, summary]),
        )

    def _gate(self, report: Report) -> None:
        limit = self.settings.max_error
        if limit is None or report.check is None:
            return
        name, error = worst_error(report.check.providers)
        if not error <= limit:
            raise GateError(
                f"--max-error {limit:g}: output {name!r} is off by {error:.3g} (mean relative L2); "
                "nothing written",
                report,
            )


def _predicted(model: ir.Model, decisions: Sequence[Decision]) -> tuple[int, int]:
    """Parameters and bytes of the model after decisions that are not carried out."""
    parameters, size = elements(model), stored_bytes(model)
    for group, decision in {d.group: d for d in decisions if d.group is not None}.items():
        removed = removed_parameters(decision)
        parameters -= removed
        size -= int(removed * group.matrix.tensor.dtype.itemsize)
    return parameters, size


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
