"""A new key ring: every data key is wrapped with its current key."""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from services.keyvault import store
from services.keyvault.domain.errors import (
    SecretUndecryptable,
)
from services.keyvault.domain.sealing import (
    REWRAP_ENTROPY_BYTES,
    rewrap,
)
from services.keyvault.handlers.vault import UNDECRYPTABLE, Vault
from services.kit.ids import new_uuid7
from services.kit.telemetry import get_logger

log = get_logger(__name__)

REWRAP_ROWS_MAX: Final = 100


@dataclass(frozen=True, slots=True)
class Rewrapped:
    """What a run of rewrapping came to. `undecryptable` are records that stay as they were."""

    ring_version: int
    rewrapped: int
    undecryptable: Sequence[UUID]


async def rewrap_all(vault: Vault, *, principal: str) -> Rewrapped:
    """Wrap every data key with the ring's current key, some rows at a time, while everything goes on. Refuses nothing.

    Interrupted, it is simply run again. A row that cannot be opened is left alone, reported and alarmed.
    """
    ring = vault.ring()
    count = 0
    undecryptable: list[UUID] = []
    after: UUID | None = None
    while True:
        async with vault.pool.connection() as connection, connection.transaction():
            rows = await store.find_not_wrapped_with(connection, ring.current, after=after, limit=REWRAP_ROWS_MAX)
            if not rows:
                return Rewrapped(ring_version=ring.current, rewrapped=count, undecryptable=undecryptable)
            done = {}
            for row in rows:
                wrapped = rewrap(row.sealed, place=row.place, ring=ring, entropy=os.urandom(REWRAP_ENTROPY_BYTES))
                if isinstance(wrapped, SecretUndecryptable):
                    undecryptable.append(row.record)
                    UNDECRYPTABLE.inc()
                    log.error("a stored secret cannot be rewrapped", reason=str(wrapped))
                else:
                    done[row.record] = wrapped
            await store.replace_wrapping(connection, done)
            await store.add_audit(
                connection,
                audit_id=new_uuid7(),
                at=vault.now(),
                principal=principal,
                action="secrets_rewrapped",
                detail={"ring_version": ring.current, "rewrapped": len(done), "undecryptable": len(rows) - len(done)},
            )
        count += len(done)
        after = rows[-1].record
        # Others have their turn.
        await asyncio.sleep(0)
