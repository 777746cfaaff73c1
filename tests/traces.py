"""Tracing to a file, for a test, and what stands in such a file."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from services.kit.settings import ServiceSettings
from services.kit.tracing import close_tracing, configure_tracing

Span = dict[str, Any]


def settings(**traces: Any) -> ServiceSettings:
    """Settings of a process that does nothing but trace."""
    return ServiceSettings(
        service="tests",
        nats_user="tests",
        nats_password=SecretStr(""),
        database_url=SecretStr(""),
        http_port=0,
        tokens_file=Path("none"),
        catalogue_file=Path("none"),
        **traces,
    )


@contextmanager
def traced(file: Path, **more: Any) -> Iterator[None]:
    """Within this, the process traces to a file; after it, the file is whole."""
    configure_tracing("tests", settings(traces_exporter="file", traces_file=file, **more))
    try:
        yield
    finally:
        close_tracing()


def spans_in(file: Path) -> list[Span]:
    """The spans in a file, those of whoever ended first before the others."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def named(spans: list[Span], name: str) -> list[Span]:
    """The spans of that name."""
    return [span for span in spans if span["name"] == name]
