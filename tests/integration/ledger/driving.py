"""What tests do to the ledger: run it, command it, hand it charges, and look at what came of it."""

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

import httpx2
from nats.aio.client import Client
from psycopg import AsyncConnection
from psycopg.rows import TupleRow
from pydantic import BaseModel, TypeAdapter

from contracts import ledger as words
from contracts.metering import ChargesRated
from contracts.partition import partition_of
from contracts.streams import CHARGES, charges_rated_subject, ledger_command_subject
from infra.schemas import MESSAGES
from services.kit.publish import Message, publish, publish_batch
from services.ledger.app import build
from services.ledger.handlers import CommandItem, Item, Ledger, NotLookedUp, Result
from services.ledger.settings import LedgerSettings

WAIT_SECONDS_MAX: Final = 45.0

# Leases and members are about processes, not about what was decided; relayed follows on its own.
RECORD_AND_PROJECTIONS: Final = (
    "heads",
    "journal",
    "commands",
    "bundles",
    "charge_lines",
    "reversals",
    "signatures",
    "accounts",
    "wallets",
    "rules",
    "lots",
    "holds",
    "hold_lots",
    "payments",
    "claims",
    "outbox",
    "dead_letters",
)

Json = dict[str, Any]
Answer = TypeVar("Answer")

FACTS: Final[Mapping[str, type[BaseModel]]] = {
    message.name: message.model
    for message in MESSAGES
    if message.kind == "event" and message.name.startswith("ledger.")
}


async def processed(ledger: Ledger, items: Sequence[Item]) -> list[Result]:
    """Process items as the subscriber has it done: what would be refused is asked again, and looked up."""
    results = await ledger.process(items)
    again = {
        place: replace(item, look_up=True)
        for place, (item, result) in enumerate(zip(items, results, strict=True))
        if isinstance(result, NotLookedUp) and isinstance(item, CommandItem)
    }
    if again:
        for place, result in zip(again, await ledger.process([*again.values()]), strict=True):
            results[place] = result
    return results


@dataclass(frozen=True, slots=True)
class Driver:
    """The world around the ledger."""

    settings: LedgerSettings
    metering_nats: Client
    ledger_nats: Client
    superuser: AsyncConnection[TupleRow]
    tokens: Mapping[str, str]
    keys: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[httpx2.AsyncClient]:
        """A ledger runs in this process, and owns all partitions; its HTTP API."""
        app = build(self.settings)
        transport = httpx2.ASGITransport(app=app)
        headers = {"Authorization": f"Bearer {self.tokens['operator']}"}
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=transport, base_url="http://ledger", headers=headers, timeout=20) as client,
        ):
            yield client

    async def command(self, command: words.Command, *, principal: str = "tester") -> words.Reply:
        """Ask by request/reply, as a service would, again while there is no owner."""
        return await self._ask(command, words.REPLIES, principal)

    async def commands(self, commands: words.CommandList, *, principal: str = "tester") -> words.ListReply:
        """Ask for a list of commands, likewise."""
        return await self._ask(commands, words.LIST_REPLIES, principal)

    async def listed(self, *commands: words.Command, all_or_nothing: str | None = None) -> words.Listed:
        """Ask for a list that must be decided; with a key for all of it, it is all or nothing."""
        asked = words.CommandList(
            commands=commands, all_or_nothing=all_or_nothing is not None, idempotency_key=all_or_nothing
        )
        reply = await self.commands(asked)
        assert isinstance(reply, words.Listed), reply
        return reply

    async def _ask(
        self, command: words.Command | words.CommandList, replies: TypeAdapter[Answer], principal: str
    ) -> Answer:
        partition = partition_of(command.account)
        subject = ledger_command_subject(partition=partition, command=command.command, principal=principal)
        return await self.request(subject, command.model_dump_json().encode(), replies)

    async def request(self, subject: str, body: bytes, replies: TypeAdapter[Answer]) -> Answer:
        """Ask with any body."""
        deadline = time.monotonic() + WAIT_SECONDS_MAX
        while True:
            try:
                message = await self.ledger_nats.request(subject, body, timeout=5)
                reply = replies.validate_json(message.data)
            except Exception:
                if time.monotonic() > deadline:
                    raise
            else:
                if not (isinstance(reply, words.Failed) and reply.code == "unavailable"):
                    return reply
            await asyncio.sleep(0.01)

    async def accepted(self, command: words.Command, *, principal: str = "tester") -> words.Accepted:
        """Ask for what must be accepted."""
        reply = await self.command(command, principal=principal)
        assert isinstance(reply, words.Accepted), reply
        return reply

    async def refused(self, command: words.Command) -> words.Refused:
        """Ask for what must be refused."""
        reply = await self.command(command)
        assert isinstance(reply, words.Refused), reply
        return reply

    def key(self) -> str:
        """A new idempotency key."""
        return f"key-{next(self.keys)}"

    async def funded(self, account: str, amount: str, *, unit: str = "usd") -> None:
        """Open an account with a wallet, and grant."""
        wallets = (words.WalletSpec(unit=unit),)
        await self.accepted(words.OpenAccount(idempotency_key=self.key(), account=account, wallets=wallets))
        await self.accepted(words.Grant(idempotency_key=self.key(), account=account, unit=unit, amount=amount))

    async def publish(self, *bundles: ChargesRated) -> None:
        """Publish bundles as metering does, but without message ids: the server's window must not help."""
        await self.publish_raw(
            *((charges_rated_subject(bundle.partition), bundle.model_dump_json().encode()) for bundle in bundles)
        )

    async def publish_raw(self, *messages: tuple[str, bytes]) -> None:
        """Publish whatever it is."""
        if len(messages) == 1:
            await publish(self.metering_nats, stream=CHARGES, message=Message(*messages[0], None))
        else:
            await publish_batch(
                self.metering_nats, stream=CHARGES, messages=[Message(*message, None) for message in messages]
            )

    async def facts(self, *types: type[BaseModel]) -> list[BaseModel]:
        """What the ledger has told, in the order of numbers, as the contract reads it; of these types, or all."""
        rows = await self.rows("SELECT partition, number, payload FROM outbox ORDER BY partition, number")
        expected: dict[int, int] = {}
        found: list[BaseModel] = []
        for partition, number, payload in rows:
            expected[partition] = expected.get(partition, 0) + 1
            assert number == expected[partition]
            found.append(FACTS[json.loads(bytes(payload))["type"]].model_validate_json(bytes(payload)))
        return [fact for fact in found if not types or isinstance(fact, types)]

    async def rows(self, statement: str, *parameters: object) -> list[TupleRow]:
        """What a query answers."""
        cursor = await self.superuser.execute(statement, parameters)
        return await cursor.fetchall()

    async def until(
        self, statement: str, wanted: object, *parameters: object, seconds: float = WAIT_SECONDS_MAX
    ) -> None:
        """Wait until a query answers one row with `wanted`."""
        deadline = time.monotonic() + seconds
        while (found := (await self.rows(statement, *parameters))[0][0]) != wanted:
            assert time.monotonic() < deadline, f"{statement}: {found!r}, not {wanted!r}"
            await asyncio.sleep(0.02)

    async def dump(self) -> dict[str, list[str]]:
        """Every row of every table, as text."""
        return {
            table: [str(row[0]) for row in await self.rows(f"SELECT t::text FROM {table} t ORDER BY 1")]
            for table in RECORD_AND_PROJECTIONS
        }
