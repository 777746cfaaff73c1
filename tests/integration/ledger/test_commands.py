"""Laws of commands through the running service: accepted once, refused without a trace, forwarded to the owner."""

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import pytest

from contracts import ledger as words
from contracts.money import Amount
from contracts.partition import partition_of, token
from contracts.streams import LEDGER, ledger_command_subject
from services.kit.ids import new_hold_id
from services.ledger.domain.rules import CATCH_UP_MAX
from tests.builders import charge_line, grant, hold_leg, open_account, place_hold, release_hold
from tests.integration.ledger.driving import Driver

pytestmark = pytest.mark.anyio


async def wallet(http: httpx2.AsyncClient, account: str) -> dict[str, str]:
    """posted, held, available and debt of the account's only wallet."""
    found = (await http.get(f"/v1/balances/{account}")).json()
    (only,) = found["wallets"]
    return {name: only[name] for name in ("posted", "held", "available", "debt")}


async def test_a_path_is_opened_from_its_root_and_told_once(driver: Driver) -> None:
    async with driver.running() as http:
        await driver.accepted(open_account("acme/ml/ana", "usd", key="1"))
        await driver.accepted(open_account("acme/ml/bob", key="2"))
        again = await driver.accepted(open_account("acme/ml", key="3"))
        assert again.movements == ()
        opened = await driver.rows(
            "SELECT convert_from(payload, 'UTF8')::json ->> 'account' FROM outbox ORDER BY number"
        )
        assert [row[0] for row in opened] == ["acme", "acme/ml", "acme/ml/ana", "acme/ml/bob"]
        page = (await http.get("/v1/accounts", params={"prefix": "acme/ml/"})).json()
        assert [(each["account"], each["units"]) for each in page["accounts"]] == [
            ("acme/ml/ana", ["usd"]),
            ("acme/ml/bob", []),
        ]


async def test_an_accepted_outcome_is_replayed_for_ever(driver: Driver) -> None:
    async with driver.running() as http:
        await driver.accepted(open_account("acme", "usd"))
        first = await driver.accepted(grant("acme", "10"))
        before = await driver.dump()
        again = await driver.accepted(grant("acme", "10"))
        assert again == first.model_copy(update={"replayed": True})
        other = await driver.command(grant("acme", "11"))
        assert isinstance(other, words.Failed)
        assert other.code == "conflict"
        assert await driver.dump() == before
        await driver.accepted(grant("acme", "10"), principal="another")
        assert (await wallet(http, "acme"))["posted"] == "20"
    async with driver.running():
        assert (await driver.accepted(grant("acme", "10"))) == again


async def test_an_answer_goes_to_an_inbox_or_nowhere(driver: Driver) -> None:
    """A reply subject is the caller's choice: an answer must not become a fact, or a call to JetStream."""
    async with driver.running():
        command = open_account("acme", "usd")
        partition = partition_of("acme")
        subject = ledger_command_subject(partition=partition, command="open_account", principal="tester")
        elsewhere = (f"ledger.v1.{token(partition)}.account.opened", "$JS.API.STREAM.PURGE.LEDGER", "_INBOX.x", "x")
        await driver.accepted(open_account("other", "usd"))
        await driver.until("SELECT (SELECT count(*) FROM outbox) = (SELECT sum(number) FROM relayed)", True)
        before = (await driver.ledger_nats.jetstream().stream_info(LEDGER)).state.last_seq
        for reply in elsewhere:
            await driver.ledger_nats.publish(subject, command.model_dump_json().encode(), reply=reply)
        await driver.ledger_nats.flush()
        await asyncio.sleep(0.3)
        assert await driver.rows("SELECT 1 FROM accounts WHERE account = 'acme'") == []
        after = (await driver.ledger_nats.jetstream().stream_info(LEDGER)).state
        assert (after.last_seq, after.first_seq) == (before, 1)
        assert not (await driver.accepted(command)).replayed


