"""What a price lowers of what was charged is given back: in any order the same total, and never more than its part."""

from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from contracts.pricing import Counter, OwnPrice, PriceVersion, Rated, Tier
from services.metering.correcting.changing import Charged, charged, lowered
from services.metering.correcting.versions import amounts_of
from services.metering.domain.corrections import take_out
from services.metering.domain.prices import CounterKey, PriceBook, rate_in_order, steps_of
from services.metering.domain.usage import Usage
from services.metering.translate import exact_of
from tests.unit.metering.building import NOON, USD, usage


def volume(
    id: str = "volume", *, above: str = "0.3333333333", first: str = "1", minimum: int = 0, free: int = 0
) -> OwnPrice:
    return OwnPrice(
        id=id,
        type="render",
        unit="usd",
        kind="volume",
        quantity="n",
        tiers=(Tier(Decimal(10), Decimal(first)), Tier(None, Decimal(above))),
        minimum=Decimal(minimum),
        free=Decimal(free),
        period="month",
    )


FIXED = OwnPrice(id="fixed", type="render", unit="usd", kind="per_unit", tiers=(Tier(None, Decimal("0.0000000015")),))
GRADUATED = OwnPrice(
    id="graduated",
    type="render",
    unit="usd",
    kind="graduated",
    quantity="n",
    tiers=(Tier(Decimal(3), Decimal("0.1")), Tier(None, Decimal("0.05"))),
    period="day",
)
CHOICES = (
    (volume(),),
    (volume(above="0"),),
    (volume(first="0.0000000015", above="0"),),
    (volume(first="0.0000000015", above="0.0000000004"),),
    (volume(minimum=3, free=2), FIXED),
    (volume(), GRADUATED, FIXED),
    (volume(), volume("other", above="0.5")),
)
prices = st.sampled_from(CHOICES)
uses = st.lists(st.integers(0, 12), min_size=1, max_size=10)


def render(number: int, n: int) -> Usage:
    return usage(number, account="acme", type="render", used=None, data=f'{{"n": {n}}}')


@dataclass
class Metering:
    """The charged uses of an account in a period, and its counters."""

    book: PriceBook
    counters: dict[CounterKey, Counter] = field(default_factory=dict)
    charged: dict[int, Charged] = field(default_factory=dict)

    @classmethod
    def under(cls, chosen: tuple[OwnPrice, ...]) -> "Metering":
        version = PriceVersion(id="v1", effective_at=NOON - timedelta(days=30), rates={}, prices=chosen)
        return cls(PriceBook([version], units={"usd": USD}))

    def charge(self, number: int, n: int) -> None:
        use = render(number, n)
        rated, moved = rate_in_order([use], book=self.book, counters=self.counters)
        price = rated[use.key]
        assert isinstance(price, Rated)
        self.counters |= moved
        self.charged[number] = charged(use, price, units=self.book.units)

    def void(self, number: int) -> None:
        if (gone := self.charged.pop(number, None)) is not None:
            counts = self.book.counts(gone.usage, self.book.versions[0])
            self.counters |= take_out(self.counters, counts, gone.amounts)

    def settle(self, *, events_max: int) -> None:
        """A round for each counter: the latest uses, and no more of them than that."""
        for key, counter in sorted(self.counters.items()):
            credit, looked_at = counter.credit, 0
            for number in sorted(self.charged, reverse=True):
                if credit >= 0 or looked_at == events_max:
                    break
                to, steps = lowered(self.charged[number], key, -credit, book=self.book)
                self.charged[number] = to
                credit += steps
                looked_at += bool(steps)
            self.counters[key] = Counter(quantity=counter.quantity, credit=credit)

    def kept(self) -> None:
        """What is charged and carried is what all that is counted costs; of each use, items say it to the step."""
        version = self.book.versions[0]
        total = sum(each.amounts["usd"] for each in self.charged.values())
        fixed = sum(self.book.counts(each.usage, version).fixed["usd"] for each in self.charged.values())
        carried = sum(each.credit for each in self.counters.values())
        assert total - fixed + carried == self.whole()
        for each in self.charged.values():
            assert each.amounts["usd"] >= self.book.counts(each.usage, version).fixed["usd"]
            exact = sum((exact_of(each.line_items, price.id) for price in version.prices), Decimal(0))
            assert abs(exact * 10**9 - each.amounts["usd"]) <= 1 + len(version.prices)
            assert amounts_of(each.amounts_json, self.book.units) == each.amounts

    def whole(self) -> int:
        by_id = {price.id: price for price in self.book.versions[0].prices}
        return sum(steps_of(by_id[key[2]], each.quantity, unit=USD) for key, each in self.counters.items())


@given(uses, prices, st.data())
def test_in_any_order_and_settled_whenever_the_same_is_charged_in_all(
    counted: list[int], chosen: tuple[OwnPrice, ...], data: st.DataObject
) -> None:
    found = set()
    for _ in range(2):
        metering = Metering.under(chosen)
        for number in data.draw(st.permutations(range(len(counted)))):
            metering.charge(number, counted[number])
            metering.kept()
            if data.draw(st.booleans()):
                metering.settle(events_max=data.draw(st.integers(1, 3)))
                metering.kept()
        # Round by round, as much as it takes.
        for _ in range(len(counted)):
            metering.settle(events_max=1)
            metering.kept()
        assert all(each.credit == 0 for each in metering.counters.values())
        found.add(sum(each.amounts["usd"] for each in metering.charged.values()))
    assert len(found) == 1


steps = st.lists(
    st.tuples(st.sampled_from(["use", "void", "amend", "settle"]), st.integers(0, 9), st.integers(0, 12)), max_size=25
)


@given(steps, prices)
def test_what_is_charged_and_carried_is_what_all_costs_whatever_is_corrected_between(
    steps: list[tuple[str, int, int]], chosen: tuple[OwnPrice, ...]
) -> None:
    metering = Metering.under(chosen)
    for kind, number, n in steps:
        match kind:
            case "settle":
                metering.settle(events_max=number + 1)
            case "void":
                metering.void(number)
            case _ if kind == "amend" or number not in metering.charged:
                metering.void(number)
                metering.charge(number, n)
        metering.kept()
    for _ in range(10):
        metering.settle(events_max=10)
        metering.kept()
    if len([price for price in chosen if price.period]) == 1:
        # What is carried now was charged too little, and is charged with what comes next.
        assert all(each.credit >= 0 for each in metering.counters.values())
