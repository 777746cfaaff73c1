"""Laws of lists: each command as if it came alone, or all of them or none."""

import pytest

from contracts import ledger as words
from contracts.money import Amount
from services.kit.ids import new_hold_id
from services.ledger.replay import replay
from tests.builders import charge_line, grant, hold_leg, open_account, place_hold
from tests.conftest import Database
from tests.integration.ledger.driving import Driver

pytestmark = pytest.mark.anyio


def statuses(listed: words.Listed) -> list[str]:
    return [reply.code if isinstance(reply, words.Refused | words.Failed) else reply.status for reply in listed.replies]


async def test_commands_of_a_list_are_decided_each_for_itself_in_order(driver: Driver) -> None:
    async with driver.running():
        await driver.accepted(open_account("acme", "usd"))
        commands = (
            place_hold(new_hold_id("acme"), hold_leg("usd", "1"), key="early"),
            grant("acme", "1", key="g"),
            place_hold(new_hold_id("acme"), hold_leg("usd", "1"), key="late"),
            grant("acme", "5", key="g"),
        )
        with pytest.raises(ValueError, match="a key of its own"):
            words.CommandList(commands=commands)
        listed = await driver.listed(*commands[:3])
        assert statuses(listed) == ["insufficient_funds", "accepted", "accepted"]
        # Each has its own key: sent again, alone or not, those that were accepted are replayed.
        again = await driver.listed(commands[2], commands[1])
        assert all(isinstance(reply, words.Accepted) and reply.replayed for reply in again.replies)
        assert (await driver.accepted(commands[1])).replayed
        other = await driver.listed(commands[3])
        assert statuses(other) == ["conflict"]
        assert await driver.rows("SELECT count(*) FROM commands") == [(3,)]


async def test_a_list_that_is_all_or_nothing_is_refused_without_a_trace(driver: Driver) -> None:
    async with driver.running():
        await driver.funded("acme", "10")
        before = await driver.dump()
        hold = new_hold_id("acme")
        asked = words.CommandList(
            commands=(
                open_account("acme/ana", "usd", key="1"),
                words.Transfer(idempotency_key="2", account="acme", to_account="acme/ana", unit="usd", amount="6"),
                place_hold(hold, hold_leg("usd", "1"), key="3"),
                words.Charge(idempotency_key="4", line=charge_line("e1", usd="1", hold=hold)),
                words.Debit(
                    idempotency_key="5", account="acme", debit="fee", amounts=(Amount(amount="9", unit="usd"),)
                ),
            ),
            all_or_nothing=True,
            idempotency_key="all",
        )
        refused = await driver.commands(asked)
        assert isinstance(refused, words.Refused)
        assert (refused.code, refused.index, refused.limit_source) == ("insufficient_funds", 4, "acme")
        assert refused.remaining == Amount(amount="3", unit="usd")
        assert await driver.dump() == before
        # Nothing of it is remembered in memory either.
        assert (await driver.refused(grant("acme/ana", "1", key="g"))).code == "account_not_open"
        placed = await driver.accepted(place_hold(hold, hold_leg("usd", "10"), key="h"))
        assert [each.available for each in placed.remaining] == ["0"]


async def test_a_list_that_is_all_or_nothing_has_one_outcome_for_ever(driver: Driver, database: Database) -> None:
    async with driver.running() as http:
        await driver.funded("acme", "10")
        hold = new_hold_id("acme")
        commands = (
            place_hold(hold, hold_leg("usd", "4"), key="1"),
            words.Charge(idempotency_key="2", line=charge_line("e1", usd="3", hold=hold)),
            words.Charge(idempotency_key="3", line=charge_line("e2", usd="1")),
            words.ReverseCharge(idempotency_key="4", account="acme", source="demo", event_id="e2"),
        )
        asked = words.CommandList(commands=commands, all_or_nothing=True, idempotency_key="all")
        before = await driver.dump()
        tried = await driver.commands(asked.model_copy(update={"dry_run": True}))
        assert isinstance(tried, words.Listed)
        assert tried.dry_run
        assert statuses(tried) == ["accepted"] * 4
        assert await driver.dump() == before
        done = await driver.commands(asked)
        assert isinstance(done, words.Listed)
        assert statuses(done) == ["accepted"] * 4
        assert len({reply.transaction for reply in done.replies if isinstance(reply, words.Accepted)}) == 4
        after = await driver.dump()
        assert await driver.commands(asked) == done.model_copy(update={"replayed": True})
        fewer = await driver.commands(asked.model_copy(update={"commands": commands[:2]}))
        assert isinstance(fewer, words.Failed)
        assert fewer.code == "conflict"
        assert await driver.dump() == after
        assert await driver.rows("SELECT posted, held FROM wallets") == [(7 * 10**9, 0)]
        assert await driver.rows("SELECT principal, idempotency_key FROM commands WHERE idempotency_key = 'all'") == [
            ("tester", "all")
        ]
        assert len(await driver.facts(words.UsageCharged)) == 2
        assert replay(database.url("ledger_owner")).is_equal

        headers = {"Idempotency-Key": "http"}
        bodies = [command.model_dump(mode="json", exclude={"idempotency_key"}) for command in commands]
        refused = await http.post("/v1/lists", json={"all_or_nothing": True, "commands": bodies}, headers=headers)
        assert (refused.status_code, refused.json()["code"], refused.json()["index"]) == (409, "hold_settled", 0)
        keyless = await http.post("/v1/lists", json={"all_or_nothing": True, "commands": bodies[1:]})
        assert (keyless.status_code, keyless.json()["code"]) == (400, "idempotency_key_missing")
        each = await http.post(
            "/v1/lists", json={"commands": [body | {"idempotency_key": str(n)} for n, body in enumerate(bodies)]}
        )
        assert each.status_code == 200, each.text
        assert [reply["status"] for reply in each.json()["replies"]] == ["refused", "refused", "refused", "accepted"]
        bad = await http.post("/v1/lists", json={"commands": [{"command": "grant", "account": "acme", "unit": "x"}]})
        assert {found["pointer"] for found in bad.json()["errors"]} >= {
            "/commands/0/idempotency_key",
            "/commands/0/amount",
        }


async def test_a_dry_run_of_a_list_sees_its_own_earlier_commands_and_changes_nothing(driver: Driver) -> None:
    async with driver.running():
        await driver.accepted(open_account("acme", "usd"))
        before = await driver.dump()
        tried = await driver.commands(
            words.CommandList(
                commands=(
                    grant("acme", "2", key="1"),
                    place_hold(new_hold_id("acme"), hold_leg("usd", "3"), key="2"),
                    place_hold(new_hold_id("acme"), hold_leg("usd", "2"), key="3"),
                ),
                dry_run=True,
            )
        )
        assert isinstance(tried, words.Listed)
        assert statuses(tried) == ["accepted", "insufficient_funds", "accepted"]
        assert await driver.dump() == before


async def test_a_list_concerns_one_tree() -> None:
    with pytest.raises(ValueError, match="one tree"):
        words.CommandList(commands=(open_account("acme"), open_account("other", key="2")))
    with pytest.raises(ValueError, match="a key if it is all or nothing"):
        words.CommandList(commands=(open_account("acme"),), all_or_nothing=True)
    with pytest.raises(ValueError, match="whole list"):
        words.CommandList(commands=(open_account("acme").model_copy(update={"dry_run": True}),))
