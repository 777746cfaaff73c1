"""Laws of the replay: set-wise or entry by entry it comes to the same bytes, and a swap mends what was spoilt."""

import asyncio
import signal
import threading
import time

import psycopg
import pytest

from contracts import ledger as words
from services.ledger import replay_sql, tables
from services.ledger.replay import LIVE, SHADOW, Compared, ShadowInUse, replay
from tests.conftest import Database
from tests.integration.ledger.driving import Driver
from tests.integration.ledger.recording import recording

pytestmark = pytest.mark.anyio

SPOILT = {
    "accounts": "UPDATE accounts SET due_at = '2026-01-01'",
    "wallets": "UPDATE wallets SET posted = posted + 1, low = '[null]'",
    "rules": "UPDATE rules SET next_period = next_period + 1",
    "lots": "UPDATE lots SET reference = 'else' WHERE kind = 'purchase'",
    "holds": "UPDATE holds SET status = 'placed', ended_at = NULL",
    "hold_lots": "DELETE FROM hold_lots",
    "payments": "UPDATE payments SET paid = paid + 1",
    "claims": "DELETE FROM claims",
}


def different(tables: tuple[Compared, ...]) -> dict[str, tuple[str, ...]]:
    return {table.table: table.first_differences for table in tables if table.different}


