"""The run: load → simplify → find → measure → choose → rewrite → check → report."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from onnx_lowrank.compression.assemble import predicted
from onnx_lowrank.compression.candidates import Candidate, Candidates
from onnx_lowrank.compression.context import Context
from onnx_lowrank.compression.int8 import beside_int8
from onnx_lowrank.compression.places import read_files, side_outputs
from onnx_lowrank.compression.plan import Chosen, cost_table, strategy_for
from onnx_lowrank.compression.prepare import prepare
from onnx_lowrank.compression.recording import carried, recipe_for
from onnx_lowrank.compression.reporting import Facts, report_of
from onnx_lowrank.compression.result import Destination, Result
from onnx_lowrank.compression.settings import Settings
from onnx_lowrank.compression.stages import stages_of
from onnx_lowrank.compression.summary import (
    nothing_gained,
)
from onnx_lowrank.compression.workplace import workplace
from onnx_lowrank.errors import GateError, named
from onnx_lowrank.evaluation.inside import taken_back
from onnx_lowrank.evaluation.outputs import worst_error
from onnx_lowrank.files import Output, check_outputs, workspace, write_text
from onnx_lowrank.graph.load import ModelLike, load
from onnx_lowrank.graph.references import restore
from onnx_lowrank.graph.walk import elements
from onnx_lowrank.maps.choice import Decision
from onnx_lowrank.phrases import counted, listed
from onnx_lowrank.progress import Progress, Stages
from onnx_lowrank.ranks.choose import decide
from onnx_lowrank.ranks.costs import CostTable
from onnx_lowrank.ranks.guard import ROUNDS, put_back, slower
from onnx_lowrank.ranks.prepared import Prepared
from onnx_lowrank.ranks.recipe import Recipe
from onnx_lowrank.ranks.recipe_file import recipe_text
from onnx_lowrank.ranks.strategy import Plan, Unreachable
from onnx_lowrank.runtime.memory import Watch
from onnx_lowrank.runtime.rehearsal import with_custom_ops
from onnx_lowrank.runtime.session import OrtLog
from onnx_lowrank.schema.json_report import File
from onnx_lowrank.schema.measures import Check, speedup_text
from onnx_lowrank.schema.report import Report

__all__ = ["execute"]

LOAD_LIMIT = 500_000_000


def execute(
    model: ModelLike,
    settings: Settings,
    target: Destination | None,
    progress: Progress,
    log: OrtLog,
    outputs: Sequence[Output] = (),
) -> Result:
    """Run all stages; with a target, write the result there at the end.

    Args:
        model: the model.
        settings: the options.
        target: where the result goes; None keeps it in memory.
        progress: shows the stages.
        log: collects ONNX Runtime's messages.
        outputs: what the caller writes of the result, checked with the rest before the work.

    Raises:
        As `compress` does.
    """
    settings.metric_used.load()
    settings = carried(settings)
    stages = Stages(progress)
    stages.plan(stages_of(settings))
    with stages("load"):
        source = load(model)
        _ = source.described  # its digest is of the file that was read
    inputs = read_files(source, settings)
    outputs = (*side_outputs(settings), *outputs)
    if target is None:
        check_outputs(outputs, inputs)
    else:
        checked = dataclasses.replace(target, force=True) if settings.dry_run else target
        checked.check(inputs, outputs)
    home = workspace(None) if target is None or settings.dry_run else target.workspace()
    written = outputs if target is None else (target.output, *outputs)
    place = workplace(settings, source, written)
    with home as folder, with_custom_ops(settings.custom_ops), place as (crew, pieces):
        context = Context(source, settings, folder, stages, log, crew, pieces)
        with Watch(context.trial.memory) as watch:
            found = _Run(context, target, inputs, watch).result()
        if pieces is not None and not settings.dry_run:
            pieces.finished()
        return found


class _Run:
    """One run; what is the same for every goal is in `Prepared`."""

    def __init__(
        self,
        context: Context,
        target: Destination | None,
        inputs: tuple[Path, ...],
        watch: Watch,
    ) -> None:
        self._context, self._target, self._inputs = context, target, inputs
        self._watch = watch
        self._before = context.source.described
        self._put_back: tuple[str, ...] = ()
        self._table: CostTable | None = None

    def result(self) -> Result:
        """Go through the stages; nothing is written before the last line but one."""
        context, inputs = self._context, self._inputs
        prepared = prepare(context)
        self._candidates = Candidates(context, prepared)
        try:
            chosen = strategy_for(context, prepared)
            self._table = chosen.table
            with context.stages("choose"):
                plan = chosen.strategy.first()
            if context.settings.dry_run:
                report = self._planned(prepared, chosen, plan)
                taken_back(prepared.model, context.at, context.source.model)
                recipe = recipe_for(context, prepared, decide(prepared.finding, plan.choices))
                self._save(recipe)
                restore(prepared.model)
                return Result(prepared.model, report, inputs, recipe)
            found = self._accepted(prepared, chosen, plan)
        except Unreachable as missed:
            report = self._planned(prepared, None, missed.plan)
            raise _missed(str(missed), report) from missed
        assembled = found.assembled
        context.say(nothing_gained(assembled.decisions, fitted=bool(prepared.statistics.fit)))
        check = self._checked(found)
        context.say(beside_int8(context, prepared, found, check))
        context.say_exceeded(self._watch)
        after = File(None, assembled.bytes, elements(assembled.model))
        report = self._report(
            prepared, chosen, found.plan, after, assembled.decisions, found, check
        )
        self._gate(report)
        self._never_larger(prepared, report, assembled.bytes)
        restore(assembled.model)
        if self._target is not None:
            self._target.commit(assembled.files, inputs)
            after = dataclasses.replace(after, path=str(self._target.path))
            report = dataclasses.replace(report, output=after)
        self._save(assembled.recipe)
        return Result(assembled.model, report, inputs, assembled.recipe)

    def _save(self, recipe: Recipe) -> None:
        """Write the recipe where that is asked for."""
        path = self._context.settings.save_recipe
        if path is not None:
            write_text(Output(Path(path), "save_recipe"), recipe_text(recipe))

    def _planned(self, prepared: Prepared, chosen: Chosen | None, plan: Plan) -> Report:
        """The report of a plan that is not carried out."""
        decisions = decide(prepared.finding, plan.choices)
        self._context.say(nothing_gained(decisions, fitted=bool(prepared.statistics.fit)))
        parameters, size = predicted(prepared, decisions)
        after = File(None, size + self._context.source.frame_bytes, parameters)
        return self._report(prepared, chosen, plan, after, decisions)

    def _accepted(self, prepared: Prepared, chosen: Chosen, plan: Plan) -> Candidate:
        """Assemble plans until one meets the goal and is not slower than the input model."""
        once = chosen.strategy.once  # else only for what is accepted the effort is made
        found = self._candidates.make(plan, chosen.metric, self._target, more=once)
        while (following := chosen.strategy.revise(found.plan, found.measured)) is not None:
            found = self._candidates.make(following, chosen.metric, self._target)
        if not once and found.plan.factored and self._more(prepared):
            found = self._improved(chosen, found)
        latency = found.measured.latency
        if latency is None or not slower(latency) or not found.plan.changed:
            return found
        settings, ratio = self._context.settings, latency.speedup
        if settings.allow_slower or settings.min_gain < 0 or not chosen.strategy.may_put_back:
            why = "the goal is not a latency" if settings.recipe is None else "the recipe says so"
            if settings.budget is not None and settings.budget.most_bytes is not None:
                why = "the file would be larger without"
            self._context.say(
                f"slower than the original: {speedup_text(ratio.median, *ratio.certain)}; "
                f"{_what(found.plan)} stay, since {why}"
            )
            return found
        if prepared.quantized.forced:
            self._context.say(
                f"slower than the original: {latency.speedup.median:.2f}×; "
                f"{named('weights', settings.weights)} leaves no floats to go back to"
            )
            return found
        for number in range(ROUNDS):
            plan, names = put_back(
                found.plan, self._times(prepared, found.plan), last=number == ROUNDS - 1
            )
            self._put_back += names
            found = self._candidates.make(plan, chosen.metric, self._target, more=True)
            latency = found.measured.latency
            if latency is None or not slower(latency) or not plan.changed:
                break
        again = "left as in the original" if prepared.formats else "made dense again"
        self._context.say(
            f"{counted(len(self._put_back), 'layer')} {again}, because the model was slower: "
            f"{listed(self._put_back, 4)}; times decided that, so another run may find it otherwise"
        )
        return found

    def _more(self, prepared: Prepared) -> bool:
        """Whether there is something that may bring a result nearer to the original."""
        tried = any(why is None for why in prepared.untried.values())
        return tried or self._context.settings.heals

    def _improved(self, chosen: Chosen, found: Candidate) -> Candidate:
        """A candidate with what the effort asks for, unless it breaks the goal that it meets."""
        budget, before = self._context.settings.budget, found.measured.loss
        better = self._candidates.make(found.plan, chosen.metric, self._target, more=True)
        after = better.measured.loss
        if budget is None or budget.kind != "tolerance" or before is None or after is None:
            return better
        if after <= budget.value:
            return self._further(chosen, better)
        if after <= before:
            return better
        self._context.say(
            f"{budget.named}: the steps for accuracy are dropped, the loss was {after:.3g} with "
            f"them and is {before:.3g} without"
        )
        return self._candidates.make(found.plan, chosen.metric, self._target)

    def _further(self, chosen: Chosen, found: Candidate) -> Candidate:
        """Smaller or faster ones, as far as what the steps for accuracy gained allows.

        Healing is too long for several models.
        """
        settings = self._context.settings
        gained = any(step.taken for step in found.assembled.steps)
        # Where the time may end between two models, the later one may lack what was gained.
        if not gained or settings.heals or self._context.until is not None:
            return found
        if not chosen.strategy.further():
            return found
        while (following := chosen.strategy.revise(found.plan, found.measured)) is not None:
            found = self._candidates.make(following, chosen.metric, self._target, more=True)
        return found

    def _times(self, prepared: Prepared, plan: Plan) -> CostTable:
        """How long the factored layers take, dense and as pairs."""
        if self._table is None:
            groups = [
                group
                for group, choice in plan.choices.items()
                if choice.changed and not (choice.format is not None and choice.format.table)
            ]
            self._table = cost_table(self._context, prepared, groups)
        return self._table

    def _checked(self, found: Candidate) -> Check | None:
        """Check of the written result, which at least has to load."""
        context, path = self._context, found.assembled.path
        settings, trial = context.settings, context.trial
        if context.runs():
            return self._candidates.check() if settings.check else None
        wanted = settings.check or settings.bench
        if not wanted and context.source.bytes > LOAD_LIMIT:
            # ONNX Runtime would hold all of it, which is more than the rest of the run takes.
            context.say(
                f"not loaded in ONNX Runtime: above {LOAD_LIMIT // 10**6} MB, "
                f"{named('check', False)}"
            )
            return None
        with context.stages("check"):
            note = trial.loads(path)
        if not wanted:  # else it is said already
            context.say(note)
        return None

    def _report(
        self,
        prepared: Prepared,
        chosen: Chosen | None,
        plan: Plan,
        after: File,
        decisions: Sequence[Decision],
        found: Candidate | None = None,
        check: Check | None = None,
    ) -> Report:
        """The report; without a candidate, of what is not carried out."""
        facts = Facts(
            prepared=prepared,
            chosen=chosen,
            plan=plan,
            after=after,
            decisions=decisions,
            target=self._target,
            found=found,
            check=check,
            table=self._table,
            put_back=self._put_back,
            assembled=self._candidates.made,
        )
        return report_of(self._context, facts)

    def _never_larger(self, prepared: Prepared, report: Report, size: int) -> None:
        """Raise GateError where integers that were made floats and rounded again take more."""
        before = self._before.bytes
        if prepared.stored and before is not None and size > before:
            raise _missed(
                f"{named('requantize', True)}: {self._context.source.name} takes {before} bytes, "
                f"the result would take {size}",
                report,
            )

    def _gate(self, report: Report) -> None:
        settings = self._context.settings
        most = None if settings.budget is None else settings.budget.size_limit
        if most is not None and report.output.bytes > most:
            why = f"{named('max_size', most)}: OUT takes {report.output.bytes} bytes"
            raise _missed(why, report)
        limit = settings.max_error
        if limit is None or report.check is None:
            return
        if not any(provider.outputs for provider in report.check.providers):
            why = f"{named('max_error', limit)}: no output holds anything that could be compared"
            raise _missed(why, report)
        name, error = worst_error(report.check.providers)
        if not error <= limit:
            raise _missed(
                f"{named('max_error', limit)}: output {name!r} is off by {error:.3g} (mean "
                "relative L2)",
                report,
            )


def _missed(why: str, report: Report) -> GateError:
    """The error of a limit that was missed, whose report says so too."""
    text = f"{why}; nothing written"
    return GateError(text, dataclasses.replace(report, missed=text))


def _what(plan: Plan) -> str:
    """What a plan changes, in words."""
    stored = any(choice.format is not None for choice in plan.choices.values())
    return " and ".join(["the pairs"] * plan.factored + ["the integers"] * stored)
