"""The publisher ends in one sentence when whoever started it is gone, and is of no use without its environment."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from contracts.streams import USERS
from infra.demo.events import SOURCE
from infra.demo.publish import ENDED_EARLY, PASSWORD_VARIABLE, URL_VARIABLE
from infra.nats_config import Account, accounts_config
from infra.servers import EmbeddedNats, free_port
from tests.conftest import NatsAccount, refresh_streams
from tests.servers import password

SECRET: Final = "own"
COMMAND: Final = (sys.executable, "-m", "infra.demo.publish", "--anchor", "2026-03-14T12:00:00+00:00")
SECONDS_MAX: Final = 20


@pytest.fixture
def nats_url(tmp_path: Path) -> Iterator[str]:
    """A server whose users have the names they have in a stack."""
    passwords = {user.name: password(SECRET, user.name) for user in USERS}
    with EmbeddedNats(
        tmp_path / "nats", accounts=accounts_config([Account("W0", passwords)]), port=free_port()
    ) as nats:
        asyncio.run(refresh_streams(NatsAccount(nats.url, SECRET, "")))
        yield nats.url


@pytest.fixture
def publisher(nats_url: str) -> Iterator[subprocess.Popen[str]]:
    """It has begun to publish, and would take more than a minute."""
    environment = dict(os.environ) | {URL_VARIABLE: nats_url, PASSWORD_VARIABLE: password(SECRET, SOURCE)}
    process = subprocess.Popen(
        [*COMMAND, "--batch", "50", "--rate", "200"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert "confirmed" in process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_publisher_whose_demo_is_gone_ends_with_one_sentence(publisher: subprocess.Popen[str]) -> None:
    assert publisher.stdout is not None
    assert publisher.stderr is not None
    publisher.stdout.close()
    said = publisher.stderr.read()
    assert publisher.wait(SECONDS_MAX) == 130
    assert said == f"{ENDED_EARLY}\n"


def test_a_publisher_that_is_interrupted_ends_with_one_sentence(publisher: subprocess.Popen[str]) -> None:
    publisher.send_signal(signal.SIGINT)
    _, said = publisher.communicate(timeout=SECONDS_MAX)
    assert publisher.returncode == 130
    assert said == f"{ENDED_EARLY}\n"


def test_a_publisher_without_an_environment_says_who_has_one() -> None:
    bare = {name: value for name, value in os.environ.items() if name not in (URL_VARIABLE, PASSWORD_VARIABLE)}
    ended = subprocess.run(COMMAND, env=bare, capture_output=True, text=True, timeout=SECONDS_MAX, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("publisher: the environment lacks")
    assert ended.stderr.count("\n") == 1
