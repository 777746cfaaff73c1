"""The ledger's statements: heads, loading what a batch needs, writing what it decided. Set-wise; never commits."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta
from functools import cache
from itertools import count
from typing import Any, Final, NamedTuple

import msgspec
import psycopg
from psycopg import AsyncConnection, AsyncRawCursor
from psycopg.rows import TupleRow
from sqlalchemy import Table
from sqlalchemy.dialects import postgresql

from contracts.accounts import root
from services.kit import dead_letters
from services.kit.dead_letters import Letter
from services.kit.outbox import OutboxRow
from services.ledger import tables
from services.ledger.domain.commands import LATE_GRACE
from services.ledger.domain.draft import Head, Recorded
from services.ledger.domain.entries import payment_of
from services.ledger.domain.state import NEVER

Connection = AsyncConnection[TupleRow]
Row = tuple[Any, ...]

_HEAD_MOVED: Final = "SC001"
_POSTGRESQL: Final = postgresql.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy leaves it untyped


# Each time one more is asked for, something was found: more than this is no ledger any more.
ROUNDS_MAX: Final = 1_000
# Open holds of a partition that are read at once because they are, or will be, overdue.
OVERDUE_READ_MAX: Final = 500


class HeadMoved(Exception):
    """A commit was refused: a partition's head is not where the batch was decided on."""


class TooEntangled(Exception):
    """What a batch concerns leads on to ever more lots."""


@dataclass(slots=True)
class Needs:
    """What a batch has to know, as sets of keys that begin with the partition.

    `accounts`: whole, with wallets, rules, and all lots that are not spent or that a late charge may ask for.
    `holds`, with the account that names them: if it is theirs and they have ended, with the lots they had earmarked.
    `payments`, with the account that names them, and whether a claim is made: if one is, or has been, with the claims
    and every lot of the account's tree that refers to them, and the accounts of those.
    `lines`: what was charged under these keys before. `past_lines`, with the account they are to be given back to: the
    lines with what has been given back of them, and the lots they took from. `lots`, with their account: whether spent
    or not; `repaying` likewise. `past_lots`: those of an account that were valid at a time; only for one longer ago
    than LATE_GRACE, others come with the account. `overdue`, with two times: the open holds that end from one to the
    other, at most OVERDUE_READ_MAX of a partition and those that end at the same time.

    What came to the lots of `past_lines`, `payments`, `repaying` and of holds that were estimated may be given back or
    taken: they come with the lots that repaid them, and with the payments that any of these refer to, as above; and
    so on, until there are no more.
    """

    heads: set[int] = field(default_factory=set)
    accounts: set[tuple[int, str]] = field(default_factory=set)
    holds: set[tuple[int, str, str]] = field(default_factory=set)
    payments: set[tuple[int, str, str, bool]] = field(default_factory=set)
    commands: set[tuple[int, str, str]] = field(default_factory=set)
    lines: set[tuple[int, str, str, int]] = field(default_factory=set)
    past_lines: set[tuple[int, str, str, int, str]] = field(default_factory=set)
    lots: set[tuple[int, str, str]] = field(default_factory=set)
    repaying: set[tuple[int, str, str]] = field(default_factory=set)
    past_lots: set[tuple[int, str, datetime]] = field(default_factory=set)
    bundles: set[tuple[int, int]] = field(default_factory=set)
    overdue: set[tuple[int, datetime, datetime]] = field(default_factory=set)

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in _NEEDED)


_NEEDED: Final = tuple(each.name for each in fields(Needs))


@dataclass(slots=True)
class Loaded:
    """What was found: heads, rows for `projections.add_rows`, and what had been accepted and charged before.

    `reached`: the accounts with lots that refer to payments on which there are, or will be, claims. `unread_from`: by
    partition whose overdue holds were read, from when on open holds end that were not.
    """

    heads: dict[int, Head] = field(default_factory=dict)
    rows: dict[str, list[Row]] = field(default_factory=dict)
    reached: set[tuple[int, str]] = field(default_factory=set)
    commands: dict[tuple[int, str, str], tuple[bytes, str]] = field(default_factory=dict)
    lines: dict[tuple[int, str, str, int], tuple[object, ...]] = field(default_factory=dict)
    bundles: dict[tuple[int, int], bytes] = field(default_factory=dict)
    unread_from: dict[int, datetime] = field(default_factory=dict)

    def add(self, more: "Loaded") -> None:
        """Rows that were found later."""
        for name, rows in more.rows.items():
            self.rows.setdefault(name, []).extend(rows)
        self.reached |= more.reached


