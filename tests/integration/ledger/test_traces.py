"""Laws of tracing in the ledger: the span of a charge names its journal entry, the span of a command its outcome."""

from pathlib import Path
from typing import Final

import pytest

from contracts import ledger as words
from contracts.metering import ChargeLine
from contracts.partition import partition_of
from contracts.streams import ledger_command_subject
from services.kit.ids import new_hold_id
from tests.builders import charge_line, charges_rated, grant, hold_leg, open_account, place_hold
from tests.integration.ledger.driving import Driver
from tests.traces import named, spans_in, traced

pytestmark = pytest.mark.anyio

TRACE: Final = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT: Final = "00f067aa0ba902b7"
SAMPLED: Final = f"00-{TRACE}-{PARENT}-01"


def traced_line(event_id: str, *, account: str = "acme", hold: str | None = None, usd: str = "1") -> ChargeLine:
    line = charge_line(event_id, account=account, hold=hold, usd=usd)
    return line.model_copy(update={"traceparent": SAMPLED})


async def test_the_span_of_a_charge_names_the_journal_entry_that_it_stands_in(driver: Driver, tmp_path: Path) -> None:
    hold = new_hold_id("acme")
    with traced(tmp_path / "traces.jsonl"):
        async with driver.running():
            await driver.funded("acme", "100")
            await driver.accepted(open_account("acme/ana"))
            await driver.accepted(place_hold(hold, hold_leg("usd", "5"), account="acme"))
            bundle = charges_rated(
                charge_line("untraced"),
                # Summed with the one before, and with each other: one entry.
                traced_line("first"),
                traced_line("second"),
                traced_line("of a hold", hold=hold, usd="3"),
                traced_line("of nothing", usd="0"),
                traced_line("not open", account="acme/bob"),
                # Paid by the account above it.
                traced_line("of another", account="acme/ana"),
            )
            await driver.publish(bundle, bundle)
            await driver.publish(charges_rated(traced_line("first"), number=2))
            await driver.until("SELECT max(charges_number) FROM heads", 2)
    spans = named(spans_in(tmp_path / "traces.jsonl"), "charge")
    assert {(span["trace_id"], span["parent_id"]) for span in spans} == {(TRACE, PARENT)}
    outcomes = [(span["attributes"]["scrip.event"], span["attributes"]["scrip.outcome"]) for span in spans]
    assert outcomes == [
        ("first", "charged"),
        ("second", "charged"),
        ("of a hold", "charged"),
        ("of nothing", "charged"),
        ("not open", "account_not_open"),
        ("of another", "charged"),
        ("first", "already_charged"),
    ]
    entries = {}
    for span in spans:
        said = span["attributes"]
        if said["scrip.outcome"] != "charged":
            assert "scrip.transaction" not in said
            continue
        ((transaction, kind, account, posted, hold_id),) = await driver.rows(
            "SELECT transaction_id::text, kind, account, posted, hold_id::text FROM journal"
            " WHERE (partition, batch, position) = (%s, %s, %s)",
            said["scrip.partition"],
            said["scrip.batch"],
            said["scrip.position"],
        )
        assert said["scrip.transaction"] == f"txn_{partition_of('acme'):02d}_{transaction}"
        entries[said["scrip.event"]] = (kind, account, posted, hold_id)
    summed = ("charged", "acme", -4 * 10**9, None)
    assert entries["first"] == entries["second"] == summed
    assert entries["of a hold"][:3] == ("charged", "acme", -3 * 10**9)
    assert entries["of a hold"][3] == hold.removeprefix(f"hold_{partition_of('acme'):02d}_")
    assert entries["of another"] == summed
    assert entries["of nothing"][0] == "charged"


async def test_the_answering_of_a_command_is_a_step_of_the_askers_trace_with_its_outcome(
    driver: Driver, tmp_path: Path
) -> None:
    async def ask(command: words.Command, headers: dict[str, str] | None) -> words.Reply:
        subject = ledger_command_subject(partition=partition_of("acme"), command=command.command, principal="tester")
        message = await driver.ledger_nats.request(
            subject, command.model_dump_json().encode(), timeout=5, headers=headers
        )
        return words.REPLIES.validate_json(message.data)

    with traced(tmp_path / "traces.jsonl"):
        async with driver.running():
            await driver.funded("acme", "1")
            accepted = await ask(grant("acme", "1"), {"traceparent": SAMPLED})
            refused = await ask(grant("acme", "1", unit="tokens", key="other"), {"traceparent": SAMPLED})
            failed = await ask(grant("acme", "2"), {"traceparent": "nonsense"})
    assert isinstance(accepted, words.Accepted)
    assert isinstance(refused, words.Refused)
    assert isinstance(failed, words.Failed)
    *_, one, two, three = named(spans_in(tmp_path / "traces.jsonl"), "ledger grant")
    assert [(span["trace_id"], span["parent_id"]) for span in (one, two)] == [(TRACE, PARENT)] * 2
    assert three["trace_id"] != TRACE
    said = [span["attributes"]["scrip.outcome"] for span in (one, two, three)]
    assert said == ["accepted", refused.code, "conflict"]
    assert one["attributes"]["scrip.transaction"] == accepted.transaction
    assert [span["error"] for span in (one, two, three)] == [False, False, True]