@pytest.mark.parametrize("seed", range(20, 26))
async def test_set_wise_and_entry_by_entry_it_comes_to_what_is_live(
    database: Database, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with recording(database.url("ledger"), seed=seed) as recorder:
        await recorder.open()
        await recorder.live(200)
    owner = database.url("ledger_owner")
    for by_evolve in (True, False):
        found = replay(owner, by_evolve=by_evolve)
        assert different(found.tables) == {}
        assert found.is_equal
        assert found.entries > 500
        assert all(table.live == table.replayed for table in found.tables)
    # In parts of a page each: what is summed of one part goes on in the next.
    monkeypatch.setattr("services.ledger.replay.PAGES_MIN", 1)
    assert different(replay(owner).tables) == {}
    # Nothing was left out.
    assert all(table.live for table in found.tables), found.tables


async def test_every_column_of_every_projection_is_compared(database: Database) -> None:
    """Whatever is spoilt is found by both ways, and mended by a swap."""
    async with recording(database.url("ledger"), seed=22) as recorder:
        await recorder.open()
        await recorder.live(200)
    owner = database.url("ledger_owner")
    with psycopg.connect(
        database.superuser_url.get_secret_value(), autocommit=True, options="-c search_path=ledger"
    ) as superuser:
        for table, statement in SPOILT.items():
            assert superuser.execute(statement).rowcount > 0, table
            for by_evolve in (True, False):
                found = replay(owner, by_evolve=by_evolve)
                assert set(different(found.tables)) == {table}
                assert not found.is_equal
            assert all(line.startswith(("only live: (", "only replayed: (")) for line in different(found.tables)[table])
            replay(owner, swap=True)
        for statement in SPOILT.values():
            superuser.execute(statement)
        spoilt = replay(owner, swap=True)
        assert set(different(spoilt.tables)) == set(SPOILT)
        assert spoilt.swapped
    assert replay(owner).is_equal


async def test_a_head_beside_its_journal_is_named(database: Database) -> None:
    async with recording(database.url("ledger")) as recorder:
        await recorder.open()
    with psycopg.connect(database.url("ledger_owner").get_secret_value(), autocommit=True) as owner:
        owner.execute("UPDATE ledger.heads SET batch = batch + 1 WHERE partition = 3")
    found = replay(database.url("ledger_owner"))
    assert found.heads_astray == ("partition 3: its head is at batch 1, its journal ends with batch 0",)
    assert not found.is_equal


async def test_progress_goes_to_the_end(database: Database) -> None:
    async with recording(database.url("ledger")) as recorder:
        await recorder.open()
        await recorder.live(30)
    told: list[tuple[int, int]] = []
    found = replay(database.url("ledger_owner"), on_progress=lambda *now: told.append(now))
    assert told[-1] == (found.entries, found.entries)
    assert told == sorted(told)


async def test_nothing_but_the_shadow_of_the_projections_is_left(database: Database) -> None:
    async with recording(database.url("ledger")) as recorder:
        await recorder.open()
    for _ in range(2):
        replay(database.url("ledger_owner"))
    with psycopg.connect(database.superuser_url.get_secret_value()) as superuser:
        rows = superuser.execute("SELECT relname FROM pg_class WHERE relnamespace = %s::regnamespace", [SHADOW])
        assert {row[0] for row in rows} == {table.name for table in tables.PROJECTIONS}


async def test_a_swap_under_a_running_ledger_is_believed_by_it(driver: Driver, database: Database) -> None:
    """What it remembers of before is forgotten: its next decisions are about what was rebuilt."""

    def wait(done: int, total: int) -> None:
        """Long enough that leases are renewed meanwhile."""
        if done == total:
            time.sleep(1.5 * driver.settings.lease_seconds)

    async with driver.running():
        await driver.funded("acme", "10")
        async with asyncio.timeout(30):
            await driver.rows("UPDATE wallets SET posted = 1 WHERE unit = 'usd' RETURNING 1")
            await driver.rows("UPDATE lots SET posted = 1 RETURNING 1")
            epochs = await driver.rows("SELECT sum(epoch) FROM heads")
            found = await asyncio.to_thread(replay, database.url("ledger_owner"), swap=True, on_progress=wait)
            assert not found.is_equal
            assert (await driver.rows("SELECT sum(epoch) FROM heads"))[0][0] > epochs[0][0]
            await driver.accepted(words.Grant(idempotency_key=driver.key(), account="acme", unit="usd", amount="5"))
    (row,) = await driver.rows("SELECT posted FROM wallets WHERE unit = 'usd'")
    assert row[0] == 15 * 10**9
    assert (await asyncio.to_thread(replay, database.url("ledger_owner"))).is_equal


async def test_a_swap_of_what_is_equal_changes_no_row(database: Database) -> None:
    async with recording(database.url("ledger"), seed=3) as recorder:
        await recorder.open()
        await recorder.live(60)
    with psycopg.connect(
        database.superuser_url.get_secret_value(), autocommit=True, options=f"-c search_path={LIVE}"
    ) as superuser:
        statement = "SELECT string_agg(ctid::text || xmin::text, ',' ORDER BY ctid) FROM lots"
        before = superuser.execute(statement).fetchone()
        assert replay(database.url("ledger_owner"), swap=True).is_equal
        assert superuser.execute(statement).fetchone() == before


async def test_swaps_under_a_ledger_that_writes_lose_nothing_and_add_nothing(
    driver: Driver, database: Database
) -> None:
    """What was granted between, before and after them is there once, and so is what the journal says of it."""
    granted, is_over = asyncio.Queue[None](), asyncio.Event()
    count = 0

    async def grant() -> None:
        nonlocal count
        while not is_over.is_set():
            await driver.accepted(words.Grant(idempotency_key=driver.key(), account="acme", unit="usd", amount="1"))
            count += 1
            granted.put_nowait(None)

    async with driver.running(), asyncio.timeout(90):
        await driver.funded("acme", "10")
        granting = [asyncio.create_task(grant()) for _ in range(8)]
        for _ in range(2):
            for _ in range(granted.qsize() + 20):
                await granted.get()
            await driver.rows("UPDATE lots SET posted = posted + 7 WHERE posted > 0 RETURNING 1")
            found = await asyncio.to_thread(replay, database.url("ledger_owner"), swap=True)
            assert not found.is_equal
            assert not found.heads_astray
        is_over.set()
        await asyncio.gather(*granting)
    (row,) = await driver.rows("SELECT posted FROM wallets WHERE unit = 'usd'")
    assert row[0] == (10 + count) * 10**9
    assert (await asyncio.to_thread(replay, database.url("ledger_owner"))).is_equal


async def test_of_two_replays_at_once_the_second_does_nothing(database: Database) -> None:
    async with recording(database.url("ledger")) as recorder:
        await recorder.open()
    owner, refused = database.url("ledger_owner"), list[ShadowInUse]()

    def again(_done: int, _total: int) -> None:
        with pytest.raises(ShadowInUse) as told:
            replay(owner, swap=True)
        refused.append(told.value)

    assert replay(owner, on_progress=again).is_equal
    assert refused
    # One after the other, as fast as can be.
    assert all(replay(owner).is_equal for _ in range(3))


def test_a_replay_that_is_cut_off_while_its_workers_work_ends_at_once(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def live() -> None:
        async with recording(database.url("ledger")) as recorder:
            await recorder.open()
            await recorder.live(30)

    asyncio.run(live())
    owner = database.url("ledger_owner")
    with monkeypatch.context() as slow:
        # One after another: whoever stops one of them has not stopped the work.
        slow.setattr(replay_sql, "STEPS", ["SELECT pg_sleep(1)"] * 60)
        interrupting = threading.Timer(
            1.5, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        )
        interrupting.start()
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            replay(owner)
        assert time.monotonic() - begin < 30
    assert replay(owner).is_equal
