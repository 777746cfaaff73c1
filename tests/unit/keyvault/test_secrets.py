"""A secret shows itself to nobody, and looks like what its provider makes."""

import json
import logging
import pickle
from dataclasses import dataclass

import pytest
from hypothesis import given
from pydantic import SecretStr, ValidationError

from contracts.keyvault import KEY_REPLIES, Leased
from services.keyvault.domain.errors import SecretMalformed
from services.keyvault.domain.formats import check_format, shown_of
from services.keyvault.domain.secret import Secret
from services.keyvault.translate import findings
from tests.unit.keyvault.strategies import texts

OPENAI = "sk-proj-" + "Ab3_" * 12
ANTHROPIC = "sk-ant-api03-" + "Ab3_" * 12
GEMINI = "AIza" + "Ab3_-" * 7
GROQ = "gsk_" + "Ab34" * 12
GITHUB = "ghp_" + "Ab34" * 9
GITHUB_FINE = "github_pat_" + "Ab34_" * 10


@dataclass(frozen=True)
class Holder:
    secret: Secret


def test_a_secret_shows_itself_to_nobody(caplog: pytest.LogCaptureFixture) -> None:
    secret = Secret(OPENAI)
    assert repr(secret) == str(secret) == f"{secret}" == f"{secret:>40}" == f"{secret!r}" == "***"
    assert f"{[secret]} {Holder(secret)}" == "[***] Holder(secret=***)"
    with pytest.raises(TypeError):
        pickle.dumps(secret)
    with pytest.raises(TypeError):
        json.dumps({"secret": secret})
    with pytest.raises(TypeError):
        hash(secret)
    logging.getLogger("any").warning("here is %s", secret)
    assert OPENAI not in caplog.text
    assert not hasattr(secret, "__dict__")


@given(texts, texts)
def test_secrets_are_equal_when_their_texts_are(one: str, other: str) -> None:
    assert (Secret(one) == Secret(other)) == (one == other)
    assert Secret(one) != one
    assert Secret(one).reveal() == one


@pytest.mark.parametrize(
    ("provider", "text"),
    [
        ("openai", OPENAI),
        ("openai", "sk-" + "a" * 48),
        ("anthropic", ANTHROPIC),
        ("gemini", GEMINI),
        ("groq", GROQ),
        ("github", GITHUB),
        ("github", GITHUB_FINE),
        ("mistral", "eight888"),
        ("mistral", "!" * 512),
    ],
)
def test_what_a_provider_makes_is_taken(provider: str, text: str) -> None:
    assert check_format(Secret(text), provider=provider) is None


@pytest.mark.parametrize(
    ("provider", "text"),
    [
        ("openai", ""),
        ("openai", "sk-short"),
        ("openai", ANTHROPIC),
        ("openai", f"{OPENAI} "),
        ("openai", f"{OPENAI}\n"),
        ("openai", "sk-scrip-0123456789abcdef-" + "a" * 43),
        ("anthropic", OPENAI),
        ("gemini", OPENAI),
        ("groq", GEMINI),
        ("groq", GROQ + "-"),
        ("github", GROQ),
        ("mistral", "seven77"),
        ("mistral", "!" * 513),
        ("mistral", "with a space"),
        ("mistral", "sk-scrip-0123456789abcdef-" + "a" * 43),
        ("mistral", "nul\x00nul\x00"),
        ("mistral", "schlüssel-ä"),
    ],
)
def test_what_it_does_not_make_is_refused_without_repeating_it(provider: str, text: str) -> None:
    malformed = check_format(Secret(text), provider=provider)
    assert isinstance(malformed, SecretMalformed)
    assert malformed.code == "secret_malformed"
    if text:
        assert text.strip() not in f"{malformed!s} {malformed!r}"


@given(texts)
def test_at_most_a_common_prefix_and_four_characters_are_shown(text: str) -> None:
    for provider in ("openai", "mistral"):
        shown = shown_of(Secret(text), provider=provider)
        assert shown.prefix in ("sk-proj-", "sk-svcacct-", "sk-", "")
        assert len(shown.last4) == (4 if len(text) >= 20 else 0)


def test_a_lease_is_written_in_the_clear_by_its_wire_only() -> None:
    leased = Leased.model_validate(
        {
            "secret": OPENAI,
            "own": True,
            "record": "r",
            "version": 1,
            "expires_at": "2025-07-01T12:00:00Z",
        }
    )
    for shown in (repr(leased), str(leased), leased.model_dump_json(), str(leased.model_dump(mode="json"))):
        assert OPENAI not in shown
    read = KEY_REPLIES.validate_json(leased.wire())
    assert isinstance(read, Leased)
    assert read.secret == SecretStr(OPENAI)
    assert read == leased


def test_a_lease_that_cannot_be_read_is_not_repeated() -> None:
    with pytest.raises(ValidationError) as raised:
        KEY_REPLIES.validate_json(json.dumps({"status": "leased", "secret": OPENAI, "own": OPENAI, OPENAI: OPENAI}))
    assert OPENAI not in str([each.detail + each.pointer for each in findings(raised.value.errors())])
    assert f"input_value={OPENAI!r}" not in str(raised.value)
