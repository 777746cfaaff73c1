"""The story: an account, its keys, calls, credits and a refund, step by step over TCP, on both simulators.

Every figure is asked for and compared with what it must be: computed here, from list prices written as literals.
"""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Final

import openai
import psycopg
from openai.types.chat import ChatCompletion

from infra.demo.story_doors import RETRY_SECONDS, WITHOUT_ANSWER_SECONDS_MAX, Doors, Target, eventually
from infra.errors import StackError
from services.ledger.audit_sql import Checked, audit
from services.ledger.replay import Replayed, replay

MILLION: Final = 1_000_000
STARTING_GRANT: Final = Decimal("1.00")
PACKAGE: Final = "usd-25"
PRICE: Final = Decimal("25.00")
PAID: Final = Decimal(25)
BONUS: Final = Decimal(2)
PAYMENT_EVENTS: Final = ("checkout.session.completed", "payment_intent.succeeded")

MODEL: Final = "gpt-4o-mini"
# Words of the text are its tokens, and three for the message: see the simulated provider.
QUESTION: Final = "What is left of my credits today? [[tokens:100]]"
DEAR_MODEL: Final = "gpt-4o"
DEAR_QUESTION: Final = "Write me eight long novels. [[tokens:10000]] [[slow:0]]"
DEAR_CHOICES: Final = 8
DEAR_TOKENS: Final = 10_000

# Dollars per million tokens, input and output.
LIST_PRICES: Final[Mapping[str, tuple[Decimal, Decimal]]] = {
    MODEL: (Decimal("0.15"), Decimal("0.60")),
    DEAR_MODEL: (Decimal("2.50"), Decimal("10.00")),
}


class _Differs(StackError):
    """Something is not as it must be."""


@dataclass(frozen=True, slots=True)
class _Call:
    """A call that was served: who asked, what the gateway called it, and its tokens as the client was told them."""

    account: str
    request: str
    model: str
    input_tokens: int
    output_tokens: int
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def cost(self) -> Decimal:
        """At list price."""
        input_price, output_price = LIST_PRICES[self.model]
        return (self.input_tokens * input_price + self.output_tokens * output_price) / MILLION


@dataclass(slots=True)
class _Story:
    """What is known so far. `balance` is what the account must have."""

    target: Target
    doors: Doors
    account: str
    own_secret: str
    balance: Decimal = Decimal(0)
    key: str = field(default="", repr=False)
    key_account: str = ""
    own_key: str = field(default="", repr=False)
    own_account: str = ""
    payment: str = ""
    calls: list[_Call] = field(default_factory=list)


def play(target: Target, say: Callable[[str], None]) -> None:
    """Play it, and say each step as one line when it is done. StackError names the step that went wrong."""
    if real := target.real:
        say(f"The story is not played: {' and '.join(real)} is set, and it would spend real money.")
        return
    say("The story, on a simulated provider and a simulated Stripe")
    name = secrets.token_hex(3)
    with Doors(target) as doors:
        story = _Story(target, doors, account=f"story-{name}", own_secret=f"sk-sim-{secrets.token_hex(12)}-mine")
        for number, (title, step) in enumerate(STEPS, start=1):
            try:
                line = step(story)
            except (StackError, openai.OpenAIError) as error:
                raise StackError(f"The story went wrong at step {number}, {title!r}: {error}") from error
            say(f"{number}. {title}: {line}")


# The steps ------------------------------------------------------------------------------------------------------------


def _open(story: _Story) -> str:
    story.key, story.key_account = _new_access_key(story, name="credits")
    story.balance = STARTING_GRANT
    wallet = _settled(story)
    _same("the kinds of lots", [lot["kind"] for lot in wallet["lots"]], ["promo"])
    return f"{story.account} starts with {usd(story.balance)}"


def _store_own_key(story: _Story) -> str:
    path = f"/v1/secrets/openai/{story.account}"
    stored = story.doors.keyvault.put(path, {"secret": story.own_secret})
    status = story.doors.keyvault.get(path)
    for shown in (stored, status):
        if story.own_secret in str(shown):
            raise _Differs("keyvault shows the secret")
    _same("the secret's last characters", status["last4"], story.own_secret[-4:])
    return f"for openai, version {status['version']}, shown as {status['prefix']}…{status['last4']}"


