"""Every Postgres role really tries every verb on every table of every schema, and every function.

What it may do is written out here, not read from the migrations: a new table, column rule or function without a line
here fails. Whatever succeeds is rolled back.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Final, NamedTuple

import psycopg
import pytest
from psycopg import Connection, sql
from psycopg.conninfo import make_conninfo
from psycopg.rows import TupleRow

from tests.conftest import SERVICES, Database

READ: Final = "SELECT"
ADD: Final = "SELECT INSERT"
KEEP: Final = "SELECT INSERT UPDATE"
ALL: Final = "SELECT INSERT UPDATE DELETE"
EVERYTHING: Final = "SELECT INSERT UPDATE DELETE TRUNCATE"

# The plumbing that every service has.
_COORDINATION: Final = {
    "schema_version": READ,
    "leases": ALL,
    "members": ALL,
    "relayed": KEEP,
}
_DEAD_LETTERS: Final = {"dead_letters": "SELECT INSERT UPDATE(redriven_at,redriven_by)"}

# What the runtime role of a service may do with each table of its schema. With those of the others: nothing.
RUNTIME: Final[Mapping[str, Mapping[str, str]]] = {
    "metering": {
        **_COORDINATION,
        **_DEAD_LETTERS,
        "heads": "SELECT UPDATE(outbox_number,recorded_at)",
        "seen": ADD,
        # Only through the whole table.
        **{f"seen_{part}": "" for part in range(8)},
        "usage_log": "SELECT INSERT UPDATE(amounts,bundle_number,line_items,line_number,price_version,superseded)",
        "usage_log_other": "",
        "usage_log_2026_01": "",
        "set_aside": "SELECT INSERT UPDATE(key,reason) DELETE",
        "conflicts": "SELECT INSERT UPDATE(times)",
        "directory": ADD,
        "aliases": "SELECT INSERT UPDATE(pending) DELETE",
        "reroutes": "SELECT INSERT DELETE",
        "answers": "SELECT INSERT DELETE",
        "ingest_counters": (
            "SELECT INSERT"
            " UPDATE(charged,conflicting,dead,duplicate,new,rerouted,unattributed,unmapped,unpriced,voided)"
        ),
        "price_versions": ADD,
        "meter_versions": ADD,
        "price_counters": "SELECT INSERT UPDATE(credit,quantity)",
        "corrections": (
            "SELECT INSERT UPDATE(counts,cursor,difference,finished_at,state,undo_reason,undone_at,undone_by)"
        ),
        "correction_items": "SELECT INSERT UPDATE(stands_as,undone,undone_revision)",
        "correction_events": "SELECT INSERT DELETE",
        # Written by the owner, who drops months and brings them back.
        "archived_months": READ,
        # The bundles are the record of what was charged.
        "outbox": ADD,
    },
    "ledger": {
        **_COORDINATION,
        **_DEAD_LETTERS,
        "heads": "SELECT UPDATE(batch,chain_hash,charges_number,epoch,outbox_number,recorded_at)",
        "journal": ADD,
        "commands": ADD,
        "bundles": ADD,
        "charge_lines": ADD,
        "reversals": ADD,
        "signatures": ADD,
        "accounts": KEEP,
        "wallets": KEEP,
        "rules": KEEP,
        "lots": KEEP,
        "holds": KEEP,
        "hold_lots": KEEP,
        "payments": KEEP,
        "claims": KEEP,
        "outbox": "SELECT INSERT DELETE",
    },
    "billing": {
        **_COORDINATION,
        **_DEAD_LETTERS,
        "heads": "SELECT UPDATE(outbox_number,recorded_at)",
        "stripe_events": "SELECT INSERT UPDATE(deliveries,detail,failures,payment,processed_at,status)",
        "listed_refunds": ADD,
        "checkouts": "SELECT INSERT UPDATE(expires_at,session,url)",
        "payments": KEEP,
        "claims": "SELECT INSERT UPDATE(claimed_minor,number,state,told_amount,told_state)",
        "resolutions": ADD,
        "outbox": ADD,
    },
    "keyvault": {
        **_COORDINATION,
        "heads": "SELECT UPDATE(outbox_number,recorded_at)",
        # Deleting a secret is what deleting means here.
        "secrets": ALL,
        "access_keys": "SELECT INSERT UPDATE(disabled_at,disabled_by,disabled_reason,last_used_at)",
        "policies": KEEP,
        "audit": ADD,
        "secret_uses": "SELECT INSERT UPDATE(times)",
        "outbox": "SELECT INSERT DELETE",
    },
}

# What a trigger refuses to everybody, the owner of the table and the superuser included.
NEVER: Final[Mapping[str, Mapping[str, str]]] = {
    "metering": {
        "seen": "UPDATE DELETE TRUNCATE",
        **{f"seen_{part}": "UPDATE DELETE TRUNCATE" for part in range(8)},
        "usage_log": "UPDATE DELETE TRUNCATE",
        "usage_log_other": "UPDATE DELETE TRUNCATE",
        "usage_log_2026_01": "UPDATE DELETE TRUNCATE",
        "price_versions": "UPDATE DELETE TRUNCATE",
        "meter_versions": "UPDATE DELETE TRUNCATE",
        "corrections": "DELETE TRUNCATE",
        "correction_items": "DELETE TRUNCATE",
    },
    "ledger": dict.fromkeys(
        ("journal", "commands", "bundles", "charge_lines", "reversals", "signatures"), "UPDATE DELETE TRUNCATE"
    ),
    "billing": {
        "stripe_events": "UPDATE DELETE TRUNCATE",
        "resolutions": "UPDATE DELETE TRUNCATE",
        "listed_refunds": "UPDATE DELETE TRUNCATE",
        # What may change of these is their own tests' affair.
        "payments": "DELETE TRUNCATE",
        "claims": "DELETE TRUNCATE",
        "checkouts": "DELETE TRUNCATE",
    },
    "keyvault": {"audit": "UPDATE DELETE TRUNCATE"},
}

# Every function, and whether the runtime role of its service may call it. Nobody else but its owner may.
FUNCTIONS: Final[Mapping[str, Mapping[str, bool]]] = {
    "metering": {
        "ensure_usage_month": True,
        "take_from_log": True,
        "refuse_change": False,
        "only_charge_once": False,
        "only_move_to_account": False,
    },
    "ledger": {"advance_heads": True, "batch_at": True, "refuse_change": False},
    "billing": {"refuse_change": False, "keep_the_event": False, "grant_once": False},
    "keyvault": {"refuse_change": False},
}

# --- Trying it. ---


class Column(NamedTuple):
    """A column, a value that it can have and another one, in SQL."""

    name: str
    required: bool
    one: str
    other: str


class Place(NamedTuple):
    """A table of a service."""

    schema: str
    table: str

    @property
    def quoted(self) -> sql.Identifier:
        return sql.Identifier(self.schema, self.table)


Columns = Mapping[Place, list[Column]]

_VALUES: Final = {
    "smallint": ("1", "2"),
    "integer": ("1", "2"),
    "bigint": ("1", "2"),
    "numeric": ("1", "2"),
    "text": ("'one'", "'other'"),
    "boolean": ("false", "true"),
    "bytea": ("decode(repeat('01', 32), 'hex')", "decode(repeat('02', 32), 'hex')"),
    "uuid": ("'00000000-0000-7000-8000-000000000001'", "'00000000-0000-7000-8000-000000000002'"),
    "jsonb": ("'{}'", "'[]'"),
    "text[]": ("'{}'", "'{other}'"),
    "date": ("'2026-01-01'", "'2026-02-01'"),
    "timestamp with time zone": ("'2026-01-02Z'", "'2026-01-03Z'"),
    "character varying(32)": ("'one'", "'other'"),
}


# Rows beyond the one of ones: every part of a partitioned table has some. What breaks a constraint else.
_ROWS: Final[Mapping[Place, list[dict[str, str]]]] = {
    Place("metering", "seen"): [{"partition": str(partition)} for partition in range(64)],
    Place("metering", "corrections"): [{"kind": "'void'", "state": "'done'"}],
    Place("metering", "usage_log"): [{}, {"occurred_at": "'2000-01-01Z'"}],
    Place("ledger", "journal"): [{"unit": "'usd'"}],
    Place("ledger", "signatures"): [{"signature": "decode(repeat('01', 64), 'hex')"}],
    Place("billing", "payments"): [{"status": "'unpaid'"}],
}


@pytest.fixture
def columns(database: Database) -> Columns:
    """All tables with their columns. Those that never lose a row have some: a trigger has something to refuse."""
    with psycopg.connect(database.url("metering").get_secret_value()) as metering:
        metering.execute("SELECT ensure_usage_month('2026-01-01')")
    with psycopg.connect(database.superuser_url.get_secret_value()) as superuser:
        found = columns_of(superuser)
        # No trigger and no foreign key hinders.
        superuser.execute("SET session_replication_role = replica")
        for place, listed in found.items():
            if place.table in NEVER.get(place.schema, {}) and not is_part(place):
                for row in _ROWS.get(place, [{}]):
                    insert(superuser, place, {**{each.name: each.one for each in listed if each.required}, **row})
    return found


def is_part(place: Place) -> bool:
    """A part of a partitioned table is filled through the whole."""
    return place.schema == "metering" and place.table.startswith(("seen_", "usage_log_"))


def insert(connection: Connection[TupleRow], place: Place, row: Mapping[str, str]) -> None:
    names = sql.SQL(", ").join(sql.Identifier(name) for name in row)
    values = ", ".join(row.values())
    connection.execute(sql.SQL("INSERT INTO {} ({}) SELECT {}").format(place.quoted, names, trusted(values)))


def trusted(text: str) -> sql.SQL:
    """A text of this file as SQL."""
    return sql.SQL(text)


def columns_of(connection: Connection[TupleRow]) -> Columns:
    """Everything that holds rows, system catalogues left out."""
    columns: dict[Place, list[Column]] = defaultdict(list)
    rows = connection.execute(
        """
        SELECT nspname, relname, attname, attnotnull AND NOT atthasdef, format_type(atttypid, atttypmod)
        FROM pg_attribute JOIN pg_class c ON c.oid = attrelid JOIN pg_namespace n ON n.oid = relnamespace
        WHERE relkind NOT IN ('i', 'I', 'c') AND attnum > 0 AND NOT attisdropped
          AND nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast') AND nspname NOT LIKE 'pg_temp%'
        ORDER BY nspname, relname, attnum
        """
    )
    for schema, table, column, required, kind in rows:
        columns[Place(schema, table)].append(Column(column, required, *_VALUES[kind]))
    return columns


class Role:
    """A connection as a role, which tries statements and keeps none of their effects."""

    def __init__(self, connection: Connection[TupleRow]) -> None:
        self._connection = connection

    def error(self, statement: str | sql.Composable) -> type[psycopg.Error] | None:
        """Execute the statement, roll it back, and say how it failed."""
        text = statement if isinstance(statement, str) else statement.as_string(self._connection)
        try:
            self._connection.execute(trusted(f"BEGIN; {text}; ROLLBACK"))
        except psycopg.Error as error:
            self._connection.rollback()
            return type(error)
        return None

    def may(self, statement: str | sql.Composable) -> bool:
        """Whether permissions let the statement through, whatever becomes of it then."""
        return self.error(statement) is not psycopg.errors.InsufficientPrivilege

    def verbs(self, place: Place, columns: list[Column]) -> str:
        """What the role may do with a table, as the expectations put it."""
        updates = sorted(each.name for each in columns if self.may(update(place, each)))
        verbs = {
            "SELECT": self.may(statement("SELECT * FROM {} LIMIT 0", place)),
            "INSERT": self.may(statement("INSERT INTO {} DEFAULT VALUES", place)),
            "UPDATE" if len(updates) == len(columns) else f"UPDATE({','.join(updates)})": bool(updates),
            "DELETE": self.may(statement("DELETE FROM {}", place)),
            "TRUNCATE": self.may(statement("TRUNCATE {} CASCADE", place)),
        }
        return " ".join(verb for verb, may in verbs.items() if may)


def statement(text: str, place: Place) -> sql.Composed:
    return trusted(text).format(place.quoted)


def update(place: Place, column: Column) -> sql.Composed:
    return sql.SQL("UPDATE {} SET {} = {}").format(place.quoted, sql.Identifier(column.name), trusted(column.other))


@pytest.fixture
def roles(database: Database) -> Iterator[Mapping[str, Role]]:
    """Every role there is: of each service the one that runs and the one that owns; and the superuser."""
    urls = {role: database.url(role) for service in SERVICES for role in (service, f"{service}_owner")}
    with ExitStack() as stack:
        yield {
            name: Role(stack.enter_context(psycopg.connect(url.get_secret_value(), autocommit=True)))
            for name, url in {**urls, "superuser": database.superuser_url}.items()
        }


def service_roles(roles: Mapping[str, Role]) -> Mapping[str, Role]:
    return {name: role for name, role in roles.items() if name != "superuser"}


def test_every_table_has_its_expectation(columns: Columns) -> None:
    found: dict[str, set[str]] = defaultdict(set)
    for place in columns:
        found[place.schema].add(place.table)
    assert found == {service: set(RUNTIME[service]) for service in SERVICES}
    for service in SERVICES:
        assert set(NEVER[service]) <= found[service]


def test_a_role_does_with_every_table_what_is_listed_and_nothing_else(
    columns: Columns, roles: Mapping[str, Role]
) -> None:
    for name, role in service_roles(roles).items():
        found = {place: role.verbs(place, listed) for place, listed in columns.items()}
        service = name.removesuffix("_owner")
        own = {place for place in columns if place.schema == service}
        expected = {
            place: "" if place not in own else RUNTIME[service][place.table] if name == service else EVERYTHING
            for place in columns
        }
        assert {place: (verbs, name) for place, verbs in found.items() if verbs != expected[place]} == {}


def test_what_is_kept_for_ever_is_kept_from_its_owner_and_from_the_superuser(
    columns: Columns, roles: Mapping[str, Role]
) -> None:
    for service in SERVICES:
        for table, verbs in NEVER[service].items():
            place = Place(service, table)
            # What the runtime role may set is set once, or again: which of them is the service's own test.
            settable = RUNTIME[service].get(table.removesuffix("_other").removesuffix("_2026_01"), "")
            tries = {
                "UPDATE": [update(place, each) for each in columns[place] if not _is_listed(each.name, settable)],
                "DELETE": [statement("DELETE FROM {}", place)],
                "TRUNCATE": [statement("TRUNCATE {} CASCADE", place)],
            }
            for role in (roles[f"{service}_owner"], roles["superuser"]):
                for verb in verbs.split():
                    assert tries[verb]
                    for each in tries[verb]:
                        assert role.error(each) is psycopg.errors.RaiseException, each


def _is_listed(column: str, verbs: str) -> bool:
    _, _, rest = verbs.partition("UPDATE(")
    return column in rest.partition(")")[0].split(",")


def test_a_table_is_altered_and_locked_by_its_owner_alone(columns: Columns, roles: Mapping[str, Role]) -> None:
    """So a trigger that keeps rows can be disabled by who migrates and by the superuser, and by no running service."""
    for name, role in service_roles(roles).items():
        assert not role.may("SET session_replication_role = replica")
        for place in columns:
            own = name == f"{place.schema}_owner"
            assert role.may(statement("ALTER TABLE {} DISABLE TRIGGER USER", place)) == own, (name, place)
            assert role.may(statement("ALTER TABLE {} ADD COLUMN spare integer", place)) == own, (name, place)
            assert role.may(statement("DROP TABLE {} CASCADE", place)) == own, (name, place)
            assert role.may(statement("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE", place)) == (
                own or (name == place.schema and may_lock(RUNTIME[name][place.table]))
            ), (name, place)


def may_lock(verbs: str) -> bool:
    """To Postgres, who may change or delete any row may also lock the whole table."""
    return any(verb in ("UPDATE", "DELETE", "TRUNCATE") for verb in verbs.split())


def test_a_function_is_called_by_whom_it_is_for(database: Database, roles: Mapping[str, Role]) -> None:
    with psycopg.connect(database.superuser_url.get_secret_value()) as superuser:
        functions = superuser.execute(
            """
            SELECT nspname, proname, ARRAY(SELECT 'NULL::' || format_type(t, NULL) FROM unnest(proargtypes) AS t)
            FROM pg_proc JOIN pg_namespace n ON n.oid = pronamespace
            WHERE nspname NOT IN ('pg_catalog', 'information_schema')
            """
        ).fetchall()
    assert {(schema, name) for schema, name, _ in functions} == {
        (service, name) for service in SERVICES for name in FUNCTIONS[service]
    }
    for schema, name, arguments in functions:
        call = sql.SQL("SELECT {}({})").format(sql.Identifier(schema, name), trusted(", ".join(arguments)))
        expected = {f"{schema}_owner", *([schema] if FUNCTIONS[schema][name] else [])}
        assert {who for who, role in service_roles(roles).items() if role.may(call)} == expected, name


def test_tables_are_made_by_the_owner_in_its_two_schemas(database: Database, roles: Mapping[str, Role]) -> None:
    with psycopg.connect(database.superuser_url.get_secret_value()) as superuser:
        schemas = {str(name) for (name,) in superuser.execute("SELECT nspname FROM pg_namespace").fetchall()}
    schemas = {name for name in schemas if not name.startswith(("pg_toast", "pg_temp"))}
    assert schemas == {
        *(schema for service in SERVICES for schema in (service, f"{service}_shadow")),
        "public",
        "pg_catalog",
        "information_schema",
    }
    for name, role in service_roles(roles).items():
        service = name.removesuffix("_owner")
        makes = {
            schema
            for schema in schemas
            if role.may(sql.SQL("CREATE TABLE {} (n integer)").format(sql.Identifier(schema, "mine")))
        }
        assert makes == ({service, f"{service}_shadow"} if name.endswith("_owner") else set()), name
        assert not role.may("CREATE SCHEMA mine")
        # A batch is copied into a temporary table first.
        assert role.may("CREATE TEMPORARY TABLE mine (n integer)") == (not name.endswith("_owner")), name


def test_what_an_owner_rebuilds_in_the_shadow_is_seen_by_nobody_else(
    database: Database, roles: Mapping[str, Role]
) -> None:
    for service in SERVICES:
        with psycopg.connect(database.url(f"{service}_owner").get_secret_value()) as owner:
            table = sql.Identifier(f"{service}_shadow", "wallets")
            owner.execute(sql.SQL("CREATE TABLE {} (n integer)").format(table))
            owner.execute(sql.SQL("GRANT ALL ON {} TO PUBLIC").format(table))
        readers = {name for name, role in roles.items() if role.may(sql.SQL("SELECT * FROM {}").format(table))}
        assert readers == {f"{service}_owner", "superuser"}


def test_no_role_is_more_than_itself(database: Database, roles: Mapping[str, Role]) -> None:
    with psycopg.connect(database.superuser_url.get_secret_value()) as superuser:
        found = superuser.execute(
            """
            SELECT rolname, rolsuper, rolcreatedb, rolcreaterole, rolreplication, rolbypassrls, rolinherit, rolcanlogin,
                   EXISTS (SELECT FROM pg_auth_members WHERE member = r.oid OR roleid = r.oid)
            FROM pg_roles r WHERE rolname !~ '^pg_' AND NOT rolsuper
            """
        ).fetchall()
        admin = superuser.info.user
    attributes = {str(row[0]): row[1:] for row in found}
    assert set(service_roles(roles)) <= set(attributes)
    for name, role in service_roles(roles).items():
        assert attributes[name] == (False, False, False, False, False, False, True, False), name
        for other in {*service_roles(roles), admin} - {name}:
            assert not role.may(sql.SQL("SET ROLE {}").format(sql.Identifier(other))), (name, other)
            assert not role.may(sql.SQL("ALTER ROLE {} PASSWORD 'x'").format(sql.Identifier(other))), (name, other)
        for forbidden in (
            "CREATE ROLE mine",
            "ALTER SYSTEM SET fsync = off",
            "COPY (SELECT 1) TO PROGRAM 'true'",
            "COPY (SELECT 1) TO '/dev/null'",
            "SELECT pg_read_file('PG_VERSION')",
            "SELECT rolpassword FROM pg_authid",
            "SELECT pg_switch_wal()",
        ):
            assert role.error(forbidden) in _REFUSED, (name, forbidden)


# ALTER SYSTEM is refused in a transaction before it is refused to a role.
_REFUSED: Final = (psycopg.errors.InsufficientPrivilege, psycopg.errors.ActiveSqlTransaction)


def test_a_service_role_gets_into_its_own_database_only(database: Database) -> None:
    """What initdb makes is everybody's by default: a service could leave tables there, or read what others left."""
    with psycopg.connect(database.superuser_url.get_secret_value()) as superuser:
        names = {str(name) for (name,) in superuser.execute("SELECT datname FROM pg_database").fetchall()}
    others = {name for name in names if not name.startswith("scrip_")}
    assert others >= {"postgres", "template1", "template0"}
    for service in SERVICES:
        for role in (service, f"{service}_owner"):
            url = database.url(role).get_secret_value()
            psycopg.connect(url).close()
            for name in others:
                with pytest.raises(psycopg.OperationalError, match=r"permission denied|not currently accepting"):
                    psycopg.connect(make_conninfo(url, dbname=name)).close()


def test_a_role_gets_in_with_its_password_only(database: Database) -> None:
    for service in SERVICES:
        for role in (service, f"{service}_owner"):
            for secret in ("", "wrong", database.url("nobody").get_secret_value()):
                with pytest.raises(psycopg.OperationalError):
                    psycopg.connect(make_conninfo(database.url(role).get_secret_value(), password=secret)).close()
