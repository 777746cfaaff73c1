"""Laws of every command: dry runs and refusals leave no trace, an outcome is replayed, a key is used once."""

from base64 import b64decode
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import pytest
from pydantic import SecretStr

from contracts import ledger as words
from contracts.metering import Scope
from contracts.money import Amount
from services.kit.ids import new_hold_id
from services.ledger.replay import replay
from services.ledger.signing import heads_of, is_signed, new_key, signer
from tests.builders import charge_line, charges_rated, grant, hold_leg, open_account, place_hold, release_hold
from tests.conftest import Database
from tests.eventually import eventually
from tests.integration.ledger.driving import Driver

pytestmark = pytest.mark.anyio

ANCHOR = datetime(2026, 1, 31, tzinfo=UTC)
UNKNOWN_LOT = "lot_62_01980000-0000-7000-8000-000000000000"


def usd(amount: str) -> Amount:
    return Amount(amount=amount, unit="usd")


def rule(name: str, amount: str = "1000", **more: Any) -> words.RuleSpec:
    """A monthly grant of tokens."""
    return words.RuleSpec(id=name, unit="tokens", amount=amount, period="month", anchor=ANCHOR, first_period=8, **more)


def unswept(driver: Driver) -> Driver:
    """Nothing is done but what is asked for."""
    return replace(driver, settings=driver.settings.model_copy(update={"sweep_seconds": 3600.0}))


async def furnished(driver: Driver) -> tuple[str, str]:
    """acme has usd and tokens, ana below it usd; a hold of 10 is open, 5 usd were charged. The lot and the hold."""
    wallets = (words.WalletSpec(unit="usd"), words.WalletSpec(unit="tokens"))
    await driver.accepted(words.OpenAccount(idempotency_key="o1", account="acme", wallets=wallets))
    await driver.accepted(open_account("acme/ana", "usd", key="o2"))
    granted = await driver.accepted(grant("acme", "100", key="g1"))
    hold = new_hold_id("acme")
    await driver.accepted(place_hold(hold, hold_leg("usd", "10"), key="h1"))
    await driver.accepted(words.Charge(idempotency_key="c1", line=charge_line("e1", usd="5")))
    lot = granted.movements[0].lot
    assert lot is not None
    return lot, hold


# Each in turn: what is accepted, a change of it that makes another command of it, what is refused, and why.
Case = tuple[words.Command, dict[str, Any], words.Command, str]


