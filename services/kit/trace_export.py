"""Where spans go: to OTLP over HTTP, to the console or to a file. Imported only by a process that traces."""

import os
import sys
from contextlib import ExitStack
from typing import Final

import msgspec
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

from services.kit.settings import ServiceSettings

# Spans that wait beyond this are dropped: work is never held up by who looks at it.
QUEUE_SPANS_MAX: Final = 4_096
BATCH_SPANS_MAX: Final = 512
EXPORT_EVERY_SECONDS: Final = 1.0
EXPORT_SECONDS_MAX: Final = 5
ATTRIBUTES_MAX: Final = 32
ATTRIBUTE_LENGTH_MAX: Final = 400


class Exporting:
    """What is constructed when tracing is on."""

    def __init__(self, provider: TracerProvider, opened: ExitStack) -> None:
        self.provider = provider
        self.tracer = provider.get_tracer("scrip")
        self._opened = opened

    def close(self) -> None:
        """Export what waits, and stop. Waits for the exporter."""
        self.provider.shutdown()
        self._opened.close()


def start_exporting(service: str, settings: ServiceSettings) -> Exporting:
    """Export the spans of this process as its settings say. Raises OSError if the file cannot be opened."""
    opened = ExitStack()
    exporter = _exporter(settings, opened)
    provider = TracerProvider(
        sampler=ParentBasedTraceIdRatio(settings.traces_sample_ratio),
        resource=Resource.create({"service.namespace": "scrip", "service.name": service}),
        span_limits=SpanLimits(max_attributes=ATTRIBUTES_MAX, max_attribute_length=ATTRIBUTE_LENGTH_MAX),
        # It would wait for the exporter for half a minute.
        shutdown_on_exit=False,
    )
    # Whatever an exporter raises is logged by it, and the batch is dropped.
    provider.add_span_processor(
        BatchSpanProcessor(
            exporter,
            max_queue_size=QUEUE_SPANS_MAX,
            max_export_batch_size=BATCH_SPANS_MAX,
            schedule_delay_millis=EXPORT_EVERY_SECONDS * 1000,
        )
    )
    return Exporting(provider, opened)


def _exporter(settings: ServiceSettings, opened: ExitStack) -> SpanExporter:
    if settings.traces_exporter == "otlp":
        return OTLPSpanExporter(endpoint=settings.traces_endpoint, timeout=EXPORT_SECONDS_MAX)
    if settings.traces_exporter == "console":
        return ConsoleSpanExporter(out=sys.stderr, formatter=_json_line)
    assert settings.traces_file is not None
    # A line is one write, at the end of a file that several processes may write to. It names accounts: nobody else's.
    file = open(  # noqa: SIM115 - it is open for as long as tracing is on
        settings.traces_file,
        "a",
        buffering=1,
        encoding="utf-8",
        opener=lambda path, flags: os.open(path, flags, 0o600),
    )
    return ConsoleSpanExporter(out=opened.enter_context(file), formatter=_json_line)


def _json_line(of: ReadableSpan) -> str:
    found, parent = of.get_span_context(), of.parent
    assert found is not None
    line = {
        "trace_id": f"{found.trace_id:032x}",
        "span_id": f"{found.span_id:016x}",
        "parent_id": None if parent is None else f"{parent.span_id:016x}",
        "service": of.resource.attributes["service.name"],
        "name": of.name,
        "kind": of.kind.name.lower(),
        "start_unix_nano": of.start_time,
        "end_unix_nano": of.end_time,
        "error": of.status.status_code is trace.StatusCode.ERROR,
        "attributes": dict(of.attributes or {}),
    }
    return msgspec.json.encode(line).decode() + "\n"
