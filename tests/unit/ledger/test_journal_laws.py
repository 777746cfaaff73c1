"""The laws of a journal, as the audit tells them: each is broken here by a journal that nobody could have decided."""

from datetime import datetime, timedelta
from typing import Any, Final

import msgspec
import pytest

from contracts.ids import derived_uuid7
from services.ledger.domain.chain import details_text
from services.ledger.domain.commands import LotScope, Scope
from services.ledger.domain.entries import Charged, HoldExtended, HoldPlaced, LotGranted, Noted, WalletOpened
from services.ledger.domain.laws import Breach, Laws, more_than_charged
from tests.unit.ledger.book import BEGIN, PARTITION

HOUR: Final = timedelta(hours=1)
DAY: Final = timedelta(days=1)
USED: Final = Scope("openai", "gpt-4o")
PLACED: Final = HoldPlaced(account="acme", expires_at=BEGIN + HOUR, overdue="release", legs=())


class Journal:
    """A journal by hand: each transaction is a batch of its own, an hour after the one before it."""

    def __init__(self) -> None:
        self.laws = Laws(PARTITION, caps={"tokens"})
        self.batch = 0
        self.rows: list[tuple[Any, ...]] = []

    @property
    def now(self) -> datetime:
        return BEGIN + self.batch * HOUR

    def add(self, *moves: dict[str, Any]) -> "Journal":
        """A transaction; each move names what is not as usual."""
        self.batch += 1
        transaction = derived_uuid7(recorded_at=self.now, partition=PARTITION, batch=self.batch, position=1)
        self.rows = []
        for position, move in enumerate(moves, start=1):
            usual: dict[str, Any] = {"account": "acme", "unit": "usd", "lot": None, "lot_kind": None, "hold": None}
            each = usual | {"posted": 0, "held": 0, "frozen": 0, "details": None, "at": self.now} | move
            if each["lot"] is not None and each["lot_kind"] is None:
                each["lot_kind"] = "purchase"
            columns = [each[name] for name in ("kind", "account", "unit", "lot", "lot_kind", "hold")]
            amounts = [each[name] for name in ("posted", "held", "frozen")]
            details = details_text(each["details"])
            self.rows.append(
                (self.batch, position, str(transaction), *columns, *amounts, each["at"], self.now, details)
            )
        self.laws.add(self.rows)
        return self

    def open(self, *, unit: str = "usd", policy: Any = "hard", overdraft: int = 0) -> "Journal":
        """A wallet."""
        return self.add({"kind": "wallet_opened", "unit": unit, "details": WalletOpened(policy, overdraft)})

    def grant(self, amount: int, *, lot: str = "lot", unit: str = "usd", **details: Any) -> "Journal":
        """A lot."""
        contra = "@stripe" if unit == "usd" else "@stripe/acme"
        granted = LotGranted(priority=100, **details)
        return self.add(
            {"kind": "lot_granted", "unit": unit, "lot": lot, "posted": amount, "details": granted},
            {"kind": "lot_granted", "unit": unit, "account": contra, "posted": -amount},
        )

    def charge(self, amount: int, *, lot: str = "lot", unit: str = "usd", lot_kind: str = "purchase") -> "Journal":
        """Taken of a lot."""
        contra = "@usage" if unit == "usd" else "@usage/acme"
        return self.add(
            {"kind": "charged", "unit": unit, "lot": lot, "lot_kind": lot_kind, "posted": -amount},
            {"kind": "charged", "unit": unit, "account": contra, "posted": amount},
        )

    def debit(self, *amounts: int, ago: timedelta = timedelta(), scope: Scope | None = USED) -> "Journal":
        """Taken of a lot, and what is said after that on a debt, by a line that required it."""
        lots = [{"lot": "lot"}, {"lot": "debt", "lot_kind": "debt"}]
        moves = [{"kind": "charged", "posted": -amount} | lot for amount, lot in zip(amounts, lots, strict=False)]
        details = Charged(lines=1, lines_hash="", required=True)
        self.add(*moves, {"kind": "charged", "account": "@usage", "posted": sum(amounts), "details": details})
        return self.lines(ago=ago, scope=scope, required=True)

    def taken(self, kind: str, amount: int, *, lot: str, unit: str = "usd", forced: bool = False) -> "Journal":
        """Taken by hand, or moved elsewhere."""
        noted = Noted("why", forced=forced)
        lot_kind = "purchase" if lot == "lot" else lot
        contra = "@adjustment" if unit == "usd" else "@adjustment/acme"
        return self.add(
            {"kind": kind, "unit": unit, "lot": lot, "lot_kind": lot_kind, "posted": -amount, "details": noted},
            {"kind": kind, "unit": unit, "account": contra, "posted": amount},
        )

    def hold(self, amount: int, *, lot: str = "lot", hold: str = "hold", **more: Any) -> "Journal":
        """Set aside."""
        move = {"kind": "hold_placed", "lot": lot, "hold": hold, "held": amount, "details": PLACED}
        return self.add(move | more)

    def expire(self, amount: int) -> "Journal":
        """The end of what is unheld of a lot."""
        return self.add(
            {"kind": "lot_expired", "lot": "lot", "posted": -amount},
            {"kind": "lot_expired", "account": "@expired", "posted": amount},
        )

    def end(self, amount: int, *, kind: str = "hold_released", lot: str | None = "lot") -> "Journal":
        """A hold's end."""
        return self.add({"kind": kind, "lot": lot, "hold": "hold", "held": -amount})

    def lines(
        self,
        *,
        ago: timedelta = timedelta(),
        hold: str | None = None,
        scope: Scope | None = USED,
        required: bool = False,
    ) -> "Journal":
        """What was added last was charged by one line."""
        split = [
            [row[4], row[5], row[6], row[7], row[9], row[10]] for row in self.rows if row[3] == "charged" and row[6]
        ]
        text = msgspec.json.encode(split).decode()
        scope_text = msgspec.json.encode(scope).decode()
        line = (PARTITION, "demo", "1", 0, "acme", self.now - ago, hold, scope_text, "v1", False, "[]", text)
        self.laws.check_lines(self.rows, [line], required=required)
        return self

    @property
    def said(self) -> list[tuple[int, str]]:
        return [(breach.batch, breach.what) for breach in self.laws.breaches]


