"""Brings archived use back into the log, file by file: each is one transaction, and one that is there changes nothing.

Into a metering that has lost everything it brings back what was seen and what waits, too. It charges nothing.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Final

from psycopg import Connection, OperationalError, sql
from psycopg.rows import TupleRow
from pydantic import SecretStr

from services.metering import tables
from services.metering.portability.archiving import Progress, working_on_log
from services.metering.portability.files import (
    COLUMNS,
    LOGGED,
    ArchivedFile,
    BadArchive,
    FileColumn,
    Manifest,
    Row,
    check_file,
    find_months,
    month_directory,
    month_name,
    read_file,
    read_manifest,
)

# Use before this is in the table of what no month takes.
FIRST_MONTH: Final = date(2020, 1, 1)
FINDINGS_MAX: Final = 20


class NotTheSame(Exception):
    """The log has something else than the archive. Nothing of the file was restored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoredMonth:
    """What became of a month: of its rows, how many were not in the log."""

    month: date
    rows: int
    rows_restored: int
    keys_restored: int
    files: int


def restore_usage(
    owner_url: SecretStr,
    directory: Path,
    *,
    months: Collection[date] = (),
    on_progress: Progress = lambda _done, _all: None,
) -> list[RestoredMonth]:
    """Bring months back, or all that the archive has, as the role that owns the schema; again, nothing changes.

    All files are checked before the first is read. BadArchive, NotTheSame, ArchiveInUse.
    """
    found = find_months(directory)
    if missing := sorted(set(months) - set(found)):
        raise BadArchive(f"{directory} has no manifest of {', '.join(map(month_name, missing))}")
    with working_on_log(owner_url) as connection:
        chosen = [_Month(connection, directory, month) for month in found if not months or month in months]
        total, done = sum(each.manifest.rows for each in chosen), 0
        on_progress(0, total)
        for each in chosen:
            each.check()
        restored = []
        for each in chosen:

            def tell(rows: int, so_far: int = done) -> None:
                on_progress(so_far + rows, total)

            restored.append(each.run(tell))
            done += each.manifest.rows
    return restored