async def test_one_key_asked_at_once_is_carried_out_once(driver: Driver) -> None:
    async with driver.running() as http:
        await driver.accepted(open_account("acme", "usd"))
        replies = await asyncio.gather(*(driver.accepted(grant("acme", "10")) for _ in range(50)))
        assert sum(not reply.replayed for reply in replies) == 1
        assert len({reply.transaction for reply in replies}) == 1
        assert (await wallet(http, "acme"))["posted"] == "10"


async def test_a_refusal_leaves_every_table_as_it_was(driver: Driver) -> None:
    async with driver.running():
        await driver.funded("acme", "3")
        hold = new_hold_id("acme")
        other, ended = new_hold_id("acme"), new_hold_id("acme")
        await driver.accepted(place_hold(hold, hold_leg("usd", "1"), key="h1"))
        await driver.accepted(release_hold(ended, key="h2"))
        await driver.accepted(words.Charge(idempotency_key="c1", line=charge_line("e1", usd="0")))
        before = await driver.dump()
        refusals: dict[str, words.Command] = {
            "insufficient_funds": place_hold(other, hold_leg("usd", "4", "10"), key="r1"),
            "hold_exists": place_hold(hold, hold_leg("usd", "1"), key="r2"),
            "hold_released": place_hold(ended, hold_leg("usd", "1"), key="r3"),
            "account_not_open": grant("nobody", "1", key="r4"),
            "wallet_not_open": grant("acme", "1", unit="tokens", key="r5"),
            "unknown_unit": grant("acme", "1", unit="sheep", key="r6"),
            "invalid_amount": grant("acme", "-1", key="r7"),
            "already_charged": words.Charge(idempotency_key="r8", line=charge_line("e1", usd="0")),
            "charge_differs": words.Charge(idempotency_key="r9", line=charge_line("e1", usd="1")),
        }
        for code, command in refusals.items():
            assert (await driver.refused(command)).code == code
        await driver.accepted(open_account("acme/ana", key="o2"))
        strange = release_hold(hold, account="acme/ana", key="r10")
        before_strange = await driver.dump()
        assert (await driver.refused(strange)).code == "account_differs"
        assert await driver.dump() == before_strange
        changed = {name for name, rows in (await driver.dump()).items() if rows != before[name]}
        assert changed == {"heads", "journal", "commands", "accounts", "outbox"}


async def test_a_refused_key_is_decided_anew(driver: Driver) -> None:
    async with driver.running():
        await driver.accepted(open_account("acme", "usd"))
        command = place_hold(new_hold_id("acme"), hold_leg("usd", "1"), key="hold")
        refusal = await driver.refused(command)
        assert refusal.required == Amount(amount="1", unit="usd")
        assert refusal.remaining == Amount(amount="0", unit="usd")
        await driver.accepted(grant("acme", "1"))
        assert not (await driver.accepted(command)).replayed


async def test_a_hold_is_settled_by_its_charge_above_what_it_held(driver: Driver) -> None:
    """The worked example 4, through the service."""
    async with driver.running() as http:
        await driver.funded("acme", "11")
        hold = new_hold_id("acme")
        await driver.accepted(place_hold(hold, hold_leg("usd", "10"), key="h"))
        assert await wallet(http, "acme") == {"posted": "11", "held": "10", "available": "1", "debt": "0"}
        reply = await driver.accepted(words.Charge(idempotency_key="c", line=charge_line("e1", usd="12", hold=hold)))
        assert [(move.lot is None, move.posted, move.held) for move in reply.movements] == [
            (False, "-11", "-10"),
            (True, "-1", "0"),
        ]
        assert await wallet(http, "acme") == {"posted": "-1", "held": "0", "available": "-1", "debt": "1"}
        await driver.accepted(grant("acme", "5", key="g5"))
        assert await wallet(http, "acme") == {"posted": "4", "held": "0", "available": "4", "debt": "0"}


async def test_of_concurrent_holds_exactly_those_are_admitted_that_are_covered(driver: Driver) -> None:
    async with driver.running() as http:
        await driver.funded("acme", "100")
        replies = await asyncio.gather(
            *(
                driver.command(place_hold(new_hold_id("acme"), hold_leg("usd", "1"), key=f"hold-{number}"))
                for number in range(300)
            )
        )
        assert sum(isinstance(reply, words.Accepted) for reply in replies) == 100
        assert await wallet(http, "acme") == {"posted": "100", "held": "100", "available": "0", "debt": "0"}


