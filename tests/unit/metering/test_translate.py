"""What comes in is usage or says all that is wrong with it; what goes out is what the contract says, to the byte."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from urllib.parse import quote

import msgspec
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
from contracts.usage import ModelUsed, QuickCall
from services.kit.dead_letters import DeadLetter, Letter, Unreadable
from services.kit.publish import Message
from services.metering import translate
from services.metering.domain.charging import Bundle, Charge
from services.metering.domain.prices import PriceBook
from services.metering.domain.usage import AGE_MAX, AGE_TOLERANCE, Reroute, Usage, reroute
from services.metering.translate import Late, TooOld, deliveries
from services.metering.translate import usage as usage_translation
from tests.unit.metering.bad_reports import BAD
from tests.unit.metering.building import NOON, USD, body, event, price_book, price_version, usage

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


def read(payload: bytes, **where: Any) -> Usage | Reroute | Late | Letter:
    return translate.read_delivery(delivery(payload, **where))


def places(problems: Any) -> set[str]:
    return {problem["field"] if isinstance(problem, dict) else problem.field for problem in problems}


@pytest.mark.parametrize(
    ("said", "where"),
    [
        ({}, {}),
        ({"time": None}, {}),
        ({"time": "2026-03-14T12:05:01.123456Z"}, {}),
        ({"time": "2026-03-14T12:05:01.123457Z"}, {}),
        ({"time": "2026-02-07T11:55:01.123456Z"}, {}),
        ({"time": "2026-02-07T11:55:01.123455Z"}, {}),
        ({"time": "2024-01-01T00:00:00Z"}, {}),
        ({}, {"reporter": "gateway"}),
        ({}, {"partition": "63"}),
        ({"source": "gateway", "data_price_version": "v1"}, {"reporter": "gateway"}),
        ({"data_price_version": "v1"}, {}),
        ({"source": "metering"}, {}),
        ({"subject": "customer 7"}, {"account": "customer 7"}),
        ({"traceparent": "00-1"}, {}),
    ],
)
def test_what_is_usual_is_read_as_it_is_closely(
    said: dict[str, Any], where: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = json.dumps({name: value for name, value in event(1, **said).items() if value is not None}).encode()
    found = read(payload, **where)
    monkeypatch.setattr(deliveries, "_read_usual", lambda *_, **__: None)
    assert found == read(payload, **where)


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
        translate.read_report(payload, reporter="demo", received_at=STORED_AT)
    assert place in places(refusal.value.problems)


def test_all_that_is_wrong_is_said_at_once() -> None:
    ahead = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    found = read(body(1, source="gateway", time=ahead, data_input_tokens=-1, id=""))
    assert isinstance(found, Letter)
    assert places(found.problems) == {"source", "time", "data.input_tokens", "id"}
    found = read(body(1, source="gateway", time=ahead), partition="63")
    assert isinstance(found, Letter)
    assert places(found.problems) == {"source", "time"}


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
        translate.read_report(report, reporter=source, received_at=STORED_AT)
        return
    with pytest.raises(InvalidEvent) as refusal:
        translate.read_report(report, reporter=source, received_at=STORED_AT)
    assert places(refusal.value.problems) == expected


@pytest.mark.parametrize(("partition", "kept_in"), [("63", 63), ("xx", partition_of("acme-1"))])
def test_use_on_the_subject_of_another_partition_is_sent_on_as_it_came(partition: str, kept_in: int) -> None:
    found = read(body(1, time=None), partition=partition)
    assert isinstance(found, Reroute)
    assert (found.partition, found.to, found.account) == (kept_in, partition_of("acme-1"), None)
    assert (found.body, found.occurred_at) == (body(1, time=None), STORED_AT)
    sent = translate.rerouted(found)
    arrived = translate.read_delivery(sent_on(sent))
    direct = read(body(1, time=None))
    assert arrived == direct


def sent_on(message: Message, *, later: timedelta = timedelta(days=40)) -> Msg:
    """A message that metering published, as it is delivered, long after."""
    stored_at_ns = STORED_AT_NS + later // timedelta(microseconds=1) * 1000
    return Msg(
        _client=None,  # type: ignore[arg-type]  # nothing is answered
        subject=message.subject,
        reply=f"$JS.ACK.USAGE.metering.1.7.7.{stored_at_ns}.0",
        data=message.payload,
        headers=dict(message.headers or {}),
    )


def test_what_is_sent_on_has_its_account_its_time_and_the_hash_it_was_first_known_by() -> None:
    came = read(body(1, subject="customer 7"), account="customer 7")
    assert isinstance(came, Usage)
    assert (came.subject, came.account, came.is_mapped) == ("customer 7", "", False)
    to = partition_of("acme")
    sent = translate.rerouted(reroute(came, partition=came.partition, to=to, account="acme/ana"))
    assert sent.subject == f"usage.v1.{token(to)}.metering"
    arrived = translate.read_delivery(sent_on(sent))
    assert isinstance(arrived, Usage)
    assert arrived.key == (to, "demo", "use-1")
    assert (arrived.subject, arrived.account, arrived.is_mapped) == ("customer 7", "acme/ana", True)
    assert (arrived.body_hash, arrived.occurred_at, arrived.body) == (came.body_hash, came.occurred_at, came.body)


def test_what_is_sent_on_to_the_wrong_place_goes_no_further() -> None:
    came = read(body(1))
    assert isinstance(came, Usage)
    sent = translate.rerouted(reroute(came, partition=came.partition, to=(came.partition + 1) % 64, account=None))
    found = translate.read_delivery(sent_on(sent))
    assert isinstance(found, Letter)
    assert places(found.problems) == {"subject"}


def test_nobody_but_metering_is_believed_about_the_account_or_the_time() -> None:
    message = delivery(body(1, time=None))
    message.headers = {
        "Scrip-Account": "acme/ana",
        "Scrip-Occurred-At": NOON.isoformat(),
        "Scrip-Body-Hash": "00",
        "Scrip-Question": "asked",
    }
    assert translate.read_delivery(message) == read(body(1, time=None))


def test_use_that_was_logged_under_a_name_says_the_same_when_it_is_written_anew() -> None:
    came = read(body(1, traceparent="00-1", region="eu", dataschema="urn:x", data_attributes={"endpoint": "/v1"}))
    assert isinstance(came, Usage)
    taken = translate.taken_usage(
        source=came.source,
        event_id=came.event_id,
        subject=came.subject,
        type=came.type,
        occurred_at=came.occurred_at,
        data=came.data,
        context=came.context,
        body_hash=came.body_hash,
    )
    same = ("key", "subject", "account", "type", "occurred_at", "body_hash", "used", "data", "context")
    assert all(getattr(taken, name) == getattr(came, name) for name in same)


def test_use_of_any_other_type_is_read_and_its_data_kept_as_it_was_sent() -> None:
    report = body(1, type="api-calls", data={"size": 1.5}).replace(b"1.5", b"1.50")
    found = read(report)
    assert isinstance(found, Usage)
    assert (found.type, found.used, found.data) == ("api-calls", None, '{"size": 1.50}')
    for nothing in ({}, {"data": None}):
        raw = {name: value for name, value in event(1, type="api-calls").items() if name != "data"} | nothing
        empty = read(json.dumps(raw).encode())
        assert isinstance(empty, Usage)
        assert empty.data == "{}"


@given(
    st.sampled_from(["ce-", "Ce-", "CE-"]), st.sampled_from([None, "application/json; charset=utf-8"]), st.booleans()
)
def test_binary_mode_is_the_same_use_as_structured(prefix: str, content_type: str | None, other: bool) -> None:
    said = event(1, traceparent="00-1", region='50 % für "alle"', subject="customer 7")
    if other:
        said |= {"type": "api-calls", "data": {"path": "/v1", "size": [1.50, None]}}
    message = delivery(json.dumps(said["data"]).encode(), account="customer 7")
    attributes = {name: quote(str(value)) for name, value in said.items() if name != "data"}
    message.headers = {"Nats-Msg-Id": "x", **{f"{prefix}{name}": value for name, value in attributes.items()}}
    if content_type is not None:
        message.headers["content-type"] = content_type
    binary, plain = translate.read_delivery(message), read(json.dumps(said).encode(), account="customer 7")
    assert isinstance(binary, Usage)
    assert isinstance(plain, Usage)
    assert (json.loads(binary.body), binary.data) == (said, plain.data)
    assert replace_body(binary) == replace_body(plain)


def replace_body(usage: Usage) -> Usage:
    return msgspec.structs.replace(usage, body=b"")


def test_what_is_wrong_in_binary_mode_is_named() -> None:
    message = delivery(b'{"path": 1}, "id": "another"')
    message.headers = {"ce-specversion": "1.0", "ce-id": "use-1"}
    found = translate.read_delivery(message)
    assert isinstance(found, Letter)
    assert places(found.problems) == {"data"}
    message = delivery(b"{}")
    message.headers = {"ce-specversion": "1.0", "ce-id": "%ff", "content-type": "text/xml"}
    found = translate.read_delivery(message)
    assert isinstance(found, Letter)
    assert places(found.problems) == {"id"}
    with pytest.raises(Unreadable):
        translate.redriven(replace(letter(b"{}"), headers=dict(message.headers)), received_at=STORED_AT)


def test_up_to_five_minutes_ahead_is_taken() -> None:
    """Reckoned from when the stream took it, so that a redelivery is judged alike."""
    assert isinstance(read(body(1, time=(STORED_AT + timedelta(minutes=5)).isoformat())), Usage)
    assert isinstance(read(body(1, time=(STORED_AT + timedelta(minutes=5, seconds=1)).isoformat())), Letter)


def test_what_is_too_old_is_refused_with_its_age() -> None:
    def of_age(age: timedelta) -> bytes:
        return body(1, time=(STORED_AT - age).isoformat())

    translate.read_report(of_age(AGE_MAX), reporter="demo", received_at=STORED_AT)
    with pytest.raises(TooOld, match="time: the time is 35 days ago, more than 35 days"):
        translate.read_report(of_age(AGE_MAX + timedelta(seconds=1)), reporter="demo", received_at=STORED_AT)
    # What HTTP took is not too old for the stream a moment later.
    assert isinstance(read(of_age(AGE_MAX + timedelta(seconds=1))), Usage)
    found = read(of_age(AGE_MAX + AGE_TOLERANCE + timedelta(seconds=1)))
    assert isinstance(found, Late)
    assert places(found.letter.problems) == {"time"}
    assert found.usage.event_id == "use-1"


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
    message = translate.read_report(report, reporter="demo", received_at=STORED_AT)
    assert message.payload == report
    assert message.subject == f"usage.v1.{token(partition_of('acme-1'))}.demo"


def test_nobody_but_ingest_says_that_a_time_was_filled_in() -> None:
    with pytest.raises(InvalidEvent, match=SERVER_FILLED):
        translate.read_report(body(1, scripfilled="time"), reporter="demo", received_at=STORED_AT)


def test_the_message_id_follows_the_content_not_its_form() -> None:
    def id_of(report: bytes) -> str | None:
        return translate.read_report(report, reporter="demo", received_at=STORED_AT).message_id

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
    """As metering's own, for it is not too old because it lay here."""
    message = translate.redriven(letter(body(1)), received_at=STORED_AT + timedelta(days=400))
    assert message.subject == f"usage.v1.{token(partition_of('acme-1'))}.metering"
    assert message.payload == body(1)
    assert message.message_id is None


