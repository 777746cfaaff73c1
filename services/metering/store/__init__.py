"""The statements of metering, each on a whole batch. Takes a connection, and never commits.

Locks are taken in one order by everybody, so that nobody deadlocks: heads in the order of partitions, then keys of
`seen`, then the rest, each in key order.
"""

from services.metering.store.aliases import (
    Alias,
    add_alias,
    delete_alias,
    find_alias,
    find_aliases,
    find_pending_aliases,
    list_aliases,
    settle_alias,
)
from services.metering.store.answers import answer, forget_answers, take_answers
from services.metering.store.claims import claim, find_seen
from services.metering.store.conflicts import add_conflicts
from services.metering.store.counts import COUNTERS, Counts, count
from services.metering.store.directory import add_to_directory, find_open
from services.metering.store.executing import Connection
from services.metering.store.heads import lock_heads, move_heads
from services.metering.store.log import FIRST_MONTH, ChargedLine, LoggedUsage, ensure_months, log_charges, log_usage
from services.metering.store.periods import find_counters, find_credit, write_counters
from services.metering.store.prices import StoredVersion, add_price_version, find_price_versions
from services.metering.store.reroutes import add_reroutes, delete_reroutes, find_reroutes
from services.metering.store.waiting import (
    TakenUsage,
    find_missing_prices,
    find_unattributed,
    find_unpriced,
    set_aside,
    take_waiting,
    wait_for_price,
)

__all__ = [
    "COUNTERS",
    "FIRST_MONTH",
    "Alias",
    "ChargedLine",
    "Connection",
    "Counts",
    "LoggedUsage",
    "StoredVersion",
    "TakenUsage",
    "add_alias",
    "add_conflicts",
    "add_price_version",
    "add_reroutes",
    "add_to_directory",
    "answer",
    "claim",
    "count",
    "delete_alias",
    "delete_reroutes",
    "ensure_months",
    "find_alias",
    "find_aliases",
    "find_counters",
    "find_credit",
    "find_missing_prices",
    "find_open",
    "find_pending_aliases",
    "find_price_versions",
    "find_reroutes",
    "find_seen",
    "find_unattributed",
    "find_unpriced",
    "forget_answers",
    "list_aliases",
    "lock_heads",
    "log_charges",
    "log_usage",
    "move_heads",
    "set_aside",
    "settle_alias",
    "take_answers",
    "take_waiting",
    "wait_for_price",
    "write_counters",
]
