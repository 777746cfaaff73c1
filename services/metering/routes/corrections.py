"""Corrections over HTTP: asked for, previewed, listed, shown."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import msgspec
from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from pydantic import BaseModel, TypeAdapter, ValidationError

from contracts.envelope import InvalidEvent
from contracts.metering import CorrectionId
from contracts.money import Unit
from services.kit.auth import Principal, require
from services.kit.clock import now
from services.kit.problems import Problem
from services.kit.telemetry import get_logger
from services.metering import store, translate
from services.metering.correcting import backfilling, records
from services.metering.correcting.amending import (
    Asked,
    CorrectionExists,
    Outcome,
    Refused,
    correct_named,
    total,
)
from services.metering.correcting.changing import Item, VersionNotRead
from services.metering.correcting.jobs import TRANSACTION_TIMEOUT, preview
from services.metering.correcting.records import Correction, NewCorrection, RecordedItem
from services.metering.correcting.versions import Named
from services.metering.domain.corrections import State
from services.metering.domain.usage import Key, Usage
from services.metering.queries.archive import PeriodArchived
from services.metering.routes.archive import of_whole_log
from services.metering.routes.backend import Backend, IngestLimits, away_as_problem, connection
from services.metering.routes.paging import Limit, cursor, not_a_place, read_cursor
from services.metering.store import Connection
from services.metering.translate.corrections import (
    SHOWN_MAX,
    AmendBody,
    BackfillBody,
    CorrectedEvent,
    CorrectionBody,
    CorrectionView,
    RerateBody,
    StagedView,
    UndoBody,
    VoidBody,
    account_differences,
    data_of,
    difference_text,
    hash_of,
    in_utc,
)

log = get_logger(__name__)

# How often the price book is read again for a use that was charged under a version of a moment ago.
READS_MAX: Final = 3
# What no id can be: a dry run needs none.
_DRY_RUN: Final = "dry run"

_ID: Final[TypeAdapter[str]] = TypeAdapter(CorrectionId)
_Id = Annotated[CorrectionId, Path(description="The correction's id")]
_UNKNOWN: Final[dict[int | str, dict[str, Any]]] = {404: {"description": "There is no correction of that id"}}


class _At(msgspec.Struct):
    """What every cursor says."""

    of: int
    done: int = 0


class CorrectionPage(BaseModel):
    """Corrections, the latest first. `next_after` asks for the next page; null on the last."""

    corrections: list[CorrectionView]
    next_after: str | None


class CorrectedPage(BaseModel):
    """What a correction did to which event, in the order of partition, source and id."""

    events: list[CorrectedEvent]
    next_after: str | None


def corrections_router(backend: Callable[[], Backend], *, limits: IngestLimits) -> APIRouter:
    """Corrections of what was charged."""
    router = APIRouter(tags=["corrections"])
    _add_asking(router, backend)
    _add_backfilling(router, backend, limits)
    _add_undoing(router, backend)
    _add_reading(router, backend)
    return router


def _add_asking(router: APIRouter, backend: Callable[[], Backend]) -> None:
    operator = Depends(require("operate"))

    @router.post(
        "/api/v1/corrections",
        status_code=201,
        responses={
            200: {"model": CorrectionView, "description": "A dry run; or it was asked for before, and came to this"},
            202: {"model": CorrectionView, "description": "It is under way"},
            404: {"description": "None of the events was ever reported"},
            409: {
                "description": "Under that id something else was asked for; some events cannot be corrected so; or use"
                " of that time is archived"
            },
            422: {"description": "It is no correction, or some data are not those of an event of that type"},
        },
    )
    async def correct(
        body: CorrectionBody,
        request: Request,
        response: Response,
        *,
        dry_run: Annotated[bool, Query(description="Only say what it would come to")] = False,
        idempotency_key: Annotated[str | None, Header(description="In place of `id`")] = None,
        principal: Principal = operator,
    ) -> CorrectionView:
        """Correct what was charged: only the difference is charged, or given back to the very lots it came from.

        The same again changes nothing and is answered with what it came to. Of events that are named all are corrected,
        or none. What may be much (`rerate`) goes on after the answer (202): ask for the correction how far it is. A
        `backfill` takes events first, and begins once it is applied.
        """
        raw = await request.body()
        new = NewCorrection(
            id=_id(body.id, idempotency_key, dry_run=dry_run),
            kind=body.kind,
            body_hash=_hash(raw),
            parameters=_parameters(body),
            reason=body.reason,
            actor=principal.name,
        )
        if not isinstance(body, VoidBody | AmendBody):
            await _check_version(backend(), body)
            async with connection(backend()) as connected, of_whole_log(connected, since=body.since, until=body.until):
                pass
            if dry_run:
                response.status_code = 200
                return await _previewed(backend(), _running(new))
            begun, response.status_code = await _begun(backend(), new)
            return begun
        outcome = await _corrected(backend(), new, _asked(body, raw), dry_run=dry_run)
        units = backend().prices.book().units
        if outcome.repeated is not None:
            response.status_code = 200
            return view(outcome.repeated, units)
        if dry_run:
            response.status_code = 200
        else:
            log.info("corrected", id=new.id, kind=new.kind, by=new.actor, **outcome.counts)
            backend().staged(outcome.rows)
        async with connection(backend()) as connected:
            found = None if dry_run else await records.find(connected, new.id)
        return _answer(new, outcome, found, units)


def _add_backfilling(router: APIRouter, backend: Callable[[], Backend], limits: IngestLimits) -> None:
    operator = Depends(require("operate"))

    @router.post(
        "/api/v1/corrections/{id}/events",
        responses={
            **_UNKNOWN,
            400: {"description": "Something is wrong with some events; all of it is named, and nothing was staged"},
            409: {"description": "It takes no events any more, or some are staged with other contents"},
            413: {"description": "There are more events than may come at once"},
        },
        dependencies=[operator],
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {
                        "schema": {
                            "oneOf": [
                                {"type": "object"},
                                {"type": "array", "items": {"type": "object"}, "maxItems": limits.batch_events_max},
                            ]
                        }
                    }
                },
            }
        },
    )
    async def stage_events(id: _Id, request: Request) -> StagedView:
        """Stage CloudEvents, one or an array, for a backfill: with `time`, whoever their `source` is.

        Staged again they are repeats. Nothing is logged or charged before the correction is applied.
        """
        bodies = _bodies(await request.body(), events_max=limits.batch_events_max)
        found = await _staging(backend(), id)
        parameters = msgspec.json.decode(found.parameters, type=backfilling.Parameters)
        usages = _staged(bodies, parameters)
        months = {usage.occurred_at.date().replace(day=1) for usage in usages}
        async with connection(backend()) as connected:
            # Apart: making one locks the log.
            await store.ensure_months(connected, (month for month in months if month >= store.FIRST_MONTH))
            async with connected.transaction():
                found = await _locked(connected, id)
                if found.state != "staging":
                    raise _not_staging(found)
                foreign = await backfilling.find_foreign(connected, usages)
                staged = await backfilling.stage_events(connected, found, usages)
                errors = [
                    {"index": index, "field": "subject", "detail": f"it stands for {foreign[usage.subject]}"}
                    for index, usage in enumerate(usages)
                    if usage.subject in foreign
                ]
                if errors:
                    raise Problem(400, "invalid_events", "some subjects stand for other accounts", errors=errors)
                if staged.conflicting:
                    raise Problem(
                        409,
                        "staged_otherwise",
                        f"{len(staged.conflicting)} events are staged with other contents, and nothing was staged",
                        errors=[{"index": index, "id": usages[index].event_id} for index in staged.conflicting],
                    )
        return StagedView(new=staged.new, repeated=staged.repeated, total=staged.total)

    @router.post(
        "/api/v1/corrections/{id}/apply",
        status_code=202,
        responses={
            **_UNKNOWN,
            200: {"model": CorrectionView, "description": "A dry run; or it is applied, or being applied, already"},
            409: {"description": "It was discarded"},
        },
        dependencies=[operator],
    )
    async def apply(
        id: _Id,
        response: Response,
        *,
        dry_run: Annotated[bool, Query(description="Only say what it would come to")] = False,
    ) -> CorrectionView:
        """Log and charge what is staged, and have void what it replaces. It goes on after the answer."""
        async with connection(backend()) as connected, connected.transaction():
            found = await _locked(connected, id)
            if found.state == "discarded":
                raise _not_staging(found)
            is_new = found.state == "staging"
            if is_new and not dry_run:
                await records.apply(connected, id)
        response.status_code = 202 if is_new and not dry_run else 200
        if is_new and dry_run:
            return await _previewed(backend(), replace(found, state="running"))
        backend().correcting()
        return await _shown(backend(), id)

    @router.delete(
        "/api/v1/corrections/{id}",
        responses={**_UNKNOWN, 409: {"description": "It was applied: undo it; or it is no backfill"}},
    )
    async def discard(id: _Id, *, principal: Principal = operator) -> CorrectionView:
        """Forget what is staged, for good. The record stays, as `discarded`, and again it is that already."""
        async with connection(backend()) as connected:
            async with connected.transaction():
                found = await _locked(connected, id)
                if found.state not in ("staging", "discarded"):
                    raise _not_staging(found)
                if found.state == "staging":
                    await records.discard(connected, id, by=principal.name, at=now())
                    log.info("correction discarded", id=id, by=principal.name)
            # Whoever dies here leaves what whoever asks again deletes.
            while await backfilling.delete_staged(connected, found):
                pass
        return await _shown(backend(), id)


def _add_undoing(router: APIRouter, backend: Callable[[], Backend]) -> None:
    operator = Depends(require("operate"))

    @router.post(
        "/api/v1/corrections/{id}/undo",
        status_code=202,
        responses={
            **_UNKNOWN,
            200: {"model": CorrectionView, "description": "A dry run; or it is undone, or being undone, already"},
            409: {"description": "It is under way; it was discarded; or it settled what a price had lowered"},
        },
    )
    async def undo(
        id: _Id,
        body: UndoBody,
        response: Response,
        *,
        dry_run: Annotated[bool, Query(description="Only say what it would come to")] = False,
        principal: Principal = operator,
    ) -> CorrectionView:
        """Have every event be what it was before, by the same difference. What was corrected since is left as it is.

        An event that had waited waits again, or is charged by what is known now.
        """
        async with connection(backend()) as connected, connected.transaction():
            found = await _locked(connected, id)
            if found.kind == "settle":
                said = f"the correction {id} gave back what a price has lowered: correct the use that did, or re-rate"
                raise Problem(409, "settled", said)
            if found.state == "discarded":
                raise _not_staging(found)
            if found.state in ("staging", "running"):
                raise Problem(409, "under_way", f"the correction {id} is {found.state}: undo it once it is done")
            is_new = found.state == "done"
            if is_new and not dry_run:
                await records.begin_undo(connected, id, by=principal.name, reason=body.reason, at=now())
        if is_new and dry_run:
            response.status_code = 200
            return await _previewed(backend(), replace(found, state="undoing", undo_reason=body.reason))
        if is_new:
            log.info("correction is undone", id=id, by=principal.name)
            backend().correcting()
        else:
            response.status_code = 200
        return await _shown(backend(), id)


def _add_reading(router: APIRouter, backend: Callable[[], Backend]) -> None:
    reader = Depends(require("metering:read"))

    @router.get("/api/v1/corrections", dependencies=[reader])
    async def list_corrections(limit: Limit = 100, after: str | None = None) -> CorrectionPage:
        """All corrections, the latest first."""
        place = None
        if after is not None:
            try:
                at, id = read_cursor(after, list[str])
                place = (datetime.fromisoformat(at).astimezone(UTC), id)
            except (ValueError, OverflowError) as error:
                raise not_a_place() from error
        async with connection(backend()) as connected:
            found = await records.list_before(connected, place, limit=limit + 1)
        units = backend().prices.book().units
        page = found[:limit]
        last = page[-1] if len(found) > limit else None
        return CorrectionPage(
            corrections=[view(each, units) for each in page],
            next_after=cursor([last.recorded_at.isoformat(), last.id]) if last else None,
        )

    @router.get("/api/v1/corrections/{id}", dependencies=[reader], responses=_UNKNOWN)
    async def show_correction(id: _Id) -> CorrectionView:
        """A correction: what was asked for, how far it is, and what it came to."""
        return await _shown(backend(), id)

    @router.get("/api/v1/corrections/{id}/events", dependencies=[reader], responses=_UNKNOWN)
    async def list_corrected(id: _Id, limit: Limit = 100, after: str | None = None) -> CorrectedPage:
        """What a correction did to which event."""
        place = read_cursor(after, tuple[int, str, str]) if after is not None else (-1, "", "")
        async with connection(backend()) as connected:
            known = await records.find(connected, id)
            found = await records.items_after(connected, id, place, limit=limit + 1)
        if known is None:
            raise _unknown(id)
        page = found[:limit]
        last = page[-1] if len(found) > limit else None
        units = backend().prices.book().units
        return CorrectedPage(
            events=[_recorded(each, units) for each in page], next_after=cursor(last.key) if last else None
        )


def _hash(body: bytes) -> bytes:
    try:
        return hash_of(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ArithmeticError) as error:
        # What one reader of JSON lets pass another one need not.
        raise Problem(422, "not_readable", f"the body is not JSON that can be kept: {error}") from error


def _id(in_body: str | None, in_header: str | None, *, dry_run: bool) -> str:
    if in_body is not None and in_header is not None and in_body != in_header:
        raise Problem(422, "two_ids", f"the correction's id is {in_body!r}, and in Idempotency-Key {in_header!r}")
    found = in_body if in_body is not None else in_header
    if found is None:
        if dry_run:
            return _DRY_RUN
        raise Problem(422, "id_missing", "a correction has an id of yours, in `id` or Idempotency-Key: it is done once")
    try:
        return _ID.validate_python(found)
    except ValidationError as error:
        raise Problem(422, "invalid_id", f"{found!r} is no id: letters, digits, and . _ : - up to 128") from error


async def _locked(connected: Connection, id: str) -> Correction:
    found = await records.find(connected, id, lock=True)
    if found is None:
        raise _unknown(id)
    return found


async def _staging(backend: Backend, id: str) -> Correction:
    """A correction that takes events."""
    async with connection(backend) as connected:
        found = await records.find(connected, id)
    if found is None:
        raise _unknown(id)
    if found.state != "staging":
        raise _not_staging(found)
    return found


def _not_staging(found: Correction) -> Problem:
    return Problem(
        409, "not_staging", f"the correction {found.id}, a {found.kind}, is {found.state}: nothing is staged"
    )


def _bodies(body: bytes, *, events_max: int) -> list[bytes]:
    try:
        found = [msgspec.Raw(body)]
        if body.lstrip()[:1] == b"[":
            found = msgspec.json.decode(body, type=list[msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(400, "not_a_batch", f"the body is not a JSON array of events: {error}") from error
    if len(found) > events_max:
        raise Problem(413, "batch_too_large", f"the batch holds {len(found)} events, more than {events_max}")
    return [bytes(each) for each in found]


def _staged(bodies: Sequence[bytes], parameters: backfilling.Parameters) -> list[Usage]:
    """The events of a request, each once. Problem 400 names everything that is wrong with any."""
    usages: list[Usage] = []
    errors = []
    hashes: dict[Key, bytes] = {}
    for index, body in enumerate(bodies):
        try:
            usage = translate.staged_usage(body, received_at=now(), since=parameters.since, until=parameters.until)
        except InvalidEvent as error:
            errors += [{"index": index, "field": each.field, "detail": each.message} for each in error.problems]
            continue
        if not parameters.covers(usage.account):
            said = f"{usage.account} is not {parameters.account}" + (" or below it" if parameters.tree else "")
            errors.append({"index": index, "field": "subject", "detail": said})
        if hashes.setdefault(usage.key, usage.body_hash) != usage.body_hash:
            said = "another event of the batch has that source and id, and other contents"
            errors.append({"index": index, "field": "id", "detail": said})
        usages.append(usage)
    if errors:
        bad = len({each["index"] for each in errors})
        said = f"{bad} of {len(bodies)} events cannot be staged, and nothing was: see errors"
        raise Problem(400, "invalid_events", said, errors=errors)
    return usages


def _parameters(body: VoidBody | AmendBody | RerateBody | BackfillBody) -> str:
    if isinstance(body, RerateBody | BackfillBody):
        asked = body.model_dump(mode="json", by_alias=True, exclude={"id", "kind", "reason"}, exclude_none=True)
        return records.as_json(asked)
    return records.as_json({"events": len(body.events)})


async def _check_version(backend: Backend, body: RerateBody | BackfillBody) -> None:
    if isinstance(body, BackfillBody):
        return
    async with away_as_problem():
        await backend.prices.refresh()
    if body.price_version is not None and backend.prices.book().find(body.price_version) is None:
        raise Problem(422, "unknown_version", f"there is no price version {body.price_version!r}")


async def _begun(backend: Backend, new: NewCorrection) -> tuple[CorrectionView, int]:
    """A correction that is under way from now on, or was asked for before; and the status to say so with."""
    async with connection(backend) as connected:
        state: State = "staging" if new.kind == "backfill" else "running"
        is_new = await records.begin(connected, new, state=state, recorded_at=now())
        if not is_new:
            found = await records.find(connected, new.id)
            if found is None or found.body_hash != new.body_hash:
                raise Problem(409, "correction_exists", str(CorrectionExists(new.id)))
    if is_new:
        log.info("correction begun", id=new.id, kind=new.kind, by=new.actor)
        backend.correcting()
    started = 201 if new.kind == "backfill" else 202
    return await _shown(backend, new.id), started if is_new else 200


async def _previewed(backend: Backend, correction: Correction) -> CorrectionView:
    """What a long correction would come to."""
    for reads in range(READS_MAX):
        try:
            async with away_as_problem():
                await backend.prices.refresh()
            async with connection(backend) as connected:
                found = await preview(connected, correction, book=backend.prices.book())
        except VersionNotRead as error:
            if reads == READS_MAX - 1:
                raise Problem(503, "prices_not_read", f"{error}: ask again") from error
            continue
        except PeriodArchived as error:
            raise Problem(
                409, "archived", str(error), members={"months": [f"{month:%Y-%m}" for month in error.months]}
            ) from error
        break
    units = backend.prices.book().units
    shown = view(correction, units)
    return shown.model_copy(
        update={
            "id": None if correction.id == _DRY_RUN else correction.id,
            "state": "dry_run",
            "recorded_at": None,
            "finished_at": None,
            "counts": found.counts,
            "difference": difference_text(total(found.items), units),
            "complete": found.complete,
            "events": [_done(each, units) for each in found.items[:SHOWN_MAX]],
            "accounts": account_differences(((each.account, each.difference) for each in found.items), units),
        }
    )


def _running(new: NewCorrection) -> Correction:
    """A correction as it is when it begins."""
    return Correction(
        id=new.id,
        kind=new.kind,
        state="running",
        body_hash=new.body_hash,
        parameters=new.parameters,
        reason=new.reason,
        actor=new.actor,
        recorded_at=now(),
        finished_at=None,
        cursor=None,
        counts="{}",
        difference="{}",
        undone_by=None,
        undo_reason=None,
        undone_at=None,
    )


async def _shown(backend: Backend, id: str) -> CorrectionView:
    async with connection(backend) as connected:
        found = await records.find(connected, id)
    if found is None:
        raise _unknown(id)
    return view(found, backend.prices.book().units)


def _asked(body: VoidBody | AmendBody, raw: bytes) -> list[Asked]:
    names = [Named(each.source, each.id, each.account) for each in body.events]
    if isinstance(body, VoidBody):
        return [Asked(each) for each in names]
    return [Asked(each, data) for each, data in zip(names, data_of(raw), strict=True)]


async def _corrected(backend: Backend, new: NewCorrection, asked: Sequence[Asked], *, dry_run: bool) -> Outcome:
    """Do it in one transaction, or say why not. A dry run does it all, and takes it back."""
    for reads in range(READS_MAX):
        try:
            async with away_as_problem():
                await backend.prices.refresh()
            async with connection(backend) as connected, connected.transaction(force_rollback=dry_run):
                # Whoever is stuck holds its heads' locks against ingest no longer than this.
                await connected.execute(f"SET LOCAL transaction_timeout = '{TRANSACTION_TIMEOUT}'")
                return await correct_named(connected, new, asked, book=backend.prices.book())
        except VersionNotRead as error:
            if reads == READS_MAX - 1:
                raise Problem(503, "prices_not_read", f"{error}: ask again") from error
        except CorrectionExists as error:
            raise Problem(409, "correction_exists", str(error)) from error
        except Refused as error:
            raise _refused(error, asked) from error
    raise AssertionError("it was tried at least once")


def _refused(error: Refused, asked: Sequence[Asked]) -> Problem:
    codes = {each.code for each in error.refusals}
    status = 404 if codes == {"unknown_event"} else 422 if codes & {"invalid_data", "named_twice"} else 409
    code = codes.pop() if len(codes) == 1 else "cannot_be_corrected"
    return Problem(
        status,
        code,
        f"{len({each.index for each in error.refusals})} of {len(asked)} events cannot be corrected, and none was:"
        f" {error}",
        errors=[
            {
                "pointer": f"/body/events/{each.index}" + (f"/{each.field.replace('.', '/')}" if each.field else ""),
                "source": asked[each.index].named.source,
                "id": asked[each.index].named.event_id,
                "code": each.code,
                "detail": each.detail,
                **({"accounts": list(each.accounts)} if each.accounts else {}),
            }
            for each in error.refusals[:SHOWN_MAX]
        ],
    )


def _unknown(id: str) -> Problem:
    return Problem(404, "unknown_correction", f"there is no correction {id!r}")


def view(found: Correction, units: Mapping[str, Unit]) -> CorrectionView:
    """A correction as it is recorded."""
    counts: dict[str, int] = msgspec.json.decode(found.counts)
    at = None if found.cursor is None else msgspec.json.decode(found.cursor, type=_At)
    return CorrectionView(
        id=found.id,
        kind=found.kind,
        state=found.state,
        reason=found.reason,
        actor=found.actor,
        parameters=msgspec.json.decode(found.parameters),
        recorded_at=in_utc(found.recorded_at),
        finished_at=in_utc(found.finished_at),
        counts=counts,
        difference=difference_text(records.amounts_from(found.difference), units),
        done=None if at is None else at.done,
        of=None if at is None else max(at.of, at.done),
        undone_by=found.undone_by,
        undo_reason=found.undo_reason,
        undone_at=in_utc(found.undone_at),
    )


def _answer(
    new: NewCorrection, outcome: Outcome, found: Correction | None, units: Mapping[str, Unit]
) -> CorrectionView:
    events = [_done(each, units) for each in outcome.items[:SHOWN_MAX]]
    accounts = account_differences(((each.account, each.difference) for each in outcome.items), units)
    if found is not None:
        return view(found, units).model_copy(update={"events": events, "accounts": accounts})
    return CorrectionView(
        id=None if new.id == _DRY_RUN else new.id,
        kind=new.kind,
        state="dry_run",
        reason=new.reason,
        actor=new.actor,
        parameters=msgspec.json.decode(new.parameters),
        recorded_at=None,
        finished_at=None,
        counts=outcome.counts,
        difference=difference_text(outcome.difference, units),
        events=events,
        accounts=accounts,
    )


def _done(item: Item, units: Mapping[str, Unit]) -> CorrectedEvent:
    return CorrectedEvent(
        source=item.source,
        id=item.event_id,
        account=item.account,
        occurred_at=item.occurred_at,
        from_revision=item.from_revision,
        to_revision=item.to_revision,
        difference=difference_text(item.difference, units),
    )


def _recorded(item: RecordedItem, units: Mapping[str, Unit]) -> CorrectedEvent:
    return CorrectedEvent(
        source=item.source,
        id=item.event_id,
        account=item.account,
        occurred_at=item.occurred_at,
        from_revision=item.from_revision,
        to_revision=item.to_revision,
        difference=difference_text(records.amounts_from(item.difference), units),
        undone=item.undone,
        undone_revision=item.undone_revision,
    )
