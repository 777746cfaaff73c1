"""What a payment is, as a function of the set of reports about it: their order and repetition do not matter.

What the ledger was told is not taken back: a payment that was granted stays so.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, assert_never

from contracts.accounts import check_account
from contracts.billing import ClaimReason, ClaimState
from services.billing.domain.offers import QUANTITY_MAX, Offers, Price, Terms, terms_of
from services.billing.domain.reports import ClaimReport, Naming, PaymentReport, RefundedReport, RefundsListed, Report

# What became of an event. Received: nothing yet. Waiting: for a report of the payment, or of refunds. Ignored: it says
# nothing about payments of ours. Failed: a fault met it, and it is tried again.
EventStatus = Literal[
    "received", "applied", "waiting", "unattributed", "conflicting", "ignored", "unreadable", "failed"
]

Reason = Literal[
    "metadata_missing",
    "metadata_contradictory",
    "checkout_unknown",
    "account_invalid",
    "package_unknown",
    "quantity_invalid",
    "price_differs",
]


@dataclass(frozen=True, slots=True)
class Unpaid:
    """Nothing has reported that it was paid: only claims on it are known."""


@dataclass(frozen=True, slots=True)
class Unattributed:
    """It was paid, and nobody is granted anything for it: `detail` says why in a sentence."""

    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class Granted:
    """It was paid on these terms."""

    terms: Terms


Standing = Unpaid | Unattributed | Granted


@dataclass(frozen=True, slots=True)
class Claim:
    """A refund or a dispute as it is now."""

    id: str
    reason: ClaimReason
    state: ClaimState
    claimed: Price
    claimed_at: datetime
    told_at: datetime


@dataclass(frozen=True, slots=True)
class ReceivedFact:
    """For the ledger: grant on these terms."""

    terms: Terms
    occurred_at: datetime


@dataclass(frozen=True, slots=True)
class ClaimedFact:
    """For the ledger: `amount` steps of what was granted are claimed back, or no longer."""

    claim: str
    reason: ClaimReason
    state: ClaimState
    amount: int
    occurred_at: datetime


Fact = ReceivedFact | ClaimedFact


@dataclass(frozen=True, slots=True)
class Told:
    """What the ledger was told of a payment so far: its terms, and of each claim the state and amount told last."""

    terms: Terms | None = None
    claims: Mapping[str, tuple[ClaimState, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Settled:
    """What a payment comes to.

    `amounts` are the claims in steps of what was granted; `conflicts` the events that contradict what was granted;
    `unlisted` those that report more refunds than are known.
    """

    standing: Standing
    paid: Price | None
    paid_at: datetime | None
    session: str | None
    claims: Sequence[Claim]
    amounts: Mapping[str, int]
    facts: Sequence[Fact]
    conflicts: frozenset[str]
    unlisted: frozenset[str]


def settle(
    reports: Iterable[Report],
    *,
    offers: Offers,
    checkouts: Mapping[str, Terms],
    resolution: Terms | None = None,
    resolved: bool = False,
    told: Told | None = None,
) -> Settled:
    """What is known of a payment, and what the ledger has to be told of it that it was not told yet.

    `checkouts` has the terms of those that the reports name. `resolution` is how somebody attributes the payment now;
    `resolved`: somebody did so before, whatever its metadata say.
    """
    known, told = list(reports), told or Told()
    payments = sorted((each for each in known if isinstance(each, PaymentReport)), key=_by_age)
    claims = claims_of(each for each in known if isinstance(each, ClaimReport))
    standing: Standing = (
        Granted(told.terms)
        if told.terms
        else stand(payments, offers=offers, checkouts=checkouts, resolution=resolution)
    )
    amounts: dict[str, int] = {}
    facts: list[Fact] = []
    conflicts: set[str] = set()
    if isinstance(standing, Granted):
        terms = standing.terms
        amounts = claim_amounts(claims, terms)
        if told.terms is None:
            facts.append(ReceivedFact(terms=terms, occurred_at=payments[0].told_at))
        facts += _claim_facts(claims, amounts, told)
        conflicts = {
            each.event
            for each in payments
            if each.paid != terms.price
            or (not (resolved or resolution) and _contradicts(each.naming, terms, offers=offers, checkouts=checkouts))
        }
        conflicts |= {
            each.event
            for each in known
            if isinstance(each, ClaimReport) and each.claimed.denomination != terms.price.denomination
        }
    return Settled(
        standing=standing,
        paid=payments[0].paid if payments else None,
        paid_at=payments[0].told_at if payments else None,
        session=next((each.session for each in payments if each.session is not None), None),
        claims=claims,
        amounts=amounts,
        facts=facts,
        conflicts=frozenset(conflicts),
        unlisted=_unlisted(known, claims),
    )


def status_of(reports: Iterable[Report], settled: Settled) -> tuple[EventStatus, str | None]:
    """What became of an event that reported this, and why, once its payment is settled."""
    about = list(reports)
    events = {each.event for each in about}
    if events & settled.conflicts:
        return "conflicting", "it contradicts what had been granted for the payment"
    if events & settled.unlisted:
        return "waiting", "more was refunded than the known refunds come to"
    match settled.standing:
        case Granted():
            return "applied", None
        case Unpaid():
            return "waiting", "nothing has reported yet that the payment was made"
        case Unattributed(reason=reason, detail=detail):
            return "unattributed", f"{reason}: {detail}"
        case _:
            assert_never(settled.standing)


def stand(
    payments: Sequence[PaymentReport],
    *,
    offers: Offers,
    checkouts: Mapping[str, Terms],
    resolution: Terms | None,
) -> Standing:
    """Whether a payment is granted: somebody is named, by none of its reports otherwise, and the price is right."""
    if not payments:
        return Unpaid()
    if resolution is not None:
        return _priced(payments, resolution)
    namings = {each.naming for each in payments} - {Naming()}
    if not namings:
        return Unattributed("metadata_missing", "nothing that reports the payment says whose it is")
    found = {read_naming(naming, offers=offers, checkouts=checkouts) for naming in namings}
    wrong = sorted((each for each in found if isinstance(each, Unattributed)), key=lambda each: each.detail)
    if wrong:
        return wrong[0]
    # Named through a checkout, and in the same words without: the checkout's terms are those that were agreed on.
    terms, *others = sorted((each for each in found if isinstance(each, Terms)), key=lambda each: each.checkout is None)
    if any(_named(each) != _named(terms) for each in others):
        return Unattributed("metadata_contradictory", "reports of the payment disagree about whose it is or what for")
    return _priced(payments, terms)


def read_naming(naming: Naming, *, offers: Offers, checkouts: Mapping[str, Terms]) -> Terms | Unattributed:
    """The terms that metadata name: those of a checkout of ours as it was opened, else today's of the catalogue."""
    if naming.checkout is not None:
        return _of_checkout(naming, checkouts.get(naming.checkout))
    try:
        account = check_account(naming.account or "")
    except ValueError as error:
        return Unattributed("account_invalid", str(error))
    package = offers.packages.get(naming.package or "")
    if package is None:
        return Unattributed("package_unknown", f"the catalogue has no package {naming.package or ''!r}")
    quantity = _quantity(naming.quantity)
    if not 1 <= quantity <= package.quantity_max:
        return Unattributed("quantity_invalid", f"the quantity {naming.quantity!r} is not 1 to {package.quantity_max}")
    return terms_of(package, account=account, quantity=quantity)


