"""Histories of a ledger, written by its own handlers without a broker: commands of all kinds, by repeatable chance."""

import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any, Final

import msgspec
from psycopg.conninfo import make_conninfo
from pydantic import SecretStr

from contracts.ids import uuid7
from contracts.metering import CHARGES_RATED
from contracts.partition import partition_of
from services.kit.catalogue import load_catalogue
from services.kit.database import Writer
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
    GrantedKind,
    Leg,
    LotScope,
    OpenAccount,
    PlaceHold,
    Policy,
    ReleaseHold,
    ResolveHold,
    ReverseCharge,
    Rule,
    Scope,
    SetRule,
    SetWallet,
    Threshold,
    Transfer,
    Units,
    VoidGrant,
    WalletTerms,
)
from services.ledger.handlers import BundleItem, CommandItem, Item, Ledger, Replied, Result, SweepItem
from services.ledger.signing import Signer, new_key, signer
from services.ledger.translate import Bundle
from tests.conftest import CATALOGUE_FILE
from tests.integration.ledger.driving import processed

BEGIN: Final = datetime(2026, 7, 1, 12, tzinfo=UTC)
UNITS: Final = Units.of(load_catalogue(CATALOGUE_FILE).units)
CAPS: Final = frozenset(name for name, unit in UNITS.by_name.items() if unit.kind == "cap")
SCOPES: Final = (Scope("openai", "gpt-4o"), Scope("openai", "gpt-4o-mini", "chat"), Scope("anthropic", "claude"))
LOT_SCOPES: Final = (None, None, LotScope(providers=("openai",)), LotScope(models=("claude",), features=("chat",)))
ROOTS: Final = ("acme", "umbrella", "initech")


