"""Random commands to the book and to the model beside it, and the laws that are checked after each of them.

Chances come from hypothesis or from a seed alike; what was done is kept as a script that can be done again, in part.
"""

import inspect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import compress
from random import Random
from typing import Any, Final, get_args

import msgspec

from contracts.accounts import root
from contracts.money import AMOUNT_MAX
from services.ledger import tables
from services.ledger.domain import errors
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
    VoidGrant,
    WalletTerms,
)
from services.ledger.domain.entries import (
    ASIDE_KINDS,
    PSEUDO_KINDS,
    BalanceCrossed,
    DebtRepaid,
    Entry,
    LotGranted,
    Move,
    is_contra,
)
from services.ledger.domain.errors import Refusal
from services.ledger.domain.state import Lot
from services.ledger.projections import (
    account_row,
    hold_row,
    lot_of,
    lot_row,
    rule_row,
    wallet_row,
)
from tests.unit.ledger.book import BEGIN, PARTITION, UNITS, Book, hold_id
from tests.unit.ledger.model import ASIDE, Key, Model, Plain, is_for

# Two trees of one partition.
ACCOUNTS: Final = ("r", "r/a", "r/a/u", "r/a/u/k", "r/b", "s145")
NAMES: Final = ("usd", "usd_cap", "tokens", "calls")
USES: Final = (Scope("openai", "small"), Scope("openai", "big", "chat"), Scope("groq", "small"))
SCOPES: Final = (
    LotScope(providers=("openai",)),
    LotScope(models=("small",)),
    LotScope(providers=("openai", "groq"), features=("chat",)),
)
PAYMENTS: Final = ("pi_1", "pi_2", "pi_3")
COMMANDS: Final = tuple(command.__name__ for command in get_args(Command))
REFUSALS: Final = tuple(refusal.__name__ for refusal in get_args(errors.Refusal))
# What a command moves of its own; everything else follows from time, claims and debts.
_OWN: Final = frozenset({"charged", "reversed", "adjusted", "transferred", "hold_estimated", "estimate_reversed"})
_LOT: Final = {name: place for place, name in enumerate(tables.lots.columns.keys())}
_WALLET: Final = {name: place for place, name in enumerate(tables.wallets.columns.keys())}

Outcome = list[Move] | Refusal


@dataclass(frozen=True, slots=True)
class Step:
    """What is done after a while: commands, each alone, as one list, or as a bundle of what is given back, and then of
    lines; or a restart.
    """

    wait: timedelta = timedelta()
    commands: tuple[Command, ...] = ()
    way: str = "alone"
    dry_run: bool = False

    def __str__(self) -> str:
        named = ", ".join(map(_text, self.commands))
        return f"after {self.wait}: {self.way}{' (dry run)' if self.dry_run else ''} {named}"


class Broken(AssertionError):
    """A law does not hold."""


def require(holds: object, law: str, *values: object) -> None:
    """The law holds."""
    if not holds:
        raise Broken(": ".join([law, *map(repr, values)]))


