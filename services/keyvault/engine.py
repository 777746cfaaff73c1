"""What goes out: questions to the ledger, asked again for a while. Every one of them may be repeated."""

import asyncio
from typing import Final

import nats.errors
from nats.aio.client import Client
from pydantic import ValidationError

from contracts import ledger
from contracts.partition import partition_of
from contracts.streams import ledger_command_subject
from services.kit import tracing

PRINCIPAL: Final = "keyvault"

# A partition whose owner died has another one within the time to live of a lease.
LEDGER_SECONDS_MAX: Final = 8.0
LEDGER_REQUEST_SECONDS_MAX: Final = 3.0
LEDGER_RETRY_SECONDS: Final = 0.1


async def ask_ledger(client: Client, command: ledger.Command) -> ledger.Reply:
    """Ask the owner of the account's partition, again while there is none. Repeating is safe: it is the same key."""
    account = command.line.account if isinstance(command, ledger.Charge) else command.account
    subject = ledger_command_subject(partition=partition_of(account), command=command.command, principal=PRINCIPAL)
    body = command.model_dump_json().encode()
    reply: ledger.Reply = ledger.Failed(code="unavailable", message="nobody owns the partition right now")
    deadline = asyncio.get_running_loop().time() + LEDGER_SECONDS_MAX
    while (left := deadline - asyncio.get_running_loop().time()) > 0:
        try:
            message = await client.request(
                subject, body, timeout=min(left, LEDGER_REQUEST_SECONDS_MAX), headers=tracing.headers()
            )
            reply = ledger.REPLIES.validate_json(message.data)
        except nats.errors.NoRespondersError:
            pass
        except (nats.errors.TimeoutError, TimeoutError):
            reply = ledger.Failed(code="unavailable", message="the owner did not answer in time")
        except nats.errors.Error as error:
            return ledger.Failed(code="unavailable", message=f"NATS is away: {type(error).__name__}")
        except ValidationError:
            return ledger.Failed(code="fault", message="the answer is none that we know")
        if not (isinstance(reply, ledger.Failed) and reply.code in ("unavailable", "busy")):
            return reply
        await asyncio.sleep(LEDGER_RETRY_SECONDS)
    return reply
