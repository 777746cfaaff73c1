"""The price book in JSON: as it is posted, stored, written in the catalogue, and read by whoever quotes."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC
from decimal import Decimal
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from contracts.accounts import AccountId
from contracts.envelope import EventType, Problem
from contracts.money import SCALE_MAX, Unit, UnitName
from contracts.pricing import (
    Override,
    OwnPrice,
    Period,
    PriceKind,
    PriceVersion,
    Quantity,
    Rate,
    Surcharge,
    Tier,
    lacking_joins,
)
from contracts.times import Time
from contracts.usage import MODEL_USED, ModelName, ProviderName, ServiceTier

# Of a price version.
MODELS_MAX: Final = 5_000
RATES_MAX: Final = 256
OVERRIDES_MAX: Final = 10_000

PriceText = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,11})(\.[0-9]{1,18})?$", examples=["0.15"])]
PercentText = Annotated[str, Field(pattern=r"^-?(0|[1-9][0-9]{0,5})(\.[0-9]{1,6})?$", examples=["20"])]
QuantityText = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,15})(\.[0-9]{1,9})?$", examples=["1000"])]
# Where in an event's data something stands.
DataPlace = Annotated[str, Field(pattern=r"^[^.\x00-\x1f]{1,64}(\.[^.\x00-\x1f]{1,64}){0,7}$", examples=["pages"])]
PriceName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$", examples=["renders", "pro"])]


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class AboveRow(_Row):
    """With more input tokens than `tokens` the whole call costs this price."""

    tokens: Annotated[int, Field(ge=0, le=10**9)]
    price: PriceText


class RateRow(_Row):
    """`price` of `unit` for every `per` of a quantity. The price is a decimal string, `per` a power of ten.

    `above`: other prices for calls with a longer input, in rising order. `service_tier`: for calls served at it.
    """

    quantity: Quantity
    unit: UnitName
    price: PriceText
    per: Annotated[int, Field(ge=1, le=10**12, examples=[1_000_000])]
    # Not written when they say nothing: readers of before know no such fields.
    above: Annotated[list[AboveRow], Field(max_length=16, exclude_if=lambda value: not value)] = []
    service_tier: Annotated[ServiceTier | None, Field(exclude_if=lambda value: value is None)] = None


class ModelRow(_Row):
    """What a model costs."""

    provider: ProviderName
    model: ModelName
    rates: Annotated[list[RateRow], Field(min_length=1, max_length=RATES_MAX)]


class TierRow(_Row):
    """The price up to `up_to`, included; null: however much it is."""

    up_to: QuantityText | None = None
    price: PriceText


class OwnPriceRow(_Row):
    """What events of a type cost (contracts.pricing.OwnPrice). It has either one `price`, or `tiers`."""

    id: PriceName
    type: EventType
    unit: UnitName
    kind: PriceKind = "per_unit"
    price: PriceText | None = None
    tiers: Annotated[list[TierRow], Field(max_length=64)] = []
    quantity: DataPlace | None = None
    per: Annotated[int, Field(ge=1, le=10**12)] = 1
    free: QuantityText = "0"
    minimum: PriceText = "0"
    period: Period | None = None
    where: Annotated[dict[DataPlace, Annotated[str, Field(max_length=512)]], Field(max_length=16)] = {}


class SurchargeRow(_Row):
    """What is added in a unit: `percent` of the cost, below 0 a discount, and a `fixed` amount for each call."""

    unit: UnitName
    percent: PercentText = "0"
    fixed: PriceText = "0"


class _OverrideRow(_Row):
    models: Annotated[list[ModelRow], Field(max_length=MODELS_MAX)] = []
    prices: Annotated[list[OwnPriceRow], Field(max_length=1_000)] = []
    markup: Annotated[list[SurchargeRow], Field(max_length=16)] | None = None
    own_key_fees: Annotated[list[SurchargeRow], Field(max_length=16)] | None = None


class PlanRow(_OverrideRow):
    """What accounts on a plan, and all below them, pay otherwise. Null: as the version says."""

    plan: PriceName
    accounts: Annotated[list[AccountId], Field(max_length=OVERRIDES_MAX)]


class AccountRow(_OverrideRow):
    """What an account, and all below it, pays otherwise: before what its plan says."""

    account: AccountId


class FurtherRow(_Row):
    """What a version says beyond what models cost."""

    prices: Annotated[list[OwnPriceRow], Field(max_length=1_000)] = []
    markup: Annotated[list[SurchargeRow], Field(max_length=16)] = []
    own_key_fees: Annotated[list[SurchargeRow], Field(max_length=16)] = []
    plans: Annotated[list[PlanRow], Field(max_length=1_000)] = []
    accounts: Annotated[list[AccountRow], Field(max_length=OVERRIDES_MAX)] = []


class VersionRow(FurtherRow):
    """A state of the price book: all models, and all types of events, that have a price from `effective_at` on."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", examples=["2026-11-01"])]
    effective_at: Time
    models: Annotated[list[ModelRow], Field(max_length=MODELS_MAX)]