@dataclass
class World:
    """The book, the model, what was done so far, and what was reached."""

    whole: bool = True
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.book = Book(whole=self.whole)
        self.model = Model(UNITS)
        self.script: list[Step] = []
        self.holds: list[str] = []
        self.lines: list[ChargeLine] = []
        self.sums: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        self.statuses: dict[str, str] = {}
        self.told: dict[tuple[str, str], set[Threshold | None]] = defaultdict(set)
        self.posted: Counter[Key] = Counter()
        # By wallet: its posted after what last came in.
        self.full: Counter[Key] = Counter()
        self.periods: set[tuple[str, int]] = set()
        self.entries = 0

    # Doing ------------------------------------------------------------------------------------------------------------

    def do(self, step: Step) -> list[Outcome]:
        """Do a step, compare what became of it with the model, and check the laws."""
        if step.way == "bundle" and any(isinstance(command, ReverseCharge) for command in step.commands):
            return self.do_corrections(step)
        self.script.append(step)
        book = self.book
        book.wait(step.wait)
        if step.way == "restart":
            self.counts["restart"] += 1
            book.restart()
            return []
        commands = [self.resolved(command) for command in step.commands]
        entries = len(book.journal)
        now = book.upcoming
        before = self.model.copy() if len(commands) > 1 or step.dry_run else None
        concerned = [book.concerned(command) for command in commands]
        outcomes = self.told_by_the_book(commands, step)
        if step.way == "bundle":
            # What is due on all accounts concerned is done before its first line.
            everybody = sorted({account for each in concerned for account in each})
            concerned = [everybody for _ in commands]
        accepted = self.follow(commands, outcomes, concerned, now, step)
        self.count(commands, outcomes, step)
        kept = accepted and not step.dry_run
        if not kept:
            require(len(book.journal) == entries, "a refusal or a dry run adds nothing")
            self.check_nothing_changed(concerned)
            if before is not None:
                self.model = before
            return outcomes
        new = [recorded.entry for recorded in book.journal[entries:]]
        # A refused command of a list has done nothing, not even what was due.
        is_done = [step.way == "bundle" or isinstance(outcome, list) for outcome in outcomes]
        self.check_entries(new, commands, {name for names in compress(concerned, is_done) for name in names})
        self.compare(new, {account for each in concerned for account in each})
        self.check_floor(commands, outcomes, now)
        self.check_plan(commands)
        if len(self.script) % 40 == 0:
            self.check_everything()
        return outcomes

    def do_corrections(self, step: Step) -> list[Outcome]:
        """What a bundle gives back is done before its lines, as if each were a command."""
        self.counts["correction"] += 1
        self.book.wait(step.wait)
        backs = [each for each in step.commands if isinstance(each, ReverseCharge)]
        lines = tuple(each for each in step.commands if isinstance(each, ChargeLine))
        outcomes = [outcome for each in backs for outcome in self.do(Step(commands=(each,)))]
        return outcomes + (self.do(Step(commands=lines, way="bundle")) if lines else [])

    def told_by_the_book(self, commands: Sequence[Command], step: Step) -> list[Outcome]:
        match step.way:
            case "alone":
                (command,) = commands
                return [self.book.ask(command, dry_run=step.dry_run)]
            case "bundle":
                return self.book.bundle([each for each in commands if isinstance(each, ChargeLine)])
            case _:
                return self.book.listed(commands, all_or_nothing=step.way == "together", dry_run=step.dry_run)

    def follow(
        self,
        commands: Sequence[Command],
        outcomes: Sequence[Outcome],
        concerned: Sequence[list[str]],
        now: datetime,
        step: Step,
    ) -> bool:
        """Let the model do the same; whether anything was accepted, or all."""
        model = self.model
        loose: set[Key] = set()
        net: Counter[Key] = Counter()
        for command, outcome, accounts in zip(commands, outcomes, concerned, strict=False):
            late = model.late(commands if step.way == "bundle" else [command], accounts, now)
            untouched = model.copy() if late and step.way != "bundle" else None
            saved = self.catch_up(command, accounts, now, late)
            due = (model.loose, model.net)
            must, may = model.refusals(command, now)
            is_certain = not any(root(key[0]) == root(command.account) for key in loose | due[0])
            if isinstance(outcome, list) or step.way == "bundle":
                loose |= due[0]
                net.update(due[1])
            if isinstance(outcome, list):
                require(not must or not is_certain, "it should be refused", sorted(must), command)
                unchanged = is_repeated(command, self.book, outcome)
                if not unchanged:
                    model.take(command, now)
                    loose |= model.loose
                    net.update(model.net)
                    if isinstance(command, SetRule | EndRule | ChangePlan):
                        model.learn_rules(outcome, now)
                if isinstance(command, ChargeLine):
                    self.learn_split(command, outcome)
                if step.way != "bundle":
                    model.loose, model.net = set(), {}
                    after = model.late((), accounts, now)
                    model.catch_up([account for account in accounts if account in model.accounts], now, late=after)
                    loose |= model.loose
                    net.update(model.net)
            else:
                if is_certain:
                    require(outcome.code in must | may, "it should not be refused so", outcome, sorted(must), command)
                    self.check_numbers(outcome, command, now)
                if untouched is not None:
                    model = self.model = untouched
                elif step.way != "bundle":
                    model.wallets.update(saved)
        model.loose, model.net = loose, dict(net)
        if step.way == "together":
            return len(outcomes) == len(commands) and isinstance(outcomes[-1], list)
        return step.way == "bundle" or any(isinstance(outcome, list) for outcome in outcomes)

    def catch_up(
        self, command: Command, accounts: Iterable[str], now: datetime, late: Sequence[str]
    ) -> dict[Key, Plain]:
        """Let the model do what is due before a command, and let holds end; of one that it resolves, all before."""
        model = self.model
        model.loose, model.net = set(), {}
        known = [account for account in accounts if account in model.accounts]
        if isinstance(command, ResolveHold) and command.hold in model.late([command], (), now):
            before = late[: late.index(command.hold)]
            saved = model.catch_up((), now, late=before)
            return model.catch_up(known, model.holds[command.hold]["deadline"]) | saved
        return model.catch_up(known, now, late=late)

    def learn_split(self, line: ChargeLine, moves: Sequence[Move]) -> None:
        split: dict[tuple[str, str, str], int] = {}
        for move in moves:
            if move.kind == "charged" and move.lot is not None and move.unit is not None:
                key = (move.account, move.unit, move.lot)
                split[key] = split.get(key, 0) - move.posted
                self.model.kinds[move.lot] = str(move.lot_kind)
        self.model.lines[line.source, line.event_id, line.revision]["split"] = split

    @staticmethod
    def lot_of(row: tuple[Any, ...]) -> Lot:
        """A lot, as it is stored."""
        return lot_of(row)

    def resolved(self, command: Command) -> Command:
        """A lot is named by its place among the account's, so that a script can be done again in part."""
        if isinstance(command, VoidGrant) and command.lot.startswith("#"):
            rows = [row for row in self.book.tables["lots"].values() if row[_LOT["account"]] == command.account]
            rows = [row for row in rows if row[_LOT["kind"]] not in PSEUDO_KINDS]
            rows.sort(key=lambda row: (row[_LOT["batch"]], row[_LOT["position"]]))
            if rows:
                return replace(command, lot=str(rows[int(command.lot[1:]) % len(rows)][_LOT["lot_id"]]))
        return command

    def count(self, commands: Sequence[Command], outcomes: Sequence[Outcome], step: Step) -> None:
        for command, outcome in zip(commands, outcomes, strict=False):
            name = type(command).__name__
            if isinstance(outcome, list):
                self.counts[name] += 1
                self.counts[step.way if step.way != "alone" else "dry run" if step.dry_run else "alone"] += 1
                if isinstance(command, ChargeLine):
                    self.counts["debit" if command.required else "increment" if not command.final else "charge"] += 1
            else:
                self.counts[type(outcome).__name__] += 1
                self.counts[f"{name} refused"] += 1

    # Comparing --------------------------------------------------------------------------------------------------------

    def compare(self, new: Sequence[Entry], accounts: set[str]) -> None:
        """What changed is as the model has it; where it left that open, it goes on from what is there."""
        model, book = self.model, self.book
        touched = {(entry.account, entry.unit) for entry in new if entry.unit and not is_contra(entry.account)}
        moved: dict[str, None] = dict.fromkeys(entry.lot for entry in new if entry.lot is not None)
        rows = {lot: book.tables["lots"][PARTITION, lot] for lot in moved}
        for lot, row in rows.items():
            model.kinds[lot] = row[_LOT["kind"]]
        own: Counter[Key] = Counter()
        for entry in new:
            if entry.lot is not None and entry.unit is not None and is_own(entry):
                own[entry.account, entry.unit] += entry.posted
        for key in {*own, *model.net}:
            require(own[key] == model.net.get(key, 0), "a command moves what it says", key, own[key], model.net)
        loose = {key for key in model.loose if key in model.wallets}
        for key in sorted(touched | {key for key in model.wallets if key[0] in accounts}):
            if key in loose:
                self.learn(key)
            else:
                self.name_new_lots(key, rows)
                self.compare_wallet(key)
        for lot, row in rows.items():
            key = (row[_LOT["account"]], row[_LOT["unit"]])
            if key not in loose and row[_LOT["kind"]] not in PSEUDO_KINDS:
                self.compare_lot(lot, row)
        for key in loose:
            self.learn(key)
        if loose:
            self.learn_holds(loose)

    def name_new_lots(self, key: Key, rows: dict[str, Any]) -> None:
        """The lots that the model made are those that were made, in their order."""
        wallet = self.model.wallets[key]
        unnamed = [name for name in wallet["lots"] if name.startswith("new ")]
        made = [
            (row[_LOT["batch"]], row[_LOT["position"]], lot)
            for lot, row in rows.items()
            if (row[_LOT["account"]], row[_LOT["unit"]]) == key
            and row[_LOT["kind"]] not in PSEUDO_KINDS
            and lot not in wallet["lots"]
        ]
        require(len(unnamed) == len(made), "as many lots are made as are granted", key, unnamed, made)
        for name, (batch, position, lot) in zip(unnamed, sorted(made), strict=True):
            wallet["lots"][lot] = wallet["lots"].pop(name)
            wallet["lots"][lot]["age"] = (batch, position)
            for other in self.model.wallets.values():
                for each in other["lots"].values():
                    if each["origin"] == name:
                        each["origin"] = lot
            for hold in self.model.holds.values():
                if (*key, name) in hold["earmarked"]:
                    hold["earmarked"].remove((*key, name))
                    hold["earmarked"].add((*key, lot))
                    hold["parts"][*key, lot] = hold["parts"].pop((*key, name))
                    if "estimated" in hold and (*key, name) in hold["estimated"]:
                        hold["estimated"][*key, lot] = hold["estimated"].pop((*key, name))

    def compare_wallet(self, key: Key) -> None:
        live = self.book.wallet(*key)
        wallet = self.model.wallets[key]
        lots = wallet["lots"].values()
        debt = wallet["debt"]
        predicted = {
            "policy": wallet["policy"],
            "overdraft": wallet["overdraft"],
            "posted": sum(lot["posted"] for lot in lots) - debt["owed"],
            "held": sum(lot["held"] for lot in lots) + debt["held"],
            "frozen": sum(lot["frozen"] for lot in lots),
            "owed": debt["owed"],
            "owing": debt["held"],
            "overage": wallet["overage"]["owed"],
            "uncapped": wallet["uncapped"]["owed"],
        }
        found = {name: getattr(live, name) for name in predicted}
        require(found == predicted, "a wallet is as predicted", key, "found", found, "predicted", predicted)

    def compare_lot(self, lot: str, row: Sequence[Any]) -> None:
        there = lot_of(tuple(row))
        known = self.model.wallets[there.account, there.unit]["lots"].get(lot)
        require(known is not None, "a lot is known", lot)
        predicted = known or {}
        found = plain_lot(there)
        found.pop("clawed")
        wrong = {name: (value, predicted[name]) for name, value in found.items() if predicted[name] != value}
        require(not wrong, "a lot is as predicted", (there.account, there.unit, lot), "found, predicted", wrong)

    def learn(self, key: Key) -> None:
        """Go on from what is there."""
        wallet = self.model.wallets[key]
        live = self.book.wallet(*key)
        lots = [
            lot_of(row) for row in self.book.tables["lots"].values() if (row[_LOT["account"]], row[_LOT["unit"]]) == key
        ]
        wallet["lots"] = {lot.id: plain_lot(lot) for lot in lots if lot.kind not in PSEUDO_KINDS}
        for kind in ASIDE:
            of_kind = [lot for lot in lots if lot.kind == kind]
            wallet[kind] = {"owed": -sum(lot.posted for lot in of_kind), "held": sum(lot.held for lot in of_kind)}
        for lot in lots:
            self.model.kinds[lot.id] = lot.kind
        require((wallet["policy"], wallet["overdraft"]) == (live.policy, live.overdraft), "terms stay", key)

    def learn_holds(self, loose: set[Key]) -> None:
        for name, hold in self.model.holds.items():
            # Of a wallet that the model did not know it may have thought that nothing could be set aside.
            pinned = {(account, unit) for unit, accounts in hold["wallets"].items() for account in accounts}
            if loose.isdisjoint(pinned | {part[:2] for part in hold["parts"]}):
                continue
            parts: Counter[tuple[str, str, str]] = Counter()
            for (_, of_hold, account, unit, lot), row in self.book.tables["hold_lots"].items():
                if of_hold == name:
                    kind = self.model.kinds[str(lot)]
                    parts[str(account), str(unit), kind if kind in ASIDE else str(lot)] += row[6]
            hold["parts"] = dict(parts)
            # Not by the names of the model's own, which may be those of other lots later.
            hold["earmarked"] = {part for part in parts if part[2] not in ASIDE}

    # Laws -------------------------------------------------------------------------------------------------------------

    def check_numbers(self, refusal: Refusal, command: Command, now: datetime) -> None:
        """A refusal for want of money says what there is, and it is less than what is required."""
        if isinstance(refusal, errors.InsufficientFunds):
            require(refusal.remaining < refusal.required, "a refusal tells why", refusal)
            wallet = self.model.wallets.get((refusal.account, refusal.unit))
            require(wallet is not None, "a refusal names a wallet", refusal)
            if isinstance(command, PlaceHold) and wallet is not None:
                there = self.model.available_in(wallet, now, command.scope) + wallet["overdraft"]
                require(refusal.remaining == max(0, there), "a refusal tells what there is", refusal, there)

    def check_nothing_changed(self, concerned: Iterable[Iterable[str]]) -> None:
        """What is in memory is what is stored, to the byte."""
        book = self.book
        require(not any(getattr(book.state.changes, name) for name in CHANGES), "nothing was touched")
        for name in {account for each in concerned for account in each}:
            account = book.state.accounts[name]
            same(book.tables["accounts"], account_row(PARTITION, account))
            for wallet in account.wallets.values():
                same(book.tables["wallets"], wallet_row(PARTITION, wallet))
                for lot in wallet.lots.values():
                    same(book.tables["lots"], lot_row(PARTITION, lot))
                for rule in wallet.rules.values():
                    same(book.tables["rules"], rule_row(PARTITION, wallet.unit, rule))
        for hold in book.state.holds.values():
            same(book.tables["holds"], hold_row(PARTITION, hold))

    def check_entries(self, new: Sequence[Entry], commands: Sequence[Command], concerned: set[str]) -> None:
        """Laws of the journal, on what was added to it."""
        place = (self.book.head.batch, 0)
        sums: Counter[tuple[str, str | None, str]] = Counter()
        for entry in new:
            place = (place[0], place[1] + 1)
            require((entry.batch, entry.position) == place, "the journal has no gaps", place, entry)
            of_wallet = entry.account.partition("/")[2] if is_contra(entry.account) else entry.account
            is_cap = entry.unit is not None and UNITS.by_name[entry.unit].kind == "cap"
            sums[entry.transaction, entry.unit, of_wallet if is_cap else ""] += entry.posted
            if entry.lot is not None:
                of_lot = self.sums[entry.lot]
                of_lot[0] += entry.posted
                of_lot[1] += entry.held
                of_lot[2] += entry.frozen
            self.check_times_and_scope(entry, commands)
            self.check_crossing(entry)
            if entry.kind == "lot_granted" and getattr(entry.details, "rule", None) is not None:
                period = (f"{entry.account} {getattr(entry.details, 'rule', '')}", getattr(entry.details, "period", 0))
                require(period not in self.periods, "a period is granted once", period)
                self.periods.add(period)
        self.check_repaid(new)
        require(not any(sums.values()), "the posted of a transaction sum to zero", +sums, -sums)
        for lot in {entry.lot for entry in new if entry.lot is not None}:
            self.check_lot(lot, concerned)
        for hold in {entry.hold for entry in new if entry.hold is not None}:
            self.check_hold(hold)
        moved = {(entry.account, entry.unit) for entry in new if entry.unit and not is_contra(entry.account)}
        for key in moved | self.caught_up(commands):
            self.check_alerts(key)
        if any(isinstance(command, ClaimPayment | Grant | ReverseCharge) for command in commands) or self.has_claims():
            self.check_claims({root(command.account) for command in commands})

    def caught_up(self, commands: Iterable[Command]) -> set[Key]:
        """The wallets of which is told what time alone has done to them."""
        names = {command.account for command in commands if isinstance(command, CatchUp)}
        return {key for key in self.model.wallets if key[0] in names}

    def check_times_and_scope(self, entry: Entry, commands: Sequence[Command]) -> None:
        """A lot is not used before its start, nor outside its scope; what is set aside of it, not after its end."""
        if entry.lot is None or entry.lot_kind in PSEUDO_KINDS:
            return
        if entry.kind in {"hold_placed", "hold_extended"} or (entry.kind == "charged" and entry.posted < 0):
            lot = lot_of(self.book.tables["lots"][PARTITION, entry.lot])
            started = lot.effective_at is None or lot.effective_at <= entry.recorded_at
            require(started or entry.hold, "a lot is not used before its start", entry)
            if entry.kind != "charged":
                require(lot.is_valid(entry.recorded_at), "a lot is held while it is valid", entry)
            if lot.scope is not None and len(commands) == 1:
                (command,) = commands
                used = getattr(command, "scope", None)
                hold = self.model.holds.get(getattr(command, "hold", None) or "")
                if used is None and hold is not None:
                    used = hold["scope"]
                require(is_for(plain_lot(lot), used), "a lot is not used outside its scope", entry, command)

    def check_crossing(self, entry: Entry) -> None:
        """Each crossing of a level is told once, and again only after it has recovered."""
        if entry.unit is None:
            return
        key = (entry.account, entry.unit)
        told = self.told[key]
        if entry.lot_kind not in ASIDE_KINDS:
            self.posted[key] += entry.posted
        if isinstance(entry.details, LotGranted) and entry.kind in {"lot_granted", "transferred"}:
            self.full[key] = self.posted[key]
        if entry.kind == "wallet_set":
            told &= {None, *getattr(entry.details, "thresholds", ())}
        if isinstance(entry.details, BalanceCrossed):
            level = entry.details.threshold
            require(entry.details.is_low != (level in told), "a crossing is told once", entry)
            if entry.details.is_low:
                require(self.full[key] > 0, "nobody is told of a level of nothing", entry)
                told.add(level)
            else:
                told.discard(level)

    def check_repaid(self, new: Sequence[Entry]) -> None:
        """What is owed is repaid from the oldest; but not by a payment's lot what claims on that made owed."""
        repaid = [entry for entry in new if entry.kind == "debt_repaid" and isinstance(entry.details, DebtRepaid)]
        if any(entry.posted < 0 and entry.lot_kind == "debt" for entry in repaid):
            # Something was given back to who had repaid it.
            return
        for entry in repaid:
            if entry.lot_kind == "debt" and isinstance(entry.details, DebtRepaid):
                rows = self.book.tables["lots"]
                by = lot_of(rows[PARTITION, entry.details.lot])
                debt = lot_of(rows[PARTITION, entry.details.debt])
                for other in self.book.wallet(by.account, by.unit).debts():
                    is_left_out = other.reference is not None and other.reference == by.reference
                    require(other.age >= debt.age or is_left_out, "the oldest debt is repaid first", debt, other)

    def check_lot(self, name: str, concerned: Iterable[str] = ()) -> None:
        """A lot is the sum of its entries, and never negative; what is over on accounts concerned is not there."""
        lot = lot_of(self.book.tables["lots"][PARTITION, name])
        require([lot.posted, lot.held, lot.frozen] == self.sums[name], "a lot is the sum of its entries", lot)
        if lot.kind in PSEUDO_KINDS:
            require(lot.posted <= 0 <= lot.held and lot.frozen == 0, "a pseudo-lot is what is not there", lot)
        else:
            require(min(lot.held, lot.frozen, lot.available) >= 0, "a lot is never negative", lot)
            # On other wallets of a hold that ended only what was due by then was done.
            over = lot.expires_at is not None and lot.expires_at <= self.book.head.recorded_at
            over = over and lot.account in concerned
            require(not (over or lot.void) or lot.available == 0, "what is over is not there", lot)
            require(0 <= lot.pending <= lot.held, "what claims wait for is held", lot)
            require(0 <= lot.pending + lot.pending_frozen <= lot.held, "what claims wait for is held once", lot)
            require(lot.clawed >= 0 and lot.clawed_spent >= 0, "claims take", lot)

    def check_hold(self, name: str) -> None:
        """A hold ends once; then nothing is held by it."""
        hold = self.book.tables["holds"][PARTITION, name]
        before, status = self.statuses.get(name), hold[3]
        if before not in {None, "placed"}:
            again = before == "estimated" and status == "settled"
            require(status == before or again, "a hold ends once", name, before, status)
        self.statuses[name] = status
        if status != "placed":
            rows = [row for key, row in self.book.tables["hold_lots"].items() if key[1] == name]
            require(not any(row[6] for row in rows), "an ended hold holds nothing", name, rows)

    def check_alerts(self, key: Key) -> None:
        """The owner has been told of the levels that the wallet is at or below, and of no others."""
        wallet = self.book.state.wallet(*key)
        if wallet is None or wallet.policy == "unlimited" or wallet.next_due() <= self.book.head.recorded_at:
            return
        require(wallet.low == self.told[key], "what is told is remembered", key, wallet.low, self.told[key])
        there = wallet.available_anywhere(self.book.head.recorded_at)
        for level in (None, *wallet.thresholds):
            hundredths = 0
            if level is not None:
                hundredths = 100 * level.amount if level.amount is not None else (level.percent or 0) * wallet.full
            is_low = 100 * there <= max(hundredths, 0)
            if not is_low or wallet.full > 0:
                require((level in wallet.low) == is_low, "a level is told when it is crossed", key, level, there)

    def has_claims(self) -> bool:
        return any(payment["claims"] for payment in self.model.payments.values())

    def check_claims(self, roots: set[str]) -> None:
        """What claims took, and will, of a payment's lots is a function of all of them. So is what they freeze."""
        taken: defaultdict[tuple[str, str], Counter[Key]] = defaultdict(Counter)
        frozen: defaultdict[tuple[str, str], Counter[Key]] = defaultdict(Counter)
        left: defaultdict[tuple[str, str], int] = defaultdict(int)
        wallets: defaultdict[tuple[str, str], set[Key]] = defaultdict(set)
        for row in self.book.tables["lots"].values():
            reference, kind = row[_LOT["reference"]], row[_LOT["kind"]]
            if reference not in PAYMENTS or kind not in {"purchase", "bonus"}:
                continue
            of = (reference, root(row[_LOT["account"]]))
            each = (kind, row[_LOT["unit"]])
            taken[of][each] += row[_LOT["clawed"]] + row[_LOT["pending"]]
            frozen[of][each] += row[_LOT["frozen"]] + row[_LOT["pending_frozen"]]
            if kind == "purchase":
                lot = lot_of(row)
                wallets[of].add((lot.account, lot.unit))
                is_over = lot.expires_at is not None and lot.expires_at <= self.book.head.recorded_at
                left[of] += 0 if is_over else lot.available
        wanted: defaultdict[tuple[str, str], Counter[Key]] = defaultdict(Counter)
        to_freeze: defaultdict[tuple[str, str], Counter[Key]] = defaultdict(Counter)
        for (name, account), payment in self.model.payments.items():
            clawed, still = self.model.wanted(payment)
            wanted[name, root(account)].update(clawed)
            to_freeze[name, root(account)].update(still)
        for of in {*taken, *wanted}:
            if of[1] in roots:
                require(+taken[of] == +wanted[of], "claims take what they come to", of, taken[of], wanted[of])
                for each, amount in frozen[of].items():
                    most = to_freeze[of][each]
                    require(0 <= amount <= most, "open claims freeze what they are about", of, amount, most)
                    # What holds of one account no longer hold is not frozen of another's at once.
                    is_one = len(wallets[of]) == 1
                    require(amount == most or not (is_one and left[of]), "open claims freeze what is left", of, most)

    def check_plan(self, commands: Sequence[Command]) -> None:
        """What is unheld of an old plan's current lots is void at once, when the plan is changed at once."""
        for command in commands:
            if isinstance(command, ChangePlan) and not command.at_period_end and len(commands) == 1:
                for wallet in self.book.state.accounts[command.account].wallets.values():
                    for lot in wallet.burning():
                        rule = wallet.rules.get(lot.rule or "")
                        if rule is not None and rule.ended and lot.is_valid(self.book.head.recorded_at):
                            of_plan = rule.rule.plan is not None and lot.origin is None
                            require(not of_plan or lot.void, "the old plan's lots are void", lot)

    def check_floor(self, commands: Sequence[Command], outcomes: Sequence[Outcome], now: datetime) -> None:
        """No hold takes a hard wallet below its floor."""
        if len(commands) == 1 and isinstance(commands[0], PlaceHold) and isinstance(outcomes[0], list):
            command = commands[0]
            held = {(move.account, move.unit or "") for move in outcomes[0] if move.held > 0}
            for key in held:
                wallet = self.book.wallet(*key)
                there = wallet.available(now, command.scope) + wallet.overdraft
                require(
                    wallet.policy != "hard" or there >= 0, "no hold takes a hard wallet below its floor", key, there
                )

    def check_audit(self) -> None:
        """What an audit looks at holds at every prefix of the journal."""
        breaches = self.book.breaches()
        require(not breaches, "an audit finds nothing", breaches[:3])

    def check_everything(self) -> None:
        """What is dear to look at: every wallet and lot, and the tables against a replay of the journal."""
        book = self.book
        require(book.replayed() == book.tables, "a replay is equal", differences(book.replayed(), book.tables))
        held: Counter[str] = Counter()
        for row in book.tables["hold_lots"].values():
            held[str(row[4])] += row[6]
        of_wallet: defaultdict[Key, list[Lot]] = defaultdict(list)
        for row in book.tables["lots"].values():
            lot = lot_of(row)
            of_wallet[lot.account, lot.unit].append(lot)
            self.check_lot(lot.id) if lot.expires_at is None else None
            require(lot.held == held[lot.id], "what is held of a lot is what holds hold of it", lot)
        for row in book.tables["wallets"].values():
            key = (row[1], row[2])
            lots = [lot for lot in of_wallet[key] if lot.kind not in ASIDE_KINDS]
            sums = [sum(lot.posted for lot in lots), sum(lot.held for lot in lots), sum(lot.frozen for lot in lots)]
            found = [row[_WALLET[name]] for name in ("posted", "held", "frozen")]
            require(sums == found, "a wallet is the sum of its lots", key, found, sums)
            for kind, column in (("overage", "overage"), ("uncapped", "uncapped"), ("debt", "owed")):
                counted = -sum(lot.posted for lot in of_wallet[key] if lot.kind == kind)
                require(counted == row[_WALLET[column]], "what is not there is a sum, too", key, kind)
        for event, line in book.lines.items():
            for part, back in line.reversed.items():
                require(0 <= back <= line.split[part], "what is given back was taken", event, part)


