"""A batch of deliveries: read and priced before the database is asked, and what it came to."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from typing import assert_never

from nats.aio.msg import Msg

from contracts.envelope import Problem
from contracts.pricing import Rated
from services.kit import tracing
from services.kit.dead_letters import Letter
from services.kit.outbox import OutboxRow
from services.kit.telemetry import FAULTS, get_logger
from services.metering import translate
from services.metering.domain.ingest import Conflict, first_of_each
from services.metering.domain.prices import CountedFirst, NoPrice, PriceBook
from services.metering.domain.usage import AGE_MAX, Key, Reroute, Usage
from services.metering.store import Counts
from services.metering.translate import Priced

log = get_logger(__name__)

Price = Rated | NoPrice | CountedFirst


@dataclass(slots=True)
class Known:
    """What a process need not ask the database twice: it only ever becomes true, for all processes.

    `subjects` are names of open accounts that are no aliases: what is open never becomes one.
    """

    open_accounts: set[str] = field(default_factory=set)
    subjects: set[str] = field(default_factory=set)
    months: set[date] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Batch:
    """Deliveries, read and priced: everything about them that needs no database. `spans` are of those traced."""

    letters: Sequence[Letter]
    late: Sequence[translate.Late]
    misplaced: Sequence[Reroute]
    usages: Sequence[Usage]
    firsts: Sequence[Usage]
    prices: Mapping[Key, Price]
    priced: Mapping[Key, Priced]
    price_book: PriceBook
    received_at: datetime
    spans: Mapping[Key, tracing.Span] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ingested:
    """What a batch came to, and what the ledger is told of it."""

    counts: Counts
    conflicts: Sequence[Conflict]
    rows: Sequence[OutboxRow]


class Reading:
    """Reads and prices deliveries, slice by slice. Of repeats only the first is priced."""

    def __init__(self, *, price_book: PriceBook, received_at: datetime, age_max: timedelta = AGE_MAX) -> None:
        self._price_book = price_book
        self._received_at = received_at
        self._age_max = age_max
        self._letters: list[Letter] = []
        self._late: list[translate.Late] = []
        self._misplaced: list[Reroute] = []
        self._usages: list[Usage] = []
        self._prices: dict[Key, Price] = {}
        self._priced: dict[Key, Priced] = {}
        self._spans: dict[Key, tracing.Span] = {}
        self._traced = tracing.is_on()

    def add(self, messages: Iterable[Msg]) -> None:
        """Read a slice."""
        for message in messages:
            try:
                self._add(message)
            except Exception as error:
                # Reading is pure: what fails once fails always, and must not hold up what is behind it.
                FAULTS.labels(place="metering.read").inc()
                log.exception("event not readable by a fault of ours, dead-lettered", subject=message.subject)
                problem = Problem("", f"a fault of ours: {type(error).__name__}: {error}")
                self._letters.append(translate.dead(message, [problem]))

    def batch(self) -> Batch:
        """All that was read."""
        return Batch(
            letters=self._letters,
            late=self._late,
            misplaced=self._misplaced,
            usages=self._usages,
            firsts=first_of_each(self._usages),
            prices=self._prices,
            priced=self._priced,
            price_book=self._price_book,
            received_at=self._received_at,
            spans=self._spans,
        )

    def _add(self, message: Msg) -> None:
        match translate.read_delivery(message, age_max=self._age_max):
            case Usage() as usage:
                if usage.key not in self._prices:
                    span = self._begin_span(usage) if self._traced else None
                    self._price(usage, traceparent=None if span is None else span.traceparent)
                self._usages.append(usage)
            case Reroute() as misplaced:
                self._misplaced.append(misplaced)
            case translate.Late() as late:
                self._late.append(late)
            case Letter() as letter:
                self._letters.append(letter)
            case never:
                assert_never(never)

    def _price(self, usage: Usage, *, traceparent: str | None) -> None:
        price = self._price_book.price(usage)
        if isinstance(price, Rated):
            self._priced[usage.key] = translate.priced(
                usage, price, units=self._price_book.units, traceparent=traceparent
            )
        self._prices[usage.key] = price

    def _begin_span(self, usage: Usage) -> tracing.Span | None:
        """The span of a use whose report is a step of a trace. It ends once the use is logged."""
        traceparent = translate.traceparent_of(usage)
        span = tracing.message_span("meter", traceparent=traceparent)
        if span is not None:
            span.set(
                {
                    "scrip.account": usage.account,
                    "scrip.source": usage.source,
                    "scrip.event": usage.event_id,
                    "scrip.partition": usage.partition,
                    "scrip.outcome": "repeat",
                }
            )
            if usage.used is not None:
                span.set({"scrip.model": usage.used.model})
            self._spans[usage.key] = span
        return span
