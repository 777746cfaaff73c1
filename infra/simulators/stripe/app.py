"""Stripe's HTTP side: the API as its library calls it, the pay page, and under /__sim what only a simulator has."""

import hashlib
import html
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, cast

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from infra.simulators.running import fingerprint, json_object, operations
from infra.simulators.stripe.forms import Params, Refused, parse
from infra.simulators.stripe.objects import Object, new_id
from infra.simulators.stripe.payments import OUTCOMES, Caller, Outcome, Payments
from infra.simulators.stripe.store import Answer, Store
from infra.simulators.stripe.webhooks import Courier, DeliverySettings, Endpoint

NAME: Final = "stripe-simulator"
KEY_PREFIXES: Final = ("sk_test_", "rk_test_")
# The one the pinned stripe library speaks.
API_VERSION: Final = "2026-10-28.endive"
LIMIT_DEFAULT: Final = 10
LIMIT_MAX: Final = 100
IDEMPOTENCY_KEY_LENGTH_MAX: Final = 255
EXPAND_DEPTH_MAX: Final = 4

# By the path: the kind, how a missing one names its parameter, and by what a list of them can be chosen.
RESOURCES: Final[dict[str, tuple[str, str, tuple[str, ...]]]] = {
    "checkout/sessions": ("checkout.session", "session", ("customer", "payment_intent", "status")),
    "payment_intents": ("payment_intent", "intent", ("customer",)),
    "charges": ("charge", "id", ("customer", "payment_intent")),
    "refunds": ("refund", "id", ("charge", "payment_intent")),
    "disputes": ("dispute", "id", ("charge", "payment_intent")),
    "customers": ("customer", "id", ("email",)),
    "events": ("event", "id", ()),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How this Stripe behaves. Without `keys` every key beginning with sk_test_ or rk_test_ is accepted."""

    keys: frozenset[str] = frozenset()
    state: Path | None = None
    delivery: DeliverySettings = field(default_factory=DeliverySettings)
    api_version: str = API_VERSION


def build_app(settings: Settings | None = None) -> Starlette:
    """Stripe as an application, with a memory and a courier of its own."""
    stripe = _Stripe(settings or Settings())
    return Starlette(
        routes=[
            Route("/v1/{path:path}", stripe.api, methods=["GET", "POST"]),
            Route("/c/pay/{session}", stripe.pay_page),
            Route("/__sim/checkout/{session}/pay", stripe.pay, methods=["POST"]),
            Route("/__sim/checkout/{session}/expire", stripe.expire, methods=["POST"]),
            Route("/__sim/refund", stripe.refund, methods=["POST"]),
            Route("/__sim/dispute", stripe.dispute, methods=["POST"]),
            Route("/__sim/dispute/{dispute}/close", stripe.close_dispute, methods=["POST"]),
            Route("/__sim/deliveries", stripe.deliveries),
            Route("/__sim/events/{event}/resend", stripe.resend, methods=["POST"]),
            Route("/__sim/settings", stripe.change_settings, methods=["POST"]),
            Route("/__sim/faults", stripe.plan_faults, methods=["POST"]),
            Route("/__sim/reset", stripe.reset, methods=["POST"]),
            *operations(NAME),
        ],
        exception_handlers={Refused: _on_refused},
        lifespan=stripe.lifespan,
    )


@dataclass(slots=True)
class _Faults:
    """What goes wrong with the next API requests: answered 500 undone, or done and the answer lost."""

    errors: int = 0
    lost_answers: int = 0

    def strike(self) -> None:
        if self.errors > 0:
            self.errors -= 1
            raise Refused(500, "An unknown error occurred.", type="api_error")


class _Stripe:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.faults = _Faults()
        self.store: Store
        self.courier: Courier
        self.payments: Payments

    @asynccontextmanager
    async def lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        self.store = Store(self.settings.state)
        try:
            async with Courier(self.store, self.settings.delivery) as self.courier:
                self.payments = Payments(self.store, api_version=self.settings.api_version, stage=self.courier.stage)
                yield
        finally:
            self.store.close()

    # The API ---------------------------------------------------------------------------------------------------

    async def api(self, request: Request) -> Response:
        request_id = new_id("req", length=14)
        headers = {"request-id": request_id}
        if "stripe-version" in request.headers:
            headers["stripe-version"] = request.headers["stripe-version"]
        try:
            account = self._account(request)
            self.faults.strike()
            body = await self._text(request)
            if request.method == "GET":
                answer = Answer("", 200, _json(self._read(request, parse(body))), request_id)
            else:
                answer = self._write_once(request, body, account=account, request_id=request_id)
        except Refused as refused:
            return JSONResponse(refused.body(), status_code=refused.status, headers=headers)
        if request.method == "POST" and self.faults.lost_answers > 0:
            self.faults.lost_answers -= 1
            return _Cut()
        if "idempotency-key" in request.headers:
            headers["idempotency-key"] = request.headers["idempotency-key"]
            if answer.request_id != request_id:
                headers |= {"idempotent-replayed": "true", "original-request": answer.request_id}
        return Response(answer.body, answer.status, headers, media_type="application/json")

    def _account(self, request: Request) -> str:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key:
            message = "You did not provide an API key. You need to provide it in the Authorization header."
            raise Refused(401, message)
        known = key in self.settings.keys if self.settings.keys else key.startswith(KEY_PREFIXES)
        if not known:
            shown = f"{key[:8]}{'*' * 8}{key[-4:]}" if len(key) > 16 else "*" * 8
            raise Refused(401, f"Invalid API Key provided: {shown}")
        return fingerprint(key)

    async def _text(self, request: Request) -> str:
        if request.method == "GET":
            return request.url.query
        body = await request.body()
        if body and not request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
            raise Refused(400, "Invalid request: the body must be form-encoded.")
        try:
            return body.decode("ascii")
        except UnicodeDecodeError as error:
            raise Refused(400, "Invalid request: the body is not form-encoded.") from error

    def _write_once(self, request: Request, body: str, *, account: str, request_id: str) -> Answer:
        """Do what a POST asks, or answer as the first request with its idempotency key was answered."""
        key = request.headers.get("idempotency-key")
        if key is not None and not 1 <= len(key) <= IDEMPOTENCY_KEY_LENGTH_MAX:
            raise Refused(400, "The idempotency key has too many characters.", type="idempotency_error")
        tree = parse(body)
        asked = hashlib.sha256(_json([request.url.path, tree]).encode()).hexdigest()
        if key is not None and (before := self.store.answer(account, key)) is not None:
            if before.request != asked:
                message = (
                    "Keys for idempotent requests can only be used with the same parameters they were first used "
                    f"with. Try using a key other than '{key}' if you meant to execute a different request."
                )
                raise Refused(400, message, type="idempotency_error")
            return before
        try:
            with self.store.transaction():
                done = self._write(request, tree, Caller(request_id, key))
                answer = Answer(asked, 200, _json(done), request_id)
                if key is not None:
                    self.store.keep_answer(account, key, answer)
        except Refused as refused:
            if key is None or not refused.executed:
                raise
            answer = Answer(asked, refused.status, _json(refused.body()), request_id)
            with self.store.transaction():
                self.store.keep_answer(account, key, answer)
        self.courier.wake()
        return answer

    def _write(self, request: Request, tree: dict[str, Any], caller: Caller) -> Object:
        expand = _expansions(tree)
        params = Params(tree)
        match str(request.path_params["path"]).split("/"):
            case ["checkout", "sessions"]:
                done = self.payments.open_session(params, pay_url=f"{request.base_url}c/pay")
            case ["checkout", "sessions", session, "expire"]:
                params.finish()
                done = self.payments.expire(session, caller=caller)
            case ["refunds"]:
                done = self.payments.refund(params, caller=caller)
            case ["customers"]:
                done = self.payments.create_customer(params, caller=caller)
            case _:
                raise _unknown(request)
        return self._expanded(done, expand)

    def _read(self, request: Request, tree: dict[str, Any]) -> Object:
        expand = _expansions(tree)
        params = Params(tree)
        path = str(request.path_params["path"])
        if path in RESOURCES:
            return self._expanded(self._list(path, params), expand)
        collection, _, id = path.rpartition("/")
        if collection not in RESOURCES:
            raise _unknown(request)
        params.finish()
        kind, param, _ = RESOURCES[collection]
        return self._expanded(self._shown(self.payments.get(id, kind=kind, param=param)), expand)

    def _list(self, path: str, params: Params) -> Object:
        """A page of a list, newest first."""
        kind, param, filters = RESOURCES[path]
        limit = params.integer("limit", least=1) or LIMIT_DEFAULT
        if limit > LIMIT_MAX:
            raise Refused(400, f"This value must be less than or equal to {LIMIT_MAX}.", param="limit")
        wanted = {name: value for name in filters if (value := params.text(name)) is not None}
        chosen = [each for each in self.store.newest_first(kind) if wanted.items() <= each.items()]
        if kind == "event":
            types = {*params.texts("types")} | ({only} if (only := params.text("type")) is not None else set())
            chosen = [each for each in chosen if not types or any(_fits(each["type"], type) for type in types)]
        chosen = [each for each in chosen if all(holds(each["created"]) for holds in _created(params))]
        after, before = params.text("starting_after"), params.text("ending_before")
        params.finish()
        for cursor in (after, before):
            if cursor is not None:
                self.payments.get(cursor, kind=kind, param=param)
        ids = [each["id"] for each in chosen]
        if before is not None:
            chosen = chosen[: ids.index(before)] if before in ids else []
            page, more = chosen[-limit:], len(chosen) > limit
        else:
            chosen = chosen[ids.index(after) + 1 :] if after in ids else [] if after is not None else chosen
            page, more = chosen[:limit], len(chosen) > limit
        data = [self._shown(each) for each in page]
        return {"object": "list", "url": f"/v1/{path}", "has_more": more, "data": data}

    def _shown(self, subject: Object) -> Object:
        if subject["object"] != "event":
            return subject
        return subject | {"pending_webhooks": self.store.undelivered(subject["id"])}

    def _expanded(self, subject: Object, paths: list[str]) -> Object:
        """The same with the objects at these paths instead of their ids."""
        for path in paths:
            parts = path.split(".")
            if len(parts) > EXPAND_DEPTH_MAX:
                raise Refused(400, f"You cannot expand more than {EXPAND_DEPTH_MAX} levels.", param="expand")
            targets = [subject]
            for part in parts:
                found: list[Object] = []
                for target in targets:
                    value = target.get(part)
                    if isinstance(value, str) and (referred := self.store.get(value)) is not None:
                        value = target[part] = referred
                    elif part not in target or not isinstance(value, dict | list | None):
                        raise Refused(400, f"This property cannot be expanded ({path}).", param="expand")
                    found += [value] if isinstance(value, dict) else value or []
                targets = found
        return subject

    # The pay page, and what only a simulator has ------------------------------------------------------------------

    async def pay_page(self, request: Request) -> Response:
        session = self._session(request)
        amount = f"{session['amount_total'] / 100:.2f} {session['currency'].upper()}"
        if session["payment_status"] == "paid":
            text = f"{amount} is paid."
        elif session["status"] != "open":
            text = f"This session is {session['status']}."
        else:
            path = html.escape(f"/__sim/checkout/{session['id']}/pay")
            buttons = "".join(f'<button name="outcome" value="{each}">{each}</button> ' for each in OUTCOMES)
            text = f'Pay {amount}?<form method="post" action="{path}">{buttons}</form>'
        if session["cancel_url"]:
            text += f'<p><a href="{html.escape(session["cancel_url"])}">Back</a></p>'
        page = f"<!doctype html><title>Simulated Stripe Checkout</title><h1>Simulated Stripe Checkout</h1><p>{text}</p>"
        return HTMLResponse(page, headers={"content-security-policy": "default-src 'none'"})

    async def pay(self, request: Request) -> Response:
        """From the page's form: then on to the success URL. Otherwise: the session, its intent and charge as JSON."""
        form = request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded")
        given = parse((await request.body()).decode()) if form else await _given(request)
        params = Params(given)
        outcome = cast(Outcome, params.one_of("outcome", OUTCOMES) or "paid")
        params.finish()
        session_id = request.path_params["session"]
        with self.store.transaction():
            session = self.payments.pay(session_id, outcome)
        self.courier.wake()
        if form and session["status"] == "complete":
            url = session["success_url"].replace("{CHECKOUT_SESSION_ID}", session["id"])
            return RedirectResponse(url, status_code=303)
        if form:
            return RedirectResponse(f"/c/pay/{session_id}", status_code=303)
        intent = self.store.get(session["payment_intent"])
        charge = self.store.get(intent["latest_charge"]) if intent and intent["latest_charge"] else None
        return JSONResponse({"session": session, "payment_intent": intent, "charge": charge})

    async def expire(self, request: Request) -> Response:
        return self._happens(lambda: self.payments.expire(request.path_params["session"], caller=Caller()))

    async def refund(self, request: Request) -> Response:
        params = Params(await _given(request))
        return self._happens(lambda: self.payments.refund(params, caller=Caller()))

    async def dispute(self, request: Request) -> Response:
        params = Params(await _given(request))
        return self._happens(lambda: self.payments.dispute(params))

    async def close_dispute(self, request: Request) -> Response:
        status = Params(await _given(request)).one_of("status", ("won", "lost")) or "lost"
        return self._happens(lambda: self.payments.close_dispute(request.path_params["dispute"], won=status == "won"))

    async def deliveries(self, request: Request) -> Response:
        """Every delivery and its attempts; chosen by `state`, `event`, `type`."""
        asked = {name: value for name, value in request.query_params.items() if name in ("state", "event", "type")}
        found = [each for each in self.store.deliveries() if asked.items() <= each.items()]
        urls = [endpoint.url for endpoint in self.courier.settings.endpoints]
        shown = [each | {"url": urls[each["endpoint"]] if each["endpoint"] < len(urls) else None} for each in found]
        return JSONResponse({"deliveries": shown})

    async def resend(self, request: Request) -> Response:
        event = self.payments.get(request.path_params["event"], kind="event", param="id")

        def staged() -> Object:
            self.courier.stage(event)
            return event

        return self._happens(staged)

    async def change_settings(self, request: Request) -> Response:
        """Change how events are delivered from now on, until the process ends."""
        given = await json_object(request)
        try:
            if "endpoints" in given:
                given["endpoints"] = tuple(Endpoint(**each) for each in given["endpoints"])
            settings = replace(self.courier.settings, **given)
        except TypeError as error:
            raise Refused(400, f"Unknown settings: {error}") from error
        await self.courier.change(settings)
        return Response(status_code=204)

    async def plan_faults(self, request: Request) -> Response:
        params = Params(await _given(request))
        errors, lost = params.integer("errors", least=0), params.integer("lost_answers", least=0)
        params.finish()
        self.faults = _Faults(errors=errors or 0, lost_answers=lost or 0)
        return Response(status_code=204)

    async def reset(self, _request: Request) -> Response:
        await self.courier.forget()
        self.store.reset()
        self.faults = _Faults()
        return Response(status_code=204)

    def _session(self, request: Request) -> Object:
        return self.payments.get(request.path_params["session"], kind="checkout.session", param="session")

    def _happens(self, what: Callable[[], Object]) -> Response:
        with self.store.transaction():
            done = what()
        self.courier.wake()
        return JSONResponse(done)


class _Cut(Response):
    """Breaks the connection in the middle of an answer."""

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1000")]})
        await send({"type": "http.response.body", "body": b"{", "more_body": True})


async def _given(request: Request) -> dict[str, Any]:
    """A JSON object as if it had been a form: scalars as texts, so that one reader of parameters does."""
    try:
        found = await json_object(request)
    except (TypeError, ValueError) as error:
        raise Refused(400, f"The body must be a JSON object: {error}") from error
    return {name: str(value) if isinstance(value, int) else value for name, value in found.items()}


def _expansions(tree: dict[str, Any]) -> list[str]:
    found = tree.pop("expand", [])
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise Refused(400, "Invalid array", param="expand")
    return found


def _created(params: Params) -> list[Callable[[int], bool]]:
    """The conditions on `created`: gt, gte, lt, lte."""
    inner = params.inner("created")
    if inner is None:
        return []
    gt, gte, lt, lte = (inner.integer(name, least=0) for name in ("gt", "gte", "lt", "lte"))
    inner.finish()
    return [
        lambda at: gt is None or at > gt,
        lambda at: gte is None or at >= gte,
        lambda at: lt is None or at < lt,
        lambda at: lte is None or at <= lte,
    ]


def _fits(type: str, pattern: str) -> bool:
    """`charge.*` means every type that begins so."""
    return type.startswith(pattern[:-1]) if pattern.endswith(".*") else type == pattern


def _unknown(request: Request) -> Refused:
    message = f"Unrecognized request URL ({request.method}: {request.url.path}): this simulator knows a part of Stripe."
    return Refused(404, message)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2)


async def _on_refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return JSONResponse(error.body(), status_code=error.status)
