"""Corrections are asked for: what is named is corrected at once, what may be much is begun."""

from collections.abc import Callable, Sequence
from typing import Annotated, Final

import msgspec
from fastapi import APIRouter, Depends, Header, Request, Response
from pydantic import TypeAdapter, ValidationError

from contracts.metering import CorrectionId
from services.kit.auth import Principal, require
from services.kit.clock import now
from services.kit.problems import Problem
from services.kit.telemetry import get_logger
from services.metering.correcting import records
from services.metering.correcting.amending import Asked, CorrectionExists, Outcome, Refused, correct_named
from services.metering.correcting.jobs import TRANSACTION_TIMEOUT
from services.metering.correcting.records import Correction, NewCorrection
from services.metering.correcting.versions import Named
from services.metering.domain.corrections import State
from services.metering.domain.prices import PriceBook
from services.metering.routes.archive import of_whole_log
from services.metering.routes.backend import Backend, away_as_problem, connection
from services.metering.routes.corrections_shown import (
    DRY_RUN,
    DryRun,
    as_dry_run,
    previewed,
    shown,
    view,
    with_items,
    with_prices_read,
)
from services.metering.translate.corrections import (
    SHOWN_MAX,
    AmendBody,
    BackfillBody,
    CorrectionBody,
    CorrectionView,
    RerateBody,
    VoidBody,
    data_of,
    hash_of,
)

log = get_logger(__name__)

_ID: Final[TypeAdapter[str]] = TypeAdapter(CorrectionId)


def add_asking(router: APIRouter, backend: Callable[[], Backend]) -> None:
    """Void, amend, re-rate and backfill."""
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
        dry_run: DryRun = False,
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
                return await previewed(backend(), _running(new))
            begun, response.status_code = await _begun(backend(), new)
            return begun
        outcome = await _corrected(backend(), new, _asked(body, raw), dry_run=dry_run)
        units = backend().prices.book().units
        if outcome.repeated is not None:
            response.status_code = 200
            return view(outcome.repeated, units)
        if dry_run:
            response.status_code = 200
            return as_dry_run(_running(new), outcome.items, outcome.counts, units)
        log.info("corrected", id=new.id, kind=new.kind, by=new.actor, **outcome.counts)
        backend().staged(outcome.rows)
        return with_items(await shown(backend(), new.id), outcome.items, units)


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
            return DRY_RUN
        raise Problem(422, "id_missing", "a correction has an id of yours, in `id` or Idempotency-Key: it is done once")
    try:
        return _ID.validate_python(found)
    except ValidationError as error:
        raise Problem(422, "invalid_id", f"{found!r} is no id: letters, digits, and . _ : - up to 128") from error


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
    return await shown(backend, new.id), started if is_new else 200


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


def _asked(body: VoidBody | AmendBody, raw: bytes) -> list[Asked]:
    names = [Named(each.source, each.id, each.account) for each in body.events]
    if isinstance(body, VoidBody):
        return [Asked(each) for each in names]
    return [Asked(each, data) for each, data in zip(names, data_of(raw), strict=True)]


async def _corrected(backend: Backend, new: NewCorrection, asked: Sequence[Asked], *, dry_run: bool) -> Outcome:
    """Do it in one transaction, or say why not. A dry run does it all, and takes it back."""

    async def correct(book: PriceBook) -> Outcome:
        async with connection(backend) as connected, connected.transaction(force_rollback=dry_run):
            # Whoever is stuck holds its heads' locks against ingest no longer than this.
            await connected.execute(f"SET LOCAL transaction_timeout = '{TRANSACTION_TIMEOUT}'")
            return await correct_named(connected, new, asked, book=book)

    try:
        return await with_prices_read(backend, correct)
    except CorrectionExists as error:
        raise Problem(409, "correction_exists", str(error)) from error
    except Refused as error:
        raise _refused(error, asked) from error


def _refused(error: Refused, asked: Sequence[Asked]) -> Problem:
    codes = {each.code for each in error.refusals}
    status = 404 if codes == {"unknown_event"} else 422 if codes & {"invalid_data", "named_twice"} else 409
    code = codes.pop() if len(codes) == 1 else "cannot_be_corrected"
    months = sorted({f"{each.month:%Y-%m}" for each in error.refusals if each.month is not None})
    return Problem(
        status,
        code,
        f"{len({each.index for each in error.refusals})} of {len(asked)} events cannot be corrected, and none was:"
        f" {error}",
        members={"months": months} if months else {},
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
