"""Laws of who answers commands: what is too much is refused at once, unread, and there is room again afterwards."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

import msgspec
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from contracts.streams import inbox_prefix
from services.kit.batcher import Batcher
from services.ledger.handlers import Item, Result
from services.ledger.subscribers import CommandSubscriber, Limits
from tests.unit.ledger.book import UNITS

pytestmark = pytest.mark.anyio

UNDER_WAY_MAX = 3


def reply_of(number: int) -> str:
    return f"{inbox_prefix('demo')}.{number}"


class Connection:
    """Hands on what it is given, and keeps what is said."""

    def __init__(self) -> None:
        self.said: dict[str, str] = {}
        self.take: Callable[[Msg], Awaitable[None]]

    async def subscribe(self, _subject: str, *, cb: Callable[[Msg], Awaitable[None]], **_: Any) -> None:
        self.take = cb

    async def flush(self) -> None: ...

    async def publish(self, subject: str, body: bytes) -> None:
        self.said[subject] = msgspec.json.decode(body)["code"]

    async def ask(self, number: int) -> None:
        """A command that cannot be read."""
        reply = reply_of(number)
        client = cast(Client, self)
        await self.take(Msg(client, subject="rpc.ledger.v1.07.grant.demo", reply=reply, data=b"no json"))


async def never(_items: list[Item], _decided: Callable[[], None]) -> Sequence[Result]:
    raise AssertionError("nothing here can be read")


async def test_more_commands_than_may_be_under_way_are_refused_before_they_are_read() -> None:
    connection = Connection()
    subscriber = CommandSubscriber(
        cast(Client, connection),
        batcher=Batcher(name="test", process=never),
        units=UNITS,
        limits=Limits(body_bytes_max=100, list_commands_max=2),
        under_way_max=UNDER_WAY_MAX,
    )
    await subscriber.own([7])
    # They come together: nobody has had a turn yet.
    await asyncio.gather(*(connection.ask(number) for number in range(10)))
    for number in range(10, 12):
        await asyncio.sleep(0)
        await connection.ask(number)
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    codes = [connection.said[reply_of(number)] for number in range(12)]
    assert codes == ["invalid"] * UNDER_WAY_MAX + ["busy"] * (10 - UNDER_WAY_MAX) + ["invalid"] * 2
