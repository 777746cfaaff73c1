"""A ledger of one partition without servers: decided and evolved as the service does it, its tables kept in dicts."""

import itertools
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import UUID

import msgspec

from contracts.ids import uuid7
from contracts.money import Unit
from services.ledger import tables
from services.ledger.domain.chain import GENESIS
from services.ledger.domain.commands import (
    ChargeLine,
    ClaimPayment,
    Command,
    Grant,
    GrantedKind,
    Leg,
    OpenAccount,
    Scope,
    Units,
)
from services.ledger.domain.decide import decide, decide_charge
from services.ledger.domain.draft import Draft, Head, Recorded
from services.ledger.domain.entries import Charged, Details, Entry, Move, payment_of
from services.ledger.domain.errors import Refusal
from services.ledger.domain.evolve import evolve
from services.ledger.domain.state import PartitionState, Wallet
from services.ledger.projections import Row, add_rows, changed_rows

PARTITION: Final = 7
BEGIN: Final = datetime(2026, 7, 1, 12, tzinfo=UTC)

UNITS: Final = Units(
    by_name={
        unit.name: unit
        for unit in (
            Unit("usd", "money", 9),
            Unit("points", "money", 0),
            Unit("usd_cap", "cap", 9),
            Unit("tokens", "cap", 0),
        )
    },
    mirrors={"usd": ("usd_cap",)},
)

_lines = itertools.count(1)
_holds = itertools.count(1)


def hold_id() -> str:
    """The id of a new hold."""
    return str(uuid7(milliseconds=1, entropy=next(_holds).to_bytes(10, "big")))


def leg(unit: str, at_least: int, at_most: int | None = None) -> Leg:
    """A leg of a hold; all or nothing if only one amount is given."""
    return Leg(unit, at_least, at_least if at_most is None else at_most)


def line(account: str, *amounts: tuple[str, int], hold: str | None = None, at: datetime = BEGIN) -> ChargeLine:
    """What a new use cost."""
    return ChargeLine(
        source="demo",
        event_id=f"event-{next(_lines)}",
        account=account,
        occurred_at=at,
        hold=hold,
        scope=Scope("openai", "gpt-4o-mini"),
        price_version="v1",
        amounts=amounts,
    )


