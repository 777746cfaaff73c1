"""Laws of what the gateway remembers of keys: never longer than it may, and nothing that a fact has made untrue."""

from datetime import UTC, datetime

import pytest

from contracts.keyvault import KeyCreated, KeyDisabled, KeyPolicy, KeyPolicyChanged, Verified
from contracts.partition import partition_of
from services.gateway.domain.errors import SecretRefused
from services.gateway.domain.policy import uses_own_secret
from services.gateway.projections import VerifiedKeys
from services.gateway.subscribers import forget

AT = datetime(2026, 1, 1, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def verified(account: str = "acme/ana/key_1", *, key_id: str = "key_aaaaaaaa", **more: object) -> Verified:
    return Verified.model_validate({"key_id": key_id, "account": account, "policy": "credits", "consent": False} | more)


def remembering(*accounts: str, clock: Clock | None = None) -> VerifiedKeys:
    keys = VerifiedKeys(seconds=5, clock=clock or Clock())
    for number, account in enumerate(accounts):
        keys.remember(account, verified(account, key_id=f"key_aaaaaaa{number}"), generation=0)
    return keys


def remembered(keys: VerifiedKeys, *accounts: str) -> list[str]:
    return [account for account in accounts if keys.find(account) is not None]


def test_a_key_is_remembered_for_its_time_only() -> None:
    clock = Clock()
    keys = remembering("a/b", clock=clock)
    clock.seconds = 4.9
    assert keys.find("a/b") is not None
    clock.seconds = 5.0
    assert keys.find("a/b") is None


def test_a_disabled_key_is_forgotten_and_no_other() -> None:
    keys = remembering("a/x", "a/y")
    fact = KeyDisabled(partition=partition_of("a"), number=1, account="a/x", recorded_at=AT, key_id="key_aaaaaaa0")
    forget(fact.model_dump_json().encode(), keys)
    assert remembered(keys, "a/x", "a/y") == ["a/y"]


def test_a_changed_policy_is_asked_for_by_all_below_and_by_nobody_beside() -> None:
    accounts = ("a/b", "a/b/c", "a/bc", "a", "x")
    keys = remembering(*accounts)
    fact = KeyPolicyChanged(partition=partition_of("a"), number=1, account="a/b", recorded_at=AT)
    forget(fact.model_dump_json().encode(), keys)
    assert remembered(keys, *accounts) == ["a/bc", "a", "x"]


def test_a_new_key_changes_nothing_and_what_is_not_understood_everything() -> None:
    keys = remembering("a", "x")
    fact = KeyCreated(partition=partition_of("a"), number=1, account="a", recorded_at=AT, key_id="key_bbbbbbbb")
    forget(fact.model_dump_json().encode(), keys)
    assert remembered(keys, "a", "x") == ["a", "x"]
    forget(b'{"type": "keyvault.key.renamed.v9"}', keys)
    assert remembered(keys, "a", "x") == []


def test_an_answer_that_a_fact_has_overtaken_is_not_remembered() -> None:
    keys = VerifiedKeys(seconds=5)
    asked_in = keys.generation
    keys.forget_key("key_aaaaaaaa")
    keys.remember("hash", verified(), generation=asked_in)
    assert keys.find("hash") is None


def test_what_is_remembered_is_bounded() -> None:
    keys = VerifiedKeys(seconds=5, count_max=2)
    for name in ("a", "b", "c"):
        keys.remember(name, verified(), generation=0)
    assert remembered(keys, "a", "b", "c") == ["b", "c"]


@pytest.mark.parametrize(
    ("policy", "consent", "has_own", "expected"),
    [
        ("own", False, True, True),
        ("own", True, False, "no_own_secret"),
        ("credits", False, True, False),
        ("credits", False, False, False),
        ("own_then_credits", False, True, True),
        ("own_then_credits", True, False, False),
        ("own_then_credits", False, False, "consent_missing"),
    ],
)
def test_which_secret_a_call_uses(policy: KeyPolicy, consent: bool, has_own: bool, expected: bool | str) -> None:
    key = verified(policy=policy, consent=consent, own_providers=("openai",) if has_own else ())
    if isinstance(expected, str):
        with pytest.raises(SecretRefused) as refused:
            uses_own_secret(key, provider="openai")
        assert refused.value.code == expected
    else:
        assert uses_own_secret(key, provider="openai") == expected
