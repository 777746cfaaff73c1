"""A service's place in Postgres: its roles and schemas, and the migrations of its tables. No service imports it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import psycopg
from alembic import command
from alembic.config import Config
from psycopg import Connection, sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import TupleRow
from pydantic import SecretStr
from sqlalchemy import create_engine, pool, text

# Held by whoever creates roles and databases, and by whoever migrates a schema: two at once wait for each other.
_BOOTSTRAP_LOCK: Final = 0x5C_12_1B_00
_MIGRATE_LOCK: Final = 0x5C_12_1B_01

# What initdb makes lets everybody in.
_DATABASES_OF_INITDB: Final = ("postgres", "template1")

_SERVICES: Final = Path(__file__).resolve().parent.parent


def bootstrap(admin_url: SecretStr, *, database: str, passwords: Mapping[str, SecretStr]) -> None:
    """Create the database, and per service its schemas and two roles; run again, it only sets passwords and rights.

    `passwords` has a `<service>` and a `<service>_owner` for every service. The owner role owns the schema `<service>`
    and migrates it, and `<service>_shadow`, where it rebuilds projections; the runtime role may use the first, and each
    table as that table's migration grants it. No role of a service gets into the databases that initdb made: there
    nobody connects any more who was not granted it by name.
    """
    services = sorted(role.removesuffix("_owner") for role in passwords if role.endswith("_owner"))
    if set(passwords) != {*services, *(f"{service}_owner" for service in services)}:
        raise ValueError(f"roles come in pairs <service> and <service>_owner, not {sorted(passwords)}")
    with psycopg.connect(admin_url.get_secret_value(), autocommit=True, application_name="scrip-bootstrap") as admin:
        admin.execute("SELECT pg_advisory_lock(%s)", [_BOOTSTRAP_LOCK])
        for role, password in passwords.items():
            _set_role(admin, role=role, password=password)
        if admin.execute("SELECT 1 FROM pg_database WHERE datname = %s", [database]).fetchone() is None:
            admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database)))
        found = admin.execute("SELECT datname FROM pg_database WHERE datname = ANY(%s)", [[*_DATABASES_OF_INITDB]])
        for (name,) in found.fetchall():
            _run(admin, "REVOKE ALL ON DATABASE {name} FROM PUBLIC", name=name)
        with psycopg.connect(
            make_conninfo(admin_url.get_secret_value(), dbname=database), application_name="scrip-bootstrap"
        ) as inside:
            _set_rights(inside, database=database, services=services)


def migrate(*, service: str, owner_url: SecretStr, versions: Path | None = None) -> None:
    """Bring a service's schema to its newest version, as its owner role. Two at once wait for each other.

    One Alembic environment serves all services; each keeps its versions in `services/<service>/migrations/versions`
    and its version table in its own schema.
    """
    config = Config()
    config.set_main_option("script_location", str(_SERVICES / "kit" / "migrations"))
    config.set_main_option("path_separator", "newline")
    config.set_main_option("version_locations", str(versions or _SERVICES / service / "migrations" / "versions"))
    parameters = conninfo_to_dict(owner_url.get_secret_value())
    engine = create_engine(
        "postgresql+psycopg://",
        connect_args={**parameters, "application_name": f"scrip-migrate-{service}"},
        poolclass=pool.NullPool,
    )
    try:
        # The lock is the session's own, so that it outlives the transactions of the migration.
        with engine.connect() as connection:
            lock = {"space": _MIGRATE_LOCK, "service": service}
            connection.execute(text("SELECT pg_advisory_lock(:space, hashtext(:service))"), lock)
            connection.commit()
            config.attributes["connection"] = connection
            config.attributes["service"] = service
            command.upgrade(config, "head")
    finally:
        engine.dispose()


def _set_role(admin: Connection[TupleRow], *, role: str, password: SecretStr) -> None:
    if admin.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [role]).fetchone() is None:
        admin.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(role)))
    # Hashed here, so that no statement log of the server ever holds it.
    verifier = admin.pgconn.encrypt_password(password.get_secret_value().encode(), role.encode(), b"scram-sha-256")
    admin.execute(
        sql.SQL(
            "ALTER ROLE {} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS NOINHERIT PASSWORD {}"
        ).format(sql.Identifier(role), sql.Literal(verifier.decode()))
    )


def _set_rights(inside: Connection[TupleRow], *, database: str, services: list[str]) -> None:
    _run(inside, "REVOKE ALL ON DATABASE {database} FROM PUBLIC", database=database)
    _run(inside, "REVOKE ALL ON SCHEMA public FROM PUBLIC")
    for service in services:
        names = {
            "database": database,
            "service": service,
            "owner": f"{service}_owner",
            "shadow": f"{service}_shadow",
        }
        _run(inside, "GRANT CONNECT ON DATABASE {database} TO {owner}, {service}", **names)
        # Where a batch can be copied to first.
        _run(inside, "GRANT TEMPORARY ON DATABASE {database} TO {service}", **names)
        _run(inside, "CREATE SCHEMA IF NOT EXISTS {service} AUTHORIZATION {owner}", **names)
        # Where the owner rebuilds projections; nobody else sees it.
        _run(inside, "CREATE SCHEMA IF NOT EXISTS {shadow} AUTHORIZATION {owner}", **names)
        _run(inside, "REVOKE ALL ON SCHEMA {service}, {shadow} FROM PUBLIC", **names)
        _run(inside, "GRANT USAGE ON SCHEMA {service} TO {service}", **names)
        for role in ("{service}", "{owner}"):
            # pg_temp last: a temporary table never hides one of the schema.
            _run(inside, f"ALTER ROLE {role} IN DATABASE {{database}} SET search_path = {{service}}, pg_temp", **names)
    for service in services:
        _run(
            inside,
            "ALTER DEFAULT PRIVILEGES FOR ROLE {owner} REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC",
            owner=f"{service}_owner",
        )


def _run(connection: Connection[TupleRow], statement: str, **names: str) -> None:
    identifiers = {name: sql.Identifier(value) for name, value in names.items()}
    connection.execute(sql.SQL(statement).format(**identifiers))
