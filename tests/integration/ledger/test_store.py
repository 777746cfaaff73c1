"""What the store writes is read back as it was: everything that a batch may have to know."""

import json
from collections.abc import AsyncIterator
from dataclasses import fields, is_dataclass
from datetime import datetime, timedelta
from typing import Any

import pytest
from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from contracts.partition import partition_of
from services.ledger import store
from services.ledger.domain.commands import LotScope, Rule, Threshold
from services.ledger.domain.entries import BalanceCrossed, ClaimFrozen, ClawedBack, LotGranted, Move
from services.ledger.domain.periods import boundary
from services.ledger.domain.state import PartitionState
from services.ledger.projections import add_rows, reversed_text
from services.ledger.store import Needs, Signature
from tests.conftest import Database
from tests.integration.ledger.by_hand import (
    BEGIN,
    GPT,
    HOUR,
    PARTITION,
    ROOT,
    Hand,
    claimed,
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


@pytest.fixture
async def runtime(database: Database) -> AsyncIterator[AsyncConnection[TupleRow]]:
    async with await AsyncConnection.connect(database.url("ledger").get_secret_value()) as opened_connection:
        yield opened_connection


@pytest.fixture
async def hand(runtime: AsyncConnection[TupleRow]) -> Hand:
    return await Hand.take(runtime)


async def read(hand: Hand, **needs: Any) -> PartitionState:
    """What another process would know, if it needed this."""
    state = PartitionState()
    loaded = await store.load(hand.connection, Needs(**needs))
    await hand.connection.commit()
    add_rows({PARTITION: state}, loaded.rows)
    return state


def plain(value: Any) -> Any:
    """A part of a state without what it only remembers to be fast."""
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: plain(getattr(value, each.name)) for each in fields(value) if each.name[0] != "_"}
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return value


A, B, C, DEBT, OVER, CAP = (uuid(number) for number in range(1, 7))
HOLD = uuid(20)
RULE = Rule("r1", "tokens", 100, "month", BEGIN, zone="Europe/Berlin", rollover_max=5, plan="pro", policy="soft")


@pytest.mark.anyio
async def test_what_is_written_is_read_back_whole(hand: Hand) -> None:
    levels = (Threshold(amount=5), Threshold(percent=20))
    await hand.write(
        opened(ROOT, "usd", thresholds=levels),
        opened(f"{ROOT}/key", "tokens"),
        rule_set(f"{ROOT}/key", RULE, 0),
        granted(ROOT, "usd", A, 50, scope=LotScope(providers=("openai",)), reference="pay_1", cost_basis="0.9"),
        granted(f"{ROOT}/key", "tokens", CAP, 100, kind="plan", rule="r1", period=0, expires_at=BEGIN + 700 * HOUR),
        placed(HOLD, f"{ROOT}/key", "usd", A, 10),
    )
    await hand.write(
        moved("charged", ROOT, "usd", A, -40),
        moved("charged", ROOT, "usd", DEBT, -7, lot_kind="debt"),
        used("usd", 47),
        granted(ROOT, "usd", B, 5),
        repaid(ROOT, "usd", lot=B, debt=DEBT, amount=3),
        moved("charged", f"{ROOT}/key", "tokens", CAP, -100, lot_kind="plan"),
        moved("lot_opened", f"{ROOT}/key", "tokens", OVER, lot_kind="overage", details=OVERAGE),
        moved("charged", f"{ROOT}/key", "tokens", OVER, -9, lot_kind="overage"),
        moved("claim_frozen", ROOT, "usd", B, frozen=1, details=ClaimFrozen("pay_1", pending=0)),
        Move(kind="balance_crossed", account=ROOT, unit="usd", occurred_at=BEGIN, details=BalanceCrossed(True, 0)),
        Move(
            kind="balance_crossed",
            account=ROOT,
            unit="usd",
            occurred_at=BEGIN,
            details=BalanceCrossed(True, 0, levels[1]),
        ),
    )
    state = await read(
        hand,
        accounts={(PARTITION, ROOT), (PARTITION, f"{ROOT}/key")},
        holds={(PARTITION, HOLD, f"{ROOT}/key")},
    )
    assert plain(state.accounts) == plain(hand.state.accounts)
    assert plain(state.holds) == plain(hand.state.holds)
    assert state.accounts[ROOT].wallets["usd"].low == {None, levels[1]}
    assert state.accounts[ROOT].wallets["usd"].lots[DEBT].repaid == {B: 3}
    # Nothing of it is left, and it says whose period it is.
    assert state.accounts[f"{ROOT}/key"].wallets["tokens"].lots[CAP].period == 0
    # A renewal; and what is left of a wallet without lots that end is never due.
    assert state.accounts[f"{ROOT}/key"].due_at == boundary(RULE, 1)
    assert state.accounts[ROOT].due_at is None


