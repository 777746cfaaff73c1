"""Recurring grants and plans: what makes sense, what replaces what, and that no period is ever granted twice."""

from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ledger.domain.commands import ChangePlan, EndRule, OpenAccount, Rule, SetRule, SetWallet, WalletTerms
from services.ledger.domain.due import next_due
from services.ledger.domain.errors import (
    AccountNotOpen,
    InvalidAmount,
    InvalidRule,
    UnknownRule,
    UnknownUnit,
    WalletNotOpen,
)
from services.ledger.domain.periods import boundary
from services.ledger.domain.rules import CATCH_UP_MAX, EVERY_MAX, RULES_MAX
from tests.unit.ledger.test_due import (
    ACCOUNT,
    BEGIN,
    FEBRUARY,
    JANUARY,
    MARCH,
    Clockwork,
    ledger,
    monthly,
    only_lot,
)

APRIL = datetime(2026, 4, 1, tzinfo=UTC)


def set_rule(rule: Rule) -> SetRule:
    return SetRule(account=ACCOUNT, rule=rule)


def plan(name: str, *rules: Rule, later: bool = False) -> ChangePlan:
    return ChangePlan(account=ACCOUNT, plan=name, rules=rules, at_period_end=later)


# What makes sense


@pytest.mark.parametrize(
    "terms",
    [
        {"zone": "Europe/Bonn"},
        {"zone": "localtime"},
        {"every": 0},
        {"every": EVERY_MAX + 1},
        {"rollover_min": 2, "rollover_max": 1},
        {"rollover_min": -1},
        {"rollover_max": 10**18 + 1},
        {"anchor": datetime(2026, 1, 1)},  # noqa: DTZ001 - that is what is wrong with it
        {"anchor": datetime(1969, 12, 31, tzinfo=UTC)},
        {"anchor": datetime(2200, 1, 1, tzinfo=UTC)},
        {"first_period": -1},
        {"first_period": 2, "end_period": 2},
        {"end_period": 0},
        {"first_period": 10**6},
        {"first_period": 10**12},
        {"period": "year", "every": 120, "first_period": 70},
        {"period": "fortnight"},
        {"overdraft": -1},
        {"overdraft": 1, "policy": "soft"},
        {"overdraft": 1, "policy": "unlimited"},
        {"overdraft": 1, "unit": "tokens"},
    ],
)
def test_a_rule_that_makes_no_sense_is_refused_and_changes_nothing(terms: dict[str, Any]) -> None:
    clockwork = Clockwork("usd", "tokens")
    before = len(clockwork.entries)
    rule = msgspec.structs.replace(monthly("usd", 5), **terms)
    assert isinstance(clockwork.ask(set_rule(rule)), InvalidRule)
    assert isinstance(clockwork.ask(plan("pro", rule)), InvalidRule)
    assert len(clockwork.entries) == before


@pytest.mark.parametrize(
    "terms",
    [
        {"zone": "America/New_York", "every": EVERY_MAX, "period": "day"},
        {"every": EVERY_MAX, "period": "year"},
        {"rollover_min": 3, "rollover_max": 10**18},
        {"amount": 10**18},
        {"first_period": 4, "end_period": 5},
        {"overdraft": 5},
        {"overdraft": 0, "policy": "unlimited"},
        {"period": "year", "every": 120, "first_period": 60},
        {"anchor": datetime(1970, 1, 1, tzinfo=UTC)},
    ],
)
def test_a_rule_that_makes_sense_is_set(terms: dict[str, Any]) -> None:
    rule = msgspec.structs.replace(monthly("usd", 5), **terms)
    assert [move.kind for move in Clockwork("usd").do(set_rule(rule))] == ["rule_set"]


