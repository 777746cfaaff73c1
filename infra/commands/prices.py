"""`scrip prices`: see the price book, and import into it what the installed genai-prices package knows. Works offline.

What the price book cannot express is named. A model whose tokens it cannot price exactly is left out: use of it waits
for a price, rather than being charged a wrong one.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from importlib.metadata import version as installed_version
from typing import TYPE_CHECKING, Annotated, Final

import typer
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from contracts.pricing import PRICE_DECIMALS_MAX, PRICE_MAX, STANDARD_TIERS
from contracts.times import Time
from contracts.usage import ModelName, ProviderName
from infra.errors import BadInput, StackError
from infra.listing import show_rows
from infra.service_api import Json, ServiceApi

if TYPE_CHECKING:
    from genai_prices.types import ModelInfo, ModelPrice, PriceVariant

PACKAGE: Final = "genai-prices"
# By then every process of metering and every gateway knows the new version, so that none prices with the old one.
AHEAD: Final = timedelta(seconds=15)
MILLION: Final = 1_000_000
NAMES_SHOWN_MAX: Final = 8

Model = tuple[str, str]

# What genai-prices has prices of, in its order, and what the book calls that.
_QUANTITIES: Final[Mapping[str, tuple[str, int]]] = {
    "input_mtok": ("input_tokens", MILLION),
    "output_mtok": ("output_tokens", MILLION),
    "cache_read_mtok": ("cached_input_tokens", MILLION),
    "cache_write_mtok": ("cache_write_tokens", MILLION),
    "cache_write_1h_mtok": ("cache_write_1h_tokens", MILLION),
    "input_audio_mtok": ("input_audio_tokens", MILLION),
    "input_image_mtok": ("input_image_tokens", MILLION),
    "input_video_mtok": ("input_video_tokens", MILLION),
    "cache_audio_read_mtok": ("cached_audio_tokens", MILLION),
    "cache_image_read_mtok": ("cached_image_tokens", MILLION),
    "output_reasoning_mtok": ("reasoning_tokens", MILLION),
    "output_citation_mtok": ("citation_tokens", MILLION),
    "output_audio_mtok": ("output_audio_tokens", MILLION),
    "output_image_mtok": ("output_image_tokens", MILLION),
    "output_video_mtok": ("output_video_tokens", MILLION),
    "input_mchars": ("characters", MILLION),
    "input_text_messages_kcount": ("messages", 1_000),
    "input_document_kpages": ("pages", 1_000),
    "input_annotated_document_kpages": ("annotated_pages", 1_000),
    "web_searches_kcount": ("tool_calls.web_search", 1_000),
    "social_searches_kcount": ("tool_calls.social_search", 1_000),
    "storage_searches_kcount": ("tool_calls.storage_search", 1_000),
    "code_executions_kcount": ("tool_calls.code_execution", 1_000),
    "rerank_searches_kcount": ("tool_calls.rerank_search", 1_000),
    "requests_kcount": ("calls", 1_000),
}
# Prices by the hour: of a second they have no exact one. They stand beside the tokens, and use that has any waits.
_BY_THE_HOUR: Final = frozenset({"audio_hours", "input_audio_hours"})
# Under what genai-prices says of a call which service tier it is.
_TIER_KEYS: Final = frozenset({"service_tier", "speed", "processing"})
_TIME: Final[TypeAdapter[datetime]] = TypeAdapter(Time)
_NAME: Final[TypeAdapter[tuple[str, str]]] = TypeAdapter(tuple[ProviderName, ModelName])

prices = typer.Typer(name="prices", help="The price book: list, show, import; receipts.", no_args_is_help=True)


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
        raise BadInput(f"{PACKAGE} knows no provider {', '.join(unknown)}; it knows {', '.join(sorted(snapshot))}.")
    known = Known()
    found = set()
    for provider in sorted(providers):
        for model in snapshot[provider].models:
            if not models or model.id in models:
                found.add(model.id)
                _read_model(known, provider=provider, model=model, at=at)
    if missing := sorted(set(models) - found):
        raise BadInput(f"{PACKAGE} has no price of {', '.join(missing)} from {', '.join(sorted(providers))}.")
    return known


def _read_model(known: Known, *, provider: str, model: "ModelInfo", at: datetime) -> None:
    name = f"{provider}/{model.id}"
    said = model.get_prices(at)
    if why := _why_left_out(provider, model, said):
        known.left_out.setdefault(why, []).append(name)
        return
    rates = list(_rates(said, service_tier=None))
    for service_tier, variants in _tiers(model, at).items():
        # One that says nothing says that calls at the tier cost the same.
        of_tier = [each for variant in variants for each in _rates(variant, service_tier=service_tier)]
        rates += of_tier or list(_rates(said, service_tier=service_tier))
    # Of two variants for one call the first one counts.
    first: dict[tuple[str, str | None], Json] = {}
    for each in rates:
        first.setdefault((each["quantity"], each.get("service_tier")), each)
    known.rates[provider, model.id] = list(first.values())
    for what in _not_expressible(model, said, at=at):
        known.not_expressible.setdefault(what, []).append(name)


def _rates(said: "ModelPrice", *, service_tier: str | None) -> Iterable[Json]:
    """The rates that prices are, as the book has them."""
    from genai_prices.types import TieredPrices  # noqa: PLC0415 - a third of a second, for this command alone

    for key, (quantity, per) in _QUANTITIES.items():
        price = vars(said).get(key)
        if price is None:
            continue
        rate: Json = {"quantity": quantity, "unit": "usd", "per": per}
        if isinstance(price, TieredPrices):
            rate["price"] = f"{price.base:f}"
            rate["above"] = [{"tokens": tier.start, "price": f"{tier.price:f}"} for tier in price.tiers]
        else:
            rate["price"] = f"{price:f}"
        yield rate if service_tier is None else {**rate, "service_tier": service_tier}


def _tiers(model: "ModelInfo", at: datetime) -> dict[str, list["ModelPrice"]]:
    """The prices of service tiers, at a time."""
    found: dict[str, list[ModelPrice]] = {}
    for variant in model.price_variants or ():
        tier = _tier_of(variant)
        if tier is not None and (variant.constraint is None or variant.constraint.active(at)):
            found.setdefault(tier, []).append(variant.prices)
    return {tier: prices for tier, prices in found.items() if tier not in STANDARD_TIERS}


def _tier_of(variant: "PriceVariant") -> str | None:
    """The service tier that a variant is for; None if it depends on something else."""
    ((key, value), *others) = variant.when.items()
    return value if key in _TIER_KEYS and not others else None


def _why_left_out(provider: str, model: "ModelInfo", said: "ModelPrice") -> str | None:
    """Why the book cannot price calls of the model exactly; None if it can."""
    from genai_prices.types import TieredPrices, TimeOfDateConstraint  # noqa: PLC0415 - as above

    try:
        _NAME.validate_python((provider, model.id))
    except ValidationError:
        return "a name that usage events cannot carry"
    if isinstance(model.prices, list) and any(
        isinstance(each.constraint, TimeOfDateConstraint) for each in model.prices
    ):
        return "prices by time of day"
    values = {key: value for key, value in vars(said).items() if value is not None and not key.startswith("_")}
    if unknown := sorted(values.keys() - _QUANTITIES.keys() - _BY_THE_HOUR):
        return f"a price of {', '.join(unknown)}, which usage events do not tell apart"
    if not values.keys() & _QUANTITIES.keys():
        return "prices by the hour alone" if values else "no price at all"
    plain = [
        price
        for value in values.values()
        for price in (
            (value.base, *(tier.price for tier in value.tiers)) if isinstance(value, TieredPrices) else (value,)
        )
    ]
    if not all(_is_exact(value) for value in plain if isinstance(value, Decimal)):
        return f"a price with more than {PRICE_DECIMALS_MAX} decimals, or out of bounds"
    return None


def _is_exact(price: Decimal) -> bool:
    exponent = price.as_tuple().exponent
    return isinstance(exponent, int) and exponent >= -PRICE_DECIMALS_MAX and 0 <= price <= PRICE_MAX


def _not_expressible(model: "ModelInfo", said: "ModelPrice", *, at: datetime) -> Iterable[str]:
    """What else the model has prices of. Use that has such a thing waits, or costs what it costs without it."""
    if any(vars(said).get(key) is not None for key in _BY_THE_HOUR):
        yield "audio by the hour"
    if others := {key for each in model.price_variants or () if _tier_of(each) is None for key in each.when}:
        yield "variants: " + ", ".join(sorted(others))
    if isinstance(model.prices, list):
        starts = [getattr(each.constraint, "start_date", None) for each in model.prices]
        if later := sorted(start for start in starts if start is not None and start > at.date()):
            yield f"another price from {later[0].isoformat()} on: import again then"


# The next version -----------------------------------------------------------------------------------------------------


def next_version(
    known: Known,
    *,
    base: Sequence[Json],
    units: Collection[str],
    id: str,
    effective_at: datetime,
    further: Json | None = None,
) -> Json:
    """The version to post: the models of `base` as they are, but those known with the rates that are known.

    A version lists all models that have a price. What a model costs in other units than usd stays; a new one counts
    tokens and calls in the units of that name. `further` is what the version says besides, and says on.
    """
    models: dict[Model, list[Json]] = {(each["provider"], each["model"]): list(each["rates"]) for each in base}
    for model, rates in known.rates.items():
        if model in models:
            others = [each for each in models[model] if each["unit"] != "usd"]
        else:
            others = [each for each in _COUNTING if each["unit"] in units]
        models[model] = [*rates, *others]
    return {
        **(further or {}),
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
    rows = [
        (each["id"], each["effective_at"], each["recorded_at"], each["source"], str(each["models"]))
        for each in _metering().get("/api/v1/price-book/versions")["versions"]
    ]
    show_rows(Console(), ("id", "takes effect", "recorded", "by", "models"), rows, numbers=("models",))


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
    columns = [Column(name, overflow="fold") for name in ("model", "quantity", "price")]
    table = Table(*columns, title=f"{chosen['id']}, from {chosen['effective_at']}")
    for each in chosen["models"]:
        if provider in (None, each["provider"]) and model in (None, each["model"]):
            for rate in each["rates"]:
                table.add_row(Text(_name(each)), _quantity(rate), _shown(rate))
    console = Console()
    console.print(table)
    for name in ("prices", "markup", "own_key_fees", "plans", "accounts"):
        for each in chosen.get(name, []):
            console.print(
                f"{name}: {json.dumps(each, ensure_ascii=False)}", markup=False, highlight=False, soft_wrap=True
            )


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
    models = base.get("models", [])
    chosen = provider or sorted({each["provider"] for each in models})
    known = read_known(providers=chosen, models=model or (), at=at)
    body = next_version(
        known,
        base=models,
        further={name: value for name, value in base.items() if name not in ("id", "effective_at", "models")},
        units={each["name"] for each in book["units"]},
        id=version_id or f"{PACKAGE}-{installed_version(PACKAGE)}-{at:%Y%m%dT%H%M%SZ}",
        effective_at=at,
    )
    found = _posted(metering, body, dry_run=True, backdate=backdate)
    _show_difference(console, found)
    _show_names(console, "Imported without what the price book cannot express:", known.not_expressible)
    _show_names(console, "Left out, for the price book cannot express:", known.left_out)
    if found["unchanged"] or not (found["added"] or found["removed"] or found["changed"] or found["others"]):
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


@prices.command("receipt")
def show_receipt(
    event: Annotated[str, typer.Argument(help="The id of an event.")],
    *,
    source: Annotated[str | None, typer.Option(help="Who reported it, if several have that id.")] = None,
    account: Annotated[str | None, typer.Option(help="Whose it is, if several have that id.")] = None,
) -> None:
    """Explain what an event cost, to the last digit; or what it waits for."""
    query = {name: value for name, value in (("source", source), ("account", account)) if value is not None}
    found = _metering().get("/api/v1/receipts", {"id": event, **query})
    console = Console()
    if found["status"] != "charged":
        waits = f", waits for {found['waits_for']}" if found["waits_for"] else ""
        console.print(f"{event} is {found['status']}{waits}", markup=False, highlight=False)
        _show_corrections(console, found["corrections"])
        return
    bundle = found["bundle"]
    place = "no line of its own"
    if bundle is not None:
        place = f"partition {bundle['partition']}, bundle {bundle['number']}, line {bundle['line']}"
    items = [
        (each["quantity"], str(each["count"]), _shown(each), each["tier"] or "", f"{each['exact']} {each['unit']}")
        for each in found["items"]
    ]
    title = f"{event}, under {found['price_version']}: {place}"
    show_rows(
        console,
        ("quantity", "count", "price", "tier", "exact"),
        items,
        title=title,
        otherwise="Nothing of it has a price.",
    )
    for each in found["amounts"]:
        rounded = "" if each["exact"] is None else f" = {each['exact']}, rounded by {each['rounding']}"
        console.print(f"{each['amount']} {each['unit']}{rounded}", markup=False, highlight=False, soft_wrap=True)
    _show_corrections(console, found["corrections"])


def _show_corrections(console: Console, corrections: Sequence[Json]) -> None:
    """Print how an event came to be what it is."""
    for each in corrections:
        difference = ", ".join(f"{amount} {unit}" for unit, amount in each["difference"].items()) or "no difference"
        became = "void" if each["to_revision"] is None else each["to_revision"]
        from_revision = "nothing" if each["from_revision"] is None else f"version {each['from_revision']}"
        undone = ", undone" if each["undone"] else ""
        console.print(
            f"{each['kind']} {each['id']} by {each['actor']}, {from_revision} to {became}: {difference}"
            f" ({each['reason']}){undone}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _read_time(text: str) -> datetime:
    try:
        return _TIME.validate_python(text).astimezone(UTC)
    except ValidationError as error:
        raise BadInput(f"{text!r} is no time: it must look like 2026-11-01T00:00:00Z.") from error


def _show_difference(console: Console, found: Json) -> None:
    """Print what a version changes, rate by rate."""
    # However narrow it is: nobody agrees to a price of he does not see what.
    columns = [Column(name, overflow="fold") for name in ("model", "quantity", "unit", "old", "new")]
    table = Table(*columns, title=f"against {found['compared_with'] or 'nothing'}")
    for each, old_or_new in (
        *((each, "new") for each in found["added"]),
        *((each, "old") for each in found["removed"]),
        *((each, None) for each in found["changed"]),
    ):
        for rate in each["rates"]:
            old = rate.get("old") if old_or_new is None else rate if old_or_new == "old" else None
            new = rate.get("new") if old_or_new is None else rate if old_or_new == "new" else None
            cells = (_quantity(rate), rate["unit"], _shown(old), _shown(new))
            table.add_row(Text(_name(each)), *cells)
    if table.row_count:
        console.print(table)
    for each in found["others"]:
        console.print(f"changed: {each}", markup=False, highlight=False)
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
    above = "".join(f", {each['price']} above {each['tokens']:,}" for each in rate.get("above") or ())
    return f"{rate['price']}{above} {rate['unit']}{per}"


def _quantity(rate: Json) -> str:
    tier = rate.get("service_tier")
    return rate["quantity"] if tier is None else f"{rate['quantity']} ({tier})"


def _metering() -> ServiceApi:
    return ServiceApi.running("metering")


def _posted(metering: ServiceApi, version: Json, *, dry_run: bool, backdate: bool) -> Json:
    return metering.post("/api/v1/price-book", version, query={"dry_run": dry_run, "backdate": backdate})


def _base(metering: ServiceApi, at: datetime, book: Json) -> Json:
    """The version that a new one would take over from; nothing before the first."""
    versions = metering.get("/api/v1/price-book/versions")["versions"]
    before = [each["id"] for each in versions if datetime.fromisoformat(each["effective_at"]) <= at]
    if not before:
        return {}
    found = [each for each in book["versions"] if each["id"] == before[-1]]
    chosen: Sequence[Json] = found or metering.get("/api/v1/price-book", {"version": before[-1]})["versions"]
    return chosen[0]
