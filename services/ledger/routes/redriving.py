"""Dead letters again: lines of bundles, and facts of billing. However often, each takes effect once at most."""

from typing import Final

from contracts import ledger as words
from contracts.streams import PAYMENTS
from services.kit.dead_letters import DeadLetter, Unreadable
from services.ledger import translate
from services.ledger.engine import NotDecided
from services.ledger.routes.backend import Backend
from services.ledger.routes.commands import problem_of

REDRIVE_SECONDS_MAX: Final = 20.0


async def redrive(backend: Backend, letter: DeadLetter) -> None:
    """Decide what was dead-lettered again; however often, it takes effect once at most.

    A line of a bundle is a command under the letter's id, a fact of billing asks under the keys it always asks under.
    """
    if letter.stream == PAYMENTS:
        try:
            await backend.owners.take_payment_fact(letter.subject, letter.payload, seconds_max=REDRIVE_SECONDS_MAX)
        except NotDecided as error:
            raise problem_of(error.failed) from error
        return
    try:
        command = translate.read_again(letter.payload, backend.units, key=f"dead-letter:{letter.id}")
    except translate.Invalid as error:
        rows = translate.problem_rows(error.problems)
        raise Unreadable("the line still cannot be read", problems=rows) from error
    reply = await backend.owners.ask(command, principal=_REDRIVER)
    match reply:
        case words.Accepted():
            pass
        case words.Refused(code="already_charged"):
            # By another bundle, meanwhile: this very line.
            pass
        case words.Refused():
            raise Unreadable(f"the line still cannot be done: {reply.message}")
        case words.Failed():
            raise problem_of(reply)


_REDRIVER: Final = "dead-letters"
