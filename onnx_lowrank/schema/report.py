"""The result of a run as plain values: what the console, the JSON and the library show.

``REPORT_VERSION`` is the version of this schema.  It grows by one whenever a field changes its
meaning or goes; new fields alone do not change it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from onnx_lowrank.schema.json_report import File, JsonReport, Origin
from onnx_lowrank.schema.layer import Layer
from onnx_lowrank.schema.measures import Check, Judged, Latency

__all__ = [
    "REPORT_VERSION",
    "BudgetReport",
    "Calibration",
    "EffortStep",
    "Healing",
    "OutputVerdict",
    "Report",
    "Totals",
    "damage_kind",
    "error_kind",
    "outcome_of",
]

REPORT_VERSION = 1


DamageOf = Literal["outputs", "classes"]


def error_kind(of: DamageOf) -> str:
    """What an error is, in a sentence."""
    return "relative L2" if of == "outputs" else "divergence of the classes, nats a row"


def damage_kind(of: DamageOf) -> str:
    """What a damage is, in a sentence."""
    if of == "outputs":
        return "mean relative square error of the outputs"
    return "Kullback-Leibler divergence of the classes, nats a row"


def outcome_of(step: EffortStep) -> str:
    """Whether the result has what was tried, or why it was not."""
    if step.why_not:
        return f"not tried: {step.why_not}"
    return ("taken" if step.taken else "dropped") + (f" ({step.at})" if step.at else "")


@dataclass(frozen=True)
class Totals:
    """Sums over the model; a constant that several nodes read counts once.

    Attributes:
        parameters_before: elements of all constants of the input (see `File.parameters`).
        parameters_after: the same of the output.
        linear_parameters_before: elements of the constants that the layers read
            whose form was chosen, but for layers that the user left out.
        linear_parameters_after: the same, with the pairs in place of what they replaced.
        macs_before: multiply-accumulates of one inference with the checked input shapes (MatMul,
            Gemm, Einsum, Conv, LSTM and their relatives); None where a shape is not known.
        macs_after: the same of the output.
    """

    parameters_before: int
    parameters_after: int
    linear_parameters_before: int
    linear_parameters_after: int
    macs_before: int | None
    macs_after: int | None


@dataclass(frozen=True)
class OutputVerdict:
    """A warning that the outputs are further off than is usable without judging them by a metric.

    Attributes:
        level: "doubtful", or "unusable" where little is left of the outputs.
        text: one sentence with the figures and what to try.
    """

    level: Literal["doubtful", "unusable"]
    text: str


@dataclass(frozen=True)
class Calibration:
    """What the factors were fitted to.

    Attributes:
        data: the source of the samples.
        samples: how many the factors were fitted to.
        held_out: how many judged the layers' errors.
        mask: the input whose zeros mark padding that was left out, or None.
        layers: how many constants were fitted.
        missing: name of a layer -> why it was factored by its weight alone.
    """

    data: str
    samples: int
    held_out: int
    mask: str | None
    layers: int
    missing: Mapping[str, str]


@dataclass(frozen=True)
class BudgetReport:
    """The budget of the whole model, and how it was met.

    Attributes:
        option: as one would type it.
        predicted_damage: mean relative square error of the outputs, all pairs together, on the
            samples of the search, and where these leave it unsure on those that factors are fitted
            to as well; None where layers were put back afterwards, or where no sample
            changes an output that shows them.
        summed_damage: sum of the layers' damages, each measured alone.
        achieved_damage: the same of the whole model on the samples of the check; None without it,
            or where no sample changes an output.
        metric: what a tolerance limits; None for other goals.
        loss: by that metric, on the samples of the check.
        evaluations: how often several layers were tried together in the search.
        assembled: how many models were assembled and measured.
        samples: how many samples the search used.
        put_back: layers that are dense again because the model was slower with their pairs.
        loss_error: standard error of the loss; None where one sample does not tell.
        predicted_error: standard error of the predicted damage; None where one sample does not
            tell.
        achieved_error: the same of the achieved one.
        damage_of: what the damages are: "outputs", the mean relative square error of the outputs;
            "classes", the mean Kullback-Leibler divergence of rows of classes, in nats.
    """

    option: str
    predicted_damage: float | None
    summed_damage: float | None
    achieved_damage: float | None
    metric: str | None
    loss: float | None
    evaluations: int
    assembled: int
    samples: int
    put_back: tuple[str, ...] = ()
    loss_error: float | None = None
    damage_of: DamageOf = "outputs"
    predicted_error: float | None = None
    achieved_error: float | None = None


@dataclass(frozen=True)
class Healing:
    """Gradient descent on the factors against the original's outputs.

    Attributes:
        steps: how many were done.
        best_step: after which the factors were taken; 0 if none was better than the start.
        error_before: relative L2 error of the outputs on held-out batches, mean over outputs.
        error_after: the same after the best step.
        batches: how many the descent read.
        held_out: how many others judged it.
        values: what it compared: outputs, and further values that were asked for.
        trained: how many constants it changed.
        seconds: wall time.
        rate: that it began with: change of an element in one step, as a share of the root mean
            square of its array.
        error_of: what the errors are: "outputs"; or "classes", their divergence in nats a row.
    """

    steps: int
    best_step: int
    error_before: float
    error_after: float
    batches: int
    held_out: int
    values: tuple[str, ...]
    trained: int
    seconds: float
    rate: float
    error_of: DamageOf = "outputs"


@dataclass(frozen=True)
class EffortStep:
    """A way to more accuracy at the same ranks: what it gained and what it cost.

    Attributes:
        method: "Fisher information", "refit" or "healing".
        taken: whether the result has it; what does not lower the error is dropped.
        error_before: relative error of the outputs without it, root mean square over samples kept
            aside; None where it was not tried.
        error_after: the same with it; None where it was not tried.
        seconds: wall time, of Fisher information with its derivatives.
        why_not: why it was not tried; "" where it was.
        error_of: what the errors are: "outputs"; or "classes", their divergence in nats a row.
        at: at what ranks, where these are not those of the result.
    """

    method: str
    taken: bool
    error_before: float | None
    error_after: float | None
    seconds: float
    why_not: str = ""
    error_of: DamageOf = "outputs"
    at: str = ""


@dataclass(frozen=True)
class Report(JsonReport):
    """A whole run.

    Attributes:
        version: version of this schema.
        tool: name and version of the program.
        input: the model that was given.
        output: the model that was made.
        layers: every linear map, in the order of the graph.
        totals: sums over the model.
        calibration: what the factors were fitted to; None if to the weights alone.
        goal: what was asked of the whole model; None where layers were chosen one by one.
        healing: what gradient descent reached; None without.
        check: outputs against the original's; None where it was left out.
        latency: one entry for each provider that was timed.
        settings: the options of the run.
        seconds: wall time of each stage.
        notes: what else the user should know: fallbacks, assumptions, warnings.
        verdict: a warning about the outputs; None where they are near, where there is no check, and
            where the user set a limit that holds.
        summary: the result in one sentence: size, speed and error.
        origin: what it takes to do it again; None where it was not kept.
        judged: the result by the metric that the user named; None without one, or where nothing
            was run.
        missed: the limit of the user's that was missed, for which nothing was written; else None.
        steps: what was tried for more accuracy, in this order.
    """

    version: int
    tool: str
    input: File
    output: File
    layers: tuple[Layer, ...]
    totals: Totals
    calibration: Calibration | None
    goal: BudgetReport | None
    healing: Healing | None
    check: Check | None
    latency: tuple[Latency, ...]
    settings: Mapping[str, Any]
    seconds: Mapping[str, float]
    notes: tuple[str, ...] = field(default=())
    verdict: OutputVerdict | None = None
    summary: str = ""
    origin: Origin | None = None
    judged: Judged | None = None
    missed: str | None = None
    steps: tuple[EffortStep, ...] = ()
