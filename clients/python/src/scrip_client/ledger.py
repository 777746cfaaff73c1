"""The ledger over HTTP: holds and balances, with typed answers and refusals.

Every command has a key, so that asking again is safe; it is asked again until it is answered or the time is up.
"""

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, Final, Literal

import httpx2

from scrip_client.amounts import Amount, Number, decimal_text, read_amount
from scrip_client.errors import (
    AccountNotOpen,
    Away,
    HoldEnded,
    InsufficientFunds,
    LedgerError,
    Refused,
    RequestRejected,
)
from scrip_client.events import new_hold_id, new_id

AGAIN_SECONDS_MIN: Final = 0.05
AGAIN_SECONDS_MAX: Final = 0.5

_REFUSALS: Final[Mapping[str, type[Refused]]] = {
    "insufficient_funds": InsufficientFunds,
    "account_not_open": AccountNotOpen,
    "wallet_not_open": AccountNotOpen,
    "unknown_hold": HoldEnded,
    "hold_released": HoldEnded,
    "hold_settled": HoldEnded,
    "hold_expired": HoldEnded,
}
# The ledger decided these, though it did so against nobody's balance.
_CALLERS_FAULT: Final = frozenset({400, 401, 403, 413, 415, 422})

Overdue = Literal["release", "charge_estimate"]


@dataclass(frozen=True, slots=True)
class Leg:
    """How much of a unit to hold: what is there between `at_least` and `at_most`, or a refusal; alone, all of it."""

    unit: str
    at_most: Number
    at_least: Number | None = None


@dataclass(frozen=True, slots=True)
class Remaining:
    """What a wallet has available after a command."""

    account: str
    amount: Amount


@dataclass(frozen=True, slots=True)
class Hold:
    """What was set aside for work that is going to be done. Reporting use that names it settles it."""

    id: str
    account: str
    held: Sequence[Amount]
    remaining: Sequence[Remaining]


@dataclass(frozen=True, slots=True)
class Wallet:
    """What an account has of a unit.

    `limit` is what there is to use in all: what was granted in lots of which something is left, or what the recurring
    grants give each time, if that is more. `renews_at` is when the next of these comes.
    """

    account: str
    unit: str
    kind: str
    policy: str
    posted: Decimal
    held: Decimal
    available: Decimal
    debt: Decimal
    overage: Decimal
    limit: Decimal
    renews_at: datetime | None


@dataclass(frozen=True, slots=True)
class Balance:
    """An account's own wallets, at one moment."""

    account: str
    as_of: datetime
    wallets: Sequence[Wallet]


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request, as it is sent however often."""

    method: str
    path: str
    body: Mapping[str, Any] | None = None
    key: str | None = None
    params: Mapping[str, str] | None = None

    def sent_by(self, http: httpx2.Client | httpx2.AsyncClient, seconds: float) -> httpx2.Request:
        headers = {} if self.key is None else {"Idempotency-Key": self.key}
        return http.build_request(
            self.method, self.path, json=self.body, headers=headers, params=self.params, timeout=seconds
        )


class Ledger:
    """The ledger, asked by threads."""

    def __init__(
        self, url: str, *, token: str, seconds: float = 2.0, transport: httpx2.BaseTransport | None = None
    ) -> None:
        """`seconds`: how long an answer is waited for in all."""
        self._seconds = seconds
        self._http = httpx2.Client(
            base_url=url, headers={"Authorization": f"Bearer {token}"}, transport=transport, trust_env=False
        )

    def hold(
        self,
        account: str,
        legs: Sequence[Leg],
        *,
        id: str | None = None,
        lifetime_seconds: int = 900,
        overdue: Overdue = "release",
        scope: Mapping[str, str] | None = None,
    ) -> Hold:
        """Set amounts aside before work is done. Raises InsufficientFunds, AccountNotOpen, Refused, Away, …"""
        asked, hold = _place(account, legs, hold=id, lifetime_seconds=lifetime_seconds, overdue=overdue, scope=scope)
        return _read_hold(hold, account, self._ask(asked))

    def extend(self, hold: Hold, *, lifetime_seconds: int, legs: Sequence[Leg] = ()) -> Hold:
        """Let a hold last so long from now, and set more aside. Raises HoldEnded, InsufficientFunds, …"""
        return _read_extended(hold, self._ask(_extend(hold, lifetime_seconds, legs)))

    def release(self, hold: Hold | str, *, account: str | None = None) -> None:
        """Give back what a hold set aside. One that is not known will never be placed. Raises HoldEnded if settled."""
        self._ask(_release(hold, account))

    def balance(self, account: str) -> Balance:
        """What the account's own wallets have. Raises AccountNotOpen, …"""
        return _read_balance(self._ask(_balance(account)))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _ask(self, asked: _Asked) -> Any:
        attempts = _Attempts(self._seconds)
        while True:
            try:
                response = self._http.send(asked.sent_by(self._http, attempts.seconds_left()))
            except (httpx2.HTTPError, OSError) as error:
                pause = attempts.unanswered(error)
            else:
                try:
                    return _read(response)
                except Away as error:
                    pause = attempts.not_now(error)
            time.sleep(pause)


