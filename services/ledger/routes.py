"""HTTP in: commands go to their partition's owner by request/reply, the one way in; reads see one snapshot."""

import asyncio
import base64
import binascii
import inspect
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC
from typing import Annotated, Any, Final, Literal

import msgspec
from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from psycopg import AsyncConnection, OperationalError
from psycopg.errors import QueryCanceled
from psycopg.rows import TupleRow
from psycopg_pool import PoolTimeout
from pydantic import BaseModel, ValidationError

from contracts import ledger as words
from contracts.accounts import check_account
from contracts.ids import HoldId, TransactionId
from contracts.streams import PAYMENTS
from contracts.times import Time
from services.kit.auth import Principal, require
from services.kit.clock import now
from services.kit.database import Pool
from services.kit.dead_letters import DeadLetter, Unreadable, dead_letters_router
from services.kit.problems import Problem
from services.ledger import queries, translate
from services.ledger.domain.commands import Units
from services.ledger.domain.entries import Kind as EntryKind
from services.ledger.engine import NotDecided, Owners
from services.ledger.queries import (
    AccountTotals,
    AccountView,
    BalanceView,
    ChargeView,
    HoldView,
    PostedView,
    StatementEntry,
    StatementFilter,
    StatementPlace,
    Totals,
    TransactionView,
    TreeAccountView,
)

PAGE_SIZE_MAX: Final = 500
TREE_PAGE_SIZE_MAX: Final = 200
EXPORTS_MAX: Final = 2
EXPORT_RETRY_AFTER_SECONDS: Final = 10
RETRY_AFTER_SECONDS: Final = 1
REDRIVE_SECONDS_MAX: Final = 20.0

_STATUS: Final[Mapping[str, int]] = {
    "insufficient_funds": 402,
    "account_not_open": 404,
    "wallet_not_open": 404,
    "unknown_hold": 404,
    "unknown_lot": 404,
    "unknown_rule": 404,
    "unknown_charge": 404,
    "unknown_unit": 422,
    "invalid_amount": 422,
    "invalid_time": 422,
    "invalid_rule": 422,
    "invalid_terms": 422,
    "invalid_transfer": 422,
}
_REFUSED_STATUS: Final = 409
_FAILED_STATUS: Final[Mapping[str, int]] = {
    "invalid": 422,
    "conflict": 409,
    "busy": 503,
    "unavailable": 503,
    "fault": 500,
}


@dataclass(frozen=True, slots=True)
class Backend:
    """What the routes work on. Made by the lifespan, before the first request."""

    owners: Owners
    pool: Pool
    units: Units


def routers(backend: Callable[[], Backend]) -> Sequence[APIRouter]:
    """All routes of the ledger."""

    async def redrive(letter: DeadLetter) -> None:
        await _redrive(backend(), letter)

    return (
        _commands_router(backend),
        reading_routes(backend),
        dead_letters_router(connect=lambda: _connection(backend()), redrive=redrive, authorize=require("operate")),
    )


# Commands -------------------------------------------------------------------------------------------------------------


_Model = type[words.Command] | type[words.CommandList]

# What is in the path is left out of the body.
_COMMANDS: Final[Mapping[str, _Model]] = {
    "/v1/accounts": words.OpenAccount,
    "/v1/wallets": words.SetWallet,
    "/v1/grants": words.Grant,
    "/v1/grants/{lot}/void": words.VoidGrant,
    "/v1/adjustments": words.Adjust,
    "/v1/holds": words.PlaceHold,
    "/v1/holds/{hold}/extend": words.ExtendHold,
    "/v1/holds/{hold}/settle": words.SettleHold,
    "/v1/holds/{hold}/release": words.ReleaseHold,
    "/v1/charges": words.Charge,
    # The id of an event may hold slashes.
    "/v1/charges/{source}/{event_id:path}/reverse": words.ReverseCharge,
    "/v1/debits": words.Debit,
    "/v1/transfers": words.Transfer,
    "/v1/claims": words.ClaimPayment,
    "/v1/rules": words.SetRule,
    "/v1/rules/{rule}/end": words.EndRule,
    "/v1/plans": words.ChangePlan,
    "/v1/lists": words.CommandList,
}


