"""What must be so after every transaction of a journal, told from the journal alone: for audits.

Shares no code with `evolve` and the decisions, on purpose: an overspend would be replayed as faithfully as it was made.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from operator import itemgetter
from typing import Any, Final, NamedTuple

import msgspec

from contracts.ids import derived_uuid7
from services.ledger.domain.commands import LATE_GRACE, LotScope, Scope
from services.ledger.domain.entries import (
    ASIDE_KINDS,
    PSEUDO_KINDS,
    Charged,
    Details,
    HoldExtended,
    HoldPlaced,
    LotGranted,
    Noted,
    Reversed,
    WalletOpened,
)

_decode_details: Final = msgspec.json.Decoder(Details).decode
_decode_scope: Final = msgspec.json.Decoder(Scope | None).decode
_decode_split: Final = msgspec.json.Decoder(list[tuple[str, str, str, str, int, int]]).decode
_ENDS: Final = {
    "hold_released": "released",
    "hold_expired": "expired",
    "hold_settled": "settled",
    "hold_estimated": "estimated",
    "estimate_reversed": "settled",
}
_ASIDE: Final = frozenset({"hold_placed", "hold_extended"})
_EXPIRY: Final = frozenset({"lot_expired", "lot_revived"})
# What a debit's transaction may take of a wallet beside it: of what its hold frees.
_BESIDE: Final = frozenset({"clawed_back", "claim_frozen", "lot_expired", "lot_voided"})

# A journal's row: batch, position, transaction, kind, account, unit, lot, lot kind, hold, posted, held, frozen,
# occurred_at, recorded_at, details as text; whatever follows is not looked at.
Row = Sequence[Any]


class Breach(NamedTuple):
    """A law that an entry breaks; `what` is a clause."""

    batch: int
    position: int
    what: str


class Line(NamedTuple):
    """What of a charge line tells which lots it might take."""

    source: str
    event_id: str
    account: str
    occurred_at: datetime
    hold: str | None
    scope: str

    @property
    def event(self) -> str:
        return f"{self.source}/{self.event_id}"


# Of a charge line's row: partition, source, event id, revision, account, occurred_at, hold, scope, price version,
# own key, amounts, split; whatever follows is not looked at.
_line_of: Final = itemgetter(1, 2, 4, 5, 6, 7)


@dataclass(slots=True)
class KnownLot:
    """A lot, as far as the laws need it."""

    id: str
    account: str
    unit: str
    kind: str
    effective_at: datetime | None = None
    expires_at: datetime | None = None
    scope: LotScope | None = None
    posted: int = 0
    held: int = 0
    frozen: int = 0
    # Less what was revived of that.
    expired: int = 0

    @property
    def available(self) -> int:
        return self.posted - self.held - self.frozen

    @property
    def is_for_anything(self) -> bool:
        """At any time, too."""
        return self.scope is None and self.effective_at is None and self.expires_at is None

    def is_for(self, used: Scope | None) -> bool:
        return self.scope is None or self.scope.includes(used)

    def has_started(self, at: datetime) -> bool:
        return self.effective_at is None or self.effective_at <= at

    def has_ended(self, at: datetime) -> bool:
        return self.expires_at is not None and self.expires_at <= at


@dataclass(slots=True)
class KnownWallet:
    """A wallet's terms, those of its lots of which something is left, and those of which something has expired."""

    policy: str
    overdraft: int
    lots: dict[str, KnownLot] = field(default_factory=dict)
    expired: dict[str, KnownLot] = field(default_factory=dict)

    def spendable(self, at: datetime, used: Scope | None, *, anywhere: bool = False) -> int:
        """What may be set aside for a use, or for one or another, above zero, with the overdraft."""
        found = self.overdraft
        for lot in self.lots.values():
            if lot.kind == "debt":
                found += lot.posted - lot.held
            elif lot.kind in ASIDE_KINDS or not lot.has_started(at) or lot.has_ended(at):
                continue
            elif anywhere or lot.is_for(used):
                found += lot.available
        return found


