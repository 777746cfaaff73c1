"""What tests do to metering: run it, report use, open accounts, and look at what came of it."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import httpx2
from nats.aio.client import Client
from nats.aio.msg import Msg
from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from contracts.ids import make_id, uuid7
from contracts.ledger import AccountOpened
from contracts.metering import ChargeLine, ChargesRated
from contracts.partition import partition_of
from contracts.streams import CHARGES, LEDGER, USAGE, ledger_fact_subject, usage_subject
from services.kit.publish import Message, publish, publish_batch
from services.metering.app import build
from services.metering.domain.prices import PriceBook
from services.metering.handlers import Batch, Reading
from services.metering.settings import MeteringSettings
from services.metering.store import COUNTERS

WAIT_SECONDS_MAX: Final = 30.0

Json = dict[str, Any]


def account_opened(account: str, *, number: int = 1) -> AccountOpened:
    """The ledger's fact."""
    partition = partition_of(account)
    entropy = (hash(account) % (1 << 64)).to_bytes(10, "big")
    return AccountOpened(
        partition=partition,
        number=number,
        transaction=make_id("txn", partition=partition, uuid=uuid7(milliseconds=1, entropy=entropy)),
        recorded_at=datetime.now(UTC),
        account=account,
    )


def delivery(event: Json, *, sequence: int = 1) -> Msg:
    """A message of the usage stream as a consumer delivers it, taken after all that tests say happened."""
    return Msg(
        _client=None,  # type: ignore[arg-type]  # nothing is answered
        subject=usage_subject(partition=partition_of(event["subject"]), source=event["source"]),
        reply=f"$JS.ACK.USAGE.metering.1.{sequence}.{sequence}.1798761600123456789.0",
        data=json.dumps(event).encode(),
    )


def batch_of(events: Iterable[Json], *, price_book: PriceBook) -> Batch:
    """Events as the handlers take them."""
    reading = Reading(price_book=price_book, received_at=datetime.now(UTC), age_max=timedelta(days=36_500))
    reading.add(delivery(each) for each in events)
    return reading.batch()


@dataclass(frozen=True, slots=True)
class Driver:
    """The world around metering."""

    settings: MeteringSettings
    demo_nats: Client
    ledger_nats: Client
    operator_nats: Client
    connection: AsyncConnection[TupleRow]
    tokens: Mapping[str, str]

    @asynccontextmanager
    async def running(self, settings: MeteringSettings | None = None) -> AsyncIterator[httpx2.AsyncClient]:
        """Metering runs; its HTTP API."""
        app = build(settings or self.settings)
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://metering") as client,
        ):
            yield client

    def headers(self, principal: str = "demo") -> dict[str, str]:
        """The principal's token."""
        return {"Authorization": f"Bearer {self.tokens[principal]}"}

    async def publish(self, events: Iterable[Json], *, source: str = "demo") -> None:
        """Publish events on the subjects they belong to, without message ids: the server's window must not help."""
        messages = [
            Message(
                subject=usage_subject(partition=partition_of(each["subject"]), source=source),
                payload=json.dumps(each).encode(),
                message_id=None,
            )
            for each in events
        ]
        await publish_batch(self.demo_nats, stream=USAGE, messages=messages)

    async def publish_raw(self, body: bytes, *, subject: str = "usage.v1.00.demo") -> None:
        """Publish whatever it is."""
        await publish(self.demo_nats, stream=USAGE, message=Message(subject, body, None))

    async def open(self, *accounts: str) -> None:
        """The ledger says that accounts are open."""
        for account in accounts:
            await self.publish_fact(account_opened(account).model_dump_json().encode(), account=account)

    async def publish_fact(self, body: bytes, *, account: str) -> None:
        """Publish whatever it is where the ledger says that an account is open."""
        subject = ledger_fact_subject(partition=partition_of(account), noun="account", verb="opened")
        await publish(self.ledger_nats, stream=LEDGER, message=Message(subject, body, None))

    async def rows(self, statement: str, *parameters: object) -> list[TupleRow]:
        """What a query answers."""
        cursor = await self.connection.execute(statement, parameters)
        return await cursor.fetchall()

    async def until(self, statement: str, wanted: object, *parameters: object) -> None:
        """Wait until a query answers one row with `wanted`."""
        deadline = time.monotonic() + WAIT_SECONDS_MAX
        while (found := (await self.rows(statement, *parameters))[0][0]) != wanted:
            assert time.monotonic() < deadline, f"{statement}: {found!r}, not {wanted!r}"
            await asyncio.sleep(0.02)

    async def until_open(self, accounts: Sequence[str]) -> None:
        """Wait until metering knows that accounts are open."""
        await self.until("SELECT count(*) FROM directory WHERE account = ANY(%s)", len(set(accounts)), list(accounts))

    async def counters(self) -> dict[str, int]:
        """The counters over all sources."""
        names = COUNTERS
        sums = ", ".join(f"coalesce(sum({name}), 0)::bigint" for name in names)
        (row,) = await self.rows(f"SELECT {sums} FROM ingest_counters")
        return dict(zip(names, row, strict=True))

    async def until_counted(self, **wanted: int) -> None:
        """Wait until the counters are these; those not named are zero."""
        deadline = time.monotonic() + WAIT_SECONDS_MAX
        while {name: value for name, value in (await self.counters()).items() if value} != wanted:
            assert time.monotonic() < deadline, f"{await self.counters()}, not {wanted}"
            await asyncio.sleep(0.02)

    async def bundles(self) -> list[ChargesRated]:
        """The outbox, by partition and number."""
        found = await self.rows("SELECT payload FROM outbox ORDER BY partition, number")
        return [ChargesRated.model_validate_json(payload) for (payload,) in found]

    async def charged(self) -> dict[str, ChargeLine]:
        """Charge lines by event id. No use is charged twice, and numbers have no gaps."""
        lines: dict[str, ChargeLine] = {}
        last: dict[int, int] = {}
        for each in await self.bundles():
            assert each.number == last.get(each.partition, 0) + 1
            last[each.partition] = each.number
            for line in each.lines:
                assert line.event_id not in lines
                lines[line.event_id] = line
        return lines

    async def stored_charges(self) -> int:
        """How many bundles are in the stream."""
        return await stored(self.operator_nats, CHARGES)


async def stored(operator_nats: Client, stream: str) -> int:
    """How many messages a stream holds."""
    info = await operator_nats.jetstream(timeout=5).stream_info(stream)
    return info.state.messages
