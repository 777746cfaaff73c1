"""Laws of the record as a file: another ledger makes the same balances of it, and goes on with the same chain."""

import asyncio
import gzip
import json
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from pydantic import SecretStr

from contracts.partition import partition_of
from services.kit.database_setup import bootstrap, migrate
from services.ledger import tables
from services.ledger.audit import audit, unknown_signers
from services.ledger.domain.commands import Grant
from services.ledger.portability import RECORD, BadFile, InUse, NotEmpty, export_journal, import_journal
from services.ledger.replay import replay
from tests.conftest import Database
from tests.integration.ledger.recording import CAPS, KEYS, ROOTS, recording


@pytest.fixture
def other(database: Database) -> Iterator[Database]:
    """Another ledger, in which nothing has happened yet."""
    made = Database(database.admin_url, f"{database.name}_other", database.secret)
    bootstrap(SecretStr(made.admin_url), database=made.name, passwords=made.passwords("ledger"))
    migrate(service="ledger", owner_url=made.url("ledger_owner"))
    yield made
    with psycopg.connect(made.admin_url, autocommit=True) as admin:
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(made.name)))


@pytest.fixture
def exported(database: Database, tmp_path: Path) -> Path:
    """A file with a history."""

    async def live() -> None:
        async with recording(database.url("ledger"), seed=7) as recorder:
            await recorder.open()
            await recorder.live(80)

    asyncio.run(live())
    path = tmp_path / "journal.jsonl.gz"
    export_journal(database.url("ledger_owner"), path)
    return path


def dump(database: Database, *, partition: int | None = None) -> dict[str, list[str]]:
    """Every row of the record and the projections."""
    where = "" if partition is None else f"WHERE partition = {partition}"
    with psycopg.connect(
        database.superuser_url.get_secret_value(), options="-c timezone=UTC -c search_path=ledger"
    ) as connection:
        return {
            table.name: [
                row[0]
                for row in connection.execute(
                    sql.SQL("SELECT t::text FROM {} t {} ORDER BY 1").format(sql.Identifier(table.name), sql.SQL(where))
                )
            ]
            for table in (*RECORD, *tables.PROJECTIONS)
        }


def test_another_ledger_ends_with_the_same_record_and_the_same_balances(
    database: Database, other: Database, exported: Path
) -> None:
    seen: list[tuple[int, int]] = []
    manifest = import_journal(other.url("ledger_owner"), exported, on_progress=lambda *now: seen.append(now))
    assert not replay(other.url("ledger_owner"), swap=True).is_equal
    assert dump(other) == dump(database)
    assert any('""bundle"":' in entry for entry in dump(other)["journal"] if ",reversed," in entry)
    assert manifest.rows["journal"] == len(dump(other)["journal"]) > 300
    assert replay(other.url("ledger_owner")).is_equal
    assert audit(other.url("ledger"), keys=KEYS, caps=CAPS, processes=1).is_clean


def test_an_audit_of_what_was_imported_needs_the_key_of_the_ledger_it_comes_from(
    other: Database, exported: Path
) -> None:
    import_journal(other.url("ledger_owner"), exported)
    replay(other.url("ledger_owner"), swap=True)
    assert not audit(other.url("ledger"), keys={}, caps=CAPS, processes=1).is_clean
    assert unknown_signers(other.url("ledger"), {}) == list(KEYS)
    assert unknown_signers(other.url("ledger"), KEYS) == []


def test_what_comes_next_continues_the_chain(database: Database, other: Database, exported: Path) -> None:
    import_journal(other.url("ledger_owner"), exported)
    replay(other.url("ledger_owner"), swap=True)

    async def go_on(ledger: Database) -> None:
        async with recording(ledger.url("ledger"), seed=8) as recorder:
            recorder.later(days=200)
            recorder.keys = 1_000_000
            await recorder.accepted(Grant(account="acme", unit="usd", amount=5_000))
            await recorder.live(20)

    asyncio.run(go_on(database))
    asyncio.run(go_on(other))
    assert dump(other)["journal"] == dump(database)["journal"]
    assert audit(other.url("ledger"), keys=KEYS, caps=CAPS, processes=1).is_clean


def test_one_partition_can_be_taken_alone(database: Database, other: Database, exported: Path) -> None:
    partition = partition_of(ROOTS[1])
    export_journal(database.url("ledger_owner"), exported, partition=partition)
    import_journal(other.url("ledger_owner"), exported)
    replay(other.url("ledger_owner"), swap=True)
    alone = dump(database, partition=partition)
    found = dump(other)
    assert {name: found[name] for name in found if name != "signatures"} == {
        name: alone[name] for name in alone if name != "signatures"
    }
    assert audit(other.url("ledger"), keys=KEYS, caps=CAPS, processes=1).is_clean