class AsyncLedger:
    """The ledger, asked by asyncio."""

    def __init__(
        self, url: str, *, token: str, seconds: float = 2.0, transport: httpx2.AsyncBaseTransport | None = None
    ) -> None:
        """`seconds`: how long an answer is waited for in all."""
        self._seconds = seconds
        self._http = httpx2.AsyncClient(
            base_url=url, headers={"Authorization": f"Bearer {token}"}, transport=transport, trust_env=False
        )

    async def hold(
        self,
        account: str,
        legs: Sequence[Leg],
        *,
        id: str | None = None,
        lifetime_seconds: int = 900,
        overdue: Overdue = "release",
        scope: Mapping[str, str] | None = None,
    ) -> Hold:
        """Set amounts aside before work is done. Raises InsufficientFunds, AccountNotOpen, Refused, Away, …"""
        asked, hold = _place(account, legs, hold=id, lifetime_seconds=lifetime_seconds, overdue=overdue, scope=scope)
        return _read_hold(hold, account, await self._ask(asked))

    async def extend(self, hold: Hold, *, lifetime_seconds: int, legs: Sequence[Leg] = ()) -> Hold:
        """Let a hold last so long from now, and set more aside. Raises HoldEnded, InsufficientFunds, …"""
        return _read_extended(hold, await self._ask(_extend(hold, lifetime_seconds, legs)))

    async def release(self, hold: Hold | str, *, account: str | None = None) -> None:
        """Give back what a hold set aside. One that is not known will never be placed. Raises HoldEnded if settled."""
        await self._ask(_release(hold, account))

    async def balance(self, account: str) -> Balance:
        """What the account's own wallets have. Raises AccountNotOpen, …"""
        return _read_balance(await self._ask(_balance(account)))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _ask(self, asked: _Asked) -> Any:
        attempts = _Attempts(self._seconds)
        while True:
            try:
                response = await self._http.send(asked.sent_by(self._http, attempts.seconds_left()))
            except (httpx2.HTTPError, OSError) as error:
                pause = attempts.unanswered(error)
            else:
                try:
                    return _read(response)
                except Away as error:
                    pause = attempts.not_now(error)
            await asyncio.sleep(pause)


class _Attempts:
    """Asking again until the time is up."""

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        self._pause = AGAIN_SECONDS_MIN
        self._maybe_done = False

    def seconds_left(self) -> float:
        return max(self._deadline - time.monotonic(), 0.01)

    def unanswered(self, error: Exception) -> float:
        """How long to wait. Raises Away."""
        # Refused connections have carried nothing.
        self._maybe_done |= not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.PoolTimeout)
        return self._next(f"{type(error).__name__}: {error}", error)

    def not_now(self, error: Away) -> float:
        """How long to wait. Raises Away."""
        self._maybe_done |= error.maybe_done
        return self._next(str(error), error)

    def _next(self, why: str, error: Exception) -> float:
        pause = self._pause * (1 + random.random())
        self._pause = min(self._pause * 2, AGAIN_SECONDS_MAX)
        if time.monotonic() + pause > self._deadline:
            raise Away(why, maybe_done=self._maybe_done) from error
        return pause


# What is asked --------------------------------------------------------------------------------------------------------


def _place(
    account: str,
    legs: Sequence[Leg],
    *,
    hold: str | None,
    lifetime_seconds: int,
    overdue: Overdue,
    scope: Mapping[str, str] | None,
) -> tuple[_Asked, str]:
    hold = hold or new_hold_id(account)
    body: dict[str, Any] = {
        "hold": hold,
        "account": account,
        "legs": _legs(legs),
        "lifetime_seconds": lifetime_seconds,
        "overdue": overdue,
    }
    if scope is not None:
        body["scope"] = dict(scope)
    return _Asked("POST", "/v1/holds", body, key=f"place:{hold}"), hold


def _extend(hold: Hold, lifetime_seconds: int, legs: Sequence[Leg]) -> _Asked:
    body = {"account": hold.account, "lifetime_seconds": lifetime_seconds, "legs": _legs(legs)}
    # A hold may be extended again and again.
    return _Asked("POST", f"/v1/holds/{hold.id}/extend", body, key=f"extend:{new_id()}")


