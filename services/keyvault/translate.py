"""Between keyvault's words and others': the ring's file, the catalogue, bodies, the ledger's replies, facts."""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Annotated, Any, Final, Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from contracts import keyvault as words
from contracts import ledger
from contracts.keyvault import KeyFact, KeyRefused, key_fact_subject
from contracts.money import Amount, AmountText, Unit, UnitName, parse_amount
from services.keyvault.domain.errors import (
    ConsentMissing,
    KeyDisabled,
    KeyExpired,
    KeyUnknown,
    NoOwnSecret,
    NoPlatformSecret,
    PolicyForbids,
    SecretUndecryptable,
)
from services.keyvault.domain.keyring import Keyring
from services.kit.outbox import OutboxRow
from services.kit.query import UNKNOWN_PARAMETER

# What Postgres has no text for, and what has no place in a name.
PLAIN_TEXT: Final = r"^[^\x00-\x1f\x7f]+$"

_encode: Final = msgspec.json.Encoder(order="sorted").encode


# The key ring's file --------------------------------------------------------------------------------------------------


class InvalidKeyring(ValueError):
    """The key ring's file cannot be used; the message says why, without its contents."""


class _KeyringText(msgspec.Struct, forbid_unknown_fields=True):
    current: int
    keys: dict[str, str]


def read_keyring(text: bytes, *, name: str) -> Keyring:
    """`{"current": 2, "keys": {"1": "<base64 of 32 bytes>", "2": …}}`. Raises InvalidKeyring."""
    try:
        read = msgspec.json.decode(text, type=_KeyringText)
        keys = {_version(version): base64.b64decode(key, validate=True) for version, key in read.keys.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, binascii.Error, ValueError):
        # Not the reason itself: it may repeat the input.
        raise InvalidKeyring(f"{name} is not a key ring: {{current, keys: {{version: base64 of 32 bytes}}}}") from None
    try:
        return Keyring(current=read.current, keys=keys)
    except ValueError as error:
        raise InvalidKeyring(f"{name}: {error}") from None


def keyring_text(ring: Keyring) -> bytes:
    """The ring as it stands in its file."""
    keys = {str(version): base64.b64encode(ring.keys[version]).decode() for version in ring.versions}
    return msgspec.json.format(msgspec.json.encode(_KeyringText(current=ring.current, keys=keys)), indent=2) + b"\n"


def _version(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,8}", text):
        raise ValueError("a version is a positive integer")
    return int(text)


# The catalogue --------------------------------------------------------------------------------------------------------


class StartingGrant(BaseModel):
    """What a holder is granted once, with its first access key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    unit: UnitName
    amount: AmountText
    kind: Literal["plan", "promo", "bonus", "adjustment"] = "promo"


class NewHolder(BaseModel):
    """The catalogue's section `keyvault`: what a holder's account gets when its first access key is made."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    wallets: Annotated[tuple[UnitName, ...], Field(max_length=ledger.WALLETS_MAX)] = ("usd",)
    starting_grant: StartingGrant | None = None


def read_new_holder(section: Any, *, units: Mapping[str, Unit]) -> NewHolder:
    """The section `keyvault` of the catalogue. Raises ValueError, which names the place."""
    read = NewHolder.model_validate(section)
    for name in read.wallets:
        if name not in units:
            raise ValueError(f"keyvault.wallets: the catalogue has no unit {name!r}")
    grant = read.starting_grant
    if grant is not None:
        if grant.unit not in read.wallets:
            raise ValueError(f"keyvault.starting_grant: {grant.unit} is none of keyvault.wallets")
        if parse_amount(grant.amount, units[grant.unit]) <= 0:
            raise ValueError("keyvault.starting_grant: its amount is more than 0")
    return read


# Bodies ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong with a request. `pointer` names only members that we know."""

    pointer: str
    code: str
    detail: str


# Found by our own checks, whose messages repeat the value: said without it.
_OWN_CHECK: Final = "value_error"


