"""Laws of tracing: off it is nothing, on it never disturbs, and a step stands under the one that asked for it."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from pydantic import ValidationError

from services.kit import trace_export, tracing
from services.kit.http import Readiness, build_app
from services.kit.problems import Problem
from services.kit.query import OwnQueryRouter
from tests.traces import named, settings, spans_in, traced

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
SAMPLED = f"00-{TRACE}-{PARENT}-01"
UNSAMPLED = f"00-{TRACE}-{PARENT}-00"

MALFORMED = (
    "",
    "nonsense",
    SAMPLED.upper(),
    SAMPLED[:-1],
    f"{SAMPLED}-more",
    f"ff-{TRACE}-{PARENT}-01",
    f"00-{'0' * 32}-{PARENT}-01",
    f"00-{TRACE}-{'0' * 16}-01",
    f" {SAMPLED}",
    f"{SAMPLED}\n",
    "x" * 10_000,
    "00-４bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
)


@pytest.fixture(autouse=True)
def _off(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("EXPORTER", "FILE", "ENDPOINT", "SAMPLE_RATIO"):
        monkeypatch.delenv(f"SCRIP_TRACES_{name}", raising=False)
    yield
    tracing.close_tracing()


# Configuration --------------------------------------------------------------------------------------------------------


def test_it_is_off_unless_a_process_is_told_otherwise() -> None:
    tracing.configure_tracing("tests", settings())
    assert not tracing.is_on()
    assert tracing.span("a") is tracing.server_span("b", traceparent=SAMPLED) is tracing.NOTHING
    assert tracing.message_span("c", traceparent=SAMPLED) is None
    assert tracing.traceparent() is None
    assert tracing.headers() is None
    with tracing.NOTHING as nothing:
        nothing.set({"a": 1})
        nothing.fail("x")
        tracing.annotate({"a": 1})
        assert not nothing.recording
        assert tracing.headers() is None


def test_a_process_that_does_not_trace_does_not_load_what_traces() -> None:
    code = (
        "import sys, services.kit.http; print([each for each in sys.modules if each.startswith('opentelemetry.sdk')])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "wrong",
    [
        {"traces_exporter": "file"},
        {"traces_exporter": "jaeger"},
        {"traces_sample_ratio": 1.1},
        {"traces_sample_ratio": -0.1},
        {"traces_endpoint": "collector:4318"},
        {"traces_endpoint": "http://"},
    ],
)
def test_settings_that_say_nothing_sensible_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        settings(**wrong)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("http://collector:4318", "http://collector:4318/v1/traces"),
        ("http://collector:4318/", "http://collector:4318/v1/traces"),
        ("https://collector/my/own", "https://collector/my/own"),
    ],
)
def test_an_endpoint_without_a_path_means_the_one_of_otlp(said: str, meant: str) -> None:
    assert settings(traces_endpoint=said).traces_endpoint == meant


def test_they_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRIP_TRACES_EXPORTER", "otlp")
    monkeypatch.setenv("SCRIP_TRACES_ENDPOINT", "http://collector:4318")
    monkeypatch.setenv("SCRIP_TRACES_SAMPLE_RATIO", "0.25")
    found = settings()
    assert (found.traces_exporter, found.traces_sample_ratio) == ("otlp", 0.25)


def test_spans_on_the_console_are_json_lines(capfd: pytest.CaptureFixture[str]) -> None:
    tracing.configure_tracing("tests", settings(traces_exporter="console"))
    with tracing.server_span("ask", traceparent=None):
        pass
    tracing.close_tracing()
    assert '"name":"ask"' in capfd.readouterr().err.splitlines()[-1]


# Spans ----------------------------------------------------------------------------------------------------------------


def test_a_step_stands_under_the_one_that_asked_for_it(tmp_path: Path) -> None:
    file = tmp_path / "traces.jsonl"
    with traced(file):
        with tracing.server_span("ask", traceparent=SAMPLED), tracing.span("hold", kind="client"):
            asked = tracing.headers()
        assert asked is not None
        with tracing.server_span("answer", traceparent=asked["traceparent"]) as answer:
            answer.set({"scrip.amount": 7})
        done = tracing.message_span("charge", traceparent=answer.traceparent, started_at_ns=time.time_ns() - 1_000)
        assert done is not None
        done.end({"scrip.outcome": "charged"})
    spans = spans_in(file)
    assert {span["trace_id"] for span in spans} == {TRACE}
    (ask,), (hold,), (answered,), (charge,) = (named(spans, name) for name in ("ask", "hold", "answer", "charge"))
    chain = [span["parent_id"] for span in (ask, hold, answered, charge)]
    assert chain == [PARENT, ask["span_id"], hold["span_id"], answered["span_id"]]
    assert [span["kind"] for span in (ask, hold, answered, charge)] == ["server", "client", "server", "consumer"]
    assert answered["attributes"] == {"scrip.amount": 7}
    assert charge["start_unix_nano"] <= charge["end_unix_nano"]
    assert ask["service"] == "tests"
    assert file.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_traceparent_counts_as_none(text: str, tmp_path: Path) -> None:
    with traced(tmp_path / "traces.jsonl"):
        assert tracing.message_span("meter", traceparent=text) is None
        with tracing.server_span("ask", traceparent=text):
            pass
    (span,) = spans_in(tmp_path / "traces.jsonl")
    assert span["parent_id"] is None
    assert span["trace_id"] != TRACE


def test_a_later_version_of_traceparent_is_understood(tmp_path: Path) -> None:
    with traced(tmp_path / "traces.jsonl"), tracing.server_span("ask", traceparent=f"01-{TRACE}-{PARENT}-03-more"):
        assert tracing.traceparent() is not None
    assert spans_in(tmp_path / "traces.jsonl")[0]["trace_id"] == TRACE


def test_what_nobody_asked_for_is_no_step(tmp_path: Path) -> None:
    with traced(tmp_path / "traces.jsonl"), tracing.span("sweep"):
        assert tracing.headers() is None
    assert spans_in(tmp_path / "traces.jsonl") == []


def test_a_ratio_is_of_traces_that_begin_here_and_a_parents_word_counts_first(tmp_path: Path) -> None:
    with traced(tmp_path / "traces.jsonl", traces_sample_ratio=0.0):
        with tracing.server_span("new", traceparent=None):
            # It is told on that the trace is not recorded, so that nobody begins another one.
            assert (tracing.traceparent() or "").endswith("-00")
            assert tracing.traceparent(sampled=True) is None
            with tracing.span("within") as within:
                assert not within.recording
        with tracing.server_span("asked for", traceparent=SAMPLED):
            pass
    with traced(tmp_path / "traces.jsonl", traces_sample_ratio=1.0):
        with tracing.server_span("not wanted", traceparent=UNSAMPLED):
            pass
        assert tracing.message_span("not wanted", traceparent=UNSAMPLED) is None
    assert [span["name"] for span in spans_in(tmp_path / "traces.jsonl")] == ["asked for"]


def test_about_so_many_are_kept_as_the_ratio_says(tmp_path: Path) -> None:
    with traced(tmp_path / "traces.jsonl", traces_sample_ratio=0.25):
        for _ in range(1_000):
            with tracing.server_span("ask", traceparent=None):
                pass
    assert 150 < len(spans_in(tmp_path / "traces.jsonl")) < 350


def test_an_error_is_recorded_by_its_type_alone(tmp_path: Path) -> None:
    file = tmp_path / "traces.jsonl"
    with traced(file), pytest.raises(ValueError, match="hunter2"), tracing.server_span("ask", traceparent=None):
        raise ValueError("hunter2")
    (span,) = spans_in(file)
    assert (span["error"], span["attributes"]) == (True, {"error.type": "ValueError"})
    assert "hunter2" not in file.read_text()


# Exporters ------------------------------------------------------------------------------------------------------------


class Failing(SpanExporter):
    """Raises, or hangs until it is let go."""

    def __init__(self, *, hangs: bool) -> None:
        self.hangs = hangs
        self.let_go = threading.Event()
        self.tried = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:  # noqa: ARG002 - as it is called
        self.tried += 1
        if self.hangs:
            self.let_go.wait(20)
        raise OSError("the collector is away")

    def shutdown(self) -> None:
        pass


@pytest.mark.parametrize("hangs", [False, True])
def test_an_exporter_that_fails_disturbs_nobody(hangs: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    exporter = Failing(hangs=hangs)
    monkeypatch.setattr(trace_export, "_exporter", lambda *_: exporter)
    monkeypatch.setattr(trace_export, "EXPORT_EVERY_SECONDS", 0.01)
    tracing.configure_tracing("tests", settings(traces_exporter="console"))
    try:
        began = time.monotonic()
        # More than its queue holds.
        for _ in range(trace_export.QUEUE_SPANS_MAX + 1_000):
            with tracing.server_span("ask", traceparent=None):
                pass
        assert time.monotonic() - began < 5
        began = time.monotonic()
        asyncio.run(tracing.flush_traces(seconds=0.3))
        assert time.monotonic() - began < 2
        assert exporter.tried
    finally:
        exporter.let_go.set()


class Collector(BaseHTTPRequestHandler):
    """Takes what is posted."""

    took: ClassVar[list[tuple[str, bytes]]] = []

    def do_POST(self) -> None:
        self.took.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Not on stderr."""