def test_a_redriven_use_without_a_time_keeps_the_time_it_first_came() -> None:
    message = translate.redriven(letter(body(1, time=None)), received_at=NOON + timedelta(days=9))
    found = translate.read_delivery(sent_on(message))
    assert isinstance(found, Usage)
    assert found.occurred_at == NOON


def test_what_was_ahead_can_be_redriven_when_its_time_has_come() -> None:
    ahead = letter(body(1, time=(NOON + timedelta(hours=1)).isoformat()))
    with pytest.raises(Unreadable):
        translate.redriven(ahead, received_at=NOON)
    translate.redriven(ahead, received_at=NOON + timedelta(hours=1))


@pytest.mark.parametrize(
    "hopeless",
    [
        letter(b"{"),
        letter(body(1, source="gateway")),
        letter(body(1), stream=LEDGER),
        letter(body(1, time=(NOON - timedelta(days=36)).isoformat())),
    ],
    ids=["not JSON", "a source of another", "of another stream", "too old when it came"],
)
def test_what_would_only_die_again_is_not_redriven(hopeless: DeadLetter) -> None:
    with pytest.raises(Unreadable):
        translate.redriven(hopeless, received_at=STORED_AT)


def test_a_unit_without_decimals_is_written_as_a_whole_number() -> None:
    calls = Unit(name="calls", kind="cap", scale=0)
    rated = Rated(price_version="v", amounts={"calls": 3}, items=())
    assert json.loads(translate.priced(usage(1), rated, units={"calls": calls}).amounts) == [
        {"amount": "3", "unit": "calls"}
    ]


