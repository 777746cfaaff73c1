"""Backfilling: what is staged is logged and charged once, however old; with replace, it is what the period holds."""

import asyncio
from datetime import timedelta
from decimal import Decimal
from typing import Any, Final

import httpx2
import pytest

from services.metering.correcting import backfilling, jobs, undoing
from services.metering.correcting.settling import Settler
from services.metering.settings import MeteringSettings
from tests.integration.metering.correcting import add, agree, ask, correct, named, undo, until, version
from tests.integration.metering.driving import Driver, Json
from tests.integration.metering.test_rerating import render
from tests.integration.metering.test_settling import cost, falling
from tests.unit.metering.building import NOON, event

pytestmark = pytest.mark.anyio

BACKFILL: Final = {
    "kind": "backfill",
    "account": "acme-1",
    "from": "2026-03-01T00:00:00Z",
    "to": "2026-04-01T00:00:00Z",
}


async def stage(http: httpx2.AsyncClient, driver: Driver, id: str, events: Any, *, status: int = 200) -> Json:
    path = f"/api/v1/corrections/{id}/events"
    answer = await http.post(path, json=events, headers=driver.headers("operator"))
    assert answer.status_code == status, answer.text
    found: Json = answer.json()
    return found


async def apply(http: httpx2.AsyncClient, driver: Driver, id: str) -> Json:
    """Apply what is staged, after a dry run that says the same."""
    path = f"/api/v1/corrections/{id}/apply"
    dry = await http.post(f"{path}?dry_run=true", headers=driver.headers("operator"))
    assert dry.status_code == 200, dry.text
    answer = await http.post(path, headers=driver.headers("operator"))
    assert answer.status_code == 202, answer.text
    done = await until(http, driver, id, "done")
    assert (dry.json()["difference"], dry.json()["counts"]) == (done["difference"], done["counts"])
    assert (await http.post(path, headers=driver.headers("operator"))).status_code == 200
    return done


def of_acme(number: int, **more: Any) -> Json:
    return event(number, **{"subject": "acme-1", **more})


async def test_a_backfill_is_charged_once_however_old_it_is(
    driver: Driver, metering_settings: MeteringSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backfilling, "EVENTS_MAX", 4)
    strict = metering_settings.model_copy(update={"metering_age_days_max": 35})
    async with driver.running(strict) as http:
        await add(http, driver, version())
        await driver.open("acme-1")
        await driver.until_open(["acme-1"])
        await correct(http, driver, {"id": "b", **BACKFILL})
        assert await stage(http, driver, "b", [of_acme(number) for number in range(10)]) == {
            "new": 10, "repeated": 0, "total": 10
        }  # fmt: skip
        again = [of_acme(number) for number in range(8, 13)]
        assert await stage(http, driver, "b", again) == {"new": 3, "repeated": 2, "total": 13}
        assert await stage(http, driver, "b", of_acme(12)) == {"new": 0, "repeated": 1, "total": 13}
        other = await stage(http, driver, "b", [of_acme(3, data_output_tokens=9)], status=409)
        assert other["code"] == "staged_otherwise"
        assert await driver.rows("SELECT count(*) FROM usage_log") == [(0,)]
        done = await apply(http, driver, "b")
        assert done["counts"] == {"events": 13, "corrected": 13}
        assert Decimal(done["difference"]["usd"]) == sum(Decimal(100 + 3 * number) for number in range(13)) / 1_000_000
        assert await driver.counters() == {**dict.fromkeys(await driver.counters(), 0), "new": 13, "charged": 13}
        before = await agree(http, driver)
        assert (await stage(http, driver, "b", [of_acme(50)], status=409))["code"] == "not_staging"
        # It is known for ever, as if it had been reported.
        await driver.publish([of_acme(number) for number in range(5)])
        await driver.until_counted(new=13, charged=13, duplicate=5)
        await correct(http, driver, {"id": "c", **BACKFILL})
        await stage(http, driver, "c", [of_acme(1), of_acme(2, data_output_tokens=9), of_acme(20)])
        twice = await apply(http, driver, "c")
        assert twice["counts"] == {"events": 3, "corrected": 1, "unchanged": 1, "conflicting": 1}
        await undo(http, driver, "c")
        assert await agree(http, driver) == before
        await undo(http, driver, "b")
        assert await agree(http, driver) == {}
        assert (await driver.counters())["voided"] == 14


