"""Laws of access keys: shown once, found by hash, opened in the ledger once, never valid again once disabled."""

import asyncio
import hashlib
import time
from datetime import UTC, datetime, timedelta

import pytest

from contracts import ledger as words
from contracts.keyvault import ACCESS_KEY, KeyRefused, Verified
from services.keyvault import engine
from tests.integration.keyvault.driving import ANTHROPIC, OPENAI, Driver, StandInLedger

pytestmark = pytest.mark.anyio


async def test_a_parameter_that_nobody_reads_is_refused_and_not_repeated(driver: Driver, ledger: StandInLedger) -> None:
    async with driver.running() as keyvault:
        await keyvault.create_key("acme")
        # All keys there are would be answered, instead of one account's.
        refused = await keyvault.ask("GET", "/v1/access-keys?acount=acme", expect=422)
        assert refused["errors"] == [
            {
                "pointer": "/query",
                "code": "unknown_parameter",
                "detail": "there is no such parameter here: known are account, before, limit",
            }
        ]
        refused = await keyvault.ask("POST", "/v1/access-keys?dry_run=true", expect=422, json={"account": "acme"})
        assert refused["errors"][0]["detail"].endswith("none is known")
        assert len((await keyvault.ask("GET", "/v1/access-keys", expect=200))["access_keys"]) == 1


async def test_a_key_is_shown_once_and_verified_by_its_hash(driver: Driver, ledger: StandInLedger) -> None:
    async with driver.running() as keyvault:
        created = await keyvault.create_key("acme/ana", name="laptop")
        assert ACCESS_KEY.fullmatch(created["key"])
        assert created["account"] == f"acme/ana/{created['key_id']}"

        verified = await driver.verify(created["key"])
        assert verified == Verified(
            key_id=created["key_id"], account=created["account"], policy="credits", consent=False
        )
        over_http = await keyvault.ask("POST", "/v1/access-keys/verify", expect=200, json={"key": created["key"]})
        assert (over_http["valid"], over_http["account"]) == (True, created["account"])

        rows = await driver.rows("SELECT key_sha256 FROM access_keys")
        assert rows == [(hashlib.sha256(created["key"].encode()).digest(),)]
        assert created["key"] not in await driver.dump()
        listed = await keyvault.ask("GET", "/v1/access-keys?account=acme", expect=200)
        assert [(each["key_id"], each["name"]) for each in listed["access_keys"]] == [(created["key_id"], "laptop")]
        assert created["key"] not in str(listed)
        assert ledger.principals == {"keyvault"}


async def test_what_is_no_key_is_unknown(driver: Driver, ledger: StandInLedger) -> None:
    async with driver.running() as keyvault:
        created = await keyvault.create_key("acme")
        for text in ("", "x", created["key"][:-1], created["key"] + "x", created["key"].swapcase()):
            refused = await driver.verify(text)
            assert isinstance(refused, KeyRefused)
            assert refused.code == "key_unknown"
            over_http = await keyvault.ask("POST", "/v1/access-keys/verify", expect=200, json={"key": text})
            assert (over_http["valid"], over_http["code"], over_http["account"]) == (False, "key_unknown", None)


async def test_a_holder_gets_its_starting_grant_once(driver: Driver, ledger: StandInLedger) -> None:
    async with driver.running() as keyvault:
        keys = [await keyvault.create_key("acme/ana") for _ in range(3)]
        await keyvault.create_key("acme/bob")
    assert ledger.granted("acme/ana") == ledger.granted("acme/bob") == [("usd", "1.00")]
    opened = ledger.opened()
    assert opened["acme/ana"] == {"usd"}
    assert all(opened[key["account"]] == set() for key in keys)
    # The catalogue says another grant one day.
    catalogue = driver.settings.catalogue_file
    catalogue.write_text(catalogue.read_text().replace("1.00", "2.00"))
    async with driver.running() as keyvault:
        await keyvault.create_key("acme/ana")
        await keyvault.create_key("acme/eve")
    assert ledger.granted("acme/ana") == [("usd", "1.00")]
    assert ledger.granted("acme/eve") == [("usd", "2.00")]


