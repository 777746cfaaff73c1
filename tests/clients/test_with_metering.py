"""With the real metering, ledger, NATS and Postgres: what was accepted is charged, once, whatever happens between."""

import json
import os
import random
import signal
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from decimal import Decimal
from pathlib import Path
from subprocess import Popen
from typing import Final

import pytest

from scrip_client import AsyncScrip, Scrip
from tests.clients.reporter import ACCOUNT, use
from tests.clients.running import Services, reporting, until

GRANTED: Final = Decimal(100)
COST: Final = Decimal("0.00015")


def client_of(services: Services, spool: Path) -> Scrip:
    return Scrip(services.metering_url, source="demo", token=services.tokens["demo"], spool=spool)


def arguments(services: Services, spool: Path, name: str, count: int) -> tuple[str, ...]:
    return (services.metering_url, services.tokens["demo"], str(spool), name, str(count))


def open_account(services: Services) -> None:
    services.open(ACCOUNT, {"usd": str(GRANTED)})


def charged_once(services: Services, logged: int) -> None:
    """All that was logged was charged, and nothing twice."""
    left = f"{GRANTED - logged * COST:f}".rstrip("0").rstrip(".")
    services.until_wallet(ACCOUNT, "usd", posted=left)
    counters = services.counters()
    assert (counters["new"], counters["charged"]) == (logged, logged)
    assert counters.keys() <= {"new", "charged", "duplicate"}


def accepted_by(process: "Popen[bytes]", count: int | None = None) -> set[str]:
    """The ids that a process has said were accepted: so many, or all until it ends."""
    assert process.stdout is not None
    found: set[str] = set()
    while count is None or len(found) < count:
        line = process.stdout.readline()
        if not line.endswith(b"\n"):
            break
        found.add(line.decode().strip())
    return found


def test_what_is_reported_while_metering_is_away_is_charged_once_when_it_is_back(
    services: Services, spool: Path
) -> None:
    with services.ledger():
        open_account(services)
        with client_of(services, spool) as client:
            ids = {client.report(use("away", number)) for number in range(300)}
            until(lambda: client.status().failures > 1)
            assert client.status().waiting == 300
            for stay in range(2):
                with services.metering():
                    assert client.flush(20) == 0
                    services.until_logged(len(ids))
                    ids.add(client.report(use("there", stay)))
                    assert client.flush(20) == 0
                ids.add(client.report(use("gone", stay)))
            with services.metering():
                assert client.flush(30) == 0
                services.until_logged(len(ids))
                charged_once(services, len(ids))
        assert services.logged() == ids


def test_events_that_metering_refuses_are_set_apart_and_the_others_charged(services: Services, spool: Path) -> None:
    with services.ledger(), services.metering():
        open_account(services)
        with client_of(services, spool) as client:
            bad = {"type": "scrip.model.used.v1", "subject": ACCOUNT, "data": {"provider": "openai"}}
            good = {client.report(use("good", number)) for number in range(40)}
            refused = {client.report(bad) for _ in range(3)}
            good |= {client.report(use("more", number)) for number in range(40)}
            other = client.report({**bad, "source": "somebody"})
            assert client.flush(20) == 0
            kept = {json.loads(each.body)["id"]: each.problems for each in client.refused()}
            assert kept.keys() == {*refused, other}
            named = {each["field"] for each in kept[next(iter(refused))]}
            assert {"data.model", "data.input_tokens", "data.output_tokens"} <= named
        services.until_logged(80)
        assert services.logged() == good
        charged_once(services, 80)


def test_an_event_of_any_type_is_logged_as_it_was_reported(services: Services, spool: Path) -> None:
    data = {"pages": 3, "share": 0.1, "paper": {"size": "A4", "tags": ["matt", None]}, "who": "Ünsal"}
    with services.metering():
        with client_of(services, spool) as client:
            reported = client.record(ACCOUNT, "pages.printed", data)
            assert client.flush(20) == 0
            assert client.refused() == []
        services.until_logged(1)
        ((event_id, kind, logged),) = services.connection.execute(
            "SELECT event_id, type, data::text FROM usage_log"
        ).fetchall()
        assert (event_id, kind, json.loads(logged)) == (reported, "pages.printed", data)


def test_no_accepted_event_is_lost_or_charged_twice_by_kill_9(services: Services, spool: Path) -> None:
    chance = random.Random(7)
    accepted: set[str] = set()
    with services.ledger():
        open_account(services)
        with ExitStack() as metering:
            for round_ in range(6):
                # Two of them with nobody to deliver to.
                if round_ == 2:
                    metering.enter_context(services.metering())
                with reporting(*arguments(services, spool, f"round-{round_}", 1_000_000)) as process:
                    accepted |= accepted_by(process, chance.randrange(20, 400))
                    process.kill()
                    process.wait()
                    # What it had written before it died.
                    accepted |= accepted_by(process)
            with client_of(services, spool) as client:
                assert client.flush(30) == 0
            until(lambda: accepted <= services.logged(), what="all that was accepted is logged")
            logged = services.logged()
            # One more in each round: on disk, and its id not said yet.
            assert len(accepted) <= len(logged) <= len(accepted) + 6
            charged_once(services, len(logged))


def test_processes_share_a_spool(services: Services, spool: Path) -> None:
    with services.ledger():
        open_account(services)
        with ExitStack() as running:
            processes = [
                running.enter_context(reporting(*arguments(services, spool, f"process-{number}", 300)))
                for number in range(3)
            ]
            forked = running.enter_context(reporting(*arguments(services, spool, "forked", 300), "fork"))
            accepted = set().union(*(accepted_by(process, 100) for process in processes))
            with services.metering():
                accepted |= set().union(*(accepted_by(process) for process in [*processes, forked]))
                accepted = {each for each in accepted if not each.isdigit()}
                assert len(accepted) == 1_200
                assert [process.wait(20) for process in [*processes, forked]] == [0] * 4
                with client_of(services, spool) as client:
                    assert client.flush(30) == 0
                services.until_logged(1_200)
                assert services.logged() == accepted
                charged_once(services, 1_200)


def test_what_a_forked_child_reports_is_kept_though_its_parent_used_the_spool_before(
    services: Services, spool: Path
) -> None:
    """SQLite would believe that the child has the locks of its parent."""
    with services.ledger():
        open_account(services)
        with reporting(*arguments(services, spool, "forked", 2_000), "fork") as process:
            accepted = accepted_by(process, 1_001)
            (child,) = (int(each) for each in accepted if each.isdigit())
            process.wait(20)
            accepted |= accepted_by(process, 400)
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            accepted |= accepted_by(process)
        accepted.remove(str(child))
        with services.metering(), client_of(services, spool) as client:
            assert client.flush(30) == 0
            until(lambda: accepted <= services.logged(), what="all that was accepted is logged")
            assert len(services.logged()) <= len(accepted) + 1
            charged_once(services, len(services.logged()))


@pytest.mark.anyio
async def test_the_async_client_reports_to_it_too(services: Services, spool: Path, tokens: Mapping[str, str]) -> None:
    with services.ledger(), services.metering():
        open_account(services)
        async with AsyncScrip(services.metering_url, source="demo", token=tokens["demo"], spool=spool) as client:
            ids = {await client.report(use("async", number)) for number in range(20)}
            assert await client.flush(20) == 0
        services.until_logged(20)
        assert services.logged() == ids
        charged_once(services, 20)
