"""Questions to meters over HTTP, as OpenMeter's clients ask them."""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import TypeAdapter, ValidationError

from contracts.envelope import Problem as Finding
from contracts.times import Time
from services.kit.auth import require
from services.kit.problems import Problem
from services.kit.query import OwnQueryRouter
from services.metering.domain.meters import SUBJECT, Meter
from services.metering.domain.windows import TooManyWindows
from services.metering.queries.meters import ROWS_MAX, TooManyRows, ask_meter, list_values
from services.metering.routes.archive import ARCHIVED, of_whole_log
from services.metering.routes.backend import Backend, asking
from services.metering.routes.meters import UNKNOWN_METER, needed_meter
from services.metering.translate.meters import (
    InvalidQuestion,
    MeterAnswer,
    MeterQueryBody,
    answer_as_csv,
    answer_as_json,
    read_meter,
    read_parameters,
    read_question,
)

_CSV: Final = "text/csv"
_JSON: Final = "application/json"
_TIME: Final[TypeAdapter[datetime]] = TypeAdapter(Time)

_ANSWERS: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "The values. As `text/csv` if that is what `Accept` asks for",
        "content": {_CSV: {"schema": {"type": "string"}}},
        "model": MeterAnswer,
    },
    400: {
        "description": f"Something is wrong with the question, all of it is named; or the answer is longer than "
        f"{ROWS_MAX} rows"
    },
    503: {"description": "The answer takes too long to find: ask for less at once"},
    **ARCHIVED,
    **UNKNOWN_METER,
}

_ANSWERS_OF_TEXTS: Final[dict[int | str, dict[str, Any]]] = {
    400: _ANSWERS[400],
    503: _ANSWERS[503],
    **ARCHIVED,
    **UNKNOWN_METER,
}


def _parameter(name: str, description: str, **schema: Any) -> dict[str, Any]:
    """A parameter in the document. They are read together, so that everything that is wrong with them is named."""
    return {"name": name, "in": "query", "required": False, "description": description, "schema": schema}


_PARAMETERS: Final = [
    _parameter("from", "The first time, included; left out: from the first event", type="string", format="date-time"),
    _parameter("to", "Not included; left out: to the last event", type="string", format="date-time"),
    _parameter(
        "windowSize",
        "Left out: one value for all of the time",
        type="string",
        enum=["MINUTE", "HOUR", "DAY", "MONTH"],
    ),
    _parameter("windowTimeZone", "IANA name, as Europe/Berlin; UTC if left out", type="string"),
    _parameter(
        "subject", "Of these alone, and grouped by them; may be repeated", type="array", items={"type": "string"}
    ),
    _parameter("filterCustomerId", "Of these accounts, and grouped by them", type="array", items={"type": "string"}),
    {
        **_parameter(
            "filterGroupBy",
            "filterGroupBy[model]=gpt-4o; or a JSON object",
            type="object",
            additionalProperties={"type": "string"},
        ),
        "style": "deepObject",
        "explode": True,
    },
    _parameter("advancedMeterGroupByFilters", 'JSON: {"model": {"$like": "gpt-%"}}', type="string"),
    _parameter(
        "groupBy",
        "The meter's groups, `subject`, `customer_id`; may be repeated",
        type="array",
        items={"type": "string"},
    ),
    _parameter("version", "Answer as this version of the meter does", type="integer"),
    _parameter("clientId", "Taken, and without effect", type="string"),
]