def _release(hold: Hold | str, account: str | None) -> _Asked:
    hold_id, account = (hold.id, hold.account) if isinstance(hold, Hold) else (hold, account)
    if account is None:
        raise ValueError("a hold that is named by its id is released with its account")
    return _Asked("POST", f"/v1/holds/{hold_id}/release", {"account": account}, key=f"release:{hold_id}")


def _balance(account: str) -> _Asked:
    # An account's id is percent-encoded itself: what it has of `%` is part of it.
    return _Asked("GET", f"/v1/balances/{account.replace('%', '%25')}")


def _legs(legs: Sequence[Leg]) -> list[dict[str, str]]:
    found = []
    for leg in legs:
        at_most = decimal_text(leg.at_most)
        at_least = at_most if leg.at_least is None else decimal_text(leg.at_least)
        found.append({"unit": leg.unit, "at_least": at_least, "at_most": at_most})
    return found


# What is answered -----------------------------------------------------------------------------------------------------


def _read(response: httpx2.Response) -> Any:
    """What a success says. Raises every LedgerError."""
    if response.is_success:
        try:
            return response.json()
        except ValueError as error:
            raise Away(f"the answer is not the ledger's: {error}", maybe_done=True) from error
    raise _error(response)


def _error(response: httpx2.Response) -> LedgerError:
    status = response.status_code
    try:
        said = response.json()
    except ValueError:
        said = {}
    if not isinstance(said, dict) or not isinstance(said.get("code"), str):
        said = {"code": "not_the_ledger", "detail": f"the answer {status} is not the ledger's"}
    code, detail = said["code"], str(said.get("detail", ""))
    if status >= 500 or status in (408, 429):
        return Away(f"{status} {code}: {detail}", maybe_done=True)
    if code in _REFUSALS or status not in _CALLERS_FAULT:
        return _REFUSALS.get(code, Refused)(
            status=status,
            code=code,
            detail=detail,
            limit_source=said.get("limit_source"),
            required=read_amount(said.get("required")),
            remaining=read_amount(said.get("remaining")),
        )
    return RequestRejected(status=status, code=code, detail=detail, errors=said.get("errors", ()))


def _read_hold(hold: str, account: str, said: Mapping[str, Any]) -> Hold:
    # A cap is counted on every wallet on the path: it is still one amount that was set aside.
    by_wallet: dict[tuple[str, str], Decimal] = {}
    for each in said["movements"]:
        wallet = (each["account"], each["unit"])
        by_wallet[wallet] = by_wallet.get(wallet, Decimal()) + Decimal(each["held"])
    held: dict[str, Decimal] = {}
    for (_, unit), amount in by_wallet.items():
        held[unit] = max(amount, held.get(unit, amount))
    return Hold(
        id=hold,
        account=account,
        held=tuple(Amount(amount, unit) for unit, amount in held.items() if amount),
        remaining=tuple(
            Remaining(each["account"], Amount(Decimal(each["available"]), each["unit"])) for each in said["remaining"]
        ),
    )


def _read_extended(hold: Hold, said: Mapping[str, Any]) -> Hold:
    more = _read_hold(hold.id, hold.account, said)
    held = {each.unit: each.amount for each in hold.held}
    for each in more.held:
        held[each.unit] = held.get(each.unit, Decimal()) + each.amount
    return Hold(
        id=hold.id,
        account=hold.account,
        held=tuple(Amount(amount, unit) for unit, amount in held.items()),
        remaining=more.remaining or hold.remaining,
    )


def _read_balance(said: Mapping[str, Any]) -> Balance:
    account = said["account"]
    return Balance(
        account=account,
        as_of=datetime.fromisoformat(said["as_of"]),
        wallets=tuple(_read_wallet(account, each) for each in said["wallets"]),
    )


def _read_wallet(account: str, said: Mapping[str, Any]) -> Wallet:
    granted = sum((Decimal(lot["granted"]) for lot in said["lots"]), Decimal())
    renewed = sum((Decimal(renewal["amount"]) for renewal in said["renewals"]), Decimal())
    return Wallet(
        account=account,
        unit=said["unit"],
        kind=said["kind"],
        policy=said["policy"],
        posted=Decimal(said["posted"]),
        held=Decimal(said["held"]),
        available=Decimal(said["available"]),
        debt=Decimal(said["debt"]),
        overage=Decimal(said["overage"]),
        limit=max(granted, renewed),
        renews_at=min((datetime.fromisoformat(each["at"]) for each in said["renewals"]), default=None),
    )
