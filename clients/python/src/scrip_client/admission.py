"""What the middleware decides: who is limited, what is held, what is told in headers, what is reported after.

Only computes; `asgi` and `flask` ask the ledger and report.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import ROUND_FLOOR, Decimal
from http import HTTPStatus
from typing import Any, Final, Literal

from scrip_client.amounts import Amount, Number
from scrip_client.errors import AccountNotOpen, InsufficientFunds, Refused
from scrip_client.events import UsageEvent, new_id
from scrip_client.ledger import Hold, Leg, Overdue, Remaining, Wallet

log = logging.getLogger("scrip_client")

REQUEST_SERVED: Final = "request.served"
PROBLEM: Final = "application/problem+json"
ACCOUNTS_REMEMBERED_MAX: Final = 10_000

Headers = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class IncomingRequest:
    """A request, whatever serves it. `native`: the ASGI scope, or Flask's request. Headers' names are lower-case.

    `path` is the one that the application's routes see, whatever it is mounted at.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    native: Any


@dataclass(frozen=True, slots=True)
class Served:
    """How a request was served. `ended`: `completed`, or `broke_off` in the middle of the answer."""

    status: int
    latency_ms: int
    response_bytes: int
    ended: Literal["completed", "broke_off"]


@dataclass(frozen=True, slots=True)
class LimitWarning:
    """So much of a limit is used: of `limit` of `unit` that `account` has, `percent`."""

    account: str
    unit: str
    limit: Decimal
    available: Decimal
    percent: int
    renews_at: datetime | None


@dataclass(slots=True)
class Admission:
    """A request that is being served: what the application may look at, and may say of it.

    In `data` it puts what the usage event is to say besides. After `nothing_used()` nothing is charged.
    """

    account: str
    hold: Hold | None
    hold_id: str
    id: str = field(default_factory=new_id)
    type: str = REQUEST_SERVED
    data: dict[str, Any] = field(default_factory=dict)
    used: bool = True
    released: bool = False
    started: float = field(default_factory=time.monotonic)

    def nothing_used(self) -> None:
        """No work was done: the account is charged nothing."""
        self.used = False


AccountOf = Callable[[IncomingRequest], str | Awaitable[str | None] | None]
Estimate = Mapping[str, Number] | Sequence[Leg]
EstimateOf = Callable[[IncomingRequest], Estimate | Awaitable[Estimate]]
UsageOf = Callable[[IncomingRequest, Admission, Served], UsageEvent | None]


