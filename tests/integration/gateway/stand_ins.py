"""Small stand-ins for whom the gateway asks: keyvault and the ledger over NATS, metering's price book over HTTP."""

import asyncio
import copy
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from nats.aio.client import Client
from nats.aio.msg import Msg
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from contracts import keyvault, ledger
from contracts.accounts import root
from contracts.ids import make_id
from contracts.money import Amount, Unit, format_amount, parse_amount
from contracts.partition import partition_of
from services.kit.ids import new_uuid7

METERING_TOKEN: Final = "token-of-gateway"
PLATFORM_SECRET: Final = "sk-sim-platform-0123456789abcdefCANARYplatform"
OWN_SECRET: Final = "sk-sim-own-0123456789abcdefCANARYown"

UNITS: Final = {
    unit.name: unit
    for unit in (
        Unit(name="usd", kind="money", scale=9),
        Unit(name="tokens", kind="cap", scale=0),
        Unit(name="calls", kind="cap", scale=0, own_key_counts=True),
    )
}


def _usd(inputs: str, outputs: str) -> list[dict[str, Any]]:
    return [
        {"quantity": "input_tokens", "unit": "usd", "price": inputs, "per": 1_000_000},
        {"quantity": "output_tokens", "unit": "usd", "price": outputs, "per": 1_000_000},
    ]


PRICE_BOOK: Final[dict[str, Any]] = {
    "units": [
        {"name": unit.name, "kind": unit.kind, "scale": unit.scale, "own_key_counts": unit.own_key_counts}
        for unit in UNITS.values()
    ],
    "versions": [
        {
            "id": "2024-07-18",
            "effective_at": "2024-07-18T00:00:00Z",
            "models": [
                {"provider": "openai", "model": "gpt-4o-mini", "rates": _usd("0.15", "0.60")},
                {
                    "provider": "openai",
                    "model": "gpt-4o",
                    "rates": [
                        *_usd("2.50", "10.00"),
                        {"quantity": "calls", "unit": "calls", "price": "1", "per": 1},
                    ],
                },
                {"provider": "elsewhere", "model": "far-away", "rates": _usd("1", "1")},
            ],
        }
    ],
}


class Metering:
    """The price book, for who has the token."""

    def __init__(self) -> None:
        self.book: dict[str, Any] = copy.deepcopy(PRICE_BOOK)
        self.away = False

    def app(self) -> Starlette:
        return Starlette(routes=[Route("/api/v1/price-book", self._answer)])

    async def _answer(self, request: Request) -> Response:
        if self.away or request.headers.get("authorization") != f"Bearer {METERING_TOKEN}":
            return Response(status_code=503 if self.away else 401)
        return JSONResponse(self.book)


@dataclass
class Keyvault:
    """Knows keys by their hash; leases what it has."""

    keys: dict[str, keyvault.Verified] = field(default_factory=dict)
    refusals: dict[str, keyvault.KeyRefused] = field(default_factory=dict)
    platform: str | None = PLATFORM_SECRET
    own: dict[str, str] = field(default_factory=dict)
    lease_refusal: keyvault.KeyRefused | None = None
    silent: bool = False
    verified: int = 0
    leased: list[keyvault.LeaseSecret] = field(default_factory=list)

    def make_key(
        self,
        account: str,
        *,
        policy: keyvault.KeyPolicy = "credits",
        consent: bool = False,
        own: Mapping[str, str] | None = None,
        expires_at: datetime | None = None,
    ) -> str:
        """A key of an account."""
        key_part = secrets.token_hex(4)
        key = f"sk-scrip-{key_part}-{(key_part * 6)[:43]}"
        self.own.update(own or {})
        self.keys[keyvault.key_hash(key)] = keyvault.Verified(
            key_id=f"key_{key_part}",
            account=account,
            policy=policy,
            consent=consent,
            own_providers=tuple(own or ()),
            expires_at=expires_at,
        )
        return key

    async def answer(self, message: Msg) -> None:
        if self.silent:
            return
        command = keyvault.KEY_COMMANDS.validate_json(message.data)
        match command:
            case keyvault.VerifyKey():
                self.verified += 1
                reply = self._verify(command).model_dump_json().encode()
            case keyvault.LeaseSecret():
                self.leased.append(command)
                reply = self._lease(command)
        await message.respond(reply)

    def _verify(self, command: keyvault.VerifyKey) -> keyvault.Verified | keyvault.KeyRefused:
        if refusal := self.refusals.get(command.key_sha256):
            return refusal
        unknown = keyvault.KeyRefused(code="key_unknown", message="there is no such access key")
        return self.keys.get(command.key_sha256, unknown)

    def _lease(self, command: keyvault.LeaseSecret) -> bytes:
        secret = self.own.get(command.provider) if command.own else self.platform
        if self.lease_refusal is not None:
            return self.lease_refusal.model_dump_json().encode()
        if secret is None:
            code: Any = "no_own_secret" if command.own else "no_platform_secret"
            return keyvault.KeyRefused(code=code, message="no secret is stored").model_dump_json().encode()
        return keyvault.Leased(
            secret=SecretStr(secret),
            own=command.own,
            record="0198",
            version=1,
            expires_at=datetime.now(UTC) + timedelta(seconds=60),
        ).wire()


