"""The provider's HTTP side: OpenAI's chat completions, and under /__sim what it counted.

Generating and answering are two tasks: what is generated is billed whether or not anybody still listens.
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from infra.simulators.provider.count import Count, Outcome, Served
from infra.simulators.provider.directives import Disconnect, Plan, Refused, plan
from infra.simulators.running import fingerprint, json_object, operations

NAME: Final = "provider-simulator"
KEY_PREFIX: Final = "sk-sim-"
MODELS: Final = ("gpt-4.1", "gpt-4.1-mini", "gpt-4o", "gpt-4o-mini", "o4-mini")

_SYSTEM_FINGERPRINT: Final = "fp_simulated"
_CREATED: Final = 1_721_172_741


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How this provider behaves. Without `keys` every key beginning with sk-sim- is accepted."""

    keys: frozenset[str] = frozenset()
    disconnect: Disconnect = "drain"
    token_seconds: float = 0.002
    state: Path | None = None


def build_app(settings: Settings | None = None) -> Starlette:
    """The provider as an application, with a count of its own."""
    provider = _Provider(settings or Settings())
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", provider.complete, methods=["POST"]),
            Route("/v1/models", provider.models),
            Route("/v1/models/{model:path}", provider.model),
            Route("/__sim/usage", provider.usage),
            Route("/__sim/requests", provider.requests),
            Route("/__sim/reset", provider.reset, methods=["POST"]),
            *operations(NAME),
        ],
        exception_handlers={Refused: _on_refused},
        lifespan=provider.lifespan,
    )
    app.state.count = provider.count
    return app


class _Provider:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.count = Count(settings.state)
        self.tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        yield
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def complete(self, request: Request) -> Response:
        key = self._key(request)
        try:
            body = await json_object(request)
        except (TypeError, ValueError) as error:
            raise Refused(400, "We could not parse the JSON body of your request.") from error
        planned = plan(body)
        served = Served(
            id=f"req_{secrets.token_hex(16)}",
            key=fingerprint(key),
            model=planned.model,
            stream=planned.stream,
            started_at=time.time(),
            client_request_id=request.headers.get("x-client-request-id"),
        )
        self.count.start(served)
        if planned.directives.fail is not None:
            self.count.finish(served, "failed")
            raise _failure(planned.directives.fail)
        return _Answer(_Generation(self, planned, served))

    async def models(self, request: Request) -> Response:
        self._key(request)
        return JSONResponse({"object": "list", "data": [_model(name) for name in MODELS]})

    async def model(self, request: Request) -> Response:
        self._key(request)
        name = request.path_params["model"]
        if name not in MODELS:
            raise Refused(404, f"The model '{name}' does not exist", code="model_not_found", param="model")
        return JSONResponse(_model(name))

    async def usage(self, request: Request) -> Response:
        return JSONResponse({"disconnect": self.settings.disconnect} | self.count.usage(_asked_key(request)))

    async def requests(self, request: Request) -> Response:
        return JSONResponse({"requests": self.count.requests(_asked_key(request))})

    async def reset(self, _request: Request) -> Response:
        self.count.reset()
        return Response(status_code=204)

    def _key(self, request: Request) -> str:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key:
            message = "You didn't provide an API key. You need to provide your API key in an Authorization header."
            raise Refused(401, message)
        known = key in self.settings.keys if self.settings.keys else key.startswith(KEY_PREFIX)
        if not known:
            # As the real one does, it says parts of the key: whoever passes this on passes those on.
            shown = f"{key[:7]}{'*' * 8}{key[-4:]}" if len(key) > 16 else "*" * 8
            raise Refused(401, f"Incorrect API key provided: {shown}.", code="invalid_api_key")
        return key


class _Left:
    """In the queue of tokens: the client has gone."""