def _commands_router(backend: Callable[[], Backend]) -> APIRouter:
    router = APIRouter(tags=["commands"])
    for route, model in _COMMANDS.items():
        router.add_api_route(
            route,
            _endpoint(backend, model),
            methods=["POST"],
            name=model.model_fields["command"].default,
            description=inspect.getdoc(model),
            **_documented(model, in_path=re.findall(r"{(\w+)", route)),
        )
    return router


def _endpoint(backend: Callable[[], Backend], model: _Model) -> Callable[..., Awaitable[Response]]:
    async def endpoint(request: Request, principal: Principal = _WRITER) -> Response:
        return await _command(backend(), model, request, principal)

    return endpoint


_WRITER: Final = Depends(require("ledger:write"))


def _documented(model: _Model, *, in_path: Sequence[str]) -> dict[str, Any]:
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": schema["properties"][name]} for name in in_path
    ]
    for name in ("command", "idempotency_key", *in_path):
        schema["properties"].pop(name)
    schema["required"] = [name for name in schema["required"] if name in schema["properties"]]
    schema.update(_without_definitions(schema))
    is_list = model is words.CommandList
    said = "Under the same key the first accepted outcome is replayed for ever."
    parameters.append(
        {
            "name": "Idempotency-Key",
            "in": "header",
            "required": not is_list,
            "schema": {"type": "string", "minLength": 1, "maxLength": 256},
            "description": f"Of a list that is all or nothing, and only then. {said}" if is_list else said,
        }
    )
    return {
        "response_model": words.Listed if is_list else words.Accepted,
        "responses": {
            400: {"description": "The header Idempotency-Key is missing"},
            402: {"description": "A wallet has not got what is required"},
            404: {"description": "The account or the wallet is not open, or what is named is not known"},
            409: {"description": "The key was used for another body, or the state does not allow the command"},
            413: {"description": "The body is larger than is allowed"},
            422: {"description": "Something is wrong with the body; all of it is named"},
            503: {"description": "Not decided, `busy` or `unavailable`: ask again with the same key"},
        },
        "openapi_extra": {
            "parameters": parameters,
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        },
    }


