"""HTTP in: commands go to their partition's owner by request/reply, the one way in; reads see one snapshot."""

import base64
import binascii
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Final

import msgspec
from fastapi import APIRouter, Depends, Query, Request, Response
from psycopg import AsyncConnection, OperationalError
from psycopg.rows import TupleRow
from psycopg_pool import PoolTimeout
from pydantic import BaseModel, ValidationError

from contracts import ledger as words
from contracts.accounts import check_account
from contracts.ids import HoldId
from contracts.streams import PAYMENTS
from services.kit.auth import Principal, require
from services.kit.database import Pool
from services.kit.dead_letters import DeadLetter, Unreadable, dead_letters_router
from services.kit.problems import Problem
from services.ledger import projections, translate
from services.ledger.domain.commands import Units
from services.ledger.engine import NotDecided, Owners
from services.ledger.projections import AccountView, BalanceView, HoldView, StatementEntry, StatementPlace, Totals

PAGE_SIZE_MAX: Final = 500
RETRY_AFTER_SECONDS: Final = 1
REDRIVE_SECONDS_MAX: Final = 20.0

_STATUS: Final[Mapping[str, int]] = {
    "insufficient_funds": 402,
    "account_not_open": 404,
    "wallet_not_open": 404,
    "unknown_unit": 422,
    "invalid_amount": 422,
    "invalid_time": 422,
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
        _reading_router(backend),
        dead_letters_router(connect=lambda: _connection(backend()), redrive=redrive, authorize=require("operate")),
    )


# Commands -------------------------------------------------------------------------------------------------------------


def _commands_router(backend: Callable[[], Backend]) -> APIRouter:
    router = APIRouter(tags=["commands"])
    writer = Depends(require("ledger:write"))

    @router.post("/v1/accounts", **_documented(words.OpenAccount))
    async def open_account(request: Request, principal: Principal = writer) -> Response:
        """Open an account, those above it, and wallets of its own. What is open already stays as it is."""
        return await _command(backend(), words.OpenAccount, request, principal)

    @router.post("/v1/grants", **_documented(words.Grant))
    async def grant(request: Request, principal: Principal = writer) -> Response:
        """Add a lot to an open wallet; its debt is repaid first."""
        return await _command(backend(), words.Grant, request, principal)

    @router.post("/v1/holds", **_documented(words.PlaceHold))
    async def place_hold(request: Request, principal: Principal = writer) -> Response:
        """Set amounts aside on every wallet concerned, together or not at all. 402 says which wallet refused."""
        return await _command(backend(), words.PlaceHold, request, principal)

    @router.post("/v1/holds/{hold}/release", **_documented(words.ReleaseHold))
    async def release_hold(hold: str, request: Request, principal: Principal = writer) -> Response:
        """End a hold and give back what it set aside."""
        return await _command(backend(), words.ReleaseHold, request, principal, hold=hold)

    @router.post("/v1/charges", **_documented(words.Charge))
    async def charge(request: Request, principal: Principal = writer) -> Response:
        """Charge what one use really cost."""
        return await _command(backend(), words.Charge, request, principal)

    @router.post("/v1/claims", **_documented(words.ClaimPayment))
    async def claim_payment(request: Request, principal: Principal = writer) -> Response:
        """Take back what was granted for a payment, for a refund or a dispute; or give it back, if that is void."""
        return await _command(backend(), words.ClaimPayment, request, principal)

    return router


