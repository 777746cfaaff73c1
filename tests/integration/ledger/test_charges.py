"""Laws of charge bundles: in number order, once, the bad line alone; and of the facts that follow."""

import asyncio
import json
from collections.abc import Mapping

import pytest
from psycopg.errors import RaiseException

from contracts import ledger as words
from contracts.money import Amount
from contracts.partition import PARTITION_COUNT, group_of, partition_of, partitions_of
from contracts.streams import CHARGES, charges_consumer, charges_rated_subject
from services.kit.ids import new_hold_id
from services.ledger.audit_sql import audit
from services.ledger.replay import replay
from tests.builders import charge_line, charges_rated, hold_leg, open_account, place_hold
from tests.conftest import Database
from tests.integration.ledger.driving import Driver

pytestmark = pytest.mark.anyio


async def posted(driver: Driver, account: str = "acme") -> int:
    """Steps of usd posted on an account's wallet."""
    ((found,),) = await driver.rows("SELECT posted FROM wallets WHERE account = %s AND unit = 'usd'", account)
    return int(found)


async def test_bundles_are_taken_in_number_order_whatever_order_they_come_in(driver: Driver) -> None:
    async with driver.running():
        await driver.funded("acme", "100")
        bundles = [charges_rated(charge_line(f"e{n}", usd="1"), number=n) for n in (3, 1, 2, 5, 4)]
        for bundle in bundles:
            await driver.publish(bundle)
        await driver.until("SELECT max(charges_number) FROM heads", 5)
        assert await posted(driver) == 95 * 10**9
        taken = await driver.rows("SELECT number FROM bundles ORDER BY batch, number")
        assert [row[0] for row in taken] == [1, 2, 3, 4, 5]


async def test_a_redelivered_bundle_is_charged_once(driver: Driver) -> None:
    async with driver.running():
        await driver.funded("acme", "100")
        bundle = charges_rated(charge_line("e1", usd="1"), charge_line("e2", usd="2"))
        await driver.publish(bundle, bundle, bundle)
        await driver.publish(bundle)
        await driver.publish(charges_rated(charge_line("e3", usd="1"), number=2))
        await driver.until("SELECT max(charges_number) FROM heads", 2)
        assert await posted(driver) == 96 * 10**9
        assert len(await driver.rows("SELECT FROM charge_lines")) == 3


async def test_a_line_that_comes_again_in_another_bundle_is_charged_once(driver: Driver) -> None:
    async with driver.running():
        await driver.funded("acme", "100")
        await driver.publish(charges_rated(charge_line("e1", usd="1")))
        await driver.publish(
            charges_rated(charge_line("e1", usd="1"), charge_line("e2", usd="1"), charge_line("e2", usd="1"), number=2)
        )
        await driver.until("SELECT max(charges_number) FROM heads", 2)
        assert await posted(driver) == 98 * 10**9
        assert await driver.rows("SELECT FROM dead_letters") == []


async def test_another_bundle_under_a_taken_number_stops_its_partition_and_no_other(driver: Driver) -> None:
    async with driver.running():
        await driver.funded("acme", "100")
        await driver.funded("other", "100")
        assert partition_of("acme") != partition_of("other")
        await driver.publish(charges_rated(charge_line("e1", usd="1")))
        await driver.until("SELECT max(charges_number) FROM heads", 1)
        before = await driver.dump()
        await driver.publish(charges_rated(charge_line("e9", usd="9")))
        await driver.publish(charges_rated(charge_line("o1", account="other", usd="1")))
        await driver.until("SELECT count(*) FROM charge_lines", 2)
        assert await posted(driver) == 99 * 10**9
        assert [row for row in (await driver.dump())["charge_lines"] if row in before["charge_lines"]]
        durable = charges_consumer(group_of(partition_of("acme")))
        info = await driver.ledger_nats.jetstream().consumer_info(CHARGES, durable)
        assert info.num_ack_pending == 1


