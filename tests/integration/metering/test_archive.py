"""Old use goes to files and comes back, row by row as it was; nothing is dropped that is not there, whoever dies."""

import json
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import httpx2
import psycopg
import pytest
from psycopg import Connection, sql
from psycopg.rows import TupleRow
from pydantic import SecretStr

from contracts.partition import partition_of
from contracts.pricing import OwnPrice, Tier
from services.kit.catalogue import load_catalogue
from services.kit.clock import now
from services.kit.database import Writer
from services.kit.database_setup import bootstrap, migrate
from services.metering import handlers, store, translate
from services.metering.handlers import Known
from services.metering.portability import archiving
from services.metering.portability.archiving import ArchivedMonth, ArchiveInUse, archive_usage
from services.metering.portability.files import MANIFEST, BadArchive, find_months
from services.metering.portability.restoring import NotTheSame, RestoredMonth, restore_usage
from tests.conftest import Database
from tests.integration.metering.correcting import correct, named, undo
from tests.integration.metering.driving import Driver, Json, batch_of
from tests.unit.metering.building import event

pytestmark = pytest.mark.anyio

OPEN: Final = ("acme", "acme/ml", "other")
BEFORE: Final = date(2026, 3, 1)
JANUARY, FEBRUARY, MARCH = date(2026, 1, 1), date(2026, 2, 1), date(2026, 3, 1)
# What must be as it was when it comes back.
TABLES: Final = ("usage_log", "seen", "set_aside", "conflicts", "outbox", "heads", "relayed", "ingest_counters")
PRICED: Final = datetime(2025, 12, 1, tzinfo=UTC)
UNICODE: Final = 'ü"\\ \U0001f642 \u2028\ttab'


def uses(count: int = 240) -> list[Json]:
    """Use of January to March, of model calls and of others, on few days."""
    chance = random.Random(11)
    found = []
    for number in range(count):
        day = chance.choice((1, 2, 31, 32, 45, 60, 61))
        at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(
            days=day - 1, seconds=chance.randrange(86_400), microseconds=number
        )
        made = event(number, subject=chance.choice(OPEN), time=at.isoformat())
        if number % 5 == 0:
            made |= {
                "type": "build",
                "data": {"cost": 1.10, "big": 10**30, "tiny": 1e-7, "name": UNICODE, "none": None},
            }
        found.append(made)
    return found


async def log(driver: Driver, writer: Writer, found: list[Json]) -> None:
    catalogue = load_catalogue(driver.settings.catalogue_file)
    book = translate.read_price_book(catalogue.section("price_versions"), units=catalogue.units)
    build = OwnPrice(
        id="builds", type="build", unit="usd", kind="per_unit", tiers=(Tier(up_to=None, price=Decimal("0.10")),)
    )
    book = book.extended([replace(book.versions[0], id="builds", effective_at=PRICED, prices=(build,))])
    async with writer.transaction() as connection:
        for account in OPEN:
            await store.add_to_directory(connection, partition=partition_of(account), account=account, opened_at=now())
    # Of one, and of many: with bundles of several lines.
    for place in range(0, len(found), 80):
        await handlers.ingest(batch_of(found[place : place + 80], price_book=book), writer=writer, known=Known())


@pytest.fixture
def owner(database: Database) -> Iterator[Connection[TupleRow]]:
    with psycopg.connect(
        database.url("metering_owner").get_secret_value(), autocommit=True, options="-c timezone=UTC"
    ) as connection:
        yield connection


@dataclass(frozen=True, slots=True)
class Archive:
    """Where use is archived to, and by whom."""

    database: Database
    directory: Path

    def archive(self, *, drop: bool = False, dry_run: bool = False, before: date = BEFORE) -> list[ArchivedMonth]:
        url = self.database.url("metering_owner")
        return archive_usage(url, self.directory, before=before, drop=drop, dry_run=dry_run)

    def restore(self, *months: date) -> list[RestoredMonth]:
        return restore_usage(self.database.url("metering_owner"), self.directory, months=months)

    def files(self) -> list[Path]:
        return sorted(self.directory.rglob("*.parquet"))


@pytest.fixture
def kept(database: Database, tmp_path: Path) -> Archive:
    return Archive(database, tmp_path / "usage")


