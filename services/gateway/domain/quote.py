"""What a call may cost at most, before it is made, by the very function that will charge it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from contracts.money import Unit, format_amount, parse_amount
from contracts.pricing import Unpriced, rate, rate_at_most
from contracts.usage import TOKENS_MAX, ModelUsed
from services.gateway.domain.errors import ModelNotPriced, RequestInvalid
from services.gateway.domain.prices import PricedModel
from services.gateway.domain.request import ChatRequest

# Of which kinds tokens may turn out to be: of any call, and of one that has to do with audio.
_PARTS: Final = frozenset({"cached_input_tokens", "reasoning_tokens"})
_AUDIO_PARTS: Final = _PARTS | {"input_audio_tokens", "output_audio_tokens"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Quote:
    """The most a call is expected to use, and the most that can cost per unit, in the unit's steps."""

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
    RequestInvalid, ModelNotPriced.
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
        service_tier=priced_tier(request, priced),
    )
    try:
        return Quote(used=used, amounts=_most(used, request, priced, units=units))
    except Unpriced as error:
        raise ModelNotPriced(model=priced.model, price_version=priced.version.id) from error


def priced_tier(request: ChatRequest, priced: PricedModel) -> str | None:
    """The service tier that a request asks for, if the model has prices for it."""
    tier = request.dearer_tier
    return tier if tier is not None and priced.version.has_tier(priced.provider, priced.model, tier) else None


def _most(
    used: ModelUsed, request: ChatRequest, priced: PricedModel, *, units: Mapping[str, Unit]
) -> Mapping[str, int]:
    parts = _AUDIO_PARTS if request.has_audio else _PARTS
    return rate_at_most(used, price_version=priced.version, units=units, parts=parts, account=priced.account)


def cost(used: ModelUsed, priced: PricedModel, *, units: Mapping[str, Unit]) -> Mapping[str, int]:
    """What use costs under the version that its call is pinned to."""
    return rate(used, price_version=priced.version, units=units, account=priced.account).amounts


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
        return amount_of(unit, _most(used, request, priced, units=units), units=units) <= left

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
