"""Which new use is charged now and which must wait, and how charges are bundled for the ledger."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from operator import attrgetter
from typing import Final, Literal

import msgspec

from contracts.metering import LINES_MAX
from contracts.pricing import Rated
from services.metering.domain.prices import NoPrice
from services.metering.domain.usage import Usage

# What a use waits for: that its account is opened, that it gets a price, or that its subject is mapped to an account.
Reason = Literal["unattributed", "unpriced", "unmapped"]

_STEP: Final = timedelta(microseconds=1)
_IN_ORDER_OF_USE: Final = attrgetter("usage.occurred_at", "usage.source", "usage.event_id")


class Charge(msgspec.Struct, frozen=True, gc=False):
    """A use and what it costs."""

    usage: Usage
    rated: Rated


@dataclass(frozen=True, slots=True)
class SetAside:
    """A use that is not charged yet. `key` is what it waits for: an account, a price (NoPrice), or a subject's alias.

    It is logged, unless it waits for an alias: then nobody knows whose it is.
    """

    usage: Usage
    reason: Reason
    key: str


@dataclass(frozen=True, slots=True)
class Decided:
    """Every use of a batch is in exactly one of the two."""

    charges: Sequence[Charge]
    set_aside: Sequence[SetAside]


@dataclass(frozen=True, slots=True)
class Bundle:
    """Charges of one partition under one number."""

    partition: int
    number: int
    recorded_at: datetime
    charges: Sequence[Charge]


@dataclass(frozen=True, slots=True)
class Head:
    """Where a partition stands: the number of its last message to the ledger, and the last time it recorded."""

    outbox_number: int
    recorded_at: datetime


def decide_charges(priced: Iterable[tuple[Usage, Rated | NoPrice]], *, open_accounts: Collection[str]) -> Decided:
    """Charge what has a price and an open account; set the rest aside."""
    charges: list[Charge] = []
    set_aside: list[SetAside] = []
    for usage, price in priced:
        if usage.account not in open_accounts:
            set_aside.append(SetAside(usage=usage, reason="unattributed", key=usage.account))
        elif isinstance(price, Rated):
            charges.append(Charge(usage, price))
        else:
            set_aside.append(SetAside(usage=usage, reason="unpriced", key=price.key))
    return Decided(charges=charges, set_aside=set_aside)


def advance(head: Head, *, now: datetime) -> datetime:
    """The time a partition records next: never the same twice, never backwards, whatever the clock does."""
    return max(now, head.recorded_at + _STEP)


def bundle(
    charges: Iterable[Charge], *, heads: Mapping[int, Head], recorded_at: Mapping[int, datetime]
) -> list[Bundle]:
    """Charges as bundles: by partition, lines in the order of their use, numbers continuing the partition's head."""
    by_partition: dict[int, list[Charge]] = {}
    for charge in charges:
        by_partition.setdefault(charge.usage.partition, []).append(charge)
    bundles = []
    for partition in sorted(by_partition):
        lines = sorted(by_partition[partition], key=_IN_ORDER_OF_USE)
        number = heads[partition].outbox_number
        for start in range(0, len(lines), LINES_MAX):
            number += 1
            bundles.append(
                Bundle(
                    partition=partition,
                    number=number,
                    recorded_at=recorded_at[partition],
                    charges=lines[start : start + LINES_MAX],
                )
            )
    return bundles
