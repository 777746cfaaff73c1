"""Checks an object against Stripe's fixture of its kind and against the stripe library's own description of it."""

import json
from inspect import get_annotations
from pathlib import Path
from types import NoneType
from typing import Any, ForwardRef, Literal, Union, get_args, get_origin

import stripe

import infra.simulators.stripe as simulator

FIXTURES: dict[str, Any] = json.loads((Path(simulator.__file__).parent / "fixtures.json").read_text(encoding="utf-8"))[
    "resources"
]

CLASSES: dict[str, type[stripe.StripeObject]] = {
    "charge": stripe.Charge,
    "checkout.session": stripe.checkout.Session,
    "customer": stripe.Customer,
    "dispute": stripe.Dispute,
    "event": stripe.Event,
    "payment_intent": stripe.PaymentIntent,
    "refund": stripe.Refund,
}


def problems(subject: dict[str, Any]) -> list[str]:
    """Everything in which an object differs from what Stripe would send."""
    kind = subject["object"]
    found = _fields(subject, FIXTURES[kind], kind) + _types(subject, CLASSES[kind], kind)
    return found + (problems(subject["data"]["object"]) if kind == "event" else [])


def _fields(value: Any, fixture: Any, where: str) -> list[str]:
    """The same fields all the way down, except in what is empty here or there, metadata, and an event's subject."""
    if not isinstance(value, dict) or not isinstance(fixture, dict) or not fixture:
        return []
    if where == "event.data":
        return [] if value.keys() == {"object"} else [f"{where}: {value.keys()}"]
    if value.keys() != fixture.keys():
        return [f"{where}: {sorted(value.keys() ^ fixture.keys())}"]
    return [problem for name in value for problem in _fields(value[name], fixture[name], f"{where}.{name}")]


def _types(value: Any, kind: Any, where: str) -> list[str]:  # noqa: PLR0911 - one line for each way to write a type
    """Whether a value is of a type as the library writes it."""
    origin = get_origin(kind)
    if origin is Union:
        if value is None and NoneType in get_args(kind):
            return []
        tried = [_types(value, each, where) for each in get_args(kind) if each is not NoneType]
        return min(tried, key=len)
    if origin is list:
        (item,) = get_args(kind)
        if not isinstance(value, list):
            return [f"{where}: {value!r} is no list"]
        return [problem for each in value for problem in _types(each, item, f"{where}[]")]
    if origin is Literal:
        return [] if value in get_args(kind) else [f"{where}: {value!r} is none of {get_args(kind)}"]
    if origin is dict:
        return [] if isinstance(value, dict) else [f"{where}: {value!r} is no object"]
    if isinstance(kind, ForwardRef):
        # An object of the API, given by its id.
        return [] if isinstance(value, str) else [f"{where}: {value!r} is no id"]
    # A generic of the library itself: a list of the API.
    kind = origin or kind
    if isinstance(kind, type) and issubclass(kind, stripe.StripeObject):
        if not isinstance(value, dict):
            return [f"{where}: {value!r} is no object"]
        known = {name: each for parent in reversed(kind.__mro__) for name, each in _annotations(parent).items()}
        return [
            problem
            for name, each in value.items()
            if name in known and name != "object"
            for problem in _types(each, known[name], f"{where}.{name}")
        ]
    return [] if not isinstance(kind, type) or type(value) is kind else [f"{where}: {value!r} is no {kind.__name__}"]


def _annotations(kind: type) -> dict[str, Any]:
    if kind is stripe.StripeObject or not issubclass(kind, stripe.StripeObject):
        return {}
    return {name: each for name, each in get_annotations(kind).items() if not isinstance(each, str)}
