"""What is read of a journal written by hand: now, of the past, page by page, with its causes."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from contracts.money import Unit
from services.ledger.domain.commands import LotScope, Rule, Units
from services.ledger.domain.entries import LotGranted, Move
from services.ledger.domain.periods import boundary
from services.ledger.projections import reversed_text
from services.ledger.queries import balances, exports, statements
from services.ledger.queries.accounts import read_accounts, read_tree
from services.ledger.queries.balances import BalanceView, read_balance, read_balance_as_of, read_posted_at
from services.ledger.queries.charges import UseView, read_charge
from services.ledger.queries.exports import as_csv, as_parquet, exported_accounts, exported_pages
from services.ledger.queries.holds import read_hold, read_open_holds
from services.ledger.queries.past import find_past
from services.ledger.queries.statements import StatementEntry, StatementFilter, read_statement
from services.ledger.queries.totals import read_account_totals
from services.ledger.queries.transactions import read_transaction
from services.ledger.queries.wallets import ScopeView, WalletView
from services.ledger.translate import full_id
from tests.conftest import Database
from tests.integration.ledger.by_hand import (
    BEGIN,
    GPT,
    HOUR,
    PARTITION,
    ROOT,
    Hand,
    expired,
    granted,
    line_row,
    moved,
    opened,
    placed,
    repaid,
    rule_set,
    used,
    uuid,
)
from tests.integration.ledger.exporting import rows_of_csv, rows_of_parquet

pytestmark = pytest.mark.anyio

UNITS = Units.of({"usd": Unit("usd", "money", 2), "tokens": Unit("tokens", "cap", 0)})
KEY = f"{ROOT}/key"
A, B, C, DEBT, OVER = (uuid(number) for number in range(1, 6))
HOLD, LATER = uuid(20), uuid(21)
EVERYTHING = StatementFilter()
USE = UseView(provider=GPT.provider, model=GPT.model, feature=None)


@pytest.fixture
async def hand(database: Database) -> AsyncIterator[Hand]:
    async with await AsyncConnection.connect(database.url("ledger").get_secret_value()) as connection:
        yield await Hand.take(connection)


async def balance(hand: Hand, account: str = ROOT, *, at: datetime) -> BalanceView:
    found = await read_balance(hand.connection, account, units=UNITS, now=at)
    assert found is not None
    return found


async def wallet(hand: Hand, account: str = ROOT, *, at: datetime) -> WalletView:
    (only,) = (await balance(hand, account, at=at)).wallets
    return only


def amounts(view: WalletView) -> tuple[str, str, str]:
    """posted, held, available."""
    return view.posted, view.held, view.available


async def everything(hand: Hand) -> list[list[TupleRow]]:
    """All of the journal and the wallets."""
    return [
        await (await hand.connection.execute(query)).fetchall()
        for query in ("SELECT * FROM journal ORDER BY batch, position", "SELECT * FROM wallets ORDER BY account, unit")
    ]


# Balances -------------------------------------------------------------------------------------------------------------


async def test_a_lot_that_ends_inside_a_hold_keeps_what_is_held_swept_or_not(hand: Hand) -> None:
    """The architecture's worked example 7."""
    ends = BEGIN + 5 * HOUR
    await hand.write(opened(ROOT, "usd"), granted(ROOT, "usd", A, 1500, expires_at=ends))
    await hand.write(placed(HOLD, ROOT, "usd", A, 1000, expires_at=ends + HOUR))
    before = await everything(hand)
    view = await wallet(hand, at=ends - timedelta(microseconds=1))
    assert amounts(view) == ("15", "10", "5")
    assert [(end.amount, end.at) for end in view.expiries] == [("5", ends)]
    view = await wallet(hand, at=ends)
    assert amounts(view) == ("10", "10", "0")
    assert view.expiries == []
    assert (view.lots[0].posted, view.lots[0].expired, view.lots[0].available) == ("10", "5", "0")
    assert await everything(hand) == before
    await hand.write(expired(ROOT, "usd", A, 500, at=ends))
    assert amounts(await wallet(hand, at=ends)) == ("10", "10", "0")


