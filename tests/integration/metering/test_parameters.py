"""A question that says something nobody reads is refused: it would be answered, or done, otherwise than was meant."""

from typing import Final

import httpx2
import pytest

from tests.integration.metering.driving import Driver, Json

pytestmark = pytest.mark.anyio

DAY: Final = "from=2026-11-01T00:00:00Z&to=2026-11-02T00:00:00Z"


def pointers(answer: httpx2.Response) -> list[str]:
    """What is wrong, in order."""
    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    return [each["pointer"] for each in answer.json()["errors"]]


async def test_a_parameter_that_nobody_reads_is_named_with_those_that_are(driver: Driver) -> None:
    async with driver.running() as http:

        async def ask(path: str) -> httpx2.Response:
            return await http.get(path, headers=driver.headers("operator"))

        # Without the model the sum would be that of all models.
        answer = await ask(f"/api/v1/usage?account=acme&{DAY}&model=gpt-4o&groupBy=day")
        assert pointers(answer) == ["/query/groupBy", "/query/model"]
        assert "known are account, after, from, group_by, limit, to, tree" in answer.json()["errors"][0]["detail"]
        assert pointers(await ask("/api/v1/set-aside?reson=unpriced")) == ["/query/reson"]
        assert pointers(await ask("/api/v1/meters?page_size=5")) == ["/query/page_size"]
        assert pointers(await ask("/api/v1/meters/calls/subjects?since=2026-11-01T00:00:00Z")) == ["/query/since"]
        assert pointers(await ask("/api/v1/receipts?event=x")) == ["/query/event"]
        assert pointers(await ask("/dead-letters?page=2")) == ["/query/page"]
        # A path that reads none says so.
        assert "none is known" in (await ask("/api/v1/aliases/x?account=acme")).json()["errors"][0]["detail"]


async def test_a_parameter_that_is_said_twice_is_named(driver: Driver) -> None:
    async with driver.running() as http:
        answer = await http.get(
            f"/api/v1/usage?account=acme&{DAY}&group_by=provider&group_by=model", headers=driver.headers("operator")
        )
        assert pointers(answer) == ["/query/group_by"]
        # As OpenMeter's clients say it.
        answer = await http.get(
            "/api/v1/meters/calls/query?groupBy=provider&groupBy=model", headers=driver.headers("operator")
        )
        assert answer.status_code == 200, answer.text


async def test_what_was_meant_as_a_dry_run_is_not_done(driver: Driver) -> None:
    body: Json = {"id": "c-1", "kind": "void", "reason": "a test", "events": [{"source": "demo", "id": "x"}]}
    async with driver.running() as http:
        for path in ("/api/v1/corrections?dryrun=true", "/api/v1/price-book?dryRun=true"):
            answer = await http.post(path, json=body, headers=driver.headers("operator"))
            assert answer.status_code == 422, answer.text
            assert path.partition("?")[2].removesuffix("=true") in answer.text
        listed = await http.get("/api/v1/corrections", headers=driver.headers("operator"))
        assert listed.json()["corrections"] == []
        # Nor is a question of which a part stands in the path's query, and is not read there.
        answer = await http.post("/api/v1/meters/calls/query?groupBy=model", headers=driver.headers("operator"))
        assert pointers(answer) == ["/query/groupBy"]
