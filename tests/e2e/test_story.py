"""The story as the README shows it; no secret of it anywhere; a balance that fifty calls at once cannot overspend."""

import asyncio
import base64
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import httpx2
import nats
import openai
import psycopg
import pytest
from nats.js.api import AckPolicy, ConsumerConfig
from openai import AsyncOpenAI, OpenAI
from psycopg import sql
from psycopg.conninfo import make_conninfo

from contracts.streams import OPERATOR, STREAMS, inbox_prefix
from infra.demo.scratch_stack import ScratchStack
from infra.servers import SUPERUSER
from infra.services import SERVICES, SIMULATED_OPENAI_KEY
from infra.supervisor import DATABASE
from services.kit.trace_export import EXPORT_EVERY_SECONDS
from tests.e2e.conftest import Api, Played
from tests.e2e.told import shown_in_readme, told
from tests.e2e.usage import event, eventually, fresh

pytestmark = pytest.mark.timeout(200)

MODEL: Final = "gpt-4o-mini"
INPUT_NANOS, OUTPUT_NANOS = 150, 600
CONCURRENT: Final = 50
AFFORDABLE: Final = 10

# Where each service reads a body.
DOORS: Final = {
    "billing": "/stripe/webhook",
    "gateway": "/v1/chat/completions",
    "keyvault": "/v1/access-keys/verify",
    "ledger": "/v1/accounts",
    "metering": "/api/v1/events",
}

Json = dict[str, Any]


@pytest.fixture(scope="module")
def keyvault(stack: ScratchStack) -> Api:
    return Api(stack.url("keyvault"), stack.credentials.tokens["operator"])


# The README -----------------------------------------------------------------------------------------------------------


def test_the_first_run_of_everything_tells_the_story_as_the_readme_shows_it(played: Played) -> None:
    assert played.first_code == 0, played.first_output
    assert told(played.first_output) == shown_in_readme()


def test_it_is_told_again_on_the_same_stack(stack: ScratchStack) -> None:
    again = stack.scrip("story")
    assert again.returncode == 0, again.stdout
    assert told(again.stdout) == shown_in_readme()


# Secrets --------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Planted:
    """Secrets by what they are, and all that was answered while they were in use."""

    secrets: dict[str, str] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)

    def needles(self) -> Iterator[tuple[str, bytes]]:
        """What must be nowhere: beyond what is shown of a secret, its beginning and its last four, in any writing."""
        for name, secret in self.secrets.items():
            core = secret[-24:-4].encode()
            assert len(core) == 20, name
            yield name, core
            yield f"{name} in hexadecimal", core.hex().encode()
            for shift in range(3):
                yield f"{name} in base64", base64.b64encode(bytes(shift) + core)[4:-4]


def test_no_secret_is_in_a_log_a_table_a_stream_a_metric_an_error_or_an_output(
    played: Played, stack: ScratchStack
) -> None:
    planted = Planted(secrets=_credentials(stack))
    account = _use(stack, planted).encode()
    needles = list(planted.needles())
    known = set()
    for place, text in _everything(played, stack, planted):
        for name, needle in needles:
            assert needle not in text, f"{name} is in {place}"
        if account in text or account.hex().encode() in text:
            known.add(place)
    # It was looked for where something would be found.
    tables = {"keyvault.access_keys", "keyvault.secrets", "keyvault.audit", "ledger.journal", "metering.outbox"}
    assert {f"the table {table}" for table in tables} <= known
    assert {f"the stream {stream}" for stream in ("KEYS", "LEDGER", "USAGE", "CHARGES")} <= known
    assert "the traces" in known


def _credentials(stack: ScratchStack) -> dict[str, str]:
    found = stack.credentials
    return {
        "the platform's key": SIMULATED_OPENAI_KEY,
        "the webhook secret": found.webhook_secret,
        **{f"the token of {name}": token for name, token in found.tokens.items()},
        **{f"the NATS password of {name}": password for name, password in found.nats.items()},
        **{f"the Postgres password of {name}": password for name, password in found.postgres.items()},
    }