@dataclass(slots=True)
class Written:
    """All that one partition's batch adds. Rows as in the tables, but of `lines` and `reversals` without the last
    column, which is the batch's time.
    """

    before: Head
    after: Head
    entries: list[Recorded]
    commands: list[Row]
    bundles: list[Row]
    lines: list[Row]
    projections: dict[str, list[Row]]
    outbox: list[OutboxRow]
    letters: list[Letter]
    reversals: list[Row] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Signature:
    """What one commit's heads were signed with. `heads` is the text that was signed; it names them all."""

    commit_id: str
    signature: bytes
    key_id: str
    heads: str


async def take_heads(connection: Connection, epochs: Mapping[int, int]) -> dict[int, Head]:
    """Raise heads to the epochs of leases just won, and read them. One that has a higher epoch already is left out."""
    await connection.execute(
        """
        WITH mine AS (
            SELECT h.partition, m.epoch FROM heads h
            JOIN unnest(%s::smallint[], %s::bigint[]) AS m (partition, epoch) USING (partition)
            WHERE h.epoch < m.epoch ORDER BY h.partition FOR NO KEY UPDATE OF h
        )
        UPDATE heads h SET epoch = mine.epoch FROM mine WHERE h.partition = mine.partition
        """,
        _columns(epochs.items()),
    )
    heads = await read_heads(connection, epochs)
    return {partition: head for partition, head in heads.items() if head.epoch == epochs[partition]}


async def read_heads(connection: Connection, partitions: Iterable[int]) -> dict[int, Head]:
    """Where partitions stand."""
    cursor = await _execute(connection, _HEADS, [_array(list(partitions))])
    return _heads(await cursor.fetchall())


async def _execute(connection: Connection, statement: bytes, columns: Sequence[str]) -> AsyncRawCursor[TupleRow]:
    """Run a statement whose placeholders are Postgres's own. psycopg's are looked for each time in a long statement."""
    cursor = AsyncRawCursor(connection)
    await cursor.execute(statement, columns)
    return cursor


def _numbered(text: str) -> bytes:
    """A statement that is written with `%s` for each placeholder, as Postgres has them."""
    numbers = count(1)
    return re.sub("%s", lambda _: f"${next(numbers)}", text).encode()


_HEADS: Final = b"""
SELECT partition, epoch, batch, chain_hash, recorded_at, outbox_number, charges_number
FROM heads WHERE partition = ANY ($1::smallint[])
"""


def _heads(rows: Iterable[TupleRow]) -> dict[int, Head]:
    return {
        row[0]: Head(
            partition=row[0],
            epoch=row[1],
            batch=row[2],
            chain_hash=row[3],
            recorded_at=row[4],
            outbox_number=row[5],
            charges_number=row[6],
        )
        for row in rows
    }


async def load(connection: Connection, needs: Needs) -> Loaded:
    """Read what a batch needs: in one round trip, and in one more for each step that claims or repayments lead on.

    Most keys are new: one statement says which of them are not, and only those are read, in one more round trip.
    """
    if not needs:
        return Loaded()
    found: dict[str, list[TupleRow]] = {}
    closure, more = _Closure(), needs
    known: Needs | None = Needs()
    for _ in range(ROUNDS_MAX):
        fetched = await _fetch(connection, more, known)
        for name, rows_of_name in fetched.items():
            found.setdefault(name, []).extend(rows_of_name)
        more = closure.beyond(more, fetched)
        if known is not None:
            more.commands, more.holds, more.lines, known = known.commands, known.holds, known.lines, None
        if not more:
            break
    else:
        raise TooEntangled(f"lots lead to others {ROUNDS_MAX} times over")
    rows: dict[str, list[Row]] = {}
    for name, table in _LOADED_AS.items():
        rows.setdefault(table, []).extend(found.get(name, ()))
    return Loaded(
        heads=_heads(found.get("heads", ())),
        rows=rows,
        reached={(row[0], row[1]) for row in found.get("paid_accounts", ())},
        commands={(row[0], row[1], row[2]): (row[3], row[4]) for row in found.get("commands", ())},
        lines={(row[0], row[1], row[2], row[3]): tuple(row[4:]) for row in found.get("lines", ())},
        bundles={(row[0], row[1]): row[2] for row in found.get("bundles", ())},
        unread_from=_unread_from(found.get("overdue", ()), found.get("next_deadline", ())),
    )


