"""Laws of how much may come of one list: what is carried out can be answered, and others do not wait for minutes."""

from datetime import UTC, datetime, timedelta

import pytest

from contracts import ledger as words
from contracts.partition import partition_of
from contracts.streams import ledger_command_subject
from services.ledger.domain.rules import CATCH_UP_MAX
from services.ledger.handlers import commands as handling
from tests.builders import grant, open_account
from tests.integration.ledger.driving import Driver

pytestmark = pytest.mark.anyio

PERIODS = CATCH_UP_MAX // 3 + 1


def set_rules(count: int) -> tuple[words.SetRule, ...]:
    """Rules of an account each, each of which grants a little more than a third of what a list may when it is set."""
    anchor = datetime.now(UTC) - timedelta(days=PERIODS, hours=-12)
    return tuple(
        words.SetRule(
            idempotency_key=f"rule-{number}",
            account=f"acme/{number}",
            rule=words.RuleSpec(id="daily", unit="usd", amount="1", period="day", anchor=anchor),
        )
        for number in range(count)
    )


def outcome(reply: words.Reply) -> words.Accepted:
    """What was accepted."""
    assert isinstance(reply, words.Accepted), reply
    return reply


async def open_accounts(driver: Driver, count: int) -> None:
    """acme/0, acme/1, … with a wallet each."""
    for number in range(count):
        await driver.accepted(open_account(f"acme/{number}", "usd", key=f"open-{number}"))


async def test_a_list_that_would_grant_too_many_periods_is_refused_before_anything_is_written(driver: Driver) -> None:
    async with driver.running() as http:
        await open_accounts(driver, 4)
        before = await driver.dump()
        asked = words.CommandList(commands=set_rules(4), all_or_nothing=True, idempotency_key="all")
        refused = await driver.commands(asked)
        assert isinstance(refused, words.Refused)
        assert (refused.code, refused.index) == ("too_much_at_once", 2)
        assert f"its first 3 commands are granting {3 * PERIODS} periods at once" in refused.message
        assert f"at most {CATCH_UP_MAX}" in refused.message
        answer = await http.post(
            "/v1/lists",
            json=asked.model_dump(mode="json", exclude={"command", "idempotency_key"}),
            headers={"Idempotency-Key": "all"},
        )
        assert (answer.status_code, answer.json()["code"]) == (422, "too_much_at_once")
        assert await driver.dump() == before
        # In two lists it is done.
        for key, part in (("first", set_rules(4)[:2]), ("second", set_rules(4)[2:])):
            listed = await driver.listed(*part, all_or_nothing=key)
            assert [len(outcome(reply).movements) for reply in listed.replies] == [PERIODS] * 2


async def test_of_a_list_of_single_commands_those_after_too_many_periods_wait_for_the_next(driver: Driver) -> None:
    async with driver.running():
        await open_accounts(driver, 4)
        commands = set_rules(4)
        *done, left = (await driver.listed(*commands)).replies
        assert all(isinstance(reply, words.Accepted) for reply in done)
        assert isinstance(left, words.Failed)
        assert (left.code, "to be sent in another list" in left.message) == ("busy", True)
        # What was accepted is replayed, and grants nothing.
        replies = (await driver.listed(*commands)).replies
        assert [isinstance(reply, words.Accepted) and reply.replayed for reply in replies] == [True, True, True, False]


async def test_no_list_is_answered_with_more_than_can_be_sent(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handling, "REPLY_BYTES_MAX", 2000)
    async with driver.running():
        await driver.accepted(open_account("acme", "usd"))
        before = await driver.dump()
        fitting = 0
        commands = tuple(grant("acme", "1", key=f"grant-{number}") for number in range(20))
        for dry_run in (False, True):
            asked = words.CommandList(commands=commands, all_or_nothing=True, idempotency_key="all", dry_run=dry_run)
            refused = await driver.commands(asked)
            assert isinstance(refused, words.Refused)
            assert refused.code == "too_much_at_once"
            assert refused.index is not None
            fitting = refused.index
            assert refused.message.endswith("and a list in at most 2000")
            assert await driver.dump() == before
        part = await driver.listed(*commands[:fitting], all_or_nothing="all")
        assert all(isinstance(reply, words.Accepted) for reply in part.replies)
        *others, last = (await driver.listed(*commands)).replies
        assert isinstance(others[0], words.Accepted)
        assert isinstance(last, words.Failed)
        assert last.code == "busy"


async def test_what_was_accepted_together_is_replayed_as_it_was(driver: Driver) -> None:
    async with driver.running():
        asked = words.CommandList(
            commands=(open_account("acme", "usd", key="open"), grant("acme", "1", key="grant")),
            all_or_nothing=True,
            idempotency_key="all",
        )
        subject = ledger_command_subject(partition=partition_of("acme"), command="list", principal="tester")
        first = await driver.request(subject, asked.model_dump_json().encode(), words.LIST_REPLIES)
        again = await driver.request(subject, asked.model_dump_json().encode(), words.LIST_REPLIES)
        assert isinstance(first, words.Listed)
        assert again == first.model_copy(update={"replayed": True})
