"""`scrip prices`: see the price book, and import into it what the installed genai-prices package knows. Works offline.

What the price book cannot express is named. A model whose plain tokens it cannot price exactly is left out: use of it
waits for a price, rather than being charged a wrong one.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from importlib.metadata import version as installed_version
from typing import TYPE_CHECKING, Annotated, Final

import typer
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from contracts.pricing import PRICE_DECIMALS_MAX, PRICE_MAX
from contracts.times import Time
from contracts.usage import ModelName, ProviderName
from infra.errors import StackError
from infra.service_api import Json, ServiceApi

if TYPE_CHECKING:
    from genai_prices.types import ModelInfo, ModelPrice

PACKAGE: Final = "genai-prices"
# By then every process of metering and every gateway knows the new version, so that none prices with the old one.
AHEAD: Final = timedelta(seconds=15)
MILLION: Final = 1_000_000
NAMES_SHOWN_MAX: Final = 8

Model = tuple[str, str]

# Names in genai-prices, and what they are called here when the book cannot express them.
_INPUT, _OUTPUT, _REQUESTS = "input_mtok", "output_mtok", "requests_kcount"
_NAMED: Final = {"cache_read_mtok": "cached_input", "cache_write_mtok": "cache_writes"}
# Part of the output of any call: the plain price of output would be a wrong one.
_OF_ALL_OUTPUT: Final = ("output_reasoning_mtok", "output_citation_mtok")
_TIME: Final[TypeAdapter[datetime]] = TypeAdapter(Time)
_NAME: Final[TypeAdapter[tuple[str, str]]] = TypeAdapter(tuple[ProviderName, ModelName])

prices = typer.Typer(name="prices", help="The price book: list, show, import.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.add_typer(prices)


# What genai-prices says -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Known:
    """What genai-prices knows of models: their rates in usd; what of it is not expressible; and who is left out."""

    rates: dict[Model, list[Json]] = field(default_factory=dict)
    not_expressible: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)


def read_known(*, providers: Collection[str], models: Collection[str], at: datetime) -> Known:
    """The prices of the providers' models at a time; of all their models, or of those named. StackError."""
    from genai_prices.data_snapshot import get_snapshot  # noqa: PLC0415 - a third of a second, for this command alone

    snapshot = {provider.id: provider for provider in get_snapshot().providers}
    if unknown := sorted(set(providers) - snapshot.keys()):
        raise StackError(f"{PACKAGE} knows no provider {', '.join(unknown)}; it knows {', '.join(sorted(snapshot))}.")
    known = Known()
    found = set()
    for provider in sorted(providers):
        for model in snapshot[provider].models:
            if not models or model.id in models:
                found.add(model.id)
                _read_model(known, provider=provider, model=model, at=at)
    if missing := sorted(set(models) - found):
        raise StackError(f"{PACKAGE} has no price of {', '.join(missing)} from {', '.join(sorted(providers))}.")
    return known


def _read_model(known: Known, *, provider: str, model: "ModelInfo", at: datetime) -> None:
    name = f"{provider}/{model.id}"
    said = model.get_prices(at)
    if why := _why_left_out(provider, model, said):
        known.left_out.setdefault(why, []).append(name)
        return
    per = {_INPUT: ("input_tokens", MILLION), _OUTPUT: ("output_tokens", MILLION), _REQUESTS: ("calls", 1_000)}
    known.rates[provider, model.id] = [
        {"quantity": quantity, "unit": "usd", "price": f"{price:f}", "per": count}
        for key, (quantity, count) in per.items()
        if (price := vars(said).get(key)) is not None
    ]
    for what in _not_expressible(model, said, at=at):
        known.not_expressible.setdefault(what, []).append(name)


