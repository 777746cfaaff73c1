"""What billing is told by its environment."""

from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from services.billing.settings import BillingSettings

ENVIRONMENT = {
    "SCRIP_NATS_USER": "billing",
    "SCRIP_NATS_PASSWORD": "x",
    "SCRIP_DATABASE_URL": "postgresql://x",
    "SCRIP_HTTP_PORT": "8083",
    "SCRIP_TOKENS_FILE": "tokens.json",
    "SCRIP_CATALOGUE_FILE": "catalogue.toml",
    "SCRIP_BILLING_CATALOGUE_FILE": "billing.toml",
    "SCRIP_STRIPE_API_KEY": "sk_test_canary",
    "SCRIP_STRIPE_WEBHOOK_SECRETS": "whsec_canary_old, whsec_canary_new",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def test_several_webhook_secrets_are_separated_by_commas() -> None:
    settings = BillingSettings()
    assert [each.get_secret_value() for each in settings.stripe_webhook_secrets] == [
        "whsec_canary_old",
        "whsec_canary_new",
    ]
    assert settings.billing_catalogue_file == Path("billing.toml")
    assert settings.stripe_api_base is None


def test_no_secret_is_shown() -> None:
    assert "canary" not in repr(BillingSettings())


def test_an_empty_base_is_the_real_stripe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRIP_STRIPE_API_BASE", "")
    assert BillingSettings().stripe_api_base is None
    monkeypatch.setenv("SCRIP_STRIPE_API_BASE", "http://127.0.0.1:8087/")
    assert BillingSettings().stripe_api_base == "http://127.0.0.1:8087"


@pytest.mark.parametrize("name", ["SCRIP_STRIPE_WEBHOOK_SECRETS", "SCRIP_STRIPE_API_KEY"])
def test_without_secrets_it_does_not_start(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "" if name.endswith("KEY") else " , ")
    with pytest.raises(ValidationError):
        BillingSettings()


def test_secrets_are_taken_as_they_are_in_tests() -> None:
    values = BillingSettings().model_dump() | {"stripe_webhook_secrets": (SecretStr("whsec_1"),)}
    assert BillingSettings(**values).stripe_webhook_secrets == (SecretStr("whsec_1"),)