def _use(stack: ScratchStack, planted: Planted) -> str:
    """Make every secret pass through: where it belongs, where it is refused, where nobody asked for it. For whom."""
    account, secrets, answers = fresh("canary"), planted.secrets, planted.answers
    secrets["the own key"] = f"sk-sim-canary-{os.urandom(24).hex()}"
    secrets["a key that the provider refuses"] = f"sk-proj-canary-{os.urandom(24).hex()}"
    secrets["an access key that nobody has"] = f"sk-scrip-{os.urandom(8).hex()}-{os.urandom(21).hex()}a"
    token, url = stack.credentials.tokens["operator"], stack.url("keyvault")
    with (
        httpx2.Client(timeout=10, trust_env=False) as stranger,
        httpx2.Client(
            base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=10, trust_env=False
        ) as keyvault,
    ):
        for name, policy in (("the access key on credits", "credits"), ("the access key on the own key", "own")):
            made = keyvault.post("/v1/access-keys", json={"account": account, "name": policy}).json()
            secrets[name] = made["key"]
            assert keyvault.put(f"/v1/policies/{made['account']}", json={"policy": policy}).is_success
        path = f"/v1/secrets/openai/{account}"
        for secret in (secrets["a key that the provider refuses"], secrets["the own key"]):
            stored = keyvault.put(path, json={"secret": secret})
            assert stored.is_success
            answers.append(stored.text)
            answers += [_ask(stack, each) for each in secrets.values() if each.startswith("sk-scrip-")]
        for secret in secrets.values():
            for body in ({"secret": secret, secret: secret}, {"secret": [secret]}, {"secret": secret + "\n"}):
                answers.append(keyvault.put(path, json=body).text)
            answers.append(keyvault.post("/v1/access-keys/verify", json={"key": secret}).text)
            answers.append(keyvault.post("/v1/access-keys", json={"account": account, secret: secret}).text)
            for service, door in DOORS.items():
                headers = {"Authorization": f"Bearer {secret}", "Stripe-Signature": f"t=1,v1={secret}"}
                answer = stranger.post(stack.url(service) + door, headers=headers, content=secret.encode())
                assert not answer.is_success
                answers.append(f"{answer.headers} {answer.text}")
        for place in (f"audit?account={account}", f"access-keys?account={account}", f"secrets?account={account}"):
            read = keyvault.get(f"/v1/{place}")
            assert read.is_success
            answers.append(read.text)
    assert [answer for answer in answers if "provider_key_rejected" in answer]
    return account


def _ask(stack: ScratchStack, key: str) -> str:
    """What a call answers, or how it is refused."""
    with OpenAI(api_key=key, base_url=f"{stack.url('gateway')}/v1", max_retries=0) as client:
        try:
            answer = client.chat.completions.with_raw_response.create(
                model=MODEL, messages=[{"role": "user", "content": "[[tokens:5]]"}]
            )
        except openai.APIStatusError as error:
            return f"{error} {error.response.headers} {error.response.text}"
        return f"{answer.headers} {answer.text}"


def _everything(played: Played, stack: ScratchStack, planted: Planted) -> Iterator[tuple[str, bytes]]:
    for number, answer in enumerate(planted.answers):
        yield f"answer {number}: {answer[:80]}", answer.encode()
    yield "the first run's output", played.first_output.encode()
    yield "the traces", _traces(played)
    for file in (*stack.layout.logs.iterdir(), *stack.layout.directory.parent.glob("*.log")):
        yield str(file), file.read_bytes()
    for service in SERVICES:
        metrics = httpx2.get(f"{stack.url(service.name)}/metrics", timeout=10, trust_env=False)
        assert metrics.is_success
        yield f"the metrics of {service.name}", metrics.content
    yield from _tables(stack)
    yield from _streams(stack)
    yield from _files(stack.layout.nats)


def _traces(played: Played) -> bytes:
    """What was traced, once the last of what was done is."""
    time.sleep(2 * EXPORT_EVERY_SECONDS)
    return played.traces.read_bytes()


