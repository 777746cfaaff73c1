"""Service tokens: who calls over HTTP, and what they may do. Only hashes are stored; a token is never logged."""

import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

from fastapi import Request, Security
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from services.kit.problems import Problem
from services.kit.telemetry import get_logger

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated caller."""

    name: str
    scopes: frozenset[str]


class InvalidTokens(ValueError):
    """The tokens file cannot be used; the message says why, without its contents."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    principal: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    scopes: list[str]


_ENTRIES: TypeAdapter[list[_Entry]] = TypeAdapter(list[_Entry])


class TokenStore:
    """The tokens file: a JSON list of {principal, sha256, scopes}, read again whenever the file changes.

    A token is looked up by its hash, so that comparing takes no longer for a token that is nearly right.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._principals: Mapping[str, Principal] = {}

    def load(self) -> None:
        """Read the file now. Raises InvalidTokens or OSError; a composition root calls it once at start."""
        status = self._path.stat()
        self._seen = (status.st_mtime_ns, status.st_size, status.st_ino)
        self._principals = _read(self._path)

    def find(self, token: str) -> Principal | None:
        """Whose token this is. A file that has become unreadable leaves the last good one in force."""
        self._reload_if_changed()
        return self._principals.get(hashlib.sha256(token.encode()).hexdigest())

    def _reload_if_changed(self) -> None:
        try:
            status = self._path.stat()
            if (status.st_mtime_ns, status.st_size, status.st_ino) != self._seen:
                self.load()
        except (OSError, InvalidTokens) as error:
            log.error("tokens file unusable, the last good one stays in force", file=self._path.name, error=str(error))


# For the OpenAPI document only: a parameter of the name Authorization is none there.
_BEARER: Final = HTTPBearer(auto_error=False, scheme_name="serviceToken", description="A service token")


def require(scope: str) -> Callable[..., Awaitable[Principal]]:
    """A FastAPI dependency: the caller's Principal if its token has `scope`. 401 without a token, 403 without it."""

    async def authorize(request: Request, _described: Annotated[object, Security(_BEARER)] = None) -> Principal:
        tokens: TokenStore = request.app.state.tokens
        authorization = request.headers.get("authorization")
        scheme, _, token = (authorization or "").partition(" ")
        principal = tokens.find(token.strip()) if scheme.lower() == "bearer" else None
        if principal is None:
            said = "the token is not known" if authorization else "a bearer token is needed"
            challenge = 'Bearer realm="scrip"' + (', error="invalid_token"' if authorization else "")
            raise Problem(401, "unauthenticated", said, headers={"WWW-Authenticate": challenge})
        if scope not in principal.scopes:
            raise Problem(
                403,
                "scope_missing",
                f"{principal.name}'s token lacks the scope {scope}",
                members={"scope": scope},
                headers={"WWW-Authenticate": f'Bearer realm="scrip", error="insufficient_scope", scope="{scope}"'},
            )
        return principal

    return authorize


def _read(path: Path) -> dict[str, Principal]:
    try:
        entries = _ENTRIES.validate_python(json.loads(path.read_bytes()))
    except ValidationError as error:
        places = ", ".join(".".join(str(part) for part in found["loc"]) for found in error.errors())
        # Not the message itself: it would repeat the input.
        raise InvalidTokens(f"{path.name} is not a list of {{principal, sha256, scopes}}; look at {places}") from None
    except ValueError as error:
        raise InvalidTokens(f"{path.name} is not JSON") from error
    return {entry.sha256: Principal(name=entry.principal, scopes=frozenset(entry.scopes)) for entry in entries}
