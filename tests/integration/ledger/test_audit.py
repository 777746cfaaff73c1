"""Laws of the audit: it finds nothing where nothing is wrong, from the beginning or since the last time."""

import asyncio
import multiprocessing
import stat
from pathlib import Path

import psycopg
import pytest
from nats.aio.client import Client

from contracts.partition import partition_of
from contracts.streams import LEDGER
from services.kit.publish import Message, publish
from services.ledger.audit import (
    Audited,
    Evidence,
    EvidenceUnreadable,
    ProcessEnded,
    audit,
    read_evidence,
    read_published,
    write_evidence,
)
from services.ledger.audit_partition import Reached
from services.ledger.audit_sql import audit as audit_tables
from services.ledger.domain import charging
from services.ledger.domain.commands import Grant, OpenAccount, WalletTerms
from services.ledger.replay import replay
from services.ledger.settings import LedgerSettings
from services.ledger.signing import ensure_key_files, new_key, read_public_keys, signer
from tests.conftest import Database
from tests.integration.ledger.driving import Driver
from tests.integration.ledger.recording import CAPS, KEYS, ROOTS, SIGNER, recording

pytestmark = pytest.mark.anyio


def audited(database: Database, evidence: Evidence | None = None, *, since_last: bool = False) -> Audited:
    found = audit(database.url("ledger"), keys=KEYS, caps=CAPS, evidence=evidence, since_last=since_last, processes=1)
    assert found.is_clean, [str(finding) for finding in found.findings]
    return found


@pytest.mark.parametrize("seed", range(4))
async def test_what_the_ledger_decided_breaks_no_law_from_the_beginning_or_since(database: Database, seed: int) -> None:
    async with recording(database.url("ledger"), seed=seed) as recorder:
        await recorder.open()
        await recorder.live(100)
        first = audited(database)
        await recorder.live(100)
    assert [check.law for check in audit_tables(database.url("ledger")) if check.breaches] == []
    since = audited(database, Evidence(audited=first.reached), since_last=True)
    whole = audited(database)
    assert first.entries + since.entries == whole.entries > 500
    assert first.lines + since.lines == whole.lines > 50
    assert first.signatures + since.signatures == whole.signatures > 100
    assert since.reached == whole.reached
    assert set(whole.reached) == {partition_of(root) for root in ROOTS}


