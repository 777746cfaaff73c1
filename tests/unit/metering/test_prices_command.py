"""`scrip prices`: imports exactly what the book can express, keeps the rest of it, and stores only when told to."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx2
import pytest
import typer
from genai_prices import Usage, calc_price
from typer.testing import CliRunner

from contracts.pricing import Override, OwnPrice, Surcharge, Tier
from infra.commands import prices
from infra.errors import StackError
from infra.service_api import ServiceApi
from services.kit.catalogue import load_catalogue
from services.metering import translate
from services.metering.domain.prices import PriceBook, difference, is_new
from services.metering.translate.receipts import ReceiptRow, receipt

CATALOGUE = load_catalogue(Path(__file__).parents[3] / "infra" / "catalogue" / "catalogue.toml")
AT = datetime(2026, 11, 20, 12, tzinfo=UTC)


class Metering:
    """Answers as metering does, with its own code, from memory."""

    def __init__(self) -> None:
        self.book: PriceBook = translate.read_price_book(CATALOGUE.section("price_versions"), units=CATALOGUE.units)
        self.posted: list[dict[str, Any]] = []

    def client(self) -> ServiceApi:
        return ServiceApi("metering", "http://stand-in", httpx2.Client(transport=httpx2.MockTransport(self.answer)))

    def answer(self, request: httpx2.Request) -> httpx2.Response:
        if request.url.path.endswith("/versions"):
            listed = [
                {
                    "id": each.id,
                    "effective_at": each.effective_at.isoformat(),
                    "recorded_at": AT.isoformat(),
                    "source": "catalogue",
                    "models": len(each.rates),
                }
                for each in self.book.versions
            ]
            return httpx2.Response(200, json={"versions": listed})
        if request.method == "GET":
            asked = request.url.params.get("version")
            shown = self.book.from_now_on(AT) if asked is None else [self.book.find(asked)]
            return httpx2.Response(200, content=translate.price_book_as_json(self.book, shown))  # type: ignore[arg-type]  # it exists
        row = translate.VersionRow.model_validate_json(request.content)
        version = translate.read_version(row, units=self.book.units)
        new = is_new(version, book=self.book, at=AT, backdate=request.url.params["backdate"] == "true")
        before = self.book.version_at(version.effective_at)
        stored = new and request.url.params["dry_run"] == "false"
        if stored:
            self.posted.append(json.loads(request.content))
            self.book = self.book.extended([version])
        said = translate.difference_row(
            version, difference(before, version), compared_with=before, stored=stored, unchanged=not new
        )
        return httpx2.Response(201 if stored else 200, content=said.model_dump_json())


@pytest.fixture
def metering(monkeypatch: pytest.MonkeyPatch) -> Metering:
    made = Metering()
    monkeypatch.setattr(prices, "_metering", made.client)
    return made


def run(*arguments: str, answer: str | None = None, columns: int = 200) -> Any:
    app = typer.Typer()
    prices.register(app)
    return CliRunner().invoke(app, ["prices", *arguments], input=answer, env={"COLUMNS": str(columns)})


def test_nothing_is_stored_by_a_dry_run_or_without_consent(metering: Metering) -> None:
    dry = run("import", "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "openai/gpt-5" in dry.output
    assert "cached_input" in dry.output
    assert "0 removed" in dry.output
    assert run("import", answer="n\n").exit_code == 1
    assert metering.posted == []


def test_a_difference_names_models_and_quantities_in_full_however_narrow_the_terminal_is(metering: Metering) -> None:
    narrow = run("import", "--provider", "anthropic", "--dry-run", columns=60).output
    cells = [[cell.strip() for cell in line.split("│")] for line in narrow.splitlines() if line.startswith("│")]
    named = "".join(row[1] for row in cells), "".join(row[2] for row in cells)
    assert "anthropic/claude-3-5-haiku-latest" in named[0]
    assert "tool_calls.web_search" in named[1]
    assert "…" not in narrow


def test_an_import_keeps_all_other_models_and_counts_tokens_and_calls(metering: Metering) -> None:
    done = run("import", "--provider", "openai", "--model", "gpt-5", "--yes", "--id", "v9")
    assert done.exit_code == 0, done.output
    (body,) = metering.posted
    assert body["id"] == "v9"
    before, after = metering.book.find("2026-11-01"), metering.book.find("v9")
    assert before is not None
    assert after is not None
    found = difference(before, after)
    assert (len(found.added), found.removed, found.changed) == (1, {}, {})
    (rates,) = found.added.values()
    assert [(each.quantity, each.unit) for each in rates if each.service_tier is None] == [
        ("input_tokens", "usd"),
        ("output_tokens", "usd"),
        ("cached_input_tokens", "usd"),
        ("tool_calls.web_search", "usd"),
        ("tool_calls.storage_search", "usd"),
        ("input_tokens", "tokens"),
        ("output_tokens", "tokens"),
        ("calls", "calls"),
    ]
    assert {each.service_tier for each in rates} == {None, "batch", "flex", "priority", "fast"}


def test_an_import_says_on_what_the_version_says_besides(metering: Metering) -> None:
    (latest,) = metering.book.from_now_on(AT)[:1]
    own = OwnPrice(id="renders", type="render", unit="usd", kind="per_unit", tiers=(Tier(None, Decimal("0.2")),))
    markup = (Surcharge("usd", percent=Decimal(20)),)
    terms = {"acme": Override(markup=())}
    further = replace(
        latest, id="v8", effective_at=AT - timedelta(days=1), prices=(own,), markup=markup, accounts=terms
    )
    metering.book = metering.book.extended([further])
    assert run("import", "--provider", "openai", "--model", "gpt-5", "--yes", "--id", "v9").exit_code == 0
    after = metering.book.find("v9")
    assert after is not None
    assert (after.prices, after.markup, after.accounts) == ((own,), markup, terms)
    assert difference(further, after).others == []


def test_importing_again_finds_nothing_to_do(metering: Metering) -> None:
    assert run("import", "--yes", "--effective-at", "2026-12-01T00:00:00Z").exit_code == 0
    again = run("import", "--yes", "--effective-at", "2026-12-02T00:00:00Z")
    assert again.exit_code == 0
    assert "Nothing to import" in again.output
    assert len(metering.posted) == 1


def test_what_needs_more_than_the_book_can_say_is_left_out_and_named() -> None:
    known = prices.read_known(providers=["google", "deepseek", "openai", "groq", "elevenlabs"], models=(), at=AT)
    assert ("google", "gemini-2.5-pro") in known.rates
    assert known.left_out["prices by the hour alone"]
    assert known.left_out["prices by time of day"]
    assert known.not_expressible["audio by the hour"]
    listed = {name for names in known.left_out.values() for name in names}
    assert not listed & {f"{provider}/{model}" for provider, model in known.rates}


def test_the_catalogue_has_the_packages_prices_of_the_storys_models() -> None:
    (version,) = [
        each
        for each in translate.read_price_book(CATALOGUE.section("price_versions"), units=CATALOGUE.units).versions
        if each.id == "2026-11-01"
    ]
    for provider, model in version.rates:
        said = calc_price(Usage(input_tokens=1_000_000, output_tokens=1_000_000), model, provider_id=provider)
        per_unit = [each.price for each in version.rates[provider, model] if each.unit == "usd"]
        assert per_unit == [said.input_price, said.output_price]


def test_what_is_not_known_is_refused_with_a_sentence(metering: Metering) -> None:
    for arguments in (("--provider", "nobody"), ("--model", "gpt-unheard-of"), ("--effective-at", "tomorrow")):
        refused = run("import", *arguments)
        assert isinstance(refused.exception, StackError)
    assert metering.posted == []


def test_a_receipt_is_shown_with_its_lines_and_its_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    row: dict[str, Any] = {
        "partition": 7, "source": "demo", "event_id": "call-1", "occurred_at": AT, "account": "acme", "subject": None,
        "type": "render", "recorded_at": AT, "price_version": "v1", "bundle_number": 3, "line_number": 5,
        "line_items": '[{"quantity":"n","count":"2.5","unit":"usd","price":"0.0000000003","per":1,'
                      '"exact":"0.00000000075","tier":"above 10","price_id":"renders"}]',
        "amounts": '[{"amount":"0.000000001","unit":"usd"},{"amount":"3","unit":"calls"}]',
        "reason": None, "key": None, "conflicts": 0, "revision": 0, "is_void": False, "versions": None,
        "corrections": '[{"id":"fix-1","kind":"rerate","reason":"a wrong price","actor":"operator","recorded_at":'
                       '"2026-11-01T12:00:00Z","from_revision":0,"to_revision":1,"difference":{"usd":-3},'
                       '"undone":false,"undone_revision":null}]',
    }  # fmt: skip
    waiting = row | dict.fromkeys(("price_version", "bundle_number", "line_number", "line_items", "amounts"))
    waiting |= {"event_id": "call-2", "reason": "unpriced", "key": "type:render", "corrections": None}

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked = row if request.url.params["id"] == "call-1" else waiting
        made = receipt(ReceiptRow(**asked), price_version=None, units=CATALOGUE.units)
        return httpx2.Response(200, content=made.model_dump_json())

    client = ServiceApi("metering", "http://stand-in", httpx2.Client(transport=httpx2.MockTransport(answer)))
    monkeypatch.setattr(prices, "_metering", lambda: client)
    shown = run("receipt", "call-1", "--source", "demo").output
    assert "call-1, under v1: partition 7, bundle 3, line 5" in shown
    assert "0.00000000075 usd" in shown
    assert "above 10" in shown
    assert "0.000000001 usd = 0.00000000075, rounded by 0.00000000025" in shown
    assert "3 calls\n" in shown
    assert "rerate fix-1 by operator, version 0 to 1: -0.000000003 usd (a wrong price)" in shown
    assert run("receipt", "call-2").output == "call-2 is unpriced, waits for type:render\n"


def test_the_book_is_shown(metering: Metering) -> None:
    listed, shown = run("list"), run("show", "2024-07-18", "--model", "gpt-4o-mini")
    assert "2026-11-01" in listed.output
    assert "0.60 usd / 1,000,000" in shown.output
