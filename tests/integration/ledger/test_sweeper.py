"""Laws of the sweeper: what is due is journalled and told without anybody asking, once, and only by who owns it."""

import asyncio
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from contracts import ledger as words
from contracts.money import Amount
from services.kit.ids import new_hold_id
from services.ledger.audit import audit
from services.ledger.replay import replay
from services.ledger.signing import ensure_key_files, read_public_keys
from tests.builders import charge_line, charges_rated, hold_leg, place_hold, release_hold
from tests.conftest import Database
from tests.integration.ledger.driving import Driver
from tests.integration.ledger.recording import CAPS

pytestmark = pytest.mark.anyio


def swift(driver: Driver) -> Driver:
    return replace(driver, settings=driver.settings.model_copy(update={"sweep_seconds": 0.05}))


def usd(amount: str) -> Amount:
    return Amount(amount=amount, unit="usd")


async def test_a_lot_ends_and_a_hold_is_resolved_without_anybody_asking(driver: Driver, database: Database) -> None:
    driver = swift(driver)
    async with driver.running():
        await driver.funded("acme", "10")
        ends = datetime.now(tz=UTC) + timedelta(seconds=1)
        await driver.accepted(
            words.Grant(idempotency_key="g", account="acme", unit="usd", amount="3", priority=200, expires_at=ends)
        )
        released, estimated = new_hold_id("acme"), new_hold_id("acme")
        hold = place_hold(released, hold_leg("usd", "2"), key="h1").model_copy(update={"lifetime_seconds": 1})
        await driver.accepted(hold)
        await driver.accepted(
            hold.model_copy(update={"hold": estimated, "idempotency_key": "h2", "overdue": "charge_estimate"})
        )
        await driver.until("SELECT count(*) FROM holds WHERE status = 'placed'", 0)
        await driver.until("SELECT count(*) FROM lots WHERE expired > 0", 1)
        assert await driver.rows("SELECT posted, held FROM wallets") == [(8 * 10**9, 0)]
        (gone,) = await driver.facts(words.LotExpired)
        assert isinstance(gone, words.LotExpired)
        assert gone.expired == usd("3")
        ended = {
            fact.hold: (fact.released, fact.estimated)
            for fact in await driver.facts(words.HoldExpired)
            if isinstance(fact, words.HoldExpired)
        }
        assert ended == {released: ((usd("2"),), ()), estimated: ((), (usd("2"),))}
        # Nobody asked: nothing is replayed for it, and nothing of it is done again.
        keys = await driver.rows("SELECT idempotency_key FROM commands WHERE principal = 'tester' ORDER BY 1")
        assert [row[0] for row in keys] == ["g", "h1", "h2", "key-1", "key-2"]
        before = await driver.dump()
        await driver.accepted(words.Charge(idempotency_key="c", line=charge_line("e", usd="1", hold=estimated)))
        (settled,) = await driver.facts(words.HoldSettled)
        assert isinstance(settled, words.HoldSettled)
        assert (settled.hold, settled.released) == (estimated, (usd("2"),))
        assert len((await driver.dump())["journal"]) > len(before["journal"])
        assert await driver.rows("SELECT posted, held FROM wallets") == [(9 * 10**9, 0)]
        assert replay(database.url("ledger_owner")).is_equal