CHANGES: Final = ("accounts", "wallets", "rules", "lots", "holds", "earmarks", "payments", "claims")


def is_own(entry: Entry) -> bool:
    """A command moves it itself: not time, a claim, or what is owed."""
    if entry.kind == "lot_granted":
        return getattr(entry.details, "rule", None) is None
    return entry.kind in _OWN


def is_repeated(command: Command, book: Book, outcome: Sequence[Move]) -> bool:
    """It was accepted because it says nothing new."""
    del book
    return not outcome and isinstance(command, ClaimPayment | ReverseCharge | VoidGrant | SetWallet)


def same(table: dict[tuple[object, ...], Any], row: tuple[Any, ...]) -> None:
    """A row is stored so."""
    found = next((stored for stored in (table.get(row[:n]) for n in (2, 3, 4)) if stored is not None), None)
    require(found == row, "a refusal leaves everything as it is", found, row)


def plain_lot(lot: Lot) -> Plain:
    """A lot as the model has it."""
    return {
        "kind": lot.kind,
        "priority": lot.priority,
        "start": lot.effective_at,
        "end": lot.expires_at,
        "scope": lot.scope,
        "reference": lot.reference,
        "origin": lot.origin,
        "rule": lot.rule,
        "period": lot.period,
        "age": lot.age,
        "posted": lot.posted,
        "held": lot.held,
        "frozen": lot.frozen,
        "expired": lot.expired,
        "void": lot.void,
        "clawed": lot.clawed,
        "claimed": bool(lot.clawed or lot.pending or lot.frozen or lot.pending_frozen or lot.clawed_spent),
    }


