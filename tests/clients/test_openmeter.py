"""The unmodified Python client of OpenMeter reports use: single, batch and plain JSON, sync and async."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import pytest
from corehttp.exceptions import ClientAuthenticationError, HttpResponseError
from openmeter import Client
from openmeter.aio import Client as AsyncClient
from openmeter.models import Event

from tests.clients.running import Services

ACCOUNT: Final = "acme"
USE: Final[Mapping[str, Any]] = {
    "provider": "openai",
    "model": "gpt-4o-mini",
    "input_tokens": 1_000,
    "output_tokens": 0,
}
NOW: Final = datetime.now(UTC)


def event(event_id: str, **changes: Any) -> Event:
    values: dict[str, Any] = {
        "id": event_id,
        "source": "demo",
        "specversion": "1.0",
        "type": "scrip.model.used.v1",
        "subject": ACCOUNT,
        "time": NOW - timedelta(minutes=1),
        "data": dict(USE),
    } | changes
    return Event(**values)


def test_the_sync_client_reports_in_every_form(services: Services) -> None:
    with services.ledger(), services.metering():
        services.open(ACCOUNT, {"usd": "1"})
        with Client(endpoint=services.metering_url, token=services.tokens["demo"]) as client:
            client.events.ingest_event(event("single"))
            client.events.ingest_event(event("without-time", time=None))
            client.events.ingest_events([event(f"batch-{number}") for number in range(100)])
            client.events.ingest_events_json(event("plain"))
            # A client that did not hear the answer sends it again.
            client.events.ingest_events([event(f"batch-{number}") for number in range(100)])
        services.until_logged(103)
        services.until_wallet(ACCOUNT, "usd", posted="0.98455")
        counters = services.counters()
        assert (counters["new"], counters["charged"]) == (103, 103)


@pytest.mark.anyio
async def test_the_async_client_does_the_same(services: Services) -> None:
    with services.ledger(), services.metering():
        services.open(ACCOUNT, {"usd": "1"})
        async with AsyncClient(endpoint=services.metering_url, token=services.tokens["demo"]) as client:
            await client.events.ingest_event(event("single"))
            await client.events.ingest_events([event("single"), event("other")])
            await client.events.ingest_events_json(event("plain"))
        services.until_logged(3)
        services.until_wallet(ACCOUNT, "usd", posted="0.99955")


def test_an_event_of_openmeters_own_example_is_taken(services: Services) -> None:
    with services.metering():
        with Client(endpoint=services.metering_url, token=services.tokens["demo"]) as client:
            client.events.ingest_event(
                event("hello", type="request", data={"method": "GET", "path": "/hello", "duration_ms": 12.5})
            )
        services.until_logged(1)


def test_a_bad_event_is_named_in_an_error_the_client_reads(services: Services) -> None:
    with services.metering():
        with Client(endpoint=services.metering_url, token=services.tokens["demo"]) as client:
            with pytest.raises(HttpResponseError) as found:
                client.events.ingest_events([event("good"), event("bad", data={"provider": "openai"})])
            assert found.value.status_code == 400
            problem = found.value.model
            assert problem is not None
            assert (problem["status"], problem["title"], problem["type"]) == (400, "Bad Request", "about:blank")
            assert problem["code"] == "invalid_events"
            assert {each["index"] for each in problem["errors"]} == {1}
        with (
            Client(endpoint=services.metering_url, token="guessed") as stranger,
            pytest.raises(ClientAuthenticationError),
        ):
            stranger.events.ingest_event(event("stranger"))
    assert services.logged() == set()
