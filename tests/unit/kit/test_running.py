"""A process ends with a task that it cannot do without, and does not wait for ever for one that is stuck."""

import asyncio
import signal

import pytest
from psycopg.conninfo import conninfo_to_dict
from pydantic import SecretStr

from services.kit.running import BY_STATISTICS, essential_task, finish_tasks, url_with_options

pytestmark = pytest.mark.anyio


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    signals: list[int] = []
    monkeypatch.setattr("services.kit.running.os.kill", lambda _pid, number: signals.append(number))
    return signals


async def test_a_task_that_fails_ends_the_process(killed: list[int]) -> None:
    async def failing() -> None:
        raise RuntimeError("a mistake of ours")

    task = essential_task(failing(), name="failing")
    await asyncio.wait([task])
    assert killed == [signal.SIGTERM]


async def test_a_task_that_returns_or_is_cancelled_does_not(killed: list[int]) -> None:
    returning = essential_task(asyncio.sleep(0), name="returning")
    cancelled = essential_task(asyncio.sleep(60), name="cancelled")
    cancelled.cancel()
    await asyncio.wait([returning, cancelled])
    assert killed == []


async def test_finishing_waits_for_those_that_end_and_cancels_those_that_do_not(killed: list[int]) -> None:
    done: list[str] = []

    async def ending() -> None:
        await asyncio.sleep(0.01)
        done.append("ended")

    tasks = [essential_task(ending(), name="ending"), essential_task(asyncio.sleep(60), name="stuck")]
    await asyncio.wait_for(finish_tasks(tasks, deadline_seconds=0.2), 5)
    assert done == ["ended"]
    assert tasks[1].cancelled()
    await finish_tasks([], deadline_seconds=0.2)
    assert killed == []


def test_a_url_keeps_its_secret_and_gets_its_options() -> None:
    url = url_with_options(SecretStr("postgresql://ledger:secret@127.0.0.1/scrip"), statement_timeout="10s")
    assert "secret" not in repr(url)
    parameters = conninfo_to_dict(url.get_secret_value())
    assert (parameters["password"], parameters["dbname"]) == ("secret", "scrip")
    options = str(parameters["options"]).removeprefix("-c ").split(" -c ")
    assert options[0] == "timezone=UTC"
    assert options[-1] == "statement_timeout=10s"
    assert "enable_seqscan=off" in options


def test_questions_about_much_are_planned_by_statistics() -> None:
    url = url_with_options(SecretStr("postgresql://metering@127.0.0.1/scrip"), **BY_STATISTICS)
    options = str(conninfo_to_dict(url.get_secret_value())["options"])
    assert "enable_seqscan=on" in options
    assert "off" not in options
