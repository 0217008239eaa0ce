"""A loss and a size, both limited: the fastest model, or that of least work, within the two.

A byte gets a price, and what is minimized within the loss is the cost with the price of all bytes
(the Lagrangian of the limit).  The price is the smallest that brings the predicted file within its
limit; at 0 this is a plain tolerance.
"""

from __future__ import annotations

from onnx_lowrank.errors import named
from onnx_lowrank.graph.walk import stored_bytes
from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.formats import Variant
from onnx_lowrank.numerics.knapsack import path
from onnx_lowrank.ranks.allocation import CostOf, Priced
from onnx_lowrank.ranks.budget_strategies import Tolerance, file_bytes
from onnx_lowrank.ranks.goals import Budget
from onnx_lowrank.ranks.search import Searching
from onnx_lowrank.ranks.strategy import Measured, Plan, Strategy, Unreachable

__all__ = ["SizedTolerance"]

# Prices that are tried: powers of this, so many below and above the middle.
_STEP, _REACH = 1.5, 24
# How often the price rises after a search whose result is too large, and how often a file does.
_RISES, _TRIES = 6, 4


class SizedTolerance(Strategy):
    """A tolerance with a limit of the written bytes beside it."""

    may_put_back = False

    def __init__(self, searching: Searching, budget: Budget, cost: CostOf, frame: int) -> None:
        """A strategy.

        Args:
            searching: the layers' options.
            budget: the loss, and the bytes at most.
            cost: what is minimized.
            frame: bytes of IN that are not elements of constants.
        """
        assert budget.most_bytes is not None
        self._searching, self._budget, self._limit = searching, budget, budget.most_bytes
        self._cost = cost
        self._other = stored_bytes(searching.prepared.model) - searching.ladders.floats + frame
        self._tries = 0
        self._power: int | None = None  # of the price; None: bytes cost nothing
        self._inner = self._tolerance()

    def first(self) -> Plan:
        """The furthest step within the loss, at the smallest price of a byte that fits."""
        plan = self._inner.first()
        for _ in range(_RISES):
            if self._bytes(plan) <= self._limit:
                return plan
            self._raise(plan)
            plan = self._inner.first()
        if self._bytes(plan) <= self._limit:
            return plan
        raise Unreachable(self._missed(self._bytes(plan), "about "), plan)

    def revise(self, plan: Plan, measured: Measured) -> Plan | None:
        """Another step for the loss; then less for the bytes."""
        following = self._inner.revise(plan, measured)
        if following is not None:
            return following
        excess = measured.bytes - self._limit
        if excess <= 0:
            return None
        self._tries += 1
        if self._tries >= _TRIES:
            raise Unreachable(self._missed(measured.bytes), plan)
        self._other += measured.bytes - self._bytes(plan)
        self._raise(plan)
        return self.first()

    def further(self) -> bool:
        """Whether the tolerance can look again."""
        return self._inner.further()

    def _missed(self, size: float, about: str = "") -> str:
        return (
            f"{self._budget.named}: what keeps within it takes {about}{size:.0f} bytes; expected "
            f"at most {self._limit} ({named('max_size')})"
        )

    def _tolerance(self) -> Tolerance:
        return Tolerance(self._searching, self._budget, self._costing(self._price(self._power)))

    def _costing(self, price: float) -> CostOf:
        def cost(group: Group, variant: Variant, leads: bool = True) -> float | None:
            own = self._cost(group, variant, leads)
            if own is None:
                if not group.members[0].site.form.indices:
                    return None
                own = 0.0  # rows that are looked up: nobody times them alone
            return own + price * file_bytes(group, variant, leads)

        return cost

    def _price(self, power: int | None) -> float:
        """A price of a byte: at power 0 bytes and costs that can be saved weigh alike."""
        if power is None:
            return 0.0
        spans = [self._span(cost) for cost in (self._costing(0.0), file_bytes)]
        return _STEP**power * max(spans[0], 1e-12) / max(spans[1], 1.0)

    def _span(self, cost: CostOf) -> float:
        steps = path(self._searching.ladders.priced(cost).items)
        return steps[0].cost - steps[-1].cost

    def _raise(self, plan: Plan) -> None:
        """The next price at which a plan of no more damage is predicted to fit.

        Raises:
            Unreachable: none does.
        """
        low, high = -_REACH if self._power is None else self._power + 1, _REACH
        damage = plan.summed or 0.0
        if low > high or not self._fits(high, damage):
            raise Unreachable(self._missed(self._bytes(plan), "about "), plan)
        while low < high:
            middle = (low + high) // 2
            if self._fits(middle, damage):
                high = middle
            else:
                low = middle + 1
        self._power = low
        self._inner = self._tolerance()

    def _fits(self, power: int, damage: float) -> bool:
        """Whether a file at a price is predicted to fit, with no more than a damage."""
        priced = self._searching.ladders.priced(self._costing(self._price(power)))
        return self._least_bytes(priced, damage) <= self._limit

    def _least_bytes(self, priced: Priced, damage: float) -> float:
        """Bytes of the furthest step with no more than a damage; without one, of the first."""
        steps = path(priced.items)
        within = [step for step in steps if step.damage <= damage] or steps[:1]
        choices = priced.choices(within[-1])
        return self._other + sum(
            file_bytes(group, Variant(own.rank, own.format), own.leads)
            for group, own in choices.items()
        )

    def _bytes(self, plan: Plan) -> float:
        """Predicted bytes of the file."""
        own = set(self._searching.ladders.groups)
        return self._other + sum(
            file_bytes(group, Variant(choice.rank, choice.format), choice.leads)
            for group, choice in plan.choices.items()
            if group in own
        )