async def test_every_period_that_has_begun_is_there_and_the_next_is_told(hand: Hand) -> None:
    rule = Rule("r1", "tokens", 100, "day", BEGIN, rollover_max=30, plan="pro")
    await hand.write(opened(KEY, "tokens"), rule_set(KEY, rule, 0))
    before = await everything(hand)
    view = await wallet(hand, KEY, at=BEGIN + 49 * HOUR)
    # Nothing was used: of each day that ended 30 were rolled over.
    assert amounts(view) == ("130", "0", "130")
    assert [(lot.rule, lot.period, lot.granted) for lot in view.lots] == [("r1", 2, "130")]
    (renewal,) = view.renewals
    assert (renewal.plan, renewal.period, renewal.at) == ("pro", 3, boundary(rule, 3))
    assert (renewal.amount, renewal.rollover_max) == ("100", "30")
    assert await everything(hand) == before


async def test_a_balance_says_what_is_owed_and_what_counts_aside(hand: Hand) -> None:
    await hand.write(
        opened(ROOT, "usd"),
        opened(KEY, "tokens"),
        granted(ROOT, "usd", A, 100, scope=LotScope(models=("gpt-4o-mini",)), effective_at=BEGIN + 90 * HOUR),
        granted(ROOT, "usd", B, 100, cost_basis="0.9", reference="ticket"),
        moved("charged", ROOT, "usd", DEBT, -250, lot_kind="debt"),
        used("usd", 250),
        moved("charged", KEY, "tokens", OVER, -7, lot_kind="overage"),
        moved("charged", KEY, "tokens", C, -9, lot_kind="uncapped"),
    )
    view = await wallet(hand, at=BEGIN + HOUR)
    # The one lot is not valid yet.
    assert amounts(view) == ("-0.5", "0", "-1.5")
    assert view.debt == "2.5"
    assert [(lot.kind, lot.available) for lot in view.lots] == [("purchase", "0"), ("purchase", "1"), ("debt", "-2.5")]
    assert view.lots[0].scope == ScopeView(providers=[], models=["gpt-4o-mini"], features=[])
    assert (view.lots[1].cost_basis, view.lots[1].reference) == ("0.9", "ticket")
    cap = await wallet(hand, KEY, at=BEGIN + HOUR)
    assert (cap.posted, cap.overage, cap.uncapped) == ("0", "7", "9")


async def test_an_account_that_is_not_open_has_no_balance(hand: Hand) -> None:
    await hand.write(opened(ROOT, "usd"))
    at = BEGIN + 2 * HOUR
    assert await read_balance(hand.connection, KEY, units=UNITS, now=at) is None
    assert await read_balance_as_of(hand.connection, KEY, as_of=at, units=UNITS) is None
    assert await read_balance_as_of(hand.connection, ROOT, as_of=BEGIN, units=UNITS) is None
    assert await read_posted_at(hand.connection, KEY, world_at=at, units=UNITS, now=at) is None
    assert await read_account_totals(hand.connection, KEY, units=UNITS) is None
    assert await exported_accounts(hand.connection, KEY, below=True) == (0, [])
    assert await read_tree(hand.connection, "other", after="", limit=9, units=UNITS, now=at) is None


async def a_past(hand: Hand) -> list[datetime]:
    """Eleven batches of all sorts; the time of each."""
    times = []
    for moves in (
        [*opened(ROOT, "usd"), *granted(ROOT, "usd", A, 1000, expires_at=BEGIN + 8 * HOUR)],
        [*opened(KEY, "tokens"), *granted(ROOT, "usd", B, 300)],
        [placed(HOLD, KEY, "usd", A, 400, payer=ROOT)],
        [moved("charged", ROOT, "usd", B, -300, at=BEGIN - 30 * HOUR), used("usd", 300)],
        [placed(LATER, KEY, "usd", A, 100, payer=ROOT)],
        [
            moved("hold_settled", ROOT, "usd", A, held=-400, hold=HOLD),
            moved("charged", ROOT, "usd", A, -350),
            used("usd", 350),
        ],
        [*opened(f"{ROOT}/other", "usd"), moved("charged", KEY, "tokens", OVER, -5, lot_kind="overage")],
        expired(ROOT, "usd", A, 550, at=BEGIN + 8 * HOUR),
        [moved("charged", ROOT, "usd", DEBT, -20, lot_kind="debt"), used("usd", 20)],
        [*granted(ROOT, "usd", C, 50), *repaid(ROOT, "usd", lot=C, debt=DEBT, amount=20)],
        [
            moved("hold_released", ROOT, "usd", A, held=-100, hold=LATER),
            *expired(ROOT, "usd", A, 100, at=BEGIN + 11 * HOUR),
        ],
    ):
        await hand.write(moves)
        times.append(hand.head.recorded_at)
    return times