OVERAGE = LotGranted(priority=0, rule="r1", period=0)


@pytest.mark.anyio
async def test_a_spent_lot_is_read_only_while_a_late_charge_may_ask_for_it(hand: Hand) -> None:
    """Batches are an hour apart. A was spent, B has expired, C has expired long ago."""
    await hand.write(
        opened(ROOT, "usd"),
        granted(ROOT, "usd", A, 5),
        granted(ROOT, "usd", B, 5, expires_at=BEGIN + 2 * HOUR),
        granted(ROOT, "usd", C, 5, expires_at=BEGIN + HOUR, effective_at=BEGIN),
    )
    await hand.write(
        moved("charged", ROOT, "usd", A, -5),
        used("usd", 5),
        expired(ROOT, "usd", C, 5, at=BEGIN + HOUR),
        expired(ROOT, "usd", B, 5, at=BEGIN + 2 * HOUR),
    )
    wanted = {(PARTITION, ROOT)}
    assert set((await read(hand, accounts=wanted)).accounts[ROOT].wallets["usd"].lots) == {B, C}
    assert set(hand.state.accounts[ROOT].wallets["usd"].lots) == {B, C}
    for _ in range(23):
        await hand.write(granted(ROOT, "usd", uuid(100 + hand.head.batch), 1))
    lots = (await read(hand, accounts=wanted)).accounts[ROOT].wallets["usd"].lots
    assert B in lots
    assert C not in lots
    assert plain(lots) == plain(hand.state.accounts[ROOT].wallets["usd"].lots)
    late = await read(hand, accounts=wanted, past_lots={(PARTITION, ROOT, BEGIN + HOUR / 2)})
    assert late.accounts[ROOT].wallets["usd"].lots[C].expired == 5
    too_late = await read(hand, accounts=wanted, past_lots={(PARTITION, ROOT, BEGIN + HOUR)})
    assert C not in too_late.accounts[ROOT].wallets["usd"].lots


@pytest.mark.anyio
async def test_an_ended_hold_comes_with_the_lots_it_had_earmarked_for_its_account_alone(hand: Hand) -> None:
    await hand.write(opened(ROOT, "usd"), opened(f"{ROOT}/key"), granted(ROOT, "usd", A, 10))
    await hand.write(placed(HOLD, f"{ROOT}/key", "usd", A, 10))
    await hand.write(
        moved("hold_settled", ROOT, "usd", A, held=-10, hold=HOLD),
        moved("charged", ROOT, "usd", A, -10),
        used("usd", 10),
    )
    accounts = {(PARTITION, ROOT), (PARTITION, f"{ROOT}/key")}
    theirs = await read(hand, accounts=accounts, holds={(PARTITION, HOLD, f"{ROOT}/key")})
    assert theirs.holds[HOLD].status == "settled"
    assert theirs.holds[HOLD].scope == GPT
    assert set(theirs.accounts[ROOT].wallets["usd"].lots) == {A}
    others = await read(hand, holds={(PARTITION, HOLD, "other")})
    assert others.holds[HOLD].account == f"{ROOT}/key"
    assert others.accounts == {}


@pytest.mark.anyio
async def test_a_line_comes_with_what_it_took_what_was_given_back_and_who_repaid(hand: Hand) -> None:
    key = f"{ROOT}/key"
    await hand.write(opened(ROOT, "usd"), opened(key), granted(ROOT, "usd", A, 10, kind="promo"))
    place = hand.next_place
    split = [[ROOT, "usd", A, "promo", -10, 0], [ROOT, "usd", DEBT, "debt", -2, 0]]
    await hand.write(
        moved("charged", ROOT, "usd", A, -10, lot_kind="promo"),
        moved("charged", ROOT, "usd", DEBT, -2, lot_kind="debt"),
        used("usd", 12),
        lines=[line_row("e1", key, json.dumps(split), amounts='[["usd",12]]', place=place)],
    )
    await hand.write(
        granted(ROOT, "usd", B, 2, kind="promo"),
        repaid(ROOT, "usd", lot=B, debt=DEBT, amount=2),
    )
    await hand.recall(past_lines={(PARTITION, "demo", "e1", 0, key)})
    batch, transaction = hand.next_place
    reversal = (PARTITION, "demo", "e1", 0, batch, 1, transaction, reversed_text({(ROOT, "usd", A): 4}), "a ticket")
    await hand.write(
        moved("reversed", ROOT, "usd", A, 4, lot_kind="promo"),
        Move(kind="reversed", account="@usage", occurred_at=BEGIN, unit="usd", posted=-4),
        reversals=[reversal],
    )
    accounts = {(PARTITION, ROOT), (PARTITION, key)}
    state = await read(hand, accounts=accounts, past_lines={(PARTITION, "demo", "e1", 0, key)})
    line = state.lines["demo", "e1", 0]
    assert line.account == key
    assert line.amounts == (("usd", 12),)
    assert line.split == {(ROOT, "usd", A): 10, (ROOT, "usd", DEBT): 2}
    assert line.reversed == {(ROOT, "usd", A): 4}
    # All three, though of the debt and of what repaid it nothing is left.
    assert set(state.accounts[ROOT].wallets["usd"].lots) == {A, B, DEBT}
    others = await read(hand, past_lines={(PARTITION, "demo", "e1", 0, "other")})
    assert others.lines["demo", "e1", 0].account == key
    assert others.accounts == {}
    assert (await read(hand, past_lines={(PARTITION, "demo", "e2", 0, key)})).lines == {}
    stored = await (await hand.connection.execute("SELECT recorded_at FROM reversals")).fetchall()
    assert stored == [(hand.head.recorded_at,)]


