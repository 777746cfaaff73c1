"""Laws of payments: whatever order and repetition Stripe's events come in, the ledger is told the same."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.billing import ClaimState
from services.billing.domain.offers import Offers, Price, Terms
from services.billing.domain.payments import (
    ClaimedFact,
    Granted,
    ReceivedFact,
    Settled,
    Told,
    Unattributed,
    Unpaid,
    settle,
    status_of,
)
from services.billing.domain.reports import (
    ClaimReport,
    Naming,
    PaymentReport,
    RefundedReport,
    RefundsListed,
    Report,
)
from tests.unit.billing.building import at, claim_report, offers, package, payment_report, terms

STATES: tuple[ClaimState, ...] = ("open", "final", "void")


@dataclass
class Ledger:
    """What was told, one event after the other, as the handlers do it."""

    offers: Offers
    checkouts: dict[str, Terms] = field(default_factory=dict)
    known: dict[str, Report] = field(default_factory=dict)
    terms: Terms | None = None
    grants: int = 0
    claims: dict[str, tuple[ClaimState, int]] = field(default_factory=dict)
    last: Settled | None = None

    def hear(self, reports: Sequence[Report]) -> "Ledger":
        for report in reports:
            self.known[report.event] = report
            self.last = settle(
                self.known.values(),
                offers=self.offers,
                checkouts=self.checkouts,
                told=Told(terms=self.terms, claims=dict(self.claims)),
            )
            for fact in self.last.facts:
                if isinstance(fact, ReceivedFact):
                    assert not self.claims, "a claim was told before its payment"
                    self.terms, self.grants = fact.terms, self.grants + 1
                else:
                    assert self.terms is not None
                    self.claims[fact.claim] = (fact.state, fact.amount)
        return self


@st.composite
def stories(draw: st.DrawFn) -> tuple[Offers, list[Report]]:
    """A payment and everything that is ever reported about it: who it is for on both reports, or on one of them."""
    price = draw(st.integers(1, 5_000))
    of = package(price=price, paid=draw(st.integers(1, 10**6)), bonus=draw(st.integers(0, 10)))
    named = Naming(account="acme", package="made")
    first, second = draw(st.sampled_from([(named, named), (named, Naming()), (Naming(), named)]))
    reports: list[Report] = [
        payment_report("evt_intent", second=draw(st.integers(0, 2)), minor=price, naming=first),
        payment_report("evt_session", second=draw(st.integers(0, 2)), minor=price, naming=second, session="cs_1"),
    ]
    for number in range(draw(st.integers(0, 4))):
        minor, begun = draw(st.integers(1, price)), draw(st.integers(0, 3))
        reports += [
            claim_report(
                f"evt_claim_{number}_{step}",
                f"re_{number}",
                second=draw(st.integers(3, 5)),
                minor=minor,
                state=draw(st.sampled_from(STATES)),
                claimed_at=at(begun),
            )
            for step in range(draw(st.integers(1, 3)))
        ]
    return offers(of), reports


@given(stories(), st.data())
def test_any_order_and_repetition_of_the_events_tells_the_ledger_the_same(
    story: tuple[Offers, list[Report]], data: st.DataObject
) -> None:
    sold, reports = story
    repeated = [*reports, *data.draw(st.lists(st.sampled_from(reports), max_size=5))]
    one, other = (Ledger(sold).hear(data.draw(st.permutations(repeated))) for _ in range(2))
    assert one.grants == other.grants == 1
    assert (one.terms, one.claims) == (other.terms, other.claims)
    assert one.last is not None
    assert other.last is not None
    assert (one.last.standing, one.last.claims, one.last.amounts) == (
        other.last.standing,
        other.last.claims,
        other.last.amounts,
    )
    assert {claim: amount for claim, (_, amount) in one.claims.items()} == one.last.amounts


@given(stories())
def test_hearing_everything_again_tells_nothing_more(story: tuple[Offers, list[Report]]) -> None:
    sold, reports = story
    heard = Ledger(sold).hear(reports)
    before = (heard.grants, dict(heard.claims))
    heard.hear(list(reversed(reports)))
    assert (heard.grants, heard.claims) == before
    assert heard.last is not None
    assert heard.last.facts == []


@given(
    price=st.integers(1, 10_000),
    paid=st.integers(1, 10**15),
    cuts=st.lists(st.integers(1, 10_000), max_size=6),
    voided=st.integers(0, 3),
)
def test_refunds_of_the_whole_claim_the_whole_whatever_the_rounding(
    price: int, paid: int, cuts: list[int], voided: int
) -> None:
    places = sorted({0, price, *(cut % price for cut in cuts)})
    parts = [upper - lower for lower, upper in pairwise(places)]
    reports: list[Report] = [payment_report("evt_paid", minor=price)]
    for number, minor in enumerate(parts):
        reports.append(claim_report(f"evt_{number}", f"re_{number:02}", minor=minor, claimed_at=at(number)))
    reports += [
        claim_report(f"evt_void_{number}", f"re_void_{number}", minor=1, state="void", claimed_at=at(number))
        for number in range(voided)
    ]
    told = Ledger(offers(package(price=price, paid=paid))).hear(reports)
    final = [amount for state, amount in told.claims.values() if state == "final"]
    assert sum(final) == paid
    assert all(amount >= 0 for amount in final)


@given(price=st.integers(2, 10_000), paid=st.integers(1, 10**15), minor=st.data())
def test_part_of_a_payment_claims_no_more_than_its_part(price: int, paid: int, minor: st.DataObject) -> None:
    part = minor.draw(st.integers(1, price - 1))
    told = Ledger(offers(package(price=price, paid=paid))).hear(
        [payment_report("evt_paid", minor=price), claim_report("evt_refund", minor=part)]
    )
    (amount,) = (amount for _, amount in told.claims.values())
    assert amount * price <= paid * part < (amount + 1) * price


def test_both_reports_of_a_payment_grant_once() -> None:
    told = Ledger(offers(package())).hear([payment_report("evt_session", session="cs_1"), payment_report("evt_intent")])
    assert told.grants == 1
    assert told.terms == terms(package())


def test_a_claim_that_comes_first_is_told_after_the_grant() -> None:
    ledger = Ledger(offers(package())).hear([claim_report("evt_refund")])
    assert isinstance(ledger.last and ledger.last.standing, Unpaid)
    assert ledger.claims == {}
    ledger.hear([payment_report("evt_intent")])
    assert ledger.last is not None
    assert [type(fact) for fact in ledger.last.facts] == [ReceivedFact, ClaimedFact]
    assert ledger.claims == {"re_1": ("final", 25_000_000_000)}


def test_of_reports_of_the_same_second_the_later_state_counts() -> None:
    """Whatever their ids and their order: a refund is pending, then succeeds, then may still fail."""
    paid, pending, done, failed = (
        payment_report("evt_paid"),
        claim_report("evt_c", state="open"),
        claim_report("evt_b", state="final"),
        claim_report("evt_a", state="void"),
    )
    stories: list[tuple[list[Report], ClaimState]] = [
        ([paid, pending, done], "final"),
        ([paid, pending, done, failed], "void"),
    ]
    for reports, state in stories:
        for order in permutations(reports):
            assert Ledger(offers(package())).hear(order).claims["re_1"][0] == state


def test_a_later_report_counts_whatever_its_state() -> None:
    reports: list[Report] = [
        payment_report("evt_paid"),
        claim_report("evt_a", state="void"),
        claim_report("evt_b", second=61),
    ]
    for order in permutations(reports):
        assert Ledger(offers(package())).hear(order).claims["re_1"][0] == "final"


def test_a_void_claim_makes_room_in_the_rounding_for_the_others() -> None:
    """Of 10 steps for 3 coins: 3 + 3 + 4. Without the second: 3 + 3, and the third is told anew."""
    reports: list[Report] = [payment_report("evt_intent", minor=3)]
    reports += [claim_report(f"evt_{n}", f"re_{n}", minor=1, claimed_at=at(n)) for n in range(3)]
    told = Ledger(offers(package(price=3, paid=10, bonus=0))).hear(reports)
    assert told.claims == {"re_0": ("final", 3), "re_1": ("final", 3), "re_2": ("final", 4)}
    told.hear([claim_report("evt_void", "re_1", minor=1, second=90, state="void", claimed_at=at(1))])
    assert told.claims == {"re_0": ("final", 3), "re_1": ("void", 3), "re_2": ("final", 3)}


@pytest.mark.parametrize(
    ("naming", "reason"),
    [
        (Naming(), "metadata_missing"),
        (Naming(account="acme"), "package_unknown"),
        (Naming(account="acme", package="gone"), "package_unknown"),
        (Naming(package="made"), "account_invalid"),
        (Naming(account="not / an account", package="made"), "account_invalid"),
        (Naming(account="acme", package="made", quantity="0"), "quantity_invalid"),
        (Naming(account="acme", package="made", quantity="-1"), "quantity_invalid"),
        (Naming(account="acme", package="made", quantity="1.5"), "quantity_invalid"),
        (Naming(account="acme", package="made", quantity="101"), "quantity_invalid"),
        (Naming(account="acme", package="made", quantity="٣"), "quantity_invalid"),
        (Naming(account="acme", package="made", quantity="9" * 400), "quantity_invalid"),
        (Naming(account="acme", package="made", quantity="2"), "price_differs"),
        (Naming(account="acme", package="made", checkout="checkout_unheard_of"), "checkout_unknown"),
    ],
)
def test_metadata_that_name_nobody_grant_nothing(naming: Naming, reason: str) -> None:
    ledger = Ledger(offers(package())).hear([payment_report("evt_intent", naming=naming)])
    assert ledger.grants == 0
    assert ledger.last is not None
    assert isinstance(ledger.last.standing, Unattributed)
    assert ledger.last.standing.reason == reason
    assert status_of(list(ledger.known.values()), ledger.last)[0] == "unattributed"


@pytest.mark.parametrize("paid", [Price(2499, "usd"), Price(2501, "usd"), Price(2500, "eur"), Price(0, "usd")])
def test_another_price_than_the_packages_grants_nothing(paid: Price) -> None:
    report = PaymentReport("evt_1", at(0), paid, Naming(account="acme", package="made"))
    ledger = Ledger(offers(package())).hear([report])
    assert ledger.grants == 0
    assert isinstance(ledger.last and ledger.last.standing, Unattributed)


def test_a_checkout_is_held_against_the_terms_it_was_opened_under() -> None:
    """The package has become dearer meanwhile."""
    agreed = Terms("acme", "made", 3, Price(6000, "usd"), "usd", 60, 3, checkout="checkout_1")
    naming = Naming(account="acme", package="made", quantity="3", checkout="checkout_1")
    ledger = Ledger(offers(package(price=9_999)), checkouts={"checkout_1": agreed})
    ledger.hear([payment_report("evt_1", minor=6000, naming=naming)])
    assert ledger.terms == agreed


@pytest.mark.parametrize(
    "naming",
    [
        Naming(account="mallory", package="made", quantity="1", checkout="checkout_1"),
        Naming(account="acme", package="other", quantity="1", checkout="checkout_1"),
        Naming(account="acme", package="made", quantity="2", checkout="checkout_1"),
    ],
)
def test_metadata_that_differ_from_their_checkout_grant_nothing(naming: Naming) -> None:
    agreed = Terms("acme", "made", 1, Price(2500, "usd"), "usd", 60, 3, checkout="checkout_1")
    ledger = Ledger(offers(package()), checkouts={"checkout_1": agreed})
    assert ledger.hear([payment_report("evt_1", naming=naming)]).grants == 0


def test_reports_that_disagree_grant_nothing_and_after_a_grant_are_an_alarm() -> None:
    other = payment_report("evt_2", naming=Naming(account="other", package="made"))
    first = settle([payment_report("evt_1"), other], offers=offers(package()), checkouts={})
    assert isinstance(first.standing, Unattributed)
    assert first.standing.reason == "metadata_contradictory"
    ledger = Ledger(offers(package())).hear([payment_report("evt_1"), other])
    assert ledger.grants == 1
    assert ledger.last is not None
    assert ledger.last.conflicts == {"evt_2"}
    assert status_of([other], ledger.last)[0] == "conflicting"
    assert status_of([payment_report("evt_1")], ledger.last)[0] == "applied"


def test_what_was_resolved_is_granted_though_the_metadata_name_nobody() -> None:
    report = payment_report("evt_1", naming=Naming())
    settled = settle([report], offers=offers(package()), checkouts={}, resolution=terms(package()))
    assert isinstance(settled.standing, Granted)
    dearer = settle([report], offers=offers(package()), checkouts={}, resolution=terms(package(), quantity=2))
    assert isinstance(dearer.standing, Unattributed)
    assert dearer.standing.reason == "price_differs"


def test_more_refunded_than_the_known_refunds_come_to_is_noticed_until_stripe_was_asked() -> None:
    refunded = RefundedReport("evt_charge", at(60), Price(2500, "usd"))
    reports: list[Report] = [payment_report("evt_1"), refunded, claim_report("evt_2", minor=1000)]
    settled = settle(reports, offers=offers(package()), checkouts={})
    assert settled.unlisted == {"evt_charge"}
    assert status_of([refunded], settled)[0] == "waiting"
    known = settle([*reports, claim_report("evt_3", "re_2", minor=1500)], offers=offers(package()), checkouts={})
    assert known.unlisted == frozenset()
    asked = settle([*reports, RefundsListed("evt_charge")], offers=offers(package()), checkouts={})
    assert asked.unlisted == frozenset()


def test_a_claim_in_other_coins_is_kept_and_not_told() -> None:
    odd: ClaimReport = claim_report("evt_2", claimed=Price(100, "eur"))
    ledger = Ledger(offers(package())).hear([payment_report("evt_1"), odd])
    assert ledger.claims == {}
    assert ledger.last is not None
    assert ledger.last.conflicts == {"evt_2"}
