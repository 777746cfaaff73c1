"""What can be read over HTTP. An answer is of one moment; what is longer comes in pages."""

import asyncio
import base64
import binascii
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from decimal import Decimal
from typing import Annotated, Any, Final

import msgspec
from fastapi import APIRouter, Depends, Header, Path, Query, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from contracts.ids import HoldId, TransactionId
from contracts.times import Time
from services.kit.auth import require
from services.kit.clock import now
from services.kit.problems import Problem
from services.ledger.domain.entries import Kind as EntryKind
from services.ledger.queries.accounts import AccountView, TreeAccountView, read_accounts, read_tree
from services.ledger.queries.charges import ChargeView, read_charge
from services.ledger.queries.exports import FORMATS, exported_accounts, exported_pages
from services.ledger.queries.holds import HoldView, read_hold, read_open_holds
from services.ledger.queries.limits import LimitQuestion, LimitView, read_limits
from services.ledger.queries.statements import StatementEntry, StatementFilter, StatementPlace, read_statement
from services.ledger.queries.totals import AccountTotals, Totals, read_account_totals, read_totals
from services.ledger.queries.transactions import TransactionView, read_transaction
from services.ledger.routes.backend import Backend, check, connected, not_open, snapshot
from services.ledger.routes.balance import balance_router
from services.ledger.routes.formats import export_format
from services.ledger.routes.streaming import StreamTaken

PAGE_SIZE_MAX: Final = 500
TREE_PAGE_SIZE_MAX: Final = 200
EXPORTS_MAX: Final = 2
EXPORT_RETRY_AFTER_SECONDS: Final = 10
EXPORT_STALLED_SECONDS_MAX: Final = 30.0


class AccountPage(BaseModel):
    """Open accounts in the order of their ids. `next_after` asks for the next page; null on the last."""

    accounts: list[AccountView]
    next_after: str | None


class TreePage(BaseModel):
    """Accounts of a tree in the order of their ids. `next_after` asks for the next page; null on the last."""

    root: str
    accounts: list[TreeAccountView]
    next_after: str | None


class LimitPage(BaseModel):
    """Caps in the order of their accounts. `next_after` asks for the next page; null on the last.

    A page may have fewer caps than there is room for, even none, and still not be the last.
    """

    limits: list[LimitView]
    next_after: str | None


class StatementPage(BaseModel):
    """Entries of an account's wallets, newest first. `next_before` asks for the next page; null on the last.

    With a filter a page may have fewer entries than there is room for, and still not be the last.
    """

    account: str
    entries: list[StatementEntry]
    next_before: str | None


class HoldPage(BaseModel):
    """Open holds, oldest first. `next_after` asks for the next page; null on the last."""

    holds: list[HoldView]
    next_after: str | None


class AccountTotalsView(BaseModel):
    """An account's totals, unit by unit."""

    account: str
    units: list[AccountTotals]


_Limit = Annotated[int, Query(ge=1, le=PAGE_SIZE_MAX)]
_TreeLimit = Annotated[int, Query(ge=1, le=TREE_PAGE_SIZE_MAX)]
_Prefix = Annotated[str, Query(max_length=400, pattern=r"^[^\x00]*$")]
_Share = Annotated[Decimal, Query(ge=0, le=1000, max_digits=10, decimal_places=6, description="0.8: four fifths.")]
_Text = Annotated[str, Query(max_length=256, pattern=r"^[^\x00]*$")]
_PathText = Annotated[str, Path(max_length=256, pattern=r"^[^\x00]*$")]
_Cursor = Annotated[str, Query(max_length=4096)]
_Format = Annotated[
    str | None,
    Query(alias="format", description="Default: what Accept likes best.", json_schema_extra={"enum": [*FORMATS]}),
]
_Below = Annotated[bool, Query(description="With all accounts below it.")]

_ERRORS: Final[Mapping[int, str]] = {
    401: "A bearer token is needed",
    403: "The token lacks the scope ledger:read",
    404: "There is no such thing",
    422: "Something is wrong with the request; all of it is named",
    503: "Not now, or too much at once: ask again, or for less",
}


def _answers(*, unknown: bool = True) -> dict[int | str, dict[str, Any]]:
    """What a route may answer but what it is asked for. `unknown`: there may be no such thing."""
    return {
        status: {"description": said, "content": {"application/problem+json": {"schema": _PROBLEM}}}
        for status, said in _ERRORS.items()
        if unknown or status != 404
    }


_PROBLEM: Final[Mapping[str, Any]] = {
    "type": "object",
    "required": ["type", "title", "status", "code", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "code": {"type": "string", "description": "Stable, for programs"},
        "detail": {"type": "string", "description": "A sentence, for people"},
        "errors": {"type": "array", "items": {"type": "object"}},
    },
}