GRANTED_60: Final = {"kind": "lot_granted", "account": "@stripe", "posted": -60}


def funded(amount: int = 100, **details: Any) -> Journal:
    return Journal().open().grant(amount, **details)


LAWFUL: Final = {
    "a charge": funded().charge(40).lines(),
    "a hold and its release": funded().hold(40).end(40),
    "a hold and its settlement": funded()
    .hold(40)
    .add(
        {"kind": "charged", "lot": "lot", "hold": "hold", "posted": -30, "held": -30},
        {"kind": "charged", "account": "@usage", "posted": 30},
        {"kind": "hold_settled", "lot": "lot", "hold": "hold", "held": -10},
    )
    .lines(hold="hold"),
    "an estimate, reversed": funded()
    .hold(40)
    .add(
        {"kind": "hold_estimated", "lot": "lot", "hold": "hold", "posted": -40, "held": -40},
        {"kind": "hold_estimated", "account": "@usage", "posted": 40},
    )
    .add(
        {"kind": "estimate_reversed", "lot": "lot", "hold": "hold", "posted": 40},
        {"kind": "estimate_reversed", "account": "@usage", "posted": -40},
    ),
    "a tombstone": funded().end(0, lot=None),
    "a debt": funded().charge(40, lot="debt", lot_kind="debt").lines(),
    "a hold on a soft wallet": Journal().open(policy="soft").hold(40, lot="debt", lot_kind="debt"),
    "a hold within the overdraft": Journal().open(overdraft=40).hold(40, lot="debt", lot_kind="debt"),
    "a late charge within the grace": funded(expires_at=BEGIN + 3 * HOUR).charge(40).lines(ago=HOUR),
    "a cap's charge of its period": Journal()
    .open(unit="tokens")
    .grant(100, unit="tokens", effective_at=BEGIN, expires_at=BEGIN + 2 * HOUR)
    .charge(5, unit="tokens")
    .lines(ago=2 * HOUR),
    "a debit of all that is there": funded().debit(100),
    "a debit of all that is there, and the overdraft": Journal().open(overdraft=40).grant(100).debit(100, 40),
    "a debit of a soft wallet": Journal().open(policy="soft").grant(100).debit(100, 40),
    "a debit that revives what has expired": funded(expires_at=BEGIN + 3 * HOUR)
    .charge(130, lot="debt", lot_kind="debt")
    .expire(100)
    .add({"kind": "lot_granted", "lot": "other", "posted": 60, "details": LotGranted(100)}, GRANTED_60)
    .add(
        {"kind": "lot_revived", "lot": "lot", "posted": 5}, {"kind": "lot_revived", "account": "@expired", "posted": -5}
    )
    .debit(5, ago=5 * HOUR),
    "what is taken by force": funded().taken("adjusted", 140, lot="debt", forced=True),
    "what is there is moved": funded().taken("transferred", 100, lot="lot"),
    "what a hold had set aside, after the end": funded(expires_at=BEGIN + 4 * HOUR)
    .hold(40)
    .end(40)
    .charge(40)
    .lines(hold="hold"),
}