@dataclass(slots=True)
class KnownHold:
    """A hold: what it still holds by lot. One that ended before it was placed has no deadline."""

    status: str
    recorded_at: datetime
    scope: Scope | None = None
    has_deadline: bool = True
    ended_at: datetime | None = None
    ended_by: str | None = None
    earmarks: dict[str, int] = field(default_factory=dict)


class Laws:
    """One partition's journal, transaction by transaction. `breaches` are those that were found so far.

    `caps` are the units that count for each wallet by itself. What came before the first transaction that is added is
    put into `lots`, `wallets`, `holds` beforehand.
    """

    def __init__(self, partition: int, *, caps: Collection[str]) -> None:
        self.breaches: list[Breach] = []
        self.lots: dict[str, KnownLot] = {}
        self.wallets: dict[tuple[str, str], KnownWallet] = {}
        self.holds: dict[str, KnownHold] = {}
        self._partition = partition
        self._caps = caps

    def add(self, rows: Sequence[Row]) -> Charged | Reversed | None:  # noqa: PLR0912 - one loop: an audit's time goes here
        """Add a transaction, whole; what it says of the charge lines that it took, or of the one that it gave back."""
        legs: dict[Any, int] = {}
        touched: dict[str, Row] = {}
        ended: dict[str, Row] = {}
        setting: Row | None = None
        told: Charged | Reversed | None = None
        taken: dict[tuple[str, str], Row] = {}
        caps = self._caps
        for row in rows:
            _, _, _, kind, account, unit, lot, _, hold, posted, held, _, _, _, details, *_ = row
            if posted:
                if unit in caps:
                    key: Any = (unit, account.partition("/")[2] if account[0] == "@" else account)
                else:
                    key = unit
                legs[key] = legs.get(key, 0) + posted
            said = None
            if details is not None:
                said = _decode_details(details)
                if isinstance(said, (Charged, Reversed)):
                    told = said
                elif isinstance(said, Noted) and posted < 0 and not said.forced and account[0] != "@":
                    taken[account, unit] = row
            if setting is not None and (kind not in _ASIDE or hold != setting[8]):
                self._check_floors(rows, setting)
                setting = None
            if account[0] == "@":
                continue
            if isinstance(said, WalletOpened):
                self._set_terms(row, said)
            if hold is not None:
                self._add_to_hold(row, said)
                if kind in _ENDS:
                    ended[hold] = row
                elif kind in _ASIDE and held:
                    setting = row
            if lot is not None:
                self._add_to_lot(row, said)
                touched[lot] = row
        if setting is not None:
            self._check_floors(rows, setting)
        first = rows[0]
        for key, total in legs.items():
            if total:
                self._breach(first, f"the legs of its transaction sum to {total}, not to zero, in {key}")
        for lot, row in touched.items():
            self._check_lot(self.lots[lot], row)
        for key, row in taken.items():
            self._check_floor_anywhere(key, row)
        for hold, row in ended.items():
            if any(self.holds[hold].earmarks.values()):
                self._breach(row, f"hold {hold} ends and still holds something")
        place = derived_uuid7(recorded_at=first[13], partition=self._partition, batch=first[0], position=first[1])
        if first[2] != str(place):
            self._breach(first, f"its transaction {first[2]} is not the one that begins here")
        return told

    def check_lines(self, rows: Sequence[Row], lines: Iterable[Row], *, required: bool = False) -> None:
        """The charge lines of the transaction that was added last say what its entries say, and might take what they
        took; one that is `required` nothing that is not there."""
        taken: dict[tuple[str, str, str], list[int]] = {}
        first, lots = rows[0], self.lots
        reversed_holds = {row[8] for row in rows if row[3] == "estimate_reversed"}
        for line in lines:
            if required and not reversed_holds:
                self._check_debit(rows, Line(*_line_of(line)))
            is_reversed = line[6] in reversed_holds
            for account, unit, lot, _kind, posted, held in _decode_split(line[11]):
                key = (account, unit, lot)
                sums = taken.get(key)
                if sums is None:
                    taken[key] = [posted, held]
                else:
                    sums[0] += posted
                    sums[1] += held
                if posted < 0 and not held and not is_reversed:
                    known = lots.get(lot)
                    if known is not None and not known.is_for_anything:
                        self._check_use(first, Line(*_line_of(line)), known)
        for row in rows:
            if row[3] == "charged" and row[6] is not None:
                sums = taken.setdefault((row[4], row[5], row[6]), [0, 0])
                sums[0] -= row[9]
                sums[1] -= row[10]
        for (account, unit, lot), (posted, held) in taken.items():
            if posted or held:
                self._breach(
                    first,
                    f"of lot {lot} of {account} {unit} its charge lines say {posted} posted and {held} held more than"
                    " its entries",
                )

    def _set_terms(self, row: Row, terms: WalletOpened) -> None:
        key = (row[4], row[5])
        wallet = self.wallets.get(key)
        if wallet is None:
            if row[3] != "wallet_opened":
                self._breach(row, f"the wallet {row[4]} {row[5]} is not open")
            self.wallets[key] = KnownWallet(terms.policy, terms.overdraft)
        else:
            wallet.policy, wallet.overdraft = terms.policy, terms.overdraft

    def _add_to_lot(self, row: Row, said: Details | None) -> None:
        _, _, _, kind, account, unit, lot_id, lot_kind, hold, posted, held, frozen, _, recorded_at, *_ = row
        lot = self.lots.get(lot_id)
        if lot is None:
            lot = self.lots[lot_id] = KnownLot(lot_id, account, unit, lot_kind)
            if isinstance(said, LotGranted):
                lot.effective_at, lot.expires_at, lot.scope = said.effective_at, said.expires_at, said.scope
            elif lot_kind not in PSEUDO_KINDS:
                self._breach(row, f"lot {lot_id} is moved before it is there")
        elif (account, unit, lot_kind) != (lot.account, lot.unit, lot.kind):
            self._breach(row, f"lot {lot_id} is a {lot.kind} of {lot.account} {lot.unit}")
        elif kind in _ASIDE and held > 0 and lot_kind not in PSEUDO_KINDS:
            known = self.holds.get(hold)
            if not lot.has_started(recorded_at) or lot.has_ended(recorded_at):
                self._breach(row, f"hold {hold} sets aside of lot {lot_id}, which is valid at another time")
            if known is not None and not lot.is_for(known.scope):
                self._breach(row, f"hold {hold} sets aside of lot {lot_id}, which is for another use")
        lot.posted += posted
        lot.held += held
        lot.frozen += frozen
        if kind in _EXPIRY:
            lot.expired -= posted
            if (wallet := self.wallets.get((account, unit))) is not None:
                wallet.expired[lot_id] = lot

    def _check_lot(self, lot: KnownLot, row: Row) -> None:
        posted, held, frozen = lot.posted, lot.held, lot.frozen
        if held < 0 or frozen < 0:
            self._breach(row, f"of lot {lot.id} {held} is held and {frozen} frozen")
        if lot.kind in PSEUDO_KINDS:
            if posted > 0:
                self._breach(row, f"the {lot.kind} {lot.id} is {posted}, above zero")
        elif posted < held + frozen:
            self._breach(row, f"lot {lot.id} has {posted}, of which {held} is held and {frozen} frozen")
        wallet = self.wallets.get((lot.account, lot.unit))
        if wallet is None:
            self._breach(row, f"the wallet {lot.account} {lot.unit} is not open")
        elif posted or held or frozen:
            wallet.lots[lot.id] = lot
        else:
            wallet.lots.pop(lot.id, None)

    def _add_to_hold(self, row: Row, said: Details | None) -> None:
        _, _, transaction, kind, _, _, lot, _, hold_id, _, held, _, _, recorded_at, *_ = row
        hold = self.holds.get(hold_id)
        if hold is None:
            hold = self.holds[hold_id] = KnownHold("placed", recorded_at)
            if isinstance(said, HoldPlaced):
                hold.scope = said.scope
            elif kind in _ENDS:
                hold.has_deadline = False
            else:
                self._breach(row, f"hold {hold_id} is moved before it is placed")
        elif isinstance(said, HoldPlaced):
            self._breach(row, f"hold {hold_id} is placed twice")
        elif isinstance(said, HoldExtended) and hold.status != "placed":
            self._breach(row, f"hold {hold_id} is extended after it has ended")
        if held and lot is not None:
            left = hold.earmarks[lot] = hold.earmarks.get(lot, 0) + held
            if left < 0:
                self._breach(row, f"hold {hold_id} gives {-left} more of lot {lot} than it holds")
            if hold.status != "placed" and hold.ended_by != transaction:
                self._breach(row, f"hold {hold_id} holds something after it has ended")
        if kind in _ENDS:
            again = kind == "estimate_reversed" and hold.status == "estimated"
            if hold.status != "placed" and hold.ended_by != transaction and not again:
                self._breach(row, f"hold {hold_id} ends twice: it was {hold.status}")
            hold.status, hold.ended_at, hold.ended_by = _ENDS[kind], recorded_at, transaction

    def _check_floors(self, rows: Sequence[Row], setting: Row) -> None:
        """Wallets of which a hold has just set something aside are not below their floor by it."""
        hold = self.holds[setting[8]]
        of_hold = {
            (row[4], row[5])
            for row in rows
            if row[8] == setting[8] and row[3] in _ASIDE and row[10] > 0 and row[1] <= setting[1]
        }
        for key in of_hold:
            wallet = self.wallets.get(key)
            if wallet is not None and wallet.policy == "hard":
                self._take_in(wallet, key, rows)
                beyond = (
                    -row[10]
                    for row in rows
                    if row[8] == setting[8] and row[3] in _ASIDE and row[7] in ASIDE_KINDS and (row[4], row[5]) == key
                )
                left = min([wallet.spendable(setting[13], hold.scope), *beyond])
                if left < 0:
                    self._breach(setting, f"hold {setting[8]} takes the hard wallet {key[0]} {key[1]} to {left}")

    def _check_floor_anywhere(self, key: tuple[str, str], row: Row) -> None:
        """What is taken by hand, or moved, and not by force, leaves a hard wallet at its floor, or above it."""
        wallet = self.wallets.get(key)
        if wallet is not None and wallet.policy == "hard":
            left = row[9] if row[7] in ASIDE_KINDS else wallet.spendable(row[13], None, anywhere=True)
            if left < 0:
                self._breach(row, f"it takes the hard wallet {key[0]} {key[1]} to {left}")

    def _check_debit(self, rows: Sequence[Row], line: Line) -> None:
        """Nor does a debit: but for what has expired and what it may revive, and what else befalls what it frees."""
        hold = None if line.hold is None else self.holds.get(line.hold)
        used = self._used(line, hold)
        recorded_at = rows[0][13]
        for key in {(row[4], row[5]) for row in rows if row[3] == "charged" and row[6] is not None and row[9] < 0}:
            wallet = self.wallets.get(key)
            if wallet is None or wallet.policy != "hard":
                continue
            self._take_in(wallet, key, rows)
            at = self._paid_at(line, hold, key[1], recorded_at)
            left = wallet.overdraft + sum(lot.posted - lot.held for lot in wallet.lots.values() if lot.kind == "debt")
            for lot in {**wallet.expired, **wallet.lots}.values():
                if lot.kind in PSEUDO_KINDS or not lot.is_for(used):
                    continue
                is_earmarked = hold is not None and lot.id in hold.earmarks
                if not lot.has_ended(recorded_at):
                    left += lot.available if lot.has_started(at) or is_earmarked else 0
                elif self._is_in_grace(lot, line, hold, at, recorded_at):
                    left += lot.available + lot.expired
            left += sum(row[11] - row[9] for row in rows if row[3] in _BESIDE and (row[4], row[5]) == key)
            # A cap's excess is no debt. What its hold had set aside while the wallet was unlimited it may count.
            of_line = [row for row in rows if row[3] == "charged" and (row[4], row[5]) == key]
            left = min([left, *(row[9] for row in of_line if row[7] in ASIDE_KINDS and not row[10])])
            if left < 0:
                first = of_line[0]
                self._breach(first, f"the debit {line.event} takes the hard wallet {key[0]} {key[1]} to {left}")

    def _take_in(self, wallet: KnownWallet, key: tuple[str, str], rows: Sequence[Row]) -> None:
        """Lots of which something is left only since this transaction."""
        for row in rows:
            if row[6] is not None and (row[4], row[5]) == key and (lot := self.lots.get(row[6])) is not None:
                wallet.lots[lot.id] = lot

    def _check_use(self, first: Row, line: Line, lot: KnownLot) -> None:
        """What was not set aside for it a charge takes of lots that are valid then, or were when it occurred."""
        if lot.kind in PSEUDO_KINDS:
            return
        recorded_at = first[13]
        hold = None if line.hold is None else self.holds.get(line.hold)
        if lot.scope is not None and not lot.is_for(self._used(line, hold)):
            self._breach(first, f"{line.event} is charged to lot {lot.id}, which is for another use")
        at = self._paid_at(line, hold, lot.unit, recorded_at)
        is_earmarked = hold is not None and lot.id in hold.earmarks
        if not lot.has_ended(recorded_at):
            if not lot.has_started(at) and not is_earmarked:
                self._breach(first, f"{line.event} is charged to lot {lot.id} before it begins")
            return
        if not self._is_in_grace(lot, line, hold, at, recorded_at):
            self._breach(first, f"{line.event} is charged to lot {lot.id} after it has ended")

    def _used(self, line: Line, hold: KnownHold | None) -> Scope | None:
        used = _decode_scope(line.scope)
        return hold.scope if used is None and hold is not None else used

    def _paid_at(self, line: Line, hold: KnownHold | None, unit: str, recorded_at: datetime) -> datetime:
        """Which time's lots pay."""
        if unit not in self._caps:
            return recorded_at
        return hold.recorded_at if hold is not None and hold.has_deadline else min(line.occurred_at, recorded_at)

    def _is_in_grace(
        self, lot: KnownLot, line: Line, hold: KnownHold | None, at: datetime, recorded_at: datetime
    ) -> bool:
        """Whether a lot that has ended may still pay."""
        ends = lot.expires_at
        assert ends is not None
        if lot.unit in self._caps and lot.has_started(at) and not lot.has_ended(at):
            return True
        if hold is not None and lot.id in hold.earmarks:
            return recorded_at <= max(ends, hold.ended_at or ends) + LATE_GRACE
        return line.occurred_at < ends and recorded_at <= ends + LATE_GRACE and lot.unit not in self._caps

    def _breach(self, row: Row, what: str) -> None:
        self.breaches.append(Breach(row[0], row[1], what))


