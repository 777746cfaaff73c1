"""Canary secrets, planted everywhere a caller can put one, are found nowhere but where they were asked for."""

import json
import logging
from pathlib import Path

import httpx2
import pytest

from services.keyvault import store
from tests.integration.keyvault.driving import ANTHROPIC, OPENAI, Driver, Running, StandInLedger
from tests.traces import traced

pytestmark = pytest.mark.anyio

# Any run of this many characters of a secret counts as found.
WINDOW = 12
COMMON = ("sk-proj-", "sk-ant-api03-")


def pieces(secret: str) -> set[str]:
    """What of a secret must not be found. The id in an access key may be."""
    if secret.startswith("sk-scrip-"):
        secret = secret[-43:]
    for prefix in COMMON:
        secret = secret.removeprefix(prefix)
    return {secret[start : start + WINDOW] for start in range(len(secret) - WINDOW + 1)}


def found_in(text: str, secrets: list[str]) -> list[str]:
    lowered = text.lower()
    hexadecimal = [piece.encode().hex() for secret in secrets for piece in pieces(secret)]
    plain = [piece for secret in secrets for piece in pieces(secret) if piece in text]
    return plain + [piece for piece in hexadecimal if piece in lowered]


class Log(logging.Handler):
    """Every line as a service writes it, and everything the record itself holds."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__(level=logging.DEBUG)
        self.setFormatter(formatter)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.__dict__} {self.format(record)}")


@pytest.fixture
def log() -> "logging.Handler":
    root = logging.getLogger()
    formatter = root.handlers[0].formatter
    assert formatter is not None
    return Log(formatter)


async def mistaken(keyvault: Running, secret: str) -> None:
    """Everything that callers do wrong with a secret in their hands."""
    headers = {"Content-Type": "application/json"}
    bodies = [
        secret,
        json.dumps(secret),
        json.dumps([secret]),
        json.dumps({secret: secret}),
        json.dumps({"secret": secret, secret: 1}),
        json.dumps({"secret": [secret]}),
        json.dumps({"secret": {"text": secret}}),
        json.dumps({"secret": secret, "ttl_seconds": secret}),
        json.dumps({"secret": f" {secret}"}),
        json.dumps({"secret": secret * 200}),
        json.dumps({"secret": f"{secret}\x00"}),
        json.dumps({"secret": secret})[:-1],
        json.dumps({"account": secret, "caps": [{"unit": secret, "amount": secret}], "name": {secret: 1}}),
        json.dumps({"policy": secret, "consent": secret}),
        json.dumps({"key": [secret]}),
        json.dumps({"reason": [secret]}),
    ]
    for body in bodies:
        for method, path in (
            ("PUT", "/v1/secrets/groq/acme"),
            ("PUT", "/v1/platform-secrets/groq"),
            ("POST", "/v1/access-keys"),
            ("POST", "/v1/access-keys/verify"),
            ("POST", "/v1/access-keys/key_00000000/disable"),
            ("PUT", "/v1/policies/acme"),
        ):
            await _sent(keyvault, method, path, content=body.encode(), headers=headers)
    for raw in (secret.encode(), b"\xff" + secret.encode()):
        await _sent(keyvault, "PUT", "/v1/secrets/groq/acme", content=raw)
    for path in (
        f"/v1/secrets/{secret}/acme",
        f"/v1/secrets/groq/{secret}//x",
        f"/v1/secrets/groq/acme?name={secret}%00",
        f"/v1/secrets?account={secret}//",
        f"/v1/access-keys?before={secret}",
        f"/v1/audit?before={secret}",
        f"/v1/audit?{secret}=1",
        f"/v1/secret-uses/{secret}",
        f"/nowhere/{secret}",
    ):
        await _sent(keyvault, "GET", path)
    await _sent(keyvault, "POST", "/v1/access-keys", json={"account": "a"}, headers={"Idempotency-Key": secret * 9})


async def _sent(keyvault: Running, method: str, path: str, **options: object) -> None:
    response: httpx2.Response = await keyvault.http.request(method, path, **options)  # type: ignore[arg-type]  # whatever
    assert response.status_code < 500, f"{method} {path}: {response.text}"
    assert response.status_code >= 400 or "verify" in path, f"{method} {path}: {response.text}"
    keyvault.said.append(f"{response.headers} {response.text}")


async def test_no_secret_is_found_where_it_should_not_be(  # noqa: PLR0917 - fixtures
    driver: Driver,
    ledger: StandInLedger,
    log: Log,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    traces = tmp_path / "traces.jsonl"
    ring = driver.settings.keyring_file.read_text()
    # The test's own client says where it went.
    for client in ("httpx2", "httpcore2"):
        monkeypatch.setattr(logging.getLogger(client), "propagate", False)
    logging.getLogger().addHandler(log)
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.DEBUG)
    try:
        with traced(traces):
            async with driver.running() as keyvault:
                await keyvault.store("openai", "acme", OPENAI)
                await keyvault.store("mistral", "acme", ANTHROPIC.replace("sk-ant", "any-ant"))
                await keyvault.store_platform("anthropic", ANTHROPIC)
                await keyvault.choose("acme", "own_then_credits", consent=True)
                created = await keyvault.create_key("acme", key="request-1")
                key = created["key"]
                # The one answer that holds the key.
                keyvault.said.clear()
                await driver.verify(key)
                assert await driver.leased("acme", own=True) == OPENAI
                assert await driver.leased("acme", "anthropic", own=False) == ANTHROPIC
                await keyvault.ask("POST", "/v1/access-keys/verify", expect=200, json={"key": key})
                for secret in (OPENAI, ANTHROPIC, key):
                    await mistaken(keyvault, secret)
                await keyvault.ask("POST", "/v1/keyring/rewrap", expect=200)
                for path in (
                    "/v1/secrets/openai/acme",
                    "/v1/secrets?account=acme",
                    "/v1/platform-secrets",
                    "/v1/access-keys",
                    "/v1/audit",
                    "/v1/keyring",
                    "/metrics",
                    "/openapi.json",
                ):
                    await _read(keyvault, path)
                await _failing(driver, keyvault, monkeypatch)
                await driver.until("SELECT coalesce(sum(times), 0) FROM secret_uses", 2)
                await driver.until("SELECT coalesce(max(number), 0) FROM relayed", 4)
                dump = await driver.dump()
                messages = b"\n".join(await driver.all_messages()).decode(errors="replace")
    finally:
        logging.getLogger().removeHandler(log)
        logging.getLogger().setLevel(level)
    captured = capfd.readouterr()
    keys = [str(each) for each in json.loads(ring)["keys"].values()]
    planted = [OPENAI, ANTHROPIC, key, *keys]
    assert log.lines
    assert "secret_stored" in dump
    assert "keyvault.key.created.v1" in messages
    seen = traces.read_text()
    assert '"keyvault lease"' in seen
    assert "PUT /v1/secrets/{provider}/{account:path}" in seen
    for place, text in {
        "tables": dump,
        "messages": messages,
        "answers": "\n".join(keyvault.said),
        "log": "\n".join(log.lines),
        "output": captured.out + captured.err,
        "traces": seen,
    }.items():
        assert found_in(text, planted) == [], place


async def _read(keyvault: Running, path: str) -> None:
    response = await keyvault.http.get(path)
    assert response.status_code == 200
    keyvault.said.append(response.text)


async def _failing(driver: Driver, keyvault: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults in the middle: what is logged and answered then."""

    async def broken(*_arguments: object, **_named: object) -> None:
        raise RuntimeError("broken for a test")

    keyvault.http._transport.raise_app_exceptions = False  # type: ignore[attr-defined]  # ASGITransport has it
    with monkeypatch.context() as patched:
        patched.setattr(store, "put_secret", broken)
        patched.setattr(store, "add_key", broken)
        patched.setattr(store, "find_key", broken)
        response = await keyvault.http.put("/v1/secrets/openai/acme", json={"secret": OPENAI})
        assert response.status_code == 500
        keyvault.said.append(response.text)
        response = await keyvault.http.post("/v1/access-keys", json={"account": "acme"})
        assert response.status_code == 500
        keyvault.said.append(response.text)
        response = await keyvault.http.post("/v1/access-keys/verify", json={"key": ANTHROPIC})
        assert response.status_code == 500
        keyvault.said.append(response.text)
        await driver.verify(ANTHROPIC)
