"""Commands, one by one or in lists: repeated under a known key, else carried out; tried out where no trace may stay."""

from collections.abc import Mapping
from functools import cache
from typing import Any, Final

import msgspec
from prometheus_client import Counter

from services.kit.telemetry import REGISTRY
from services.ledger.domain.commands import ChargeLine, Command
from services.ledger.domain.errors import Refusal
from services.ledger.domain.rules import CATCH_UP_MAX
from services.ledger.handlers.carrying_out import Done, carry_out
from services.ledger.handlers.catching_up import catch_up, concerned, is_due, overdue_before
from services.ledger.handlers.charging import LINES
from services.ledger.handlers.items import CommandItem, ListItem
from services.ledger.handlers.work import Work
from services.ledger.translate import refused

COMMANDS: Final = Counter("scrip_ledger_commands", "Commands by outcome.", ("command", "outcome"), registry=REGISTRY)

# Half of what a message carries: to a reply to a plain list one command's is added at most.
REPLY_BYTES_MAX: Final = 4 << 20
TOO_MUCH: Final = "too_much_at_once"

_encode: Final = msgspec.json.Encoder().encode
_CONFLICT: Final = "the idempotency key was used for a command with another body"


def take_command(work: Work, item: CommandItem, *, is_looked_up: bool) -> bytes | None:
    """Decide a command, or repeat the outcome its key has: the reply as JSON.

    None: it would be refused, unless it was accepted before. Of what is accepted that shows when it is written.
    """
    reply = _reply(work, item, is_looked_up=is_looked_up)
    return None if reply["status"] == "refused" and not is_looked_up else _encode(reply)


def take_list(work: Work, item: ListItem) -> bytes:
    """Decide commands one after the other, each as if it came alone; or all of them, or none: the reply as JSON."""
    if item.key is not None:
        return _encode(_reply_to_all(work, item, item.key))
    mark = work.fork() if item.dry_run else None
    answers = _Answers(work)
    for each in item.commands:
        if (excess := answers.excess) is None:
            answers.add(_reply(work, each, is_tried_out=item.dry_run))
        else:
            message = f"not decided, to be sent in another list: {excess}"
            answers.add({"status": "failed", "code": "busy", "message": message})
    outcome = {"status": "listed", "replies": answers.replies}
    if mark is None:
        return _encode(outcome)
    work.drop(mark)
    return _encode({**outcome, "dry_run": True})


class _Answers:
    """What is answered to a list, command by command: no more than can be sent, or than others can wait for."""

    def __init__(self, work: Work) -> None:
        self.replies: list[msgspec.Raw] = []
        self._work = work
        self._bytes = 0
        self._renewals_before = work.renewals

    def add(self, reply: Mapping[str, Any]) -> None:
        """The answer to the next command."""
        encoded = _encode(reply)
        self._bytes += len(encoded)
        self.replies.append(msgspec.Raw(encoded))

    @property
    def excess(self) -> str | None:
        """Why no more of the list can be decided, if so."""
        renewals = self._work.renewals - self._renewals_before
        if self._bytes > REPLY_BYTES_MAX:
            return f"{self._decided} answered in {self._bytes} bytes, and a list in at most {REPLY_BYTES_MAX}"
        if renewals > CATCH_UP_MAX:
            return f"{self._decided} granting {renewals} periods at once, and a list grants at most {CATCH_UP_MAX}"
        return None

    @property
    def _decided(self) -> str:
        return "its first command is" if len(self.replies) == 1 else f"its first {len(self.replies)} commands are"


def _reply(work: Work, item: CommandItem, *, is_tried_out: bool = False, is_looked_up: bool = True) -> dict[str, Any]:
    name = type(item.command).__name__
    dry_run = item.dry_run or is_tried_out
    if (known := _outcome_of(work, item.principal, item.key)) is not None:
        return _known(name, item.body_hash, known, dry_run=dry_run)
    # What is tried out as part of a list is known to what comes after it.
    done = _try(work, item.command, dry_run=item.dry_run and not is_tried_out)
    if not isinstance(done, Done):
        if is_looked_up:
            _count(name, done.code)
        return refused(done, partition=work.partition, units=work.units)
    if dry_run:
        _count(name, "dry_run")
        return {**done.outcome, "dry_run": True}
    _note_accepted(item.command)
    _record_outcome(work, item.principal, item.key, body_hash=item.body_hash, done=done, outcome=done.outcome)
    return done.outcome