@pytest.mark.anyio
async def test_a_claim_sees_every_lot_of_the_payment_in_its_tree_and_no_other(hand: Hand) -> None:
    """A was bought and transferred to a team as B, where it was spent; a bonus C; another tree's lot by that name."""
    team, other = f"{ROOT}/team", tree_beside(ROOT)
    spent, elsewhere = uuid(30), uuid(31)
    await hand.write(
        opened(ROOT, "usd"),
        opened(team, "usd"),
        opened(other, "usd"),
        granted(ROOT, "usd", A, 10, reference="pay_1"),
        granted(ROOT, "usd", C, 2, kind="bonus", reference="pay_1"),
        granted(team, "usd", spent, 4, kind="promo"),
        granted(other, "usd", elsewhere, 3, reference="pay_1"),
    )
    details = LotGranted(priority=100, reference="pay_1", origin=A)
    await hand.write(
        moved("transferred", ROOT, "usd", A, -10),
        moved("transferred", team, "usd", B, 10, details=details),
    )
    await hand.write(moved("charged", team, "usd", B, -10), used("usd", 10))
    mine = {(PARTITION, ROOT)}
    granting = await read(hand, accounts=mine, payments={(PARTITION, "pay_1", ROOT, False)})
    assert set(granting.payments) == {("pay_1", ROOT)}
    assert set(granting.accounts) == {ROOT}
    claiming = await read(hand, accounts=mine, payments={(PARTITION, "pay_1", ROOT, True)})
    assert set(claiming.payments) == {("pay_1", ROOT), ("pay_1", other)}
    assert {lot.id for lot in claiming.lots()} == {A, B, C, spent}
    await hand.write(claimed(ROOT, "usd", "pay_1", "dp_1", 4, state="open"))
    granting = await read(hand, accounts=mine, payments={(PARTITION, "pay_1", ROOT, False)})
    assert {lot.id for lot in granting.lots()} == {A, B, C, spent}
    assert granting.payments["pay_1", ROOT].disputed == 4
    assert granting.payments["pay_1", ROOT].claims["dp_1"].state == "open"


@pytest.mark.anyio
async def test_what_is_given_back_of_a_payments_lot_comes_with_its_claims(hand: Hand) -> None:
    await hand.write(opened(ROOT, "usd"), granted(ROOT, "usd", A, 10, reference="pay_1"))
    place = hand.next_place
    split = json.dumps([[ROOT, "usd", A, "purchase", -10, 0]])
    await hand.write(
        moved("charged", ROOT, "usd", A, -10),
        used("usd", 10),
        lines=[line_row("e1", ROOT, split, amounts='[["usd",10]]', place=place)],
    )
    await hand.recall(payments={(PARTITION, "pay_1", ROOT, True)})
    clawed = ClawedBack(payment="pay_1", lot=A)
    await hand.write(
        claimed(ROOT, "usd", "pay_1", "re_1", 10),
        moved("clawed_back", ROOT, "usd", DEBT, -10, lot_kind="debt", details=clawed),
        Move(kind="clawed_back", account="@stripe", occurred_at=BEGIN, unit="usd", posted=10),
    )
    state = await read(hand, accounts={(PARTITION, ROOT)}, past_lines={(PARTITION, "demo", "e1", 0, ROOT)})
    assert state.payments["pay_1", ROOT].claimed == 10
    assert state.accounts[ROOT].wallets["usd"].lots[A].clawed_spent == 10
    assert state.accounts[ROOT].wallets["usd"].lots[DEBT].origin == A


