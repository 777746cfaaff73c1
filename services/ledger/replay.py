"""Replay: every projection is rebuilt from the journal into the schema ledger_shadow and compared with the live one.

Set-wise, by workers that share the partitions and see one moment, so that it may run while the service works; or entry
by entry with the `evolve` of the service itself: both must come to the same bytes. A swap puts what was rebuilt in
place of what is live.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, LiteralString, TypeVar

import msgspec
import psycopg
from psycopg import Connection, sql
from psycopg.rows import TupleRow
from pydantic import SecretStr
from sqlalchemy import Table

from contracts.partition import PARTITION_COUNT
from services.ledger import replay_sql, tables
from services.ledger.domain.commands import Rule
from services.ledger.domain.entries import Details, Entry
from services.ledger.domain.evolve import evolve
from services.ledger.domain.periods import boundary
from services.ledger.domain.state import Account, Changes, PartitionState, Wallet
from services.ledger.projections import Row, changed_rows

LIVE: Final = "ledger"
SHADOW: Final = "ledger_shadow"
DIFFERENCES_SHOWN_MAX: Final = 5
FETCH_ROWS: Final = 20_000
WORKERS: Final = 2
# Longer than an owner goes without looking at its leases, shorter than a caller waits for an owner.
DEPOSED_SECONDS: Final = 4
CANCEL_SECONDS: Final = 0.1
# What is summed at once, in pages of the journal: enough that groups are few, and that progress is seen.
PARTS_MIN: Final = 4
PAGES_MAX: Final = 4_096
PAGES_MIN: Final = 128

_decode_details: Final = msgspec.json.Decoder(Details).decode
_decode_rule: Final = msgspec.json.Decoder(Rule).decode
_encode: Final = msgspec.json.Encoder(order="sorted").encode

Progress = Callable[[int, int], None]
T = TypeVar("T")
# A part of the journal: the row addresses where it begins and ends, and of which partitions.
_Range = dict[str, Any]


class ShadowMissing(Exception):
    """There is no schema to replay into, and this role may not make one."""


class ShadowInUse(Exception):
    """Another replay is at work there."""


@dataclass(frozen=True, slots=True)
class Compared:
    """A projection: rows live and replayed, how many rows differ or only one of them has, and the first of those."""

    table: str
    live: int
    replayed: int
    different: int
    first_differences: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay found. It is equal if no table differs and every partition's head is its journal's last entry.

    `seconds` is what the rebuilding took, without the comparison. `swapped`: what differed has been replaced.
    """

    entries: int
    seconds: float
    tables: tuple[Compared, ...]
    heads_astray: tuple[str, ...]
    swapped: bool = False

    @property
    def is_equal(self) -> bool:
        """Whether everything can be rebuilt from the journal."""
        return not self.heads_astray and not any(table.different for table in self.tables)

    @property
    def entries_per_second(self) -> float:
        """The rate of rebuilding, without the comparison."""
        return self.entries / max(self.seconds, 1e-9)


def replay(
    owner_url: SecretStr,
    *,
    on_progress: Progress = lambda _done, _all: None,
    by_evolve: bool = False,
    swap: bool = False,
) -> Replayed:
    """Rebuild and compare, as the role that owns the schema. The shadow stays to be looked at.

    `swap`: nothing is committed meanwhile, and what differs is replaced by what was rebuilt; owners lose their leases
    and what they remember. Readers see the tables as they were or as they are then, nothing in between. ShadowMissing,
    ShadowInUse.
    """
    with _connect(owner_url) as connection, _alone(connection):
        _make_shadow(connection)
        if swap:
            # Nothing is committed from here on, but by workers, which has to be seen.
            connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
            connection.execute("LOCK TABLE ledger.heads IN EXCLUSIVE MODE")
        sizes = _sizes(connection)
        total = sum(sizes.values())
        started = time.monotonic()
        if by_evolve:
            _rebuild_by_evolve(connection, lambda done: on_progress(done, total))
            seconds = time.monotonic() - started
            compared = _compare(connection, 0, PARTITION_COUNT - 1)
        else:
            with _working(connection, owner_url, _shares(sizes), _Progress(total, on_progress)) as workers:
                _all(workers, _Worker.rebuild)
                seconds = time.monotonic() - started
                compared = _put_together(_all(workers, _Worker.compare))
        on_progress(total, total)
        astray = tuple(_heads_astray(connection))
        if swap:
            for table, found in zip(tables.PROJECTIONS, compared, strict=True):
                if found.different:
                    _replace(connection, table)
            _depose_owners(connection, owner_url)
        for name in replay_sql.PART_NAMES:
            connection.execute(sql.SQL("DROP TABLE {}").format(sql.Identifier(SHADOW, name)))
    return Replayed(total, seconds, compared, astray, swap)


