"""Where the last audit got: what the entries after it are about, as it was then."""

from typing import Final, LiteralString

import msgspec
from psycopg import Connection
from psycopg.rows import TupleRow

from services.ledger.domain.commands import LotScope, Scope
from services.ledger.domain.laws import KnownHold, KnownLot, KnownWallet, Laws

_decode_lot_scope: Final = msgspec.json.Decoder(LotScope).decode
_decode_scope: Final = msgspec.json.Decoder(Scope).decode


def recall(connection: Connection[TupleRow], laws: Laws, partition: int, after: int) -> None:
    """What the entries after a batch are about, as it was then: what it is now, less what they add."""
    parameters = {"partition": partition, "after": after}
    for account, unit, policy, overdraft in connection.execute(_WALLETS_THEN, parameters).fetchall():
        laws.wallets[account, unit] = KnownWallet(policy, overdraft)
    for row in connection.execute(_LOTS_THEN, parameters).fetchall():
        lot_id, account, unit, kind, effective_at, expires_at, scope, posted, held, frozen, expired = row
        lot = KnownLot(lot_id, account, unit, kind, effective_at, expires_at, posted=posted, held=held, frozen=frozen)
        lot.scope = None if scope is None else _decode_lot_scope(scope)
        lot.expired = expired
        laws.lots[lot_id] = lot
        if (posted or held or frozen) and (account, unit) in laws.wallets:
            laws.wallets[account, unit].lots[lot_id] = lot
        if expired and (account, unit) in laws.wallets:
            laws.wallets[account, unit].expired[lot_id] = lot
    for hold_id, status, scope, has_deadline, recorded_at, ended_at in connection.execute(_HOLDS_THEN, parameters):
        laws.holds[hold_id] = KnownHold(
            status,
            recorded_at,
            scope=None if scope is None else _decode_scope(scope),
            has_deadline=has_deadline,
            ended_at=ended_at,
        )
    for hold_id, lot_id, held in connection.execute(_EARMARKS_THEN, parameters):
        laws.holds[hold_id].earmarks[lot_id] = held


_WALLETS_THEN: Final[LiteralString] = """
WITH touched AS (
    SELECT DISTINCT account, unit FROM journal
    WHERE partition = %(partition)s AND batch > %(after)s AND unit IS NOT NULL AND left(account, 1) <> '@'
), terms AS (
    SELECT DISTINCT ON (account, unit) account, unit, details::json ->> 'policy' AS policy,
           coalesce((details::json ->> 'overdraft')::bigint, 0) AS overdraft
    FROM journal
    WHERE partition = %(partition)s AND batch <= %(after)s AND kind IN ('wallet_opened', 'wallet_set')
      AND account IN (
          SELECT account FROM journal WHERE partition = %(partition)s AND batch > %(after)s AND kind = 'wallet_set'
      )
    ORDER BY account, unit, batch DESC, position DESC
)
SELECT w.account, w.unit, coalesce(t.policy, w.policy), coalesce(t.overdraft, w.overdraft)
FROM wallets w JOIN touched USING (account, unit) LEFT JOIN terms t USING (account, unit)
WHERE w.partition = %(partition)s AND w.batch <= %(after)s
"""

_LOTS_THEN: Final[LiteralString] = """
WITH touched AS (
    SELECT DISTINCT account, unit FROM journal
    WHERE partition = %(partition)s AND batch > %(after)s AND unit IS NOT NULL AND left(account, 1) <> '@'
), added AS (
    SELECT lot_id, sum(posted)::bigint AS posted, sum(held)::bigint AS held, sum(frozen)::bigint AS frozen,
           sum(posted) FILTER (WHERE kind IN ('lot_expired', 'lot_revived'))::bigint AS not_expired
    FROM journal WHERE partition = %(partition)s AND batch > %(after)s AND lot_id IS NOT NULL GROUP BY 1
)
SELECT l.lot_id::text, l.account, l.unit, l.kind, l.effective_at, l.expires_at, l.scope,
       l.posted - coalesce(a.posted, 0), l.held - coalesce(a.held, 0), l.frozen - coalesce(a.frozen, 0),
       l.expired + coalesce(a.not_expired, 0)
FROM lots l JOIN touched USING (account, unit) LEFT JOIN added a USING (lot_id)
WHERE l.partition = %(partition)s AND l.batch <= %(after)s AND (NOT l.spent OR a.lot_id IS NOT NULL OR l.expired > 0)
"""

_TOUCHED_HOLDS: Final[LiteralString] = """
WITH touched AS (
    SELECT hold_id,
           bool_or(kind IN ('hold_released', 'hold_expired', 'hold_settled', 'hold_estimated')) AS ended,
           bool_or(kind = 'estimate_reversed') AS reversed
    FROM journal WHERE partition = %(partition)s AND batch > %(after)s AND hold_id IS NOT NULL GROUP BY 1
    UNION
    SELECT hold_id, false, false FROM charge_lines
    WHERE partition = %(partition)s AND batch > %(after)s AND hold_id IS NOT NULL
), held AS (
    SELECT hold_id, bool_or(ended) AS ended, bool_or(reversed) AS reversed FROM touched GROUP BY 1
)
"""

_HOLDS_THEN: Final[LiteralString] = (
    _TOUCHED_HOLDS
    + """
SELECT h.hold_id::text,
       CASE WHEN held.ended THEN 'placed' WHEN held.reversed THEN 'estimated' ELSE h.status END,
       h.scope, h.expires_at IS NOT NULL, h.recorded_at,
       CASE WHEN held.ended OR held.reversed THEN NULL ELSE h.ended_at END
FROM holds h JOIN held USING (hold_id) WHERE h.partition = %(partition)s AND h.batch <= %(after)s
"""
)

_EARMARKS_THEN: Final[LiteralString] = (
    _TOUCHED_HOLDS
    + """
, added AS (
    SELECT hold_id, lot_id, sum(held)::bigint AS held FROM journal
    WHERE partition = %(partition)s AND batch > %(after)s AND hold_id IS NOT NULL AND lot_id IS NOT NULL GROUP BY 1, 2
)
SELECT e.hold_id::text, e.lot_id::text, e.held - coalesce(a.held, 0)
FROM hold_lots e JOIN held USING (hold_id) JOIN holds h USING (partition, hold_id)
LEFT JOIN added a USING (hold_id, lot_id)
WHERE e.partition = %(partition)s AND h.batch <= %(after)s
"""
)