class UnitRow(_Row):
    """A unit. `scale` is the number of decimals of its step; `mirrors`: a cap that counts what is paid in that unit."""

    name: UnitName
    kind: Literal["money", "cap"]
    scale: Annotated[int, Field(ge=0, le=SCALE_MAX)]
    own_key_counts: bool = False
    mirrors: UnitName | None = None


class PriceBookRow(_Row):
    """Units, and price versions in the order in which they take effect."""

    units: list[UnitRow]
    versions: list[VersionRow]


class InvalidVersion(ValueError):
    """A price version that cannot be read; carries every problem found. Their fields are places, `models/0/rates/1`."""

    def __init__(self, id: str, problems: Sequence[Problem]) -> None:
        super().__init__(
            f"price version {id} cannot be used: " + "; ".join(f"{each.field}: {each.message}" for each in problems)
        )
        self.problems = problems


# From JSON ------------------------------------------------------------------------------------------------------------


def read_version(row: VersionRow, *, units: Mapping[str, Unit]) -> PriceVersion:
    """A price version. Raises InvalidVersion with every problem."""
    reader = _Reader(units)
    rates = reader.models(row.models, "models")
    for place, model in enumerate(row.models):
        for lacking in lacking_joins(rates[model.provider, model.model]):
            reader.say(f"models/{place}", f"{model.provider}/{model.model} {lacking}")
    version = PriceVersion(
        id=row.id,
        effective_at=row.effective_at.astimezone(UTC),
        rates=rates,
        prices=reader.prices(row.prices, "prices"),
        markup=reader.surcharges(row.markup, "markup"),
        own_key_fees=reader.fees(row.own_key_fees, "own_key_fees"),
        plans=reader.once(
            [(each.plan, reader.override(each, at)) for at, each in _placed("plans", row.plans)], "plans"
        ),
        accounts=reader.once(
            [(each.account, reader.override(each, at)) for at, each in _placed("accounts", row.accounts)], "accounts"
        ),
        members=reader.once([(account, each.plan) for each in row.plans for account in each.accounts], "plans"),
    )
    for kind, overrides in (("plans", version.plans), ("accounts", version.accounts)):
        for name, override in overrides.items():
            reader.check_override(version, override, f"{kind}/{name}")
    if reader.problems:
        raise InvalidVersion(row.id, reader.problems)
    return version


Kept = TypeVar("Kept")
Listed = TypeVar("Listed", bound=_Row)


def _placed(name: str, rows: Sequence[Listed]) -> Iterable[tuple[str, Listed]]:
    return ((f"{name}/{place}", row) for place, row in enumerate(rows))