def _connect(url: SecretStr) -> Connection[TupleRow]:
    # Unqualified, a projection is the one that is rebuilt; the journal is there once.
    connection = psycopg.connect(
        url.get_secret_value(),
        application_name="scrip-replay",
        # Of one that was killed the server would go on with what it was asked last.
        options=f"-c timezone=UTC -c search_path={SHADOW},{LIVE} -c jit=off -c work_mem=64MB"
        " -c client_connection_check_interval=1s",
    )
    connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    return connection


@contextmanager
def _alone(connection: Connection[TupleRow]) -> Iterator[None]:
    """Nobody else replays meanwhile: all in the same shadow."""
    if not _value(connection, "SELECT pg_try_advisory_lock(hashtext('ledger replay'))"):
        raise ShadowInUse("another replay is at work")
    connection.commit()
    try:
        yield
        connection.commit()
    finally:
        # The next need not wait until the server notices that nobody is there any more.
        if not connection.broken:
            connection.rollback()
            connection.execute("SELECT pg_advisory_unlock(hashtext('ledger replay'))")
            connection.commit()


def _make_shadow(connection: Connection[TupleRow]) -> None:
    """An empty shadow, committed. What one that was interrupted left of another goes."""
    if connection.execute("SELECT 1 FROM pg_namespace WHERE nspname = %s", [SHADOW]).fetchone() is None:
        try:
            connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(SHADOW)))
        except psycopg.errors.InsufficientPrivilege as error:
            raise ShadowMissing(f"there is no schema {SHADOW}, and this role may not create it") from error
    for name in (*replay_sql.PART_NAMES, *(table.name for table in tables.PROJECTIONS)):
        connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(sql.Identifier(SHADOW, name)))
    for table in tables.PROJECTIONS:
        connection.execute(sql.SQL("CREATE UNLOGGED TABLE {shadow} (LIKE {live})").format(**_names(table)))
    for statement in replay_sql.PARTS:
        connection.execute(statement)
    connection.commit()


# Set-wise -------------------------------------------------------------------------------------------------------------


def _shares(sizes: Mapping[int, int]) -> list[tuple[int, int]]:
    """The partitions, first and last, of each worker: about as many entries for one as for another."""
    total, done = sum(sizes.values()), 0
    ends: list[int] = []
    for partition in range(PARTITION_COUNT):
        done += sizes.get(partition, 0)
        if done * WORKERS >= total * (len(ends) + 1) and len(ends) < WORKERS - 1:
            ends.append(partition)
    begins = [0, *(end + 1 for end in ends)]
    return list(zip(begins, [*ends, PARTITION_COUNT - 1], strict=True))


@dataclass(slots=True)
class _Progress:
    """How much of the journal has been read, by all workers."""

    total: int
    on_progress: Progress
    parts: int = 0
    done: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def advance(self) -> None:
        with self.lock:
            self.done += 1
            self.on_progress(self.total * self.done // self.parts, self.total)


class _Worker:
    """A connection that rebuilds some partitions, as another sees them, and compares. Its rows are its own."""

    def __init__(
        self, url: SecretStr, snapshot: str, share: tuple[int, int], ranges: Sequence[_Range], progress: _Progress
    ) -> None:
        self.connection = _connect(url)
        self.connection.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(sql.Literal(snapshot)))
        self._first, self._last = share
        self._ranges = [{**each, "first": self._first, "last": self._last} for each in ranges]
        self._progress = progress

    def rebuild(self) -> None:
        """All projections of its partitions."""
        # How many rows a sum has the planner cannot know. Were it to guess, it would look each up among all others, or
        # sort the journal.
        self._execute("SET LOCAL enable_nestloop = off")
        self._execute("SET LOCAL enable_mergejoin = off")
        self._read(replay_sql.SCANS)
        self._execute(replay_sql.LAST_IN)
        self._read(replay_sql.SCANS_OF_LOTS)
        for statement in replay_sql.LOT_SUMS:
            self._execute(statement)
        for statement in replay_sql.STEPS:
            self._execute(statement)
        _end_rules(self.connection)
        _fold_claimed_payments(self.connection)
        _note_renewals(self.connection)
        self._execute(replay_sql.ACCOUNTS)

    def compare(self) -> tuple[Compared, ...]:
        """What it rebuilt with what is live. Others may see it then."""
        compared = _compare(self.connection, self._first, self._last)
        self.connection.commit()
        return compared

    def _read(self, scans: Mapping[str, str]) -> None:
        for part in self._ranges:
            for table, statement in scans.items():
                self._execute(f"INSERT INTO {table} {statement}", part)
            self._progress.advance()

    def _execute(self, statement: str, parameters: _Range | None = None) -> None:
        # Parameters are put into the text: what is planned knows them, and a utility statement may have them.
        self.connection.execute(sql.SQL(statement), parameters)