def findings(errors: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """What pydantic found, without anything of what was sent: no value, no name that is not ours."""
    found = []
    for error in errors:
        location = error["loc"]
        if error["type"] == "extra_forbidden":
            found.append(Finding(_pointer(location[:-1]), error["type"], "there is a member that is not known here"))
        elif error["type"] == UNKNOWN_PARAMETER:
            found.append(Finding("/query", error["type"], error["msg"]))
        elif error["type"] == "json_invalid":
            found.append(Finding("/body", error["type"], "the body is not JSON"))
        elif error["type"] == _OWN_CHECK:
            found.append(Finding(_pointer(location), error["type"], "the value does not have the form it must have"))
        else:
            found.append(Finding(_pointer(location), error["type"], error["msg"]))
    return found


def read_key_command(body: bytes, *, name: str) -> words.VerifyKey | words.LeaseSecret | KeyRefused:
    """A request of the gateway; refused as invalid otherwise, without anything of what was sent."""
    try:
        command = words.KEY_COMMANDS.validate_json(body)
    except ValidationError as error:
        places = "; ".join(f"{each.pointer or 'the body'}: {each.code}" for each in findings(error.errors()))
        return KeyRefused(code="invalid", message=f"the command cannot be read: {places}")
    if command.command != name:
        return KeyRefused(code="invalid", message="the subject names another command than the body")
    return command


def request_hash(model: BaseModel) -> bytes:
    """What tells one request from another under the same idempotency key."""
    return sha256(_encode(model.model_dump(mode="json"))).digest()


def _pointer(location: Sequence[Any]) -> str:
    return "".join(f"/{str(part).replace('~', '~0').replace('/', '~1')}" for part in location)


# Replies --------------------------------------------------------------------------------------------------------------

KeyRefusal = (
    KeyUnknown
    | KeyDisabled
    | KeyExpired
    | NoOwnSecret
    | NoPlatformSecret
    | PolicyForbids
    | ConsentMissing
    | SecretUndecryptable
)


def refused(refusal: KeyRefusal) -> KeyRefused:
    """A refusal as the gateway is told of it."""
    return KeyRefused.model_validate({"code": refusal.code, "message": str(refusal)})


# To the ledger --------------------------------------------------------------------------------------------------------


def starting_grant(account: str, grant: StartingGrant) -> ledger.Grant:
    """The one starting grant of a holder: its idempotency key is the account, whoever asks and however often."""
    return ledger.Grant(
        idempotency_key=_once("starting-grant", account),
        account=account,
        unit=grant.unit,
        amount=grant.amount,
        kind=grant.kind,
        reference="starting grant",
    )


def cap_grant(account: str, cap: Amount) -> ledger.Grant:
    """A cap of an access key, granted to the key's own account once."""
    return ledger.Grant(
        idempotency_key=_once(f"cap:{cap.unit}", account),
        account=account,
        unit=cap.unit,
        amount=cap.amount,
        kind="adjustment",
        reference=f"cap of {account.rsplit('/', 1)[1]}",
    )


def open_account(account: str, units: Sequence[str], *, attempt: str) -> ledger.OpenAccount:
    """Open an account with wallets. What is open stays as it is, so that each attempt has a key of its own."""
    return ledger.OpenAccount(
        idempotency_key=f"open:{attempt}:{sha256(account.encode()).hexdigest()[:32]}",
        account=account,
        wallets=tuple(ledger.WalletSpec(unit=unit) for unit in units),
    )


_KEY_LENGTH_MAX: Final = 256


def _once(what: str, account: str) -> str:
    key = f"{what}:{account}"
    return key if len(key) <= _KEY_LENGTH_MAX else f"{what}:sha256:{sha256(account.encode()).hexdigest()}"


# Facts ----------------------------------------------------------------------------------------------------------------


def outbox_row(fact: KeyFact) -> OutboxRow:
    """A fact as the message to whoever remembers keys. Its bytes are kept, and repeats are identical."""
    return OutboxRow(
        partition=fact.partition,
        number=fact.number,
        subject=key_fact_subject(partition=fact.partition, verb=fact.type.split(".")[2]),
        message_id=f"keyvault.{fact.partition}.{fact.number}",
        payload=fact.model_dump_json().encode(),
        recorded_at=fact.recorded_at,
    )


def minute_of(at: datetime) -> datetime:
    """The minute a moment is counted in."""
    return at.replace(second=0, microsecond=0)
