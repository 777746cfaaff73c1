"""What middleware tells of limits, computed: headers, warnings and refusals."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Final, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scrip_client import AccountNotOpen, Amount, Hold, InsufficientFunds, Refused, Remaining, Wallet
from scrip_client.admission import (
    ACCOUNTS_REMEMBERED_MAX,
    IncomingRequest,
    Limits,
    Rules,
    limit_headers,
    refusal,
    remaining_after,
)
from scrip_client.asgi import ScripMiddleware

NOW: Final = datetime(2026, 3, 14, 12, tzinfo=UTC)


def wallet(unit: str = "calls", *, kind: str = "cap", limit: str = "50", policy: str = "hard", **more: Any) -> Wallet:
    zero = Decimal(0)
    values = {"posted": zero, "held": zero, "available": zero, "debt": zero, "overage": zero, "renews_at": None}
    return Wallet(account="acme", unit=unit, kind=kind, policy=policy, limit=Decimal(limit), **(values | more))


def left(amount: str, unit: str = "calls", *, account: str = "acme") -> Remaining:
    return Remaining(account, Amount(Decimal(amount), unit))


def told(remaining: list[Remaining], *wallets: Wallet, warn_percent: int = 80) -> tuple[dict[str, str], list[int]]:
    headers, warnings = limit_headers(remaining, {"acme": wallets}, warn_percent=warn_percent, now=NOW)
    assert len(dict(headers)) == len(headers)
    return dict(headers), [each.percent for each in warnings]


def test_a_cap_is_told_as_the_standard_has_it() -> None:
    headers, warnings = told([left("30")], wallet(renews_at=NOW + timedelta(hours=1)))
    assert headers == {
        "X-Scrip-Remaining": "30 calls",
        "RateLimit-Policy": '"calls";q=50',
        "RateLimit": '"calls";r=30;t=3600',
    }
    assert warnings == []


def test_money_is_told_in_its_own_header_only() -> None:
    headers, warnings = told([left("0.123", "usd")], wallet("usd", kind="money", limit="25"), warn_percent=101)
    assert headers == {"X-Scrip-Remaining": "0.123 usd"}
    assert warnings == []


def test_the_tightest_wallet_of_a_unit_is_told() -> None:
    headers, _ = told([left("30", account="acme/ana"), left("20"), left("1.5", "usd")], wallet())
    assert headers["X-Scrip-Remaining"] == "20 calls, 1.5 usd"
    assert headers["RateLimit"] == '"calls";r=20'


def test_an_unlimited_or_unknown_wallet_has_no_limit_to_tell() -> None:
    for wallets in ((), (wallet(policy="unlimited"),), (wallet(limit="0"),), (wallet("tokens"),)):
        assert told([left("3")], *wallets) == ({"X-Scrip-Remaining": "3 calls"}, [])


@pytest.mark.parametrize(("remaining", "percent"), [("11", None), ("10", 80), ("9.9", 80), ("0", 100), ("-5", 100)])
def test_it_warns_from_80_percent_on(remaining: str, percent: int | None) -> None:
    headers, warnings = told([left(remaining)], wallet())
    assert warnings == ([] if percent is None else [percent])
    assert headers.get("X-Scrip-Warning") == (None if percent is None else f"{percent}% of 50 calls used")


@given(limit=st.decimals("0.001", 10**9, places=3), part=st.decimals(0, 1, places=6))
def test_headers_never_promise_more_than_there_is(limit: Decimal, part: Decimal) -> None:
    available = limit * part
    headers, _ = told([left(f"{available:f}")], wallet(limit=f"{limit:f}"))
    assert int(headers["RateLimit"].rpartition("r=")[2]) <= available
    assert int(headers["RateLimit-Policy"].rpartition("q=")[2]) <= limit


def test_what_was_released_is_left_again() -> None:
    hold = Hold("h", "acme", (Amount(Decimal(2), "calls"),), (left("3"), left("4", account="root"), left("1", "usd")))
    assert remaining_after(hold, released=False) == hold.remaining
    assert [str(each.amount) for each in remaining_after(hold, released=True)] == ["5 calls", "6 calls", "1 usd"]


RULES: Final = Rules(
    account=lambda _: "acme", estimate=lambda _: {"calls": 1}, upgrade_url="https://acme.example/plans"
)


def short(unit: str) -> InsufficientFunds:
    return InsufficientFunds(
        status=402,
        code="insufficient_funds",
        detail="not enough",
        limit_source="acme",
        required=Amount(Decimal(2), unit),
        remaining=Amount(Decimal(1), unit),
    )


def test_a_cap_that_is_used_up_is_429_until_it_renews() -> None:
    problem, warnings = refusal(
        short("calls"), wallets=[wallet(renews_at=NOW + timedelta(seconds=90))], rules=RULES, now=NOW
    )
    assert problem.status == 429
    assert dict(problem.headers) == {
        "X-Scrip-Remaining": "1 calls",
        "RateLimit-Policy": '"calls";q=50',
        "RateLimit": '"calls";r=1;t=90',
        "X-Scrip-Warning": "98% of 50 calls used",
        "Retry-After": "90",
    }
    assert problem.body() == {
        "type": "about:blank",
        "title": "Too Many Requests",
        "status": 429,
        "code": "insufficient_funds",
        "detail": "not enough",
        "limit_source": "acme",
        "required": {"amount": "2", "unit": "calls"},
        "remaining": {"amount": "1", "unit": "calls"},
        "upgrade_url": "https://acme.example/plans",
    }
    assert [each.percent for each in warnings] == [98]


def test_money_that_is_short_is_402_and_so_is_what_is_not_known() -> None:
    for wallets in ((), (wallet("usd", kind="money", limit="25"),)):
        problem, _ = refusal(short("usd"), wallets=wallets, rules=RULES, now=NOW)
        assert problem.status == 402
        assert "Retry-After" not in dict(problem.headers)


def test_other_refusals_are_403() -> None:
    for refused, code in (
        (AccountNotOpen(status=404, code="wallet_not_open", detail="d"), "account_not_open"),
        (Refused(status=409, code="hold_exists", detail="d"), "hold_exists"),
    ):
        problem, warnings = refusal(refused, wallets=(), rules=RULES, now=NOW)
        assert (problem.status, problem.code, list(warnings)) == (403, code, [])


def request(path: str) -> IncomingRequest:
    return IncomingRequest(method="GET", path=path, headers={}, native=None)


def test_routes_are_prefixes_of_whole_segments_or_say_themselves() -> None:
    under = Rules(account=lambda _: "acme", estimate=lambda _: {}, routes=("/analyze", "/v1/"))
    assert [under.apply_to(request(path)) for path in ("/analyze", "/analyze/1", "/analyzer", "/v1/x", "/v2", "/")] == [
        True,
        True,
        False,
        True,
        False,
        False,
    ]
    assert RULES.apply_to(request("/anything"))
    asked = Rules(account=lambda _: "acme", estimate=lambda _: {}, routes=lambda each: each.path.endswith("x"))
    assert [asked.apply_to(request(path)) for path in ("/x", "/y")] == [True, False]


@pytest.mark.anyio
async def test_what_a_server_or_a_mount_puts_before_the_path_lets_nobody_past() -> None:
    seen: list[str] = []

    def nobodys(request: IncomingRequest) -> None:
        seen.append(request.path)

    async def app(_scope: Any, _receive: Any, _send: Any) -> None:
        pass

    rules = Rules(account=nobodys, estimate=lambda _: {}, routes=("/analyze",))
    middleware = ScripMiddleware(app, scrip=cast(Any, None), rules=rules)
    for path, root in (
        ("/analyze", ""),
        ("/api/analyze/1", "/api"),
        ("/api/v1/analyze", "/api/v1"),
        # Of a server that does not put it before the path.
        ("/analyze/2", "/api"),
        ("/api/analyze", ""),
        ("/apian/analyze", "/api"),
    ):
        scope = {"type": "http", "method": "GET", "path": path, "root_path": root, "headers": []}
        await middleware(scope, cast(Any, None), cast(Any, None))
    assert seen == ["/analyze", "/analyze/1", "/analyze", "/analyze/2"]


def test_limits_are_remembered_for_a_while_and_of_so_many() -> None:
    limits = Limits(60)
    for number in range(ACCOUNTS_REMEMBERED_MAX + 1):
        limits.remember(f"a{number}", [])
    assert limits.of("a0") is None
    assert limits.of("a1") == []
    forgetful = Limits(0)
    forgetful.remember("a", [])
    assert forgetful.of("a") is None
