"""Budgets: the strategies that spend one goal over the whole model."""

from __future__ import annotations

import math

from onnx_lowrank.errors import InputError, named
from onnx_lowrank.graph.walk import stored_bytes
from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.formats import Variant
from onnx_lowrank.numerics.knapsack import Solution, path, solve
from onnx_lowrank.ranks.allocation import CostOf, bytes_of, parameters_of
from onnx_lowrank.ranks.costs import CostTable
from onnx_lowrank.ranks.furthest import furthest
from onnx_lowrank.ranks.goals import Budget
from onnx_lowrank.ranks.prepared import Prepared
from onnx_lowrank.ranks.search import Searching
from onnx_lowrank.ranks.strategy import (
    Measured,
    Plan,
    Strategy,
    Unreachable,
)
from onnx_lowrank.schema.measures import Judged, Latency

__all__ = ["Keep", "MaxSize", "Speed", "Tolerance", "cost_of", "file_bytes"]

# How often a model is assembled for one goal.
_TRIES = 4
# The same for a tolerance, and how often for a step ahead: where less than this share of the limit
# is used, and at least this share of the cost might be saved.
_TOLERANCE_TRIES, _AHEAD, _USED, _WORTH = 6, 2, 0.8, 0.01
# The same for a latency, and how much faster than asked for is near enough.
_TIMED_TRIES, _OVERSHOOT = 7, 1.1
# What a plan that replaces one that was too large leaves free, as a share of the size: it has other
# names and nodes, and of a large model each try takes minutes.
_MARGIN = 2e-4
# What a pair adds to the file beside its elements: a node, names and shapes.
_OVERHEAD = 400
# The same of a matrix of integers: its scales, and the nodes that make floats of both.
_OVERHEAD_OF_FORMAT, _OVERHEAD_OF_TABLE, _OVERHEAD_OF_INTEGERS = 700, 2500, 1200


class Keep(Strategy):
    """A share of the linear layers' parameters over the whole model; of their bytes with formats.

    Where layers may be integers, their bytes count as they are stored, and those of tables too.
    """

    once = True
    may_put_back = False

    def __init__(self, searching: Searching, budget: Budget) -> None:
        self._searching, self._budget = searching, budget

    def first(self) -> Plan:
        """The least damage within the share."""
        searching, share = self._searching, self._budget.value
        stored = searching.prepared.quantized.wanted
        priced = searching.ladders.priced(bytes_of if stored else parameters_of)
        total = searching.linear_bytes() if stored else searching.linear_parameters()
        fixed = searching.fixed_bytes() if stored else total - priced.dense
        solution = solve(priced.items, share * total - fixed)
        if solution is not None:
            return searching.plan(priced, solution)
        best = path(priced.items)[-1]
        what = "bytes" if stored else "parameters"
        kept = (best.cost + fixed) / total if total else 1.0
        held = f"; layers that must stay dense hold {fixed / total:.3g}" if fixed and total else ""
        raise Unreachable(
            f"{self._budget.named}: the least that can be kept is {kept:.3g} of the linear "
            f"layers' {what}{held}{searching.ladders.left_out}",
            searching.plan(priced, best),
        )


class MaxSize(Strategy):
    """Bytes of the written model.

    Args:
        searching: the layers' options.
        budget: the bytes.
        frame: bytes of IN that are not elements of constants.
    """

    may_put_back = False

    def __init__(self, searching: Searching, budget: Budget, frame: int) -> None:
        self._searching, self._budget = searching, budget
        prepared = searching.prepared
        self._priced = searching.ladders.priced(file_bytes)
        self._other = stored_bytes(prepared.model) - searching.ladders.floats + frame
        self._tries = 0

    def first(self) -> Plan:
        """The least damage that should fit."""
        items = self._priced.items
        solution = solve(items, self._budget.value - self._other)
        if solution is not None:
            return self._searching.plan(self._priced, solution)
        best = path(items)[-1]
        raise Unreachable(
            f"{self._budget.named}: the smallest that can be had is about "
            f"{best.cost + self._other:.0f} bytes; {self._other:.0f} of them are not linear layers "
            f"that can be factored{self._searching.ladders.left_out}",
            self._searching.plan(self._priced, best),
        )

    def revise(self, plan: Plan, measured: Measured) -> Plan | None:
        """Less, by as much as the file turned out too large."""
        excess = measured.bytes - self._budget.value
        if excess <= 0:
            return None
        self._tries += 1
        if self._tries >= _TRIES:
            raise Unreachable(f"{self._budget.named}: OUT takes {measured.bytes} bytes", plan)
        self._other += excess + _MARGIN * self._budget.value
        return self.first()