def _call_on_credits(story: _Story) -> str:
    for stream in (False, True):
        call = _ask(story, stream=stream)
        story.balance -= call.cost
        _settled(story)
    first, streamed = story.calls
    _same("what is told of the same call as a stream", _tokens([streamed]), _tokens([first]))
    _same("the cost in the header", _amount(first, "x-scrip-cost", unit="usd"), first.cost)
    _same("what remains in the header", _amount(first, "x-scrip-remaining", unit="usd"), STARTING_GRANT - first.cost)
    return (
        f"{first.input_tokens} + {first.output_tokens} tokens of {MODEL} cost {usd(first.cost)},"
        f" the same as a stream; {usd(story.balance)} left"
    )


def _call_on_own_key(story: _Story) -> str:
    # A key of its own, whose policy nobody can remember otherwise: the gateway does for a few seconds.
    story.own_key, story.own_account = _new_access_key(story, name="own")
    policy = story.doors.keyvault.put(f"/v1/policies/{story.own_account}", {"policy": "own"})
    _same("the policy", policy["policy"], "own")
    calls = [_ask(story, stream=stream, own=True) for stream in (False, True)]
    used = eventually(
        lambda: _used(story).get(story.own_account),
        lambda found: found is not None and found["charged_events"] == len(calls),
        what="metering has not charged the calls on the own key",
    )
    assert used is not None
    tokens = _tokens(calls)
    _same("the recorded tokens", (used["input_tokens"], used["output_tokens"]), tokens)
    _same("the calls on the own key", used["own_key_events"], len(calls))
    _same("what they cost", used["amounts"].get("usd", "0"), "0")
    _settled(story)
    return f"{tokens[0]} + {tokens[1]} tokens recorded, 0 usd charged; {usd(story.balance)} left"


def _spend(story: _Story) -> str:
    call = _ask_dearly(story)
    story.balance -= call.cost
    _settled(story)
    return f"{DEAR_CHOICES} x {DEAR_TOKENS} tokens of {DEAR_MODEL} cost {usd(call.cost)}; {usd(story.balance)} left"


def _run_out(story: _Story) -> str:
    try:
        _ask_dearly(story)
    except openai.APIStatusError as error:
        refused = error
    else:
        raise _Differs(f"a call was served that {usd(story.balance)} cannot pay")
    _same("the status", refused.status_code, 402)
    said = refused.body
    if not isinstance(said, dict):
        raise _Differs(f"the refusal has no error object: {said}")
    _same("the code", said["code"], "insufficient_quota")
    _same("who limits it", said["limit_source"], story.account)
    _same("what remains", said["remaining"], {"amount": f"{story.balance.normalize():f}", "unit": "usd"})
    # It is bounded from above before the call, by the bytes of the text.
    required = Decimal(said["required"]["amount"])
    cost = story.calls[-1].cost
    if not cost <= required < cost * Decimal("1.01"):
        raise _Differs(f"{usd(required)} are required for a call that cost {usd(cost)}")
    _settled(story)
    return (
        f"the same once more, {refused.status_code}: required {usd(required)}, remaining {usd(story.balance)},"
        f" affordable_max_tokens {said['affordable_max_tokens']}"
    )


def _buy(story: _Story) -> str:
    doors = story.doors
    doors.stripe.post("/__sim/settings", {"duplicate": 1.0, "reorder_seconds": 0.3})
    checkout = doors.billing.post(
        "/v1/checkout",
        {
            "account": story.account,
            "package": PACKAGE,
            "success_url": "http://127.0.0.1/paid",
            "cancel_url": "http://127.0.0.1/not-paid",
        },
        key=f"{story.account}:checkout",
    )
    paid = doors.stripe.post(f"/__sim/checkout/{checkout['session']}/pay", {"outcome": "paid"})
    story.payment = paid["payment_intent"]["id"]
    events = eventually(
        lambda: _events(story),
        lambda found: all(found.get(each, 0) >= 2 for each in PAYMENT_EVENTS),
        what="the webhooks have not come twice and been applied",
    )
    _delivered(story)
    story.balance += PAID + BONUS
    wallet = _settled(story)
    lots = [(lot["kind"], Decimal(lot["granted"])) for lot in wallet["lots"] if lot["reference"] == story.payment]
    _same("what was granted for the payment", sorted(lots), [("bonus", BONUS), ("purchase", PAID)])
    return (
        f"{PRICE} usd paid for {PACKAGE}; {len(PAYMENT_EVENTS)} events came {sum(events.values())} times and granted"
        f" {PAID} + {BONUS} bonus once; {usd(story.balance)} left"
    )


