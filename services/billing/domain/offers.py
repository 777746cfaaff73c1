"""What is sold: packages and plans as the catalogue has them, and the terms under which a package is bought."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

# Up to which quantity a package may ask to be sold at once.
QUANTITY_MAX: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Price:
    """Real money: an integer of the smallest coins (`minor`) of a denomination in lower case, `usd`."""

    minor: int
    denomination: str

    def times(self, quantity: int) -> "Price":
        """The price of so many."""
        return Price(self.minor * quantity, self.denomination)


@dataclass(frozen=True, slots=True)
class Package:
    """Paid once, granted once. `paid` and `bonus` are steps of `unit`, per piece; `bonus` 0 is none."""

    id: str
    title: str
    price: Price
    unit: str
    paid: int
    bonus: int
    quantity_max: int


@dataclass(frozen=True, slots=True)
class PlanGrant:
    """What a plan brings of a unit each period: `amount` steps of it, or as much as is used (amount 0)."""

    unit: str
    amount: int
    unlimited: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """Recurring grants for a recurring price."""

    id: str
    title: str
    price: Price
    period: Literal["month"]
    grants: tuple[PlanGrant, ...]
    features: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Offers:
    """Everything that is sold, by id."""

    packages: Mapping[str, Package]
    plans: Mapping[str, Plan]


@dataclass(frozen=True, slots=True)
class Terms:
    """Who pays how much for what. `price`, `paid` and `bonus` are for the whole quantity."""

    account: str
    package: str
    quantity: int
    price: Price
    unit: str
    paid: int
    bonus: int
    checkout: str | None = None


def terms_of(package: Package, *, account: str, quantity: int, checkout: str | None = None) -> Terms:
    """The terms on which `account` buys a quantity of a package today."""
    return Terms(
        account=account,
        package=package.id,
        quantity=quantity,
        price=package.price.times(quantity),
        unit=package.unit,
        paid=package.paid * quantity,
        bonus=package.bonus * quantity,
        checkout=checkout,
    )
