"""Corrections are undone."""

from collections.abc import Callable
from dataclasses import replace

from fastapi import APIRouter, Depends, Response

from services.kit.auth import Principal, require
from services.kit.clock import now
from services.kit.problems import Problem
from services.kit.telemetry import get_logger
from services.metering.correcting import records
from services.metering.correcting.undoing import check_undoable
from services.metering.queries.archive import PeriodArchived
from services.metering.routes.archive import archived
from services.metering.routes.backend import Backend, connection
from services.metering.routes.corrections_shown import UNKNOWN, DryRun, Id, locked, not_staging, previewed, shown
from services.metering.store import Connection
from services.metering.translate.corrections import CorrectionView, UndoBody

log = get_logger(__name__)


def add_undoing(router: APIRouter, backend: Callable[[], Backend]) -> None:
    """One way to."""
    operator = Depends(require("operate"))

    @router.post(
        "/api/v1/corrections/{id}/undo",
        status_code=202,
        responses={
            **UNKNOWN,
            200: {"model": CorrectionView, "description": "A dry run; or it is undone, or being undone, already"},
            409: {
                "description": "It is under way; it was discarded; it settled what a price had lowered; or use that it"
                " corrected is archived"
            },
        },
    )
    async def undo(
        id: Id,
        body: UndoBody,
        response: Response,
        *,
        dry_run: DryRun = False,
        principal: Principal = operator,
    ) -> CorrectionView:
        """Have every event be what it was before, by the same difference. What was corrected since is left as it is.

        An event that had waited waits again, or is charged by what is known now.
        """
        async with connection(backend()) as connected, connected.transaction():
            found = await locked(connected, id)
            if found.kind == "settle":
                said = f"the correction {id} gave back what a price has lowered: correct the use that did, or re-rate"
                raise Problem(409, "settled", said)
            if found.state == "discarded":
                raise not_staging(found)
            if found.state in ("staging", "running"):
                raise Problem(409, "under_way", f"the correction {id} is {found.state}: undo it once it is done")
            is_new = found.state == "done"
            if is_new:
                await _check(connected, id)
            if is_new and not dry_run:
                await records.begin_undo(connected, id, by=principal.name, reason=body.reason, at=now())
        if is_new and dry_run:
            response.status_code = 200
            return await previewed(backend(), replace(found, state="undoing", undo_reason=body.reason))
        if is_new:
            log.info("correction is undone", id=id, by=principal.name)
            backend().correcting()
        else:
            response.status_code = 200
        return await shown(backend(), id)


async def _check(connection: Connection, id: str) -> None:
    try:
        await check_undoable(connection, id)
    except PeriodArchived as error:
        raise archived(error) from error