def test_a_rule_is_of_an_open_wallet_of_a_known_unit_and_of_an_amount() -> None:
    clockwork = Clockwork("usd", "tokens")
    assert clockwork.ask(set_rule(monthly("eur", 5))) == UnknownUnit("eur")
    assert clockwork.ask(set_rule(monthly("points", 5))) == WalletNotOpen(ACCOUNT, "points")
    assert clockwork.ask(SetRule(account="other", rule=monthly("usd", 5))) == AccountNotOpen("other")
    assert isinstance(clockwork.ask(set_rule(monthly("usd", -1))), InvalidAmount)
    assert isinstance(clockwork.ask(set_rule(monthly("usd", 10**18 + 1))), InvalidAmount)
    assert clockwork.ask(EndRule(account=ACCOUNT, rule="r")) == UnknownRule("r", ACCOUNT)
    assert clockwork.ask(EndRule(account="other", rule="r")) == AccountNotOpen("other")
    assert clockwork.ask(ChangePlan(account="other", plan="pro", rules=())) == AccountNotOpen("other")
    assert clockwork.ask(plan("pro", monthly("points", 5))) == WalletNotOpen(ACCOUNT, "points")


def test_an_account_has_one_rule_of_an_id() -> None:
    clockwork = ledger(monthly("usd", 5), "usd", "tokens")
    assert isinstance(clockwork.ask(set_rule(monthly("tokens", 5))), InvalidRule)
    assert isinstance(clockwork.ask(plan("pro", monthly("usd", 5, id="a"), monthly("tokens", 5, id="a"))), InvalidRule)


def test_what_is_granted_at_once_is_bounded() -> None:
    days = timedelta(days=CATCH_UP_MAX)
    first = datetime(BEGIN.year, BEGIN.month, BEGIN.day, tzinfo=UTC) - days
    long_ago = monthly("usd", 1, period="day", anchor=first)
    clockwork = Clockwork("usd")
    assert isinstance(clockwork.ask(set_rule(long_ago)), InvalidRule)
    assert isinstance(
        clockwork.ask(set_rule(msgspec.structs.replace(long_ago, end_period=CATCH_UP_MAX + 1))), InvalidRule
    )
    refused = clockwork.ask(set_rule(long_ago))
    assert isinstance(refused, InvalidRule)
    # It says how to begin without what is past.
    assert refused.reason.endswith(f"with {CATCH_UP_MAX} as its first_period it begins with the current one")
    # One that has ended, one that begins a day later: no more than the bound.
    clockwork.do(set_rule(msgspec.structs.replace(long_ago, id="later", first_period=CATCH_UP_MAX)))
    assert clockwork.available("usd") == 1


def test_a_wallet_has_so_many_rules_and_no_more() -> None:
    clockwork = Clockwork("usd")
    for number in range(RULES_MAX):
        clockwork.do(set_rule(monthly("usd", 1, id=f"r{number}")))
    assert isinstance(clockwork.ask(set_rule(monthly("usd", 1))), InvalidRule)
    clockwork.do(set_rule(monthly("usd", 2, id="r0")))
    clockwork.do(EndRule(account=ACCOUNT, rule="r0"))
    clockwork.do(set_rule(monthly("usd", 1)))


# Setting and ending


def test_a_rule_is_replaced_from_its_next_period_on() -> None:
    clockwork = ledger(monthly("usd", 100, rollover_max=10))
    clockwork.do(set_rule(monthly("usd", 200, rollover_max=70)))
    assert clockwork.available("usd") == 100
    clockwork.catch_up(MARCH)
    assert clockwork.periods() == {0: (100, 0), 1: (270, 70), 2: (270, 70)}


def test_a_rule_that_is_so_already_moves_nothing() -> None:
    clockwork = ledger(monthly("usd", 100))
    assert clockwork.do(set_rule(monthly("usd", 100))) == []
    same_time = JANUARY.astimezone(datetime.fromisoformat("2026-01-01T00:00:00+05:00").tzinfo)
    assert clockwork.do(set_rule(monthly("usd", 100, anchor=same_time))) == []
    clockwork.catch_up(MARCH)
    assert list(clockwork.periods()) == [0, 1, 2]