def reading_routers(backend: Callable[[], Backend]) -> Sequence[APIRouter]:
    """What can be read. An account's id is written into a path as it is, but for each `%`, which is `%25`."""
    others = APIRouter(tags=["reading"], dependencies=[Depends(require("ledger:read"))])
    routes = (_account_routes, _limit_routes, _statement_routes, _charge_routes, _hold_routes, _total_routes)
    for add in (*routes, _export_routes):
        add(others, backend)
    return balance_router(backend, answers=_answers()), others


def _account_routes(router: APIRouter, backend: Callable[[], Backend]) -> None:
    @router.get("/v1/accounts", responses=_answers(unknown=False))
    async def accounts(prefix: _Prefix = "", limit: _Limit = 100, after: _Prefix = "") -> AccountPage:
        """Open accounts whose id begins with `prefix`."""
        async with connected(backend()) as connection:
            found = await read_accounts(connection, prefix=prefix, after=after, limit=limit + 1)
        page = found[:limit]
        return AccountPage(accounts=page, next_after=page[-1].account if len(found) > limit else None)

    @router.get("/v1/trees/{root:path}", responses=_answers())
    async def tree(root: str, limit: _TreeLimit = 100, after: _Prefix = "") -> TreePage:
        """An account and all below it with their wallets, exact at the time of reading. A tree is all of its root."""
        check(root)
        async with snapshot(backend()) as connection:
            found = await read_tree(connection, root, after=after, limit=limit + 1, units=backend().units, now=now())
        if found is None:
            raise not_open(root)
        page = found[:limit]
        return TreePage(root=root, accounts=page, next_after=page[-1].account if len(found) > limit else None)


def _limit_routes(router: APIRouter, backend: Callable[[], Backend]) -> None:
    @router.get("/v1/limits", responses=_answers(unknown=False))
    async def limits(
        share: _Share = Decimal("0.8"),
        unit: str | None = None,
        root: str | None = None,
        limit: _TreeLimit = 100,
        after: _Prefix = "",
    ) -> LimitPage:
        """Caps of which at least a share is used in the period that is running, exact at the time of reading: of all
        accounts, or of those of a tree.
        """
        if root is not None:
            check(root)
        caps = [name for name, known in backend().units.by_name.items() if known.kind == "cap"]
        if unit is not None and _unit(backend(), unit) not in caps:
            raise Problem(422, "no_cap", f"{unit} is money: nothing limits it but what is there")
        asked = LimitQuestion(share=share, units=caps if unit is None else [unit], root=root, after=after, limit=limit)
        async with snapshot(backend()) as connection:
            found, next_after = await read_limits(connection, asked, units=backend().units, now=now())
        return LimitPage(limits=found, next_after=next_after)


def _statement_routes(router: APIRouter, backend: Callable[[], Backend]) -> None:
    @router.get("/v1/statements/{account:path}", responses=_answers())
    async def statement(
        account: str,
        *,
        unit: str | None = None,
        kind: EntryKind | None = None,
        since: Time | None = None,
        until: Time | None = None,
        reference: _Text | None = None,
        limit: _Limit = 100,
        before: _Cursor | None = None,
    ) -> StatementPage:
        """The entries of an account's own wallets, newest first, with the balance after each.

        Recorded in [`since`, `until`). `reference`: the id of a lot, a hold, a transaction or a charged event, or the
        reference of a lot.
        """
        check(account)
        if unit is not None:
            _unit(backend(), unit)
        place = None if before is None else _read_place(before, account)
        wanted = StatementFilter(unit=unit, kind=kind, since=since, until=until, reference=reference or None)
        async with snapshot(backend()) as connection:
            found = await read_statement(
                connection, account, wanted=wanted, before=place, limit=limit, units=backend().units.by_name
            )
        if found is None:
            raise not_open(account)
        entries, more = found
        return StatementPage(account=account, entries=entries, next_before=None if more is None else _place_text(more))

    @router.get("/v1/transactions/{transaction}", responses=_answers())
    async def transaction(transaction: TransactionId) -> TransactionView:
        """All entries of a transaction and its cause: who asked, or the charged events and the lots that paid."""
        async with snapshot(backend()) as connection:
            found = await read_transaction(connection, transaction, units=backend().units)
        if found is None:
            raise Problem(404, "transaction_unknown", f"there is no transaction {transaction}")
        return found