def test_a_collector_is_posted_the_spans_as_otlp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        tracing.configure_tracing("tests", settings(traces_exporter="otlp", traces_endpoint=endpoint))
        with tracing.server_span("ask", traceparent=SAMPLED):
            pass
        tracing.close_tracing()
        server.shutdown()
    ((path, body),) = Collector.took
    assert path == "/v1/traces"
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    named_as = {each.key: each.value.string_value for each in resource.resource.attributes}
    assert (named_as["service.namespace"], named_as["service.name"]) == ("scrip", "tests")
    (span,) = resource.scope_spans[0].spans
    assert (span.trace_id.hex(), span.parent_span_id.hex(), span.name) == (TRACE, PARENT, "ask")


def test_a_file_that_cannot_be_opened_is_said_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        tracing.configure_tracing("tests", settings(traces_exporter="file", traces_file=tmp_path / "nowhere" / "file"))
    assert not tracing.is_on()


# HTTP -----------------------------------------------------------------------------------------------------------------

# What it is asked besides is let be: no query may get into a trace.
router = OwnQueryRouter()


@router.get("/things/{thing}")
async def thing(thing: str) -> str:
    match thing:
        case "refused":
            raise Problem(402, "insufficient_funds", "no")
        case "broken":
            raise RuntimeError("hunter2")
    with tracing.span("look"):
        return tracing.traceparent() or ""