def test_an_anchor_is_the_same_in_every_zone_even_when_the_clock_shows_it_twice() -> None:
    anchor = datetime(2025, 10, 26, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"))
    rule = monthly("usd", 100, zone="Europe/Berlin", anchor=JANUARY)
    clockwork = ledger(msgspec.structs.replace(rule, anchor=anchor))
    assert clockwork.do(set_rule(msgspec.structs.replace(rule, anchor=anchor))) == []
    assert clockwork.do(set_rule(msgspec.structs.replace(rule, anchor=anchor.astimezone(UTC)))) == []
    clockwork.do(set_rule(msgspec.structs.replace(rule, anchor=anchor, amount=1)))


@pytest.mark.parametrize("terms", [{"zone": "Europe/Berlin"}, {"every": 2}, {"period": "day"}, {"anchor": FEBRUARY}])
def test_a_rule_keeps_its_schedule(terms: dict[str, Any]) -> None:
    clockwork = ledger(monthly("usd", 100))
    assert isinstance(clockwork.ask(set_rule(msgspec.structs.replace(monthly("usd", 100), **terms))), InvalidRule)


def test_a_rule_that_has_granted_nothing_may_be_given_another_schedule() -> None:
    clockwork = ledger(monthly("usd", 100, first_period=2))
    clockwork.do(set_rule(monthly("usd", 7, first_period=1, anchor=FEBRUARY)))
    clockwork.catch_up(APRIL)
    assert clockwork.periods() == {2: (7, 0)}, "the second after February, as it was to begin with its second"


def test_a_rule_ends_with_its_current_period_and_is_told_so_once() -> None:
    clockwork = ledger(monthly("usd", 100))
    assert [move.kind for move in clockwork.do(EndRule(account=ACCOUNT, rule="r"))] == ["rule_ended"]
    assert clockwork.do(EndRule(account=ACCOUNT, rule="r")) == []
    assert clockwork.available("usd") == 100
    clockwork.catch_up(APRIL)
    assert list(clockwork.periods()) == [0]
    assert clockwork.wallet("usd").posted == 0


def test_a_rule_that_was_ended_goes_on_as_if_it_had_not_been_within_its_period() -> None:
    clockwork = ledger(monthly("usd", 100, rollover_max=50))
    clockwork.do(EndRule(account=ACCOUNT, rule="r"))
    clockwork.do(set_rule(monthly("usd", 100, rollover_max=50)))
    clockwork.catch_up(FEBRUARY)
    assert clockwork.periods() == {0: (100, 0), 1: (150, 50)}


def test_a_rule_that_was_over_for_months_goes_on_with_the_current_period() -> None:
    clockwork = ledger(monthly("usd", 100, end_period=1))
    clockwork.catch_up(APRIL + timedelta(days=3))
    clockwork.do(set_rule(monthly("usd", 60)))
    assert clockwork.periods() == {0: (100, 0), 3: (60, 0)}
    assert clockwork.available("usd") == 60


# Plans


def test_an_upgrade_voids_what_is_unheld_at_once_and_what_is_held_as_it_is_released() -> None:
    """Worked example 9."""
    clockwork = Clockwork("tokens")
    clockwork.do(plan("free", monthly("tokens", 1_000, id="free")))
    free = only_lot(clockwork, "tokens")
    clockwork.hold("tokens", free.id, 500, hold="h")
    clockwork.do(plan("pro", monthly("tokens", 100_000, id="pro")))
    wallet = clockwork.wallet("tokens")
    assert (free.posted, free.held, free.void) == (500, 500, True)
    assert (wallet.posted, wallet.held, clockwork.available("tokens")) == (100_500, 500, 100_000)
    charged = clockwork.of("tokens", free.id, "charged", posted=-300, held=-300)
    clockwork.record([msgspec.structs.replace(charged, hold="h"), clockwork.contra("tokens", 300)])
    besides = clockwork.release("tokens", free.id, 200, hold="h")
    assert [move.kind for move in besides] == ["lot_voided", "lot_voided"]
    assert (wallet.posted, wallet.held, clockwork.available("tokens")) == (100_000, 0, 100_000)
    clockwork.catch_up(FEBRUARY)
    assert (list(clockwork.periods("free")), list(clockwork.periods("pro"))) == ([0], [0, 1])


def test_a_downgrade_waits_for_the_end_of_the_period() -> None:
    clockwork = Clockwork("tokens")
    clockwork.do(plan("pro", monthly("tokens", 100_000, id="pro")))
    clockwork.do(plan("free", monthly("tokens", 1_000, id="free"), later=True))
    assert clockwork.available("tokens") == 100_000
    clockwork.catch_up(FEBRUARY - timedelta(seconds=1))
    assert clockwork.available("tokens") == 100_000
    clockwork.catch_up(MARCH)
    assert (list(clockwork.periods("pro")), list(clockwork.periods("free"))) == ([0], [1, 2])
    assert clockwork.available("tokens") == 1_000


def test_a_change_at_the_periods_end_can_be_taken_back_and_made_again() -> None:
    clockwork = Clockwork("tokens")
    pro, free = monthly("tokens", 100, id="pro"), monthly("tokens", 1, id="free")
    clockwork.do(plan("pro", pro))
    clockwork.do(plan("free", free, later=True))
    assert clockwork.do(plan("free", free, later=True)) == []
    clockwork.do(plan("pro", pro, later=True))
    assert clockwork.do(plan("pro", pro)) == []
    clockwork.catch_up(FEBRUARY)
    assert (list(clockwork.periods("pro")), list(clockwork.periods("free"))) == ([0, 1], [])
    clockwork.do(plan("free", free, later=True))
    clockwork.do(plan("pro", pro))
    clockwork.do(plan("free", free, later=True))
    clockwork.catch_up(MARCH)
    assert (list(clockwork.periods("pro")), list(clockwork.periods("free"))) == ([0, 1], [2])


def test_a_plan_without_another_before_it_begins_now_even_if_it_may_wait() -> None:
    clockwork = Clockwork("tokens")
    clockwork.do(plan("free", monthly("tokens", 1_000, id="free"), later=True))
    assert clockwork.available("tokens") == 1_000


def test_the_plan_that_there_is_is_no_change() -> None:
    clockwork = Clockwork("tokens")
    clockwork.do(plan("pro", monthly("tokens", 100, id="pro")))
    clockwork.use("tokens", only_lot(clockwork, "tokens").id, 60)
    for later in (False, True):
        assert clockwork.do(plan("pro", monthly("tokens", 100, id="pro"), later=later)) == []
    assert clockwork.available("tokens") == 40


def test_what_both_plans_have_goes_on() -> None:
    clockwork = Clockwork("tokens", "usd")
    both = monthly("tokens", 100, id="both", plan="free")
    clockwork.do(plan("free", both))
    clockwork.do(plan("free", both, monthly("usd", 5, id="more")))
    assert (clockwork.available("tokens"), clockwork.available("usd")) == (100, 5)
    clockwork.do(plan("free", both))
    assert (clockwork.available("tokens"), clockwork.available("usd")) == (100, 0)
    clockwork.catch_up(FEBRUARY)
    assert (list(clockwork.periods("both")), list(clockwork.periods("more"))) == ([0, 1], [0])


def test_a_plan_leaves_alone_what_belongs_to_none() -> None:
    clockwork = ledger(monthly("usd", 7), "usd")
    lot = clockwork.grant("usd", 50)
    clockwork.do(plan("pro", monthly("usd", 100, id="pro")))
    clockwork.do(plan("none"))
    assert clockwork.available("usd") == 57
    assert clockwork.lot("usd", lot).posted == 50
    clockwork.catch_up(FEBRUARY)
    assert clockwork.available("usd") == 57


def test_back_and_forth_within_a_period_grants_nothing_twice_but_the_terms_are_those_of_the_plan() -> None:
    clockwork = Clockwork("tokens")
    free = monthly("tokens", 1_000, id="free", policy="hard")
    pro = monthly("tokens", 0, id="pro", policy="unlimited")
    clockwork.do(plan("free", free))
    clockwork.do(plan("pro", pro))
    assert clockwork.wallet("tokens").policy == "unlimited"
    clockwork.do(plan("free", free))
    assert clockwork.wallet("tokens").policy == "hard"
    assert clockwork.available("tokens") == 0
    clockwork.catch_up(FEBRUARY)
    assert clockwork.periods("free") == {0: (1_000, 0), 1: (1_000, 0)}
    assert clockwork.available("tokens") == 1_000


def test_another_form_of_a_running_grant_needs_another_id_now_and_none_at_the_periods_end() -> None:
    clockwork = Clockwork("tokens")
    clockwork.do(plan("pro", monthly("tokens", 100)))
    before = len(clockwork.entries)
    assert isinstance(clockwork.ask(plan("max", monthly("tokens", 900))), InvalidRule)
    assert len(clockwork.entries) == before
    clockwork.do(plan("max", monthly("tokens", 900), later=True))
    clockwork.catch_up(FEBRUARY)
    assert clockwork.periods() == {0: (100, 0), 1: (900, 0)}


def test_a_plan_grants_the_period_that_contains_now_and_none_before() -> None:
    clockwork = Clockwork("usd")
    clockwork.do(plan("pro", monthly("usd", 100, anchor=datetime(2020, 3, 31, tzinfo=UTC))))
    lot = only_lot(clockwork, "usd")
    assert (lot.period, lot.effective_at) == (69, datetime(2025, 12, 31, tzinfo=UTC))
    assert clockwork.available("usd") == 100


def test_a_plan_that_begins_in_the_future_grants_nothing_until_then() -> None:
    clockwork = Clockwork("usd")
    clockwork.do(plan("pro", monthly("usd", 100, anchor=MARCH)))
    assert next_due(clockwork.state, [ACCOUNT]) == MARCH


def test_new_grants_begin_after_those_of_their_unit_or_after_all() -> None:
    clockwork = Clockwork("usd", "tokens", "points")
    weekly = monthly("usd", 10, id="weekly", period="week", anchor=datetime(2026, 1, 5, tzinfo=UTC))
    clockwork.do(plan("old", weekly, monthly("tokens", 10, id="tokens")))
    daily = [monthly(unit, 1, id=f"daily_{unit}", period="day") for unit in ("usd", "tokens", "points")]
    clockwork.do(plan("new", *daily, later=True))
    clockwork.catch_up(FEBRUARY)
    first = {rule.unit: min(clockwork.periods(rule.id)) for rule in daily}
    assert first == {"usd": 11, "tokens": 31, "points": 31}


def test_a_plan_that_was_to_begin_is_forgotten_when_another_begins() -> None:
    clockwork = Clockwork("tokens")
    clockwork.do(plan("pro", monthly("tokens", 100, id="pro")))
    clockwork.do(plan("free", monthly("tokens", 1, id="free"), later=True))
    clockwork.do(plan("max", monthly("tokens", 900, id="max")))
    clockwork.catch_up(FEBRUARY)
    assert clockwork.available("tokens") == 900
    assert clockwork.periods("free") == {}


def test_a_plan_that_was_to_begin_may_begin_now() -> None:
    clockwork = Clockwork("tokens")
    free = monthly("tokens", 1, id="free")
    clockwork.do(plan("pro", monthly("tokens", 100, id="pro")))
    clockwork.do(plan("free", free, later=True))
    clockwork.do(plan("free", free))
    assert clockwork.available("tokens") == 1
    clockwork.catch_up(FEBRUARY)
    assert list(clockwork.periods("free")) == [0, 1]


def test_lots_of_a_plan_that_is_to_end_are_void_if_another_begins_before() -> None:
    clockwork = Clockwork("tokens")
    clockwork.do(plan("pro", monthly("tokens", 100, id="pro")))
    clockwork.do(plan("none", later=True))
    clockwork.do(plan("free", monthly("tokens", 1, id="free")))
    assert clockwork.available("tokens") == 1


def test_a_plan_that_was_to_end_and_was_replaced_before_is_gone_and_not_merely_to_end() -> None:
    clockwork = Clockwork("tokens")
    pro = monthly("tokens", 100, id="pro", policy="soft")
    clockwork.do(plan("pro", pro))
    clockwork.do(plan("none", later=True))
    clockwork.do(plan("free", monthly("tokens", 1, id="free", policy="hard")))
    clockwork.do(plan("pro", pro))
    assert (clockwork.wallet("tokens").policy, clockwork.available("tokens")) == ("soft", 0)
    clockwork.catch_up(FEBRUARY)
    assert clockwork.available("tokens") == 100


def test_what_is_held_of_a_period_that_has_ended_is_left_to_expire_by_a_change_of_plan() -> None:
    clockwork = Clockwork("tokens")
    clockwork.do(plan("free", monthly("tokens", 100, id="free")))
    january = only_lot(clockwork, "tokens")
    clockwork.hold("tokens", january.id, 10, hold="h")
    clockwork.catch_up(FEBRUARY)
    clockwork.do(plan("pro", monthly("tokens", 900, id="pro")))
    assert not january.void
    assert [move.kind for move in clockwork.release("tokens", january.id, 10, hold="h")] == ["lot_expired"] * 2
    assert clockwork.wallet("tokens").posted == 900


# Laws

_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["set", "end", "now", "later", "wait", "wait", "terms"]),
        st.sampled_from(["a", "b", "c"]),
        st.integers(1, 40),
        st.sampled_from(["day", "month", "week"]),
    ),
    max_size=20,
)