@dataclass
class Ledger:
    """One wallet per unit for one organisation, and the holds on it. What others are still owed is taken note of."""

    organisation: str
    balance: dict[str, int] = field(default_factory=lambda: {"usd": 10**9})
    holds: dict[str, dict[str, int]] = field(default_factory=dict)
    commands: list[ledger.Command] = field(default_factory=list)
    silent: bool = False
    busy: int = 0
    delay_seconds: float = 0.0
    forget_reply_after_place: bool = False
    refusal: ledger.Refused | None = None

    async def answer(self, message: Msg) -> None:
        if self.silent:
            return
        command = ledger.COMMANDS.validate_json(message.data)
        if isinstance(command, ledger.Charge | ledger.CommandList) or root(command.account) != self.organisation:
            # Of an earlier test.
            refused = ledger.Refused(code="hold_released", message="it is released")
            await message.respond(refused.model_dump_json(exclude_none=True).encode())
            return
        if self.busy:
            self.busy -= 1
            await message.respond(ledger.Failed(code="busy", message="busy").model_dump_json().encode())
            return
        self.commands.append(command)
        await asyncio.sleep(self.delay_seconds)
        reply = self.refusal or self._decide(command)
        if not (self.forget_reply_after_place and isinstance(command, ledger.PlaceHold)):
            await message.respond(reply.model_dump_json(exclude_none=True).encode())

    @property
    def released(self) -> list[str]:
        """The holds that were asked to be released."""
        return [each.hold for each in self.commands if isinstance(each, ledger.ReleaseHold)]

    def available(self, unit: str) -> int:
        return self.balance[unit] - sum(hold.get(unit, 0) for hold in self.holds.values())

    def _decide(self, command: ledger.Command) -> ledger.Accepted | ledger.Refused:
        match command:
            case ledger.PlaceHold():
                legs = {leg.unit: parse_amount(leg.at_least, UNITS[leg.unit]) for leg in command.legs}
                for unit, amount in legs.items():
                    if unit in self.balance and command.hold not in self.holds and amount > self.available(unit):
                        return ledger.Refused(
                            code="insufficient_funds",
                            message="there is not enough",
                            limit_source=self.organisation,
                            required=Amount(amount=format_amount(amount, UNITS[unit]), unit=unit),
                            remaining=Amount(amount=format_amount(self.available(unit), UNITS[unit]), unit=unit),
                        )
                self.holds[command.hold] = legs
            case ledger.ReleaseHold():
                self.holds.pop(command.hold, None)
            case _:
                raise AssertionError(command)
        partition = partition_of(command.account)
        return ledger.Accepted(
            transaction=make_id("txn", partition=partition, uuid=new_uuid7()),
            recorded_at=datetime.now(UTC),
            remaining=tuple(
                ledger.Remaining(
                    account=self.organisation, unit=unit, available=format_amount(self.available(unit), UNITS[unit])
                )
                for unit in self.balance
            ),
        )


async def answering(client: Client, subject: str, service: Keyvault | Ledger) -> None:
    """Have a stand-in answer what is asked on a subject."""
    tasks: set[asyncio.Task[None]] = set()

    async def take(message: Msg) -> None:
        task = asyncio.create_task(service.answer(message))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    await client.subscribe(subject, cb=take)
    await client.flush()