async def test_a_hold_that_nobody_swept_ends_at_its_deadline_before_it_is_named(
    driver: Driver, database: Database
) -> None:
    """The sweeper is away. A release comes too late and leaves no trace; a charge finds the hold ended."""
    driver = replace(driver, settings=driver.settings.model_copy(update={"sweep_seconds": 600.0}))
    async with driver.running():
        await driver.funded("acme", "10")
        released, estimated = new_hold_id("acme"), new_hold_id("acme")
        hold = place_hold(released, hold_leg("usd", "2"), key="h1").model_copy(update={"lifetime_seconds": 1})
        await driver.accepted(hold)
        await driver.accepted(
            hold.model_copy(update={"hold": estimated, "idempotency_key": "h2", "overdue": "charge_estimate"})
        )
        await asyncio.sleep(1.2)
        before = await driver.dump()
        for name in (released, estimated):
            assert (await driver.refused(release_hold(name, key=f"r{name}"))).code == "hold_expired"
            again = hold.model_copy(update={"hold": name, "idempotency_key": f"p{name}"})
            assert (await driver.refused(again)).code == "hold_expired"
            more = words.ExtendHold(idempotency_key=f"e{name}", hold=name, account="acme", lifetime_seconds=60)
            assert (await driver.refused(more)).code == "hold_expired"
        dry = words.Charge(idempotency_key="d", line=charge_line("d", usd="1", hold=estimated), dry_run=True)
        await driver.accepted(dry)
        assert await driver.dump() == before
        lines = (charge_line("e1", usd="1", hold=released), charge_line("e2", usd="1", hold=estimated))
        await driver.publish(charges_rated(*lines))
        await driver.until("SELECT max(charges_number) FROM heads", 1)
        assert await driver.rows("SELECT status FROM holds ORDER BY 1") == [("expired",), ("settled",)]
        assert await driver.rows("SELECT posted, held FROM wallets") == [(8 * 10**9, 0)]
        told = [fact.hold for fact in await driver.facts(words.HoldExpired) if isinstance(fact, words.HoldExpired)]
        assert sorted(told) == sorted((released, estimated))
        ends = await driver.rows(
            "SELECT count(*) FROM journal j JOIN holds h USING (partition, hold_id)"
            " WHERE j.kind IN ('hold_expired', 'hold_estimated') AND j.occurred_at = h.expires_at"
        )
        assert ends == [(2,)]
        assert replay(database.url("ledger_owner")).is_equal


async def test_periods_that_were_missed_while_no_ledger_ran_are_granted_once_each(
    driver: Driver, database: Database
) -> None:
    driver = swift(driver)
    begins = datetime.now(tz=UTC) - timedelta(days=2, hours=1)
    async with driver.running():
        wallets = (words.WalletSpec(unit="tokens"),)
        await driver.accepted(words.OpenAccount(idempotency_key="o", account="acme", wallets=wallets))
        daily = words.RuleSpec(id="daily", unit="tokens", amount="100", period="day", anchor=begins, rollover_max="50")
        done = await driver.accepted(words.SetRule(idempotency_key="r", account="acme", rule=daily))
        assert [each.available for each in done.remaining] == ["150"]
    periods = "SELECT period, granted, posted FROM lots WHERE rule_id = 'daily' ORDER BY 1"
    assert await driver.rows(periods) == [(0, 100, 0), (1, 150, 0), (2, 150, 150)]
    # As if the process had been away for a day: its clock cannot be set, but what is due can.
    async with driver.running():
        granted = await driver.facts(words.LotGranted)
        assert [fact.period for fact in granted if isinstance(fact, words.LotGranted)] == [0, 1, 2]
        assert replay(database.url("ledger_owner")).is_equal


async def test_many_accounts_are_swept_some_at_a_time(driver: Driver, database: Database) -> None:
    settings = driver.settings.model_copy(update={"sweep_seconds": 0.05, "sweep_cost_max": 4})
    driver = replace(driver, settings=settings)
    async with driver.running():
        accounts = [f"org{number}" for number in range(25)]
        began = time.monotonic()
        for account in accounts:
            await driver.funded(account, "1")
        # They are granted before that, on a slow machine, too.
        ends = datetime.now(tz=UTC) + timedelta(seconds=2 * (time.monotonic() - began))
        await asyncio.gather(
            *(
                driver.accepted(
                    words.Grant(idempotency_key=account, account=account, unit="usd", amount="1", expires_at=ends)
                )
                for account in accounts
            )
        )
        await driver.until("SELECT count(*) FROM journal WHERE kind = 'lot_expired' AND posted < 0", 25)
        assert len(await driver.facts(words.LotExpired)) == 25
        assert replay(database.url("ledger_owner")).is_equal