@pytest.fixture
async def logged(driver: Driver, writer: Writer, owner: Connection[TupleRow]) -> list[Json]:
    """A log with a history: versions of a use, one that has none that counts, one of a subject, all columns set."""
    found = uses()
    await log(driver, writer, found)
    changed = sorted({each["time"]: each for each in found if each["type"] != "build"}.items())
    for (_, each), version in zip(changed[:3], (1, 1, None), strict=True):
        owner.execute("UPDATE usage_log SET superseded = true WHERE event_id = %s", [each["id"]])
        if version is None:
            owner.execute(
                "UPDATE ingest_counters SET charged = charged - 1, voided = voided + 1 WHERE partition = %s",
                [partition_of(each["subject"])],
            )
        else:
            owner.execute(
                sql.SQL(
                    """
                    INSERT INTO usage_log ({names}) SELECT {values} FROM usage_log WHERE event_id = {id}
                    """
                ).format(
                    names=sql.SQL(", ").join(sql.Identifier(name) for name in _columns(owner)),
                    values=sql.SQL(", ").join(
                        sql.SQL(
                            {
                                "revision": "1",
                                "superseded": "false",
                                "posted": """'{"usd": "0.10"}'""",
                                "context": "'{\"a\": 1.50}'",
                                "subject": "'ü'",
                            }.get(name, f'"{name}"')
                        )
                        for name in _columns(owner)
                    ),
                    id=sql.Literal(each["id"]),
                )
            )
    return found


def _columns(owner: Connection[TupleRow]) -> list[str]:
    rows = owner.execute(
        "SELECT attname FROM pg_attribute WHERE attrelid = 'metering.usage_log'::regclass AND attnum > 0"
        " AND NOT attisdropped ORDER BY attnum"
    ).fetchall()
    return [name for (name,) in rows]


def dump(owner: Connection[TupleRow], *tables: str, where: str = "true") -> dict[str, list[str]]:
    """Every row, as text, in order."""
    return {
        table: [
            row for (row,) in owner.execute(f"SELECT t::text FROM {table} AS t WHERE {where} ORDER BY 1").fetchall()
        ]
        for table in tables or TABLES
    }


QUESTIONS: Final = (
    "/api/v1/meters/tokens/query?windowSize=DAY&from=2026-01-01T00:00:00Z&to=2026-04-01T00:00:00Z&groupBy=subject",
    "/api/v1/meters/tokens/query",
    "/api/v1/meters/tokens/subjects",
    "/api/v1/usage?account=*&group_by=account,day&from=2026-01-01T00:00:00Z&to=2026-04-01T00:00:00Z",
    "/api/v1/usage/history?account=acme&tree=true&from=2026-01-15T00:00:00Z&to=2026-03-15T00:00:00Z",
    "/api/v1/usage/summary?account=*&month=2026-02",
    "/api/v1/usage/calls?account=*&from=2026-02-01T00:00:00Z&to=2026-02-10T00:00:00Z",
    "/api/v1/usage/events?account=*&from=2026-01-01T00:00:00Z&to=2026-02-01T00:00:00Z&limit=1000",
)


async def ask(http: httpx2.AsyncClient, driver: Driver, question: str) -> httpx2.Response:
    return await http.get(question, headers=driver.headers("operator"))