def cases(lot: str, hold: str) -> Sequence[Case]:
    new, bad = new_hold_id("acme"), new_hold_id("acme")
    scope = Scope(provider="openai", model="gpt-4o")
    later = datetime.now(tz=UTC) + timedelta(days=1)
    return [
        (
            open_account("acme/bob", "usd", key="1"),
            {"account": "acme/eve"},
            words.OpenAccount(
                idempotency_key="x1", account="acme", wallets=(words.WalletSpec(unit="usd", policy="soft"),)
            ),
            "wallet_policy_differs",
        ),
        (
            words.SetWallet(
                idempotency_key="2",
                account="acme",
                wallet=words.WalletSpec(unit="usd", overdraft="3", thresholds=(words.Threshold(percent=50),)),
            ),
            {"wallet": words.WalletSpec(unit="usd")},
            words.SetWallet(
                idempotency_key="x2",
                account="acme",
                wallet=words.WalletSpec(unit="tokens", policy="soft", overdraft="3"),
            ),
            "invalid_terms",
        ),
        (
            words.Grant(
                idempotency_key="3",
                account="acme",
                unit="usd",
                amount="20",
                kind="promo",
                expires_at=later,
                scope=words.LotScope(providers=("openai",)),
                cost_basis="8.00 eur",
            ),
            {"amount": "21"},
            words.Grant(idempotency_key="x3", account="acme/nobody", unit="usd", amount="1"),
            "account_not_open",
        ),
        (
            words.PlaceHold(idempotency_key="4", hold=new, account="acme", legs=(hold_leg("usd", "20"),), scope=scope),
            {"scope": None},
            words.PlaceHold(idempotency_key="x4", hold=bad, account="acme", legs=(hold_leg("usd", "1000"),)),
            "insufficient_funds",
        ),
        (
            words.ExtendHold(
                idempotency_key="5",
                hold=new,
                account="acme",
                lifetime_seconds=3600,
                legs=(hold_leg("usd", "1", "2"),),
            ),
            {"lifetime_seconds": 60},
            words.ExtendHold(idempotency_key="x5", hold=bad, account="acme", lifetime_seconds=60),
            "unknown_hold",
        ),
        (
            words.SettleHold(
                idempotency_key="6", hold=new, account="acme", settlement="s1", amounts=(usd("7"),), final=False
            ),
            {"amounts": (usd("8"),)},
            words.SettleHold(idempotency_key="x6", hold=new, account="acme/ana", settlement="s1", amounts=(usd("7"),)),
            "account_differs",
        ),
        (
            words.SettleHold(idempotency_key="7", hold=new, account="acme", settlement="s2", amounts=(usd("1"),)),
            {"settlement": "s3"},
            # Under another key it is still the same settlement.
            words.SettleHold(idempotency_key="x7", hold=new, account="acme", settlement="s1", amounts=(usd("7"),)),
            "already_charged",
        ),
        (
            release_hold(hold, key="8"),
            {"hold": new},
            release_hold(new, key="x8"),
            "hold_settled",
        ),
        (
            words.Charge(idempotency_key="9", line=charge_line("e2", usd="1")),
            {"line": charge_line("e2", usd="2")},
            words.Charge(idempotency_key="x9", line=charge_line("e1", usd="6")),
            "charge_differs",
        ),
        (
            words.Debit(idempotency_key="10", account="acme", debit="fee", amounts=(usd("2"),)),
            {"debit": "fee-2"},
            words.Debit(idempotency_key="x10", account="acme", debit="more", amounts=(usd("1000"),)),
            "insufficient_funds",
        ),
        (
            words.ReverseCharge(
                idempotency_key="11", account="acme", source="demo", event_id="e1", amounts=(usd("2"),), reason="late"
            ),
            {"reason": None},
            words.ReverseCharge(
                idempotency_key="x11", account="acme", source="demo", event_id="e1", amounts=(usd("6"),)
            ),
            "more_than_charged",
        ),
        (
            words.Adjust(idempotency_key="12", account="acme", unit="usd", amount="-3", reason="mistake"),
            {"amount": "3"},
            words.Adjust(idempotency_key="x12", account="acme", unit="usd", amount="-3000", reason="mistake"),
            "insufficient_funds",
        ),
        (
            words.Transfer(idempotency_key="13", account="acme", to_account="acme/ana", unit="usd", amount="9"),
            {"amount": "8"},
            words.Transfer(idempotency_key="x13", account="acme", to_account="acme", unit="usd", amount="1"),
            "invalid_transfer",
        ),
        (
            words.VoidGrant(idempotency_key="14", account="acme", lot=lot, reason="a mistake"),
            {"reason": None},
            words.VoidGrant(idempotency_key="x14", account="acme", lot=UNKNOWN_LOT),
            "unknown_lot",
        ),
        (
            words.ClaimPayment(
                idempotency_key="15",
                account="acme",
                payment="pi_1",
                claim="dp_1",
                reason="dispute",
                state="open",
                claimed=usd("5"),
            ),
            {"state": "final"},
            words.ClaimPayment(
                idempotency_key="x15",
                account="acme/nobody",
                payment="pi_1",
                claim="dp_2",
                reason="dispute",
                state="open",
                claimed=usd("5"),
            ),
            "account_not_open",
        ),
        (
            words.SetRule(idempotency_key="16", account="acme", rule=rule("tokens", plan="free")),
            {"rule": rule("tokens", "7")},
            words.SetRule(idempotency_key="x16", account="acme", rule=rule("moon", zone="Moon/Tycho")),
            "invalid_rule",
        ),
        (
            words.ChangePlan(idempotency_key="17", account="acme", plan="pro", rules=(rule("tokens-pro", "5000"),)),
            {"at_period_end": True},
            words.ChangePlan(idempotency_key="x17", account="acme/ana", plan="pro", rules=(rule("tokens-pro"),)),
            "wallet_not_open",
        ),
        (
            words.EndRule(idempotency_key="18", account="acme", rule="tokens-pro"),
            {"rule": "tokens"},
            words.EndRule(idempotency_key="x18", account="acme", rule="none"),
            "unknown_rule",
        ),
    ]