async def test_of_a_group_that_is_partly_anothers_what_is_owned_is_charged_and_the_rest_waits(driver: Driver) -> None:
    """They come through one consumer: what is not owned here is given back, again and again, and is not lost."""
    mine = partition_of("acme")
    neighbours = set(partitions_of(group_of(mine))) - {mine}
    other = next(name for name in map("org{}".format, range(10_000)) if partition_of(name) in neighbours)
    async with driver.running():
        await driver.funded("acme", "100")
        await driver.funded(other, "100")
        await driver.superuser.execute(
            "UPDATE leases SET owner = 'thief', epoch = epoch + 1, expires_at = clock_timestamp() + interval '1 hour'"
            " WHERE partition = %s",
            [partition_of(other)],
        )
        await driver.until(
            "SELECT count(*) FROM leases WHERE owner <> 'thief' AND expires_at > clock_timestamp()",
            PARTITION_COUNT - 1,
        )
        # The loss is noticed with the next renewal.
        await asyncio.sleep(1.5 * driver.settings.lease_seconds)
        await driver.publish(charges_rated(charge_line("o1", account=other, usd="1")))
        for number in (1, 2, 3):
            await driver.publish(charges_rated(charge_line(f"e{number}", usd="1"), number=number))
        await driver.until("SELECT charges_number FROM heads WHERE partition = %s", 3, mine)
        assert (await posted(driver), await posted(driver, other)) == (97 * 10**9, 100 * 10**9)
        await driver.superuser.execute("UPDATE leases SET owner = NULL WHERE partition = %s", [partition_of(other)])
        await driver.until("SELECT charges_number FROM heads WHERE partition = %s", 1, partition_of(other))
        assert await posted(driver, other) == 99 * 10**9


async def test_a_bad_line_is_dead_lettered_alone_and_charged_once_when_redriven(driver: Driver) -> None:
    async with driver.running() as http:
        await driver.funded("acme", "100")
        stranger = new_hold_id("acme")
        await driver.accepted(place_hold(stranger, hold_leg("usd", "1"), key="h"))
        await driver.accepted(open_account("acme/ana", key="o"))
        await driver.publish(charges_rated(charge_line("e0", usd="1")))
        good = charge_line("good", usd="1")
        bad: Mapping[str, object] = {
            "closed": charge_line("closed", account="acme/late", usd="1"),
            "unit": charge_line("unit", amounts={"sheep": "1"}),
            "hold": charge_line("hold", account="acme/ana", usd="1", hold=stranger),
            "again": charge_line("e0", usd="2"),
            "negative": charge_line("negative", usd="-1"),
        }
        lines = [
            json.loads(line.model_dump_json()) for line in (good, *bad.values()) if hasattr(line, "model_dump_json")
        ]
        lines += [{"nonsense": True}, 17, {**lines[0], "event_id": "nul\u0000"}]
        body = json.loads(charges_rated(good, number=2).model_dump_json()) | {"lines": lines}
        await driver.publish_raw((charges_rated_subject(partition_of("acme")), json.dumps(body).encode()))
        await driver.until("SELECT max(charges_number) FROM heads", 2)
        letters = (await http.get("/dead-letters")).json()["dead_letters"]
        reasons = {letter["reason"].split(": ", 1)[1].partition(";")[0] for letter in letters}
        assert len(letters) == 8
        assert reasons >= {"the account acme/late is not open", "the catalogue has no unit 'sheep'"}
        assert await posted(driver) == 98 * 10**9

        await driver.accepted(open_account("acme/late", key="late"))
        (letter,) = [each for each in letters if "acme/late" in each["reason"]]
        redriven = await http.post(f"/dead-letters/{letter['id']}/redrive")
        assert redriven.status_code == 200, redriven.text
        assert (await http.post(f"/dead-letters/{letter['id']}/redrive")).status_code == 409
        assert await posted(driver) == 97 * 10**9
        # As if the process had died between charging and noting it.
        await driver.rows("UPDATE dead_letters SET redriven_at = NULL RETURNING id")
        assert (await http.post(f"/dead-letters/{letter['id']}/redrive")).status_code == 200
        assert await posted(driver) == 97 * 10**9
        (unit,) = [each for each in letters if "sheep" in each["reason"]]
        still = await http.post(f"/dead-letters/{unit['id']}/redrive")
        assert (still.status_code, still.json()["code"]) == (422, "still_unreadable")