@given(
    event_id=st.text(st.characters(codec="utf-8", min_codepoint=0x20), min_size=1, max_size=40),
    tokens=st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)),
    price=st.decimals(0, 100, places=7),
    feature=st.none() | st.just("chat"),
    hold=st.none() | st.just("hold_07_01980000-0000-7000-8000-000000000000"),
    traceparent=st.none() | st.just("00-1"),
)
def test_a_charge_put_together_of_texts_is_the_one_that_is_built(
    *,
    event_id: str,
    tokens: tuple[int, int],
    price: Decimal,
    feature: str | None,
    hold: str | None,
    traceparent: str | None,
) -> None:
    units = {"usd": USD, "calls": Unit(name="calls", kind="cap", scale=0)}
    rates = (
        Rate(quantity="input_tokens", unit="usd", price=price, per=1_000_000),
        Rate(quantity="calls", unit="calls", price=Decimal(1), per=1),
        Rate(quantity="output_tokens", unit="usd", price=price * 4, per=1_000),
    )
    version = replace(price_version(), rates={("openai", "gpt-4o-mini"): rates})
    used = ModelUsed(
        provider="openai",
        model="gpt-4o-mini",
        input_tokens=tokens[0],
        output_tokens=tokens[1],
        feature=feature,
        hold=hold,
    )
    use = usage(1, event_id=event_id, used=used)
    quick = PriceBook([version], units=units).price(use)
    assert isinstance(quick, Rated)
    built = msgspec.structs.replace(quick, items=tuple(quick.items))
    assert translate.priced(use, quick, units=units, traceparent=traceparent) == translate.priced(
        use, built, units=units, traceparent=traceparent
    )


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "source": st.sampled_from(["gateway", "metering", "Demo"]),
            "subject": st.sampled_from(["acme-2", "a b", "acme-1/x"]),
            "time": st.integers(-4_000_000, 4_000).map(lambda s: (STORED_AT + timedelta(seconds=s)).isoformat()),
            "data_price_version": st.just("v1"),
            "data_input_tokens": st.integers(-1, 2),
            "data_counts": st.just({"cached_input_tokens": 1}),
            "traceparent": st.just("00-1"),
        },
    ),
    st.sampled_from(["demo", "gateway"]),
)
def test_a_delivery_is_read_fast_as_it_is_read_slowly(changes: dict[str, Any], reporter: str) -> None:
    payload = body(1, **changes)
    quick = read(payload, reporter=reporter)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(usage_translation, "read_quickly", lambda _: None)
        slow = read(payload, reporter=reporter)
    assert type(quick) is type(slow)
    if isinstance(quick, Usage) and isinstance(slow, Usage):
        assert json.loads(quick.data) == json.loads(slow.data)
        if isinstance(quick.used, QuickCall):
            quick = msgspec.structs.replace(quick, used=quick.used.in_full())
        slow = msgspec.structs.replace(slow, data=quick.data)
    assert quick == slow
