"""The balance of an account over HTTP: asked before every use, so it costs as little as can be.

It reads its few parameters and the token itself: what FastAPI does for a route takes as long as the answer.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import QueryParams

from contracts.times import Time
from services.kit.auth import require
from services.kit.clock import now
from services.kit.problems import Problem
from services.kit.query import OwnQueryRouter, check_names
from services.ledger.queries.balances import BalanceView, PostedView, read_balance, read_balance_as_of, read_posted_at
from services.ledger.routes.backend import Backend, check, connected, not_open, snapshot

_TIME: Final[TypeAdapter[datetime]] = TypeAdapter(Time)
_QUERY: Final = ("as_of", "world_at")
_authorize: Final = require("ledger:read")


def balance_router(backend: Callable[[], Backend], *, answers: dict[int | str, dict[str, Any]]) -> APIRouter:
    """The one route. Before all others: a request is compared with one after the other."""
    router = OwnQueryRouter(tags=["reading"])

    @router.get(
        "/v1/balances/{account:path}",
        response_model=BalanceView | PostedView,
        responses=answers,
        openapi_extra=_DOCUMENTED,
    )
    async def balance(request: Request) -> Response:
        """What an account's own wallets hold, lot by lot, exact at the time of reading.

        `as_of`: as it was recorded at a time, with lots and holds. `world_at`: what had been posted by what had
        occurred at a time, whenever it was recorded.
        """
        await _authorize(request)
        account = request.path_params["account"]
        check(account)
        if request.scope["query_string"]:
            as_of, world_at = _times(request.query_params)
            if as_of is not None or world_at is not None:
                found = await _at_another_time(backend(), account, as_of=as_of, world_at=world_at)
                return Response(found.model_dump_json(), media_type="application/json")
        # One statement, which is of one moment by itself.
        async with connected(backend()) as connection:
            view = await read_balance(connection, account, units=backend().units, now=now())
        if view is None:
            raise not_open(account)
        return Response(view.model_dump_json(), media_type="application/json")

    return router


async def _at_another_time(
    backend: Backend, account: str, *, as_of: datetime | None, world_at: datetime | None
) -> BalanceView | PostedView:
    if as_of is not None and world_at is not None:
        raise Problem(422, "invalid_time", "as_of and world_at are asked for one at a time")
    present = now()
    if as_of is not None and as_of > present:
        raise Problem(422, "invalid_time", f"what will be recorded by {as_of.isoformat()} is not known")
    units = backend.units
    found: BalanceView | PostedView | None
    async with snapshot(backend) as connection:
        if as_of is not None:
            found = await read_balance_as_of(connection, account, as_of=as_of.astimezone(UTC), units=units)
        else:
            assert world_at is not None
            at = world_at.astimezone(UTC)
            found = await read_posted_at(connection, account, world_at=at, units=units, now=present)
    if found is None:
        raise not_open(account, at=as_of)
    return found


def _times(query: QueryParams) -> tuple[datetime | None, datetime | None]:
    """`as_of` and `world_at`, as far as they are asked for. RequestValidationError names all that is no time."""
    check_names([name for name, _ in query.multi_items()], known=frozenset(_QUERY))
    found: dict[str, datetime] = {}
    errors: list[Any] = []
    for name in _QUERY:
        if name in query:
            try:
                found[name] = _TIME.validate_python(query[name])
            except ValidationError as error:
                errors += ({**each, "loc": ("query", name)} for each in error.errors())
    if errors:
        raise RequestValidationError(errors)
    return found.get("as_of"), found.get("world_at")


def _time_parameter(name: str) -> dict[str, Any]:
    schema = {"anyOf": [_TIME.json_schema(), {"type": "null"}], "title": name.replace("_", " ").title()}
    return {"name": name, "in": "query", "required": False, "schema": schema}


_DOCUMENTED: Final[dict[str, Any]] = {
    "parameters": [
        {"name": "account", "in": "path", "required": True, "schema": {"type": "string", "title": "Account"}},
        _time_parameter("as_of"),
        _time_parameter("world_at"),
    ],
    "security": [{"serviceToken": []}],
}