async def test_http_commands_reach_the_owner_and_name_all_problems_at_once(driver: Driver) -> None:
    async with driver.running() as http:

        async def post(path: str, body: Any, key: str | None = "k") -> httpx2.Response:
            return await http.post(path, json=body, headers={} if key is None else {"Idempotency-Key": key})

        opened = await post("/v1/accounts", {"account": "acme", "wallets": [{"unit": "usd"}]}, "open")
        assert opened.status_code == 200, opened.text
        assert opened.json()["replayed"] is False
        again = await post("/v1/accounts", {"account": "acme", "wallets": [{"unit": "usd"}]}, "open")
        assert again.json()["replayed"] is True
        conflict = await post("/v1/accounts", {"account": "acme"}, "open")
        assert (conflict.status_code, conflict.json()["code"]) == (409, "conflict")

        bad = await post("/v1/grants", {"account": "acme//", "unit": "sheep", "amount": 1.5, "kind": "gift", "x": 1})
        assert bad.status_code == 422
        assert bad.headers["content-type"] == "application/problem+json"
        assert {each["pointer"] for each in bad.json()["errors"]} == {"/account", "/unit", "/amount", "/kind", "/x"}
        negative = await post("/v1/grants", {"account": "acme", "unit": "usd", "amount": "-5"})
        assert [each["pointer"] for each in negative.json()["errors"]] == ["/amount"]
        absurd = await post("/v1/grants", {"account": "acme", "unit": "usd", "amount": "9999999999999999999"})
        assert absurd.status_code == 422
        legs = [{"unit": "usd", "at_least": "2", "at_most": "1"}, {"unit": "usd", "at_least": "0", "at_most": "1"}]
        hold = await post("/v1/holds", {"hold": new_hold_id("other"), "account": "acme", "legs": legs})
        assert {each["pointer"] for each in hold.json()["errors"]} >= {"/legs", "/legs/0/at_least", "/hold"}
        keyless = await post("/v1/grants", {"account": "acme", "unit": "usd", "amount": "5"}, None)
        assert (keyless.status_code, keyless.json()["code"]) == (400, "idempotency_key_missing")
        assert (await http.post("/v1/grants", content=b"{", headers={"Idempotency-Key": "k"})).status_code == 400

        short = await post(
            "/v1/holds",
            {
                "hold": new_hold_id("acme"),
                "account": "acme",
                "legs": [{"unit": "usd", "at_least": "4", "at_most": "10"}],
            },
        )
        assert short.status_code == 402
        assert short.json()["required"] == {"amount": "4", "unit": "usd"}
        assert short.json()["remaining"] == {"amount": "0", "unit": "usd"}
        assert short.json()["limit_source"] == "acme"
        assert (await http.get("/v1/balances/nobody")).status_code == 404
        assert (await http.get("/v1/balances/acme//x")).status_code == 422
        assert (await http.get("/v1/totals", params={"unit": "sheep"})).status_code == 422
        assert (await http.get("/v1/balances/acme", headers={"Authorization": "Bearer no"})).status_code == 401
        demo = {"Authorization": f"Bearer {driver.tokens['demo']}"}
        assert (await http.get("/v1/balances/acme", headers=demo)).status_code == 403


async def test_a_command_with_a_parameter_that_nobody_reads_is_not_carried_out(driver: Driver) -> None:
    async with driver.running() as http:
        for path in ("/v1/accounts?dryrun=true", "/v1/lists?dry_run=true"):
            answer = await http.post(path, json={"account": "acme"}, headers={"Idempotency-Key": "k"})
            assert answer.status_code == 422, answer.text
            (finding,) = answer.json()["errors"]
            assert (finding["code"], finding["detail"].endswith("none is known")) == ("unknown_parameter", True)
    assert await driver.rows("SELECT * FROM journal") == []


