"""The tamper evidence: each entry's hash covers all its columns and the hash of the entry before it."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Final

import msgspec

from services.ledger.domain.entries import Details, Entry

GENESIS: Final = bytes(32)

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_encode = msgspec.json.Encoder(order="sorted").encode


def details_text(details: Details | None) -> str | None:
    """The canonical JSON of an entry's details: what the journal stores, and the chain covers."""
    return None if details is None else _encode(details).decode()


def entry_hash(previous: bytes, *, partition: int, entry: Entry, details: str | None) -> bytes:
    """SHA-256 of the hash before, and every column in the journal's order, each with its length before it."""
    return sha256(
        previous
        + length_prefixed(
            (
                str(partition),
                str(entry.batch),
                str(entry.position),
                entry.transaction,
                entry.kind,
                entry.account,
                entry.unit,
                entry.lot,
                entry.lot_kind,
                entry.hold,
                str(entry.posted),
                str(entry.held),
                str(entry.frozen),
                microseconds(entry.occurred_at),
                microseconds(entry.recorded_at),
                details,
            )
        )
    ).digest()


def length_prefixed(fields: Sequence[str | None]) -> bytes:
    """Fields one after another, unambiguous whatever they contain: `<bytes>:<field>`, `-` for one that is absent."""
    parts = []
    for field in fields:
        if field is None:
            parts.append(b"-")
        else:
            text = field.encode()
            parts.append(b"%d:%b" % (len(text), text))
    return b"".join(parts)


def microseconds(time: datetime) -> str:
    """A time as whole microseconds since 1970, UTC."""
    return str((time - _EPOCH) // _MICROSECOND)
