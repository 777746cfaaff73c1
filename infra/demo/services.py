"""The two HTTP APIs as the demo and the benches use them: retried while a service restarts, bounded in concurrency."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from types import TracebackType
from typing import Final, Self
from urllib.parse import quote

import httpx2

from infra.demo.patience import Patience

CONCURRENT_MAX: Final = 32
RETRY_SECONDS: Final = 0.2
WITHOUT_ANSWER_SECONDS_MAX: Final = 60.0


@dataclass(frozen=True, slots=True)
class NewAccount:
    """An account to open with a usd wallet, and what to grant it. `key` makes both commands repeatable."""

    account: str
    dollars: str
    granted_at: datetime
    key: str


@dataclass(frozen=True, slots=True)
class Counters:
    """What metering has made of a source's events since it first met one."""

    new: int = 0
    duplicate: int = 0
    conflicting: int = 0
    dead: int = 0
    unattributed: int = 0
    unpriced: int = 0
    charged: int = 0

    @property
    def accounted(self) -> int:
        """How many messages it has dealt with."""
        return self.new + self.duplicate + self.conflicting + self.dead

    def since(self, before: "Counters") -> "Counters":
        """What was added since then."""
        return Counters(
            new=self.new - before.new,
            duplicate=self.duplicate - before.duplicate,
            conflicting=self.conflicting - before.conflicting,
            dead=self.dead - before.dead,
            unattributed=self.unattributed - before.unattributed,
            unpriced=self.unpriced - before.unpriced,
            charged=self.charged - before.charged,
        )


@dataclass(frozen=True, slots=True)
class Charged:
    """What the ledger says of an account, in dollars: charged by its journal, granted to it, and left."""

    journal: Decimal
    granted: Decimal
    posted: Decimal


class _Api:
    """One service under one token."""

    def __init__(self, url: str, token: str) -> None:
        self._url = url
        self._client = httpx2.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=10.0,
            trust_env=False,
            limits=httpx2.Limits(max_connections=CONCURRENT_MAX),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def get(self, path: str) -> httpx2.Response:
        """The answer to a question. StackError if there is none, or an error."""
        return await self._send("GET", path)

    async def post(self, path: str, body: object, *, key: str) -> httpx2.Response:
        """The answer to a command; repeated under its key until there is one."""
        return await self._send("POST", path, body=body, headers={"Idempotency-Key": key})

    async def _send(
        self, method: str, path: str, *, body: object = None, headers: dict[str, str] | None = None
    ) -> httpx2.Response:
        patience = Patience(f"{method} {self._url}{path}", seconds_max=WITHOUT_ANSWER_SECONDS_MAX)
        while True:
            try:
                response = await self._client.request(method, path, json=body, headers=headers)
            except httpx2.TransportError as error:
                patience.failed(error)
            else:
                if patience.is_answered(response):
                    return response
            await asyncio.sleep(RETRY_SECONDS)


class Metering(_Api):
    """Metering's HTTP API."""

    async def counters(self, source: str) -> Counters:
        """What became of the events of `source`."""
        (found,) = (await self.get(f"/api/v1/ingest?source={source}")).json()["sources"]
        return Counters(**{name: found[name] for name in Counters.__slots__})


class Ledger(_Api):
    """The ledger's HTTP API."""

    async def open_and_grant(self, new: Iterable[NewAccount]) -> AsyncIterator[int]:
        """Open and fund accounts, a bounded number at a time; yields how many are done."""
        waiting = iter(new)
        done = 0
        working: set[asyncio.Task[None]] = set()
        try:
            while True:
                while len(working) < CONCURRENT_MAX and (one := next(waiting, None)) is not None:
                    working.add(asyncio.create_task(self._open_and_grant(one)))
                if not working:
                    return
                ended, _ = await asyncio.wait(working, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    working.remove(task)
                    task.result()
                    done += 1
                    yield done
        finally:
            for task in working:
                task.cancel()
            # Others may have been refused, too: the first refusal says it for all.
            await asyncio.gather(*working, return_exceptions=True)

    async def _open_and_grant(self, new: NewAccount) -> None:
        await self.post(
            "/v1/accounts",
            {"account": new.account, "wallets": [{"unit": "usd"}]},
            key=f"{new.key}:open",
        )
        await self.post(
            "/v1/grants",
            {
                "account": new.account,
                "unit": "usd",
                "amount": new.dollars,
                "occurred_at": new.granted_at.isoformat(timespec="microseconds"),
                "reference": new.key,
            },
            key=f"{new.key}:grant",
        )

    async def charged_lines(self, account_prefix: str) -> int:
        """How many uses of the accounts so named are charged."""
        found = (await self.get(f"/v1/totals?unit=usd&account_prefix={account_prefix}")).json()
        return int(found["charge_lines"])

    async def charged(self, accounts: Sequence[str]) -> list[Charged]:
        """What each account was charged and granted, by its journal, and what its balance is."""
        window = asyncio.Semaphore(CONCURRENT_MAX)

        async def one(account: str) -> Charged:
            async with window:
                return await self._charged(account)

        return await asyncio.gather(*(one(account) for account in accounts))

    async def _charged(self, account: str) -> Charged:
        wallets = (await self.get(f"/v1/balances/{account}")).json()["wallets"]
        posted = sum((Decimal(wallet["posted"]) for wallet in wallets if wallet["unit"] == "usd"), Decimal(0))
        charged, granted = Decimal(0), Decimal(0)
        before: str | None = ""
        while before is not None:
            page = (await self.get(f"/v1/statements/{account}?unit=usd&limit=500{before}")).json()
            for entry in page["entries"]:
                if entry["kind"] == "charged":
                    charged -= Decimal(entry["posted"])
                else:
                    granted += Decimal(entry["posted"])
            before = None if page["next_before"] is None else f"&before={quote(page['next_before'])}"
        return Charged(journal=charged, granted=granted, posted=posted)
