"""Laws of holds through the running service: on all wallets of the path at once, with what remains, and listed."""

import pytest

from contracts import ledger as words
from contracts.money import Amount
from services.kit.ids import new_hold_id
from services.ledger.audit_sql import audit
from services.ledger.replay import replay
from tests.builders import charge_line, grant, hold_leg, open_account, place_hold, release_hold
from tests.conftest import Database
from tests.integration.ledger.driving import Driver

pytestmark = pytest.mark.anyio

KEY = "acme/ana/key_1"


def remaining(reply: words.Accepted) -> dict[tuple[str, str], str]:
    return {(each.account, each.unit): each.available for each in reply.remaining}


async def opened(driver: Driver) -> None:
    """acme has usd 100, its key a spending limit of 5 and 10 calls, ana nothing."""
    await driver.funded("acme", "100")
    await driver.accepted(open_account(KEY, "usd_cap", "calls", key="key"))
    await driver.accepted(grant(KEY, "5", unit="usd_cap", kind="plan", key="cap"))
    await driver.accepted(grant(KEY, "10", unit="calls", kind="plan", key="calls"))


async def test_example_1_through_the_service(driver: Driver, database: Database) -> None:
    async with driver.running() as http:
        await opened(driver)
        refusal = await driver.refused(place_hold(new_hold_id("acme"), hold_leg("usd", "6"), account=KEY, key="6"))
        assert (refusal.code, refusal.limit_source) == ("insufficient_funds", KEY)
        assert refusal.required == Amount(amount="6", unit="usd_cap")
        assert refusal.remaining == Amount(amount="5", unit="usd_cap")
        hold = new_hold_id("acme")
        command = place_hold(hold, hold_leg("usd", "4"), account=KEY, key="4")
        placed = await driver.accepted(command)
        assert remaining(placed) == {("acme", "usd"): "96", (KEY, "usd_cap"): "1"}
        assert (await driver.accepted(command)).remaining == placed.remaining
        for account, unit in (("acme", "usd"), (KEY, "usd_cap")):
            wallets = (await http.get(f"/v1/balances/{account}")).json()["wallets"]
            assert {each["unit"]: each["held"] for each in wallets}[unit] == "4"
        assert (await http.get("/v1/balances/acme/ana")).json()["wallets"] == []
        assert replay(database.url("ledger_owner")).is_equal


async def test_a_hold_of_several_units_stands_or_falls_together_and_is_settled_on_every_wallet(
    driver: Driver, database: Database
) -> None:
    async with driver.running() as http:
        await opened(driver)
        hold = new_hold_id("acme")
        legs = (hold_leg("usd", "2"), hold_leg("calls", "1"), hold_leg("tokens", "1000"))
        placed = await driver.accepted(place_hold(hold, *legs, account=KEY, key="h"))
        assert remaining(placed) == {("acme", "usd"): "98", (KEY, "usd_cap"): "3", (KEY, "calls"): "9"}
        short = place_hold(new_hold_id("acme"), hold_leg("usd", "1"), hold_leg("calls", "10"), account=KEY, key="s")
        assert (await driver.refused(short)).limit_source == KEY
        line = charge_line("e1", account=KEY, amounts={"usd": "1.5", "calls": "1", "tokens": "900"}, hold=hold)
        await driver.accepted(words.Charge(idempotency_key="c", line=line))
        wallets = (await http.get(f"/v1/balances/{KEY}")).json()["wallets"]
        assert {each["unit"]: (each["posted"], each["held"]) for each in wallets} == {
            "calls": ("9", "0"),
            "usd_cap": ("3.5", "0"),
        }
        (usd,) = (await http.get("/v1/balances/acme")).json()["wallets"]
        assert (usd["posted"], usd["held"]) == ("98.5", "0")
        assert [check.law for check in audit(database.url("ledger")) if check.breaches] == []
        assert replay(database.url("ledger_owner")).is_equal


async def test_open_holds_are_listed_for_an_account_and_all_below_it(driver: Driver) -> None:
    async with driver.running() as http:
        await opened(driver)
        await driver.accepted(open_account("acme2", key="2"))
        holds = sorted(new_hold_id("acme") for _ in range(5))
        accounts = ("acme", KEY, "acme", KEY, KEY)
        for number, (hold, account) in enumerate(zip(holds, accounts, strict=True)):
            await driver.accepted(place_hold(hold, hold_leg("usd", "1"), account=account, key=f"h{number}"))
        await driver.accepted(release_hold(holds[1], account=KEY, key="r"))

        async def listed(account: str, **query: str) -> tuple[list[str], str | None]:
            page = (await http.get("/v1/holds", params={"account": account} | query)).json()
            return [each["hold"] for each in page["holds"]], page["next_after"]

        open_holds = [holds[0], *holds[2:]]
        assert await listed("acme") == (open_holds, None)
        assert await listed("acme/ana") == (holds[3:], None)
        # A neighbour by its letters that nobody opened.
        assert (await http.get("/v1/holds", params={"account": "acm"})).status_code == 404
        first, after = await listed("acme", limit="3")
        assert (first, after) == (open_holds[:3], open_holds[2])
        assert await listed("acme", limit="3", after=after or "") == (open_holds[3:], None)

        found = (await http.get(f"/v1/holds/{holds[3]}")).json()
        assert (found["account"], found["status"], found["ended_at"]) == (KEY, "placed", None)
        assert found["wallets"] == [
            {"account": "acme", "unit": "usd", "placed": "1", "held": "1", "estimated": "0"},
            {"account": KEY, "unit": "usd_cap", "placed": "1", "held": "1", "estimated": "0"},
        ]
        assert [(leg["unit"], leg["amount"]) for leg in found["legs"]] == [("usd", "1"), ("usd_cap", "1")]
        ended = (await http.get(f"/v1/holds/{holds[1]}")).json()
        assert ended["status"] == "released"
        assert {each["held"] for each in ended["wallets"]} == {"0"}
        assert (await http.get(f"/v1/holds/{new_hold_id('acme')}")).status_code == 404
        assert (await http.get("/v1/holds/nonsense")).status_code == 422
        assert (await http.get("/v1/holds", params={"account": "acme//x"})).status_code == 422
