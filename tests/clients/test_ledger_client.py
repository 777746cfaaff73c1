"""Holds and balances through the client: against the real ledger, and what it makes of silence and nonsense."""

from collections.abc import Iterator
from decimal import Decimal
from typing import Any, Final

import httpx2
import pytest

from contracts.ids import partition_of_id
from contracts.partition import partition_of
from scrip_client import (
    AccountNotOpen,
    Amount,
    AsyncLedger,
    Away,
    HoldEnded,
    InsufficientFunds,
    Ledger,
    Leg,
    RequestRejected,
    new_hold_id,
)
from scrip_client.amounts import decimal_text
from tests.clients.running import Services
from tests.clients.stand_in import problem

ACCOUNT: Final = "acme/j%C3%BCrgen"


@pytest.fixture
def ledger(services: Services) -> Iterator[Ledger]:
    with services.ledger():
        services.open("acme", {"usd": "10"})
        services.open(ACCOUNT, {"calls": "3"})
        client = Ledger(services.ledger_url, token=services.tokens["operator"], seconds=5)
        yield client
        client.close()


def test_a_hold_sets_aside_and_a_release_gives_back(ledger: Ledger) -> None:
    hold = ledger.hold(ACCOUNT, [Leg("usd", "0.25"), Leg("calls", 1)])
    assert set(hold.held) == {Amount(Decimal("0.25"), "usd"), Amount(Decimal(1), "calls")}
    assert {(each.account, str(each.amount)) for each in hold.remaining} == {("acme", "9.75 usd"), (ACCOUNT, "2 calls")}
    (wallet,) = ledger.balance(ACCOUNT).wallets
    assert (wallet.unit, wallet.kind, wallet.policy) == ("calls", "cap", "hard")
    assert [wallet.available, wallet.held, wallet.limit] == [Decimal(2), Decimal(1), Decimal(3)]
    assert wallet.renews_at is None
    ledger.release(hold)
    assert ledger.balance(ACCOUNT).wallets[0].available == 3
    with pytest.raises(HoldEnded, match="hold_released"):
        ledger.release(new_hold_of(ledger, released=True), account=ACCOUNT)


def new_hold_of(ledger: Ledger, *, released: bool) -> str:
    """A hold that was released under another key."""
    hold = ledger.hold(ACCOUNT, [Leg("calls", 1)])
    if released:
        ledger._http.post(
            f"/v1/holds/{hold.id}/release", json={"account": ACCOUNT}, headers={"Idempotency-Key": "by-hand"}
        )
    return hold.id


def test_a_hold_takes_what_is_there_between_the_two(ledger: Ledger) -> None:
    hold = ledger.hold(ACCOUNT, [Leg("usd", "25", at_least="1")])
    assert hold.held == (Amount(Decimal(10), "usd"),)


def test_a_hold_is_extended(ledger: Ledger) -> None:
    hold = ledger.hold(ACCOUNT, [Leg("calls", 1)])
    more = ledger.extend(hold, lifetime_seconds=1_000, legs=[Leg("calls", 1)])
    assert more.held == (Amount(Decimal(2), "calls"),)
    assert [str(each.amount) for each in more.remaining] == ["1 calls"]
    ledger.release(more)
    with pytest.raises(HoldEnded):
        ledger.extend(hold, lifetime_seconds=10)


def test_a_refusal_carries_its_numbers(ledger: Ledger) -> None:
    with pytest.raises(InsufficientFunds) as found:
        ledger.hold(ACCOUNT, [Leg("calls", 4), Leg("usd", "1")])
    refused = found.value
    assert (refused.status, refused.code, refused.limit_source) == (402, "insufficient_funds", ACCOUNT)
    assert (refused.required, refused.remaining) == (Amount(Decimal(4), "calls"), Amount(Decimal(3), "calls"))
    assert ledger.balance("acme").wallets[0].held == 0


