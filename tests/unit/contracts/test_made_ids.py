"""Laws of the ids Scrip makes: they name their partition, sort by time, and follow from their place."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import get_args
from uuid import RFC_4122, UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from contracts.ids import ChargeId, HoldId, Kind, LotId, TransactionId, derived_uuid7, make_id, partition_of_id, uuid7
from contracts.partition import PARTITION_COUNT
from tests.unit.contracts.strategies import partitions, uuids7

KINDS: tuple[Kind, ...] = get_args(Kind)
TYPES: dict[Kind, TypeAdapter[str]] = {
    "hold": TypeAdapter(HoldId),
    "lot": TypeAdapter(LotId),
    "txn": TypeAdapter(TransactionId),
    "charge": TypeAdapter(ChargeId),
}
milliseconds_of_time = st.integers(0, 2**48 - 1)
entropies = st.binary(min_size=10, max_size=10)


@given(st.sampled_from(KINDS), partitions, uuids7)
def test_an_id_names_its_partition_and_kind(kind: Kind, partition: int, uuid: UUID) -> None:
    made = make_id(kind, partition=partition, uuid=uuid)
    assert partition_of_id(made) == partition
    for other, adapter in TYPES.items():
        if other == kind:
            assert adapter.validate_python(made) == made
        else:
            with pytest.raises(ValidationError):
                adapter.validate_python(made)


@given(st.text() | st.from_regex(r"(hold|lot|txn|charge)_\d\d_[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\n?"))
def test_any_text_is_an_id_or_a_value_error(text: str) -> None:
    try:
        partition = partition_of_id(text)
    except ValueError:
        return
    assert 0 <= partition < PARTITION_COUNT
    assert text.isascii()
    kind = text.split("_", maxsplit=1)[0]
    assert any(kind == known and text == make_id(known, partition=partition, uuid=UUID(text[-36:])) for known in KINDS)


@pytest.mark.parametrize(
    "text",
    [
        "hold_64_01980000-0000-7000-8000-000000000000",
        "hold_7_01980000-0000-7000-8000-000000000000",
        "hold_٠٧_01980000-0000-7000-8000-000000000000",
        "hold_07_01980000-0000-4000-8000-000000000000",
        "hold_07_01980000-0000-7000-c000-000000000000",
        "hold_07_01980000-0000-7000-8000-00000000000A",
        "hold_07_01980000-0000-7000-8000-000000000000\n",
        "wallet_07_01980000-0000-7000-8000-000000000000",
    ],
)
def test_what_is_nearly_an_id_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        partition_of_id(text)


@given(milliseconds_of_time, entropies)
def test_a_uuid_is_of_version_7_and_carries_its_time(milliseconds: int, entropy: bytes) -> None:
    made = uuid7(milliseconds=milliseconds, entropy=entropy)
    assert (made.version, made.variant) == (7, RFC_4122)
    assert made.int >> 80 == milliseconds


@given(entropies, entropies)
def test_entropy_is_kept_but_for_the_six_fixed_bits(one: bytes, other: bytes) -> None:
    fixed = 0xF << 76 | 0x3 << 62
    made, known = uuid7(milliseconds=0, entropy=one).int & ~fixed, int.from_bytes(one, "big") & ~fixed
    assert made == known
    same = known == int.from_bytes(other, "big") & ~fixed
    assert (uuid7(milliseconds=0, entropy=other).int & ~fixed == made) == same


@given(st.lists(st.tuples(milliseconds_of_time, entropies), min_size=2), partitions)
def test_ids_of_a_kind_and_partition_sort_by_time(made: list[tuple[int, bytes]], partition: int) -> None:
    ids = sorted(
        (make_id("txn", partition=partition, uuid=uuid7(milliseconds=time, entropy=entropy)), time)
        for time, entropy in made
    )
    assert all(earlier[1] <= later[1] for earlier, later in pairwise(ids))


places = st.tuples(partitions, st.integers(1, 2**40), st.integers(1, 10_000))
recorded_times = st.datetimes(datetime(1970, 1, 1), datetime(2199, 12, 31)).map(  # noqa: DTZ001 - naive bounds wanted
    lambda time: time.replace(tzinfo=UTC)
)


@given(recorded_times, st.sets(places, min_size=2, max_size=20))
def test_derived_ids_follow_from_their_place_and_differ(
    recorded_at: datetime, found: set[tuple[int, int, int]]
) -> None:
    def derive(place: tuple[int, int, int]) -> UUID:
        partition, batch, position = place
        return derived_uuid7(recorded_at=recorded_at, partition=partition, batch=batch, position=position)

    derived = [derive(place) for place in found]
    assert derived == [derive(place) for place in found]
    assert len(set(derived)) == len(found)
    assert {each.version for each in derived} == {7}
    assert {each.int >> 80 for each in derived} == {
        (recorded_at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
    }


def test_a_derived_id_never_changes() -> None:
    # Replay derives again what was derived years ago.
    recorded_at = datetime(2025, 7, 1, 12, 0, 0, 1, tzinfo=UTC)
    derived = derived_uuid7(recorded_at=recorded_at, partition=7, batch=41, position=3)
    assert str(derived) == "0197c5db-b600-79f9-a782-7c22a18c07bc"
