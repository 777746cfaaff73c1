"""Laws of remembered keys: what keyvault says has changed is asked anew at once, and nothing is believed for long."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import openai
import pytest
from nats.aio.client import Client

from contracts import keyvault
from contracts.partition import partition_of
from tests.conftest import NatsAccount
from tests.eventually import eventually
from tests.integration.gateway.conftest import OwnWorld
from tests.integration.gateway.driving import World

pytestmark = pytest.mark.anyio


@pytest.fixture
async def keyvault_nats(nats_account: NatsAccount) -> AsyncIterator[Client]:
    client = await nats_account.connect("keyvault")
    yield client
    await client.close()


async def tell(client: Client, fact: keyvault.KeyFact) -> None:
    verb = fact.type.split(".")[2]
    subject = keyvault.key_fact_subject(partition=fact.partition, verb=verb)
    await client.publish(subject, fact.model_dump_json().encode())
    await client.flush()


async def test_a_disabled_key_is_refused_as_soon_as_keyvault_says_so(world: World, keyvault_nats: Client) -> None:
    await world.ask()
    key_sha256 = keyvault.key_hash(world.key)
    verified = world.keyvault.keys[key_sha256]
    world.keyvault.refusals[key_sha256] = keyvault.KeyRefused(code="key_disabled", message="it is disabled")
    await world.ask()
    partition = partition_of(world.account)
    fact = keyvault.KeyDisabled(
        partition=partition,
        number=1,
        account=world.account,
        recorded_at=datetime.now(UTC),
        key_id=verified.key_id,
    )
    await tell(keyvault_nats, fact)

    async def refused() -> bool:
        try:
            await world.ask()
        except openai.AuthenticationError as error:
            return error.code == "key_disabled"
        return False

    await eventually(refused, seconds=1)


async def test_a_policy_that_changed_above_a_key_holds_at_once(world: World, keyvault_nats: Client) -> None:
    await world.ask()
    key_sha256 = keyvault.key_hash(world.key)
    world.keyvault.keys[key_sha256] = world.keyvault.keys[key_sha256].model_copy(update={"policy": "own"})
    fact = keyvault.KeyPolicyChanged(
        partition=partition_of(world.account), number=1, account=world.root, recorded_at=datetime.now(UTC)
    )
    await tell(keyvault_nats, fact)

    async def refused() -> bool:
        try:
            await world.ask()
        except openai.PermissionDeniedError as error:
            return error.code == "no_own_secret"
        return False

    await eventually(refused, seconds=1)


async def test_without_hearing_anything_a_key_is_believed_for_a_moment_only(own_world: OwnWorld) -> None:
    async with own_world(key_cache_seconds=0.3) as world:
        await world.ask()
        refusal = keyvault.KeyRefused(code="key_disabled", message="it is disabled")
        world.keyvault.refusals[keyvault.key_hash(world.key)] = refusal
        await asyncio.sleep(0.4)
        with pytest.raises(openai.AuthenticationError):
            await world.ask()


async def test_a_lease_that_is_refused_for_the_key_is_a_refusal_of_the_key(own_world: OwnWorld) -> None:
    async with own_world() as world:
        world.keyvault.lease_refusal = keyvault.KeyRefused(code="key_disabled", message="it is disabled")
        with pytest.raises(openai.AuthenticationError):
            await world.ask()
        assert world.ledger.holds == {}
