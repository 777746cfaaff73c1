"""`scrip prices`: imports exactly what the book can express, keeps the rest of it, and stores only when told to."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest
import typer
from genai_prices import Usage, calc_price
from genai_prices.data_snapshot import get_snapshot
from typer.testing import CliRunner

from contracts.money import Unit
from contracts.pricing import rate
from contracts.usage import ModelUsed
from infra.commands import prices
from infra.errors import StackError
from infra.service_api import ServiceApi
from services.kit.catalogue import load_catalogue
from services.metering import translate
from services.metering.domain.prices import PriceBook, difference, is_new

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


def run(*arguments: str, answer: str | None = None) -> Any:
    app = typer.Typer()
    prices.register(app)
    return CliRunner().invoke(app, ["prices", *arguments], input=answer, env={"COLUMNS": "200"})


def test_nothing_is_stored_by_a_dry_run_or_without_consent(metering: Metering) -> None:
    dry = run("import", "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "openai/gpt-5" in dry.output
    assert "cached_input" in dry.output
    assert "0 removed" in dry.output
    assert run("import", answer="n\n").exit_code == 1
    assert metering.posted == []


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
    assert [(each.quantity, each.unit) for each in rates] == [
        ("input_tokens", "usd"),
        ("output_tokens", "usd"),
        ("input_tokens", "tokens"),
        ("output_tokens", "tokens"),
        ("calls", "calls"),
    ]


def test_importing_again_finds_nothing_to_do(metering: Metering) -> None:
    assert run("import", "--yes", "--effective-at", "2026-12-01T00:00:00Z").exit_code == 0
    again = run("import", "--yes", "--effective-at", "2026-12-02T00:00:00Z")
    assert again.exit_code == 0
    assert "Nothing to import" in again.output
    assert len(metering.posted) == 1


def test_every_imported_model_costs_what_the_package_says() -> None:
    """Over all it knows: what is imported prices plain calls as genai-prices does, to the last digit."""
    providers = [provider.id for provider in get_snapshot().providers]
    known = prices.read_known(providers=providers, models=(), at=AT)
    assert len(known.rates) > 1_000
    usd = {"usd": Unit(name="usd", kind="money", scale=9)}
    row = translate.VersionRow.model_validate(
        prices.next_version(known, base=[], units=["usd"], id="all", effective_at=AT)
    )
    version = translate.read_version(row, units=usd)
    by_id = {provider.id: provider for provider in get_snapshot().providers}
    for provider, model_id in version.rates:
        model = next(each for each in by_id[provider].models if each.id == model_id)
        for input_tokens, output_tokens in ((1, 1), (300_000, 7_001)):
            used = ModelUsed(provider=provider, model=model_id, input_tokens=input_tokens, output_tokens=output_tokens)
            rated = rate(used, price_version=version, units=usd)
            plain = model.calc_price(
                Usage(input_tokens=input_tokens, output_tokens=output_tokens),
                by_id[provider],
                genai_request_timestamp=AT,
            )
            assert sum(item.exact for item in rated.items) == plain.total_price, (provider, model_id)


def test_what_needs_more_than_the_book_can_say_is_left_out_and_named() -> None:
    known = prices.read_known(providers=["google", "deepseek", "openai"], models=(), at=AT)
    assert "google/gemini-2.5-pro" in known.left_out["tiers: prices by the length of the input"]
    assert ("google", "gemini-2.5-pro") not in known.rates
    assert "openai/gpt-4o" in known.not_expressible["cached_input"]
    assert any("text-embedding" in name for name in known.left_out["no price of input or of output tokens"])
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


def test_the_book_is_shown(metering: Metering) -> None:
    listed, shown = run("list"), run("show", "2024-07-18", "--model", "gpt-4o-mini")
    assert "2026-11-01" in listed.output
    assert "0.60 usd / 1,000,000" in shown.output
