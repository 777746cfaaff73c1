"""Middleware on real services: held before, charged after what was served, given back what was not, told in headers."""

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import flask
import httpx2
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from scrip_client import AsyncScrip, Scrip, SpoolFull, UsageEvent
from scrip_client.admission import Admission, IncomingRequest, LimitWarning, Rules, Served, served
from scrip_client.asgi import ScripMiddleware
from scrip_client.flask import ScripFlask
from tests.clients.running import Services, until

ACCOUNT: Final = "acme/ana"
LIMIT: Final = 5

Call = Callable[..., httpx2.Response]


def usage(request: IncomingRequest, admission: Admission, how: Served) -> UsageEvent | None:
    """A use of a model, as those have a price."""
    made = served(request, admission, how)
    if made is None:
        return None
    return UsageEvent(
        account=made.account,
        id=made.id,
        type="scrip.model.used.v1",
        data={
            "provider": "openai",
            "model": "gpt-4o-mini",
            "input_tokens": made.data.get("tokens", 1_000),
            "output_tokens": 0,
            "attributes": {
                name: made.data[name] for name in ("endpoint", "method", "status", "ended", "response_bytes")
            },
        },
    )


RULES: Final = Rules(
    account=lambda request: request.headers.get("x-account"),
    estimate=lambda _: {"usd": "0.01", "calls": 1},
    usage=usage,
    routes=("/jobs",),
    limits_seconds=0,
)


# The application, once for each framework: /jobs/<what> does it, /free is not metered. --------------------------------


def starlette(scrip: AsyncScrip, rules: Rules) -> Starlette:
    async def work(request: Request) -> Response:
        admission: Admission = request.scope.get("scrip") or Admission(account="", hold=None, hold_id="")
        match request.path_params["what"]:
            case "fine":
                admission.data["tokens"] = 2_000
                return JSONResponse({"ok": True}, headers={"X-Own": "1"})
            case "nothing":
                admission.nothing_used()
                return JSONResponse({"ok": True})
            case "invalid":
                return JSONResponse({"ok": False}, status_code=422)
            case "broken":
                raise RuntimeError("broken")
            case "stream":
                return StreamingResponse(_chunks())
            case "file":
                return FileResponse(__file__)
            case _:
                return StreamingResponse(_breaking())

    async def _chunks() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"x" * 10

    async def _breaking() -> AsyncIterator[bytes]:
        yield b"x" * 10
        raise RuntimeError("broke off")

    async def free(_: Request) -> Response:
        return JSONResponse({"ok": True})

    app = Starlette(routes=[Route("/jobs/{what}", work), Route("/free", free)])
    app.add_middleware(ScripMiddleware, scrip=scrip, rules=rules)
    return app


def flask_app(scrip: Scrip, rules: Rules) -> flask.Flask:
    app = flask.Flask("tests")

    @app.get("/jobs/<what>")
    def work(what: str) -> Any:
        admission: Admission = flask.g.get("scrip") or Admission(account="", hold=None, hold_id="")
        match what:
            case "fine":
                admission.data["tokens"] = 2_000
                return flask.jsonify(ok=True), 200, {"X-Own": "1"}
            case "nothing":
                admission.nothing_used()
                return flask.jsonify(ok=True)
            case "invalid":
                return flask.jsonify(ok=False), 422
            case "broken":
                raise RuntimeError("broken")
            case _:
                return flask.Response((b"x" * 10 for _ in range(3)), mimetype="text/plain")

    @app.get("/free")
    def free() -> Any:
        return flask.jsonify(ok=True)

    ScripFlask(app, scrip=scrip, rules=rules)
    return app


