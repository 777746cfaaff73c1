"""What is read over HTTP: as it was commanded, as it is documented, and what a question cannot be."""

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx2
import pytest
from typer.testing import CliRunner

from contracts import ledger as words
from contracts.money import Amount, Unit
from infra.cli import app_for
from infra.commands import ledger as commands
from services.kit.database import open_pool
from services.kit.http import Readiness, build_app
from services.ledger.domain.commands import Units
from services.ledger.engine import Owners
from services.ledger.routes import Backend
from services.ledger.routes.reading import reading_routers
from services.ledger.translate import full_id
from tests.builders import charge_line, hold_leg, open_account, place_hold
from tests.conftest import Database
from tests.integration.ledger.by_hand import (
    PARTITION,
    uuid,
)
from tests.integration.ledger.driving import Driver
from tests.integration.ledger.exporting import rows_of_csv

pytestmark = pytest.mark.anyio

UNITS = Units.of({"usd": Unit("usd", "money", 2), "tokens": Unit("tokens", "cap", 0)})
HOLD = uuid(20)


async def test_a_place_in_one_statement_is_none_in_another(driver: Driver) -> None:
    async with driver.running() as http:
        await driver.funded("acme", "10")
        await driver.accepted(open_account("acme/key", "usd", key="key"))
        page = (await http.get("/v1/statements/acme", params={"limit": 1})).json()
        query = {"before": page["next_before"]}
        assert (await http.get("/v1/statements/acme", params=query)).json()["entries"]
        refused = await http.get("/v1/statements/acme/key", params=query)
        assert (refused.status_code, refused.json()["code"]) == (422, "invalid_cursor")
        assert refused.json()["detail"] == "`before` is a place in the statement of acme"


