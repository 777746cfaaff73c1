"""What an audit of a partition is asked, and what it finds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from services.ledger.domain.chain import GENESIS

FINDINGS_KEPT_MAX: Final = 100


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """Something that is not as it must be, and where; `what` is a clause."""

    partition: int
    batch: int
    position: int
    what: str

    def __str__(self) -> str:
        place = f", batch {self.batch}" if self.batch else ""
        place += f", position {self.position}" if self.position else ""
        return f"partition {self.partition}{place}: {self.what}"


@dataclass(frozen=True, slots=True)
class Reached:
    """An entry that ends a batch, and the hash of everything up to it."""

    batch: int
    chain_hash: bytes


@dataclass(frozen=True, slots=True)
class Seen:
    """A head that was seen outside the database; `where` says how."""

    reached: Reached
    where: str


@dataclass(frozen=True, slots=True)
class Task:
    """What one process needs to audit one partition."""

    url: str = field(repr=False)
    partition: int
    keys: Mapping[str, bytes]
    caps: frozenset[str]
    since: Reached | None
    seen: tuple[Seen, ...]


@dataclass(slots=True)
class Result:
    """What was found in one partition."""

    partition: int
    reached: Reached = Reached(0, GENESIS)
    entries: int = 0
    lines: int = 0
    signatures: int = 0
    found: int = 0
    findings: list[Finding] = field(default_factory=list)

    def find(self, batch: int, position: int, what: str) -> None:
        self.found += 1
        if len(self.findings) < FINDINGS_KEPT_MAX:
            self.findings.append(Finding(self.partition, batch, position, what))
