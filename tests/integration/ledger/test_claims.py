"""Laws of payments and claims through the running service: what billing says once is granted and taken back once."""

import json
from itertools import permutations
from typing import Any

import httpx2
import pytest

from contracts import ledger as words
from contracts.billing import PaymentClaimed, PaymentReceived, payment_subject
from contracts.money import Amount
from contracts.partition import partition_of
from contracts.streams import LEDGER_PAYMENTS_CONSUMER, PAYMENTS
from services.kit.ids import new_hold_id
from services.kit.publish import Message, publish
from services.ledger.audit_sql import audit
from services.ledger.replay import replay
from tests.builders import NOON, charge_line, charges_rated, hold_leg, open_account, place_hold, release_hold
from tests.conftest import Database, NatsAccount
from tests.eventually import eventually
from tests.integration.ledger.driving import Driver

pytestmark = pytest.mark.anyio

PAYMENT = "pi_1"


def received(account: str = "acme", *, paid: str = "50", bonus: str | None = "5", unit: str = "usd") -> PaymentReceived:
    return PaymentReceived(
        partition=partition_of(account),
        number=1,
        account=account,
        payment=PAYMENT,
        recorded_at=NOON,
        package="usd-50",
        paid=Amount(amount=paid, unit=unit),
        bonus=None if bonus is None else Amount(amount=bonus, unit=unit),
        occurred_at=NOON,
    )


def claimed(
    account: str = "acme", *, amount: str = "50", state: str = "final", number: int = 2, claim: str = "re_1"
) -> PaymentClaimed:
    said: dict[str, Any] = {
        "partition": partition_of(account),
        "number": number,
        "account": account,
        "payment": PAYMENT,
        "recorded_at": NOON,
        "claim": claim,
        "reason": "refund",
        "state": state,
        "claimed": Amount(amount=amount, unit="usd"),
        "occurred_at": NOON,
    }
    return PaymentClaimed.model_validate(said)


class Billing:
    """Says what billing says, over its own connection, without message ids: the server's window must not help."""

    def __init__(self, account: NatsAccount) -> None:
        self._account = account

    async def say(self, *facts: PaymentReceived | PaymentClaimed | tuple[str, bytes]) -> None:
        client = await self._account.connect("billing")
        for fact in facts:
            if isinstance(fact, tuple):
                subject, body = fact
            else:
                verb, body = fact.type.split(".")[2], fact.model_dump_json().encode()
                subject = f"billing.v1.{fact.partition:02d}.payment.{verb}"
            await publish(client, stream=PAYMENTS, message=Message(subject, body, None))
        await client.close()


@pytest.fixture
def billing(nats_account: NatsAccount) -> Billing:
    return Billing(nats_account)


async def all_taken(driver: Driver) -> None:
    """Until everything said is acknowledged."""

    async def taken() -> bool:
        info = await driver.ledger_nats.jetstream().consumer_info(PAYMENTS, LEDGER_PAYMENTS_CONSUMER)
        return not (info.num_pending or info.num_ack_pending)

    await eventually(taken, seconds=15)


async def wallet(http: httpx2.AsyncClient, account: str = "acme") -> dict[str, str]:
    (only,) = (await http.get(f"/v1/balances/{account}")).json()["wallets"]
    return {name: only[name] for name in ("posted", "held", "available", "debt")}


def assert_sound(database: Database) -> None:
    found = replay(database.url("ledger_owner"))
    assert found.is_equal, found
    assert [check.law for check in audit(database.url("ledger")) if check.breaches] == []


async def test_a_payment_is_granted_once_and_its_wallet_opened(
    driver: Driver, billing: Billing, database: Database
) -> None:
    async with driver.running() as http:
        await billing.say(received("acme/ana"), received("acme/ana"))
        await driver.until("SELECT count(*) FROM lots", 2)
        await billing.say(received("acme/ana"))
        await all_taken(driver)
        found = (await http.get("/v1/balances/acme/ana")).json()["wallets"][0]
        assert sorted((lot["kind"], lot["granted"], lot["reference"]) for lot in found["lots"]) == [
            ("bonus", "5", PAYMENT),
            ("purchase", "50", PAYMENT),
        ]
        principals = await driver.rows("SELECT principal, idempotency_key FROM commands ORDER BY batch")
        assert set(principals) == {
            ("billing", f"payment:{PAYMENT}:paid"),
            ("billing", f"payment:{PAYMENT}:paid:open"),
            ("billing", f"payment:{PAYMENT}:bonus"),
        }
        assert_sound(database)


