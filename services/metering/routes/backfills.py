"""What is staged for a backfill, applied, or forgotten."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec
from fastapi import APIRouter, Depends, Request, Response

from contracts.envelope import InvalidEvent
from services.kit.auth import Principal, require
from services.kit.clock import now
from services.kit.problems import Problem
from services.kit.telemetry import get_logger
from services.metering import store, translate
from services.metering.correcting import backfilling, records
from services.metering.correcting.records import Correction
from services.metering.domain.usage import Key, Usage
from services.metering.routes.backend import Backend, IngestLimits, connection
from services.metering.routes.corrections_shown import (
    UNKNOWN,
    DryRun,
    Id,
    locked,
    not_staging,
    previewed,
    shown,
    unknown,
)
from services.metering.translate.corrections import CorrectionView, StagedView

log = get_logger(__name__)


def add_backfilling(router: APIRouter, backend: Callable[[], Backend], limits: IngestLimits) -> None:
    """Events are staged; and then all of them applied, or discarded."""
    operator = Depends(require("operate"))

    @router.post(
        "/api/v1/corrections/{id}/events",
        responses={
            **UNKNOWN,
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
    async def stage_events(id: Id, request: Request) -> StagedView:
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
                found = await locked(connected, id)
                if found.state != "staging":
                    raise not_staging(found)
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
            **UNKNOWN,
            200: {"model": CorrectionView, "description": "A dry run; or it is applied, or being applied, already"},
            409: {"description": "It was discarded"},
        },
        dependencies=[operator],
    )
    async def apply(
        id: Id,
        response: Response,
        *,
        dry_run: DryRun = False,
    ) -> CorrectionView:
        """Log and charge what is staged, and have void what it replaces. It goes on after the answer."""
        async with connection(backend()) as connected, connected.transaction():
            found = await locked(connected, id)
            if found.state == "discarded":
                raise not_staging(found)
            is_new = found.state == "staging"
            if is_new and not dry_run:
                await records.apply(connected, id)
        response.status_code = 202 if is_new and not dry_run else 200
        if is_new and dry_run:
            return await previewed(backend(), replace(found, state="running"))
        backend().correcting()
        return await shown(backend(), id)

    @router.delete(
        "/api/v1/corrections/{id}",
        responses={**UNKNOWN, 409: {"description": "It was applied: undo it; or it is no backfill"}},
    )
    async def discard(id: Id, *, principal: Principal = operator) -> CorrectionView:
        """Forget what is staged, for good. The record stays, as `discarded`, and again it is that already."""
        async with connection(backend()) as connected:
            async with connected.transaction():
                found = await locked(connected, id)
                if found.state not in ("staging", "discarded"):
                    raise not_staging(found)
                if found.state == "staging":
                    await records.discard(connected, id, by=principal.name, at=now())
                    log.info("correction discarded", id=id, by=principal.name)
            # Whoever dies here leaves what whoever asks again deletes.
            while await backfilling.delete_staged(connected, found):
                pass
        return await shown(backend(), id)


async def _staging(backend: Backend, id: str) -> Correction:
    """A correction that takes events."""
    async with connection(backend) as connected:
        found = await records.find(connected, id)
    if found is None:
        raise unknown(id)
    if found.state != "staging":
        raise not_staging(found)
    return found


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
