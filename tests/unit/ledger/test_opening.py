"""The terms of wallets: which make sense, which differ from those there are, and what changing them moves."""

import pytest

from contracts import ledger as words
from services.ledger.domain.commands import OpenAccount, Policy, SetWallet, Threshold, WalletTerms
from services.ledger.domain.entries import WalletOpened
from services.ledger.domain.errors import AccountNotOpen, InvalidTerms, UnknownUnit, WalletNotOpen, WalletPolicyDiffers
from services.ledger.domain.opening import THRESHOLDS_MAX
from services.ledger.domain.rules import EVERY_MAX
from tests.unit.ledger.test_due import ACCOUNT, Clockwork


def amounts(*amounts: int) -> tuple[Threshold, ...]:
    return tuple(Threshold(amount=amount) for amount in amounts)


SENSELESS = [
    WalletTerms("usd", overdraft=-1),
    WalletTerms("usd", overdraft=10**18 + 1),
    WalletTerms("usd", policy="soft", overdraft=1),
    WalletTerms("usd", policy="unlimited", overdraft=1),
    WalletTerms("tokens", overdraft=1),
    WalletTerms("usd", thresholds=amounts(*range(THRESHOLDS_MAX + 1))),
    WalletTerms("usd", thresholds=amounts(5, 5)),
    WalletTerms("usd", thresholds=(Threshold(),)),
    WalletTerms("usd", thresholds=(Threshold(amount=1, percent=1),)),
    WalletTerms("usd", thresholds=(Threshold(percent=0),)),
    WalletTerms("usd", thresholds=(Threshold(percent=101),)),
    WalletTerms("usd", thresholds=amounts(-1)),
    WalletTerms("usd", thresholds=amounts(10**18 + 1)),
]


@pytest.mark.parametrize("terms", SENSELESS)
def test_terms_that_make_no_sense_are_refused_and_change_nothing(terms: WalletTerms) -> None:
    clockwork = Clockwork("usd", "tokens")
    before = len(clockwork.entries)
    assert isinstance(clockwork.ask(SetWallet(account=ACCOUNT, terms=terms)), InvalidTerms)
    assert isinstance(clockwork.ask(OpenAccount(account="other", wallets=(terms,))), InvalidTerms)
    assert len(clockwork.entries) == before


@pytest.mark.parametrize(
    "terms",
    [
        WalletTerms("usd", overdraft=10**18),
        WalletTerms("tokens", policy="soft", thresholds=amounts(0, 1)),
        WalletTerms("usd", policy="unlimited", thresholds=(*amounts(1), Threshold(percent=1), Threshold(percent=100))),
        WalletTerms("usd", thresholds=amounts(*range(THRESHOLDS_MAX))),
    ],
)
def test_a_wallet_is_opened_with_its_terms_and_can_be_given_them_later(terms: WalletTerms) -> None:
    clockwork = Clockwork("usd", "tokens")
    clockwork.do(SetWallet(account=ACCOUNT, terms=terms))
    clockwork.do(OpenAccount(account="acme/ml", wallets=(terms,)))
    for account in (ACCOUNT, "acme/ml"):
        wallet = clockwork.state.wallet(account, terms.unit)
        assert wallet is not None
        assert (wallet.policy, wallet.overdraft, wallet.thresholds) == (terms.policy, terms.overdraft, terms.thresholds)


def test_an_account_is_opened_with_those_above_it_from_the_root() -> None:
    clockwork = Clockwork("usd")
    moves = clockwork.do(OpenAccount(account="acme/ml/ana", wallets=(WalletTerms("usd", policy="soft"),)))
    assert [(move.kind, move.account) for move in moves] == [
        ("account_opened", "acme/ml"),
        ("account_opened", "acme/ml/ana"),
        ("wallet_opened", "acme/ml/ana"),
    ]
    assert moves[-1].details == WalletOpened(policy="soft")


def test_what_is_open_stays_as_it_is() -> None:
    clockwork = Clockwork("usd")
    clockwork.do(SetWallet(account=ACCOUNT, terms=WalletTerms("usd", overdraft=5, thresholds=amounts(3))))
    assert clockwork.do(OpenAccount(account=ACCOUNT, wallets=(WalletTerms("usd"),))) == []
    assert clockwork.wallet("usd").overdraft == 5


@pytest.mark.parametrize("policy", ["soft", "unlimited"])
def test_an_open_wallet_of_another_policy_is_told(policy: Policy) -> None:
    asked = OpenAccount(account=ACCOUNT, wallets=(WalletTerms("usd", policy=policy),))
    assert Clockwork("usd").ask(asked) == WalletPolicyDiffers(ACCOUNT, "usd", "hard", policy)


def test_a_wallet_is_named_once_or_with_the_same_terms() -> None:
    clockwork = Clockwork("usd")

    def opened(*terms: WalletTerms) -> object:
        return clockwork.ask(OpenAccount(account="other", wallets=terms))

    twice = WalletTerms("usd", overdraft=1)
    assert opened(WalletTerms("usd"), WalletTerms("usd", policy="soft")) == WalletPolicyDiffers(
        "other", "usd", "hard", "soft"
    )
    assert isinstance(opened(WalletTerms("usd"), twice), InvalidTerms)
    moves = clockwork.do(OpenAccount(account="other", wallets=(twice, twice)))
    assert [move.kind for move in moves] == ["account_opened", "wallet_opened"]


def test_terms_that_are_so_already_move_nothing() -> None:
    clockwork = Clockwork("usd")
    assert clockwork.do(SetWallet(account=ACCOUNT, terms=WalletTerms("usd"))) == []


def test_terms_are_of_an_open_wallet_of_a_known_unit() -> None:
    clockwork = Clockwork("usd")
    assert clockwork.ask(SetWallet(account=ACCOUNT, terms=WalletTerms("eur"))) == UnknownUnit("eur")
    assert clockwork.ask(SetWallet(account=ACCOUNT, terms=WalletTerms("points"))) == WalletNotOpen(ACCOUNT, "points")
    assert clockwork.ask(SetWallet(account="other", terms=WalletTerms("usd"))) == AccountNotOpen("other")
    assert clockwork.ask(OpenAccount(account="other", wallets=(WalletTerms("eur"),))) == UnknownUnit("eur")


def test_what_a_command_may_ask_for_makes_sense() -> None:
    """The bounds of the contract are those of the core."""
    assert words.THRESHOLDS_MAX == THRESHOLDS_MAX
    assert words.RuleSpec.model_json_schema()["properties"]["every"]["maximum"] == EVERY_MAX
