"""OpenMeter's own client, unmodified, defines meters and asks them; and what it cannot ask is answered clearly."""

import csv
import io
import json
import time
from collections.abc import AsyncIterator, Iterable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Final

import anyio
import anyio.to_thread
import httpx2
import openmeter
import openmeter.aio
import psycopg
import pytest
import typer
from corehttp.exceptions import HttpResponseError, ResourceExistsError, ResourceNotFoundError
from openmeter.models import Event, MeterCreate, MeterQueryRequest, MeterUpdate
from typer.testing import CliRunner

from contracts.partition import partition_of
from infra.commands import meters
from infra.service_api import ServiceApi
from services.metering import app
from services.metering.app import build
from tests.conftest import CATALOGUE_FILE
from tests.integration.metering.driving import Driver, Json
from tests.integration.simulators.serving import serving

pytestmark = pytest.mark.anyio

SINCE: Final = datetime(2026, 10, 24, tzinfo=UTC)
TYPE: Final = "prompt"


def meter(**changes: Any) -> MeterCreate:
    members: dict[str, Any] = {
        "slug": "tokens_total",
        "name": "Tokens",
        "description": "Tokens of prompts",
        "aggregation": "SUM",
        "event_type": TYPE,
        "value_property": "$.tokens",
        "group_by": {"model": "$.model", "kind": "$.attributes.kind"},
        "metadata": {"team": "ml"},
    }
    return MeterCreate(**(members | changes))


async def log(driver: Driver, found: Iterable[tuple[datetime, str, str | None, Json]]) -> None:
    """Use that is in the log: when, whose, reported of whom, what."""
    await driver.connection.execute("SELECT ensure_usage_month('2026-10-01')")
    for number, (at, account, subject, data) in enumerate(found):
        await driver.connection.execute(
            "INSERT INTO usage_log"
            " (partition, occurred_at, source, event_id, account, type, recorded_at, data, subject)"
            " VALUES (%s, %s, 'demo', %s, %s, %s, now(), %s, %s)",
            [partition_of(account), at, f"use-{number}", account, TYPE, json.dumps(data), subject],
        )


def use(hours: int, tokens: Any, *, account: str = "acme", subject: str | None = None, model: str = "gpt-4o") -> Any:
    return SINCE + timedelta(hours=hours), account, subject, {"tokens": tokens, "model": model}


@pytest.fixture
async def http(driver: Driver) -> AsyncIterator[httpx2.AsyncClient]:
    async with driver.running() as client:
        client.headers["Authorization"] = driver.headers("operator")["Authorization"]
        yield client


def as_rows(found: Any) -> list[tuple[Any, ...]]:
    return [
        (row.value, row.window_start, row.window_end, row.subject, row.customer_id, dict(row.group_by))
        for row in found.data
    ]