def _charge_routes(router: APIRouter, backend: Callable[[], Backend]) -> None:
    @router.get("/v1/charges/{source}/{event_id:path}", responses=_answers())
    async def charge(source: _PathText, event_id: _PathText, account: str | None = None) -> ChargeView:
        """What a use was charged, from which lots, and what of that was given back since: every revision of it."""
        if account is not None:
            check(account)
        async with snapshot(backend()) as connection:
            found = await read_charge(connection, source, event_id, account=account, units=backend().units)
        if found is None:
            raise Problem(404, "charge_unknown", f"{source} {event_id} has not been charged")
        return found


def _hold_routes(router: APIRouter, backend: Callable[[], Backend]) -> None:
    @router.get("/v1/holds", responses=_answers())
    async def holds(account: str, limit: _Limit = 100, after: HoldId | None = None) -> HoldPage:
        """Open holds of an account and of all below it."""
        check(account)
        async with snapshot(backend()) as connection:
            found = await read_open_holds(
                connection, account, after=after, limit=limit + 1, units=backend().units, now=now()
            )
        if found is None:
            raise not_open(account)
        return HoldPage(holds=found[:limit], next_after=found[limit - 1].hold if len(found) > limit else None)

    @router.get("/v1/holds/{hold}", responses=_answers())
    async def hold(hold: HoldId) -> HoldView:
        """A hold, open or ended: what was set aside, on which wallets, and what of it still is."""
        async with snapshot(backend()) as connection:
            found = await read_hold(connection, hold, units=backend().units, now=now())
        if found is None:
            raise Problem(404, "hold_unknown", f"there is no hold {hold}")
        return found


def _total_routes(router: APIRouter, backend: Callable[[], Backend]) -> None:
    @router.get("/v1/totals", responses=_answers(unknown=False))
    async def totals(unit: str, account_prefix: _Prefix = "") -> Totals:
        """Sums over all accounts whose id begins with `account_prefix`, all of one moment."""
        known = _unit(backend(), unit)
        async with snapshot(backend()) as connection:
            return await read_totals(connection, backend().units.by_name[known], account_prefix=account_prefix)

    @router.get("/v1/totals/{account:path}", responses=_answers())
    async def account_totals(account: str) -> AccountTotalsView:
        """What was ever granted, charged, given back, expired and clawed back on an account's own wallets."""
        check(account)
        async with snapshot(backend()) as connection:
            found = await read_account_totals(connection, account, units=backend().units)
        if found is None:
            raise not_open(account)
        return AccountTotalsView(account=account, units=found)


def _export_routes(router: APIRouter, backend: Callable[[], Backend]) -> None:
    exports = asyncio.Semaphore(EXPORTS_MAX)
    answers: dict[int | str, dict[str, Any]] = {
        200: {
            "description": "CSV with a header, or Parquet: the same rows",
            "content": {each.media_type: {} for each in FORMATS.values()},
        },
        400: {"description": "There is no such format; those there are are named"},
        **_answers(),
    }

    @router.get("/v1/exports/journal", response_class=StreamingResponse, responses=answers)
    async def export(
        account: str, below: _Below = False, named: _Format = None, accept: Annotated[str, Header()] = ""
    ) -> Response:
        """The entries of an account's wallets as recorded by now, oldest first, in one stream. Contras are left out."""
        wanted = export_format(named, accept)
        check(account)
        if exports.locked():
            headers = {"Retry-After": str(EXPORT_RETRY_AFTER_SECONDS)}
            raise Problem(503, "busy", f"{EXPORTS_MAX} exports are under way", headers=headers)
        async with snapshot(backend()) as connection:
            batch, names = await exported_accounts(connection, account, below=below)
        if not names:
            raise not_open(account)

        async def stream() -> AsyncGenerator[bytes, None]:
            async with exports:
                pages = exported_pages(lambda: connected(backend()), names, batch=batch, units=backend().units.by_name)
                async for part in wanted.written(pages):
                    yield part

        return StreamTaken(stream(), media_type=wanted.media_type, stalled_seconds_max=EXPORT_STALLED_SECONDS_MAX)


def _unit(backend: Backend, name: str) -> str:
    if name not in backend.units.by_name:
        raise Problem(422, "unknown_unit", f"the catalogue has no unit {name!r}")
    return name


def _place_text(place: StatementPlace) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode(place)).decode()


def _read_place(text: str, account: str) -> StatementPlace:
    try:
        place = msgspec.json.decode(base64.urlsafe_b64decode(text), type=StatementPlace)
    except (binascii.Error, msgspec.DecodeError, UnicodeError, ValueError) as error:
        raise Problem(422, "invalid_cursor", "`before` is not a place that an earlier page named") from error
    if place.account != account:
        # What it says was posted there is not what this one had.
        raise Problem(422, "invalid_cursor", f"`before` is a place in the statement of {place.account}")
    return place