UNLAWFUL: Final = {
    "the legs of its transaction sum to -1": funded().add({"kind": "charged", "lot": "lot", "posted": -1}),
    "in ('tokens', 'acme')": Journal()
    .open(unit="tokens")
    .grant(9, unit="tokens")
    .add(
        {"kind": "charged", "unit": "tokens", "lot": "lot", "posted": -1},
        {"kind": "charged", "unit": "tokens", "account": "@usage/acme/ana", "posted": 1},
    ),
    "lot lot has -1, of which 0 is held": funded().charge(101),
    "lot lot has 100, of which 101 is held": funded().hold(101),
    "-1 is held": funded().add({"kind": "hold_released", "lot": "lot", "hold": "hold", "held": -1}),
    "and -1 frozen": funded().add({"kind": "claim_frozen", "lot": "lot", "frozen": -1}),
    "the debt debt is 5, above zero": funded().charge(-5, lot="debt", lot_kind="debt"),
    "lot other is moved before it is there": funded().charge(1, lot="other"),
    "is a purchase of acme usd": funded().charge(1, lot_kind="promo"),
    "the wallet acme usd is not open": Journal().grant(1),
    "hold hold is placed twice": funded().hold(1).hold(1),
    "hold hold is moved before it is placed": funded().hold(1, details=None),
    "gives 1 more of lot lot than it holds": funded().hold(5).end(6),
    "ends and still holds something": funded().hold(5).end(4),
    "hold hold ends twice: it was released": funded().hold(5).end(5).end(0, kind="hold_settled"),
    "hold hold holds something after it has ended": funded()
    .hold(5)
    .end(5)
    .add({"kind": "hold_extended", "lot": "lot", "hold": "hold", "held": 1}),
    "hold hold is extended after it has ended": funded()
    .hold(5)
    .end(5)
    .add({"kind": "hold_extended", "hold": "hold", "details": HoldExtended(BEGIN, ())}),
    "takes the hard wallet acme usd to -40": Journal().open().hold(40, lot="debt", lot_kind="debt"),
    "the debit demo/1 takes the hard wallet acme usd to -10": funded().debit(100, 10),
    "the debit demo/1 takes the hard wallet acme usd to -1": Journal().open(overdraft=40).grant(100).debit(100, 41),
    "the debit demo/1 takes the hard wallet acme usd to -20": funded()
    .charge(30, lot="debt", lot_kind="debt")
    .debit(90),
    "the debit demo/1 takes the hard wallet acme usd to -5": funded(scope=LotScope(providers=("other",))).debit(0, 5),
    "takes the hard wallet acme tokens to -7": Journal()
    .open(unit="tokens")
    .grant(9, unit="tokens")
    .hold(7, unit="tokens", lot="overage", lot_kind="overage"),
    "it takes the hard wallet acme tokens to -7": Journal()
    .open(unit="tokens")
    .grant(9, unit="tokens")
    .taken("adjusted", 7, lot="overage", unit="tokens"),
    "the debit demo/1 takes the hard wallet acme tokens to -7": Journal()
    .open(unit="tokens")
    .grant(9, unit="tokens")
    .charge(7, unit="tokens", lot="overage", lot_kind="overage")
    .lines(required=True),
    "it takes the hard wallet acme usd to -40": funded(60).taken("adjusted", 100, lot="debt"),
    "it takes the hard wallet acme usd to -30": funded()
    .charge(30, lot="debt", lot_kind="debt")
    .taken("transferred", 100, lot="lot"),
    "sets aside of lot lot, which is valid at another time": funded(expires_at=BEGIN + HOUR).hold(1),
    "sets aside of lot lot, which is valid at another time ": funded(effective_at=BEGIN + DAY).hold(1),
    "sets aside of lot lot, which is for another use": funded(scope=LotScope(providers=("other",))).hold(1),
    "is charged to lot lot before it begins": funded(effective_at=BEGIN + DAY).charge(1).lines(),
    "is charged to lot lot after it has ended": funded(expires_at=BEGIN + 3 * HOUR).charge(1).lines(),
    "is charged to lot lot, which is for another use": funded(scope=LotScope(models=("other",))).charge(1).lines(),
    "posted and 0 held more than its entries": funded().charge(1).lines().charge(2),
    "is not the one that begins here": Journal().open(),
}