def _reply_to_all(work: Work, item: ListItem, key: str) -> dict[str, Any]:
    if (known := _outcome_of(work, item.principal, key)) is not None:
        return _known("list", item.body_hash, known, dry_run=item.dry_run)
    mark = work.fork()
    answers = _Answers(work)
    done: Done | None = None
    for place, each in enumerate(item.commands):
        accounts = concerned(work, each.command)
        catch_up(work, accounts, overdue_before(work, accounts, (each.command,)))
        decided = carry_out(work, each.command, accounts)
        if not isinstance(decided, Done):
            work.drop(mark)
            _count("list", decided.code)
            return {**refused(decided, partition=work.partition, units=work.units), "index": place}
        done = decided
        answers.add({**done.outcome, "dry_run": True} if item.dry_run else done.outcome)
        if (excess := answers.excess) is not None:
            work.drop(mark)
            _count("list", TOO_MUCH)
            return {
                "status": "refused",
                "code": TOO_MUCH,
                "message": f"make it several lists: {excess}",
                "index": place,
            }
    assert done is not None, "a list has a command"
    outcome: dict[str, Any] = {"status": "listed", "replies": answers.replies, "replayed": False}
    if item.dry_run:
        work.drop(mark)
        _count("list", "dry_run")
        return {**outcome, "dry_run": True}
    work.join(mark)
    for each in item.commands:
        _note_accepted(each.command)
    _record_outcome(work, item.principal, key, body_hash=item.body_hash, done=done, outcome=outcome)
    return outcome


def _try(work: Work, command: Command, *, dry_run: bool) -> Done | Refusal:
    """Carry out a command after what is due. A refusal leaves no trace, nor does a dry run."""
    accounts = concerned(work, command)
    overdue_holds = overdue_before(work, accounts, (command,))
    if not dry_run and not overdue_holds and not is_due(work, accounts):
        # A refusal has changed nothing: only what is due before it would have.
        return carry_out(work, command, accounts)
    mark = work.fork()
    catch_up(work, accounts, overdue_holds)
    done = carry_out(work, command, accounts)
    if isinstance(done, Done) and not dry_run:
        work.join(mark)
    else:
        work.drop(mark)
    return done


def _known(name: str, body_hash: bytes, known: tuple[bytes, dict[str, Any]], *, dry_run: bool) -> dict[str, Any]:
    """What is answered under a key that has an outcome."""
    if known[0] != body_hash:
        _count(name, "conflict")
        return {"status": "failed", "code": "conflict", "message": _CONFLICT}
    _count(name, "replayed")
    outcome = {**known[1], "replayed": True}
    return {**outcome, "dry_run": True} if dry_run else outcome


def _outcome_of(work: Work, principal: str, key: str) -> tuple[bytes, dict[str, Any]] | None:
    if (recent := work.accepted.get((principal, key))) is not None:
        return recent
    stored = work.loaded.commands.get((work.partition, principal, key))
    return None if stored is None else (stored[0], msgspec.json.decode(stored[1]))


def _note_accepted(command: Command) -> None:
    _count(type(command).__name__, "accepted")
    if isinstance(command, ChargeLine):
        LINES.labels(outcome="charged").inc()


def _record_outcome(
    work: Work, principal: str, key: str, *, body_hash: bytes, done: Done, outcome: dict[str, Any]
) -> None:
    work.accepted[principal, key] = (body_hash, outcome)
    work.commands.append(
        (
            work.partition,
            principal,
            key,
            body_hash,
            done.transaction,
            done.batch,
            done.recorded_at,
            _encode(outcome).decode(),
        )
    )


def _count(command: str, outcome: str) -> None:
    _counter(command, outcome).inc()


@cache
def _counter(command: str, outcome: str) -> Counter:
    # Looking a counter up by its labels costs more than counting.
    return COMMANDS.labels(command=command, outcome=outcome)