def _unread_from(overdue: Sequence[TupleRow], following: Iterable[TupleRow]) -> dict[int, datetime]:
    """By partition: when the first of the open holds that were not read ends, or after which of those that were."""
    found = {}
    for partition, next_deadline in following:
        deadlines = [row[_DEADLINE] for row in overdue if row[0] == partition]
        is_more = len(deadlines) >= OVERDUE_READ_MAX
        found[partition] = max(deadlines) + timedelta(microseconds=1) if is_more else next_deadline or NEVER
    return found


async def _fetch(connection: Connection, needs: Needs, known: Needs | None) -> dict[str, list[TupleRow]]:
    """The rows that each statement of `_LOAD` finds. `known`, if given, is told which `_KEYS` there are."""
    cursors: dict[str, AsyncRawCursor[TupleRow]] = {}
    asked = {} if known is None else {name: list(keys) for name in _KEYS if (keys := getattr(needs, name))}
    async with connection.pipeline():
        if asked:
            columns = [column for name, width in _KEYS.items() for column in _key_columns(asked.get(name, ()), width)]
            cursors["known"] = await _execute(connection, _KNOWN, columns)
        if needs.heads:
            cursors["heads"] = await _execute(connection, _HEADS, [_array(list(needs.heads))])
        for wanted, names in _LOADED_BY.items():
            if wanted not in asked and (keys := getattr(needs, wanted)):
                columns = _columns(keys)
                for name in names:
                    cursors[name] = await _execute(connection, _LOAD[name], columns)
    found = {name: await cursor.fetchall() for name, cursor in cursors.items()}
    for name, place in found.pop("known", ()):
        getattr(known, name).add(asked[name][place - 1])
    return found


def _key_columns(keys: Sequence[Sequence[Any]], width: int) -> list[str]:
    return _columns(keys) if keys else ["{}"] * width


class _Closure:
    """What was followed so far: lots to those that repaid them, and to the payments that they refer to."""

    def __init__(self) -> None:
        self._lots: set[tuple[int, str]] = set()
        self._payments: set[tuple[int, str, str]] = set()

    def beyond(self, needs: Needs, found: Mapping[str, list[TupleRow]]) -> Needs:
        """What `found`, which is what was needed, leads on to."""
        self._payments.update((partition, payment, root(account)) for partition, payment, account, _ in needs.payments)
        more = Needs()
        lots = [lot for name in _FOLLOWED for lot in found.get(name, ())]
        if estimated := {(row[0], row[1]) for row in found.get("holds", ()) if row[_STATUS] == "estimated"}:
            earmarked = {(row[0], row[_EARMARKED_LOT]) for row in found.get("hold_lots", ()) if row[:2] in estimated}
            lots += [row for row in found.get("earmarked", ()) if row[:2] in earmarked]
        for lot in lots:
            partition, account, reference, repaid = lot[0], lot[_ACCOUNT], lot[_REFERENCE], lot[_REPAID]
            self._lots.add((partition, str(lot[1])))
            # Of whatever kind: a debt in a purchase's stead, too.
            if reference is not None and (payment := payment_of("purchase", reference)) is not None:
                key = (partition, payment, root(account))
                if key not in self._payments:
                    self._payments.add(key)
                    more.payments.add((partition, payment, account, False))
            if repaid is not None:
                more.repaying.update((partition, name, account) for name in msgspec.json.decode(repaid))
        more.repaying = {each for each in more.repaying if each[:2] not in self._lots}
        return more


def _place(table: Table, column: str) -> int:
    return list(table.columns.keys()).index(column)


# Which rows are lots that are followed, and where in a row something stands.
_FOLLOWED: Final = ("line_lots", "paid_lots", "repaying")
_ACCOUNT: Final = _place(tables.lots, "account")
_REFERENCE: Final = _place(tables.lots, "reference")
_REPAID: Final = _place(tables.lots, "repaid")
_STATUS: Final = _place(tables.holds, "status")
_HOLD_BATCH: Final = _place(tables.holds, "batch")
_DEADLINE: Final = _place(tables.holds, "expires_at")
_EARMARKED_LOT: Final = _place(tables.hold_lots, "lot_id")


async def due_accounts(
    connection: Connection, partitions: Iterable[int], at: datetime, limit: int
) -> list[tuple[int, str]]:
    """Accounts on whose wallets something is due by a time, and their partitions: the longest overdue first."""
    cursor = await connection.execute(
        """
        SELECT partition, account FROM accounts
        WHERE partition = ANY (%s) AND due_at <= %s ORDER BY due_at, partition, account LIMIT %s
        """,
        [list(partitions), at, limit],
    )
    return [(int(partition), str(account)) for partition, account in await cursor.fetchall()]