def served(request: IncomingRequest, admission: Admission, how: Served) -> UsageEvent | None:
    """The usage event of a request that did not fail: what is known of it, and what the application put in `data`."""
    if how.status >= 400 or not admission.used:
        return None
    return UsageEvent(
        account=admission.account,
        type=admission.type,
        id=admission.id,
        data={
            "endpoint": request.path,
            "method": request.method,
            "status": how.status,
            "latency_ms": how.latency_ms,
            "response_bytes": how.response_bytes,
            "ended": how.ended,
            **admission.data,
        },
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Who is limited by what, on which routes.

    `account` says whose request it is; None: nobody's, it is served as if there were no limits. `estimate` says how
    much to hold, `{"calls": 1}`. `usage` makes the event that is reported after; None: nothing was used, the hold is
    released. `routes` are path prefixes, or say of a request whether it is metered; without any, all are.
    `when_away`: what becomes of a request that Scrip cannot decide: `refuse` it (503), or `serve` it without a hold; it
    is charged all the same. `overdue`: what becomes of the hold of a request whose server died.
    """

    account: AccountOf
    estimate: EstimateOf
    usage: UsageOf = served
    routes: Sequence[str] | Callable[[IncomingRequest], bool] = ("/",)
    when_away: Literal["refuse", "serve"] = "refuse"
    lifetime_seconds: int = 300
    overdue: Overdue = "release"
    warn_percent: int = 80
    on_warning: Callable[[LimitWarning], None] | None = None
    upgrade_url: str | None = None
    limits_seconds: float = 30.0

    def apply_to(self, request: IncomingRequest) -> bool:
        """Whether a request is metered."""
        if callable(self.routes):
            return self.routes(request)
        return any(_is_under(request.path, prefix) for prefix in self.routes)

    def warn(self, warnings: Sequence[LimitWarning]) -> None:
        """Tell whoever wants to know."""
        for warning in warnings:
            try:
                if self.on_warning is not None:
                    self.on_warning(warning)
            except Exception:
                # Somebody else's code, and no reason to answer nobody.
                log.exception("on_warning failed")


def legs(estimate: Estimate) -> Sequence[Leg]:
    """What is held of an estimate: all of it."""
    if isinstance(estimate, Mapping):
        return [Leg(unit, amount) for unit, amount in estimate.items()]
    return estimate


def event_naming_hold(event: UsageEvent, admission: Admission) -> UsageEvent:
    """The event as it is reported: under the request's id, and naming the hold that its charge settles."""
    return UsageEvent(
        account=event.account,
        type=event.type,
        data={"hold": admission.hold_id, **event.data},
        id=event.id or admission.id,
        time=event.time,
        attributes=event.attributes,
    )


class Limits:
    """What wallets were last found to be limited to, by account. Remembered for a while: limits change rarely."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._found: OrderedDict[str, tuple[float, Sequence[Wallet]]] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, account: str) -> Sequence[Wallet] | None:
        """The account's wallets; None: ask."""
        with self._lock:
            known = self._found.get(account)
        return known[1] if known is not None and time.monotonic() - known[0] < self._seconds else None

    def remember(self, account: str, wallets: Sequence[Wallet]) -> None:
        """The ledger has told."""
        with self._lock:
            self._found[account] = (time.monotonic(), wallets)
            self._found.move_to_end(account)
            while len(self._found) > ACCOUNTS_REMEMBERED_MAX:
                self._found.popitem(last=False)


# What is told ---------------------------------------------------------------------------------------------------------


def remaining_after(hold: Hold, *, released: bool) -> Sequence[Remaining]:
    """What wallets have left while a hold is held, or once it has been given back."""
    if not released:
        return hold.remaining
    held = {each.unit: each.amount for each in hold.held}
    return [
        Remaining(each.account, Amount(each.amount.amount + held.get(each.amount.unit, Decimal()), each.amount.unit))
        for each in hold.remaining
    ]


def limit_headers(
    remaining: Sequence[Remaining], limits: Mapping[str, Sequence[Wallet]], *, warn_percent: int, now: datetime
) -> tuple[Headers, Sequence[LimitWarning]]:
    """X-Scrip-Remaining and X-Scrip-Warning; RateLimit-Policy and RateLimit of caps, in whole numbers. And warnings."""
    tightest: dict[str, Remaining] = {}
    for each in remaining:
        known = tightest.get(each.amount.unit)
        if known is None or each.amount.amount < known.amount.amount:
            tightest[each.amount.unit] = each
    headers: Headers = []
    if tightest:
        headers.append(("X-Scrip-Remaining", ", ".join(str(each.amount) for each in tightest.values())))
    policies, rates, warnings = [], [], []
    for unit, each in tightest.items():
        wallet = next((found for found in limits.get(each.account, ()) if found.unit == unit), None)
        if wallet is None or wallet.limit <= 0 or wallet.policy == "unlimited":
            continue
        available = max(each.amount.amount, Decimal())
        if wallet.kind == "cap":
            seconds = None if wallet.renews_at is None else max(int((wallet.renews_at - now).total_seconds()), 0)
            policies.append(f'"{unit}";q={_whole(wallet.limit)}')
            rates.append(f'"{unit}";r={_whole(available)}' + ("" if seconds is None else f";t={seconds}"))
        percent = min(max(_whole((wallet.limit - available) * 100 / wallet.limit), 0), 100)
        if percent >= warn_percent:
            warnings.append(LimitWarning(each.account, unit, wallet.limit, available, percent, wallet.renews_at))
    if policies:
        headers += [("RateLimit-Policy", ", ".join(policies)), ("RateLimit", ", ".join(rates))]
    if warnings:
        said = (f"{each.percent}% of {Amount(each.limit, each.unit)} used" for each in warnings)
        headers.append(("X-Scrip-Warning", ", ".join(said)))
    return headers, warnings


def request_headers(admission: Admission) -> Headers:
    """What is told of a request: its id, which is its usage event's, and what was held for it."""
    headers = [("X-Scrip-Request-Id", admission.id)]
    if admission.hold is not None and admission.hold.held:
        headers.append(("X-Scrip-Held", ", ".join(str(each) for each in admission.hold.held)))
    return headers


@dataclass(frozen=True, slots=True)
class Problem:
    """An answer in place of the application's, as problem+json (RFC 9457)."""

    status: int
    code: str
    detail: str
    members: Mapping[str, Any] = field(default_factory=dict)
    headers: Headers = field(default_factory=list)

    def body(self) -> dict[str, Any]:
        """The problem, to be written as JSON."""
        return {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
            **self.members,
        }


def refusal(
    refused: Refused, *, wallets: Sequence[Wallet], rules: Rules, now: datetime | None = None
) -> tuple[Problem, Sequence[LimitWarning]]:
    """What a client is told of a refusal: 402 if money is short, 429 if a cap is used up, 403 otherwise."""
    now = now or datetime.now(UTC)
    if not isinstance(refused, InsufficientFunds):
        code = "account_not_open" if isinstance(refused, AccountNotOpen) else refused.code
        return Problem(403, code, refused.detail), ()
    members: dict[str, Any] = {}
    headers: Headers = []
    warnings: Sequence[LimitWarning] = ()
    wallet = None
    if refused.limit_source is not None and refused.required is not None:
        members["limit_source"] = refused.limit_source
        members["required"] = _amount(refused.required)
        wallet = next((each for each in wallets if each.unit == refused.required.unit), None)
    if refused.remaining is not None and refused.limit_source is not None:
        members["remaining"] = _amount(refused.remaining)
        headers, warnings = limit_headers(
            [Remaining(refused.limit_source, refused.remaining)],
            {refused.limit_source: wallets},
            warn_percent=rules.warn_percent,
            now=now,
        )
    if rules.upgrade_url is not None:
        members["upgrade_url"] = rules.upgrade_url
    is_cap = wallet is not None and wallet.kind == "cap"
    if wallet is not None and wallet.renews_at is not None and is_cap:
        seconds = max(int((wallet.renews_at - now).total_seconds()), 1)
        headers = [*headers, ("Retry-After", str(seconds))]
    return Problem(429 if is_cap else 402, "insufficient_funds", refused.detail, members, headers), warnings


def away(why: str) -> Problem:
    """What a client is told if it cannot be decided."""
    return Problem(
        503, "unavailable", f"whether this may start cannot be decided now: {why}", {}, [("Retry-After", "2")]
    )


def not_recorded(request_id: str) -> Problem:
    """What a client is told if its use could be recorded nowhere."""
    said = f"the use of request {request_id} could not be recorded"
    return Problem(500, "usage_not_recorded", said, {}, [("X-Scrip-Request-Id", request_id)])


def _amount(amount: Amount) -> dict[str, str]:
    return {"amount": str(amount).partition(" ")[0], "unit": amount.unit}


def _whole(number: Decimal) -> int:
    return int(number.to_integral_value(ROUND_FLOOR))


def _is_under(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(prefix if prefix.endswith("/") else f"{prefix}/")
