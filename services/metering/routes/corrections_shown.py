"""What all routes of corrections need: a correction found, previewed, and as it is shown."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any, Final, TypeVar

import msgspec
from fastapi import Path, Query

from contracts.metering import CorrectionId
from contracts.money import Unit
from services.kit.problems import Problem
from services.metering.correcting import records
from services.metering.correcting.amending import total
from services.metering.correcting.changing import Item, VersionNotRead
from services.metering.correcting.jobs import Preview, preview
from services.metering.correcting.records import Correction, RecordedItem
from services.metering.domain.corrections import Amounts
from services.metering.domain.prices import PriceBook
from services.metering.queries.archive import PeriodArchived
from services.metering.routes.archive import archived
from services.metering.routes.backend import Backend, away_as_problem, connection
from services.metering.store import Connection
from services.metering.translate.corrections import (
    SHOWN_MAX,
    CorrectedEvent,
    CorrectionView,
    account_differences,
    difference_text,
    in_utc,
)

Id = Annotated[CorrectionId, Path(description="The correction's id")]
DryRun = Annotated[bool, Query(description="Only say what it would come to")]
UNKNOWN: Final[dict[int | str, dict[str, Any]]] = {404: {"description": "There is no correction of that id"}}
# What no id can be: a dry run needs none.
DRY_RUN: Final = "dry run"

# How often the price book is read again for a use that was charged under a version of a moment ago.
READS_MAX: Final = 3

Found = TypeVar("Found")


async def shown(backend: Backend, id: str) -> CorrectionView:
    """A correction, as it is recorded by now. Problem 404."""
    async with connection(backend) as connected:
        found = await records.find(connected, id)
    if found is None:
        raise unknown(id)
    return view(found, backend.prices.book().units)


async def locked(connected: Connection, id: str) -> Correction:
    """A correction that nobody else goes on with until the end of the transaction. Problem 404."""
    found = await records.find(connected, id, lock=True)
    if found is None:
        raise unknown(id)
    return found


async def with_prices_read(backend: Backend, attempt: Callable[[PriceBook], Awaitable[Found]]) -> Found:
    """What is found with the price book as it is now, read again if that is not all there is. Problem 503."""
    for reads in range(READS_MAX):
        async with away_as_problem():
            await backend.prices.refresh()
        try:
            return await attempt(backend.prices.book())
        except VersionNotRead as error:
            if reads == READS_MAX - 1:
                raise Problem(503, "prices_not_read", f"{error}: ask again") from error
    raise AssertionError("it was tried at least once")


async def previewed(backend: Backend, correction: Correction) -> CorrectionView:
    """What a long correction would come to."""

    async def tried(book: PriceBook) -> Preview:
        async with connection(backend) as connected:
            return await preview(connected, correction, book=book)

    try:
        found = await with_prices_read(backend, tried)
    except PeriodArchived as error:
        raise archived(error) from error
    units = backend.prices.book().units
    return as_dry_run(correction, found.items, found.counts, units).model_copy(update={"complete": found.complete})


def as_dry_run(
    correction: Correction, items: Sequence[Item], counts: Mapping[str, int], units: Mapping[str, Unit]
) -> CorrectionView:
    """A correction that would do that, and was not done."""
    return with_items(view(correction, units), items, units).model_copy(
        update={
            "id": None if correction.id == DRY_RUN else correction.id,
            "state": "dry_run",
            "recorded_at": None,
            "finished_at": None,
            "counts": counts,
            "difference": difference_text(total(items), units),
        }
    )


def with_items(shown: CorrectionView, items: Sequence[Item], units: Mapping[str, Unit]) -> CorrectionView:
    """A correction, with what it does to events and accounts."""
    return shown.model_copy(
        update={
            "events": [corrected(each, each.difference, units) for each in items[:SHOWN_MAX]],
            "accounts": account_differences(((each.account, each.difference) for each in items), units),
        }
    )


def corrected(item: Item | RecordedItem, difference: Amounts, units: Mapping[str, Unit]) -> CorrectedEvent:
    """What a correction does to an event."""
    return CorrectedEvent(
        source=item.source,
        id=item.event_id,
        account=item.account,
        occurred_at=item.occurred_at,
        from_revision=item.from_revision,
        to_revision=item.to_revision,
        difference=difference_text(difference, units),
    )


class _At(msgspec.Struct):
    """What every cursor says."""

    of: int
    done: int = 0


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


def unknown(id: str) -> Problem:
    """There is none of that id."""
    return Problem(404, "unknown_correction", f"there is no correction {id!r}")


def not_staging(found: Correction) -> Problem:
    """It is not, or no more, what takes events."""
    return Problem(
        409, "not_staging", f"the correction {found.id}, a {found.kind}, is {found.state}: nothing is staged"
    )
