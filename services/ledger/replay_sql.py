"""The projections as sums over the journal, set-wise: statements that rebuild what `evolve` builds entry by entry.

A worker reads its partitions in two passes, each part of the journal by itself (SCANS, SCANS_OF_LOTS), and puts the
sums together (STEPS). Shares no code with `evolve`, on purpose: a replay by `evolve` has to come to the same bytes.
"""

from typing import Final, LiteralString

# An entry's place as one number: that of its batch, and its position in the batch.
POSITION_BITS: Final = 22
BATCH_MAX: Final = 1 << 38
_AT: Final = "((j.batch << 22) | j.position)"

_SPECIAL_KINDS: Final = (
    "'account_opened', 'wallet_opened', 'wallet_set', 'rule_set', 'rule_ended', 'lot_granted', 'lot_opened',"
    " 'lot_expired', 'lot_revived', 'lot_voided', 'transferred', 'debt_repaid', 'payment_claimed', 'clawed_back',"
    " 'given_back', 'claim_frozen', 'balance_crossed'"
)
_ENDING_KINDS: Final = "'hold_released', 'hold_expired', 'hold_settled', 'hold_estimated', 'estimate_reversed'"

# Tables that live for the length of a replay, in the shadow schema. All workers use them, each in a transaction of its
# own: none sees a row of another's.
PARTS: Final[tuple[LiteralString, ...]] = (
    """
    CREATE UNLOGGED TABLE part_special (
        partition smallint, at bigint, batch bigint, position integer, transaction_id uuid, kind text, account text,
        unit text, lot_id uuid, lot_kind text, hold_id uuid, posted bigint, frozen bigint, occurred_at timestamptz,
        recorded_at timestamptz, details json
    )
    """,
    """
    CREATE UNLOGGED TABLE part_lots (
        partition smallint, lot_id uuid, first bigint, posted bigint, held bigint, frozen bigint, full_posted bigint
    )
    """,
    """
    CREATE UNLOGGED TABLE part_earmarks (
        partition smallint, hold_id uuid, account text, unit text, lot_id uuid, placed bigint, held bigint,
        estimated bigint, is_earmark boolean, first_ending bigint, ending bigint, ended_at timestamptz
    )
    """,
    """
    CREATE UNLOGGED TABLE part_holds (
        partition smallint, hold_id uuid, at bigint, kind text, account text, expires_at timestamptz, overdue text,
        legs text, scope text, recorded_at timestamptz, transaction_id uuid, batch bigint, position integer
    )
    """,
    """
    CREATE UNLOGGED TABLE lots_summed (
        partition smallint, lot_id uuid, first bigint, posted bigint, held bigint, frozen bigint, full_posted bigint
    )
    """,
    """
    CREATE UNLOGGED TABLE lot_sums (
        partition smallint, lot_id uuid, first bigint, posted bigint, held bigint, frozen bigint, full_posted bigint,
        account text, unit text, kind text, made_by text, posted_first bigint, occurred_at timestamptz,
        recorded_at timestamptz, batch bigint, position integer, details json
    )
    """,
    "CREATE UNLOGGED TABLE last_in (partition smallint, account text, unit text, at bigint)",
    "CREATE UNLOGGED TABLE renewals (partition smallint, account text, due_at timestamptz)",
)
PART_NAMES: Final = (
    *("part_special", "part_lots", "part_earmarks", "part_holds", "last_in", "lots_summed", "lot_sums", "renewals"),
)

