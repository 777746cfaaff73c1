"""Laws of limits: who has used at least a share of a cap in the running period, over all partitions, page by page."""

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import pytest

from contracts import ledger as words
from contracts.partition import partition_of
from services.kit.ids import new_hold_id
from services.ledger.queries import limits
from tests.builders import charge_line, hold_leg, place_hold
from tests.eventually import eventually
from tests.integration.ledger.driving import Driver

pytestmark = pytest.mark.anyio


async def opened(driver: Driver, account: str, unit: str = "tokens", **terms: Any) -> None:
    wallets = (words.WalletSpec(unit=unit, **terms),)
    await driver.accepted(words.OpenAccount(idempotency_key=driver.key(), account=account, wallets=wallets))


async def granted(driver: Driver, account: str, amount: str, unit: str = "tokens", **more: Any) -> None:
    await driver.accepted(words.Grant(idempotency_key=driver.key(), account=account, unit=unit, amount=amount, **more))


async def charged(driver: Driver, account: str, amount: str, unit: str = "tokens") -> None:
    key = driver.key()
    line = charge_line(key, account=account, amounts={unit: amount}, occurred_at=datetime.now(tz=UTC))
    await driver.accepted(words.Charge(idempotency_key=key, line=line))


async def asked(client: httpx2.AsyncClient, **query: str) -> list[Mapping[str, Any]]:
    """All pages."""
    found: list[Mapping[str, Any]] = []
    after = ""
    for _ in range(100):
        answer = await client.get("/v1/limits", params={**query, "after": after})
        assert answer.status_code == httpx2.codes.OK, answer.text
        page = answer.json()
        found += page["limits"]
        if page["next_after"] is None:
            return found
        after = page["next_after"]
    raise AssertionError("the pages do not end")


async def names(client: httpx2.AsyncClient, **query: str) -> list[str]:
    return [each["account"] for each in await asked(client, **query)]


async def test_who_is_at_a_share_of_a_limit_is_found_in_all_partitions(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = replace(driver, settings=driver.settings.model_copy(update={"sweep_seconds": 600.0}))
    async with driver.running() as client:
        uses = {"org0": "50", "org1": "79", "org2": "80", "org3": "95", "org3/ana": "100", "org4": "120", "org5": "0"}
        assert len({partition_of(account) for account in uses}) > 1
        for account, use in uses.items():
            await opened(driver, account, policy="soft")
            await granted(driver, account, "100")
            if use != "0" and "/" not in account:
                await charged(driver, account, use)
        # What is counted on ana is counted on her organisation, too.
        await charged(driver, "org3/ana", "100")
        await opened(driver, "free", policy="unlimited")
        await charged(driver, "free", "1000")
        await opened(driver, "none", policy="soft")
        await charged(driver, "none", "1")
        await driver.funded("rich", "10")
        await charged(driver, "rich", "10", "usd")
        everybody = ["none", "org2", "org3", "org3/ana", "org4"]
        assert await names(client) == everybody
        assert await names(client, share="0.79") == ["none", "org1", *everybody[1:]]
        assert await names(client, share="0.7901") == everybody
        assert await names(client, share="1.2") == ["none", "org3", "org4"]
        assert await names(client, share="0") == ["none", "org0", "org1", *everybody[1:]]
        assert await names(client, root="org3") == ["org3", "org3/ana"]
        assert await names(client, root="org") == []
        assert await names(client, unit="calls") == []
        assert await names(client, limit="1") == everybody
        by_account = {each["account"]: each for each in await asked(client, unit="tokens")}
        shown = ("limit", "used", "share", "available", "overage", "renews_at")
        assert [by_account["org4"][name] for name in shown] == ["100", "120", "1.2000", "0", "20", None]
        assert [by_account["org3"][name] for name in shown] == ["100", "195", "1.9500", "0", "95", None]
        assert [by_account["org2"][name] for name in shown] == ["100", "80", "0.8000", "20", "0", None]
        assert [by_account["none"][name] for name in shown] == ["0", "1", None, "0", "1", None]
        # However little is looked at for a page.
        monkeypatch.setattr(limits, "_CANDIDATES", _looking_at(2))
        monkeypatch.setattr(limits, "ACCOUNTS_MAX", 2)
        assert await names(client) == everybody
        for query, code in (
            ({"unit": "usd"}, "no_cap"),
            ({"unit": "gold"}, "unknown_unit"),
            ({"share": "-1"}, "invalid_request"),
            ({"root": "a//b"}, "invalid_account"),
        ):
            answer = await client.get("/v1/limits", params=query)
            assert (answer.status_code, answer.json()["code"]) == (422, code)


def _looking_at(accounts: int) -> Any:
    text = limits._CANDIDATES.as_string(None)
    assert text.count(f"LIMIT {limits.ACCOUNTS_MAX}\n") == 1
    return text.replace(f"LIMIT {limits.ACCOUNTS_MAX}\n", f"LIMIT {accounts}\n").encode()


async def test_a_share_is_that_of_the_moment_though_nobody_has_swept(driver: Driver) -> None:
    driver = replace(driver, settings=driver.settings.model_copy(update={"sweep_seconds": 600.0}))
    async with driver.running() as client:
        began = time.monotonic()
        for account in ("renewed", "ending", "estimated"):
            await opened(driver, account)
        await granted(driver, "ending", "100")
        await granted(driver, "estimated", "100")
        # The rest is done before that, on a slow machine, too.
        lifetime = math.ceil(4 * (time.monotonic() - began))
        soon = datetime.now(tz=UTC) + timedelta(seconds=lifetime)
        rule = words.RuleSpec(id="d", unit="tokens", amount="100", period="day", anchor=soon - timedelta(days=1))
        await driver.accepted(words.SetRule(idempotency_key="r", account="renewed", rule=rule))
        await charged(driver, "renewed", "100")
        await granted(driver, "ending", "100", kind="promo", expires_at=soon, priority=200)
        await charged(driver, "ending", "90")
        hold = place_hold(new_hold_id("estimated"), hold_leg("tokens", "85"), account="estimated", key="h")
        hold = hold.model_copy(update={"lifetime_seconds": lifetime, "overdue": "charge_estimate"})
        held = await driver.accepted(hold)
        (before,) = await asked(client)
        assert (before["account"], before["share"]) == ("renewed", "1.0000")
        assert datetime.fromisoformat(before["renews_at"]) == soon
        ended = held.recorded_at + timedelta(seconds=lifetime)
        await eventually(lambda: datetime.now(tz=UTC) > ended, seconds=2 * lifetime)
        stored = await driver.dump()
        after = {each["account"]: each["share"] for each in await asked(client)}
        assert after == {"ending": "0.9000", "estimated": "0.8500"}
        assert await driver.dump() == stored