async def test_the_python_client_manages_and_queries_meters(driver: Driver) -> None:
    await log(driver, [use(0, 1), use(1, "2.5"), use(24, 4, model="o4"), use(25, 8, account="other", subject="cust 1")])

    def drive(url: str) -> None:
        with openmeter.Client(endpoint=url, token=driver.tokens["operator"]) as client:
            created = client.meters.create(meter())
            assert created.slug == "tokens_total"
            assert created.metadata == {"team": "ml"}
            assert created.created_at == created.updated_at
            with pytest.raises(ResourceExistsError):
                client.meters.create(meter())
            assert client.meters.get(created.id) == client.meters.get("tokens_total") == created
            assert created in client.meters.list(order_by="createdAt", order="DESC", page_size=100)
            changed = client.meters.update(
                "tokens_total", MeterUpdate(name="All tokens", group_by={"model": "$.model", "day": "$.day"})
            )
            assert (changed.name, changed.description, changed.aggregation) == ("All tokens", None, "SUM")
            assert changed.group_by == {"model": "$.model", "day": "$.day"}
            assert changed.id == created.id
            assert changed.updated_at > changed.created_at

            total = client.meters.query_json("tokens_total")
            assert as_rows(total) == [(15.5, SINCE, SINCE + timedelta(hours=25, minutes=1), None, None, {})]
            days = client.meters.query_json(
                "tokens_total",
                from_parameter=SINCE,
                to=SINCE + timedelta(days=3),
                window_size="DAY",
                window_time_zone="Europe/Berlin",
                group_by=["subject", "model"],
                filter_group_by={"model": "gpt-4o"},
            )
            assert days.window_size == "DAY"
            # The 25th has 25 hours in Berlin.
            first, second, third = (datetime(2026, 10, day, 22, tzinfo=UTC) for day in (23, 24, 25))
            third += timedelta(hours=1)
            assert as_rows(days) == [
                (3.5, first, second, "acme", None, {"model": "gpt-4o"}),
                (8.0, second, third, "cust 1", None, {"model": "gpt-4o"}),
            ]
            asked: Any = {"model": {"$like": "o%"}}
            found = client.meters.query_json(
                "tokens_total", advanced_meter_group_by_filters=asked, subject=["acme", "cust 1"]
            )
            assert [(row.value, row.subject) for row in found.data] == [(4.0, "acme")]
            found = client.meters.query_json("tokens_total", filter_customer_id=["other"], group_by=["subject"])
            assert [(row.value, row.subject, row.customer_id) for row in found.data] == [(8.0, "cust 1", "other")]
            found = client.meters.query(
                "tokens_total",
                MeterQueryRequest(from_property=SINCE, filter_group_by={"model": ["gpt-4o", "o4"]}, group_by=["model"]),
            )
            assert [(row.value, dict(row.group_by)) for row in found.data] == [
                (11.5, {"model": "gpt-4o"}),
                (4.0, {"model": "o4"}),
            ]
            written = client.meters.query_csv("tokens_total", group_by=["subject", "model"])
            assert list(csv.reader(io.StringIO(written)))[:2] == [
                ["window_start", "window_end", "subject", "model", "value"],
                ["2026-10-24T00:00:00Z", "2026-10-24T01:01:00Z", "acme", "gpt-4o", "3.5"],
            ]
            assert client.meters.query_csv_post("tokens_total").splitlines()[1].endswith(",,15.5")
            assert client.meters.list_subjects("tokens_total") == ["acme", "cust 1"]
            assert client.meters.list_group_by_values("tokens_total", "model", to=SINCE + timedelta(hours=2)) == [
                "gpt-4o"
            ]

            client.meters.delete("tokens_total")
            for gone in (client.meters.get, client.meters.query_json, client.meters.delete):
                with pytest.raises(ResourceNotFoundError):
                    gone("tokens_total")
            assert "tokens_total" not in [each.slug for each in client.meters.list()]
            (deleted,) = [each for each in client.meters.list(include_deleted=True) if each.deleted_at]
            assert deleted.id == created.id == client.meters.get(created.id).id
            again = client.meters.create(meter())
            assert again.id != created.id
            assert client.meters.query_json("tokens_total").data[0].value == 15.5
            with pytest.raises(HttpResponseError) as refused:
                client.meters.query_json("tokens_total", group_by=["colour"])
            assert refused.value.status_code == 400

    with serving(build(driver.settings)) as url:
        await anyio.to_thread.run_sync(drive, url)


async def test_what_the_python_client_reports_is_what_its_meter_answers(driver: Driver) -> None:
    now = datetime.now(UTC).replace(microsecond=0)

    def event(number: int, tokens: Any, *, subject: str = "acme") -> Event:
        return Event(
            specversion="1.0",
            id=f"prompt-{number}",
            source="demo",
            type=TYPE,
            subject=subject,
            time=now - timedelta(hours=number),
            data={"tokens": tokens, "model": "gpt-4o"},
        )

    def drive(url: str) -> None:
        with openmeter.Client(endpoint=url, token=driver.tokens["demo"]) as reporter:
            reporter.events.ingest_event(event(0, 1))
            reporter.events.ingest_events([event(1, "2.5"), event(2, 4, subject="acme/ana"), event(0, 1)])
            reporter.events.ingest_events([event(2, 4, subject="acme/ana")])
        with openmeter.Client(endpoint=url, token=driver.tokens["operator"]) as client:
            client.meters.create(meter())
            deadline = time.monotonic() + 10
            found = client.meters.query_json("tokens_total", group_by=["subject"])
            while sum(row.value for row in found.data) < 7.5:
                assert time.monotonic() < deadline
                time.sleep(0.05)
                found = client.meters.query_json("tokens_total", group_by=["subject"])
            assert [(row.subject, row.value) for row in found.data] == [("acme", 3.5), ("acme/ana", 4.0)]
            counted = client.meters.create(meter(slug="prompts", aggregation="COUNT"))
            assert client.meters.query_json(counted.id).data[0].value == 3.0

    with serving(build(driver.settings)) as url:
        await anyio.to_thread.run_sync(drive, url)


