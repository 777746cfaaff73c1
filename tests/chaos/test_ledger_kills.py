"""Whenever the ledger or Postgres is killed under load: nothing accepted is lost, nothing is done twice."""

import asyncio
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

import httpx2
import pytest

from contracts.money import parse_amount
from infra.demo.scratch_stack import ScratchStack
from services.kit.ids import new_hold_id
from tests.chaos.killing import LEDGER, POSTGRES
from tests.chaos.test_kills import SEED
from tests.unit.ledger.book import UNITS

ROUNDS_SHORT: Final = 5
ROUNDS_LONG: Final = 50
ROOTS: Final = 6
WORKERS: Final = 12
COMMANDS: Final = 240
ANSWER_SECONDS_MAX: Final = 60.0
USD: Final = UNITS.by_name["usd"]


@pytest.mark.timeout(240)
def test_nothing_is_lost_or_done_twice_when_the_ledger_or_postgres_is_killed(stack: ScratchStack) -> None:
    play(stack, rounds=ROUNDS_SHORT, name="short")


@pytest.mark.soak
@pytest.mark.timeout(2 * 3600)
def test_nothing_is_lost_or_done_twice_over_fifty_kills(stack: ScratchStack) -> None:
    play(stack, rounds=ROUNDS_LONG, name="long")


@dataclass
class Done:
    """A command that was accepted: what was asked under its key, and what was answered."""

    path: str
    body: dict[str, Any]
    transaction: str


