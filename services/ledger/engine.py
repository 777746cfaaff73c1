"""The way to a partition's owner, for HTTP and for what billing says: request/reply, as any other service would ask."""

import asyncio
from dataclasses import dataclass
from typing import Final, TypeVar

import nats.errors
from nats.aio.client import Client
from pydantic import TypeAdapter

from contracts import ledger as words
from contracts.partition import partition_of
from contracts.streams import ledger_command_subject
from services.kit import tracing
from services.kit.dead_letters import Unreadable
from services.ledger.translate import read_payment_fact

# A partition whose owner died has another one within the time to live of a lease.
COMMAND_SECONDS_MAX: Final = 8.0
REQUEST_SECONDS_MAX: Final = 3.0
NO_OWNER_RETRY_SECONDS: Final = 0.1

# Payments are billing's: its name is on their idempotency keys.
BILLING: Final = "billing"


Answer = TypeVar("Answer")


class NotDecided(Exception):
    """The ledger did not decide a command: it is worth another try, under the same key."""

    def __init__(self, failed: words.Failed) -> None:
        super().__init__(f"{failed.code}: {failed.message}")
        self.failed = failed


@dataclass(frozen=True, slots=True)
class Owners:
    """Whoever owns the partitions right now, reached by request/reply."""

    client: Client

    async def ask(
        self, command: words.Command, *, principal: str, seconds_max: float = COMMAND_SECONDS_MAX
    ) -> words.Reply:
        """Ask the owner of the partition, and wait while there is none. Repeating is safe: it is the same key."""
        return await self._ask(command, words.REPLIES, principal=principal, seconds_max=seconds_max)

    async def ask_all(
        self, commands: words.CommandList, *, principal: str, seconds_max: float = COMMAND_SECONDS_MAX
    ) -> words.ListReply:
        """Ask for a list of commands, likewise."""
        return await self._ask(commands, words.LIST_REPLIES, principal=principal, seconds_max=seconds_max)

    async def _ask(
        self,
        command: words.Command | words.CommandList,
        replies: TypeAdapter[Answer],
        *,
        principal: str,
        seconds_max: float,
    ) -> Answer | words.Failed:
        partition = partition_of(command.account)
        subject = ledger_command_subject(partition=partition, command=command.command, principal=principal)
        body = command.model_dump_json(exclude_defaults=False).encode()
        reply: Answer | words.Failed = words.Failed(
            code="unavailable", message="nobody owns the partition right now: ask again"
        )
        deadline = asyncio.get_running_loop().time() + seconds_max
        while (left := deadline - asyncio.get_running_loop().time()) > 0:
            try:
                message = await self.client.request(
                    subject, body, timeout=min(left, REQUEST_SECONDS_MAX), headers=tracing.headers()
                )
            except nats.errors.NoRespondersError:
                await asyncio.sleep(NO_OWNER_RETRY_SECONDS)
            except (nats.errors.TimeoutError, TimeoutError):
                reply = words.Failed(code="unavailable", message="the owner did not answer in time: ask again")
            except nats.errors.Error as error:
                return words.Failed(code="unavailable", message=f"NATS is away: {type(error).__name__}")
            else:
                reply = replies.validate_json(message.data)
                if not (isinstance(reply, words.Failed) and reply.code == "unavailable"):
                    return reply
                await asyncio.sleep(NO_OWNER_RETRY_SECONDS)
        return reply

    async def take_payment_fact(self, subject: str, body: bytes, *, seconds_max: float) -> None:
        """Grant or claim back what a fact about a payment says. Taken again, it changes nothing.

        Raises Unreadable for what no repetition will make acceptable as it stands, NotDecided for what one may.
        """
        commands = read_payment_fact(subject, body)
        for command in commands:
            reply = await self._accepted(command, seconds_max=seconds_max / len(commands) / 3)
            match reply:
                case words.Accepted():
                    pass
                case words.Refused():
                    raise Unreadable(f"the ledger refuses: {reply.message}", problems=[_problem(reply)])
                case words.Failed(code="invalid" | "conflict"):
                    raise Unreadable(f"the ledger cannot take it: {reply.message}", problems=[_problem(reply)])
                case words.Failed():
                    raise NotDecided(reply)

    async def _accepted(self, command: words.Grant | words.ClaimPayment, *, seconds_max: float) -> words.Reply:
        """Carry a command out; a wallet that is missing is opened first."""
        reply = await self.ask(command, principal=BILLING, seconds_max=seconds_max)
        if not (isinstance(reply, words.Refused) and reply.code in {"account_not_open", "wallet_not_open"}):
            return reply
        unit = command.unit if isinstance(command, words.Grant) else command.claimed.unit
        opening = words.OpenAccount(
            idempotency_key=f"{command.idempotency_key}:open",
            account=command.account,
            wallets=(words.WalletSpec(unit=unit),),
        )
        opened = await self.ask(opening, principal=BILLING, seconds_max=seconds_max)
        if not isinstance(opened, words.Accepted):
            return opened
        return await self.ask(command, principal=BILLING, seconds_max=seconds_max)


def _problem(reply: words.Refused | words.Failed) -> dict[str, str]:
    return {"pointer": "", "code": reply.code, "detail": reply.message}
