"""What is measured of two models, as plain values: outputs compared, and latencies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from onnx_lowrank.phrases import counted

__all__ = [
    "Check",
    "Judged",
    "Latency",
    "Milliseconds",
    "OutputCheck",
    "ProviderCheck",
    "Speedup",
    "Verdict",
    "judged_text",
    "speedup_text",
    "verdict_of",
]

Verdict = Literal["faster", "slower", "as fast", "too noisy to tell"]

# Upper end over lower end of an interval around 1 up to which two models are equally fast.
_EQUAL = 1.1


def verdict_of(low: float, high: float) -> Verdict:
    """What the confidence interval of a speedup says.

    Args:
        low: lower end of the interval.
        high: upper end.

    Returns:
        "faster" or "slower" where the interval is above or below 1.  Where it holds 1: "as fast" if
        it is narrow, else "too noisy to tell".
    """
    if low > 1.0:
        return "faster"
    if high < 1.0:
        return "slower"
    return "as fast" if high <= _EQUAL * low else "too noisy to tell"


def speedup_text(median: float, low: float, high: float) -> str:
    """A median speedup with its 95 % interval, such as "2.1× as fast, 95 % interval …"."""
    interval = f"95 % interval {low:.2f}× to {high:.2f}×"
    verdict = verdict_of(low, high)
    if verdict == "too noisy to tell":
        return f"{verdict} ({interval})"
    equal = ": no difference" if verdict == "as fast" else ""
    return f"{median:.2f}× as fast, {interval}{equal}"


def judged_text(judged: Judged) -> str:
    """A result by a metric, such as "kl 0 → 0.012 (loss 0.012, standard error 0.001; 16 …)"."""
    sure = "" if judged.standard_error is None else f", standard error {judged.standard_error:.2g}"
    if judged.expected is not None:
        sure += f", {judged.expected:.2g} expected by the margins of all rows"
    return (
        f"{judged.metric} {judged.before:.4g} → {judged.after:.4g} (loss {judged.loss:.3g}"
        f"{sure}; {counted(judged.samples, 'sample')})"
    )


@dataclass(frozen=True)
class OutputCheck:
    """How far one output of the result is from the original's, over all samples.

    Attributes:
        name: the output.
        max_abs_error: largest absolute difference of any element.
        relative_l2: mean over the samples of ``‖b − a‖₂ / ‖a‖₂``; of strings, truths and integers
            of 32 and 64 bits the share that differs.
        cosine: mean over the samples of the cosine between the flattened outputs; None where it is
            no figure: one element in a sample has no direction, and strings and integers have none.
        top1_agreement: share of rows (along the last axis) whose largest element is at the same
            place, for outputs that look like a classifier's; else None.
        top1_rows: how many rows that share is of; None where they were not counted.
    """

    name: str
    max_abs_error: float
    relative_l2: float
    cosine: float | None
    top1_agreement: float | None
    top1_rows: int | None = None


@dataclass(frozen=True)
class ProviderCheck:
    """The check on one execution provider."""

    provider: str
    outputs: tuple[OutputCheck, ...]


@dataclass(frozen=True)
class Check:
    """Outputs of the result against the original's on the same inputs.

    Attributes:
        data: "random", or the path of the samples.
        samples: how many were run.
        providers: one entry for each execution provider.
        damage: mean over samples and outputs of ``‖b − a‖² / ‖a‖²``, on the first provider; None
            where no output can be compared.
        damage_error: standard error of the damage; None where one sample does not tell.
    """

    data: str
    samples: int
    providers: tuple[ProviderCheck, ...]
    damage: float | None = None
    damage_error: float | None = None


@dataclass(frozen=True)
class Judged:
    """One model by one metric.

    Attributes:
        loss: how much worse it is than the original, from 0; may be negative where a score with
            labels or of the user's rises.
        before: the metric's own figure for the original.
        after: the same for the model.
        samples: how many it is the mean of.
        standard_error: of the loss as a mean over samples, for top1 over rows; None where one
            sample does not tell.
        metric: its name, or the function's.
        expected: for top1, the loss that the margins of all rows let expect (see
            `onnx_lowrank.evaluation.top1`), which does not jump as a count of rows does; else None.
    """

    loss: float
    before: float
    after: float
    samples: int
    standard_error: float | None = None
    metric: str = ""
    expected: float | None = None

    @property
    def smooth(self) -> float:
        """The loss as a search follows it: the expected one where there is one."""
        return self.loss if self.expected is None else self.expected


@dataclass(frozen=True)
class Milliseconds:
    """Latency of one inference in milliseconds.

    Attributes:
        median: half of the runs took at most this long.
        p90: nine tenths of them.
        certain: 95 % confidence interval of the median, from order statistics; None where it was
            not kept.
        runs: the runs, rising; of more than 256 so many, evenly chosen.
    """

    median: float
    p90: float
    certain: tuple[float, float] | None = None
    runs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Speedup:
    """Ratios before / after of interleaved pairs of runs.

    Attributes:
        median: median ratio; above 1 the result is faster.
        low: 10th percentile of the ratios.
        high: 90th percentile of the ratios.
        certain: 95 % confidence interval of the median, from order statistics.
        verdict: what that interval says, see `verdict_of`.
    """

    median: float
    low: float
    high: float
    certain: tuple[float, float]
    verdict: Verdict = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "verdict", verdict_of(*self.certain))


@dataclass(frozen=True)
class Latency:
    """Timing of the original and the result on one execution provider, run in turns.

    Attributes:
        provider: the execution provider.
        threads: intra-op threads.
        pairs: how many pairs of runs were timed.
        before_ms: the original.
        after_ms: the result.
        speedup: the ratio before / after, pair by pair.
    """

    provider: str
    threads: int
    pairs: int
    before_ms: Milliseconds
    after_ms: Milliseconds
    speedup: Speedup
