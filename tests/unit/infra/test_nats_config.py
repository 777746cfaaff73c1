"""Laws of the generated NATS configuration: every user of the matrix, what its row allows, and nothing more."""

import json
import re

import pytest

from contracts.streams import USERS, User, permissions
from infra.nats_config import Account, accounts_config

PASSWORDS = {user.name: f"secret-of-{user.name}" for user in USERS}


def block(text: str, user: str) -> str:
    """The lines of one user."""
    found = re.search(rf'\{{ user: "{user}", (.*?)\n      \}} \}}\n', text, re.DOTALL)
    assert found
    return found.group(1)


def allowed(text: str, user: str, direction: str) -> list[str]:
    found = re.search(rf"{direction}: \{{ allow: (\[.*\]) \}}", block(text, user))
    subjects: list[str] = json.loads(found.group(1)) if found else []
    return subjects


@pytest.mark.parametrize("user", USERS, ids=lambda user: user.name)
def test_a_user_is_allowed_exactly_its_row_of_the_matrix(user: User) -> None:
    text = accounts_config([Account(name="SCRIP", passwords=PASSWORDS)])
    row = permissions(user)
    assert allowed(text, user.name, "publish") == list(row.publish)
    assert allowed(text, user.name, "subscribe") == list(row.subscribe)
    assert ("allow_responses" in block(text, user.name)) == row.responds
    assert f'password: "secret-of-{user.name}"' in block(text, user.name)


def test_a_user_without_subjects_is_denied_everything() -> None:
    text = accounts_config([Account(name="A", passwords={"mute": "x"})], users=[User(name="mute")])
    assert 'publish: { deny: ">" }' in block(text, "mute")


def test_users_of_several_accounts_are_told_apart_by_prefix() -> None:
    accounts = [Account(name=f"W{number}", passwords=PASSWORDS, user_prefix=f"w{number}_") for number in range(2)]
    names = re.findall(r'user: "([^"]+)"', accounts_config(accounts))
    assert sorted(names) == sorted(f"w{number}_{user.name}" for number in range(2) for user in USERS)


def test_every_account_has_streams_and_the_system_account_has_no_user() -> None:
    text = accounts_config([Account(name="A", passwords=PASSWORDS), Account(name="B", passwords=PASSWORDS)])
    assert text.count("jetstream: enabled") == 2
    assert "  SYS {}\n" in text
    assert text.endswith("system_account: SYS\n")


def test_passwords_do_not_show_in_the_repr_of_an_account() -> None:
    assert "secret-of" not in repr(Account(name="A", passwords=PASSWORDS))
