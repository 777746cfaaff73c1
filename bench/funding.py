"""Opens and funds many accounts by request/reply to the ledger, a bounded number at a time."""

import asyncio
from collections.abc import Iterator, Sequence
from typing import Final

import nats.errors
from nats.aio.client import Client

from contracts.ledger import (
    LIST_REPLIES,
    REPLIES,
    Accepted,
    CommandList,
    Failed,
    Grant,
    Listed,
    OpenAccount,
    WalletSpec,
)
from contracts.partition import partition_of
from contracts.streams import OPERATOR, ledger_command_subject
from infra.demo.publish import connect
from infra.supervisor import Stack

GRANT_DOLLARS: Final = "1000000"
CONCURRENT_MAX: Final = 200
TREE_ACCOUNTS: Final = 125
TREES_CONCURRENT_MAX: Final = 8
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


async def open_trees(stack: Stack, roots: Sequence[str]) -> None:
    """Open trees of TREE_ACCOUNTS accounts, each with a funded usd wallet, in one list of commands a tree."""
    client = await connect(stack.nats_url, stack.credentials.nats["ledger"], user="ledger")
    waiting = iter(roots)

    async def work() -> None:
        for root in waiting:
            await _ask(client, CommandList(commands=tuple(_of_tree(root))))

    try:
        await asyncio.gather(*(work() for _ in range(TREES_CONCURRENT_MAX)))
    finally:
        await client.close()


def _of_tree(root: str) -> Iterator[OpenAccount | Grant]:
    for number in range(TREE_ACCOUNTS):
        account = f"{root}/{number}" if number else root
        wallets = (WalletSpec(unit="usd"),)
        yield OpenAccount(idempotency_key=f"{account}:open", account=account, wallets=wallets)
        yield Grant(idempotency_key=f"{account}:grant", account=account, unit="usd", amount="1")


async def _ask(client: Client, command: OpenAccount | Grant | CommandList) -> None:
    subject = ledger_command_subject(
        partition=partition_of(command.account), command=command.command, principal=OPERATOR
    )
    for _ in range(ATTEMPTS_MAX):
        try:
            message = await client.request(subject, command.model_dump_json().encode(), timeout=10)
        except nats.errors.NoRespondersError:
            # Between two owners of the partition.
            await asyncio.sleep(0.1)
            continue
        replies = LIST_REPLIES if isinstance(command, CommandList) else REPLIES
        match replies.validate_json(message.data):
            case Accepted():
                return
            case Listed(replies=found) if all(isinstance(each, Accepted) for each in found):
                return
            case Failed(code="busy" | "unavailable"):
                await asyncio.sleep(0.1)
            case refused:
                raise RuntimeError(f"{subject}: {refused}")
    raise RuntimeError(f"{subject}: still busy after {ATTEMPTS_MAX} attempts")
