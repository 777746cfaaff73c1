"""Laws of the boundary: the fast reading of a bundle takes what the contract takes, and names what it does not."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import pytest

from contracts import ledger as words
from contracts.billing import payment_subject
from contracts.money import Amount, Unit
from contracts.partition import partition_of
from contracts.streams import charges_rated_subject
from services.kit.dead_letters import Unreadable
from services.ledger.domain.commands import ChangePlan, ChargeLine, ClaimPayment, Grant, ReverseCharge, Units
from services.ledger.translate import (
    WHEN_RECORDED,
    BadLine,
    Invalid,
    UnreadableBundle,
    body_hash,
    body_problems,
    read_again,
    read_bundle,
    read_command,
    read_list,
    read_payment_fact,
    read_traceparents,
    refused_as,
)
from tests.builders import charge_line, charges_rated, grant, hold_leg, open_account, place_hold, reversal_line

UNITS = Units({"usd": Unit("usd", "money", 9), "tokens": Unit("tokens", "cap", 0)})
SUBJECT = charges_rated_subject(partition_of("acme"))
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
HOLD = f"hold_{partition_of('acme'):02d}_01980000-0000-7000-8000-000000000000"

# As they were when less could be asked.
GRANT_HASH = "05c3303330edbb897dd390ea2334aa989fb6c21e25ef0c5b33824417d80f4d67"
CHARGE_HASH = "749123e43f988b479f877da80bcc43374873737be57b8362656f83b65f7d538c"
BUNDLE_HASH = "fca51e2e5595f8aaa144b85e0732e88623a6876ff7b162a2783668c82840f67a"


def body_of(*lines: dict[str, Any]) -> bytes:
    bundle = json.loads(charges_rated().model_dump_json())
    return json.dumps(bundle | {"lines": list(lines)}).encode()


def as_json(**change: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(charge_line(hold=HOLD).model_dump_json())
    return found | change


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"hold": None},
        {"amounts": []},
        {"amounts": [{"unit": "usd", "amount": "0.000000001"}, {"unit": "tokens", "amount": "12"}]},
        {"occurred_at": "2026-07-01T14:00:00.5+02:00"},
        {"revision": 3, "own_key": True},
        {"event_id": "ünïcode 🐑"},
        {"traceparent": TRACEPARENT},
        {"traceparent": "nonsense"},
        {"traceparent": None},
    ],
)
def test_what_the_contract_takes_is_read_the_same_fast_and_slowly(change: dict[str, Any]) -> None:
    line = as_json(**change)
    (fast,) = read_bundle(SUBJECT, body_of(line), UNITS).lines
    # An escaped NUL anywhere makes every line be read slowly.
    slow, _ = read_bundle(SUBJECT, body_of(line, {"x": "\x00"}), UNITS).lines
    assert isinstance(fast, ChargeLine)
    assert fast == slow


@pytest.mark.parametrize(
    "change",
    [
        {"account": "acme//ana"},
        {"account": "other"},
        {"amounts": [{"unit": "sheep", "amount": "1"}]},
        {"amounts": [{"unit": "usd", "amount": 1}]},
        {"amounts": [{"unit": "usd", "amount": "1e3"}]},
        {"amounts": [{"unit": "usd", "amount": "-1"}]},
        {"amounts": [{"unit": "tokens", "amount": "0.5"}]},
        {"amounts": [{"unit": "usd", "amount": "1"}, {"unit": "usd", "amount": "1"}]},
        {"occurred_at": "yesterday"},
        {"occurred_at": 1},
        {"occurred_at": "9999-12-31T23:59:59-10:00"},
        {"hold": "hold_63_01980000-0000-7000-8000-000000000000"},
        {"hold": HOLD.replace("hold", "lot")},
        {"event_id": ""},
        {"event_id": "x" * 257},
        {"event_id": "nul\x00"},
        {"revision": -1},
        {"revision": 2**40},
        {"surprise": 1},
        {"traceparent": 1},
        {"traceparent": "x" * 257},
        {"scope": None},
    ],
)
def test_a_bad_line_is_found_and_its_neighbours_are_read(change: dict[str, Any]) -> None:
    lines = read_bundle(SUBJECT, body_of(as_json(), as_json(**change), as_json()), UNITS).lines
    assert [type(line) for line in lines] in (
        [ChargeLine, BadLine, ChargeLine],
        # Refused when it is decided: an amount below zero, an account that cannot be open.
        [ChargeLine, ChargeLine, ChargeLine],
    )
    if isinstance(lines[1], ChargeLine):
        assert lines[1].amounts[0][1] < 0 or "//" in lines[1].account


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff", b"{}", b'{"lines": []}', b"[" * 100_000, body_of(), body_of(*[{}] * 1001)]
)
def test_what_is_no_bundle_is_unreadable(body: bytes) -> None:
    with pytest.raises(UnreadableBundle):
        read_bundle(SUBJECT, body, UNITS)


def test_a_bundle_of_another_partition_is_unreadable() -> None:
    with pytest.raises(UnreadableBundle):
        read_bundle(charges_rated_subject(0), body_of(as_json()), UNITS)


def with_reversals(*reversals: Any, lines: tuple[dict[str, Any], ...] = ()) -> bytes:
    bundle = json.loads(charges_rated().model_dump_json())
    return json.dumps(bundle | {"lines": list(lines), "reversals": list(reversals)}).encode()


def reversal_json(**change: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(reversal_line("event-1", usd="2", reason="prices").model_dump_json())
    return found | change


@pytest.mark.parametrize("read_slowly", [False, True])
def test_a_reversal_of_a_bundle_is_the_command_with_its_correction_and_its_bundle(read_slowly: bool) -> None:
    lines = ({"x": "\x00"},) if read_slowly else ()
    (read,) = read_bundle(SUBJECT, with_reversals(reversal_json(), lines=lines), UNITS).reversals
    asked = words.ReverseCharge(
        idempotency_key="k",
        account="acme",
        source="demo",
        event_id="event-1",
        amounts=(Amount(amount="2", unit="usd"),),
        reason="prices",
    )
    command = read_command(asked, UNITS, principal="metering")
    assert isinstance(command, ReverseCharge)
    assert read == replace(command, correction="correction-1", bundle=1)


@pytest.mark.parametrize(
    "wrong",
    [
        17,
        None,
        [],
        {},
        reversal_json(amounts=[]),
        reversal_json(amounts=[{"unit": "usd", "amount": "0"}]),
        reversal_json(amounts=[{"unit": "usd", "amount": "-1"}]),
        reversal_json(amounts=[{"unit": "usd", "amount": 1}]),
        reversal_json(amounts=[{"unit": "sheep", "amount": "1"}]),
        reversal_json(amounts=[{"unit": "tokens", "amount": "0.5"}]),
        reversal_json(amounts=[{"unit": "usd", "amount": "1"}] * 2),
        reversal_json(amounts=[{"unit": "usd", "amount": "1"}] * 17),
        reversal_json(account="other"),
        reversal_json(event_id=""),
        reversal_json(event_id="nul\x00"),
        reversal_json(revision=-1),
        reversal_json(revision=2**31),
        reversal_json(correction=""),
        reversal_json(correction="a b"),
        reversal_json(correction="a\n"),
        reversal_json(reason=""),
        reversal_json(reason="nul\x00"),
        reversal_json(surprise=1),
    ],
)
def test_a_bad_reversal_is_found_as_it_came_and_its_neighbours_are_read(wrong: Any) -> None:
    body = with_reversals(reversal_json(), wrong, reversal_json(revision=1), lines=(as_json(),))
    bundle = read_bundle(SUBJECT, body, UNITS)
    assert [type(each) for each in bundle.reversals] == [ReverseCharge, BadLine, ReverseCharge]
    assert isinstance(bundle.lines[0], ChargeLine)
    bad = bundle.reversals[1]
    assert isinstance(bad, BadLine)
    assert json.loads(bad.body) == json.loads(bundle.reversal_body(1)) == wrong
    assert bad.problems


@pytest.mark.parametrize(
    "change", [{"reversals": None}, {"reversals": {}}, {"reversals": [{}] * 1001}, {"lines": [], "reversals": []}]
)
def test_what_is_no_list_of_reversals_makes_no_bundle(change: dict[str, Any]) -> None:
    body = json.loads(charges_rated().model_dump_json()) | change
    with pytest.raises(UnreadableBundle):
        read_bundle(SUBJECT, json.dumps(body).encode(), UNITS)


def test_a_bundle_without_reversals_is_written_and_hashed_as_before_there_were_any() -> None:
    body = charges_rated().model_dump_json().encode()
    assert b"reversals" not in body
    assert sha256(body).hexdigest() == BUNDLE_HASH
    bundle = read_bundle(SUBJECT, body, UNITS)
    assert (bundle.body_hash.hex(), bundle.reversals) == (BUNDLE_HASH, [])


def test_a_dead_line_is_asked_for_again_as_what_it_is() -> None:
    charge = read_again(json.dumps(as_json()).encode(), UNITS, key="k")
    assert charge == words.Charge(idempotency_key="k", line=charge_line(hold=HOLD))
    back = read_again(json.dumps(reversal_json()).encode(), UNITS, key="k")
    assert isinstance(back, words.ReverseCharge)
    assert (back.correction, back.amounts) == ("correction-1", (Amount(amount="2", unit="usd"),))
    for body in (b"{", b"[]", b"17", b"\xff", b'{"correction": 1}', json.dumps(reversal_json(amounts=[])).encode()):
        with pytest.raises(Invalid):
            read_again(body, UNITS, key="k")


def test_all_problems_of_a_command_are_named() -> None:
    legs = (hold_leg("sheep", "1"), hold_leg("usd", "-2", "-1"), hold_leg("tokens", "0.5"))
    with pytest.raises(Invalid) as caught:
        read_command(place_hold(HOLD, *legs, account="other"), UNITS, principal="tester")
    assert {problem.pointer for problem in caught.value.problems} == {
        "/hold",
        "/legs/0/unit",
        "/legs/1/at_least",
        "/legs/1/at_most",
        "/legs/2/at_least",
        "/legs/2/at_most",
    }


def test_units_and_amounts_are_looked_at_in_what_is_no_command() -> None:
    body = {"account": 7, "legs": [{"unit": "sheep"}, {"unit": "usd", "at_least": "-1", "at_most": 2.5}, None]}
    assert {problem.pointer for problem in body_problems(body, UNITS)} == {"/legs/0/unit", "/legs/1/at_least"}


def test_a_body_hash_is_of_what_is_asked_and_not_of_how() -> None:
    assert body_hash(grant(key="1")) == body_hash(grant(key="2"))
    assert body_hash(grant(amount="1")) != body_hash(grant(amount="2"))
    spelt_out = words.OpenAccount(idempotency_key="k", account="acme", wallets=())
    assert body_hash(spelt_out) == body_hash(open_account("acme"))


def test_the_trace_of_a_charge_is_no_part_of_what_is_charged() -> None:
    plain, traced = charge_line(), charge_line().model_copy(update={"traceparent": TRACEPARENT})
    assert "traceparent" not in plain.model_dump_json()
    assert body_hash(words.Charge(idempotency_key="k", line=plain)) == body_hash(
        words.Charge(idempotency_key="k", line=traced)
    )
    (read,), (read_traced,) = (
        read_bundle(SUBJECT, charges_rated(line).model_dump_json().encode(), UNITS).lines for line in (plain, traced)
    )
    assert read == read_traced


def test_traces_are_found_by_the_places_of_their_lines() -> None:
    plain, traced = as_json(), as_json(traceparent=TRACEPARENT)
    assert read_traceparents(body_of(plain, traced, plain, traced)) == {1: TRACEPARENT, 3: TRACEPARENT}
    assert read_traceparents(body_of(plain)) == read_traceparents(body_of(as_json(event_id='"traceparent"'))) == {}
    # A line that cannot be read is nobody's trace, and no fault.
    assert read_traceparents(body_of(traced, as_json(traceparent=1))) == read_traceparents(b'"traceparent"') == {}


RECEIVED: dict[str, Any] = {
    "type": "billing.payment.received.v1",
    "partition": partition_of("acme"),
    "number": 1,
    "account": "acme/ana",
    "payment": "pi_1",
    "recorded_at": "2026-07-01T12:00:01Z",
    "package": "usd-50",
    "paid": {"amount": "50", "unit": "usd"},
    "bonus": {"amount": "5", "unit": "usd"},
    "occurred_at": "2026-07-01T12:00:00Z",
}
CLAIMED: dict[str, Any] = {
    **{name: RECEIVED[name] for name in ("partition", "account", "payment", "recorded_at", "occurred_at")},
    "type": "billing.payment.claimed.v1",
    "number": 7,
    "claim": "re_1",
    "reason": "refund",
    "state": "final",
    "claimed": {"amount": "20", "unit": "usd"},
}


def asked(verb: str, body: dict[str, Any], *, partition: int = partition_of("acme")) -> list[words.Command]:
    subject = payment_subject(partition=partition, verb="received").replace("received", verb)
    return [*read_payment_fact(subject, json.dumps(body).encode())]


def test_a_payment_is_a_purchase_and_a_bonus_under_its_own_keys() -> None:
    paid, bonus = asked("received", RECEIVED)
    assert isinstance(paid, words.Grant)
    assert isinstance(bonus, words.Grant)
    assert (paid.idempotency_key, paid.kind, paid.amount, paid.reference) == (
        "payment:pi_1:paid",
        "purchase",
        "50",
        "pi_1",
    )
    assert (bonus.idempotency_key, bonus.kind, bonus.amount) == ("payment:pi_1:bonus", "bonus", "5")
    assert asked("received", RECEIVED | {"bonus": None}) == [paid]
    assert asked("received", RECEIVED) == [paid, bonus]


def test_a_claim_says_with_its_number_which_of_its_states_is_the_last() -> None:
    (claim,) = asked("claimed", CLAIMED)
    assert isinstance(claim, words.ClaimPayment)
    assert (claim.idempotency_key, claim.revision) == ("claim:re_1:7", 7)
    read = read_command(claim, UNITS, principal="billing")
    assert isinstance(read, ClaimPayment)
    assert (read.claimed, read.unit, read.state) == (20 * 10**9, "usd", "final")


@pytest.mark.parametrize(
    ("verb", "body", "partition"),
    [
        ("received", RECEIVED | {"paid": {"amount": 50, "unit": "usd"}}, partition_of("acme")),
        ("received", RECEIVED | {"payment": "pi 1"}, partition_of("acme")),
        ("received", CLAIMED, partition_of("acme")),
        ("received", RECEIVED, (partition_of("acme") + 1) % 64),
        ("refunded", RECEIVED, partition_of("acme")),
        ("claimed", CLAIMED | {"state": "lost"}, partition_of("acme")),
    ],
)
def test_what_billing_cannot_have_meant_is_unreadable(verb: str, body: dict[str, Any], partition: int) -> None:
    with pytest.raises(Unreadable):
        asked(verb, body, partition=partition)


def test_a_settlement_and_a_debit_are_charges_of_the_caller() -> None:
    settle = words.SettleHold(
        idempotency_key="k", hold=HOLD, account="acme", settlement="s1", amounts=(), final=False, price_version="v1"
    )
    line = read_command(settle, UNITS, principal="batch")
    assert isinstance(line, ChargeLine)
    assert (line.source, line.event_id, line.hold) == ("batch", "s1", HOLD.removeprefix("hold_62_"))
    assert (line.final, line.required, line.scope, line.occurred_at) == (False, False, None, WHEN_RECORDED)
    debit = words.Debit(idempotency_key="k", account="acme", debit="fee", amounts=(Amount(amount="1", unit="usd"),))
    line = read_command(debit, UNITS, principal="batch")
    assert isinstance(line, ChargeLine)
    assert (line.source, line.event_id, line.hold) == ("batch", "fee", None)
    assert (line.final, line.required, line.price_version, line.amounts) == (True, True, "", (("usd", 10**9),))


def test_a_scope_that_names_nothing_is_none() -> None:
    everywhere = grant().model_copy(update={"scope": words.LotScope()})
    read = read_command(everywhere, UNITS, principal="tester")
    assert isinstance(read, Grant)
    assert read.scope is None


def test_the_rules_of_a_plan_belong_to_it() -> None:
    anchor = datetime(2026, 1, 31, tzinfo=UTC)
    spec = words.RuleSpec(id="r", unit="tokens", amount="5", period="month", anchor=anchor)
    asked = words.ChangePlan(idempotency_key="k", account="acme", plan="pro", rules=(spec,))
    read = read_command(asked, UNITS, principal="tester")
    assert isinstance(read, ChangePlan)
    assert [(each.plan, each.amount) for each in read.rules] == [("pro", 5)]
    with pytest.raises(ValueError, match="belong to that plan"):
        words.ChangePlan(
            idempotency_key="k", account="acme", plan="pro", rules=(spec.model_copy(update={"plan": "free"}),)
        )


def test_all_problems_of_all_commands_of_a_list_are_named() -> None:
    asked = words.CommandList(
        commands=(
            grant(unit="sheep", key="1"),
            words.Adjust(idempotency_key="2", account="acme", unit="usd", amount="-1", reason="r"),
            words.Transfer(idempotency_key="3", account="acme", to_account="acme/ana", unit="usd", amount="0"),
            words.VoidGrant(idempotency_key="4", account="acme", lot=HOLD.replace("hold_62", "lot_63")),
        )
    )
    with pytest.raises(Invalid) as caught:
        read_list(asked, UNITS, principal="tester")
    assert {problem.pointer for problem in caught.value.problems} == {
        "/commands/0/unit",
        "/commands/2/amount",
        "/commands/3/lot",
    }


def test_who_asked_with_a_list_is_told_which_command_cannot_be_taken() -> None:
    asked = words.CommandList(commands=(grant(key="1"), grant(amount="9" * 18, key="2")))
    with pytest.raises(Invalid) as caught:
        read_list(asked, UNITS, principal="tester")
    refused = refused_as(caught.value)
    assert isinstance(refused, words.Refused)
    assert (refused.code, refused.index) == ("invalid_amount", 1)
    with pytest.raises(Invalid) as caught:
        read_command(grant(amount="9" * 18), UNITS, principal="tester")
    alone = refused_as(caught.value)
    assert isinstance(alone, words.Refused)
    assert alone.index is None


def test_a_dry_run_is_of_the_same_command() -> None:
    assert body_hash(grant()) == body_hash(grant().model_copy(update={"dry_run": True}))
    listed = words.CommandList(commands=(grant(),), all_or_nothing=True, idempotency_key="a")
    assert body_hash(listed) == body_hash(listed.model_copy(update={"idempotency_key": "b", "dry_run": True}))
    assert body_hash(listed) != body_hash(listed.model_copy(update={"commands": (grant(key="other"),)}))


def test_what_was_asked_before_there_was_more_to_ask_has_the_hash_it_had() -> None:
    """Hashes of outcomes that are stored: with another, what was accepted once would be a conflict."""
    assert body_hash(grant()).hex() == GRANT_HASH
    charged = words.Charge(idempotency_key="k", line=charge_line("e1", usd="1", hold=HOLD))
    assert body_hash(charged).hex() == CHARGE_HASH


def test_what_a_line_leaves_open_is_read_the_same_fast_and_slowly() -> None:
    line = as_json(final=False)
    (fast,) = read_bundle(SUBJECT, body_of(line), UNITS).lines
    slow, _ = read_bundle(SUBJECT, body_of(line, {"x": "\x00"}), UNITS).lines
    assert isinstance(fast, ChargeLine)
    assert fast == slow
    assert not fast.final
    assert b"final" not in charges_rated(charge_line()).model_dump_json().encode()
