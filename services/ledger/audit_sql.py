"""Laws between whole tables, in plain SQL: each a query that names every row that breaks it."""

from dataclasses import dataclass
from typing import Final, LiteralString

import psycopg
from pydantic import SecretStr

FINDINGS_SHOWN_MAX: Final = 5


@dataclass(frozen=True, slots=True)
class Check:
    """A law, as a query that names every row that breaks it."""

    law: str
    breaches: LiteralString


@dataclass(frozen=True, slots=True)
class Checked:
    """How often a law is broken, and the first breaches."""

    law: str
    breaches: int
    first: tuple[str, ...]


# What the audit tells transaction by transaction, and the replay row by row, is not told again.
CHECKS: Final = (
    Check(
        "what is held on a lot is what open holds hold of it",
        """
        SELECT partition, l.lot_id, l.held, h.held
        FROM (SELECT partition, lot_id, held FROM lots WHERE held <> 0) l
        FULL JOIN (
            SELECT partition, lot_id, sum(hl.held) AS held
            FROM hold_lots hl JOIN holds h USING (partition, hold_id)
            WHERE h.status = 'placed' GROUP BY 1, 2 HAVING sum(hl.held) <> 0
        ) h USING (partition, lot_id)
        WHERE l.held::numeric IS DISTINCT FROM h.held
        """,
    ),
    Check(
        "a hold that has ended holds nothing",
        """
        SELECT partition, hold_id, status, lot_id, held
        FROM holds JOIN hold_lots USING (partition, hold_id) WHERE status <> 'placed' AND held <> 0
        """,
    ),
    Check(
        "a wallet has what its lots and debts have",
        """
        SELECT partition, w.account, w.unit, w.posted, l.posted, w.held, l.held, w.frozen, l.frozen
        FROM wallets w LEFT JOIN (
            SELECT partition, account, unit,
                   sum(posted) FILTER (WHERE kind NOT IN ('overage', 'uncapped')) AS posted,
                   sum(held) FILTER (WHERE kind NOT IN ('overage', 'uncapped')) AS held,
                   sum(frozen) FILTER (WHERE kind NOT IN ('overage', 'uncapped')) AS frozen,
                   -sum(posted) FILTER (WHERE kind = 'overage') AS overage,
                   -sum(posted) FILTER (WHERE kind = 'uncapped') AS uncapped,
                   -sum(posted) FILTER (WHERE kind = 'debt') AS owed
            FROM lots GROUP BY 1, 2, 3
        ) l USING (partition, account, unit)
        WHERE (w.posted::numeric, w.held::numeric, w.frozen::numeric, w.overage::numeric, w.uncapped::numeric,
               w.owed::numeric)
              <> (coalesce(l.posted, 0), coalesce(l.held, 0), coalesce(l.frozen, 0), coalesce(l.overage, 0),
                  coalesce(l.uncapped, 0), coalesce(l.owed, 0))
        """,
    ),
    Check(
        "the posted of all lots and contras of a unit sum to zero",
        """
        SELECT partition, unit, sum(posted) FROM journal WHERE unit IS NOT NULL GROUP BY 1, 2 HAVING sum(posted) <> 0
        """,
    ),
    Check(
        "a partition's head is its outbox's and its bundles' last number",
        """
        SELECT partition, h.batch, h.charges_number, h.outbox_number FROM heads h
        WHERE h.charges_number <> (SELECT count(*) FROM bundles b WHERE b.partition = h.partition)
           OR h.charges_number <> coalesce((SELECT max(number) FROM bundles b WHERE b.partition = h.partition), 0)
           OR h.outbox_number < coalesce((SELECT max(number) FROM outbox o WHERE o.partition = h.partition), 0)
        """,
    ),
    # A record that was taken to another ledger left its dead letters behind.
    Check(
        "a bundle's dead lines are those that were put aside, or more",
        r"""
        SELECT partition, number, b.lines_dead, d.letters
        FROM (
            SELECT partition, substring(reason FROM '^(?:line|reversal) \d+ of bundle (\d+): ')::bigint AS number,
                   count(*) AS letters
            FROM dead_letters GROUP BY 1, 2
        ) d JOIN bundles b USING (partition, number)
        WHERE b.lines_dead < d.letters
        """,
    ),
    Check(
        "claims take of a payment what they come to, and freeze no more",
        """
        SELECT partition, payment, root, p.paid, p.clawed, l.clawed, p.disputed, l.frozen
        FROM (
            SELECT partition, payment, split_part(account, '/', 1) AS root, sum(paid) AS paid,
                   sum(least(paid, claimed)) AS clawed,
                   sum(least(paid - least(paid, claimed), disputed)) AS disputed
            FROM payments GROUP BY 1, 2, 3
        ) p FULL JOIN (
            SELECT partition, reference AS payment, split_part(account, '/', 1) AS root,
                   sum(clawed + pending) AS clawed, sum(frozen + pending_frozen) AS frozen
            FROM lots WHERE kind = 'purchase' AND reference IS NOT NULL GROUP BY 1, 2, 3
        ) l USING (partition, payment, root)
        WHERE coalesce(p.clawed, 0) <> coalesce(l.clawed, 0)
           OR coalesce(l.frozen, 0) NOT BETWEEN 0 AND coalesce(p.disputed, 0)
        """,
    ),
    Check(
        "claims take of a bonus in proportion to what they take of its payment",
        """
        SELECT partition, payment, root, unit, p.paid, p.clawed, b.granted, b.clawed
        FROM (
            SELECT partition, payment, split_part(account, '/', 1) AS root, sum(paid) AS paid,
                   sum(least(paid, claimed)) AS clawed
            FROM payments GROUP BY 1, 2, 3 HAVING count(*) = 1
        ) p JOIN (
            SELECT partition, reference AS payment, split_part(account, '/', 1) AS root, unit,
                   sum(granted) FILTER (WHERE origin IS NULL) AS granted, sum(clawed + pending) AS clawed
            FROM lots WHERE kind = 'bonus' AND reference IS NOT NULL GROUP BY 1, 2, 3, 4
        ) b USING (partition, payment, root)
        WHERE b.clawed <> CASE WHEN p.paid > 0 THEN div(coalesce(b.granted, 0) * p.clawed, p.paid) ELSE 0 END
        """,
    ),
    Check(
        "of a lot with something pending nothing is available",
        """
        SELECT partition, lot_id, posted, held, frozen, pending, pending_frozen FROM lots
        WHERE pending < 0 OR pending > held OR (pending > 0 AND posted > held + frozen)
        """,
    ),
)


def audit(url: SecretStr) -> tuple[Checked, ...]:
    """Check every law on one snapshot. Any role that may read the tables will do."""
    with psycopg.connect(
        url.get_secret_value(), application_name="scrip-audit", options="-c search_path=ledger -c timezone=UTC"
    ) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        found = []
        for check in CHECKS:
            breaches = connection.execute(check.breaches).fetchall()
            first = tuple(", ".join(str(value) for value in row) for row in breaches[:FINDINGS_SHOWN_MAX])
            found.append(Checked(check.law, len(breaches), first))
        return tuple(found)
