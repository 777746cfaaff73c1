"""Laws of the streams, the consumers and the permission matrix."""

import re
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from contracts.envelope import SourceName
from contracts.partition import GROUP_COUNT, PARTITION_COUNT, group_of, token
from contracts.streams import (
    CHARGES,
    CONSUMERS,
    FORWARDED,
    LEDGER,
    OPERATOR,
    SOURCES,
    STREAMS,
    USAGE,
    USERS,
    User,
    charges_consumer,
    charges_rated_subject,
    consumers_of,
    inbox_prefix,
    ledger_command_subject,
    ledger_fact_subject,
    permissions,
    usage_subject,
)
from tests.unit.contracts.strategies import partitions

SERVICES = [user for user in USERS if user.name != OPERATOR]
# The two that speak for others: HTTP ingest publishes every authenticated source's usage, the ledger's HTTP side
# forwards every authenticated principal's commands.
SPEAKS_FOR_OTHERS = {("metering", "usage.v1.*.*"), ("ledger", "rpc.ledger.v1.*.*.*")}

sources = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,20}", fullmatch=True)


def meet(first: str, second: str) -> bool:
    """Whether some subject matches both patterns."""
    ones, twos = first.split("."), second.split(".")
    for one, two in zip(ones, twos, strict=False):
        if ">" in (one, two):
            return True
        if one != two and "*" not in (one, two):
            return False
    return len(ones) == len(twos)


def covers(wide: str, narrow: str) -> bool:
    """Whether every subject that matches `narrow` matches `wide`."""
    wides, narrows = wide.split("."), narrow.split(".")
    for position, one in enumerate(wides):
        if one == ">":
            return len(narrows) > position
        if position >= len(narrows) or narrows[position] == ">" or one not in ("*", narrows[position]):
            return False
    return len(wides) == len(narrows)


def subjects_of(user: User) -> list[str]:
    """What a user may say to the business, its JetStream calls left out."""
    return [subject for subject in user.publishes if not subject.startswith("$JS.")]


def every_pattern() -> list[str]:
    return [
        *(subject for stream in STREAMS for subject in stream.subjects),
        *(subject for consumer in CONSUMERS for subject in consumer.filter_subjects),
        *(subject for user in USERS for subject in (*permissions(user).publish, *permissions(user).subscribe)),
    ]


def test_patterns_meet_and_cover_as_nats_has_it() -> None:
    assert covers("a.*.>", "a.b.c.d")
    assert covers("a.*", "a.b")
    assert not covers("a.*", "a.b.c")
    assert not covers("a.*", "a.>")
    assert not covers("a.>", "a")
    assert not covers("a.b", "a.*")
    assert meet("a.*.c", "a.b.*")
    assert meet("a.>", "a.b.c")
    assert not meet("a.*", "a.b.c")
    assert not meet("a.b", "a.c")


def test_every_pattern_is_well_formed() -> None:
    for pattern in set(every_pattern()):
        tokens = pattern.split(".")
        assert len(pattern) < 256
        assert ">" not in tokens[:-1], pattern
        assert all(re.fullmatch(r"\*|>|\$?[A-Za-z0-9_-]+", each) for each in tokens), pattern


def test_no_subject_belongs_to_two_streams() -> None:
    listed = [subject for stream in STREAMS for subject in stream.subjects]
    assert not [pair for pair in combinations(listed, 2) if meet(*pair)]
    assert len({stream.name for stream in STREAMS}) == len(STREAMS)


def test_limits_are_possible() -> None:
    for stream in STREAMS:
        assert 0 < stream.message_bytes_max < stream.keep_bytes_max < stream.bytes_max
        assert 10 <= stream.duplicate_window_seconds <= 30
        assert any(user.name == stream.trimmed_by for user in SERVICES)
    assert all(consumer.ack_pending_max >= 1000 and consumer.ack_wait_seconds >= 10 for consumer in CONSUMERS)


def test_each_consumers_filter_lies_in_its_stream() -> None:
    subjects = {stream.name: stream.subjects for stream in STREAMS}
    for consumer in CONSUMERS:
        for filtered in consumer.filter_subjects:
            assert any(covers(subject, filtered) for subject in subjects[consumer.stream])
        assert any(user.name == consumer.service for user in SERVICES)
        assert re.fullmatch(r"[a-z0-9-]+", consumer.durable)
    assert len({(consumer.stream, consumer.durable) for consumer in CONSUMERS}) == len(CONSUMERS)


def test_each_partitions_charges_have_one_consumer() -> None:
    charges = [consumer for consumer in CONSUMERS if consumer.stream == CHARGES]
    assert len(charges) == GROUP_COUNT
    for partition in range(PARTITION_COUNT):
        matching = [
            consumer.durable
            for consumer in charges
            for subject in consumer.filter_subjects
            if meet(subject, charges_rated_subject(partition))
        ]
        assert matching == [charges_consumer(group_of(partition))]


@given(partitions, sources)
def test_what_is_published_lands_in_the_stream_it_is_meant_for(partition: int, source: str) -> None:
    for name, subject in (
        (USAGE, usage_subject(partition=partition, source=source)),
        (CHARGES, charges_rated_subject(partition)),
        (LEDGER, ledger_fact_subject(partition=partition, noun="account", verb="opened")),
    ):
        assert token(partition) in subject.split(".")
        assert [stream.name for stream in STREAMS if any(covers(each, subject) for each in stream.subjects)] == [name]


