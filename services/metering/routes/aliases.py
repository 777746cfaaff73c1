"""What publishers call accounts that have another id."""

from collections.abc import Callable
from typing import Annotated, assert_never

from fastapi import APIRouter, Depends, Path, Response
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field

from contracts.accounts import ACCOUNT_LENGTH_MAX, AccountId
from contracts.envelope import check_subject
from contracts.partition import partition_of
from services.kit.auth import Principal, require
from services.kit.clock import now
from services.kit.problems import Problem
from services.kit.telemetry import get_logger
from services.metering import handlers, store
from services.metering.handlers import AliasTaken, NamesAnAccount
from services.metering.routes.backend import Backend, connection
from services.metering.routes.paging import Limit, cursor, read_cursor
from services.metering.store import Alias

log = get_logger(__name__)

_Subject = Annotated[
    str,
    Path(
        min_length=1,
        max_length=ACCOUNT_LENGTH_MAX,
        description="What events call the account in `subject`, percent-encoded",
    ),
    AfterValidator(check_subject),
]


class AliasTarget(BaseModel):
    """The account that a subject stands for. It need not be open yet."""

    model_config = ConfigDict(extra="forbid")

    account: AccountId


class AliasRow(BaseModel):
    """A subject that stands for an account, since when, and who said so."""

    subject: str
    account: str
    recorded_at: AwareDatetime
    recorded_by: Annotated[str, Field(description="A principal")]


class AliasPage(BaseModel):
    """Aliases in the order of partition and subject. `next_after` asks for the next page; null on the last."""

    aliases: list[AliasRow]
    next_after: str | None


def aliases_router(backend: Callable[[], Backend]) -> APIRouter:
    """Aliases: listed, shown, set, deleted."""
    router = APIRouter(tags=["aliases"])
    reader = Depends(require("metering:read"))
    operator = Depends(require("operate"))

    @router.get("/api/v1/aliases", dependencies=[reader])
    async def list_aliases(limit: Limit = 100, after: str | None = None) -> AliasPage:
        """All aliases."""
        place = read_cursor(after, tuple[int, str]) if after is not None else (-1, "")
        async with connection(backend()) as connected:
            found = await store.list_aliases(connected, after=place, limit=limit + 1)
        page = found[:limit]
        last = page[-1] if len(found) > limit else None
        return AliasPage(
            aliases=[_row(each) for each in page],
            next_after=cursor((partition_of(last.subject), last.subject)) if last else None,
        )

    @router.get(
        "/api/v1/aliases/{subject:path}", dependencies=[reader], responses={404: {"description": "It is no alias"}}
    )
    async def show_alias(subject: _Subject) -> AliasRow:
        """Which account a subject stands for."""
        async with connection(backend()) as connected:
            found = await store.find_alias(connected, partition=partition_of(subject), subject=subject)
        if found is None:
            raise Problem(404, "not_an_alias", f"{subject!r} is not an alias")
        return _row(found)

    @router.put(
        "/api/v1/aliases/{subject:path}",
        status_code=201,
        responses={
            200: {"model": AliasRow, "description": "It stands for that account already"},
            409: {"description": "It stands for another account, or is the id of an open one"},
        },
    )
    async def set_alias(
        subject: _Subject, target: AliasTarget, response: Response, principal: Principal = operator
    ) -> AliasRow:
        """Have a subject stand for an account. Use that waited under it is charged, soon; and all that comes.

        An alias does not change: to have it stand for another account, delete it first. What was taken through it stays
        with the account it went to, also when it is reported again.
        """
        if subject == target.account:
            raise Problem(422, "alias_of_itself", f"{subject!r} is that account's own id: it needs no alias")
        alias = Alias(subject=subject, account=target.account, recorded_at=now(), recorded_by=principal.name)
        async with connection(backend()) as connected, connected.transaction():
            outcome = await handlers.add_alias(connected, alias)
            found = await store.find_alias(connected, partition=partition_of(subject), subject=subject)
        match outcome:
            case AliasTaken(alias=taken):
                raise Problem(
                    409,
                    "alias_taken",
                    f"{subject!r} stands for {taken.account} since {taken.recorded_at.isoformat()}: delete that first",
                    members={"account": taken.account},
                )
            case NamesAnAccount():
                raise Problem(409, "names_an_account", f"{subject!r} is the id of an open account: it can be no alias")
            case bool():
                response.status_code = 201 if outcome else 200
            case _:
                assert_never(outcome)
        if outcome:
            log.info("alias set", subject=subject, account=alias.account, by=principal.name)
            backend().mapped()
        return _row(found or alias)

    @router.delete("/api/v1/aliases/{subject:path}", status_code=204)
    async def delete_alias(subject: _Subject, principal: Principal = operator) -> Response:
        """Forget an alias, if it is one. What was charged through it stays as it is."""
        async with connection(backend()) as connected, connected.transaction():
            existed = await handlers.delete_alias(connected, subject)
        if existed:
            log.info("alias deleted", subject=subject, by=principal.name)
        return Response(status_code=204)

    return router


def _row(alias: Alias) -> AliasRow:
    return AliasRow(
        subject=alias.subject,
        account=alias.account,
        recorded_at=alias.recorded_at,
        recorded_by=alias.recorded_by,
    )