class _Reader:
    """Reads rows, and keeps what is wrong with them."""

    def __init__(self, units: Mapping[str, Unit]) -> None:
        self.problems: list[Problem] = []
        self._units = units

    def say(self, place: str, message: str) -> None:
        """Something is wrong."""
        self.problems.append(Problem(place, message))

    def once(self, named: Sequence[tuple[str, Kept]], place: str) -> dict[str, Kept]:
        """What is listed by name, each once."""
        found: dict[str, Kept] = {}
        for name, value in named:
            if name in found:
                self.say(place, f"{name} is listed twice")
            found[name] = value
        return found

    def models(self, rows: Sequence[ModelRow], place: str) -> dict[tuple[str, str], tuple[Rate, ...]]:
        """What models cost."""
        found: dict[tuple[str, str], tuple[Rate, ...]] = {}
        for at, model in _placed(place, rows):
            name = f"{model.provider}/{model.model}"
            if (model.provider, model.model) in found:
                self.say(at, f"{name} is listed twice")
            read: dict[tuple[str, str, str | None], Rate] = {}
            for where, each in _placed(f"{at}/rates", model.rates):
                self._check_unit(each.unit, where, name)
                try:
                    rate = Rate(
                        quantity=each.quantity,
                        unit=each.unit,
                        price=Decimal(each.price),
                        per=each.per,
                        above=tuple((above.tokens, Decimal(above.price)) for above in each.above),
                        service_tier=each.service_tier,
                    )
                except ValueError as error:
                    self.say(where, str(error))
                    continue
                if rate.place in read:
                    of_tier = f" at {each.service_tier}" if each.service_tier else ""
                    self.say(where, f"{name} has two rates for {each.quantity} in {each.unit}{of_tier}")
                read[rate.place] = rate
            found[model.provider, model.model] = tuple(read.values())
        return found

    def prices(self, rows: Sequence[OwnPriceRow], place: str) -> tuple[OwnPrice, ...]:
        """Own prices."""
        named = []
        for at, row in _placed(place, rows):
            self._check_unit(row.unit, at, row.id)
            if (row.price is None) == (not row.tiers):
                self.say(at, f"{row.id} has either one price, or tiers")
                continue
            if row.type == MODEL_USED and row.period is not None:
                # Who quotes a call does not know what was used before.
                self.say(at, f"{row.id} has a period, and a price for {MODEL_USED} must be of each call alone")
            tiers = [TierRow(price=row.price)] if row.price is not None else row.tiers
            try:
                price = OwnPrice(
                    id=row.id,
                    type=row.type,
                    unit=row.unit,
                    kind=row.kind,
                    tiers=tuple(
                        Tier(None if each.up_to is None else Decimal(each.up_to), Decimal(each.price)) for each in tiers
                    ),
                    quantity=row.quantity,
                    per=row.per,
                    free=Decimal(row.free),
                    minimum=Decimal(row.minimum),
                    period=row.period,
                    where=tuple(sorted(row.where.items())),
                )
            except ValueError as error:
                self.say(at, f"{row.id}: {error}")
            else:
                named.append((row.id, price))
        return tuple(self.once(named, place).values())

    def surcharges(self, rows: Sequence[SurchargeRow], place: str) -> tuple[Surcharge, ...]:
        """Surcharges, one for a unit."""
        named = []
        for at, row in _placed(place, rows):
            self._check_unit(row.unit, at, "a surcharge")
            try:
                named.append((row.unit, Surcharge(row.unit, Decimal(row.percent), Decimal(row.fixed))))
            except ValueError as error:
                self.say(at, str(error))
        return tuple(self.once(named, place).values())

    def fees(self, rows: Sequence[SurchargeRow], place: str) -> tuple[Surcharge, ...]:
        """Own-key fees, one for a unit. A call costs nothing without them, so they are no discounts."""
        for at, row in _placed(place, rows):
            if row.percent.startswith("-"):
                self.say(at, "a fee is not below 0")
        return self.surcharges(rows, place)

    def override(self, row: PlanRow | AccountRow, place: str) -> Override:
        """What some pay otherwise."""
        return Override(
            rates=self.models(row.models, f"{place}/models"),
            prices=self.prices(row.prices, f"{place}/prices"),
            markup=None if row.markup is None else self.surcharges(row.markup, f"{place}/markup"),
            own_key_fees=None if row.own_key_fees is None else self.fees(row.own_key_fees, f"{place}/own_key_fees"),
        )

    def check_override(self, version: PriceVersion, override: Override, place: str) -> None:
        """An override changes prices that there are. What has no price has none for everybody."""
        for (provider, model), rates in override.rates.items():
            places = {each.place for each in version.rates.get((provider, model), ())}
            for each in rates:
                if each.place not in places:
                    self.say(place, f"{provider}/{model} has no rate for {each.quantity} in {each.unit} to override")
        counted_as = {price.id: price.counted_as for price in version.prices}
        for price in override.prices:
            if counted_as.get(price.id) != price.counted_as:
                self.say(place, f"there is no own price {price.id} of the same type, quantity, unit, period and where")

    def _check_unit(self, unit: str, place: str, name: str) -> None:
        if unit not in self._units:
            self.say(place, f"{name} is priced in {unit}, which is no unit")