# What is read of a part of the journal first, by the table it goes to: few entries as they are, sums over others.
_IN_PART: Final = "j.ctid >= %(begin)s::tid AND j.ctid < %(end)s::tid AND j.partition BETWEEN %(first)s AND %(last)s"
SCANS: Final = {
    "part_special": f"""
        SELECT j.partition, {_AT}, j.batch, j.position, j.transaction_id, j.kind, j.account, j.unit, j.lot_id,
               j.lot_kind, j.hold_id, j.posted, j.frozen, j.occurred_at, j.recorded_at, j.details::json
        FROM journal j WHERE {_IN_PART} AND j.kind IN ({_SPECIAL_KINDS}) AND left(j.account, 1) <> '@'
        """,
    "part_earmarks": f"""
        SELECT j.partition, j.hold_id, j.account, j.unit, j.lot_id,
               coalesce(sum(j.held) FILTER (WHERE j.kind IN ('hold_placed', 'hold_extended')), 0)::bigint,
               sum(j.held)::bigint,
               coalesce(-sum(j.posted) FILTER (
                   WHERE j.kind = 'estimate_reversed' OR (j.kind = 'hold_estimated' AND j.held <> 0)
               ), 0)::bigint,
               bool_or(j.lot_id IS NOT NULL AND (j.held <> 0 OR j.kind = 'estimate_reversed')),
               min({_AT}) FILTER (WHERE j.kind IN ({_ENDING_KINDS})),
               max({_AT} * 8 + CASE j.kind
                   WHEN 'hold_released' THEN 0 WHEN 'hold_expired' THEN 1 WHEN 'hold_estimated' THEN 2 ELSE 3
               END) FILTER (WHERE j.kind IN ({_ENDING_KINDS})),
               max(j.recorded_at) FILTER (WHERE j.kind IN ({_ENDING_KINDS}))
        FROM journal j
        WHERE {_IN_PART} AND j.hold_id IS NOT NULL
        GROUP BY j.partition, j.hold_id, j.account, j.unit, j.lot_id
        HAVING bool_or(j.held <> 0 OR j.kind IN ({_ENDING_KINDS}))
        """,
    "part_holds": f"""
        SELECT j.partition, j.hold_id, {_AT}, j.kind, d.account, d.expires_at, d.overdue, d.legs::text, d.scope::text,
               j.recorded_at, j.transaction_id, j.batch, j.position
        FROM journal j, json_to_record(j.details::json)
             AS d (account text, expires_at timestamptz, overdue text, legs json, scope json)
        WHERE {_IN_PART} AND j.kind IN ('hold_placed', 'hold_extended') AND j.details IS NOT NULL
        """,
}

# When something last came in to each wallet: `full_posted` is what its lots had then.
LAST_IN: Final[LiteralString] = """
INSERT INTO last_in
SELECT partition, account, unit, max(at) FROM part_special
WHERE kind IN ('lot_granted', 'transferred') AND details ->> 'type' = 'lot_granted' GROUP BY 1, 2, 3
"""

# What is read of a part of the journal then.
SCANS_OF_LOTS: Final = {
    "part_lots": f"""
        SELECT j.partition, j.lot_id, min({_AT}), sum(j.posted)::bigint, sum(j.held)::bigint, sum(j.frozen)::bigint,
               (sum(j.posted) FILTER (WHERE {_AT} <= w.at))::bigint
        FROM journal j LEFT JOIN last_in w ON (w.partition, w.account, w.unit) = (j.partition, j.account, j.unit)
        WHERE {_IN_PART} AND j.lot_id IS NOT NULL GROUP BY j.partition, j.lot_id
        """,
}

# A lot is what its first entry says it is; most of those are here.
LOT_SUMS: Final[tuple[LiteralString, ...]] = (
    """
    INSERT INTO lots_summed
    SELECT partition, lot_id, min(first) AS first, sum(posted)::bigint AS posted, sum(held)::bigint AS held,
           sum(frozen)::bigint AS frozen, sum(full_posted)::bigint AS full_posted
    FROM part_lots GROUP BY 1, 2
    """,
    """
    INSERT INTO lot_sums
    SELECT s.*, p.account, p.unit, p.lot_kind AS kind, p.kind AS made_by, p.posted AS posted_first, p.occurred_at,
           p.recorded_at, p.batch, p.position, p.details
    FROM lots_summed s JOIN part_special p ON (p.partition, p.at) = (s.partition, s.first)
    """,
    """
    DELETE FROM lots_summed s USING lot_sums f WHERE (f.partition, f.lot_id) = (s.partition, s.lot_id)
    """,
    # Few are left: each is looked up.
    """
    INSERT INTO lot_sums
    SELECT s.*, j.account, j.unit, j.lot_kind, j.kind, j.posted, j.occurred_at, j.recorded_at, j.batch, j.position,
           j.details::json
    FROM lots_summed s CROSS JOIN LATERAL (
        SELECT * FROM journal
        WHERE partition = s.partition AND batch = s.first >> 22 AND position = (s.first & 4194303)::integer
        OFFSET 0
    ) j
    """,
)

