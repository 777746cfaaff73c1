"""What comes in is usage or says all that is wrong with it; what goes out is what the contract says, to the byte."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.msg import Msg

from contracts.envelope import SERVER_FILLED, InvalidEvent, read_usage_event
from contracts.metering import ChargesRated
from contracts.money import Unit, parse_amount
from contracts.partition import partition_of, token
from contracts.pricing import Rate, Rated
from contracts.streams import LEDGER, USAGE
from contracts.usage import ModelUsed
from services.kit.dead_letters import DeadLetter, Letter, Unreadable
from services.metering import translate
from services.metering.domain.charging import Bundle, Charge
from services.metering.domain.prices import PriceBook
from services.metering.domain.usage import Usage
from tests.unit.metering.bad_reports import BAD
from tests.unit.metering.building import NOON, USD, body, price_book, price_version, usage

STORED_AT = datetime(2026, 3, 14, 12, 0, 1, 123456, tzinfo=UTC)
STORED_AT_NS = 1_773_489_601_123_456_789
BAD_IDS = [name for name, _, _ in BAD]


def delivery(payload: bytes, *, account: str = "acme-1", partition: str | None = None, reporter: str = "demo") -> Msg:
    return Msg(
        _client=None,  # type: ignore[arg-type]  # nothing is answered
        subject=f"usage.v1.{partition or token(partition_of(account))}.{reporter}",
        reply=f"$JS.ACK.USAGE.metering.1.7.7.{STORED_AT_NS}.0",
        data=payload,
        headers=None,
    )


def read(payload: bytes, **where: Any) -> Usage | Letter:
    return translate.read_delivery(delivery(payload, **where), received_at=datetime.now(UTC))


def places(problems: Any) -> set[str]:
    return {problem["field"] if isinstance(problem, dict) else problem.field for problem in problems}


def test_a_delivery_is_read_as_it_was_reported() -> None:
    found = read(body(1, data_attributes={"endpoint": "/v1"}, traceparent="00-1", time="2026-03-14T13:00:01+01:00"))
    assert isinstance(found, Usage)
    assert found.key == (partition_of("acme-1"), "demo", "use-1")
    assert found.occurred_at == NOON + timedelta(seconds=1)
    assert found.occurred_at.tzinfo is UTC
    assert json.loads(found.data)["attributes"] == {"endpoint": "/v1"}
    assert json.loads(found.context or "") == {"traceparent": "00-1"}


def test_use_without_a_time_happened_when_the_stream_took_it_at_every_delivery() -> None:
    found = read(body(1, time=None))
    assert isinstance(found, Usage)
    assert found.occurred_at == STORED_AT


@pytest.mark.parametrize(("payload", "place"), [(payload, place) for _, payload, place in BAD], ids=BAD_IDS)
def test_a_bad_delivery_is_a_letter_that_says_why(payload: bytes, place: str) -> None:
    found = read(payload)
    assert isinstance(found, Letter)
    assert place in places(found.problems)
    assert found.reason
    assert (found.stream, found.stream_sequence, found.payload) == (USAGE, 7, payload)


@pytest.mark.parametrize(("payload", "place"), [(payload, place) for _, payload, place in BAD], ids=BAD_IDS)
def test_a_bad_report_is_refused_with_the_same_reason(payload: bytes, place: str) -> None:
    with pytest.raises(InvalidEvent) as refusal:
        translate.read_report(payload, reporter="demo", received_at=datetime.now(UTC))
    assert place in places(refusal.value.problems)


def test_all_that_is_wrong_is_said_at_once() -> None:
    ahead = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    found = read(body(1, source="gateway", time=ahead, data_input_tokens=-1, id=""))
    assert isinstance(found, Letter)
    assert places(found.problems) == {"source", "time", "data.input_tokens", "id"}
    found = read(body(1, source="gateway", time=ahead), partition="63")
    assert isinstance(found, Letter)
    assert places(found.problems) == {"source", "time", "subject"}


@given(st.sampled_from(["demo", "gateway"]), st.booleans(), st.booleans())
def test_only_the_gateway_pins_use_to_a_price_version(source: str, pinned: bool, otherwise_bad: bool) -> None:
    data = {"data_price_version": "v1"} if pinned else {}
    bad = {"data_input_tokens": -1} if otherwise_bad else {}
    report = body(1, source=source, **data, **bad)
    expected = {"data.price_version"} if pinned and source == "demo" else set()
    expected |= {"data.input_tokens"} if otherwise_bad else set()
    found = read(report, reporter=source)
    assert (places(found.problems) if isinstance(found, Letter) else set()) == expected
    if not expected:
        translate.read_report(report, reporter=source, received_at=datetime.now(UTC))
        return
    with pytest.raises(InvalidEvent) as refusal:
        translate.read_report(report, reporter=source, received_at=datetime.now(UTC))
    assert places(refusal.value.problems) == expected


def test_use_on_the_subject_of_another_partition_is_dead_and_the_letter_knows_where_it_belongs() -> None:
    found = read(body(1), partition="xx")
    assert isinstance(found, Letter)
    assert found.partition == partition_of("acme-1")


def test_up_to_five_minutes_ahead_is_taken() -> None:
    report = body(1, time=(NOON + timedelta(minutes=5)).isoformat())
    assert isinstance(translate.read_delivery(delivery(report), received_at=NOON), Usage)
    assert isinstance(translate.read_delivery(delivery(report), received_at=NOON - timedelta(seconds=1)), Letter)


# Over HTTP ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [body(1, time=None), body(1, time=None)[:-1] + b', "time": null }\n'])
def test_a_missing_time_is_filled_in_marked_and_no_part_of_the_content(missing: bytes) -> None:
    first = translate.read_report(missing, reporter="demo", received_at=NOON)
    later = translate.read_report(missing, reporter="demo", received_at=NOON + timedelta(hours=1))
    event, filled_hash = read_usage_event(first.payload)
    assert event.time == NOON
    assert (event.model_extra or {})[SERVER_FILLED] == "time"
    assert read_usage_event(later.payload)[1] == filled_hash
    assert first.message_id == later.message_id


def test_what_was_reported_is_published_to_the_byte() -> None:
    report = b" " + body(1).replace(b'"id"', b'\n"id" ')
    message = translate.read_report(report, reporter="demo", received_at=datetime.now(UTC))
    assert message.payload == report
    assert message.subject == f"usage.v1.{token(partition_of('acme-1'))}.demo"


def test_nobody_but_ingest_says_that_a_time_was_filled_in() -> None:
    with pytest.raises(InvalidEvent, match=SERVER_FILLED):
        translate.read_report(body(1, scripfilled="time"), reporter="demo", received_at=datetime.now(UTC))


def test_the_message_id_follows_the_content_not_its_form() -> None:
    def id_of(report: bytes) -> str | None:
        return translate.read_report(report, reporter="demo", received_at=datetime.now(UTC)).message_id

    assert id_of(body(1)) == id_of(json.dumps(json.loads(body(1)), indent=2, sort_keys=True).encode())
    assert id_of(body(1)) != id_of(body(1, data_input_tokens=5))
    assert id_of(body(1)) != id_of(body(2))


# Charges out ----------------------------------------------------------------------------------------------------------


@given(
    input_tokens=st.integers(0, 10**9),
    output_tokens=st.integers(0, 10**9),
    event_id=st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=20),
    own_key=st.booleans(),
    feature=st.none() | st.just("chat"),
)
def test_a_bundle_is_what_the_contract_says(
    input_tokens: int, output_tokens: int, event_id: str, own_key: bool, feature: str | None
) -> None:
    book = price_book()
    used = ModelUsed(
        provider="openai",
        model="gpt-4o-mini",
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        own_key=own_key,
        feature=feature,
        hold="hold_07_01980000-0000-7000-8000-000000000000",
    )
    use = usage(1, used=used, event_id=event_id)
    rated = book.price(use)
    assert isinstance(rated, Rated)
    priced = translate.priced(use, rated, units=book.units)
    bundle = Bundle(partition=use.partition, number=3, recorded_at=NOON, charges=[Charge(usage=use, rated=rated)])
    row = translate.outbox_row(bundle, [priced.line])
    read_back = ChargesRated.model_validate_json(row.payload)
    assert (read_back.partition, read_back.number, read_back.recorded_at) == (use.partition, 3, NOON)
    (line,) = read_back.lines
    assert (line.source, line.event_id, line.revision, line.account) == ("demo", event_id, 0, use.account)
    assert (line.occurred_at, line.hold, line.own_key) == (use.occurred_at, used.hold, own_key)
    assert (line.scope.provider, line.scope.model, line.scope.feature) == ("openai", "gpt-4o-mini", feature)
    assert {each.unit: parse_amount(each.amount, USD) for each in line.amounts} == rated.amounts


def test_costs_are_written_without_exponents() -> None:
    use = usage(1, used=ModelUsed(provider="openai", model="gpt-4o-mini", input_tokens=1, output_tokens=0))
    rated = price_book().price(use)
    assert isinstance(rated, Rated)
    items = json.loads(translate.priced(use, rated, units={"usd": USD}).items)
    assert items[0] == {
        "quantity": "input_tokens",
        "count": 1,
        "unit": "usd",
        "price": "0.15",
        "per": 1_000_000,
        "exact": "0.00000015",
    }


def test_only_money_is_itemised_and_all_units_are_charged() -> None:
    units = {"usd": USD, "calls": Unit(name="calls", kind="cap", scale=0)}
    use = usage(1, used=ModelUsed(provider="openai", model="gpt-4o-mini", input_tokens=1, output_tokens=0))
    per_call = Rate(quantity="calls", unit="calls", price=Decimal(1), per=1)
    ((model, rates),) = price_version().rates.items()
    book = PriceBook([replace(price_version(), rates={model: (*rates, per_call)})], units=units)
    rated = book.price(use)
    assert isinstance(rated, Rated)
    priced = translate.priced(use, rated, units=units)
    assert {each["unit"] for each in json.loads(priced.items)} == {"usd"}
    assert json.loads(priced.amounts)[-1] == {"amount": "1", "unit": "calls"}


# Re-driving -----------------------------------------------------------------------------------------------------------


def letter(payload: bytes, *, subject: str = "usage.v1.63.demo", stream: str = USAGE) -> DeadLetter:
    return DeadLetter(
        id="dead_1",
        partition=None,
        received_at=NOON,
        stream=stream,
        stream_sequence=7,
        subject=subject,
        headers={},
        payload=payload,
        reason="",
        problems=[],
        redriven_at=None,
        redriven_by=None,
    )


def test_a_redriven_letter_goes_where_its_account_lives_under_no_message_id() -> None:
    message = translate.redriven(letter(body(1)), received_at=datetime.now(UTC))
    assert message.subject == f"usage.v1.{token(partition_of('acme-1'))}.demo"
    assert message.payload == body(1)
    assert message.message_id is None


def test_a_redriven_use_without_a_time_keeps_the_time_it_first_came() -> None:
    message = translate.redriven(letter(body(1, time=None)), received_at=NOON + timedelta(days=9))
    event, _ = read_usage_event(message.payload)
    assert event.time == NOON


@pytest.mark.parametrize(
    "hopeless",
    [letter(b"{"), letter(body(1, source="gateway")), letter(body(1), stream=LEDGER)],
    ids=["not JSON", "a source of another", "of another stream"],
)
def test_what_would_only_die_again_is_not_redriven(hopeless: DeadLetter) -> None:
    with pytest.raises(Unreadable):
        translate.redriven(hopeless, received_at=datetime.now(UTC))


def test_a_unit_without_decimals_is_written_as_a_whole_number() -> None:
    calls = Unit(name="calls", kind="cap", scale=0)
    rated = Rated(price_version="v", amounts={"calls": 3}, items=())
    assert json.loads(translate.priced(usage(1), rated, units={"calls": calls}).amounts) == [
        {"amount": "3", "unit": "calls"}
    ]