def file_bytes(group: Group, variant: Variant, leads: bool = True) -> float:
    """Bytes that a group takes in a file: its weights, and their nodes and names."""
    form, nodes = variant.format, len(group.members)
    size = bytes_of(group, variant, leads)
    size += 0 if variant.rank is None or group.heads else _OVERHEAD * nodes
    if form is not None:
        matrices = len(group.maps) or (1 if variant.rank is None else 2)
        matrices += 2 if form.correction else 0
        own = _OVERHEAD_OF_INTEGERS * nodes if form.integers else _OVERHEAD_OF_FORMAT
        size += _OVERHEAD_OF_TABLE * nodes if form.table else own * matrices
        size += 2 * _OVERHEAD * nodes if form.correction else 0
    return size


class Tolerance(Strategy):
    """The smallest or fastest model whose loss stays within a limit.

    The search follows the loss on its own samples.  Then the loss on others decides: a step back
    where it is beyond the limit, one ahead where it leaves much of the limit unused.
    """

    def __init__(self, searching: Searching, budget: Budget, cost: CostOf) -> None:
        self._searching, self._budget = searching, budget
        self._priced = searching.ladders.priced(cost)
        self._steps = path(self._priced.items)
        self._known: dict[int, float] = {}
        self._at = 0
        self._held: int | None = None  # the furthest step that kept within the limit
        self._missed = len(self._steps)  # the first one that did not
        self._tries = self._ahead = 0

    def first(self) -> Plan:
        """The furthest step whose loss on the search samples is within the limit."""
        self._check_start()
        self._at = self._within(self._budget.value)
        return self._plan()

    def _check_start(self) -> None:
        """Where no layer may stay as it is, the least damage loses something too.

        Raises:
            Unreachable: it loses more than the limit.
        """
        start = self._steps[0]
        if not start.damage:
            return
        with self._searching.stages("search"):
            loss = self._searching.loss(self._priced, start, self._budget.metric)
        self._known[0] = loss
        if loss > self._budget.value:
            raise Unreachable(self._least(loss), self._searching.plan(self._priced, start))

    def _least(self, loss: float) -> str:
        floats = named("weights", "auto")
        return (
            f"{self._budget.named}: in the formats that were asked for the loss is {loss:.3g} at "
            f"least; {floats} leaves floats where that is needed"
        )

    def revise(self, plan: Plan, measured: Measured) -> Plan | None:
        """Another step, by as much as other samples lost more or less than those of the search."""
        judged, limit, at = measured.judged, self._budget.value, self._at
        if judged is not None and not at and self._steps[0].damage and judged.loss > limit:
            raise Unreachable(self._least(judged.loss), plan)
        if judged is None or not at:
            return None
        self._tries += 1
        if judged.loss <= limit:
            self._held = at if self._held is None else max(self._held, at)
        else:
            self._missed = min(self._missed, at)
        if at == self._held and not self._room(judged):
            return None
        if self._tries >= _TOLERANCE_TRIES:
            return self._back()
        found = max(self._known.get(at, limit), 1e-12)
        ratio = min(max(max(judged.smooth, judged.loss / 2.0) / found, 0.1), 10.0)
        wanted = self._within((limit if at == self._held else 0.98 * limit) / ratio)
        least = 1 if self._held is None else self._held + 1
        if self._held is None and wanted >= self._missed:  # noise: the search found the same again
            wanted = self._missed * 9 // 10
        wanted = min(max(wanted, least), self._missed - 1)
        if wanted < least or wanted == at:
            return self._back()
        self._ahead += wanted > at
        self._at = wanted
        return self._plan()

    def further(self) -> bool:
        """Forget what other fits of the same steps lost."""
        self._held, self._missed = None, len(self._steps)
        self._tries = self._ahead = 0
        return True

    def _room(self, judged: Judged) -> bool:
        """Whether a step ahead may be worth an assembly."""
        limit, last = self._budget.value, len(self._steps) - 1
        following = min(self._missed - 1, last)
        saved = self._steps[self._at].cost - self._steps[following].cost
        return (
            self._ahead < _AHEAD
            and max(judged.loss, judged.smooth) < _USED * limit
            and saved > _WORTH * self._steps[0].cost
        )

    def _back(self) -> Plan | None:
        """The furthest step that held; None where it is at hand."""
        if self._at == self._held:
            return None
        self._at, self._ahead = self._held or 0, _AHEAD
        if self._held is None:
            self._searching.say(
                f"{self._budget.named}: nothing that was tried held on unseen samples"
            )
        return self._plan()

    def _within(self, limit: float) -> int:
        """The furthest step whose loss on the search samples is within a limit."""
        searching, metric = self._searching, self._budget.metric
        with searching.stages("search"):
            found, self._known = furthest(
                self._steps,
                lambda step: searching.loss(self._priced, step, metric),
                limit,
                self._guess,
                self._known,
            )
        return found

    def _plan(self) -> Plan:
        if not self._at and not self._steps[0].damage:
            nothing = "nothing that was tried keeps within the tolerance"
            if len(self._steps) == 1:
                size = named("objective", "size")
                nothing = f"no choice costs less by the objective; {size} counts bytes"
                if self._budget.objective == "size":
                    nothing = "no choice is smaller"
            return self._searching.dense(nothing)
        return self._searching.plan(self._priced, self._steps[self._at])

    def _guess(self, step: Solution) -> float:
        # Distances go with the root of the damage; what counts or correlates goes with it.
        rooted = self._budget.metric.kind == "relative-l2"
        return math.sqrt(step.damage) if rooted else step.damage