async def overdue_holds(
    connection: Connection, partitions: Iterable[int], at: datetime, limit: int
) -> list[tuple[int, str, str]]:
    """Open holds whose deadline is at a time or before, as (partition, hold, account): the longest overdue first."""
    cursor = await connection.execute(
        """
        SELECT partition, hold_id::text, account FROM holds
        WHERE partition = ANY (%s) AND status = 'placed' AND expires_at <= %s
        ORDER BY expires_at, partition, hold_id LIMIT %s
        """,
        [list(partitions), at, limit],
    )
    return [(int(partition), str(hold), str(account)) for partition, hold, account in await cursor.fetchall()]


async def oldest_due(
    connection: Connection, partitions: Iterable[int], at: datetime
) -> tuple[datetime | None, datetime | None]:
    """Since when something has been due on an account, and since when a hold has been overdue; null: nothing is."""
    cursor = await connection.execute(
        """
        SELECT (SELECT min(due_at) FROM accounts WHERE partition = ANY (%(partitions)s) AND due_at <= %(at)s),
               (SELECT min(expires_at) FROM holds
                WHERE partition = ANY (%(partitions)s) AND status = 'placed' AND expires_at <= %(at)s)
        """,
        {"partitions": list(partitions), "at": at},
    )
    accounts, holds = await cursor.fetchone() or (None, None)
    return accounts, holds


async def write(
    connection: Connection,
    batch: Sequence[Written],
    signature: Signature | None = None,
    sent: Callable[[], None] = lambda: None,
) -> None:
    """Write what was decided, and commit, in one round trip. HeadMoved: nothing was, another owner was first.

    Tells `sent` when the server has it all, and there is nothing to do here but to wait.
    """
    rows = {addition: found for addition, found in _rows_of(batch, signature) if found}
    values = [*_head_columns(batch)]
    for found in rows.values():
        values += _columns(found)
    try:
        async with connection.pipeline():
            await _execute(connection, _write_statement(tuple(rows)), values)
            await dead_letters.record(connection, [letter for one in batch for letter in one.letters])
            # `connection.commit()` would wait for the answers to it all.
            await _execute(connection, b"COMMIT", ())
            sent()
    except psycopg.Error as error:
        if error.sqlstate == _HEAD_MOVED:
            raise HeadMoved(f"partitions {error.diag.message_detail}") from error
        raise


class _Addition(NamedTuple):
    """Rows for a table. Those that are `new` are not there yet, or nothing is written: UniqueViolation."""

    table: Table
    new: bool


def _rows_of(batch: Sequence[Written], signature: Signature | None) -> Iterator[tuple[_Addition, list[Row]]]:
    """The rows of a batch, by where they go."""
    for table, rows in _record_of(batch, signature):
        yield _Addition(table, new=True), rows
    placed: list[Row] = []
    for table in tables.PROJECTIONS:
        changed = [row for one in batch for row in one.projections[table.name]]
        if table is tables.holds:
            # Whether they were placed before may not have been looked up.
            begun = {one.after.partition: one.after.batch for one in batch}
            placed = [row for row in changed if row[_HOLD_BATCH] == begun[row[0]]]
            changed = [row for row in changed if row[_HOLD_BATCH] != begun[row[0]]]
        yield _Addition(table, new=False), changed
    yield _Addition(tables.holds, new=True), placed


def _record_of(batch: Sequence[Written], signature: Signature | None) -> Iterator[tuple[Table, list[Row]]]:
    """The rows of a batch that are only ever added, and the outbox's."""
    yield tables.journal, [_entry_row(one, each) for one in batch for each in one.entries]
    yield tables.commands, [row for one in batch for row in one.commands]
    yield tables.bundles, [row for one in batch for row in one.bundles]
    yield tables.charge_lines, [(*row, one.after.recorded_at) for one in batch for row in one.lines]
    yield tables.reversals, [(*row, one.after.recorded_at) for one in batch for row in one.reversals]
    if signature is not None:
        yield tables.signatures, _signature_rows(batch, signature)
    yield tables.outbox, [_outbox_row(row) for one in batch for row in one.outbox]


@cache
def _write_statement(written: tuple[_Addition, ...]) -> bytes:
    """Advance the heads, and add rows to tables, as one statement: each costs by itself, whatever it adds.

    The heads come first: what a SELECT needs is done before what a WITH merely adds.
    """
    additions = "".join(f", added_{place} AS ({_addition(*each)})" for place, each in enumerate(written))
    return _numbered(f"WITH heads_ AS ({_ADVANCE}){additions} SELECT count(*) FROM heads_")