class Book:
    """State, journal and tables of a partition. `restart` forgets the state and reads it from the tables."""

    def __init__(self, units: Units = UNITS) -> None:
        self.units = units
        self.state = PartitionState()
        self.journal: list[Recorded] = []
        self.tables: dict[str, dict[tuple[object, ...], Row]] = {table.name: {} for table in tables.PROJECTIONS}
        self.head = Head(
            partition=PARTITION,
            epoch=1,
            batch=0,
            chain_hash=GENESIS,
            recorded_at=BEGIN,
            outbox_number=0,
            charges_number=0,
        )
        self.now = BEGIN

    # Given and when

    def open(self, account: str, *units: str) -> None:
        """Open an account with hard wallets."""
        self.do(OpenAccount(account=account, wallets=tuple((unit, "hard") for unit in units)))

    def grant(
        self, account: str, unit: str, amount: int, *, kind: GrantedKind = "purchase", reference: str | None = None
    ) -> str:
        """Grant a lot; its id."""
        moves = self.do(Grant(account=account, unit=unit, amount=amount, kind=kind, reference=reference))
        assert moves[0].lot is not None
        return moves[0].lot

    def do(self, command: Command) -> list[Move]:
        """Carry out what must be accepted."""
        decided = self.ask(command)
        assert isinstance(decided, list), decided
        return decided

    def ask(self, command: Command) -> list[Move] | Refusal:
        """Carry out a command in a batch of its own, if it is accepted."""
        self._recall(command)
        draft = self._draft()
        transaction = draft.begin()
        decided = decide(draft.state, command, units=self.units, place=transaction.place)
        if isinstance(decided, list):
            transaction.record(decided)
            self._commit(draft)
        return decided

    def bundle(self, lines: Sequence[ChargeLine]) -> list[list[Move] | Refusal]:
        """Charge lines in one transaction, as a bundle: what became of each."""
        for each in lines:
            self._recall(each)
        draft = self._draft()
        transaction = draft.begin()
        outcomes: list[list[Move] | Refusal] = []
        for each in lines:
            decided = decide_charge(draft.state, each, units=self.units, place=transaction.place)
            if isinstance(decided, list):
                transaction.record_summed(decided)
            outcomes.append(decided)
        charged = sum(isinstance(outcome, list) for outcome in outcomes)
        if charged:
            transaction.finish(Charged(lines=charged, lines_hash="", bundle=1))
            self._commit(draft)
        return outcomes

    def restart(self) -> None:
        """What another process would know: what is in the tables. Holds are read when they are named."""
        self.state = PartitionState()
        spent = tables.lots.columns.keys().index("spent")
        rows = {name: list(found.values()) for name, found in self.tables.items()}
        rows["lots"] = [row for row in rows["lots"] if not row[spent]]
        del rows["holds"], rows["hold_lots"], rows["payments"], rows["claims"]
        add_rows({PARTITION: self.state}, rows)

    # Then

    def wallet(self, account: str, unit: str) -> Wallet:
        """An open wallet."""
        found = self.state.wallet(account, unit)
        assert found is not None
        return found

    def amounts(self, account: str, unit: str) -> tuple[int, int]:
        """posted and held of a wallet."""
        wallet = self.wallet(account, unit)
        return wallet.posted, wallet.held

    def lot(self, lot: str) -> tuple[int, int]:
        """posted and held of a lot, as stored."""
        row = dict(zip(tables.lots.columns.keys(), self.tables["lots"][PARTITION, lot], strict=True))
        return row["posted"], row["held"]

    def replayed(self) -> dict[str, dict[tuple[object, ...], Row]]:
        """The tables as the journal alone has them, through its stored form."""
        state = PartitionState()
        for recorded in self.journal:
            stored = None if recorded.details is None else msgspec.json.decode(recorded.details, type=Details)
            evolve(state, msgspec.structs.replace(recorded.entry, details=stored))
        return _keyed(changed_rows(PARTITION, state.changes))

    @property
    def entries(self) -> list[Entry]:
        """The journal."""
        return [recorded.entry for recorded in self.journal]

    def _recall(self, command: Command) -> None:
        """Read the hold of a command from the tables, if it is not in memory."""
        if isinstance(command, Grant) and (payment := payment_of(command.kind, command.reference)) is not None:
            self._recall_payment(payment, command.account, claiming=False)
        if isinstance(command, ClaimPayment):
            self._recall_payment(command.payment, command.account, claiming=True)
        hold = getattr(command, "hold", None)
        if hold is not None and hold not in self.state.holds and (PARTITION, hold) in self.tables["holds"]:
            earmarks = [row for key, row in self.tables["hold_lots"].items() if key[:2] == (PARTITION, hold)]
            add_rows({PARTITION: self.state}, {"holds": [self.tables["holds"][PARTITION, hold]], "hold_lots": earmarks})

    def _recall_payment(self, payment: str, account: str, *, claiming: bool) -> None:
        """Read a payment from the tables, and its lots, spent or not, if a claim is made or has been."""

        def found(name: str, **values: object) -> list[Row]:
            columns = tables.metadata.tables[name].columns.keys()
            rows = [dict(zip(columns, row, strict=True)) for row in self.tables[name].values()]
            return [tuple(row.values()) for row in rows if all(row[key] == value for key, value in values.items())]

        rows = {
            "payments": found("payments", payment=payment, **({} if claiming else {"account": account})),
            "claims": found("claims", payment=payment, account=account),
        }
        if claiming or any(row[5] for row in rows["payments"]):
            rows["lots"] = [
                lot
                for kind in ("purchase", "bonus")
                for lot in found("lots", reference=payment, account=account, kind=kind)
            ]
        add_rows({PARTITION: self.state}, rows)

    def _draft(self) -> Draft:
        self.now += timedelta(milliseconds=1)
        return Draft(self.head, self.state, now=self.now)

    def _commit(self, draft: Draft) -> None:
        self.head, recorded = draft.finish()
        self.journal.extend(recorded)
        for name, rows in _keyed(changed_rows(PARTITION, self.state.changes)).items():
            self.tables[name].update(rows)
        self.state.written()


def _keyed(rows: dict[str, list[Row]]) -> dict[str, dict[tuple[object, ...], Row]]:
    return {
        table.name: {row[: len(table.primary_key.columns)]: row for row in rows[table.name]}
        for table in tables.PROJECTIONS
    }


def is_uuid(text: str) -> bool:
    """Whether a text is the canonical form of a UUID."""
    return str(UUID(text)) == text
