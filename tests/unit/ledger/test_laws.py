"""The laws of the ledger on its pure core: random commands to it and to a model beside it, by hypothesis and seeds."""

import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from services.ledger.domain.chain import GENESIS, columns_hash, entry_columns
from services.ledger.domain.commands import (
    Adjust,
    ClaimPayment,
    Command,
    ExtendHold,
    Grant,
    OpenAccount,
    PlaceHold,
    Rule,
    SetRule,
    WalletTerms,
)
from services.ledger.domain.errors import AlreadyCharged
from services.ledger.projections import lot_of
from tests.unit.ledger.book import BEGIN, PARTITION, Book, hold_id, leg, line
from tests.unit.ledger.world import (
    COMMANDS,
    REFUSALS,
    STEPS,
    Chances,
    Failure,
    Step,
    World,
    beginning,
    episodes,
    missing,
    play,
    report,
    shrunk,
)

STEPS_SHORT: Final = 6_000
STEPS_LONG: Final = int(os.environ.get("SCRIP_LAWS_STEPS") or 1_000_000)
SEED: Final = int(os.environ.get("SCRIP_LAWS_SEED") or random.SystemRandom().randrange(10**6))
PROCESSES: Final = 2

chances = st.randoms(use_true_random=False)


class Laws(RuleBasedStateMachine):
    """Random steps, each checked by the world."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    @initialize(chance=chances, whole=st.booleans())
    def begin(self, chance: random.Random, whole: bool) -> None:
        self.world = World(whole=whole)
        for step in beginning(chance):
            self.world.do(step)

    @rule(chance=chances, name=st.sampled_from(sorted(STEPS)))
    def step(self, chance: random.Random, name: str) -> None:
        self.world.do(Chances(self.world, chance).named(name))

    def teardown(self) -> None:
        self.world.check_everything()
        self.world.check_audit()
        previous = GENESIS
        for recorded in self.world.book.journal:
            previous = columns_hash(previous, entry_columns(recorded.entry, partition=PARTITION))
            assert previous == recorded.hash
        assert self.world.book.head.chain_hash == previous


TestLaws = Laws.TestCase
TestLaws.settings = settings(max_examples=30, stateful_step_count=40, report_multiple_bugs=False)


def test_laws_hold_whatever_is_asked_in_whatever_order(capsys: pytest.CaptureFixture[str]) -> None:
    """The same steps in every run: nearly all commands and refusals are among them."""
    counts: Counter[str] = Counter()
    for _ in episodes(1, STEPS_SHORT, counts):
        pass
    assert len(missing(counts)) <= (len(COMMANDS) + len(REFUSALS)) // 20, missing(counts)


def test_of_a_list_only_what_is_accepted_has_what_is_due_done_before_it() -> None:
    """A hold of r/b ends because it holds of r; a refused command leaves r/b as it was by then, whatever is due."""
    world = World()
    hold, hour = hold_id(), timedelta(hours=1)
    daily = Rule(id="cap", unit="usd_cap", amount=10, period="day", anchor=BEGIN - 23 * hour)
    for command in (
        OpenAccount(account="r", wallets=(WalletTerms("usd"),)),
        OpenAccount(account="r/b", wallets=(WalletTerms("usd_cap"),)),
        Grant(account="r", unit="usd", amount=100, kind="purchase"),
        SetRule(account="r/b", rule=daily),
        PlaceHold(hold=hold, account="r/b", legs=(leg("usd", 5),), lifetime_seconds=7_200),
    ):
        world.do(Step(commands=(command,)))
    refused = ExtendHold(hold=hold_id(), account="r/b", lifetime_seconds=900)
    adjusted = Adjust(account="r", unit="usd", amount=-1, reason="put right")
    outcomes = world.do(Step(wait=72 * hour, commands=(refused, adjusted), way="listed"))
    assert [isinstance(outcome, list) for outcome in outcomes] == [False, True]
    assert world.book.state.holds[hold].status != "placed"
    (over,) = [lot for lot in world.book.wallet("r/b", "usd_cap").lots.values() if lot.available]
    assert over.expires_at is not None
    assert over.expires_at <= world.book.head.recorded_at


@pytest.mark.soak
@pytest.mark.timeout(6 * 3600)
def test_laws_hold_over_a_million_steps(capsys: pytest.CaptureFixture[str]) -> None:
    share = -(-STEPS_LONG // PROCESSES)
    with capsys.disabled():
        _say(f"\n{STEPS_LONG} steps in {PROCESSES} processes, seed {SEED}")
        began = time.monotonic()
        counts: Counter[str] = Counter()
        with ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn")) as pool:
            futures = [pool.submit(_part, SEED, share, number) for number in range(PROCESSES)]
            for future in futures:
                found, failure = future.result()
                assert failure is None, failure
                counts.update(found)
        _say(f"{STEPS_LONG / (time.monotonic() - began):.0f} steps/s; {report(counts)}")
    assert not missing(counts)


def _part(seed: int, steps: int, number: int) -> tuple[Counter[str], str | None]:
    """One process's share: what was reached, and what failed. Episodes of a process are its own."""
    counts: Counter[str] = Counter()
    done, began = 0, time.monotonic()
    try:
        for world in episodes(seed, steps, counts, first=number * 10**6):
            before, done = done, done + len(world.script)
            if done // 50_000 > before // 50_000:
                _say(f"process {number}: {done} steps, {done / (time.monotonic() - began):.0f} steps/s")
    except Failure as failure:
        return counts, str(failure)
    return counts, None


