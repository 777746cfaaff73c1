"""What the ledger promises, in plain dicts and integers: slow, and simple enough to be seen to be right.

It knows granted lots one by one, and of what is not there (debt, overage, uncapped) only sums. Where a prediction would
be the implementation once more (claims, money that comes back to a lot that repaid), it says so: then laws are checked
on what became of those wallets, and the model goes on from there.
"""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from zoneinfo import ZoneInfo

from msgspec.structs import replace

from contracts.accounts import path, root
from contracts.money import AMOUNT_MAX
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
    Transfer,
    Units,
    VoidGrant,
    WalletTerms,
)
from services.ledger.domain.entries import Move, RuleEnded, RuleSet, WalletOpened

Key = tuple[str, str]
Plain = dict[str, Any]

AHEAD: Final = timedelta(minutes=5)
LATE_GRACE: Final = timedelta(hours=24)
RETURN_GRACE: Final = timedelta(days=7)
NEVER: Final = datetime.max.replace(tzinfo=UTC)
KINDS: Final = ("plan", "promo", "bonus", "purchase", "adjustment")
ASIDE: Final = ("debt", "overage", "uncapped")
ENDED: Final = {
    "released": "hold_released",
    "settled": "hold_settled",
    "expired": "hold_expired",
    "estimated": "hold_expired",
}


def boundary(rule: Rule, n: int) -> datetime:
    """When a period begins, counted on the wall clock of its zone."""
    zone = ZoneInfo(rule.zone)
    wall = rule.anchor.astimezone(zone).replace(tzinfo=None, fold=0)
    if n == 0:
        return rule.anchor
    if rule.period == "day":
        wall += timedelta(days=rule.every * n)
    elif rule.period == "week":
        wall += timedelta(weeks=rule.every * n)
    else:
        months = wall.month - 1 + rule.every * n * (12 if rule.period == "year" else 1)
        year, month, day = wall.year + months // 12, months % 12 + 1, wall.day
        while True:
            try:
                wall = wall.replace(year=year, month=month, day=day)
                break
            except ValueError:
                day -= 1
    return wall.replace(tzinfo=zone).astimezone(UTC)