@given(_STEPS)
def test_no_period_is_granted_twice_and_none_overlaps_another_of_its_rule(
    steps: list[tuple[str, str, int, str]],
) -> None:
    clockwork = Clockwork("usd")
    for what, name, amount, period in steps:
        rule = monthly("usd", amount % 4, id=f"{name}_{period}", period=period, first_period=0, rollover_max=5)
        match what:
            case "set":
                clockwork.do(set_rule(rule))
            case "end":
                clockwork.ask(EndRule(account=ACCOUNT, rule=rule.id))
            case "now" | "later":
                rules = (rule, monthly("usd", 1, id="base")) if amount % 2 else (rule,)
                clockwork.ask(plan(name, *rules, later=what == "later"))
            case "terms":
                clockwork.do(SetWallet(account=ACCOUNT, terms=WalletTerms("usd", overdraft=amount)))
            case _:
                clockwork.catch_up(clockwork.now + timedelta(days=amount))
        due = next_due(clockwork.state, [ACCOUNT])
        assert due is None or due > clockwork.now
        wallet = clockwork.wallet("usd")
        for known in wallet.rules.values():
            granted = clockwork.periods(known.rule.id)
            assert list(granted) == sorted(granted)
            assert not granted or known.next_period > max(granted)
            if not known.is_over:
                assert boundary(known.rule, known.next_period) > clockwork.now
        assert wallet.posted == sum(lot.posted for lot in wallet.lots.values()) == wallet.available(clockwork.now)
    replayed = clockwork.replayed().wallet(ACCOUNT, "usd")
    assert replayed is not None
    assert {name: (rule.rule, rule.next_period, rule.ended) for name, rule in replayed.rules.items()} == {
        name: (rule.rule, rule.next_period, rule.ended) for name, rule in clockwork.wallet("usd").rules.items()
    }


def test_another_account_of_the_tree_is_not_concerned() -> None:
    clockwork = ledger(monthly("usd", 5))
    clockwork.do(OpenAccount(account="acme/ml", wallets=(WalletTerms("usd"),)))
    clockwork.do(SetRule(account="acme/ml", rule=monthly("usd", 5)))
    assert next_due(clockwork.state, [ACCOUNT]) == FEBRUARY
    assert next_due(clockwork.state, ["acme/ml"]) == JANUARY