class World:
    """The application of one framework, with the real services behind it."""

    def __init__(self, services: Services, spool: Path, framework: str) -> None:
        self.services = services
        self.framework = framework
        self.opened = ExitStack()
        self.scrip: Scrip | AsyncScrip | None = None
        self._spool = spool

    def serve(self, rules: Rules = RULES, **more: Any) -> Call:
        """A function that calls the application."""
        options: dict[str, Any] = {
            "source": "operator",
            "token": self.services.tokens["operator"],
            "spool": self._spool,
            "ledger_url": self.services.ledger_url,
        } | more
        url = self.services.metering_url
        if self.framework == "flask":
            scrip = self.opened.enter_context(Scrip(url, **options))
            self.scrip = scrip
            http = self.opened.enter_context(
                httpx2.Client(
                    transport=httpx2.WSGITransport(flask_app(scrip, rules), raise_app_exceptions=False),
                    base_url="http://app",
                )
            )
            return lambda path, **headers: http.get(path, headers={"X-Account": ACCOUNT} | headers)
        return self._serve_asgi(rules, url, options)

    def _serve_asgi(self, rules: Rules, url: str, options: dict[str, Any]) -> Call:
        runner = asyncio.Runner()
        self.opened.callback(runner.close)
        scrip = AsyncScrip(url, **options)
        self.scrip = scrip
        self.opened.callback(lambda: runner.run(scrip.close()))
        app = starlette(scrip, rules)
        self.app = app

        async def call(path: str, headers: dict[str, str]) -> httpx2.Response:
            transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
            async with httpx2.AsyncClient(transport=transport, base_url="http://app") as http:
                answer = await http.get(path, headers=headers)
            # What goes on in the background is part of the request here.
            await asyncio.gather(*(task for task in asyncio.all_tasks() if task is not asyncio.current_task()))
            return answer

        return lambda path, **headers: runner.run(call(path, {"X-Account": ACCOUNT} | headers))

    def wallet(self, unit: str) -> tuple[str, str]:
        """What is posted and held."""
        found = self.services.wallet(ACCOUNT if unit == "calls" else "acme", unit)
        return found["posted"], found["held"]

    def events(self) -> list[dict[str, Any]]:
        """What was logged."""
        assert self.scrip is not None
        until(lambda: self.scrip is not None and self.scrip.status().waiting == 0)
        rows = self.services.connection.execute("SELECT data::text FROM usage_log ORDER BY occurred_at").fetchall()
        return [json.loads(row[0]) for row in rows]


@pytest.fixture(params=["asgi", "flask"])
def world(request: pytest.FixtureRequest, services: Services, spool: Path) -> Iterator[World]:
    made = World(services, spool, request.param)
    with services.ledger(), services.metering():
        services.open("acme", {"usd": "1"})
        services.open(ACCOUNT, {"calls": str(LIMIT)})
        with made.opened:
            yield made


def test_a_request_is_held_for_served_charged_and_told_of(world: World) -> None:
    call = world.serve()
    answer = call("/jobs/fine")
    assert (answer.status_code, answer.json()) == (200, {"ok": True})
    headers = answer.headers
    assert headers["x-own"] == "1"
    assert headers["x-scrip-held"] == "0.01 usd, 1 calls"
    assert headers["x-scrip-remaining"] == "0.99 usd, 4 calls"
    assert headers["ratelimit-policy"] == '"calls";q=5'
    assert headers["ratelimit"] == '"calls";r=4'
    assert "x-scrip-warning" not in headers
    world.services.until_wallet("acme", "usd", posted="0.9997", held="0")
    world.services.until_wallet(ACCOUNT, "calls", posted="4", held="0")
    (event,) = world.events()
    assert event["hold"].startswith("hold_")
    assert event["attributes"]["endpoint"] == "/jobs/fine"
    assert event["attributes"]["status"] == 200
    assert world.services.logged() == {headers["x-scrip-request-id"]}


def test_what_did_no_work_is_given_back_and_not_charged(world: World) -> None:
    call = world.serve()
    for path, status in (("/jobs/invalid", 422), ("/jobs/broken", 500), ("/jobs/nothing", 200)):
        answer = call(path)
        assert answer.status_code == status
        world.services.until_wallet(ACCOUNT, "calls", posted=str(LIMIT), held="0")
        world.services.until_wallet("acme", "usd", posted="1", held="0")
        if path != "/jobs/broken":
            assert answer.headers["x-scrip-remaining"] == f"1 usd, {LIMIT} calls"
    assert world.events() == []


def test_a_stream_is_charged_when_it_ends(world: World) -> None:
    call = world.serve()
    answer = call("/jobs/stream")
    assert answer.content == b"x" * 30
    assert answer.headers["x-scrip-held"] == "0.01 usd, 1 calls"
    world.services.until_wallet(ACCOUNT, "calls", posted="4", held="0")
    (event,) = world.events()
    assert event["attributes"]["ended"] == "completed"


def test_what_is_not_metered_is_not_touched(world: World) -> None:
    call = world.serve()
    for answer in (call("/free"), call("/jobs/fine", **{"X-Account": ""})):
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.startswith(("x-scrip", "ratelimit"))]
    assert world.wallet("calls") == (str(LIMIT), "0")