async def test_what_was_commanded_is_read_over_http_with_its_causes_and_shown_by_scrip(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: dict[str, Any] = {}
    async with driver.running() as http:
        await driver.funded("acme", "10")
        await driver.accepted(open_account("acme/key"))
        hold = full_id("hold", PARTITION, HOLD)
        await driver.accepted(place_hold(hold, hold_leg("usd", "4"), account="acme/key"))
        line = charge_line("event/1", account="acme/key", usd="3", hold=hold)
        charged = await driver.accepted(words.Charge(idempotency_key="charge", line=line))

        async def get(path: str, **query: str) -> Any:
            answer = await http.get(path, params=query)
            assert answer.status_code == 200, answer.text
            answers[path] = answer.json()
            return answers[path]

        now = await get("/v1/balances/acme")
        (usd,) = now["wallets"]
        assert (usd["posted"], usd["held"], usd["available"], usd["policy"]) == ("7", "0", "7", "hard")
        (then,) = (await get("/v1/balances/acme", as_of=now["as_of"]))["wallets"]
        assert (then["posted"], then["policy"], then["holds"]) == ("7", None, [])
        assert [lot["posted"] for lot in then["lots"]] == ["7"]
        before = await http.get("/v1/balances/acme", params={"as_of": "2026-01-01T09:00:00+09:00"})
        assert before.status_code == 404
        assert before.json()["detail"] == "the account acme was not open at 2026-01-01T00:00:00Z"
        world = await get("/v1/balances/acme", world_at=now["as_of"])
        assert world["wallets"] == [{"unit": "usd", "posted": "7"}]

        page = await get("/v1/statements/acme", reference=line.event_id)
        assert {entry["transaction"] for entry in page["entries"]} == {charged.transaction}
        page = await get("/v1/statements/acme", kind="charged", since="2026-01-01T00:00:00Z", limit="1")
        assert [(entry["posted"], entry["balance"]) for entry in page["entries"]] == [("-3", "7")]

        cause = await get(f"/v1/transactions/{charged.transaction}")
        assert cause["commands"] == [{"principal": "tester", "idempotency_key": "charge"}]
        assert [each["event_id"] for each in cause["lines"]] == [line.event_id]
        assert ("charged", "@usage", "3") in {
            (each["kind"], each["account"], each["posted"]) for each in cause["entries"]
        }
        (found,) = (await get(f"/v1/charges/{line.source}/{line.event_id}"))["lines"]
        assert (found["transaction"], found["hold"], found["reversals"]) == (charged.transaction, hold, [])
        assert [(part["account"], part["amount"]) for part in found["split"]] == [("acme", "3")]

        (totals,) = (await get("/v1/totals/acme"))["units"]
        assert (totals["granted"], totals["charged"], totals["posted"]) == ("10", "3", "7")
        tree = await get("/v1/trees/acme", limit="1")
        assert [each["account"] for each in tree["accounts"]] == ["acme"]
        tree = await get("/v1/trees/acme", after=tree["next_after"])
        assert [(each["account"], each["wallets"]) for each in tree["accounts"]] == [("acme/key", [])]
        assert tree["next_after"] is None
        branch = await get("/v1/trees/acme/key")
        assert [each["account"] for each in branch["accounts"]] == ["acme/key"]

        now = await get("/v1/balances/acme")
        await get("/v1/holds", account="acme")
        export = await http.get("/v1/exports/journal", params={"account": "acme", "below": "true", "format": "csv"})
        assert export.headers["content-type"].startswith("text/csv")
        rows = rows_of_csv(export.content)
        assert [row["kind"] for row in rows][:2] == ["wallet_opened", "lot_granted"]

    class Answering:
        @classmethod
        def running(cls, _service: str) -> "Answering":
            return cls()

        def get(self, path: str, _query: dict[str, str] | None = None) -> Any:
            return answers[path]

    monkeypatch.setattr(commands, "ServiceApi", Answering)
    for arguments, shown in (
        (["balance", "acme"], "hard"),
        (["statement", "acme"], "charged"),
        (["transaction", charged.transaction], "@usage"),
        (["charge", "demo", "event/1"], "event/1"),
        (["holds", "acme"], "There are no open holds."),
        (["totals", "acme"], "granted"),
        (["tree", "acme"], "acme/key"),
    ):
        result = CliRunner().invoke(app_for(()), arguments, env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        assert shown in result.output


async def test_what_says_nothing_of_its_use_is_explained_like_any_charge(driver: Driver) -> None:
    amounts = (Amount(unit="usd", amount="2"),)
    async with driver.running() as http:
        await driver.funded("acme", "10")
        hold = full_id("hold", PARTITION, HOLD)
        await driver.accepted(place_hold(hold, hold_leg("usd", "4")))
        for command, event_id in (
            (
                words.SettleHold(
                    idempotency_key="settle", hold=hold, account="acme", settlement="settled", amounts=amounts
                ),
                "settled",
            ),
            (words.Debit(idempotency_key="debit", account="acme", debit="debited", amounts=amounts), "debited"),
        ):
            done = await driver.accepted(command)
            asked = await http.get(f"/v1/charges/tester/{event_id}")
            (line,) = asked.json()["lines"]
            assert (line["scope"], [part["amount"] for part in line["split"]]) == (None, ["2"])
            cause = await http.get(f"/v1/transactions/{done.transaction}")
            assert cause.json()["lines"] == [line]


async def test_what_the_documentation_refers_to_is_in_it(driver: Driver) -> None:
    async with driver.running() as http:
        document = (await http.get("/openapi.json")).json()

    def strings(part: Any) -> Iterator[str]:
        if isinstance(part, str):
            yield part
        for each in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            yield from strings(each)

    place = "#/components/schemas/"
    named = {each.removeprefix(place) for each in strings(document) if each.startswith("#/")}
    assert named
    assert named <= document["components"]["schemas"].keys()


async def test_bad_questions_are_told_apart_from_empty_answers(asking: httpx2.AsyncClient) -> None:
    for path, status, code in BAD_QUESTIONS:
        answer = await asking.get(path)
        said = answer.json()
        found = said["errors"][0]["code"] if said["code"] == "invalid_request" else said["code"]
        assert (answer.status_code, said["code"] if code == "invalid_request" else found) == (status, code), path
        assert answer.headers["content-type"] == "application/problem+json"


BAD_QUESTIONS = (
    ("/v1/balances/nobody", 404, "account_not_open"),
    ("/v1/balances/nobody?as_of=2026-01-01T00:00:00Z", 404, "account_not_open"),
    ("/v1/balances/nobody?world_at=2026-01-01T00:00:00Z", 404, "account_not_open"),
    ("/v1/balances/acme//x", 422, "invalid_account"),
    ("/v1/balances/acme?as_of=yesterday", 422, "invalid_request"),
    ("/v1/balances/acme?as_of=2026-01-01", 422, "invalid_request"),
    ("/v1/balances/acme?as_of=2199-01-01T00:00:00Z", 422, "invalid_time"),
    ("/v1/balances/acme?as_of=2026-01-01T00:00:00Z&world_at=2026-01-01T00:00:00Z", 422, "invalid_time"),
    ("/v1/statements/acme?kind=eaten", 422, "invalid_request"),
    ("/v1/statements/acme?unit=sheep", 422, "unknown_unit"),
    ("/v1/statements/acme?limit=501", 422, "invalid_request"),
    ("/v1/statements/acme?reference=%00", 422, "invalid_request"),
    ("/v1/statements/acme?before=eyJiYXRjaCI6LTF9", 422, "invalid_cursor"),
    (f"/v1/statements/acme?before={'A' * 5000}", 422, "invalid_request"),
    ("/v1/transactions/nonsense", 422, "invalid_request"),
    (f"/v1/transactions/hold_07_{HOLD}", 422, "invalid_request"),
    (f"/v1/transactions/txn_07_{HOLD}", 404, "transaction_unknown"),
    ("/v1/transactions/txn_07_ffffffff-ffff-7fff-bfff-ffffffffffff", 404, "transaction_unknown"),
    ("/v1/charges/demo/nothing", 404, "charge_unknown"),
    ("/v1/charges/demo/%00", 422, "invalid_request"),
    ("/v1/charges/demo/x?account=acme//x", 422, "invalid_account"),
    ("/v1/totals/nobody", 404, "account_not_open"),
    ("/v1/trees/nobody", 404, "account_not_open"),
    ("/v1/trees/%25zz", 422, "invalid_account"),
    ("/v1/trees/nobody/below", 404, "account_not_open"),
    ("/v1/exports/journal?account=nobody", 404, "account_not_open"),
    ("/v1/exports/journal?account=nobody&format=parquet", 404, "account_not_open"),
    ("/v1/exports/journal?account=acme&format=xlsx", 400, "unknown_format"),
    ("/v1/statements/nobody", 404, "account_not_open"),
    ("/v1/statements/nobody?kind=charged&since=2026-01-01T00:00:00Z", 404, "account_not_open"),
    ("/v1/holds?account=nobody", 404, "account_not_open"),
    ("/v1/trees/nobody?after=nobody/a", 404, "account_not_open"),
    ("/v1/holds?account=acme&after=nonsense", 422, "invalid_request"),
    # Else it would be answered as if it had not been asked.
    ("/v1/balances/acme?asof=2026-01-01T00:00:00Z", 422, "unknown_parameter"),
    ("/v1/balances/acme?as_of=2026-01-01T00:00:00Z&as_of=2026-01-02T00:00:00Z", 422, "repeated_parameter"),
    ("/v1/statements/acme?from=2026-01-01T00:00:00Z", 422, "unknown_parameter"),
    ("/v1/exports/journal?account=acme&named=csv", 422, "unknown_parameter"),
)


@pytest.fixture
async def asking(database: Database, tokens_file: Path, tokens: Mapping[str, str]) -> AsyncIterator[httpx2.AsyncClient]:
    """The routes on a database of nobody, without a ledger behind them."""
    pool = await open_pool(database.url("ledger"), name="asking")
    backend = Backend(owners=Owners(None), pool=pool, units=UNITS)  # type: ignore[arg-type]  # nobody is asked
    app = build_app(
        name="ledger",
        lifespan=lambda _: nullcontext(),
        readiness=Readiness(),
        tokens_file=tokens_file,
        routers=reading_routers(lambda: backend),
    )
    headers = {"Authorization": f"Bearer {tokens['operator']}"}
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://ledger", headers=headers) as client:
        yield client
    await pool.close()