@contextmanager
def _working(
    connection: Connection[TupleRow], owner_url: SecretStr, shares: Sequence[tuple[int, int]], progress: _Progress
) -> Iterator[list[_Worker]]:
    """Workers who see what a connection sees. Whoever leaves early stops them."""
    _check_places(connection)
    snapshot = str(_value(connection, "SELECT pg_export_snapshot()"))
    ranges = _ranges(int(_value(connection, "SELECT pg_relation_size('journal') / current_setting('block_size')::int")))
    progress.parts = 2 * len(ranges) * len(shares)
    workers = [_Worker(owner_url, snapshot, share, ranges, progress) for share in shares]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.connection.close()


def _all(workers: Sequence[_Worker], work: Callable[[_Worker], T]) -> list[T]:
    """Have all workers do something at the same time."""
    with ThreadPoolExecutor(len(workers)) as pool:
        doing = [pool.submit(work, worker) for worker in workers]
        try:
            return [each.result() for each in doing]
        except BaseException:
            # Told between two statements, a worker would begin the next.
            while wait(doing, CANCEL_SECONDS).not_done:
                for worker in workers:
                    worker.connection.cancel_safe()
            raise


def _put_together(found: Sequence[tuple[Compared, ...]]) -> tuple[Compared, ...]:
    """What all workers found, table by table."""
    return tuple(
        Compared(
            of_table[0].table,
            sum(each.live for each in of_table),
            sum(each.replayed for each in of_table),
            sum(each.different for each in of_table),
            tuple(
                sorted((line for each in of_table for line in each.first_differences), key=_by_row)[
                    :DIFFERENCES_SHOWN_MAX
                ]
            ),
        )
        for of_table in zip(*found, strict=True)
    )


def _by_row(difference: str) -> tuple[str, str]:
    """What is live of a row stands beside what was replayed of it."""
    return difference[difference.index(":") :], difference


def _check_places(connection: Connection[TupleRow]) -> None:
    """Places are compared as one number each: they have to fit."""
    if int(_value(connection, "SELECT max(batch) FROM heads")) >= replay_sql.BATCH_MAX:
        raise ValueError("there are more batches than a set-wise replay can count: replay entry by entry")