async def test_every_command_is_decided_once_and_what_is_not_leaves_no_trace(
    driver: Driver, database: Database
) -> None:
    driver = unswept(driver)
    async with driver.running():
        lot, hold = await furnished(driver)
        asked = set()
        for command, change, refusable, code in cases(lot, hold):
            name = f"{command.command} {command.idempotency_key}"
            asked.add(type(command))
            before = await driver.dump()
            tried = await driver.accepted(command.model_copy(update={"dry_run": True}))
            assert tried.dry_run, name
            refused = await driver.command(refusable)
            assert isinstance(refused, words.Refused), (name, refused)
            assert refused.code == code, (name, refused)
            assert await driver.command(refusable.model_copy(update={"dry_run": True})) == refused, name
            assert await driver.dump() == before, name

            done = await driver.accepted(command)
            assert not done.replayed
            assert not done.dry_run
            assert (tried.exceeded, [each.posted for each in tried.movements], tried.remaining) == (
                done.exceeded,
                [each.posted for each in done.movements],
                done.remaining,
            ), name
            after = await driver.dump()
            assert after["commands"] != before["commands"], name
            assert after["journal"] != before["journal"], name
            assert await driver.accepted(command) == done.model_copy(update={"replayed": True}), name
            again = await driver.accepted(command.model_copy(update={"dry_run": True}))
            assert again == done.model_copy(update={"replayed": True, "dry_run": True}), name
            other = await driver.command(command.model_copy(update=change))
            assert isinstance(other, words.Failed), name
            assert other.code == "conflict", name
            assert await driver.dump() == after, name
        assert asked == set(words.Command.__args__)
        await driver.facts()
        assert replay(database.url("ledger_owner")).is_equal
    # What another process would know: it is read again.
    async with driver.running():
        again = await driver.accepted(open_account("acme/bob", "usd", key="1"))
        assert again.replayed


async def test_what_is_due_is_recorded_before_what_is_accepted_and_never_by_what_is_not(
    driver: Driver, database: Database
) -> None:
    driver = unswept(driver)
    async with driver.running():
        await driver.funded("acme", "5")
        ends = datetime.now(tz=UTC) + timedelta(seconds=1)
        await driver.accepted(
            words.Grant(idempotency_key="g", account="acme", unit="usd", amount="10", expires_at=ends)
        )
        await eventually(lambda: datetime.now(tz=UTC) > ends)
        before = await driver.dump()
        short = await driver.refused(place_hold(new_hold_id("acme"), hold_leg("usd", "6"), key="1"))
        assert short.remaining == usd("5")
        fits = place_hold(new_hold_id("acme"), hold_leg("usd", "5"), key="2")
        tried = await driver.accepted(fits.model_copy(update={"dry_run": True}))
        assert [each.available for each in tried.remaining] == ["0"]
        bad = words.CommandList(
            commands=(grant("acme", "1", key="3"), place_hold(new_hold_id("acme"), hold_leg("usd", "7"), key="4")),
            all_or_nothing=True,
            idempotency_key="list",
        )
        refused = await driver.commands(bad)
        assert isinstance(refused, words.Refused)
        assert (refused.code, refused.index) == ("insufficient_funds", 1)
        assert await driver.dump() == before

        placed = await driver.accepted(fits)
        assert [(each.posted, each.held) for each in placed.movements] == [("0", "5")]
        expired = await driver.rows("SELECT occurred_at, posted FROM journal WHERE kind = 'lot_expired' AND posted < 0")
        assert expired == [(ends, -10 * 10**9)]
        (told,) = await driver.facts(words.LotExpired)
        assert isinstance(told, words.LotExpired)
        assert told.expired == usd("10")
        assert replay(database.url("ledger_owner")).is_equal


