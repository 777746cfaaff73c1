"""Writes old use to files and, when that is asked for, drops whole months of it from the log.

A month is read in one snapshot. It is dropped only while every row of it is, unchanged, in files that were read back,
and none of it waits for anything; the same transaction notes that it is archived. `seen` stays as it is.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Final, Literal, NamedTuple

import psycopg
from psycopg import Connection, IsolationLevel, sql
from psycopg.errors import LockNotAvailable
from psycopg.rows import TupleRow
from psycopg.types.json import Jsonb
from pydantic import SecretStr

from services.metering import tables
from services.metering.portability.files import (
    LOGGED,
    NAMES,
    PAGE_ROWS,
    ArchivedFile,
    BadArchive,
    Manifest,
    Row,
    check_file,
    make_manifest,
    month_directory,
    month_name,
    next_month,
    read_manifest,
    remove_strays,
    write_file,
    write_manifest,
)

# How long the log's writers and readers may be held up by who waits for them, and how often it is tried.
LOCK_SECONDS: Final = 5
LOCK_TRIES_MAX: Final = 6

# Done and all rows.
Progress = Callable[[int, int], None]

State = Literal["archived", "dropped", "left"]


class ArchiveInUse(Exception):
    """Another archive or restore works on this log, or the log itself is too busy to have a month dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchivedMonth:
    """What became of a month. `why` it was left as it is, or not dropped."""

    month: date
    rows: int
    files: int
    files_written: int
    bytes: int
    amounts: Mapping[str, str]
    state: State
    why: str | None = None


class Content(NamedTuple):
    """What the log has of a partition on a day."""

    rows: int
    fingerprint: str


Contents = Mapping[tuple[date, int], Content]


def archive_usage(
    owner_url: SecretStr,
    directory: Path,
    *,
    before: date,
    drop: bool,
    dry_run: bool,
    on_progress: Progress = lambda _done, _all: None,
) -> list[ArchivedMonth]:
    """Write use from before a day, as the role that owns the schema. Again, it writes what is new.

    BadArchive, ArchiveInUse. `drop`: drop the months that are whole, too. `dry_run`: only say what would be done.
    """
    with working_on_log(owner_url) as connection:
        months = _find_months(connection, before=before)
        total, done = _estimate(connection, months), 0
        found = []
        for month in months:

            def tell(rows: int, so_far: int = done) -> None:
                on_progress(so_far + rows, max(total, so_far + rows))

            each = _Month(connection, directory, month, before=before, on_progress=tell)
            found.append(each.run(drop=drop, dry_run=dry_run))
            done += found[-1].rows
        on_progress(done, done)
    return found


@contextmanager
def working_on_log(owner_url: SecretStr) -> Iterator[Connection[TupleRow]]:
    """A connection of the only one who archives or restores. ArchiveInUse."""
    with psycopg.connect(
        owner_url.get_secret_value(),
        application_name="scrip-usage-archive",
        autocommit=True,
        # The text of a row, and so its fingerprint, depends on them.
        options="-c timezone=UTC -c datestyle=ISO -c bytea_output=hex -c search_path=metering,pg_temp",
    ) as connection:
        row = connection.execute("SELECT pg_try_advisory_lock(hashtext('metering.archive'))").fetchone()
        if row is None or not row[0]:
            raise ArchiveInUse("another archive or restore works on this log: wait for it")
        yield connection
        # Not left to the end of the connection: the server notices that only some time after it was closed here.
        connection.execute("SELECT pg_advisory_unlock(hashtext('metering.archive'))")


def find_contents(connection: Connection[TupleRow], *, since: date, until: date) -> dict[tuple[date, int], Content]:
    """What the log has of each day of each partition."""
    statement = sql.SQL(
        """
        SELECT (occurred_at AT TIME ZONE 'UTC')::date, partition, count(*),
               sum(hashtextextended(ROW({columns})::text, 0))::text
        FROM usage_log WHERE occurred_at >= %s AND occurred_at < %s GROUP BY 1, 2 ORDER BY 1, 2
        """
    ).format(columns=sql.SQL(", ").join(sql.Identifier(column.name) for column in LOGGED))
    rows = connection.execute(statement, [_instant(since), _instant(until)]).fetchall()
    return {(day, partition): Content(count, fingerprint) for day, partition, count, fingerprint in rows}


