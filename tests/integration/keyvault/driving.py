"""What tests do to keyvault: run it, call it over HTTP and NATS, stand in for the ledger, look everywhere."""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

import httpx2
import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg
from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from contracts import ledger as words
from contracts.ids import make_id, uuid7
from contracts.keyvault import KEY_REPLIES, KeyRefused, Leased, LeaseSecret, Verified, VerifyKey, key_command_subject
from contracts.partition import partition_of
from contracts.streams import STREAMS
from services.keyvault.app import build
from services.keyvault.settings import KeyvaultSettings

WAIT_SECONDS_MAX: Final = 30.0

Json = dict[str, Any]

CATALOGUE: Final = """
[[units]]
name = "usd"
kind = "money"
scale = 9

[[units]]
name = "tokens"
kind = "cap"
scale = 0

[[units]]
name = "calls"
kind = "cap"
scale = 0
own_key_counts = true

[keyvault]
wallets = ["usd"]
starting_grant = { unit = "usd", amount = "1.00" }
"""

OPENAI: Final = "sk-proj-canary0openai0" + "Zq3" * 14
ANTHROPIC: Final = "sk-ant-api03-canary0anthropic0" + "Zq3" * 14


class StandInLedger:
    """Answers commands as the ledger does, as far as keyvault can tell: accepted once per key, else replayed."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._accepted: dict[tuple[str, str], words.Command] = {}
        self.taken: list[words.Command] = []
        self.principals: set[str] = set()
        self.answer_instead: words.Reply | None = None
        self.silent_after: int | None = None

    async def start(self) -> None:
        """Begin to answer."""
        await self._client.subscribe("rpc.ledger.v1.*.*.*", cb=self._answer)
        await self._client.flush()

    def granted(self, account: str) -> list[tuple[str, str]]:
        """What an account was granted: unit and amount."""
        return [
            (each.unit, each.amount)
            for each in self._accepted.values()
            if isinstance(each, words.Grant) and each.account == account
        ]

    def opened(self) -> dict[str, set[str]]:
        """Accounts that were opened, with the units of their wallets."""
        found: dict[str, set[str]] = {}
        for each in self._accepted.values():
            if isinstance(each, words.OpenAccount):
                found.setdefault(each.account, set()).update(wallet.unit for wallet in each.wallets)
        return found

    async def _answer(self, message: Msg) -> None:
        *_, partition, name, principal = message.subject.split(".")
        command = words.COMMANDS.validate_json(message.data)
        assert not isinstance(command, words.Charge | words.CommandList)
        assert (command.command, f"{partition_of(command.account):02d}") == (name, partition)
        self.taken.append(command)
        self.principals.add(principal)
        if self.silent_after is not None and len(self.taken) > self.silent_after:
            return
        reply = self.answer_instead or self._decide(command, principal)
        await message.respond(reply.model_dump_json().encode())

    def _decide(self, command: words.Command, principal: str) -> words.Reply:
        assert not isinstance(command, words.Charge | words.CommandList)
        known = self._accepted.setdefault((principal, command.idempotency_key), command)
        if known != command:
            return words.Failed(code="conflict", message="the key was used for another body")
        partition = partition_of(command.account)
        return words.Accepted(
            transaction=make_id("txn", partition=partition, uuid=uuid7(milliseconds=1, entropy=bytes(10))),
            recorded_at=datetime.now(UTC),
        )


@dataclass(frozen=True, slots=True)
class Running:
    """A keyvault that runs, as one principal sees it over HTTP."""

    http: httpx2.AsyncClient
    said: list[str] = field(default_factory=list)

    async def ask(self, method: str, path: str, *, expect: int, **options: Any) -> Json:
        """A request whose answer has this status; its JSON."""
        response = await self.http.request(method, path, **options)
        self.said.append(f"{response.headers} {response.text}")
        assert response.status_code == expect, f"{method} {path}: {response.status_code} {response.text}"
        found: Json = response.json() if response.content else {}
        return found

    async def store(self, provider: str, account: str, secret: str, *, expect: int = 201, **body: object) -> Json:
        """Store an account's secret."""
        return await self.ask(
            "PUT", f"/v1/secrets/{provider}/{account}", expect=expect, json={"secret": secret, **body}
        )

    async def store_platform(self, provider: str, secret: str) -> Json:
        """Store a platform's secret."""
        return await self.ask("PUT", f"/v1/platform-secrets/{provider}", expect=201, json={"secret": secret})

    async def create_key(self, account: str, *, expect: int = 201, key: str | None = None, **body: object) -> Json:
        """Make an access key; `key` is the idempotency key."""
        headers = {} if key is None else {"Idempotency-Key": key}
        return await self.ask(
            "POST", "/v1/access-keys", expect=expect, json={"account": account, **body}, headers=headers
        )

    async def choose(self, account: str, policy: str, **body: object) -> Json:
        """Choose a key policy."""
        return await self.ask("PUT", f"/v1/policies/{account}", expect=200, json={"policy": policy, **body})

    def as_principal(self, token: str) -> "Running":
        """The same keyvault with another token."""
        http = httpx2.AsyncClient(
            transport=self.http._transport,
            base_url=self.http.base_url,
            headers={"Authorization": f"Bearer {token}"},
        )
        return Running(http, self.said)