class _Generation:
    """Generates the tokens of one answer in a task of its own, and counts each as it comes into being."""

    def __init__(self, provider: _Provider, planned: Plan, served: Served) -> None:
        self.plan = planned
        self.served = served
        self.made: asyncio.Queue[tuple[int, str] | _Left | None] = asyncio.Queue()
        self.broken = False
        self._count = provider.count
        self._left = False
        self._disconnect = planned.directives.disconnect or provider.settings.disconnect
        chosen = planned.directives.token_seconds
        self._token_seconds = provider.settings.token_seconds if chosen is None else chosen
        self._task = asyncio.create_task(self._run())
        provider.tasks.add(self._task)
        self._task.add_done_callback(provider.tasks.discard)

    def client_left(self) -> None:
        """Nobody listens any more. What that means is this provider's policy."""
        self._left = True
        if self._disconnect == "abort":
            self._task.cancel()
        self.made.put_nowait(_Left())

    async def _run(self) -> None:
        outcome: Outcome = "stopped"
        try:
            whole = await self._generate()
            outcome = "cut" if not whole else "drained" if self._left else "completed"
        except asyncio.CancelledError:
            outcome = "aborted" if self._left else "stopped"
            raise
        finally:
            self.broken = outcome not in ("completed", "drained")
            self._count.finish(self.served, outcome)
            self.made.put_nowait(None)

    async def _generate(self) -> bool:
        """Make the tokens. False if a directive ended it early."""
        planned, directives, served = self.plan, self.plan.directives, self.served
        await asyncio.sleep(directives.stall_seconds)
        served.began = True
        served.input_tokens = planned.input_tokens
        served.cached_tokens = planned.cached_tokens
        served.reasoning_tokens = planned.reasoning_tokens * planned.choices
        served.output_tokens = served.reasoning_tokens
        ends = [count for count in (directives.cut_after, directives.error_after) if count is not None]
        for number, (choice, text) in enumerate(_tokens(planned)):
            if directives.stall_after is not None and number == directives.stall_after[0]:
                await asyncio.sleep(directives.stall_after[1])
            if number in ends:
                break
            await asyncio.sleep(self._token_seconds)
            served.output_tokens += 1
            self.made.put_nowait((choice, text))
        return not ends