async def test_with_replace_a_period_holds_what_is_staged(driver: Driver) -> None:
    async with driver.running() as http:
        await add(http, driver, version())
        await driver.open("acme-1", "acme-1/ana")
        await driver.until_open(["acme-1", "acme-1/ana"])
        late = (NOON + timedelta(days=30)).isoformat()
        await driver.publish([of_acme(number) for number in range(6)])
        await driver.publish([of_acme(6, data_model="unheard-of"), of_acme(7, time=late)])
        await driver.publish([event(8, subject="acme-1/ana")])
        await driver.until_counted(new=9, charged=8, unpriced=1)
        before = await agree(http, driver)
        await correct(http, driver, {"id": "b", **BACKFILL, "replace": True, "tree": True})
        staged = [
            of_acme(0),
            of_acme(1, data_input_tokens=1000),
            of_acme(30),
            event(31, subject="acme-1/ana"),
        ]
        await stage(http, driver, "b", staged)
        done = await apply(http, driver, "b")
        assert done["counts"] == {"events": 10, "corrected": 9, "replaced": 6, "unchanged": 1}
        found = await agree(http, driver)
        cost = (100 + 0) + (1000 + 2) + (100 + 3 * 30) + (100 + 3 * 7)
        assert found == {
            "acme-1": {"usd": Decimal(cost) / 1_000_000, "calls": Decimal(4)},
            "acme-1/ana": {"usd": Decimal(100 + 3 * 31) / 1_000_000, "calls": Decimal(1)},
        }
        month = await ask(
            http, driver, "/api/v1/usage?account=acme-1&tree=true&from=2026-03-01T00:00:00Z&to=2026-04-01T00:00:00Z"
        )
        assert month["usage"][0]["events"] == 4
        # Undone, all is as it was; done again under another id, what became void is staged use again.
        await undo(http, driver, "b")
        assert await agree(http, driver) == before
        assert (await driver.counters())["unpriced"] == 1
        await correct(http, driver, {"id": "c", **BACKFILL, "replace": True, "tree": True})
        await stage(http, driver, "c", staged)
        await apply(http, driver, "c")
        assert await agree(http, driver) == found