async def test_a_charge_may_be_given_back_in_the_batch_that_took_it(driver: Driver, database: Database) -> None:
    async with driver.running():
        await driver.funded("acme", "5")
        back = words.ReverseCharge(idempotency_key="r", account="acme", source="demo", event_id="e1")
        listed = await driver.listed(
            words.Charge(idempotency_key="c", line=charge_line("e1", usd="7")),
            back.model_copy(update={"idempotency_key": "r1", "amounts": (usd("3"),)}),
            back.model_copy(update={"idempotency_key": "r2", "amounts": (usd("5"),)}),
            back,
        )
        codes = [reply.code if isinstance(reply, words.Refused) else reply.status for reply in listed.replies]
        assert codes == ["accepted", "accepted", "more_than_charged", "accepted"]
        assert await driver.rows("SELECT posted FROM wallets") == [(5 * 10**9,)]
        assert len(await driver.rows("SELECT FROM reversals")) == 2
        reversals = await driver.facts(words.ChargeReversed)
        assert [fact.reversed for fact in reversals if isinstance(fact, words.ChargeReversed)] == [
            (usd("3"),),
            (usd("4"),),
        ]
        more = await driver.refused(back.model_copy(update={"idempotency_key": "r3", "amounts": (usd("1"),)}))
        assert more.remaining == usd("0")
        assert replay(database.url("ledger_owner")).is_equal


async def test_a_line_of_a_bundle_may_leave_its_hold_open(driver: Driver) -> None:
    """The worked example 3, through the service."""
    async with driver.running():
        await driver.funded("acme", "20")
        hold = new_hold_id("acme")
        await driver.accepted(place_hold(hold, hold_leg("usd", "10"), key="h"))
        lines = [charge_line(f"e{n}", usd=amount, hold=hold) for n, amount in enumerate(("5", "5", "2"))]
        increments = [line.model_copy(update={"final": False}) for line in lines[:2]]
        await driver.publish(charges_rated(*increments))
        await driver.until("SELECT max(charges_number) FROM heads", 1)
        assert await driver.rows("SELECT posted, held FROM wallets") == [(10 * 10**9, 0)]
        assert await driver.rows("SELECT status FROM holds") == [("placed",)]
        await driver.publish(charges_rated(lines[2], number=2))
        await driver.until("SELECT max(charges_number) FROM heads", 2)
        assert await driver.rows("SELECT posted, held FROM wallets") == [(8 * 10**9, 0)]
        assert await driver.rows("SELECT status FROM holds") == [("settled",)]
        assert len(await driver.facts(words.HoldSettled)) == 1


async def test_what_a_wallet_lets_through_is_said(driver: Driver) -> None:
    async with driver.running():
        soft = words.WalletSpec(unit="usd", policy="soft")
        await driver.accepted(words.OpenAccount(idempotency_key="o", account="acme", wallets=(soft,)))
        placed = await driver.accepted(place_hold(new_hold_id("acme"), hold_leg("usd", "4"), key="h"))
        assert placed.exceeded == (words.Exceeded(account="acme", unit="usd", amount="4"),)
        assert [(each.lot, each.lot_kind, each.held) for each in placed.movements] == [(None, "debt", "4")]
        debited = await driver.accepted(
            words.Debit(idempotency_key="d", account="acme", debit="fee", amounts=(usd("1"),))
        )
        assert debited.exceeded == (words.Exceeded(account="acme", unit="usd", amount="1"),)


