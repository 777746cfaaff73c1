"""What a provider's secret looks like, and what may be shown of it. A secret of another form is refused, unstored."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from services.keyvault.domain.errors import SecretMalformed
from services.keyvault.domain.secret import Secret

LENGTH_MIN: Final = 8
LENGTH_MAX: Final = 512
# Of a shorter one four characters would be too much of it.
SHOWN_LENGTH_MIN: Final = 20


@dataclass(frozen=True, slots=True)
class Format:
    """`prefixes`: what it begins with, the first that fits. `expected` is a clause for people."""

    pattern: re.Pattern[str]
    prefixes: tuple[str, ...]
    expected: str


_FORMATS: Final[Mapping[str, Format]] = {
    # Those of Anthropic, and our own access keys, begin alike: pasted into the wrong field they are refused.
    "openai": Format(
        pattern=re.compile(r"sk-(?!ant-|scrip-)[A-Za-z0-9_-]{16,300}"),
        prefixes=("sk-proj-", "sk-svcacct-", "sk-"),
        expected="begins with sk- (and not sk-ant-), then at least 16 letters, digits, - or _",
    ),
    "anthropic": Format(
        pattern=re.compile(r"sk-ant-[A-Za-z0-9_-]{16,300}"),
        prefixes=("sk-ant-",),
        expected="begins with sk-ant-, then at least 16 letters, digits, - or _",
    ),
    "gemini": Format(
        pattern=re.compile(r"AIza[A-Za-z0-9_-]{16,300}"),
        prefixes=("AIza",),
        expected="begins with AIza, then at least 16 letters, digits, - or _",
    ),
    "groq": Format(
        pattern=re.compile(r"gsk_[A-Za-z0-9]{16,300}"),
        prefixes=("gsk_",),
        expected="begins with gsk_, then at least 16 letters or digits",
    ),
    "github": Format(
        pattern=re.compile(r"(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{22,255})"),
        prefixes=("github_pat_", "ghp_", "gho_", "ghu_", "ghs_", "ghr_"),
        expected="begins with ghp_ (classic) or github_pat_ (fine-grained), then letters, digits or _",
    ),
}
_ANY: Final = Format(
    pattern=re.compile(rf"(?!sk-scrip-)[\x21-\x7e]{{{LENGTH_MIN},{LENGTH_MAX}}}"),
    prefixes=(),
    expected=f"has {LENGTH_MIN} to {LENGTH_MAX} printable ASCII characters and no spaces",
)


def check_format(secret: Secret, *, provider: str) -> SecretMalformed | None:
    """Why this cannot be a secret of the provider; null if it can."""
    known = _FORMATS.get(provider, _ANY)
    if known.pattern.fullmatch(secret.reveal()):
        return None
    return SecretMalformed(provider=provider, expected=known.expected)


@dataclass(frozen=True, slots=True)
class Shown:
    """What tells an owner which secret it is: a prefix that all of the kind share, and the last four characters."""

    prefix: str
    last4: str


def shown_of(secret: Secret, *, provider: str) -> Shown:
    """What may be stored and shown of a secret."""
    text = secret.reveal()
    prefixes = _FORMATS.get(provider, _ANY).prefixes
    return Shown(
        prefix=next((prefix for prefix in prefixes if text.startswith(prefix)), ""),
        last4=text[-4:] if len(text) >= SHOWN_LENGTH_MIN else "",
    )