async def test_what_is_dropped_comes_back_as_it_was_and_is_answered_as_before(
    driver: Driver,
    logged: list[Json],
    owner: Connection[TupleRow],
    kept: Archive,
) -> None:
    meter = {
        "slug": "tokens",
        "eventType": "scrip.model.used.v1",
        "aggregation": "SUM",
        "valueProperty": "$.input_tokens",
    }
    receipt = f"/api/v1/receipts/demo/{min(logged, key=lambda each: each['time'])['id']}"
    async with driver.running() as http:
        made = await http.post("/api/v1/meters", json=meter, headers=driver.headers("operator"))
        assert made.status_code in (200, 201), made.text
        answers = [(await ask(http, driver, question)).text for question in (*QUESTIONS, receipt)]
        before = dump(owner)

        dropped = kept.archive(drop=True)
        assert [(each.month, each.state) for each in dropped] == [(JANUARY, "dropped"), (FEBRUARY, "dropped")]
        assert owner.execute("SELECT count(*) FROM usage_log WHERE occurred_at < %s", [BEFORE]).fetchone() == (0,)
        assert dump(owner, "seen") == {"seen": before["seen"]}
        for question in (*QUESTIONS, receipt):
            refused = await ask(http, driver, question)
            assert refused.status_code == 409, question
            assert refused.json()["code"] == "archived", refused.text
            assert set(refused.json()["months"]) <= {"2026-01", "2026-02"}
            assert "scrip usage restore" in refused.json()["detail"]
        # What is not archived is answered, up to the very moment.
        march = "/api/v1/usage?account=*&from=2026-03-01T00:00:00Z&to=2026-04-01T00:00:00Z"
        assert (await ask(http, driver, march)).status_code == 200
        a_moment_more = "/api/v1/usage?account=*&from=2026-02-28T23:59:59.999999Z&to=2026-04-01T00:00:00Z"
        assert (await ask(http, driver, a_moment_more)).json()["months"] == ["2026-02"]

        restored = kept.restore(JANUARY)
        assert [(each.month, each.rows_restored) for each in restored] == [(JANUARY, dropped[0].rows)]
        assert (await ask(http, driver, QUESTIONS[1])).json()["months"] == ["2026-02"]
        restored = kept.restore()
        assert [each.rows_restored for each in restored] == [0, dropped[1].rows]
        assert dump(owner) == before
        assert [(await ask(http, driver, question)).text for question in (*QUESTIONS, receipt)] == answers
    assert [(each.rows_restored, each.keys_restored) for each in kept.restore()] == [(0, 0), (0, 0)]
    assert dump(owner) == before
    # And it may go again, without a file being written.
    assert [(each.state, each.files_written) for each in kept.archive(drop=True)] == [("dropped", 0)] * 2


async def test_what_is_archived_is_corrected_once_it_is_restored_and_the_refusal_says_how(
    driver: Driver, owner: Connection[TupleRow], kept: Archive
) -> None:
    january = [event(number, subject="acme", time="2026-01-15T12:00:00Z") for number in range(3)]
    first, second, third = named(0, 1, 2)
    void = {"kind": "void", "events": [first]}
    of_account = {"kind": "void", "events": [first | {"account": "acme"}]}
    amend = {"kind": "amend", "events": [second | {"data": january[1]["data"] | {"input_tokens": 7}}]}
    async with driver.running() as http:
        await driver.open("acme")
        await driver.until_open(["acme"])
        await driver.publish(january)
        await driver.until_counted(new=3, charged=3)
        await correct(http, driver, {"id": "before", "kind": "void", "events": [third]})
        kept.archive(drop=True)
        before = dump(owner, "usage_log", "outbox", "corrections")
        for number, kind in enumerate((void, of_account, amend)):
            for dry_run in (True, False):
                asked = {"id": f"c{number}", **kind}
                refused = await correct(http, driver, asked, status=409, dry_run=dry_run)
                assert (refused["code"], refused["months"]) == ("archived", ["2026-01"])
                assert "`scrip usage restore --from DIR --month 2026-01`" in refused["detail"]
        path, body = "/api/v1/corrections/before/undo", {"reason": "a try"}
        for query in ("?dry_run=true", ""):
            answer = await http.post(f"{path}{query}", json=body, headers=driver.headers("operator"))
            assert (answer.status_code, answer.json()["months"]) == (409, ["2026-01"])
        assert dump(owner, "usage_log", "outbox", "corrections") == before
        kept.restore(JANUARY)
        for number, kind in enumerate((void, amend)):
            assert (await correct(http, driver, {"id": f"c{number}", **kind}))["counts"]["corrected"] == 1
        await undo(http, driver, "before")


