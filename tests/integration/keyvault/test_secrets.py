"""Laws of provider secrets: stored sealed, never given out over HTTP, gone when deleted or expired."""

import asyncio
from datetime import datetime
from uuid import UUID

import pytest

from contracts.keyvault import Leased
from tests.integration.keyvault.driving import ANTHROPIC, OPENAI, Driver, Running

pytestmark = pytest.mark.anyio


async def test_a_secret_is_stored_shown_as_a_status_replaced_and_deleted(driver: Driver) -> None:
    async with driver.running() as keyvault:
        stored = await keyvault.store("openai", "acme/ana", OPENAI)
        assert (stored["account"], stored["provider"], stored["name"]) == ("acme/ana", "openai", "default")
        assert (stored["prefix"], stored["last4"], stored["version"]) == ("sk-proj-", OPENAI[-4:], 1)
        assert stored["last_used_at"] is stored["expires_at"] is None
        assert await keyvault.ask("GET", "/v1/secrets/openai/acme/ana", expect=200) == stored

        replaced = await keyvault.store("openai", "acme/ana", OPENAI + "2", expect=200)
        assert (replaced["record"], replaced["version"]) == (stored["record"], 2)
        assert replaced["created_at"] == stored["created_at"] < replaced["updated_at"]

        await keyvault.choose("acme/ana", "own")
        assert await driver.leased("acme/ana", own=True) == OPENAI + "2"

        await keyvault.ask("DELETE", "/v1/secrets/openai/acme/ana", expect=204)
        for method in ("GET", "DELETE"):
            missing = await keyvault.ask(method, "/v1/secrets/openai/acme/ana", expect=404)
            assert missing["code"] == "secret_not_found"
        assert await driver.refused("acme/ana", own=True) == "no_own_secret"
        assert await driver.rows("SELECT * FROM secrets") == []


async def test_secrets_of_an_account_have_names(driver: Driver) -> None:
    async with driver.running() as keyvault:
        await keyvault.choose("acme", "own")
        path = "/v1/secrets/openai/acme"
        await keyvault.ask("PUT", f"{path}?name=work", expect=201, json={"secret": OPENAI + "work"})
        assert await driver.leased("acme", own=True) == OPENAI + "work"
        await keyvault.store("openai", "acme", OPENAI + "default")
        await keyvault.ask("PUT", f"{path}?name=play", expect=201, json={"secret": OPENAI + "play"})
        await keyvault.store("anthropic", "acme", ANTHROPIC)
        listed = await keyvault.ask("GET", "/v1/secrets?account=acme", expect=200)
        assert [(each["provider"], each["name"]) for each in listed["secrets"]] == [
            ("anthropic", "default"),
            ("openai", "default"),
            ("openai", "play"),
            ("openai", "work"),
        ]
        assert await driver.leased("acme", own=True) == OPENAI + "default"
        await keyvault.ask("DELETE", f"{path}?name=play", expect=204)
        await keyvault.ask("GET", f"{path}?name=play", expect=404)
        await keyvault.ask("GET", f"{path}?name=work", expect=200)


async def test_a_malformed_secret_is_refused_and_not_repeated(driver: Driver) -> None:
    async with driver.running() as keyvault:
        for provider, secret in (("openai", ANTHROPIC), ("groq", OPENAI), ("mistral", "short")):
            refused = await keyvault.store(provider, "acme", secret, expect=422)
            assert refused["code"] == "secret_malformed"
            assert secret not in str(refused)
        assert await driver.rows("SELECT record FROM secrets UNION ALL SELECT id FROM audit") == []


async def test_a_secret_with_a_time_to_live_is_absent_afterwards_and_then_shredded(driver: Driver) -> None:
    settings = driver.settings.model_copy(update={"sweep_seconds": 3600.0})
    async with driver.running(settings) as keyvault:
        await keyvault.choose("acme", "own")
        stored = await keyvault.store("openai", "acme", OPENAI, ttl_seconds=1)
        await keyvault.store("anthropic", "acme", ANTHROPIC, ttl_seconds=1)
        leased = await driver.lease("acme", own=True)
        assert isinstance(leased, Leased)
        assert leased.expires_at == datetime.fromisoformat(stored["expires_at"])
        await asyncio.sleep(1.1)
        # Nobody has swept yet.
        assert (await driver.rows("SELECT count(*) FROM secrets"))[0][0] == 2
        await keyvault.ask("GET", "/v1/secrets/openai/acme", expect=404)
        assert await driver.refused("acme", own=True) == "no_own_secret"
        renewed = await keyvault.store("openai", "acme", OPENAI, expect=200)
        assert renewed["version"] == 2
    async with driver.running():
        await driver.until("SELECT count(*) FROM secrets", 1)
        assert await driver.leased("acme", own=True) == OPENAI
        swept = await driver.rows("SELECT principal, detail ->> 'provider' FROM audit WHERE action = 'secret_expired'")
        assert swept == [("clock", "anthropic")]


async def test_the_platforms_secrets_are_the_operators(driver: Driver) -> None:
    async with driver.running() as keyvault:
        stored = await keyvault.store_platform("openai", OPENAI)
        assert stored["account"] is None
        listed = await keyvault.ask("GET", "/v1/platform-secrets", expect=200)
        assert [each["record"] for each in listed["secrets"]] == [stored["record"]]
        product = keyvault.as_principal(driver.tokens["product"])
        for method in ("GET", "PUT", "DELETE"):
            refused = await product.ask(method, "/v1/platform-secrets/openai", expect=403, json={"secret": OPENAI})
            assert refused["code"] == "scope_missing"
        assert await driver.leased("acme/ana", own=False) == OPENAI
        await keyvault.ask("DELETE", "/v1/platform-secrets/openai", expect=204)
        assert await driver.refused("acme/ana", own=False) == "no_platform_secret"


