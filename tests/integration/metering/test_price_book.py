"""The price book: added to over HTTP, never changed; what waited for a price is charged once."""

import asyncio
import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

import httpx2
import pytest

from contracts.partition import partition_of
from contracts.pricing import PriceVersion
from contracts.streams import USAGE, usage_subject
from services.kit.clock import now
from services.kit.database import Writer
from services.kit.publish import Message, publish_batch
from services.metering import handlers, store
from services.metering.handlers import Known
from services.metering.settings import MeteringSettings
from tests.conftest import Database, NatsAccount
from tests.eventually import eventually
from tests.integration.metering.driving import Driver, Json, batch_of
from tests.unit.metering.building import NOON, event, price_book, price_version

pytestmark = pytest.mark.anyio

ACCOUNTS: Final = [f"acme-{number}" for number in range(7)]


def rate(quantity: str, price: str, *, unit: str = "usd", per: int = 1_000_000) -> Json:
    return {"quantity": quantity, "unit": unit, "price": price, "per": per}


def version(id: str, effective_at: datetime, **models: str) -> Json:
    """A version in which models cost the same for input and output; `gpt_new` is the model `gpt-new`."""
    return {
        "id": id,
        "effective_at": effective_at.isoformat(),
        "models": [
            {
                "provider": "openai",
                "model": name.replace("_", "-"),
                "rates": [rate("input_tokens", price), rate("output_tokens", price)],
            }
            for name, price in models.items()
        ],
    }


async def post(http: httpx2.AsyncClient, driver: Driver, body: Json, query: str = "") -> httpx2.Response:
    return await http.post(f"/api/v1/price-book{query}", json=body, headers=driver.headers("operator"))


async def book_of(http: httpx2.AsyncClient, driver: Driver, query: str = "") -> Json:
    answer = await http.get(f"/api/v1/price-book{query}", headers=driver.headers("operator"))
    assert answer.status_code == 200, answer.text
    found: Json = answer.json()
    return found


async def open_all(driver: Driver) -> None:
    await driver.open(*ACCOUNTS)
    await driver.until_open(ACCOUNTS)


async def report_as_gateway(nats_account: NatsAccount, events: Sequence[Json]) -> None:
    client = await nats_account.connect("gateway")
    messages = [
        Message(
            usage_subject(partition=partition_of(each["subject"]), source="gateway"), json.dumps(each).encode(), None
        )
        for each in events
    ]
    await publish_batch(client, stream=USAGE, messages=messages)
    await client.close()


# Adding versions ------------------------------------------------------------------------------------------------------