@pytest.mark.parametrize("since_last", [False, True])
async def test_an_overspending_debit_is_named(
    database: Database, since_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ledger that forgot to refuse: its journal is whole, signed and replays, and the audit names the debit."""
    root = ROOTS[0]
    async with recording(database.url("ledger")) as recorder:
        await recorder.open()
        await recorder.accepted(Grant(account=root, unit="usd", amount=50))
        await recorder.accepted(recorder.line(root, ("usd", 50), required=True))
        first = audited(database)
        await recorder.accepted(Grant(account=root, unit="usd", amount=5))
        (refused,) = await recorder.do(recorder.line(root, ("usd", 6), required=True))
        assert refused["code"] == "insufficient_funds"
        audited(database)
        with monkeypatch.context() as forgetful:
            forgetful.setattr(charging, "_lacking", lambda *_: None)
            await recorder.accepted(recorder.line(root, ("usd", 6), required=True))
    found = audit(
        database.url("ledger"),
        keys=KEYS,
        caps=CAPS,
        evidence=Evidence(audited=first.reached) if since_last else None,
        since_last=since_last,
        processes=1,
    )
    (finding,) = found.findings
    assert "the debit demo/" in str(finding)
    assert f"takes the hard wallet {root} usd to -1" in str(finding)
    assert replay(database.url("ledger_owner")).is_equal


async def test_an_audit_since_the_last_looks_at_what_came_since_alone(database: Database) -> None:
    async with recording(database.url("ledger")) as recorder:
        await recorder.open()
        first = audited(database)
        await recorder.accepted(Grant(account=ROOTS[0], unit="usd", amount=5))
        since = audited(database, Evidence(audited=first.reached), since_last=True)
    # The lot, the contra, and perhaps what its owner is told.
    assert 2 <= since.entries <= 4
    assert audited(database, Evidence(audited=since.reached), since_last=True).entries == 0


async def test_an_audit_since_the_last_notices_that_what_it_saw_then_has_changed(database: Database) -> None:
    async with recording(database.url("ledger")) as recorder:
        await recorder.open()
        first = audited(database)
        await recorder.accepted(Grant(account=ROOTS[0], unit="usd", amount=5))
    partition = partition_of(ROOTS[0])
    reached = {**first.reached, partition: Reached(first.reached[partition].batch, bytes(32))}
    found = audit(
        database.url("ledger"), keys=KEYS, caps=CAPS, evidence=Evidence(audited=reached), since_last=True, processes=1
    )
    assert [(finding.partition, finding.what) for finding in found.findings] == [
        (partition, "it is not what has been audited: entries up to it have been changed")
    ]


async def test_processes_share_the_partitions_and_tell_how_far_they_are(database: Database) -> None:
    async with recording(database.url("ledger")) as recorder:
        await recorder.open()
        await recorder.live(20)
    told: list[tuple[int, int]] = []
    found = await asyncio.to_thread(
        audit, database.url("ledger"), keys=KEYS, caps=CAPS, processes=2, on_progress=lambda *now: told.append(now)
    )
    assert found.is_clean
    assert told[-1] == (found.entries, found.entries)
    assert told == sorted(told)
    assert found.entries == audited(database).entries


async def test_an_audit_of_which_a_process_is_killed_is_an_error(database: Database) -> None:
    async with recording(database.url("ledger")) as recorder:
        await recorder.open()

    def kill(_done: int, _total: int) -> None:
        """Told while both still begin."""
        for child in multiprocessing.active_children()[:1]:
            child.kill()

    with pytest.raises(ProcessEnded, match="exit code -9"):
        await asyncio.to_thread(audit, database.url("ledger"), keys=KEYS, caps=CAPS, processes=2, on_progress=kill)
    assert not multiprocessing.active_children()


async def test_an_error_in_a_process_is_one_of_the_audit(database: Database) -> None:
    async with recording(database.url("ledger")) as recorder:
        await recorder.open()
    with psycopg.connect(database.superuser_url.get_secret_value(), autocommit=True) as superuser:
        superuser.execute("ALTER TABLE ledger.signatures RENAME COLUMN key_id TO key")
    with pytest.raises(psycopg.errors.UndefinedColumn):
        await asyncio.to_thread(audit, database.url("ledger"), keys=KEYS, caps=CAPS, processes=2)


async def test_a_ledger_in_which_nothing_happened_is_clean(database: Database) -> None:
    assert audited(database).entries == 0


async def test_without_the_key_nothing_is_signed(database: Database) -> None:
    async with recording(database.url("ledger")) as recorder:
        await recorder.open()
    found = audit(database.url("ledger"), keys={}, caps=CAPS, processes=1)
    assert found.found == found.signatures > 0
    assert SIGNER.key_id in str(found.findings[0])


# Outside the database


async def test_what_was_signed_is_published_and_is_evidence(
    driver: Driver, database: Database, ledger_settings: LedgerSettings, operator_nats: Client, tmp_path: Path
) -> None:
    ensure_key_files(tmp_path / "signing.pem", tmp_path / "public.pem")
    keys = read_public_keys(tmp_path / "public.pem")
    settings = ledger_settings.model_copy(update={"ledger_signing_key_file": tmp_path / "signing.pem"})
    driven = Driver(
        settings=settings,
        metering_nats=driver.metering_nats,
        ledger_nats=driver.ledger_nats,
        superuser=driver.superuser,
        tokens=driver.tokens,
    )
    async with driven.running():
        for account in ("acme", "umbrella"):
            await driven.funded(account, "10")
        await driven.until(
            "SELECT count(*) FROM outbox o JOIN relayed r USING (partition) WHERE o.number > r.number", 0
        )
    found = audit(database.url("ledger"), keys=keys, caps=CAPS, processes=1)
    assert found.is_clean, found.findings
    jetstream = operator_nats.jetstream()
    evidence, forged = await read_published(jetstream, Evidence(), keys=keys)
    assert not forged
    assert evidence.published == found.reached

    again, _ = await read_published(jetstream, evidence, keys=keys)
    assert again == evidence
    assert audit(database.url("ledger"), keys=keys, caps=CAPS, evidence=evidence, processes=1).is_clean

    with psycopg.connect(
        database.superuser_url.get_secret_value(),
        options="-c search_path=ledger -c session_replication_role=replica",
    ) as superuser:
        for table in ("journal", "signatures", "commands"):
            superuser.execute(f"DELETE FROM {table}")
        superuser.execute("UPDATE heads SET batch = 0, chain_hash = decode(repeat('00', 32), 'hex')")
    assert audit(database.url("ledger"), keys=keys, caps=CAPS, processes=1).is_clean
    cut = audit(database.url("ledger"), keys=keys, caps=CAPS, evidence=evidence, processes=1)
    assert {finding.partition for finding in cut.findings} == set(found.reached)
    assert "has been published as signed: entries have been removed" in cut.findings[0].what


async def test_what_nobody_signed_is_no_evidence(ledger_nats: Client, operator_nats: Client) -> None:
    for body in (b"{}", b"nonsense", b'{"heads":"scrip ledger heads 1\\n07 9 00","signature":"AAAA","key_id":"x"}'):
        await publish(ledger_nats, stream=LEDGER, message=Message("ledger.v1.07.heads.signed", body, None))
    evidence, forged = await read_published(operator_nats.jetstream(), Evidence(), keys=KEYS)
    assert evidence.published == {}
    assert len(forged) == 3
    assert "is not signed by the ledger" in forged[0]


async def test_evidence_is_kept_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    assert read_evidence(path) == Evidence()
    evidence = Evidence({7: Reached(3, bytes([1] * 32))}, {7: Reached(2, bytes([2] * 32))}, 41)
    write_evidence(path, evidence)
    assert read_evidence(path) == evidence
    assert stat.S_IMODE((await asyncio.to_thread(path.stat)).st_mode) == 0o600


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"audited":{"7":{}},"published":{},"sequence":1}',
        '{"audited":{"64":{"batch":1,"hash":"00"}},"published":{},"sequence":1}',
        '{"audited":{"7":{"batch":1e400,"hash":"00"}},"published":{},"sequence":1}',
        '{"audited":{},"published":{"7":{"batch":9223372036854775808,"hash":"00"}},"sequence":1}',
        '{"audited":{},"published":{},"sequence":-1}',
    ],
)
def test_evidence_that_says_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "audit.json").write_text(text)
    with pytest.raises(EvidenceUnreadable):
        read_evidence(tmp_path / "audit.json")


def test_evidence_that_cannot_be_read_is_not_taken_for_none(tmp_path: Path) -> None:
    (tmp_path / "audit.json").mkdir()
    with pytest.raises(EvidenceUnreadable, match=r"audit\.json cannot be read: Is a directory"):
        read_evidence(tmp_path / "audit.json")


async def test_a_key_that_was_replaced_still_proves_what_it_signed(database: Database) -> None:
    other = signer(new_key())
    async with recording(database.url("ledger")) as recorder:
        await recorder.open()
    async with recording(database.url("ledger"), signed_by=other) as recorder:
        recorder.keys = 1_000
        await recorder.accepted(
            OpenAccount(account=f"{ROOTS[0]}/new", wallets=(WalletTerms(unit="usd"),)),
        )
    both = {**KEYS, other.key_id: other.public_key}
    assert audit(database.url("ledger"), keys=both, caps=CAPS, processes=1).is_clean
    assert audit(database.url("ledger"), keys=KEYS, caps=CAPS, processes=1).found == 1