@dataclass(slots=True)
class Recorder:
    """A ledger that owns the partitions of some roots, and what has been done to it so far."""

    ledger: Ledger
    chance: random.Random
    clock: list[datetime]
    roots: Sequence[str]
    outcomes: Counter[str] = field(default_factory=Counter)
    keys: int = 0
    bundles: Counter[int] = field(default_factory=Counter)
    holds: list[tuple[str, str]] = field(default_factory=list)
    lines: list[tuple[str, str]] = field(default_factory=list)
    rules: list[tuple[str, str]] = field(default_factory=list)
    payments: list[tuple[str, str, str]] = field(default_factory=list)

    async def do(self, *commands: Command) -> list[dict[str, Any]]:
        """Carry out commands in one batch; their replies."""
        results = await processed(self.ledger, [self._item(command) for command in commands])
        replies = [msgspec.json.decode(result.body) for result in results if isinstance(result, Replied)]
        for command, reply in zip(commands, replies, strict=True):
            self.outcomes[f"{type(command).__name__} {reply.get('code', reply['status'])}"] += 1
        return replies

    async def accepted(self, *commands: Command) -> list[dict[str, Any]]:
        """Carry out what must be accepted."""
        replies = await self.do(*commands)
        assert all(reply["status"] == "accepted" for reply in replies), replies
        return replies

    async def bundle(self, *lines: ChargeLine, reversals: Sequence[ReverseCharge] = ()) -> Result:
        """Give back lines, then charge lines, all of one tree, in a bundle."""
        partition = partition_of(lines[0].account if lines else reversals[0].account)
        self.bundles[partition] += 1
        number = self.bundles[partition]
        told = {"lines": [str(line) for line in lines], "reversals": [str(each) for each in reversals]}
        body = msgspec.json.encode({"type": CHARGES_RATED, "partition": partition, "number": number, **told})
        named = [replace(each, correction="correction-1", bundle=number) for each in reversals]
        bundle = Bundle(partition, number, sha256(body).digest(), body, lines, named)
        (result,) = await self.ledger.process([BundleItem(bundle, "CHARGES", number, "metering.v1.00.charges.rated")])
        return result

    async def sweep(self, account: str, *, hold: str | None = None) -> None:
        """Do what is due, as the sweeper asks for it."""
        command = CatchUp(account=account) if hold is None else ResolveHold(hold=hold, account=account)
        await self.ledger.process([SweepItem(partition_of(account), command)])

    def line(self, account: str, *amounts: tuple[str, int], hold: str | None = None, **more: Any) -> ChargeLine:
        """What a use cost."""
        self.keys += 1
        line = ChargeLine(
            source="demo",
            event_id=f"event-{self.keys}",
            account=account,
            occurred_at=more.pop("occurred_at", self.clock[0]),
            hold=hold,
            scope=more.pop("scope", SCOPES[0]),
            price_version="v1",
            amounts=amounts,
            **more,
        )
        self.lines.append((account, line.event_id))
        return line

    def later(self, **by: int) -> None:
        """Let time pass."""
        self.clock[0] += timedelta(**by)

    def new_hold(self) -> str:
        """The id of a new hold."""
        self.keys += 1
        return str(uuid7(milliseconds=1_780_000_000_000, entropy=self.keys.to_bytes(10, "big")))

    async def open(self) -> None:
        """A tree under each root: money at the top, caps beneath."""
        for root in self.roots:
            await self.accepted(
                OpenAccount(
                    account=root,
                    wallets=(
                        WalletTerms(unit="usd", thresholds=(Threshold(percent=20), Threshold(amount=1_000))),
                        WalletTerms(unit="tokens", policy="soft"),
                    ),
                ),
                OpenAccount(account=f"{root}/ml", wallets=(WalletTerms(unit="usd_cap"),)),
                OpenAccount(account=f"{root}/ml/ana", wallets=(WalletTerms(unit="usd", policy="soft"),)),
                OpenAccount(account=f"{root}/ml/key", wallets=(WalletTerms(unit="tokens", policy="unlimited"),)),
            )

    async def live(self, steps: int) -> None:
        """Whatever happens in so many steps. What is refused is part of it."""
        for _ in range(steps):
            self.later(seconds=self.chance.choice((0, 1, 30, 600, 7_200, 90_000)))
            if self.chance.random() < 0.2:
                account = self._account()
                lines = [self._line(account) for _ in range(self.chance.randint(1, 6))]
                await self.bundle(*lines, reversals=self._given_back(account))
                continue
            if self.chance.random() < 0.15:
                account, hold = self.chance.choice(self.holds) if self.holds else (self._account(), None)
                await self.sweep(account, hold=hold)
                continue
            commands = [self._command() for _ in range(self.chance.randint(1, 3))]
            await self.do(*commands)
        assert self.outcomes, "nothing was done"

    def _item(self, command: Command) -> Item:
        self.keys += 1
        return CommandItem(
            partition=partition_of(command.account),
            principal="tester",
            key=f"key-{self.keys}",
            body_hash=sha256(str(command).encode()).digest(),
            command=command,
        )

    def _command(self) -> Command:
        made: list[tuple[int, Any]] = [
            (10, self._grant),
            (8, self._place),
            (3, self._extend),
            (4, self._release),
            (12, self._line_of_any),
            (5, self._reverse),
            (3, self._transfer),
            (4, self._claim),
            (3, self._rule),
            (1, self._end_rule),
            (1, self._plan),
            (2, self._void),
            (2, self._adjust),
            (2, self._terms),
        ]
        weights, makers = zip(*made, strict=True)
        command: Command = self.chance.choices(makers, weights)[0]()
        return command

    def _account(self) -> str:
        return self.chance.choice(self.roots) + self.chance.choice(("", "/ml", "/ml/ana", "/ml/key", "/ml/key"))

    def _wallet(self) -> tuple[str, str]:
        root = self.chance.choice(self.roots)
        return self.chance.choice(
            (
                (root, "usd"),
                (root, "usd"),
                (root, "tokens"),
                (f"{root}/ml", "usd_cap"),
                (f"{root}/ml/ana", "usd"),
                (f"{root}/ml/key", "tokens"),
            )
        )

    def _amount(self) -> int:
        return self.chance.choice((0, 1, 7, 100, 1_000, 25_000))

    def _grant(self) -> Command:
        account, unit = self._wallet()
        kind: GrantedKind = self.chance.choice(("plan", "promo", "bonus", "purchase", "purchase", "adjustment"))
        now = self.clock[0]
        reference = self.chance.choice((None, "welcome", f"pi_{self.chance.randint(1, 9)}"))
        if reference is not None and kind == "purchase":
            self.payments.append((account, unit, reference))
        return Grant(
            account=account,
            unit=unit,
            amount=self._amount() * 10,
            kind=kind,
            priority=self.chance.choice((10, 100)),
            reference=reference,
            effective_at=self.chance.choice((None, None, now + timedelta(hours=2))),
            expires_at=self.chance.choice((None, None, now + timedelta(hours=5), now + timedelta(days=3))),
            scope=self.chance.choice(LOT_SCOPES),
            cost_basis=self.chance.choice((None, "0.8")),
        )

    def _hold(self) -> tuple[str, str | None]:
        return self.chance.choice(self.holds[-12:]) if self.holds else (self._account(), None)

    def _legs(self) -> tuple[Leg, ...]:
        units = self.chance.sample(("usd", "tokens"), self.chance.randint(1, 2))
        return tuple(Leg(unit, 0, self._amount()) for unit in units)

    def _place(self) -> Command:
        account = self._account()
        hold = self.new_hold()
        self.holds.append((account, hold))
        return PlaceHold(
            hold=hold,
            account=account,
            legs=self._legs(),
            lifetime_seconds=self.chance.choice((60, 900, 86_400)),
            overdue=self.chance.choice(("release", "charge_estimate")),
            scope=self.chance.choice((None, *SCOPES)),
        )

    def _extend(self) -> Command:
        account, hold = self._hold()
        return (
            self._place()
            if hold is None
            else ExtendHold(hold=hold, account=account, lifetime_seconds=1_000, legs=self._legs())
        )

    def _release(self) -> Command:
        account, hold = self._hold()
        if self.chance.random() < 0.1:
            # One that nobody has placed.
            hold = self.new_hold()
        return self._place() if hold is None else ReleaseHold(hold=hold, account=account)

    def _line(self, account: str) -> ChargeLine:
        hold = None
        held = [each for of, each in self.holds[-12:] if of == account]
        if held and self.chance.random() < 0.6:
            hold = self.chance.choice(held)
        units = self.chance.sample(("usd", "tokens"), self.chance.randint(1, 2))
        return self.line(
            account,
            *((unit, self._amount()) for unit in units),
            hold=hold,
            final=self.chance.random() < 0.7,
            scope=self.chance.choice(SCOPES),
            occurred_at=self.clock[0] - timedelta(seconds=self.chance.choice((0, 5, 40, 4_000, 100_000))),
        )

    def _line_of_any(self) -> Command:
        line = self._line(self._account())
        if self.chance.random() < 0.3:
            return msgspec.structs.replace(line, required=True)
        return line

    def _reverse(self) -> Command:
        if not self.lines:
            return self._line_of_any()
        account, event = self.chance.choice(self.lines[-40:])
        amounts = self.chance.choice((None, None, (("usd", self._amount()),), (("tokens", self._amount()),)))
        return ReverseCharge(account=account, source="demo", event_id=event, amounts=amounts)

    def _given_back(self, account: str) -> list[ReverseCharge]:
        """Of lines of the account's tree, what a bundle may give back. Some of them more than is left."""
        root = account.partition("/")[0]
        lines = [line for line in self.lines[-60:] if line[0].partition("/")[0] == root]
        count = self.chance.choice((0, 0, 1, 3))
        return [
            ReverseCharge(
                account=of, source="demo", event_id=event, amounts=(("usd", self.chance.choice((1, 7, 100))),)
            )
            for of, event in (self.chance.choices(lines, k=count) if lines else ())
        ]

    def _transfer(self) -> Command:
        root = self.chance.choice(self.roots)
        pair = self.chance.sample((root, f"{root}/ml/ana"), 2)
        return Transfer(account=pair[0], to_account=pair[1], unit="usd", amount=self._amount())

    def _claim(self) -> Command:
        account, unit, payment = (*self._wallet(), f"pi_{self.chance.randint(1, 9)}")
        if self.payments and self.chance.random() < 0.9:
            account, unit, payment = self.chance.choice(self.payments)
        return ClaimPayment(
            account=account,
            payment=payment,
            claim=f"re_{self.chance.randint(1, 3)}",
            reason=self.chance.choice(("refund", "dispute")),
            state=self.chance.choice(("open", "final", "final", "void")),
            unit=unit,
            claimed=self._amount() * 10,
            revision=self.chance.randint(0, 9),
        )

    def _rule(self, *, plan: str | None = None, unit: str | None = None) -> Any:
        account, of_unit = self._wallet()
        name = f"rule-{self.chance.randint(1, 3)}"
        self.rules.append((account, name))
        rule = Rule(
            id=name if plan is None else f"{plan}-{unit}",
            unit=unit or of_unit,
            amount=self._amount(),
            period=self.chance.choice(("day", "week", "month")),
            anchor=self.clock[0] - timedelta(hours=self.chance.choice((0, 30, 300))),
            zone=self.chance.choice(("UTC", "Europe/Berlin")),
            rollover_max=self.chance.choice((0, 500)),
            plan=plan,
            policy=self.chance.choice((None, None, "hard", "soft")),
            end_period=self.chance.choice((None, None, 4)),
        )
        return SetRule(account=account, rule=rule) if plan is None else rule

    def _end_rule(self) -> Command:
        account, rule = self.chance.choice(self.rules) if self.rules else (self._account(), "rule-1")
        return EndRule(account=account, rule=rule)

    def _plan(self) -> Command:
        plan = self.chance.choice(("free", "pro"))
        return ChangePlan(
            account=self.chance.choice(self.roots),
            plan=plan,
            rules=(self._rule(plan=plan, unit="usd"), self._rule(plan=plan, unit="tokens")),
            at_period_end=self.chance.random() < 0.5,
        )

    def _void(self) -> Command:
        # In an order of their own: that of memory is the one in which the database happened to hand them over.
        lots = sorted(
            (lot.account, lot.id)
            for owned in self.ledger._owned.values()
            for lot in owned.state.lots()
            if lot.kind in {"plan", "promo", "purchase"}
        )
        account, lot = (
            self.chance.choice(lots) if lots else (self._account(), str(uuid7(milliseconds=1, entropy=bytes(10))))
        )
        return VoidGrant(account=account, lot=lot, reason="mistake")

    def _adjust(self) -> Command:
        account, unit = self._wallet()
        amount = self._amount() * self.chance.choice((-1, 1))
        return Adjust(account=account, unit=unit, amount=amount, reason="by hand", force=self.chance.random() < 0.3)

    def _terms(self) -> Command:
        account, unit = self._wallet()
        policy: Policy = self.chance.choice(("hard", "hard", "soft", "unlimited"))
        overdraft = 500 if policy == "hard" and unit == "usd" and self.chance.random() < 0.5 else 0
        thresholds = self.chance.sample((Threshold(percent=20), Threshold(percent=50), Threshold(amount=1_000)), 2)
        return SetWallet(
            account=account,
            terms=WalletTerms(unit=unit, policy=policy, overdraft=overdraft, thresholds=tuple(thresholds)),
        )


SIGNER: Final = signer(new_key())
KEYS: Final = {SIGNER.key_id: SIGNER.public_key}


@asynccontextmanager
async def recording(
    url: SecretStr, *, seed: int = 1, roots: Sequence[str] = ROOTS, signed_by: Signer = SIGNER
) -> AsyncIterator[Recorder]:
    """A recorder on a database, as the ledger's runtime role. It owns the partitions of the roots as of a new epoch."""
    clock = [BEGIN]
    writer = Writer(SecretStr(make_conninfo(url.get_secret_value(), options="-c timezone=UTC")), name="recording")
    ledger = Ledger(writer=writer, units=UNITS, now=lambda: clock[0], on_committed=lambda _: None, signer=signed_by)
    try:
        async with writer.transaction() as connection:
            cursor = await connection.execute("SELECT max(epoch) + 1 FROM heads")
            row = await cursor.fetchone()
        epoch = 1 if row is None else int(row[0])
        await ledger.take_over({partition_of(root): epoch for root in roots})
        yield Recorder(ledger, random.Random(seed), clock, roots)
    finally:
        await writer.close()
