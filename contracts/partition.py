"""Partitions: the unit of order, ownership, chain, transaction and placement. Computable from an account id alone."""

from functools import lru_cache
from typing import Annotated
from zlib import crc32

from pydantic import Field

from contracts.accounts import root

PARTITION_COUNT = 64
# So many have one owner and one consumer of their charges: a consumer costs NATS some synced writes a second, whatever
# comes through it. As many processes as there are groups can share them.
GROUP_SIZE = 8
GROUP_COUNT = PARTITION_COUNT // GROUP_SIZE

Partition = Annotated[int, Field(ge=0, lt=PARTITION_COUNT)]


@lru_cache(maxsize=65_536)
def partition_of(account: str) -> int:
    """The partition of an account: `crc32(root segment) % 64`, so that a whole tree shares one."""
    return crc32(root(account).encode()) % PARTITION_COUNT


def group_of(partition: int) -> int:
    """The group of a partition: neighbours."""
    return partition // GROUP_SIZE


def partitions_of(group: int) -> range:
    """The partitions of a group."""
    return range(group * GROUP_SIZE, (group + 1) * GROUP_SIZE)


def token(partition: int) -> str:
    """The partition as it stands in subjects and ids: two digits."""
    return f"{partition:02d}"
