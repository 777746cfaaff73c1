"""Between the words of the contracts and the ledger's own: decimal strings and integers, prefixed ids and UUIDs."""

from services.ledger.translate.bundles import (
    BadLine,
    Bundle,
    UnreadableBundle,
    read_again,
    read_bundle,
    read_traceparents,
)
from services.ledger.translate.commands import WHEN_RECORDED, body_hash, body_problems, read_command, read_list
from services.ledger.translate.facts import (
    ChargedSum,
    Fact,
    facts_of,
    heads_signed_row,
    outbox_row,
    reversed_fact,
    transferred_fact,
    usage_charged_facts,
)
from services.ledger.translate.outcomes import accepted, full_id, refusal_text, refused, refused_as
from services.ledger.translate.payments import read_payment_fact
from services.ledger.translate.problems import Invalid, Problem, model_problems, problem_rows
from services.ledger.translate.stored import amounts_text, scope_text, split_text

__all__ = [
    "WHEN_RECORDED",
    "BadLine",
    "Bundle",
    "ChargedSum",
    "Fact",
    "Invalid",
    "Problem",
    "UnreadableBundle",
    "accepted",
    "amounts_text",
    "body_hash",
    "body_problems",
    "facts_of",
    "full_id",
    "heads_signed_row",
    "model_problems",
    "outbox_row",
    "problem_rows",
    "read_again",
    "read_bundle",
    "read_command",
    "read_list",
    "read_payment_fact",
    "read_traceparents",
    "refusal_text",
    "refused",
    "refused_as",
    "reversed_fact",
    "scope_text",
    "split_text",
    "transferred_fact",
    "usage_charged_facts",
]
