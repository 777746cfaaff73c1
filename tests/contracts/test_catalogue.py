"""The event catalogue, contracts/README.md, names everything there is: it cannot fall behind."""

import re

from contracts.accounts import ACCOUNT_LENGTH_MAX, DEPTH_MAX, SEGMENT_LENGTH_MAX
from contracts.envelope import EVENT_BYTES_MAX, SERVER_FILLED
from contracts.metering import LINES_MAX
from contracts.partition import PARTITION_COUNT
from contracts.streams import CONSUMERS, OPERATOR, STREAMS, USERS
from contracts.usage import ATTRIBUTES_MAX
from infra.asyncapi import overlaps, receivers, senders, stream_of
from infra.schemas import CONTRACTS, MESSAGES, pattern_of

README = (CONTRACTS / "README.md").read_text(encoding="utf-8")
ROWS = [line for line in README.splitlines() if line.startswith("|")]


def as_documented(address: str) -> str:
    """An address as the catalogue writes it: `usage.v1.<pp>.<source>`."""
    return re.sub(r"\{([a-z]+)\}", r"<\1>", address.replace("{partition}", "<pp>"))


def row_of(name: str) -> str:
    (row,) = (row for row in ROWS if f"`{name}`" in row)
    return row


def test_every_type_has_one_row() -> None:
    for message in MESSAGES:
        assert row_of(message.name)


def test_no_type_is_documented_that_does_not_exist() -> None:
    documented = set(re.findall(r"`([a-z_.]+\.v\d+)`", README))
    assert documented == {message.name for message in MESSAGES}


def test_every_subject_is_named() -> None:
    documented = [
        pattern_of(each.replace("<", "{").replace(">", "}")) for each in re.findall(r"`([a-z_.<>0-9]+)`", README)
    ]
    subjects = [pattern for pattern in documented if "." in pattern and ".v1." in pattern]
    known = [
        *(subject for stream in STREAMS for subject in stream.subjects),
        *(subject for consumer in CONSUMERS for subject in consumer.filter_subjects),
        *(subject for user in USERS if user.name != OPERATOR for subject in (*user.publishes, *user.answers)),
    ]
    for subject in known:
        assert any(overlaps(subject, each) for each in subjects), subject
    for message in MESSAGES:
        if message.kind == "event":
            assert f"`{as_documented(message.address)}`" in README
        if message.kind == "command":
            assert f"`{message.address.split('.')[-2]}`" in row_of(message.name)


def test_every_stream_is_named_with_its_subjects() -> None:
    for stream in STREAMS:
        lines = [line for line in README.splitlines() if re.search(rf"\b{stream.name}\b", line)]
        assert lines
        found = [each for line in lines for each in re.findall(r"`([a-z_.<>0-9]+)`", line)]
        patterns = [pattern_of(each.replace("<", "{").replace(">", "}")) for each in found]
        assert any(overlaps(pattern, subject) for pattern in patterns for subject in stream.subjects)


def test_each_row_names_who_sends_and_who_reads() -> None:
    for message in MESSAGES:
        if message.kind == "reply":
            continue
        row = row_of(message.name)
        for user in senders(message.address):
            everywhere = user.name == "ledger" and stream_of(message.address) == "LEDGER"
            assert everywhere or re.search(rf"\b{user.name}\b", row), (message.name, user.name)
        for service in receivers(message.address):
            assert message.kind == "command" or re.search(rf"\b{service}\b", row), (message.name, service)


def test_every_durable_is_named() -> None:
    for consumer in CONSUMERS:
        assert f"`{re.sub(r'-[0-9]$', '-<g>', consumer.durable)}`" in README


def test_the_numbers_are_those_of_the_code() -> None:
    text = " ".join(README.split())
    assert f"% {PARTITION_COUNT}" in text
    assert f"{EVENT_BYTES_MAX >> 10} KiB" in text
    assert f"up to {LINES_MAX:,} charge lines" in text
    assert f"1 to {DEPTH_MAX} segments" in text
    assert f"{SEGMENT_LENGTH_MAX} characters a segment, {ACCOUNT_LENGTH_MAX} in all" in text
    assert f"up to {ATTRIBUTES_MAX} names" in text
    assert f'`{SERVER_FILLED}: "time"`' in text


def test_every_module_of_contracts_is_named() -> None:
    for path in CONTRACTS.glob("*.py"):
        assert path.stem == "__init__" or f"`{path.stem}`" in README, path.stem


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (CONTRACTS / target).exists(), target
