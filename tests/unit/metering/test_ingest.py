"""New use is told from repeats and conflicts, whatever the order, batching and redelivery."""

from collections import Counter
from collections.abc import Sequence
from typing import Final

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from contracts.partition import partition_of
from services.metering.domain.ingest import first_of_each, judge, place
from services.metering.domain.usage import Key, Usage
from tests.unit.metering.building import usage

NUMBERS = st.lists(st.integers(0, 20), min_size=1, max_size=60)


def in_batches(deliveries: Sequence[Usage], cuts: Sequence[int]) -> list[list[Usage]]:
    """The deliveries cut into batches of the given sizes; what is left is the last one."""
    batches, start = [], 0
    for size in cuts:
        batches.append(list(deliveries[start : start + size]))
        start += size
    return [*batches, list(deliveries[start:])]


def ingested(batches: Sequence[Sequence[Usage]]) -> tuple[dict[Key, Usage], Counter[str]]:
    """What the log holds after the batches, and how the deliveries were counted."""
    log: dict[Key, Usage] = {}
    counts: Counter[str] = Counter()
    for batch in batches:
        keys = {each.key for each in first_of_each(batch)}
        judged = judge(batch, claimed={key: log[key].body_hash for key in keys if key in log})
        assert len(judged.new) + len(judged.repeats) + len(judged.conflicts) == len(batch)
        for each in judged.new:
            assert each.key not in log
            log[each.key] = each
        counts.update(new=len(judged.new), repeats=len(judged.repeats), conflicts=len(judged.conflicts))
    return log, counts


@given(numbers=NUMBERS, cuts=st.lists(st.integers(0, 10), max_size=8), data=st.data())
def test_any_order_batching_and_redelivery_gives_the_same_log(
    numbers: list[int], cuts: list[int], data: st.DataObject
) -> None:
    deliveries = [usage(number) for number in numbers]
    shuffled = data.draw(st.permutations(deliveries * 2))
    log, counts = ingested(in_batches(shuffled, cuts))
    assert log == {each.key: each for each in deliveries}
    assert counts == Counter(new=len(set(numbers)), repeats=len(shuffled) - len(set(numbers)), conflicts=0)


@given(
    reports=st.lists(st.tuples(st.integers(0, 5), st.sampled_from([b"a", b"b", b"c"])), min_size=1, max_size=40),
    cuts=st.lists(st.integers(0, 10), max_size=8),
)
def test_the_first_content_counts_and_every_other_one_is_a_conflict(
    reports: list[tuple[int, bytes]], cuts: list[int]
) -> None:
    deliveries = [usage(number, content=content) for number, content in reports]
    log, counts = ingested(in_batches(deliveries, cuts))
    first = dict(reversed(reports))
    assert {key: each.body_hash for key, each in log.items()} == {
        usage(number).key: content for number, content in first.items()
    }
    assert counts["conflicts"] == sum(content != first[number] for number, content in reports)


ALIASES: Final = {"customer 1": "acme", "customer 2": "acme/ana", "customer-3": "other"}


class World:
    """Partitions that share nothing: what each has seen and logged, and the messages on their way."""

    def __init__(self) -> None:
        self.seen: dict[Key, bytes] = {}
        self.log: list[Usage] = []
        self.sent_on: list[Usage] = []
        self.counts: Counter[str] = Counter()

    def deliver(self, batch: Sequence[Usage]) -> None:
        """What a batch does, wherever its messages came."""
        firsts = first_of_each(batch)
        claimed = {each.key: self.seen[each.key] for each in firsts if each.key in self.seen}
        judged = judge(batch, claimed=claimed)
        self.seen.update({each.key: each.body_hash for each in judged.new})
        placed = place(
            judged.new, aliases={(partition_of(subject), subject): account for subject, account in ALIASES.items()}
        )
        assert not placed.unmapped
        assert len(placed.here) + len(placed.elsewhere) == len(judged.new)
        self.log += placed.here
        by_key = {(each.partition, each.source, each.event_id): each for each in judged.new}
        for each in placed.elsewhere:
            # It is read again where it goes to: there it has its account, and that account's partition.
            assert each.account is not None
            self.sent_on.append(
                msgspec.structs.replace(
                    by_key[each.partition, each.source, each.event_id],
                    key=(each.to, each.source, each.event_id),
                    partition=each.to,
                    account=each.account,
                )
            )
        self.counts.update(new=len(placed.here), rerouted=len(placed.elsewhere))
        self.counts.update(duplicate=len(judged.repeats), conflicting=len(judged.conflicts), deliveries=len(batch))


@given(
    reports=st.lists(
        st.tuples(st.integers(0, 8), st.sampled_from([*ALIASES, "acme", "other/ana"])), min_size=1, max_size=30
    ),
    data=st.data(),
)
def test_sending_on_in_any_order_and_however_often_gives_the_same_log(
    reports: list[tuple[int, str]], data: st.DataObject
) -> None:
    """Ids are of one subject each: what is sent on may be sent again at any time, and so may the report itself."""
    came = [
        msgspec.structs.replace(
            usage(number, account=subject, event_id=f"{subject}:{number}"), account="" if " " in subject else subject
        )
        for number, subject in reports
    ]
    world = World()
    on_their_way = data.draw(st.permutations(came * 2))
    while on_their_way:
        size = data.draw(st.integers(1, len(on_their_way)))
        batch, on_their_way = on_their_way[:size], on_their_way[size:]
        world.deliver(batch)
        again = data.draw(st.integers(1, 2)) if world.sent_on else 1
        on_their_way = data.draw(st.permutations([*on_their_way, *world.sent_on * again]))
        world.sent_on.clear()
    logged = {(each.event_id, each.account, each.partition) for each in world.log}
    assert len(world.log) == len(logged)
    expected = {(each.event_id, ALIASES.get(each.subject, each.subject)) for each in came}
    assert logged == {(event_id, account, partition_of(account)) for event_id, account in expected}
    assert world.counts["new"] == len(expected)
    outcomes = ("new", "duplicate", "conflicting", "rerouted")
    assert world.counts["deliveries"] == sum(world.counts[name] for name in outcomes)


def test_a_conflict_names_the_content_that_counts() -> None:
    judged = judge([usage(1, content=b"first"), usage(1, content=b"second")], claimed={})
    (conflict,) = judged.conflicts
    assert (conflict.usage.body_hash, conflict.first_body_hash) == (b"second", b"first")


def test_a_use_of_another_source_is_another_use() -> None:
    assert len(judge([usage(1), usage(1, source="gateway")], claimed={}).new) == 2


@given(NUMBERS)
def test_keys_are_claimed_in_one_order(numbers: list[int]) -> None:
    firsts = first_of_each(usage(number) for number in numbers)
    assert [each.key for each in firsts] == sorted({usage(number).key for number in numbers})