def _say(text: str) -> None:
    """To stderr: of stdout nothing comes through from a worker of xdist."""
    sys.stderr.write(text + "\n")


@given(chance=chances)
@settings(max_examples=60)
def test_the_order_of_redelivery_does_not_matter(chance: random.Random) -> None:
    """Charges, claims and the grants they are about, in any order, some of them again: the same sums."""
    seed = chance.randrange(10**6)
    assert _sums_after(seed, chance.sample) == _sums_after(seed, lambda found, _: list(found))


def _sums_after(seed: int, order: Any) -> dict[tuple[str, str], tuple[int, ...]]:
    """What wallets come to when the same things are told in an order; by the numbers, not by the lots."""
    chance = random.Random(seed)
    book = Book(whole=bool(chance.randrange(2)))
    book.open("r", "usd", "tokens")
    book.open("r/a", "usd_cap")
    for unit, amount in (("usd", 60), ("tokens", 30)):
        book.grant("r", unit, amount, kind="promo")
    book.grant("r/a", "usd_cap", 40, kind="plan")
    holds = [hold_id() for _ in range(3)]
    for hold in holds:
        book.do(PlaceHold(hold=hold, account="r/a", legs=(leg("usd", 0, 12), leg("tokens", 0, 6))))
    told: list[Command] = []
    for number in range(14):
        named = chance.choice((*holds, None, None))
        amounts = (("usd", chance.randrange(12)), ("tokens", chance.randrange(6)))
        told.append(line("r/a", *amounts, hold=named, final=number % 3 > 0, at=book.now))
    told += [line("r/a", ("usd", 1), hold=hold, at=book.now) for hold in holds]
    told += [Grant(account="r", unit="usd", amount=33, kind="purchase", reference="pi_1")]
    told += [Grant(account="r", unit="usd", amount=7, kind="bonus", reference="pi_1")]
    for number in range(5):
        told.append(
            ClaimPayment(
                account="r",
                payment="pi_1",
                claim=chance.choice(("re_1", "dp_1")),
                reason="refund",
                state="void" if number == 3 else "final",
                unit="usd",
                claimed=chance.randrange(40),
                revision=number,
            )
        )
    for command in order(told, len(told)):
        book.do(command)
    for command in told[:5]:
        assert isinstance(book.ask(command), AlreadyCharged)
    sums: dict[tuple[str, str], tuple[int, ...]] = {}
    lots = [lot_of(row) for row in book.tables["lots"].values()]
    for account, unit in (("r", "usd"), ("r", "tokens"), ("r/a", "usd_cap")):
        wallet = book.wallet(account, unit)
        clawed = sum(lot.clawed for lot in lots if (lot.account, lot.unit) == (account, unit))
        sums[account, unit] = (wallet.posted - wallet.overage, wallet.held, wallet.frozen, clawed)
    return sums


def test_a_failure_is_told_with_as_few_steps_as_it_needs() -> None:
    """The driver itself: a broken law is found, and what does not matter is left out."""
    world = play(2, 0, 60, Counter())

    class Short(World):
        def do(self, step: Any) -> Any:
            if any(isinstance(command, PlaceHold) for command in step.commands):
                raise AssertionError("no holds")
            return super().do(step)

    why = AssertionError("no holds")
    script = shrunk(world.script, world.whole, why, made=Short)
    assert [type(command).__name__ for step in script for command in step.commands].count("PlaceHold") == 1
    assert len(script) == 1