def _ranges(pages: int) -> list[_Range]:
    """The journal in parts, as ranges of row addresses."""
    step = min(max(pages // PARTS_MIN, PAGES_MIN), PAGES_MAX)
    begins = range(0, max(pages, 1), step)
    return [{"begin": f"({begin},0)", "end": f"({begin + step},0)"} for begin in begins]


def _end_rules(connection: Connection[TupleRow]) -> None:
    """Give rules the ends that were set since: their text is made as the service makes it."""
    ended = connection.execute(replay_sql.END_RULES).fetchall()
    with connection.cursor() as cursor:
        cursor.executemany(
            "UPDATE rules SET rule = %s WHERE (partition, account, unit, rule_id) = (%s, %s, %s, %s)",
            [
                (_encode(msgspec.structs.replace(_decode_rule(rule), end_period=end)).decode(), *key)
                for *key, rule, end in ended
            ],
        )


def _note_renewals(connection: Connection[TupleRow]) -> None:
    """Say when rules are renewed next: only the service's own calendar knows."""

    def renewals() -> Iterator[Row]:
        for partition, account, text, next_period in connection.execute(replay_sql.RENEWING).fetchall():
            rule = _decode_rule(text)
            if rule.end_period is None or next_period < rule.end_period:
                yield partition, account, boundary(rule, next_period)

    _copy_rows(connection, "renewals", ["partition", "account", "due_at"], list(renewals()))


def _fold_claimed_payments(connection: Connection[TupleRow]) -> None:
    """Payments on which there are claims: what their unit is depends on the order of purchases and claims."""
    states: dict[int, PartitionState] = {}
    for (
        partition,
        batch,
        position,
        transaction,
        kind,
        account,
        unit,
        lot,
        lot_kind,
        posted,
        *more,
    ) in connection.execute(replay_sql.CLAIMED).fetchall():
        occurred_at, recorded_at, details = more
        entry = Entry(
            batch=batch,
            position=position,
            transaction=transaction,
            recorded_at=recorded_at,
            kind=kind,
            account=account,
            occurred_at=occurred_at,
            unit=unit,
            lot=lot,
            lot_kind=lot_kind,
            hold=None,
            posted=posted,
            held=0,
            frozen=0,
            details=_decode_details(details),
        )
        state = states.setdefault(partition, PartitionState())
        _provide_wallet(state, entry)
        evolve(state, entry)
    with connection.cursor() as cursor:
        cursor.executemany(
            "UPDATE payments SET unit = %s, paid = %s WHERE (partition, payment, account) = (%s, %s, %s)",
            [
                (payment.unit, payment.paid, partition, payment.id, payment.account)
                for partition, state in states.items()
                for payment in state.payments.values()
            ],
        )


def _provide_wallet(state: PartitionState, entry: Entry) -> None:
    """A wallet for an entry to be added to: what it comes to is not looked at."""
    since: dict[str, Any] = {"recorded_at": entry.recorded_at, "batch": entry.batch, "position": entry.position}
    account = state.accounts.get(entry.account)
    if account is None:
        account = Account(id=entry.account, opened_at=entry.recorded_at, transaction=entry.transaction, **since)
        state.accounts[account.id] = account
    if entry.unit is not None and entry.unit not in account.wallets:
        wallet = Wallet(account=entry.account, unit=entry.unit, policy="hard", overdraft=0, **since)
        account.wallets[entry.unit] = wallet


# Entry by entry -------------------------------------------------------------------------------------------------------


def _rebuild_by_evolve(connection: Connection[TupleRow], on_progress: Callable[[int], None]) -> None:
    """Each partition that has entries, with the `evolve` of the service."""
    partition, state = -1, PartitionState()
    for done, row in enumerate(_entries(connection), start=1):
        if row[0] != partition:
            _copy_state(connection, partition, state)
            partition, state = row[0], PartitionState()
        evolve(state, _entry(row))
        if done % FETCH_ROWS == 0:
            on_progress(done)
    _copy_state(connection, partition, state)


def _entries(connection: Connection[TupleRow]) -> Iterator[TupleRow]:
    """The journal in order, without contras: they carry no balance."""
    with connection.cursor(name="replay") as cursor:
        cursor.itersize = FETCH_ROWS
        cursor.execute(
            """
            SELECT partition, batch, position, transaction_id::text, kind, account, unit, lot_id::text, lot_kind,
                   hold_id::text, posted, held, frozen, occurred_at, recorded_at, details
            FROM journal ORDER BY partition, batch, position
            """
        )
        yield from cursor


def _entry(row: TupleRow) -> Entry:
    return Entry(
        batch=row[1],
        position=row[2],
        transaction=row[3],
        kind=row[4],
        account=row[5],
        unit=row[6],
        lot=row[7],
        lot_kind=row[8],
        hold=row[9],
        posted=row[10],
        held=row[11],
        frozen=row[12],
        occurred_at=row[13],
        recorded_at=row[14],
        details=None if row[15] is None else _decode_details(row[15]),
    )


def _copy_state(connection: Connection[TupleRow], partition: int, state: PartitionState) -> None:
    """Write a partition's state. Its changes are all of it: nothing was there before."""
    rows = changed_rows(partition, state)
    state.changes = Changes()
    for table in tables.PROJECTIONS:
        _copy_rows(connection, table.name, [column.name for column in table.columns], rows[table.name])


def _copy_rows(connection: Connection[TupleRow], table: str, columns: Sequence[str], rows: Iterable[Row]) -> None:
    statement = sql.SQL("COPY {} ({}) FROM STDIN").format(
        sql.Identifier(SHADOW, table), sql.SQL(", ").join(sql.Identifier(column) for column in columns)
    )
    with connection.cursor() as cursor, cursor.copy(statement) as copy:
        for row in rows:
            copy.write_row(row)


# Comparing and swapping -----------------------------------------------------------------------------------------------


def _compare(connection: Connection[TupleRow], first: int, last: int) -> tuple[Compared, ...]:
    """Every byte of every row of some partitions."""
    return tuple(_compare_table(connection, table, first, last) for table in tables.PROJECTIONS)


def _compare_table(connection: Connection[TupleRow], table: Table, first: int, last: int) -> Compared:
    row: Any = connection.execute(
        sql.SQL(
            """
            WITH live AS (
                SELECT * FROM {live} WHERE partition BETWEEN {first} AND {last}
            ), shadow AS (
                SELECT * FROM {shadow} WHERE partition BETWEEN {first} AND {last}
            ), differing AS (
                SELECT l, s FROM live l FULL JOIN shadow s ON {same_key}
                WHERE l.partition IS NULL OR s.partition IS NULL OR l.* *<> s.*
            ), lines AS (
                SELECT 'only live: ' || l::text AS line FROM differing WHERE (l).partition IS NOT NULL
                UNION ALL SELECT 'only replayed: ' || s::text FROM differing WHERE (s).partition IS NOT NULL
            )
            SELECT (SELECT count(*) FROM live), (SELECT count(*) FROM shadow), (SELECT count(*) FROM differing),
                   (SELECT array_agg(line) FROM (
                       SELECT line FROM lines ORDER BY substr(line, strpos(line, ':')), line LIMIT {shown}
                   ) f)
            """
        ).format(
            **_names(table), first=sql.Literal(first), last=sql.Literal(last), shown=sql.Literal(DIFFERENCES_SHOWN_MAX)
        )
    ).fetchone()
    return Compared(table.name, row[0], row[1], row[2], tuple(row[3] or ()))


def _replace(connection: Connection[TupleRow], table: Table) -> None:
    """Have the live table say what the shadow says, row by row where they differ: readers are not kept waiting."""
    for statement in (
        "DELETE FROM {live} l WHERE NOT EXISTS (SELECT FROM {shadow} s WHERE {same_key} AND l.* *= s.*)",
        "INSERT INTO {live} SELECT * FROM {shadow} s WHERE NOT EXISTS (SELECT FROM {live} l WHERE {same_key})",
    ):
        connection.execute(sql.SQL(statement).format(**_names(table)))


def _names(table: Table) -> Mapping[str, sql.Composable]:
    keys = [sql.Identifier(column.name) for column in table.primary_key]
    return {
        "live": sql.Identifier(LIVE, table.name),
        "shadow": sql.Identifier(SHADOW, table.name),
        "same_key": sql.SQL(" AND ").join(sql.SQL("l.{0} = s.{0}").format(key) for key in keys),
    }


def _depose_owners(connection: Connection[TupleRow], owner_url: SecretStr) -> None:
    """Whoever owns a partition has to take it over anew: what it remembers was read from the tables before.

    For a moment nobody can: so each owner learns that it has lost the partition before it may win it again. Leases are
    renewed all the time, so they are taken as they are now, and not as they were when all this began.
    """
    with psycopg.connect(owner_url.get_secret_value(), autocommit=True, application_name="scrip-replay") as leases:
        deposed = leases.execute(
            "UPDATE ledger.leases SET owner = 'replay', epoch = epoch + 1,"
            " expires_at = clock_timestamp() + make_interval(secs => %s) WHERE epoch > 0 RETURNING partition, epoch",
            [DEPOSED_SECONDS],
        ).fetchall()
    connection.execute(
        "UPDATE ledger.heads h SET epoch = d.epoch FROM unnest(%s::smallint[], %s::bigint[]) AS d (partition, epoch)"
        " WHERE d.partition = h.partition AND d.epoch > h.epoch",
        [[partition for partition, _ in deposed], [epoch for _, epoch in deposed]],
    )


def _heads_astray(connection: Connection[TupleRow]) -> Iterator[str]:
    """Partitions whose head is not their journal's last entry."""
    found = connection.execute(
        """
        SELECT h.partition, h.batch, coalesce(j.batch, 0)
        FROM heads h
        LEFT JOIN LATERAL (
            SELECT batch, hash FROM journal j WHERE j.partition = h.partition
            ORDER BY batch DESC, position DESC LIMIT 1
        ) j ON true
        WHERE (h.batch, h.chain_hash) <> (coalesce(j.batch, 0), coalesce(j.hash, decode(repeat('00', 32), 'hex')))
        ORDER BY 1
        """
    ).fetchall()
    for partition, batch, end in found:
        yield f"partition {partition}: its head is at batch {batch}, its journal ends with batch {end}"


def _sizes(connection: Connection[TupleRow]) -> dict[int, int]:
    """How many entries each partition has."""
    return dict(connection.execute("SELECT partition, count(*) FROM journal GROUP BY 1").fetchall())


def _value(connection: Connection[TupleRow], statement: LiteralString) -> Any:
    row = connection.execute(statement).fetchone()
    return None if row is None else row[0]
