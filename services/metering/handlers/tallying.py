"""What became of what, by partition and source, as the counters are told."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import assert_never

from services.metering.domain.charging import Decided, Reason
from services.metering.domain.ingest import Conflict, Judged, Placed
from services.metering.domain.usage import Reroute, Usage
from services.metering.store import COUNTERS, Counts

Tally = dict[tuple[int, str], Counts]


def counts_of(tally: Tally, of: Usage | Reroute) -> Counts:
    """The counts that a use goes into."""
    key = (of.partition, of.source)
    if (counts := tally.get(key)) is None:
        counts = tally[key] = Counts()
    return counts


def total(tally: Tally) -> Counts:
    """The sums over partitions and sources."""
    return Counts(*(sum(getattr(counts, name) for counts in tally.values()) for name in COUNTERS))


def tally_new(placed: Placed, decided: Decided, tally: Tally) -> None:
    """Count what is new, and what of it is charged, waits, or is sent on."""
    for key, count in _by_source(placed.here).items():
        tally.setdefault(key, Counts()).new += count
    for usage in placed.unmapped:
        counts = counts_of(tally, usage)
        counts.new += 1
        counts.unmapped += 1
    for rerouted in placed.elsewhere:
        # Not new here: it is where it goes to.
        counts_of(tally, rerouted).rerouted += 1
    for key, count in _by_source(charge.usage for charge in decided.charges).items():
        tally.setdefault(key, Counts()).charged += count
    for each in decided.set_aside:
        counts = counts_of(tally, each.usage)
        match each.reason:
            case "unattributed":
                counts.unattributed += 1
            case "unpriced":
                counts.unpriced += 1
            case "unmapped":
                counts.unmapped += 1
            case _:
                assert_never(each.reason)


def tally_judged(judged: Judged, new_conflicts: Sequence[Conflict], tally: Tally) -> None:
    """A conflict counts once; the same content once more is a repeat of it."""
    for usage in judged.repeats:
        counts_of(tally, usage).duplicate += 1
    for conflict in judged.conflicts:
        counts_of(tally, conflict.usage).duplicate += 1
    for conflict in new_conflicts:
        counts = counts_of(tally, conflict.usage)
        counts.conflicting += 1
        counts.duplicate -= 1


def wait_no_more(counts: Counts, was: Reason) -> None:
    """Count a use out of what waits."""
    match was:
        case "unattributed":
            counts.unattributed -= 1
        case "unpriced":
            counts.unpriced -= 1
        case "unmapped":
            counts.unmapped -= 1
        case _:
            assert_never(was)


def _by_source(usages: Iterable[Usage]) -> Mapping[tuple[int, str], int]:
    return Counter([(usage.partition, usage.source) for usage in usages])