class _Month:
    """A month of an archive."""

    def __init__(self, connection: Connection[TupleRow], directory: Path, month: date) -> None:
        self._connection = connection
        self._month = month
        self._directory = month_directory(directory, month)
        read = read_manifest(self._directory)
        if read is None:
            raise BadArchive(f"{self._directory} has no manifest")
        self.manifest: Manifest = read[0]
        self._manifest_hash = read[1]
        known = {column.name: column for column in COLUMNS}
        if unknown := [name for name in self.manifest.columns if name not in known]:
            raise BadArchive(f"{self._directory} has columns that this log lacks: {', '.join(unknown)}")
        # One that was written before a column was there leaves it at its default.
        columns = [known[name] for name in self.manifest.columns]
        self._staged = _Staged(columns)

    def check(self) -> None:
        """Whether the month is what was archived, file by file; all that is wrong is named."""
        row = self._connection.execute(
            "SELECT encode(manifest_hash, 'hex') FROM archived_months WHERE month = %s", [self._month]
        ).fetchone()
        if row is not None and row[0] != self._manifest_hash:
            raise BadArchive(
                f"{self._directory} is not what {month_name(self._month)} was archived to: its manifest has the SHA-256"
                f" {self._manifest_hash}, not {row[0]}"
            )
        wrong = []
        for file in self.manifest.files:
            try:
                check_file(self._directory, file)
            except BadArchive as error:
                wrong.append(str(error))
        if wrong:
            more = f"; and {len(wrong) - FINDINGS_MAX} more" if len(wrong) > FINDINGS_MAX else ""
            raise BadArchive("; ".join(wrong[:FINDINGS_MAX]) + more)

    def run(self, on_progress: Callable[[int], None]) -> RestoredMonth:
        if self._month >= FIRST_MONTH:
            self._connection.execute("SELECT ensure_usage_month(%s)", [self._month])
        done = rows = keys = 0
        self._staged.make(self._connection)
        try:
            for file in self.manifest.files:

                def tell(so_far: int, before: int = done) -> None:
                    on_progress(before + so_far)

                added = self._restore(file, tell)
                rows, keys = rows + added[0], keys + added[1]
                done += file.rows
        finally:
            # Whose connection is gone leaves it to who makes the next.
            with suppress(OperationalError):
                self._staged.remove(self._connection)
        # Every row is there: the log may be asked about it again.
        self._connection.execute("DELETE FROM archived_months WHERE month = %s", [self._month])
        return RestoredMonth(
            month=self._month, rows=done, rows_restored=rows, keys_restored=keys, files=len(self.manifest.files)
        )

    def _restore(self, file: ArchivedFile, on_progress: Callable[[int], None]) -> tuple[int, int]:
        """All of a file, or nothing; how many rows and keys of `seen` were not there."""
        path = self._directory / file.name
        with self._connection.transaction():
            pages = read_file(self._directory, file, columns=self.manifest.columns)
            last_bundle = self._staged.fill(self._connection, pages, on_progress)
            # Before its keys: so does ingest.
            self._connection.execute("SELECT FROM heads WHERE partition = %s FOR NO KEY UPDATE", [file.partition])
            keys = self._staged.see(self._connection, path)
            rows = self._staged.log(self._connection, path, rows=file.rows)
            if keys:
                self._number_on(file.partition, last_bundle)
        return rows, keys

    def _number_on(self, partition: int, last_bundle: int) -> None:
        """In a metering that has lost everything: bundles that were published are not numbered anew."""
        row = self._connection.execute(
            """
            SELECT outbox_number, EXISTS (SELECT FROM outbox WHERE outbox.partition = heads.partition)
            FROM heads WHERE partition = %s FOR NO KEY UPDATE
            """,
            [partition],
        ).fetchone()
        if row is None or row[0] >= last_bundle:
            return
        if row[1]:
            raise NotTheSame(
                f"partition {partition} has bundles of its own, up to number {row[0]}, and the archive knows of"
                f" {last_bundle}: restore into a metering that has charged nothing yet"
            )
        self._connection.execute("UPDATE heads SET outbox_number = %s WHERE partition = %s", [last_bundle, partition])
        self._connection.execute(
            """
            INSERT INTO relayed (partition, number) VALUES (%s, %s)
            ON CONFLICT (partition) DO UPDATE SET number = excluded.number
            """,
            [partition, last_bundle],
        )


class _Staged:
    """The rows of a file in a table of their own, from where they are added to the log and to `seen`."""

    def __init__(self, columns: Sequence[FileColumn]) -> None:
        self._columns = columns
        self._bundle_number = [column.name for column in columns].index("bundle_number")
        logged = [column for column in columns if column in LOGGED]
        key = [column for column in logged if column.name in {each.name for each in tables.usage_log.primary_key}]
        self._add = sql.SQL(_ADD).format(file=_FILE, names=_joined(logged, "{}"), values=_joined(logged, "file.{}"))
        self._differing = sql.SQL(_DIFFERING).format(
            file=_FILE,
            their_key=_joined(key, "l.{}"),
            our_key=_joined(key, "file.{}"),
            theirs=_joined(logged, "l.{}"),
            ours=_joined(logged, "file.{}"),
        )

    def make(self, connection: Connection[TupleRow]) -> None:
        """Make the table. Where projections are rebuilt it is in nobody's way, and who dies leaves it to the next."""
        columns = sql.SQL(", ").join(
            sql.SQL(f"{{}} {column.sql_type}").format(sql.Identifier(column.name)) for column in COLUMNS
        )
        self.remove(connection)
        connection.execute(sql.SQL("CREATE UNLOGGED TABLE {} ({})").format(_STAGED, columns))

    def remove(self, connection: Connection[TupleRow]) -> None:
        """Remove it."""
        connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(_STAGED))

    def fill(
        self, connection: Connection[TupleRow], pages: Iterable[Sequence[Row]], on_progress: Callable[[int], None]
    ) -> int:
        """Let it have these rows alone; the highest bundle they were charged in."""
        done = last_bundle = 0
        connection.execute(sql.SQL("TRUNCATE {}").format(_STAGED))
        with (
            connection.cursor() as cursor,
            cursor.copy(sql.SQL("COPY {} ({}) FROM STDIN").format(_STAGED, _joined(self._columns, "{}"))) as copy,
        ):
            for page in pages:
                for row in page:
                    copy.write_row(row)
                    last_bundle = max(last_bundle, row[self._bundle_number] or 0)
                done += len(page)
                on_progress(done)
        return last_bundle

    def log(self, connection: Connection[TupleRow], path: Path, *, rows: int) -> int:
        """Add the rows to the log; how many. NotTheSame if it has one of them otherwise."""
        row = connection.execute(self._add).fetchone()
        added = 0 if row is None else int(row[0])
        if added < rows and (found := connection.execute(self._differing).fetchone()):
            raise NotTheSame(
                f"the log has use {found[1]} of {found[0]} otherwise than {path}: it was charged or corrected since,"
                " and stays as it is"
            )
        return added

    def see(self, connection: Connection[TupleRow], path: Path) -> int:
        """Add the keys to `seen`, and what goes with those that are new; how many. NotTheSame."""
        row = connection.execute(sql.SQL(_SEE).format(file=_FILE)).fetchone()
        if found := connection.execute(sql.SQL(_SEEN_OTHERWISE).format(file=_FILE)).fetchone():
            raise NotTheSame(f"use {found[1]} of {found[0]} was seen with other contents than {path} has")
        return 0 if row is None else int(row[0])