async def test_what_is_no_bundle_is_put_aside_and_blocks_nothing(driver: Driver) -> None:
    async with driver.running():
        await driver.funded("acme", "100")
        subject = charges_rated_subject(partition_of("acme"))
        wrong = charges_rated(charge_line("x")).model_dump_json().replace('"partition":', '"partition":6', 1).encode()
        await driver.publish_raw((subject, b"{"), (subject, b"\xff"), (subject, b"[]"), (subject, wrong))
        await driver.publish(charges_rated(charge_line("e1", usd="1")))
        await driver.until("SELECT max(charges_number) FROM heads", 1)
        await driver.until("SELECT count(*) FROM dead_letters", 4)


async def test_a_full_bundle_is_few_entries_and_every_line_is_explained(driver: Driver, database: Database) -> None:
    async with driver.running() as http:
        for number in range(20):
            await driver.funded(f"acme/{number}", "1")
        lines = [charge_line(f"e{n}", account=f"acme/{n % 20}", usd="0.01") for n in range(1000)]
        await driver.publish(
            charges_rated(*lines),
            charges_rated(*[charge_line(f"f{n}", account=f"acme/{n % 20}", usd="0.01") for n in range(1000)], number=2),
        )
        await driver.until("SELECT max(charges_number) FROM heads", 2)
        entries = await driver.rows("SELECT count(*) FROM journal WHERE kind = 'charged' GROUP BY transaction_id")
        assert [row[0] for row in entries] == [21, 21]
        totals = (await http.get("/v1/totals", params={"unit": "usd", "account_prefix": "acme/"})).json()
        assert totals["charged"] == "20"
        assert totals["granted"] == "20"
        assert totals["posted"] == "0"
        assert totals["charge_lines_by_source"] == {"demo": 2000}
        assert not any(check.breaches for check in audit(database.url("ledger")))


async def test_what_a_bundle_charges_is_told_in_as_few_facts_as_hold_its_accounts(driver: Driver) -> None:
    async with driver.running():
        await driver.funded("acme", "100")
        accounts = [f"acme/{number}" for number in range(words.CHARGED_ACCOUNTS_MAX + 2)]
        for account in accounts:
            await driver.accepted(open_account(account, key=account))
        lines = [charge_line(f"e{place}", account=account, usd="0.1") for place, account in enumerate(accounts)]
        await driver.publish(
            charges_rated(*lines, charge_line("again", account=accounts[0], amounts={"usd": "0.2", "tokens": "3"}))
        )
        await driver.publish(charges_rated(charge_line("alone", account=accounts[1], usd="1"), number=2))
        await driver.until("SELECT max(charges_number) FROM heads", 2)
        many, rest, alone = [fact for fact in await driver.facts() if isinstance(fact, words.UsageCharged)]
        assert len({many.transaction, rest.transaction, alone.transaction}) == 2
        assert many.transaction == rest.transaction
        assert [each.account for fact in (many, rest) for each in fact.accounts] == accounts
        usd = Amount(amount="0.1", unit="usd")
        first, *others = (*many.accounts, *rest.accounts)
        assert (first.lines, {each.unit: each.amount for each in first.charged}) == (2, {"usd": "0.3", "tokens": "3"})
        assert {(each.lines, each.charged) for each in others} == {(1, (usd,))}
        assert [(each.account, each.lines) for each in alone.accounts] == [(accounts[1], 1)]
        assert len(rest.accounts) == 2