@pytest.mark.anyio
async def test_a_lot_is_found_by_its_id_for_its_account_alone(hand: Hand) -> None:
    await hand.write(opened(ROOT, "usd"), granted(ROOT, "usd", A, 5))
    await hand.write(moved("charged", ROOT, "usd", A, -5), used("usd", 5))
    found = await read(hand, accounts={(PARTITION, ROOT)}, lots={(PARTITION, A, ROOT)})
    assert set(found.accounts[ROOT].wallets["usd"].lots) == {A}
    none = await read(hand, accounts={(PARTITION, ROOT)}, lots={(PARTITION, A, f"{ROOT}/key"), (PARTITION, B, ROOT)})
    assert none.accounts[ROOT].wallets["usd"].lots == {}


@pytest.mark.anyio
async def test_a_sweeper_finds_what_is_due_the_longest_overdue_first(hand: Hand) -> None:
    key = f"{ROOT}/key"
    await hand.write(
        opened(ROOT, "usd"),
        opened(key, "usd"),
        opened(f"{ROOT}/never", "usd"),
        granted(ROOT, "usd", A, 5, expires_at=BEGIN + 30 * HOUR),
        granted(key, "usd", B, 5, expires_at=BEGIN + 20 * HOUR),
        granted(f"{ROOT}/never", "usd", C, 5),
        placed(HOLD, key, "usd", A, 1, expires_at=BEGIN + 10 * HOUR),
    )
    mine = [PARTITION]
    at = BEGIN + 30 * HOUR
    assert await store.due_accounts(hand.connection, mine, at, 10) == [(PARTITION, key), (PARTITION, ROOT)]
    assert await store.due_accounts(hand.connection, mine, at, 1) == [(PARTITION, key)]
    assert await store.due_accounts(hand.connection, mine, at - HOUR, 10) == [(PARTITION, key)]
    assert await store.due_accounts(hand.connection, [PARTITION + 1], at, 10) == []
    assert await store.overdue_holds(hand.connection, mine, BEGIN + 10 * HOUR, 10) == [(PARTITION, HOLD, key)]
    assert await store.overdue_holds(hand.connection, mine, BEGIN + 9 * HOUR, 10) == []
    await hand.write(
        expired(key, "usd", B, 5, at=BEGIN + 20 * HOUR),
        moved("hold_released", ROOT, "usd", A, held=-1, hold=HOLD),
    )
    assert await store.due_accounts(hand.connection, mine, at, 10) == [(PARTITION, ROOT)]
    assert await store.overdue_holds(hand.connection, mine, at, 10) == []


@pytest.mark.anyio
async def test_every_head_that_moved_is_signed_and_none_that_did_not(hand: Hand) -> None:
    other = await Hand.take(hand.connection, PARTITION + 1)
    moving, _ = hand.written(opened(ROOT))
    resting, _ = other.written(bundles=[(PARTITION + 1, 1, b"h", 0, None, 1, 1)])
    signature = Signature(commit_id="c1", signature=bytes(64), key_id="k1", heads='[[7,1,"…"]]')
    await store.write(hand.connection, [moving, resting], signature)
    cursor = await hand.connection.execute("SELECT * FROM signatures")
    expected = (PARTITION, 1, moving.after.chain_hash, "c1", bytes(64), "k1", '[[7,1,"…"]]')
    assert await cursor.fetchall() == [expected]


@pytest.mark.anyio
async def test_what_was_decided_on_a_head_that_has_moved_is_not_written(hand: Hand) -> None:
    lost, _ = hand.written(opened(f"{ROOT}/lost"))
    hand.state = PartitionState()
    await hand.write(opened(ROOT))
    with pytest.raises(store.HeadMoved):
        await store.write(hand.connection, [lost])
    await hand.connection.rollback()
    cursor = await hand.connection.execute("SELECT account FROM journal UNION SELECT account FROM accounts")
    assert await cursor.fetchall() == [(ROOT,)]


@pytest.mark.anyio
async def test_batch_at_is_the_last_batch_by_a_time(hand: Hand) -> None:
    async def batch_at(at: datetime) -> int:
        cursor = await hand.connection.execute("SELECT batch_at(%s::smallint, %s)", [PARTITION, at])
        (found,) = await cursor.fetchone() or (None,)
        return int(found)

    assert await batch_at(BEGIN) == 0
    for number in range(9):
        await hand.write(opened(f"{ROOT}/{number}"), opened(f"{ROOT}/{number}b"))
    # The n-th was recorded n hours after the beginning.
    assert await batch_at(BEGIN) == 0
    assert [await batch_at(BEGIN + HOUR * number) for number in range(1, 10)] == list(range(1, 10))
    assert await batch_at(BEGIN + HOUR * 3 - timedelta(microseconds=1)) == 2
    assert await batch_at(BEGIN + HOUR * 99) == 9


def tree_beside(root: str) -> str:
    """Another tree of the same partition."""
    names = (f"other{number}" for number in range(10_000))
    return next(name for name in names if partition_of(name) == partition_of(root))
