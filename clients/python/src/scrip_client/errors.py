"""What can go wrong, as facts.

ScripError
├── NotAccepted            an event was not taken: the caller still has it
│   ├── InvalidEvent       it is no event
│   ├── SpoolFull          there is no room for it
│   ├── SpoolFailed        the disk fails, or is too slow
│   └── ClientClosed
├── NotDelivered           closed with events that are in memory only
└── LedgerError
    ├── Refused            the ledger will not; nothing was changed
    │   ├── InsufficientFunds
    │   ├── AccountNotOpen
    │   └── HoldEnded
    ├── RequestRejected    the request, its key or its token is wrong
    └── Away               no answer, or not now
"""

from collections.abc import Sequence

from scrip_client.amounts import Amount


class ScripError(Exception):
    """Anything that this package raises."""


class NotAccepted(ScripError):
    """The event was not accepted: whoever reported it still has it."""


class InvalidEvent(NotAccepted, ValueError):
    """What was reported is no usage event, whoever would be asked."""


class SpoolFull(NotAccepted):
    """There is no room for the event until others have been delivered."""


class SpoolFailed(NotAccepted):
    """The spool's file cannot be written, or not in time. The event may be stored: reporting it again is safe."""


class ClientClosed(NotAccepted):
    """The client was closed before."""


class NotDelivered(ScripError):
    """The client was closed with events that are neither delivered nor on disk: `bodies`, as JSON, are all of them."""

    def __init__(self, bodies: Sequence[bytes]) -> None:
        super().__init__(f"{len(bodies)} events are in memory only and were not delivered")
        self.bodies = tuple(bodies)


class LedgerError(ScripError):
    """A command or a question to the ledger did not succeed."""


class Refused(LedgerError):
    """The ledger will not: nothing was changed, and asking again decides anew.

    `limit_source` is the account whose wallet refused, `required` what it was asked for, `remaining` what it has.
    """

    def __init__(
        self,
        *,
        status: int,
        code: str,
        detail: str,
        limit_source: str | None = None,
        required: Amount | None = None,
        remaining: Amount | None = None,
    ) -> None:
        super().__init__(f"{code}: {detail}")
        self.status = status
        self.code = code
        self.detail = detail
        self.limit_source = limit_source
        self.required = required
        self.remaining = remaining


class InsufficientFunds(Refused):
    """A wallet has not got what is required: `limit_source`, `required` and `remaining` say which and how much."""


class AccountNotOpen(Refused):
    """The account, or a wallet that is named, is not open."""


class HoldEnded(Refused):
    """The hold is not there any more, or never was: it was released or settled, or its deadline has passed."""


class RequestRejected(LedgerError):
    """The request cannot be right, however often it is sent: the body, the key or the token."""

    def __init__(self, *, status: int, code: str, detail: str, errors: Sequence[object] = ()) -> None:
        super().__init__(f"{status} {code}: {detail}")
        self.status = status
        self.code = code
        self.detail = detail
        self.errors = tuple(errors)


class Away(LedgerError):
    """The ledger did not answer in time, or cannot decide now. `maybe_done`: what was asked may have been done."""

    def __init__(self, why: str, *, maybe_done: bool) -> None:
        super().__init__(why)
        self.maybe_done = maybe_done
