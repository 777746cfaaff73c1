"""The laws of the ledger through the running service: random commands to it, to its core and to a model at once."""

import asyncio
import os
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
import pytest
from pydantic import SecretStr, ValidationError

from contracts import ledger as words
from contracts.ids import make_id
from contracts.metering import ChargeLine as ContractLine
from contracts.metering import ChargesRated, ReversalLine
from contracts.metering import Scope as ContractScope
from contracts.money import Amount, format_amount
from contracts.partition import partition_of
from services.ledger import app as ledger_app
from services.ledger.audit import audit
from services.ledger.domain.commands import (
    Adjust,
    CatchUp,
    ChangePlan,
    ChargeLine,
    ClaimPayment,
    Command,
    EndRule,
    ExtendHold,
    Grant,
    Leg,
    LotScope,
    OpenAccount,
    PlaceHold,
    ReleaseHold,
    ResolveHold,
    ReverseCharge,
    Rule,
    Scope,
    SetRule,
    SetWallet,
    Threshold,
    Transfer,
    VoidGrant,
    WalletTerms,
)
from services.ledger.domain.entries import PSEUDO_KINDS
from services.ledger.domain.errors import AlreadyCharged, InsufficientFunds, Refusal
from services.ledger.domain.state import Wallet
from services.ledger.replay import replay
from services.ledger.signing import new_key, signer
from services.ledger.translate import Invalid, read_command
from tests.conftest import Database
from tests.integration.ledger.driving import Driver
from tests.unit.ledger.book import UNITS
from tests.unit.ledger.world import ACCOUNTS, Chances, Outcome, Step, World, beginning, missing, report

pytestmark = pytest.mark.anyio

