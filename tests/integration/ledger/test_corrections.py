"""Laws of what bundles give back: once, to the very lots, the bad line alone; all follows from the journal."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any, Final

import httpx2
import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from contracts import ledger as words
from contracts.metering import ChargeLine, ReversalLine
from contracts.money import Amount
from contracts.partition import group_of, partition_of
from contracts.streams import CHARGES, charges_consumer, charges_rated_subject
from infra.cli import app_for
from infra.commands import ledger as commands
from services.kit.ids import new_hold_id
from services.ledger import audit_sql
from services.ledger.audit import audit
from services.ledger.replay import replay
from services.ledger.signing import new_key, signer
from tests.builders import charge_line, charges_rated, hold_leg, open_account, place_hold, reversal_line
from tests.conftest import Database
from tests.integration.ledger.driving import Driver

pytestmark = pytest.mark.anyio

SUBJECT: Final = charges_rated_subject(partition_of("acme"))


@dataclass
class Corrected:
    """A ledger that is told of charges and corrections."""

    driver: Driver
    http: httpx2.AsyncClient
    bundles: int = 0

    async def bundle(self, *lines: ChargeLine, reversals: tuple[ReversalLine, ...] = ()) -> None:
        """The next bundle, until it was taken."""
        self.bundles += 1
        await self.driver.publish(charges_rated(*lines, reversals=reversals, number=self.bundles))
        await self.taken()

    async def taken(self) -> None:
        """All bundles so far are."""
        await self.driver.until("SELECT max(charges_number) FROM heads", self.bundles)

    async def usd(self, account: str = "acme") -> str:
        """What is posted."""
        found = (await self.http.get(f"/v1/balances/{account}")).json()
        return str(next(wallet["posted"] for wallet in found["wallets"] if wallet["unit"] == "usd"))

    async def letters(self) -> list[dict[str, Any]]:
        """Dead letters, the first of them first."""
        found = (await self.http.get("/dead-letters")).json()["dead_letters"]
        return sorted(found, key=lambda letter: letter["reason"])

    async def charge(self, event_id: str) -> dict[str, Any]:
        """The only line of an event."""
        (line,) = (await self.http.get(f"/v1/charges/demo/{event_id}")).json()["lines"]
        found: dict[str, Any] = line
        return found


@pytest.fixture
async def corrected(driver: Driver, database: Database) -> AsyncIterator[Corrected]:
    """At the end of each test all projections follow from the journal, which breaks no law."""
    pem = new_key()
    settings = driver.settings.model_copy(update={"ledger_signing_key": SecretStr(pem)})
    driver = replace(driver, settings=settings)
    async with driver.running() as http:
        await driver.funded("acme", "100")
        yield Corrected(driver, http)
    for by_evolve in (False, True):
        found = await asyncio.to_thread(replay, database.url("ledger_owner"), by_evolve=by_evolve)
        assert found.is_equal, found
    keys = {signer(pem).key_id: signer(pem).public_key}
    caps = {"tokens", "calls", "usd_cap"}
    audited = await asyncio.to_thread(audit, database.url("ledger"), keys=keys, caps=caps, processes=1)
    assert audited.is_clean, audited.findings
    assert [check for check in audit_sql.audit(database.url("ledger")) if check.breaches] == []


async def test_a_redelivered_reversal_gives_back_once_in_whatever_order_bundles_come(corrected: Corrected) -> None:
    driver = corrected.driver
    bundles = [
        charges_rated(charge_line("e1", usd="9"), number=1),
        charges_rated(reversals=(reversal_line("e1", usd="2"),), number=2),
        charges_rated(charge_line("e2", usd="1"), reversals=(reversal_line("e1", usd="3"),), number=3),
    ]
    for bundle in (bundles[2], bundles[1], bundles[2], bundles[0], bundles[1], bundles[0]):
        await driver.publish(bundle)
    await driver.until("SELECT max(charges_number) FROM heads", 3)
    before = await driver.dump()
    await driver.publish(*bundles, *bundles)
    await driver.publish(charges_rated(charge_line("e3", usd="1"), number=4))
    await driver.until("SELECT max(charges_number) FROM heads", 4)
    assert await corrected.usd() == "94"
    assert (await driver.dump())["reversals"] == before["reversals"]
    assert len(before["reversals"]) == 2


async def test_other_reversals_under_a_taken_number_stop_the_partition_and_change_nothing(corrected: Corrected) -> None:
    driver = corrected.driver
    await corrected.bundle(charge_line("e1", usd="9"))
    await corrected.bundle(reversals=(reversal_line("e1", usd="2"),))
    before = await driver.dump()
    await driver.publish(charges_rated(reversals=(reversal_line("e1", usd="3"),), number=2))
    # Of another partition, taken after it was delivered.
    await driver.funded("other", "1")
    await driver.publish(charges_rated(charge_line("o1", account="other", usd="1")))
    await driver.until("SELECT count(*) FROM charge_lines", 2)
    durable = charges_consumer(group_of(partition_of("acme")))
    info = await driver.ledger_nats.jetstream().consumer_info(CHARGES, durable)
    assert info.num_ack_pending == 1
    for table, rows in (await driver.dump()).items():
        mine = [row for row in rows if row.startswith(f"({partition_of('acme')},")]
        assert mine == [row for row in before[table] if row.startswith(f"({partition_of('acme')},")], table


async def test_reversals_are_done_before_the_lines_of_their_bundle(corrected: Corrected) -> None:
    await corrected.bundle(charge_line("e1", usd="100"))
    await corrected.bundle(
        charge_line("e2", usd="99"),
        reversals=(
            reversal_line("e1", usd="60"),
            reversal_line("e1", usd="40", correction="c2"),
            reversal_line("e2", usd="1"),
        ),
    )
    kinds = await corrected.driver.rows(
        "SELECT DISTINCT kind, lot_kind FROM journal WHERE posted <> 0 AND kind <> 'lot_granted' AND lot_id IS NOT NULL"
    )
    assert sorted(kinds) == [("charged", "adjustment"), ("reversed", "adjustment")]
    assert await corrected.usd() == "1"
    (letter,) = await corrected.letters()
    assert letter["reason"].startswith("reversal 3 of bundle 2: ")


async def test_a_line_and_its_reversal_in_bundles_that_come_at_once_are_both_done(corrected: Corrected) -> None:
    bundles = [charges_rated(charge_line(f"e{n}", usd="5"), number=2 * n + 1) for n in range(20)]
    backs = [charges_rated(reversals=(reversal_line(f"e{n}", usd="4"),), number=2 * n + 2) for n in range(20)]
    await corrected.driver.publish(*(each for pair in zip(bundles, backs, strict=True) for each in pair))
    corrected.bundles = 40
    await corrected.taken()
    assert await corrected.usd() == "80"
    assert await corrected.letters() == []


async def test_more_than_is_left_is_dead_lettered_alone_and_the_rest_of_the_bundle_stands(corrected: Corrected) -> None:
    await corrected.bundle(charge_line("e1", usd="9"), charge_line("e2", usd="9"))
    await corrected.bundle(reversals=(reversal_line("e1", usd="5"),))
    too_much = reversal_line("e1", usd="4.5", correction="c2", reason="again")
    await corrected.bundle(
        charge_line("e3", usd="1"), reversals=(too_much, reversal_line("e2", usd="9"), reversal_line("e1", usd="4"))
    )
    assert await corrected.usd() == "99"
    (letter,) = await corrected.letters()
    assert letter["reason"].startswith("reversal 1 of bundle 3: ")
    whole = (await corrected.http.get(f"/dead-letters/{letter['id']}")).json()
    assert [problem["code"] for problem in whole["problems"]] == ["more_than_charged"]
    ((payload,),) = await corrected.driver.rows("SELECT payload FROM dead_letters")
    assert ReversalLine.model_validate_json(bytes(payload)) == too_much
    assert await corrected.driver.rows("SELECT lines, lines_dead FROM bundles WHERE number = 3") == [(4, 1)]
    still = await corrected.http.post(f"/dead-letters/{letter['id']}/redrive")
    assert (still.status_code, still.json()["code"]) == (422, "still_unreadable")


async def test_a_reversal_that_came_too_early_is_done_once_when_redriven(corrected: Corrected) -> None:
    await corrected.bundle(reversals=(reversal_line("e1", usd="4", correction="c1", reason="a mistake"),))
    (letter,) = await corrected.letters()
    await corrected.bundle(charge_line("e1", usd="9"))
    redriven = await corrected.http.post(f"/dead-letters/{letter['id']}/redrive")
    assert redriven.status_code == 200, redriven.text
    # As if the process had died between giving back and noting it.
    await corrected.driver.rows("UPDATE dead_letters SET redriven_at = NULL RETURNING id")
    assert (await corrected.http.post(f"/dead-letters/{letter['id']}/redrive")).status_code == 200
    assert await corrected.usd() == "95"
    (given_back,) = (await corrected.charge("e1"))["reversals"]
    assert (given_back["correction"], given_back["bundle"], given_back["reason"]) == ("c1", None, "a mistake")


async def test_what_is_no_reversal_is_dead_lettered_as_it_came_and_its_neighbours_are_done(
    corrected: Corrected,
) -> None:
    await corrected.bundle(charge_line("e1", amounts={"usd": "9", "tokens": "7"}))
    good = json.loads(reversal_line("e1", usd="1").model_dump_json())
    bad: list[Any] = [
        17,
        {},
        {**good, "surprise": 1},
        {**good, "amounts": []},
        {**good, "amounts": [{"amount": "0", "unit": "usd"}]},
        {**good, "amounts": [{"amount": "-1", "unit": "usd"}]},
        {**good, "amounts": [{"amount": "1", "unit": "sheep"}]},
        {**good, "amounts": [{"amount": "1", "unit": "usd"}] * 2},
        {**good, "account": "other"},
        {**good, "account": "acme/ana"},
        {**good, "event_id": "nul\u0000"},
        {**good, "event_id": "e2"},
        {**good, "revision": 1},
        {**good, "correction": "no spaces"},
        {**good, "reason": ""},
        {name: value for name, value in good.items() if name != "correction"},
    ]
    last = {**good, "amounts": [{"amount": "2", "unit": "usd"}]}
    body = json.loads(charges_rated(number=2).model_dump_json()) | {"lines": [], "reversals": [good, *bad, last]}
    await corrected.driver.publish_raw((SUBJECT, json.dumps(body).encode()))
    corrected.bundles = 2
    await corrected.taken()
    assert await corrected.usd() == "94"
    rows = await corrected.driver.rows("SELECT payload FROM dead_letters")
    assert sorted(json.dumps(json.loads(bytes(row[0]))) for row in rows) == sorted(map(json.dumps, bad))
    assert all(letter["reason"].startswith("reversal ") for letter in await corrected.letters())


async def test_a_bundle_of_nothing_is_put_aside_and_has_no_number(corrected: Corrected) -> None:
    body = json.loads(charges_rated().model_dump_json()) | {"lines": []}
    await corrected.driver.publish_raw((SUBJECT, json.dumps(body).encode()))
    await corrected.bundle(charge_line("e1", usd="9"))
    (letter,) = await corrected.letters()
    assert "neither lines nor reversals" in letter["reason"]


async def test_what_another_account_asks_back_does_not_count_against_its_own(corrected: Corrected) -> None:
    """Both name one line, of which something was given back before: it is read once."""
    await corrected.driver.accepted(open_account("acme/ana", key="ana"))
    await corrected.bundle(charge_line("e1", usd="9"))
    await corrected.bundle(reversals=(reversal_line("e1", usd="4"),))
    await corrected.bundle(
        reversals=(reversal_line("e1", account="acme/ana", usd="5"), reversal_line("e1", usd="5", correction="c2"))
    )
    (letter,) = await corrected.letters()
    assert letter["reason"].startswith("reversal 1 of bundle 3: ")
    assert await corrected.usd() == "100"


async def test_a_correction_upwards_is_a_later_revision_and_can_be_given_back_by_itself(corrected: Corrected) -> None:
    await corrected.bundle(charge_line("e1", usd="9"))
    more = charge_line("e1", usd="2").model_copy(update={"revision": 1, "price_version": "later"})
    await corrected.bundle(more)
    await corrected.bundle(more, reversals=(reversal_line("e1", revision=1, usd="2"),))
    assert await corrected.usd() == "91"
    lines = (await corrected.http.get("/v1/charges/demo/e1")).json()["lines"]
    assert [(line["revision"], len(line["reversals"])) for line in lines] == [(0, 0), (1, 1)]
    assert await corrected.letters() == []


async def test_the_charge_after_an_estimate_is_given_back_to_the_lot_it_took_from(
    corrected: Corrected,
) -> None:
    hold = new_hold_id("acme")
    held = place_hold(hold, hold_leg("usd", "10")).model_copy(
        update={"lifetime_seconds": 1, "overdue": "charge_estimate"}
    )
    await corrected.driver.accepted(held)
    await corrected.driver.until("SELECT status FROM holds", "estimated")
    ((at,),) = await corrected.driver.rows("SELECT expires_at FROM holds")
    await corrected.bundle(
        charge_line("e1", usd="7", hold=hold, occurred_at=at), charge_line("e2", usd="4", hold=hold, occurred_at=at)
    )
    assert await corrected.usd() == "89"
    await corrected.bundle(reversals=(reversal_line("e1", usd="7"), reversal_line("e2", usd="1")))
    assert await corrected.usd() == "97"
    assert len(await corrected.driver.rows("SELECT FROM lots WHERE posted <> 0")) == 1


async def test_the_cause_of_a_transaction_is_the_bundle_and_its_correction(corrected: Corrected) -> None:
    await corrected.bundle(charge_line("e1", amounts={"usd": "110", "tokens": "7"}))
    await corrected.bundle(
        reversals=(reversal_line("e1", amounts={"usd": "105", "tokens": "7"}, correction="july", reason="prices"),)
    )
    line = await corrected.charge("e1")
    (given_back,) = line["reversals"]
    assert (given_back["correction"], given_back["bundle"], given_back["reason"]) == ("july", 2, "prices")
    found = (await corrected.http.get(f"/v1/transactions/{given_back['transaction']}")).json()
    assert (found["bundle"], found["commands"], found["lines"]) == (2, [], [])
    assert found["reversals"] == [given_back]
    assert {entry["kind"] for entry in found["entries"]} >= {"reversed"}
    charging = (await corrected.http.get(f"/v1/transactions/{line['transaction']}")).json()
    assert (charging["bundle"], charging["reversals"]) == (1, [])


@pytest.mark.parametrize("asked", ["charge", "transaction", "cause"])
async def test_the_command_line_shows_what_a_correction_gave_back_when_and_why(
    corrected: Corrected, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    await corrected.bundle(charge_line("e1", usd="50"))
    await corrected.bundle(reversals=(reversal_line("e1", usd="45", correction="july", reason="prices [2]"),))
    charge = (await corrected.http.get("/v1/charges/demo/e1")).json()
    (line,) = charge["lines"]
    (given_back,) = line["reversals"]
    named = given_back["transaction"] if asked == "cause" else line["transaction"]
    answer = charge if asked == "charge" else (await corrected.http.get(f"/v1/transactions/{named}")).json()

    class Answering:
        @classmethod
        def running(cls, _service: str) -> "Answering":
            return cls()

        def get(self, _path: str) -> Any:
            return answer

    monkeypatch.setattr(commands, "ServiceApi", Answering)
    arguments = ["charge", "demo", "e1"] if asked == "charge" else ["transaction", named]
    result = CliRunner().invoke(app_for(arguments), arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for shown in (given_back["recorded_at"], "45 usd", "prices [2]", "july"):
        assert shown in result.output


async def test_each_reversal_is_told_with_its_correction(corrected: Corrected) -> None:
    await corrected.bundle(charge_line("e1", usd="9"))
    await corrected.bundle(
        charge_line("e2", usd="1"), reversals=(reversal_line("e1", usd="2"), reversal_line("e1", usd="3", reason="r"))
    )
    one, two, charged = (await corrected.driver.facts(words.ChargeReversed, words.UsageCharged))[-3:]
    assert isinstance(one, words.ChargeReversed)
    assert isinstance(two, words.ChargeReversed)
    assert isinstance(charged, words.UsageCharged)
    assert one.transaction != two.transaction
    assert [(fact.event_id, fact.reversed, fact.correction, fact.reason) for fact in (one, two)] == [
        ("e1", (Amount(amount="2", unit="usd"),), "correction-1", None),
        ("e1", (Amount(amount="3", unit="usd"),), "correction-1", "r"),
    ]


async def test_a_full_bundle_of_reversals_is_taken(corrected: Corrected) -> None:
    await corrected.bundle(*(charge_line(f"e{n}", usd="0.05") for n in range(1000)))
    await corrected.bundle(
        *(charge_line(f"f{n}", usd="0.01") for n in range(1000)),
        reversals=tuple(reversal_line(f"e{n}", usd="0.04") for n in range(1000)),
    )
    assert await corrected.usd() == "80"
    assert len(await corrected.driver.rows("SELECT FROM reversals")) == 1000