class _Month:
    """A month of the log, and its files."""

    def __init__(
        self,
        connection: Connection[TupleRow],
        directory: Path,
        month: date,
        *,
        before: date,
        on_progress: Callable[[int], None],
    ) -> None:
        self._connection = connection
        self._month = month
        self._until = min(next_month(month), before)
        self._is_whole = next_month(month) <= before
        self._directory = month_directory(directory, month)
        self._on_progress = on_progress
        self._done = 0

    def run(self, *, drop: bool, dry_run: bool) -> ArchivedMonth:
        with self._snapshot():
            contents = find_contents(self._connection, since=self._month, until=self._until)
            rows = sum(each.rows for each in contents.values())
            if self._is_archived():
                return self._left(rows)
            known = self._known(contents)
            missing = [place for place in contents if place not in known]
            if dry_run:
                manifest = make_manifest(self._month, known.values(), schema_version="")
                why = self._why_not_dropped() if drop else None
                state: State = "dropped" if drop and why is None else "archived"
                return self._said(manifest, rows=rows, files=len(contents), written=len(missing), state=state, why=why)
            manifest = self._write(contents, known)
        if not drop:
            return self._said(manifest, rows=rows, written=len(missing), state="archived")
        why = self._drop(manifest)
        return self._said(
            manifest, rows=rows, written=len(missing), state="archived" if why is not None else "dropped", why=why
        )

    def _known(self, contents: Contents) -> dict[tuple[date, int], ArchivedFile]:
        """The files that are as the log is, and those of days that are not looked at."""
        stored = read_manifest(self._directory)
        if stored is None:
            return {}
        manifest, _ = stored
        known = {}
        for file in manifest.files:
            content = contents.get((file.day, file.partition))
            is_looked_at = file.day < self._until
            if is_looked_at and (content is None or content.rows < file.rows):
                # To write what is left over it would lose what was archived.
                raise BadArchive(
                    f"{self._directory / file.name} has {file.rows} rows and the log {content.rows if content else 0}: "
                    "it is not the archive of this log, or use has moved to another account since; "
                    "name another directory"
                )
            path = self._directory / file.name
            is_there = path.is_file() and path.stat().st_size == file.bytes
            is_same = content is None or content.fingerprint == file.fingerprint
            if is_there and is_same and manifest.columns == list(NAMES):
                known[file.day, file.partition] = file
        return known

    def _write(self, contents: Contents, known: Mapping[tuple[date, int], ArchivedFile]) -> Manifest:
        """Write what is missing. The manifest is written after each day, so that who dies has not much to do again."""
        files = dict(known)
        version = self._schema_version()
        day_written: date | None = None
        for (day, partition), content in contents.items():
            if (day, partition) not in files:
                if day_written not in (None, day):
                    write_manifest(self._directory, make_manifest(self._month, files.values(), schema_version=version))
                files[day, partition] = write_file(
                    self._directory,
                    self._rows(day, partition),
                    day=day,
                    partition=partition,
                    fingerprint=content.fingerprint,
                )
                day_written = day
            else:
                self._count(content.rows)
        manifest = make_manifest(self._month, files.values(), schema_version=version)
        if day_written is not None or files.keys() != known.keys():
            write_manifest(self._directory, manifest)
        if self._directory.is_dir():
            remove_strays(self._directory, manifest)
        return manifest

    def _rows(self, day: date, partition: int) -> Iterator[Row]:
        logged = sql.SQL(", ").join(
            sql.SQL("l.{}::text" if column.is_text else "l.{}").format(sql.Identifier(column.name)) for column in LOGGED
        )
        key = sql.SQL(", ").join(
            sql.SQL("l.{}").format(sql.Identifier(each.name)) for each in tables.usage_log.primary_key
        )
        statement = sql.SQL(
            """
            SELECT {logged}, s.body_hash, s.occurred_at, w.reason, w.key, w.recorded_at
            FROM usage_log AS l
            LEFT JOIN seen AS s ON (s.partition, s.source, s.event_id) = (l.partition, l.source, l.event_id)
            LEFT JOIN set_aside AS w ON (w.partition, w.source, w.event_id) = (l.partition, l.source, l.event_id)
            WHERE l.partition = %s AND l.occurred_at >= %s AND l.occurred_at < %s ORDER BY {key}
            """
        ).format(logged=logged, key=key)
        with self._connection.cursor(name="archive") as cursor:
            cursor.itersize = PAGE_ROWS
            cursor.execute(statement, [partition, _instant(day), _instant(day + timedelta(days=1))])
            number = 0
            for number, row in enumerate(cursor, start=1):
                yield row
                if number % PAGE_ROWS == 0:
                    self._count(PAGE_ROWS)
            self._count(number % PAGE_ROWS)

    # Dropping ---------------------------------------------------------------------------------------------------------

    def _drop(self, manifest: Manifest) -> str | None:
        """Drop the month from the log; why not, if it is left."""
        if (why := self._why_not_dropped()) is not None:
            return why
        for file in manifest.files:
            check_file(self._directory, file)
        stored = read_manifest(self._directory)
        if stored is None or stored[0] != manifest:
            raise BadArchive(f"{self._directory} was changed while it was written")
        with self._snapshot():
            archived = {(each.day, each.partition): Content(each.rows, each.fingerprint) for each in manifest.files}
            if find_contents(self._connection, since=self._month, until=self._until) != archived:
                return "use of it came or changed meanwhile: archive again"
            stamp = self._stamp()
        for _ in range(LOCK_TRIES_MAX):
            try:
                return self._drop_if_still(manifest, manifest_hash=stored[1], stamp=stamp)
            except LockNotAvailable:
                continue
        raise ArchiveInUse(f"{month_name(self._month)} is not dropped: others use the log without a pause; try again")

    def _drop_if_still(self, manifest: Manifest, *, manifest_hash: str, stamp: TupleRow | None) -> str | None:
        """Let an empty table take the place of the month's: use that comes late still has where to go."""
        table = self._table()
        with self._connection.transaction():
            self._connection.execute(sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(f"{LOCK_SECONDS}s")))
            # In the order of `ensure_usage_month`. From here on nobody reads or writes the log.
            self._connection.execute("SELECT pg_advisory_xact_lock(hashtext('metering.usage_log'))")
            self._connection.execute("LOCK TABLE usage_log IN ACCESS EXCLUSIVE MODE")
            if self._stamp() != stamp:
                return "use of it came or changed meanwhile: archive again"
            if (why := self._why_not_dropped()) is not None:
                return why
            self._connection.execute(
                "INSERT INTO archived_months (month, rows, amounts, manifest_hash, recorded_at)"
                " VALUES (%s, %s, %s, decode(%s, 'hex'), clock_timestamp())",
                [self._month, manifest.rows, Jsonb(manifest.amounts), manifest_hash],
            )
            self._connection.execute(sql.SQL("ALTER TABLE usage_log DETACH PARTITION {}").format(table))
            self._connection.execute(sql.SQL("DROP TABLE {}").format(table))
            self._connection.execute("SELECT ensure_usage_month(%s)", [self._month])
        return None

    def _why_not_dropped(self) -> str | None:
        if not self._is_whole:
            return "it is not archived to its end"
        if not self._has_table():
            return "its use is in the table of what no month takes"
        waiting = self._one(
            "SELECT count(*) FROM set_aside WHERE occurred_at >= %s AND occurred_at < %s AND reason <> 'unmapped'",
            _instant(self._month),
            _instant(next_month(self._month)),
        )
        return f"{waiting} uses of it still wait to be charged" if waiting else None

    def _stamp(self) -> TupleRow | None:
        """Where each row is, and who wrote it there: it is another as soon as one is added, changed or taken away.

        Far faster than to look at the rows: it is done while everybody waits.
        """
        return self._connection.execute(
            sql.SQL("SELECT count(*), sum(hashtidextended(ctid, xmin::text::bigint))::text FROM {}").format(
                self._table()
            )
        ).fetchone()

    def _table(self) -> sql.Identifier:
        return sql.Identifier("metering", f"usage_log_{self._month:%Y_%m}")

    def _has_table(self) -> bool:
        return bool(self._one("SELECT to_regclass(%s) IS NOT NULL", f"metering.usage_log_{self._month:%Y_%m}"))

    # Reading ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def _snapshot(self) -> Iterator[None]:
        self._connection.isolation_level = IsolationLevel.REPEATABLE_READ
        self._connection.read_only = True
        try:
            with self._connection.transaction():
                yield
        finally:
            self._connection.isolation_level = None
            self._connection.read_only = None

    def _is_archived(self) -> bool:
        return bool(self._one("SELECT count(*) FROM archived_months WHERE month = %s", self._month))

    def _schema_version(self) -> str:
        return str(self._one("SELECT max(version_num) FROM schema_version"))

    def _one(self, statement: str, *parameters: object) -> object:
        row = self._connection.execute(statement, parameters).fetchone()
        return None if row is None else row[0]

    def _count(self, rows: int) -> None:
        self._done += rows
        self._on_progress(self._done)

    # Saying -----------------------------------------------------------------------------------------------------------

    def _left(self, rows: int) -> ArchivedMonth:
        why = f"it is archived and dropped; {rows} uses came since: restore it to archive them, too"
        return ArchivedMonth(
            month=self._month, rows=rows, files=0, files_written=0, bytes=0, amounts={}, state="left", why=why
        )

    def _said(
        self,
        manifest: Manifest,
        *,
        rows: int,
        written: int,
        state: State,
        files: int | None = None,
        why: str | None = None,
    ) -> ArchivedMonth:
        return ArchivedMonth(
            month=self._month,
            rows=rows,
            files=len(manifest.files) if files is None else files,
            files_written=written,
            bytes=sum(each.bytes for each in manifest.files),
            amounts=manifest.amounts,
            state=state,
            why=why,
        )


