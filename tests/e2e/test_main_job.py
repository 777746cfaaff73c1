"""The main job from one command: exact, and exact again."""

import re

import pytest

from infra.demo.scratch_stack import ScratchStack
from tests.e2e.conftest import Api, Played

pytestmark = pytest.mark.timeout(200)

TOTAL = "5.807479500"
ROWS = "19,366"


def counts(output: str) -> dict[str, str]:
    """The first table of the demo's output."""
    return dict(re.findall(r"^│ ([a-z][a-z -]*?) +│ +([\d,]+) │$", output, flags=re.MULTILINE))


def test_the_first_run_charges_every_request_once_and_its_totals_agree(played: Played) -> None:
    assert played.first_code == 0, played.first_output
    found = counts(played.first_output)
    assert (found["published"], found["new"], found["charged"]) == (ROWS, ROWS, ROWS)
    assert (found["duplicate"], found["conflicting"], found["dead-lettered"], found["set aside"]) == ("0",) * 4
    assert played.first_output.count(TOTAL) >= 4
    assert "demo-0 " in played.first_output
    assert "agree to the nano-dollar" in played.first_output


def test_a_second_run_charges_nothing_after_a_restart_of_everything(played: Played) -> None:
    second = played.stack.scrip("demo")
    assert second.returncode == 0, second.stdout
    found = counts(second.stdout)
    assert (found["published"], found["new"], found["duplicate"], found["charged"]) == (ROWS, "0", ROWS, "0")
    assert second.stdout.count(TOTAL) >= 4


def test_status_shows_everything_ready_and_nothing_waiting(stack: ScratchStack) -> None:
    status = stack.scrip("status")
    assert status.returncode == 0, status.stdout
    for name in ("supervisor", "PostgreSQL", "NATS", "ledger", "metering", "USAGE", "CHARGES"):
        assert name in status.stdout


def test_the_busiest_account_has_what_the_independent_bill_leaves_it(stack: ScratchStack, ledger: Api) -> None:
    balance = stack.scrip("balance", "demo-0")
    assert balance.returncode == 0, balance.stdout
    assert "99.57232675" in balance.stdout


def test_a_statement_lists_the_grant_and_charges(stack: ScratchStack) -> None:
    statement = stack.scrip("statement", "demo-199", "--limit", "500")
    assert statement.returncode == 0, statement.stdout
    assert "granted" in statement.stdout
    assert "charged" in statement.stdout


def test_a_replay_of_the_journal_finds_the_same_balances(stack: ScratchStack) -> None:
    replay = stack.scrip("replay", "--verify")
    assert replay.returncode == 0, replay.stdout
    assert "different" not in replay.stdout
