"""Load, decide, write, stage: one transaction for a batch of commands and charge bundles of the partitions owned."""

from services.ledger.handlers.items import (
    COMMAND_COST,
    BundleItem,
    CommandItem,
    Conflicting,
    Item,
    ListItem,
    NotLookedUp,
    NotOwner,
    OutOfOrder,
    Replied,
    Result,
    SweepItem,
    Swept,
    Taken,
    TracedCharge,
    cost_of,
)
from services.ledger.handlers.ledger import Ledger
from services.ledger.handlers.needs import BATCH_SECONDS_MAX

__all__ = [
    "BATCH_SECONDS_MAX",
    "COMMAND_COST",
    "BundleItem",
    "CommandItem",
    "Conflicting",
    "Item",
    "Ledger",
    "ListItem",
    "NotLookedUp",
    "NotOwner",
    "OutOfOrder",
    "Replied",
    "Result",
    "SweepItem",
    "Swept",
    "Taken",
    "TracedCharge",
    "cost_of",
]