def _without_definitions(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with its definitions put in where they are referred to."""
    definitions = schema.get("$defs", {})

    def put_in(part: Any) -> Any:
        if isinstance(part, list):
            return [put_in(each) for each in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return put_in(definitions[part["$ref"].rsplit("/", 1)[1]])
        return {name: put_in(each) for name, each in part.items() if name != "$defs"}

    found: dict[str, Any] = put_in(dict(schema))
    return found


async def _command(backend: Backend, model: _Model, request: Request, principal: Principal) -> Response:
    """Read a command, hand it to the owner of its partition, and tell the answer."""
    body = _read_body(await request.body())
    command = _read_command(
        model,
        body,
        key=request.headers.get("idempotency-key"),
        in_path=request.path_params,
        units=backend.units,
        principal=principal.name,
    )
    reply: words.Reply | words.ListReply
    if isinstance(command, words.CommandList):
        reply = await backend.owners.ask_all(command, principal=principal.name)
    else:
        reply = await backend.owners.ask(command, principal=principal.name)
    if isinstance(reply, words.Accepted | words.Listed):
        return Response(reply.model_dump_json(), media_type="application/json")
    raise _problem(reply)


def _read_body(text: bytes) -> dict[str, Any]:
    try:
        body = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(400, "not_json", f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise Problem(400, "not_an_object", "the body is a JSON object")
    return body


def _read_command(
    model: _Model,
    body: dict[str, Any],
    *,
    key: str | None,
    in_path: Mapping[str, Any],
    units: Units,
    principal: str,
) -> words.Command | words.CommandList:
    """The command in a body. Problem 400 or 422 names everything that is wrong."""
    problems = _differences(body, key=key, in_path=in_path)
    whole = {**body, **in_path, "command": model.model_fields["command"].default}
    if key is not None:
        whole["idempotency_key"] = key
    stands_or_falls = model is not words.CommandList or body.get("all_or_nothing") is True
    if model is words.CommandList and stands_or_falls:
        whole["commands"] = _numbered(body.get("commands"))
    is_missing = stands_or_falls and whole.get("idempotency_key") is None
    if is_missing:
        problems.append(
            translate.Problem("/header/Idempotency-Key", "missing", "a command needs the header Idempotency-Key")
        )
        whole["idempotency_key"] = "missing"
    command: words.Command | words.CommandList | None = None
    try:
        command = model.model_validate_json(msgspec.json.encode(whole))
        if isinstance(command, words.CommandList):
            translate.read_list(command, units, principal=principal)
        else:
            translate.read_command(command, units, principal=principal)
    except ValidationError as error:
        problems.extend(translate.model_problems(error))
        named = {problem.pointer for problem in problems}
        problems.extend(each for each in translate.body_problems(whole, units) if each.pointer not in named)
    except translate.Invalid as error:
        problems.extend(error.problems)
    if problems or command is None:
        raise Problem(
            400 if is_missing else 422,
            "idempotency_key_missing" if is_missing else "invalid_request",
            problems[0].detail if len(problems) == 1 else f"the request has {len(problems)} problems",
            errors=translate.problem_rows(problems),
        )
    return command


def _differences(body: Mapping[str, Any], *, key: str | None, in_path: Mapping[str, Any]) -> list[translate.Problem]:
    """Where the body says something else than the header or the path."""
    elsewhere = {**in_path} if key is None else {**in_path, "idempotency_key": key}
    return [
        translate.Problem(f"/{name}", "invalid", f"the body names another {name} than the path or the header")
        for name, said in elsewhere.items()
        if body.get(name, said) != said
    ]


def _numbered(commands: Any) -> Any:
    """Commands that stand or fall together need no keys of their own: their places do."""
    if not isinstance(commands, list):
        return commands
    return [
        {"idempotency_key": str(place), **each} if isinstance(each, dict) else each
        for place, each in enumerate(commands)
    ]


def _problem(reply: words.Refused | words.Failed) -> Problem:
    if isinstance(reply, words.Failed):
        status = _FAILED_STATUS[reply.code]
        headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status == 503 else {}
        return Problem(status, reply.code, reply.message, headers=headers)
    numbers = reply.model_dump(exclude_none=True, include={"limit_source", "required", "remaining", "index"})
    return Problem(_STATUS.get(reply.code, _REFUSED_STATUS), reply.code, reply.message, members=numbers)


async def _redrive(backend: Backend, letter: DeadLetter) -> None:
    """Decide what was dead-lettered again; however often, it takes effect once at most.

    A charge line is a command under the letter's id, a fact of billing asks under the keys it always asks under.
    """
    if letter.stream == PAYMENTS:
        try:
            await backend.owners.take_payment_fact(letter.subject, letter.payload, seconds_max=REDRIVE_SECONDS_MAX)
        except NotDecided as error:
            raise _problem(error.failed) from error
        return
    try:
        line = translate.read_line(letter.payload, backend.units)
    except translate.Invalid as error:
        rows = translate.problem_rows(error.problems)
        raise Unreadable("the charge line still cannot be read", problems=rows) from error
    command = words.Charge(idempotency_key=f"dead-letter:{letter.id}", line=line)
    reply = await backend.owners.ask(command, principal=_REDRIVER)
    match reply:
        case words.Accepted():
            pass
        case words.Refused(code="already_charged"):
            # By another bundle, meanwhile: this very line.
            pass
        case words.Refused():
            raise Unreadable(f"the charge line still cannot be charged: {reply.message}")
        case words.Failed():
            raise _problem(reply)


_REDRIVER: Final = "dead-letters"


# Reading --------------------------------------------------------------------------------------------------------------


class AccountPage(BaseModel):
    """Open accounts in the order of their ids. `next_after` asks for the next page; null on the last."""

    accounts: list[AccountView]
    next_after: str | None


class TreePage(BaseModel):
    """Accounts of a tree in the order of their ids. `next_after` asks for the next page; null on the last."""

    root: str
    accounts: list[TreeAccountView]
    next_after: str | None


class StatementPage(BaseModel):
    """Entries of an account's wallets, newest first. `next_before` asks for the next page; null on the last.

    With a filter a page may have fewer entries than there is room for, and still not be the last.
    """

    account: str
    entries: list[StatementEntry]
    next_before: str | None


class HoldPage(BaseModel):
    """Open holds, oldest first. `next_after` asks for the next page; null on the last."""

    holds: list[HoldView]
    next_after: str | None


class AccountTotalsView(BaseModel):
    """An account's totals, unit by unit."""

    account: str
    units: list[AccountTotals]


_Limit = Annotated[int, Query(ge=1, le=PAGE_SIZE_MAX)]
_TreeLimit = Annotated[int, Query(ge=1, le=TREE_PAGE_SIZE_MAX)]
_Prefix = Annotated[str, Query(max_length=400, pattern=r"^[^\x00]*$")]
_Text = Annotated[str, Query(max_length=256, pattern=r"^[^\x00]*$")]
_PathText = Annotated[str, Path(max_length=256, pattern=r"^[^\x00]*$")]
_Cursor = Annotated[str, Query(max_length=4096)]
_Format = Annotated[Literal["csv"], Query(alias="format")]
_Below = Annotated[bool, Query(description="With all accounts below it.")]

_ERRORS: Final[Mapping[int, str]] = {
    401: "A bearer token is needed",
    403: "The token lacks the scope ledger:read",
    404: "There is no such thing",
    422: "Something is wrong with the request; all of it is named",
    503: "Not now, or too much at once: ask again, or for less",
}


def _answers(*, unknown: bool = True) -> dict[int | str, dict[str, Any]]:
    """What a route may answer but what it is asked for. `unknown`: there may be no such thing."""
    return {
        status: {"description": said, "content": {"application/problem+json": {"schema": _PROBLEM}}}
        for status, said in _ERRORS.items()
        if unknown or status != 404
    }


_PROBLEM: Final[Mapping[str, Any]] = {
    "type": "object",
    "required": ["type", "title", "status", "code", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "code": {"type": "string", "description": "Stable, for programs"},
        "detail": {"type": "string", "description": "A sentence, for people"},
        "errors": {"type": "array", "items": {"type": "object"}},
    },
}


def reading_routes(backend: Callable[[], Backend]) -> APIRouter:
    """What can be read. An account's id is written into a path as it is, but for each `%`, which is `%25`."""
    router = APIRouter(tags=["reading"], dependencies=[Depends(require("ledger:read"))])
    for add in (_account_routes, _statement_routes, _charge_routes, _hold_routes, _total_routes, _export_routes):
        add(router, backend)
    return router


def _account_routes(router: APIRouter, backend: Callable[[], Backend]) -> None:
    @router.get("/v1/accounts", responses=_answers(unknown=False))
    async def accounts(prefix: _Prefix = "", limit: _Limit = 100, after: _Prefix = "") -> AccountPage:
        """Open accounts whose id begins with `prefix`."""
        async with _connection(backend()) as connection:
            found = await queries.read_accounts(connection, prefix=prefix, after=after, limit=limit + 1)
        page = found[:limit]
        return AccountPage(accounts=page, next_after=page[-1].account if len(found) > limit else None)

    @router.get("/v1/trees/{root}", responses=_answers())
    async def tree(root: str, limit: _TreeLimit = 100, after: _Prefix = "") -> TreePage:
        """The accounts of a tree with their wallets, exact at the time of reading."""
        _check(root)
        async with _snapshot(backend()) as connection:
            found = await queries.read_tree(
                connection, root, after=after, limit=limit + 1, units=backend().units, now=now()
            )
        if not found and not after:
            raise _not_open(root)
        page = found[:limit]
        return TreePage(root=root, accounts=page, next_after=page[-1].account if len(found) > limit else None)

    @router.get("/v1/balances/{account:path}", response_model=BalanceView | PostedView, responses=_answers())
    async def balance(account: str, as_of: Time | None = None, world_at: Time | None = None) -> Response:
        """What an account's own wallets hold, lot by lot, exact at the time of reading.

        `as_of`: as it was recorded at a time, with lots and holds. `world_at`: what had been posted by what had
        occurred at a time, whenever it was recorded.
        """
        _check(account)
        if as_of is not None and world_at is not None:
            raise Problem(422, "invalid_time", "as_of and world_at are asked for one at a time")
        present = now()
        if as_of is not None and as_of > present:
            raise Problem(422, "invalid_time", f"what will be recorded by {as_of.isoformat()} is not known")
        units = backend().units
        found: BalanceView | PostedView | None
        if as_of is None and world_at is None:
            # One statement, which is of one moment by itself.
            async with _connection(backend()) as connection:
                found = await queries.read_balance(connection, account, units=units, now=present)
        else:
            async with _snapshot(backend()) as connection:
                if as_of is not None:
                    found = await queries.read_balance_as_of(
                        connection, account, as_of=as_of.astimezone(UTC), units=units
                    )
                else:
                    assert world_at is not None
                    found = await queries.read_posted_at(
                        connection, account, world_at=world_at.astimezone(UTC), units=units, now=present
                    )
        if found is None:
            raise _not_open(account)
        return Response(found.model_dump_json(), media_type="application/json")


def _statement_routes(router: APIRouter, backend: Callable[[], Backend]) -> None:
    @router.get("/v1/statements/{account:path}", responses=_answers())
    async def statement(
        account: str,
        *,
        unit: str | None = None,
        kind: EntryKind | None = None,
        since: Time | None = None,
        until: Time | None = None,
        reference: _Text | None = None,
        limit: _Limit = 100,
        before: _Cursor | None = None,
    ) -> StatementPage:
        """The entries of an account's own wallets, newest first, with the balance after each.

        Recorded in [`since`, `until`). `reference`: the id of a lot, a hold, a transaction or a charged event, or the
        reference of a lot.
        """
        _check(account)
        if unit is not None:
            _unit(backend(), unit)
        place = None if before is None else _read_place(before)
        wanted = StatementFilter(unit=unit, kind=kind, since=since, until=until, reference=reference or None)
        async with _snapshot(backend()) as connection:
            entries, more = await queries.read_statement(
                connection, account, wanted=wanted, before=place, limit=limit, units=backend().units.by_name
            )
        return StatementPage(account=account, entries=entries, next_before=None if more is None else _place_text(more))

    @router.get("/v1/transactions/{transaction}", responses=_answers())
    async def transaction(transaction: TransactionId) -> TransactionView:
        """All entries of a transaction and its cause: who asked, or the charged events and the lots that paid."""
        async with _snapshot(backend()) as connection:
            found = await queries.read_transaction(connection, transaction, units=backend().units)
        if found is None:
            raise Problem(404, "transaction_unknown", f"there is no transaction {transaction}")
        return found


def _charge_routes(router: APIRouter, backend: Callable[[], Backend]) -> None:
    @router.get("/v1/charges/{source}/{event_id:path}", responses=_answers())
    async def charge(source: _PathText, event_id: _PathText, account: str | None = None) -> ChargeView:
        """What a use was charged, from which lots, and what of that was given back since: every revision of it."""
        if account is not None:
            _check(account)
        async with _snapshot(backend()) as connection:
            found = await queries.read_charge(connection, source, event_id, account=account, units=backend().units)
        if found is None:
            raise Problem(404, "charge_unknown", f"{source} {event_id} has not been charged")
        return found


def _hold_routes(router: APIRouter, backend: Callable[[], Backend]) -> None:
    @router.get("/v1/holds", responses=_answers(unknown=False))
    async def holds(account: str, limit: _Limit = 100, after: HoldId | None = None) -> HoldPage:
        """Open holds of an account and of all below it."""
        _check(account)
        async with _snapshot(backend()) as connection:
            found = await queries.read_open_holds(
                connection, account, after=after, limit=limit + 1, units=backend().units.by_name
            )
        return HoldPage(holds=found[:limit], next_after=found[limit - 1].hold if len(found) > limit else None)

    @router.get("/v1/holds/{hold}", responses=_answers())
    async def hold(hold: HoldId) -> HoldView:
        """A hold, open or ended: what was set aside, on which wallets, and what of it still is."""
        async with _snapshot(backend()) as connection:
            found = await queries.read_hold(connection, hold, units=backend().units.by_name)
        if found is None:
            raise Problem(404, "hold_unknown", f"there is no hold {hold}")
        return found


def _total_routes(router: APIRouter, backend: Callable[[], Backend]) -> None:
    @router.get("/v1/totals", responses=_answers(unknown=False))
    async def totals(unit: str, account_prefix: _Prefix = "") -> Totals:
        """Sums over all accounts whose id begins with `account_prefix`, all of one moment."""
        known = _unit(backend(), unit)
        async with _snapshot(backend()) as connection:
            return await queries.read_totals(connection, backend().units.by_name[known], account_prefix=account_prefix)

    @router.get("/v1/totals/{account:path}", responses=_answers())
    async def account_totals(account: str) -> AccountTotalsView:
        """What was ever granted, charged, given back, expired and clawed back on an account's own wallets."""
        _check(account)
        async with _snapshot(backend()) as connection:
            found = await queries.read_account_totals(connection, account, units=backend().units)
        if found is None:
            raise _not_open(account)
        return AccountTotalsView(account=account, units=found)


def _export_routes(router: APIRouter, backend: Callable[[], Backend]) -> None:
    exports = asyncio.Semaphore(EXPORTS_MAX)
    answers = {200: {"description": "CSV with a header", "content": {"text/csv": {}}}, **_answers()}

    @router.get("/v1/exports/journal", response_class=StreamingResponse, responses=answers)
    async def export(account: str, below: _Below = False, _format: _Format = "csv") -> Response:
        """The entries of an account's wallets as recorded by now, oldest first, in one stream. Contras are left out."""
        _check(account)
        if exports.locked():
            headers = {"Retry-After": str(EXPORT_RETRY_AFTER_SECONDS)}
            raise Problem(503, "busy", f"{EXPORTS_MAX} exports are under way", headers=headers)
        async with _snapshot(backend()) as connection:
            batch, names = await queries.exported_accounts(connection, account, below=below)
        if not names:
            raise _not_open(account)

        async def stream() -> AsyncIterator[bytes]:
            async with exports:
                pages = queries.exported_csv(
                    lambda: _connection(backend()), names, batch=batch, units=backend().units.by_name
                )
                async for page in pages:
                    yield page

        return StreamingResponse(stream(), media_type="text/csv")


def _not_open(account: str) -> Problem:
    return Problem(404, "account_not_open", f"the account {account} is not open")


def _check(account: str) -> None:
    try:
        check_account(account)
    except ValueError as error:
        raise Problem(422, "invalid_account", str(error)) from error


def _unit(backend: Backend, name: str) -> str:
    if name not in backend.units.by_name:
        raise Problem(422, "unknown_unit", f"the catalogue has no unit {name!r}")
    return name


def _place_text(place: StatementPlace) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode(place)).decode()


def _read_place(text: str) -> StatementPlace:
    try:
        return msgspec.json.decode(base64.urlsafe_b64decode(text), type=StatementPlace)
    except (binascii.Error, msgspec.DecodeError, UnicodeError, ValueError) as error:
        raise Problem(422, "invalid_cursor", "`before` is not a place that an earlier page named") from error


@asynccontextmanager
async def _connection(backend: Backend) -> AsyncIterator[AsyncConnection[TupleRow]]:
    """A connection of the pool. Problem 503 if there is none, or if an answer takes too long."""
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    try:
        async with backend.pool.connection() as connection:
            yield connection
    except (QueryCanceled, queries.TooMuchDue) as error:
        raise Problem(503, "too_much", "the answer takes too long: ask for less", headers=headers) from error
    except (PoolTimeout, OperationalError) as error:
        raise Problem(503, "database_away", "the database is away: ask again", headers=headers) from error


@asynccontextmanager
async def _snapshot(backend: Backend) -> AsyncIterator[AsyncConnection[TupleRow]]:
    """A connection on which everything is read as of one moment."""
    async with _connection(backend) as connection:
        await connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        try:
            yield connection
        except Exception:
            await connection.rollback()
            raise
        await connection.commit()
