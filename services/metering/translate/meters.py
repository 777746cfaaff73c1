"""Meters and questions to them as the catalogue, the table and HTTP have them: OpenMeter's names and shapes."""

import ast
import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Annotated, Any, Final, Self
from zoneinfo import ZoneInfo, available_timezones

import msgspec
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from contracts.accounts import check_account
from contracts.envelope import Problem
from contracts.times import Time
from services.metering.domain.meters import (
    ACCOUNT_GROUP,
    SUBJECT,
    Aggregate,
    Aggregation,
    AllOf,
    AnyOf,
    Comparison,
    Filter,
    Meter,
    MeterQuestion,
    Operator,
    read_path,
)
from services.metering.domain.windows import WindowSize

GROUPS_MAX: Final = 32
FILTERS_MAX: Final = 32
FILTER_VALUES_MAX: Final = 100
FILTER_DEPTH_MAX: Final = 4
SUBJECTS_MAX: Final = 100
UTC_NAME: Final = "UTC"

# Postgres has no text with a NUL in it.
_TEXT: Final = r"^[^\x00]*$"


def _check_path(text: str) -> str:
    read_path(text)
    return text


def _check_zone(name: str) -> str:
    if name not in _zones():
        raise ValueError(f"{name[:64]!r} is no time zone of the IANA database, like Europe/Berlin")
    return name


@cache
def _zones() -> frozenset[str]:
    return frozenset(available_timezones())


def _check_pattern(text: str) -> str:
    if len(text) - len(text.rstrip("\\")) & 1:
        raise ValueError("a pattern does not end with the escape character")
    return text


PathText = Annotated[str, AfterValidator(_check_path), Field(examples=["$.input_tokens"])]
ZoneName = Annotated[str, AfterValidator(_check_zone), Field(examples=["Europe/Berlin"])]
GroupName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
FilterText = Annotated[str, Field(max_length=512, pattern=_TEXT)]
Pattern = Annotated[FilterText, AfterValidator(_check_pattern)]
FilterTexts = Annotated[list[FilterText], Field(min_length=1, max_length=FILTER_VALUES_MAX)]
SubjectText = Annotated[str, Field(min_length=1, max_length=512, pattern=_TEXT)]


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", alias_generator=to_camel, populate_by_name=True)