async def test_what_is_archived_again_is_only_what_changed(
    logged: list[Json],
    owner: Connection[TupleRow],
    kept: Archive,
) -> None:
    planned = kept.archive(dry_run=True)
    assert not (kept.directory).exists()
    first = kept.archive()
    assert [(each.rows, each.files_written) for each in planned] == [(each.rows, each.files_written) for each in first]
    assert (
        sum(each.rows for each in first)
        == owner.execute("SELECT count(*) FROM usage_log WHERE occurred_at < %s", [BEFORE]).fetchall()[0][0]
    )
    files = {path: path.read_bytes() for path in (kept.directory).rglob("*") if path.is_file()}
    assert [each.files_written for each in kept.archive()] == [0, 0]
    assert {path: path.read_bytes() for path in (kept.directory).rglob("*") if path.is_file()} == files

    (late,) = [each for each in logged if each["type"] != "build" and each["time"] >= "2026-01-31"][:1]
    owner.execute("UPDATE usage_log SET superseded = true WHERE event_id = %s", [late["id"]])
    (changed,) = [each for each in kept.archive() if each.files_written]
    assert changed.files_written == 1
    assert len(list((kept.directory).rglob("*.parquet"))) == sum(each.files for each in first)


async def test_only_days_from_before_are_archived_and_only_whole_months_dropped(
    logged: list[Json], kept: Archive, owner: Connection[TupleRow]
) -> None:
    before = dump(owner)
    january, february = kept.archive(before=date(2026, 2, 10), drop=True)
    assert (january.state, february.state) == ("dropped", "archived")
    assert february.why is not None
    assert "to its end" in february.why
    assert february.rows == sum("2026-02-01" <= each["time"] < "2026-02-10" for each in logged)
    (left, rest) = dump(owner, "usage_log")["usage_log"], before["usage_log"]
    assert set(left) < set(rest)
    assert [each.state for each in kept.archive(drop=True)] == ["dropped"]


KILLED: Final = """
import os, signal, sys
from datetime import date
from pathlib import Path
from pydantic import SecretStr
from services.metering.portability.archiving import archive_usage
from services.metering.portability.restoring import restore_usage
what, url, directory, after = sys.argv[1:]
calls = 0
def tell(done, total):
    global calls
    calls += 1
    if calls > int(after):
        os.kill(os.getpid(), signal.SIGKILL)
if what == "archive":
    archive_usage(SecretStr(url), Path(directory), before=date(2026, 3, 1), drop=True, dry_run=False, on_progress=tell)
else:
    restore_usage(SecretStr(url), Path(directory), on_progress=tell)
"""


def run_until_killed(what: str, kept: Archive, *, after: int) -> bool:
    """Whether it was killed before it was done."""
    url = kept.database.url("metering_owner").get_secret_value()
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, what, url, str(kept.directory), str(after)], check=False, timeout=60
    )
    assert ended.returncode in (0, -signal.SIGKILL)
    return ended.returncode != 0


@pytest.mark.parametrize("after", [1, 4, 7])
async def test_who_is_killed_leaves_no_half_and_the_next_finishes(
    logged: list[Json],
    owner: Connection[TupleRow],
    kept: Archive,
    after: int,
) -> None:
    before = dump(owner)
    directory = kept.directory
    assert run_until_killed("archive", kept, after=after)
    # Whatever a manifest names is whole; and nothing is gone that is in no file.
    kept.restore()
    assert dump(owner) == before
    kept.archive(drop=True)
    assert not list(directory.rglob(".*.new"))
    named = {
        directory / f"month={month:%Y-%m}" / each["name"]
        for month in find_months(directory)
        for each in json.loads((directory / f"month={month:%Y-%m}" / MANIFEST).read_bytes())["files"]
    }
    assert set(directory.rglob("*.parquet")) == named
    assert run_until_killed("restore", kept, after=after)
    assert owner.execute("SELECT count(*) FROM archived_months").fetchone() != (0,)
    kept.restore()
    assert dump(owner) == before


