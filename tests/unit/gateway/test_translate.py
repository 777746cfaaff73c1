"""Laws of what crosses the gateway's edges: no secret in an error, no 401 but ours, the same event each time."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from contracts.envelope import read_usage_event
from contracts.money import Amount
from contracts.usage import ModelUsed
from services.gateway import translate
from services.gateway.domain import errors
from services.gateway.domain.errors import InsufficientFunds, ProviderFailed, Refusal, RequestInvalid
from services.kit.ids import new_hold_id

SECRET = "sk-proj-abcdefghijklmnopqrstuvwxyz0123456789"
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def refused(status: int, message: str, *, code: str | None = None, **headers: str) -> ProviderFailed:
    body = json.dumps({"error": {"message": message, "code": code, "param": None}}).encode()
    return translate.provider_refused(
        provider="openai", status=status, headers=headers, body=body, secret=SECRET, own=False
    )


@pytest.mark.parametrize(
    "message",
    [
        f"Incorrect API key provided: {SECRET}.",
        "Incorrect API key provided: sk-proj-********6789.",
        "key abcdefg********6789 is not valid",
        "Rate limit reached for gpt-4o in organization org-AbCdEf123456 on tokens per min",
        "Authorization: Bearer abc.def.ghi failed",
        "API key AIzaSyA-1234567890abcdefghij expired",
        "project proj_AbCdEf123456 has no access",
    ],
)
@pytest.mark.parametrize("status", [400, 401, 429, 500])
def test_a_providers_words_say_nothing_of_its_key(message: str, status: int) -> None:
    said = str(refused(status, message))
    for part in (SECRET, "6789", "abc.def", "AbCdEf", "AIza", "1234567890"):
        assert part not in said


def test_a_providers_words_are_passed_on_otherwise() -> None:
    message = "Unsupported value: 'temperature' does not support 3 with this model."
    failed = refused(400, message, code="unsupported_value")
    assert (failed.status, failed.code, str(failed)) == (400, "unsupported_value", message)
    assert "\n" not in str(refused(500, "a\nb"))
    assert len(str(refused(500, "x" * 10_000))) < 600


@pytest.mark.parametrize(
    ("status", "code", "told", "told_code"),
    [
        (401, "invalid_api_key", 502, "provider_key_rejected"),
        (403, None, 502, "provider_key_rejected"),
        (400, "invalid_api_key", 502, "provider_key_rejected"),
        (429, "rate_limit_exceeded", 429, "rate_limit_exceeded"),
        (429, "insufficient_quota", 502, "provider_out_of_quota"),
        (404, "model_not_found", 404, "model_not_found"),
        (402, None, 502, "provider_failed"),
        (500, None, 502, "provider_failed"),
        (302, None, 502, "provider_failed"),
    ],
)
def test_what_a_client_is_told_of_a_providers_status(status: int, code: str | None, told: int, told_code: str) -> None:
    failed = refused(status, "no", code=code)
    assert (failed.status, failed.code) == (told, told_code)


def test_a_rate_limit_says_when_to_try_again() -> None:
    assert refused(429, "no", **{"retry-after": "7", "retry-after-ms": "6900"}).headers == {
        "retry-after": "7",
        "retry-after-ms": "6900",
    }
    assert refused(429, "no", **{"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}).headers == {"retry-after": "1"}


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"5", b'{"error": "text"}', b'{"error": null}', b"\xff"])
def test_any_error_body_is_an_error(body: bytes) -> None:
    failed = translate.provider_refused(provider="openai", status=500, headers={}, body=body, secret=SECRET, own=True)
    assert failed.status == 502


def test_every_refusal_has_a_status_and_openais_shape() -> None:
    amount = Amount(amount="1", unit="usd")
    made: list[Refusal] = [
        errors.KeyRefused(code="key_missing", reason="no"),
        RequestInvalid(reason="no", param="n"),
        errors.BodyTooLarge(bytes_max=1),
        errors.BodyTooSlow(),
        errors.ModelNotPriced(model="m", price_version="v"),
        errors.NoProvider(model="m", providers=("p",)),
        errors.UnknownPath(method="GET", path="/v1/x"),
        errors.SecretRefused(code="no_own_secret", reason="no", own=True),
        errors.SecretRefused(code="no_platform_secret", reason="no", own=False),
        InsufficientFunds(limit_source="acme", required=amount, remaining=amount, affordable_max_tokens=3),
        errors.AccountNotOpen(account="acme"),
        errors.Unavailable(reason="no"),
        errors.ClientLeft(),
        ProviderFailed(reason="no"),
        errors.NotRecorded(request_id="req_1"),
    ]
    assert {type(each) for each in made} == set(Refusal.__subclasses__())
    statuses = []
    for each in made:
        status, headers, body = translate.error_answer(each, request_id="req_1")
        statuses.append(status)
        assert (b"x-scrip-request-id", b"req_1") in headers
        error = json.loads(body)["error"]
        assert {"message", "type", "param", "code"} <= set(error)
        assert error["message"] == str(each) != ""
    assert statuses == [401, 400, 413, 408, 404, 404, 404, 403, 503, 402, 403, 503, 408, 502, 500]


def test_a_request_that_is_refused_for_money_says_how_much() -> None:
    refusal = InsufficientFunds(
        limit_source="acme",
        required=Amount(amount="2", unit="usd"),
        remaining=Amount(amount="1", unit="usd"),
        affordable_max_tokens=3,
    )
    error = json.loads(translate.error_answer(refusal, request_id="req_1")[2])["error"]
    assert error["code"] == "insufficient_quota"
    assert {name: error[name] for name in ("limit_source", "required", "remaining", "affordable_max_tokens")} == {
        "limit_source": "acme",
        "required": {"amount": "2", "unit": "usd"},
        "remaining": {"amount": "1", "unit": "usd"},
        "affordable_max_tokens": 3,
    }


def test_a_usage_event_is_one_that_metering_reads_and_the_same_each_time() -> None:
    hold = new_hold_id("acme/ana")
    used = ModelUsed(
        provider="openai", model="m", input_tokens=1, output_tokens=2, hold=hold, attributes={"estimated": True}
    )
    at = datetime(2026, 7, 1, 12, 0, 0, 5, tzinfo=UTC)
    first, second = (
        translate.usage_message(used, request_id="req_1", account="acme/ana", occurred_at=at) for _ in range(2)
    )
    assert first == second
    event, _ = read_usage_event(first.payload)
    assert (event.id, event.source, event.subject, event.time) == ("req_1", "gateway", "acme/ana", at)
    assert event.data == used


def test_the_trace_of_a_usage_event_changes_neither_its_hash_nor_its_message_id() -> None:
    used = ModelUsed(provider="openai", model="m", input_tokens=1, output_tokens=2)
    at = datetime(2026, 7, 1, 12, tzinfo=UTC)
    plain, traced, otherwise = (
        translate.usage_message(used, request_id="req_1", account="acme", occurred_at=at, traceparent=traceparent)
        for traceparent in (None, TRACEPARENT, TRACEPARENT.replace("-00f0", "-11f0"))
    )
    assert TRACEPARENT.encode() not in plain.payload
    assert TRACEPARENT.encode() in traced.payload
    assert plain.message_id == traced.message_id == otherwise.message_id
    hashes = {read_usage_event(each.payload)[1] for each in (plain, traced, otherwise)}
    assert len(hashes) == 1


def test_a_provider_is_told_nothing_of_the_trace() -> None:
    headers = {"traceparent": TRACEPARENT, "tracestate": "a=b", "baggage": "c=d"}
    for own in (True, False):
        sent = translate.request_headers(headers, secret=SECRET, own=own, request_id="req_1")
        assert not {"traceparent", "tracestate", "baggage"} & set(sent)
        assert TRACEPARENT not in str(sent)


def test_a_stream_is_asked_for_its_usage_and_keeps_its_other_options() -> None:
    body: dict[str, Any] = {"model": "m", "stream": True, "stream_options": {"include_obfuscation": False}}
    sent = json.loads(translate.request_body(body, stream=True, usage_wanted=False))
    assert sent["stream_options"] == {"include_obfuscation": False, "include_usage": True}
    assert body["stream_options"] == {"include_obfuscation": False}
    assert json.loads(translate.request_body({"model": "m"}, stream=False, usage_wanted=False)) == {"model": "m"}


def test_only_an_own_key_chooses_its_organisation() -> None:
    headers = {
        "openai-organization": "org-1",
        "cookie": "c",
        "authorization": "Bearer sk-scrip-x",
        "x-scrip-source": "a",
    }
    ours = translate.request_headers(headers, secret=SECRET, own=False, request_id="req_1")
    own = translate.request_headers(headers, secret=SECRET, own=True, request_id="req_1")
    assert "openai-organization" not in ours
    assert own["openai-organization"] == "org-1"
    for sent in (ours, own):
        assert sent["authorization"] == f"Bearer {SECRET}"
        assert not {"cookie", "x-scrip-source"} & set(sent)


def test_labels_are_checked() -> None:
    labels = translate.read_labels(
        {"x-scrip-attribute-order-id": "7", "x-scrip-source": "chat", "x-scrip-feature": "f"}
    )
    assert (labels.feature, labels.attributes) == ("f", {"order_id": "7", "source": "chat"})
    for bad in (
        {"x-scrip-attribute-": "x"},
        {"x-scrip-attribute-7": "x"},
        {"x-scrip-attribute-estimated": "false"},
        {"x-scrip-conversation": "x" * 600},
        {"x-scrip-feature": "Not A Name"},
        {f"x-scrip-attribute-a{number}": "x" for number in range(13)},
    ):
        with pytest.raises(RequestInvalid) as refused_label:
            translate.read_labels(bad)
        assert refused_label.value.code == "invalid_attribute"


def test_of_the_client_only_its_network_is_kept() -> None:
    assert translate.client_attributes({}, address="203.0.113.77") == {"client_network": "203.0.113.0/24"}
    assert translate.client_attributes({"user-agent": "x" * 999}, address="2001:db8:1:2::3") == {
        "user_agent": "x" * 200,
        "client_network": "2001:db8:1::/48",
    }
    assert translate.client_attributes({}, address="testclient") == {}


BOOK: dict[str, Any] = {
    "units": [{"name": "usd", "kind": "money", "scale": 9, "own_key_counts": False}],
    "versions": [
        {
            "id": "v",
            "effective_at": "2025-01-01T00:00:00Z",
            "models": [
                {
                    "provider": "openai",
                    "model": "m",
                    "rates": [{"quantity": "input_tokens", "unit": "usd", "price": "0.15", "per": 1000000}],
                }
            ],
        }
    ],
}


def test_a_price_book_is_read_whole_or_not_at_all() -> None:
    book = translate.read_price_book(json.dumps(BOOK).encode())
    assert list(book.versions[0].rates) == [("openai", "m")]
    text = json.dumps(BOOK)
    for wrong, instead in (
        ('"unit": "usd"', '"unit": "eur"'),
        ('"0.15"', '"NaN"'),
        ('"0.15"', "0.15"),
        ("1000000", "7"),
    ):
        assert wrong in text
        with pytest.raises(translate.UnreadablePrices):
            translate.read_price_book(text.replace(wrong, instead).encode())
    with pytest.raises(translate.UnreadablePrices):
        translate.read_price_book(b"<html>")