_ADVANCE: Final = (
    "SELECT advance_heads(%s::smallint[], %s::bigint[], %s::bigint[], %s::bigint[], %s::bytea[],"
    " %s::timestamptz[], %s::bigint[], %s::bigint[])"
)


def _addition(table: Table, new: bool) -> str:
    """INSERT of any number of rows, whose columns are arrays; those that are not new replace what is there."""
    names = ", ".join(column.name for column in table.columns)
    # In the list of what is selected they go forth in step; in FROM each would first be copied into a store of its own.
    arrays = ", ".join(f"unnest(%s::{column.type.compile(dialect=_POSTGRESQL)}[])" for column in table.columns)
    statement = f"INSERT INTO {table.name} ({names}) SELECT {arrays}"
    if new:
        return statement
    key = ", ".join(column.name for column in table.primary_key)
    values = ", ".join(f"{column.name} = excluded.{column.name}" for column in table.columns if not column.primary_key)
    return f"{statement} ON CONFLICT ({key}) DO UPDATE SET {values}"


def _signature_rows(batch: Sequence[Written], signature: Signature) -> list[Row]:
    """One for each head that has a new hash. What was signed, all of them, stands in the first alone."""
    moved = [one.after for one in batch if one.after.batch != one.before.batch]
    first = min((head.partition for head in moved), default=None)
    return [
        (
            head.partition,
            head.batch,
            head.chain_hash,
            signature.commit_id,
            signature.signature,
            signature.key_id,
            signature.heads if head.partition == first else "",
        )
        for head in moved
    ]


def _head_columns(batch: Sequence[Written]) -> list[str]:
    return _columns(
        (
            one.after.partition,
            one.before.epoch,
            one.before.batch,
            one.after.batch,
            one.after.chain_hash,
            one.after.recorded_at,
            one.after.outbox_number,
            one.after.charges_number,
        )
        for one in batch
    )


def _entry_row(written: Written, recorded: Recorded) -> Row:
    entry = recorded.entry
    return (
        written.after.partition,
        entry.batch,
        entry.position,
        entry.transaction,
        entry.kind,
        entry.account,
        entry.unit,
        entry.lot,
        entry.lot_kind,
        entry.hold,
        entry.posted,
        entry.held,
        entry.frozen,
        entry.occurred_at,
        entry.recorded_at,
        recorded.details,
        recorded.hash,
    )


def _outbox_row(row: OutboxRow) -> Row:
    return (row.partition, row.number, row.subject, row.message_id, row.payload, row.recorded_at)


def _columns(rows: Iterable[Sequence[Any]]) -> list[str]:
    """Rows as one array literal per column. psycopg's own array dumper took more time than deciding and the server."""
    return [_array(column) for column in zip(*rows, strict=True)]


def _array(values: Sequence[Any]) -> str:  # noqa: PLR0911 - one for each kind of column
    """An array literal of integers, booleans, texts, times or bytes, and nulls. Many a column is one value."""
    first, count = values[0], len(values)
    if values.count(first) == count:
        one = "NULL" if first is None else _element(first)
        return "{" + f"{one}," * (count - 1) + one + "}"
    if None in values:
        return "{" + ",".join(["NULL" if value is None else _element(value) for value in values]) + "}"
    match first:
        case bool():
            return "{" + ",".join(["t" if value else "f" for value in values]) + "}"
        case int():
            return "{" + ",".join(map(str, values)) + "}"
        case bytes():
            return '{"\\\\x' + '","\\\\x'.join([value.hex() for value in values]) + '"}'
        case datetime():
            return '{"' + '","'.join([value.isoformat() for value in values]) + '"}'
        case _:
            texts = values
    joined = _SEPARATOR.join(texts)
    if joined.count(_SEPARATOR) != len(values) - 1:
        return "{" + ",".join([_element(text) for text in texts]) + "}"
    return '{"' + _quoted(joined).replace(_SEPARATOR, '","') + '"}'


# Seldom part of a text; looked for before it is relied on.
_SEPARATOR: Final = "\x1f"


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _element(value: Any) -> str:
    match value:
        case str():
            return f'"{_quoted(value)}"'
        case bool():
            return "t" if value else "f"
        case bytes():
            return f'"\\\\x{value.hex()}"'
        case datetime():
            return f'"{value.isoformat()}"'
        case _:
            return str(value)


