"""The worked examples of the architecture, with its numbers, through the running service; its clock is the test's."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import httpx2
import pytest

from contracts import ledger as words
from contracts.metering import ChargeLine, ReversalLine, Scope
from contracts.money import Amount
from services.kit.ids import new_hold_id
from services.ledger import app as ledger_app
from services.ledger.routes import balance, reading
from tests.builders import charge_line, charges_rated, hold_leg, reversal_line
from tests.integration.ledger.driving import Driver

pytestmark = pytest.mark.anyio

A: Final = Scope(provider="openai", model="gpt-4o-mini")
B: Final = Scope(provider="anthropic", model="claude")


@dataclass
class Service:
    """The service, what time it is there, and what its balances say."""

    driver: Driver
    http: httpx2.AsyncClient
    at: datetime = datetime(2026, 7, 1, 12, tzinfo=UTC)
    events: int = 0
    bundles: int = 0

    def __call__(self) -> datetime:
        return self.at

    async def open(self, account: str, *units: str) -> None:
        wallets = tuple(words.WalletSpec(unit=unit) for unit in units)
        await self.driver.accepted(
            words.OpenAccount(idempotency_key=self.driver.key(), account=account, wallets=wallets)
        )

    async def grant(self, amount: str, unit: str = "usd", **more: Any) -> str:
        """A lot of acme's; its id."""
        asked = words.Grant(idempotency_key=self.driver.key(), account="acme", unit=unit, amount=amount, **more)
        lot = (await self.driver.accepted(asked)).movements[0].lot
        assert lot is not None
        return lot

    def hold(self, *legs: words.HoldLeg, account: str = "acme", **more: Any) -> words.PlaceHold:
        return words.PlaceHold(
            idempotency_key=self.driver.key(), hold=new_hold_id("acme"), account=account, legs=legs, **more
        )

    async def held(self, *legs: words.HoldLeg, **more: Any) -> str:
        """A hold of acme's that is placed; its id."""
        asked = self.hold(*legs, **more)
        await self.driver.accepted(asked)
        return asked.hold

    async def charge(self, amount: str, *, unit: str = "usd", hold: str | None = None, final: bool = True) -> str:
        """A charge that occurs now; its event."""
        self.events += 1
        line = charge_line(f"e{self.events}", amounts={unit: amount}, hold=hold, occurred_at=self.at)
        line = line.model_copy(update={"final": final})
        await self.driver.accepted(words.Charge(idempotency_key=self.driver.key(), line=line))
        return line.event_id

    async def bundle(self, *lines: ChargeLine, reversals: tuple[ReversalLine, ...] = ()) -> None:
        """What metering says next."""
        self.bundles += 1
        await self.driver.publish(charges_rated(*lines, reversals=reversals, number=self.bundles, recorded_at=self.at))
        await self.driver.until("SELECT max(charges_number) FROM heads", self.bundles)

    async def reverse(self, event_id: str, amount: str, *, by: str) -> None:
        """Give back all of an event, of which that amount of usd was taken: by a command, or in a bundle."""
        if by == "bundle":
            await self.bundle(reversals=(reversal_line(event_id, usd=amount),))
            return
        await self.driver.accepted(
            words.ReverseCharge(idempotency_key=self.driver.key(), account="acme", source="demo", event_id=event_id)
        )

    async def wallet(self, account: str = "acme", unit: str = "usd") -> dict[str, Any]:
        """What the balance says of a wallet."""
        answer = await self.http.get(f"/v1/balances/{account}")
        assert answer.status_code == 200, answer.text
        return next(wallet for wallet in answer.json()["wallets"] if wallet["unit"] == unit)

    async def amounts(self, account: str = "acme", unit: str = "usd") -> tuple[str, str, str]:
        """posted, held, available."""
        found = await self.wallet(account, unit)
        return found["posted"], found["held"], found["available"]

    async def left(self, *lots: str) -> list[int]:
        """What is posted of lots, in steps."""
        rows = await self.driver.rows("SELECT 'lot_62_' || lot_id::text, posted FROM lots")
        found = {str(lot)[7:]: int(posted) for lot, posted in rows}
        return [found[lot[7:]] for lot in lots]

    async def plan(self, name: str, amount: str, *, later: bool = False, **more: Any) -> None:
        rule = words.RuleSpec(
            id=name, unit="tokens", amount=amount, period="month", anchor=datetime(2026, 7, 1, 12, tzinfo=UTC), **more
        )
        await self.driver.accepted(
            words.ChangePlan(
                idempotency_key=self.driver.key(), account="acme", plan=name, rules=(rule,), at_period_end=later
            )
        )


@pytest.fixture
async def service(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Service]:
    driver = replace(driver, settings=driver.settings.model_copy(update={"sweep_seconds": 0.02}))
    found = Service(driver, httpx2.AsyncClient())
    monkeypatch.setattr(ledger_app, "now", found)
    for routes in (reading, balance):
        monkeypatch.setattr(routes, "now", found)
    async with driver.running() as http:
        await found.http.aclose()
        found.http = http
        yield found


