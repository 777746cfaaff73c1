"""The sums over the journal in plain SQL, compared with the projections. Shares no code with `evolve`, on purpose."""

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


CHECKS: Final = (
    Check(
        "a lot holds what the journal posted, held and froze on it",
        """
        SELECT coalesce(l.partition, j.partition), coalesce(l.lot_id, j.lot_id), l.posted, j.posted, l.held, j.held
        FROM lots l
        FULL JOIN (
            SELECT partition, lot_id, account, unit, lot_kind, sum(posted) AS posted, sum(held) AS held,
                   sum(frozen) AS frozen
            FROM journal WHERE lot_id IS NOT NULL GROUP BY 1, 2, 3, 4, 5
        ) j USING (partition, lot_id)
        WHERE (l.account, l.unit, l.kind, l.posted::numeric, l.held::numeric, l.frozen::numeric)
              IS DISTINCT FROM (j.account, j.unit, j.lot_kind, j.posted, j.held, j.frozen)
        """,
    ),
    Check(
        "a wallet's posted, held, frozen and overage are sums over the journal",
        """
        SELECT coalesce(w.partition, j.partition), coalesce(w.account, j.account), coalesce(w.unit, j.unit),
               w.posted, j.posted, w.held, j.held, w.overage, j.overage
        FROM wallets w
        FULL JOIN (
            SELECT partition, account, unit,
                   coalesce(sum(posted) FILTER (WHERE lot_kind IS DISTINCT FROM 'overage'), 0) AS posted,
                   sum(held) AS held, sum(frozen) AS frozen,
                   coalesce(-sum(posted) FILTER (WHERE lot_kind = 'overage'), 0) AS overage
            FROM journal WHERE left(account, 1) <> '@' AND unit IS NOT NULL GROUP BY 1, 2, 3
        ) j USING (partition, account, unit)
        WHERE (w.posted::numeric, w.held::numeric, w.frozen::numeric, w.overage::numeric)
              IS DISTINCT FROM (j.posted, j.held, j.frozen, j.overage)
        """,
    ),
    Check(
        "a hold holds what the journal set aside for it and has not taken or given back",
        """
        SELECT coalesce(h.partition, j.partition), coalesce(h.hold_id, j.hold_id), coalesce(h.lot_id, j.lot_id),
               h.placed, j.placed, h.held, j.held
        FROM hold_lots h
        FULL JOIN (
            SELECT partition, hold_id, account, unit, lot_id, sum(held) AS held,
                   coalesce(sum(held) FILTER (WHERE kind = 'hold_placed'), 0) AS placed
            FROM journal WHERE hold_id IS NOT NULL AND lot_id IS NOT NULL AND kind <> 'clawed_back'
            GROUP BY 1, 2, 3, 4, 5
        ) j USING (partition, hold_id, account, unit, lot_id)
        WHERE (h.placed::numeric, h.held::numeric) IS DISTINCT FROM (j.placed, j.held)
        """,
    ),
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
        "a hold ends once",
        """
        SELECT partition, hold_id, count(DISTINCT transaction_id)
        FROM journal WHERE kind IN ('hold_released', 'hold_settled')
        GROUP BY 1, 2 HAVING count(DISTINCT transaction_id) > 1
        """,
    ),
    Check(
        "the posted of a transaction sum to zero per unit",
        """
        SELECT partition, transaction_id, unit, sum(posted)
        FROM journal WHERE unit IS NOT NULL GROUP BY 1, 2, 3 HAVING sum(posted) <> 0
        """,
    ),
    Check(
        "a lot is never below what is held of it, a debt never above zero",
        """
        SELECT partition, lot_id, kind, posted, held, frozen FROM lots
        WHERE held < 0 OR frozen < 0 OR (kind IN ('debt', 'overage') AND posted > 0)
           OR (kind NOT IN ('debt', 'overage') AND posted < held + frozen)
        """,
    ),
    Check(
        "batches and positions have no gaps",
        """
        SELECT partition, batch, position FROM (
            SELECT partition, batch, position,
                   lag(batch) OVER w AS batch_before, lag(position) OVER w AS position_before
            FROM journal WINDOW w AS (PARTITION BY partition ORDER BY batch, position)
        ) j
        WHERE NOT CASE
            WHEN batch_before IS NULL THEN batch = 1 AND position = 1
            WHEN batch = batch_before THEN position = position_before + 1
            ELSE batch = batch_before + 1 AND position = 1
        END
        """,
    ),
    Check(
        "a partition's head is its journal's last entry, and its outbox's and bundles' last number",
        """
        SELECT partition, h.batch, h.charges_number FROM heads h
        WHERE h.batch <> coalesce((SELECT max(batch) FROM journal j WHERE j.partition = h.partition), 0)
           OR h.charges_number <> (SELECT count(*) FROM bundles b WHERE b.partition = h.partition)
           OR h.charges_number <> coalesce((SELECT max(number) FROM bundles b WHERE b.partition = h.partition), 0)
           OR h.outbox_number < coalesce((SELECT max(number) FROM outbox o WHERE o.partition = h.partition), 0)
        """,
    ),
    Check(
        "what the charge lines say they took of each lot is what the journal charged to it",
        """
        SELECT coalesce(c.partition, j.partition), coalesce(c.transaction_id, j.transaction_id),
               coalesce(c.lot_id, j.lot_id), c.posted, j.posted
        FROM (
            SELECT partition, transaction_id, part ->> 0 AS account, part ->> 1 AS unit, (part ->> 2)::uuid AS lot_id,
                   sum((part ->> 4)::numeric) AS posted, sum((part ->> 5)::numeric) AS held
            FROM charge_lines, jsonb_array_elements(split::jsonb) AS part GROUP BY 1, 2, 3, 4, 5
        ) c
        FULL JOIN (
            SELECT partition, transaction_id, account, unit, lot_id, sum(posted) AS posted, sum(held) AS held
            FROM journal WHERE kind = 'charged' AND lot_id IS NOT NULL GROUP BY 1, 2, 3, 4, 5
        ) j USING (partition, transaction_id, account, unit, lot_id)
        WHERE (c.posted, c.held) IS DISTINCT FROM (j.posted, j.held)
        """,
    ),
    Check(
        "what was clawed back of a payment's lot, and is pending, is what the journal says",
        """
        SELECT coalesce(l.partition, j.partition), coalesce(l.lot_id, j.lot_id), l.clawed, j.clawed,
               l.clawed_spent, j.clawed_spent, l.pending, j.pending
        FROM (SELECT * FROM lots WHERE (clawed, clawed_spent, pending) <> (0, 0, 0)) l
        FULL JOIN (
            SELECT partition, (details::jsonb ->> 'lot')::uuid AS lot_id, -sum(posted) AS clawed,
                   coalesce(-sum(posted) FILTER (WHERE lot_id <> (details::jsonb ->> 'lot')::uuid), 0) AS clawed_spent,
                   sum(coalesce((details::jsonb ->> 'pending')::bigint, 0))
                   + coalesce(sum(posted) FILTER (WHERE hold_id IS NOT NULL), 0) AS pending
            FROM journal WHERE kind IN ('clawed_back', 'given_back') AND lot_id IS NOT NULL GROUP BY 1, 2
        ) j USING (partition, lot_id)
        WHERE (coalesce(l.clawed, 0)::numeric, coalesce(l.clawed_spent, 0)::numeric, coalesce(l.pending, 0)::numeric)
              IS DISTINCT FROM (coalesce(j.clawed, 0), coalesce(j.clawed_spent, 0), coalesce(j.pending, 0))
        """,
    ),
    Check(
        "claims take back what was paid, once, and of each bonus as much in proportion",
        """
        WITH said AS (
            SELECT DISTINCT ON (partition, account, payment, claim) partition, account, unit, payment, state, claimed
            FROM (
                SELECT partition, account, unit, batch, position, details::jsonb ->> 'payment' AS payment,
                       details::jsonb ->> 'claim' AS claim, details::jsonb ->> 'state' AS state,
                       (details::jsonb ->> 'claimed')::numeric AS claimed,
                       coalesce((details::jsonb ->> 'revision')::bigint, 0) AS revision
                FROM journal WHERE kind = 'payment_claimed'
            ) c
            ORDER BY partition, account, payment, claim, revision DESC, batch DESC, position DESC
        ), claimed AS (
            SELECT partition, account, payment, min(unit) AS unit,
                   coalesce(sum(claimed) FILTER (WHERE state = 'final'), 0) AS claimed
            FROM said GROUP BY 1, 2, 3
        ), granted AS (
            SELECT partition, account, reference AS payment, kind, unit, sum(granted) AS granted,
                   sum(clawed::numeric + pending) AS taken
            FROM lots WHERE kind IN ('purchase', 'bonus') AND reference IS NOT NULL GROUP BY 1, 2, 3, 4, 5
        ), paid AS (
            SELECT c.partition, c.account, c.payment, c.unit, coalesce(g.granted, 0) AS paid,
                   least(coalesce(g.granted, 0), c.claimed) AS clawed
            FROM claimed c LEFT JOIN granted g
                ON (g.partition, g.account, g.payment, g.unit, g.kind)
                 = (c.partition, c.account, c.payment, c.unit, 'purchase')
        )
        SELECT partition, account, payment, g.kind, g.unit, g.granted, g.taken, p.paid, p.clawed
        FROM granted g LEFT JOIN paid p USING (partition, account, payment)
        WHERE g.taken <> CASE
            WHEN p.paid IS NULL OR p.paid = 0 OR (g.kind = 'purchase' AND g.unit <> p.unit) THEN 0
            WHEN g.kind = 'purchase' THEN p.clawed
            ELSE div(g.granted * p.clawed, p.paid)
        END
        """,
    ),
    Check(
        "of a lot with something pending nothing is available",
        """
        SELECT partition, lot_id, posted, held, frozen, pending FROM lots
        WHERE pending < 0 OR pending > held OR (pending > 0 AND posted > held + frozen)
        """,
    ),
    Check(
        "a payment's sums are those of its purchases and its claims",
        """
        SELECT p.partition, p.payment, p.account, p.paid, l.paid, p.claimed, c.claimed
        FROM payments p
        LEFT JOIN (
            SELECT partition, reference AS payment, account, unit, sum(granted) AS paid
            FROM lots WHERE kind = 'purchase' GROUP BY 1, 2, 3, 4
        ) l USING (partition, payment, account, unit)
        LEFT JOIN (
            SELECT partition, payment, account, sum(claimed) AS claimed
            FROM claims WHERE state = 'final' GROUP BY 1, 2, 3
        ) c USING (partition, payment, account)
        WHERE (p.paid::numeric, p.claimed) IS DISTINCT FROM (coalesce(l.paid, 0), coalesce(c.claimed, 0))
        """,
    ),
    Check(
        "a transaction of charges says how many lines it took",
        """
        SELECT coalesce(c.partition, j.partition), coalesce(c.transaction_id, j.transaction_id), c.lines, j.lines
        FROM (SELECT partition, transaction_id, count(*) AS lines FROM charge_lines GROUP BY 1, 2) c
        FULL JOIN (
            SELECT partition, transaction_id, (details::jsonb ->> 'lines')::bigint AS lines
            FROM journal WHERE kind IN ('charged', 'hold_settled') AND details IS NOT NULL
        ) j USING (partition, transaction_id)
        WHERE c.lines IS DISTINCT FROM j.lines
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