def test_it_warns_at_80_percent_and_refuses_at_100(world: World) -> None:
    warnings: list[LimitWarning] = []
    call = world.serve(replace(RULES, on_warning=warnings.append, upgrade_url="https://acme.example/plans"))
    told = [call("/jobs/fine").headers.get("x-scrip-warning") for _ in range(LIMIT)]
    assert told == [None, None, None, "80% of 5 calls used", "100% of 5 calls used"]
    assert [(each.account, each.unit, each.percent) for each in warnings] == [
        (ACCOUNT, "calls", 80),
        (ACCOUNT, "calls", 100),
    ]
    world.services.until_wallet(ACCOUNT, "calls", posted="0", held="0")
    refused = call("/jobs/fine")
    # A wallet of which all is spent has no lot that tells its limit, but it is a cap.
    assert refused.status_code == 429
    assert refused.headers["content-type"] == "application/problem+json"
    body = refused.json()
    assert (body["code"], body["limit_source"], body["upgrade_url"]) == (
        "insufficient_funds",
        ACCOUNT,
        "https://acme.example/plans",
    )
    assert (body["required"], body["remaining"]) == (
        {"amount": "1", "unit": "calls"},
        {"amount": "0", "unit": "calls"},
    )
    assert len(world.events()) == LIMIT


def test_a_warning_that_fails_stops_nothing(world: World) -> None:
    def broken(_: LimitWarning) -> None:
        raise RuntimeError("broken")

    call = world.serve(replace(RULES, on_warning=broken, warn_percent=0))
    answer = call("/jobs/fine")
    assert (answer.status_code, answer.json()) == (200, {"ok": True})
    assert answer.headers["x-scrip-warning"] == "1% of 1 usd used, 20% of 5 calls used"
    world.services.until_wallet(ACCOUNT, "calls", posted="4", held="0")
    # So it is when somebody is refused.
    call = world.serve(replace(RULES, on_warning=broken, warn_percent=0, estimate=lambda _: {"calls": 9}))
    assert call("/jobs/fine").status_code == 429


def test_money_that_is_short_is_402(world: World) -> None:
    call = world.serve(replace(RULES, estimate=lambda _: {"usd": "1.5"}))
    refused = call("/jobs/fine")
    assert refused.status_code == 402
    assert refused.json()["required"] == {"amount": "1.5", "unit": "usd"}
    assert refused.headers["x-scrip-remaining"] == "1 usd"


def test_an_account_that_is_not_open_is_refused(world: World) -> None:
    refused = world.serve()("/jobs/fine", **{"X-Account": "nobody"})
    assert (refused.status_code, refused.json()["code"]) == (403, "account_not_open")


AWAY: Final[dict[str, Any]] = {"ledger_url": "http://127.0.0.1:9", "ledger_seconds": 0.2}


def test_nothing_is_served_while_the_ledger_is_away(world: World) -> None:
    refused = world.serve(**AWAY)("/jobs/fine")
    assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
    assert refused.headers["retry-after"] == "2"
    assert world.events() == []


def test_unless_that_is_wanted_and_then_it_is_charged_all_the_same(world: World) -> None:
    answer = world.serve(replace(RULES, when_away="serve"), **AWAY)("/jobs/fine")
    assert (answer.status_code, answer.json()) == (200, {"ok": True})
    assert "x-scrip-remaining" not in answer.headers
    world.services.until_wallet("acme", "usd", posted="0.9997", held="0")
    world.services.until_wallet(ACCOUNT, "calls", posted="4", held="0")


def test_nobody_is_let_in_whose_use_could_not_be_recorded(world: World) -> None:
    refused = world.serve(spool_bytes_max=1_000)("/jobs/fine")
    assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
    assert world.wallet("calls") == (str(LIMIT), "0")


def test_who_was_let_in_and_cannot_be_recorded_is_told_an_error(world: World) -> None:
    call = world.serve()
    assert world.scrip is not None
    with patch.object(world.scrip.recorder, "accept", side_effect=SpoolFull("full")):
        answer = call("/jobs/fine")
    assert (answer.status_code, answer.json()["code"]) == (500, "usage_not_recorded")
    assert "ok" not in answer.json()
    assert answer.headers["x-scrip-request-id"] in answer.json()["detail"]


@asynccontextmanager
async def asgi(services: Services, spool: Path, rules: Rules = RULES) -> AsyncIterator[Starlette]:
    options: dict[str, Any] = {"token": services.tokens["operator"], "ledger_url": services.ledger_url}
    scrip = AsyncScrip(services.metering_url, source="operator", spool=spool, **options)
    yield starlette(scrip, rules)
    await scrip.close(1)


