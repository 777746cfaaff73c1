"""HTTP in: secrets, access keys, policies, the audit trail, the key ring. No answer holds a stored secret, and no error
repeats anything of a body."""

from collections.abc import Callable, Coroutine, Sequence
from datetime import timedelta
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from psycopg import OperationalError
from psycopg_pool import PoolTimeout
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, SecretStr

from contracts.accounts import AccountId, path
from contracts.keyvault import AccessKeyId, KeyPolicy, Verified, key_hash
from contracts.ledger import WALLETS_MAX
from contracts.money import Amount
from contracts.times import Time
from contracts.usage import ProviderName
from services.keyvault import handlers, projections, translate
from services.keyvault.domain.errors import KeyUnknown, Refusal, SecretNotFound
from services.keyvault.domain.policy import UNCHOSEN
from services.keyvault.domain.secret import Secret
from services.keyvault.handlers import CreateAccessKey, SecretPlace, Vault
from services.keyvault.projections import AccessKeyView, AuditEntry, PolicyView, SecretStatus, SecretUse
from services.keyvault.store import DEFAULT_NAME
from services.kit.auth import Principal, require
from services.kit.problems import Problem

PAGE_SIZE_MAX: Final = 500
RETRY_AFTER_SECONDS: Final = 2
TTL_SECONDS_MAX: Final = 10 * 366 * 86_400

_STATUS: Final = {
    "secret_malformed": 422,
    "expiry_passed": 422,
    "account_too_deep": 422,
    "unknown_unit": 422,
    "cap_unit_is_money": 422,
    "invalid_cap": 422,
    "secret_not_found": 404,
    "key_unknown": 404,
    "ledger_away": 503,
}
_REFUSED_STATUS: Final = 409


class _QuietRoute(APIRoute):
    """A route whose errors name places and reasons, never what was sent; and whose answers nobody keeps."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def quiet(request: Request) -> Response:
            try:
                response = await answer(request)
            except RequestValidationError as error:
                found = translate.findings(error.errors())
                raise Problem(
                    422,
                    "invalid_request",
                    f"the request has {len(found)} problem(s)",
                    errors=[{"pointer": each.pointer, "code": each.code, "detail": each.detail} for each in found],
                ) from None
            except (PoolTimeout, OperationalError) as error:
                headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
                raise Problem(503, "database_away", "the database is away: ask again", headers=headers) from error
            response.headers["Cache-Control"] = "no-store"
            return response

        return quiet


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


def routers(vault: Callable[[], Vault]) -> Sequence[APIRouter]:
    """All routes of keyvault."""
    return (
        _secrets_router(vault),
        _platform_secrets_router(vault),
        _access_keys_router(vault),
        _policies_router(vault),
        _audit_router(vault),
        _keyring_router(vault),
    )


# Secrets --------------------------------------------------------------------------------------------------------------

_Name = Annotated[str, Query(min_length=1, max_length=128, pattern=translate.PLAIN_TEXT)]
_Limit = Annotated[int, Query(ge=1, le=PAGE_SIZE_MAX)]
_Provider = Annotated[ProviderName, Path()]
_Account = Annotated[AccountId, Path()]


class StoreSecret(_Body):
    """A provider secret, and for how long to keep it; without `ttl_seconds` until it is deleted or replaced."""

    secret: Annotated[SecretStr, Field(max_length=4096)]
    ttl_seconds: Annotated[int, Field(ge=1, le=TTL_SECONDS_MAX)] | None = None


class SecretList(BaseModel):
    """The status of each secret, by provider and name."""

    secrets: list[SecretStatus]


_STORING: Final[dict[int | str, dict[str, Any]]] = {
    201: {"model": SecretStatus, "description": "Nothing was stored there before"},
    422: {"description": "secret_malformed, or something is wrong with the request: all of it is named"},
}
_FINDING: Final[dict[int | str, dict[str, Any]]] = {404: {"description": "secret_not_found"}}


def _secrets_router(vault: Callable[[], Vault]) -> APIRouter:
    router = APIRouter(tags=["secrets"], route_class=_QuietRoute)
    reader, writer = Depends(require("keyvault:read")), Depends(require("keyvault:write"))

    @router.put("/v1/secrets/{provider}/{account:path}", responses=_STORING)
    async def store_secret(
        provider: _Provider,
        account: _Account,
        body: StoreSecret,
        *,
        response: Response,
        name: _Name = DEFAULT_NAME,
        principal: Principal = writer,
    ) -> SecretStatus:
        """Store an account's provider secret, in place of one of the same name. It is never given out over HTTP."""
        at = SecretPlace(account=account, provider=provider, name=name)
        return await _store(vault(), at, body, response, principal)

    @router.get("/v1/secrets/{provider}/{account:path}", dependencies=[reader], responses=_FINDING)
    async def secret_status(provider: _Provider, account: _Account, name: _Name = DEFAULT_NAME) -> SecretStatus:
        """What may be known of a secret. Each `%` of the account's id is written `%25` in the path."""
        return await _status(vault(), SecretPlace(account=account, provider=provider, name=name))

    @router.delete("/v1/secrets/{provider}/{account:path}", status_code=204, responses=_FINDING)
    async def delete_secret(
        provider: _Provider, account: _Account, name: _Name = DEFAULT_NAME, principal: Principal = writer
    ) -> Response:
        """Delete a secret for good."""
        return await _delete(vault(), SecretPlace(account=account, provider=provider, name=name), principal)

    @router.get("/v1/secrets", dependencies=[reader])
    async def secrets(account: Annotated[AccountId, Query()]) -> SecretList:
        """All secrets of an account's own."""
        return await _list(vault(), account)

    return router