async def test_a_request_that_says_two_commands_or_two_keys_is_not_carried_out(driver: Driver) -> None:
    grant = {"account": "acme", "unit": "usd", "amount": "5"}
    async with driver.running() as http:
        opened = {"account": "acme", "wallets": [{"unit": "usd"}]}
        assert (await http.post("/v1/accounts", json=opened, headers={"Idempotency-Key": "o"})).status_code == 200
        other = await http.post("/v1/grants", json={**grant, "command": "debit"}, headers={"Idempotency-Key": "k"})
        assert (other.status_code, [each["pointer"] for each in other.json()["errors"]]) == (422, ["/command"])
        for path, body in (("/v1/grants", grant), ("/v1/lists", {"commands": [{"command": "grant", **grant}]})):
            twice = await http.post(path, json=body, headers=[("Idempotency-Key", "k"), ("Idempotency-Key", "l")])
            assert twice.status_code == 422, twice.text
            assert "/header/Idempotency-Key" in {each["pointer"] for each in twice.json()["errors"]}
        said = await http.post("/v1/grants", json={**grant, "command": "grant"}, headers={"Idempotency-Key": "k"})
        assert said.status_code == 200, said.text
        assert (await wallet(http, "acme"))["posted"] == "5"


async def test_a_refusal_names_what_it_is_about_by_the_id_that_the_caller_knows(driver: Driver) -> None:
    async with driver.running() as http:
        await driver.funded("acme", "10")
        await driver.accepted(open_account("acme/ana", key="ana"))
        held, ended, unknown = (new_hold_id("acme") for _ in range(3))
        await driver.accepted(place_hold(held, hold_leg("usd", "1"), key="h1"))
        await driver.accepted(release_hold(ended, key="h2"))
        lot = "lot" + unknown.removeprefix("hold")
        commands: dict[words.Command, str] = {
            place_hold(held, hold_leg("usd", "1"), key="r"): held,
            place_hold(ended, hold_leg("usd", "1"), key="r"): ended,
            release_hold(held, account="acme/ana", key="r"): held,
            words.ExtendHold(idempotency_key="r", hold=unknown, account="acme", lifetime_seconds=9): unknown,
            words.VoidGrant(idempotency_key="r", account="acme", lot=lot): lot,
        }
        for command, named in commands.items():
            refused = await driver.refused(command)
            assert named in refused.message.split(), refused.message
            # In a list, too; and it is the sentence that HTTP tells.
            listed = words.CommandList(commands=(command,), all_or_nothing=True, idempotency_key="list")
            assert await driver.commands(listed) == refused.model_copy(update={"index": 0})
        answer = await http.post(
            f"/v1/holds/{ended}/release", json={"account": "acme"}, headers={"Idempotency-Key": "x"}
        )
        assert answer.json()["detail"] == f"the hold {ended} has been released"


async def test_an_amount_that_is_none_is_named_in_a_sentence(driver: Driver) -> None:
    async with driver.running() as http:
        for amount in ("1e5", "1,5", "", "+1", "01", ".5", "0.1234567891", "NaN", "1" * 20):
            body = {"account": "acme", "unit": "usd", "amount": amount}
            answer = await http.post("/v1/grants", json=body, headers={"Idempotency-Key": "k"})
            (problem,) = answer.json()["errors"]
            assert (answer.status_code, problem["pointer"]) == (422, "/amount")
            assert problem["detail"].startswith(
                f"{amount!r} is not an amount: that is a decimal number, as 12 or -0.05"
            )
            assert not set("^[]$") & set(problem["detail"])


async def test_request_reply_says_what_it_cannot_read(driver: Driver) -> None:
    async with driver.running():
        partition = f"{partition_of('acme'):02d}"
        for subject, body in (
            (f"rpc.ledger.v1.{partition}.grant.tester", b"{"),
            (f"rpc.ledger.v1.{partition}.grant.tester", open_account("acme").model_dump_json().encode()),
            (f"rpc.ledger.v1.{partition}.open_account.tester", open_account("other").model_dump_json().encode()),
            (f"rpc.ledger.v1.{partition}.grant.tester", b" " * (driver.settings.body_bytes_max + 1)),
        ):
            reply = await driver.request(subject, body, words.REPLIES)
            assert isinstance(reply, words.Failed)
            assert reply.code == "invalid"