def _call_again(story: _Story) -> str:
    call = _ask_dearly(story)
    story.balance -= call.cost
    _settled(story)
    return f"what was refused costs {usd(call.cost)}; {usd(story.balance)} left"


def _refund(story: _Story) -> str:
    doors = story.doors
    doors.stripe.post("/__sim/refund", {"payment_intent": story.payment})
    story.balance -= PAID + BONUS
    wallet = _settled(story)
    (payment,) = doors.billing.get("/v1/payments", account=story.account)["payments"]
    _same("the claims", [(each["reason"], each["state"]) for each in payment["claims"]], [("refund", "final")])
    _delivered(story)
    _settled(story)
    debt = Decimal(wallet["debt"])
    _same("the debt", debt, -story.balance)
    return (
        f"{PRICE} usd went back; {PAID} + {BONUS} bonus taken, {usd(debt)} of it spent;"
        f" balance {usd(story.balance)}, debt {usd(debt)}"
    )


def _replay(story: _Story) -> str:
    replayed, checks = _replayed(story)
    if not replayed.is_equal:
        different = [table.table for table in replayed.tables if table.different]
        raise _Differs(f"the replay is not equal: {[*different, *replayed.heads_astray]}")
    if broken := [check.law for check in checks if check.breaches]:
        raise _Differs(f"plain SQL finds broken laws: {broken}")
    return "every projection rebuilt from the journal is equal, row by row; every law holds in plain SQL"


def _count(story: _Story) -> str:
    asked = {call.request: call for call in story.calls}
    served = [
        each for each in story.doors.provider.get("/__sim/requests")["requests"] if each["client_request_id"] in asked
    ]
    _same("the provider's number of calls", len(served), len(asked))
    for each in served:
        call = asked[each["client_request_id"]]
        _same(f"the tokens of {call.request}", (each["input_tokens"], each["output_tokens"]), _tokens([call]))
    used = _used(story)
    by_account = {
        account: _tokens([call for call in story.calls if call.account == account])
        for account in (story.key_account, story.own_account)
    }
    found = {account: (row["input_tokens"], row["output_tokens"]) for account, row in used.items()}
    _same("the metered tokens", found, by_account)
    cost = sum((call.cost for call in story.calls if call.account == story.key_account), Decimal(0))
    _same("the metered cost", Decimal(used[story.key_account]["amounts"]["usd"]), cost)
    totals = story.doors.ledger.get("/v1/totals", unit="usd", account_prefix=story.account)
    _same("the journal's charges", Decimal(totals["charged"]), cost)
    total = _tokens(story.calls)
    return (
        f"the provider's own is {len(served)} calls, {total[0]} + {total[1]} tokens, as metered;"
        f" those on credits cost {usd(cost)}, as charged"
    )


STEPS: Final[Sequence[tuple[str, Callable[[_Story], str]]]] = (
    ("account and access key", _open),
    ("own key stored", _store_own_key),
    ("calls on credits", _call_on_credits),
    ("the same on the own key", _call_on_own_key),
    ("a dear call", _spend),
    ("out of credits", _run_out),
    ("checkout", _buy),
    ("the call again", _call_again),
    ("refund", _refund),
    ("replay", _replay),
    ("count", _count),
)


# Calls ----------------------------------------------------------------------------------------------------------------


def _ask(story: _Story, *, stream: bool, own: bool = False) -> _Call:
    """One call, in one piece or as a stream, with the unmodified client."""
    completions = story.doors.openai(story.own_key if own else story.key).chat.completions.with_raw_response
    account = story.own_account if own else story.key_account
    messages: Any = [{"role": "user", "content": QUESTION}]
    if not stream:
        answer = completions.create(model=MODEL, messages=messages)
        return _noted(story, account, answer.headers, answer.parse())
    told = completions.create(model=MODEL, messages=messages, stream=True, stream_options={"include_usage": True})
    usage = None
    for chunk in told.parse():
        usage = chunk.usage or usage
    return _noted(story, account, told.headers, usage)