def _tables(stack: ScratchStack) -> Iterator[tuple[str, bytes]]:
    """Every table of every schema, as text."""
    url = make_conninfo(
        host="127.0.0.1",
        port=stack.run.ports["postgres"],
        dbname=DATABASE,
        user=SUPERUSER,
        password=stack.credentials.postgres[SUPERUSER],
    )
    with psycopg.connect(url) as connection:
        tables = connection.execute(
            """
            SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE c.relkind = 'r' AND n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema'
            """
        ).fetchall()
        schemas = {schema for schema, _ in tables}
        assert {service.name for service in SERVICES if service.has_schema} <= schemas
        for schema, table in tables:
            command = sql.SQL("COPY {} TO STDOUT").format(sql.Identifier(schema, table))
            with connection.cursor() as cursor, cursor.copy(command) as copied:
                yield f"the table {schema}.{table}", b"".join(bytes(part) for part in copied)


def _streams(stack: ScratchStack) -> Iterator[tuple[str, bytes]]:
    """Every message of every stream."""

    async def read() -> Mapping[str, bytes]:
        client = await nats.connect(
            f"nats://127.0.0.1:{stack.run.ports['nats']}",
            user=OPERATOR,
            password=stack.credentials.nats[OPERATOR],
            inbox_prefix=inbox_prefix(OPERATOR),
        )
        try:
            jetstream = client.jetstream(timeout=10)
            found = {}
            for stream in STREAMS:
                count = (await jetstream.stream_info(stream.name)).state.messages
                config = ConsumerConfig(ack_policy=AckPolicy.NONE)
                reader = await jetstream.pull_subscribe("", stream=stream.name, config=config)
                parts: list[bytes] = []
                while len(parts) < count:
                    messages = await reader.fetch(min(1000, count - len(parts)), timeout=10)
                    parts += [f"{each.subject} {each.headers} ".encode() + each.data for each in messages]
                found[stream.name] = b"\n".join(parts)
        finally:
            await client.close()
        return found

    yield from ((f"the stream {name}", text) for name, text in asyncio.run(read()).items())


def _files(directory: Path) -> Iterator[tuple[str, bytes]]:
    """What NATS has on disk, what was trimmed of it included as far as it is."""
    for file in directory.rglob("*.blk"):
        yield str(file), file.read_bytes()


# Money ----------------------------------------------------------------------------------------------------------------


def test_of_fifty_calls_at_once_on_a_balance_for_ten_ten_are_served_and_nothing_stays_held(
    stack: ScratchStack, keyvault: Api, ledger: Api, reporter: Api
) -> None:
    account = fresh("rush")
    made = keyvault.post("/v1/access-keys", {"account": account}).json()
    first = asyncio.run(_rush(stack, made["key"], count=1))
    held = _nanos(first.headers[0]["x-scrip-held"])
    cost = _nanos(first.headers[0]["x-scrip-cost"])
    # No call gives back enough for another one.
    assert held * AFFORDABLE > cost * AFFORDABLE > held * (AFFORDABLE - 1)
    _wallet_becomes(ledger, account, 10**9 - cost)
    left = _drain(reporter, ledger, account, has=10**9 - cost, leave=held * AFFORDABLE)
    rush = asyncio.run(_rush(stack, made["key"], count=CONCURRENT))
    assert len(rush.headers) == AFFORDABLE
    assert [error.status_code for error in rush.refused] == [402] * (CONCURRENT - AFFORDABLE)
    for error in rush.refused:
        assert isinstance(error.body, dict)
        assert error.body["limit_source"] == account
        assert _nanos(f"{error.body['remaining']['amount']} usd") < held
    _wallet_becomes(ledger, account, left - AFFORDABLE * cost)
    assert ledger.json(f"/v1/holds?account={account}")["holds"] == []
    served = {headers["x-scrip-request-id"] for headers in (*first.headers, *rush.headers)}
    refused = {error.response.headers["x-scrip-request-id"] for error in rush.refused}
    counted = [each for each in _counted(stack) if each["client_request_id"] in served | refused]
    assert {each["client_request_id"] for each in counted} == served
    assert len(counted) == len(served)
    assert sum(_price(each) for each in counted) == cost * (AFFORDABLE + 1)


