"""What the local stack runs besides its servers: our services, and simulators where no real key is set.

A service is told everything by its environment; nothing else about the machine is known to it.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from infra.servers import LOOPBACK
from infra.state import Credentials, Layout

OPENAI_KEY_VARIABLE: Final = "SCRIP_OPENAI_API_KEY"
STRIPE_KEY_VARIABLE: Final = "SCRIP_STRIPE_API_KEY"

# A private key in PEM form, instead of the file that is made at the first start.
SIGNING_KEY_VARIABLE: Final = "SCRIP_LEDGER_SIGNING_KEY"

# Set to 1, another ledger runs beside the one that owns the partitions, and only answers.
LEDGER_READER_VARIABLE: Final = "SCRIP_LEDGER_READER"

USAGE_AGE_VARIABLE: Final = "SCRIP_METERING_AGE_DAYS_MAX"

OPENAI_URL: Final = "https://api.openai.com/v1"

# Accepted by the simulators, and by nobody else.
SIMULATED_OPENAI_KEY: Final = "sk-sim-platform-0123456789abcdef"
SIMULATED_STRIPE_KEY: Final = "sk_test_simulated"

_CATALOGUE: Final = Path(__file__).parent / "catalogue"


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Where a stack lies, its ports, and its credentials."""

    layout: Layout
    ports: Mapping[str, int]
    credentials: Credentials

    def url(self, name: str) -> str:
        """Where a service answers."""
        return f"http://{LOOPBACK}:{self.ports[name]}"


@dataclass(frozen=True, slots=True)
class Service:
    """A process of ours: `python -m <module>`. Its name is also its port's, and that of its NATS user and schema.

    `beside`: the service whose NATS user and schema it shares. `told`: the variables that only it is told, beyond those
    of every service.
    """

    name: str
    module: str
    has_schema: bool = True
    has_nats: bool = True
    credentials: str = "bearer token: tokens.<principal>"
    beside: str | None = None
    told: Callable[[Surroundings], dict[str, str]] = lambda _: {}

    @property
    def role(self) -> str:
        """Its NATS user, and its role and schema in Postgres."""
        return self.beside or self.name


def simulators() -> tuple[Service, ...]:
    """Who stands in: a simulator for each real key that is not set."""
    wanted = ((OPENAI_KEY_VARIABLE, PROVIDER), (STRIPE_KEY_VARIABLE, STRIPE))
    return tuple(simulator for variable, simulator in wanted if not os.environ.get(variable))


def chosen_services() -> tuple[Service, ...]:
    """Ours, in the order in which they are started."""
    return (*SERVICES, LEDGER_READER) if os.environ.get(LEDGER_READER_VARIABLE) == "1" else SERVICES


def openai_key() -> str:
    """The platform's provider secret: the real one, or what the simulator accepts."""
    return os.environ.get(OPENAI_KEY_VARIABLE) or SIMULATED_OPENAI_KEY


def _gateway(around: Surroundings) -> dict[str, str]:
    openai = OPENAI_URL if os.environ.get(OPENAI_KEY_VARIABLE) else f"{around.url('provider')}/v1"
    return {
        "SCRIP_METERING_URL": around.url("metering"),
        "SCRIP_METERING_TOKEN": around.credentials.tokens["gateway"],
        "SCRIP_SPOOL_FILE": str(around.layout.directory / "gateway-spool.sqlite"),
        "SCRIP_PROVIDERS": json.dumps({"openai": {"base_url": openai}}),
    }


def _ledger(around: Surroundings) -> dict[str, str]:
    told = {"SCRIP_LEDGER_SIGNING_KEY_FILE": str(around.layout.ledger_signing_key_file)}
    # It is used instead.
    if given := os.environ.get(SIGNING_KEY_VARIABLE):
        told[SIGNING_KEY_VARIABLE] = given
    return told


def _ledger_reader(_: Surroundings) -> dict[str, str]:
    return {"SCRIP_LEDGER_OWNS": "false"}


def _metering(_: Surroundings) -> dict[str, str]:
    # The demo sends what it sent first for ever, at the times of its first run: on this machine that is never too old.
    return {USAGE_AGE_VARIABLE: os.environ.get(USAGE_AGE_VARIABLE) or "36500"}


def _keyvault(around: Surroundings) -> dict[str, str]:
    return {"SCRIP_KEYRING_FILE": str(around.layout.keyring_file)}


def _billing(around: Surroundings) -> dict[str, str]:
    told = {"SCRIP_BILLING_CATALOGUE_FILE": str(_CATALOGUE / "billing.toml")}
    if os.environ.get(STRIPE_KEY_VARIABLE):
        # The key and SCRIP_STRIPE_WEBHOOK_SECRETS are inherited.
        return told
    return told | {
        STRIPE_KEY_VARIABLE: SIMULATED_STRIPE_KEY,
        "SCRIP_STRIPE_WEBHOOK_SECRETS": around.credentials.webhook_secret,
        "SCRIP_STRIPE_API_BASE": around.url("stripe"),
    }


def _stripe(around: Surroundings) -> dict[str, str]:
    return {
        "SCRIP_PORT_STRIPE": str(around.ports["stripe"]),
        "SCRIP_STRIPE_WEBHOOK_URL": f"{around.url('billing')}/stripe/webhook",
        "SCRIP_STRIPE_WEBHOOK_SECRET": around.credentials.webhook_secret,
        "SCRIP_STRIPE_STATE": str(around.layout.directory / "stripe-simulator.sqlite"),
        # As the real one does now and then: twice, and out of order.
        "SCRIP_STRIPE_DUPLICATE": "0.5",
        "SCRIP_STRIPE_REORDER": "0.2",
    }


def _provider(around: Surroundings) -> dict[str, str]:
    return {
        "SCRIP_PORT_PROVIDER": str(around.ports["provider"]),
        "SCRIP_PROVIDER_STATE": str(around.layout.directory / "provider-simulator.json"),
    }


KEYVAULT: Final = "keyvault"

PROVIDER: Final = Service(
    name="provider",
    module="infra.simulators.provider",
    has_schema=False,
    has_nats=False,
    credentials="simulated: any key that begins with sk-sim-",
    told=_provider,
)
STRIPE: Final = Service(
    name="stripe",
    module="infra.simulators.stripe",
    has_schema=False,
    has_nats=False,
    credentials="simulated: any key that begins with sk_test_",
    told=_stripe,
)

# In the order in which they are started.
SERVICES: Final = (
    Service(name="ledger", module="services.ledger.app", told=_ledger),
    Service(name="metering", module="services.metering.app", told=_metering),
    Service(name=KEYVAULT, module="services.keyvault.app", told=_keyvault),
    Service(name="billing", module="services.billing.app", told=_billing),
    Service(
        name="gateway",
        module="services.gateway.app",
        has_schema=False,
        credentials="access key, made by keyvault",
        told=_gateway,
    ),
)

LEDGER_READER: Final = Service(name="ledger_reader", module="services.ledger.app", beside="ledger", told=_ledger_reader)