async def test_the_owner_of_a_wallet_is_told_of_each_level_once(driver: Driver) -> None:
    async with driver.running():
        levels = (words.Threshold(percent=50), words.Threshold(amount="2"))
        wallet = words.WalletSpec(unit="usd", thresholds=levels)
        await driver.accepted(words.OpenAccount(idempotency_key="o", account="acme", wallets=(wallet,)))
        await driver.accepted(grant("acme", "10", key="g"))
        for number, amount in enumerate(("4", "1", "1", "2", "1", "1")):
            await driver.accepted(
                words.Charge(idempotency_key=f"c{number}", line=charge_line(f"e{number}", usd=amount))
            )
        await driver.accepted(grant("acme", "10", key="g2"))
        told = [
            (type(fact).__name__, fact.available.amount, getattr(fact, "threshold", None))
            for fact in await driver.facts(words.BalanceLow, words.BalanceExhausted, words.BalanceRecovered)
            if isinstance(fact, words.BalanceLow | words.BalanceExhausted | words.BalanceRecovered)
        ]
        assert told == [
            ("BalanceLow", "5", levels[0]),
            ("BalanceLow", "2", levels[1]),
            ("BalanceExhausted", "0", None),
            ("BalanceRecovered", "10", None),
            ("BalanceRecovered", "10", levels[1]),
            ("BalanceRecovered", "10", levels[0]),
        ]


HTTP: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("/v1/accounts", {"account": "acme/eve"}, 200),
    ("/v1/wallets", {"account": "acme", "wallet": {"unit": "usd", "overdraft": "1"}}, 200),
    ("/v1/grants", {"account": "acme", "unit": "usd", "amount": "1"}, 200),
    ("/v1/grants/{lot}/void", {"account": "acme"}, 200),
    ("/v1/adjustments", {"account": "acme", "unit": "usd", "amount": "-1", "reason": "r"}, 200),
    (
        "/v1/holds",
        {
            "hold": new_hold_id("acme"),
            "account": "acme",
            "legs": [{"unit": "usd", "at_least": "1", "at_most": "1"}],
            "overdue": "charge_estimate",
        },
        200,
    ),
    ("/v1/holds/{hold}/extend", {"account": "acme", "lifetime_seconds": 7}, 200),
    (
        "/v1/holds/{hold}/settle",
        {"account": "acme", "settlement": "s", "amounts": [{"amount": "1", "unit": "usd"}]},
        200,
    ),
    ("/v1/holds/{hold}/release", {"account": "acme"}, 200),
    ("/v1/charges/demo/e1/reverse", {"account": "acme"}, 200),
    ("/v1/charges/demo/a%2Fb/c/reverse", {"account": "acme"}, 404),
    ("/v1/debits", {"account": "acme", "debit": "d", "amounts": [{"amount": "1", "unit": "usd"}]}, 200),
    ("/v1/debits", {"account": "acme", "debit": "d", "amounts": [{"amount": "1000", "unit": "usd"}]}, 402),
    ("/v1/transfers", {"account": "acme", "to_account": "acme/ana", "unit": "usd", "amount": "1"}, 200),
    ("/v1/transfers", {"account": "acme", "to_account": "other", "unit": "usd", "amount": "1"}, 422),
    (
        "/v1/rules",
        {
            "account": "acme",
            "rule": {"id": "r", "unit": "tokens", "amount": "5", "period": "week", "anchor": "2026-11-02T00:00:00Z"},
        },
        200,
    ),
    ("/v1/rules/none/end", {"account": "acme"}, 404),
    ("/v1/plans", {"account": "acme", "plan": "free"}, 200),
)