def _select(table: Table, *, keys: Mapping[str, str], on: str | None = None) -> bytes:
    """SELECT of all columns of the rows with the keys, which are handed over as arrays of the named types.

    `on` says which rows `t` belong to a key `k`, if not those with its columns.
    """
    columns = ", ".join(f"t.{column.name}" for column in table.columns)
    join = f"USING ({', '.join(keys)})" if on is None else f"ON {on}"
    statement = f"SELECT {columns} FROM {_keys(keys)} JOIN {table.name} t {join}"
    return _numbered(statement)


def _keys(keys: Mapping[str, str]) -> str:
    return f"(SELECT {', '.join(f'unnest(%s::{kind}[]) AS {name}' for name, kind in keys.items())}) AS k"


_ACCOUNT_KEYS: Final = {"partition": "smallint", "account": "text"}
_HOLD_KEYS: Final = {"partition": "smallint", "hold_id": "uuid", "account": "text"}
_LOT_KEYS: Final = {"partition": "smallint", "lot_id": "uuid", "account": "text"}
_PAST_KEYS: Final = {"partition": "smallint", "account": "text", "at": "timestamptz"}
_COMMAND_KEYS: Final = {"partition": "smallint", "principal": "text", "idempotency_key": "text"}
_TIME_KEYS: Final = {"partition": "smallint", "since": "timestamptz", "until": "timestamptz"}
_LINE_KEYS: Final = {"partition": "smallint", "source": "text", "event_id": "text", "revision": "integer"}
_PAYMENT_KEYS: Final = {"partition": "smallint", "payment": "text", "account": "text", "claiming": "boolean"}

_SAME_LOT: Final = "t.partition = k.partition AND t.lot_id = k.lot_id AND t.account = k.account"
_SAME_HOLD: Final = "t.partition = k.partition AND t.hold_id = k.hold_id"
_SAME_LINE: Final = (
    "t.partition = k.partition AND t.source = k.source AND t.event_id = k.event_id AND t.revision = k.revision"
)
_SAME_TREE: Final = "split_part(t.account, '/', 1) = split_part(k.account, '/', 1)"
# A claim has to know if the payment is another tree's.
_PAYMENT: Final = (
    f"t.partition = k.partition AND t.payment = k.payment AND ((k.claiming AND t.paid > 0) OR {_SAME_TREE})"
)
_CLAIM: Final = f"t.partition = k.partition AND t.payment = k.payment AND {_SAME_TREE}"
# A grant changes its payment's other lots only if something has been claimed.
_CLAIMED: Final = """
(k.claiming OR (
    SELECT true FROM payments p
    WHERE p.partition = k.partition AND p.payment = k.payment AND (p.claimed > 0 OR p.disputed > 0) LIMIT 1
))
"""
# Accounts with lots that refer to a payment.
_PAID_ACCOUNTS: Final = f"""
SELECT DISTINCT t.partition, t.account
FROM {{keys}} JOIN lots t ON t.partition = k.partition AND t.reference = k.payment AND {_SAME_TREE} AND {_CLAIMED}
"""
# Of an account in use: what is not spent, and what ended so lately that a late charge may ask for it.
_ACCOUNT_LOTS: Final = """
WITH a AS ({accounts})
SELECT {columns} FROM a JOIN lots t USING (partition, account) WHERE NOT t.spent
UNION ALL
SELECT {columns} FROM a JOIN heads h USING (partition) JOIN lots t USING (partition, account)
WHERE t.spent AND (t.rule_id IS NOT NULL OR t.expired > 0) AND t.expires_at > h.recorded_at - interval '{late_grace}'
"""
_PAST_LOTS: Final = """
t.partition = k.partition AND t.account = k.account AND t.spent AND (t.rule_id IS NOT NULL OR t.expired > 0)
AND t.expires_at > k.at AND (t.effective_at IS NULL OR t.effective_at <= k.at)
"""
# Of an ended hold, and only for its own account: what it had earmarked.
_EARMARKED: Final = """
SELECT {columns} FROM {keys}
JOIN holds h ON h.partition = k.partition AND h.hold_id = k.hold_id AND h.account = k.account AND h.status <> 'placed'
JOIN hold_lots e ON e.partition = h.partition AND e.hold_id = h.hold_id
JOIN lots t ON t.partition = e.partition AND t.lot_id = e.lot_id
"""
_OVERDUE: Final = f"""
FROM (
    SELECT o.partition, o.hold_id FROM {{keys}} CROSS JOIN LATERAL (
        SELECT * FROM holds h
        WHERE h.partition = k.partition AND h.status = 'placed' AND h.expires_at BETWEEN k.since AND k.until
        ORDER BY h.expires_at FETCH FIRST {OVERDUE_READ_MAX} ROWS WITH TIES
    ) o
) o
"""
# What lines took from.
_LINE_LOTS: Final = f"""
WITH taken AS (
    SELECT DISTINCT t.partition, (part ->> 2)::uuid AS lot_id
    FROM {{keys}} JOIN charge_lines t ON {_SAME_LINE} AND t.account = k.account,
         jsonb_array_elements(t.split::jsonb) AS part
)
SELECT {{columns}} FROM taken JOIN lots t USING (partition, lot_id)
"""
# What refers to a payment, debts in its stead, too.
_PAID_LOTS: Final = f"""
SELECT {{columns}} FROM {{keys}}
JOIN lots t ON t.partition = k.partition AND t.reference = k.payment AND {_SAME_TREE} AND {_CLAIMED}
"""


