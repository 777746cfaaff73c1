"""Uses that are named: void, and amend. All that were asked for in one transaction, or nothing."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Final

import msgspec

from contracts.envelope import InvalidEvent, Problem
from contracts.partition import partition_of
from services.kit.clock import now
from services.kit.outbox import OutboxRow
from services.metering import store, translate
from services.metering.correcting import carrying, records, versions
from services.metering.correcting.changing import Change, Item, Rating, Task, Voided, WaitsForAlias
from services.metering.correcting.records import Correction, NewCorrection, Progress
from services.metering.correcting.versions import Found, Named, Place
from services.metering.domain.prices import PriceBook
from services.metering.domain.usage import Usage
from services.metering.queries.archive import find_archived
from services.metering.store import Connection
from services.metering.translate.items import is_same_data

# Of a request: they are one transaction.
EVENTS_MAX: Final = 1_000


@dataclass(frozen=True, slots=True)
class Asked:
    """A use that is to be corrected; `data`, as it was written, is what it is to be. None: it is void."""

    named: Named
    data: bytes | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a use that is named cannot be corrected. `code` is stable: unknown_event, ambiguous, archived, void, ….

    `accounts`: whose it may be, if it is ambiguous. `month`: which one is to be restored, if it is archived.
    """

    index: int
    code: str
    detail: str
    field: str | None = None
    accounts: Sequence[str] = ()
    month: date | None = None


class Refused(Exception):
    """Some uses cannot be corrected, so none was."""

    def __init__(self, refusals: Sequence[Refusal]) -> None:
        said = (each.detail if each.field is None else f"{each.field}: {each.detail}" for each in refusals[:3])
        super().__init__("; ".join(said))
        self.refusals = refusals


