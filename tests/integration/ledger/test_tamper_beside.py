"""Laws of the audit of commands, bundles and charge lines: what was asked for, taken and recorded cannot be unsaid."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec
import psycopg
import pytest

from contracts.partition import partition_of
from services.ledger.audit import Evidence, audit
from services.ledger.audit_sql import audit as audit_tables
from services.ledger.domain.commands import (
    ClaimPayment,
    Command,
    Grant,
    Leg,
    OpenAccount,
    Overdue,
    PlaceHold,
    ReverseCharge,
    WalletTerms,
)
from services.ledger.handlers import CommandItem, ListItem, Replied
from tests.conftest import Database
from tests.integration.ledger.driving import processed
from tests.integration.ledger.recording import CAPS, KEYS, Recorder, recording
from tests.integration.ledger.test_tamper import PARTITION, ROOT, History, one, said

NOTHING: Final = "'01980000-0000-7000-8000-000000000000'"
# Each found all as it wanted it, and names the transaction that had made it so: of both commands one is not missed.
FOUND_AS_WANTED: Final = ("open-again", "claim-again")
LIST: Final = "list-1"


@pytest.fixture
def history(database: Database) -> History:
    """All ways to come into the journal: commands, lists of them, bundles, and what is due."""

    async def live() -> None:
        async with recording(database.url("ledger"), roots=(ROOT,)) as recorder:
            await recorder.open()
            await _live(recorder)

    asyncio.run(live())
    found = History(database, audit(database.url("ledger"), keys=KEYS, caps=CAPS, processes=1))
    assert found.clean.is_clean, said(found.clean)
    assert not broken(database)
    return found


async def _live(recorder: Recorder) -> None:
    opened = OpenAccount(account=ROOT, wallets=(WalletTerms(unit="usd"),))
    claim = ClaimPayment(
        account=ROOT, payment="pi_1", claim="re_1", reason="refund", state="final", unit="usd", claimed=5
    )
    await recorder.accepted(Grant(account=ROOT, unit="usd", amount=10_000, kind="purchase", reference="pi_1"), claim)
    later = recorder.clock[0].replace(hour=recorder.clock[0].hour + 1)
    await recorder.accepted(Grant(account=ROOT, unit="tokens", amount=10, expires_at=later))
    overdue: Sequence[Overdue] = ("release", "charge_estimate")
    for policy in overdue:
        hold = PlaceHold(
            hold=recorder.new_hold(),
            account=ROOT,
            legs=(Leg("usd", 100, 100),),
            lifetime_seconds=60,
            overdue=policy,
        )
        await recorder.accepted(hold)
    # One is charged twice, the second time for nothing; one cannot be.
    first, second = recorder.line(f"{ROOT}/ml", ("usd", 60)), recorder.line(f"{ROOT}/ml", ("usd", 30))
    await recorder.bundle(first)
    recorder.later(days=1)
    back = ReverseCharge(account=f"{ROOT}/ml", source="demo", event_id=first.event_id, amounts=(("usd", 5),))
    await recorder.bundle(first, second, recorder.line(f"{ROOT}/nobody", ("usd", 1)), reversals=[back])
    # Of one nothing could be charged.
    await recorder.bundle(recorder.line(f"{ROOT}/nobody", ("usd", 2)))
    known: Sequence[Command] = (opened, claim)
    for key, again in zip(FOUND_AS_WANTED, known, strict=True):
        (reply,) = await processed(recorder.ledger, [item(again, key)])
        assert isinstance(reply, Replied)
        assert msgspec.json.decode(reply.body)["status"] == "accepted"
    # Of a list the command that comes last names the transaction: of this one, what it found.
    grants = [Grant(account=ROOT, unit="usd", amount=amount) for amount in (1, 2, 3)]
    lists: Mapping[str, Sequence[Command]] = {LIST: grants[:2], "list-2": [grants[2], opened]}
    for key, commands in lists.items():
        recorder.later(seconds=1)
        items = tuple(item(each, f"{key}-{place}") for place, each in enumerate(commands))
        asked = ListItem(partition=PARTITION, principal="tester", commands=items, key=key, body_hash=bytes(32))
        (reply,) = await processed(recorder.ledger, [asked])
        assert isinstance(reply, Replied)
        assert msgspec.json.decode(reply.body)["status"] == "listed"


def item(command: Command, key: str) -> CommandItem:
    return CommandItem(
        partition=partition_of(command.account), principal="tester", key=key, body_hash=bytes(32), command=command
    )


def broken(database: Database) -> set[str]:
    return {check.law for check in audit_tables(database.url("ledger")) if check.breaches}


def test_a_removed_command_is_missed_by_what_it_asked_for(history: History) -> None:
    with psycopg.connect(history.database.superuser_url.get_secret_value()) as reader:
        removable = [
            row[0]
            for row in reader.execute(
                "SELECT min(idempotency_key) FROM ledger.commands GROUP BY transaction_id HAVING count(*) = 1"
            ).fetchall()
        ]
    assert len(removable) >= 8
    assert LIST in removable
    for key in removable:
        with history.tampering() as superuser:
            assert superuser.execute("DELETE FROM commands WHERE idempotency_key = %s", [key]).rowcount == 1
            found = history.audited()
        assert "no command asked for it" in said(found), key


def test_a_removed_command_is_missed_by_an_audit_since_the_last(history: History) -> None:
    with history.tampering() as superuser:
        superuser.execute("DELETE FROM commands WHERE idempotency_key IN (%s, 'list-2')", [LIST])
        batch = one(superuser, "SELECT max(batch) - 2 FROM journal")
        chain_hash = one(superuser, f"SELECT hash FROM journal WHERE batch = {batch} ORDER BY position DESC LIMIT 1")
        reached = type(history.clean.reached[PARTITION])(batch, chain_hash)
        found = audit(
            history.database.url("ledger"),
            keys=KEYS,
            caps=CAPS,
            evidence=Evidence(audited={PARTITION: reached}),
            since_last=True,
            processes=1,
        )
    assert found.entries < history.clean.entries
    assert {finding.what for finding in found.findings} == {"no command asked for it: one has been removed"}


GRANT: Final = "idempotency_key = (SELECT idempotency_key FROM commands WHERE batch = 3)"
DUE: Final = "(SELECT transaction_id FROM journal WHERE kind = '{}' LIMIT 1)"
COMMANDS: Final = {
    f"UPDATE commands SET transaction_id = {NOTHING} WHERE {GRANT}": "which is not there",
    f"UPDATE commands SET batch = 999 WHERE {GRANT}": "which is not there",
    f"UPDATE commands SET batch = 0 WHERE {GRANT}": f"partition {PARTITION}: the command tester",
    f"UPDATE commands SET batch = -7 WHERE {GRANT}": "which is not there",
    f"UPDATE commands SET recorded_at = recorded_at + interval '1 microsecond' WHERE {GRANT}": (
        "was recorded at another time than transaction"
    ),
    f"UPDATE commands SET outcome = replace(outcome, 'txn_', 'txn_0') WHERE {GRANT}": "is not one of transaction",
    f'UPDATE commands SET outcome = replace(outcome, \'"recorded_at":"2026\', \'"recorded_at":"2025\') WHERE {GRANT}': (
        "is not one of transaction"
    ),
    f"UPDATE commands SET outcome = 'nothing' WHERE {GRANT}": "cannot be read",
    f"UPDATE commands SET outcome = '{{}}' WHERE {GRANT}": "is not one of transaction",
    f"UPDATE commands SET outcome = replace(outcome, '\"replies\"', '\"others\"') WHERE idempotency_key = '{LIST}'": (
        "no command asked for it"
    ),
    # Added, or made to name what somebody else asked for, or nobody.
    f"INSERT INTO commands SELECT partition, principal, 'added', body_hash, transaction_id, batch, recorded_at, outcome"
    f" FROM commands WHERE {GRANT}": "say that they asked for it",
    "UPDATE commands SET transaction_id = "
    + DUE.format("lot_expired")
    + f" WHERE idempotency_key = '{LIST}'": "which is not there",
    **{
        "INSERT INTO commands SELECT c.partition, principal, 'added', body_hash, j.transaction_id, j.batch,"
        " j.recorded_at, outcome FROM commands c, (SELECT DISTINCT transaction_id, batch, recorded_at FROM journal"
        f" WHERE transaction_id = {DUE.format(kind)}) j WHERE {GRANT.replace('idem', 'c.idem', 1)}": (
            "names it, and nobody asked for it"
        )
        for kind in ("lot_expired", "hold_expired", "hold_estimated", "reversed")
    },
}


def test_a_command_is_that_of_the_transaction_it_names(history: History) -> None:
    for statement, what in COMMANDS.items():
        with history.tampering() as superuser:
            assert superuser.execute(statement).rowcount == 1, statement
            found = history.audited()
        assert what in said(found), f"{statement}: {said(found)}"


BUNDLES: Final = {
    "UPDATE bundles SET lines = lines - 1 WHERE number = 1": "the bundle 1 says that 0 of its 0 lines are dead, and 1",
    "UPDATE bundles SET lines = 2 WHERE number = 2": "the bundle 2 says that 1 of its 2 lines are dead, and 2",
    "UPDATE bundles SET lines_dead = lines_dead + 1 WHERE number = 1": "the bundle 1 says",
    "UPDATE bundles SET lines_dead = -1 WHERE number = 2": "the bundle 2 says",
    "UPDATE bundles SET lines = 0 WHERE number = 3": "the bundle 3 says that 1 of its 0 lines are dead, and 0",
    "UPDATE bundles SET batch = 1 WHERE number = 3": "the bundle 1 was taken after the bundle 3",
    "UPDATE bundles SET batch = 999 WHERE number = 3": "the bundle 3 was taken with a batch that is not there",
}


def test_a_bundle_says_of_no_fewer_lines_than_were_carried_out(history: History) -> None:
    for statement, what in BUNDLES.items():
        with history.tampering() as superuser:
            assert superuser.execute(statement).rowcount == 1, statement
            found = history.audited()
        assert what in said(found), f"{statement}: {said(found)}"


def test_a_bundle_has_the_dead_lines_that_were_put_aside(history: History) -> None:
    for number in (2, 3):
        with history.tampering() as superuser:
            superuser.execute("UPDATE bundles SET lines_dead = 0 WHERE number = %s", [number])
            assert broken(history.database) == {"a bundle's dead lines are those that were put aside, or more"}


def test_a_charge_line_was_recorded_with_its_batch(history: History) -> None:
    for by in ("1 microsecond", "-1 day"):
        with history.tampering() as superuser:
            changed = f"UPDATE charge_lines SET recorded_at = recorded_at + interval '{by}' WHERE bundle_number = 2"
            assert superuser.execute(changed).rowcount == 1
            found = history.audited()
        (finding,) = found.findings
        assert "was recorded at another time than its batch" in str(finding)


def test_what_is_before_the_first_batch_is_named(history: History) -> None:
    """Who may do everything may also drop the check that there is no such thing."""
    with history.tampering() as superuser:
        superuser.execute("ALTER TABLE journal DROP CONSTRAINT journal_batch_check")
        superuser.execute(
            "INSERT INTO journal SELECT partition, -5, position, transaction_id, kind, account, unit,"
            " lot_id, lot_kind, hold_id, posted, held, frozen, occurred_at, recorded_at, details, hash"
            " FROM journal WHERE batch = 2"
        )
        found = history.audited()
    assert f"partition {PARTITION}, batch -5, position 1: batch 1 should come here" in said(found)
