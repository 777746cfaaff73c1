"""Laws of `scrip keyring`: what was stored before is leased after, nothing is shown, and errors are sentences."""

import asyncio
import base64
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import httpx2
import pytest
import typer
from typer.testing import CliRunner, Result

from infra import state
from infra.commands import keyring
from infra.errors import StackError
from infra.service_api import ServiceApi
from infra.state import Layout, Run
from services.keyvault.app import build
from services.keyvault.domain.keyring import without
from services.keyvault.translate import keyring_text, read_keyring
from tests.integration.keyvault.driving import OPENAI, Driver, Running
from tests.integration.simulators.serving import serving

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    monkeypatch.setenv(state.STATE_VARIABLE, str(tmp_path))
    return Layout(tmp_path)


def scrip(*arguments: str) -> Result:
    app = typer.Typer()
    keyring.register(app)
    return CliRunner().invoke(app, ["keyring", *arguments], env={"COLUMNS": "200"})


Runs = Callable[[str], None]


@pytest.fixture
def runs(tokens: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    """Have the command find keyvault at a URL."""
    headers = {"Authorization": f"Bearer {tokens['operator']}"}
    with httpx2.Client(headers=headers, timeout=20, trust_env=False) as client:

        def found_at(url: str) -> None:
            monkeypatch.setattr(ServiceApi, "running", lambda service: ServiceApi(service, url, client))
            monkeypatch.setattr(state, "current_run", lambda _layout: Run(supervisor=1, ports={}, processes={}))

        yield found_at


async def test_what_was_stored_before_a_rotation_is_leased_after_it(
    driver: Driver, layout: Layout, tokens: Mapping[str, str], runs: Runs
) -> None:
    ring_file = layout.keyring_file
    assert ring_file == driver.settings.keyring_file
    before = read_keyring(ring_file.read_bytes(), name="ring")
    with serving(build(driver.settings)) as url:
        runs(url)
        headers = {"Authorization": f"Bearer {tokens['operator']}"}
        async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=20) as http:
            keyvault = Running(http)
            await keyvault.choose("acme", "own")
            await keyvault.store("openai", "acme", OPENAI)

            rotated = await asyncio.to_thread(scrip, "rotate")
            assert rotated.exit_code == 0, rotated.output
            assert "version 2 is current; versions 1, 2 can be opened" in rotated.output
            assert "1 secrets rewrapped with version 2" in rotated.output

            ring = read_keyring(ring_file.read_bytes(), name="ring")
            assert (ring.current, ring.keys[1]) == (2, before.keys[1])
            assert ring_file.stat().st_mode & 0o777 == 0o600
            assert await driver.leased("acme", own=True) == OPENAI
            assert (await keyvault.store("openai", "acme/ana", OPENAI))["ring_version"] == 2

            # Nothing is under the old version any more: it may be taken out.
            ring_file.write_bytes(keyring_text(without(ring, 1)))
            assert await driver.leased("acme", own=True) == OPENAI
            for key in ring.keys.values():
                assert base64.b64encode(key).decode() not in rotated.output


async def test_a_rotation_without_a_running_keyvault_is_in_force_when_it_runs_again(driver: Driver, runs: Runs) -> None:
    async with driver.running() as keyvault:
        await keyvault.choose("acme", "own")
        await keyvault.store("openai", "acme", OPENAI)
    rotated = scrip("rotate")
    assert rotated.exit_code == 0
    assert "run scrip keyring rewrap" in rotated.output
    with serving(build(driver.settings)) as url:
        # The old version still opens what it wrapped.
        assert await driver.leased("acme", own=True) == OPENAI
        runs(url)
        rewrapped = await asyncio.to_thread(scrip, "rewrap")
        assert rewrapped.exit_code == 0
        assert rewrapped.output.splitlines() == ["1 secrets rewrapped with version 2", "  version 2: 1 secrets"]
        assert await driver.leased("acme", own=True) == OPENAI


async def test_a_secret_that_cannot_be_rewrapped_is_named(
    driver: Driver, tokens: Mapping[str, str], runs: Runs
) -> None:
    with serving(build(driver.settings)) as url:
        runs(url)
        headers = {"Authorization": f"Bearer {tokens['operator']}"}
        async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=20) as http:
            await Running(http).store("openai", "acme", OPENAI)
        ((record,),) = await driver.rows(
            "UPDATE secrets SET wrapped_key = set_byte(wrapped_key, 20, 255 - get_byte(wrapped_key, 20))"
            " RETURNING record"
        )
        found = await asyncio.to_thread(scrip, "rotate")
        assert found.exit_code == 1
        assert f"could not be opened, and stays as it was: {record}" in found.output


def test_a_keyvault_that_reads_another_ring_is_noticed(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    keyring_text_of_one = {"current": 1, "keys": {"1": base64.b64encode(b"k" * 32).decode()}}
    layout.keyring_file.write_text(json.dumps(keyring_text_of_one))
    answer = httpx2.Response(200, json={"ring_version": 1, "rewrapped": 0, "undecryptable": []})
    client = httpx2.Client(transport=httpx2.MockTransport(lambda _request: answer))
    monkeypatch.setattr(ServiceApi, "running", lambda service: ServiceApi(service, "http://stand-in", client))
    monkeypatch.setattr(state, "current_run", lambda _layout: Run(supervisor=1, ports={}, processes={}))
    found = scrip("rotate")
    assert isinstance(found.exception, StackError)
    assert "Keyvault wraps with version 1, not 2" in str(found.exception)


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "There is no key ring"), ("{ canary", "cannot be rotated"), ('{"current": 1, "keys": {}}', "no version 1")],
)
def test_a_ring_that_cannot_be_rotated_says_why_and_stays(layout: Layout, content: str | None, said: str) -> None:
    if content is not None:
        layout.keyring_file.write_text(content)
    found = scrip("rotate")
    assert isinstance(found.exception, StackError)
    assert said in str(found.exception)
    assert "canary" not in str(found.exception)
    assert str(layout.keyring_file) in str(found.exception)
    assert (layout.keyring_file.read_text() if content is not None else None) == content


def test_help_says_what_becomes_of_old_versions() -> None:
    said = " ".join(scrip("rotate", "--help").output.replace("│", " ").split())
    assert "Older versions stay in the file and open what they wrapped" in said