def usd(amount: str) -> Amount:
    return Amount(amount=amount, unit="usd")


async def test_example_1_a_tree_is_limited_where_a_wallet_is(service: Service) -> None:
    await service.open("acme", "usd")
    await service.open("acme/ana/key_1", "usd_cap")
    await service.grant("100")
    monthly = words.RuleSpec(id="cap", unit="usd_cap", amount="5", period="month", anchor=service.at)
    await service.driver.accepted(words.SetRule(idempotency_key="rule", account="acme/ana/key_1", rule=monthly))
    refused = await service.driver.refused(service.hold(hold_leg("usd", "6"), account="acme/ana/key_1"))
    assert (refused.code, refused.limit_source) == ("insufficient_funds", "acme/ana/key_1")
    assert (refused.required, refused.remaining) == (
        Amount(amount="6", unit="usd_cap"),
        Amount(amount="5", unit="usd_cap"),
    )
    await service.held(hold_leg("usd", "4"), account="acme/ana/key_1")
    assert await service.amounts() == ("100", "4", "96")
    assert await service.amounts("acme/ana/key_1", "usd_cap") == ("5", "4", "1")
    assert (await service.http.get("/v1/balances/acme/ana")).json()["wallets"] == []


async def test_example_2_a_part_is_held_if_that_is_enough(service: Service) -> None:
    await service.open("acme", "usd")
    await service.grant("3")
    before = await service.driver.dump()
    refused = await service.driver.refused(service.hold(hold_leg("usd", "4", "10")))
    assert (refused.required, refused.remaining) == (usd("4"), usd("3"))
    assert await service.driver.dump() == before
    await service.held(hold_leg("usd", "1", "10"))
    assert await service.amounts() == ("3", "3", "0")


async def test_example_3_increments_add_up(service: Service) -> None:
    await service.open("acme", "usd")
    await service.grant("20")
    hold = await service.held(hold_leg("usd", "10"))
    await service.charge("5", hold=hold, final=False)
    await service.charge("5", hold=hold, final=False)
    await service.charge("2", hold=hold)
    assert await service.amounts() == ("8", "0", "8")


async def test_example_4_what_is_above_the_hold_is_taken_then_owed_then_repaid(service: Service) -> None:
    await service.open("acme", "usd")
    await service.grant("11")
    hold = await service.held(hold_leg("usd", "10"))
    await service.charge("12", hold=hold)
    found = await service.wallet()
    assert (found["posted"], found["debt"]) == ("-1", "1")
    lot = await service.grant("5")
    assert await service.left(lot) == [4 * 10**9]
    assert await service.amounts() == ("4", "0", "4")


@pytest.mark.parametrize("by", ["command", "bundle"])
async def test_example_5_what_was_repaid_goes_back_to_the_lot_that_repaid_it(service: Service, by: str) -> None:
    await service.open("acme", "usd")
    lots = [await service.grant("10"), await service.grant("1")]
    event = await service.charge("12")
    lots.append(await service.grant("5"))
    assert await service.left(*lots) == [0, 0, 4 * 10**9]
    await service.reverse(event, "12", by=by)
    assert await service.left(*lots) == [10 * 10**9, 10**9, 5 * 10**9]
    assert await service.amounts() == ("16", "0", "16")


async def test_example_6_the_truth_replaces_the_estimate(service: Service) -> None:
    await service.open("acme", "usd")
    await service.grant("20")
    hold = await service.held(hold_leg("usd", "10"), lifetime_seconds=60, overdue="charge_estimate")
    service.at += timedelta(seconds=61)
    await service.driver.until("SELECT status FROM holds", "estimated")
    assert await service.amounts() == ("10", "0", "10")
    await service.charge("7", hold=hold)
    assert await service.amounts() == ("13", "0", "13")
    await service.charge("4", hold=hold)
    assert await service.amounts() == ("9", "0", "9")


async def test_example_7_an_earmarked_lot_pays_after_its_end(service: Service) -> None:
    await service.open("acme", "usd")
    lot = await service.grant("15", expires_at=service.at + timedelta(hours=1))
    hold = await service.held(hold_leg("usd", "10"), lifetime_seconds=86_400)
    service.at += timedelta(hours=2)
    # At once, whether it has been swept or not; and then swept.
    assert await service.amounts() == ("10", "10", "0")
    await service.driver.until("SELECT sum(expired)::bigint FROM lots", 5 * 10**9)
    assert await service.amounts() == ("10", "10", "0")
    await service.charge("10", hold=hold)
    assert await service.left(lot) == [0]
    assert await service.amounts() == ("0", "0", "0")


