"""Levels of a wallet that its owner is told of: each crossing once, and again only after the balance has recovered."""

from collections.abc import Iterable, Iterator

from services.ledger.domain.commands import Threshold
from services.ledger.domain.concerned import Place
from services.ledger.domain.entries import BalanceCrossed, Move
from services.ledger.domain.state import Wallet


def decide_alerts(wallets: Iterable[Wallet], *, place: Place) -> list[Move]:
    """What the owners of wallets that a transaction has changed are to be told, as the last moves of it.

    Nothing of a wallet on which something is still due: its owner is told how it stands when that has been done.
    """
    return [
        move
        for wallet in wallets
        if wallet.policy != "unlimited" and wallet.next_due() > place.recorded_at
        for move in _crossings(wallet, place)
    ]


def _crossings(wallet: Wallet, place: Place) -> Iterator[Move]:
    """Downwards from the highest level, upwards from the lowest; exhausted is below them all."""
    available = wallet.available_anywhere(place.recorded_at)
    if wallet.low:
        for level in sorted(wallet.low, key=lambda level: _of_full(level, wallet)):
            if not _is_low(level, wallet, available):
                yield _crossed(wallet, level, is_low=False, available=available, place=place)
    if wallet.full > 0:
        for level in sorted((*wallet.thresholds, None), key=lambda level: _of_full(level, wallet), reverse=True):
            if level not in wallet.low and _is_low(level, wallet, available):
                yield _crossed(wallet, level, is_low=True, available=available, place=place)


def _is_low(level: Threshold | None, wallet: Wallet, available: int) -> bool:
    return 100 * available <= _of_full(level, wallet)[0]


def _of_full(level: Threshold | None, wallet: Wallet) -> tuple[int, bool, bool]:
    """A level in hundredths of the unit's step, and what orders those that are equal."""
    if level is None:
        return (0, False, False)
    if level.amount is not None:
        return (100 * level.amount, True, False)
    assert level.percent is not None
    return (level.percent * max(wallet.full, 0), True, True)


def _crossed(wallet: Wallet, level: Threshold | None, *, is_low: bool, available: int, place: Place) -> Move:
    return Move(
        kind="balance_crossed",
        account=wallet.account,
        occurred_at=place.recorded_at,
        unit=wallet.unit,
        details=BalanceCrossed(is_low=is_low, available=available, threshold=level),
    )
