"""Ids of what Scrip makes: `<kind>_<partition>_<uuidv7>`, time-sortable, and routable without a lookup."""

import re
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import Annotated, Literal
from uuid import UUID

from pydantic import AfterValidator, Field
from pydantic.config import JsonDict

from contracts.partition import PARTITION_COUNT, token

Kind = Literal["hold", "lot", "txn", "charge"]

_UUID7 = "[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
_ID = re.compile(rf"(hold|lot|txn|charge)_([0-9]{{2}})_({_UUID7})")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def make_id(kind: Kind, *, partition: int, uuid: UUID) -> str:
    """The id of a `kind` that lives in `partition`."""
    return f"{kind}_{token(partition)}_{uuid}"


def partition_of_id(text: str) -> int:
    """The partition an id names; ValueError if it is not an id of ours."""
    match = _ID.fullmatch(text)
    if match is None or int(match[2]) >= PARTITION_COUNT:
        raise ValueError(f"{text!r} is not an id of the form kind_pp_uuidv7")
    return int(match[2])


def uuid7(*, milliseconds: int, entropy: bytes) -> UUID:
    """A UUIDv7 (RFC 9562) of a Unix time in milliseconds and 10 bytes of entropy."""
    value = (milliseconds & (1 << 48) - 1) << 80 | int.from_bytes(entropy[:10], "big")
    value = value & ~(0xF << 76) | 0x7 << 76
    return UUID(int=value & ~(0x3 << 62) | 0x2 << 62)


def derived_uuid7(*, recorded_at: datetime, partition: int, batch: int, position: int) -> UUID:
    """A UUIDv7 that follows from an entry's place in the journal, so that a decision needs no random source.

    The place is unique, and gapless within its partition: the hash only spreads it over the 74 free bits.
    """
    entropy = blake2b(f"{partition}/{batch}/{position}".encode(), digest_size=10).digest()
    return uuid7(milliseconds=(recorded_at - _EPOCH) // timedelta(milliseconds=1), entropy=entropy)


def _check_kind(kind: Kind) -> AfterValidator:
    def check(text: str) -> str:
        partition_of_id(text)
        if not text.startswith(f"{kind}_"):
            raise ValueError(f"{text!r} is not the id of a {kind}")
        return text

    return AfterValidator(check)


def _described(kind: Kind) -> JsonDict:
    return {
        "pattern": f"^{kind}_[0-6][0-9]_{_UUID7}$",
        "examples": [f"{kind}_07_01980000-0000-7000-8000-000000000000"],
    }


HoldId = Annotated[str, Field(max_length=64, json_schema_extra=_described("hold")), _check_kind("hold")]
LotId = Annotated[str, Field(max_length=64, json_schema_extra=_described("lot")), _check_kind("lot")]
TransactionId = Annotated[str, Field(max_length=64, json_schema_extra=_described("txn")), _check_kind("txn")]
ChargeId = Annotated[str, Field(max_length=64, json_schema_extra=_described("charge")), _check_kind("charge")]