async def test_the_asynchronous_python_client_does_too(driver: Driver) -> None:
    await log(driver, [use(0, 1), use(0, 2), use(1, 3, model="o4")])
    with serving(build(driver.settings)) as url:
        async with openmeter.aio.Client(endpoint=url, token=driver.tokens["operator"]) as client:
            created = await client.meters.create(meter(aggregation="MAX"))
            found = await client.meters.query_json("tokens_total", window_size="HOUR", group_by=["model"])
            assert [(row.value, dict(row.group_by)) for row in found.data] == [
                (2.0, {"model": "gpt-4o"}),
                (3.0, {"model": "o4"}),
            ]
            assert "input_tokens" in [each.slug for each in await client.meters.list()]
            await client.meters.delete(created.id)
            with pytest.raises(ResourceNotFoundError):
                await client.meters.get("tokens_total")
        async with openmeter.aio.Client(endpoint=url, token=driver.tokens["demo"]) as client:
            with pytest.raises(HttpResponseError) as refused:
                await client.meters.create(meter())
            assert refused.value.status_code == 403


async def test_numbers_are_written_as_they_are(driver: Driver, http: httpx2.AsyncClient) -> None:
    await log(driver, [use(0, 1), use(1, "12345678901234567890.000000001"), use(2, "0.10")])
    await http.post("/api/v1/meters", json=meter().as_dict())
    answer = await http.get("/api/v1/meters/tokens_total/query")
    assert json.loads(answer.content, parse_float=Decimal)["data"][0]["value"] == Decimal(
        "12345678901234567891.100000001"
    )
    answer = await http.get("/api/v1/meters/tokens_total/query", headers={"Accept": "text/csv"})
    assert answer.headers["content-type"].startswith("text/csv")
    assert answer.text.splitlines()[1].endswith(",,12345678901234567891.100000001")


async def test_objects_in_a_query_string_come_as_the_javascript_client_sends_them(
    driver: Driver, http: httpx2.AsyncClient
) -> None:
    await log(driver, [use(0, 1), use(1, 2, model="o4"), use(2, 4, model="o5")])
    await http.post("/api/v1/meters", json=meter().as_dict())
    for query, wanted in (
        ("filterGroupBy[model]=o4", [2]),
        ("filterGroupBy%5Bmodel%5D=o4&filterGroupBy%5Bmodel%5D=o5", [6]),
        ('filterGroupBy={"model":["o4"]}', [2]),
        ("advancedMeterGroupByFilters[model][$like]=o%25", [6]),
        ("advancedMeterGroupByFilters[model][$in]=o4&advancedMeterGroupByFilters[model][$in]=gpt-4o", [3]),
        ('advancedMeterGroupByFilters={"model":{"$or":[{"$eq":"o4"},{"$gt":"o4"}]}}', [6]),
    ):
        answer = await http.get(f"/api/v1/meters/tokens_total/query?{query}")
        assert answer.status_code == 200, answer.text
        assert [row["value"] for row in answer.json()["data"]] == wanted, query


async def test_all_that_is_wrong_with_a_question_is_named(driver: Driver, http: httpx2.AsyncClient) -> None:
    await http.post("/api/v1/meters", json=meter().as_dict())
    wrong = (
        "from=yesterday&windowSize=WEEK&windowTimeZone=Mars/Olympus&groupBy=no%20name&colour=red&to=2026-01-01T00:00:00Z"
        "&to=2026-01-02T00:00:00Z&filterGroupBy=[object%20Object]&advancedMeterGroupByFilters[model][$like]=x\\"
    )
    answer = await http.get(f"/api/v1/meters/tokens_total/query?{wrong}")
    assert answer.status_code == 400
    pointers = {each["pointer"] for each in answer.json()["errors"]}
    assert pointers == {
        "/query/from",
        "/query/windowSize",
        "/query/windowTimeZone",
        "/query/groupBy/0",
        "/query/colour",
        "/query/to",
        "/query/filterGroupBy",
        "/query/advancedMeterGroupByFilters/model/$like",
    }
    wrong_too = "from=2026-01-02T00:00:00Z&to=2026-01-02T00:00:00Z&groupBy=colour&filterCustomerId=%2Facme"
    answer = await http.get(f"/api/v1/meters/tokens_total/query?{wrong_too}")
    assert [each["pointer"] for each in answer.json()["errors"]] == [
        "/query/to",
        "/query/groupBy",
        "/query/filterCustomerId",
    ]
    long = "from=2020-01-01T00:00:00Z&to=2026-01-01T00:00:00Z&windowSize=MINUTE"
    answer = await http.get(f"/api/v1/meters/tokens_total/query?{long}")
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (400, "/query/windowSize")
    assert (await http.post("/api/v1/meters/tokens_total/query", json={"windowSize": 1})).status_code == 422
    assert (await http.get("/api/v1/meters/nothing/query")).status_code == 404
    assert (await http.get("/api/v1/meters/%00")).status_code == 404
    assert (await http.get("/api/v1/meters/tokens_total/group-by/colour/values")).status_code == 404
    assert (await http.get("/api/v1/meters/tokens_total/subjects?from=never")).status_code == 400