def _statement(text: str, *, table: Table | None = None, keys: Mapping[str, str]) -> bytes:
    """A statement in which {keys} stands for the keys `k`, and {columns} for all columns of the table's rows `t`."""
    columns = "" if table is None else ", ".join(f"t.{column.name}" for column in table.columns)
    accounts = _PAID_ACCOUNTS if keys is _PAYMENT_KEYS else "SELECT * FROM {keys}"
    grace = f"{LATE_GRACE.total_seconds():.0f} seconds"
    filled = text.replace("{late_grace}", grace).replace("{accounts}", accounts)
    filled = filled.replace("{keys}", _keys(keys)).replace("{columns}", columns)
    return _numbered(filled)


_OF_PAID_ACCOUNT: Final = "SELECT {columns} FROM ({accounts}) k JOIN"
_LOAD: Final[Mapping[str, bytes]] = {
    "accounts": _select(tables.accounts, keys=_ACCOUNT_KEYS),
    "wallets": _select(tables.wallets, keys=_ACCOUNT_KEYS),
    "rules": _select(tables.rules, keys=_ACCOUNT_KEYS),
    "account_lots": _statement(_ACCOUNT_LOTS, table=tables.lots, keys=_ACCOUNT_KEYS),
    "holds": _select(tables.holds, keys=_HOLD_KEYS, on=_SAME_HOLD),
    "hold_lots": _select(tables.hold_lots, keys=_HOLD_KEYS, on=_SAME_HOLD),
    "earmarked": _statement(_EARMARKED, table=tables.lots, keys=_HOLD_KEYS),
    "overdue": _statement(
        f"SELECT {{columns}} {_OVERDUE} JOIN holds t USING (partition, hold_id)", table=tables.holds, keys=_TIME_KEYS
    ),
    "overdue_lots": _statement(
        f"SELECT {{columns}} {_OVERDUE} JOIN hold_lots t USING (partition, hold_id)",
        table=tables.hold_lots,
        keys=_TIME_KEYS,
    ),
    "next_deadline": _statement(
        """
        SELECT k.partition, (
            SELECT min(h.expires_at) FROM holds h
            WHERE h.partition = k.partition AND h.status = 'placed' AND h.expires_at > k.until
        ) FROM {keys}
        """,
        keys=_TIME_KEYS,
    ),
    "payments": _select(tables.payments, keys=_PAYMENT_KEYS, on=_PAYMENT),
    "claims": _select(tables.claims, keys=_PAYMENT_KEYS, on=_CLAIM),
    "paid_accounts": _statement(
        f"{_OF_PAID_ACCOUNT} accounts t USING (partition, account)", table=tables.accounts, keys=_PAYMENT_KEYS
    ),
    "paid_wallets": _statement(
        f"{_OF_PAID_ACCOUNT} wallets t USING (partition, account)", table=tables.wallets, keys=_PAYMENT_KEYS
    ),
    "paid_rules": _statement(
        f"{_OF_PAID_ACCOUNT} rules t USING (partition, account)", table=tables.rules, keys=_PAYMENT_KEYS
    ),
    "paid_account_lots": _statement(_ACCOUNT_LOTS, table=tables.lots, keys=_PAYMENT_KEYS),
    "paid_lots": _statement(_PAID_LOTS, table=tables.lots, keys=_PAYMENT_KEYS),
    "lots": _select(tables.lots, keys=_LOT_KEYS, on=_SAME_LOT),
    "repaying": _select(tables.lots, keys=_LOT_KEYS, on=_SAME_LOT),
    "past_lots": _select(tables.lots, keys=_PAST_KEYS, on=_PAST_LOTS),
    "past_lines": _statement(
        f"""
        SELECT t.partition, t.source, t.event_id, t.revision, t.account, t.occurred_at, t.hold_id, t.amounts, t.split
        FROM {{keys}} JOIN charge_lines t ON {_SAME_LINE}
        """,
        keys=_LINE_KEYS | {"account": "text"},
    ),
    "reversals": _statement(
        f"""
        SELECT t.partition, t.source, t.event_id, t.revision, t.split
        FROM (SELECT DISTINCT partition, source, event_id, revision FROM {{keys}}) k
        JOIN reversals t ON {_SAME_LINE} ORDER BY t.batch, t.position
        """,
        keys=_LINE_KEYS | {"account": "text"},
    ),
    "line_lots": _statement(_LINE_LOTS, table=tables.lots, keys=_LINE_KEYS | {"account": "text"}),
    "commands": _statement(
        """
        SELECT t.partition, t.principal, t.idempotency_key, t.body_hash, t.outcome
        FROM {keys} JOIN commands t USING (partition, principal, idempotency_key)
        """,
        keys=_COMMAND_KEYS,
    ),
    "lines": _statement(
        f"""
        SELECT t.partition, t.source, t.event_id, t.revision,
               t.account, t.occurred_at, t.hold_id::text, t.scope, t.price_version, t.own_key, t.amounts
        FROM {{keys}} JOIN charge_lines t ON {_SAME_LINE}
        """,
        keys=_LINE_KEYS,
    ),
    "bundles": _statement(
        "SELECT t.partition, t.number, t.body_hash FROM {keys} JOIN bundles t USING (partition, number)",
        keys={"partition": "smallint", "number": "bigint"},
    ),
}