def differences(one: Any, other: Any) -> Sequence[object]:
    """Some rows that differ."""
    return [
        (name, one[name].get(key), other[name].get(key))
        for name in one
        for key in {*one[name], *other[name]}
        if one[name].get(key) != other[name].get(key)
    ][:3]


def _text(command: Command) -> str:
    fields = {name: getattr(command, name) for name in inspect.signature(type(command)).parameters}
    said = ", ".join(f"{name}={value!r}" for name, value in fields.items() if value not in (None, (), "v1", "demo"))
    return f"{type(command).__name__}({said})"


# Chances --------------------------------------------------------------------------------------------------------------


class Chances:
    """Steps that make sense, mostly, in a world as it is."""

    def __init__(self, world: World, chance: Random, *, is_served: bool = False) -> None:
        """`is_served`: by the service. It is asked for settlements and debits under the name of who asks."""
        self.world = world
        self.chance = chance
        self.is_served = is_served

    def amount(self, most: int = 40) -> int:
        return self.chance.randrange(0, most + 1)

    def often(self, percent: int) -> bool:
        return self.chance.randrange(100) < percent

    def account(self) -> str:
        return self.chance.choice(ACCOUNTS if self.often(90) else ("r", "r/x"))

    def unit(self) -> str:
        return self.chance.choice(NAMES) if self.often(97) else "francs"

    def key(self) -> Key:
        """A wallet, mostly an open one."""
        if self.world.model.wallets and self.often(92):
            return self.chance.choice(sorted(self.world.model.wallets))
        return self.account(), self.unit()

    def money(self) -> Key:
        keys = [key for key in sorted(self.world.model.wallets) if key[1] == "usd"]
        return self.chance.choice(keys) if keys and self.often(92) else self.key()

    def use(self) -> Scope | None:
        return self.chance.choice((*USES, *USES, None))

    def hold(self, *statuses: str) -> tuple[str, str]:
        """A hold, mostly of such a status, and its account, mostly."""
        holds = self.world.model.holds
        found = [name for name, hold in holds.items() if hold["status"] in statuses][-12:]
        if not found or self.often(4):
            found = list(holds)[-12:]
        if not found or self.often(3):
            return self.new_hold(), self.account()
        name = self.chance.choice(found)
        return name, holds[name]["account"] if self.often(96) else self.account()

    def new_hold(self) -> str:
        name = hold_id()
        self.world.holds.append(name)
        return name

    def amounts(self, most: int = 25) -> tuple[tuple[str, int], ...]:
        if self.often(3):
            return self.chance.choice(
                (
                    (("usd", -1),),
                    (("usd", 1), ("usd_cap", 1)),
                    (("francs", 1),),
                    (("tokens", AMOUNT_MAX + 1),),
                )
            )
        units = self.chance.sample(("usd", "tokens", "calls"), self.chance.choice((1, 1, 1, 2, 3)))
        return tuple((unit, self.amount(most)) for unit in units)

    def past(self) -> datetime:
        """When something occurred: now, mostly, or some time ago."""
        ago = timedelta()
        if self.often(35):
            ago = timedelta(seconds=self.chance.choice((1, 60, 3_600, 22 * 3_600, 26 * 3_600, 20 * 86_400)))
        elif self.often(2):
            ago = timedelta(minutes=-self.chance.choice((1, 10)))
        return self.world.book.now - ago

    def step(self) -> Step:
        """Any step, after some time."""
        name = self.chance.choices(list(STEPS), weights=[weight for weight, _ in STEPS.values()])[0]
        return self.named(name)

    def named(self, name: str) -> Step:
        """A step of a kind, after some time."""
        return replace(STEPS[name][1](self), wait=self.wait())

    def wait(self) -> timedelta:
        kind = self.chance.randrange(100)
        if kind < 55:
            return timedelta()
        if kind < 60 and not self.is_served:
            return self.until_due()
        # Nothing is due at the very microsecond at which something else is.
        return self.some_time(kind) + timedelta(microseconds=self.chance.randrange(1_000_000))

    def until_due(self) -> timedelta:
        """Until the very moment at which a lot ends, a period begins or a hold is late, if that is soon."""
        book = self.world.book
        times = [wallet.next_due() for account in book.state.accounts.values() for wallet in account.wallets.values()]
        times += [row[4] for row in book.tables["holds"].values() if row[3] == "placed"]
        ahead = sorted(at - book.upcoming for at in times if timedelta() <= at - book.upcoming < timedelta(days=40))
        return self.chance.choice(ahead) if ahead else timedelta()

    def some_time(self, kind: int) -> timedelta:
        if kind < 80:
            return timedelta(seconds=self.chance.randrange(1, 300))
        if kind < 92:
            return timedelta(minutes=self.chance.randrange(1, 600))
        if kind < 98:
            return timedelta(hours=self.chance.randrange(1, 60))
        return timedelta(days=self.chance.randrange(1, 40))

    # Commands

    def terms(self, unit: str) -> WalletTerms:
        policies: tuple[Policy, ...] = ("hard", "hard", "hard", "soft", "unlimited")
        policy = self.chance.choice(policies)
        overdraft = self.amount(20) if policy == "hard" and unit == "usd" and self.often(30) else 0
        levels = (Threshold(amount=10), Threshold(percent=20), Threshold(percent=80), Threshold(amount=0))
        thresholds = tuple(self.chance.sample(levels, self.chance.choice((0, 0, 1, 2))))
        if self.often(3):
            overdraft, thresholds = self.chance.choice(((-1, ()), (0, (Threshold(),)), (0, (levels[0], levels[0]))))
        return WalletTerms(unit, policy, overdraft, thresholds)

    def open_account(self) -> Command:
        units = self.chance.sample((*NAMES, self.unit()), self.chance.choice((0, 1, 2, 3)))
        return OpenAccount(account=self.account(), wallets=tuple(self.terms(unit) for unit in units))

    def set_wallet(self) -> Command:
        account, unit = self.key()
        return SetWallet(account=account, terms=self.terms(unit))

    def grant(self) -> Command:
        account, unit = self.key()
        now = self.world.book.now
        start = end = None
        if self.often(20):
            start = now + timedelta(seconds=self.chance.choice((-3_600, 60, 3_600, 86_400)))
        if self.often(45):
            end = now + timedelta(seconds=self.chance.choice((30, 600, 7_200, 90_000, 864_000)))
            if self.often(4):
                end = now - timedelta(seconds=5)
        return Grant(
            account=account,
            unit=unit,
            amount=self.amount(60) if self.often(97) else -1,
            kind=self.chance.choice(("plan", "promo", "bonus", "purchase", "adjustment")),
            priority=self.chance.choice((50, 100, 100)),
            occurred_at=self.past() if self.often(15) else None,
            effective_at=start,
            expires_at=end,
            scope=self.chance.choice(SCOPES) if self.often(25) else None,
        )

    def bought(self) -> tuple[str, str, str]:
        payment = self.chance.choice(PAYMENTS)
        home = {"pi_1": ("r", "usd"), "pi_2": ("r/a", "usd"), "pi_3": ("r", "tokens")}[payment]
        account, unit = home if self.often(93) else self.key()
        return payment, account, unit

    def buy(self) -> Command:
        payment, account, unit = self.bought()
        return Grant(
            account=account,
            unit=unit,
            amount=1 + self.amount(),
            kind="purchase" if self.often(65) else "bonus",
            reference=payment,
            expires_at=self.world.book.now + timedelta(days=20) if self.often(20) else None,
        )

    def claim(self) -> Command:
        payment, account, unit = self.bought()
        return ClaimPayment(
            account=account,
            payment=payment,
            claim=self.chance.choice(("re_1", "re_2", "dp_1")),
            reason="refund",
            state=self.chance.choice(("final", "final", "open", "void")),
            unit=unit,
            claimed=self.amount(60),
            revision=self.chance.randrange(4),
            occurred_at=self.past() if self.often(10) else None,
        )

    def void_grant(self) -> Command:
        account, _ = self.key()
        return VoidGrant(account=account, lot=f"#{self.chance.randrange(1_000)}" if self.often(95) else hold_id())

    def adjust(self) -> Command:
        account, unit = self.key()
        return Adjust(account=account, unit=unit, amount=self.amount(60) - 30, reason="put right", force=self.often(40))

    def legs(self) -> tuple[Leg, ...]:
        legs = []
        for unit, most in self.amounts(30):
            least = self.chance.choice((0, most, most, most // 2)) if self.often(98) else most + 1
            legs.append(Leg(unit, least, most))
        return tuple(legs)

    def place_hold(self) -> Command:
        ended = ("released", "settled", "expired", "estimated")
        name = self.new_hold() if self.often(94) else self.hold(*(ended if self.often(70) else ("placed",)))[0]
        return PlaceHold(
            hold=name,
            account=self.chance.choice(("r/a/u/k", "r/a/u", "r/a", "r", "r/b")) if self.often(90) else self.account(),
            legs=self.legs(),
            lifetime_seconds=self.chance.choice((30, 900, 7_200)),
            overdue="charge_estimate" if self.often(40) else "release",
            scope=self.use(),
        )

    def extend_hold(self) -> Command:
        name, account = self.hold("placed")
        seconds = self.chance.choice((10, 900, 9_000))
        return ExtendHold(
            hold=name, account=account, lifetime_seconds=seconds, legs=self.legs() if self.often(60) else ()
        )

    def release_hold(self) -> Command:
        name, account = self.hold("placed") if self.often(95) else self.hold("released", "settled", "expired")
        return ReleaseHold(hold=name, account=account)

    def resolve_hold(self) -> Command:
        now = self.world.book.now
        late = [
            (name, hold["account"])
            for name, hold in self.world.model.holds.items()
            if hold["status"] == "placed" and hold["deadline"] <= now
        ]
        name, account = self.chance.choice(late) if late and self.often(95) else self.hold("placed")
        return ResolveHold(hold=name, account=account)

    def line(self, account: str, *, hold: str | None = None, **more: Any) -> ChargeLine:
        self.world.entries += 1
        made = ChargeLine(
            source="demo",
            event_id=f"e{self.world.entries}",
            account=account,
            occurred_at=self.past(),
            hold=hold,
            scope=self.use(),
            price_version="v1",
            amounts=self.amounts(),
            **more,
        )
        if self.is_served:
            is_asked_for = made.required or (hold is not None and self.often(40))
            source = "tester" if is_asked_for else "demo"
            made = msgspec.structs.replace(made, scope=made.scope or USES[0], source=source)
        self.world.lines.append(made)
        return made

    def charge(self) -> Command:
        if self.world.lines and self.often(6):
            again = self.chance.choice(self.world.lines[-20:])
            return again if self.often(60) else msgspec.structs.replace(again, price_version="v2")
        return self.line(self.account())

    def settle(self) -> Command:
        name, account = self.hold("placed")
        return self.line(account, hold=name, final=self.often(60))

    def late_charge(self) -> Command:
        name, account = self.hold("estimated", "expired", "released", "settled")
        return self.line(account, hold=name, final=self.often(80))

    def debit(self) -> Command:
        line = self.line(self.account(), required=True)
        return msgspec.structs.replace(line, occurred_at=self.world.book.now)

    def reverse(self) -> Command:
        if not self.world.lines or self.often(4):
            return ReverseCharge(account=self.account(), source="demo", event_id="none")
        line = self.chance.choice(self.world.lines[-25:])
        amounts = None
        if self.often(50):
            amounts = tuple((unit, self.amount(max(1, amount))) for unit, amount in line.amounts if amount >= 0)
            amounts = amounts or (("usd", 1),)
        account = line.account if self.often(97) else self.account()
        return ReverseCharge(
            account=account, source=line.source, event_id=line.event_id, amounts=amounts, reason="mistake"
        )

    def given_back(self) -> ReverseCharge:
        """As a bundle says it: amounts, each above zero."""
        line = self.chance.choice(self.world.lines[-25:]) if self.world.lines else self.line(self.account())
        amounts = tuple((unit, self.amount(amount)) for unit, amount in line.amounts if 0 < amount <= AMOUNT_MAX)
        if self.often(40):
            amounts = tuple((unit, amount) for unit, amount in line.amounts if 0 < amount <= AMOUNT_MAX)
        amounts = tuple((unit, amount) for unit, amount in amounts if amount) or (("usd", 1),)
        account = line.account if self.often(97) else self.account()
        return ReverseCharge(
            account=account, source=line.source, event_id=line.event_id, amounts=amounts, reason="mistake"
        )

    def transfer(self) -> Command:
        account, unit = self.money()
        to_account, _ = self.money()
        return Transfer(account=account, to_account=to_account, unit=unit, amount=self.amount(25))

    def rule(self, account_unit: Key, name: str, plan: str | None) -> Rule:
        begin = BEGIN if self.often(60) else self.world.book.now
        anchor = begin + timedelta(days=self.chance.choice((-40, -31, -1, 0, 0, 2)))
        if self.often(30):
            anchor = datetime(2026, 1, 31, 2, 30, tzinfo=UTC)
        return Rule(
            id=name,
            unit=account_unit[1],
            amount=self.amount(80),
            period=self.chance.choice(("day", "week", "month", "month", "year")),
            anchor=anchor,
            zone=self.chance.choice(("UTC", "Europe/Berlin", "America/New_York")) if self.often(97) else "Nowhere",
            every=self.chance.choice((1, 1, 2, 3)),
            priority=self.chance.choice((50, 100)),
            rollover_min=0 if self.often(80) else 5,
            rollover_max=0 if self.often(50) else 30,
            scope=self.chance.choice(SCOPES) if self.often(10) else None,
            plan=plan,
            policy=self.chance.choice((None, None, None, "hard", "soft", "unlimited")),
            end_period=None,
        )

    def set_rule(self) -> Command:
        key = self.key()
        return SetRule(account=key[0], rule=self.rule(key, f"{key[1]}-{self.chance.randrange(3)}", None))

    def end_rule(self) -> Command:
        account, unit = self.key()
        known = sorted(name for wallet in self.world.model.of(account) for name in wallet["rules"])
        name = self.chance.choice(known) if known and self.often(90) else f"{unit}-none"
        return EndRule(account=account, rule=name)

    def change_plan(self) -> Command:
        account, _ = self.key()
        plan = self.chance.choice(("free", "pro", "max"))
        units = sorted(unit for of, unit in self.world.model.wallets if of == account)
        chosen = self.chance.sample(units, min(len(units), self.chance.choice((0, 1, 2))))
        number = self.chance.randrange(3)
        rules = tuple(self.rule((account, unit), f"{plan}-{unit}-{number}", plan) for unit in chosen)
        return ChangePlan(account=account, plan=plan, rules=rules, at_period_end=self.often(40))

    def catch_up(self) -> Command:
        known = sorted(self.world.model.accounts)
        return CatchUp(account=self.chance.choice(known) if known else "r")

    # Ways

    def alone(self, name: str) -> Step:
        return Step(commands=(getattr(self, name)(),), dry_run=self.often(3))

    def several(self) -> Step:
        """A list: its commands are of one tree."""
        found: list[Command] = []
        for _ in range(self.chance.choice((2, 3, 4))):
            command = getattr(self, self.chance.choice(IN_LISTS))()
            if not found or root(command.account) == root(found[0].account):
                found.append(command)
        way = "together" if self.often(60) else "listed"
        return Step(commands=tuple(found), way=way, dry_run=self.often(10))

    def bundle(self) -> Step:
        """What is given back comes first, and may be all there is."""
        backs = [self.given_back() for _ in range(self.chance.choice((0, 0, 1, 3)))]
        lines: list[Command] = []
        for _ in range(self.chance.choice((0, 1, 2, 3, 5) if backs else (1, 2, 3, 5))):
            made = getattr(self, self.chance.choice(("charge", "charge", "settle", "late_charge")))()
            # A debit has no time of its own, so no line repeats it.
            lines.append(self.line(self.account()) if made.required else made)
        return Step(commands=(*backs, *lines), way="bundle")

    def restart(self) -> Step:
        return Step(way="restart")


def _alone(name: str) -> Callable[[Chances], Step]:
    return lambda chances: chances.alone(name)


# By name: how often, of all, and how it is made.
STEPS: Final[dict[str, tuple[int, Callable[[Chances], Step]]]] = {
    "open_account": (3, _alone("open_account")),
    "set_wallet": (2, _alone("set_wallet")),
    "grant": (12, _alone("grant")),
    "buy": (4, _alone("buy")),
    "claim": (4, _alone("claim")),
    "void_grant": (2, _alone("void_grant")),
    "adjust": (3, _alone("adjust")),
    "place_hold": (16, _alone("place_hold")),
    "extend_hold": (4, _alone("extend_hold")),
    "release_hold": (3, _alone("release_hold")),
    "resolve_hold": (5, _alone("resolve_hold")),
    "charge": (9, _alone("charge")),
    "settle": (9, _alone("settle")),
    "late_charge": (5, _alone("late_charge")),
    "debit": (4, _alone("debit")),
    "reverse": (7, _alone("reverse")),
    "transfer": (4, _alone("transfer")),
    "set_rule": (3, _alone("set_rule")),
    "end_rule": (1, _alone("end_rule")),
    "change_plan": (2, _alone("change_plan")),
    "catch_up": (3, _alone("catch_up")),
    "several": (4, Chances.several),
    "bundle": (6, Chances.bundle),
    "restart": (1, Chances.restart),
}
IN_LISTS: Final = (
    "open_account",
    "grant",
    "buy",
    "adjust",
    "place_hold",
    "extend_hold",
    "release_hold",
    "charge",
    "settle",
    "debit",
    "transfer",
    "set_wallet",
    "void_grant",
    "change_plan",
)


def beginning(chance: Random) -> list[Step]:
    """Some wallets, and something in them."""
    steps = []
    for account in ACCOUNTS:
        units = chance.sample(NAMES, chance.choice((1, 2, 3)))
        if account in {"r", "r/a"}:
            units = sorted({*units, "usd", "tokens"})
        terms = tuple(WalletTerms(unit, "hard" if chance.randrange(4) else "soft") for unit in units)
        steps.append(Step(commands=(OpenAccount(account=account, wallets=terms),)))
        for unit in units:
            if chance.randrange(4):
                given = Grant(account=account, unit=unit, amount=chance.choice((20, 100)), kind="purchase")
                steps.append(Step(commands=(given,)))
    return steps


# Seeds ----------------------------------------------------------------------------------------------------------------


@dataclass
class Failure(Exception):
    """A law was broken: the seed, and the least of what was done that breaks it."""

    seed: int
    episode: int
    why: BaseException
    steps: list[Step]
    whole: bool

    def __str__(self) -> str:
        script = "\n".join(f"  {step}" for step in self.steps)
        return f"seed {self.seed}, episode {self.episode}, whole {self.whole}: {self.why!r}\n{script}"


def play(seed: int, episode: int, steps: int, counts: Counter[str]) -> World:
    """One episode: a world of its own. Failure if it breaks a law, with a script that is as short as is cheap."""
    chance = Random(f"{seed}/{episode}")
    world = World(whole=bool(episode % 3), counts=counts)
    chances = Chances(world, chance)
    try:
        for step in beginning(chance):
            world.do(step)
        while len(world.script) < steps:
            world.do(chances.step())
        world.check_everything()
        world.check_audit()
    except Exception as error:
        why = error
    else:
        return world
    raise Failure(seed, episode, why, shrunk(world.script, world.whole, why), world.whole) from why


def shrunk(
    script: Sequence[Step], whole: bool, why: BaseException, *, made: type[World] = World, tries_max: int = 400
) -> list[Step]:
    """Leave out what the failure does not need: halves, then smaller pieces, while it stays the same failure."""
    kept = list(script)
    size = len(kept) // 2
    tries = 0
    while size >= 1 and tries < tries_max:
        at = 0
        while at < len(kept) and tries < tries_max:
            without = [*kept[:at], *kept[at + size :]]
            # Time goes on as it did.
            gone = sum((step.wait for step in kept[at : at + size]), timedelta())
            if at < len(without):
                without[at] = replace(without[at], wait=without[at].wait + gone)
            tries += 1
            if fails_alike(without, why, made(whole=whole)):
                kept = without
            else:
                at += size
        size //= 2
    return kept


def fails_alike(script: Iterable[Step], why: BaseException, world: World) -> bool:
    """A script fails in the same way."""
    try:
        for step in script:
            world.do(step)
        world.check_everything()
        world.check_audit()
    except Exception as error:
        return type(error) is type(why) and str(error).split(":")[0] == str(why).split(":")[0]
    return False


def episodes(seed: int, steps: int, counts: Counter[str], *, each: int = 300, first: int = 0) -> Iterator[World]:
    """Worlds, until so many steps have been done."""
    done, episode = 0, first
    while done < steps:
        world = play(seed, episode, min(each, steps - done) if steps - done > 40 else 40, counts)
        done += len(world.script)
        episode += 1
        yield world


def missing(counts: Counter[str]) -> list[str]:
    """The commands and refusals that were not reached."""
    return [name for name in (*COMMANDS, *REFUSALS) if not counts[name]]


def report(counts: Counter[str]) -> str:
    """How often each command and each refusal was reached."""
    return ", ".join(f"{name} {counts[name]}" for name in sorted({*counts, *COMMANDS, *REFUSALS}))
