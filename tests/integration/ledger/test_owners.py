"""Laws of ownership: one owner per partition, take-over within seconds, and a deposed owner commits nothing."""

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from nats.aio.client import Client

from contracts import ledger as words
from contracts.money import Unit
from contracts.partition import PARTITION_COUNT, group_of, partition_of
from contracts.streams import CHARGES, CONSUMERS, charges_consumer
from infra.provision import consumer_config
from services.kit.clock import now
from services.kit.database import Writer
from services.kit.ids import new_hold_id
from services.kit.leases import fair_share
from services.kit.outbox import OutboxRow
from services.ledger import store
from services.ledger.audit_sql import audit
from services.ledger.domain.commands import Grant, OpenAccount, Units, VoidGrant, WalletTerms
from services.ledger.handlers import CommandItem, Ledger, NotOwner, Replied
from services.ledger.settings import LedgerSettings
from tests.builders import charge_line, charges_rated, grant, hold_leg, open_account, place_hold
from tests.conftest import Database
from tests.eventually import eventually
from tests.integration.ledger.driving import Driver
from tests.integration.ledger.processes import ledgers

pytestmark = pytest.mark.anyio

ROOTS = tuple(f"org{number}" for number in range(12))
PARTITION = partition_of("acme")


def item(command: OpenAccount | Grant | VoidGrant, key: str) -> CommandItem:
    return CommandItem(partition=PARTITION, principal="tester", key=key, body_hash=bytes(32), command=command)


@asynccontextmanager
async def ledger(database: Database) -> AsyncIterator[tuple[Ledger, list[OutboxRow]]]:
    """The core of a process: all but its lease, its streams and its HTTP."""
    writer = Writer(database.url("ledger"), name="test")
    told: list[OutboxRow] = []

    def on_committed(rows: Iterable[OutboxRow]) -> None:
        told.extend(rows)

    yield Ledger(writer=writer, units=Units({"usd": Unit("usd", "money", 9)}), now=now, on_committed=on_committed), told
    await writer.close()