# To JSON --------------------------------------------------------------------------------------------------------------


def models_as_rows(rates: Mapping[tuple[str, str], Sequence[Rate]]) -> list[dict[str, Any]]:
    """What models cost, in order of providers and models: `ModelRow`, without what is not said."""
    return [
        {"provider": provider, "model": model, "rates": [rate_as_row(each) for each in rates[provider, model]]}
        for provider, model in sorted(rates)
    ]


def rate_as_row(of: Rate) -> dict[str, Any]:
    """`RateRow`, without what is not said."""
    row: dict[str, Any] = {"quantity": of.quantity, "unit": of.unit, "price": f"{of.price:f}", "per": of.per}
    if of.above:
        row["above"] = [{"tokens": tokens, "price": f"{price:f}"} for tokens, price in of.above]
    if of.service_tier is not None:
        row["service_tier"] = of.service_tier
    return row


def further_as_row(version: PriceVersion) -> dict[str, Any]:
    """`FurtherRow`, without what is not said: empty if the version says what models cost, and nothing else."""
    rows: dict[str, Any] = {
        "prices": [_price_as_row(each) for each in version.prices],
        "markup": [_surcharge_as_row(each) for each in version.markup],
        "own_key_fees": [_surcharge_as_row(each) for each in version.own_key_fees],
        "plans": [
            {
                "plan": plan,
                "accounts": sorted(account for account, each in version.members.items() if each == plan),
                **_override_as_row(version.plans[plan]),
            }
            for plan in sorted(version.plans)
        ],
        "accounts": [
            {"account": account, **_override_as_row(version.accounts[account])} for account in sorted(version.accounts)
        ],
    }
    return {name: listed for name, listed in rows.items() if listed}


def version_as_row(version: PriceVersion) -> dict[str, Any]:
    """`VersionRow`, without what is not said."""
    return {
        "id": version.id,
        "effective_at": version.effective_at,
        "models": models_as_rows(version.rates),
        **further_as_row(version),
    }


def unit_as_row(unit: Unit) -> dict[str, Any]:
    """`UnitRow`."""
    return {
        "name": unit.name,
        "kind": unit.kind,
        "scale": unit.scale,
        "own_key_counts": unit.own_key_counts,
        "mirrors": unit.mirrors,
    }


def _price_as_row(of: OwnPrice) -> dict[str, Any]:
    row: dict[str, Any] = {"id": of.id, "type": of.type, "unit": of.unit, "kind": of.kind}
    if len(of.tiers) == 1:
        row["price"] = f"{of.tiers[0].price:f}"
    else:
        row["tiers"] = [
            {"up_to": None if each.up_to is None else f"{each.up_to:f}", "price": f"{each.price:f}"}
            for each in of.tiers
        ]
    further: dict[str, Any] = {
        "quantity": of.quantity,
        "per": of.per if of.per != 1 else None,
        "free": f"{of.free:f}" if of.free else None,
        "minimum": f"{of.minimum:f}" if of.minimum else None,
        "period": of.period,
        "where": dict(of.where) or None,
    }
    return row | {name: value for name, value in further.items() if value is not None}


def _surcharge_as_row(of: Surcharge) -> dict[str, Any]:
    row = {"unit": of.unit}
    if of.percent:
        row["percent"] = f"{of.percent:f}"
    if of.fixed:
        row["fixed"] = f"{of.fixed:f}"
    return row


def _override_as_row(of: Override) -> dict[str, Any]:
    row: dict[str, Any] = {}
    if of.rates:
        row["models"] = models_as_rows(of.rates)
    if of.prices:
        row["prices"] = [_price_as_row(each) for each in of.prices]
    if of.markup is not None:
        row["markup"] = [_surcharge_as_row(each) for each in of.markup]
    if of.own_key_fees is not None:
        row["own_key_fees"] = [_surcharge_as_row(each) for each in of.own_key_fees]
    return row