STEPS_SHORT: Final = 150
STEPS_LONG: Final = int(os.environ.get("SCRIP_SERVED_STEPS") or 10_000)
SEED: Final = int(os.environ.get("SCRIP_LAWS_SEED") or random.SystemRandom().randrange(10**6))
# A world that is not too old to be looked at whole after each step.
EPISODE: Final = 500
EPISODES: Final = range(-(-STEPS_LONG // EPISODE))
# What each episode reached.
REACHED: Final[dict[int, Counter[str]]] = {}
PARTITION: Final = partition_of(ACCOUNTS[0])
PRINCIPAL: Final = "tester"


@dataclass
class Clock:
    """What time it is to the service: it stands still until a test moves it."""

    at: datetime = field(default_factory=lambda: datetime.now(tz=UTC))

    def __call__(self) -> datetime:
        return self.at


@dataclass
class Served:
    """A world, and the service that is asked the same."""

    driver: Driver
    clock: Clock
    world: World
    bundles: int = 0
    keys: int = 0
    replayed: int = 0

    async def do(self, step: Step, chance: random.Random) -> None:
        """Do a step on both sides, and compare what came of it."""
        self.world.book.wait(step.wait)
        step = replace(step, wait=type(step.wait)())
        await self.sweep()
        if step.way == "restart":
            self.world.do(step)
            return
        commands = tuple(self.timed(each) for each in step.commands if not isinstance(each, ResolveHold | CatchUp))
        try:
            asked = [await self.words_of(self.world.resolved(command)) for command in commands]
        except ValidationError:
            # Nobody can say so.
            return
        if not commands or (step.way not in {"alone", "bundle"} and not all(map(is_readable, asked))):
            # A list of which a command cannot be read is not decided at all.
            return
        outcomes = self.world.do(replace(step, commands=commands))
        match step.way:
            case "bundle":
                await self.bundle(commands, outcomes)
            case "alone":
                await self.alone(asked[0].model_copy(update={"dry_run": step.dry_run}), outcomes[0], chance)
            case _:
                await self.listed(asked, outcomes, step)
        await self.compare()

    def timed(self, command: Command) -> Command:
        """A debit is asked for without a time: it occurs when it is first decided, after the wait."""
        if not (isinstance(command, ChargeLine) and command.required):
            return command
        before = self.world.book.contents.get((command.source, command.event_id, command.revision))
        at = self.clock.at if before is None else before[1]
        assert isinstance(at, datetime)
        return msgspec.structs.replace(command, occurred_at=at)

    async def alone(self, asked: words.Command, outcome: Outcome, chance: random.Random) -> None:
        reply = await self.driver.command(asked, principal=PRINCIPAL)
        agree(reply, outcome, asked)
        if isinstance(reply, words.Accepted) and not asked.dry_run and chance.randrange(20) == 0:
            again = await self.driver.command(asked, principal=PRINCIPAL)
            assert again == reply.model_copy(update={"replayed": True})
            self.replayed += 1

    async def listed(self, asked: list[words.Command], outcomes: list[Outcome], step: Step) -> None:
        together = step.way == "together"
        commands = words.CommandList(
            commands=tuple(asked),
            all_or_nothing=together,
            idempotency_key=self.key() if together else None,
            dry_run=step.dry_run,
        )
        reply = await self.driver.commands(commands, principal=PRINCIPAL)
        if not together:
            assert isinstance(reply, words.Listed), reply
            for each, one, outcome in zip(asked, reply.replies, outcomes, strict=True):
                agree(one, outcome, each)
        elif isinstance(outcomes[-1], list):
            assert isinstance(reply, words.Listed), (reply, outcomes)
        else:
            assert isinstance(reply, words.Refused), (reply, outcomes)
            assert (reply.code, reply.index) == (outcomes[-1].code, len(outcomes) - 1)

    async def bundle(self, commands: Sequence[Command], outcomes: list[Outcome]) -> None:
        self.bundles += 1
        lines = tuple(contract_line(each) for each in commands if isinstance(each, ChargeLine))
        backs = [each for each in commands if isinstance(each, ReverseCharge)]
        reversals = tuple(reversal_line(each, f"correction-{place}") for place, each in enumerate(backs))
        bundle = ChargesRated(
            partition=PARTITION, number=self.bundles, recorded_at=self.clock.at, lines=lines, reversals=reversals
        )
        await self.driver.publish(bundle)
        await self.driver.until("SELECT charges_number FROM heads WHERE partition = %s", self.bundles, PARTITION)
        dead = sum(not isinstance(outcome, list | AlreadyCharged) for outcome in outcomes)
        found = await self.driver.rows("SELECT lines, lines_dead FROM bundles WHERE number = %s", self.bundles)
        assert found == [(len(commands), dead)], (found, outcomes, commands)

    async def sweep(self) -> None:
        """What is due is done on both sides: here by the sweeper, there in the order in which it does it."""
        book = self.world.book
        self.clock.at = book.now
        late = sorted(
            (row[4], row[1], row[2])
            for row in book.tables["holds"].values()
            if row[3] == "placed" and row[4] is not None and row[4] <= book.now
        )
        for _, hold, account in late:
            self.world.do(Step(commands=(ResolveHold(hold=hold, account=account),)))
        for account in sorted(book.state.accounts):
            wallets = book.state.accounts[account].wallets.values()
            if any(wallet.next_due() <= book.now or self.is_low_with_begun(wallet) for wallet in wallets):
                self.world.do(Step(commands=(CatchUp(account=account),)))
        await self.driver.until(
            "SELECT (SELECT count(*) FROM holds WHERE status = 'placed' AND expires_at <= %s)"
            " + (SELECT count(*) FROM accounts WHERE due_at <= %s)",
            0,
            self.clock.at,
            self.clock.at,
        )
        low = [row[17] for row in sorted(book.tables["wallets"].values(), key=lambda row: row[1:3])]
        told = "SELECT coalesce(array_agg(low ORDER BY account, unit), '{}') FROM wallets"
        await self.driver.until(told, low)

    def is_low_with_begun(self, wallet: Wallet) -> bool:
        """Whether its owner was told that it is low, and a lot that was granted for later has begun since."""
        lots = map(self.world.lot_of, self.world.book.tables["lots"].values() if wallet.low else ())
        return any(
            (lot.account, lot.unit) == (wallet.account, wallet.unit)
            and lot.effective_at is not None
            and lot.recorded_at < lot.effective_at <= self.world.book.now
            for lot in lots
        )

    async def compare(self) -> None:
        """Every wallet is the same, and every lot in the order in which they were made."""
        names = (
            "account, unit, policy, overdraft, posted, held, frozen, overage, uncapped, owed, owing, full_posted, low"
        )
        wallets = await self.driver.rows(f"SELECT {names} FROM wallets ORDER BY 1, 2")
        wanted = [
            (
                row[1],
                row[2],
                row[3],
                row[4],
                row[8],
                row[9],
                row[10],
                row[11],
                row[13],
                row[14],
                row[15],
                row[16],
                row[17],
            )
            for row in sorted(self.world.book.tables["wallets"].values(), key=lambda row: row[1:3])
        ]
        assert wallets == wanted
        lots = await self.driver.rows(
            "SELECT account, unit, kind, posted, held, frozen, expired, void, clawed, clawed_spent, pending,"
            " pending_frozen, rule_id, period FROM lots"
        )
        assert Counter(lots) == Counter(
            (
                *(lot.account, lot.unit, lot.kind, lot.posted, lot.held, lot.frozen, lot.expired, lot.void),
                *(lot.clawed, lot.clawed_spent, lot.pending, lot.pending_frozen, lot.rule, lot.period),
            )
            for lot in map(self.world.lot_of, self.world.book.tables["lots"].values())
        )

    # Words ------------------------------------------------------------------------------------------------------------

    def key(self) -> str:
        self.keys += 1
        return f"step-{self.keys}"

    async def words_of(self, command: Command) -> words.Command:  # noqa: PLR0911, PLR0912 - one case for each command
        """A command as it is asked for."""
        key = self.key()
        match command:
            case OpenAccount(account=account, wallets=wallets):
                terms = tuple(map(wallet_spec, wallets))
                return words.OpenAccount(idempotency_key=key, account=account, wallets=terms)
            case SetWallet(account=account, terms=wanted):
                return words.SetWallet(idempotency_key=key, account=account, wallet=wallet_spec(wanted))
            case Grant():
                return words.Grant(
                    idempotency_key=key,
                    account=command.account,
                    unit=command.unit,
                    amount=text(command.unit, command.amount),
                    kind=command.kind,
                    priority=command.priority,
                    occurred_at=command.occurred_at,
                    reference=command.reference,
                    effective_at=command.effective_at,
                    expires_at=command.expires_at,
                    scope=lot_scope(command.scope),
                )
            case VoidGrant():
                lot = make_id("lot", partition=PARTITION, uuid=await self.lot(command))
                return words.VoidGrant(idempotency_key=key, account=command.account, lot=lot)
            case Adjust():
                return words.Adjust(
                    idempotency_key=key,
                    account=command.account,
                    unit=command.unit,
                    amount=text(command.unit, command.amount),
                    reason=command.reason,
                    force=command.force,
                )
            case PlaceHold():
                return words.PlaceHold(
                    idempotency_key=key,
                    hold=hold_id_of(command.hold),
                    account=command.account,
                    legs=tuple(map(hold_leg, command.legs)),
                    lifetime_seconds=command.lifetime_seconds,
                    scope=scope(command.scope),
                    overdue=command.overdue,
                )
            case ExtendHold():
                return words.ExtendHold(
                    idempotency_key=key,
                    hold=hold_id_of(command.hold),
                    account=command.account,
                    lifetime_seconds=command.lifetime_seconds,
                    legs=tuple(map(hold_leg, command.legs)),
                )
            case ReleaseHold():
                return words.ReleaseHold(idempotency_key=key, hold=hold_id_of(command.hold), account=command.account)
            case ChargeLine():
                return line_words(key, command)
            case ReverseCharge():
                return words.ReverseCharge(
                    idempotency_key=key,
                    account=command.account,
                    source=command.source,
                    event_id=command.event_id,
                    amounts=None if command.amounts is None else amounts(command.amounts),
                    reason=command.reason,
                )
            case Transfer():
                return words.Transfer(
                    idempotency_key=key,
                    account=command.account,
                    to_account=command.to_account,
                    unit=command.unit,
                    amount=text(command.unit, command.amount),
                )
            case ClaimPayment():
                return words.ClaimPayment(
                    idempotency_key=key,
                    account=command.account,
                    payment=command.payment,
                    claim=command.claim,
                    reason=command.reason,
                    state=command.state,
                    claimed=Amount(amount=text(command.unit, command.claimed), unit=command.unit),
                    revision=command.revision,
                    occurred_at=command.occurred_at,
                )
            case SetRule():
                return words.SetRule(idempotency_key=key, account=command.account, rule=rule_spec(command.rule))
            case EndRule():
                return words.EndRule(idempotency_key=key, account=command.account, rule=command.rule)
            case ChangePlan():
                return words.ChangePlan(
                    idempotency_key=key,
                    account=command.account,
                    plan=command.plan,
                    rules=tuple(map(rule_spec, command.rules)),
                    at_period_end=command.at_period_end,
                )
            case ResolveHold() | CatchUp():
                raise ValueError("only the sweeper asks so")

    async def lot(self, command: VoidGrant) -> Any:
        """The service's id of a lot: it is the same one of its account, in the order in which they were made."""
        rows = [self.world.lot_of(row) for row in self.world.book.tables["lots"].values()]
        lots = [lot for lot in rows if lot.account == command.account and lot.kind not in PSEUDO_KINDS]
        ids = [lot.id for lot in sorted(lots, key=lambda lot: lot.age)]
        found = await self.driver.rows(
            "SELECT lot_id FROM lots WHERE account = %s AND NOT kind = ANY (%s) ORDER BY batch, position",
            command.account,
            list(PSEUDO_KINDS),
        )
        return found[ids.index(command.lot)][0] if command.lot in ids else command.lot


def is_readable(asked: words.Command) -> bool:
    """Its units and amounts can be meant: else it is turned away before it is decided."""
    try:
        read_command(asked, UNITS, principal=PRINCIPAL)
    except Invalid:
        return False
    return True


def agree(reply: words.Reply, outcome: Outcome, asked: words.Command) -> None:
    """The service answers what the core decides."""
    if isinstance(outcome, list):
        assert isinstance(reply, words.Accepted), (reply, asked)
    elif not is_readable(asked):
        assert isinstance(reply, words.Failed | words.Refused), (reply, asked, outcome)
    else:
        assert isinstance(reply, words.Refused), (reply, asked, outcome)
        assert reply.code == outcome.code, (reply, asked, outcome)
        check_numbers(reply, outcome)


def check_numbers(reply: words.Refused, outcome: Refusal) -> None:
    if isinstance(outcome, InsufficientFunds):
        assert reply.limit_source == outcome.account
        assert reply.required == Amount(amount=text(outcome.unit, outcome.required), unit=outcome.unit)
        assert reply.remaining == Amount(amount=text(outcome.unit, outcome.remaining), unit=outcome.unit)


def text(unit: str, amount: int) -> str:
    found = UNITS.by_name.get(unit)
    return str(amount) if found is None else format_amount(amount, found)


def amounts(found: tuple[tuple[str, int], ...]) -> tuple[Amount, ...]:
    return tuple(Amount(amount=text(unit, amount), unit=unit) for unit, amount in found)


def hold_id_of(hold: str) -> Any:
    return f"hold_{PARTITION:02}_{hold}"


def hold_leg(leg: Leg) -> words.HoldLeg:
    return words.HoldLeg(unit=leg.unit, at_least=text(leg.unit, leg.at_least), at_most=text(leg.unit, leg.at_most))


def scope(used: Scope | None) -> ContractScope | None:
    return None if used is None else ContractScope(provider=used.provider, model=used.model, feature=used.feature)


def lot_scope(valid: LotScope | None) -> words.LotScope | None:
    if valid is None:
        return None
    return words.LotScope(providers=valid.providers, models=valid.models, features=valid.features)


def threshold(unit: str, level: Threshold) -> words.Threshold:
    return words.Threshold(amount=None if level.amount is None else text(unit, level.amount), percent=level.percent)


def wallet_spec(terms: WalletTerms) -> words.WalletSpec:
    return words.WalletSpec(
        unit=terms.unit,
        policy=terms.policy,
        overdraft=text(terms.unit, terms.overdraft),
        thresholds=tuple(threshold(terms.unit, level) for level in terms.thresholds),
    )


def rule_spec(rule: Rule) -> words.RuleSpec:
    return words.RuleSpec(
        id=rule.id,
        unit=rule.unit,
        amount=text(rule.unit, rule.amount),
        period=rule.period,
        anchor=rule.anchor,
        zone=rule.zone,
        every=rule.every,
        kind=rule.kind,
        priority=rule.priority,
        rollover_min=text(rule.unit, rule.rollover_min),
        rollover_max=text(rule.unit, rule.rollover_max),
        scope=lot_scope(rule.scope),
        plan=rule.plan,
        policy=rule.policy,
        overdraft=None if rule.overdraft is None else text(rule.unit, rule.overdraft),
    )


def line_words(key: str, line: ChargeLine) -> words.Command:
    """A charge; of who asks: a debit, or a settlement."""
    used = scope(line.scope)
    if line.required:
        return words.Debit(
            idempotency_key=key,
            account=line.account,
            debit=line.event_id,
            amounts=amounts(line.amounts),
            scope=used,
            price_version=line.price_version,
        )
    if line.source == PRINCIPAL and line.hold is not None:
        return words.SettleHold(
            idempotency_key=key,
            hold=hold_id_of(line.hold),
            account=line.account,
            settlement=line.event_id,
            amounts=amounts(line.amounts),
            final=line.final,
            scope=used,
            price_version=line.price_version,
            occurred_at=line.occurred_at,
        )
    return words.Charge(idempotency_key=key, line=contract_line(line))


def reversal_line(command: ReverseCharge, correction: str) -> ReversalLine:
    assert command.amounts is not None
    return ReversalLine(
        source=command.source,
        event_id=command.event_id,
        account=command.account,
        amounts=amounts(command.amounts),
        correction=correction,
        reason=command.reason,
    )


def contract_line(line: ChargeLine) -> ContractLine:
    used = scope(line.scope)
    assert used is not None
    return ContractLine(
        source=line.source,
        event_id=line.event_id,
        account=line.account,
        occurred_at=line.occurred_at,
        hold=None if line.hold is None else hold_id_of(line.hold),
        scope=used,
        price_version=line.price_version,
        amounts=amounts(line.amounts),
        final=line.final,
    )


async def play_and_replay(
    driver: Driver, database: Database, monkeypatch: pytest.MonkeyPatch, *, seed: int, episode: int, steps: int
) -> None:
    """One world and an empty service; afterwards everything can be rebuilt from the journal."""
    clock = Clock()
    monkeypatch.setattr(ledger_app, "now", clock)
    pem = new_key()
    more = {"sweep_seconds": 0.01, "ledger_signing_key": SecretStr(pem)}
    driver = replace(driver, settings=driver.settings.model_copy(update=more))
    counts = REACHED[episode] = Counter()
    async with driver.running():
        await play(driver, clock, seed=seed, episode=episode, steps=steps, counts=counts)
    for by_evolve in (False, True):
        found = await asyncio.to_thread(replay, database.url("ledger_owner"), by_evolve=by_evolve)
        assert found.is_equal, found
    caps = {unit.name for unit in UNITS.by_name.values() if unit.kind == "cap"}
    keys = {signer(pem).key_id: signer(pem).public_key}
    audited = await asyncio.to_thread(audit, database.url("ledger"), keys=keys, caps=caps, processes=1)
    assert audited.is_clean, audited.findings


async def play(driver: Driver, clock: Clock, *, seed: int, episode: int, steps: int, counts: Counter[str]) -> None:
    """Steps in one world, and what the service does at each."""
    chance = random.Random(f"{seed}/{episode}")
    world = World(whole=False, counts=counts)
    world.book.tick = type(world.book.tick)()
    world.book.now = clock.at = datetime.now(tz=UTC).replace(microsecond=0)
    served = Served(driver, clock, world)
    chances = Chances(world, chance, is_served=True)
    done = 0
    try:
        for step in beginning(chance):
            await served.do(step, chance)
        for done in range(steps):  # noqa: B007 - told if it fails
            await served.do(chances.step(), chance)
    except BaseException:
        last = "\n".join(f"  {step}" for step in world.script[-12:])
        sys.stderr.write(f"\nseed {seed}, episode {episode}, step {done}; the last steps:\n{last}\n")
        raise
    world.check_everything()


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("episode", EPISODES)
async def test_the_service_does_what_the_core_decides_over_ten_thousand_steps(
    driver: Driver,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    episode: int,
) -> None:
    with capsys.disabled():
        await play_and_replay(driver, database, monkeypatch, seed=SEED, episode=episode, steps=EPISODE)
        if episode == EPISODES[-1] and len(REACHED) == len(EPISODES):
            counts = sum(REACHED.values(), Counter())
            sys.stderr.write(f"\n{len(EPISODES) * EPISODE} steps, seed {SEED}; {report(counts)}\n")
            assert not missing(counts)


async def test_the_service_does_what_the_core_decides_whatever_is_asked(
    driver: Driver, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await play_and_replay(driver, database, monkeypatch, seed=7, episode=0, steps=STEPS_SHORT)