def test_what_is_not_there_or_not_right_is_told_apart(ledger: Ledger, services: Services) -> None:
    with pytest.raises(AccountNotOpen):
        ledger.hold("nobody", [Leg("usd", 1)])
    with pytest.raises(AccountNotOpen):
        ledger.balance("nobody")
    with pytest.raises(RequestRejected, match="422"):
        ledger.hold(ACCOUNT, [Leg("doubloons", 1)])
    stranger = Ledger(services.ledger_url, token="guessed")
    with pytest.raises(RequestRejected, match="401 unauthenticated"):
        stranger.balance(ACCOUNT)
    stranger.close()


@pytest.mark.anyio
async def test_the_async_client_does_the_same(services: Services) -> None:
    with services.ledger():
        services.open(ACCOUNT, {"calls": "3"})
        ledger = AsyncLedger(services.ledger_url, token=services.tokens["operator"], seconds=5)
        hold = await ledger.hold(ACCOUNT, [Leg("calls", 1)])
        assert (await ledger.balance(ACCOUNT)).wallets[0].held == 1
        assert (await ledger.extend(hold, lifetime_seconds=20)).held == hold.held
        await ledger.release(hold)
        with pytest.raises(InsufficientFunds):
            await ledger.hold(ACCOUNT, [Leg("calls", 4)])
        await ledger.close()


@pytest.mark.parametrize("account", ["acme", "a", "Ünsal", "acme/ml/ana/key_7f3", "j%C3%BCrgen"])
def test_the_id_of_a_hold_names_its_partition(account: str) -> None:
    assert partition_of_id(new_hold_id(account)) == partition_of(account)


class Answers:
    """A ledger that answers these, one after the other."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.requests: list[httpx2.Request] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, httpx2.Response)
        return answer

    def ledger(self, *, seconds: float) -> Ledger:
        return Ledger("http://ledger", token="t", seconds=seconds, transport=httpx2.MockTransport(self))


ACCEPTED: Final[dict[str, Any]] = {"movements": [], "remaining": []}


def test_what_was_not_answered_is_asked_again_under_its_key() -> None:
    answers = Answers(
        httpx2.ConnectError("away"),
        problem(503, "busy"),
        httpx2.ReadTimeout("slow"),
        httpx2.Response(200, json=ACCEPTED),
    )
    hold = answers.ledger(seconds=5).hold("acme", [Leg("calls", 1)])
    assert len(answers.requests) == 4
    assert {request.headers["idempotency-key"] for request in answers.requests} == {f"place:{hold.id}"}
    assert len({request.content for request in answers.requests}) == 1


@pytest.mark.parametrize(
    ("answer", "maybe_done"),
    [
        (httpx2.ConnectError("refused"), False),
        (httpx2.ReadTimeout("slow"), True),
        (problem(503, "unavailable"), True),
        (httpx2.Response(200, html="<html>"), True),
        (httpx2.Response(502, html="<html>"), True),
    ],
)
def test_silence_and_nonsense_are_never_a_yes(answer: Any, maybe_done: bool) -> None:
    with pytest.raises(Away) as found:
        Answers(answer).ledger(seconds=0.2).hold("acme", [Leg("calls", 1)])
    assert found.value.maybe_done is maybe_done


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (1, "1"),
        ("0.10", "0.1"),
        (Decimal("1E+3"), "1000"),
        (Decimal("0.000000001"), "0.000000001"),
        (Decimal("-0"), "0"),
        ("-1.50", "-1.5"),
        (100, "100"),
    ],
)
def test_amounts_are_told_exactly(number: Any, text: str) -> None:
    assert decimal_text(number) == text


@pytest.mark.parametrize("number", [0.1, True, None, float("nan")])
def test_a_float_is_no_amount(number: Any) -> None:
    with pytest.raises(TypeError):
        decimal_text(number)


def test_infinity_is_no_amount() -> None:
    with pytest.raises(ValueError, match="is not an amount"):
        decimal_text(Decimal("inf"))