STEPS: Final[tuple[LiteralString, ...]] = (
    """
    INSERT INTO lots (
        partition, lot_id, account, unit, kind, priority, effective_at, expires_at, scope, reference, cost_basis,
        origin, granted, occurred_at, recorded_at, batch, position, posted, held, frozen, spent, clawed, clawed_spent,
        pending, rule_id, period, expired, void, voided, pending_frozen, repaid
    )
    WITH ended AS (
        SELECT partition, lot_id, coalesce(-sum(posted) FILTER (WHERE kind <> 'lot_voided'), 0) AS expired,
               bool_or(kind = 'lot_voided') AS void,
               coalesce(-sum(posted) FILTER (WHERE kind = 'lot_voided'), 0) AS voided
        FROM part_special WHERE kind IN ('lot_expired', 'lot_revived', 'lot_voided') GROUP BY 1, 2
    ), clawed AS (
        SELECT partition, (details ->> 'lot')::uuid AS lot_id, -sum(posted) AS clawed,
               -coalesce(sum(posted) FILTER (WHERE lot_id <> (details ->> 'lot')::uuid), 0) AS clawed_spent,
               sum(coalesce((details ->> 'pending')::bigint, 0))
               + coalesce(sum(posted) FILTER (WHERE hold_id IS NOT NULL), 0) AS pending
        FROM part_special WHERE kind IN ('clawed_back', 'given_back') GROUP BY 1, 2
    ), frozen AS (
        SELECT partition, lot_id, sum(coalesce((details ->> 'pending')::bigint, 0))
               - coalesce(sum(frozen) FILTER (WHERE hold_id IS NOT NULL), 0) AS pending
        FROM part_special WHERE kind = 'claim_frozen' GROUP BY 1, 2
    ), repaid AS (
        SELECT partition, lot_id, '{' || string_agg(format('"%s":%s', lot, amount), ',' ORDER BY lot) || '}' AS by_lot
        FROM (
            SELECT partition, lot_id, details ->> 'lot' COLLATE "C" AS lot, sum(posted) AS amount
            FROM part_special WHERE kind = 'debt_repaid' AND lot_id = (details ->> 'debt')::uuid GROUP BY 1, 2, 3
            HAVING sum(posted) <> 0
        ) r
        GROUP BY 1, 2
    )
    SELECT s.partition, s.lot_id, s.account, s.unit, s.kind, coalesce(d.priority, 0), d.effective_at, d.expires_at,
           d.scope::text, coalesce(d.reference, o.payment), d.cost_basis, coalesce(d.origin, o.lot),
           CASE WHEN s.made_by IN ('lot_granted', 'transferred') THEN s.posted_first ELSE 0 END,
           s.occurred_at, s.recorded_at, s.batch, s.position, s.posted, s.held, s.frozen,
           s.posted = 0 AND s.held = 0 AND s.frozen = 0 AND s.kind NOT IN ('overage', 'uncapped'),
           coalesce(c.clawed, 0), coalesce(c.clawed_spent, 0), coalesce(c.pending, 0), d.rule, d.period,
           coalesce(e.expired, 0), coalesce(e.void, false),
           coalesce(e.voided, 0), coalesce(f.pending, 0), r.by_lot
    FROM lot_sums s
    LEFT JOIN LATERAL (
        SELECT * FROM json_to_record(s.details) AS x (
            priority integer, effective_at timestamptz, expires_at timestamptz, scope json, reference text,
            cost_basis text, origin text, rule text, period bigint
        ) WHERE s.details ->> 'type' = 'lot_granted'
    ) d ON true
    LEFT JOIN LATERAL (
        SELECT * FROM json_to_record(s.details) AS x (payment text, lot text)
        WHERE s.kind = 'debt' AND s.details ->> 'type' = 'clawed_back'
    ) o ON true
    LEFT JOIN ended e ON (e.partition, e.lot_id) = (s.partition, s.lot_id)
    LEFT JOIN clawed c ON (c.partition, c.lot_id) = (s.partition, s.lot_id)
    LEFT JOIN frozen f ON (f.partition, f.lot_id) = (s.partition, s.lot_id)
    LEFT JOIN repaid r ON (r.partition, r.lot_id) = (s.partition, s.lot_id)
    """,
    # A level is told low if that was said last, and it has been one of the wallet's levels ever since.
    """
    INSERT INTO wallets (
        partition, account, unit, policy, overdraft, recorded_at, batch, position, posted, held, frozen, overage,
        thresholds, uncapped, owed, owing, full_posted, low
    )
    WITH terms AS (
        SELECT DISTINCT ON (partition, account, unit) partition, account, unit, details ->> 'policy' AS policy,
               coalesce((details ->> 'overdraft')::bigint, 0) AS overdraft,
               coalesce((details -> 'thresholds')::text, '[]') AS thresholds
        FROM part_special WHERE kind IN ('wallet_opened', 'wallet_set') ORDER BY partition, account, unit, at DESC
    ), sums AS (
        SELECT partition, account, unit,
               sum(posted) FILTER (WHERE kind NOT IN ('overage', 'uncapped')) AS posted,
               sum(held) FILTER (WHERE kind NOT IN ('overage', 'uncapped')) AS held,
               sum(frozen) FILTER (WHERE kind NOT IN ('overage', 'uncapped')) AS frozen,
               -sum(posted) FILTER (WHERE kind = 'overage') AS overage,
               -sum(posted) FILTER (WHERE kind = 'uncapped') AS uncapped,
               -sum(posted) FILTER (WHERE kind = 'debt') AS owed,
               sum(held) FILTER (WHERE kind = 'debt') AS owing,
               sum(full_posted) FILTER (WHERE kind NOT IN ('overage', 'uncapped')) AS full_posted
        FROM lot_sums GROUP BY 1, 2, 3
    ), said AS (
        SELECT DISTINCT ON (partition, account, unit, level) partition, account, unit, at, level, is_low
        FROM (
            SELECT partition, account, unit, at, coalesce((details -> 'threshold')::text, 'null') AS level,
                   (details ->> 'is_low')::boolean AS is_low
            FROM part_special WHERE kind = 'balance_crossed'
        ) c
        ORDER BY partition, account, unit, level, at DESC
    ), low AS (
        SELECT partition, account, unit, '[' || string_agg(level, ',' ORDER BY level COLLATE "C") || ']' AS levels
        FROM said
        WHERE is_low AND (level = 'null' OR NOT EXISTS (
            SELECT FROM part_special t
            WHERE t.kind = 'wallet_set' AND t.at > said.at
              AND (t.partition, t.account, t.unit) = (said.partition, said.account, said.unit)
              AND NOT EXISTS (
                  SELECT FROM json_array_elements(t.details -> 'thresholds') AS e (one) WHERE e.one::text = said.level
              )
        ))
        GROUP BY 1, 2, 3
    )
    SELECT o.partition, o.account, o.unit, t.policy, t.overdraft, o.recorded_at, o.batch, o.position,
           coalesce(s.posted, 0), coalesce(s.held, 0), coalesce(s.frozen, 0), coalesce(s.overage, 0), t.thresholds,
           coalesce(s.uncapped, 0), coalesce(s.owed, 0), coalesce(s.owing, 0), coalesce(s.full_posted, 0),
           coalesce(l.levels, '[]')
    FROM part_special o
    JOIN terms t USING (partition, account, unit)
    LEFT JOIN sums s USING (partition, account, unit)
    LEFT JOIN low l USING (partition, account, unit)
    WHERE o.kind = 'wallet_opened'
    """,
    # As it was set last; from then on each grant of it moves it to the next period. `rule` as text, but for an end
    # that was given to it since: END_RULES.
    """
    INSERT INTO rules (
        partition, account, unit, rule_id, rule, next_period, ended, recorded_at, batch, position
    )
    WITH rule_sets AS (
        SELECT DISTINCT ON (partition, account, unit, rule_id) *
        FROM (
            SELECT partition, account, unit, details -> 'rule' ->> 'id' AS rule_id, at, details, recorded_at, batch,
                   position
            FROM part_special WHERE kind = 'rule_set'
        ) r
        ORDER BY partition, account, unit, rule_id, at DESC
    ), granted AS (
        SELECT partition, account, unit, details ->> 'rule' AS rule_id, at, (details ->> 'period')::bigint AS period
        FROM part_special WHERE kind = 'lot_granted' AND details ->> 'rule' IS NOT NULL
    ), renewed AS (
        SELECT DISTINCT ON (partition, account, unit, rule_id) partition, account, unit, rule_id, g.period + 1 AS next
        FROM rule_sets s JOIN granted g USING (partition, account, unit, rule_id) WHERE g.at > s.at
        ORDER BY partition, account, unit, rule_id, g.at DESC
    ), gone AS (
        SELECT DISTINCT partition, account, unit, rule_id
        FROM rule_sets s JOIN (
            SELECT partition, account, unit, details ->> 'rule' AS rule_id, at
            FROM part_special WHERE kind = 'rule_ended' AND details ->> 'end_period' IS NULL
        ) e USING (partition, account, unit, rule_id) WHERE e.at > s.at
    )
    SELECT s.partition, s.account, s.unit, s.rule_id, (s.details -> 'rule')::text,
           coalesce(n.next, (s.details ->> 'next_period')::bigint), g.rule_id IS NOT NULL, s.recorded_at, s.batch,
           s.position
    FROM rule_sets s
    LEFT JOIN renewed n USING (partition, account, unit, rule_id)
    LEFT JOIN gone g USING (partition, account, unit, rule_id)
    """,
    """
    INSERT INTO holds (
        partition, hold_id, account, status, expires_at, overdue, legs, recorded_at, transaction_id, batch, position,
        ended_at, scope
    )
    WITH placed AS (
        SELECT * FROM part_holds WHERE kind = 'hold_placed'
    ), extended AS (
        SELECT DISTINCT ON (partition, hold_id) partition, hold_id, expires_at, legs
        FROM part_holds WHERE kind = 'hold_extended' ORDER BY partition, hold_id, at DESC
    ), ended AS (
        SELECT partition, hold_id, min(first_ending) AS first, max(ending) & 7 AS status, max(ended_at) AS ended_at
        FROM part_earmarks WHERE ending IS NOT NULL GROUP BY 1, 2
    )
    SELECT p.partition, p.hold_id, p.account,
           CASE e.status WHEN 0 THEN 'released' WHEN 1 THEN 'expired' WHEN 2 THEN 'estimated' WHEN 3 THEN 'settled'
                ELSE 'placed' END,
           coalesce(x.expires_at, p.expires_at), p.overdue, coalesce(x.legs, p.legs), p.recorded_at, p.transaction_id,
           p.batch, p.position, e.ended_at, p.scope
    FROM placed p
    LEFT JOIN extended x ON (x.partition, x.hold_id) = (p.partition, p.hold_id)
    LEFT JOIN ended e ON (e.partition, e.hold_id) = (p.partition, p.hold_id)
    UNION ALL
    -- Ended before they were placed: they never will be.
    SELECT j.partition, j.hold_id, j.account,
           CASE e.status WHEN 0 THEN 'released' WHEN 1 THEN 'expired' WHEN 2 THEN 'estimated' ELSE 'settled' END,
           NULL, 'release', '[]', j.recorded_at, j.transaction_id, j.batch, j.position, e.ended_at, NULL
    FROM ended e
    LEFT JOIN placed p ON (p.partition, p.hold_id) = (e.partition, e.hold_id)
    JOIN journal j ON j.partition = e.partition AND j.batch = e.first >> 22
                  AND j.position = (e.first & 4194303)::integer
    WHERE p.hold_id IS NULL
    """,
    """
    INSERT INTO hold_lots (partition, hold_id, account, unit, lot_id, placed, held, estimated)
    SELECT partition, hold_id, account, unit, lot_id, sum(placed), sum(held), sum(estimated)
    FROM part_earmarks WHERE lot_id IS NOT NULL GROUP BY 1, 2, 3, 4, 5 HAVING bool_or(is_earmark)
    """,
    """
    INSERT INTO claims (
        partition, payment, account, claim, reason, state, claimed, revision, occurred_at, recorded_at, transaction_id,
        batch, position
    )
    SELECT DISTINCT ON (partition, payment, account, claim)
           partition, details ->> 'payment' AS payment, account, details ->> 'claim' AS claim, details ->> 'reason',
           details ->> 'state', (details ->> 'claimed')::bigint, coalesce((details ->> 'revision')::bigint, 0),
           occurred_at, recorded_at, transaction_id, batch, position
    FROM part_special WHERE kind = 'payment_claimed' ORDER BY partition, payment, account, claim, at DESC
    """,
    # Its unit is its first purchase's. What claims say of the unit, and in which order, is told by `evolve`: CLAIMED.
    """
    INSERT INTO payments (
        partition, payment, account, unit, paid, claimed, recorded_at, batch, position, disputed
    )
    WITH concerned AS (
        SELECT partition, coalesce(details ->> 'reference', details ->> 'payment') AS payment, account, unit, at, kind,
               lot_kind, posted, recorded_at, batch, position
        FROM part_special
        WHERE kind = 'payment_claimed'
           OR (kind = 'lot_granted' AND lot_kind IN ('purchase', 'bonus') AND details ->> 'origin' IS NULL
               AND details ->> 'reference' ~ '^[A-Za-z0-9_]{1,128}$')
    ), first AS (
        SELECT DISTINCT ON (partition, payment, account) * FROM concerned ORDER BY partition, payment, account, at
    ), paid AS (
        SELECT DISTINCT ON (partition, payment, account) partition, payment, account, unit,
               sum(posted) OVER (PARTITION BY partition, payment, account, unit) AS paid
        FROM concerned WHERE kind = 'lot_granted' AND lot_kind = 'purchase'
        ORDER BY partition, payment, account, at
    ), claimed AS (
        SELECT partition, payment, account, coalesce(sum(claimed) FILTER (WHERE state = 'final'), 0) AS claimed,
               coalesce(sum(claimed) FILTER (WHERE state = 'open'), 0) AS disputed
        FROM claims GROUP BY 1, 2, 3
    )
    SELECT f.partition, f.payment, f.account, p.unit, coalesce(p.paid, 0), coalesce(c.claimed, 0), f.recorded_at,
           f.batch, f.position, coalesce(c.disputed, 0)
    FROM first f
    LEFT JOIN paid p USING (partition, payment, account)
    LEFT JOIN claimed c USING (partition, payment, account)
    """,
)