@dataclass(frozen=True, slots=True)
class Driver:
    """The world around keyvault."""

    settings: KeyvaultSettings
    gateway_nats: Client
    operator_nats: Client
    superuser: AsyncConnection[TupleRow]
    tokens: Mapping[str, str]

    @asynccontextmanager
    async def running(self, settings: KeyvaultSettings | None = None) -> AsyncIterator[Running]:
        """Keyvault runs; its HTTP API, as the operator."""
        app = build(settings or self.settings)
        transport = httpx2.ASGITransport(app=app)
        headers = {"Authorization": f"Bearer {self.tokens['operator']}"}
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=transport, base_url="http://keyvault", headers=headers, timeout=30) as client,
        ):
            yield Running(client)

    async def verify(self, key: str) -> Verified | KeyRefused:
        """Whose key is this, as the gateway asks."""
        command = VerifyKey(key_sha256=hashlib.sha256(key.encode()).hexdigest())
        subject = key_command_subject(command="verify", principal="gateway")
        message = await self.gateway_nats.request(subject, command.model_dump_json().encode(), timeout=5)
        reply = KEY_REPLIES.validate_json(message.data)
        assert not isinstance(reply, Leased)
        return reply

    async def lease(self, account: str, provider: str = "openai", *, own: bool) -> Leased | KeyRefused:
        """A provider secret, as the gateway asks."""
        command = LeaseSecret(account=account, provider=provider, own=own)
        subject = key_command_subject(command="lease", principal="gateway")
        message = await self.gateway_nats.request(subject, command.model_dump_json().encode(), timeout=5)
        reply = KEY_REPLIES.validate_json(message.data)
        assert not isinstance(reply, Verified)
        return reply

    async def leased(self, account: str, provider: str = "openai", *, own: bool) -> str:
        """The text of a secret that must be leased."""
        reply = await self.lease(account, provider, own=own)
        assert isinstance(reply, Leased), reply
        assert reply.own == own
        return reply.secret.get_secret_value()

    async def refused(self, account: str, provider: str = "openai", *, own: bool) -> str:
        """Why a secret is not leased."""
        reply = await self.lease(account, provider, own=own)
        assert isinstance(reply, KeyRefused), reply
        return reply.code

    async def rows(self, statement: str, *parameters: object) -> list[TupleRow]:
        """What a query answers."""
        cursor = await self.superuser.execute(statement, parameters)
        return await cursor.fetchall()

    async def until(self, statement: str, wanted: object, *parameters: object) -> None:
        """Wait until a query answers one row with `wanted`."""
        deadline = time.monotonic() + WAIT_SECONDS_MAX
        while (found := (await self.rows(statement, *parameters))[0][0]) != wanted:
            assert time.monotonic() < deadline, f"{statement}: {found!r}, not {wanted!r}"
            await asyncio.sleep(0.02)

    async def dump(self) -> str:
        """Every row of every table of every schema, as text; bytes in hexadecimal."""
        tables = await self.rows(
            "SELECT quote_ident(schemaname) || '.' || quote_ident(tablename) FROM pg_tables"
            " WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
        )
        found = []
        for (table,) in tables:
            for (row,) in await self.rows(f"SELECT to_jsonb(t)::text FROM {table} t"):
                found.append(f"{table}: {row}")
        return "\n".join(found)

    async def facts(self) -> list[Json]:
        """What keyvault said, as it stands in the stream, in order."""
        return [msg async for msg in self._messages("KEYS")]

    async def all_messages(self) -> list[bytes]:
        """Subject, headers and body of every message of every stream."""
        found = []
        jetstream = self.operator_nats.jetstream(timeout=5)
        for stream in STREAMS:
            state = (await jetstream.stream_info(stream.name)).state
            for sequence in range(max(state.first_seq, 1), state.last_seq + 1):
                message = await jetstream.get_msg(stream.name, sequence)
                found.append(f"{message.subject} {message.headers}".encode() + (message.data or b""))
        return found

    async def _messages(self, stream: str) -> AsyncIterator[Json]:
        jetstream = self.operator_nats.jetstream(timeout=5)
        state = (await jetstream.stream_info(stream)).state
        for sequence in range(max(state.first_seq, 1), state.last_seq + 1):
            message = await jetstream.get_msg(stream, sequence)
            yield {"subject": message.subject, **msgspec.json.decode(message.data or b"{}")}
