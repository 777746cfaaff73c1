"""New ids from this machine's time and randomness. Domain code never calls it: its ids are handed in or derived."""

import os
import time
from uuid import UUID

from contracts.ids import Kind, make_id, uuid7
from contracts.partition import partition_of


def new_uuid7() -> UUID:
    """A UUIDv7 of the present."""
    return uuid7(milliseconds=time.time_ns() // 1_000_000, entropy=os.urandom(10))


def new_id(kind: Kind, *, account: str) -> str:
    """The id of a new `kind` in the partition of `account`: `hold_07_<uuidv7>`."""
    return make_id(kind, partition=partition_of(account), uuid=new_uuid7())


def new_hold_id(account: str) -> str:
    """The id of a new hold on `account`, made by whoever is going to place it."""
    return new_id("hold", account=account)
