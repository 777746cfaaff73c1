"""What is charged, what waits, and how charges are bundled."""

from datetime import timedelta
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from contracts.metering import LINES_MAX
from contracts.pricing import Rated
from services.metering.domain.charging import Charge, Head, advance, bundle, decide_charges
from services.metering.domain.prices import NoPrice
from services.metering.domain.usage import Usage
from tests.unit.metering.building import NOON, price_book, priced, usage

HEADS = {partition: Head(outbox_number=partition * 10, recorded_at=NOON) for partition in range(64)}
TIMES = dict.fromkeys(range(64), NOON + timedelta(seconds=1))
OPEN = {f"acme-{number}" for number in range(7)}


def charge(number: int) -> Charge:
    rated = price_book().price(usage(number))
    assert isinstance(rated, Rated)
    return Charge(usage=usage(number), rated=rated)


@given(st.sets(st.integers(0, 60), max_size=40), st.sets(st.sampled_from(sorted(OPEN))))
def test_every_use_is_charged_or_waits_for_what_it_lacks(numbers: set[int], open_accounts: set[str]) -> None:
    book = price_book()
    uses: list[Usage] = [usage(number) for number in sorted(numbers)]
    uses += [usage(100 + number, occurred_at=NOON - timedelta(days=900)) for number in sorted(numbers)]
    decided = decide_charges(((each, priced(book, each)) for each in uses), open_accounts=open_accounts)
    assert sorted(
        [each.usage.event_id for each in decided.charges] + [each.usage.event_id for each in decided.set_aside]
    ) == sorted(each.event_id for each in uses)
    assert all(each.usage.account in open_accounts for each in decided.charges)
    for waiting in decided.set_aside:
        if waiting.usage.account not in open_accounts:
            assert (waiting.reason, waiting.key) == ("unattributed", waiting.usage.account)
        else:
            assert (waiting.reason, waiting.key) == ("unpriced", "openai/gpt-4o-mini")
            assert isinstance(book.price(waiting.usage), NoPrice)


@given(st.permutations(list(range(80))))
def test_bundles_have_the_next_numbers_of_their_partition_and_lines_in_order_of_use(numbers: list[int]) -> None:
    bundles = bundle([charge(number) for number in numbers], heads=HEADS, recorded_at=TIMES)
    assert [each.partition for each in bundles] == sorted({usage(number).partition for number in numbers})
    for each in bundles:
        assert each.number == HEADS[each.partition].outbox_number + 1
        assert each.recorded_at == TIMES[each.partition]
        times = [line.usage.occurred_at for line in each.charges]
        assert times == sorted(times)
    assert sorted(line.usage.event_id for each in bundles for line in each.charges) == sorted(
        f"use-{number}" for number in numbers
    )


def test_a_bundle_has_no_more_lines_than_the_ledger_takes() -> None:
    charges = [
        Charge(usage=usage(number, account="acme"), rated=charge(1).rated) for number in range(2 * LINES_MAX + 1)
    ]
    bundles = bundle(charges, heads=HEADS, recorded_at=TIMES)
    assert [len(each.charges) for each in bundles] == [LINES_MAX, LINES_MAX, 1]
    first = HEADS[bundles[0].partition].outbox_number + 1
    assert [each.number for each in bundles] == [first, first + 1, first + 2]


@given(st.lists(st.lists(st.integers(0, 500), max_size=30, unique=True), max_size=8), st.data())
def test_totals_do_not_depend_on_batching(batches: list[list[int]], data: st.DataObject) -> None:
    numbers = sorted({number for batch in batches for number in batch})
    shuffled = data.draw(st.permutations(numbers))
    cut = data.draw(st.integers(0, len(numbers)))

    def totals(parts: list[list[int]]) -> dict[str, int]:
        sums: dict[str, int] = {}
        for part in parts:
            for each in bundle([charge(number) for number in part], heads=HEADS, recorded_at=TIMES):
                for line in each.charges:
                    account = line.usage.account
                    sums[account] = sums.get(account, 0) + line.rated.amounts["usd"]
        return sums

    assert totals([shuffled[:cut], shuffled[cut:]]) == totals([numbers])


@given(st.lists(st.timedeltas(min_value=timedelta(days=-1), max_value=timedelta(days=1)), min_size=1, max_size=20))
def test_recorded_times_only_grow_whatever_the_clock_does(clock: list[timedelta]) -> None:
    head = Head(outbox_number=0, recorded_at=NOON)
    recorded = []
    for since_noon in clock:
        head = Head(outbox_number=0, recorded_at=advance(head, now=NOON + since_noon))
        recorded.append(head.recorded_at)
    assert all(earlier < later for earlier, later in pairwise([NOON, *recorded]))
