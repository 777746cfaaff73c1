"""The items of which a cost is the sum; those of a call that has tokens alone are computed in integers, and fast."""

from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal, localcontext

import msgspec

from contracts.money import Unit
from contracts.pricing.arithmetic import EXACT, decimals_of, divided


class LineItem(msgspec.Struct, frozen=True, gc=False):
    """One priced quantity, before rounding: what a receipt shows. `exact` is always `count` * `price` / `per`.

    Of a surcharge in percent `count` is what it is taken of and `per` 100. `tier` says which of several prices it is.
    `price_id`: of which own price it is.
    """

    quantity: str
    count: int | Decimal
    unit: str
    price: Decimal
    per: int
    exact: Decimal
    tier: str | None = None
    price_id: str | None = None


class PlainItems(msgspec.Struct, frozen=True, gc=False, eq=False):
    """The items of a call that has tokens alone, made when they are asked for. `of`: its tokens, and the call."""

    plan: "PlainPlan"
    of: tuple[int, int, int]

    def __iter__(self) -> Iterator[LineItem]:
        with localcontext(EXACT):
            items = [each.item(self.of[each.place]) for each in self.plan.rows]
        return iter(items)

    def __len__(self) -> int:
        return len(self.plan.rows)

    def __getitem__(self, place: int) -> LineItem:
        return tuple(self)[place]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, tuple | PlainItems) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))


class PlainRow(msgspec.Struct, frozen=True, gc=False):
    """What every token, or the call, costs by one rate: `price` of `unit` for every `per`.

    That is `steps` for each, divided by ten to the power of `decimals`, of which `decimals_min` are always written.
    """

    place: int
    quantity: str
    unit: str
    price: Decimal
    per: int
    steps: int
    decimals: int
    decimals_min: int

    def item(self, count: int) -> LineItem:
        """The item of so many, in the exact context."""
        cost = self.price * count
        exact = cost if self.per == 1 else divided(cost, self.per)
        return LineItem(self.quantity, count, self.unit, self.price, self.per, exact)

    def exact_text(self, count: int) -> str:
        """What so many cost, as `item` says it, as a plain decimal."""
        if not (decimals := self.decimals):
            return str(count * self.steps)
        digits = str(count * self.steps).zfill(decimals + 1)
        least = len(digits) - decimals + self.decimals_min
        behind = digits[-decimals:least] + digits[least:].rstrip("0")
        return f"{digits[:-decimals]}.{behind}" if behind else digits[:-decimals]


class PlainPlan:
    """Rates of calls that have tokens alone, in integers: the same to the last digit as in decimals."""

    def __init__(self, plain: Iterable[tuple[int, str, str, Decimal, int]], units: Mapping[str, Unit]) -> None:
        self.units = units
        self.rows = tuple(_plain_row(*each) for each in plain)
        # By unit what one input token, one output token and the call are in steps, and by what that is to be divided.
        self._by_unit = []
        for unit in dict.fromkeys(row.unit for row in self.rows):
            rows = [row for row in self.rows if row.unit == unit]
            scale = units[unit].scale
            shift = max(0, *(row.decimals - scale for row in rows))
            steps = [0, 0, 0]
            for row in rows:
                steps[row.place] += row.steps * 10 ** (shift - row.decimals + scale)
            self._by_unit.append((unit, *steps, 10**shift))

    def amounts(self, of: tuple[int, int, int]) -> dict[str, int]:
        """What a call costs, rounded once per unit, half-even."""
        input_tokens, output_tokens, _ = of
        amounts = {}
        for unit, of_input, of_output, of_call, by in self._by_unit:
            steps = of_input * input_tokens + of_output * output_tokens + of_call
            if by != 1:
                steps, rest = divmod(steps, by)
                if rest * 2 > by or (rest * 2 == by and steps & 1):
                    steps += 1
            amounts[unit] = steps
        return amounts


def _plain_row(place: int, quantity: str, unit: str, price: Decimal, per: int) -> PlainRow:
    decimals_min = max(decimals_of(price), 0)
    decimals = decimals_min + len(str(per)) - 1
    steps = int(price.scaleb(decimals_min, EXACT))
    return PlainRow(place, quantity, unit, price, per, steps, decimals, decimals_min)