async def test_a_statement_is_paged_with_its_running_balance(driver: Driver) -> None:
    async with driver.running() as http:
        await driver.funded("acme", "10")
        for number in range(7):
            charge = words.Charge(idempotency_key=f"c{number}", line=charge_line(f"e{number}", usd="1"))
            await driver.accepted(charge)
        entries: list[dict[str, str]] = []
        cursor: str | None = None
        while True:
            query = {"limit": "3"} | ({"before": cursor} if cursor else {})
            page = (await http.get("/v1/statements/acme", params=query)).json()
            entries += page["entries"]
            cursor = page["next_before"]
            if cursor is None:
                break
        assert [entry["balance"] for entry in entries] == ["3", "4", "5", "6", "7", "8", "9", "10", "0"]
        assert [entry["kind"] for entry in entries[-2:]] == ["lot_granted", "wallet_opened"]
        assert (await http.get("/v1/statements/acme", params={"before": "nonsense"})).status_code == 422


async def test_as_many_periods_as_may_be_granted_at_once_are_granted_before_the_caller_gives_up(driver: Driver) -> None:
    async with driver.running() as http:
        await driver.accepted(open_account("acme", "usd"))
        anchor = datetime.now(UTC) - timedelta(days=CATCH_UP_MAX, hours=-12)
        rule = words.RuleSpec(id="daily", unit="usd", amount="1", period="day", anchor=anchor)
        body = {"account": "acme", "rule": rule.model_dump(mode="json")}
        answer = await http.post("/v1/rules", json=body, headers={"Idempotency-Key": "r"})
        assert answer.status_code == 200, answer.json()
        assert len(answer.json()["movements"]) == CATCH_UP_MAX
        assert (await wallet(http, "acme"))["available"] == "1"


async def test_what_is_wrong_is_told_once_and_with_its_place(driver: Driver) -> None:
    leg = {"unit": "usd", "at_least": "1"}
    hold = {"account": "acme", "hold": new_hold_id("acme"), "legs": [{**leg, "at_most": None}]}
    wrong: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
        "holds": ({**hold, "command": "place_hold"}, ("/legs/0/at_most",)),
        "accounts": ({"command": "open_account"}, ("/account",)),
        "lists": (
            {"command": "list", "commands": [{**hold, "command": "place_hold", "idempotency_key": "k"}]},
            ("/commands/0/legs/0/at_most",),
        ),
        "plans": (
            {"command": "change_plan", "account": "acme", "plan": "p", "rules": [{}], "at_period_end": 1},
            (*(f"/rules/0/{name}" for name in ("id", "unit", "amount", "period", "anchor")), "/at_period_end"),
        ),
        "transfers": (
            {"command": "transfer", "account": "a", "to_account": "b", "unit": "usd", "amount": "1"},
            ("",),
        ),
    }
    async with driver.running() as http:
        for route, (body, pointers) in wrong.items():
            keyed = body if route == "lists" else {**body, "idempotency_key": "k"}
            subject = ledger_command_subject(
                partition=partition_of("acme"), command=body["command"], principal="tester"
            )
            reply = await driver.request(subject, json.dumps(keyed).encode(), words.REPLIES)
            assert isinstance(reply, words.Failed), reply
            headers = {} if route == "lists" else {"Idempotency-Key": "k"}
            answer = (await http.post(f"/v1/{route}", json=body, headers=headers)).json()
            assert tuple(problem["pointer"] for problem in answer["errors"]) == pointers
            said = [": ".join(filter(None, (each["pointer"], each["detail"]))) for each in answer["errors"]]
            # In the same words, whoever asks.
            assert reply.message == "; ".join(said)
            assert answer["detail"] == (said[0] if len(said) == 1 else f"the request has {len(said)} problems")
