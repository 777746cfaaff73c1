"""What a call may cost at most, before it is made, by the very function that will charge it."""

from collections.abc import Mapping
from dataclasses import dataclass

from contracts.money import Unit, format_amount, parse_amount
from contracts.pricing import rate
from contracts.usage import TOKENS_MAX, ModelUsed
from services.gateway.domain.errors import RequestInvalid
from services.gateway.domain.prices import PricedModel
from services.gateway.domain.request import ChatRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Quote:
    """The most a call is expected to use, and what that costs per unit, in the unit's steps."""

    used: ModelUsed
    amounts: Mapping[str, int]


def quote(
    request: ChatRequest,
    priced: PricedModel,
    *,
    units: Mapping[str, Unit],
    own_key: bool,
    lately: int | None,
    output_tokens_max: int,
) -> Quote:
    """The quote of a call: its input bounded from above, its output by the first of these that is known.

    The request's own limit; what this account's calls of the model lately produced; the model's maximum.
    RequestInvalid.
    """
    per_choice = request.output_tokens_max
    if per_choice is None:
        per_choice = output_tokens_max if lately is None else min(lately, output_tokens_max)
    output_tokens = per_choice * request.choices
    if max(request.input_tokens_bound, output_tokens) > TOKENS_MAX:
        raise RequestInvalid(reason=f"a call has at most {TOKENS_MAX} tokens", param="max_tokens")
    used = ModelUsed(
        provider=priced.provider,
        model=priced.model,
        input_tokens=request.input_tokens_bound,
        output_tokens=output_tokens,
        own_key=own_key,
        price_version=priced.version.id,
    )
    return Quote(used=used, amounts=cost(used, priced, units=units))


def cost(used: ModelUsed, priced: PricedModel, *, units: Mapping[str, Unit]) -> Mapping[str, int]:
    """What use costs under the version that its call is pinned to."""
    return rate(used, price_version=priced.version, units=units).amounts


def affordable_max_tokens(
    quoted: Quote,
    request: ChatRequest,
    priced: PricedModel,
    *,
    units: Mapping[str, Unit],
    unit: str,
    remaining: str,
) -> int:
    """How many output tokens a choice may have so that a call costs no more of a unit than what remains; 0 if none."""
    left = parse_amount(remaining, units[unit])

    def fits(tokens: int) -> bool:
        used = quoted.used.model_copy(update={"output_tokens": tokens * request.choices})
        return amount_of(unit, cost(used, priced, units=units), units=units) <= left

    if not fits(0):
        return 0

    low, high = 0, quoted.used.output_tokens // request.choices
    while low < high:
        middle = -(-(low + high) // 2)
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def amount_of(unit: str, amounts: Mapping[str, int], *, units: Mapping[str, Unit]) -> int:
    """What amounts take from a wallet of a unit: a cap that mirrors money counts what is paid in that."""
    return amounts.get(unit, 0) + amounts.get(units[unit].mirrors or "", 0)


def shown(amounts: Mapping[str, int], *, units: Mapping[str, Unit]) -> list[tuple[str, str]]:
    """Amounts as decimal text and unit, money first."""
    ordered = sorted(amounts, key=lambda name: (units[name].kind != "money", name))
    return [(format_amount(amounts[name], units[name]), name) for name in ordered]
