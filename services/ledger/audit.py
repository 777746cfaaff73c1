"""The audit: the journal is whole, unchanged, signed, and keeps every law at every transaction; it names what does not.

Partition by partition, in processes. From the beginning, or from where the last audit got, whose findings are kept in a
file outside the database, as are the heads that were published when they were signed.
"""

import base64
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final, LiteralString

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from pydantic import SecretStr

from contracts.partition import PARTITION_COUNT
from contracts.streams import LEDGER
from services.ledger.audit_partition import (
    FINDINGS_KEPT_MAX,
    Finding,
    Reached,
    Result,
    Seen,
    Task,
    audit_in_turn,
    audit_partitions,
    connect,
)
from services.ledger.signing import heads_of, is_signed

PROGRESS_SECONDS: Final = 0.2
SIGNED_SUBJECT: Final = "ledger.v1.*.heads.signed"
# What is counted fits into a column of the database.
_COUNTS_END: Final = 2**63

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Audited:
    """What an audit found: `findings` are the first ones, `found` is how many there are. `reached` by partition."""

    entries: int
    lines: int
    signatures: int
    seconds: float
    found: int
    findings: tuple[Finding, ...]
    reached: Mapping[int, Reached]

    @property
    def is_clean(self) -> bool:
        """Whether everything is as it must be."""
        return not self.found

    @property
    def entries_per_second(self) -> float:
        return self.entries / max(self.seconds, 1e-9)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known outside the database: where the last audit got, and the highest signed heads that were published.

    `sequence` is the last message of the stream that was read.
    """

    audited: Mapping[int, Reached] = field(default_factory=dict)
    published: Mapping[int, Reached] = field(default_factory=dict)
    sequence: int = 0


class ProcessEnded(Exception):
    """Not all was audited: nothing is known."""


class EvidenceUnreadable(Exception):
    """The file of the last audit does not say what it should."""


def audit(
    url: SecretStr,
    *,
    keys: Mapping[str, Ed25519PublicKey],
    caps: Collection[str],
    evidence: Evidence | None = None,
    since_last: bool = False,
    processes: int | None = None,
    on_progress: Progress = lambda _done, _all: None,
) -> Audited:
    """Audit all partitions. Any role that may read the tables will do, and the service may work meanwhile.

    `caps` are the units that count for each wallet by itself. `since_last`: only what came after the last audit; the
    sums up to there are taken from the projections, which a replay proves.
    """
    known = evidence or Evidence()
    started = time.monotonic()
    raw_keys = {name: key.public_bytes(Encoding.Raw, PublicFormat.Raw) for name, key in keys.items()}
    sizes = _sizes(url, known.audited if since_last else {}, {*known.audited, *known.published})
    tasks = [
        Task(
            url=url.get_secret_value(),
            partition=partition,
            keys=raw_keys,
            caps=frozenset(caps),
            since=known.audited.get(partition) if since_last else None,
            seen=tuple(_seen(known, partition)),
        )
        for partition in sorted(sizes, key=lambda each: -sizes[each])
    ]
    total = sum(sizes.values())
    processes = min(processes or os.cpu_count() or 1, len(tasks))

    def on_counted(entries: int) -> None:
        on_progress(min(entries, total), total)

    results = _in_processes(tasks, processes, on_counted) if processes > 1 else _alone(tasks, on_counted)
    on_progress(total, total)
    findings = sorted(finding for result in results for finding in result.findings)
    return Audited(
        entries=sum(result.entries for result in results),
        lines=sum(result.lines for result in results),
        signatures=sum(result.signatures for result in results),
        seconds=time.monotonic() - started,
        found=sum(result.found for result in results),
        findings=tuple(findings[:FINDINGS_KEPT_MAX]),
        reached={result.partition: result.reached for result in results if result.reached.batch},
    )


def unknown_signers(url: SecretStr, keys: Collection[str]) -> list[str]:
    """The ids of the keys by which the ledger is signed, and which are not among these: it came from elsewhere."""
    with connect(url.get_secret_value()) as connection:
        rows = connection.execute("SELECT DISTINCT key_id FROM signatures ORDER BY 1").fetchall()
    return [str(row[0]) for row in rows if row[0] not in keys]


# Outside the database -------------------------------------------------------------------------------------------------


def read_evidence(path: Path) -> Evidence:
    """What the last audit left behind; nothing if there was none."""
    try:
        told = json.loads(path.read_bytes())
        sequence = _number(told["sequence"], below=_COUNTS_END)
        return Evidence(_reached_of(told["audited"]), _reached_of(told["published"]), sequence)
    except FileNotFoundError:
        return Evidence()
    except OSError as error:
        raise EvidenceUnreadable(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise EvidenceUnreadable(f"{path} is not what an audit wrote: {error!r}") from error


def write_evidence(path: Path, evidence: Evidence) -> None:
    """Keep evidence for the next audit, for the owner of the file alone. Replaced in one step."""
    told = {
        "audited": _reached_text(evidence.audited),
        "published": _reached_text(evidence.published),
        "sequence": evidence.sequence,
    }
    new = path.with_name(f"{path.name}.new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(json.dumps(told, indent=1) + "\n")
        file.flush()
        os.fsync(descriptor)
    new.replace(path)


async def read_published(
    jetstream: JetStreamContext, known: Evidence, *, keys: Mapping[str, Ed25519PublicKey]
) -> tuple[Evidence, tuple[str, ...]]:
    """Add what was published about signed heads since the last audit, as the operator. What is not signed by one of the
    keys is said, and does not count.
    """
    info = await jetstream.stream_info(LEDGER)
    first, last = info.state.first_seq, info.state.last_seq
    # A stream that was made anew counts from the beginning.
    start = max(known.sequence + 1 if known.sequence <= last else 1, first)
    published = dict(known.published)
    forged: list[str] = []
    subscription = await jetstream.pull_subscribe(
        SIGNED_SUBJECT,
        stream=LEDGER,
        config=ConsumerConfig(
            deliver_policy=DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=start, ack_policy=AckPolicy.NONE
        ),
    )
    try:
        waiting = (await subscription.consumer_info()).num_pending or 0
        while waiting > 0:
            for message in await subscription.fetch(min(waiting, 500), timeout=10):
                waiting -= 1
                fact = _signed_fact(message.data, keys)
                if fact is None:
                    forged.append(f"message {message.metadata.sequence.stream} of {LEDGER} is not signed by the ledger")
                    continue
                for partition, reached in fact.items():
                    if partition not in published or published[partition].batch < reached.batch:
                        published[partition] = reached
    finally:
        await subscription.unsubscribe()
    return Evidence(known.audited, published, last), tuple(forged)


def _signed_fact(body: bytes, keys: Mapping[str, Ed25519PublicKey]) -> dict[int, Reached] | None:
    try:
        told = json.loads(body)
        text, key = told["heads"], told["key_id"]
        signature = base64.b64decode(told["signature"], validate=True)
        if not is_signed(text, signature, key_id=key, keys=keys):
            return None
        return {partition: Reached(*head) for partition, head in heads_of(text).items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _seen(known: Evidence, partition: int) -> Iterator[Seen]:
    if partition in known.audited:
        yield Seen(known.audited[partition], "audited")
    if partition in known.published:
        yield Seen(known.published[partition], "published as signed")


def _reached_of(told: Mapping[str, Mapping[str, Any]]) -> dict[int, Reached]:
    return {
        _number(key, below=PARTITION_COUNT): Reached(
            _number(each["batch"], below=_COUNTS_END), bytes.fromhex(each["hash"])
        )
        for key, each in told.items()
    }


def _number(told: str | int, *, below: int) -> int:
    number = int(told)
    if not 0 <= number < below:
        raise ValueError(f"{number} is not from 0 to {below - 1}")
    return number


def _reached_text(reached: Mapping[int, Reached]) -> dict[str, dict[str, Any]]:
    return {f"{key:02d}": {"batch": each.batch, "hash": each.chain_hash.hex()} for key, each in sorted(reached.items())}


# Processes ------------------------------------------------------------------------------------------------------------


def _in_processes(tasks: Sequence[Task], processes: int, on_progress: Callable[[int], None]) -> list[Result]:
    """What is found in each partition. An error in a process is one here; so is a process that ends too early."""
    context = multiprocessing.get_context("spawn")
    turn, counted = context.Value("Q", 0), context.Value("Q", 0)
    children: dict[Pipe, BaseProcess] = {}
    results: list[Result] = []
    try:
        for _ in range(processes):
            ours, theirs = context.Pipe(duplex=False)
            child: BaseProcess = context.Process(target=audit_in_turn, args=(tasks, turn, counted, theirs), daemon=True)
            with _uninterrupted():
                child.start()
                children[ours] = child
            theirs.close()
        while children:
            ready = wait(list(children), PROGRESS_SECONDS)
            for pipe, child in list(children.items()):
                if pipe not in ready:
                    continue
                try:
                    told = pipe.recv()
                except (EOFError, OSError):
                    del children[pipe]
                    child.join()
                    if child.exitcode != 0:
                        raise ProcessEnded(f"a process of the audit ended with exit code {child.exitcode}") from None
                    continue
                if isinstance(told, Exception):
                    raise told
                results.append(told)
            on_progress(counted.value)
    finally:
        for each in children.values():
            each.terminate()
            each.join()
    if len(results) != len(tasks):
        raise ProcessEnded(f"{len(results)} of {len(tasks)} partitions were audited")
    return results


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """What ends this process waits for a child to be started. The child hears of no Ctrl-C: who began it ends it."""
    late: list[int] = []
    before: dict[int, Any] = {}
    # Only the main thread handles signals, and may say how.
    if threading.current_thread() is threading.main_thread():
        for each in (signal.SIGINT, signal.SIGTERM):
            before[each] = signal.signal(each, lambda number, _: late.append(number))
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in late:
            signal.raise_signal(number)


def _alone(tasks: Sequence[Task], on_progress: Callable[[int], None]) -> list[Result]:
    """The same in this process."""
    counted = 0

    def count(entries: int) -> None:
        nonlocal counted
        counted += entries
        on_progress(counted)

    return list(audit_partitions(tasks, count))


def _sizes(url: SecretStr, since: Mapping[int, Reached], seen: Collection[int]) -> dict[int, int]:
    """How many entries there are to audit, by partition: of each that has any, or of which a head was seen."""
    after = [since[each].batch if each in since else 0 for each in range(PARTITION_COUNT)]
    with connect(url.get_secret_value()) as connection:
        rows = connection.execute(_SIZES, [list(range(PARTITION_COUNT)), after, list(seen)]).fetchall()
    return {int(partition): int(count) for partition, count in rows}


_SIZES: Final[LiteralString] = """
SELECT p.partition, (SELECT count(*) FROM journal j WHERE j.partition = p.partition AND j.batch > p.batch)
FROM unnest(%s::smallint[], %s::bigint[]) AS p (partition, batch)
WHERE p.partition = ANY (%s) OR EXISTS (SELECT FROM heads t WHERE t.partition = p.partition AND t.batch > 0)
   OR EXISTS (SELECT FROM journal t WHERE t.partition = p.partition)
   OR EXISTS (SELECT FROM signatures t WHERE t.partition = p.partition)
   OR EXISTS (SELECT FROM charge_lines t WHERE t.partition = p.partition)
   OR EXISTS (SELECT FROM commands t WHERE t.partition = p.partition)
   OR EXISTS (SELECT FROM bundles t WHERE t.partition = p.partition AND t.transaction_id IS NOT NULL)
   OR EXISTS (SELECT FROM reversals t WHERE t.partition = p.partition)
"""