async def test_scopes_are_needed(driver: Driver) -> None:
    async with driver.running() as keyvault:
        await keyvault.store("openai", "acme", OPENAI)
        viewer = keyvault.as_principal(driver.tokens["viewer"])
        await viewer.ask("GET", "/v1/secrets/openai/acme", expect=200)
        body = {"secret": OPENAI}
        await viewer.ask("PUT", "/v1/secrets/openai/acme", expect=403, json=body)
        await viewer.ask("DELETE", "/v1/secrets/openai/acme", expect=403)
        await viewer.ask("POST", "/v1/access-keys", expect=403, json={"account": "acme"})
        await viewer.ask("PUT", "/v1/policies/acme", expect=403, json={"policy": "own"})
        for method, path in (("GET", "/v1/keyring"), ("POST", "/v1/keyring/rewrap")):
            await keyvault.as_principal(driver.tokens["product"]).ask(method, path, expect=403)
        nobody = keyvault.as_principal("no-token")
        for path in ("/v1/secrets/openai/acme", "/v1/audit", "/v1/access-keys", "/v1/policies/acme"):
            assert (await nobody.ask("GET", path, expect=401))["code"] == "unauthenticated"


async def test_a_row_that_was_changed_or_moved_is_not_opened(driver: Driver) -> None:
    async with driver.running() as keyvault:
        for account in ("acme", "other"):
            await keyvault.choose(account, "own")
            await keyvault.store("openai", account, OPENAI + account)
        assert await driver.leased("acme", own=True) == OPENAI + "acme"
        sealed = "wrapped_key, commitment, ciphertext, version, ring_version"
        await driver.rows(
            f"UPDATE secrets SET ({sealed}) = (SELECT {sealed} FROM secrets WHERE account = 'other')"
            " WHERE account = 'acme' RETURNING 1"
        )
        assert await driver.refused("acme", own=True) == "secret_undecryptable"
        assert await driver.leased("other", own=True) == OPENAI + "other"
        await driver.rows("UPDATE secrets SET account = 'acme/x' WHERE account = 'other' RETURNING 1")
        await keyvault.choose("acme/x", "own")
        assert await driver.refused("acme/x", own=True) == "secret_undecryptable"
        # Stored anew, it is well again.
        await keyvault.store("openai", "acme", OPENAI, expect=200)
        assert await driver.leased("acme", own=True) == OPENAI


async def test_uses_are_counted_by_the_minute(driver: Driver) -> None:
    async with driver.running() as keyvault:
        stored = await keyvault.store_platform("openai", OPENAI)
        for _ in range(7):
            await driver.leased("acme", own=False)
        await driver.until("SELECT coalesce(sum(times), 0) FROM secret_uses", 7)
        await driver.until("SELECT count(*) FROM secrets WHERE last_used_at IS NOT NULL", 1)
        uses = await keyvault.ask("GET", f"/v1/secret-uses/{stored['record']}", expect=200)
        assert sum(each["times"] for each in uses["uses"]) == 7
        assert {each["principal"] for each in uses["uses"]} == {"gateway"}
        assert (await keyvault.ask("GET", "/v1/platform-secrets/openai", expect=200))["last_used_at"]


async def test_every_change_is_in_the_audit_trail(driver: Driver) -> None:
    async with driver.running() as keyvault:
        product = keyvault.as_principal(driver.tokens["product"])
        stored = await product.store("openai", "acme/ana", OPENAI)
        await keyvault.store("openai", "acme/ana", OPENAI, expect=200)
        await product.choose("acme", "own_then_credits", consent=True, consented_by="ana@acme.example")
        await keyvault.ask("DELETE", "/v1/secrets/openai/acme/ana", expect=204)
        await keyvault.store("openai", "acme0", OPENAI)
        trail = await _trail(keyvault, "acme")
        assert [(each["principal"], each["action"], each["account"]) for each in trail] == [
            ("product", "secret_stored", "acme/ana"),
            ("operator", "secret_replaced", "acme/ana"),
            ("product", "policy_changed", "acme"),
            ("operator", "secret_deleted", "acme/ana"),
        ]
        assert [each["record"] for each in trail] == [stored["record"], stored["record"], None, stored["record"]]
        assert trail[2]["detail"] == {
            "policy": "own_then_credits",
            "consent": True,
            "consented_by": "ana@acme.example",
        }
        assert len(await _trail(keyvault, "acme/ana")) == 3
        first = await keyvault.ask("GET", "/v1/audit?limit=2", expect=200)
        assert [each["action"] for each in first["entries"]] == ["secret_stored", "secret_deleted"]
        second = await keyvault.ask("GET", f"/v1/audit?limit=3&before={UUID(first['next_before'])}", expect=200)
        assert (len(second["entries"]), second["next_before"]) == (3, None)


async def _trail(keyvault: Running, account: str) -> list[dict[str, object]]:
    """Oldest first."""
    found = await keyvault.ask("GET", f"/v1/audit?account={account}", expect=200)
    return list(reversed(found["entries"]))
