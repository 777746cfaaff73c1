"""Bad input at both doors: named, kept, never in the way of what is behind it, and charged once when it can be."""

import time
from datetime import timedelta
from typing import Any
from urllib.parse import quote

import pytest

from contracts.partition import partition_of
from infra.demo.scratch_stack import ScratchStack
from tests.e2e.conftest import Api
from tests.e2e.usage import at, event, eventually, fresh, send

pytestmark = pytest.mark.timeout(200)

COST = "0.00021"


def test_over_http_all_problems_of_all_events_are_named_at_once(reporter: Api) -> None:
    account = fresh("bad")
    good = event(fresh("good"), account)
    floats = event(fresh("floats"), account, data=good["data"] | {"input_tokens": 1.5, "output_tokens": -1})
    stranger = event(fresh("stranger"), "a\x07b", source="gateway", time=at(timedelta(minutes=6)))
    answer = reporter.post(
        "/api/v1/events", [good, floats, stranger, "text"], content_type="application/cloudevents-batch+json"
    )
    assert answer.status_code == 400, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    errors = {(error["index"], error["field"]) for error in answer.json()["errors"]}
    assert {(1, "data.input_tokens"), (1, "data.output_tokens"), (2, "subject"), (3, "")} <= errors
    assert {(2, "source"), (2, "time")} <= errors
    assert not any(index == 0 for index, _ in errors)


def test_over_nats_the_unreadable_is_dead_lettered_and_does_not_block_what_is_behind_it(
    stack: ScratchStack, metering: Api, ledger: Api
) -> None:
    account = _opened(ledger, fresh("behind"))
    marker = fresh("marker")
    send(stack, f"not json {marker}".encode(), event(fresh("good"), account), account=account)
    _charged(ledger, account, COST)
    (letter,) = _letters_with(metering, marker)
    assert letter["reason"].startswith("not JSON")
    shown = stack.scrip("dead-letters", "list")
    assert shown.returncode == 0, shown.stdout
    assert letter["id"] in shown.stdout
    refused = metering.post(f"/dead-letters/{letter['id']}/redrive", None)
    assert refused.status_code == 422, refused.text


def test_an_event_too_far_ahead_is_dead_lettered_and_charged_once_when_redriven_in_its_time(
    stack: ScratchStack, metering: Api, ledger: Api
) -> None:
    account = _opened(ledger, fresh("ahead"))
    early = event(fresh("early"), account, time=at(timedelta(minutes=5, seconds=2)))
    send(stack, early, account=account)
    letter = eventually(lambda: _letters_with(metering, early["id"]), bool)[0]
    assert letter["problems"][0]["field"] == "time"
    time.sleep(2.5)
    redriven = stack.scrip("dead-letters", "redrive", letter["id"])
    assert redriven.returncode == 0, redriven.stdout
    _charged(ledger, account, COST)
    assert metering.post(f"/dead-letters/{letter['id']}/redrive", None).status_code == 409


def test_an_event_on_a_strange_partition_is_sent_on_and_charged_once(
    stack: ScratchStack, metering: Api, ledger: Api
) -> None:
    account = _opened(ledger, fresh("lost"))
    stray = event(fresh("stray"), account)
    send(stack, stray, stray, account=account, partition=(partition_of(account) + 1) % 64)
    _charged(ledger, account, COST)
    assert _letters_with(metering, stray["id"]) == []