def _platform_secrets_router(vault: Callable[[], Vault]) -> APIRouter:
    router = APIRouter(tags=["platform secrets"], route_class=_QuietRoute)
    operator = Depends(require("operate"))

    @router.put("/v1/platform-secrets/{provider}", responses=_STORING)
    async def store_platform_secret(
        provider: _Provider,
        body: StoreSecret,
        response: Response,
        name: _Name = DEFAULT_NAME,
        principal: Principal = operator,
    ) -> SecretStatus:
        """Store the platform's secret for a provider: what calls on credits are made with."""
        return await _store(vault(), SecretPlace(account="", provider=provider, name=name), body, response, principal)

    @router.get("/v1/platform-secrets/{provider}", dependencies=[operator], responses=_FINDING)
    async def platform_secret_status(provider: _Provider, name: _Name = DEFAULT_NAME) -> SecretStatus:
        """What may be known of a platform's secret."""
        return await _status(vault(), SecretPlace(account="", provider=provider, name=name))

    @router.delete("/v1/platform-secrets/{provider}", status_code=204, responses=_FINDING)
    async def delete_platform_secret(
        provider: _Provider, name: _Name = DEFAULT_NAME, principal: Principal = operator
    ) -> Response:
        """Delete a platform's secret for good."""
        return await _delete(vault(), SecretPlace(account="", provider=provider, name=name), principal)

    @router.get("/v1/platform-secrets", dependencies=[operator])
    async def platform_secrets() -> SecretList:
        """All secrets of the platform."""
        return await _list(vault(), "")

    return router


async def _store(
    vault: Vault, at: SecretPlace, body: StoreSecret, response: Response, principal: Principal
) -> SecretStatus:
    ttl = None if body.ttl_seconds is None else timedelta(seconds=body.ttl_seconds)
    secret = Secret(body.secret.get_secret_value())
    stored = await handlers.store_secret(vault, at, secret, ttl=ttl, principal=principal.name)
    if not isinstance(stored, bool):
        raise _problem(stored)
    response.status_code = 201 if stored else 200
    return await _status(vault, at)


async def _status(vault: Vault, at: SecretPlace) -> SecretStatus:
    async with vault.pool.connection() as connection:
        found = await projections.secret_status(
            connection, account=at.account, provider=at.provider, name=at.name, at=vault.now()
        )
    if found is None:
        raise _problem(SecretNotFound(account=at.account, provider=at.provider, name=at.name))
    return found


async def _delete(vault: Vault, at: SecretPlace, principal: Principal) -> Response:
    if refusal := await handlers.delete_secret(vault, at, principal=principal.name):
        raise _problem(refusal)
    return Response(status_code=204)


async def _list(vault: Vault, account: str) -> SecretList:
    async with vault.pool.connection() as connection:
        return SecretList(secrets=await projections.secret_statuses(connection, account=account, at=vault.now()))


# Access keys ----------------------------------------------------------------------------------------------------------


class NewAccessKey(_Body):
    """A key for `account`, limited to `caps` of its own: amounts in units of the kind cap."""

    account: AccountId
    name: Annotated[str, Field(min_length=1, max_length=128, pattern=translate.PLAIN_TEXT)] = DEFAULT_NAME
    caps: Annotated[tuple[Amount, ...], Field(max_length=WALLETS_MAX)] = ()
    expires_at: Time | None = None


class CreatedAccessKey(BaseModel):
    """A new key. `key` is its text: it is shown here and nowhere else, ever. `account` is the key's own."""

    key_id: str
    account: str
    key: str
    created_at: AwareDatetime