async def test_every_fact_is_told_in_number_order_and_reads_as_the_contract_says(driver: Driver) -> None:
    async with driver.running() as http:
        await driver.funded("acme", "5")
        one, two = new_hold_id("acme"), new_hold_id("acme")
        await driver.accepted(place_hold(one, hold_leg("usd", "1"), key="1"))
        await driver.accepted(place_hold(two, hold_leg("usd", "2"), hold_leg("tokens", "7"), key="2"))
        body = {"account": "acme"}
        released = await http.post(f"/v1/holds/{two}/release", json=body, headers={"Idempotency-Key": "3"})
        assert released.status_code == 200, released.text
        await driver.publish(charges_rated(charge_line("e1", usd="7", hold=one), charge_line("e2", usd="0.5")))
        await driver.until("SELECT max(charges_number) FROM heads", 1)
        await driver.until("SELECT max(number) FROM relayed", 8)
        read = await driver.facts()
        last, exhausted, settled, release, placed = reversed(read[-5:])
        assert isinstance(last, words.UsageCharged)
        assert isinstance(exhausted, words.BalanceExhausted)
        assert exhausted.available == Amount(amount="-2.5", unit="usd")
        assert isinstance(settled, words.HoldSettled)
        assert (settled.hold, settled.released) == (one, ())
        assert [(each.account, each.lines, each.charged[0].amount) for each in last.accounts] == [("acme", 2, "7.5")]
        assert isinstance(release, words.HoldReleased)
        assert [(each.amount, each.unit) for each in release.released] == [("2", "usd")]
        assert isinstance(placed, words.HoldPlaced)
        assert [(each.amount, each.unit) for each in placed.held] == [("2", "usd")]
        await driver.funded("acme", "10")
        granted, recovered = (await driver.facts())[-2:]
        assert isinstance(granted, words.LotGranted)
        assert granted.repaid.amount == "2.5"
        assert isinstance(recovered, words.BalanceRecovered)
        assert (recovered.available.amount, recovered.threshold) == ("7.5", None)


async def test_a_hold_that_was_charged_first_is_never_placed(driver: Driver) -> None:
    async with driver.running():
        await driver.funded("acme", "5")
        hold = new_hold_id("acme")
        await driver.publish(charges_rated(charge_line("e1", usd="1", hold=hold)))
        await driver.until("SELECT max(charges_number) FROM heads", 1)
        assert (await driver.refused(place_hold(hold, hold_leg("usd", "1"), key="late"))).code == "hold_settled"


async def test_replay_rebuilds_every_projection_and_notices_a_difference(driver: Driver, database: Database) -> None:
    async with driver.running():
        for account in ("acme", "acme/ana", "other"):
            await driver.funded(account, "5")
        hold = new_hold_id("acme")
        await driver.accepted(place_hold(hold, hold_leg("usd", "1"), key="1"))
        await driver.accepted(place_hold(new_hold_id("acme"), hold_leg("usd", "2"), key="2"))
        lines = [charge_line(f"e{n}", account="acme/ana", usd="0.1") for n in range(70)]
        await driver.publish(charges_rated(charge_line("h", usd="3", hold=hold), *lines))
        await driver.until("SELECT max(charges_number) FROM heads", 1)
        found = replay(database.url("ledger_owner"))
        assert found.is_equal, found
        assert {table.table: table.live for table in found.tables} == {
            "accounts": 3,
            "wallets": 3,
            "rules": 0,
            "lots": 4,
            "holds": 2,
            "hold_lots": 2,
            "payments": 0,
            "claims": 0,
        }
        assert not any(check.breaches for check in audit(database.url("ledger")))

    await driver.superuser.execute("UPDATE wallets SET posted = posted + 1 WHERE account = 'acme'")
    found = replay(database.url("ledger_owner"))
    assert not found.is_equal
    assert [table.table for table in found.tables if table.different] == ["wallets"]
    broken = [check.law for check in audit(database.url("ledger")) if check.breaches]
    assert broken == ["a wallet has what its lots and debts have"]


@pytest.mark.parametrize("table", ["journal", "commands", "bundles", "charge_lines"])
async def test_the_record_is_only_ever_added_to(driver: Driver, table: str) -> None:
    async with driver.running():
        await driver.funded("acme", "5")
        await driver.publish(charges_rated(charge_line("e1", usd="1")))
        await driver.until("SELECT max(charges_number) FROM heads", 1)
    for statement in (f"UPDATE {table} SET partition = 1", f"DELETE FROM {table}", f"TRUNCATE {table}"):
        with pytest.raises(RaiseException, match="only ever added"):
            await driver.superuser.execute(statement)
