"""Gives keyvault the platform's provider secret: calls paid with credits are made with it."""

from typing import Final

import httpx2

from infra.errors import StackError

DEADLINE_SECONDS: Final = 10.0


def store(*, keyvault_url: str, token: str, provider: str, secret: str) -> None:
    """Store it, unless keyvault has one that ends alike: a start changes no secret that an operator has not changed."""
    url = f"{keyvault_url}/v1/platform-secrets/{provider}"
    try:
        with httpx2.Client(
            headers={"authorization": f"Bearer {token}"}, timeout=DEADLINE_SECONDS, trust_env=False
        ) as client:
            known = client.get(url)
            if known.status_code == httpx2.codes.OK and known.json()["last4"] == secret[-4:]:
                return
            stored = client.put(url, json={"secret": secret})
    except httpx2.HTTPError as error:
        raise StackError(f"The {provider} key could not be stored: keyvault did not answer ({error}).") from error
    if not stored.is_success:
        reason = stored.json().get("detail", stored.status_code)
        raise StackError(f"The {provider} key was not taken by keyvault ({reason}): check the variable that holds it.")
