"""The demo's events are what the demo says they are, and its independent computation agrees with Scrip's pure parts."""

import ast
import inspect
import sys
from collections import Counter
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from hashlib import sha256

from contracts.envelope import UsageEvent, read_usage_event
from contracts.money import Unit
from contracts.partition import partition_of
from contracts.pricing import PriceVersion, Rate, rate
from contracts.streams import usage_subject
from infra.demo import independent
from infra.demo.events import event_id, message
from infra.demo.publish import Sendings, messages
from infra.demo.trace import TRACE_FILE, account_of, accounts, requests

ANCHOR = datetime(2026, 3, 1, 12, tzinfo=UTC)
ROWS = 19_366


def test_the_trace_is_the_published_file() -> None:
    digest = sha256(TRACE_FILE.read_bytes()).hexdigest()
    assert digest == "59074f4b7e058b8cd73c96bc18275ba5d187b9061669308e7922cf0c0ef9e03e"
    assert len(requests()) == ROWS


def test_both_account_rules_agree_on_every_row() -> None:
    assert [account_of(row.number) for row in requests()] == [
        independent.account(number) for number in range(1, ROWS + 1)
    ]


def test_two_hundred_accounts_occur() -> None:
    assert accounts(requests()) == [f"demo-{number}" for number in range(200)]


def test_every_event_is_a_usage_event_of_its_account() -> None:
    for row in requests():
        sent = message(row, anchor=ANCHOR)
        event, _ = read_usage_event(sent.payload)
        assert isinstance(event, UsageEvent)
        assert (event.id, event.source, event.subject) == (event_id(row.number), "demo", account_of(row.number))
        assert event.time == ANCHOR + row.after_first
        assert (event.data.input_tokens, event.data.output_tokens) == (row.input_tokens, row.output_tokens)
        assert sent.subject == usage_subject(partition=partition_of(event.subject), source="demo")


def test_the_trace_ends_before_the_run_that_sent_it_first() -> None:
    """The anchor is two hours before the first run: no event may lie ahead of the clock."""
    assert max(row.after_first for row in requests()) < timedelta(hours=2)


def test_the_independent_bill_is_what_the_price_book_function_says() -> None:
    usd = Unit(name="usd", kind="money", scale=9)
    prices = PriceVersion(
        id="test",
        effective_at=ANCHOR,
        rates={
            ("openai", "gpt-4o-mini"): (
                Rate(quantity="input_tokens", unit="usd", price=Decimal("0.15"), per=1_000_000),
                Rate(quantity="output_tokens", unit="usd", price=Decimal("0.60"), per=1_000_000),
            )
        },
    )
    nanos: Counter[str] = Counter()
    for row in requests():
        event, _ = read_usage_event(message(row, anchor=ANCHOR).payload)
        assert isinstance(event, UsageEvent)
        nanos[event.subject] += rate(event.data, price_version=prices, units={"usd": usd}).amounts["usd"]
    assert {account: amount * 10**9 for account, amount in independent.bill().amounts.items()} == dict(nanos)


def test_the_independent_computation_imports_nothing_of_ours() -> None:
    nodes = list(ast.walk(ast.parse(inspect.getsource(independent))))
    imported = {name.name.partition(".")[0] for node in nodes if isinstance(node, ast.Import) for name in node.names}
    imported |= {(node.module or ".").partition(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    assert imported <= set(sys.stdlib_module_names)


def test_the_first_rows_cost_what_a_person_computes() -> None:
    """Rows 1 and 2: 374 + 396 input tokens at 150 nano-dollars, 44 + 109 output tokens at 600."""
    assert independent.bill(rows_max=2).total == Decimal("0.000207300")


def test_sending_three_times_in_another_order_sends_every_event_three_times() -> None:
    rows = requests(rows_max=50)
    plain = messages(Sendings(anchor=ANCHOR), rows)
    thrice = messages(Sendings(anchor=ANCHOR, times=3, shuffle=7), rows)
    assert Counter(sent.payload for sent in thrice) == Counter(
        {payload: 3 * count for payload, count in Counter(sent.payload for sent in plain).items()}
    )
    assert len({sent.message_id for sent in thrice}) == 150
    assert [sent.payload for sent in thrice[:50]] != [sent.payload for sent in plain]
    assert thrice == messages(Sendings(anchor=ANCHOR, times=3, shuffle=7), rows)


def test_an_edition_shares_no_id_and_no_account_with_another() -> None:
    rows = requests(rows_max=500)
    ids = {event_id(row.number, edition=edition) for row in rows for edition in ("", "a", "b")}
    assert len(ids) == 1500
    payers = [set(accounts(rows, edition=edition)) for edition in ("", "a", "b")]
    assert not (payers[0] & payers[1])
    assert not (payers[1] & payers[2])
    sent = messages(Sendings(anchor=ANCHOR, edition="a"), rows)
    assert {read_usage_event(one.payload)[0].subject for one in sent} == payers[1]
