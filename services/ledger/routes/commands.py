"""Commands over HTTP: read, handed to their partition's owner by request/reply, the one way in, and answered."""

import inspect
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import msgspec
from fastapi import APIRouter, Depends, Request, Response
from pydantic import ValidationError

from contracts import ledger as words
from services.kit.auth import Principal, require
from services.kit.problems import Problem
from services.ledger import translate
from services.ledger.domain.commands import Units
from services.ledger.routes.backend import RETRY_AFTER_SECONDS, Backend

_STATUS: Final[Mapping[str, int]] = {
    "insufficient_funds": 402,
    "account_not_open": 404,
    "wallet_not_open": 404,
    "unknown_hold": 404,
    "unknown_lot": 404,
    "unknown_rule": 404,
    "unknown_charge": 404,
    "unknown_unit": 422,
    "invalid_amount": 422,
    "invalid_time": 422,
    "invalid_rule": 422,
    "invalid_terms": 422,
    "invalid_transfer": 422,
    "too_much_at_once": 422,
}
_REFUSED_STATUS: Final = 409
_FAILED_STATUS: Final[Mapping[str, int]] = {
    "invalid": 422,
    "conflict": 409,
    "busy": 503,
    "unavailable": 503,
    "fault": 500,
}


_Model = type[words.Command] | type[words.CommandList]

# What is in the path is left out of the body.
_COMMANDS: Final[Mapping[str, _Model]] = {
    "/v1/accounts": words.OpenAccount,
    "/v1/wallets": words.SetWallet,
    "/v1/grants": words.Grant,
    "/v1/grants/{lot}/void": words.VoidGrant,
    "/v1/adjustments": words.Adjust,
    "/v1/holds": words.PlaceHold,
    "/v1/holds/{hold}/extend": words.ExtendHold,
    "/v1/holds/{hold}/settle": words.SettleHold,
    "/v1/holds/{hold}/release": words.ReleaseHold,
    "/v1/charges": words.Charge,
    # The id of an event may hold slashes.
    "/v1/charges/{source}/{event_id:path}/reverse": words.ReverseCharge,
    "/v1/debits": words.Debit,
    "/v1/transfers": words.Transfer,
    "/v1/claims": words.ClaimPayment,
    "/v1/rules": words.SetRule,
    "/v1/rules/{rule}/end": words.EndRule,
    "/v1/plans": words.ChangePlan,
    "/v1/lists": words.CommandList,
}


def commands_router(backend: Callable[[], Backend]) -> APIRouter:
    router = APIRouter(tags=["commands"])
    for route, model in _COMMANDS.items():
        router.add_api_route(
            route,
            _endpoint(backend, model),
            methods=["POST"],
            name=model.model_fields["command"].default,
            description=inspect.getdoc(model),
            **_documented(model, in_path=re.findall(r"{(\w+)", route)),
        )
    return router


def _endpoint(backend: Callable[[], Backend], model: _Model) -> Callable[..., Awaitable[Response]]:
    async def endpoint(request: Request, principal: Principal = _WRITER) -> Response:
        return await _command(backend(), model, request, principal)

    return endpoint


_WRITER: Final = Depends(require("ledger:write"))


def _documented(model: _Model, *, in_path: Sequence[str]) -> dict[str, Any]:
    schema = _without_definitions(model.model_json_schema())
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": schema["properties"][name]} for name in in_path
    ]
    for name in ("command", "idempotency_key", *in_path):
        schema["properties"].pop(name)
    schema["required"] = [name for name in schema["required"] if name in schema["properties"]]
    is_list = model is words.CommandList
    said = "Under the same key the first accepted outcome is replayed for ever."
    parameters.append(
        {
            "name": "Idempotency-Key",
            "in": "header",
            "required": not is_list,
            "schema": {"type": "string", "minLength": 1, "maxLength": 256},
            "description": f"Of a list that is all or nothing, and only then. {said}" if is_list else said,
        }
    )
    return {
        "response_model": words.Listed if is_list else words.Accepted,
        "responses": {
            400: {"description": "The header Idempotency-Key is missing"},
            402: {"description": "A wallet has not got what is required"},
            404: {"description": "The account or the wallet is not open, or what is named is not known"},
            409: {"description": "The key was used for another body, or the state does not allow the command"},
            413: {"description": "The body is larger than is allowed"},
            422: {"description": "Something is wrong with the body; all of it is named"},
            503: {"description": "Not decided, `busy` or `unavailable`: ask again with the same key"},
        },
        "openapi_extra": {
            "parameters": parameters,
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        },
    }