def _find_months(connection: Connection[TupleRow], *, before: date) -> Sequence[date]:
    """The months that have use from before a day, in order."""
    tables_found = connection.execute(
        """
        SELECT to_date(substr(c.relname, 11), 'YYYY_MM')
        FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid
        WHERE i.inhparent = 'metering.usage_log'::regclass AND c.relname ~ '^usage_log_[0-9]{4}_[0-9]{2}$'
        """
    ).fetchall()
    others = connection.execute(
        "SELECT DISTINCT date_trunc('month', occurred_at AT TIME ZONE 'UTC')::date FROM usage_log_other"
    ).fetchall()
    found = sorted({month for (month,) in (*tables_found, *others) if month < before})
    return [month for month in found if _has_use(connection, month, before=before)]


def _has_use(connection: Connection[TupleRow], month: date, *, before: date) -> bool:
    row = connection.execute(
        "SELECT EXISTS (SELECT FROM usage_log WHERE occurred_at >= %s AND occurred_at < %s)",
        [_instant(month), _instant(min(next_month(month), before))],
    ).fetchone()
    return row is not None and bool(row[0])


def _estimate(connection: Connection[TupleRow], months: Sequence[date]) -> int:
    """How many rows months have, as far as Postgres knows without counting."""
    row = connection.execute(
        "SELECT coalesce(sum(greatest(reltuples, 0)), 0)::bigint FROM pg_class"
        " WHERE relnamespace = 'metering'::regnamespace AND relname = ANY(%s)",
        [[f"usage_log_{month:%Y_%m}" for month in months]],
    ).fetchone()
    return 0 if row is None else int(row[0])


def _instant(day: date) -> datetime:
    return datetime.combine(day, time(), tzinfo=UTC)