def test_use_of_a_foreign_subject_is_kept_and_charged_once_when_it_is_mapped(
    stack: ScratchStack, reporter: Api, metering: Api, ledger: Api
) -> None:
    account, subject = _opened(ledger, fresh("mapped")), fresh("Müller & Söhne")
    use, later = event(fresh("use"), subject), event(fresh("later"), subject)
    assert reporter.post("/api/v1/events", [use, use], content_type="application/json").status_code == 204

    def unmapped() -> list[str]:
        found = metering.json(f"/api/v1/set-aside?reason=unmapped&key={quote(subject)}")["set_aside"]
        return [each["id"] for each in found]

    eventually(unmapped, lambda found: found == [use["id"]])
    for _ in range(2):
        assert f"{subject} stands for {account}" in _said(stack, "alias", "add", subject, account)
    _charged(ledger, account, COST)
    assert unmapped() == []
    assert reporter.post("/api/v1/events", use).status_code == 204
    _charged(ledger, account, COST)
    # Forgotten, what it took stays where it went, and what comes waits.
    assert f"{subject} does not stand for {account} any more" in _said(stack, "alias", "delete", subject)
    assert reporter.post("/api/v1/events", [use, later], content_type="application/json").status_code == 204
    eventually(unmapped, lambda found: found == [later["id"]])
    _charged(ledger, account, COST)


def test_use_of_an_unknown_account_is_set_aside_and_charged_once_when_the_account_is_opened(
    stack: ScratchStack, reporter: Api, metering: Api, ledger: Api
) -> None:
    account = fresh("unknown")
    use = event(fresh("use"), account)
    assert reporter.post("/api/v1/events", use).status_code == 204
    send(stack, use, account=account)
    eventually(lambda: _set_aside(metering, account), lambda found: len(found) == 1)
    _opened(ledger, account)
    _charged(ledger, account, COST)
    assert _set_aside(metering, account) == []
    assert reporter.post("/api/v1/events", use).status_code == 204
    _charged(ledger, account, COST)


def test_the_same_id_with_another_body_is_a_conflict_that_charges_nothing(
    stack: ScratchStack, reporter: Api, metering: Api, ledger: Api
) -> None:
    account = _opened(ledger, fresh("conflict"))
    first = event(fresh("first"), account)
    other = first | {"data": first["data"] | {"input_tokens": 999_999}}
    last = event(fresh("last"), account)
    send(stack, first, account=account)
    _charged(ledger, account, COST)
    assert reporter.post("/api/v1/events", [other, last], content_type="application/json").status_code == 204
    _charged(ledger, account, "0.00042")
    (conflict,) = [one for one in _all(metering, "/api/v1/conflicts", "conflicts") if one["id"] == first["id"]]
    assert conflict["account"] == account
    assert "999999" in conflict["body"]


def _opened(ledger: Api, account: str) -> str:
    opened = ledger.post(
        "/v1/accounts", {"account": account, "wallets": [{"unit": "usd"}]}, idempotency_key=f"open:{account}"
    )
    assert opened.is_success, opened.text
    granted = ledger.post(
        "/v1/grants", {"account": account, "unit": "usd", "amount": "100"}, idempotency_key=f"grant:{account}"
    )
    assert granted.is_success, granted.text
    return account


def _charged(ledger: Api, account: str, dollars: str) -> None:
    """The account is charged so much, soon, and not more a moment later."""

    def charged() -> str:
        found: str = ledger.json(f"/v1/totals?unit=usd&account_prefix={account}")["charged"]
        return found

    eventually(charged, lambda found: found == dollars)
    time.sleep(0.5)
    assert charged() == dollars


def _said(stack: ScratchStack, *command: str) -> str:
    """What `scrip` says."""
    done = stack.scrip(*command)
    assert done.returncode == 0, done.stdout
    return done.stdout


def _letters_with(metering: Api, text: str) -> list[dict[str, Any]]:
    letters = metering.json("/dead-letters")["dead_letters"]
    details = [metering.json(f"/dead-letters/{letter['id']}") for letter in letters]
    return [detail for detail in details if text in (detail["payload_text"] or "")]


def _set_aside(metering: Api, account: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = metering.json(f"/api/v1/set-aside?reason=unattributed&key={account}")["set_aside"]
    return found


def _all(metering: Api, path: str, member: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = metering.json(f"{path}?limit=500")[member]
    return found
