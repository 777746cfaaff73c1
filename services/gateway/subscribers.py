"""Messages in: keyvault's facts about keys, heard as they are published. What is missed is asked again soon."""

from typing import Annotated, Final

from nats.aio.client import Client
from nats.aio.msg import Msg
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from contracts.keyvault import KeyCreated, KeyDisabled, KeyPolicyChanged
from contracts.streams import KEY_FACTS
from services.gateway.projections import VerifiedKeys
from services.kit.telemetry import get_logger

log = get_logger(__name__)

_FACTS: Final[TypeAdapter[KeyCreated | KeyDisabled | KeyPolicyChanged]] = TypeAdapter(
    Annotated[KeyCreated | KeyDisabled | KeyPolicyChanged, Field(discriminator="type")],
    config=ConfigDict(hide_input_in_errors=True),
)


async def subscribe_keys(client: Client, keys: VerifiedKeys) -> None:
    """Have what is remembered of a key forgotten when keyvault says that it changed.

    A plain subscription: what is remembered is young enough not to need what was said while nobody listened.
    """

    async def heard(message: Msg) -> None:
        forget(message.data, keys)

    await client.subscribe(KEY_FACTS, cb=heard)


def forget(fact_body: bytes, keys: VerifiedKeys) -> None:
    """Forget what a fact makes untrue; everything, if it is not understood."""
    try:
        fact = _FACTS.validate_json(fact_body)
    except ValidationError as error:
        log.warning("a fact about keys is not readable, all keys are verified anew", problems=error.error_count())
        keys.forget_all()
        return
    match fact:
        case KeyDisabled():
            keys.forget_key(fact.key_id)
        case KeyPolicyChanged():
            keys.forget_below(fact.account)
        case KeyCreated():
            pass