async def test_example_11_through_the_service(driver: Driver, billing: Billing, database: Database) -> None:
    async with driver.running() as http:
        await billing.say(received())
        await all_taken(driver)
        hold = new_hold_id("acme")
        await driver.publish(charges_rated(charge_line("e1", usd="25")))
        await driver.until("SELECT max(charges_number) FROM heads", 1)
        await driver.accepted(place_hold(hold, hold_leg("usd", "10")))
        await billing.say(claimed(), claimed())
        await all_taken(driver)
        assert await wallet(http) == {"posted": "-15", "held": "10", "available": "-25", "debt": "25"}
        assert_sound(database)
        await driver.accepted(release_hold(hold))
        assert await wallet(http) == {"posted": "-25", "held": "0", "available": "-25", "debt": "25"}
        totals = (await http.get("/v1/totals", params={"unit": "usd"})).json()
        assert (totals["granted"], totals["charged"], totals["clawed_back"]) == ("55", "25", "55")
        statement = (await http.get("/v1/statements/acme")).json()["entries"]
        assert "payment_claimed" in {entry["kind"] for entry in statement}
        assert_sound(database)
    await driver.superuser.execute("UPDATE lots SET clawed = clawed - 1 WHERE kind = 'bonus'")
    replayed = replay(database.url("ledger_owner"))
    assert [each.table for each in replayed.tables if each.different] == ["lots"]


async def test_claims_payments_and_charges_may_come_in_any_order(
    driver: Driver, billing: Billing, database: Database
) -> None:
    """Every order on an account of its own. What a hold finds to set aside is the pure core's example."""
    steps = ("received", "claimed", "charged")
    async with driver.running() as http:
        numbers: dict[int, int] = {}
        accounts = {f"order{place}": order for place, order in enumerate(permutations(steps))}
        for account in accounts:
            await driver.accepted(open_account(account, "usd", key=account))

        async def take(account: str, step: str) -> None:
            partition = partition_of(account)
            if step == "charged":
                numbers[partition] = numbers.get(partition, 0) + 1
                line = charge_line(f"{account}-use", account=account, usd="25")
                await driver.publish(charges_rated(line, number=numbers[partition]))
                await driver.until("SELECT count(*) FROM charge_lines WHERE account = %s", 1, account)
            else:
                fact = received(account) if step == "received" else claimed(account, claim=f"re_{account}")
                # A payment is one account's.
                await billing.say(fact.model_copy(update={"payment": f"pi_{account}"}))
                await all_taken(driver)

        for place in range(len(steps)):
            for account, order in accounts.items():
                await take(account, order[place])
        for account in accounts:
            assert await wallet(http, account) == {"posted": "-25", "held": "0", "available": "-25", "debt": "25"}
        assert_sound(database)


async def test_of_the_facts_about_a_claim_the_last_one_counts_however_late_the_others_come(
    driver: Driver, billing: Billing, database: Database
) -> None:
    async with driver.running() as http:
        await billing.say(received(), claimed(number=5, state="void"), claimed(number=3, state="final"))
        await all_taken(driver)
        assert (await wallet(http))["posted"] == "55"
        await billing.say(claimed(number=6, amount="20"), claimed(number=8, state="void"), claimed(number=7))
        await all_taken(driver)
        assert await wallet(http) == {"posted": "55", "held": "0", "available": "55", "debt": "0"}
        assert_sound(database)


async def test_what_a_claim_gave_back_is_not_clawed_back_in_the_totals(driver: Driver, billing: Billing) -> None:
    async with driver.running() as http:
        await billing.say(received(), claimed(amount="20"), claimed(number=3, amount="20", state="void"))
        await all_taken(driver)
        (usd,) = (await http.get("/v1/totals/acme")).json()["units"]
        assert (usd["granted"], usd["clawed_back"], usd["posted"]) == ("55", "0", "55")
        assert usd["by_kind"]["given_back"] == "22"


