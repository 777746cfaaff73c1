"""Scrip's client: usage is reported and never lost, holds are placed before work, limits are told in headers."""

from scrip_client.amounts import Amount
from scrip_client.client import AsyncScrip, Scrip
from scrip_client.errors import (
    AccountNotOpen,
    Away,
    ClientClosed,
    HoldEnded,
    InsufficientFunds,
    InvalidEvent,
    LedgerError,
    NotAccepted,
    NotDelivered,
    Refused,
    RequestRejected,
    ScripError,
    SpoolFailed,
    SpoolFull,
)
from scrip_client.events import UsageEvent, model_used, new_hold_id, new_id
from scrip_client.ledger import AsyncLedger, Balance, Hold, Ledger, Leg, Remaining, Wallet
from scrip_client.recorder import Status
from scrip_client.spool import RefusedEvent

__all__ = [
    "AccountNotOpen",
    "Amount",
    "AsyncLedger",
    "AsyncScrip",
    "Away",
    "Balance",
    "ClientClosed",
    "Hold",
    "HoldEnded",
    "InsufficientFunds",
    "InvalidEvent",
    "Ledger",
    "LedgerError",
    "Leg",
    "NotAccepted",
    "NotDelivered",
    "Refused",
    "RefusedEvent",
    "Remaining",
    "RequestRejected",
    "Scrip",
    "ScripError",
    "SpoolFailed",
    "SpoolFull",
    "Status",
    "UsageEvent",
    "Wallet",
    "model_used",
    "new_hold_id",
    "new_id",
]