async def test_every_command_has_its_route_and_every_route_is_documented(driver: Driver) -> None:
    async with driver.running() as http:
        lot, hold = await furnished(driver)
        before = await driver.dump()

        async def post(path: str, body: dict[str, Any], key: str | None = "k") -> httpx2.Response:
            url = path.replace("{lot}", lot).replace("{hold}", hold)
            return await http.post(url, json=body, headers={} if key is None else {"Idempotency-Key": key})

        for path, body, status in HTTP:
            found = await post(path, body | {"dry_run": True})
            assert found.status_code == status, (path, found.text)
            if status == 200:
                assert found.json()["dry_run"] is True
        elsewhere = await post("/v1/holds/{hold}/release", {"account": "acme", "hold": new_hold_id("acme")})
        assert [each["pointer"] for each in elsewhere.json()["errors"]] == ["/hold"]
        assert await driver.dump() == before

        document = (await http.get("/openapi.json")).json()
        posts = {path: each["post"] for path, each in document["paths"].items() if "post" in each}
        named = {each["operationId"].split("_v1")[0] for each in posts.values()}
        assert {model.model_fields["command"].default for model in words.Command.__args__} | {"list"} <= named
        reverse = posts["/v1/charges/{source}/{event_id}/reverse"]
        parameters = [each["name"] for each in reverse["parameters"] if each["name"] != "authorization"]
        assert parameters == ["source", "event_id", "Idempotency-Key"]
        schema = reverse["requestBody"]["content"]["application/json"]["schema"]
        assert {"command", "idempotency_key", "source", "event_id"}.isdisjoint(schema["properties"])
        assert schema["required"] == ["account"]


async def test_what_is_too_large_is_said_so(driver: Driver) -> None:
    limited = driver.settings.model_copy(update={"body_bytes_max": 2_000, "list_commands_max": 2})
    driver = replace(driver, settings=limited)
    async with driver.running() as http:
        large = await http.post("/v1/grants", content=b" " * 2_001, headers={"Idempotency-Key": "k"})
        assert (large.status_code, large.json()["code"]) == (413, "body_too_large")
        reply = await driver.commands(
            words.CommandList(commands=tuple(open_account(f"acme/{n}", key=str(n)) for n in range(3)))
        )
        assert isinstance(reply, words.Failed)
        assert reply.code == "invalid"
        assert "at most 2 commands" in reply.message


async def test_each_commit_signs_the_heads_it_moved_and_says_so(driver: Driver) -> None:
    pem = new_key()
    settings = driver.settings.model_copy(update={"ledger_signing_key": SecretStr(pem)})
    driver = replace(driver, settings=settings)
    keys = {signer(pem).key_id: signer(pem).public_key}
    async with driver.running():
        await driver.funded("acme", "5")
        await driver.refused(place_hold(new_hold_id("acme"), hold_leg("usd", "6"), key="1"))
        await driver.funded("other", "5")
        told = [fact for fact in await driver.facts(words.HeadsSigned) if isinstance(fact, words.HeadsSigned)]
        assert len(told) == 4
        stored = {
            (partition, batch): (bytes(chain_hash), heads)
            for partition, batch, chain_hash, heads in await driver.rows(
                "SELECT partition, batch, chain_hash, heads FROM signatures"
            )
        }
        for fact in told:
            assert is_signed(fact.heads, b64decode(fact.signature), key_id=fact.key_id, keys=keys)
            for partition, (batch, chain_hash) in heads_of(fact.heads).items():
                assert stored[partition, batch] == (chain_hash, fact.heads)
        last = await driver.rows("SELECT partition, batch, chain_hash FROM heads WHERE batch > 0")
        assert {(partition, batch): bytes(chain_hash) for partition, batch, chain_hash in last}.items() <= {
            place: chain_hash for place, (chain_hash, _) in stored.items()
        }.items()