def scope(path: str) -> dict[str, Any]:
    headers = [(b"x-account", ACCOUNT.encode())]
    return {
        "type": "http",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": headers,
    }


@pytest.mark.anyio
@pytest.mark.parametrize("leaves", [False, True])
async def test_a_stream_that_breaks_off_is_charged_for_what_was_sent(
    services: Services, spool: Path, leaves: bool
) -> None:
    """Because the application failed, or because the client left."""
    with services.ledger(), services.metering():
        await asyncio.to_thread(services.open, ACCOUNT, {"calls": "5"})
        async with asgi(services, spool) as app:

            async def receive() -> dict[str, Any]:
                await asyncio.sleep(60)
                return {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                if leaves and message.get("body"):
                    raise asyncio.CancelledError

            # Starlette ends quietly when its client has left.
            with suppress(asyncio.CancelledError) if leaves else pytest.raises(RuntimeError, match="broke off"):
                await app(scope("/jobs/stream" if leaves else "/jobs/breaking"), receive, send)
        await asyncio.to_thread(services.until_wallet, ACCOUNT, "calls", posted="4", held="0")
        ((data,),) = services.connection.execute("SELECT data::text FROM usage_log").fetchall()
        assert json.loads(data)["attributes"]["ended"] == "broke_off"


@pytest.mark.anyio
async def test_the_use_is_on_disk_before_the_last_byte(services: Services, spool: Path) -> None:
    with services.ledger():
        await asyncio.to_thread(services.open, ACCOUNT, {"calls": "5"})
        async with asgi(services, spool) as app:
            seen: list[tuple[str, int]] = []

            async def receive() -> dict[str, Any]:
                await asyncio.sleep(60)
                return {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                with sqlite3.connect(spool) as connection:
                    (waiting,) = connection.execute("SELECT count(*) FROM events").fetchone()
                connection.close()
                seen.append(("last" if message.get("more_body") is False else message["type"], waiting))

            await app(scope("/jobs/stream"), receive, send)
            assert seen[-1] == ("last", 1)
            assert {waiting for _, waiting in seen[:-1]} == {0}


def test_the_event_it_makes_by_itself_is_charged_at_a_price_of_ones_own(world: World) -> None:
    """And its hold settled: the whole of "check the limit, track after" without a line of one's own."""
    http = httpx2.Client(
        base_url=world.services.metering_url,
        headers={"Authorization": f"Bearer {world.services.tokens['operator']}"},
        trust_env=False,
    )
    version = {
        "id": "own",
        "effective_at": "2026-11-02T00:00:00Z",
        "models": [],
        "prices": [{"id": "calls", "type": "request.served", "unit": "calls", "price": "1"}],
    }
    with http:
        stored = http.post("/api/v1/price-book", params={"backdate": "true"}, json=version)
        assert stored.status_code == 201, stored.text
    call = world.serve(Rules(account=RULES.account, estimate=lambda _: {"calls": 3}, routes=("/jobs",)))
    answer = call("/jobs/fine")
    assert answer.headers["x-scrip-held"] == "3 calls"
    assert answer.headers["x-scrip-remaining"] == "2 calls"
    world.services.until_wallet(ACCOUNT, "calls", posted="4", held="0")
    (event,) = world.events()
    assert {name: event[name] for name in ("endpoint", "method", "status", "ended", "tokens", "response_bytes")} == {
        "endpoint": "/jobs/fine",
        "method": "GET",
        "status": 200,
        "ended": "completed",
        "tokens": 2_000,
        "response_bytes": len(answer.content),
    }


@pytest.mark.anyio
async def test_a_file_that_the_server_sends_itself_is_an_answer_like_any_other(services: Services, spool: Path) -> None:
    with services.ledger():
        await asyncio.to_thread(services.open, ACCOUNT, {"calls": "5"})
        async with asgi(services, spool) as app:
            sent: list[Any] = []

            async def receive() -> dict[str, Any]:
                await asyncio.sleep(60)
                return {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                sent.append(message)

            await app(scope("/jobs/file") | {"extensions": {"http.response.pathsend": {}}}, receive, send)
            assert [message["type"] for message in sent] == ["http.response.start", "http.response.pathsend"]
            assert (b"x-scrip-remaining", b"4 calls") in sent[0]["headers"]
            with sqlite3.connect(spool) as connection:
                assert connection.execute("SELECT count(*) FROM events").fetchone() == (1,)
            connection.close()
