"""Usage events, valid by default."""

import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Final

from contracts.money import Unit
from contracts.partition import partition_of
from contracts.pricing import PriceVersion, Rate, Rated
from contracts.usage import ModelUsed
from services.metering.domain.prices import CountedFirst, NoPrice, PriceBook
from services.metering.domain.usage import Usage

NOON: Final = datetime(2026, 3, 14, 12, tzinfo=UTC)
USD: Final = Unit(name="usd", kind="money", scale=9)

Json = dict[str, Any]


def event(number: int = 1, **changes: Any) -> Json:
    """A CloudEvent of use number `number`. `changes` replace attributes; those of `data` are given as `data_<name>`."""
    data: Json = {"provider": "openai", "model": "gpt-4o-mini", "input_tokens": 100 + number, "output_tokens": number}
    made: Json = {
        "specversion": "1.0",
        "id": f"use-{number}",
        "source": "demo",
        "type": "scrip.model.used.v1",
        "subject": f"acme-{number % 7}",
        "time": (NOON + timedelta(seconds=number)).isoformat(),
        "data": data,
    }
    for name, value in changes.items():
        if name.startswith("data_"):
            data[name.removeprefix("data_")] = value
        elif value is None:
            made.pop(name, None)
        else:
            made[name] = value
    return made


def body(number: int = 1, **changes: Any) -> bytes:
    """The event as JSON."""
    return json.dumps(event(number, **changes)).encode()


def usage(number: int = 1, *, account: str | None = None, content: bytes = b"first", **changes: Any) -> Usage:
    """Use number `number`, as it is read. `content` stands for the body: another one is a conflict."""
    account = account or f"acme-{number % 7}"
    values: dict[str, Any] = {
        "partition": partition_of(account),
        "source": "demo",
        "event_id": f"use-{number}",
        "account": account,
        "subject": account,
        "type": "scrip.model.used.v1",
        "occurred_at": NOON + timedelta(seconds=number),
        "body_hash": content,
        "used": ModelUsed(provider="openai", model="gpt-4o-mini", input_tokens=100 + number, output_tokens=number),
        "data": "{}",
        "context": None,
        "body": content,
    }
    values |= changes
    return Usage(key=(values["partition"], values["source"], values["event_id"]), **values)


def price_version(
    *, id: str = "v1", effective_at: datetime = NOON - timedelta(days=30), usd_per_million_tokens: str = "0.15"
) -> PriceVersion:
    """A version with one price for everything that gpt-4o-mini reads and writes."""
    price = Decimal(usd_per_million_tokens)
    return PriceVersion(
        id=id,
        effective_at=effective_at,
        rates={
            ("openai", "gpt-4o-mini"): (
                Rate(quantity="input_tokens", unit="usd", price=price, per=1_000_000),
                Rate(quantity="output_tokens", unit="usd", price=price, per=1_000_000),
            )
        },
    )


def priced(book: PriceBook, use: Usage) -> Rated | NoPrice:
    """What a use costs that does not depend on what was used before."""
    price = book.price(use)
    assert not isinstance(price, CountedFirst)
    return price


def price_book(*versions: PriceVersion) -> PriceBook:
    """A price book; without versions, of one."""
    return PriceBook(versions or (price_version(),), units={"usd": USD})
