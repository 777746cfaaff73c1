"""Laws of the audit against somebody who may do everything in the database: whatever is changed is named."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import psycopg
import pytest
from psycopg import Connection
from psycopg.rows import TupleRow

from contracts.partition import partition_of
from services.ledger.audit import Audited, Evidence, audit
from services.ledger.audit_partition import Finding
from services.ledger.domain.chain import GENESIS, columns_hash
from services.ledger.domain.commands import Adjust, ClaimPayment, Grant, Leg, PlaceHold, ReleaseHold, ReverseCharge
from services.ledger.signing import Signer, new_key, signer
from tests.conftest import Database
from tests.integration.ledger.recording import CAPS, KEYS, SIGNER, Recorder, recording

ROOT: Final = "acme"
PARTITION: Final = partition_of(ROOT)
RECORD: Final = ("heads", "journal", "commands", "bundles", "charge_lines", "reversals", "signatures")

COLUMNS: Final = {
    "transaction_id": "'01980000-0000-7000-8000-000000000000'",
    "kind": "'adjusted'",
    "account": "'acme/eve'",
    "unit": "'tokens'",
    "lot_id": "'01980000-0000-7000-8000-000000000000'",
    "lot_kind": "'promo'",
    "hold_id": "'01980000-0000-7000-8000-000000000000'",
    "posted": "posted + 1",
    "held": "held + 1",
    "frozen": "frozen + 1",
    "occurred_at": "occurred_at + interval '1 microsecond'",
    "recorded_at": "recorded_at + interval '1 microsecond'",
    "details": '\'{"type":"noted"}\'',
    "hash": "decode(repeat('ab', 32), 'hex')",
}


@dataclass(frozen=True)
class History:
    """What was done to a ledger, and what an audit of it found."""

    database: Database
    clean: Audited

    def audited(self, evidence: Evidence | None = None) -> Audited:
        return audit(self.database.url("ledger"), keys=KEYS, caps=CAPS, evidence=evidence, processes=1)

    @contextmanager
    def tampering(self) -> Iterator[Connection[TupleRow]]:
        """A superuser at work, whom no trigger stops. In the end everything is as it was."""
        with psycopg.connect(
            self.database.superuser_url.get_secret_value(),
            autocommit=True,
            options="-c timezone=UTC -c search_path=ledger -c session_replication_role=replica",
        ) as connection:
            for table in RECORD:
                connection.execute(f"CREATE TEMP TABLE kept_{table} AS TABLE {table}")
            try:
                yield connection
            finally:
                with connection.transaction():
                    for table in RECORD:
                        connection.execute(f"DELETE FROM {table}")
                        connection.execute(f"INSERT INTO {table} SELECT * FROM kept_{table}")
                for table in RECORD:
                    connection.execute(f"DROP TABLE kept_{table}")


@pytest.fixture
def history(database: Database) -> History:
    """Grants, holds, charges, a reversal and a claim, in one partition."""

    async def live() -> None:
        async with recording(database.url("ledger"), roots=(ROOT,)) as recorder:
            await recorder.open()
            await _live(recorder)

    asyncio.run(live())
    found = History(database, audit(database.url("ledger"), keys=KEYS, caps=CAPS, processes=1))
    assert found.clean.is_clean, found.clean.findings
    return found


async def _live(recorder: Recorder) -> None:
    await recorder.accepted(Grant(account=ROOT, unit="usd", amount=10_000, kind="purchase", reference="pi_1"))
    await recorder.accepted(Grant(account=ROOT, unit="tokens", amount=10_000))
    await recorder.accepted(Grant(account=f"{ROOT}/ml", unit="usd_cap", amount=10_000))
    holds = [recorder.new_hold() for _ in range(3)]
    for hold in holds:
        recorder.later(seconds=1)
        await recorder.accepted(PlaceHold(hold=hold, account=f"{ROOT}/ml", legs=(Leg("usd", 100, 100),)))
    await recorder.bundle(
        recorder.line(f"{ROOT}/ml", ("usd", 60), hold=holds[0]),
        recorder.line(f"{ROOT}/ml", ("usd", 30), ("tokens", 12)),
    )
    recorder.later(seconds=1)
    await recorder.accepted(ReleaseHold(hold=holds[1], account=f"{ROOT}/ml"))
    line = recorder.line(f"{ROOT}/ml", ("usd", 50))
    await recorder.accepted(line)
    recorder.later(seconds=1)
    for amount in (20, 10):
        given_back = (("usd", amount),)
        await recorder.accepted(
            ReverseCharge(account=f"{ROOT}/ml", source="demo", event_id=line.event_id, amounts=given_back)
        )
    await recorder.accepted(
        ClaimPayment(
            account=ROOT, payment="pi_1", claim="re_1", reason="refund", state="final", unit="usd", claimed=500
        )
    )
    recorder.later(seconds=1)
    await recorder.accepted(Grant(account=ROOT, unit="usd", amount=7))
    await recorder.accepted(Adjust(account=ROOT, unit="usd", amount=-20_000, reason="put right", force=True))
    in_bundle = ReverseCharge(account=f"{ROOT}/ml", source="demo", event_id=line.event_id, amounts=(("usd", 5),))
    await recorder.bundle(reversals=[in_bundle])


def places(found: Audited) -> set[tuple[int, int]]:
    return {(finding.batch, finding.position) for finding in found.findings}


def said(found: Audited) -> str:
    return "\n".join(str(finding) for finding in found.findings)


def one(connection: Connection[TupleRow], statement: str) -> Any:
    row = connection.execute(statement).fetchone()
    assert row is not None, statement
    return row if len(row) > 1 else row[0]


def rechained(connection: Connection[TupleRow], by: Signer | None = SIGNER) -> None:
    """Whoever has the key could do so: every hash, head and signature follows from what the journal says now."""
    previous = GENESIS
    ends: dict[int, bytes] = {}
    rows = connection.execute(
        "SELECT partition, batch, position, transaction_id::text, kind, account, unit, lot_id::text, lot_kind,"
        " hold_id::text, posted, held, frozen, occurred_at, recorded_at, details FROM journal ORDER BY 1, 2, 3"
    ).fetchall()
    for row in rows:
        previous = ends[row[1]] = columns_hash(previous, tuple(row))
        connection.execute("UPDATE journal SET hash = %s WHERE (batch, position) = (%s, %s)", [previous, *row[1:3]])
    last = max(ends)
    connection.execute("UPDATE heads SET batch = %s, chain_hash = %s WHERE batch > 0", [last, previous])
    if by is None:
        return
    connection.execute("DELETE FROM signatures")
    for batch, chain_hash in ends.items():
        signed = by.sign_heads([_At(PARTITION, batch, chain_hash)])
        connection.execute(
            "INSERT INTO signatures VALUES (%s, %s, %s, %s, %s, %s, %s)",
            [PARTITION, batch, chain_hash, signed.commit_id, signed.signature, signed.key_id, signed.heads],
        )


@dataclass(frozen=True)
class _At:
    partition: int
    batch: int
    chain_hash: bytes


def test_a_changed_entry_is_named_whatever_column_it_is(history: History) -> None:
    for column, value in COLUMNS.items():
        with history.tampering() as superuser:
            place = one(
                superuser, "SELECT batch, position FROM journal WHERE kind = 'charged' AND lot_kind = 'purchase'"
            )
            superuser.execute(
                f"UPDATE journal SET {column} = {value} WHERE (batch, position) = ({place[0]}, {place[1]})"
            )
            found = history.audited()
        assert tuple(place) in places(found), f"{column}: {said(found)}"
        assert f"partition {PARTITION}, batch {place[0]}, position {place[1]}: its hash is not" in said(found), column
    assert history.audited().is_clean


def test_an_entry_in_another_partition_is_missed_here_and_found_there(history: History) -> None:
    with history.tampering() as superuser:
        superuser.execute("UPDATE journal SET partition = 63 WHERE (batch, position) = (3, 1)")
        found = history.audited()
    assert {finding.partition for finding in found.findings} == {PARTITION, 63}


def test_a_removed_entry_is_missed_where_it_was(history: History) -> None:
    with history.tampering() as superuser:
        superuser.execute("DELETE FROM journal WHERE (batch, position) = (1, 2)")
        found = history.audited()
    assert f"partition {PARTITION}, batch 1, position 3: position 2 should come here" in said(found)


def test_a_removed_batch_is_missed_where_it_was(history: History) -> None:
    with history.tampering() as superuser:
        superuser.execute("DELETE FROM journal WHERE batch = 3")
        found = history.audited()
    assert f"partition {PARTITION}, batch 4, position 1: batch 3 should come here" in said(found)


def test_an_added_entry_is_named(history: History) -> None:
    with history.tampering() as superuser:
        batch, position = one(superuser, "SELECT batch, max(position) + 1 FROM journal WHERE batch = 2 GROUP BY 1")
        superuser.execute(
            "INSERT INTO journal SELECT partition, batch, %s, transaction_id, kind, account, unit, lot_id, lot_kind,"
            " hold_id, 0, 0, 0, occurred_at, recorded_at, NULL, hash FROM journal WHERE (batch, position) = (2, 1)",
            [position],
        )
        found = history.audited()
    assert (batch, position) in places(found), said(found)


def test_an_added_batch_is_named(history: History) -> None:
    with history.tampering() as superuser:
        batch = one(superuser, "SELECT max(batch) + 1 FROM journal")
        superuser.execute(
            "INSERT INTO journal SELECT partition, %s, position, transaction_id, kind, account, unit, lot_id, lot_kind,"
            " hold_id, posted, held, frozen, occurred_at, recorded_at, details, hash FROM journal WHERE batch = 2",
            [batch],
        )
        found = history.audited()
    assert (batch, 1) in places(found), said(found)


def test_swapped_entries_are_both_named(history: History) -> None:
    with history.tampering() as superuser:
        superuser.execute("UPDATE journal SET position = 1000 WHERE (batch, position) = (1, 2)")
        superuser.execute("UPDATE journal SET position = 2 WHERE (batch, position) = (1, 3)")
        superuser.execute("UPDATE journal SET position = 3 WHERE (batch, position) = (1, 1000)")
        found = history.audited()
    assert {(1, 2), (1, 3)} <= places(found), said(found)


def test_a_cut_tail_is_noticed(history: History) -> None:
    last = history.clean.reached[PARTITION].batch
    with history.tampering() as superuser:
        superuser.execute("DELETE FROM journal WHERE batch = %s", [last])
        found = history.audited()
    assert f"partition {PARTITION}, batch {last}: it was signed, and is not there" in said(found)
    assert f"its head is at batch {last}" in said(found)


def test_a_tail_cut_without_a_trace_is_known_outside(history: History) -> None:
    """With it heads, signatures and all else are set back: nothing inside tells of it."""
    reached = history.clean.reached
    last = reached[PARTITION].batch
    with history.tampering() as superuser:
        for table in ("journal", "signatures", "charge_lines", "commands", "bundles", "reversals"):
            superuser.execute(f"DELETE FROM {table} WHERE batch >= {last - 1}")
        superuser.execute(
            "UPDATE heads SET (batch, chain_hash) ="
            " (SELECT batch, hash FROM journal ORDER BY batch DESC, position DESC LIMIT 1) WHERE batch > 0"
        )
        assert history.audited().is_clean
        audited = history.audited(Evidence(audited=reached))
        published = history.audited(Evidence(published=reached))
    assert f"batch {last - 2}: the journal ends here, but batch {last} has been audited" in said(audited)
    assert f"but batch {last} has been published as signed" in said(published)


def test_a_chain_made_anew_is_not_the_one_that_was_signed(history: History) -> None:
    with history.tampering() as superuser:
        superuser.execute("UPDATE journal SET occurred_at = occurred_at - interval '1 day' WHERE batch = 3")
        rechained(superuser, by=None)
        found = history.audited()
    assert min(finding.batch for finding in found.findings) == 3
    assert "batch 3, position" in said(found)
    assert "another hash of it was signed" in said(found)


def test_nobody_else_can_sign_a_chain_made_anew(history: History) -> None:
    with history.tampering() as superuser:
        superuser.execute("UPDATE journal SET occurred_at = occurred_at - interval '1 day' WHERE batch = 3")
        rechained(superuser, by=signer(new_key()))
        found = history.audited()
    assert found.found == history.clean.reached[PARTITION].batch
    assert "its signature is not one by the key" in said(found)


def test_a_chain_made_anew_with_the_key_is_not_the_one_seen_outside(history: History) -> None:
    with history.tampering() as superuser:
        superuser.execute("UPDATE journal SET occurred_at = occurred_at - interval '1 day' WHERE batch = 3")
        rechained(superuser)
        assert history.audited().is_clean
        found = history.audited(Evidence(published=history.clean.reached))
    assert "it is not what has been published as signed" in said(found)


def test_missing_and_foreign_signatures_are_named(history: History) -> None:
    with history.tampering() as superuser:
        superuser.execute("DELETE FROM signatures WHERE batch = 3")
        superuser.execute(
            "UPDATE signatures SET signature = (SELECT signature FROM signatures WHERE batch = 5) WHERE batch = 4"
        )
        superuser.execute("UPDATE signatures SET heads = 'nothing' WHERE batch = 5")
        superuser.execute("UPDATE signatures SET key_id = 'unknown' WHERE batch = 6")
        # So it looks where the row of the commit's first head, in another partition, was deleted.
        superuser.execute("UPDATE signatures SET heads = '' WHERE batch = 7")
        found = history.audited()
    assert sorted(finding.batch for finding in found.findings) == [3, 4, 5, 6, 7], said(found)
    assert "no signature covers the head" in str(found.findings[0])
    assert "the text that was signed says something else of it" in str(found.findings[2])
    assert f"the text that commit {PARTITION:02d}-7 signed is not there" in str(found.findings[4])


def test_a_text_is_not_signed_because_another_of_that_commit_is(history: History) -> None:
    with history.tampering() as superuser:
        superuser.execute(
            "UPDATE signatures SET heads = heads || E'\\n63 1 00', commit_id ="
            " (SELECT commit_id FROM signatures WHERE batch = 3) WHERE batch = 4"
        )
        found = history.audited()
    assert [finding.batch for finding in found.findings] == [4], said(found)
    assert "its signature is not one by the key" in said(found)


# What somebody with the key could have the journal say: the laws say that it cannot be.

FORGERIES: Final = {
    "the legs of its transaction sum to 1": (
        "UPDATE journal SET posted = posted + 1 WHERE kind = 'charged' AND hold_id IS NOT NULL"
    ),
    "of which": (
        "UPDATE journal SET posted = sign(posted) * 50 WHERE kind = 'lot_granted' AND unit = 'usd' AND batch = 2"
    ),
    "is moved before it is there": (
        "UPDATE journal SET details = NULL WHERE kind = 'lot_granted' AND lot_id IS NOT NULL"
    ),
    "gives 1 more of lot": "UPDATE journal SET held = held - 1 WHERE kind = 'hold_released' AND unit = 'usd'",
    "ends and still holds something": (
        "UPDATE journal SET held = held + 1 WHERE kind = 'hold_released' AND unit = 'usd'"
    ),
    "ends twice": (
        "UPDATE journal SET kind = 'hold_settled', hold_id = (SELECT hold_id FROM journal WHERE kind = 'hold_settled'"
        " LIMIT 1) WHERE kind = 'hold_released'"
    ),
    "takes the hard wallet acme usd to -40": (
        "UPDATE journal SET posted = CASE kind WHEN 'lot_granted' THEN sign(posted) * 60 ELSE posted END,"
        " lot_kind = CASE kind WHEN 'hold_placed' THEN 'debt' ELSE lot_kind END,"
        " lot_id = CASE kind WHEN 'hold_placed' THEN '01980000-0000-7000-8000-000000000000' ELSE lot_id END"
        " WHERE (kind, unit, batch) = ('lot_granted', 'usd', 2) OR (kind, account) = ('hold_placed', 'acme')"
    ),
    "it takes the hard wallet acme usd to -": (
        "UPDATE journal SET details = replace(details, '\"forced\":true,', '') WHERE kind = 'adjusted'"
    ),
    "which is valid at another time": (
        "UPDATE journal SET details = replace(details, '\"priority\"',"
        ' \'"effective_at":"2027-01-01T00:00:00Z","priority"\') WHERE kind = \'lot_granted\' AND details IS NOT NULL'
    ),
    "it was recorded at": "UPDATE journal SET recorded_at = recorded_at - interval '1 day' WHERE batch = 5",
    "at another time than the entry before it": (
        "UPDATE journal SET recorded_at = recorded_at + interval '1 microsecond' WHERE (batch, position) = (1, 2)"
    ),
    "is not the one that begins here": (
        "UPDATE journal SET transaction_id = '01980000-0000-7000-8000-000000000000' WHERE batch = 4"
    ),
    "the wallet acme usd is not open": "DELETE FROM journal WHERE kind = 'wallet_opened' AND account = 'acme'",
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_forged_journal_breaks_a_law(history: History, what: str) -> None:
    with history.tampering() as superuser:
        assert superuser.execute(FORGERIES[what]).rowcount > 0
        rechained(superuser)
        found = history.audited()
    assert what in said(found), said(found)


BESIDE: Final = {
    "charge lines of its transaction are not its own": "UPDATE charge_lines SET own_key = true WHERE line_number = 2",
    "charge lines of its transaction are not its own ": "DELETE FROM charge_lines WHERE line_number = 2",
    "which is not there": (
        "UPDATE charge_lines SET transaction_id = '01980000-0000-7000-8000-000000000000' WHERE line_number = 2"
    ),
    "the command tester": (
        "UPDATE commands SET batch = batch + 1 WHERE idempotency_key = (SELECT min(idempotency_key) FROM commands)"
    ),
    "for bundle 1, which names transaction": (
        "UPDATE bundles SET transaction_id = '01980000-0000-7000-8000-000000000000'"
    ),
    "the reversal of demo/": "UPDATE reversals SET position = position + 100",
    "more than demo/": "UPDATE reversals SET split = replace(split, ',20]', ',45]')",
    "for bundle 2, which was not taken with it": "UPDATE bundles SET batch = batch - 1 WHERE number = 2",
    "which was not charged": "UPDATE reversals SET event_id = 'another'",
}


# Of the reversal that another than the last gave back, and of bundles: what is named, and where.
REVERSAL: Final = (
    "(batch, position) = (SELECT batch, position FROM reversals ORDER BY batch, position LIMIT 1 OFFSET 1)"
)
REVERSAL_COLUMNS: Final = {
    "source": "'other'",
    "event_id": "'another'",
    "revision": "7",
    "batch": "batch + 1",
    "position": "position + 1",
    "transaction_id": "'01980000-0000-7000-8000-000000000000'",
    "split": "replace(split, ',10]', ',9]')",
    "reason": "'nobody said so'",
    "recorded_at": "recorded_at + interval '1 microsecond'",
}


def test_a_changed_reversal_is_named_whatever_column_it_is(history: History) -> None:
    for column, value in REVERSAL_COLUMNS.items():
        with history.tampering() as superuser:
            place = one(superuser, f"SELECT batch, position FROM reversals WHERE {REVERSAL}")
            assert superuser.execute(f"UPDATE reversals SET {column} = {value} WHERE {REVERSAL}").rowcount == 1
            found = history.audited()
        assert tuple(place) in places(found), f"{column}: {said(found)}"
        assert "and that is not what is recorded" in said(found), column
    assert history.audited().is_clean


def test_a_deleted_reversal_is_named(history: History) -> None:
    with history.tampering() as superuser:
        place = one(superuser, f"SELECT batch, position FROM reversals WHERE {REVERSAL}")
        superuser.execute(f"DELETE FROM reversals WHERE {REVERSAL}")
        found = history.audited()
    assert places(found) == {tuple(place)}
    assert "and that is not what is recorded" in said(found)


def test_an_added_reversal_is_named(history: History) -> None:
    """Of a line of which nothing was given back, in a transaction that was about another, or about none."""
    for position in ("position", "position + 1"):
        with history.tampering() as superuser:
            batch = one(superuser, f"SELECT batch FROM reversals WHERE {REVERSAL}")
            superuser.execute(
                f"INSERT INTO reversals SELECT partition, source, 'event-4', revision, batch, {position},"
                f" transaction_id, '[]', reason, recorded_at FROM reversals WHERE {REVERSAL}"
            )
            found = history.audited()
        assert {finding.batch for finding in found.findings} == {batch}
        assert "the reversal of demo/event-4/0" in said(found), said(found)


BUNDLE_1: Final = (
    "DELETE FROM bundles WHERE number = 1",
    "UPDATE bundles SET number = 9 WHERE number = 1",
    "UPDATE bundles SET transaction_id = NULL WHERE number = 1",
    (
        "UPDATE bundles SET batch = 1, transaction_id = (SELECT transaction_id FROM commands WHERE batch = 1 LIMIT 1)"
        " WHERE number = 1"
    ),
)


def test_a_bundle_is_that_of_the_transaction_that_names_it(history: History) -> None:
    for statement in BUNDLE_1:
        with history.tampering() as superuser:
            place = one(
                superuser,
                "SELECT j.batch, min(position) FROM journal j JOIN bundles USING (transaction_id)"
                " WHERE number = 1 GROUP BY 1",
            )
            assert superuser.execute(statement).rowcount == 1
            found = history.audited()
        assert tuple(place) in places(found), said(found)
        assert "it was done for bundle 1" in said(found), said(found)


@pytest.mark.parametrize("what", BESIDE)
def test_what_stands_beside_the_journal_belongs_to_it(history: History, what: str) -> None:
    with history.tampering() as superuser:
        assert superuser.execute(BESIDE[what]).rowcount > 0
        found = history.audited()
    assert what.strip() in said(found), said(found)


def test_a_finding_says_where_and_what() -> None:
    assert str(Finding(7, 2, 3, "it is wrong")) == "partition 7, batch 2, position 3: it is wrong"
    assert str(Finding(7, 2, 0, "it is wrong")) == "partition 7, batch 2: it is wrong"