def claims_of(reports: Iterable[ClaimReport]) -> list[Claim]:
    """The claims as they are now, in the order in which they were made."""
    latest: dict[str, ClaimReport] = {}
    for report in reports:
        before = latest.get(report.claim)
        if before is None or report.recency > before.recency:
            latest[report.claim] = report
    claims = [
        Claim(
            id=each.claim,
            reason=each.reason,
            state=each.state,
            claimed=each.claimed,
            claimed_at=each.claimed_at,
            told_at=each.told_at,
        )
        for each in latest.values()
    ]
    return sorted(claims, key=lambda claim: (claim.claimed_at, claim.id))


def claim_amounts(claims: Iterable[Claim], terms: Terms) -> dict[str, int]:
    """The claims in steps of what was granted as paid, by claim.

    Cumulative: after claims of c minor coins in all, floor(granted x c / paid) steps are claimed, and each claim has
    the difference it makes. So nothing is lost to rounding, and what is refunded wholly is claimed wholly. A void
    claim takes no part and has floor(granted x claimed / paid) of its own.
    """
    amounts: dict[str, int] = {}
    minor = 0
    for claim in claims:
        if claim.claimed.denomination != terms.price.denomination:
            continue
        before = 0 if claim.state == "void" else minor
        after = before + claim.claimed.minor
        amounts[claim.id] = terms.paid * after // terms.price.minor - terms.paid * before // terms.price.minor
        if claim.state != "void":
            minor = after
    return amounts


