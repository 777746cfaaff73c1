"""What billing says of payments, as the ledger's commands."""

from collections.abc import Iterator

from pydantic import ValidationError

from contracts import ledger as words
from contracts.billing import PaymentClaimed, PaymentReceived, payment_subject
from contracts.money import Amount
from contracts.partition import partition_of
from services.kit.dead_letters import Unreadable
from services.ledger.translate.problems import model_problems, problem_rows


def read_payment_fact(subject: str, body: bytes) -> list[words.Grant | words.ClaimPayment]:
    """What a fact about a payment asks of the ledger, in order. The same fact always asks under the same keys.

    Raises kit's Unreadable.
    """
    partition = int(subject.split(".")[2])
    asked: list[words.Grant | words.ClaimPayment]
    try:
        if subject == payment_subject(partition=partition, verb="received"):
            asked = [*_received(PaymentReceived.model_validate_json(body))]
        elif subject == payment_subject(partition=partition, verb="claimed"):
            asked = [_claimed(PaymentClaimed.model_validate_json(body))]
        else:
            raise Unreadable(f"nothing is known of {subject}")
    except ValidationError as error:
        raise Unreadable("not a fact about a payment", problems=problem_rows(model_problems(error))) from error
    for command in asked:
        if partition_of(command.account) != partition:
            raise Unreadable(f"{command.account} lives in partition {partition_of(command.account)}, not {partition}")
    return asked


def _received(fact: PaymentReceived) -> Iterator[words.Grant]:
    granted: tuple[tuple[str, words.LotKind, Amount | None], ...] = (
        ("paid", "purchase", fact.paid),
        ("bonus", "bonus", fact.bonus),
    )
    for name, kind, amount in granted:
        if amount is not None:
            yield words.Grant(
                idempotency_key=f"payment:{fact.payment}:{name}",
                account=fact.account,
                unit=amount.unit,
                amount=amount.amount,
                kind=kind,
                occurred_at=fact.occurred_at,
                reference=fact.payment,
            )


def _claimed(fact: PaymentClaimed) -> words.ClaimPayment:
    return words.ClaimPayment(
        idempotency_key=f"claim:{fact.claim}:{fact.number}",
        account=fact.account,
        payment=fact.payment,
        claim=fact.claim,
        reason=fact.reason,
        state=fact.state,
        claimed=fact.claimed,
        revision=fact.number,
        occurred_at=fact.occurred_at,
    )
