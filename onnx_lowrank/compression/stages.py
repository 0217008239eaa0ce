"""Stages: what a run goes through, for whoever watches it."""

from __future__ import annotations

from onnx_lowrank.compression.settings import Settings

__all__ = ["MADE", "stages_before", "stages_of"]

MADE = ("rewrite", "write", "bench", "check")
"""What every point of a sweep goes through."""


def _sampled(settings: Settings) -> bool:
    """Whether there are samples to fit to."""
    sampled = settings.data is not None or settings.calibration is not None
    return sampled and settings.calibrate


def stages_before(settings: Settings) -> tuple[str, ...]:
    """Up to the choice of the ranks, in their order."""
    runs, loads = settings.check or settings.bench, settings.load_stats is not None
    fitted = loads or _sampled(settings)
    budget = settings.budget
    felt = settings.fisher or budget is not None or settings.effort_used == "thorough"
    static = (integers := settings.quantized.integers) is not None and integers.static
    timed = (budget is not None and budget.timed) or settings.rank_multiple == "auto"
    wanted = {
        "load": True,
        "simplify": settings.simplify,
        "find": True,
        "calibrate": fitted,
        "fisher": fitted and felt and not loads,
        "measure": True,
        "count": runs,
        "time layers": timed,
        "ranges": static,
        "damage": budget is not None and runs,
        "damage of formats": budget is not None and runs,
        "damage together": budget is not None and runs,
    }
    return tuple(name for name, there in wanted.items() if there)


def stages_of(settings: Settings) -> tuple[str, ...]:
    """Of a whole run, in their order; a goal that is searched for may repeat the last ones."""
    budget = settings.budget
    wanted = {
        "choose": True,
        "effort": _sampled(settings) and settings.effort_used != "quick" and not settings.dry_run,
        "refit": settings.refit and not settings.dry_run,
        "rewrite": not settings.dry_run,
        "heal": settings.heals and not settings.dry_run,
        "round": settings.weights != "fp32",
        "write": not settings.dry_run,
        "judge": budget is not None and budget.kind == "tolerance",
        "bench": settings.bench and not settings.dry_run,
        "check": settings.check and not settings.dry_run,
    }
    return (*stages_before(settings), *(name for name, there in wanted.items() if there))
