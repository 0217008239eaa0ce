"""Candidates: plans assembled and measured, one after the other."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort

from onnx_lowrank.compression.assemble import Assembled, assemble
from onnx_lowrank.compression.context import Context
from onnx_lowrank.compression.result import Destination
from onnx_lowrank.evaluation.metrics import Metric
from onnx_lowrank.evaluation.watched import watched
from onnx_lowrank.ranks.prepared import Prepared
from onnx_lowrank.ranks.strategy import Measured, Plan
from onnx_lowrank.schema.measures import Check

__all__ = ["TIMED_PAIRS", "Candidate", "Candidates"]

TIMED_PAIRS = 40


@dataclass(frozen=True, eq=False)
class Candidate:
    """An assembled plan and what was measured of it."""

    plan: Plan
    assembled: Assembled
    measured: Measured


class Candidates:
    """Assembles plans in a workspace; only the newest one's files and session are kept.

    Attributes:
        made: how many there were.
    """

    def __init__(self, context: Context, prepared: Prepared) -> None:
        self._context, self._prepared = context, prepared
        self._folder: Path | None = None
        self._session: ort.InferenceSession | None = None
        self._assembled: Assembled | None = None
        self.made = 0

    def make(
        self,
        plan: Plan,
        metric: Metric | None,
        destination: Destination | None,
        *,
        more: bool = False,
        goal: Mapping[str, Any] | None = None,
    ) -> Candidate:
        """A plan, assembled for a destination, judged by a metric and timed.

        Args:
            plan: the plan.
            metric: what judges it; None for none.
            destination: where it goes.
            more: whether what the effort asks for, and healing, take part.
            goal: what the model says that it was made for; None for that of the settings.

        Raises:
            InputError: the result cannot be written, is not valid or does not run.
        """
        context, settings = self._context, self._context.settings
        if self._folder is not None:
            self._session = None
            shutil.rmtree(self._folder)
        self.made += 1
        self._folder = context.folder / f"candidate-{self.made}"
        self._folder.mkdir()
        assembled = assemble(
            context, self._prepared, plan.choices, destination, self._folder, more=more, goal=goal
        )
        self._assembled = assembled
        judged = latency = None
        if context.runs():
            context.trial.rest()
            session = context.trial.open(assembled.path)
            self._session = context.trial.judged(assembled.model, session)
            if metric is not None:
                with context.stages("judge"):
                    judged = context.trial.judge(self._session, metric)
            if settings.bench:
                with context.stages("bench", TIMED_PAIRS) as advance:
                    latency = context.trial.time(session, TIMED_PAIRS, advance)
        return Candidate(plan, assembled, Measured(assembled.bytes, judged, latency))

    def check(self) -> Check:
        """Outputs of the newest candidate, of a model that runs, against the original's."""
        trial, session, assembled = self._context.trial, self._session, self._assembled
        assert session is not None
        assert assembled is not None
        before, changed = self._prepared.model, [d for d in assembled.decisions if d.choice.changed]
        by_classes = self._context.settings.metric_used.of_classes
        seen = watched(before, [decision.node for decision in changed], trial.reading, by_classes)
        with self._context.stages("check", len(trial.samples.feeds)) as advance:
            check = trial.check(session, advance, seen if by_classes else None)
        if not seen.instead:
            return check
        after = trial.giving_out(assembled.model)
        with self._context.stages("check", len(trial.samples.feeds)) as advance:
            damage = trial.damage(seen, before, after, advance)
        return dataclasses.replace(check, damage=damage.mean, damage_error=damage.error)
