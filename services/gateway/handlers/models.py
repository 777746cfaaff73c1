"""Which models may be called."""

from collections.abc import Sequence

from services.gateway.domain.prices import PricedModel
from services.gateway.handlers.calls import Gateway
from services.kit.clock import now


def models(gateway: Gateway) -> Sequence[PricedModel]:
    """Every model that may be called. Unavailable."""
    return gateway.outside.prices.book().models(at=now(), providers=gateway.outside.providers.names)


def model(gateway: Gateway, name: str) -> PricedModel:
    """One of them. ModelNotPriced, NoProvider, Unavailable."""
    return gateway.outside.prices.book().find(name, at=now(), providers=gateway.outside.providers.names)