def _documented(model: type[words.Command]) -> dict[str, Any]:
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    for name in ("command", "idempotency_key"):
        schema["properties"].pop(name)
    schema["required"] = [name for name in schema["required"] if name != "idempotency_key"]
    schema.update(_without_definitions(schema))
    return {
        "response_model": words.Accepted,
        "responses": {
            400: {"description": "The header Idempotency-Key is missing"},
            402: {"description": "A wallet has not got what is required"},
            404: {"description": "The account or the wallet is not open"},
            409: {"description": "The key was used for another body, or the state does not allow the command"},
            422: {"description": "Something is wrong with the body; all of it is named"},
            503: {"description": "Not decided: ask again with the same key"},
        },
        "openapi_extra": {
            "parameters": [
                {
                    "name": "Idempotency-Key",
                    "in": "header",
                    "required": True,
                    "schema": {"type": "string", "minLength": 1, "maxLength": 256},
                    "description": "Under the same key the first accepted outcome is replayed for ever.",
                }
            ],
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


async def _command(
    backend: Backend, model: type[words.Command], request: Request, principal: Principal, *, hold: str | None = None
) -> Response:
    """Read a command, hand it to the owner of its partition, and tell the answer."""
    body = _read_body(await request.body())
    command = _read_command(model, body, key=request.headers.get("idempotency-key"), hold=hold, units=backend.units)
    reply = await backend.owners.ask(command, principal=principal.name)
    if isinstance(reply, words.Accepted):
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
    model: type[words.Command], body: dict[str, Any], *, key: str | None, hold: str | None, units: Units
) -> words.Command:
    """The command in a body. Problem 400 or 422 names everything that is wrong."""
    problems: list[translate.Problem] = []
    given = body.get("idempotency_key")
    if key is None and given is None:
        problems.append(
            translate.Problem("/header/Idempotency-Key", "missing", "a command needs the header Idempotency-Key")
        )
        key = "missing"
    elif key is not None and given is not None and key != given:
        problems.append(translate.Problem("/idempotency_key", "invalid", "the body names another key than the header"))
    whole = body | {"command": model.model_fields["command"].default, "idempotency_key": key or given}
    if hold is not None:
        whole["hold"] = hold
    command: words.Command | None = None
    try:
        command = model.model_validate_json(msgspec.json.encode(whole))
        translate.read_command(command, units)
    except ValidationError as error:
        problems.extend(translate.model_problems(error))
        named = {problem.pointer for problem in problems}
        problems.extend(each for each in translate.body_problems(body, units) if each.pointer not in named)
    except translate.Invalid as error:
        problems.extend(error.problems)
    if problems or command is None:
        missing = any(problem.code == "missing" and problem.pointer.startswith("/header") for problem in problems)
        raise Problem(
            400 if missing else 422,
            "idempotency_key_missing" if missing else "invalid_request",
            problems[0].detail if len(problems) == 1 else f"the request has {len(problems)} problems",
            errors=translate.problem_rows(problems),
        )
    return command


def _problem(reply: words.Refused | words.Failed) -> Problem:
    if isinstance(reply, words.Failed):
        status = _FAILED_STATUS[reply.code]
        headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status == 503 else {}
        return Problem(status, reply.code, reply.message, headers=headers)
    numbers = reply.model_dump(exclude_none=True, include={"limit_source", "required", "remaining"})
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


class StatementPage(BaseModel):
    """Entries of an account's wallets, newest first. `next_before` asks for the next page; null on the last."""

    account: str
    entries: list[StatementEntry]
    next_before: str | None


class HoldPage(BaseModel):
    """Open holds, oldest first. `next_after` asks for the next page; null on the last."""

    holds: list[HoldView]
    next_after: str | None


_Limit = Annotated[int, Query(ge=1, le=PAGE_SIZE_MAX)]
_Prefix = Annotated[str, Query(max_length=400, pattern=r"^[^\x00]*$")]


def _reading_router(backend: Callable[[], Backend]) -> APIRouter:
    router = APIRouter(tags=["reading"], dependencies=[Depends(require("ledger:read"))])

    @router.get("/v1/accounts")
    async def accounts(prefix: _Prefix = "", limit: _Limit = 100, after: _Prefix = "") -> AccountPage:
        """Open accounts whose id begins with `prefix`."""
        async with _connection(backend()) as connection:
            found = await projections.read_accounts(connection, prefix=prefix, after=after, limit=limit + 1)
        page = found[:limit]
        return AccountPage(accounts=page, next_after=page[-1].account if len(found) > limit else None)

    @router.get("/v1/balances/{account:path}")
    async def balance(account: str) -> BalanceView:
        """What an account's own wallets hold, lot by lot. Each `%` of the id is written `%25` in the path."""
        _check(account)
        async with _snapshot(backend()) as connection:
            found = await projections.read_balance(connection, account, backend().units.by_name)
        if found is None:
            raise Problem(404, "account_not_open", f"the account {account} is not open")
        return found

    @router.get("/v1/statements/{account:path}")
    async def statement(
        account: str, unit: str | None = None, limit: _Limit = 100, before: str | None = None
    ) -> StatementPage:
        """The entries of an account's own wallets, with the balance after each."""
        _check(account)
        if unit is not None:
            _unit(backend(), unit)
        place = None if before is None else _read_place(before)
        async with _snapshot(backend()) as connection:
            entries, more = await projections.read_statement(
                connection, account, unit=unit, before=place, limit=limit, units=backend().units.by_name
            )
        return StatementPage(account=account, entries=entries, next_before=None if more is None else _place_text(more))

    @router.get("/v1/holds")
    async def holds(account: str, limit: _Limit = 100, after: HoldId | None = None) -> HoldPage:
        """Open holds of an account and of all below it."""
        _check(account)
        async with _snapshot(backend()) as connection:
            found = await projections.read_open_holds(
                connection, account, after=after, limit=limit + 1, units=backend().units.by_name
            )
        return HoldPage(holds=found[:limit], next_after=found[limit - 1].hold if len(found) > limit else None)

    @router.get("/v1/holds/{hold}")
    async def hold(hold: HoldId) -> HoldView:
        """A hold, open or ended: what was set aside, on which wallets, and what of it still is."""
        async with _snapshot(backend()) as connection:
            found = await projections.read_hold(connection, hold, units=backend().units.by_name)
        if found is None:
            raise Problem(404, "hold_unknown", f"there is no hold {hold}")
        return found

    @router.get("/v1/totals")
    async def totals(unit: str, account_prefix: _Prefix = "") -> Totals:
        """Sums over all accounts whose id begins with `account_prefix`, all of one moment."""
        known = _unit(backend(), unit)
        async with _snapshot(backend()) as connection:
            return await projections.read_totals(
                connection, backend().units.by_name[known], account_prefix=account_prefix
            )

    return router


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
    """A connection of the pool. Problem 503 if there is none."""
    try:
        async with backend.pool.connection() as connection:
            yield connection
    except (PoolTimeout, OperationalError) as error:
        headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
        raise Problem(503, "database_away", "the database is away: ask again", headers=headers) from error


@asynccontextmanager
async def _snapshot(backend: Backend) -> AsyncIterator[AsyncConnection[TupleRow]]:
    """A connection on which everything is read as of one moment."""
    async with _connection(backend) as connection, connection.transaction():
        await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        yield connection