class Speed(Strategy):
    """A latency, absolute or relative to the original's.

    The cost table says which layers to take next, timing of the whole model how far to go.
    """

    def __init__(self, searching: Searching, budget: Budget, table: CostTable) -> None:
        self._searching, self._budget = searching, budget
        cost = cost_of(searching.prepared, "latency", table)
        self._priced = searching.ladders.priced(cost)
        self._steps = path(self._priced.items)
        self._at = self._low = 0  # too slow
        self._high: int | None = None  # fast enough
        self._best = 0.0
        self._tries = 0
        # Nanoseconds of the whole model for each that the table says.
        self._scale = 1.0

    def first(self) -> Plan:
        """All layers dense: their times alone do not tell the model's."""
        if self._steps[0].damage:  # as floats nothing may stay
            return self._plan()
        return self._searching.dense("the input model meets the goal as it is")

    def revise(self, plan: Plan, measured: Measured) -> Plan | None:
        """Further, or back where it went too far."""
        latency = measured.latency
        if latency is None:
            raise InputError(
                f"{self._budget.named} needs the timing that {named('bench', False)} leaves out"
            )
        wanted, had = self._wanted(latency), latency.speedup.median
        self._best = max(self._best, had)
        self._tries += 1
        dense = latency.before_ms.median * 1e6
        if self._at:
            saved = self._steps[0].cost - self._steps[self._at].cost
            self._scale = max((dense - dense / had) / saved, 0.05)
        if had >= wanted:
            self._high = self._at
            # Fast enough, and no slower step is left or it is just so.
            if self._at == 0 or had <= wanted * _OVERSHOOT or self._at - self._low <= 1:
                return None
        else:
            self._low = self._at
        last = len(self._steps) - 1
        if self._tries > _TIMED_TRIES or (self._high is None and self._low == last):
            if self._high is None:
                raise Unreachable(self._limit(dense), plan)
            if self._at == self._high:
                return None
            self._at = self._low = self._high  # the last one that was fast enough, once more
            return self._plan()
        saving = (dense - dense / wanted) * 1.02 / self._scale
        start = self._steps[0].cost
        high = last if self._high is None else self._high - 1
        ahead = (i for i, s in enumerate(self._steps) if start - s.cost >= saving)
        self._at = min(max(next(ahead, last), self._low + 1), high)
        if self._high is not None and self._tries > 3:
            self._at = (self._low + self._high) // 2 or 1
        return self._plan()

    def _plan(self) -> Plan:
        return self._searching.plan(self._priced, self._steps[self._at])

    def _wanted(self, latency: Latency) -> float:
        """The speedup that is asked for."""
        if self._budget.kind == "speedup":
            return self._budget.value
        return latency.before_ms.median / self._budget.value

    def _limit(self, dense: float) -> str:
        saved = (self._steps[0].cost - self._steps[-1].cost) / 1e6
        return (
            f"{self._budget.named}: the fastest that was found is {self._best:.3g}× the original; "
            f"by the cost table all layers together save at most {saved:.3g} of "
            f"{dense / 1e6:.3g} ms"
        )


def cost_of(prepared: Prepared, objective: str, table: CostTable | None) -> CostOf:
    """What a group costs by an objective: bytes, multiply-accumulates or nanoseconds."""
    if objective == "size":
        return bytes_of
    if objective == "macs":
        macs = prepared.macs

        def count(group: Group, variant: Variant, leads: bool = True) -> float | None:
            if variant.format is not None and variant.format.table:
                return 0.0
            rank = variant.rank
            costs = [None if macs is None else macs.costs.get(m.site) for m in group.members]
            known = [cost for cost in costs if cost is not None]
            if len(known) < len(costs):
                return None
            if rank is None:
                form = variant.format
                more = 0 if form is None or not form.correction else form.correction
                return float(sum(c.dense + (c.pair(more) if more else 0) for c in known))
            return float(sum(c.pair(rank) if leads else rank * c.second for c in known))

        return count
    assert table is not None

    def time(group: Group, variant: Variant, leads: bool = True) -> float | None:
        return table.time(group, variant, leads)

    return time
