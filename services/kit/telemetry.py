"""Logs and metrics of one process: a JSON line per event on stderr, and a registry with the standard counters.

Never logs a secret: a SecretStr is written as ***, and so is the password inside a URL.
"""

import logging
import re
import sys
from typing import Final, cast

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from pydantic import SecretStr
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

REGISTRY: Final = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)

HTTP_REQUESTS: Final = Counter(
    "scrip_http_requests", "HTTP requests answered.", ("method", "route", "status"), registry=REGISTRY
)
HTTP_SECONDS: Final = Histogram(
    "scrip_http_seconds", "Time to answer an HTTP request.", ("method", "route"), buckets=_SECONDS, registry=REGISTRY
)
MESSAGES: Final = Counter(
    "scrip_messages",
    "Messages read from a stream, by what became of them: acknowledged, postponed, terminated, stale, dead.",
    ("consumer", "outcome"),
    registry=REGISTRY,
)
PUBLISHED: Final = Counter(
    "scrip_published",
    "Messages published to a stream, by outcome: stored, duplicate, refused, unconfirmed.",
    ("stream", "outcome"),
    registry=REGISTRY,
)
FAULTS: Final = Counter(
    "scrip_faults", "Faults: what should not happen, and is tried again.", ("place",), registry=REGISTRY
)
NATS_ERRORS: Final = Counter("scrip_nats_errors", "Errors the NATS connection reported.", ("kind",), registry=REGISTRY)
LEASES_HELD: Final = Gauge("scrip_leases_held", "Partitions this process owns.", ("name",), registry=REGISTRY)
OUTBOX_BLOCKED: Final = Gauge(
    "scrip_outbox_blocked_partitions", "Partitions whose relay waits after a failure.", ("stream",), registry=REGISTRY
)
BATCH_ITEMS: Final = Histogram(
    "scrip_batch_items",
    "Items per group commit.",
    ("name",),
    buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000),
    registry=REGISTRY,
)
BATCH_SECONDS: Final = Histogram(
    "scrip_batch_seconds", "Time of a group commit.", ("name",), buckets=_SECONDS, registry=REGISTRY
)


def configure_logging(*, service: str, level: str = "info") -> None:
    """Send every log line of this process, of libraries too, to stderr as one JSON object."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _named(service),
        structlog.processors.format_exc_info,
        _without_secrets,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # A line per request of ours says nothing that its caller does not.
    logging.getLogger("httpx2").setLevel(logging.WARNING)


def get_logger(name: str) -> FilteringBoundLogger:
    """A logger whose lines carry `module=name`. Events are short facts, values go into keywords."""
    return cast(FilteringBoundLogger, structlog.get_logger(name, module=name))


def _named(service: str) -> Processor:
    def add(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event["service"] = service
        return event

    return add


_URL_PASSWORD = re.compile(r"(\w+://[^\s:/@]*:)[^\s@]+@")


def _without_secrets(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    for key, value in event.items():
        if isinstance(value, SecretStr):
            event[key] = "***"
        elif isinstance(value, str) and "://" in value:
            event[key] = _URL_PASSWORD.sub(r"\1***@", value)
    return event