async def test_what_the_ledger_refuses_of_billing_is_dead_lettered_and_taken_once_when_redriven(
    driver: Driver, billing: Billing
) -> None:
    async with driver.running() as http:
        subject = payment_subject(partition=partition_of("acme"), verb="received")
        elsewhere = payment_subject(partition=(partition_of("acme") + 1) % 64, verb="received")
        refunded = payment_subject(partition=partition_of("acme"), verb="received").replace("received", "refunded")
        body = received().model_dump_json().encode()
        await billing.say(
            (subject, b"{"),
            (subject, json.dumps(json.loads(body) | {"surprise": 1}).encode()),
            (elsewhere, body),
            (refunded, body),
            received(unit="sheep"),
            received(),
        )
        await driver.until("SELECT count(*) FROM dead_letters", 5)
        await all_taken(driver)
        assert (await wallet(http))["posted"] == "55"
        letters = (await http.get("/dead-letters")).json()["dead_letters"]
        (sheep,) = [letter for letter in letters if "sheep" in letter["reason"]]
        still = await http.post(f"/dead-letters/{sheep['id']}/redrive")
        assert (still.status_code, still.json()["code"]) == (422, "still_unreadable")

        # The same payment, another amount: which one is right is for people to find out.
        await billing.say(received(paid="60"))
        await driver.until("SELECT count(*) FROM dead_letters", 6)
        assert (await wallet(http))["posted"] == "55"
        # As if it had been refused once: what was taken by then is not taken again.
        statement = "UPDATE dead_letters SET payload = %s WHERE id = %s RETURNING id"
        await driver.rows(statement, body, sheep["id"])
        assert (await http.post(f"/dead-letters/{sheep['id']}/redrive")).status_code == 200
        assert (await wallet(http))["posted"] == "55"


async def test_claims_over_http_name_all_problems_and_say_whose_payment_it_is(driver: Driver) -> None:
    async with driver.running() as http:
        await driver.funded("acme", "1")
        await driver.funded("acme/ana", "1")
        bought = words.Grant(
            idempotency_key="g", account="acme", unit="usd", amount="50", kind="purchase", reference=PAYMENT
        )
        await driver.accepted(bought)

        async def post(body: dict[str, Any], key: str) -> httpx2.Response:
            return await http.post("/v1/claims", json=body, headers={"Idempotency-Key": key})

        good = {
            "account": "acme",
            "payment": PAYMENT,
            "claim": "re_1",
            "reason": "refund",
            "state": "final",
            "claimed": {"amount": "20", "unit": "usd"},
        }
        taken = await post(good, "1")
        assert taken.status_code == 200, taken.text
        assert [each["posted"] for each in taken.json()["movements"]] == ["-20"]
        again = await post(good, "2")
        assert again.json()["transaction"] == taken.json()["transaction"]
        assert again.json()["movements"] == []
        assert (await wallet(http))["posted"] == "31"
        bad = await post(good | {"payment": "pi 1", "state": "lost", "claimed": {"amount": "x", "unit": "sheep"}}, "3")
        assert bad.status_code == 422
        assert {each["pointer"] for each in bad.json()["errors"]} >= {"/payment", "/state", "/claimed/amount"}
        other = await post(good | {"account": "acme/ana"}, "4")
        assert (other.status_code, other.json()["code"]) == (409, "account_differs")
        closed = await post(good | {"account": "acme/bob"}, "5")
        assert (closed.status_code, closed.json()["code"]) == (404, "account_not_open")


async def test_payments_wait_for_an_owner_and_are_taken_once(
    driver: Driver, billing: Billing, database: Database
) -> None:
    """Said while no ledger runs, and while one stops."""
    accounts = [f"org{number}" for number in range(20)]
    facts = [received(each).model_copy(update={"payment": f"pi_{each}"}) for each in accounts]
    await billing.say(*facts[:10])
    async with driver.running():
        await driver.until("SELECT count(*) > 3 FROM lots", True)
        await billing.say(*facts[10:])
    async with driver.running():
        await driver.until("SELECT count(*) FROM lots", 40)
        await all_taken(driver)
        assert await driver.rows("SELECT DISTINCT posted FROM wallets") == [(55 * 10**9,)]
        assert await driver.rows("SELECT count(*) FROM dead_letters") == [(0,)]
        assert_sound(database)
