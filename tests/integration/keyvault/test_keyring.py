"""Laws of the key ring in a running service: rotated and rewrapped online, nothing lost."""

import asyncio

import pytest

from services.keyvault.domain.keyring import without
from services.keyvault.handlers import rewrapping
from services.keyvault.store import rotate_keyring_file
from services.keyvault.translate import InvalidKeyring, keyring_text, read_keyring
from tests.integration.keyvault.driving import OPENAI, Driver, Running

pytestmark = pytest.mark.anyio

ACCOUNTS = [f"org{number}" for number in range(12)]


async def stored(keyvault: Running) -> None:
    for account in ACCOUNTS:
        await keyvault.choose(account, "own")
        await keyvault.store("openai", account, OPENAI + account)


async def test_a_new_version_wraps_at_once_and_old_ones_still_open(driver: Driver) -> None:
    async with driver.running() as keyvault:
        await stored(keyvault)
        rotate_keyring_file(driver.settings.keyring_file)
        for account in ACCOUNTS:
            assert await driver.leased(account, own=True) == OPENAI + account
        replaced = await keyvault.store("openai", "org0", OPENAI, expect=200)
        assert replaced["ring_version"] == 2
        ring = await keyvault.ask("GET", "/v1/keyring", expect=200)
        assert ring == {"current": 2, "versions": [1, 2], "secrets_by_version": {"1": 11, "2": 1}}


async def test_rewrapping_goes_on_online_and_lets_the_old_key_go(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewrapping, "REWRAP_ROWS_MAX", 2)
    async with driver.running() as keyvault:
        await stored(keyvault)
        before = await driver.rows("SELECT record, ciphertext, commitment, version FROM secrets ORDER BY record")
        wrapped_before = {key for (key,) in await driver.rows("SELECT wrapped_key FROM secrets")}
        rotate_keyring_file(driver.settings.keyring_file)

        async def leasing() -> None:
            for account in ACCOUNTS * 3:
                assert await driver.leased(account, own=True) == OPENAI + account

        async def storing() -> None:
            for account in ACCOUNTS[:3]:
                await keyvault.store("openai", account, OPENAI + account, expect=200)

        report, _ = await asyncio.gather(keyvault.ask("POST", "/v1/keyring/rewrap", expect=200), leasing())
        assert report == {"ring_version": 2, "rewrapped": 12, "undecryptable": []}
        assert before == await driver.rows(
            "SELECT record, ciphertext, commitment, version FROM secrets ORDER BY record"
        )
        assert not wrapped_before & {key for (key,) in await driver.rows("SELECT wrapped_key FROM secrets")}

        rotate_keyring_file(driver.settings.keyring_file)
        await asyncio.gather(
            keyvault.ask("POST", "/v1/keyring/rewrap", expect=200),
            keyvault.ask("POST", "/v1/keyring/rewrap", expect=200),
            storing(),
        )
        ring = await keyvault.ask("GET", "/v1/keyring", expect=200)
        assert ring["secrets_by_version"] == {"3": 12}

        path = driver.settings.keyring_file
        newest = without(without(read_keyring(path.read_bytes(), name="ring"), 1), 2)
        path.write_bytes(keyring_text(newest))
        await leasing()
        again = await keyvault.ask("POST", "/v1/keyring/rewrap", expect=200)
        assert again == {"ring_version": 3, "rewrapped": 0, "undecryptable": []}
        assert (await driver.rows("SELECT count(*) > 6 FROM audit WHERE action = 'secrets_rewrapped'"))[0][0]


async def test_what_cannot_be_rewrapped_is_named_and_left_alone(driver: Driver) -> None:
    async with driver.running() as keyvault:
        await stored(keyvault)
        ((record, wrapped),) = await driver.rows(
            "UPDATE secrets SET wrapped_key = set_byte(wrapped_key, 20, 255 - get_byte(wrapped_key, 20))"
            " WHERE account = 'org5' RETURNING record, wrapped_key"
        )
        rotate_keyring_file(driver.settings.keyring_file)
        report = await keyvault.ask("POST", "/v1/keyring/rewrap", expect=200)
        assert report == {"ring_version": 2, "rewrapped": 11, "undecryptable": [str(record)]}
        kept = await driver.rows("SELECT wrapped_key, ring_version FROM secrets WHERE record = %s", record)
        assert kept == [(wrapped, 1)]


async def test_a_ring_that_lacks_a_key_says_so_for_its_secrets_only(driver: Driver) -> None:
    async with driver.running() as keyvault:
        await stored(keyvault)
        path = driver.settings.keyring_file
        ring = rotate_keyring_file(path)
        await keyvault.store("openai", "org0", OPENAI, expect=200)
        path.write_bytes(keyring_text(without(ring, 1)))
        assert await driver.refused("org1", own=True) == "secret_undecryptable"
        assert await driver.leased("org0", own=True) == OPENAI
        path.write_bytes(keyring_text(ring))
        assert await driver.leased("org1", own=True) == OPENAI + "org1"


async def test_a_damaged_ring_leaves_the_last_good_one_in_force(driver: Driver) -> None:
    async with driver.running() as keyvault:
        await stored(keyvault)
        driver.settings.keyring_file.write_text("{")
        assert await driver.leased("org1", own=True) == OPENAI + "org1"
        await keyvault.store("openai", "org1", OPENAI, expect=200)
        driver.settings.keyring_file.unlink()
        assert await driver.leased("org1", own=True) == OPENAI
    driver.settings.keyring_file.write_text("{")
    with pytest.raises(InvalidKeyring):
        async with driver.running():
            pass