class AccessKeyPage(BaseModel):
    """Access keys, newest first. `next_before` asks for the next page; null on the last one."""

    access_keys: list[AccessKeyView]
    next_before: str | None


class DisableAccessKey(_Body):
    """Why a key must no longer be used. Shown to whoever lists keys."""

    reason: Annotated[str, Field(min_length=1, max_length=256, pattern=translate.PLAIN_TEXT)]


class VerifyAccessKey(_Body):
    """The text of an access key."""

    key: Annotated[SecretStr, Field(max_length=512)]


class Verification(BaseModel):
    """Whether a key may be used. If not, `code` says why: key_unknown, key_disabled, key_expired; the rest is null."""

    valid: bool
    code: Literal["key_unknown", "key_disabled", "key_expired"] | None = None
    key_id: str | None = None
    account: str | None = None
    policy: KeyPolicy | None = None
    consent: bool | None = None
    own_providers: list[str] | None = None
    expires_at: AwareDatetime | None = None


_IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=256,
        pattern=translate.PLAIN_TEXT,
        description="Under the same key one access key is made at most, however often it is asked for.",
    ),
]


def _access_keys_router(vault: Callable[[], Vault]) -> APIRouter:
    router = APIRouter(tags=["access keys"], route_class=_QuietRoute)
    reader, writer = Depends(require("keyvault:read")), Depends(require("keyvault:write"))

    @router.post(
        "/v1/access-keys",
        status_code=201,
        responses={
            409: {"description": "already_created, conflict (of the Idempotency-Key), ledger_refused"},
            422: {"description": "account_too_deep, unknown_unit, cap_unit_is_money, invalid_cap, expiry_passed, …"},
            503: {"description": "ledger_away: no key was made; asking again does nothing twice"},
        },
    )
    async def create_access_key(
        body: NewAccessKey, idempotency_key: _IdempotencyKey = None, principal: Principal = writer
    ) -> CreatedAccessKey:
        """Make an access key, and open its holder's and its own account. A new holder gets the starting grant once."""
        command = CreateAccessKey(
            holder=body.account,
            name=body.name,
            caps=body.caps,
            expires_at=body.expires_at,
            idempotency_key=idempotency_key,
            request_sha256=translate.request_hash(body) if idempotency_key is not None else None,
        )
        created = await handlers.create_access_key(vault(), command, principal=principal.name)
        if not isinstance(created, handlers.CreatedAccessKey):
            raise _problem(created)
        return CreatedAccessKey(
            key_id=created.key_id,
            account=created.account,
            key=created.key.reveal(),
            created_at=created.created_at,
        )

    @router.get("/v1/access-keys", dependencies=[reader])
    async def access_keys(
        account: Annotated[AccountId | None, Query()] = None,
        limit: _Limit = 100,
        before: Annotated[AccessKeyId | None, Query()] = None,
    ) -> AccessKeyPage:
        """The keys of an account and of all below it."""
        async with vault().pool.connection() as connection:
            found = await projections.access_keys(connection, account=account, before=before, limit=limit + 1)
        page = found[:limit]
        return AccessKeyPage(access_keys=page, next_before=page[-1].key_id if len(found) > limit else None)

    @router.post("/v1/access-keys/{key_id}/disable", responses={404: {"description": "key_unknown"}})
    async def disable_access_key(
        key_id: AccessKeyId, body: DisableAccessKey, principal: Principal = writer
    ) -> AccessKeyView:
        """Let a key never be used again. One that is disabled keeps its first reason."""
        refusal = await handlers.disable_access_key(vault(), key_id, reason=body.reason, principal=principal.name)
        if refusal is not None:
            raise _problem(refusal)
        async with vault().pool.connection() as connection:
            found = await projections.access_key(connection, key_id)
        if found is None:
            raise _problem(KeyUnknown())
        return found

    @router.post("/v1/access-keys/verify", dependencies=[reader])
    async def verify_access_key(body: VerifyAccessKey) -> Verification:
        """Whether a key may be used, whose it is, and what its account chose."""
        key_sha256 = bytes.fromhex(key_hash(body.key.get_secret_value()))
        found = await handlers.verify_key(vault(), key_sha256)
        if isinstance(found, Verified):
            return Verification(valid=True, **found.model_dump(exclude={"status"}))
        return Verification.model_validate({"valid": False, "code": found.code})

    return router


# Policies -------------------------------------------------------------------------------------------------------------


class ChoosePolicy(_Body):
    """`consent`: falling back from own keys to paid credits is agreed to, by `consented_by` (default: the caller)."""

    policy: KeyPolicy
    consent: bool = False
    consented_by: Annotated[str, Field(min_length=1, max_length=256, pattern=translate.PLAIN_TEXT)] | None = None