class FilterRow(BaseModel):
    """What a text must be. Several members must all be met. Texts are compared by their code points."""

    model_config = ConfigDict(extra="forbid", alias_generator=lambda name: f"${name.rstrip('_')}")

    eq: FilterText | None = None
    ne: FilterText | None = None
    in_: FilterTexts | None = None
    nin: FilterTexts | None = None
    like: Pattern | None = None
    nlike: Pattern | None = None
    ilike: Pattern | None = None
    nilike: Pattern | None = None
    gt: FilterText | None = None
    gte: FilterText | None = None
    lt: FilterText | None = None
    lte: FilterText | None = None
    and_: Annotated[list["FilterRow"], Field(min_length=1, max_length=FILTER_VALUES_MAX)] | None = None
    or_: Annotated[list["FilterRow"], Field(min_length=1, max_length=FILTER_VALUES_MAX)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.model_fields_set or all(getattr(self, name) is None for name in self.model_fields_set):
            raise ValueError("a filter says at least one thing, like {'$eq': 'openai'}")
        if _depth(self) > FILTER_DEPTH_MAX:
            raise ValueError(f"filters are nested at most {FILTER_DEPTH_MAX} deep")
        return self


class MeterChange(_Row):
    """A meter's new version. What OpenMeter's clients can change is replaced: left out, it is none.

    `aggregation`, `eventType`, `valueProperty`, `eventFrom` and `filters` stay as they are where they are left out.
    """

    name: Annotated[str, Field(max_length=256, pattern=_TEXT)] | None = None
    description: Annotated[str, Field(max_length=1024, pattern=_TEXT)] | None = None
    metadata: Annotated[dict[FilterText, FilterText], Field(max_length=GROUPS_MAX)] | None = None
    group_by: Annotated[dict[GroupName, PathText], Field(max_length=GROUPS_MAX)] | None = None
    aggregation: Aggregation | None = None
    event_type: Annotated[str, Field(min_length=1, max_length=256, pattern=_TEXT)] | None = None
    value_property: PathText | None = None
    event_from: Time | None = None
    filters: Annotated[dict[PathText, FilterRow], Field(max_length=FILTERS_MAX)] | None = None


class MeterBody(MeterChange):
    """A meter. `filters` are by JSONPath; an event that does not meet all of them is none of this meter's."""

    slug: Annotated[str, Field(pattern=r"^[a-z0-9]+(?:_[a-z0-9]+)*$", max_length=64, examples=["input_tokens"])]
    aggregation: Aggregation
    event_type: Annotated[str, Field(min_length=1, max_length=256, pattern=_TEXT, examples=["scrip.model.used.v1"])]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.aggregation == "COUNT":
            # As OpenMeter says: it is ignored.
            self.value_property = None
        elif self.value_property is None:
            raise ValueError(f"valueProperty is missing: it says of what the {self.aggregation} is")
        if taken := {SUBJECT, ACCOUNT_GROUP}.intersection(self.group_by or {}):
            raise ValueError(f"groupBy: every meter has the group {min(taken)} anyway")
        return self


class CatalogueMeter(MeterBody):
    """A meter of the catalogue. A change has a higher `version`."""

    version: Annotated[int, Field(ge=1, strict=True)]


class MeterView(_Row):
    """A meter as it is stored. `version` counts the changes of its slug; `source` is the catalogue or a principal."""

    id: str
    slug: str
    name: str | None = None
    description: str | None = None
    metadata: dict[str, str] | None = None
    aggregation: Aggregation
    event_type: str
    event_from: datetime | None = None
    value_property: str | None = None
    group_by: dict[str, str] | None = None
    filters: dict[str, FilterRow] | None = None
    version: int
    source: str
    created_at: datetime
    updated_at: datetime
    deleted_at: datetime | None = None


class MeterQueryBody(_Row):
    """A question to a meter, as OpenMeter's clients ask it. `from` is included, `to` is not.

    `filterCustomerId` are accounts, `subject` are subjects as they were reported. `version` asks an earlier version.
    """

    client_id: Annotated[str, Field(max_length=256)] | None = None
    from_: Annotated[Time | None, Field(alias="from")] = None
    to: Time | None = None
    window_size: WindowSize | None = None
    window_time_zone: ZoneName | None = None
    subject: Annotated[list[SubjectText], Field(max_length=SUBJECTS_MAX)] | None = None
    filter_customer_id: Annotated[list[SubjectText], Field(max_length=SUBJECTS_MAX)] | None = None
    filter_group_by: dict[GroupName, FilterText | Annotated[list[FilterText], Field(max_length=100)]] | None = None
    advanced_meter_group_by_filters: Annotated[dict[GroupName, FilterRow], Field(max_length=FILTERS_MAX)] | None = None
    group_by: Annotated[list[GroupName], Field(max_length=GROUPS_MAX + 2)] | None = None
    version: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None


class MeterAnswerRow(_Row):
    """The value of one window and group. `subject` and `customerId` are set if it was grouped by them."""

    # In the document alone: the answer is written exactly, not by way of a float.
    value: Annotated[Any, Field(json_schema_extra={"type": "number"})]
    window_start: datetime
    window_end: datetime
    subject: str | None
    customer_id: str | None = None
    group_by: dict[str, str]


class MeterAnswer(_Row):
    """What a meter answers, in the order of windows and groups. `from`, `to`, `windowSize` are as they were asked."""

    from_: Annotated[datetime | None, Field(alias="from")] = None
    to: datetime | None = None
    window_size: WindowSize | None = None
    data: list[MeterAnswerRow]


class InvalidQuestion(ValueError):
    """A question that cannot be answered; carries every problem found. Their fields are the question's members."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(f"{each.field}: {each.message}" for each in problems))
        self.problems = problems


_CATALOGUE: Final[TypeAdapter[list[CatalogueMeter]]] = TypeAdapter(list[CatalogueMeter])
_OPERATORS: Final[tuple[Operator, ...]] = (
    "eq",
    "ne",
    "in",
    "nin",
    "like",
    "nlike",
    "ilike",
    "nilike",
    "gt",
    "gte",
    "lt",
    "lte",
)


# Definitions ----------------------------------------------------------------------------------------------------------


def read_catalogue_meters(section: Any) -> list[CatalogueMeter]:
    """The catalogue's section `meters`. Raises ValueError, which names the place."""
    meters = _CATALOGUE.validate_python(section)
    if len({each.slug for each in meters}) != len(meters):
        raise ValueError("the catalogue lists a meter twice")
    return meters


def read_meter(body: MeterBody) -> Meter:
    """The meter that is defined."""
    return Meter(
        slug=body.slug,
        aggregation=body.aggregation,
        event_type=body.event_type,
        value=None if body.value_property is None else read_path(body.value_property),
        group_by={name: read_path(path) for name, path in (body.group_by or {}).items()},
        filters={read_path(path): _filter(row) for path, row in (body.filters or {}).items()},
        event_from=None if body.event_from is None else body.event_from.astimezone(UTC),
    )


def definition_as_json(body: MeterBody) -> str:
    """A definition as the table keeps it."""
    return body.model_dump_json(by_alias=True, exclude_none=True, exclude={"version"})


def read_definition(text: str) -> MeterBody:
    """A definition as the table has it."""
    return MeterBody.model_validate_json(text)


def is_same(one: MeterBody, other: MeterBody) -> bool:
    """Whether two definitions say the same. The table keeps no order of members."""
    decoded = [msgspec.json.decode(definition_as_json(each)) for each in (one, other)]
    return bool(decoded[0] == decoded[1])


def changed(body: MeterBody, change: MeterChange) -> MeterBody:
    """A meter's next definition. Raises ValidationError, a ValueError: it is none."""
    kept = {"aggregation", "event_type", "value_property", "event_from", "filters"}
    members = {"slug": body.slug} | {name: getattr(body, name) for name in kept}
    for name in MeterChange.model_fields:
        value = getattr(change, name)
        if value is not None or name not in kept:
            members[name] = value
    return MeterBody.model_validate(members)


def meter_view(
    body: MeterBody,
    *,
    id: str,
    version: int,
    source: str,
    created_at: datetime,
    updated_at: datetime,
    deleted_at: datetime | None,
) -> MeterView:
    """A stored meter as HTTP has it."""
    return MeterView(
        **{name: getattr(body, name) for name in MeterBody.model_fields if name != "version"},
        id=id,
        version=version,
        source=source,
        created_at=created_at.astimezone(UTC),
        updated_at=updated_at.astimezone(UTC),
        deleted_at=None if deleted_at is None else deleted_at.astimezone(UTC),
    )


def _filter(row: FilterRow) -> Filter:
    found: list[Filter] = []
    for operator in _OPERATORS:
        value = row.in_ if operator == "in" else getattr(row, operator)
        if value is not None:
            found.append(Comparison(operator, value if isinstance(value, list) else [value]))
    if row.and_ is not None:
        found.append(AllOf([_filter(each) for each in row.and_]))
    if row.or_ is not None:
        found.append(AnyOf([_filter(each) for each in row.or_]))
    return found[0] if len(found) == 1 else AllOf(found)


def _depth(row: FilterRow) -> int:
    return 1 + max((_depth(each) for each in [*(row.and_ or []), *(row.or_ or [])]), default=0)


# Questions ------------------------------------------------------------------------------------------------------------

_SINGLE: Final = frozenset({"clientId", "from", "to", "windowSize", "windowTimeZone", "version"})
_SEVERAL: Final = frozenset({"subject", "filterCustomerId", "groupBy"})
_OBJECTS: Final = frozenset({"filterGroupBy", "advancedMeterGroupByFilters"})
_NESTED: Final = re.compile(r"(\w+)((?:\[[^\[\]]*\]){1,2})")
_OBJECT_LENGTH_MAX: Final = 8_192


def read_parameters(parameters: Iterable[tuple[str, str]]) -> MeterQueryBody:
    """A question as a query string has it. InvalidQuestion.

    Objects come in brackets (`filterGroupBy[model]=gpt-4o`, as OpenMeter's JavaScript client sends them), as JSON, or
    as its Python client writes a mapping.
    """
    members: dict[str, Any] = {}
    problems: list[Problem] = []
    for name, value in parameters:
        nested = _NESTED.fullmatch(name)
        if name in _SINGLE and name not in members:
            members[name] = int(value) if name == "version" and value.isdecimal() and len(value) < 10 else value
        elif name in _SEVERAL:
            members.setdefault(name, []).append(value)
        elif name in _OBJECTS and isinstance(found := _read_object(value), dict):
            members.setdefault(name, {}).update(found)
        elif nested is not None and nested[1] in _OBJECTS:
            _put(members.setdefault(nested[1], {}), nested[2][1:-1].split("]["), value)
        else:
            problems.append(Problem(name[:64], _what_is_wrong(name, members)))
    try:
        body = MeterQueryBody.model_validate(members)
    except ValidationError as error:
        problems += [
            Problem(".".join(str(part) for part in found["loc"]), found["msg"].removeprefix("Value error, "))
            for found in error.errors(include_url=False, include_context=False, include_input=False)
        ]
    if problems:
        raise InvalidQuestion(problems)
    return body


def read_question(body: MeterQueryBody, meter: Meter) -> MeterQuestion:
    """What a meter is asked. InvalidQuestion."""
    problems: list[Problem] = []
    since = None if body.from_ is None else body.from_.astimezone(UTC)
    until = None if body.to is None else body.to.astimezone(UTC)
    if since is not None and until is not None and since >= until:
        problems.append(Problem("to", "to is not after from"))
    known = [SUBJECT, ACCOUNT_GROUP, *meter.group_by]
    groups = list(dict.fromkeys(body.group_by or ()))
    problems += [
        Problem("groupBy", f"the meter has no group {name}: it has {', '.join(known)}")
        for name in groups
        if name not in known
    ]
    # As OpenMeter has it: who filters by subject is answered by subject.
    groups += [SUBJECT] if body.subject and SUBJECT not in groups else []
    groups += [ACCOUNT_GROUP] if body.filter_customer_id and ACCOUNT_GROUP not in groups else []
    if body.filter_group_by and body.advanced_meter_group_by_filters:
        problems.append(Problem("filterGroupBy", "it goes not together with advancedMeterGroupByFilters"))
    filters: dict[str, Filter] = {
        name: Comparison("in", values if isinstance(values, list) else [values])
        for name, values in (body.filter_group_by or {}).items()
        if values != []
    }
    filters |= {name: _filter(row) for name, row in (body.advanced_meter_group_by_filters or {}).items()}
    problems += [
        Problem("filterGroupBy", f"the meter has no group {name}: it has {', '.join(known)}")
        for name in filters
        if name not in known
    ]
    for account in body.filter_customer_id or ():
        try:
            check_account(account)
        except ValueError as error:
            problems.append(Problem("filterCustomerId", str(error)))
    if problems:
        raise InvalidQuestion(problems)
    return MeterQuestion(
        since=since,
        until=until,
        size=body.window_size,
        zone=ZoneInfo(body.window_time_zone or UTC_NAME),
        group_by=groups,
        subjects=body.subject or None,
        accounts=body.filter_customer_id or None,
        filters=filters,
    )


def _read_object(text: str) -> object:
    """JSON, or a Python literal; None if it is neither."""
    if len(text) > _OBJECT_LENGTH_MAX:
        return None
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _put(members: dict[str, Any], names: Sequence[str], value: str) -> None:
    if len(names) == 1:
        # Twice the same name is either of two values.
        before = members.get(names[0])
        members[names[0]] = value if before is None else [*(before if isinstance(before, list) else [before]), value]
        return
    inner = members.setdefault(names[0], {})
    if not isinstance(inner, dict):
        members[names[0]] = inner = {}
    if names[1] in ("$in", "$nin"):
        inner.setdefault(names[1], []).append(value)
    else:
        inner[names[1]] = value


def _what_is_wrong(name: str, members: Mapping[str, Any]) -> str:
    if name in members:
        return "it is said twice"
    if name in _OBJECTS:
        return f"it is no JSON object of at most {_OBJECT_LENGTH_MAX} characters"
    return f"it is not known: known are {', '.join(sorted(_SINGLE | _SEVERAL | _OBJECTS))}"


# Answers --------------------------------------------------------------------------------------------------------------

# Numbers are written as they are, digit by digit.
_ANSWERS: Final = msgspec.json.Encoder(decimal_format="number")


def answer_as_json(body: MeterQueryBody, question: MeterQuestion, rows: Sequence[Aggregate]) -> bytes:
    """MeterAnswer."""
    said = {"from": body.from_, "to": body.to, "windowSize": body.window_size}
    data = []
    for row in rows:
        groups = dict(zip(question.group_by, row.groups, strict=True))
        each: dict[str, Any] = {
            "value": row.value,
            "windowStart": row.window_start,
            "windowEnd": row.window_end,
            "subject": groups.pop(SUBJECT, None),
        }
        if ACCOUNT_GROUP in groups:
            each["customerId"] = groups.pop(ACCOUNT_GROUP)
        each["groupBy"] = groups
        data.append(each)
    return _ANSWERS.encode({name: value for name, value in said.items() if value is not None} | {"data": data})


def answer_as_csv(question: MeterQuestion, rows: Sequence[Aggregate]) -> str:
    """The rows with OpenMeter's columns: window_start, window_end, subject, the groups, value."""
    names = [name for name in question.group_by if name != SUBJECT]
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow(["window_start", "window_end", SUBJECT, *names, "value"])
    for row in rows:
        groups = dict(zip(question.group_by, row.groups, strict=True))
        writer.writerow(
            [
                _shown(row.window_start),
                _shown(row.window_end),
                groups.get(SUBJECT, ""),
                *(groups[name] for name in names),
                f"{row.value:f}",
            ]
        )
    return written.getvalue()


def _shown(instant: datetime) -> str:
    return instant.isoformat().replace("+00:00", "Z")
