"""The rival: what the source systems do for every event, on the same Postgres with the same durability.

One transaction per event: take the cost from the balance if it is there, and write the usage row.
"""

import asyncio
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psycopg
from psycopg import sql
from psycopg_pool import AsyncConnectionPool

from contracts.ids import uuid7

POOL_SIZES: Final = (4, 16, 64)

TABLES: Final = """
CREATE TABLE balance (account bigint PRIMARY KEY, balance bigint NOT NULL) WITH (fillfactor = 70);
CREATE TABLE usage (
  id uuid PRIMARY KEY, account bigint NOT NULL, occurred_at timestamptz NOT NULL,
  model text NOT NULL, input_tokens bigint NOT NULL, output_tokens bigint NOT NULL, cost bigint NOT NULL
)
"""
TAKE: Final = "UPDATE balance SET balance = balance - %(cost)s WHERE account = %(account)s AND balance >= %(cost)s"
WRITE: Final = (
    "INSERT INTO usage (id, account, occurred_at, model, input_tokens, output_tokens, cost)"
    " VALUES (%(id)s, %(account)s, now(), 'gpt-4o-mini', %(input)s, %(output)s, %(cost)s)"
)
# The same in pgbench's language: a client in C, which costs the shared cores next to nothing.
PGBENCH: Final = """\\set account random(1, :accounts)
\\set input random(50, 2000)
\\set output random(10, 400)
\\set cost :input * 150 + :output * 600
BEGIN;
UPDATE balance SET balance = balance - :cost WHERE account = :account AND balance >= :cost;
INSERT INTO usage (id, account, occurred_at, model, input_tokens, output_tokens, cost)
  VALUES (uuidv7(), :account, now(), 'gpt-4o-mini', :input, :output, :cost);
COMMIT;
"""


@dataclass(frozen=True, slots=True)
class Rate:
    """Events per second that a client with so many connections reached."""

    client: str
    connections: int
    events_per_second: float


def prepare(url: str, *, accounts: int) -> None:
    """Make the tables, and give every account more than it can spend."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP TABLE IF EXISTS balance, usage")
        for statement in TABLES.split(";"):
            connection.execute(sql.SQL(statement))
        connection.execute(
            "INSERT INTO balance SELECT number, 1000000000000000 FROM generate_series(1, %s) number", [accounts]
        )
        connection.execute("VACUUM ANALYZE balance")


async def measure_psycopg(url: str, *, accounts: int, connections: int, events: int) -> Rate:
    """What a Python service with a pool of connections reaches; its statements are prepared."""
    chosen = random.Random(connections)
    todo = iter(
        [
            {
                "id": uuid7(milliseconds=time.time_ns() // 1_000_000, entropy=os.urandom(10)),
                "account": chosen.randint(1, accounts),
                "input": (input_tokens := chosen.randint(50, 2000)),
                "output": (output_tokens := chosen.randint(10, 400)),
                "cost": input_tokens * 150 + output_tokens * 600,
            }
            for _ in range(events)
        ]
    )

    async def work(pool: AsyncConnectionPool) -> None:
        for event in todo:
            async with pool.connection() as connection, connection.transaction():
                taken = await connection.execute(TAKE, event, prepare=True)
                if taken.rowcount != 1:
                    raise RuntimeError("an account had too little")
                await connection.execute(WRITE, event, prepare=True)

    async with AsyncConnectionPool(
        url, min_size=connections, max_size=connections, kwargs={"autocommit": True}
    ) as pool:
        await pool.wait()
        begin = time.perf_counter()
        await asyncio.gather(*(work(pool) for _ in range(connections)))
        return Rate("psycopg", connections, events / (time.perf_counter() - begin))


def measure_pgbench(pgbench: Path, url: str, *, accounts: int, connections: int, seconds: int) -> Rate:
    """What the same transaction reaches when its client costs next to nothing."""
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as script:
        script.write(PGBENCH)
        script.flush()
        found = subprocess.run(
            [
                *(str(pgbench), "--no-vacuum", "--protocol=prepared", f"--file={script.name}"),
                *(f"--client={connections}", "--jobs=1", f"--time={seconds}", f"--define=accounts={accounts}", url),
            ],
            capture_output=True,
            text=True,
            check=True,
        )
    (line,) = (line for line in found.stdout.splitlines() if line.startswith("tps ="))
    return Rate("pgbench", connections, float(line.split()[2]))


def best(rates: Sequence[Rate]) -> Rate:
    """The fastest."""
    return max(rates, key=lambda rate: rate.events_per_second)