_STAGED: Final = sql.Identifier("metering_shadow", "restored_usage")
_FILE: Final = sql.SQL("{} AS file").format(_STAGED)

_ADD: Final = """
WITH added AS (
    INSERT INTO usage_log ({names}) SELECT {values} FROM {file} ON CONFLICT DO NOTHING RETURNING 1
) SELECT count(*) FROM added
"""

_DIFFERING: Final = """
SELECT source, event_id FROM {file} WHERE NOT EXISTS (
    SELECT FROM usage_log AS l WHERE ({their_key}) = ({our_key}) AND ROW({theirs})::text = ROW({ours})::text
) LIMIT 1
"""

# In the order of their keys, as everybody claims them. Of a use's versions the one that counts, if any does.
_SEE: Final = """
WITH uses AS MATERIALIZED (
    SELECT DISTINCT ON (partition, source, event_id) * FROM {file} WHERE seen_body_hash IS NOT NULL
    ORDER BY partition, source, event_id, superseded
), added AS (
    INSERT INTO seen (partition, source, event_id, body_hash, occurred_at)
    SELECT partition, source, event_id, seen_body_hash, seen_occurred_at FROM uses
    ORDER BY partition, source, event_id ON CONFLICT DO NOTHING RETURNING partition, source, event_id
), new AS (
    SELECT uses.* FROM uses JOIN added USING (partition, source, event_id)
), waiting AS (
    INSERT INTO set_aside (partition, source, event_id, account, occurred_at, reason, key, recorded_at)
    SELECT partition, source, event_id, account, seen_occurred_at, waits_reason, waits_key, waits_recorded_at
    FROM new WHERE waits_reason IS NOT NULL ON CONFLICT DO NOTHING
), counted AS (
    INSERT INTO ingest_counters AS c
        (partition, source, new, duplicate, conflicting, dead, unattributed, unpriced, charged, voided)
    SELECT partition, source, count(*), 0, 0, 0, count(*) FILTER (WHERE waits_reason = 'unattributed'),
           count(*) FILTER (WHERE waits_reason = 'unpriced'),
           count(*) FILTER (WHERE waits_reason IS NULL AND superseded IS NOT TRUE), count(*) FILTER (WHERE superseded)
    FROM new GROUP BY partition, source ORDER BY partition, source
    ON CONFLICT (partition, source) DO UPDATE SET
        new = c.new + excluded.new, charged = c.charged + excluded.charged,
        unattributed = c.unattributed + excluded.unattributed, unpriced = c.unpriced + excluded.unpriced,
        voided = c.voided + excluded.voided
)
SELECT count(*) FROM new
"""

_SEEN_OTHERWISE: Final = """
SELECT file.source, file.event_id FROM {file} JOIN seen AS s
    ON (s.partition, s.source, s.event_id) = (file.partition, file.source, file.event_id)
WHERE s.body_hash <> file.seen_body_hash LIMIT 1
"""


def _joined(columns: Sequence[FileColumn], form: str) -> sql.Composable:
    return sql.SQL(", ").join(sql.SQL(form).format(sql.Identifier(column.name)) for column in columns)