async def test_caps_are_granted_to_the_keys_own_account(driver: Driver, ledger: StandInLedger) -> None:
    async with driver.running() as keyvault:
        caps = [{"unit": "tokens", "amount": "100000"}, {"unit": "calls", "amount": "10"}]
        created = await keyvault.create_key("acme", caps=caps)
        assert ledger.opened()[created["account"]] == {"tokens", "calls"}
        assert sorted(ledger.granted(created["account"])) == [("calls", "10"), ("tokens", "100000")]
        for unit, amount, code in (
            ("usd", "5", "cap_unit_is_money"),
            ("gold", "5", "unknown_unit"),
            ("tokens", "0", "invalid_cap"),
        ):
            taken = len(ledger.taken)
            refused = await keyvault.create_key("acme", expect=422, caps=[{"unit": unit, "amount": amount}])
            assert refused["code"] == code
            assert len(ledger.taken) == taken


async def test_what_can_be_no_key_is_refused(driver: Driver, ledger: StandInLedger) -> None:
    async with driver.running() as keyvault:
        deep = await keyvault.create_key("a/b/c/d", expect=422)
        assert deep["code"] == "account_too_deep"
        past = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
        assert (await keyvault.create_key("acme", expect=422, expires_at=past))["code"] == "expiry_passed"
        assert (await keyvault.create_key("acme/", expect=422))["code"] == "invalid_request"
        assert ledger.taken == []


async def test_a_key_expires(driver: Driver, ledger: StandInLedger) -> None:
    async with driver.running() as keyvault:
        began = time.monotonic()
        await keyvault.store_platform("openai", OPENAI)
        assert isinstance(await driver.verify((await keyvault.create_key("acme"))["key"]), Verified)
        # It is verified before that, on a slow machine, too.
        soon = datetime.now(UTC) + timedelta(seconds=5 * (time.monotonic() - began))
        created = await keyvault.create_key("acme", expires_at=soon.isoformat())
        verified = await driver.verify(created["key"])
        assert isinstance(verified, Verified)
        assert verified.expires_at == soon
        await asyncio.sleep(max(0, (soon - datetime.now(UTC)).total_seconds()) + 0.01)
        refused = await driver.verify(created["key"])
        assert isinstance(refused, KeyRefused)
        assert refused.code == "key_expired"
        assert await driver.refused(created["account"], own=False) == "key_expired"


async def test_a_disabled_key_is_valid_nowhere_at_once(driver: Driver, ledger: StandInLedger) -> None:
    async with driver.running() as keyvault:
        await keyvault.store_platform("openai", OPENAI)
        created, other = await keyvault.create_key("acme"), await keyvault.create_key("acme")
        path = f"/v1/access-keys/{created['key_id']}/disable"
        disabled = await keyvault.ask("POST", path, expect=200, json={"reason": "it was in a public repository"})
        assert disabled["disabled_by"] == "operator"
        again = await keyvault.ask("POST", path, expect=200, json={"reason": "another"})
        assert again == disabled
        refused = await driver.verify(created["key"])
        assert isinstance(refused, KeyRefused)
        assert refused.code == "key_disabled"
        # A gateway that still remembers the key gets no secret for it.
        assert await driver.refused(created["account"], own=False) == "key_disabled"
        assert await driver.leased(other["account"], own=False) == OPENAI
        unknown = await keyvault.ask(
            "POST", "/v1/access-keys/key_00000000/disable", expect=404, json={"reason": "none"}
        )
        assert unknown["code"] == "key_unknown"
        assert (await driver.rows("SELECT count(*) FROM audit WHERE action = 'access_key_disabled'"))[0][0] == 1


async def test_a_repeated_request_makes_one_key(driver: Driver, ledger: StandInLedger) -> None:
    async with driver.running() as keyvault:
        created = await keyvault.create_key("acme", key="request-1")
        repeated = await keyvault.create_key("acme", key="request-1", expect=409)
        assert (repeated["code"], repeated["key_id"]) == ("already_created", created["key_id"])
        other = await keyvault.create_key("acme", key="request-1", name="other", expect=409)
        assert other["code"] == "conflict"
        product = keyvault.as_principal(driver.tokens["product"])
        anothers = await product.create_key("acme", key="request-1")
        assert anothers["key_id"] != created["key_id"]
        assert (await driver.rows("SELECT count(*) FROM access_keys"))[0][0] == 2


async def test_a_request_that_comes_many_times_at_once_makes_one_key(driver: Driver, ledger: StandInLedger) -> None:
    async with driver.running() as keyvault:
        body = {"account": "acme", "caps": [{"unit": "tokens", "amount": "5"}]}
        answers = await asyncio.gather(
            *(
                keyvault.http.post("/v1/access-keys", json=body, headers={"Idempotency-Key": "request-1"})
                for _ in range(8)
            )
        )
        assert sorted(answer.status_code for answer in answers) == [201] + [409] * 7
        (account,) = {account for account in ledger.opened() if account != "acme"}
        assert ledger.granted(account) == [("tokens", "5")]