class _Answer(Response):
    """Tells the client what is generated, for as long as it listens."""

    def __init__(self, generation: _Generation) -> None:
        super().__init__()
        self._generation = generation
        self._plan = generation.plan
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(self._watch(receive))
        try:
            await (self._streamed(send) if self._plan.stream else self._whole(scope, receive, send))
        finally:
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._generation.client_left()

    async def _streamed(self, send: Send) -> None:
        planned, directives = self._plan, self._plan.directives
        made = await self._generation.made.get()
        if isinstance(made, _Left):
            return
        await self._start(send, b"text/event-stream; charset=utf-8")
        for choice in range(planned.choices):
            await self._say(send, self._chunk(choice, {"role": "assistant", "content": "", "refusal": None}))
        number = 0
        while made is not None:
            if isinstance(made, _Left):
                return
            if directives.bad_json and number == 1:
                await _write(send, b'data: {"id": "chatcmpl-broken", "choices": [{"delta"\n\n')
            await self._say(send, self._chunk(made[0], {"content": made[1]}))
            number += 1
            made = await self._generation.made.get()
        if self._generation.broken:
            if directives.error_after is not None:
                await self._say(send, _failure(500).body())
                await _write(send, b"", more=False)
            # Otherwise returning without an end is what makes the server break the connection.
            return
        for choice in range(planned.choices):
            await self._say(send, self._chunk(choice, {}, finish_reason=planned.finish_reason))
        if planned.include_usage and not directives.omit_usage:
            self._generation.served.usage_reported = True
            await self._say(send, self._envelope("chat.completion.chunk") | {"choices": [], "usage": self._usage()})
        await _write(send, b"data: [DONE]\n\n", more=False)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        planned = self._plan
        texts = [""] * planned.choices
        while (made := await self._generation.made.get()) is not None:
            if isinstance(made, _Left):
                return
            texts[made[0]] += made[1]
        if self._generation.broken and planned.directives.error_after is not None:
            await _error(_failure(500))(scope, receive, send)
            return
        answer = self._envelope("chat.completion") | {
            "choices": [
                {
                    "index": choice,
                    "message": {"role": "assistant", "content": text, "refusal": None, "annotations": []},
                    "logprobs": None,
                    "finish_reason": planned.finish_reason,
                }
                for choice, text in enumerate(texts)
            ]
        }
        if not planned.directives.omit_usage:
            self._generation.served.usage_reported = True
            answer["usage"] = self._usage()
        body = _json(answer)
        if planned.directives.bad_json:
            body = body[: len(body) // 2]
        await self._start(send, b"application/json", length=len(body))
        if self._generation.broken:
            await _write(send, body[: len(body) // 2])
            return
        await _write(send, body, more=False)

    async def _start(self, send: Send, content_type: bytes, *, length: int | None = None) -> None:
        headers = [
            (b"content-type", content_type),
            (b"x-request-id", self._generation.served.id.encode()),
            (b"openai-version", b"2020-10-01"),
        ]
        if length is not None:
            headers.append((b"content-length", str(length).encode()))
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _say(self, send: Send, event: dict[str, Any]) -> None:
        await _write(send, b"data: " + _json(event) + b"\n\n")

    def _chunk(self, choice: int, delta: dict[str, Any], *, finish_reason: str | None = None) -> dict[str, Any]:
        chunk = self._envelope("chat.completion.chunk") | {
            "choices": [{"index": choice, "delta": delta, "logprobs": None, "finish_reason": finish_reason}]
        }
        # Asked for usage, every chunk but the last says that it has none; unasked, no chunk speaks of it.
        return chunk | {"usage": None} if self._plan.include_usage else chunk

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._plan.directives.served_as or self._plan.model,
            "service_tier": "default",
            "system_fingerprint": _SYSTEM_FINGERPRINT,
        }

    def _usage(self) -> dict[str, Any]:
        served = self._generation.served
        return {
            "prompt_tokens": served.input_tokens,
            "completion_tokens": served.output_tokens,
            "total_tokens": served.input_tokens + served.output_tokens,
            "prompt_tokens_details": {"cached_tokens": served.cached_tokens, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": served.reasoning_tokens,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }


def _tokens(planned: Plan) -> Iterator[tuple[int, str]]:
    """Every visible token in the order it is generated, with the choice it belongs to."""
    for index in range(planned.visible_tokens):
        for choice in range(planned.choices):
            yield choice, planned.word(index)


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


async def _write(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


def _asked_key(request: Request) -> str | None:
    """Whose count is asked for: a key in the Authorization header, or everybody's."""
    _, _, key = request.headers.get("authorization", "").partition(" ")
    return fingerprint(key.strip()) if key.strip() else None


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": _CREATED, "owned_by": "system"}


_FAILURES: Final = {
    401: ("Incorrect API key provided.", "invalid_request_error", "invalid_api_key"),
    403: ("Country, region, or territory not supported.", "request_forbidden", "unsupported_country_region_territory"),
    404: ("The model does not exist or you do not have access to it.", "invalid_request_error", "model_not_found"),
    429: ("Rate limit reached for requests. Please try again in 20ms.", "requests", "rate_limit_exceeded"),
    503: ("The engine is currently overloaded, please try again later.", "server_error", None),
}


def _failure(status: int) -> Refused:
    """What OpenAI says with this status."""
    text = "The server had an error while processing your request." if status >= 500 else "The request was refused."
    message, kind, code = _FAILURES.get(
        status, (text, "server_error" if status >= 500 else "invalid_request_error", None)
    )
    return Refused(status, message, type=kind, code=code)


def _error(refused: Refused) -> JSONResponse:
    headers = {"x-request-id": f"req_{secrets.token_hex(16)}"}
    if refused.status == 429:
        headers |= {"retry-after": "1", "retry-after-ms": "20"}
    return JSONResponse(refused.body(), status_code=refused.status, headers=headers)


async def _on_refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return _error(error)