NO_METERS: Final[list[Json]] = [
    {"slug": "Tokens"},
    {"slug": "a__b"},
    {"aggregation": "MEDIAN"},
    {"value_property": "tokens"},
    {"value_property": "$..tokens"},
    {"value_property": "$.a[*]"},
    {"value_property": None},
    {"group_by": {"a b": "$.a"}},
    {"group_by": {"subject": "$.a"}},
    {"group_by": {"a": "$." + ".".join("abcdefghi")}},
    {"event_type": ""},
    {"filters": {"$.a": {}}},
    {"filters": {"a": {"$eq": "1"}}},
    {"filters": {"$.a": {"$near": "1"}}},
    {"surprise": 1},
]


async def test_what_is_no_meter_is_refused(http: httpx2.AsyncClient) -> None:
    renamed = {"value_property": "valueProperty", "group_by": "groupBy", "event_type": "eventType"}
    for changes in NO_METERS:
        body = meter().as_dict() | {renamed.get(name, name): value for name, value in changes.items()}
        answer = await http.post("/api/v1/meters", json=body)
        assert answer.status_code == 422, (changes, answer.text)
        assert answer.json()["errors"]


async def test_a_change_is_a_version_and_every_version_still_answers(driver: Driver, http: httpx2.AsyncClient) -> None:
    await log(driver, [use(0, 1), use(1, 2, model="o4"), use(2, 4, model="o5")])
    await http.post("/api/v1/meters", json=meter().as_dict())
    path = "/api/v1/meters/tokens_total"
    same = await http.put(
        path, json={name: meter().as_dict()[name] for name in ("name", "description", "metadata", "groupBy")}
    )
    assert same.json()["version"] == 1
    first = await http.put(path, json={"filters": {"$.model": {"$like": "o%"}}})
    second = await http.put(path, json={"aggregation": "COUNT"})
    assert [each.json()["version"] for each in (first, second)] == [2, 3]
    assert second.json()["filters"] == {"$.model": {"$like": "o%"}}
    values = [
        (await http.get(f"{path}/query", params={"version": number})).json()["data"][0]["value"] for number in (1, 2, 3)
    ]
    assert values == [7, 6, 2]
    assert (await http.get(f"{path}/query")).json()["data"][0]["value"] == 2
    assert (await http.get(f"{path}/query?version=4")).status_code == 404
    assert (await http.get(path, params={"version": 1})).json()["aggregation"] == "SUM"
    versions = (await http.get(f"{path}/versions")).json()
    assert [(each["version"], each["source"]) for each in versions] == [
        (3, "operator"),
        (2, "operator"),
        (1, "operator"),
    ]
    assert (await http.put(path, json={"aggregation": "SUM", "filters": {"$.a": {}}})).status_code == 422
    # COUNT has no value, so a SUM must say of what.
    assert (await http.put(path, json={"aggregation": "SUM"})).status_code == 422
    assert (await http.get("/api/v1/meters/nothing/versions")).status_code == 404


async def test_the_catalogue_adds_and_changes_meters_by_its_versions(
    driver: Driver, tmp_path: Any, tokens: Any
) -> None:
    path = tmp_path / "catalogue.toml"
    settings = driver.settings.model_copy(update={"catalogue_file": path})
    plain = CATALOGUE_FILE.read_text()

    def say(version: int, aggregation: str, *, event_type: str = TYPE) -> None:
        path.write_text(
            f'{plain}\n[[meters]]\nslug = "own"\nversion = {version}\nevent_type = "{event_type}"\n'
            f'aggregation = "{aggregation}"\nvalue_property = "$.tokens"\n'
        )

    async def seen() -> tuple[int, str, str]:
        async with driver.running(settings) as http:
            found = (await http.get("/api/v1/meters/own", headers=driver.headers("operator"))).json()
            return found["version"], found["aggregation"], found["source"]

    say(1, "SUM")
    assert await seen() == (1, "SUM", "catalogue")
    assert await seen() == (1, "SUM", "catalogue")
    async with driver.running(settings) as http:
        headers = driver.headers("operator")
        assert (await http.put("/api/v1/meters/own", json={"aggregation": "MIN"}, headers=headers)).status_code == 200
    assert await seen() == (2, "MIN", "operator")
    say(2, "MAX")
    assert await seen() == (3, "MAX", "catalogue")
    say(1, "SUM")
    assert await seen() == (3, "MAX", "catalogue")
    say(2, "AVG")
    with pytest.raises(ValueError, match="own has other contents than those stored of its version 2"):
        await seen()