async def test_a_version_is_tried_stored_repeated_and_never_changed(driver: Driver) -> None:
    soon = now() + timedelta(hours=1)
    body = version("v2", soon, gpt_new="5", gpt_4o="3")
    async with driver.running() as http:
        dry = await post(http, driver, body, "?dry_run=true")
        assert (dry.status_code, dry.json()["stored"], dry.json()["compared_with"]) == (200, False, "2026-11-01")
        assert [model["model"] for model in dry.json()["added"]] == ["gpt-new"]
        assert [model["model"] for model in dry.json()["removed"]] == ["gpt-4.1-mini", "gpt-4o-mini", "o4-mini"]
        (changed,) = dry.json()["changed"]
        assert changed["rates"][0] == {
            "quantity": "input_tokens",
            "unit": "usd",
            "old": rate("input_tokens", "2.50"),
            "new": rate("input_tokens", "3"),
        }
        assert changed["rates"][-1]["new"] is None
        assert await driver.rows("SELECT 1 FROM price_versions WHERE id = 'v2'") == []
        stored = await post(http, driver, body)
        assert (stored.status_code, stored.json()["stored"], stored.json()["unchanged"]) == (201, True, False)
        assert stored.json()["changed"] == dry.json()["changed"]
        again = await post(http, driver, body | {"models": list(reversed(body["models"]))})
        assert (again.status_code, again.json()["stored"], again.json()["unchanged"]) == (200, True, True)
        assert (again.json()["added"], again.json()["changed"]) == ([], [])
        for wrong, code in (
            (version("v2", soon, gpt_new="6"), "version_exists"),
            (version("v2", soon + timedelta(1), gpt_new="5", gpt_4o="3"), "version_exists"),
            (version("v3", soon, gpt_new="5"), "effective_at_taken"),
            (version("v4", now() - timedelta(minutes=2), gpt_new="5"), "in_the_past"),
        ):
            for query in ("", "?dry_run=true"):
                refused = await post(http, driver, wrong, query)
                assert (refused.status_code, refused.json()["code"]) == (409, code)
        assert (await post(http, driver, version("v5", now() - timedelta(seconds=30), gpt_new="5"))).status_code == 201
        assert (await post(http, driver, version("v6", NOON, gpt_new="5"), "?backdate=true")).status_code == 201
        listed = await http.get("/api/v1/price-book/versions", headers=driver.headers("operator"))
        assert [(each["id"], each["source"], each["models"]) for each in listed.json()["versions"]] == [
            ("2024-07-18", "catalogue", 1),
            ("v6", "operator", 1),
            ("2026-11-01", "catalogue", 4),
            ("v5", "operator", 1),
            ("v2", "operator", 2),
        ]
        book = await book_of(http, driver)
        assert [each["id"] for each in book["versions"]] == ["v5", "v2"]
        assert {"name": "calls", "kind": "cap", "scale": 0, "own_key_counts": True, "mirrors": None} in book["units"]
        (old,) = (await book_of(http, driver, "?version=2024-07-18"))["versions"]
        assert old["models"][0]["rates"] == [rate("input_tokens", "0.15"), rate("output_tokens", "0.60")]
        unknown = await http.get("/api/v1/price-book?version=v9", headers=driver.headers("operator"))
        assert (unknown.status_code, unknown.json()["code"]) == (404, "unknown_version")


BAD: Final[Sequence[tuple[Any, str]]] = (
    ({"id": "v 2"}, "/body/id"),
    ({"effective_at": "tomorrow"}, "/body/effective_at"),
    ({"currency": "usd"}, "/body/currency"),
    ({"models": [{"provider": "openai", "model": "m", "rates": []}]}, "/body/models/0/rates"),
    (
        {"models": [{"provider": "openai", "model": "m", "rates": [rate("calls", "1", unit="eur")]}]},
        "/body/models/0/rates/0",
    ),
    (
        {"models": [{"provider": "openai", "model": "m", "rates": [rate("calls", "1", per=7)]}]},
        "/body/models/0/rates/0",
    ),
)


async def test_a_version_with_a_mistake_is_refused_and_the_place_is_named(driver: Driver) -> None:
    async with driver.running() as http:
        for wrong, pointer in BAD:
            refused = await post(http, driver, version("v2", now() + timedelta(hours=1), gpt_new="5") | wrong)
            assert refused.status_code == 422
            assert pointer in [each["pointer"] for each in refused.json()["errors"]]
        for path in ("/api/v1/price-book", "/api/v1/price-book/versions"):
            assert (await http.get(path, headers=driver.headers("demo"))).status_code == 403
        demo = await http.post("/api/v1/price-book", json=version("v2", now()), headers=driver.headers("demo"))
        assert demo.status_code == 403
    assert await driver.rows("SELECT count(*) FROM price_versions") == [(2,)]


async def test_two_processes_posted_to_at_once_agree_on_one(driver: Driver) -> None:
    soon = now() + timedelta(hours=1)
    async with driver.running() as first, driver.running() as second:
        answers = await asyncio.gather(
            *(post(http, driver, version("v2", soon, gpt_new=f"{n}")) for n in range(3) for http in (first, second)),
        )
        assert sorted(answer.status_code for answer in answers) == [200, 201, 409, 409, 409, 409]

        async def both_know() -> bool:
            books = [await book_of(http, driver) for http in (first, second)]
            return books[0] == books[1] and len(books[0]["versions"]) == 2

        await eventually(both_know, seconds=5)