def meter_queries_routers(backend: Callable[[], Backend]) -> Sequence[APIRouter]:
    """Meters, asked."""
    reader = Depends(require("metering:read"))
    as_clients_write = OwnQueryRouter(tags=["meters"], dependencies=[reader])
    router = APIRouter(tags=["meters"], dependencies=[reader])

    @as_clients_write.get(
        "/api/v1/meters/{id_or_slug}/query",
        responses=_ANSWERS,
        openapi_extra={"parameters": _PARAMETERS},
    )
    async def query_meter(id_or_slug: str, request: Request) -> Response:
        """Ask a meter. Exact at the moment of asking: what is logged is counted, by the time it happened.

        Windows are those of the zone, across changes of its clocks, and tile the time: they sum to the total.
        """
        try:
            body = read_parameters(request.query_params.multi_items())
        except InvalidQuestion as error:
            raise _invalid(error.problems, place="query") from error
        return await _answer(backend(), id_or_slug, body, request=request, place="query")

    @router.post("/api/v1/meters/{id_or_slug}/query", responses=_ANSWERS)
    async def query_meter_by_body(id_or_slug: str, request: Request, body: MeterQueryBody | None = None) -> Response:
        """The same question as a body."""
        return await _answer(backend(), id_or_slug, body or MeterQueryBody(), request=request, place="body")

    @router.get("/api/v1/meters/{id_or_slug}/subjects", responses=_ANSWERS_OF_TEXTS)
    async def subjects(
        id_or_slug: str,
        since: Annotated[str | None, Query(alias="from", description="RFC 3339; included")] = None,
        until: Annotated[str | None, Query(alias="to", description="Not included")] = None,
    ) -> list[str]:
        """The subjects that a meter has events of, in order."""
        return await _values(backend(), id_or_slug, SUBJECT, since=since, until=until)

    @router.get("/api/v1/meters/{id_or_slug}/group-by/{group}/values", responses=_ANSWERS_OF_TEXTS)
    async def group_values(
        id_or_slug: str,
        group: str,
        since: Annotated[str | None, Query(alias="from", description="RFC 3339; included")] = None,
        until: Annotated[str | None, Query(alias="to", description="Not included")] = None,
    ) -> list[str]:
        """The values that one of a meter's groups has, in order."""
        return await _values(backend(), id_or_slug, group, since=since, until=until)

    return as_clients_write, router


async def _answer(backend: Backend, id_or_slug: str, body: MeterQueryBody, *, request: Request, place: str) -> Response:
    async with asking(backend) as connected:
        stored = await needed_meter(connected, id_or_slug, version=body.version, deleted=False)
        meter = read_meter(stored.body)
        try:
            question = read_question(body, meter)
            async with of_whole_log(connected, since=_counted_from(meter, question.since), until=question.until):
                rows = await ask_meter(connected, meter, question)
        except InvalidQuestion as error:
            raise _invalid(error.problems, place=place) from error
        except TooManyWindows as error:
            raise _invalid([Finding("windowSize", str(error))], place=place) from error
        except TooManyRows as error:
            raise Problem(400, "too_many_rows", str(error)) from error
    accepted = request.headers.get("accept", "")
    if _CSV in accepted and _JSON not in accepted:
        name = f'attachment; filename="{stored.body.slug}.csv"'
        return Response(answer_as_csv(question, rows), media_type=_CSV, headers={"Content-Disposition": name})
    return Response(answer_as_json(body, question, rows), media_type=_JSON)


async def _values(backend: Backend, id_or_slug: str, group: str, *, since: str | None, until: str | None) -> list[str]:
    problems: list[Finding] = []
    first, last = _time("from", since, problems), _time("to", until, problems)
    if problems:
        raise _invalid(problems, place="query")
    async with asking(backend) as connected:
        stored = await needed_meter(connected, id_or_slug, deleted=False)
        meter = read_meter(stored.body)
        if group != SUBJECT and group not in meter.group_by:
            raise Problem(404, "unknown_group", f"the meter {stored.body.slug!r} has no group {group[:64]!r}")
        try:
            async with of_whole_log(connected, since=_counted_from(meter, first), until=last):
                return await list_values(connected, meter, group, since=first, until=last)
        except TooManyRows as error:
            raise Problem(400, "too_many_rows", str(error)) from error


def _counted_from(meter: Meter, since: datetime | None) -> datetime | None:
    """What happened before a meter's own beginning is none of its business."""
    found = [each for each in (since, meter.event_from) if each is not None]
    return max(found) if found else None


def _time(name: str, text: str | None, problems: list[Finding]) -> datetime | None:
    try:
        return None if text is None else _TIME.validate_python(text)
    except ValidationError as error:
        problems.append(Finding(name, error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")))
        return None


def _invalid(problems: Sequence[Finding], *, place: str) -> Problem:
    errors = [{"pointer": f"/{place}/{each.field.replace('.', '/')}", "detail": each.message} for each in problems]
    return Problem(400, "invalid_question", f"the question has {len(errors)} problem(s): see errors", errors=errors)