@given(partitions, sources)
def test_requests_are_stored_by_no_stream_and_answered_by_the_ledger(partition: int, principal: str) -> None:
    subject = ledger_command_subject(partition=partition, command="grant", principal=principal)
    assert not [stream for stream in STREAMS for each in stream.subjects if meet(each, subject)]
    assert [user.name for user in USERS if any(covers(each, subject) for each in user.answers)] == ["ledger"]


def test_what_a_user_may_publish_is_stored_or_answered() -> None:
    stored = [subject for stream in STREAMS for subject in stream.subjects]
    answered = [subject for user in USERS for subject in user.answers]
    for user in SERVICES:
        for subject in subjects_of(user):
            assert any(covers(each, subject) for each in (*stored, *answered)), subject


def test_no_user_may_publish_on_anothers_subjects() -> None:
    for one, other in combinations(SERVICES, 2):
        for first in subjects_of(one):
            for second in subjects_of(other):
                spoken_for = {(one.name, first), (other.name, second)} & SPEAKS_FOR_OTHERS
                assert spoken_for or not meet(first, second), f"{one.name} {first} meets {other.name} {second}"


def test_usage_and_commands_end_in_their_callers_own_name() -> None:
    for user in SERVICES:
        for subject in subjects_of(user):
            if subject.split(".")[0] in ("usage", "rpc") and (user.name, subject) not in SPEAKS_FOR_OTHERS:
                assert subject.rsplit(".", 1)[1] == user.name


def test_services_publish_their_own_words() -> None:
    for user in SERVICES:
        for subject in subjects_of(user):
            first = subject.split(".", maxsplit=1)[0]
            assert first in ("usage", "rpc", user.name)


def test_nobody_reads_business_subjects_but_through_its_consumers_or_what_it_listens_to() -> None:
    stored = [subject for stream in STREAMS for subject in stream.subjects]
    for user in USERS:
        allowed = permissions(user).subscribe
        assert [each for each in allowed if any(meet(each, pair) for pair in stored)] == list(user.listens)
        assert allowed == (*user.answers, *user.listens, f"{inbox_prefix(user.name)}.>")
    for one, other in combinations(USERS, 2):
        assert not [
            (first, second)
            for first in permissions(one).subscribe
            for second in permissions(other).subscribe
            if meet(first, second)
        ]


def test_only_who_answers_may_respond() -> None:
    """Who only listens may answer nothing, whatever reply subject comes with what it hears."""
    for user in USERS:
        assert permissions(user).responds == bool(user.answers)
    assert not permissions(User(name="listener", listens=("keyvault.v1.*.key.*",))).responds


def test_what_is_listened_to_is_one_streams_facts_of_one_noun_and_anothers() -> None:
    for user in USERS:
        for subject in user.listens:
            assert [stream for stream in STREAMS if any(covers(each, subject) for each in stream.subjects)], subject
            assert subject.split(".", maxsplit=1)[0] not in ("*", ">", user.name)
    assert {user.name: user.listens for user in USERS if user.listens} == {"gateway": ("keyvault.v1.*.key.*",)}


def test_a_users_jetstream_calls_are_about_its_own_consumers_and_the_streams_it_trims() -> None:
    for user in SERVICES:
        own = {f"{consumer.stream}.{consumer.durable}" for consumer in consumers_of(user.name)}
        trimmed = {stream.name for stream in STREAMS if stream.trimmed_by == user.name}
        expected = {
            *(f"$JS.API.CONSUMER.MSG.NEXT.{name}" for name in own),
            *(f"$JS.API.CONSUMER.INFO.{name}" for name in own),
            *(f"$JS.ACK.{name}.>" for name in own),
            *(f"$JS.API.STREAM.{verb}.{name}" for name in trimmed for verb in ("INFO", "PURGE")),
            *(
                f"$JS.API.CONSUMER.INFO.{consumer.stream}.{consumer.durable}"
                for consumer in CONSUMERS
                if consumer.stream in trimmed
            ),
        }
        calls = [subject for subject in permissions(user).publish if subject.startswith("$JS.")]
        assert set(calls) == expected
        assert len(calls) == len(set(calls))


def test_only_the_operator_may_provision_and_it_says_nothing_to_the_business() -> None:
    operators = [
        user for user in USERS if any(meet(each, "$JS.API.STREAM.CREATE.X") for each in permissions(user).publish)
    ]
    assert [user.name for user in operators] == [OPERATOR]
    assert subjects_of(operators[0]) == []
    assert operators[0].answers == ()


def test_users_have_names_that_can_stand_in_a_subject() -> None:
    names = [user.name for user in USERS]
    adapter: TypeAdapter[str] = TypeAdapter(SourceName)
    assert len(set(names)) == len(names)
    assert all(adapter.validate_python(name) == name for name in names)
    assert set(SOURCES) <= set(names)


def test_nobody_but_metering_publishes_where_it_sends_on() -> None:
    for user in USERS:
        if user.name != "metering":
            assert not any(meet(subject, f"usage.v1.*.{FORWARDED}") for subject in permissions(user).publish), user.name
    assert FORWARDED not in SOURCES
