"""Meters over HTTP, as OpenMeter's clients manage and query them."""

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Depends, Query, Response
from pydantic import TypeAdapter, ValidationError

from contracts.times import Time
from services.kit.auth import Principal, require
from services.kit.clock import now
from services.kit.problems import Problem
from services.metering.domain.meters import MeterChanged, MeterTaken
from services.metering.queries import definitions
from services.metering.queries.definitions import Connection, StoredMeter, TooManyMeters
from services.metering.routes.backend import Backend, connection
from services.metering.translate.meters import (
    MeterBody,
    MeterChange,
    MeterView,
    changed,
)

PAGE_SIZE_MAX: Final = 1_000

_CSV: Final = "text/csv"
_JSON: Final = "application/json"
_TIME: Final[TypeAdapter[datetime]] = TypeAdapter(Time)

UNKNOWN_METER: Final[dict[int | str, dict[str, Any]]] = {404: {"description": "There is no such meter"}}
Order = Literal["ASC", "DESC"]
OrderBy = Literal["key", "name", "aggregation", "createdAt", "updatedAt"]

_ORDERS: Final[Mapping[OrderBy, Callable[[StoredMeter], Any]]] = {
    "key": lambda each: each.body.slug,
    "name": lambda each: (each.body.name or "", each.body.slug),
    "aggregation": lambda each: (each.body.aggregation, each.body.slug),
    "createdAt": lambda each: (each.created_at, each.body.slug),
    "updatedAt": lambda each: (each.updated_at, each.body.slug),
}


def meters_router(backend: Callable[[], Backend]) -> APIRouter:
    """Meters: defined, and asked."""
    router = APIRouter(tags=["meters"])
    reader = Depends(require("metering:read"))
    operator = Depends(require("operate"))

    @router.get("/api/v1/meters", dependencies=[reader], response_model_exclude_none=True)
    async def list_meters(
        *,
        page: Annotated[int, Query(ge=1, le=10_000)] = 1,
        page_size: Annotated[int, Query(ge=1, le=PAGE_SIZE_MAX, alias="pageSize")] = 100,
        order: Order = "ASC",
        order_by: Annotated[OrderBy, Query(alias="orderBy")] = "key",
        include_deleted: Annotated[bool, Query(alias="includeDeleted")] = False,
    ) -> list[MeterView]:
        """The meters, each as its newest version has it."""
        async with connection(backend()) as connected:
            found = await definitions.list_meters(connected, deleted=include_deleted)
        found.sort(key=_ORDERS[order_by], reverse=order == "DESC")
        return [each.view() for each in found[(page - 1) * page_size : page * page_size]]

    @router.post(
        "/api/v1/meters",
        status_code=201,
        response_model_exclude_none=True,
        responses={
            409: {"description": "There is a meter of that slug"},
            422: {"description": "It is no meter; everything that is wrong with it is named"},
        },
    )
    async def create_meter(body: MeterBody, principal: Principal = operator) -> MeterView:
        """Define a meter. It answers from the log, and so has all of the past at once."""
        async with connection(backend()) as connected:
            try:
                stored = await definitions.create_meter(connected, body, source=principal.name, at=now())
            except MeterTaken as error:
                raise Problem(409, "meter_exists", str(error)) from error
            except TooManyMeters as error:
                raise Problem(409, "too_many_meters", str(error)) from error
        return stored.view()

    @router.get(
        "/api/v1/meters/{id_or_slug}", dependencies=[reader], response_model_exclude_none=True, responses=UNKNOWN_METER
    )
    async def read_one(id_or_slug: str, version: Annotated[int | None, Query(ge=1, le=2**31 - 1)] = None) -> MeterView:
        """A meter, by its id or its slug, as it is now, or as a version had it."""
        async with connection(backend()) as connected:
            return (await needed_meter(connected, id_or_slug, version=version)).view()

    @router.get(
        "/api/v1/meters/{id_or_slug}/versions",
        dependencies=[reader],
        response_model_exclude_none=True,
        responses=UNKNOWN_METER,
    )
    async def versions(id_or_slug: str) -> list[MeterView]:
        """All that a meter was and is, newest first: `updatedAt` says since when."""
        _check_name(id_or_slug)
        async with connection(backend()) as connected:
            found = await definitions.find_versions(connected, id_or_slug)
        if not found:
            raise _unknown(id_or_slug, None)
        return [each.view() for each in found]

    @router.put(
        "/api/v1/meters/{id_or_slug}",
        response_model_exclude_none=True,
        responses={
            **UNKNOWN_METER,
            409: {"description": "Somebody else changed it at the same time"},
            422: {"description": "It would be no meter; everything that is wrong with it is named"},
        },
    )
    async def update_meter(id_or_slug: str, change: MeterChange, principal: Principal = operator) -> MeterView:
        """Change a meter: its next version, which answers from now on, of the past as well. The old one is kept."""
        async with connection(backend()) as connected:
            stored = await needed_meter(connected, id_or_slug, deleted=False)
            try:
                body = changed(stored.body, change)
            except ValidationError as error:
                raise _invalid_change(error) from error
            try:
                stored = await definitions.change_meter(connected, stored, body, source=principal.name, at=now())
            except MeterChanged as error:
                raise Problem(409, "meter_changed", str(error)) from error
        return stored.view()

    @router.delete(
        "/api/v1/meters/{id_or_slug}",
        status_code=204,
        responses={**UNKNOWN_METER, 409: {"description": "Somebody else changed it at the same time"}},
    )
    async def delete_meter(id_or_slug: str, principal: Principal = operator) -> Response:
        """Let a meter answer no more. Nothing of the log is deleted; defined again, it answers the same."""
        async with connection(backend()) as connected:
            stored = await needed_meter(connected, id_or_slug, deleted=False)
            try:
                await definitions.delete_meter(connected, stored, source=principal.name, at=now())
            except MeterChanged as error:
                raise Problem(409, "meter_changed", str(error)) from error
        return Response(status_code=204)

    return router


async def needed_meter(
    connected: Connection, id_or_slug: str, *, version: int | None = None, deleted: bool = True
) -> StoredMeter:
    """A meter, or Problem 404."""
    _check_name(id_or_slug)
    found = await definitions.find_meter(connected, id_or_slug, version=version)
    if found is None or (found.deleted_at is not None and not deleted):
        raise _unknown(id_or_slug, version)
    return found


def _check_name(id_or_slug: str) -> None:
    # Postgres has no text with a NUL in it.
    if "\x00" in id_or_slug or len(id_or_slug) > 128:
        raise _unknown(id_or_slug[:128], None)


def _unknown(id_or_slug: str, version: int | None) -> Problem:
    which = "" if version is None else f" with a version {version}"
    return Problem(404, "unknown_meter", f"there is no meter {id_or_slug!r}{which}")


def _invalid_change(error: ValidationError) -> Problem:
    errors = [
        {
            "pointer": "/".join(["/body", *(str(part) for part in found["loc"])]),
            "detail": found["msg"].removeprefix("Value error, "),
        }
        for found in error.errors(include_url=False, include_context=False, include_input=False)
    ]
    return Problem(422, "invalid_meter", f"the meter would have {len(errors)} problem(s): see errors", errors=errors)
