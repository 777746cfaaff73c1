"""The price book over HTTP."""

from collections.abc import Callable
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Query, Response
from pydantic import BaseModel

from services.kit.auth import Principal, require
from services.kit.clock import now
from services.kit.problems import Problem
from services.metering import projections, translate
from services.metering.domain.prices import VersionRefused, difference, is_new
from services.metering.projections import (
    ListedVersion,
)
from services.metering.routes.backend import Backend, away_as_problem, connection
from services.metering.routes.paging import Text
from services.metering.translate import InvalidVersion, PriceBookRow, VersionDifference, VersionRow

_PLAIN: Final = "application/json"


class PriceVersions(BaseModel):
    """All price versions, in the order in which they take effect."""

    versions: list[ListedVersion]


def prices_router(backend: Callable[[], Backend]) -> APIRouter:
    """The price book: read, and added to."""
    router = APIRouter(tags=["prices"])
    operator = Depends(require("operate"))

    @router.get(
        "/api/v1/price-book",
        response_model=PriceBookRow,
        dependencies=[Depends(require("metering:read"))],
        responses={404: {"description": "There is no version of that id"}},
    )
    async def price_book(version: Text | None = None) -> Response:
        """The units, and the versions in force now and later; or one version, of whatever time."""
        prices = backend().prices
        if version is None:
            shown = prices.book().from_now_on(now())
        else:
            if (found := prices.book().find(version)) is None:
                async with away_as_problem():
                    await prices.refresh()
                found = prices.book().find(version)
            if found is None:
                raise Problem(404, "unknown_version", f"there is no price version {version!r}")
            shown = [found]
        return Response(translate.price_book_as_json(prices.book(), shown), media_type=_PLAIN)

    @router.get("/api/v1/price-book/versions", dependencies=[Depends(require("metering:read"))])
    async def price_versions() -> PriceVersions:
        """All versions without their prices."""
        async with connection(backend()) as connected:
            return PriceVersions(versions=await projections.listed_versions(connected))

    @router.post(
        "/api/v1/price-book",
        status_code=201,
        response_model=VersionDifference,
        responses={
            200: {"model": VersionDifference, "description": "A dry run; or the version is stored already"},
            409: {"description": "Its id is stored with other contents, its time is taken, or it is in the past"},
            422: {"description": "It is no price version; everything that is wrong with it is named"},
        },
    )
    async def add_price_version(
        body: VersionRow,
        response: Response,
        *,
        dry_run: Annotated[bool, Query(description="Only say what would change")] = False,
        backdate: Annotated[bool, Query(description="It may take effect in the past")] = False,
        principal: Principal = operator,
    ) -> VersionDifference:
        """Add a version to the price book, for good. It prices use from `effective_at` on, all of it.

        What was charged keeps the price it was charged at. Use that waits for a price is charged if it has one now:
        use of that time, or pinned to this version.
        """
        prices = backend().prices
        try:
            version = translate.read_version(body, units=prices.book().units)
            async with away_as_problem():
                await prices.refresh()
                before = prices.book()
                if dry_run:
                    new, stored = is_new(version, book=before, at=now(), backdate=backdate), False
                else:
                    new = stored = await prices.add(version, source=principal.name, backdate=backdate)
        except InvalidVersion as error:
            errors = [{"pointer": f"/body/{each.field}", "detail": each.message} for each in error.problems]
            raise Problem(422, "invalid_price_version", str(error), errors=errors) from error
        except VersionRefused as error:
            raise Problem(409, error.code, str(error)) from error
        response.status_code = 201 if stored else 200
        # A version that is stored already takes over from nobody anew.
        compared_with = before.version_at(version.effective_at) if new else version
        return translate.difference_row(
            version,
            difference(compared_with, version),
            compared_with=compared_with,
            stored=stored or not new,
            unchanged=not new,
        )

    return router