def lose_while_reading(owner: Ledger, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on it gives the partition up each time something is read; what was given up."""
    load, given_up = store.load, list[int]()

    async def load_and_lose(connection: store.Connection, needs: store.Needs) -> store.Loaded:
        loaded = await load(connection, needs)
        owner.give_up([PARTITION])
        given_up.append(PARTITION)
        return loaded

    monkeypatch.setattr(store, "load", load_and_lose)
    return given_up


async def until_owned(driver: Driver, *, owners: int) -> None:
    """Wait until as many processes share all partitions fairly."""
    # Processes that have just been started share few processors with whatever else runs.
    statement = "SELECT count(DISTINCT owner) FROM leases WHERE expires_at > clock_timestamp()"
    await driver.until(statement, owners, seconds=60)
    share = fair_share(owners)
    await driver.until(
        "SELECT bool_and(held <= %s) AND sum(held) = %s FROM (SELECT count(*) AS held FROM leases"
        " WHERE owner IS NOT NULL AND expires_at > clock_timestamp() GROUP BY owner) l",
        True,
        share,
        PARTITION_COUNT,
    )


async def redeliver_soon(operator_nats: Client) -> None:
    """What a killed process was reading comes again after 2 s, not after half a minute."""
    jetstream = operator_nats.jetstream()
    for group in {group_of(partition_of(root)) for root in ROOTS}:
        durable = charges_consumer(group)
        wanted = next(each for each in CONSUMERS if each.durable == durable)
        await jetstream.add_consumer(CHARGES, replace(consumer_config(wanted), ack_wait=2))


async def until_accepted(ask: Callable[[], Awaitable[words.Reply]]) -> words.Accepted:
    """Ask under one key until it is accepted."""
    while True:
        reply = await ask()
        if isinstance(reply, words.Accepted):
            return reply
        assert isinstance(reply, words.Failed), reply
        assert reply.code in {"busy", "unavailable"}, reply
        await asyncio.sleep(0.05)


async def test_a_deposed_owner_commits_nothing(driver: Driver, database: Database) -> None:
    async with ledger(database) as (first, told), ledger(database) as (second, _):
        assert await first.take_over({PARTITION: 1}) == {PARTITION}
        (opened,) = await first.process([item(OpenAccount(account="acme", wallets=(WalletTerms("usd"),)), "1")])
        assert isinstance(opened, Replied)
        assert await second.take_over({PARTITION: 2}) == {PARTITION}
        before = await driver.dump()
        told.clear()
        # It has everything in memory, believes that it owns the partition, and decides.
        (refused,) = await first.process([item(Grant(account="acme", unit="usd", amount=5), "2")])
        assert refused == NotOwner()
        assert first.partitions == frozenset()
        assert await driver.dump() == before
        assert told == []
        (granted,) = await second.process([item(Grant(account="acme", unit="usd", amount=5), "2")])
        assert isinstance(granted, Replied)
        # A lease won earlier than the one that is in force is worth nothing.
        assert await first.take_over({PARTITION: 1}) == frozenset()


async def test_a_partition_that_is_lost_does_not_hold_up_the_others_of_its_batch(
    driver: Driver, database: Database
) -> None:
    other = partition_of("other")
    async with ledger(database) as (first, _), ledger(database) as (second, _):
        await first.take_over({PARTITION: 1, other: 1})
        await first.process([item(OpenAccount(account="acme"), "1")])
        await second.take_over({PARTITION: 2})
        mine = CommandItem(
            partition=other,
            principal="tester",
            key="2",
            body_hash=bytes(32),
            command=OpenAccount(account="other"),
        )
        results = await first.process([item(OpenAccount(account="acme/ana"), "3"), mine])
        assert results[0] == NotOwner()
        assert isinstance(results[1], Replied)
        assert [row[0] for row in await driver.rows("SELECT account FROM accounts ORDER BY 1")] == ["acme", "other"]


async def test_a_partition_may_be_given_up_while_its_head_is_read_again(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ledger(database) as (first, _), ledger(database) as (second, _):
        await first.take_over({PARTITION: 1})
        await first.process([item(OpenAccount(account="acme"), "1")])
        await second.take_over({PARTITION: 2})
        given_up = lose_while_reading(first, monkeypatch)
        assert await first.process([item(OpenAccount(account="acme/ana"), "2")]) == [NotOwner()]
        assert given_up == [PARTITION]


async def test_a_partition_may_be_given_up_while_more_is_read_of_what_is_in_memory(
    driver: Driver, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lot comes without its account if that is in memory, and has no place once it is not."""
    async with ledger(database) as (first, _):
        await first.take_over({PARTITION: 1})
        await first.process([item(OpenAccount(account="acme", wallets=(WalletTerms("usd"),)), "1")])
        await first.process([item(Grant(account="acme", unit="usd", amount=5), "2")])
        ((lot,),) = await driver.rows("SELECT lot_id FROM lots")
        await first.process([item(VoidGrant(account="acme", lot=str(lot)), "3")])
    async with ledger(database) as (second, _):
        await second.take_over({PARTITION: 2})
        await second.process([item(Grant(account="acme", unit="usd", amount=1), "4")])
        given_up = lose_while_reading(second, monkeypatch)
        assert await second.process([item(VoidGrant(account="acme", lot=str(lot)), "5")]) == [NotOwner()]
        assert given_up == [PARTITION]


async def test_processes_share_the_partitions_and_one_takes_over_from_one_that_is_killed(
    driver: Driver, ledger_settings: LedgerSettings, database: Database, operator_nats: Client, tmp_path: Path
) -> None:
    await redeliver_soon(operator_nats)
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    with ledgers(ledger_settings, count=3, directory=tmp_path) as processes:
        await until_owned(driver, owners=3)
        for root in ROOTS:
            await driver.funded(root, "1000")
        commands = [grant(chance.choice(ROOTS), "1", key=f"grant-{number}") for number in range(600)]
        numbers = dict.fromkeys(ROOTS, 0)
        done = 0

        async def ask(command: words.Grant) -> words.Accepted:
            nonlocal done
            reply = await until_accepted(lambda: driver.command(command))
            done += 1
            return reply

        async def charge() -> None:
            for number in range(60):
                root = chance.choice(ROOTS)
                numbers[root] += 1
                line = charge_line(f"{root}-{number}", account=root, usd="1")
                # Roots may share a partition, whose numbers are one sequence.
                await driver.publish(charges_rated(line, number=sequence(root)))

        sequences: dict[int, int] = {}

        def sequence(root: str) -> int:
            partition = partition_of(root)
            sequences[partition] = sequences.get(partition, 0) + 1
            return sequences[partition]

        asking = asyncio.gather(*(ask(command) for command in commands))
        charging = asyncio.create_task(charge())
        await eventually(lambda: done >= 60)
        in_flight = len(commands) - done
        assert in_flight > 0, f"seed {seed}: nothing was in flight"
        processes[0].end()
        killed_at = time.monotonic()
        replies = await asking
        await charging
        took = time.monotonic() - killed_at
        assert took < 10, f"seed {seed}: {in_flight} commands in flight took {took:.1f} s"
        assert len({reply.transaction for reply in replies}) == len(commands)
        await driver.until("SELECT count(*) FROM charge_lines", 60)
        await until_owned(driver, owners=2)
        expected = (len(ROOTS) * 1000 + len(commands) - 60) * 10**9
        assert await driver.rows("SELECT sum(posted)::bigint FROM wallets") == [(expected,)]
        assert not any(check.breaches for check in audit(database.url("ledger")))


async def test_an_owner_that_slept_through_its_deposition_doubles_nothing(
    driver: Driver, ledger_settings: LedgerSettings, database: Database, tmp_path: Path
) -> None:
    with ledgers(ledger_settings, count=1, directory=tmp_path) as processes:
        await until_owned(driver, owners=1)
        for root in ROOTS:
            await driver.funded(root, "10")
        await driver.accepted(open_account("org0/ana", key="ana"))
        gifts = [grant(root, "1", key=f"asleep-{root}") for root in ROOTS]
        processes[0].send(signal.SIGSTOP)
        # It will find these in its buffers when it wakes up.
        asleep = [asyncio.create_task(until_accepted(partial(driver.command, each))) for each in gifts]
        await asyncio.sleep(0.1)
        with ledgers(ledger_settings, count=1, directory=tmp_path):
            replies = await asyncio.gather(*asleep)
            assert not any(reply.replayed for reply in replies)
            await driver.accepted(place_hold(new_hold_id("org0"), hold_leg("usd", "11"), account="org0", key="all"))
            processes[0].send(signal.SIGCONT)
            await until_owned(driver, owners=2)
            for root in ROOTS:
                assert (await driver.accepted(grant(root, "1", key=f"asleep-{root}"))).replayed
            assert (
                await driver.refused(place_hold(new_hold_id("org0"), hold_leg("usd", "1"), account="org0", key="more"))
            ).code == "insufficient_funds"
            assert await driver.rows("SELECT DISTINCT posted FROM wallets") == [(11 * 10**9,)]
            assert not any(check.breaches for check in audit(database.url("ledger")))
