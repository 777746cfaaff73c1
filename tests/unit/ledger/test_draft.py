"""Laws of a draft: what was tried out and dropped has never been; what was joined is as if it had not been tried."""

from datetime import UTC, datetime

import msgspec
import pytest

from contracts.money import AMOUNT_MAX
from services.ledger.domain.chain import GENESIS
from services.ledger.domain.draft import SUM_MAX, Draft, Head
from services.ledger.domain.entries import Charged, LotGranted, Move, Noted, WalletOpened
from services.ledger.domain.evolve import evolve
from services.ledger.domain.state import PartitionState

NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)
HEAD = Head(partition=7, epoch=1, batch=3, chain_hash=GENESIS, recorded_at=NOW, outbox_number=5, charges_number=0)
OPENED = (
    Move(kind="account_opened", account="acme", occurred_at=NOW),
    Move(kind="wallet_opened", account="acme", occurred_at=NOW, unit="usd", details=WalletOpened(policy="hard")),
)


def granted(draft: Draft, amount: int) -> str:
    """Grant a lot in a transaction of its own; its id."""
    transaction = draft.begin()
    lot = transaction.place.new_lot(0)
    details = LotGranted(priority=1)
    transaction.record([moved(lot, amount, kind="lot_granted", details=details)])
    draft.next_outbox_number()
    return lot


def moved(lot: str, amount: int, **more: object) -> Move:
    made = {"kind": "charged", "account": "acme", "occurred_at": NOW, "unit": "usd", "lot": lot} | more
    return Move(**made, lot_kind="promo", posted=amount)  # type: ignore[arg-type]  # a test's shorthand


def opened() -> Draft:
    draft = Draft(HEAD, PartitionState(), now=NOW)
    draft.begin().record(OPENED)
    return draft


def posted(draft: Draft) -> int:
    wallet = draft.state.wallet("acme", "usd")
    assert wallet is not None
    return wallet.posted


def test_what_is_dropped_has_never_been() -> None:
    draft, plain = opened(), opened()
    kept = granted(draft, 5)
    assert granted(plain, 5) == kept
    outer = draft.fork()
    granted(draft, 7)
    inner = draft.fork()
    granted(draft, 11)
    assert posted(draft) == 23
    draft.drop(inner)
    assert (posted(draft), draft.entries) == (12, 4)
    draft.drop(outer)
    assert (posted(draft), draft.entries, draft.outbox_number) == (5, 3, 6)
    assert draft.state.changes.lots.keys() == {kept}
    # What comes next gets the places, ids and numbers of what was dropped.
    assert granted(draft, 1) == granted(plain, 1)
    assert draft.finish() == plain.finish()


def test_what_is_joined_is_as_if_it_had_not_been_tried() -> None:
    draft, plain = opened(), opened()
    outer = draft.fork()
    first = granted(draft, 5)
    inner = draft.fork()
    second = granted(draft, 7)
    draft.join(inner)
    draft.join(outer)
    assert [granted(plain, 5), granted(plain, 7)] == [first, second]
    assert draft.finish() == plain.finish()
    assert posted(draft) == 12
    assert draft.state.changes.lots.keys() == {first, second}
    # It is that very state that goes on.
    granted(draft, 1)
    assert draft.state.changes.wallets["acme", "usd"].posted == posted(draft) == 13


def test_what_concerns_the_whole_transaction_is_on_its_first_entry_that_says_nothing_else() -> None:
    draft = opened()
    lot = granted(draft, 9)
    transaction = draft.begin()
    transaction.record([moved(lot, -1, details=Noted("why"))])
    transaction.record_summed([moved(lot, -2), moved(lot, -3)])
    charged = Charged(lines=2, lines_hash="")
    transaction.finish(charged)
    _, entries = draft.finish()
    assert [(each.entry.posted, each.entry.details) for each in entries[-2:]] == [(-1, Noted("why")), (-5, charged)]
    assert transaction.wallets() == {("acme", "usd"): None}


def test_a_sum_that_would_be_too_large_for_its_column_goes_on_in_another_entry() -> None:
    """All lines of a bundle have one other side."""
    draft = opened()
    lot = granted(draft, 4 * AMOUNT_MAX)
    transaction = draft.begin()
    contra = Move(kind="charged", account="@usage", occurred_at=NOW, unit="usd", posted=AMOUNT_MAX)
    lines = [[moved(lot, -AMOUNT_MAX), contra] for _ in range(4)]
    back = [moved(lot, 4 * AMOUNT_MAX, kind="reversed"), msgspec.structs.replace(contra, posted=-4 * AMOUNT_MAX)]
    places = [transaction.record_summed(each) for each in [*lines, back, *lines, lines[0]]]
    transaction.finish(Charged(lines=9, lines_hash=""))
    _, entries = draft.finish()
    first = transaction.position
    assert places == [first] * 4 + [first + 2] + [first + 3] * 4 + [first + 4]
    assert [(each.entry.account, each.entry.posted) for each in entries[-6:]] == [
        ("acme", -SUM_MAX),
        ("@usage", SUM_MAX),
        ("acme", SUM_MAX),
        ("acme", -SUM_MAX),
        ("acme", -AMOUNT_MAX),
        ("@usage", AMOUNT_MAX),
    ]


def test_a_sum_does_not_go_on_past_an_entry_that_looks_at_what_is_there() -> None:
    """Levels in percent are counted of what a wallet has when a lot comes in, after what was charged until then."""
    draft = opened()
    lot = granted(draft, 40)
    transaction = draft.begin()
    returned = transaction.place.new_lot(1)
    comes_in = moved(returned, 6, kind="lot_granted", details=LotGranted(priority=1))
    for moves in ([moved(lot, -5)], [moved(lot, -2), comes_in], [moved(lot, -3)], [moved(lot, -1)]):
        transaction.record_summed(moves)
    transaction.finish(Charged(lines=4, lines_hash=""))
    _, entries = draft.finish()
    assert [each.entry.posted for each in entries[-3:]] == [-7, 6, -4]
    replayed = PartitionState()
    for each in entries:
        evolve(replayed, each.entry)
    decided, again = draft.state.wallet("acme", "usd"), replayed.wallet("acme", "usd")
    assert decided is not None
    assert again is not None
    assert (decided.posted, decided.full) == (again.posted, again.full) == (35, 39)


def test_details_that_no_entry_has_room_for_are_a_fault() -> None:
    draft = opened()
    transaction = draft.begin()
    transaction.record([moved(granted(opened(), 1), 1, kind="lot_granted", details=LotGranted(priority=1))])
    with pytest.raises(ValueError, match="is without details"):
        transaction.finish(Charged(lines=1, lines_hash=""))