# Rules that were given an end after they were set: the last such end.
END_RULES: Final[LiteralString] = """
SELECT DISTINCT ON (r.partition, r.account, r.unit, r.rule_id)
       r.partition, r.account, r.unit, r.rule_id, r.rule, (e.details ->> 'end_period')::bigint
FROM rules r JOIN part_special e
    ON (e.partition, e.account, e.unit, e.kind, e.details ->> 'rule')
     = (r.partition, r.account, r.unit, 'rule_ended', r.rule_id)
WHERE e.details ->> 'end_period' IS NOT NULL AND (e.batch, e.position) > (r.batch, r.position)
ORDER BY r.partition, r.account, r.unit, r.rule_id, e.at DESC
"""

# The grants and claims of payments on which there are claims, in order.
CLAIMED: Final[LiteralString] = """
SELECT s.partition, s.batch, s.position, s.transaction_id::text, s.kind, s.account, s.unit, s.lot_id::text, s.lot_kind,
       s.posted, s.occurred_at, s.recorded_at, s.details::text
FROM part_special s
WHERE s.kind = 'payment_claimed'
   OR (s.kind = 'lot_granted' AND s.lot_kind = 'purchase' AND s.details ->> 'origin' IS NULL
       AND (s.partition, s.account, s.details ->> 'reference') IN (SELECT partition, account, payment FROM claims))
ORDER BY s.partition, s.at
"""

# The rules of which something is still to come.
RENEWING: Final[LiteralString] = """
SELECT partition, account, rule, next_period FROM rules WHERE NOT ended
"""

# Accounts, at last: when something is due is known from their lots and rules.
ACCOUNTS: Final[LiteralString] = """
INSERT INTO accounts (partition, account, opened_at, recorded_at, batch, position, transaction_id, due_at)
WITH due AS (
    SELECT partition, account, min(due_at) AS due_at
    FROM (
        SELECT partition, account, expires_at AS due_at FROM lots
        WHERE expires_at IS NOT NULL AND kind NOT IN ('debt', 'overage', 'uncapped') AND posted - held - frozen > 0
        UNION ALL
        SELECT partition, account, due_at FROM renewals
    ) d
    GROUP BY 1, 2
)
SELECT o.partition, o.account, o.occurred_at, o.recorded_at, o.batch, o.position, o.transaction_id, d.due_at
FROM part_special o LEFT JOIN due d USING (partition, account)
WHERE o.kind = 'account_opened'
"""