# The catalogue --------------------------------------------------------------------------------------------------------


@pytest.fixture
def changed_catalogue(metering_settings: MeteringSettings, tmp_path: Path) -> Path:
    path = tmp_path / "catalogue.toml"
    path.write_text(metering_settings.catalogue_file.read_text().replace('"0.15"', '"0.14"'))
    return path


async def test_a_catalogue_that_contradicts_what_is_stored_does_not_start(
    driver: Driver, changed_catalogue: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with driver.running():
        pass
    async with driver.running():
        pass
    changed = driver.settings.model_copy(update={"catalogue_file": changed_catalogue})
    with pytest.raises(ValueError, match="price version 2024-07-18 is stored with other contents"):
        async with driver.running(changed):
            pass
    assert await driver.rows("SELECT count(*) FROM price_versions") == [(2,)]


# What waits for a price -----------------------------------------------------------------------------------------------


async def test_use_without_a_price_is_charged_once_by_whichever_of_two_processes_when_the_price_arrives(
    driver: Driver,
) -> None:
    """A version prices the use of its time only; what was charged stays as it is."""
    times = {"time": (NOON + timedelta(hours=1)).isoformat()}
    async with driver.running() as first, driver.running() as second:
        await open_all(driver)
        waiting = [event(number, data_model="gpt-new") for number in range(300)]
        late = [event(number, data_model="gpt-new", **times) for number in range(300, 310)]
        await driver.publish([*waiting, *late, *(event(number) for number in range(400, 420))])
        await driver.until_counted(new=330, charged=20, unpriced=310)
        assert (await post(first, driver, version("now", now(), gpt_new="1"))).status_code == 201
        await asyncio.sleep(1.5)
        assert (await driver.counters())["unpriced"] == 310
        backdated = version("then", NOON, gpt_new="2", gpt_4o_mini="99")
        assert (await post(second, driver, backdated, "?backdate=true")).status_code == 201
        after = version("after", NOON + timedelta(minutes=30), gpt_4o_mini="99")
        assert (await post(first, driver, after, "?backdate=true")).status_code == 201
        await driver.until("SELECT (count(*) >= 300)::text FROM usage_log WHERE price_version = 'then'", "true")
        await asyncio.sleep(1)
    charged = await driver.charged()
    versions = {name: line.price_version for name, line in charged.items()}
    assert {name for name, id in versions.items() if id == "2024-07-18"} == {f"use-{n}" for n in range(400, 420)}
    assert {f"use-{number}" for number in range(300)} <= versions.keys()
    counters = {name: count for name, count in (await driver.counters()).items() if count}
    assert counters["charged"] + counters.get("unpriced", 0) == counters["new"] == 330
    assert await driver.rows("SELECT count(*) FROM set_aside") == [(counters.get("unpriced", 0),)]
    assert charged["use-1"].amounts[0].amount == "0.000204"


async def test_a_sweep_of_many_processes_charges_each_use_once(
    driver: Driver, database: Database, writer: Writer
) -> None:
    async with writer.transaction() as connection:
        await store.add_to_directory(connection, partition=partition_of("acme"), account="acme", opened_at=now())
    events = [event(number, subject="acme", data_model="gpt-new") for number in range(500)]
    await handlers.ingest(batch_of(events, price_book=price_book()), writer=writer, known=Known())
    assert (await driver.counters())["unpriced"] == 500
    extended = price_book(price_version(), with_model(price_version(id="v2", effective_at=NOON), "gpt-new"))

    async def sweep(number: int) -> int:
        own = Writer(database.url("metering"), name=f"sweeper-{number}")
        rows = await handlers.charge_unpriced(partition_of("acme"), "openai/gpt-new", writer=own, price_book=extended)
        await own.close()
        return len(rows)

    assert sorted(await asyncio.gather(*(sweep(number) for number in range(4)))) == [0, 0, 0, 1]
    assert len(await driver.charged()) == 500
    assert {name: count for name, count in (await driver.counters()).items() if count} == {"new": 500, "charged": 500}


async def test_dying_between_two_chunks_leaves_the_rest_to_the_next_sweep(
    driver: Driver, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another process: the version is long known when it starts."""
    monkeypatch.setattr(handlers.waiting, "SET_ASIDE_ROWS_MAX", 200)
    async with driver.running() as http:
        await open_all(driver)
        await driver.publish(event(number, subject="acme-1", data_model="gpt-new") for number in range(500))
        await driver.until_counted(new=500, unpriced=500)
        real, calls = store.find_unpriced, 0

        async def dying(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise RuntimeError("a mistake of ours")
            return await real(*arguments, **named)

        monkeypatch.setattr(store, "find_unpriced", dying)
        assert (await post(http, driver, version("then", NOON, gpt_new="2"), "?backdate=true")).status_code == 201
        await driver.until_counted(new=500, charged=200, unpriced=300)
        monkeypatch.setattr(store, "find_unpriced", real)
    async with driver.running():
        await driver.until_counted(new=500, charged=500)
    assert len(await driver.charged()) == 500


async def test_use_set_aside_by_a_process_that_did_not_know_the_price_yet_is_found(
    driver: Driver, writer: Writer
) -> None:
    """Its batch was priced before the version was stored, and commits after everybody looked."""
    stale = batch_of([event(number, data_model="gpt-new") for number in range(7)], price_book=price_book())
    async with driver.running() as http:
        await open_all(driver)
        assert (await post(http, driver, version("then", NOON, gpt_new="2"), "?backdate=true")).status_code == 201
        await asyncio.sleep(1.5)
        ingested = await handlers.ingest(stale, writer=writer, known=Known())
        assert ingested.counts.unpriced == 7
        await driver.until_counted(new=7, charged=7)


# Pinned use -----------------------------------------------------------------------------------------------------------


async def test_pinned_use_is_charged_under_its_version_even_if_that_is_learned_later(
    driver: Driver, nats_account: NatsAccount
) -> None:
    pinned = {"2024-07-18": ["use-1"], "later": ["use-2", "use-3"]}
    events = [
        event(1, source="gateway", time=now().isoformat(), data_price_version="2024-07-18"),
        event(2, source="gateway", time=now().isoformat(), data_price_version="later"),
        event(3, source="gateway", data_price_version="later"),
        event(4, source="gateway", data_price_version="later", data_model="gpt-4o"),
        event(5, source="gateway", data_price_version="never"),
    ]
    async with driver.running() as http:
        await open_all(driver)
        await report_as_gateway(nats_account, events)
        await driver.publish([event(6, data_price_version="2024-07-18")])
        await driver.until_counted(new=5, charged=1, unpriced=4, dead=1)
        waiting = "SELECT event_id, key FROM set_aside ORDER BY event_id"
        assert await driver.rows(waiting) == [
            ("use-2", "version:later"),
            ("use-3", "version:later"),
            ("use-4", "version:later"),
            ("use-5", "version:never"),
        ]
        later = version("later", now() + timedelta(days=1), gpt_4o_mini="7")
        assert (await post(http, driver, later)).status_code == 201
        await driver.until_counted(new=5, charged=3, unpriced=2, dead=1)
        assert await driver.rows(waiting) == [("use-4", "version:later/openai/gpt-4o"), ("use-5", "version:never")]
        letters = await http.get("/dead-letters", headers=driver.headers("operator"))
        (letter,) = letters.json()["dead_letters"]
        assert letter["reason"] == "data.price_version: only gateway pins use to a price version"
    charged = await driver.charged()
    found: dict[str, list[str]] = {}
    for name in sorted(charged):
        found.setdefault(charged[name].price_version, []).append(name)
    assert found == pinned


def with_model(of: PriceVersion, model: str) -> PriceVersion:
    (rates,) = of.rates.values()
    return PriceVersion(id=of.id, effective_at=of.effective_at, rates={**of.rates, ("openai", model): rates})