def test_every_call_that_the_provider_counts_is_charged_with_the_tokens_it_counts(
    stack: ScratchStack, ledger: Api
) -> None:
    """Of all calls that this stack has ever made, at the end of whatever was done to it before."""
    counted = {
        each["client_request_id"]: (each["model"], each["input_tokens"], each["output_tokens"])
        for each in _counted(stack)
        if each["began"]
    }
    assert counted
    eventually(lambda: _logged(stack), lambda found: found == counted)


@dataclass(slots=True)
class Rush:
    """The headers of the calls that were served, and the refusals of the others."""

    headers: list[Mapping[str, str]] = field(default_factory=list)
    refused: list[openai.APIStatusError] = field(default_factory=list)


async def _rush(stack: ScratchStack, key: str, *, count: int) -> Rush:
    rush = Rush()
    async with AsyncOpenAI(api_key=key, base_url=f"{stack.url('gateway')}/v1", max_retries=5, timeout=60) as client:

        async def one() -> None:
            try:
                answer = await client.chat.completions.with_raw_response.create(
                    model=MODEL,
                    messages=[{"role": "user", "content": "[[tokens:1000]] [[slow:0]]"}],
                    max_tokens=1000,
                )
            except openai.APIStatusError as error:
                rush.refused.append(error)
            else:
                rush.headers.append(answer.headers)

        await asyncio.gather(*(one() for _ in range(count)))
    return rush


def _drain(reporter: Api, ledger: Api, account: str, *, has: int, leave: int) -> int:
    """Report a use that leaves so much, and less than an input token more: what it really leaves."""
    output_tokens, rest = divmod(has - leave, OUTPUT_NANOS)
    input_tokens, more = divmod(rest, INPUT_NANOS)
    data = {"provider": "openai", "model": MODEL, "input_tokens": input_tokens, "output_tokens": output_tokens}
    used = event(fresh("drain"), account, data=data, time=(datetime.now(UTC) - timedelta(seconds=1)).isoformat())
    assert reporter.post("/api/v1/events", used).status_code == 204
    _wallet_becomes(ledger, account, leave + more)
    return leave + more


def _wallet_becomes(ledger: Api, account: str, nanos: int) -> None:
    """The account has so much, soon, and nothing of it is held."""

    def read() -> tuple[int, int]:
        (wallet,) = ledger.json(f"/v1/balances/{account}")["wallets"]
        return _nanos(f"{wallet['posted']} usd"), _nanos(f"{wallet['held']} usd")

    eventually(read, lambda found: found == (nanos, 0))


def _counted(stack: ScratchStack) -> list[Json]:
    """Every request that the simulated provider has met."""
    answer = httpx2.get(f"{stack.url('provider')}/__sim/requests", timeout=10, trust_env=False)
    found: list[Json] = answer.json()["requests"]
    return found


def _logged(stack: ScratchStack) -> dict[str, tuple[str, int, int]]:
    """The charged use of the gateway's, by request."""
    url = make_conninfo(
        host="127.0.0.1",
        port=stack.run.ports["postgres"],
        dbname=DATABASE,
        user="metering",
        password=stack.credentials.postgres["metering"],
    )
    with psycopg.connect(url) as connection:
        rows = connection.execute(
            """
            SELECT event_id, data ->> 'model', (data ->> 'input_tokens')::bigint, (data ->> 'output_tokens')::bigint
            FROM metering.usage_log WHERE source = 'gateway' AND amounts IS NOT NULL
            """
        ).fetchall()
    return {request: (model, input_tokens, output_tokens) for request, model, input_tokens, output_tokens in rows}


def _price(counted: Json) -> int:
    cost: int = counted["input_tokens"] * INPUT_NANOS + counted["output_tokens"] * OUTPUT_NANOS
    return cost


def _nanos(text: str) -> int:
    """The dollars in a text like `0.0006 usd, 1 calls`, in nano-dollars."""
    (amount,) = (part.removesuffix(" usd") for part in text.split(", ") if part.endswith(" usd"))
    return int(Decimal(amount).scaleb(9))