def _policies_router(vault: Callable[[], Vault]) -> APIRouter:
    router = APIRouter(tags=["policies"], route_class=_QuietRoute)
    reader, writer = Depends(require("keyvault:read")), Depends(require("keyvault:write"))

    @router.get("/v1/policies/{account:path}", dependencies=[reader])
    async def policy(account: _Account) -> PolicyView:
        """The key policy in force for an account: its own, or of the nearest account above it that chose one."""
        return await _policy(vault(), account)

    @router.put("/v1/policies/{account:path}")
    async def choose_policy(account: _Account, body: ChoosePolicy, principal: Principal = writer) -> PolicyView:
        """Choose whose provider secrets an account's calls are made with. Consent is recorded with who and when."""
        await handlers.set_policy(
            vault(),
            account,
            chosen=body.policy,
            consent=body.consent,
            consented_by=body.consented_by,
            principal=principal.name,
        )
        return await _policy(vault(), account)

    return router


async def _policy(vault: Vault, account: str) -> PolicyView:
    async with vault.pool.connection() as connection:
        found = await projections.policy_of(connection, account=account, accounts=list(path(account)))
    return found or PolicyView(
        account=account,
        policy=UNCHOSEN.policy,
        consent=UNCHOSEN.consent,
        consent_at=None,
        consented_by=None,
        chosen_by=None,
        updated_at=None,
        updated_by=None,
    )


# The audit trail ------------------------------------------------------------------------------------------------------


class AuditPage(BaseModel):
    """Who did what, newest first. `next_before` asks for the next page; null on the last one."""

    entries: list[AuditEntry]
    next_before: UUID | None


class SecretUses(BaseModel):
    """In which minutes a secret was leased, newest first."""

    record: UUID
    uses: list[SecretUse]


def _audit_router(vault: Callable[[], Vault]) -> APIRouter:
    router = APIRouter(tags=["audit"], route_class=_QuietRoute, dependencies=[Depends(require("keyvault:read"))])

    @router.get("/v1/audit")
    async def audit(
        account: Annotated[AccountId | None, Query()] = None, limit: _Limit = 100, before: UUID | None = None
    ) -> AuditPage:
        """What was done to an account and all below it; without an account, everything."""
        async with vault().pool.connection() as connection:
            found = await projections.audit_trail(connection, account=account, before=before, limit=limit + 1)
        page = found[:limit]
        return AuditPage(entries=page, next_before=page[-1].id if len(found) > limit else None)

    @router.get("/v1/secret-uses/{record}")
    async def secret_uses(record: UUID, limit: _Limit = 100) -> SecretUses:
        """When a secret was used, deleted ones too. What was used in the last seconds may be missing."""
        async with vault().pool.connection() as connection:
            return SecretUses(record=record, uses=await projections.secret_uses(connection, record, limit=limit))

    return router


# The key ring ---------------------------------------------------------------------------------------------------------


class KeyringView(BaseModel):
    """`versions` can be opened, `current` wraps. A version that wraps no secret any more may be taken out."""

    current: int
    versions: list[int]
    secrets_by_version: dict[int, int]


class RewrapReport(BaseModel):
    """How many secrets are wrapped with `ring_version` now that were not. `undecryptable` were left as they were."""

    ring_version: int
    rewrapped: int
    undecryptable: list[UUID]


def _keyring_router(vault: Callable[[], Vault]) -> APIRouter:
    router = APIRouter(tags=["key ring"], route_class=_QuietRoute)
    operator = Depends(require("operate"))

    @router.get("/v1/keyring", dependencies=[operator])
    async def keyring() -> KeyringView:
        """Which keys the ring has, and what they wrap. Never the keys."""
        ring = vault().ring()
        async with vault().pool.connection() as connection:
            rows = await projections.rows_by_ring_version(connection)
        return KeyringView(current=ring.current, versions=list(ring.versions), secrets_by_version=rows)

    @router.post("/v1/keyring/rewrap")
    async def rewrap(principal: Principal = operator) -> RewrapReport:
        """Wrap every secret's data key with the ring's current key, while everything goes on. Safe to repeat."""
        done = await handlers.rewrap_all(vault(), principal=principal.name)
        return RewrapReport(
            ring_version=done.ring_version, rewrapped=done.rewrapped, undecryptable=list(done.undecryptable)
        )

    return router


def _problem(refusal: Refusal) -> Problem:
    """A refusal as it leaves us."""
    status = _STATUS.get(refusal.code, _REFUSED_STATUS)
    members = {"key_id": refusal.key_id} if hasattr(refusal, "key_id") else {}
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status == 503 else {}
    return Problem(status, refusal.code, str(refusal), members=members, headers=headers)