def spoiled(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


async def test_a_file_that_was_changed_or_is_missing_is_named_and_nothing_is_restored(
    logged: list[Json],
    owner: Connection[TupleRow],
    kept: Archive,
) -> None:
    kept.archive(drop=True)
    before = dump(owner)
    files = kept.files()
    contents = {path: path.read_bytes() for path in files[:2]}
    spoiled(files[0])
    files[1].unlink()
    with pytest.raises(BadArchive) as refused:
        kept.restore()
    for path in contents:
        assert str(path) in str(refused.value)
    assert dump(owner) == before
    for path, content in contents.items():
        path.write_bytes(content)
    # Nor is a manifest believed that is another than the one that was written.
    manifest = kept.directory / "month=2026-01" / MANIFEST
    content = manifest.read_bytes()
    manifest.write_bytes(content.replace(b'"rows": ', b'"rows":  ', 1))
    with pytest.raises(BadArchive, match=r"month=2026-01.* is not what 2026-01 was archived to"):
        kept.restore()
    manifest.write_bytes(content.replace(b"day=2026", b"../=2026", 1))
    with pytest.raises(BadArchive, match="no file of an archive"):
        kept.restore()
    manifest.write_bytes(content)
    kept.restore()
    with pytest.raises(BadArchive, match="no manifest of 2025-12"):
        kept.restore(date(2025, 12, 1))


async def test_nothing_is_dropped_whose_file_is_not_what_was_written(
    logged: list[Json],
    owner: Connection[TupleRow],
    kept: Archive,
) -> None:
    kept.archive()
    before = dump(owner)
    spoiled(kept.files()[0])
    with pytest.raises(BadArchive, match="is not what was written"):
        kept.archive(drop=True)
    assert dump(owner) == before


async def test_what_changes_while_it_is_archived_is_not_dropped(
    logged: list[Json],
    driver: Driver,
    owner: Connection[TupleRow],
    kept: Archive,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    late = (
        "INSERT INTO usage_log (partition, occurred_at, source, event_id, account, type, recorded_at, data)"
        " VALUES (1, '2026-01-05Z', 'demo', %s, 'acme', 't', now(), '{}')"
    )
    for number, hook in enumerate(("check_file", "_Month._stamp")):
        with monkeypatch.context() as patch:
            holder: Any = archiving._Month if "." in hook else archiving  # the moment in between is nobody else's
            name = hook.rpartition(".")[2]
            original = getattr(holder, name)
            added: list[str] = []

            def hooked(
                *arguments: Any, original: Any = original, added: list[str] = added, number: int = number
            ) -> Any:
                answer = original(*arguments)
                if not added:
                    added.append(f"late-{number}")
                    with psycopg.connect(kept.database.url("metering").get_secret_value(), autocommit=True) as runtime:
                        runtime.execute(late, [added[0]])
                return answer

            patch.setattr(holder, name, hooked)
            january, *february = kept.archive(drop=True)
        assert [january.state, *(each.state for each in february)] == ["archived", "dropped"][: 2 - number]
        assert january.why == "use of it came or changed meanwhile: archive again"
        assert owner.execute("SELECT count(*) FROM usage_log WHERE event_id = %s", added).fetchone() == (1,)


async def test_what_still_waits_keeps_its_month_and_what_comes_late_is_kept_beside_the_archive(
    logged: list[Json],
    driver: Driver,
    writer: Writer,
    owner: Connection[TupleRow],
    kept: Archive,
) -> None:
    await log(driver, writer, [event(900, subject="nobody-yet", time="2026-02-10T12:00:00Z")])
    january, february = kept.archive(drop=True)
    assert (january.state, february.state) == ("dropped", "archived")
    assert february.why == "1 uses of it still wait to be charged"
    # A repeat is one still, and what is new is logged and charged.
    first = min(logged, key=lambda each: each["time"])
    await log(driver, writer, [first, event(901, subject="acme", time="2026-01-02T12:00:00Z")])
    assert owner.execute(
        "SELECT event_id, bundle_number IS NULL FROM usage_log WHERE occurred_at < '2026-02-01'"
    ).fetchall() == [("use-901", False)]
    (again,) = [each for each in kept.archive(drop=True) if each.month == JANUARY]
    assert (again.state, again.rows, again.why) == (
        "left",
        1,
        "it is archived and dropped; 1 uses came since: restore it to archive them, too",
    )
    kept.restore(JANUARY)
    (again,) = [each for each in kept.archive(drop=True) if each.month == JANUARY]
    assert (again.state, again.files_written, again.rows) == ("dropped", 1, january.rows + 1)


async def test_a_metering_that_lost_everything_is_made_again_from_the_archive(
    logged: list[Json],
    driver: Driver,
    writer: Writer,
    owner: Connection[TupleRow],
    kept: Archive,
) -> None:
    await log(driver, writer, [event(900, subject="nobody-yet", time="2026-02-10T12:00:00Z")])
    kept.archive(before=date(2026, 4, 1))
    same = ("usage_log", "seen", "set_aside", "ingest_counters")
    other = Database(kept.database.admin_url, f"{kept.database.name}_other", kept.database.secret)
    bootstrap(SecretStr(other.admin_url), database=other.name, passwords=other.passwords("metering"))
    migrate(service="metering", owner_url=other.url("metering_owner"))
    try:
        restored = restore_usage(other.url("metering_owner"), kept.directory)
        assert sum(each.keys_restored for each in restored) == len(logged) + 1
        with psycopg.connect(
            other.url("metering_owner").get_secret_value(), autocommit=True, options="-c timezone=UTC"
        ) as rebuilt:
            assert dump(rebuilt, *same) == dump(owner, *same)
            # It numbers its bundles on from those that were charged.
            last = "SELECT partition, outbox_number FROM heads ORDER BY 1"
            assert rebuilt.execute(last).fetchall() == owner.execute(last).fetchall()
            assert (
                rebuilt.execute("SELECT sum(number) FROM relayed").fetchone()
                == rebuilt.execute("SELECT sum(outbox_number) FROM heads").fetchone()
            )
            before = dump(rebuilt)
            restore_usage(other.url("metering_owner"), kept.directory)
            assert dump(rebuilt) == before
    finally:
        with psycopg.connect(other.admin_url, autocommit=True) as admin:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(other.name)))


