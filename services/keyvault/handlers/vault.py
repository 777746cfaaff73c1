"""What the handlers work with, and the one way to change something: under the lock of a partition's head."""

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from prometheus_client import Counter as Metric

from contracts import ledger
from contracts.keyvault import KeyCreated, KeyDisabled, KeyPolicyChanged
from contracts.money import Unit
from contracts.partition import partition_of
from services.keyvault import store, translate
from services.keyvault.domain.keyring import Keyring
from services.keyvault.store import Connection, Head
from services.keyvault.translate import NewHolder
from services.kit.database import Pool
from services.kit.ids import new_uuid7
from services.kit.outbox import OutboxRow, stage
from services.kit.telemetry import REGISTRY

Ask = Callable[[ledger.Command], Awaitable[ledger.Reply]]
# Beyond, uses are no longer told apart: what is counted must not be what fills the memory.
USES_KEPT_MAX: Final = 100_000
UNDECRYPTABLE: Final = Metric(
    "scrip_keyvault_undecryptable", "Stored secrets that could not be opened: each is an alarm.", registry=REGISTRY
)


class Uses:
    """What was used since the last flush. Lost if the process dies: it says when and how often, never whether."""

    def __init__(self) -> None:
        self.leases: Counter[tuple[UUID, datetime, str]] = Counter()
        self.secrets: dict[UUID, datetime] = {}
        self.keys: dict[str, datetime] = {}

    def leased(self, record: UUID, *, principal: str, at: datetime) -> None:
        """A secret was leased."""
        if len(self.leases) < USES_KEPT_MAX:
            self.leases[record, translate.minute_of(at), principal] += 1
            self.secrets[record] = at

    def verified(self, key_id: str, *, at: datetime) -> None:
        """A key was verified."""
        if len(self.keys) < USES_KEPT_MAX:
            self.keys[key_id] = at


@dataclass(frozen=True, slots=True, kw_only=True)
class Vault:
    """What the handlers work with. `notify` is told what has been committed to the outbox."""

    pool: Pool
    lookups: Pool
    ring: Callable[[], Keyring]
    ask: Ask
    units: Mapping[str, Unit]
    new_holder: NewHolder
    now: Callable[[], datetime]
    notify: Callable[[Sequence[OutboxRow]], None]
    lease_valid: timedelta
    uses: Uses = field(default_factory=Uses)


@asynccontextmanager
async def changing(vault: Vault, account: str) -> AsyncIterator["Change"]:
    """A transaction that changes something of an account (empty: the platform). What it has to say goes out after."""
    partition = partition_of(account) if account else 0
    async with vault.pool.connection() as connection:
        async with connection.transaction():
            head = await store.lock_head(connection, partition)
            # The clock may have been put back.
            at = max(vault.now(), head.recorded_at + timedelta(microseconds=1))
            change = Change(connection, account=account, partition=partition, number=head.outbox_number, at=at)
            yield change
            await change.finish()
        vault.notify(change.rows)


class Change:
    """A transaction under the lock of a partition's head. The platform's secrets are kept with partition 0."""

    def __init__(self, connection: Connection, *, account: str, partition: int, number: int, at: datetime) -> None:
        self.connection = connection
        self.at = at
        self.rows: list[OutboxRow] = []
        self._account = account
        self._partition = partition
        self._number = number

    async def audit(
        self,
        principal: str,
        action: str,
        *,
        record: UUID | None = None,
        key_id: str | None = None,
        detail: Mapping[str, Any],
    ) -> None:
        """Note who did what."""
        await store.add_audit(
            self.connection,
            audit_id=new_uuid7(),
            at=self.at,
            principal=principal,
            action=action,
            account=self._account or None,
            record=record,
            key_id=key_id,
            detail=detail,
        )

    def tell(self, fact: type[KeyCreated] | type[KeyDisabled], *, key_id: str) -> None:
        """Stage a fact about a key."""
        self._number += 1
        self.rows.append(
            translate.outbox_row(
                fact(
                    partition=self._partition,
                    number=self._number,
                    account=self._account,
                    recorded_at=self.at,
                    key_id=key_id,
                )
            )
        )

    def tell_policy_changed(self) -> None:
        """Stage the fact that what was verified below the account is to be asked again. Of the platform nobody asks."""
        if not self._account:
            return
        self._number += 1
        self.rows.append(
            translate.outbox_row(
                KeyPolicyChanged(
                    partition=self._partition, number=self._number, account=self._account, recorded_at=self.at
                )
            )
        )

    async def finish(self) -> None:
        """Write the outbox and where the partition stands now."""
        if self.rows:
            await stage(self.connection, self.rows)
            await store.move_head(
                self.connection, self._partition, Head(outbox_number=self._number, recorded_at=self.at)
            )
