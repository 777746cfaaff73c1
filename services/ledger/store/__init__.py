"""The statements of the ledger, set-wise: heads, what a batch needs, what it decided. Only `write` commits."""

from services.ledger.store.due import Begun, begun_lots, due_accounts, oldest_due, overdue_holds
from services.ledger.store.executing import Connection, Row
from services.ledger.store.heads import take_heads
from services.ledger.store.loading import TooEntangled, load
from services.ledger.store.needs import OVERDUE_READ_MAX, Loaded, Needs
from services.ledger.store.writing import HeadMoved, Signature, Written, write

__all__ = [
    "OVERDUE_READ_MAX",
    "Begun",
    "Connection",
    "HeadMoved",
    "Loaded",
    "Needs",
    "Row",
    "Signature",
    "TooEntangled",
    "Written",
    "begun_lots",
    "due_accounts",
    "load",
    "oldest_due",
    "overdue_holds",
    "take_heads",
    "write",
]
