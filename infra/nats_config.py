"""The accounts part of the NATS configuration, rendered from the permission matrix of contracts/streams.py. Pure."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from contracts.streams import USERS, User, permissions

# An answer may come this late. The permission to give it is the request's, and is used up by it.
ANSWER_WITHIN: Final = "1m"


@dataclass(frozen=True, slots=True)
class Account:
    """One account: its own streams and subjects. `passwords` by user of the matrix.

    User names are unique in a server: several accounts need different prefixes.
    """

    name: str
    passwords: Mapping[str, str] = field(repr=False)
    user_prefix: str = ""


def accounts_config(accounts: Sequence[Account], *, users: Iterable[User] = USERS) -> str:
    """Configuration text: every account with every user of the matrix, and a system account that nobody logs into."""
    matrix = tuple(users)
    blocks = "".join(_account(account, matrix) for account in accounts)
    return f"accounts {{\n  SYS {{}}\n{blocks}}}\nsystem_account: SYS\n"


def _account(account: Account, users: Iterable[User]) -> str:
    rows = "".join(_user(account, user) for user in users)
    return f"  {account.name} {{\n    jetstream: enabled\n    users: [\n{rows}    ]\n  }}\n"


def _user(account: Account, user: User) -> str:
    name = json.dumps(account.user_prefix + user.name)
    password = json.dumps(account.passwords[user.name])
    allowed = permissions(user)
    lines = [
        f"publish: {_allow(allowed.publish)}",
        f"subscribe: {_allow(allowed.subscribe)}",
        *([f'allow_responses: {{ max: 1, expires: "{ANSWER_WITHIN}" }}'] if allowed.responds else []),
    ]
    rules = "".join(f"          {line}\n" for line in lines)
    return f"      {{ user: {name}, password: {password}, permissions: {{\n{rules}      }} }}\n"


def _allow(subjects: Sequence[str]) -> str:
    # To the server an empty list of permissions means no restriction at all.
    return f"{{ allow: {json.dumps(list(subjects))} }}" if subjects else '{ deny: ">" }'
