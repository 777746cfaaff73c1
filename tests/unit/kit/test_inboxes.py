"""An answer goes to an inbox, and nowhere else."""

import pytest

from contracts.streams import USERS, inbox_prefix
from services.kit.broker import is_inbox


@pytest.mark.parametrize("user", [user.name for user in USERS])
def test_every_users_inbox_is_one_and_its_own(user: str) -> None:
    reply_subject = f"{inbox_prefix(user)}.abc.1"
    assert is_inbox(reply_subject)
    assert [each.name for each in USERS if is_inbox(reply_subject, of=each.name)] == [user]


@pytest.mark.parametrize(
    "subject", ["", "_INBOX.x", "ledger.v1.07.account.opened", "$JS.API.STREAM.PURGE.USAGE", "$JS.ACK.USAGE.metering.1"]
)
def test_what_streams_and_jetstream_listen_to_is_none(subject: str) -> None:
    assert not is_inbox(subject)
    assert not is_inbox(subject, of="gateway")


def test_a_name_that_another_begins_with_is_told_apart() -> None:
    assert not is_inbox("_INBOX_gateway2.x", of="gateway")
