"""Opens and funds many accounts by request/reply to the ledger, a bounded number at a time."""

import asyncio
from collections.abc import Sequence
from typing import Final

from nats.aio.client import Client

from contracts.ledger import REPLIES, Accepted, Failed, Grant, OpenAccount, WalletSpec
from contracts.partition import partition_of
from contracts.streams import OPERATOR, ledger_command_subject
from infra.demo.publish import connect
from infra.supervisor import Stack

GRANT_DOLLARS: Final = "1000000"
CONCURRENT_MAX: Final = 200
ATTEMPTS_MAX: Final = 50


async def open_accounts(stack: Stack, accounts: Sequence[str]) -> None:
    """Open each with a usd wallet and grant it more than a load can spend. RuntimeError if the ledger refuses."""
    client = await connect(stack.nats_url, stack.credentials.nats["ledger"], user="ledger")
    waiting = iter(accounts)

    async def work() -> None:
        for account in waiting:
            key = f"bench:{account}"
            wallets = (WalletSpec(unit="usd"),)
            await _ask(client, OpenAccount(idempotency_key=f"{key}:open", account=account, wallets=wallets))
            await _ask(client, Grant(idempotency_key=f"{key}:grant", account=account, unit="usd", amount=GRANT_DOLLARS))

    try:
        await asyncio.gather(*(work() for _ in range(CONCURRENT_MAX)))
    finally:
        await client.close()


async def _ask(client: Client, command: OpenAccount | Grant) -> None:
    subject = ledger_command_subject(
        partition=partition_of(command.account), command=command.command, principal=OPERATOR
    )
    for _ in range(ATTEMPTS_MAX):
        message = await client.request(subject, command.model_dump_json().encode(), timeout=10)
        match REPLIES.validate_json(message.data):
            case Accepted():
                return
            case Failed(code="busy" | "unavailable"):
                await asyncio.sleep(0.1)
            case refused:
                raise RuntimeError(f"{subject}: {refused}")
    raise RuntimeError(f"{subject}: still busy after {ATTEMPTS_MAX} attempts")