class CorrectionExists(Exception):
    """Under that id something else was asked for."""

    def __init__(self, id: str) -> None:
        super().__init__(f"the correction {id} is recorded, and asks for something else: give this one another id")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a correction came to. `repeated`: it was asked for before, and this is what it came to then."""

    counts: Mapping[str, int] = field(default_factory=dict)
    items: Sequence[Item] = ()
    rows: Sequence[OutboxRow] = ()
    repeated: Correction | None = None


async def correct_named(
    connection: Connection, new: NewCorrection, asked: Sequence[Asked], *, book: PriceBook
) -> Outcome:
    """Void or amend uses, in the caller's transaction.

    Raises Refused, CorrectionExists, and VersionNotRead: read the price book and try again.
    """
    if not await records.begin(connection, new, state="running", recorded_at=now()):
        return Outcome(repeated=await _repeated(connection, new))
    places = await versions.find_places(connection, [each.named for each in asked])
    heads = await store.lock_heads(connection, {place.partition for each in places for place in each})
    uses = await versions.find_uses(connection, [place for each in places for place in each])
    months = [] if all(each.is_here for each in uses.values()) else await find_archived(connection)
    found, refusals = _pick(asked, places, uses, archived=months)
    if refusals:
        raise Refused(refusals)
    # In order of use, so that it does not matter in which order they were named.
    wanted = sorted(_wanted(asked, found), key=lambda each: each[0].place.in_order)
    task = Task(new.id, new.reason, book)
    rating = await Rating.of(
        connection, ((each, usage) for (each, usage, _) in wanted if not isinstance(usage, bytes)), task
    )
    changes = [_change(each, usage, rating) for each, usage, changed in wanted if changed]
    settled = await carrying.settle_corrected(connection, changes, rating, task)
    written = await records.write_and_record(
        connection, [*changes, *settled], task, heads=heads, counters=rating.moved()
    )
    keys = {each.found.place.key for each in settled}
    await records.settle_items(connection, new.id, [each for each in written.items if each.key in keys])
    counts = {"events": len(asked), "corrected": len(changes), "unchanged": len(asked) - len(changes)}
    if settled:
        counts["settled"] = len(settled)
    await records.write_progress(connection, new.id, Progress("done", None, counts, total(written.items), now()))
    return Outcome(counts, written.items, written.rows)


def total(items: Iterable[Item]) -> dict[str, int]:
    """What items cost more in all, by unit."""
    found: dict[str, int] = {}
    for each in items:
        found = records.sum_of(found, each.difference)
    return found


async def _repeated(connection: Connection, new: NewCorrection) -> Correction:
    found = await records.find(connection, new.id)
    if found is None or found.body_hash != new.body_hash or found.kind != new.kind:
        raise CorrectionExists(new.id)
    return found


def _pick(
    asked: Sequence[Asked],
    places: Sequence[Sequence[Place]],
    uses: Mapping[Any, Found],
    *,
    archived: Collection[date],
) -> tuple[list[Found], list[Refusal]]:
    """The one use that each name means; or why it means none, or may not be corrected so."""
    picked: list[Found] = []
    refusals: list[Refusal] = []
    taken: dict[Any, int] = {}
    for index, (each, at) in enumerate(zip(asked, places, strict=True)):
        named = each.named
        candidates = [uses[place.key] for place in at]
        here = [found for found in candidates if found.is_here and named.account in (None, found.account)]
        said = f"{named.source}/{named.event_id}"
        if len(here) == 1 and (first := taken.setdefault(here[0].place.key, index)) != index:
            refusals.append(Refusal(index, "named_twice", f"{said} is named twice, at {first} and at {index}"))
        elif len(here) == 1 and each.data is not None and here[0].is_void:
            refusals.append(Refusal(index, "void", f"{said} is void: undo that first"))
        elif len(here) == 1:
            picked.append(here[0])
        elif here:
            accounts = sorted({found.account or "" for found in here})
            refusals.append(
                Refusal(index, "ambiguous", f"{len(here)} events are {said}: say of which account", accounts=accounts)
            )
        elif month := _month_of(named, candidates, archived):
            back = f"restore that first, with `scrip usage restore --from DIR --month {month:%Y-%m}`"
            refusals.append(Refusal(index, "archived", f"{said} is archived with {month:%Y-%m}: {back}", month=month))
        elif candidates and named.account is None:
            refusals.append(Refusal(index, "not_here", f"{said} is on its way to its account: try again"))
        else:
            refusals.append(Refusal(index, "unknown_event", f"no event {said} was ever reported"))
    return picked, refusals


def _month_of(named: Named, candidates: Iterable[Found], archived: Collection[date]) -> date | None:
    """With which month a use is archived, if it is. Whose it is does not stand where it was seen."""
    for found in candidates:
        month = found.place.occurred_at.date().replace(day=1)
        may_be = named.account is None or found.place.partition == partition_of(named.account)
        if may_be and not found.is_here and month in archived:
            return month
    return None


def _wanted(asked: Sequence[Asked], found: Sequence[Found]) -> list[tuple[Found, Usage | bytes | None, bool]]:
    """What each use is to be (None: void; bytes: the body of one that is unmapped), and whether it is that not yet."""
    wanted: list[tuple[Found, Usage | bytes | None, bool]] = []
    refusals = []
    for index, (each, use) in enumerate(zip(asked, found, strict=True)):
        try:
            wanted.append(_wanted_of(each.data, use))
        except InvalidEvent as error:
            refusals += [_invalid(index, problem) for problem in error.problems]
    if refusals:
        raise Refused(refusals)
    return wanted


def _wanted_of(data: bytes | None, found: Found) -> tuple[Found, Usage | bytes | None, bool]:
    if data is None:
        return found, None, not found.is_void
    if found.current is not None:
        usage = msgspec.structs.replace(found.current.usage(), revision=found.next_revision - 1)
        return found, translate.amended_usage(usage, data), not is_same_data(found.current.data, data)
    assert found.waiting is not None
    assert found.waiting.body is not None
    body = translate.amended_body(found.waiting.body, data)
    before = msgspec.json.decode(found.waiting.body, type=dict[str, msgspec.Raw]).get("data", msgspec.Raw(b"{}"))
    return found, body, not is_same_data(before, data)


def _invalid(index: int, problem: Problem) -> Refusal:
    return Refusal(index, "invalid_data", problem.message, field=problem.field)


def _change(found: Found, wanted: Usage | bytes | None, rating: Rating) -> Change:
    if found.current is not None:
        rating.take_out(found.current)
    if wanted is None:
        return Change(found, Voided(), rating.moves())
    if isinstance(wanted, bytes):
        assert found.waiting is not None
        return Change(found, WaitsForAlias(wanted, found.waiting.key, found.next_revision))
    return Change(found, rating.rated(wanted), rating.moves())
