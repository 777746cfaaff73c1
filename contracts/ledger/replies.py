"""What the ledger answers a command, or a list of them."""

from typing import Annotated, Final, Literal

from pydantic import Field, TypeAdapter

from contracts.accounts import AccountId
from contracts.ids import LotId, TransactionId
from contracts.ledger.terms import LIST_MAX, AnyLotKind, Frozen
from contracts.money import Amount, AmountText, UnitName
from contracts.times import Time


class Movement(Frozen):
    """How a transaction changed one lot of one wallet. `lot` is null of what is no lot: debt and overage."""

    account: AccountId
    unit: UnitName
    lot: LotId | None
    lot_kind: AnyLotKind | None = None
    posted: AmountText
    held: AmountText
    frozen: AmountText = "0"


class Remaining(Frozen):
    """What a wallet has available after the command: of a hold or a charge, for what they use."""

    account: AccountId
    unit: UnitName
    available: AmountText


class Exceeded(Frozen):
    """How much a command held or took of a wallet that no lot of it had: overdrawn, owed, or beyond the cap."""

    account: AccountId
    unit: UnitName
    amount: AmountText


class Accepted(Frozen):
    """The command's first accepted outcome; `replayed` if this very command had been accepted before.

    Of a `dry_run` it is what would be: nothing was recorded, and there is no such transaction.
    A command that found all as it wants it moved nothing: its transaction is the one that made the claim, or else the
    one that opened the account.
    """

    status: Literal["accepted"] = "accepted"
    transaction: TransactionId
    recorded_at: Time
    movements: tuple[Movement, ...] = ()
    remaining: tuple[Remaining, ...] = ()
    exceeded: tuple[Exceeded, ...] = ()
    replayed: bool = False
    dry_run: bool = False


class Refused(Frozen):
    """The ledger will not: nothing was changed; asking again decides anew. Numbers are of the wallet that refused.

    `index`: which command of an all-or-nothing list it was, from 0.
    """

    status: Literal["refused"] = "refused"
    code: str
    message: str
    limit_source: AccountId | None = None
    required: Amount | None = None
    remaining: Amount | None = None
    index: Annotated[int, Field(ge=0, lt=LIST_MAX)] | None = None


class Failed(Frozen):
    """The command was not decided. `conflict`: its key was used for another body. `busy`, `unavailable`: try again."""

    status: Literal["failed"] = "failed"
    code: Literal["invalid", "conflict", "busy", "unavailable", "fault"]
    message: str


class Listed(Frozen):
    """What became of the commands of a list, one by one; of one that is all or nothing: all were accepted."""

    status: Literal["listed"] = "listed"
    replies: tuple[Annotated[Accepted | Refused | Failed, Field(discriminator="status")], ...]
    replayed: bool = False
    dry_run: bool = False


Reply = Accepted | Refused | Failed
REPLIES: Final[TypeAdapter[Accepted | Refused | Failed]] = TypeAdapter(
    Annotated[Accepted | Refused | Failed, Field(discriminator="status")]
)
# A list is answered by one of these: refused if it is all or nothing, failed if nothing of it was decided.
ListReply = Listed | Refused | Failed
LIST_REPLIES: Final[TypeAdapter[Listed | Refused | Failed]] = TypeAdapter(
    Annotated[Listed | Refused | Failed, Field(discriminator="status")]
)
