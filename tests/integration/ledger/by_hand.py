"""A journal written by hand: moves that nobody decided, put into the tables as the service does it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from contracts.ids import uuid7
from contracts.partition import partition_of
from services.ledger import store
from services.ledger.domain.commands import LotScope, Policy, Rule, Scope, Threshold
from services.ledger.domain.draft import Draft, Head
from services.ledger.domain.entries import (
    DebtRepaid,
    HeldLeg,
    HoldPlaced,
    LotGranted,
    LotKind,
    Move,
    PaymentClaimed,
    RuleSet,
    WalletOpened,
)
from services.ledger.domain.state import PartitionState
from services.ledger.projections import add_rows, changed_rows
from services.ledger.store import Connection, Row, Signature, Written

BEGIN: Final = datetime(2026, 7, 1, 12, tzinfo=UTC)
HOUR: Final = timedelta(hours=1)
ROOT: Final = "acme"
PARTITION: Final = partition_of(ROOT)
GPT: Final = Scope("openai", "gpt-4o-mini")


def uuid(number: int) -> str:
    """A UUIDv7 as bare text."""
    return str(uuid7(milliseconds=1_780_000_000_000 + number, entropy=number.to_bytes(10, "big")))


def opened(account: str, *units: str, policy: Policy = "hard", thresholds: tuple[Threshold, ...] = ()) -> list[Move]:
    """An account with wallets."""
    terms = WalletOpened(policy=policy, thresholds=thresholds)
    return [
        Move(kind="account_opened", account=account, occurred_at=BEGIN),
        *(Move(kind="wallet_opened", account=account, occurred_at=BEGIN, unit=unit, details=terms) for unit in units),
    ]


def rule_set(account: str, rule: Rule, next_period: int) -> Move:
    """A recurring grant."""
    details = RuleSet(rule, next_period)
    return Move(kind="rule_set", account=account, occurred_at=BEGIN, unit=rule.unit, details=details)


def granted(
    account: str,
    unit: str,
    lot: str,
    amount: int,
    *,
    kind: LotKind = "purchase",
    at: datetime = BEGIN,
    scope: LotScope | None = None,
    **details: Any,
) -> list[Move]:
    """A lot, and its other side."""
    about = LotGranted(priority=100, scope=scope, **details)
    return [
        Move(
            kind="lot_granted",
            account=account,
            occurred_at=at,
            unit=unit,
            lot=lot,
            lot_kind=kind,
            posted=amount,
            details=about,
        ),
        Move(kind="lot_granted", account="@stripe", occurred_at=at, unit=unit, posted=-amount),
    ]


def expired(account: str, unit: str, lot: str, amount: int, *, kind: LotKind = "purchase", at: datetime) -> list[Move]:
    """The end of what is unheld of a lot."""
    return [
        Move(kind="lot_expired", account=account, occurred_at=at, unit=unit, lot=lot, lot_kind=kind, posted=-amount),
        Move(kind="lot_expired", account="@expired", occurred_at=at, unit=unit, posted=amount),
    ]


def moved(
    kind: Any,
    account: str,
    unit: str,
    lot: str,
    posted: int = 0,
    *,
    held: int = 0,
    lot_kind: LotKind = "purchase",
    hold: str | None = None,
    at: datetime = BEGIN,
    frozen: int = 0,
    details: Any = None,
) -> Move:
    """One side of anything."""
    return Move(
        kind=kind,
        account=account,
        occurred_at=at,
        unit=unit,
        lot=lot,
        lot_kind=lot_kind,
        hold=hold,
        posted=posted,
        held=held,
        frozen=frozen,
        details=details,
    )


def used(unit: str, amount: int, *, at: datetime = BEGIN) -> Move:
    """The other side of a charge."""
    return Move(kind="charged", account="@usage", occurred_at=at, unit=unit, posted=amount)


def repaid(account: str, unit: str, *, lot: str, debt: str, amount: int) -> list[Move]:
    """Both sides of a debt's repayment."""
    details = DebtRepaid(lot=lot, debt=debt)
    return [
        moved("debt_repaid", account, unit, lot, -amount, details=details),
        moved("debt_repaid", account, unit, debt, amount, lot_kind="debt", details=details),
    ]