async def as_of(hand: Hand, at: datetime, account: str = ROOT) -> BalanceView | None:
    return await read_balance_as_of(hand.connection, account, as_of=at, units=UNITS)


async def known_as_of(hand: Hand, at: datetime, account: str) -> BalanceView:
    view = await as_of(hand, at, account)
    assert view is not None
    return view


async def test_the_past_is_what_was_recorded_then(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    times = await a_past(hand)
    views = [await as_of(hand, at) for at in times]
    told = [
        (only.posted, only.held, only.debt, {lot.lot[-2:]: lot.posted for lot in only.lots}, holds_of(only))
        for view in views
        if view is not None
        for only in view.wallets
    ]
    a, b, c, debt = (lot[-2:] for lot in (A, B, C, DEBT))
    assert told == [
        ("10", "0", "0", {a: "10"}, {}),
        ("13", "0", "0", {a: "10", b: "3"}, {}),
        ("13", "4", "0", {a: "10", b: "3"}, {HOLD: "4"}),
        ("10", "4", "0", {a: "10"}, {HOLD: "4"}),
        ("10", "5", "0", {a: "10"}, {HOLD: "4", LATER: "1"}),
        ("6.5", "1", "0", {a: "6.5"}, {LATER: "1"}),
        ("6.5", "1", "0", {a: "6.5"}, {LATER: "1"}),
        ("1", "1", "0", {a: "1"}, {LATER: "1"}),
        ("0.8", "1", "0.2", {a: "1", debt: "-0.2"}, {LATER: "1"}),
        ("1.3", "1", "0", {a: "1", c: "0.3"}, {LATER: "1"}),
        ("0.3", "0", "0", {c: "0.3"}, {}),
    ]
    # Between two batches it is as after the first of them; counted from the other end it is the same.
    assert [plain_as_of(await as_of(hand, at + HOUR / 2)) for at in times] == [plain_as_of(view) for view in views]
    directions = []

    async def turned(*asked: Any) -> Any:
        past = await find_past(*asked)
        assert past is not None
        directions.append(past.backwards)
        return replace(past, backwards=not past.backwards)

    monkeypatch.setattr(balances, "find_past", turned)
    assert [await as_of(hand, at) for at in times] == views
    assert set(directions) == {True, False}


async def test_of_each_wallet_of_the_past_as_many_holds_are_told(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    await hand.write(opened(ROOT, "usd", "tokens"), granted(ROOT, "usd", A, 1000), granted(ROOT, "tokens", B, 1000))
    for number, (unit, lot) in enumerate((("usd", A), ("usd", A), ("tokens", B), ("tokens", B))):
        await hand.write(placed(uuid(50 + number), ROOT, unit, lot, 100))
    monkeypatch.setattr(balances, "HOLDS_SHOWN_MAX", 2)
    then = await known_as_of(hand, hand.head.recorded_at, ROOT)
    assert [(each.unit, each.held, len(holds_of(each))) for each in then.wallets] == [
        ("tokens", "200", 2),
        ("usd", "2", 2),
    ]


def holds_of(view: WalletView) -> dict[str, str]:
    assert view.holds is not None
    return {hold.hold[-36:]: hold.held for hold in view.holds}


def plain_as_of(view: BalanceView | None) -> Any:
    """Without the time it was asked for, and what is told by that time."""
    assert view is not None
    told = view.model_dump(exclude={"as_of"})
    for each in told["wallets"]:
        del each["available"]
        for lot in each["lots"]:
            del lot["available"]
    return told


async def test_the_past_of_an_account_has_what_was_open_then(hand: Hand) -> None:
    times = await a_past(hand)
    assert await as_of(hand, times[0], KEY) is None
    (cap,) = (await known_as_of(hand, times[1], KEY)).wallets
    assert (cap.overage, cap.lots) == ("0", [])
    (cap,) = (await known_as_of(hand, times[6], KEY)).wallets
    assert (cap.overage, [lot.kind for lot in cap.lots]) == ("5", ["overage"])


async def test_world_time_counts_by_when_it_occurred(hand: Hand) -> None:
    """The charge of 3 had occurred 30 hours before anything was recorded; of the lot of 10 expired 5.5 and 1."""
    await a_past(hand)

    async def posted(at: datetime) -> str:
        view = await read_posted_at(hand.connection, ROOT, world_at=at, units=UNITS, now=hand.head.recorded_at + HOUR)
        assert view is not None
        (only,) = view.wallets
        return only.posted

    assert await posted(BEGIN - 31 * HOUR) == "0"
    assert await posted(BEGIN - 30 * HOUR) == "-3"
    assert await posted(BEGIN) == "6.8"
    assert await posted(BEGIN + 8 * HOUR) == "1.3"
    assert await posted(BEGIN + 11 * HOUR) == "0.3"


async def test_world_time_knows_what_is_due_and_not_yet_recorded(hand: Hand) -> None:
    await hand.write(opened(ROOT, "usd"), granted(ROOT, "usd", A, 100, expires_at=BEGIN + 5 * HOUR))
    for at, expected in ((BEGIN + 4 * HOUR, "1"), (BEGIN + 5 * HOUR, "0")):
        view = await read_posted_at(hand.connection, ROOT, world_at=at, units=UNITS, now=BEGIN + 99 * HOUR)
        assert view is not None
        assert view.wallets[0].posted == expected


# Statements -----------------------------------------------------------------------------------------------------------


async def pages(
    hand: Hand, account: str = ROOT, *, limit: int = 500, wanted: StatementFilter = EVERYTHING
) -> tuple[list[StatementEntry], int]:
    """All pages of a statement, and how many there were."""
    entries: list[StatementEntry] = []
    place, count = None, 0
    while True:
        found = await read_statement(
            hand.connection, account, wanted=wanted, before=place, limit=limit, units=UNITS.by_name
        )
        assert found is not None
        page, place = found
        entries += page
        count += 1
        assert count < 200
        if place is None:
            return entries, count


async def test_a_statement_is_the_same_in_pages_of_any_size_and_its_balances_run(hand: Hand) -> None:
    await a_past(hand)
    whole, _ = await pages(hand)
    for limit in (1, 2, 5, len(whole)):
        found, count = await pages(hand, limit=limit)
        assert found == whole
        assert count == -(-len(whole) // limit)
    posted = 0
    for entry in reversed(whole):
        posted += round(100 * float(entry.posted))
        assert round(100 * float(entry.balance)) == posted
    assert whole[0].balance == (await wallet(hand, at=hand.head.recorded_at)).posted
    # An overage is told, and leaves the balance as it is.
    (overage, terms), _ = await pages(hand, KEY)
    assert (overage.posted, overage.balance, terms.kind) == ("-5", "0", "wallet_opened")


async def test_a_filter_leaves_out_and_changes_nothing_however_little_is_looked_at(
    hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = await a_past(hand)
    whole, _ = await pages(hand)
    filters: dict[StatementFilter, Callable[[StatementEntry], bool]] = {
        StatementFilter(unit="usd"): lambda entry: entry.unit == "usd",
        StatementFilter(unit="tokens"): lambda _: False,
        StatementFilter(kind="charged"): lambda entry: entry.kind == "charged",
        StatementFilter(since=times[3]): lambda entry: entry.recorded_at >= times[3],
        StatementFilter(until=times[3]): lambda entry: entry.recorded_at < times[3],
        StatementFilter(since=times[2], until=times[6], kind="charged"): lambda entry: (
            times[2] <= entry.recorded_at < times[6] and entry.kind == "charged"
        ),
        StatementFilter(until=BEGIN): lambda _: False,
        StatementFilter(since=times[-1] + HOUR): lambda _: False,
    }
    for scanned in (20_000, 7, 3, 1):
        monkeypatch.setattr(statements, "ENTRIES_SCANNED_MAX", scanned)
        for wanted, belongs in filters.items():
            expected = [entry for entry in whole if belongs(entry)]
            for limit in (500, 2):
                found, _ = await pages(hand, limit=limit, wanted=wanted)
                assert found == expected, (wanted, scanned, limit)


async def test_a_page_is_before_its_cursor_and_its_times_wherever_the_cursor_comes_from(hand: Hand) -> None:
    times = await a_past(hand)
    whole, _ = await pages(hand)
    for limit in range(1, len(whole)):
        found = await read_statement(
            hand.connection, ROOT, wanted=EVERYTHING, before=None, limit=limit, units=UNITS.by_name
        )
        assert found is not None
        for time in times:
            later = await read_statement(
                hand.connection,
                ROOT,
                wanted=StatementFilter(until=time),
                before=found[1],
                limit=500,
                units=UNITS.by_name,
            )
            assert later is not None
            assert later[0] == [entry for entry in whole[limit:] if entry.recorded_at < time]


async def test_a_reference_is_a_lot_a_hold_a_transaction_an_event_or_what_a_lot_refers_to(hand: Hand) -> None:
    await hand.write(opened(ROOT, "usd"), granted(ROOT, "usd", A, 1000, reference="pay_1"))
    hold = await hand.write(placed(HOLD, KEY, "usd", A, 400, payer=ROOT))
    place = hand.next_place
    charge = await hand.write(
        moved("hold_settled", ROOT, "usd", A, held=-400, hold=HOLD),
        moved("charged", ROOT, "usd", A, -350),
        used("usd", 350),
        lines=[line_row("event-1", KEY, json.dumps([[ROOT, "usd", A, "purchase", -350, 0]]), place=place)],
    )
    await hand.write(granted(ROOT, "usd", B, 5))

    async def kinds(reference: str) -> list[str]:
        found, _ = await pages(hand, wanted=StatementFilter(reference=reference))
        return [entry.kind for entry in found]

    assert await kinds(full_id("lot", PARTITION, B)) == ["lot_granted"]
    assert await kinds("pay_1") == ["charged", "hold_settled", "hold_placed", "lot_granted"]
    assert await kinds(full_id("hold", PARTITION, HOLD)) == ["hold_settled", "hold_placed"]
    assert await kinds(full_id("txn", PARTITION, hold)) == ["hold_placed"]
    assert await kinds(full_id("txn", PARTITION, charge)) == ["charged", "hold_settled"]
    assert await kinds("event-1") == ["charged", "hold_settled"]
    for nothing in ("nothing", "lot_of_nobody", "hold_", full_id("lot", PARTITION, C)):
        assert await kinds(nothing) == []


# Transactions, charges, holds -----------------------------------------------------------------------------------------


async def test_a_transaction_tells_its_cause_and_both_sides(hand: Hand) -> None:
    batch, transaction = hand.next_place
    command = (PARTITION, "billing", "payment:1", b"h", transaction, batch, BEGIN + HOUR, "{}")
    await hand.write(opened(ROOT, "usd"), granted(ROOT, "usd", A, 1000), commands=[command])
    await hand.write(opened(KEY))
    view = await read_transaction(hand.connection, full_id("txn", PARTITION, transaction), units=UNITS)
    assert view is not None
    assert [(each.principal, each.idempotency_key) for each in view.commands] == [("billing", "payment:1")]
    assert [(entry.kind, entry.account, entry.posted) for entry in view.entries] == [
        ("account_opened", ROOT, None),
        ("wallet_opened", ROOT, "0"),
        ("lot_granted", ROOT, "10"),
        ("lot_granted", "@stripe", "-10"),
    ]
    assert (view.batch, view.recorded_at, view.entries_total) == (1, BEGIN + HOUR, 4)
    assert (view.bundle, view.lines, view.reversals) == (None, [], [])
    unknown = full_id("txn", PARTITION, uuid(7))
    assert await read_transaction(hand.connection, unknown, units=UNITS) is None


async def test_a_charge_is_explained_from_the_event_to_the_lots_and_back(hand: Hand) -> None:
    await hand.write(opened(ROOT, "usd"), opened(KEY), granted(ROOT, "usd", A, 1000, kind="promo"))
    place = hand.next_place
    split = [[ROOT, "usd", A, "promo", -1000, 0], [ROOT, "usd", DEBT, "debt", -200, 0]]
    charging = await hand.write(
        moved("charged", ROOT, "usd", A, -1000, lot_kind="promo"),
        moved("charged", ROOT, "usd", DEBT, -200, lot_kind="debt"),
        used("usd", 1200),
        lines=[
            line_row("e/1", KEY, json.dumps(split), amounts='[["usd",1200]]', hold=HOLD, bundle=3, place=place),
            line_row("e2", KEY, "[]", bundle=3, number=2, place=place),
        ],
        bundles=[(PARTITION, 3, b"h", place[0], place[1], 2, 0)],
    )
    batch, transaction = hand.next_place
    await hand.recall(past_lines={(PARTITION, "demo", "e/1", 0, KEY)})
    text = reversed_text({(ROOT, "usd", A): 400})
    await hand.write(
        moved("reversed", ROOT, "usd", A, 400, lot_kind="promo"),
        Move(kind="reversed", account="@usage", occurred_at=BEGIN, unit="usd", posted=-400),
        reversals=[(PARTITION, "demo", "e/1", 0, batch, 1, transaction, text, "a ticket")],
    )
    for account in (None, KEY):
        view = await read_charge(hand.connection, "demo", "e/1", account=account, units=UNITS)
        assert view is not None
        (line,) = view.lines
        assert (line.account, line.hold, line.bundle, line.line) == (KEY, full_id("hold", PARTITION, HOLD), 3, 1)
        assert line.scope == USE
        assert [(each.unit, each.amount) for each in line.amounts] == [("usd", "12")]
        assert [(part.lot[-36:], part.lot_kind, part.amount) for part in line.split] == [
            (A, "promo", "10"),
            (DEBT, "debt", "2"),
        ]
        (reversal,) = line.reversals
        assert (reversal.reason, [part.amount for part in reversal.split]) == ("a ticket", ["4"])
        assert reversal.transaction == full_id("txn", PARTITION, transaction)
    assert await read_charge(hand.connection, "demo", "e/1", account=ROOT, units=UNITS) is None
    assert await read_charge(hand.connection, "demo", "e3", account=None, units=UNITS) is None
    cause = await read_transaction(hand.connection, full_id("txn", PARTITION, charging), units=UNITS)
    assert cause is not None
    assert (cause.bundle, [each.event_id for each in cause.lines]) == (3, ["e/1", "e2"])
    back = await read_transaction(hand.connection, full_id("txn", PARTITION, transaction), units=UNITS)
    assert back is not None
    assert back.reversals == [reversal]


async def test_open_holds_are_those_of_the_account_and_below_it_and_no_neighbours(hand: Hand) -> None:
    names = (f"{ROOT}/ab", f"{ROOT}/ab/c", f"{ROOT}/ab-c", f"{ROOT}/ab0")
    await hand.write(opened(ROOT, "usd"), granted(ROOT, "usd", A, 1000))
    ends = BEGIN + 100 * HOUR
    for number, name in enumerate(names):
        await hand.write(placed(uuid(50 + number), name, "usd", A, 100, payer=ROOT, expires_at=ends))
    await hand.write(placed(uuid(60), names[0], "usd", A, 100, payer=ROOT, expires_at=ends))
    await hand.write(moved("hold_released", ROOT, "usd", A, held=-100, hold=uuid(60)))

    async def found(account: str, after: str | None = None) -> list[tuple[str, str]]:
        views = await read_open_holds(hand.connection, account, after=after, limit=2, units=UNITS, now=BEGIN)
        assert views is not None
        return [(view.account, view.hold) for view in views]

    ids = [full_id("hold", PARTITION, uuid(50 + number)) for number in range(4)]
    assert await found(names[0]) == [(names[0], ids[0]), (names[1], ids[1])]
    assert await found(names[0], ids[0]) == [(names[1], ids[1])]
    assert await found(ROOT, ids[1]) == [(names[2], ids[2]), (names[3], ids[3])]
    view = await read_hold(hand.connection, ids[0], units=UNITS, now=BEGIN)
    assert view is not None
    assert view.scope == USE
    assert [(each.account, each.placed, each.held, each.estimated) for each in view.wallets] == [(ROOT, "1", "1", "0")]


# Totals, trees, exports -----------------------------------------------------------------------------------------------


async def test_totals_add_up_to_what_is_posted(hand: Hand) -> None:
    await a_past(hand)
    details = LotGranted(priority=100, origin=C)
    await hand.write(
        moved("adjusted", ROOT, "usd", C, -5),
        Move(kind="adjusted", account="@adjustment", occurred_at=BEGIN, unit="usd", posted=5),
        moved("transferred", ROOT, "usd", C, -10),
        moved("transferred", f"{ROOT}/other", "usd", uuid(70), 10, details=details),
    )
    (usd,) = await read_account_totals(hand.connection, ROOT, units=UNITS) or []
    assert (usd.granted, usd.charged, usd.expired, usd.adjusted, usd.transferred) == (
        "13.5",
        "6.7",
        "6.5",
        "-0.05",
        "-0.1",
    )
    assert usd.granted_by_kind == {"purchase": "13.5"}
    assert usd.by_kind["charged"] == "-6.7"
    assert "debt_repaid" not in usd.by_kind or usd.by_kind["debt_repaid"] == "0"

    def cents(text: str) -> int:
        return round(100 * float(text))

    added = cents(usd.granted) - cents(usd.charged) + cents(usd.reversed) - cents(usd.expired) - cents(usd.voided)
    added += -cents(usd.clawed_back) + cents(usd.adjusted) + cents(usd.transferred)
    assert added == cents(usd.posted) - cents(usd.overage) - cents(usd.uncapped)
    (tokens,) = await read_account_totals(hand.connection, KEY, units=UNITS) or []
    assert (tokens.charged, tokens.posted, tokens.overage) == ("5", "0", "5")


async def test_a_tree_has_its_accounts_in_order_and_what_is_due_on_them_done(hand: Hand) -> None:
    names = [ROOT, f"{ROOT}/a", f"{ROOT}/a-b", f"{ROOT}/a/b", f"{ROOT}/b"]
    for number, name in enumerate(reversed(names)):
        await hand.write(
            opened(name, "usd"), granted(name, "usd", uuid(80 + number), 100, expires_at=BEGIN + 30 * HOUR)
        )

    async def found(after: str, limit: int, at: datetime) -> list[tuple[str, str]]:
        page = await read_tree(hand.connection, ROOT, after=after, limit=limit, units=UNITS, now=at)
        assert page is not None
        return [(each.account, each.wallets[0].posted) for each in page]

    assert await found("", 9, BEGIN) == [(name, "1") for name in names]
    assert await found("", 2, BEGIN) == [(name, "1") for name in names[:2]]
    assert await found(names[1], 9, BEGIN + 30 * HOUR) == [(name, "0") for name in names[2:]]
    listed = await read_accounts(hand.connection, prefix=f"{ROOT}/a", after=names[1], limit=9)
    assert [(each.account, each.units) for each in listed] == [(name, ["usd"]) for name in names[2:4]]


async def test_an_export_is_the_journal_of_the_accounts_as_it_was_when_it_began_whatever_its_format(
    hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "PAGE_ROWS", 2)
    monkeypatch.setattr(exports, "GROUP_ROWS", 4)
    await a_past(hand)

    @asynccontextmanager
    async def connect() -> AsyncIterator[AsyncConnection[TupleRow]]:
        yield hand.connection

    async def exported(account: str, *, below: bool) -> list[dict[str, str]]:
        batch, names = await exported_accounts(hand.connection, account, below=below)
        await hand.write(granted(ROOT, "usd", uuid(90 + hand.head.batch), 1))
        written = []
        for write in (as_csv, as_parquet):
            pages = exported_pages(connect, names, batch=batch, units=UNITS.by_name)
            written.append(b"".join([part async for part in write(pages)]))
        rows = rows_of_csv(written[0])
        assert rows_of_parquet(written[1]) == rows
        return rows

    rows = await exported(ROOT, below=False)
    whole, _ = await pages(hand)
    assert [(row["kind"], row["posted"], row["transaction"]) for row in rows] == [
        (entry.kind, entry.posted, entry.transaction) for entry in reversed(whole[1:])
    ]
    assert json.loads(rows[1]["details"])["type"] == "lot_granted"
    rows = await exported(ROOT, below=True)
    assert {row["account"] for row in rows} == {ROOT, KEY, f"{ROOT}/other"}
