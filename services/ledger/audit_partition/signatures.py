"""Signatures and the journal: the last entry of each batch was signed, with whatever else its commit moved."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, LiteralString

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from psycopg import Connection
from psycopg.rows import TupleRow

from services.ledger.audit_partition.findings import Result
from services.ledger.audit_partition.rows import Batches, Source, Told
from services.ledger.signing import is_signed, says_head

TEXT_CHARACTERS_MAX: Final = 64 * 2**20

_SIGNATURES: Final[LiteralString] = """
SELECT batch, chain_hash, signature, key_id, commit_id, heads FROM signatures
WHERE partition = %(partition)s AND batch > %(after)s ORDER BY batch
"""

# A row without a text refers to the one of its commit's first head.
_TEXTS: Final[LiteralString] = """
SELECT k.commit_id, (
    SELECT heads FROM signatures f WHERE (f.partition, f.batch, f.commit_id) = (k.partition, k.batch, k.commit_id)
) FROM unnest(%s::text[], %s::smallint[], %s::bigint[]) AS k (commit_id, partition, batch)
"""
_COMMIT: Final = re.compile(r"([0-9]{2})-([0-9]{1,18})")


class Commits:
    """What commits signed: read and verified once, not for each of the partitions whose heads they moved."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        self._keys = {name: Ed25519PublicKey.from_public_bytes(raw) for name, raw in keys.items()}
        # Text, signature and key of those that are signed, by their ids.
        self._signed: dict[str, tuple[str, bytes, str]] = {}
        self._characters = 0

    def texts_of(self, connection: Connection[TupleRow], rows: Sequence[TupleRow]) -> dict[str, str]:
        """The texts that rows of signatures refer to, as far as there are any."""
        wanted = {row[4]: _COMMIT.fullmatch(row[4]) for row in rows if not row[5] and row[4] not in self._signed}
        named = [(name, int(place[1]), int(place[2])) for name, place in wanted.items() if place is not None]
        found = connection.execute(_TEXTS, list(map(list, zip(*named, strict=True)))).fetchall() if named else ()
        known = {row[4]: self._signed[row[4]][0] for row in rows if not row[5] and row[4] in self._signed}
        return known | {name: text or "" for name, text in found}

    def is_signed(self, commit: str, text: str, signature: bytes, key_id: str) -> bool:
        """Whether the text of a commit was signed by a key that is known."""
        said = (text, signature, key_id)
        if self._signed.get(commit) == said:
            return True
        if not is_signed(text, signature, key_id=key_id, keys=self._keys):
            return False
        if self._characters < TEXT_CHARACTERS_MAX and commit not in self._signed:
            self._signed[commit] = said
            self._characters += len(text)
        return True


class Signatures:
    """The signature of each batch."""

    def __init__(self, source: Source, commits: Commits, result: Result) -> None:
        self._source = source
        self._commits = commits
        self._result = result
        self._batches = Batches(self._rows(), 0, self._stray)

    def begin(self, batch: Sequence[TupleRow]) -> None:
        last = batch[-1]
        number, position, chain_hash = last[0], last[1], last[15]
        found = self._batches.take(number)
        if not found:
            self._result.find(number, position, "no signature covers the head that it made")
            return
        _, signed_hash, signature, key_id, commit, text = found[0]
        self._result.signatures += 1
        if signed_hash != chain_hash:
            self._result.find(number, position, "another hash of it was signed")
        elif not text:
            self._result.find(number, position, f"the text that commit {commit} signed is not there: it was removed")
        elif not says_head(text, partition=self._source.partition, batch=number, chain_hash=chain_hash):
            self._result.find(number, position, "the text that was signed says something else of it")
        elif not self._commits.is_signed(commit, text, signature, key_id):
            self._result.find(number, position, f"its signature is not one by the key {key_id}, if that is known")

    def check(self, entries: Sequence[TupleRow], told: Told) -> None:
        """A transaction is not signed by itself."""

    def leave(self) -> None:
        """There is one signature for a batch."""

    def end(self) -> None:
        self._batches.end()

    def _rows(self) -> Iterator[TupleRow]:
        """Each with its text."""
        for rows in self._source.blocks("signatures", _SIGNATURES):
            texts = self._commits.texts_of(self._source.connection, rows)
            for *more, commit, text in rows:
                yield *more, commit, text or texts.get(commit, "")

    def _stray(self, row: TupleRow) -> None:
        self._result.find(row[0], 0, "it was signed, and is not there: entries have been removed")