async def test_example_8_a_charge_belongs_to_the_period_its_hold_was_placed_in(service: Service) -> None:
    service.at = datetime(2027, 1, 1, tzinfo=UTC)
    await service.open("acme", "usd_cap")
    monthly = words.RuleSpec(id="cap", unit="usd_cap", amount="100", period="month", anchor=service.at)
    await service.driver.accepted(words.SetRule(idempotency_key="rule", account="acme", rule=monthly))
    await service.charge("50", unit="usd_cap")
    service.at = datetime(2027, 1, 31, 23, 59, tzinfo=UTC)
    hold = await service.held(hold_leg("usd_cap", "10"), lifetime_seconds=3600)
    service.at = datetime(2027, 2, 1, 0, 5, tzinfo=UTC)
    await service.charge("12", unit="usd_cap", hold=hold)
    charged = await service.driver.rows(
        "SELECT l.period, sum(j.posted)::bigint FROM journal j JOIN lots l USING (lot_id)"
        " WHERE j.kind = 'charged' GROUP BY 1"
    )
    assert charged == [(0, -62 * 10**9)]
    assert await service.amounts(unit="usd_cap") == ("100", "0", "100")


async def test_example_9_an_upgrade_with_an_open_hold(service: Service) -> None:
    await service.open("acme", "tokens")
    await service.plan("free", "1000")
    hold = await service.held(hold_leg("tokens", "500"))
    await service.plan("pro", "100000")
    voided = "SELECT -sum(posted)::bigint FROM journal WHERE kind = 'lot_voided' AND account = 'acme'"
    assert await service.driver.rows(voided) == [(500,)]
    await service.charge("300", unit="tokens", hold=hold)
    assert await service.driver.rows(voided) == [(700,)]
    assert (await service.amounts(unit="tokens"))[2] == "100000"


async def test_example_10_what_was_counted_while_unlimited_is_never_owed(service: Service) -> None:
    await service.open("acme", "tokens")
    await service.plan("max", "0", policy="unlimited")
    await service.charge("5000000", unit="tokens")
    await service.plan("free", "1000", policy="hard", later=True)
    service.at = datetime(2026, 8, 1, 12, 1, tzinfo=UTC)
    found = await service.wallet(unit="tokens")
    assert (found["posted"], found["available"], found["debt"], found["overage"]) == ("1000", "1000", "0", "0")
    refused = await service.driver.refused(service.hold(hold_leg("tokens", "1001")))
    assert refused.remaining == Amount(amount="1000", unit="tokens")


async def claim(service: Service, amount: str, *, claim: str = "re_1", reason: Any = "refund") -> None:
    await service.driver.accepted(
        words.ClaimPayment(
            idempotency_key=service.driver.key(),
            account="acme",
            payment="pi_1",
            claim=claim,
            reason=reason,
            state="final",
            claimed=usd(amount),
        )
    )


async def test_example_11_a_refund_takes_what_is_there_what_is_released_and_the_rest_is_owed(service: Service) -> None:
    await service.open("acme", "usd")
    await service.grant("50", kind="purchase", reference="pi_1")
    await service.grant("5", kind="bonus", reference="pi_1")
    await service.charge("25")
    hold = await service.held(hold_leg("usd", "10"))
    await claim(service, "50")
    assert (await service.amounts())[:2] == ("-15", "10")
    await service.driver.accepted(words.ReleaseHold(idempotency_key="release", hold=hold, account="acme"))
    found = await service.wallet()
    assert (found["posted"], found["held"], found["debt"]) == ("-25", "0", "25")


async def test_example_11_a_partial_refund_and_a_lost_dispute_take_what_was_paid_and_no_more(service: Service) -> None:
    await service.open("acme", "usd")
    await service.grant("50", kind="purchase", reference="pi_1")
    await claim(service, "20")
    await claim(service, "50", claim="dp_1", reason="dispute")
    assert await service.driver.rows("SELECT clawed FROM lots") == [(50 * 10**9,)]
    assert await service.amounts() == ("0", "0", "0")


@pytest.mark.parametrize("by", ["command", "bundle"])
async def test_example_12_a_lot_pays_within_its_scope_and_gets_back_what_it_paid(service: Service, by: str) -> None:
    await service.open("acme", "usd")
    promo = await service.grant("5", kind="promo", scope=words.LotScope(providers=("openai",)))
    purchase = await service.grant("20", kind="purchase")
    lines = [
        charge_line(f"line-{place}", usd=amount, occurred_at=service.at).model_copy(update={"scope": scope})
        for place, (amount, scope) in enumerate((("3", A), ("4", B), ("4", A)))
    ]
    await service.bundle(*lines)
    assert await service.left(promo, purchase) == [0, 14 * 10**9]
    await service.reverse("line-0", "3", by=by)
    assert await service.left(promo, purchase) == [3 * 10**9, 14 * 10**9]