async def test_lots_granted_for_later_recover_their_wallets_when_they_begin_without_anybody_asking(
    driver: Driver, database: Database
) -> None:
    """Some at a time, all at the same moment; those that begin while no ledger runs are told when one does again."""
    settings = driver.settings.model_copy(update={"sweep_seconds": 0.05, "sweep_cost_max": 4})
    driver = replace(driver, settings=settings)
    accounts = [f"org{number}" for number in range(10)]
    crossings = "SELECT count(*) FROM journal WHERE kind = 'balance_crossed'"

    def later(account: str, key: str, begins: datetime) -> words.Grant:
        return words.Grant(idempotency_key=key, account=account, unit="usd", amount="5", effective_at=begins)

    async with driver.running():
        began = time.monotonic()
        for account in accounts:
            await driver.funded(account, "1")
            await driver.accepted(
                words.Charge(idempotency_key=account, line=charge_line("e", account=account, usd="1"))
            )
        begins = datetime.now(tz=UTC) + timedelta(seconds=2 * (time.monotonic() - began))
        for account in accounts:
            await driver.accepted(later(account, f"l{account}", begins))
        assert await driver.facts(words.BalanceRecovered) == []
        await driver.until(crossings, 2 * len(accounts))
        told = [fact for fact in await driver.facts(words.BalanceRecovered) if isinstance(fact, words.BalanceRecovered)]
        assert sorted(fact.account for fact in told) == accounts
        assert {fact.available for fact in told} == {usd("5")}
        assert min(fact.recorded_at for fact in told) >= begins
        await driver.accepted(words.Charge(idempotency_key="c", line=charge_line("f", account="org0", usd="5")))
        begins = datetime.now(tz=UTC) + timedelta(seconds=1)
        await driver.accepted(later("org0", "again", begins))
    await asyncio.sleep(1)
    async with driver.running():
        await driver.until(crossings, 2 * len(accounts) + 2)
    assert replay(database.url("ledger_owner")).is_equal


async def test_what_the_sweeper_has_told_of_a_lot_that_begins_is_nothing_wrong(
    driver: Driver, database: Database, tmp_path: Path
) -> None:
    ensure_key_files(tmp_path / "signing.pem", tmp_path / "public.pem")
    told = {"sweep_seconds": 0.05, "ledger_signing_key_file": tmp_path / "signing.pem"}
    driver = replace(driver, settings=driver.settings.model_copy(update=told))
    crossings = "SELECT count(*) FROM journal WHERE kind = 'balance_crossed'"
    async with driver.running():
        await driver.funded("acme", "1")
        await driver.accepted(words.Charge(idempotency_key="c", line=charge_line("e", usd="1")))
        begins = datetime.now(tz=UTC) + timedelta(seconds=1)
        await driver.accepted(
            words.Grant(idempotency_key="l", account="acme", unit="usd", amount="5", effective_at=begins)
        )
        await driver.until(crossings, 2)
    keys = read_public_keys(tmp_path / "public.pem")
    found = await asyncio.to_thread(audit, database.url("ledger"), keys=keys, caps=CAPS, processes=1)
    assert found.is_clean, found.findings


async def test_a_charge_of_long_ago_counts_in_its_own_period_though_its_lot_is_long_gone(
    driver: Driver, database: Database
) -> None:
    driver = swift(driver)
    begins = datetime.now(tz=UTC) - timedelta(days=3, hours=1)
    daily = words.RuleSpec(id="daily", unit="tokens", amount="100", period="day", anchor=begins)
    async with driver.running():
        wallets = (words.WalletSpec(unit="tokens"),)
        await driver.accepted(words.OpenAccount(idempotency_key="o", account="acme", wallets=wallets))
        await driver.accepted(words.SetRule(idempotency_key="r", account="acme", rule=daily))
    periods = "SELECT period, kind, posted, expired FROM lots WHERE rule_id = 'daily' ORDER BY period, kind"
    full = [(0, "plan", 0, 100), (1, "plan", 0, 100), (2, "plan", 0, 100), (3, "plan", 100, 0)]
    assert await driver.rows(periods) == full
    # Another process has not got in memory what ended so long ago.
    async with driver.running():
        first, second = (
            charge_line(f"e{hours}", amounts={"tokens": amount}, occurred_at=begins + timedelta(hours=hours))
            for hours, amount in ((1, "30"), (25, "120"))
        )
        await driver.publish(charges_rated(first, second))
        await driver.until("SELECT max(charges_number) FROM heads", 1)
        assert await driver.rows(periods) == [
            (0, "plan", 0, 70),
            (1, "overage", -20, 0),
            (1, "plan", 0, 0),
            (2, "plan", 0, 100),
            (3, "plan", 100, 0),
        ]
        assert replay(database.url("ledger_owner")).is_equal
