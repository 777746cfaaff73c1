"""The price book and the one pure rating function: quotes and charges use it alike, with a pinned version."""

from contracts.pricing.items import LineItem, PlainItems, PlainPlan, PlainRow
from contracts.pricing.own_prices import period_start, total_of
from contracts.pricing.plans import lacking_joins
from contracts.pricing.rated import Counter, Counting, NotMeasurable, Rated, Unpriced
from contracts.pricing.rating import periods, rate, rate_at_most, rate_event
from contracts.pricing.terms import (
    MODEL_QUANTITIES,
    PER_MAX,
    PERCENT_DECIMALS_MAX,
    PERCENT_MAX,
    PRICE_DECIMALS_MAX,
    PRICE_MAX,
    QUANTITY_DECIMALS_MAX,
    QUANTITY_MAX,
    STANDARD_TIERS,
    Override,
    OwnPrice,
    Period,
    PriceKind,
    Quantity,
    Rate,
    Surcharge,
    Tier,
)
from contracts.pricing.versions import PriceVersion

__all__ = [
    "MODEL_QUANTITIES",
    "PERCENT_DECIMALS_MAX",
    "PERCENT_MAX",
    "PER_MAX",
    "PRICE_DECIMALS_MAX",
    "PRICE_MAX",
    "QUANTITY_DECIMALS_MAX",
    "QUANTITY_MAX",
    "STANDARD_TIERS",
    "Counter",
    "Counting",
    "LineItem",
    "NotMeasurable",
    "Override",
    "OwnPrice",
    "Period",
    "PlainItems",
    "PlainPlan",
    "PlainRow",
    "PriceKind",
    "PriceVersion",
    "Quantity",
    "Rate",
    "Rated",
    "Surcharge",
    "Tier",
    "Unpriced",
    "lacking_joins",
    "period_start",
    "periods",
    "rate",
    "rate_at_most",
    "rate_event",
    "total_of",
]