def _ask_dearly(story: _Story) -> _Call:
    completions = story.doors.openai(story.key).chat.completions.with_raw_response
    answer = completions.create(
        model=DEAR_MODEL,
        messages=[{"role": "user", "content": DEAR_QUESTION}],
        n=DEAR_CHOICES,
        max_tokens=DEAR_TOKENS,
    )
    return _noted(story, story.key_account, answer.headers, answer.parse(), model=DEAR_MODEL)


def _noted(story: _Story, account: str, headers: Mapping[str, str], answer: Any, *, model: str = MODEL) -> _Call:
    usage = answer.usage if isinstance(answer, ChatCompletion) else answer
    if usage is None:
        raise _Differs("the answer does not say its usage")
    call = _Call(
        account=account,
        request=headers["x-scrip-request-id"],
        model=model,
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        headers=headers,
    )
    story.calls.append(call)
    return call


def _amount(call: _Call, header: str, *, unit: str) -> Decimal | None:
    """An amount in a header like `0.00012 usd, 210 tokens`."""
    pairs = [text.split(" ") for text in call.headers.get(header, "").split(", ")]
    return next((Decimal(pair[0]) for pair in pairs if pair[1:] == [unit]), None)


def _tokens(calls: Sequence[_Call]) -> tuple[int, int]:
    return sum(call.input_tokens for call in calls), sum(call.output_tokens for call in calls)


# Questions ------------------------------------------------------------------------------------------------------------


def _new_access_key(story: _Story, *, name: str) -> tuple[str, str]:
    """The text of a new access key, which is shown once, and its own account."""
    made = story.doors.keyvault.post(
        "/v1/access-keys", {"account": story.account, "name": name}, key=f"{story.account}:{name}"
    )
    return made["key"], made["account"]


def _settled(story: _Story) -> dict[str, Any]:
    """The account's usd wallet, once it has what it must have and nothing is held. StackError if that does not come."""

    def read() -> dict[str, Any]:
        wallets = story.doors.ledger.get(f"/v1/balances/{story.account}")["wallets"]
        found: dict[str, Any] = next((each for each in wallets if each["unit"] == "usd"), {})
        return found

    return eventually(
        read,
        lambda found: Decimal(found.get("posted", "0")) == story.balance and Decimal(found["held"]) == 0,
        what=f"the balance of {story.account} has not become {usd(story.balance)}, nothing held",
    )


def _used(story: _Story) -> dict[str, dict[str, Any]]:
    """What metering has logged of the account and all below it, by account."""
    now, day = datetime.now(UTC), timedelta(days=1)
    found = story.doors.metering.get(
        "/api/v1/usage",
        account=story.account,
        tree="true",
        group_by="account",
        **{"from": (now - day).isoformat(), "to": (now + day).isoformat()},
    )
    return {row["account"]: row for row in found["usage"]}


def _events(story: _Story) -> dict[str, int]:
    """How often each event about the payment has come to billing, of those that are applied."""
    found = story.doors.billing.get("/v1/stripe-events", limit="100")["stripe_events"]
    ours = [each for each in found if each["payment"] == story.payment and each["status"] == "applied"]
    return {each["type"]: each["deliveries"] for each in ours}


def _replayed(story: _Story) -> tuple[Replayed, Sequence[Checked]]:
    """What a replay and plain SQL find; asked again while PostgreSQL restarts, as everybody else is."""
    deadline = time.monotonic() + WITHOUT_ANSWER_SECONDS_MAX
    while True:
        try:
            return replay(story.target.ledger_owner_url), audit(story.target.ledger_owner_url)
        except psycopg.OperationalError as error:
            if time.monotonic() > deadline:
                raise StackError(f"PostgreSQL is away: {str(error).strip()}") from error
        time.sleep(RETRY_SECONDS)


def _delivered(story: _Story) -> None:
    """Wait until Stripe has nothing left to deliver."""
    eventually(
        lambda: story.doors.stripe.get("/__sim/deliveries", state="pending")["deliveries"],
        lambda found: not found,
        what="Stripe has not delivered everything",
    )


def _same(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise _Differs(f"{what}: {found}, should be {wanted}")


def usd(amount: Decimal) -> str:
    """Dollars, to the last decimal that is not zero."""
    return f"{amount.normalize():f} usd"