async def test_a_log_that_says_otherwise_is_left_as_it_is(
    logged: list[Json],
    owner: Connection[TupleRow],
    kept: Archive,
) -> None:
    kept.archive()
    one = next(each for each in logged if each["type"] != "build" and each["time"] >= "2026-01-31")
    owner.execute("UPDATE usage_log SET superseded = true WHERE event_id = %s", [one["id"]])
    before = dump(owner)
    with pytest.raises(NotTheSame, match=f"{one['id']} of demo otherwise"):
        kept.restore()
    assert dump(owner) == before


async def test_an_archive_of_more_than_the_log_has_is_not_written_over(
    logged: list[Json], kept: Archive, owner: Connection[TupleRow]
) -> None:
    kept.archive(drop=True)
    owner.execute("DELETE FROM archived_months")
    owner.execute(
        "INSERT INTO usage_log (partition, occurred_at, source, event_id, account, type, recorded_at, data)"
        " VALUES (1, '2026-01-05Z', 'demo', 'late', 'acme', 't', now(), '{}')"
    )
    with pytest.raises(BadArchive, match="not the archive of this log"):
        kept.archive()


async def test_one_at_a_time_archives_or_restores(
    logged: list[Json],
    kept: Archive,
) -> None:
    kept.archive()
    with archiving.working_on_log(kept.database.url("metering_owner")):
        for run in (kept.archive, kept.restore):
            with pytest.raises(ArchiveInUse):
                run()


async def test_a_log_that_others_do_not_let_go_is_not_dropped(
    logged: list[Json],
    kept: Archive,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(archiving, "LOCK_SECONDS", 0.1)
    monkeypatch.setattr(archiving, "LOCK_TRIES_MAX", 2)
    with psycopg.connect(kept.database.url("metering").get_secret_value()) as reader:
        reader.execute("SELECT count(*) FROM usage_log")
        with pytest.raises(ArchiveInUse, match="2026-01 is not dropped"):
            kept.archive(drop=True)
    assert [each.state for each in kept.archive(drop=True)] == ["dropped", "dropped"]


def test_the_service_itself_archives_nothing(database: Database) -> None:
    with psycopg.connect(database.url("metering").get_secret_value(), autocommit=True) as runtime:
        for statement in (
            "INSERT INTO archived_months VALUES ('2026-01-01', 1, '{}', '', now())",
            "DELETE FROM archived_months",
            "ALTER TABLE usage_log DETACH PARTITION usage_log_other",
            "DROP TABLE usage_log_other",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                runtime.execute(statement)