def _without_definitions(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with its definitions put in where they are referred to."""
    definitions = schema.get("$defs", {})

    def put_in(part: Any) -> Any:
        if isinstance(part, list):
            return [put_in(each) for each in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return put_in(definitions[part["$ref"].rsplit("/", 1)[1]])
        # What is put in has no name that could be chosen by.
        return {name: put_in(each) for name, each in part.items() if name not in {"$defs", "discriminator"}}

    found: dict[str, Any] = put_in(dict(schema))
    return found


async def _command(backend: Backend, model: _Model, request: Request, principal: Principal) -> Response:
    """Read a command, hand it to the owner of its partition, and tell the answer."""
    body = _read_body(await request.body())
    command = _read_command(
        model,
        body,
        keys=request.headers.getlist("idempotency-key"),
        in_path=request.path_params,
        units=backend.units,
        principal=principal.name,
    )
    reply: words.Reply | words.ListReply
    if isinstance(command, words.CommandList):
        reply = await backend.owners.ask_all(command, principal=principal.name)
    else:
        reply = await backend.owners.ask(command, principal=principal.name)
    if isinstance(reply, words.Accepted | words.Listed):
        return Response(reply.model_dump_json(), media_type="application/json")
    raise problem_of(reply)


def _read_body(text: bytes) -> dict[str, Any]:
    try:
        body = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(400, "not_json", f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise Problem(400, "not_an_object", "the body is a JSON object")
    return body


def _read_command(
    model: _Model,
    body: dict[str, Any],
    *,
    keys: Sequence[str],
    in_path: Mapping[str, Any],
    units: Units,
    principal: str,
) -> words.Command | words.CommandList:
    """The command in a body. Problem 400 or 422 names everything that is wrong."""
    elsewhere = {**in_path, "command": model.model_fields["command"].default}
    if keys:
        elsewhere["idempotency_key"] = keys[0]
    problems = _differences(body, elsewhere)
    if len(keys) > 1:
        said = f"a command has one idempotency key, here are {len(keys)}"
        problems.append(translate.Problem("/header/Idempotency-Key", "repeated", said))
    whole = {**body, **elsewhere}
    stands_or_falls = model is not words.CommandList or body.get("all_or_nothing") is True
    if model is words.CommandList and stands_or_falls:
        whole["commands"] = _numbered(body.get("commands"))
    is_missing = stands_or_falls and whole.get("idempotency_key") is None
    if is_missing:
        problems.append(
            translate.Problem("/header/Idempotency-Key", "missing", "a command needs the header Idempotency-Key")
        )
        whole["idempotency_key"] = "missing"
    command: words.Command | words.CommandList | None = None
    try:
        command = model.model_validate_json(msgspec.json.encode(whole))
        if isinstance(command, words.CommandList):
            translate.read_list(command, units, principal=principal)
        else:
            translate.read_command(command, units, principal=principal)
    except ValidationError as error:
        problems.extend(translate.model_problems(error))
        named = {problem.pointer for problem in problems}
        problems.extend(each for each in translate.body_problems(whole, units) if each.pointer not in named)
    except translate.Invalid as error:
        problems.extend(error.problems)
    if problems or command is None:
        raise Problem(
            400 if is_missing else 422,
            "idempotency_key_missing" if is_missing else "invalid_request",
            str(problems[0]) if len(problems) == 1 else f"the request has {len(problems)} problems",
            errors=translate.problem_rows(problems),
        )
    return command


def _differences(body: Mapping[str, Any], elsewhere: Mapping[str, Any]) -> list[translate.Problem]:
    """Where the body says something else than the header or the path."""
    return [
        translate.Problem(f"/{name}", "invalid", f"the body names another {name} than the path or the header")
        for name, said in elsewhere.items()
        if body.get(name, said) != said
    ]


def _numbered(commands: Any) -> Any:
    """Commands that stand or fall together need no keys of their own: their places do."""
    if not isinstance(commands, list):
        return commands
    return [
        {"idempotency_key": str(place), **each} if isinstance(each, dict) else each
        for place, each in enumerate(commands)
    ]


def problem_of(reply: words.Refused | words.Failed) -> Problem:
    if isinstance(reply, words.Failed):
        status = _FAILED_STATUS[reply.code]
        headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status == 503 else {}
        return Problem(status, reply.code, reply.message, headers=headers)
    numbers = reply.model_dump(exclude_none=True, include={"limit_source", "required", "remaining", "index"})
    return Problem(_STATUS.get(reply.code, _REFUSED_STATUS), reply.code, reply.message, members=numbers)