def test_the_same_record_makes_the_same_file(database: Database, exported: Path, tmp_path: Path) -> None:
    export_journal(database.url("ledger_owner"), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == exported.read_bytes()


def test_nothing_is_imported_where_something_is(database: Database, other: Database, exported: Path) -> None:
    with pytest.raises(NotEmpty, match="has rows in journal already"):
        import_journal(database.url("ledger_owner"), exported)
    import_journal(other.url("ledger_owner"), exported)
    with pytest.raises(NotEmpty):
        import_journal(other.url("ledger_owner"), exported)


def test_nothing_is_imported_under_a_running_ledger(other: Database, exported: Path) -> None:
    with psycopg.connect(other.url("ledger_owner").get_secret_value(), autocommit=True) as connection:
        connection.execute("INSERT INTO leases VALUES (7, 'somebody', 1, clock_timestamp() + '1 hour')")
    with pytest.raises(InUse):
        import_journal(other.url("ledger_owner"), exported)


def changed(lines: list[bytes]) -> list[bytes]:
    return [*lines[:20], lines[20].replace(b'{"row":["', b'{"row":["1'), *lines[21:]]


def dropped(lines: list[bytes]) -> list[bytes]:
    return [*lines[:20], *lines[21:]]


def swapped(lines: list[bytes]) -> list[bytes]:
    return [*lines[:20], lines[21], lines[20], *lines[22:]]


def repeated(lines: list[bytes]) -> list[bytes]:
    return [*lines[:20], lines[19], *lines[20:]]


def nonsense(lines: list[bytes]) -> list[bytes]:
    return [*lines[:20], b"nonsense\n", *lines[20:]]


@pytest.mark.parametrize("change", [changed, dropped, swapped, repeated, nonsense])
def test_a_changed_file_is_refused_with_the_line(
    other: Database, exported: Path, change: Callable[[list[bytes]], list[bytes]]
) -> None:
    lines = gzip.decompress(exported.read_bytes()).splitlines(keepends=True)
    exported.write_bytes(gzip.compress(b"".join(change(lines))))
    with pytest.raises(BadFile, match=r"^line 21: "):
        import_journal(other.url("ledger_owner"), exported)
    assert not any(dump(other).values())


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_cut_file_is_refused_with_the_line(other: Database, exported: Path, share: float) -> None:
    whole = exported.read_bytes()
    exported.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(BadFile, match=r"^line \d+: .*cut"):
        import_journal(other.url("ledger_owner"), exported)


def test_a_file_without_its_last_line_is_refused(other: Database, exported: Path) -> None:
    lines = gzip.decompress(exported.read_bytes()).splitlines(keepends=True)
    exported.write_bytes(gzip.compress(b"".join(lines[:-1])))
    with pytest.raises(BadFile, match=rf"^line {len(lines) - 1}: .*manifest"):
        import_journal(other.url("ledger_owner"), exported)
    assert not any(dump(other).values())


def repeated_command(line: dict[str, Any]) -> list[dict[str, Any]]:
    return [line, line] if line.get("table") == "commands" else [line]


def no_text(line: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**line, "row": [*line["row"][:-1], "\0"]}] if line.get("table") == "commands" else [line]


def no_amount(line: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**line, "row": [*line["row"][:10], "9" * 30, *line["row"][11:]]}] if "row" in line else [line]


def no_number(line: dict[str, Any]) -> list[dict[str, Any]]:
    if "manifest" not in line:
        return [line]
    heads = [{**head, "outbox_number": -5} for head in line["manifest"]["heads"]]
    return [{"manifest": {**line["manifest"], "heads": heads}}]


def more_posted(line: dict[str, Any]) -> list[dict[str, Any]]:
    if line.get("table") != "journal":
        return [line]
    return [{**line, "row": [*line["row"][:10], str(int(line["row"][10]) + 1), *line["row"][11:]]}]


def no_commands(line: dict[str, Any]) -> list[dict[str, Any]]:
    return [] if line.get("table") == "commands" else [line]


def another_head(line: dict[str, Any]) -> list[dict[str, Any]]:
    if "manifest" not in line:
        return [line]
    heads = [{**head, "chain_hash": "ab" * 32} for head in line["manifest"]["heads"]]
    return [{"manifest": {**line["manifest"], "heads": heads}}]


@pytest.mark.parametrize(
    ("forge", "said"),
    [
        (repeated_command, "it says what no ledger records: duplicate key"),
        (no_text, "it says what no ledger records: .*NUL"),
        (no_amount, r"line 2: "),
        (no_number, r"line \d+: .*outbox_number"),
        (more_posted, r"line 2: the hash of partition \d+, batch 1, position 1 is not that of its columns"),
        (no_commands, r"line \d+: the manifest says"),
        (another_head, r"line \d+: the heads of the manifest are not the last entries"),
    ],
)
def test_a_file_that_was_made_of_what_no_ledger_records_is_refused(
    other: Database, exported: Path, forge: Callable[[dict[str, Any]], list[dict[str, Any]]], said: str
) -> None:
    """The sum of each line is right."""
    total, forged = blake2b(digest_size=8), []
    for line in gzip.decompress(exported.read_bytes()).splitlines():
        for fields in forge({key: said for key, said in json.loads(line).items() if key != "sum"}):
            text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()[:-1]
            total.update(text)
            forged.append(b'%b,"sum":"%b"}\n' % (text, total.hexdigest().encode()))
    exported.write_bytes(gzip.compress(b"".join(forged)))
    with pytest.raises(BadFile, match=said):
        import_journal(other.url("ledger_owner"), exported)
    assert not any(dump(other).values())