def _why_left_out(provider: str, model: "ModelInfo", said: "ModelPrice") -> str | None:
    """Why the book cannot price a plain call of the model exactly; None if it can."""
    from genai_prices.types import TieredPrices, TimeOfDateConstraint  # noqa: PLC0415 - as above

    try:
        _NAME.validate_python((provider, model.id))
    except ValidationError:
        return "a name that usage events cannot carry"
    if isinstance(model.prices, list) and any(
        isinstance(each.constraint, TimeOfDateConstraint) for each in model.prices
    ):
        return "prices by time of day"
    values = vars(said)
    plain = [values.get(key) for key in (_INPUT, _OUTPUT, _REQUESTS)]
    reasons = {
        "tiers: prices by the length of the input": any(isinstance(value, TieredPrices) for value in plain),
        "no price of input or of output tokens": None in plain[:2],
        "another price for a part of the output": any(values.get(key) is not None for key in _OF_ALL_OUTPUT),
        f"a price with more than {PRICE_DECIMALS_MAX} decimals, or out of bounds": not all(
            _is_exact(value) for value in plain if isinstance(value, Decimal)
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _is_exact(price: Decimal) -> bool:
    exponent = price.as_tuple().exponent
    return isinstance(exponent, int) and exponent >= -PRICE_DECIMALS_MAX and 0 <= price <= PRICE_MAX


def _not_expressible(model: "ModelInfo", said: "ModelPrice", *, at: datetime) -> Iterable[str]:
    """What else the model has prices of: usage events do not carry it, and it is charged as plain tokens, or not."""
    for key, value in vars(said).items():
        if value is not None and key not in {_INPUT, _OUTPUT, _REQUESTS} and not key.startswith("_"):
            yield _NAMED.get(key, key.removesuffix("_mtok").removesuffix("_kcount"))
    if model.price_variants:
        yield "variants: " + ", ".join(sorted({key for each in model.price_variants for key in each.when}))
    if isinstance(model.prices, list):
        starts = [getattr(each.constraint, "start_date", None) for each in model.prices]
        if later := sorted(start for start in starts if start is not None and start > at.date()):
            yield f"another price from {later[0].isoformat()} on: import again then"


# The next version -----------------------------------------------------------------------------------------------------


def next_version(
    known: Known, *, base: Sequence[Json], units: Collection[str], id: str, effective_at: datetime
) -> Json:
    """The version to post: the models of `base` as they are, but those known with the rates that are known.

    A version lists all models that have a price. What a model costs in other units than usd stays; a new one counts
    tokens and calls in the units of that name.
    """
    models: dict[Model, list[Json]] = {(each["provider"], each["model"]): list(each["rates"]) for each in base}
    for model, rates in known.rates.items():
        if model in models:
            others = [each for each in models[model] if each["unit"] != "usd"]
        else:
            others = [each for each in _COUNTING if each["unit"] in units]
        models[model] = [*rates, *others]
    return {
        "id": id,
        "effective_at": effective_at.isoformat(),
        "models": [
            {"provider": provider, "model": model, "rates": rates}
            for (provider, model), rates in sorted(models.items())
        ],
    }


_COUNTING: Final[Sequence[Json]] = (
    {"quantity": "input_tokens", "unit": "tokens", "price": "1", "per": 1},
    {"quantity": "output_tokens", "unit": "tokens", "price": "1", "per": 1},
    {"quantity": "calls", "unit": "calls", "price": "1", "per": 1},
)


# Commands -------------------------------------------------------------------------------------------------------------


@prices.command("list")
def list_versions() -> None:
    """List the versions of the price book, in the order in which they take effect."""
    table = Table("id", "takes effect", "recorded", "by", "models")
    for each in _metering().get("/api/v1/price-book/versions")["versions"]:
        cells = (each["id"], each["effective_at"], each["recorded_at"], each["source"], str(each["models"]))
        table.add_row(*map(Text, cells))
    Console().print(table)


@prices.command("show")
def show_version(
    version_id: Annotated[
        str | None, typer.Argument(help="The id that `list` shows. Default: the one in force.")
    ] = None,
    *,
    provider: Annotated[str | None, typer.Option(help="Only models of this provider.")] = None,
    model: Annotated[str | None, typer.Option(help="Only this model.")] = None,
) -> None:
    """Show what models cost under a version."""
    query = {} if version_id is None else {"version": version_id}
    versions = _metering().get("/api/v1/price-book", query)["versions"]
    if not versions:
        raise StackError("The price book is empty.")
    chosen = versions[0]
    table = Table("model", "quantity", "price", title=f"{chosen['id']}, from {chosen['effective_at']}")
    for each in chosen["models"]:
        if provider in (None, each["provider"]) and model in (None, each["model"]):
            for rate in each["rates"]:
                table.add_row(Text(_name(each)), rate["quantity"], _shown(rate))
    Console().print(table)


@prices.command("import")
def import_prices(
    *,
    provider: Annotated[
        list[str] | None, typer.Option(help="A provider; may be repeated. Default: those in the price book.")
    ] = None,
    model: Annotated[list[str] | None, typer.Option(help="A model; may be repeated. Default: all.")] = None,
    effective_at: Annotated[
        str | None, typer.Option(help="From when on, 2026-11-01T00:00:00Z. Default: in a few seconds.")
    ] = None,
    version_id: Annotated[str | None, typer.Option("--id", help="The new version's id.")] = None,
    backdate: Annotated[
        bool, typer.Option("--backdate", help="It may take effect in the past. No charge is changed by that.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would change.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Import prices of genai-prices as a new version of the price book. Shows what changes, and asks.

    All other models keep their price. What was charged is never changed.
    """
    console = Console()
    metering = _metering()
    at = datetime.now(UTC).replace(microsecond=0) + AHEAD if effective_at is None else _read_time(effective_at)
    book = metering.get("/api/v1/price-book")
    base = _base(metering, at, book)
    chosen = provider or sorted({each["provider"] for each in base})
    known = read_known(providers=chosen, models=model or (), at=at)
    body = next_version(
        known,
        base=base,
        units={each["name"] for each in book["units"]},
        id=version_id or f"{PACKAGE}-{installed_version(PACKAGE)}-{at:%Y%m%dT%H%M%SZ}",
        effective_at=at,
    )
    found = _posted(metering, body, dry_run=True, backdate=backdate)
    _show_difference(console, found)
    _show_names(console, "Imported without what the price book cannot express:", known.not_expressible)
    _show_names(console, "Left out, for the price book cannot express:", known.left_out)
    if found["unchanged"] or not (found["added"] or found["removed"] or found["changed"]):
        console.print("Nothing to import: the price book says the same.")
        return
    if dry_run:
        return
    if not yes and not typer.confirm(f"Store version {body['id']}, in force from {at.isoformat()} on, for good?"):
        raise typer.Exit(1)
    if effective_at is None:
        # Whoever took a while to answer has not backdated anything.
        body["effective_at"] = max(at, datetime.now(UTC).replace(microsecond=0) + AHEAD).isoformat()
    stored = _posted(metering, body, dry_run=False, backdate=backdate)
    console.print(
        f"{stored['id']} is stored and in force from {stored['effective_at']} on", markup=False, highlight=False
    )


def _read_time(text: str) -> datetime:
    try:
        return _TIME.validate_python(text).astimezone(UTC)
    except ValidationError as error:
        raise StackError(f"{text!r} is no time: it must look like 2026-11-01T00:00:00Z.") from error


def _show_difference(console: Console, found: Json) -> None:
    """Print what a version changes, rate by rate."""
    table = Table("model", "quantity", "unit", "old", "new", title=f"against {found['compared_with'] or 'nothing'}")
    for each, old_or_new in (
        *((each, "new") for each in found["added"]),
        *((each, "old") for each in found["removed"]),
        *((each, None) for each in found["changed"]),
    ):
        for rate in each["rates"]:
            old = rate.get("old") if old_or_new is None else rate if old_or_new == "old" else None
            new = rate.get("new") if old_or_new is None else rate if old_or_new == "new" else None
            cells = (rate["quantity"], rate["unit"], _shown(old), _shown(new))
            table.add_row(Text(_name(each)), *cells)
    if table.row_count:
        console.print(table)
    console.print(
        f"{len(found['added'])} models added, {len(found['changed'])} changed, {len(found['removed'])} removed"
    )


def _show_names(console: Console, heading: str, names: Mapping[str, Sequence[str]]) -> None:
    if not names:
        return
    console.print(heading)
    for what in sorted(names):
        shown = ", ".join(names[what][:NAMES_SHOWN_MAX])
        more = len(names[what]) - NAMES_SHOWN_MAX
        said = f"  {what} ({len(names[what])}): {shown}" + (f" and {more} more" if more > 0 else "")
        console.print(said, markup=False, highlight=False, soft_wrap=True)


def _name(of: Json) -> str:
    return f"{of['provider']}/{of['model']}"


def _shown(rate: Json | None) -> str:
    if rate is None:
        return "–"
    per = "" if rate["per"] == 1 else f" / {rate['per']:,}"
    return f"{rate['price']} {rate['unit']}{per}"


def _metering() -> ServiceApi:
    return ServiceApi.running("metering")


def _posted(metering: ServiceApi, version: Json, *, dry_run: bool, backdate: bool) -> Json:
    return metering.post("/api/v1/price-book", version, query={"dry_run": dry_run, "backdate": backdate})


def _base(metering: ServiceApi, at: datetime, book: Json) -> Sequence[Json]:
    """The models of the version that a new one would take over from; none before the first."""
    versions = metering.get("/api/v1/price-book/versions")["versions"]
    before = [each["id"] for each in versions if datetime.fromisoformat(each["effective_at"]) <= at]
    if not before:
        return []
    found = [each for each in book["versions"] if each["id"] == before[-1]]
    chosen = found or metering.get("/api/v1/price-book", {"version": before[-1]})["versions"]
    models: Sequence[Json] = chosen[0]["models"]
    return models