async def test_a_key_that_dies_half_made_is_completed_by_the_retry(
    driver: Driver, ledger: StandInLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "LEDGER_SECONDS_MAX", 0.3)
    monkeypatch.setattr(engine, "LEDGER_REQUEST_SECONDS_MAX", 0.2)
    async with driver.running() as keyvault:
        caps = [{"unit": "tokens", "amount": "5"}]
        for answered in (0, 1, 2, 3):
            ledger.silent_after = len(ledger.taken) + answered
            away = await keyvault.create_key("acme", key="request-1", caps=caps, expect=503)
            assert away["code"] == "ledger_away"
            assert await driver.rows("SELECT 1 FROM access_keys UNION ALL SELECT 1 FROM audit") == []
        ledger.silent_after = None
        created = await keyvault.create_key("acme", key="request-1", caps=caps)
        assert ledger.granted("acme") == [("usd", "1.00")]
        assert ledger.granted(created["account"]) == [("tokens", "5")]
        assert set(ledger.opened()) == {"acme", created["account"]}


async def test_the_ledgers_refusal_is_told(driver: Driver, ledger: StandInLedger) -> None:
    async with driver.running() as keyvault:
        ledger.answer_instead = words.Refused(code="wallet_policy_differs", message="the wallet is soft")
        refused = await keyvault.create_key("acme", expect=409)
        assert refused["code"] == "ledger_refused"
        assert "wallet_policy_differs" in refused["detail"]
        assert await driver.rows("SELECT 1 FROM access_keys") == []


async def test_without_a_ledger_no_key_is_made(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "LEDGER_SECONDS_MAX", 0.3)
    async with driver.running() as keyvault:
        away = await keyvault.create_key("acme", expect=503)
        assert away["code"] == "ledger_away"


async def test_keys_are_listed_by_tree_and_page(driver: Driver, ledger: StandInLedger) -> None:
    async with driver.running() as keyvault:
        made = [
            (await keyvault.create_key(holder))["key_id"]
            for holder in ("acme", "acme/ana", "acme/ana", "acme0", "acme-b", "b")
        ]
        listed = await keyvault.ask("GET", "/v1/access-keys?account=acme", expect=200)
        assert [each["key_id"] for each in listed["access_keys"]] == made[2::-1]
        seen: list[str] = []
        before = ""
        while True:
            page = await keyvault.ask("GET", f"/v1/access-keys?limit=4{before}", expect=200)
            seen += [each["key_id"] for each in page["access_keys"]]
            if page["next_before"] is None:
                break
            before = f"&before={page['next_before']}"
        assert seen == made[::-1]


async def test_verifying_notes_when_a_key_was_last_used(driver: Driver, ledger: StandInLedger) -> None:
    async with driver.running() as keyvault:
        created = await keyvault.create_key("acme")
        await driver.verify(created["key"])
        await driver.until("SELECT count(*) FROM access_keys WHERE last_used_at IS NOT NULL", 1)


async def test_what_changes_keys_is_told_in_order_without_gaps(driver: Driver, ledger: StandInLedger) -> None:
    async with driver.running() as keyvault:
        created = await keyvault.create_key("acme/ana")
        await keyvault.store("anthropic", "acme/ana", ANTHROPIC)
        await keyvault.choose("acme", "own")
        await keyvault.choose("acme", "own")
        await keyvault.ask("DELETE", "/v1/secrets/anthropic/acme/ana", expect=204)
        await keyvault.store_platform("openai", OPENAI)
        path = f"/v1/access-keys/{created['key_id']}/disable"
        await keyvault.ask("POST", path, expect=200, json={"reason": "lost"})
        await driver.until("SELECT coalesce(max(number), 0) FROM relayed", 5)
        facts = await driver.facts()
    assert [(each["type"], each["account"], each["number"]) for each in facts] == [
        ("keyvault.key.created.v1", created["account"], 1),
        ("keyvault.key.policy_changed.v1", "acme/ana", 2),
        ("keyvault.key.policy_changed.v1", "acme", 3),
        ("keyvault.key.policy_changed.v1", "acme/ana", 4),
        ("keyvault.key.disabled.v1", created["account"], 5),
    ]
    assert {each["subject"].split(".")[0] for each in facts} == {"keyvault"}