@pytest.fixture
def application(tmp_path: Path) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield

    return build_app(
        name="tests", lifespan=lifespan, readiness=Readiness(), tokens_file=tmp_path / "none", routers=[router]
    )


# Whoever sets a provider for the process would have FastAPI trace, too: with the whole path and query.
FASTAPIS_OWN = """
import asyncio
from pathlib import Path
from contextlib import asynccontextmanager
from fastapi.testclient import TestClient
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
from services.kit.http import Readiness, build_app

trace.set_tracer_provider(TracerProvider())
trace.get_tracer_provider().add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter()))

@asynccontextmanager
async def lifespan(app):
    yield

app = build_app(name="tests", lifespan=lifespan, readiness=Readiness(), tokens_file=Path("none"))
with TestClient(app) as client:
    client.get("/healthz?key=hunter2")
"""


def test_nobody_else_traces_requests() -> None:
    ran = subprocess.run([sys.executable, "-c", FASTAPIS_OWN], capture_output=True, text=True, check=True)
    assert ran.stdout == ""


def test_a_request_is_a_step_of_the_trace_it_came_with(application: FastAPI, tmp_path: Path) -> None:
    file = tmp_path / "traces.jsonl"
    with traced(file):
        with TestClient(application, raise_server_exceptions=False) as client:
            told = client.get("/things/sk-hunter2?x=hunter2", headers={"traceparent": SAMPLED}).json()
            client.get("/things/refused")
            client.get("/things/broken")
            client.get("/nowhere/hunter2")
            client.get("/things/a", headers=[("traceparent", SAMPLED), ("traceparent", SAMPLED)])
            for probe in ("/healthz", "/readyz", "/metrics"):
                client.get(probe)
        # The application's end is enough.
        assert len(spans_in(file)) == 7
    spans = spans_in(file)
    look, asked, refused, broken, nowhere, _, twice = spans
    assert (asked["trace_id"], asked["parent_id"], asked["name"]) == (TRACE, PARENT, "GET /things/{thing}")
    assert look["parent_id"] == asked["span_id"]
    assert told == f"00-{TRACE}-{look['span_id']}-01"
    assert twice["trace_id"] != TRACE
    assert [span["attributes"]["http.response.status_code"] for span in (asked, refused, broken, nowhere)] == [
        200,
        402,
        500,
        404,
    ]
    assert [span["error"] for span in (asked, refused, broken, nowhere)] == [False, False, True, False]
    assert broken["attributes"]["error.type"] == "RuntimeError"
    assert "hunter2" not in file.read_text()
