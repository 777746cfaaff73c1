"""The verdict: totals agree only account by account, and what differs is said in one sentence."""

import io
from decimal import Decimal

from rich.console import Console

from infra.demo.job import Result, Totals
from infra.demo.report import show_result

A, B = Decimal("0.000000001"), Decimal("0.000000002")


def test_totals_that_agree_in_sum_but_not_by_account_do_not_agree() -> None:
    totals = Totals(journal={"a": A, "b": B}, movement={"a": B, "b": A}, independent={"a": A, "b": B})
    assert not totals.agree
    assert totals.difference() == "a: journal 1E-9, movement of the balance 2E-9, independent 1E-9"


def test_an_account_that_is_missing_on_one_side_is_a_difference() -> None:
    assert not Totals(journal={"a": A}, movement={"a": A}, independent={"a": A, "b": B}).agree


def test_equal_amounts_written_differently_agree() -> None:
    tenth = {"a": Decimal("0.1")}
    assert Totals(journal=tenth, movement={"a": Decimal("0.100")}, independent=tenth).agree


def test_what_is_shown_names_the_difference_and_the_reason_why_nothing_moves() -> None:
    wrong = Totals(journal={"a": A}, movement={"a": B}, independent={"a": A})
    assert "The first account: a: journal" in _shown(_result(wrong, stuck="Nothing has moved."))
    assert "Nothing has moved." in _shown(_result(wrong, stuck="Nothing has moved."))


def test_what_is_shown_of_an_exact_bill_has_nine_decimals() -> None:
    right = Totals(journal={"a": A}, movement={"a": A}, independent={"a": A})
    text = _shown(_result(right))
    assert text.count("0.000000001") == 5
    assert "agree to the nano-dollar" in text


def test_a_stuck_run_is_not_right_even_if_totals_agree() -> None:
    right = Totals(journal={"a": A}, movement={"a": A}, independent={"a": A})
    assert _result(right).right
    assert not _result(right, stuck="Nothing has moved.").right


def _result(totals: Totals, stuck: str | None = None) -> Result:
    return Result(
        published=1,
        new=1,
        duplicate=0,
        conflicting=0,
        dead=0,
        set_aside=0,
        charged=1,
        seconds=1.0,
        totals=totals,
        stuck=stuck,
    )


def _shown(result: Result) -> str:
    output = io.StringIO()
    show_result(Console(file=output, width=100), result)
    return output.getvalue()