class Model:
    """Accounts with wallets, holds, charge lines and payments, as the commands so far have made them."""

    def __init__(self, units: Units) -> None:
        self.units = units
        self.accounts: set[str] = set()
        self.wallets: dict[Key, Plain] = {}
        self.holds: dict[str, Plain] = {}
        self.lines: dict[tuple[str, str, int], Plain] = {}
        self.payments: dict[Key, Plain] = {}
        # Wallets of which the last command is not predicted lot by lot.
        self.loose: set[Key] = set()
        # By how much the last command changes a wallet in all, but for what expires, is voided or claimed of it.
        self.net: dict[Key, int] = {}
        self._new = 0
        # Which kind a lot is of, by its id: told by whoever drives.
        self.kinds: dict[str, str] = {}

    def copy(self) -> "Model":
        """One that goes its own way."""
        other = Model(self.units)
        other.accounts = set(self.accounts)
        other.kinds = dict(self.kinds)
        # What it makes next has not the name of a lot it has.
        other._new = self._new
        for name in ("wallets", "holds", "lines", "payments"):
            setattr(other, name, copied(getattr(self, name)))
        # What was granted for a payment is a list.
        for payment in other.payments.values():
            payment["granted"] = list(payment["granted"])
        return other

    # Time -------------------------------------------------------------------------------------------------------------

    def late(self, commands: Iterable[Command], accounts: Iterable[str], now: datetime) -> list[str]:
        """The holds past their deadline, in their order, that commands of their accounts name, or that hold something
        of the wallets of accounts; with those on the paths of these.
        """
        past = {name for name, hold in self.holds.items() if hold["status"] == "placed" and hold["deadline"] <= now}
        asked = {(getattr(command, "hold", None), command.account) for command in commands}
        found = {name for name in past if (name, self.holds[name]["account"]) in asked}
        names = set(accounts)
        while True:
            more = {
                name
                for name in past - found
                if any(amount and part[0] in names for part, amount in self.holds[name]["parts"].items())
            }
            if not more:
                return sorted(found, key=lambda name: (self.holds[name]["deadline"], name))
            found |= more
            names |= {each for name in more for each in path(self.holds[name]["account"])}

    def catch_up(self, accounts: Iterable[str], now: datetime, *, late: Sequence[str] = ()) -> dict[Key, Plain]:
        """Do what is due on accounts, the earliest first, overdue holds among it: what those wallets were before."""
        saved: dict[Key, Plain] = {}
        keys = sorted(key for key in self.wallets if key[0] in set(accounts))
        for name in late:
            deadline = self.holds[name]["deadline"]
            saved = self.catch_up(path(self.holds[name]["account"]), deadline) | saved
            self.resolve(name, now)
        while True:
            due = [(at, key) for key in keys if (at := self.next_due(self.wallets[key])) <= now]
            if not due:
                return saved
            at, key = min(due)
            wallet = self.wallets[key]
            if key not in saved:
                saved[key] = copied(wallet)
            renewals = [rule for _, rule in sorted(wallet["rules"].items()) if self.next_boundary(rule) == at]
            renewed = [self.previous_lot(wallet, rule) for rule in renewals]
            ending = [lot for lot in wallet["lots"].values() if lot["end"] == at and available(lot) > 0]
            ending = [lot for lot in ending if lot not in renewed]
            if ending:
                for lot in ending:
                    expire(lot)
            else:
                self.renew(wallet, renewals[0], at)

    def next_due(self, wallet: Plain) -> datetime:
        """When a lot of which something is available ends, or a rule is renewed."""
        ends = [lot["end"] for lot in wallet["lots"].values() if lot["end"] is not None and available(lot) > 0]
        found: datetime = min([*ends, *(self.next_boundary(rule) for rule in wallet["rules"].values()), NEVER])
        return found

    def next_boundary(self, state: Plain) -> datetime:
        """When a rule is renewed next."""
        rule: Rule = state["rule"]
        if state["ended"] or (rule.end_period is not None and state["next"] >= rule.end_period):
            return NEVER
        if state["due"] is None:
            state["due"] = boundary(rule, state["next"])
        found: datetime = state["due"]
        return found

    def previous_lot(self, wallet: Plain, state: Plain) -> Plain | None:
        """The lot of the period before the next."""
        for lot in wallet["lots"].values():
            is_its = (lot["rule"], lot["period"]) == (state["rule"].id, state["next"] - 1)
            if is_its and lot["origin"] is None and not lot["void"] and (lot["posted"] or lot["held"] or lot["frozen"]):
                found: Plain = lot
                return found
        return None

    def renew(self, wallet: Plain, state: Plain, at: datetime) -> None:
        """A period ends, the next begins."""
        rule: Rule = state["rule"]
        before = self.previous_lot(wallet, state)
        remaining = 0 if before is None else max(available(before), 0)
        if before is not None:
            expire(before)
        if state["next"] == rule.terms_from and (rule.policy is not None or rule.overdraft is not None):
            wallet["policy"] = rule.policy or wallet["policy"]
            wallet["overdraft"] = wallet["overdraft"] if rule.overdraft is None else rule.overdraft
            if wallet["policy"] != "hard":
                wallet["overdraft"] = 0
        rolled = 0
        if state["next"] > rule.first_period:
            rolled = min(rule.rollover_max, max(remaining, rule.rollover_min))
        lot = self.add_lot(
            wallet,
            kind=rule.kind,
            amount=rule.amount + rolled,
            priority=rule.priority,
            start=at,
            end=boundary(rule, state["next"] + 1),
            scope=rule.scope,
            rule=rule.id,
            period=state["next"],
        )
        state["next"] += 1
        state["due"] = None
        self.repay(wallet, lot)

    # Lots -------------------------------------------------------------------------------------------------------------

    def add_lot(
        self,
        wallet: Plain,
        *,
        kind: str,
        amount: int,
        priority: int = 100,
        start: datetime | None = None,
        end: datetime | None = None,
        scope: LotScope | None = None,
        reference: str | None = None,
        origin: str | None = None,
        rule: str | None = None,
        period: int | None = None,
    ) -> Plain:
        """A lot whose id is not known yet."""
        self._new += 1
        lot: Plain = {
            "kind": kind,
            "priority": priority,
            "start": start,
            "end": end,
            "scope": scope,
            "reference": reference,
            "origin": origin,
            "rule": rule,
            "period": period,
            "age": (1 << 62, self._new),
            "posted": amount,
            "held": 0,
            "frozen": 0,
            "expired": 0,
            "void": False,
            "clawed": 0,
            "claimed": False,
        }
        wallet["lots"][f"new {self._new}"] = lot
        return lot

    def burning(self, wallet: Plain) -> list[tuple[str, Plain]]:
        """Lots as they are used up: priority, soonest expiry, kind, oldest."""
        return sorted(
            wallet["lots"].items(),
            key=lambda each: (
                each[1]["priority"],
                each[1]["end"] or NEVER,
                KINDS.index(each[1]["kind"]),
                each[1]["age"],
            ),
        )

    def available_in(self, wallet: Plain, now: datetime, used: Scope | None, *, anywhere: bool = False) -> int:
        """What there is to hold for a use."""
        lots = [lot for lot in wallet["lots"].values() if is_valid(lot, now) and (anywhere or is_for(lot, used))]
        owed: int = wallet["debt"]["owed"] + wallet["debt"]["held"]
        return sum(available(lot) for lot in lots) - owed

    def repay(self, wallet: Plain, lot: Plain, amount: int | None = None) -> None:
        """Money that comes in repays what is owed first."""
        paid = max(0, min(available(lot) if amount is None else amount, available(lot), wallet["debt"]["owed"]))
        lot["posted"] -= paid
        wallet["debt"]["owed"] -= paid

    def paying(self, account: str, unit: str) -> list[Key]:
        """Whose wallets: the nearest for money, all on the path for a cap."""
        found = [(each, unit) for each in path(account) if (each, unit) in self.wallets]
        return found[:1] if self.units.by_name[unit].kind == "money" else found

    def pinned(self, account: str, unit: str, hold: Plain | None) -> list[Key]:
        """A hold's wallets stay its wallets."""
        if hold is not None and unit in hold["wallets"]:
            return [(each, unit) for each in hold["wallets"][unit]]
        return self.paying(account, unit)

    def counted(self, unit: str) -> tuple[str, ...]:
        """A unit and its mirrors."""
        return (unit, *self.units.mirrors.get(unit, ()))

    # Refusals ---------------------------------------------------------------------------------------------------------

    def refusals(  # noqa: PLR0911, PLR0912 - one case for each command
        self, command: Command, now: datetime
    ) -> tuple[set[str], set[str]]:
        """The codes by which a command must be refused, any of them, and those by which it may be."""
        match command:
            case OpenAccount():
                found = {code for terms in command.wallets for code in self.bad_terms(terms)}
                asked: dict[str, WalletTerms] = {}
                for terms in command.wallets:
                    known = self.wallets.get((command.account, terms.unit))
                    if known is not None and known["policy"] != terms.policy:
                        found.add("wallet_policy_differs")
                    if terms.unit in asked and asked[terms.unit] != terms:
                        found |= {"wallet_policy_differs", "invalid_terms"}
                    asked[terms.unit] = terms
                return found, set()
            case SetWallet(terms=terms):
                return self.bad_terms(terms) | self.not_open(command.account, terms.unit), set()
            case Grant():
                return self.grant_refusals(command, now), set()
            case Adjust():
                return self.adjust_refusals(command, now), set()
            case VoidGrant():
                if command.account not in self.accounts:
                    return {"account_not_open"}, set()
                lots = [w["lots"][command.lot] for w in self.of(command.account) if command.lot in w["lots"]]
                left = [lot for lot in lots if lot["posted"] or lot["held"] or lot["frozen"]]
                return set() if left else {"unknown_lot"}, set()
            case PlaceHold():
                return self.hold_refusals(command, now), set()
            case ExtendHold():
                return self.extend_refusals(command, now), set()
            case ReleaseHold():
                hold = self.holds.get(command.hold)
                return set() if hold is None else self.ended(hold, command.account), set()
            case ResolveHold():
                hold = self.holds.get(command.hold)
                return {"unknown_hold"} if hold is None else self.ended(hold, command.account), set()
            case ChargeLine():
                return self.charge_refusals(command, now), set()
            case ReverseCharge():
                return self.reverse_refusals(command), set()
            case Transfer():
                return self.transfer_refusals(command, now), set()
            case ClaimPayment():
                return self.claim_refusals(command, now), set()
            case SetRule():
                return self.bad_rule(command.account, command.rule), {"invalid_rule"}
            case EndRule():
                if command.account not in self.accounts:
                    return {"account_not_open"}, set()
                has_it = any(command.rule in wallet["rules"] for wallet in self.of(command.account))
                return set() if has_it else {"unknown_rule"}, set()
            case ChangePlan():
                found = {code for rule in command.rules for code in self.bad_rule(command.account, rule)}
                if command.account not in self.accounts:
                    found.add("account_not_open")
                return found, {"invalid_rule"}
            case CatchUp():
                return set(), set()

    def of(self, account: str) -> list[Plain]:
        """The wallets of an account."""
        return [wallet for key, wallet in self.wallets.items() if key[0] == account]

    def bad_terms(self, terms: WalletTerms) -> set[str]:
        """Terms that make no sense."""
        if terms.unit not in self.units.by_name:
            return {"unknown_unit"}
        bad = not 0 <= terms.overdraft <= AMOUNT_MAX
        bad |= terms.overdraft > 0 and (terms.policy != "hard" or self.units.by_name[terms.unit].kind != "money")
        bad |= len(set(terms.thresholds)) < len(terms.thresholds)
        for level in terms.thresholds:
            bad |= (level.amount is None) == (level.percent is None)
            bad |= level.amount is not None and not 0 <= level.amount <= AMOUNT_MAX
            bad |= level.percent is not None and not 1 <= level.percent <= 100
        return {"invalid_terms"} if bad else set()

    def bad_rule(self, account: str, rule: Rule) -> set[str]:
        """A rule that makes no sense whatever there is."""
        if rule.unit not in self.units.by_name:
            return {"unknown_unit"}
        found = set() if 0 <= rule.amount <= AMOUNT_MAX else {"invalid_amount"}
        if rule.every < 1 or not 0 <= rule.rollover_min <= rule.rollover_max or rule.zone == "Nowhere":
            found.add("invalid_rule")
        return found | self.not_open(account, rule.unit)

    def bad_amounts(self, amounts: Sequence[tuple[str, int]]) -> set[str]:
        """Amounts that make no sense."""
        found = set()
        seen: list[str] = []
        for unit, amount in amounts:
            if unit not in self.units.by_name:
                found.add("unknown_unit")
            elif not 0 <= amount <= AMOUNT_MAX:
                found.add("invalid_amount")
            seen += self.counted(unit)
        if len(set(seen)) < len(seen):
            found.add("invalid_amount")
        return found

    def not_open(self, account: str, unit: str) -> set[str]:
        """Why there is no such wallet, if there is none."""
        if account not in self.accounts:
            return {"account_not_open"}
        if (account, unit) not in self.wallets and unit in self.units.by_name:
            return {"wallet_not_open"}
        return set()

    def grant_refusals(self, command: Grant, now: datetime) -> set[str]:
        found = self.bad_amounts([(command.unit, command.amount)])
        begins = max(command.occurred_at or now, command.effective_at or command.occurred_at or now)
        if (command.occurred_at or now) > now + AHEAD:
            found.add("invalid_time")
        if command.expires_at is not None and command.expires_at <= max(begins, now):
            found.add("invalid_time")
        if command.amount == 0:
            found.add("invalid_amount")
        return found | self.not_open(command.account, command.unit)

    def adjust_refusals(self, command: Adjust, now: datetime) -> set[str]:
        found = self.bad_amounts([(command.unit, abs(command.amount))])
        if command.amount == 0:
            found.add("invalid_amount")
        found |= self.not_open(command.account, command.unit)
        wallet = self.wallets.get((command.account, command.unit))
        if wallet is not None and wallet["policy"] == "hard" and command.amount < 0 and not command.force:
            there = self.available_in(wallet, now, None, anywhere=True) + wallet["overdraft"]
            if -command.amount > there:
                found.add("insufficient_funds")
        return found

    def ended(self, hold: Plain, account: str) -> set[str]:
        """Why a hold is not open to an account, if it is not."""
        found = set() if hold["account"] == account else {"account_differs"}
        return found | ({ENDED[hold["status"]]} if hold["status"] != "placed" else set())

    def hold_refusals(self, command: PlaceHold, now: datetime) -> set[str]:
        found = self.bad_legs(command.legs)
        known = self.holds.get(command.hold)
        if known is not None:
            is_open = known["status"] == "placed" and known["deadline"] > now
            found.add("hold_exists" if is_open else ENDED.get(known["status"], "hold_expired"))
        if command.account not in self.accounts:
            found.add("account_not_open")
        return found or self.lacking(command.legs, command.account, command.scope, None, now)

    def extend_refusals(self, command: ExtendHold, now: datetime) -> set[str]:
        found = self.bad_legs(command.legs)
        hold = self.holds.get(command.hold)
        if hold is None:
            return found | {"unknown_hold"}
        found |= self.ended(hold, command.account)
        if hold["status"] == "placed" and hold["deadline"] <= now:
            found.add("hold_expired")
        return found or self.lacking(command.legs, hold["account"], hold["scope"], hold, now)

    def bad_legs(self, legs: Sequence[Any]) -> set[str]:
        found = self.bad_amounts([(leg.unit, leg.at_most) for leg in legs])
        return found | {"invalid_amount" for leg in legs if not 0 <= leg.at_least <= leg.at_most}

    def lacking(
        self, legs: Sequence[Any], account: str, used: Scope | None, hold: Plain | None, now: datetime
    ) -> set[str]:
        short = [leg for leg in legs if self.to_hold(leg, account, used, hold, now) < leg.at_least]
        return {"insufficient_funds"} if short else set()

    def to_hold(self, leg: Any, account: str, used: Scope | None, hold: Plain | None, now: datetime) -> int:
        """How much of a leg can be set aside: on all its wallets the same, as much as the tightest hard one allows."""
        amount: int = leg.at_most
        for unit in self.counted(leg.unit):
            for key in self.pinned(account, unit, hold):
                wallet = self.wallets[key]
                if wallet["policy"] == "hard":
                    amount = min(amount, max(0, self.available_in(wallet, now, used) + wallet["overdraft"]))
        return amount

    def charge_refusals(self, line: ChargeLine, now: datetime) -> set[str]:
        known = self.lines.get((line.source, line.event_id, line.revision))
        if known is not None:
            return {"already_charged"} if said(known["line"]) == said(line) else {"charge_differs"}
        found = self.bad_amounts(line.amounts)
        if line.occurred_at > now + AHEAD:
            found.add("invalid_time")
        if line.account not in self.accounts:
            found.add("account_not_open")
        hold = self.holds.get(line.hold or "")
        if hold is not None and hold["account"] != line.account:
            found.add("account_differs")
        if found or not line.required:
            return found
        for name, amount in line.amounts:
            for unit in self.counted(name):
                for key in self.pinned(line.account, unit, hold):
                    wallet = self.wallets[key]
                    if wallet["policy"] == "hard" and amount > 0 and self.room(wallet, line, unit, now) < amount:
                        found.add("insufficient_funds")
        return found

    def room(self, wallet: Plain, line: ChargeLine, unit: str, now: datetime) -> int:
        """What a debit without a hold may take."""
        there = sum(self.usable(wallet, lot, line, None, unit, now) for lot in wallet["lots"].values())
        floor: int = wallet["overdraft"] - wallet["debt"]["owed"] - wallet["debt"]["held"]
        return there + floor

    def reverse_refusals(self, command: ReverseCharge) -> set[str]:
        found = self.bad_amounts(command.amounts or ())
        line = self.lines.get((command.source, command.event_id, command.revision))
        if line is None or line["line"].account != command.account:
            return found | {"unknown_charge"}
        charged = dict(line["line"].amounts)
        for unit, amount in command.amounts or ():
            if any(amount > left for left in self.left_of(line, unit, charged)):
                found.add("more_than_charged")
        return found

    def left_of(self, line: Plain, unit: str, charged: dict[str, int]) -> list[int]:
        """What is left to give back of a unit, by wallet; of what no wallet was charged, what was charged."""
        if unit not in charged:
            return [0]
        counted = self.counted(unit)
        wallets = sorted({key[:2] for key in line["split"] if key[1] in counted})
        found = [
            sum(line["split"][key] - line["back"].get(key, 0) for key in line["split"] if key[:2] == wallet)
            for wallet in wallets
        ]
        return found or [charged[unit]]

    def transfer_refusals(self, command: Transfer, now: datetime) -> set[str]:
        found = self.bad_amounts([(command.unit, command.amount)])
        if command.amount == 0:
            found.add("invalid_amount")
        if command.unit in self.units.by_name and self.units.by_name[command.unit].kind != "money":
            found.add("invalid_transfer")
        if command.account == command.to_account or root(command.account) != root(command.to_account):
            found.add("invalid_transfer")
        for account in (command.account, command.to_account):
            found |= self.not_open(account, command.unit)
        if not found:
            wallet = self.wallets[command.account, command.unit]
            if command.amount > self.available_in(wallet, now, None, anywhere=True):
                found.add("insufficient_funds")
        return found

    def claim_refusals(self, command: ClaimPayment, now: datetime) -> set[str]:
        found = self.bad_amounts([(command.unit, command.claimed)])
        if (command.occurred_at or now) > now + AHEAD:
            found.add("invalid_time")
        found |= self.not_open(command.account, command.unit)
        payment = self.payments.get((command.payment, command.account))
        if payment is None:
            elsewhere = [each for (of, _), each in self.payments.items() if of == command.payment and each["paid"]]
            if elsewhere:
                found.add("account_differs")
        elif payment["unit"] not in {None, command.unit}:
            found.add("invalid_amount")
        return found

    # Effects ----------------------------------------------------------------------------------------------------------

    def take(self, command: Command, now: datetime) -> None:  # noqa: PLR0912 - one case for each command
        """What an accepted command does."""
        self.loose, self.net = set(), {}
        match command:
            case OpenAccount():
                self.accounts.update(path(command.account))
                for terms in command.wallets:
                    self.wallets.setdefault((command.account, terms.unit), self.new_wallet(terms))
            case SetWallet(terms=terms):
                wallet = self.wallets[command.account, terms.unit]
                wallet.update(policy=terms.policy, overdraft=terms.overdraft, thresholds=terms.thresholds)
            case Grant():
                self.grant(command, now)
            case Adjust():
                self.adjust(command, now)
            case VoidGrant():
                for wallet in self.of(command.account):
                    if command.lot in wallet["lots"]:
                        void(wallet["lots"][command.lot])
            case PlaceHold():
                self.place_hold(command, now)
            case ExtendHold():
                hold = self.holds[command.hold]
                hold["deadline"] = max(hold["deadline"], now + timedelta(seconds=command.lifetime_seconds))
                self.set_aside(hold, command.legs, now)
            case ReleaseHold():
                self.end(command.hold, command.account, "released", now)
            case ResolveHold():
                if self.holds[command.hold]["deadline"] <= now:
                    self.resolve(command.hold, now)
            case ChargeLine():
                self.charge(command, now)
            case ReverseCharge():
                self.reverse(command, now)
            case Transfer():
                self.transfer(command, now)
            case ClaimPayment():
                self.claim(command)
            case SetRule() | EndRule() | ChangePlan() | CatchUp():
                # Which period is the next one, whoever drives tells: see `learn_rules`.
                pass

    def learn_rules(self, moves: Iterable[Move], now: datetime) -> None:
        """What rules there are from now on; all that follows is predicted. With a rule that is gone go its lots."""
        for move in moves:
            wallet = self.wallets[move.account, move.unit or ""] if (move.account, move.unit) in self.wallets else None
            match move.details:
                case RuleSet(rule=rule, next_period=number) if wallet is not None:
                    wallet["rules"][rule.id] = {"rule": rule, "next": number, "ended": False, "due": None}
                case RuleEnded(rule=name, end_period=end) if wallet is not None:
                    state = wallet["rules"][name]
                    state["due"] = None
                    if end is None:
                        state["ended"] = True
                        for lot in wallet["lots"].values():
                            if lot["rule"] == name and lot["end"] > now:
                                void(lot)
                    else:
                        state["rule"] = replace(state["rule"], end_period=end)
                case WalletOpened(policy=policy, overdraft=overdraft) if wallet is not None:
                    wallet["policy"], wallet["overdraft"] = policy, overdraft
                case _:
                    pass

    def new_wallet(self, terms: WalletTerms) -> Plain:
        return {
            "policy": terms.policy,
            "overdraft": terms.overdraft,
            "thresholds": terms.thresholds,
            "lots": {},
            "rules": {},
            # What was not there: posted, held.
            "debt": {"owed": 0, "held": 0},
            "overage": {"owed": 0, "held": 0},
            "uncapped": {"owed": 0, "held": 0},
        }

    def changes(self, key: Key, amount: int) -> None:
        """Note by how much a wallet changes in all."""
        self.net[key] = self.net.get(key, 0) + amount

    def tree(self, account: str) -> set[Key]:
        """The wallets of a tree."""
        return {key for key in self.wallets if root(key[0]) == root(account)}

    def grant(self, command: Grant, now: datetime) -> None:
        key = (command.account, command.unit)
        self.changes(key, command.amount)
        lot = self.add_lot(
            self.wallets[key],
            kind=command.kind,
            amount=command.amount,
            priority=command.priority,
            start=command.effective_at,
            end=command.expires_at,
            scope=command.scope,
            reference=command.reference,
            origin=command.origin,
        )
        if is_payment(command.kind, command.reference):
            assert command.reference is not None
            payment = self.payment(command.reference, command.account)
            if command.kind == "purchase" and payment["unit"] in {None, command.unit}:
                payment["unit"] = command.unit
                payment["paid"] += command.amount
            payment["granted"].append((command.kind, command.unit, command.amount))
            if payment["claims"]:
                self.loose |= self.tree(command.account)
        if command.effective_at is None or command.effective_at <= now:
            self.repay(self.wallets[key], lot)

    def payment(self, name: str, account: str) -> Plain:
        return self.payments.setdefault((name, account), {"unit": None, "paid": 0, "granted": [], "claims": {}})

    def adjust(self, command: Adjust, now: datetime) -> None:
        key = (command.account, command.unit)
        wallet = self.wallets[key]
        self.changes(key, command.amount)
        if command.amount > 0:
            lot = self.add_lot(wallet, kind="adjustment", amount=command.amount)
            self.repay(wallet, lot)
            return
        left = -command.amount
        for _, lot in self.burning(wallet):
            part = max(0, min(left, available(lot))) if is_valid(lot, now) else 0
            lot["posted"] -= part
            left -= part
        wallet["uncapped" if wallet["policy"] == "unlimited" else self.beyond(command.unit)]["owed"] += left

    def beyond(self, unit: str) -> str:
        return "debt" if self.units.by_name[unit].kind == "money" else "overage"

    def place_hold(self, command: PlaceHold, now: datetime) -> None:
        hold: Plain = {
            "account": command.account,
            "status": "placed",
            "deadline": now + timedelta(seconds=command.lifetime_seconds),
            "overdue": command.overdue,
            "scope": command.scope,
            "placed_at": now,
            "ended_at": None,
            "wallets": {},
            # By wallet and lot, or kind of pseudo-lot: what is set aside, and what was ever.
            "parts": {},
            "earmarked": set(),
        }
        self.set_aside(hold, command.legs, now)
        self.holds[command.hold] = hold

    def set_aside(self, hold: Plain, legs: Sequence[Any], now: datetime) -> None:
        for leg in legs:
            amount = self.to_hold(leg, hold["account"], hold["scope"], hold, now)
            for unit in self.counted(leg.unit):
                keys = self.pinned(hold["account"], unit, hold)
                hold["wallets"][unit] = [key[0] for key in keys]
                for key in keys:
                    self.set_aside_on(hold, key, amount, now)

    def set_aside_on(self, hold: Plain, key: Key, amount: int, now: datetime) -> None:
        wallet = self.wallets[key]
        left = amount
        if wallet["policy"] != "unlimited":
            for name, lot in self.burning(wallet):
                part = max(0, min(left, available(lot))) if is_valid(lot, now) and is_for(lot, hold["scope"]) else 0
                if part:
                    lot["held"] += part
                    left -= part
                    hold["parts"][*key, name] = hold["parts"].get((*key, name), 0) + part
                    hold["earmarked"].add((*key, name))
        if left:
            kind = "uncapped" if wallet["policy"] == "unlimited" else self.beyond(key[1])
            wallet[kind]["held"] += left
            hold["parts"][*key, kind] = hold["parts"].get((*key, kind), 0) + left

    def resolve(self, name: str, now: datetime) -> None:
        """A hold ends at its deadline, as it says itself."""
        hold = self.holds[name]
        is_estimate = hold["overdue"] == "charge_estimate"
        if is_estimate:
            self.estimate(hold)
        self.end(name, hold["account"], "estimated" if is_estimate else "expired", now, at=hold["deadline"])

    def end(self, name: str, account: str, status: str, now: datetime, *, at: datetime | None = None) -> None:
        """Release what a hold holds, and end it. What is free of a lot that is void, or over by then, is gone."""
        hold = self.holds.get(name)
        if hold is None:
            hold = {"account": account, "wallets": {}, "parts": {}, "earmarked": set(), "deadline": None, "scope": None}
            self.holds[name] = hold
        for (holder, unit, part), amount in list(hold["parts"].items()):
            self.unhold(hold, (holder, unit, part), amount)
            lot = self.wallets[holder, unit]["lots"].get(part)
            if lot is not None and amount:
                self.after_freed(lot, at or now)
        hold.update(status=status, ended_at=now)

    def unhold(self, hold: Plain, part: tuple[str, str, str], amount: int) -> None:
        wallet = self.wallets[part[:2]]
        hold["parts"][part] -= amount
        if part[2] in ASIDE:
            wallet[part[2]]["held"] -= amount
        else:
            lot = wallet["lots"][part[2]]
            lot["held"] -= amount
            if lot["claimed"] and amount:
                self.loose |= self.tree(part[0])

    def after_freed(self, lot: Plain, now: datetime) -> None:
        if lot["void"]:
            void(lot)
        elif lot["end"] is not None and lot["end"] <= now:
            expire(lot)

    def estimate(self, hold: Plain) -> None:
        """All that is held is charged."""
        hold["estimated"] = {part: amount for part, amount in hold["parts"].items() if amount}
        for part, amount in hold["estimated"].items():
            self.changes(part[:2], -amount)
            self.unhold(hold, part, amount)
            wallet = self.wallets[part[:2]]
            if part[2] in ASIDE:
                wallet[part[2]]["owed"] += amount
            else:
                wallet["lots"][part[2]]["posted"] -= amount

    def charge(self, line: ChargeLine, now: datetime) -> None:
        hold = self.holds.get(line.hold or "")
        used = line.scope
        if used is None and hold is not None:
            used = hold["scope"]
        self.lines[line.source, line.event_id, line.revision] = {"line": line, "split": {}, "back": {}, "used": used}
        if hold is not None and hold["status"] == "estimated":
            self.charge_after_estimate(line, hold, now)
            return
        for name, amount in line.amounts:
            for unit in self.counted(name):
                for key in self.pinned(line.account, unit, hold) if amount else ():
                    self.charge_wallet(line, hold, key, amount, now)
        is_open = hold is not None and hold["status"] == "placed"
        if line.hold is not None and (hold is None or (is_open and line.final)):
            self.end(line.hold, line.account, "settled", now)

    def charge_wallet(self, line: ChargeLine, hold: Plain | None, key: Key, amount: int, now: datetime) -> None:
        wallet = self.wallets[key]
        self.changes(key, -amount)
        used = line.scope if line.scope is not None or hold is None else hold["scope"]
        left = uncovered = amount
        if hold is not None and hold["status"] == "placed":
            for part in self.parts_in_order(hold, key):
                is_lot = part[2] not in ASIDE
                if is_lot and not is_for(wallet["lots"][part[2]], used):
                    continue
                covered = min(uncovered, hold["parts"][part])
                uncovered -= covered
                self.unhold(hold, part, covered)
                if is_lot:
                    wallet["lots"][part[2]]["posted"] -= covered
                    left -= covered
                elif part[2] == "uncapped":
                    wallet["uncapped"]["owed"] += covered
                    left -= covered
        if wallet["policy"] == "unlimited":
            wallet["uncapped"]["owed"] += left
            return
        for _, lot in self.burning(wallet):
            part_of_lot = max(0, min(left, self.usable(wallet, lot, line, hold, key[1], now)))
            revived = max(0, part_of_lot - max(available(lot), 0))
            lot["expired"] -= revived
            lot["posted"] += revived - part_of_lot
            left -= part_of_lot
        wallet[self.beyond(key[1])]["owed"] += left

    def parts_in_order(self, hold: Plain, key: Key) -> list[tuple[str, str, str]]:
        """Of a wallet: lots in burn order, then what stood for what was not there."""
        found = [(*key, name) for name, _ in self.burning(self.wallets[key])]
        found += [(*key, kind) for kind in ("uncapped", "debt", "overage")]
        return [part for part in found if hold["parts"].get(part)]

    def usable(  # noqa: PLR0917 - what it depends on
        self, wallet: Plain, lot: Plain, line: ChargeLine, hold: Plain | None, unit: str, now: datetime
    ) -> int:
        """How much of a lot a charge may take, beside what its hold holds."""
        used = line.scope if line.scope is not None or hold is None else hold["scope"]
        if not is_for(lot, used):
            return 0
        name = next(name for name, each in wallet["lots"].items() if each is lot)
        earmarked = hold is not None and any(part[2] == name for part in hold["earmarked"])
        is_cap = self.units.by_name[unit].kind == "cap"
        at = now
        if is_cap:
            placed = hold is not None and hold["deadline"] is not None
            at = hold["placed_at"] if placed and hold is not None else min(line.occurred_at, now)
        if lot["end"] is None or now < lot["end"]:
            has_started = lot["start"] is None or lot["start"] <= at
            return max(0, available(lot)) if has_started or earmarked else 0
        if lot["void"]:
            return 0
        late = now <= lot["end"] + LATE_GRACE
        if is_cap and is_valid(lot, at):
            fine = True
        elif earmarked:
            ended = (hold["ended_at"] if hold is not None else None) or lot["end"]
            fine = now <= max(ended, lot["end"]) + LATE_GRACE
        else:
            fine = not is_cap and line.occurred_at < lot["end"] and late
        return max(0, available(lot)) + self.revivable(wallet, lot) if fine else 0

    def revivable(self, wallet: Plain, lot: Plain) -> int:
        """What has expired, but not what may have been rolled over."""
        state = wallet["rules"].get(lot["rule"])
        expired: int = lot["expired"]
        if state is None or state["next"] <= lot["period"] + 1:
            return expired
        return max(0, expired - int(state["rule"].rollover_max))

    def charge_after_estimate(self, line: ChargeLine, hold: Plain, now: datetime) -> None:
        """The estimate goes back, whole, and what it really cost is charged: what of which lot is left to laws."""
        keys = {part[:2] for part in hold["estimated"]}
        for part, amount in hold["estimated"].items():
            self.changes(part[:2], amount)
        for name, amount in line.amounts:
            for unit in self.counted(name):
                for key in self.pinned(line.account, unit, hold) if amount else ():
                    keys.add(key)
                    self.changes(key, -amount)
        hold.update(status="settled", ended_at=now)
        self.loose |= {each for key in keys for each in self.tree(key[0])}

    def reverse(self, command: ReverseCharge, now: datetime) -> None:
        line = self.lines[command.source, command.event_id, command.revision]
        charged = dict(line["line"].amounts)
        asked: dict[str, int] | None = None
        if command.amounts is not None:
            asked = {}
            for unit, amount in command.amounts:
                asked |= dict.fromkeys(self.counted(unit) if unit in charged else (), amount)
        for key in dict.fromkeys(part[:2] for part in line["split"]):
            parts = [part for part in reversed(list(line["split"])) if part[:2] == key]
            wanted = sum(line["split"][part] - line["back"].get(part, 0) for part in parts)
            if asked is not None:
                wanted = asked.get(key[1], 0)
            restored = []
            for part in parts:
                back = min(wanted, line["split"][part] - line["back"].get(part, 0))
                wanted -= back
                line["back"][part] = line["back"].get(part, 0) + back
                self.changes(key, back)
                if back:
                    restored.append((part, back))
            for part, back in restored:
                self.restore(part, back, now)

    def restore(self, part: tuple[str, str, str], back: int, now: datetime) -> None:
        """What is given back to a lot."""
        wallet = self.wallets[part[:2]]
        lot = wallet["lots"].get(part[2])
        if lot is None:
            # A pseudo-lot: of money there may be lots that had repaid it.
            kind = self.kinds[part[2]]
            if kind == "debt":
                self.loose |= self.tree(part[0])
            else:
                wallet[kind]["owed"] -= back
        elif lot["claimed"] or self.is_claimed(lot):
            self.loose |= self.tree(part[0])
        elif not lot["void"]:
            over = lot["end"] is not None and lot["end"] <= now
            is_money = self.units.by_name[part[1]].kind == "money"
            if over and is_money:
                new = self.add_lot(
                    wallet,
                    kind=lot["kind"],
                    amount=back,
                    priority=lot["priority"],
                    end=now + RETURN_GRACE,
                    scope=lot["scope"],
                    reference=lot["reference"],
                    origin=part[2],
                )
                self.repay(wallet, new)
            elif over:
                lot["expired"] += back
            else:
                lot["posted"] += back
                if is_money and (lot["start"] is None or lot["start"] <= now):
                    self.repay(wallet, lot, back)

    def is_claimed(self, lot: Plain) -> bool:
        """There are claims on the payment that a lot was granted for."""
        payments = [each for (of, _), each in self.payments.items() if of == lot["reference"]]
        return is_payment(lot["kind"], lot["reference"]) and any(each["claims"] for each in payments)

    def transfer(self, command: Transfer, now: datetime) -> None:
        source, target = (command.account, command.unit), (command.to_account, command.unit)
        self.changes(source, -command.amount)
        self.changes(target, command.amount)
        left = command.amount
        for name, lot in self.burning(self.wallets[source]):
            part = max(0, min(left, available(lot))) if is_valid(lot, now) else 0
            if part:
                left -= part
                lot["posted"] -= part
                came = self.add_lot(
                    self.wallets[target],
                    kind=lot["kind"],
                    amount=part,
                    priority=lot["priority"],
                    start=lot["start"],
                    end=lot["end"],
                    scope=lot["scope"],
                    reference=lot["reference"],
                    origin=name,
                )
                self.repay(self.wallets[target], came)
                if lot["claimed"]:
                    self.loose |= self.tree(command.account)

    def claim(self, command: ClaimPayment) -> None:
        payment = self.payment(command.payment, command.account)
        payment["unit"] = command.unit
        known = payment["claims"].get(command.claim)
        if known is None or command.revision >= known[0]:
            payment["claims"][command.claim] = (command.revision, command.state, command.claimed)
        self.loose |= self.tree(command.account)

    # What claims come to ----------------------------------------------------------------------------------------------

    def wanted(self, payment: Plain) -> tuple[dict[Key, int], dict[Key, int]]:
        """What claims take and freeze by (kind, unit): whatever order they and the grants came in."""
        unit = payment["unit"]
        final = sum(amount for _, state, amount in payment["claims"].values() if state == "final")
        still = sum(amount for _, state, amount in payment["claims"].values() if state == "open")
        paid = sum(amount for kind, of, amount in payment["granted"] if (kind, of) == ("purchase", unit))
        clawed = min(paid, final)
        taken = {("purchase", unit): clawed}
        for of in {of for kind, of, _ in payment["granted"] if kind == "bonus"}:
            bonus = sum(amount for kind, each, amount in payment["granted"] if (kind, each) == ("bonus", of))
            taken["bonus", of] = bonus * clawed // paid if paid else 0
        return taken, {("purchase", unit): min(paid - clawed, still)}