def _of_checkout(naming: Naming, terms: Terms | None) -> Terms | Unattributed:
    if terms is None:
        return Unattributed("checkout_unknown", f"no checkout {naming.checkout!r} was opened here")
    said = (naming.account or terms.account, naming.package or terms.package)
    if said != (terms.account, terms.package) or naming.quantity not in (None, str(terms.quantity)):
        return Unattributed("metadata_contradictory", f"the metadata differ from the checkout {naming.checkout}")
    return terms


def _priced(payments: Iterable[PaymentReport], terms: Terms) -> Granted | Unattributed:
    for each in payments:
        if each.paid != terms.price:
            return Unattributed(
                "price_differs",
                f"{each.paid.minor} {each.paid.denomination} (minor coins) were paid, and {terms.quantity} of"
                f" {terms.package} cost {terms.price.minor} {terms.price.denomination}",
            )
    return Granted(terms)


def _contradicts(naming: Naming, terms: Terms, *, offers: Offers, checkouts: Mapping[str, Terms]) -> bool:
    """Whether metadata name somebody or something else than what was granted. What cannot be read names nobody."""
    if naming == Naming():
        return False
    named = read_naming(naming, offers=offers, checkouts=checkouts)
    if isinstance(named, Unattributed):
        return named.reason == "metadata_contradictory"
    return _named(named) != _named(terms)


def _named(terms: Terms) -> tuple[str, str, int]:
    return (terms.account, terms.package, terms.quantity)


def _claim_facts(claims: Iterable[Claim], amounts: Mapping[str, int], told: Told) -> Iterable[ClaimedFact]:
    for claim in claims:
        amount = amounts.get(claim.id)
        if amount is not None and told.claims.get(claim.id) != (claim.state, amount):
            yield ClaimedFact(
                claim=claim.id, reason=claim.reason, state=claim.state, amount=amount, occurred_at=claim.told_at
            )


def _unlisted(reports: Iterable[Report], claims: Iterable[Claim]) -> frozenset[str]:
    known = list(reports)
    listed = {each.event for each in known if isinstance(each, RefundsListed)}
    refunded = sum(each.claimed.minor for each in claims if each.reason == "refund" and each.state != "void")
    return frozenset(
        each.event
        for each in known
        if isinstance(each, RefundedReport) and each.refunded.minor > refunded and each.event not in listed
    )


def _quantity(text: str | None) -> int:
    """The number a text stands for; missing is one, and what is no plain number is none."""
    if text is None:
        return 1
    return int(text) if text.isascii() and text.isdigit() and len(text) <= len(str(QUANTITY_MAX)) else 0


def _by_age(report: PaymentReport) -> tuple[datetime, str]:
    return (report.told_at, report.event)
