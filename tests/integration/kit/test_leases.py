"""Laws of leases: one believer per partition, fair shares, take-over after a death, and a graceful way out."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

import pytest

from contracts.partition import GROUP_SIZE, PARTITION_COUNT
from services.kit.database import Pool, Writer
from services.kit.leases import LeaseKeeper
from tests.conftest import Database
from tests.eventually import eventually

pytestmark = pytest.mark.anyio

TTL_SECONDS = 0.6


@dataclass
class Member:
    """A process that keeps leases, as far as the database can tell."""

    keeper: LeaseKeeper
    writer: Writer
    acquired: set[int] = field(default_factory=set)
    events: list[tuple[str, frozenset[int]]] = field(default_factory=list)
    task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.task = asyncio.create_task(self.keeper.run())

    async def leave(self) -> None:
        assert self.task is not None
        self.keeper.stop()
        await self.task
        await self.writer.close()

    async def die(self) -> None:
        assert self.task is not None
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await self.writer.close()


@pytest.fixture
async def join(kit_database: Database) -> AsyncIterator[Callable[..., Member]]:
    members: list[Member] = []
    numbers = itertools.count(1)

    def joined(*, fails: int = 0) -> Member:
        number = next(numbers)
        writer = Writer(kit_database.url("kit"), name=f"member-{number}")
        failures = itertools.repeat(True, fails)
        member = Member(keeper=_NOT_YET, writer=writer)

        async def on_acquired(partitions: frozenset[int]) -> None:
            if next(failures, False):
                raise RuntimeError("cannot load")
            assert not member.acquired & partitions
            member.acquired |= partitions
            member.events.append(("acquired", partitions))

        async def on_lost(partitions: frozenset[int]) -> None:
            member.events.append(("lost", partitions))
            member.acquired -= partitions

        member.keeper = LeaseKeeper(
            writer, owner=f"member-{number}", ttl_seconds=TTL_SECONDS, on_acquired=on_acquired, on_lost=on_lost
        )
        members.append(member)
        member.start()
        return member

    yield joined
    for member in members:
        assert member.task is not None
        if not member.task.done():
            await member.die()


_NOT_YET: LeaseKeeper = None  # type: ignore[assignment]  # set before anybody looks


def believers(members: list[Member]) -> Iterator[list[int]]:
    for partition in range(PARTITION_COUNT):
        yield [number for number, member in enumerate(members) if member.keeper.holds(partition)]


async def test_one_member_gets_everything_and_keeps_it(join: Callable[..., Member]) -> None:
    member = join()
    await eventually(lambda: len(member.acquired) == PARTITION_COUNT, seconds=1)
    epochs = {partition: member.keeper.epoch(partition) for partition in range(PARTITION_COUNT)}
    await asyncio.sleep(3 * TTL_SECONDS)
    assert {partition: member.keeper.epoch(partition) for partition in range(PARTITION_COUNT)} == epochs
    assert len(member.events) == 1


async def test_partitions_are_shared_fairly_and_never_believed_in_twice(join: Callable[..., Member]) -> None:
    members = [join()]
    await eventually(lambda: len(members[0].acquired) == PARTITION_COUNT)
    for expected in ([32, 32], [16, 24, 24]):
        members.append(join())
        async with asyncio.timeout(8):
            while sorted(len(member.acquired) for member in members) != expected:
                assert all(len(found) <= 1 for found in believers(members))
                await asyncio.sleep(0.005)
    assert set().union(*(member.acquired for member in members)) == set(range(PARTITION_COUNT))


async def test_a_dead_members_partitions_are_taken_over_with_a_higher_epoch(join: Callable[..., Member]) -> None:
    first, second = join(), join()
    await eventually(lambda: len(first.acquired) == 32 and len(second.acquired) == 32)
    epochs = {partition: first.keeper.epoch(partition) or 0 for partition in first.acquired}
    await first.die()
    died_at = asyncio.get_running_loop().time()
    await eventually(lambda: len(second.acquired) == PARTITION_COUNT)
    assert asyncio.get_running_loop().time() - died_at < 3 * TTL_SECONDS
    assert all((second.keeper.epoch(partition) or 0) > epoch for partition, epoch in epochs.items())


async def test_a_member_that_leaves_hands_over_at_once(join: Callable[..., Member], pool: Pool) -> None:
    member = join()
    await eventually(lambda: len(member.acquired) == PARTITION_COUNT)
    await member.leave()
    assert member.events[-1] == ("lost", frozenset(range(PARTITION_COUNT)))
    assert member.keeper.partitions == frozenset()
    async with pool.connection() as connection:
        cursor = await connection.execute("SELECT count(*) FROM leases WHERE owner IS NOT NULL")
        assert await cursor.fetchone() == (0,)
        assert await (await connection.execute("SELECT count(*) FROM members")).fetchone() == (0,)


async def test_a_member_cut_off_from_the_database_stops_believing_before_others_may(
    join: Callable[..., Member], pool: Pool
) -> None:
    member = join()
    await eventually(lambda: len(member.acquired) == PARTITION_COUNT)
    async with pool.connection() as connection, connection.transaction():
        # Renewals wait for this lock.
        await connection.execute("LOCK TABLE leases IN ACCESS EXCLUSIVE MODE")
        await eventually(lambda: not member.acquired, seconds=2)
        cursor = await connection.execute("SELECT count(*) FROM leases WHERE expires_at < clock_timestamp()")
        assert await cursor.fetchone() == (0,)
        assert member.keeper.partitions == frozenset()
    await eventually(lambda: len(member.acquired) == PARTITION_COUNT)


async def test_a_lease_that_another_took_is_lost(join: Callable[..., Member], pool: Pool) -> None:
    member = join()
    await eventually(lambda: len(member.acquired) == PARTITION_COUNT)
    async with pool.connection() as connection:
        await connection.execute(
            "UPDATE leases SET owner = 'thief', epoch = epoch + 1, expires_at = clock_timestamp() + interval '1 hour'"
            " WHERE partition = 7"
        )
    await eventually(lambda: 7 not in member.acquired)
    assert not member.keeper.holds(7)
    assert len(member.keeper.partitions) == PARTITION_COUNT - 1


async def test_of_a_group_that_is_partly_anothers_nothing_is_taken_until_it_is_free(
    join: Callable[..., Member], pool: Pool
) -> None:
    """Its charges come through one consumer: who owned half of it would give back the other half's, again and again."""
    first = join()
    await eventually(lambda: len(first.acquired) == PARTITION_COUNT)
    await first.leave()
    async with pool.connection() as connection:
        await connection.execute(
            "UPDATE leases SET owner = 'other', expires_at = clock_timestamp() + interval '1 hour' WHERE partition = 3"
        )
    second = join()
    await eventually(lambda: len(second.acquired) == PARTITION_COUNT - GROUP_SIZE)
    await asyncio.sleep(TTL_SECONDS)
    assert second.acquired == set(range(GROUP_SIZE, PARTITION_COUNT))
    async with pool.connection() as connection:
        await connection.execute("UPDATE leases SET owner = NULL WHERE partition = 3")
    await eventually(lambda: len(second.acquired) == PARTITION_COUNT)


async def test_a_lease_that_is_lost_and_free_again_is_given_up_before_it_is_won_anew(
    join: Callable[..., Member], pool: Pool
) -> None:
    member = join()
    await eventually(lambda: len(member.acquired) == PARTITION_COUNT)
    async with pool.connection() as connection:
        await connection.execute("UPDATE leases SET owner = NULL, epoch = epoch + 1 WHERE partition = 7")
    # Who acquires it while it believes to have it already fails in `on_acquired`.
    await eventually(lambda: ("lost", frozenset({7})) in member.events)
    await eventually(lambda: member.events[-1] == ("acquired", frozenset({7})))
    assert member.keeper.holds(7)


async def test_partitions_that_cannot_be_taken_over_are_given_back_and_tried_again(
    join: Callable[..., Member],
) -> None:
    member = join(fails=2)
    await eventually(lambda: len(member.acquired) == PARTITION_COUNT)
    assert [kind for kind, _ in member.events] == ["lost", "lost", "acquired"]