def placed(
    hold: str,
    account: str,
    unit: str,
    lot: str,
    amount: int,
    *,
    expires_at: datetime = BEGIN + HOUR,
    payer: str = ROOT,
    lot_kind: LotKind = "purchase",
) -> Move:
    """A hold on one lot."""
    about = HoldPlaced(
        account=account,
        expires_at=expires_at,
        overdue="release",
        legs=(HeldLeg(unit, amount, amount, amount, (payer,)),),
        scope=GPT,
    )
    return moved("hold_placed", payer, unit, lot, held=amount, hold=hold, details=about, lot_kind=lot_kind)


def claimed(account: str, unit: str, payment: str, claim: str, amount: int, *, state: Any = "final") -> Move:
    """A claim as it stands."""
    details = PaymentClaimed(payment=payment, claim=claim, reason="refund", state=state, claimed=amount)
    return Move(kind="payment_claimed", account=account, occurred_at=BEGIN, unit=unit, details=details)


def line_row(
    event_id: str,
    account: str,
    split: str,
    *,
    amounts: str = "[]",
    hold: str | None = None,
    revision: int = 0,
    bundle: int | None = None,
    number: int = 1,
    place: tuple[int, str],
) -> Row:
    """A row of charge_lines, without its time. `place`: batch and transaction."""
    scope = '{"feature":null,"model":"gpt-4o-mini","provider":"openai"}'
    about = (account, BEGIN, hold, scope, "v1", False, amounts, split)
    return (PARTITION, "demo", event_id, revision, *about, bundle, number, *place)


@dataclass(slots=True)
class Hand:
    """Writes the journal of ROOT's partition, a batch at a time, each an hour after the one before."""

    connection: Connection
    head: Head
    state: PartitionState = field(default_factory=PartitionState)

    @classmethod
    async def take(cls, connection: Connection, partition: int = PARTITION) -> "Hand":
        """The partition is this hand's."""
        heads = await store.take_heads(connection, {partition: 1})
        await connection.commit()
        return cls(connection, heads[partition])

    @property
    def next_place(self) -> tuple[int, str]:
        """Batch and transaction of what is written next."""
        draft = self._draft()
        return draft.batch, draft.begin().id

    async def write(
        self,
        *moves: Sequence[Move] | Move,
        commands: Sequence[Row] = (),
        lines: Sequence[Row] = (),
        reversals: Sequence[Row] = (),
        bundles: Sequence[Row] = (),
        signature: Signature | None = None,
    ) -> str:
        """Write a batch of one transaction, and commit it: the transaction."""
        written, transaction = self.written(
            *moves, commands=commands, lines=lines, reversals=reversals, bundles=bundles
        )
        await store.write(self.connection, [written], signature)
        self.head = written.after
        self.state.written(written.after.recorded_at)
        return transaction

    async def recall(self, **needs: Any) -> None:
        """Read what is no longer in memory, as the service does before it decides."""
        loaded = await store.load(self.connection, store.Needs(**needs))
        await self.connection.commit()
        add_rows({self.head.partition: self.state}, loaded.rows)

    def written(
        self,
        *moves: Sequence[Move] | Move,
        commands: Sequence[Row] = (),
        lines: Sequence[Row] = (),
        reversals: Sequence[Row] = (),
        bundles: Sequence[Row] = (),
    ) -> tuple[Written, str]:
        """What a batch of one transaction adds, and the transaction."""
        draft = self._draft()
        transaction = draft.begin()
        transaction.record([each for part in moves for each in ([part] if isinstance(part, Move) else part)])
        after, entries = draft.finish()
        written = Written(
            before=self.head,
            after=after,
            entries=entries,
            commands=list(commands),
            bundles=list(bundles),
            lines=list(lines),
            reversals=list(reversals),
            projections=changed_rows(self.head.partition, self.state),
            outbox=[],
            letters=[],
        )
        return written, transaction.id

    def _draft(self) -> Draft:
        return Draft(self.head, self.state, now=BEGIN + HOUR * (self.head.batch + 1))
