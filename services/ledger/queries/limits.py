"""Who has used how much of a limit: caps, and what counts against them in the period that is running."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

from psycopg import sql
from pydantic import BaseModel

from contracts.money import Unit, format_amount
from contracts.partition import partition_of
from services.ledger.domain.commands import LATE_GRACE, Units
from services.ledger.domain.entries import PSEUDO_KINDS
from services.ledger.domain.state import Wallet
from services.ledger.queries.present import present
from services.ledger.queries.selection import Connection, bounds_below, text_array

# How many accounts are looked at for one page.
ACCOUNTS_MAX: Final = 5_000
# Shares are told to this many decimals, rounded down.
SHARE_DECIMALS: Final = 4


class LimitView(BaseModel):
    """A cap and what is used of it. `share` is `used` over `limit`, rounded down; null if the limit is 0.

    `limit`: what was granted by the lots that are valid, less what was voided or clawed back; of a grant that does not
    recur and is used up nothing is known but if it was all there was. `used`: what is no longer there of it, and
    `overage`. `held` is not used yet. `renews_at`: when the next period begins.
    """

    account: str
    unit: str
    policy: str
    limit: str
    used: str
    share: str | None
    held: str
    available: str
    overage: str
    renews_at: datetime | None


@dataclass(frozen=True, slots=True)
class LimitQuestion:
    """At or above which share, of which units, in which tree (all: none), after which account, how many at most."""

    share: Decimal
    units: Sequence[str]
    root: str | None
    after: str
    limit: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What a cap comes to and what is used of it, in steps of its unit."""

    limit: int
    used: int
    overage: int

    def is_at(self, share: Decimal) -> bool:
        """Whether something is used, and at least a share of the limit."""
        return self.used > 0 and self.used >= share * self.limit

    @property
    def share(self) -> str | None:
        """As it is told."""
        if self.limit <= 0:
            return None
        return str(Decimal(self.used * 10**SHARE_DECIMALS // self.limit).scaleb(-SHARE_DECIMALS))


def usage(wallet: Wallet, at: datetime) -> Usage:
    """Of the lots that are valid at a time. If there are none, of what there was when something last came in."""
    valid = [lot for lot in wallet.burning() if lot.is_valid(at) and not lot.void]
    # Where there are periods, what was beyond the cap is counted in one of them.
    periods: set[tuple[str | None, int | None]] = {(lot.rule, lot.period) for lot in valid if lot.rule is not None}
    periods = periods or {(None, None)}
    counted = (lot for lot in wallet.lots.values() if lot.kind == "overage" and (lot.rule, lot.period) in periods)
    overage = sum(-lot.posted for lot in counted)
    if not valid:
        return Usage(wallet.full, wallet.full - wallet.posted + overage, overage)
    limit = sum(lot.granted - lot.voided - lot.clawed for lot in valid)
    return Usage(limit, limit - sum(lot.posted for lot in valid) + overage, overage)


async def read_limits(
    connection: Connection, asked: LimitQuestion, *, units: Units, now: datetime
) -> tuple[list[LimitView], str | None]:
    """Caps of which at least a share is used at `now`, in the order of accounts; after which account the next page
    begins, None on the last. A page may have fewer than there is room for, and still not be the last.
    """
    cursor = await connection.execute(
        _CANDIDATES,
        {
            "units": text_array(asked.units),
            "share": asked.share,
            "now": now,
            "after": asked.after,
            "root": asked.root,
            **({"below": None, "beside": None} if asked.root is None else bounds_below(asked.root)),
            "limit": asked.limit,
        },
    )
    looked_at, last, names = await cursor.fetchone() or (0, None, None)
    candidates = [str(name) for name in names or ()]
    after = last if looked_at == ACCOUNTS_MAX else None
    if len(candidates) == asked.limit:
        after = candidates[-1]
    by_partition: dict[int, list[str]] = {}
    for name in candidates:
        by_partition.setdefault(partition_of(name), []).append(name)
    found: dict[str, list[LimitView]] = {}
    for partition, accounts in by_partition.items():
        state, draft = await present(connection, partition, accounts, units=units, now=now)
        for name in accounts:
            found[name] = [
                _limit_view(wallet, comes_to, draft.recorded_at, units.by_name[unit])
                for unit, wallet in sorted(state.accounts[name].wallets.items())
                if unit in asked.units and wallet.policy != "unlimited"
                if (comes_to := usage(wallet, draft.recorded_at)).is_at(asked.share)
            ]
    return [view for name in candidates for view in found[name]], after


def _limit_view(wallet: Wallet, comes_to: Usage, at: datetime, unit: Unit) -> LimitView:
    return LimitView(
        account=wallet.account,
        unit=unit.name,
        policy=wallet.policy,
        limit=format_amount(comes_to.limit, unit),
        used=format_amount(comes_to.used, unit),
        share=comes_to.share,
        held=format_amount(wallet.held, unit),
        available=format_amount(wallet.available_anywhere(at), unit),
        overage=format_amount(comes_to.overage, unit),
        renews_at=min((rule.next_due() for rule in wallet.rules.values() if not rule.is_over), default=None),
    )


def _literals(texts: Any) -> str:
    return ", ".join(f"'{text}'" for text in sorted(texts))


# A bounded number of accounts in their order, and which of them may be meant: by what is stored, or because something
# is due. It reads what `present` reads, and by the same indexes; it finds a few more than `usage` then agrees to.
_CANDIDATES: Final = sql.SQL(
    f"""
    WITH looked_at AS MATERIALIZED (
        SELECT a.partition, a.account, a.due_at FROM accounts a
        WHERE a.account > %(after)s COLLATE "C"
          AND (%(root)s::text IS NULL OR (
              a.account >= %(root)s::text COLLATE "C" AND a.account < %(beside)s::text COLLATE "C"
              AND (a.account = %(root)s::text OR starts_with(a.account, %(below)s::text))
          ))
        ORDER BY a.account COLLATE "C" LIMIT {ACCOUNTS_MAX}
    ), meant AS (
        SELECT DISTINCT a.account COLLATE "C" AS account
        FROM looked_at a JOIN wallets w USING (partition, account) CROSS JOIN LATERAL (
            SELECT sum(granted - voided - clawed) AS granted, sum(posted) AS posted
            FROM (
                SELECT * FROM lots t
                WHERE t.partition = w.partition AND t.account = w.account AND t.unit = w.unit AND NOT t.spent
                UNION ALL
                SELECT * FROM lots t
                WHERE t.partition = w.partition AND t.account = w.account AND t.unit = w.unit
                  AND t.spent AND (t.rule_id IS NOT NULL OR t.expired > 0)
                  AND t.expires_at > %(now)s - interval '{LATE_GRACE.total_seconds():.0f} seconds'
            ) t
            WHERE t.kind NOT IN ({_literals(PSEUDO_KINDS)}) AND NOT t.void
              AND (t.effective_at IS NULL OR t.effective_at <= %(now)s)
              AND (t.expires_at IS NULL OR t.expires_at > %(now)s)
        ) l
        WHERE w.unit = ANY ((SELECT %(units)s::text[])::text[]) AND w.policy <> 'unlimited' AND (
            coalesce(l.granted, w.full_posted) - coalesce(l.posted, w.posted) + w.overage
                >= %(share)s::numeric * coalesce(l.granted, w.full_posted)
            OR a.due_at <= %(now)s
            OR (w.held > 0 AND (
                SELECT true FROM holds o JOIN hold_lots e USING (partition, hold_id)
                WHERE o.partition = w.partition AND o.status = 'placed' AND o.expires_at <= %(now)s
                  AND e.account = w.account AND e.held > 0
                LIMIT 1
            ))
        )
        ORDER BY 1 LIMIT %(limit)s
    )
    SELECT (SELECT count(*) FROM looked_at), (SELECT max(account COLLATE "C") FROM looked_at),
           (SELECT array_agg(account ORDER BY account) FROM meant)
    """
)
