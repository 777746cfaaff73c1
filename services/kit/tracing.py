"""One trace from the gateway's request to the journal entry: spans, W3C `traceparent`, and where spans go.

Off unless a process is told otherwise: then nothing of the SDK is imported, and a span is one check. Spans say account,
unit, amounts, ids and model; never a secret, a prompt, or the words of an error.
"""

import asyncio
import re
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Final, Literal, Self

from opentelemetry import context, trace

from services.kit.settings import ServiceSettings
from services.kit.telemetry import get_logger

if TYPE_CHECKING:
    from services.kit.trace_export import Exporting

log = get_logger(__name__)

HEADER: Final = "traceparent"

FLUSH_SECONDS_MAX: Final = 2.0

Attribute = str | int | bool
Attributes = Mapping[str, Attribute]

# Version, trace id, span id, flags; a later version may say more.
_TRACEPARENT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.{0,200})?")
_KINDS: Final[Mapping[str, trace.SpanKind]] = {kind.name.lower(): kind for kind in trace.SpanKind}


class Span:
    """A step of a trace, and the current one while it is entered. Ended by leaving it, or by `end`."""

    __slots__ = ("_span", "_token")

    def __init__(self, span: trace.Span) -> None:
        self._span = span

    @property
    def recording(self) -> bool:
        """Whether what it is told goes anywhere: else it need not be told what costs something to find out."""
        return self._span.is_recording()

    @property
    def traceparent(self) -> str:
        """It, as whoever goes on from here is told."""
        return _written(self._span.get_span_context())

    def set(self, attributes: Attributes) -> None:
        """Say more of it."""
        self._span.set_attributes(attributes)

    def rename(self, name: str) -> None:
        """Name it otherwise, now that more is known."""
        self._span.update_name(name)

    def fail(self, kind: str) -> None:
        """It failed. `kind` is a type or a code of ours, never what an error says."""
        self._span.set_attribute("error.type", kind)
        self._span.set_status(trace.StatusCode.ERROR)

    def end(self, attributes: Attributes | None = None) -> None:
        """It is over."""
        if attributes:
            self._span.set_attributes(attributes)
        self._span.end()

    def __enter__(self) -> Self:
        self._token = context.attach(trace.set_span_in_context(self._span))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        context.detach(self._token)
        if error is not None:
            self.fail(type(error).__name__)
        self._span.end()


class _Nothing(Span):
    """No span: the current one stays what it is."""

    __slots__ = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass


NOTHING: Final[Span] = _Nothing(trace.INVALID_SPAN)


_running: "Exporting | None" = None


# On and off -----------------------------------------------------------------------------------------------------------


def configure_tracing(service: str, settings: ServiceSettings) -> None:
    """Trace this process as its settings say, from now on. Raises OSError if the file cannot be opened."""
    global _running  # noqa: PLW0603 - a process has one trace output, as it has one log
    close_tracing()
    if settings.traces_exporter != "none":
        from services.kit.trace_export import start_exporting  # noqa: PLC0415 - no SDK where nothing is traced

        _running = start_exporting(service, settings)
        log.info("traces are exported", exporter=settings.traces_exporter, sample_ratio=settings.traces_sample_ratio)


def close_tracing() -> None:
    """Export what waits, and trace no longer. Waits for the exporter."""
    global _running
    running, _running = _running, None
    if running is not None:
        running.close()


async def flush_traces(*, seconds: float = FLUSH_SECONDS_MAX) -> None:
    """Export what waits, but do not wait longer than that."""
    if _running is None:
        return
    # A daemon: an exporter that hangs must not hold up the end of the process either.
    thread = threading.Thread(target=_running.provider.force_flush, name="flush-traces", daemon=True)
    thread.start()
    deadline = time.monotonic() + seconds
    # Asked again and again: a thread that is left behind would find no loop to wake.
    while thread.is_alive() and time.monotonic() < deadline:  # noqa: ASYNC110 - see above
        await asyncio.sleep(0.01)
    if thread.is_alive():
        log.warning("traces not exported in time")


def is_on() -> bool:
    """Whether this process traces at all. Where much passes, ask this before anything else."""
    return _running is not None


# Spans ----------------------------------------------------------------------------------------------------------------


def span(name: str, *, kind: Literal["internal", "client"] = "internal", attributes: Attributes | None = None) -> Span:
    """A step within the current one. Without one, or if its trace is not sampled: nothing."""
    if _running is None or not trace.get_current_span().is_recording():
        return NOTHING
    return Span(_running.tracer.start_span(name, kind=_KINDS[kind], attributes=attributes))


def server_span(name: str, *, traceparent: str | None, attributes: Attributes | None = None) -> Span:
    """The answering of a question: a step of the trace it came with, else the first of a new one."""
    if _running is None:
        return NOTHING
    parent = _context_of(traceparent)
    return Span(_running.tracer.start_span(name, parent, kind=trace.SpanKind.SERVER, attributes=attributes))


def message_span(
    name: str, *, traceparent: str | None, started_at_ns: int | None = None, attributes: Attributes | None = None
) -> Span | None:
    """What was done about a message, to be ended by `end`. None if it came with no trace, or with one not sampled."""
    if _running is None or traceparent is None:
        return None
    parent = _context_of(traceparent)
    if not trace.get_current_span(parent).get_span_context().trace_flags.sampled:
        return None
    return Span(
        _running.tracer.start_span(
            name, parent, kind=trace.SpanKind.CONSUMER, attributes=attributes, start_time=started_at_ns
        )
    )


def annotate(attributes: Attributes) -> None:
    """Say more of the current span, if there is one."""
    if _running is not None:
        trace.get_current_span().set_attributes(attributes)


def traceparent(*, sampled: bool = False) -> str | None:
    """The current span as whoever is asked is told; `sampled`: None unless its trace is recorded."""
    if _running is None:
        return None
    found = trace.get_current_span().get_span_context()
    return _written(found) if found.is_valid and (found.trace_flags.sampled or not sampled) else None


def headers() -> dict[str, str] | None:
    """The headers of a NATS message that asks within the current span."""
    found = traceparent()
    return None if found is None else {HEADER: found}


def _context_of(text: str | None) -> context.Context:
    """What goes on from a traceparent. One that is malformed counts as none."""
    found = None if text is None else _TRACEPARENT.fullmatch(text)
    if found is None:
        return context.Context()
    version, trace_id, span_id, flags, more = found.groups()
    parent = trace.SpanContext(
        trace_id=int(trace_id, 16),
        span_id=int(span_id, 16),
        is_remote=True,
        trace_flags=trace.TraceFlags(int(flags, 16)),
    )
    if version == "ff" or (version == "00" and more) or not parent.is_valid:
        return context.Context()
    return trace.set_span_in_context(trace.NonRecordingSpan(parent), context.Context())


def _written(of: trace.SpanContext) -> str:
    return f"00-{of.trace_id:032x}-{of.span_id:016x}-{of.trace_flags & trace.TraceFlags.SAMPLED:02x}"
