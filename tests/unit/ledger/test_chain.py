"""Laws of the chain: every column counts, and fields cannot run into each other."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ledger.domain.chain import GENESIS, entry_hash, length_prefixed
from services.ledger.domain.entries import Entry
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

fields = st.lists(st.none() | st.text(), max_size=4)


@given(one=fields, other=fields)
def test_only_the_same_fields_have_the_same_form(one: list[str | None], other: list[str | None]) -> None:
    assert (length_prefixed(one) == length_prefixed(other)) == (one == other)


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
    ],
)
def test_every_column_enters_the_hash(change: dict[str, object]) -> None:
    changed = msgspec.structs.replace(ENTRY, **change)
    assert entry_hash(GENESIS, partition=PARTITION, entry=changed, details=None) != entry_hash(
        GENESIS, partition=PARTITION, entry=ENTRY, details=None
    )


def test_what_is_beside_the_entry_enters_the_hash() -> None:
    same = entry_hash(GENESIS, partition=PARTITION, entry=ENTRY, details=None)
    assert entry_hash(bytes([1] * 32), partition=PARTITION, entry=ENTRY, details=None) != same
    assert entry_hash(GENESIS, partition=PARTITION + 1, entry=ENTRY, details=None) != same
    assert entry_hash(GENESIS, partition=PARTITION, entry=ENTRY, details="") != same
