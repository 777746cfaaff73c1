"""Sums over all that was ever posted: of an account, and of all accounts of a prefix."""

from collections.abc import Mapping

from pydantic import BaseModel

from contracts.money import Unit, format_amount
from contracts.partition import partition_of
from services.ledger.domain.commands import Units
from services.ledger.queries.selection import OF_ACCOUNT, Connection


class AccountTotals(BaseModel):
    """Sums over all that was ever posted on a wallet, each above zero as its name says.

    posted less overage and uncapped = granted - charged + reversed - expired - voided - clawed_back + adjusted +
    transferred. Estimates are charged until they are reversed. `granted_by_kind`: by the kind of lot; `by_kind`: all
    that was posted, by the kind of entry, as it was.
    """

    unit: str
    granted: str
    charged: str
    reversed: str
    expired: str
    voided: str
    clawed_back: str
    adjusted: str
    transferred: str
    posted: str
    overage: str
    uncapped: str
    granted_by_kind: dict[str, str]
    by_kind: dict[str, str]


class Totals(BaseModel):
    """Sums over all accounts whose id begins with a prefix: three ways to the same money, and how many uses.

    granted = posted + charged + clawed_back, unless something was reversed, expired, voided or adjusted; of a cap,
    posted less overage counts. `charge_lines` counts those of the accounts' own use.
    """

    unit: str
    account_prefix: str
    charged: str
    clawed_back: str
    granted: str
    posted: str
    overage: str
    charge_lines: int
    charge_lines_by_source: dict[str, int]


async def read_account_totals(connection: Connection, account: str, *, units: Units) -> list[AccountTotals] | None:
    """What was ever posted on an account's wallets, or None if it is not open. As journalled."""
    keys = {"partition": partition_of(account), "account": account}
    cursor = await connection.execute(
        """
        SELECT w.unit, w.posted, w.overage, w.uncapped
        FROM accounts a LEFT JOIN wallets w USING (partition, account)
        WHERE a.partition = %(partition)s AND a.account = %(account)s ORDER BY w.unit
        """,
        keys,
    )
    wallets = await cursor.fetchall()
    if not wallets:
        return None
    cursor = await connection.execute(
        f"""
        SELECT unit, kind, lot_kind, sum(posted)::bigint FROM journal WHERE {OF_ACCOUNT}
        GROUP BY unit, kind, lot_kind HAVING sum(posted) <> 0
        """,
        keys,
    )
    sums: dict[str, dict[tuple[str, str], int]] = {}
    for unit, kind, lot_kind, posted in await cursor.fetchall():
        sums.setdefault(unit, {})[kind, lot_kind] = int(posted)
    return [
        _account_totals(sums.get(unit, {}), units.by_name[unit], posted=posted, overage=overage, uncapped=uncapped)
        for unit, posted, overage, uncapped in wallets
        if unit is not None
    ]


def _account_totals(
    sums: Mapping[tuple[str, str], int], unit: Unit, *, posted: int, overage: int, uncapped: int
) -> AccountTotals:
    def told(*kinds: str, sign: int = 1) -> str:
        return format_amount(sign * sum(amount for (kind, _), amount in sums.items() if kind in kinds), unit)

    return AccountTotals(
        unit=unit.name,
        granted=told("lot_granted"),
        charged=told("charged", "hold_estimated", "estimate_reversed", sign=-1),
        reversed=told("reversed"),
        expired=told("lot_expired", "lot_revived", sign=-1),
        voided=told("lot_voided", sign=-1),
        clawed_back=told("clawed_back", "given_back", sign=-1),
        adjusted=told("adjusted"),
        transferred=told("transferred"),
        posted=format_amount(posted, unit),
        overage=format_amount(overage, unit),
        uncapped=format_amount(uncapped, unit),
        granted_by_kind={
            lot_kind: format_amount(amount, unit)
            for (kind, lot_kind), amount in sorted(sums.items())
            if kind == "lot_granted"
        },
        by_kind={kind: told(kind) for kind in sorted({kind for kind, _ in sums})},
    )


async def read_totals(connection: Connection, unit: Unit, *, account_prefix: str) -> Totals:
    """What was charged by the journal, granted by the lots, and is left in the wallets. As journalled."""
    keys = {"unit": unit.name, "prefix": account_prefix}
    async with connection.pipeline():
        charged = await connection.execute(
            """
            SELECT coalesce(-sum(posted), 0) FROM journal
            WHERE kind IN ('charged', 'hold_estimated', 'estimate_reversed') AND unit = %(unit)s
              AND left(account, 1) <> '@' AND starts_with(account, %(prefix)s)
            """,
            keys,
        )
        lots = await connection.execute(
            """
            SELECT coalesce(sum(clawed), 0), coalesce(sum(granted) FILTER (WHERE origin IS NULL), 0) FROM lots
            WHERE unit = %(unit)s AND starts_with(account, %(prefix)s)
            """,
            keys,
        )
        left = await connection.execute(
            """
            SELECT coalesce(sum(posted), 0), coalesce(sum(overage), 0) FROM wallets
            WHERE unit = %(unit)s AND starts_with(account, %(prefix)s)
            """,
            keys,
        )
        lines = await connection.execute(
            """
            SELECT source, count(*) FROM charge_lines WHERE starts_with(account, %(prefix)s) GROUP BY source
            ORDER BY source
            """,
            keys,
        )
    posted, overage = await left.fetchone() or (0, 0)
    clawed, granted = await lots.fetchone() or (0, 0)
    by_source = {str(source): int(count) for source, count in await lines.fetchall()}
    return Totals(
        unit=unit.name,
        account_prefix=account_prefix,
        charged=format_amount(int((await charged.fetchone() or (0,))[0]), unit),
        clawed_back=format_amount(int(clawed), unit),
        granted=format_amount(int(granted), unit),
        posted=format_amount(int(posted), unit),
        overage=format_amount(int(overage), unit),
        charge_lines=sum(by_source.values()),
        charge_lines_by_source=by_source,
    )
