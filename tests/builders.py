"""Builders of contract messages: valid by default, a test shows only what it is about."""

from datetime import UTC, datetime
from typing import Final

from contracts import ledger
from contracts.metering import ChargeLine, ChargesRated, ReversalLine, Scope
from contracts.money import Amount
from contracts.partition import partition_of

NOON: Final = datetime(2026, 7, 1, 12, tzinfo=UTC)


def open_account(account: str = "acme", *units: str, key: str = "open") -> ledger.OpenAccount:
    """An account with wallets of units."""
    wallets = tuple(ledger.WalletSpec(unit=unit) for unit in units)
    return ledger.OpenAccount(idempotency_key=key, account=account, wallets=wallets)


def grant(
    account: str = "acme",
    amount: str = "100",
    *,
    unit: str = "usd",
    kind: ledger.LotKind = "purchase",
    key: str = "grant",
) -> ledger.Grant:
    """A grant to a wallet."""
    return ledger.Grant(idempotency_key=key, account=account, unit=unit, amount=amount, kind=kind)


def hold_leg(unit: str, at_least: str, at_most: str | None = None) -> ledger.HoldLeg:
    """A leg of a hold; all or nothing if only one amount is given."""
    return ledger.HoldLeg(unit=unit, at_least=at_least, at_most=at_most or at_least)


def place_hold(hold: str, *legs: ledger.HoldLeg, account: str = "acme", key: str = "place") -> ledger.PlaceHold:
    """A hold."""
    return ledger.PlaceHold(idempotency_key=key, hold=hold, account=account, legs=legs)


def release_hold(hold: str, *, account: str = "acme", key: str = "release") -> ledger.ReleaseHold:
    """The release of a hold."""
    return ledger.ReleaseHold(idempotency_key=key, hold=hold, account=account)


def charge_line(
    event_id: str = "event-1",
    *,
    account: str = "acme",
    usd: str | None = "1",
    amounts: dict[str, str] | None = None,
    hold: str | None = None,
    occurred_at: datetime = NOON,
    source: str = "demo",
) -> ChargeLine:
    """What one use cost: some usd, or the amounts given by unit."""
    costs = amounts if amounts is not None else {} if usd is None else {"usd": usd}
    return ChargeLine(
        source=source,
        event_id=event_id,
        account=account,
        occurred_at=occurred_at,
        hold=hold,
        scope=Scope(provider="openai", model="gpt-4o-mini"),
        price_version="2024-07-18",
        amounts=tuple(Amount(amount=amount, unit=unit) for unit, amount in costs.items()),
    )


def reversal_line(
    event_id: str = "event-1",
    *,
    account: str = "acme",
    usd: str = "1",
    amounts: dict[str, str] | None = None,
    source: str = "demo",
    revision: int = 0,
    correction: str = "correction-1",
    reason: str | None = None,
) -> ReversalLine:
    """What is given back of one line: some usd, or the amounts given by unit."""
    given_back = {"usd": usd} if amounts is None else amounts
    return ReversalLine(
        source=source,
        event_id=event_id,
        revision=revision,
        account=account,
        amounts=tuple(Amount(amount=amount, unit=unit) for unit, amount in given_back.items()),
        correction=correction,
        reason=reason,
    )


def charges_rated(
    *lines: ChargeLine, reversals: tuple[ReversalLine, ...] = (), number: int = 1, recorded_at: datetime = NOON
) -> ChargesRated:
    """A bundle of one partition: lines, one if nothing is said, and what is given back before them."""
    chosen = lines if lines or reversals else (charge_line(),)
    account = chosen[0].account if chosen else reversals[0].account
    return ChargesRated(
        partition=partition_of(account), number=number, recorded_at=recorded_at, lines=chosen, reversals=reversals
    )
