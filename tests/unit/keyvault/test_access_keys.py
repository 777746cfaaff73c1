"""Laws of access keys and key policies."""

from datetime import UTC, datetime, timedelta
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from contracts.accounts import path
from contracts.keyvault import ACCESS_KEY, AccessKeyId, KeyPolicy, key_hash
from contracts.money import Amount, Unit
from services.keyvault.domain.access_keys import (
    KEY_BYTES,
    KeyState,
    check_caps,
    derived_key_id,
    new_access_key,
    new_key_id,
    own_account,
    why_unusable,
)
from services.keyvault.domain.errors import (
    AccountTooDeep,
    CapInvalid,
    CapUnitIsMoney,
    CapUnitUnknown,
    ConsentMissing,
    KeyDisabled,
    KeyExpired,
    PolicyForbids,
)
from services.keyvault.domain.policy import UNCHOSEN, Policy, why_not_leased
from tests.unit.contracts.strategies import accounts

KEY_ID: TypeAdapter[str] = TypeAdapter(AccessKeyId)
UNITS = {
    "usd": Unit(name="usd", kind="money", scale=9),
    "tokens": Unit(name="tokens", kind="cap", scale=0),
    "usd_cap": Unit(name="usd_cap", kind="cap", scale=9),
}
NOON = datetime(2025, 7, 1, 12, tzinfo=UTC)

ids = st.binary(min_size=10, max_size=10).map(new_key_id)
entropy = st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES)


@given(ids, entropy)
def test_a_key_has_the_form_that_the_gateway_looks_for(key_id: str, random: bytes) -> None:
    key = new_access_key(key_id=key_id, entropy=random)
    match = ACCESS_KEY.fullmatch(key.reveal())
    assert match
    assert KEY_ID.validate_python(f"key_{match[1]}") == key_id
    assert repr(key) == "***"


@given(entropy, entropy)
def test_different_randomness_makes_different_keys(one: bytes, other: bytes) -> None:
    keys = [new_access_key(key_id="key_00000000", entropy=each).reveal() for each in (one, other)]
    assert (keys[0] == keys[1]) == (one == other)
    assert (key_hash(keys[0]) == key_hash(keys[1])) == (one == other)


@given(st.text(max_size=20), st.text(max_size=20), st.text(max_size=20), st.text(max_size=20))
def test_a_request_names_one_key(principal: str, key: str, other_principal: str, other_key: str) -> None:
    one = derived_key_id(principal=principal, idempotency_key=key)
    assert one == derived_key_id(principal=principal, idempotency_key=key)
    assert KEY_ID.validate_python(one) == one
    other = derived_key_id(principal=other_principal, idempotency_key=other_key)
    assert (one == other) == ((principal, key) == (other_principal, other_key))


@given(accounts, ids)
def test_a_keys_account_is_one_below_its_holders(holder: str, key_id: str) -> None:
    account = own_account(holder=holder, key_id=key_id)
    if isinstance(account, AccountTooDeep):
        assert len(path(holder)) == 4 or len(holder) > 400 - len(key_id) - 1
    else:
        assert path(account) == (account, *path(holder))


@pytest.mark.parametrize(
    ("caps", "refusal"),
    [
        ([], None),
        ([("tokens", "1000"), ("usd_cap", "0.5")], None),
        ([("usd", "5")], CapUnitIsMoney),
        ([("gold", "5")], CapUnitUnknown),
        ([("tokens", "0")], CapInvalid),
        ([("tokens", "-1")], CapInvalid),
        ([("tokens", "1.5")], CapInvalid),
        ([("tokens", "1"), ("tokens", "2")], CapInvalid),
    ],
)
def test_a_cap_is_an_amount_of_a_cap_unit(caps: list[tuple[str, str]], refusal: type | None) -> None:
    found = check_caps([Amount(amount=amount, unit=unit) for unit, amount in caps], units=UNITS)
    assert found is None if refusal is None else isinstance(found, refusal)


def test_a_key_is_valid_until_it_is_disabled_or_expires() -> None:
    later = NOON + timedelta(seconds=1)
    assert why_unusable(KeyState("key_00000000", None, None), at=NOON) is None
    assert why_unusable(KeyState("key_00000000", None, later), at=NOON) is None
    assert isinstance(why_unusable(KeyState("key_00000000", None, NOON), at=NOON), KeyExpired)
    assert isinstance(why_unusable(KeyState("key_00000000", NOON, None), at=later), KeyDisabled)
    assert isinstance(why_unusable(KeyState("key_00000000", NOON, NOON), at=later), KeyDisabled)


@given(st.sampled_from(get_args(KeyPolicy)), st.booleans(), st.booleans())
def test_the_platform_is_never_paid_without_being_asked_to(policy: KeyPolicy, consent: bool, own: bool) -> None:
    why = why_not_leased(Policy(policy=policy, consent=consent), own=own, account="acme")
    if own:
        assert isinstance(why, PolicyForbids) == (policy == "credits")
    elif policy == "own":
        assert isinstance(why, PolicyForbids)
    elif policy == "own_then_credits":
        assert isinstance(why, ConsentMissing) == (not consent)
    else:
        assert why is None


def test_who_chose_nothing_is_on_credits() -> None:
    assert why_not_leased(UNCHOSEN, own=False, account="acme") is None
    assert isinstance(why_not_leased(UNCHOSEN, own=True, account="acme"), PolicyForbids)