# What is seldom there already, and how many columns its keys have.
_KEYS: Final = {"commands": 3, "holds": 3, "lines": 4}
# Which of these keys there are: what was asked for, and its place in the arrays.
_KNOWN: Final = _numbered(
    """
    SELECT 'commands', k.place
    FROM unnest(%s::smallint[], %s::text[], %s::text[])
         WITH ORDINALITY AS k (partition, principal, idempotency_key, place)
    JOIN commands t USING (partition, principal, idempotency_key)
    UNION ALL
    SELECT 'holds', k.place
    FROM unnest(%s::smallint[], %s::uuid[], %s::text[]) WITH ORDINALITY AS k (partition, hold_id, account, place)
    JOIN holds t USING (partition, hold_id)
    UNION ALL
    SELECT 'lines', k.place
    FROM unnest(%s::smallint[], %s::text[], %s::text[], %s::integer[])
         WITH ORDINALITY AS k (partition, source, event_id, revision, place)
    JOIN charge_lines t USING (partition, source, event_id, revision)
    """
)

# By what is needed: the statements that read it.
_LOADED_BY: Final[Mapping[str, tuple[str, ...]]] = {
    "accounts": ("accounts", "wallets", "rules", "account_lots"),
    "holds": ("holds", "hold_lots", "earmarked"),
    "overdue": ("overdue", "overdue_lots", "next_deadline"),
    "payments": (
        "payments",
        "claims",
        "paid_accounts",
        "paid_wallets",
        "paid_rules",
        "paid_account_lots",
        "paid_lots",
    ),
    "lots": ("lots",),
    "repaying": ("repaying",),
    "past_lots": ("past_lots",),
    "past_lines": ("past_lines", "reversals", "line_lots"),
    "commands": ("commands",),
    "lines": ("lines",),
    "bundles": ("bundles",),
}

# By statement: what its rows are to `projections.add_rows`.
_LOADED_AS: Final[Mapping[str, str]] = {
    "accounts": "accounts",
    "paid_accounts": "accounts",
    "wallets": "wallets",
    "paid_wallets": "wallets",
    "rules": "rules",
    "paid_rules": "rules",
    "account_lots": "lots",
    "paid_account_lots": "lots",
    "earmarked": "lots",
    "paid_lots": "lots",
    "lots": "lots",
    "repaying": "lots",
    "past_lots": "lots",
    "line_lots": "lots",
    "holds": "holds",
    "overdue": "holds",
    "hold_lots": "hold_lots",
    "overdue_lots": "hold_lots",
    "payments": "payments",
    "claims": "claims",
    "past_lines": "past_lines",
    "reversals": "reversals",
}