@pytest.mark.parametrize("what", LAWFUL)
def test_what_is_lawful_breaks_no_law(what: str) -> None:
    assert LAWFUL[what].said == []


@pytest.mark.parametrize("what", UNLAWFUL)
def test_each_law_names_what_breaks_it(what: str) -> None:
    journal = UNLAWFUL[what]
    if "more than its entries" in what:
        journal.laws.check_lines(journal.rows, [])
    if "begins here" in what:
        journal.laws.add([(*journal.rows[0][:2], "another", *journal.rows[0][3:])])
    assert any(batch == journal.batch and what.strip() in said for batch, said in journal.said), journal.said


def test_a_late_charge_after_the_grace_is_unlawful() -> None:
    journal = funded(expires_at=BEGIN + 3 * HOUR)
    journal.batch += 30
    journal.charge(1).lines(ago=30 * HOUR)
    assert [said for _, said in journal.said] == ["demo/1 is charged to lot lot after it has ended"]


def test_a_transaction_says_how_many_lines_it_took() -> None:
    journal = funded()
    said = Charged(lines=3, lines_hash="abc")
    row = (*journal.rows[0][:14], details_text(said))
    assert journal.laws.add([row]) == said


def test_a_breach_says_where() -> None:
    assert funded().charge(101).laws.breaches == [Breach(3, 1, "lot lot has -1, of which 0 is held and 0 frozen")]


def test_more_given_back_than_charged_is_told_lot_by_lot() -> None:
    split = '[["acme","usd","a","purchase",-10,0],["acme","usd","b","debt",-5,0]]'
    assert more_than_charged(split, ['[["acme","usd","a",10],["acme","usd","b",2]]']) == {}
    again = ['[["acme","usd","a",10]]', '[["acme","usd","a",1],["acme","usd","b",5]]']
    assert more_than_charged(split, again) == {("acme", "usd", "a"): 1}
    assert more_than_charged(split, ['[["acme","usd","c",1]]']) == {("acme", "usd", "c"): 1}
