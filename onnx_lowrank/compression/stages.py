"""Stages: what a run goes through, for whoever watches it."""

from __future__ import annotations

from onnx_lowrank.compression.settings import Settings

__all__ = ["MADE", "stages_before", "stages_of"]

MADE = ("rewrite", "write", "bench", "check")
"""What every point of a sweep goes through."""


def stages_before(settings: Settings) -> tuple[str, ...]:
    """Up to the choice of the ranks, in their order."""
    runs = settings.check or settings.bench
    sampled = settings.data is not None or settings.calibration is not None
    fitted = settings.load_stats is not None or (sampled and settings.calibrate)
    budget = settings.budget
    timed = (budget is not None and budget.timed) or settings.rank_multiple == "auto"
    wanted = {
        "load": True,
        "simplify": settings.simplify,
        "find": True,
        "calibrate": fitted,
        "fisher": fitted and settings.load_stats is None and (settings.fisher or bool(budget)),
        "measure": True,
        "count": runs,
        "time layers": timed,
        "damage": budget is not None and runs,
        "damage together": budget is not None and runs,
    }
    return tuple(name for name, there in wanted.items() if there)


def stages_of(settings: Settings) -> tuple[str, ...]:
    """Of a whole run, in their order; a goal that is searched for may repeat the last ones."""
    budget = settings.budget
    wanted = {
        "choose": True,
        "refit": settings.refit,
        "rewrite": not settings.dry_run,
        "heal": bool(settings.heal),
        "round": settings.weights != "fp32",
        "write": not settings.dry_run,
        "judge": budget is not None and budget.kind == "tolerance",
        "bench": settings.bench and not settings.dry_run,
        "check": settings.check and not settings.dry_run,
    }
    return (*stages_before(settings), *(name for name, there in wanted.items() if there))
