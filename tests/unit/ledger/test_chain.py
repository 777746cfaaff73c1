"""Laws of the chain: every column counts, and fields cannot run into each other."""

from datetime import timedelta, timezone

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ledger import tables
from services.ledger.domain.chain import GENESIS, columns_hash, entry_columns
from services.ledger.domain.entries import Entry, Noted
from tests.unit.ledger.book import BEGIN, PARTITION

ENTRY = Entry(
    batch=2,
    position=3,
    transaction="01980000-0000-7000-8000-000000000000",
    recorded_at=BEGIN,
    kind="charged",
    account="acme",
    occurred_at=BEGIN,
    unit="usd",
    lot="01980000-0000-7000-8000-000000000001",
    lot_kind="purchase",
    hold="01980000-0000-7000-8000-000000000002",
    posted=-5,
    held=-4,
    frozen=0,
    details=None,
)

columns = st.lists(
    st.none()
    | st.text()
    | st.integers(-(2**63), 2**63 - 1)
    | st.integers(-(2**40), 2**50).map(lambda count: BEGIN + timedelta(microseconds=count)),
    max_size=4,
)


@given(one=columns, other=columns)
def test_only_the_same_columns_have_the_same_hash(one: list[object], other: list[object]) -> None:
    assert (columns_hash(GENESIS, tuple(one)) == columns_hash(GENESIS, tuple(other))) == (one == other)


def test_a_time_counts_to_the_microsecond_and_not_by_its_zone() -> None:
    elsewhere = BEGIN.astimezone(timezone(timedelta(hours=5, minutes=30)))
    assert columns_hash(GENESIS, (elsewhere,)) == columns_hash(GENESIS, (BEGIN,))
    assert columns_hash(GENESIS, (BEGIN + timedelta(microseconds=1),)) != columns_hash(GENESIS, (BEGIN,))


def test_the_form_is_what_it_was() -> None:
    """What is in a journal stays provable: whoever changes the form has to say so here."""
    assert (
        _hash(msgspec.structs.replace(ENTRY, details=Noted())).hex()
        == "57037396e5ea1720e98b8123c08407d6c87a0fe06786657a03a4c7fc4b238d94"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"batch": 3},
        {"position": 4},
        {"transaction": "01980000-0000-7000-8000-000000000009"},
        {"recorded_at": BEGIN.replace(microsecond=1)},
        {"kind": "hold_settled"},
        {"account": "acme/ana"},
        {"occurred_at": BEGIN.replace(microsecond=1)},
        {"unit": None},
        {"lot": None},
        {"lot_kind": "debt"},
        {"hold": None},
        {"posted": 5},
        {"held": 4},
        {"frozen": 1},
        {"details": Noted("why")},
    ],
)
def test_every_column_enters_the_hash(change: dict[str, object]) -> None:
    assert _hash(msgspec.structs.replace(ENTRY, **change)) != _hash(ENTRY)


def test_what_is_beside_the_entry_enters_the_hash() -> None:
    assert _hash(ENTRY, previous=bytes([1] * 32)) != _hash(ENTRY)
    assert _hash(ENTRY, partition=PARTITION + 1) != _hash(ENTRY)


def test_the_columns_are_those_of_the_journal() -> None:
    names = [column.name.removesuffix("_id") for column in tables.journal.columns]
    found = dict(zip(names, (*entry_columns(ENTRY, partition=PARTITION), b"hash"), strict=True))
    assert found == {**msgspec.structs.asdict(ENTRY), "partition": PARTITION, "hash": b"hash"}


def _hash(entry: Entry, *, previous: bytes = GENESIS, partition: int = PARTITION) -> bytes:
    return columns_hash(previous, entry_columns(entry, partition=partition))