async def test_a_dry_run_counts_what_its_earlier_slices_would_have(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(_: Settler) -> bool:
        return False

    # What is carried stays, and is compared.
    monkeypatch.setattr(Settler, "round", nothing)
    monkeypatch.setattr(backfilling, "EVENTS_MAX", 3)
    monkeypatch.setattr(undoing, "EVENTS_MAX", 2)
    tiers = [{"up_to": "10", "price": "1"}, {"price": "0.5"}]
    price = {"id": "renders", "type": "render", "unit": "usd", "quantity": "n", "period": "month", "tiers": tiers}
    async with driver.running() as http:
        await add(http, driver, version() | {"prices": [price | {"kind": "graduated"}]})
        await driver.open("acme-1")
        await driver.until_open(["acme-1"])
        await driver.publish([render(number, 3) for number in range(8)])
        await driver.until_counted(new=8, charged=8)
        counters = "SELECT quantity, credit FROM price_counters"
        before, stood_at = await agree(http, driver), await driver.rows(counters)
        await correct(http, driver, {"id": "b", **BACKFILL, "replace": True})
        await stage(http, driver, "b", [render(number, 2) for number in range(4, 14)])
        # `apply` compares it with its dry run.
        done = await apply(http, driver, "b")
        assert done["counts"] == {"events": 14, "corrected": 14, "replaced": 4}
        (quantity, credit), *_ = await driver.rows(counters)
        charged = (await agree(http, driver))["acme-1"]["usd"]
        assert (quantity, charged + credit / Decimal(10**9)) == (20, 15)
        path, body = "/api/v1/corrections/b/undo", {"reason": "a try"}
        dry = await http.post(f"{path}?dry_run=true", json=body, headers=driver.headers("operator"))
        assert Decimal(dry.json()["difference"]["usd"]) == before["acme-1"]["usd"] - charged
        await undo(http, driver, "b")
        assert (await agree(http, driver), await driver.rows(counters)) == (before, stood_at)


@pytest.mark.parametrize("staged", [(), (7,)])
async def test_what_replacing_raises_of_the_rest_of_a_period_is_charged_with_it(
    driver: Driver, staged: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backfilling, "EVENTS_MAX", 2)
    async with driver.running() as http:
        await add(http, driver, falling())
        await driver.open("acme-1")
        await driver.until_open(["acme-1"])
        # On four days, of which one is replaced.
        await driver.publish([render(number, 20) for number in range(12)])
        await driver.until_counted(new=12, charged=12)
        before = await agree(http, driver)
        of_a_day = {"from": "2026-03-14T00:00:00Z", "to": "2026-03-15T00:00:00Z", "replace": True}
        assert {NOON.date().isoformat()} == {"2026-03-14"}
        for id, days in (("b", (0,)), ("c", (1, 2))):
            window = of_a_day | {
                "from": f"2026-03-{14 + days[0]}T00:00:00Z",
                "to": f"2026-03-{15 + days[-1]}T00:00:00Z",
            }
            await correct(http, driver, {"id": id, **BACKFILL, **window})
            if staged and id == "b":
                await stage(http, driver, id, [render(100 + 4 * place, n) for place, n in enumerate(staged)])
            await apply(http, driver, id)
        rest = 60 + sum(staged)
        assert await agree(http, driver) == {"acme-1": {"usd": cost(rest, 3 + len(staged))}}
        assert await driver.rows("SELECT quantity, credit FROM price_counters") == [(rest, 0)]
        for id in ("c", "b"):
            assert (await undo(http, driver, id))["counts"]["left"] == 0
        assert await agree(http, driver) == before


async def test_what_cannot_be_staged_is_named(driver: Driver) -> None:
    async with driver.running() as http:
        await correct(http, driver, {"id": "b", **BACKFILL})
        events = [
            of_acme(1, subject="acme-2"),
            of_acme(2, time=None),
            of_acme(3, time="2026-05-01T00:00:00Z"),
            of_acme(4, data_price_version="v1"),
            of_acme(5, subject="Acme GmbH"),
            {"id": "6"},
            of_acme(7),
            of_acme(7, data_output_tokens=70),
        ]
        refused = await stage(http, driver, "b", events, status=400)
        assert {(each["index"], each["field"]) for each in refused["errors"]} >= {
            (0, "subject"),
            (1, "time"),
            (2, "time"),
            (3, "data.price_version"),
            (4, "subject"),
            (7, "id"),
        }
        assert {each["index"] for each in refused["errors"]} == {0, 1, 2, 3, 4, 5, 7}
        assert (await stage(http, driver, "b", [of_acme(1)] * 1001, status=413))["code"] == "batch_too_large"
        assert (await stage(http, driver, "nobody", [of_acme(1)], status=404))["code"] == "unknown_correction"
        alias = await http.put("/api/v1/aliases/acme-1", json={"account": "x"}, headers=driver.headers("operator"))
        assert alias.status_code == 201
        assert (await stage(http, driver, "b", [of_acme(1)], status=400))["code"] == "invalid_events"


async def test_a_backfill_goes_on_where_whoever_died_left_it(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backfilling, "EVENTS_MAX", 3)
    monkeypatch.setattr(jobs.Corrector, "retry_seconds", 0.01)
    gone_on, steps = jobs.step, 0

    async def dies(*arguments: Any, **more: Any) -> Any:
        nonlocal steps
        steps += 1
        done = await gone_on(*arguments, **more)
        if steps % 3 == 2:
            # After all was written, and before the commit.
            raise RuntimeError("killed")
        return done

    async with driver.running() as http:
        await add(http, driver, version())
        await driver.open("acme-1")
        await driver.until_open(["acme-1"])
        await driver.publish([of_acme(number) for number in range(10)])
        await driver.until_counted(new=10, charged=10)
        await correct(http, driver, {"id": "b", **BACKFILL, "replace": True})
        await stage(http, driver, "b", [of_acme(number) for number in range(5, 20)])
        monkeypatch.setattr(jobs, "step", dies)
        answer = await http.post("/api/v1/corrections/b/apply", headers=driver.headers("operator"))
        assert answer.status_code == 202
        # The same events are reported meanwhile: each is logged once.
        await driver.publish([of_acme(number) for number in range(5, 20)])
        done = await until(http, driver, "b", "done")
        assert done["counts"]["replaced"] == 5
        await driver.until("SELECT sum(charged)::int FROM ingest_counters", 15)
        found = await agree(http, driver)
        assert found["acme-1"]["usd"] == sum(Decimal(100 + 3 * number) for number in range(5, 20)) / 1_000_000
        assert (await ask(http, driver, "/api/v1/receipts/demo/use-2"))["status"] == "void"
        assert (await correct(http, driver, {"id": "v", "kind": "void", "events": named(2)}))["counts"][
            "unchanged"
        ] == 1


async def test_what_is_staged_is_discarded_for_good_and_nothing_else_is(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backfilling, "DELETED_MAX", 3)
    async with driver.running() as http:
        await add(http, driver, version())
        await driver.open("acme-1")
        await driver.until_open(["acme-1"])
        for id in ("b", "c"):
            await correct(http, driver, {"id": id, **BACKFILL})
            await stage(http, driver, id, [of_acme(number) for number in range(8)])
        staged = "SELECT correction, count(*) FROM correction_events GROUP BY correction ORDER BY correction"

        async def discard(id: str, *, status: int = 200) -> Json:
            answer = await http.delete(f"/api/v1/corrections/{id}", headers=driver.headers("operator"))
            assert answer.status_code == status, answer.text
            found: Json = answer.json()
            return found

        at_once = await asyncio.gather(discard("b"), discard("b"))
        assert [(each["state"], each["undone_by"]) for each in at_once] == [("discarded", "operator")] * 2
        assert await discard("b") == at_once[0]
        assert await driver.rows(staged) == [("c", 8)]
        # It takes nothing any more, and is not begun again under its id.
        assert (await stage(http, driver, "b", [of_acme(1)], status=409))["code"] == "not_staging"
        for path in ("apply", "undo"):
            answer = await http.post(
                f"/api/v1/corrections/b/{path}", json={"reason": "no"}, headers=driver.headers("operator")
            )
            assert (answer.status_code, answer.json()["code"]) == (409, "not_staging")
        assert (await correct(http, driver, {"id": "b", **BACKFILL}, status=200))["state"] == "discarded"
        await apply(http, driver, "c")
        assert (await discard("c", status=409))["code"] == "not_staging"
        assert (await discard("nobody", status=404))["code"] == "unknown_correction"
        await correct(http, driver, {"id": "v", "kind": "void", "events": named(1)})
        assert (await discard("v", status=409))["code"] == "not_staging"
        refused = await http.delete("/api/v1/corrections/c", headers=driver.headers("demo"))
        assert refused.status_code == 403
        assert await driver.rows(staged) == [("c", 8)]
