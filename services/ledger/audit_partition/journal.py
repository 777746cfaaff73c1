"""One pass through the journal of a partition: the chain entry by entry, the laws transaction by transaction, and what
stands beside it batch by batch.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, groupby
from operator import itemgetter
from typing import Final, LiteralString

from psycopg import Connection
from psycopg.rows import TupleRow

from services.ledger.audit_partition.bundles import Bundles
from services.ledger.audit_partition.commands import Commands
from services.ledger.audit_partition.findings import Reached, Result, Task
from services.ledger.audit_partition.lines import ChargeLines
from services.ledger.audit_partition.recall import recall
from services.ledger.audit_partition.reversals import Reversals
from services.ledger.audit_partition.rows import BEFORE_ALL, Beside, Source
from services.ledger.audit_partition.signatures import Commits, Signatures
from services.ledger.domain.chain import GENESIS, columns_hash
from services.ledger.domain.laws import Laws

_JOURNAL: Final[LiteralString] = """
SELECT batch, position, transaction_id::text, kind, account, unit, lot_id::text, lot_kind, hold_id::text, posted, held,
       frozen, occurred_at, recorded_at, details, hash
FROM journal WHERE partition = %(partition)s AND batch > %(after)s ORDER BY batch, position
"""


def audited(connection: Connection[TupleRow], task: Task, commits: Commits, count: Callable[[int], None]) -> Result:
    """Everything about a partition. `count` is told how many entries more have been read."""
    since = task.since
    if since is not None and _hash_of(connection, task.partition, since.batch) != since.chain_hash:
        # Said below, with all else that was seen: so everything is looked at again.
        since = None
    result = Result(task.partition)
    source = Source(connection, task.partition, BEFORE_ALL if since is None else since.batch)
    laws = Laws(task.partition, caps=task.caps)
    if since is not None:
        recall(connection, laws, task.partition, since.batch)
    besides: tuple[Beside, ...] = (
        Signatures(source, commits, result),
        Commands(source, result),
        Bundles(source, result),
        ChargeLines(source, laws, result, since=since is not None),
        Reversals(source, result),
    )
    result.reached = since or Reached(0, GENESIS)
    _read(source, laws, besides, result, count)
    for breach in laws.breaches:
        result.find(*breach)
    for beside in besides:
        beside.end()
    _check_head(source, task, result)
    return result


def _read(source: Source, laws: Laws, besides: Sequence[Beside], result: Result, count: Callable[[int], None]) -> None:
    """The journal, batch by batch, from where `result` got."""

    def blocks() -> Iterator[Sequence[TupleRow]]:
        for rows in source.blocks("journal", _JOURNAL):
            count(len(rows))
            yield rows

    recorded_before = None
    for _, each in groupby(chain.from_iterable(blocks()), key=itemgetter(0)):
        batch = list(each)
        first = batch[0]
        if first[0] != result.reached.batch + 1:
            what = f"batch {result.reached.batch + 1} should come here: entries have been removed"
            result.find(first[0], first[1], what)
        if recorded_before is not None and first[13] <= recorded_before:
            result.find(first[0], first[1], f"it was recorded at {first[13]}, not after the batch before it")
        _check_chain(source.partition, batch, result)
        for beside in besides:
            beside.begin(batch)
        for _, of_transaction in groupby(batch, key=itemgetter(2)):
            entries = list(of_transaction)
            told = laws.add(entries)
            for beside in besides:
                beside.check(entries, told)
        for beside in besides:
            beside.leave()
        recorded_before = batch[-1][13]


def _check_chain(partition: int, batch: Sequence[TupleRow], result: Result) -> None:
    """The entries of a batch follow each other, and the last of the batch before."""
    previous, position, recorded_at = result.reached.chain_hash, 0, batch[0][13]
    for row in batch:
        if row[13] != recorded_at:
            result.find(row[0], row[1], "it was recorded at another time than the entry before it in its batch")
            recorded_at = row[13]
        if row[1] != position + 1:
            result.find(row[0], row[1], f"position {position + 1} should come here: entries have been removed")
        position = row[1]
        if columns_hash(previous, (partition, *row[:15])) != row[15]:
            result.find(row[0], row[1], "its hash is not that of its columns after the entry before it")
        previous = row[15]
    result.entries += len(batch)
    result.reached = Reached(batch[0][0], previous)


def _check_head(source: Source, task: Task, result: Result) -> None:
    """The head is the last entry; what was seen outside is in the journal."""
    reached, partition = result.reached, source.partition
    row = source.connection.execute(
        "SELECT batch, chain_hash FROM heads WHERE partition = %s", [partition], binary=True
    ).fetchone()
    if row is None or (row[0], row[1]) != (reached.batch, reached.chain_hash):
        result.find(reached.batch, 0, f"the journal ends here, its head is at batch {row and row[0]}")
    for seen in task.seen:
        batch = seen.reached.batch
        if batch > reached.batch:
            what = f"the journal ends here, but batch {batch} has been {seen.where}: entries have been removed"
            result.find(reached.batch, 0, what)
        elif _hash_of(source.connection, partition, batch) != seen.reached.chain_hash:
            result.find(batch, 0, f"it is not what has been {seen.where}: entries up to it have been changed")


def _hash_of(connection: Connection[TupleRow], partition: int, batch: int) -> bytes | None:
    """The hash of the last entry of a batch."""
    row = connection.execute(
        "SELECT hash FROM journal WHERE partition = %s AND batch = %s ORDER BY position DESC LIMIT 1",
        [partition, batch],
        binary=True,
    ).fetchone()
    return None if row is None else bytes(row[0])