async def test_what_takes_too_long_is_answered_so_and_holds_up_nothing_else(
    driver: Driver, database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "READ_TIMEOUT", "300ms")
    headers = driver.headers("operator")
    query = {"account": "acme", "from": SINCE.isoformat(), "to": (SINCE + timedelta(days=1)).isoformat()}
    async with driver.running() as client:
        with psycopg.connect(database.url("metering_owner").get_secret_value()) as owner:
            owner.execute("LOCK TABLE usage_log IN ACCESS EXCLUSIVE MODE")
            for path in ("/api/v1/meters/calls/query", "/api/v1/usage/history"):
                answer = await client.get(path, params=query if "usage" in path else {}, headers=headers)
                assert (answer.status_code, answer.json()["code"]) == (503, "too_much")
            async with anyio.create_task_group() as group:
                answers: list[httpx2.Response] = []

                async def ask() -> None:
                    answers.append(await client.get("/api/v1/meters/calls/query", headers=headers))

                for _ in range(40):
                    group.start_soon(ask)
                await anyio.sleep(0.1)
                # With every connection for questions taken.
                began = time.monotonic()
                assert (await client.get("/api/v1/price-book/versions", headers=headers)).status_code == 200
                assert time.monotonic() - began < 0.2
        assert {(each.status_code, each.json()["code"]) for each in answers} == {(503, "too_much"), (503, "busy")}
        assert (await client.get("/api/v1/meters/calls/query", headers=headers)).status_code == 200


async def test_the_command_line_asks_a_running_service(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    await log(driver, [use(0, 1), use(1, "12345678901234567890.5"), use(24, 4, model="o4", subject="cust 1")])

    def drive(url: str, client: httpx2.Client) -> None:
        monkeypatch.setattr(meters, "_metering", lambda: ServiceApi("metering", url, client))
        assert client.post(f"{url}/api/v1/meters", json=meter().as_dict()).status_code == 201
        command = typer.Typer()
        meters.register(command)

        def run(*arguments: str) -> str:
            answer = CliRunner().invoke(command, ["meters", *arguments], env={"COLUMNS": "200"})
            assert answer.exit_code == 0, answer.output
            return answer.stdout

        assert "tokens_total" in run("list")
        assert json.loads(run("show", "tokens_total"))["version"] == 1
        told = ["query", "tokens_total", "--window", "day", "--group-by", "subject", "--csv"]
        assert run(*told, "--from", "2026-10-24", "--zone", "Europe/Berlin").splitlines() == [
            "from,to,subject,value",
            "2026-10-23T22:00:00Z,2026-10-24T22:00:00Z,acme,12345678901234567891.5",
            "2026-10-24T22:00:00Z,2026-10-25T23:00:00Z,cust 1,4",
        ]
        assert "cust 1" in run(*told[:-1], "--subject", "cust 1", "--subject", "acme", "--filter", "model=o4")

    with serving(build(driver.settings)) as url, httpx2.Client(headers=driver.headers("operator")) as client:
        await anyio.to_thread.run_sync(drive, url, client)


async def test_the_document_tells_what_can_be_asked(http: httpx2.AsyncClient) -> None:
    paths = (await http.get("/openapi.json")).json()["paths"]
    query = paths["/api/v1/meters/{id_or_slug}/query"]
    names = {each["name"] for each in query["get"]["parameters"]}
    assert names >= {"from", "to", "windowSize", "windowTimeZone", "subject", "filterGroupBy", "groupBy"}
    assert set(query["post"]["responses"]["200"]["content"]) == {"application/json", "text/csv"}
    assert {"/api/v1/usage/history", "/api/v1/usage/summary", "/api/v1/usage/calls"} <= set(paths)


def refused(connection: psycopg.Connection[Any], statement: str, kind: type[psycopg.Error]) -> None:
    with pytest.raises(kind):
        connection.execute(statement)


async def test_a_stored_version_is_never_changed(driver: Driver, http: httpx2.AsyncClient, database: Any) -> None:
    statements = ("DELETE FROM meter_versions", "UPDATE meter_versions SET deleted = true", "TRUNCATE meter_versions")
    for role, kind in (
        ("metering", psycopg.errors.InsufficientPrivilege),
        ("metering_owner", psycopg.errors.RaiseException),
    ):
        with psycopg.connect(database.url(role).get_secret_value(), autocommit=True) as connection:
            for statement in statements:
                refused(connection, statement, kind)
