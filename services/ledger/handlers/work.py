"""What is being decided of one partition in one batch, and the rows that follow; or do not, if it was tried out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from services.kit.dead_letters import Letter
from services.kit.outbox import OutboxRow
from services.ledger.domain.alerts import decide_alerts
from services.ledger.domain.commands import Units
from services.ledger.domain.draft import Draft, Fork, Transaction
from services.ledger.domain.entries import Move
from services.ledger.projections import Row, changed_rows
from services.ledger.store import Loaded, Written
from services.ledger.translate import Fact, facts_of, outbox_row


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a partition's work stood when it began to try something out."""

    fork: Fork
    lines: int
    reversals: int
    outbox: int


class Work:
    """What is being decided for one partition in one batch, and the rows that follow from it."""

    def __init__(
        self,
        draft: Draft,
        units: Units,
        loaded: Loaded,
        *,
        reversing: frozenset[tuple[Any, ...]],
        paid_accounts: set[str],
    ) -> None:
        """`reversing`: the keys of lines that the batch names to give them back. `paid_accounts`: claims reach them."""
        self.draft = draft
        self.units = units
        self.loaded = loaded
        self.reversing = reversing
        self.paid_accounts = paid_accounts
        self.partition = draft.head.partition
        self.accepted: dict[tuple[str, str], tuple[bytes, dict[str, Any]]] = {}
        self.charged: dict[tuple[str, str, int], Row] = {}
        # How many periods commands have granted, whether that holds or was tried out.
        self.renewals = 0
        # Of the line that was charged last.
        self.line_position = 0
        self.bundle_hashes: dict[int, bytes] = {}
        self.commands: list[Row] = []
        self.bundles: list[Row] = []
        self.lines: list[Row] = []
        self.reversals: list[Row] = []
        self.letters: list[Letter] = []
        self.outbox: list[OutboxRow] = []

    @property
    def is_something(self) -> bool:
        """Whether there is anything to write: a batch of refusals and repeats changes nothing."""
        return bool(self.commands or self.bundles or self.draft.entries)

    def written(self) -> Written:
        """Everything to write."""
        after, entries = self.draft.finish()
        return Written(
            before=self.draft.head,
            after=after,
            entries=entries,
            commands=self.commands,
            bundles=self.bundles,
            lines=self.lines,
            projections=changed_rows(self.partition, self.draft.state),
            outbox=self.outbox,
            letters=self.letters,
            reversals=self.reversals,
        )

    def fork(self) -> Mark:
        """What is done from here on is tried out, until `join` or `drop` of what it returns."""
        return Mark(self.draft.fork(), len(self.lines), len(self.reversals), len(self.outbox))

    def join(self, mark: Mark) -> None:
        """What was tried out holds."""
        self.draft.join(mark.fork)

    def drop(self, mark: Mark) -> None:
        """What was tried out has never been."""
        self.draft.drop(mark.fork)
        for row in self.lines[mark.lines :]:
            del self.charged[row[1], row[2], row[3]]
        del self.lines[mark.lines :]
        del self.reversals[mark.reversals :]
        del self.outbox[mark.outbox :]

    def facts(self, moves: Sequence[Move], transaction: Transaction, account: str) -> list[Fact]:
        """Add to a transaction what the owners of its wallets are to be told, as its last moves: all facts of it."""
        crossed = self._alert(transaction)
        return facts_of(
            [*moves, *crossed] if crossed else moves,
            account=account,
            partition=self.partition,
            transaction=transaction.id,
            units=self.units,
        )

    def tell(self, facts: Iterable[Fact]) -> None:
        """Put facts into the outbox."""
        self.outbox.extend(
            outbox_row(
                fact,
                partition=self.partition,
                number=self.draft.next_outbox_number(),
                recorded_at=self.draft.recorded_at,
            )
            for fact in facts
        )

    def _alert(self, transaction: Transaction) -> list[Move]:
        state = self.draft.state
        wallets = [wallet for key in transaction.wallets() if (wallet := state.wallet(*key)) is not None]
        moves = decide_alerts(wallets, place=transaction.place)
        if moves:
            transaction.record(moves)
        return moves
