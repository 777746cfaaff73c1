"""When the open holds in memory end: what tells at once whether any is overdue, and on which accounts."""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from services.ledger.domain.state import Hold

_EVER: Final = datetime.min.replace(tzinfo=UTC)
# So many more than twice the holds in memory are noted before those that have ended are left out.
_STALE_MAX: Final = 64


class Deadlines:
    """What is noted here is looked up before it is believed: holds end, are extended, and were never placed after all.

    `unread_from`: all open holds that end before are in memory.
    """

    def __init__(self) -> None:
        self.unread_from = _EVER
        # A heap of deadlines, each hold's latest among them.
        self._ahead: list[tuple[datetime, str]] = []
        # By account: the holds that had set aside something of its wallets when they came to their deadline, in order.
        self._passed: dict[str, dict[str, None]] = {}

    def note(self, hold: "Hold") -> None:
        """An open hold is there, or ends later than it did."""
        assert hold.expires_at is not None
        heappush(self._ahead, (hold.expires_at, hold.id))

    def are_passed(self, at: datetime) -> bool:
        """Whether there may be any hold that ends at a time or before."""
        return bool(self._passed) or (bool(self._ahead) and self._ahead[0][0] <= at)

    def may_be_more(self, at: datetime, holds: Mapping[str, "Hold"], *, than: int) -> bool:
        """Whether more open holds than so many may end at a time or before: those not in memory are not known."""
        if self.unread_from <= at:
            return True
        self._pass(at, holds)
        return sum(map(len, self._passed.values())) > than

    def passed(self, account: str, at: datetime, holds: Mapping[str, "Hold"]) -> Iterator["Hold"]:
        """The open holds that hold something of an account's wallets, and end at a time or before."""
        self._pass(at, holds)
        for name in self._passed.get(account, ()):
            hold = holds.get(name)
            if hold is not None and hold.is_overdue(at) and _is_on(hold, account):
                yield hold

    def _pass(self, at: datetime, holds: Mapping[str, "Hold"]) -> None:
        while self._ahead and self._ahead[0][0] <= at:
            hold = holds.get(heappop(self._ahead)[1])
            if hold is not None and hold.is_overdue(at):
                for earmark in hold.earmarks.values():
                    self._passed.setdefault(earmark.account, {})[hold.id] = None

    def forget(self, hold: "Hold") -> None:
        """A hold has ended for good."""
        for account in {earmark.account for earmark in hold.earmarks.values()} if self._passed else ():
            if (names := self._passed.get(account)) is not None:
                names.pop(hold.id, None)
                if not names:
                    del self._passed[account]

    def compact(self, holds: Mapping[str, "Hold"]) -> None:
        """Leave out what is of no use, if that is most of it. Not while something is tried out: it may be undone."""
        if len(self._ahead) > 2 * len(holds) + _STALE_MAX:
            ahead = ((hold.expires_at, hold.id) for hold in holds.values() if hold.status == "placed")
            self._ahead = [(at, name) for at, name in ahead if at is not None]
            heapify(self._ahead)

    def lose(self, hold: "Hold") -> None:
        """A hold is in memory no longer, and may be open."""
        if hold.status == "placed" and hold.expires_at is not None:
            self.unread_from = min(self.unread_from, hold.expires_at)


def _is_on(hold: "Hold", account: str) -> bool:
    return any(each.held and each.account == account for each in hold.earmarks.values())
