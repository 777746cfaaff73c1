"""Access keys: how one is made from random bytes, which account is its own, when it is valid, what it may be capped in.

Keys of a request that is repeated under one idempotency key have the same id, so that the ledger sees one account.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Final

from contracts.accounts import DEPTH_MAX, check_account, path
from contracts.money import Amount, Unit, parse_amount
from services.keyvault.domain.errors import (
    AccountTooDeep,
    CapInvalid,
    CapUnitIsMoney,
    CapUnitUnknown,
    KeyDisabled,
    KeyExpired,
)
from services.keyvault.domain.secret import Secret

KEY_BYTES: Final = 32
ID_BYTES: Final = 10
_ID_LENGTH: Final = 16
_KEY_LENGTH: Final = 43

_DIGITS: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ID_DIGITS: Final = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class KeyState:
    """What of a key decides whether it may be used."""

    key_id: str
    disabled_at: datetime | None
    expires_at: datetime | None


def new_key_id(entropy: bytes) -> str:
    """`key_…` of ten random bytes."""
    return f"key_{_text(entropy[:ID_BYTES], digits=_ID_DIGITS, length=_ID_LENGTH)}"


def derived_key_id(*, principal: str, idempotency_key: str) -> str:
    """The id of the key that a principal asks for under an idempotency key, however often it asks."""
    return new_key_id(sha256(f"{len(principal)}:{principal}:{idempotency_key}".encode()).digest())


def new_access_key(*, key_id: str, entropy: bytes) -> Secret:
    """`sk-scrip-<id>-<43 characters>`: 32 random bytes in base 62."""
    if len(entropy) != KEY_BYTES:
        raise ValueError(f"an access key takes {KEY_BYTES} random bytes, not {len(entropy)}")
    return Secret(f"sk-scrip-{key_id.removeprefix('key_')}-{_text(entropy, digits=_DIGITS, length=_KEY_LENGTH)}")


def own_account(*, holder: str, key_id: str) -> str | AccountTooDeep:
    """The key's own account, one below its holder's. AccountTooDeep if there is no room for it."""
    account = f"{holder}/{key_id}"
    if len(path(holder)) >= DEPTH_MAX:
        return AccountTooDeep(account=holder, depth_max=DEPTH_MAX - 1)
    try:
        return check_account(account)
    except ValueError:
        return AccountTooDeep(account=holder, depth_max=DEPTH_MAX - 1)


def check_caps(
    caps: Sequence[Amount], *, units: Mapping[str, Unit]
) -> CapUnitUnknown | CapUnitIsMoney | CapInvalid | None:
    """Why a key cannot have these caps. Money is none: it would be paid from the key's account, not limited by it."""
    seen: set[str] = set()
    for cap in caps:
        unit = units.get(cap.unit)
        if unit is None:
            return CapUnitUnknown(unit=cap.unit)
        if unit.kind == "money":
            return CapUnitIsMoney(unit=cap.unit)
        try:
            value = parse_amount(cap.amount, unit)
        except ValueError:
            return CapInvalid(unit=cap.unit, reason="the amount is not one of the unit")
        if value < 1:
            return CapInvalid(unit=cap.unit, reason="a cap is more than 0; disable a key that may do nothing")
        if cap.unit in seen:
            return CapInvalid(unit=cap.unit, reason="it is given twice")
        seen.add(cap.unit)
    return None


def why_unusable(key: KeyState, *, at: datetime) -> KeyDisabled | KeyExpired | None:
    """Why a key may not be used at a moment."""
    if key.disabled_at is not None:
        return KeyDisabled(key_id=key.key_id)
    if key.expires_at is not None and key.expires_at <= at:
        return KeyExpired(key_id=key.key_id)
    return None


def _text(number: bytes, *, digits: str, length: int) -> str:
    value = int.from_bytes(number, "big")
    found = []
    for _ in range(length):
        value, digit = divmod(value, len(digits))
        found.append(digits[digit])
    return "".join(reversed(found))
