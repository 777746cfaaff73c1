"""One call through processes of their own is one trace, from the gateway's request to the journal entry."""

import os
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, Final

import psycopg
import pytest
from openai import OpenAI
from psycopg.conninfo import make_conninfo

from infra.demo.scratch_stack import ScratchStack
from infra.supervisor import DATABASE
from tests.e2e.conftest import Api, Played
from tests.e2e.usage import eventually, fresh
from tests.traces import Span, named, spans_in

pytestmark = pytest.mark.timeout(200)

MODEL: Final = "gpt-4o-mini"
REQUEST: Final = "POST /v1/chat/completions"
# Who answers, under which step of the gateway's.
STEPS: Final[Mapping[str, str | None]] = {
    "verify": REQUEST,
    "keyvault verify": "verify",
    "quote": REQUEST,
    "place_hold": REQUEST,
    "ledger place_hold": "place_hold",
    "lease": REQUEST,
    "keyvault lease": "lease",
    "forward": REQUEST,
    "relay": REQUEST,
    "meter": REQUEST,
    "charge": "meter",
}
SERVICES: Final[Mapping[str, str]] = {
    REQUEST: "gateway",
    "keyvault verify": "keyvault",
    "keyvault lease": "keyvault",
    "ledger place_hold": "ledger",
    "meter": "metering",
    "charge": "ledger",
}


@pytest.fixture
def key(stack: ScratchStack) -> str:
    """An access key that nobody has verified yet."""
    keyvault = Api(stack.url("keyvault"), stack.credentials.tokens["operator"])
    made: str = keyvault.post("/v1/access-keys", {"account": fresh("trace")}).json()["key"]
    return made


def call(stack: ScratchStack, key: str, **headers: str) -> str:
    """One call of a model; the request's id."""
    with OpenAI(api_key=key, base_url=f"{stack.url('gateway')}/v1", max_retries=0) as client:
        raw = client.chat.completions.with_raw_response.create(
            model=MODEL,
            messages=[{"role": "user", "content": "[[tokens:5]] a prompt of hunter2"}],
            extra_headers=headers,
        )
    return raw.headers["x-scrip-request-id"]


def whole_trace(played: Played, request: str) -> Sequence[Span]:
    """All spans of the trace of a request, once every process has told its own."""

    def read() -> Sequence[Span]:
        spans = spans_in(played.traces)
        traces = {span["trace_id"] for span in spans if span["attributes"].get("scrip.request") == request}
        assert len(traces) <= 1
        return [span for span in spans if span["trace_id"] in traces]

    return eventually(read, lambda spans: {REQUEST, *STEPS} <= {span["name"] for span in spans})


def entry(stack: ScratchStack, charge: Span) -> tuple[Any, ...]:
    """The journal entry that a charge names: its transaction, account, kind, amount and hold."""
    url = make_conninfo(
        host="127.0.0.1",
        port=stack.run.ports["postgres"],
        dbname=DATABASE,
        user="ledger",
        password=stack.credentials.postgres["ledger"],
    )
    place = [charge["attributes"][f"scrip.{name}"] for name in ("partition", "batch", "position")]
    with psycopg.connect(url) as connection:
        (found,) = connection.execute(
            "SELECT transaction_id::text, account, kind, posted, hold_id::text FROM ledger.journal"
            " WHERE (partition, batch, position) = (%s, %s, %s)",
            place,
        ).fetchall()
    return found


def test_one_call_is_one_trace_from_the_request_to_the_journal_entry(
    played: Played, stack: ScratchStack, key: str
) -> None:
    request = call(stack, key)
    spans = whole_trace(played, request)
    by_id = {span["span_id"]: span for span in spans}
    (root,) = named(list(spans), REQUEST)
    assert root["parent_id"] is None
    for name, parent in STEPS.items():
        (span,) = named(list(spans), name)
        assert by_id[span["parent_id"]]["name"] == parent, name
    assert {span["name"] for span in spans} == {REQUEST, *STEPS}
    for name, service in SERVICES.items():
        assert named(list(spans), name)[0]["service"] == service
    assert not [span for span in spans if span["error"]]
    (hold,), (meter,), (charge,) = (named(list(spans), name) for name in ("ledger place_hold", "meter", "charge"))
    assert hold["attributes"]["scrip.outcome"] == "accepted"
    for span in (meter, charge):
        assert (span["attributes"]["scrip.event"], span["attributes"]["scrip.outcome"]) == (request, "charged")
    transaction, account, kind, posted, hold_id = entry(stack, charge)
    assert charge["attributes"]["scrip.transaction"].endswith(transaction)
    # The key's own account has no wallet of money: the one above it paid.
    assert charge["attributes"]["scrip.account"].startswith(f"{account}/key_")
    assert kind == "charged"
    assert f'"{Decimal(-posted).scaleb(-9).normalize():f}"' in meter["attributes"]["scrip.amounts"]
    (placed,) = named(list(spans), "place_hold")
    assert placed["attributes"]["scrip.hold"].endswith(hold_id)
    assert "hunter2" not in played.traces.read_text(encoding="utf-8")


def test_the_access_key_of_an_account_is_made_in_one_trace_with_what_the_ledger_opens(
    played: Played, stack: ScratchStack
) -> None:
    trace, parent = os.urandom(16).hex(), os.urandom(8).hex()
    keyvault = Api(stack.url("keyvault"), stack.credentials.tokens["operator"])
    made = keyvault.post("/v1/access-keys", {"account": fresh("trace")}, traceparent=f"00-{trace}-{parent}-01")
    assert made.status_code == 201

    def of_this_trace() -> set[tuple[str, str]]:
        return {(span["service"], span["name"]) for span in spans_in(played.traces) if span["trace_id"] == trace}

    wanted = {("keyvault", "POST /v1/access-keys"), ("ledger", "ledger open_account")}
    eventually(of_this_trace, lambda found: wanted <= found)


def test_a_client_that_traces_sees_its_call_as_a_step_of_its_own_trace(
    played: Played, stack: ScratchStack, key: str
) -> None:
    trace, parent = os.urandom(16).hex(), os.urandom(8).hex()
    request = call(stack, key, traceparent=f"00-{trace}-{parent}-01")
    spans = whole_trace(played, request)
    (root,) = named(list(spans), REQUEST)
    assert (root["trace_id"], root["parent_id"]) == (trace, parent)
    assert {span["trace_id"] for span in spans} == {trace}


def test_use_that_names_no_trace_is_not_traced(played: Played) -> None:
    # The demo's 19,366 events, and what the tests beside this one report.
    sources = {span["attributes"]["scrip.source"] for span in named(spans_in(played.traces), "meter")}
    assert sources <= {"gateway"}
