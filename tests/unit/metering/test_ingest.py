"""New use is told from repeats and conflicts, whatever the order, batching and redelivery."""

from collections import Counter
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from services.metering.domain.ingest import first_of_each, judge
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