def reversal_row(rows: Sequence[Row], told: Reversed) -> tuple[Any, ...]:
    """What is to be recorded of a transaction that gives back a charge line: the columns of `reversals` after the
    partition, with its id as text."""
    given_back: dict[tuple[str, str, str], int] = {}
    for row in rows:
        if row[3] == "reversed" and row[6] is not None:
            key = (row[4], row[5], row[6])
            given_back[key] = given_back.get(key, 0) + row[9]
    split = msgspec.json.encode([(*key, posted) for key, posted in given_back.items() if posted]).decode()
    first = rows[0]
    return told.source, told.event_id, told.revision, first[0], first[1], first[2], split, told.reason, first[13]


def more_than_charged(split: str, reversals: Iterable[str]) -> Mapping[tuple[str, str, str], int]:
    """By how much more than a charge line took of each lot has been given back: by account, unit and lot."""
    left: dict[tuple[str, str, str], int] = {}
    for account, unit, lot, _kind, posted, _held in _decode_split(split):
        left[account, unit, lot] = left.get((account, unit, lot), 0) - posted
    for reversal in reversals:
        for account, unit, lot, amount in msgspec.json.decode(reversal, type=list[tuple[str, str, str, int]]):
            left[account, unit, lot] = left.get((account, unit, lot), 0) - amount
    return {key: -amount for key, amount in left.items() if amount < 0}