@dataclass
class Load:
    """Commands on some accounts, and what they must come to: by account, in the unit's steps."""

    url: str
    token: str
    name: str
    chance: random.Random
    done: dict[str, Done] = field(default_factory=dict)
    posted: Counter[str] = field(default_factory=Counter)
    held: dict[str, tuple[str, int]] = field(default_factory=dict)
    asked: int = 0
    refused: int = 0
    again: int = 0

    @property
    def accounts(self) -> list[str]:
        return [f"{self.name}{number}" for number in range(ROOTS)]

    async def open(self, client: httpx2.AsyncClient) -> None:
        for account in self.accounts:
            await self.ask(client, "/v1/accounts", {"account": account, "wallets": [{"unit": "usd"}]})
            await self.grant(client, account, 20)

    async def work(self, client: httpx2.AsyncClient) -> None:
        """One caller: its commands, one after the other, and the holds that it has placed."""
        mine: list[str] = []
        for _ in range(COMMANDS // WORKERS):
            account = self.chance.choice(self.accounts)
            kind = self.chance.randrange(10)
            if kind < 2:
                await self.grant(client, account, self.chance.randrange(1, 6))
            elif kind < 5 or not mine:
                mine += await self.hold(client, account)
            elif kind < 8:
                await self.charge(client, account, mine.pop(self.chance.randrange(len(mine))))
            elif kind < 9:
                await self.charge(client, account, None)
            else:
                hold = mine.pop()
                if await self.ask(client, f"/v1/holds/{hold}/release", {"account": self.held[hold][0]}):
                    del self.held[hold]

    async def grant(self, client: httpx2.AsyncClient, account: str, amount: int) -> None:
        body = {"account": account, "unit": "usd", "amount": str(amount), "kind": "purchase"}
        if await self.ask(client, "/v1/grants", body):
            self.posted[account] += amount * 10**9

    async def hold(self, client: httpx2.AsyncClient, account: str) -> list[str]:
        hold = new_hold_id(account)
        most = self.chance.randrange(1, 9)
        leg = {"unit": "usd", "at_least": str(most * self.chance.randrange(2)), "at_most": str(most)}
        body = {"hold": hold, "account": account, "legs": [leg], "lifetime_seconds": 86_400}
        reply = await self.ask(client, "/v1/holds", body)
        if reply is None:
            return []
        amount = sum(parse_amount(each["held"], USD) for each in reply["movements"])
        self.held[hold] = (account, amount)
        return [hold]

    async def charge(self, client: httpx2.AsyncClient, account: str, hold: str | None) -> None:
        """It occurs once: its event is named by its key."""
        account = account if hold is None else self.held[hold][0]
        amount = self.chance.randrange(1, 5)
        line = {
            "source": "operator",
            "event_id": f"{self.name}-use-{self.asked}",
            "account": account,
            "occurred_at": "2026-07-01T12:00:00Z",
            "hold": hold,
            "scope": {"provider": "openai", "model": "gpt-4o-mini"},
            "price_version": "v1",
            "amounts": [{"amount": str(amount), "unit": "usd"}],
        }
        if await self.ask(client, "/v1/charges", {"line": line}):
            self.posted[account] -= amount * 10**9
            if hold is not None:
                del self.held[hold]

    async def ask(self, client: httpx2.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """Ask under a new key until there is an answer; null if it is a refusal."""
        self.asked += 1
        key = f"{self.name}-{self.asked}"
        reply = await self.answer(client, path, body, key)
        if reply is not None:
            self.done[key] = Done(path, body, reply["transaction"])
        return reply

    async def answer(
        self, client: httpx2.AsyncClient, path: str, body: dict[str, Any], key: str
    ) -> dict[str, Any] | None:
        headers = {"Idempotency-Key": key}
        deadline = time.monotonic() + ANSWER_SECONDS_MAX
        while True:
            try:
                answer = await client.post(f"{self.url}{path}", json=body, headers=headers)
            except httpx2.HTTPError:
                answer = None
            if answer is not None and answer.status_code == 200:
                found: dict[str, Any] = answer.json()
                self.again += bool(found["replayed"])
                return found
            if answer is not None and answer.status_code < 500:
                assert answer.json()["code"] == "insufficient_funds", (path, body, answer.text)
                self.refused += 1
                return None
            assert time.monotonic() < deadline, (path, body, answer and answer.text)
            await asyncio.sleep(0.05)

    async def check(self, client: httpx2.AsyncClient) -> None:
        """Balances are what was accepted comes to, and each accepted command is still known by its key."""
        for account in self.accounts:
            answer = await client.get(f"{self.url}/v1/balances/{account}")
            assert answer.status_code == 200, answer.text
            (wallet,) = answer.json()["wallets"]
            held = sum(amount for of, amount in self.held.values() if of == account)
            found = (parse_amount(wallet["posted"], USD), parse_amount(wallet["held"], USD))
            assert found == (self.posted[account], held), (account, wallet)
        for key, done in self.done.items():
            again = await self.answer(client, done.path, done.body, key)
            assert again is not None
            assert (again["transaction"], again["replayed"]) == (done.transaction, True), (key, done)


def play(stack: ScratchStack, *, rounds: int, name: str) -> None:
    """Rounds of load with a kill in each, then what must be so: also in what the journal alone says."""
    chance = random.Random(f"{SEED}/{name}")
    sys.stderr.write(f"\n{rounds} kills of the ledger and Postgres, seed {SEED}\n")
    # Each as often as the other.
    victims = [(LEDGER, POSTGRES)[number % 2] for number in range(rounds)]
    chance.shuffle(victims)
    for number, victim in enumerate(victims):
        asyncio.run(play_round(stack, chance, victim, name=f"kill-{name}-{SEED}-{number}-"))
        stack.wait_until_ready()
        if number % 10 == 9 or number == rounds - 1:
            replayed = stack.scrip("replay")
            assert replayed.returncode == 0, f"seed {SEED}\n{replayed.stdout}"


async def play_round(stack: ScratchStack, chance: random.Random, victim: str, *, name: str) -> None:
    token = stack.credentials.tokens["operator"]
    load = Load(stack.url("ledger"), token, name, chance)
    headers = {"Authorization": f"Bearer {token}"}
    async with httpx2.AsyncClient(headers=headers, timeout=10) as client:
        await load.open(client)
        before = load.asked
        when = before + chance.randrange(COMMANDS // 10, COMMANDS * 9 // 10)
        workers = [asyncio.create_task(load.work(client)) for _ in range(WORKERS)]
        while load.asked < when:
            assert not all(worker.done() for worker in workers), "the load ended before the kill"
            await asyncio.sleep(0.001)
        pid = stack.run.processes[victim]
        os.kill(pid, signal.SIGKILL)
        killed_at = load.asked
        await asyncio.gather(*workers)
        await load.check(client)
    sys.stderr.write(
        f"  kill -9 of {victim} ({pid}) after {killed_at - before} of {load.asked - before} commands:"
        f" {len(load.done)} accepted, {load.refused} refused\n"
    )
