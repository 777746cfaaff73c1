"""Telling new use from repeats and conflicts, and where it belongs, whatever the order, batching or redelivery."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from contracts.partition import partition_of
from services.metering.domain.usage import Key, Reroute, Usage, reroute

# A subject, with its partition.
Subject = tuple[int, str]


@dataclass(frozen=True, slots=True)
class Conflict:
    """A report under the key of another one, with another content."""

    usage: Usage
    first_body_hash: bytes


@dataclass(frozen=True, slots=True)
class Judged:
    """A batch sorted out. Every usage of the batch is in exactly one of the three."""

    new: Sequence[Usage]
    repeats: Sequence[Usage]
    conflicts: Sequence[Conflict]


def first_of_each(usages: Iterable[Usage]) -> list[Usage]:
    """The first usage of every key, in key order: the order in which keys must be claimed, so that nobody deadlocks."""
    first: dict[Key, Usage] = {}
    for usage in usages:
        first.setdefault(usage.key, usage)
    return [first[key] for key in sorted(first)]


def judge(usages: Sequence[Usage], *, claimed: Mapping[Key, bytes]) -> Judged:
    """Sort out a batch. `claimed` has the body hash of every key of it that was reported before the batch."""
    if not claimed and len({usage.key for usage in usages}) == len(usages):
        return Judged(new=usages, repeats=(), conflicts=())
    body_hashes = dict(claimed)
    new, repeats, conflicts = [], [], []
    for usage in usages:
        key = usage.key
        first_body_hash = body_hashes.get(key)
        if first_body_hash is None:
            body_hashes[key] = usage.body_hash
            new.append(usage)
        elif first_body_hash == usage.body_hash:
            repeats.append(usage)
        else:
            conflicts.append(Conflict(usage=usage, first_body_hash=first_body_hash))
    return Judged(new=new, repeats=repeats, conflicts=conflicts)


@dataclass(frozen=True, slots=True)
class Placed:
    """Where new use belongs: it is logged here, or sent on, or waits for an alias. Every use is in one of the three."""

    here: Sequence[Usage]
    elsewhere: Sequence[Reroute]
    unmapped: Sequence[Usage]


def place(usages: Sequence[Usage], *, aliases: Mapping[Subject, str]) -> Placed:
    """Sort use by where its account lives. An alias counts before an account of the same name."""
    if not aliases and all(usage.account for usage in usages):
        return Placed(here=usages, elsewhere=(), unmapped=())
    here, elsewhere, unmapped = [], [], []
    for usage in usages:
        account = None if usage.is_mapped else aliases.get((usage.partition, usage.subject))
        if account is not None:
            to = partition_of(account)
            if to == usage.partition:
                here.append(msgspec.structs.replace(usage, account=account))
            else:
                elsewhere.append(reroute(usage, partition=usage.partition, to=to, account=account))
        elif usage.account:
            here.append(usage)
        else:
            unmapped.append(usage)
    return Placed(here=here, elsewhere=elsewhere, unmapped=unmapped)