def said(line: ChargeLine) -> tuple[object, ...]:
    """What a charge line says of a use, but for how it is asked."""
    used = (line.scope, line.price_version, line.own_key, line.amounts)
    return (line.account, line.occurred_at, line.hold, *used)


def copied(plain: Any) -> Any:
    """A copy of what is made of dicts and sets; what is in them never changes."""
    if isinstance(plain, dict):
        return {key: copied(value) for key, value in plain.items()}
    return set(plain) if isinstance(plain, set) else plain


def available(lot: Plain) -> int:
    """What may be held or charged of a lot."""
    found: int = lot["posted"] - lot["held"] - lot["frozen"]
    return found


def is_valid(lot: Plain, at: datetime) -> bool:
    """It has begun and not ended."""
    return (lot["start"] is None or lot["start"] <= at) and (lot["end"] is None or at < lot["end"])


def is_for(lot: Plain, used: Scope | None) -> bool:
    """A use is in the lot's scope."""
    scope: LotScope | None = lot["scope"]
    if scope is None:
        return True
    if used is None:
        return False
    return (
        (not scope.providers or used.provider in scope.providers)
        and (not scope.models or used.model in scope.models)
        and (not scope.features or used.feature in scope.features)
    )


def is_payment(kind: str, reference: str | None) -> bool:
    """A lot was granted for a payment that can be claimed."""
    return kind in {"purchase", "bonus"} and reference is not None


def expire(lot: Plain) -> None:
    """What is available of a lot expires."""
    gone = max(0, available(lot))
    lot["posted"] -= gone
    lot["expired"] += gone


def void(lot: Plain) -> None:
    """What is available of a lot is taken back; what is not will be."""
    lot["posted"] -= max(0, available(lot))
    lot["void"] = True
