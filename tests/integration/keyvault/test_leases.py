"""Laws of leases: by policy, nearest first, to the gateway and nobody else."""

import asyncio
import time

import nats.errors
import pytest

from contracts.keyvault import KEY_REPLIES, KeyRefused, LeaseSecret, Verified, key_command_subject
from contracts.streams import USERS
from tests.conftest import NatsAccount
from tests.integration.keyvault.driving import OPENAI, Driver, StandInLedger

pytestmark = pytest.mark.anyio


async def test_the_policy_says_whose_secret_is_leased(driver: Driver) -> None:
    async with driver.running() as keyvault:
        await keyvault.store("openai", "acme", OPENAI + "own")
        await keyvault.store_platform("openai", OPENAI + "platform")

        async def leases() -> list[str]:
            found = []
            for own in (True, False):
                reply = await driver.lease("acme", own=own)
                found.append(
                    reply.code if isinstance(reply, KeyRefused) else reply.secret.get_secret_value()[len(OPENAI) :]
                )
            return found

        assert await leases() == ["policy_forbids", "platform"]
        await keyvault.choose("acme", "credits")
        assert await leases() == ["policy_forbids", "platform"]
        await keyvault.choose("acme", "own")
        assert await leases() == ["own", "policy_forbids"]
        await keyvault.choose("acme", "own_then_credits")
        assert await leases() == ["own", "consent_missing"]
        await keyvault.choose("acme", "own_then_credits", consent=True)
        assert await leases() == ["own", "platform"]
        await keyvault.choose("acme", "own_then_credits", consent=False)
        assert await leases() == ["own", "consent_missing"]


async def test_consent_is_recorded_with_who_and_when(driver: Driver) -> None:
    async with driver.running() as keyvault:
        nobody = await keyvault.ask("GET", "/v1/policies/acme/ana", expect=200)
        assert (nobody["policy"], nobody["consent"], nobody["chosen_by"]) == ("credits", False, None)
        chosen = await keyvault.choose("acme", "own_then_credits", consent=True, consented_by="ana@acme.example")
        assert (chosen["consented_by"], chosen["updated_by"]) == ("ana@acme.example", "operator")
        assert chosen["consent_at"]
        inherited = await keyvault.ask("GET", "/v1/policies/acme/ana", expect=200)
        assert (inherited["policy"], inherited["chosen_by"]) == ("own_then_credits", "acme")
        later = await keyvault.choose("acme", "own", consent=True, consented_by="ana@acme.example")
        assert later["consent_at"] == chosen["consent_at"]
        withdrawn = await keyvault.choose("acme", "own_then_credits")
        assert (withdrawn["consent_at"], withdrawn["consented_by"]) == (None, None)
        given_again = await keyvault.choose("acme", "own_then_credits", consent=True)
        assert given_again["consented_by"] == "operator"
        assert given_again["consent_at"] > chosen["consent_at"]


async def test_the_nearest_secret_and_policy_count(driver: Driver, ledger: StandInLedger) -> None:
    async with driver.running() as keyvault:
        created = await keyvault.create_key("acme/ana")
        await keyvault.choose("acme", "own")
        await keyvault.store("openai", "acme", OPENAI + "acme")
        await keyvault.store("openai", "acme0", OPENAI + "other")
        assert await driver.leased(created["account"], own=True) == OPENAI + "acme"
        await keyvault.store("openai", "acme/ana", OPENAI + "ana")
        assert await driver.leased(created["account"], own=True) == OPENAI + "ana"
        assert await driver.leased("acme/bob", own=True) == OPENAI + "acme"
        verified = await driver.verify(created["key"])
        assert isinstance(verified, Verified)
        assert (verified.policy, verified.own_providers) == ("own", ("openai",))
        await keyvault.choose("acme/ana", "credits")
        assert await driver.refused(created["account"], own=True) == "policy_forbids"
        assert await driver.leased("acme/bob", own=True) == OPENAI + "acme"


async def test_nats_lets_only_the_gateway_ask(driver: Driver, nats_account: NatsAccount) -> None:
    async with driver.running() as keyvault:
        await keyvault.store_platform("openai", OPENAI)
        body = LeaseSecret(account="acme", provider="openai", own=False).model_dump_json().encode()

        async def tried(user: str) -> None:
            client = await nats_account.connect(user)
            try:
                for principal in ("gateway", user):
                    subject = key_command_subject(command="lease", principal=principal)
                    with pytest.raises((nats.errors.TimeoutError, nats.errors.NoRespondersError)):
                        await client.request(subject, body, timeout=0.3)
            finally:
                await client.close()

        await asyncio.gather(*(tried(user.name) for user in USERS if user.name != "gateway"))
        assert await driver.rows("SELECT 1 FROM secret_uses") == []


async def test_an_answer_goes_to_the_gateways_inbox_or_nowhere(driver: Driver) -> None:
    async with driver.running() as keyvault:
        await keyvault.store_platform("openai", OPENAI)
        body = LeaseSecret(account="acme", provider="openai", own=False).model_dump_json().encode()
        subject = key_command_subject(command="lease", principal="gateway")
        for reply in ("usage.v1.00.gateway", "keyvault.v1.00.key.created", "_INBOX_metering.x"):
            await driver.gateway_nats.publish(subject, body, reply=reply)
        await driver.gateway_nats.flush()
        assert await driver.leased("acme", own=False) == OPENAI
        await asyncio.sleep(0.2)
        for message in await driver.all_messages():
            assert OPENAI.encode() not in message
            assert b"not_permitted" not in message


async def test_what_cannot_be_read_is_refused_and_not_repeated(driver: Driver) -> None:
    secret = OPENAI.encode()
    async with driver.running():
        for body in (
            b"",
            b"{",
            b'{"command":"lease"}',
            b'{"command":"verify","key_sha256":"%b"}' % secret,
            b'{"command":"lease","account":"acme","provider":"openai","own":true,"%b":1}' % secret,
            b'{"command":"lease","account":"acme","provider":"openai","own":"%b"}' % secret,
            b"x" * 5_000,
        ):
            subject = key_command_subject(command="lease", principal="gateway")
            message = await driver.gateway_nats.request(subject, body, timeout=5)
            reply = KEY_REPLIES.validate_json(message.data)
            assert isinstance(reply, KeyRefused)
            assert reply.code == "invalid"
            assert OPENAI not in reply.message


async def test_verifying_and_leasing_are_fast(driver: Driver, ledger: StandInLedger) -> None:
    async with driver.running() as keyvault:
        created = await keyvault.create_key("acme/ana")
        await keyvault.store_platform("openai", OPENAI)
        times: dict[str, list[float]] = {"verify": [], "lease": []}
        for _ in range(100):
            started = time.perf_counter()
            await driver.verify(created["key"])
            middle = time.perf_counter()
            await driver.lease(created["account"], own=False)
            times["verify"].append(middle - started)
            times["lease"].append(time.perf_counter() - middle)
        medians = {name: sorted(each)[50] for name, each in times.items()}
        # Far above what it takes (about a millisecond), for a machine that does other things, too.
        assert all(median < 0.05 for median in medians.values()), medians
