"""How much a provider produced: what it reports, or what was seen of it when it does not.

The count of what was seen: every piece of a stream with content is one token, as OpenAI's are; a piece of many bytes
counts for more, a token for every 8. Tokens of reasoning are not seen, so they are not in it.
"""

from dataclasses import dataclass
from typing import Final

from contracts.usage import Counts

BYTES_PER_TOKEN_MAX: Final = 8
BYTES_PER_TOKEN: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """What a provider says that a call used. Cached is part of the input, reasoning of the output, audio of each."""

    input_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    input_audio_tokens: int = 0
    output_audio_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """What a call is charged for."""

    input_tokens: int
    output_tokens: int
    estimated: bool
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    input_audio_tokens: int = 0
    output_audio_tokens: int = 0

    def counts(self, *, audio: bool) -> Counts | None:
        """Of which kinds the tokens are, as far as a call was quoted for it: `audio`, if it asked for that.

        A provider's parts may not fit into its totals. What is said of a call must, whatever it says.
        """
        cached = min(self.cached_tokens, self.input_tokens)
        reasoning = min(self.reasoning_tokens, self.output_tokens)
        heard = min(self.input_audio_tokens, self.input_tokens - cached) if audio else 0
        spoken = min(self.output_audio_tokens, self.output_tokens - reasoning) if audio else 0
        if not (cached or reasoning or heard or spoken):
            return None
        return Counts(
            cached_input_tokens=cached,
            reasoning_tokens=reasoning,
            input_audio_tokens=heard,
            output_audio_tokens=spoken,
        )


@dataclass(slots=True)
class Seen:
    """What was seen of an answer so far. `began`: the provider has begun to answer, so that it bills the input."""

    began: bool = False
    pieces: int = 0
    text_bytes: int = 0
    reported: Reported | None = None
    served_model: str | None = None
    service_tier: str | None = None

    def add(self, text_bytes: int) -> None:
        """A piece of an answer with content."""
        self.pieces += 1
        self.text_bytes += text_bytes

    @property
    def output_tokens(self) -> int:
        """About how many tokens were seen."""
        return max(self.pieces, self.text_bytes // BYTES_PER_TOKEN_MAX)


def counted(seen: Seen, *, input_tokens_estimate: int, complete: bool) -> Counted:
    """What to charge: what the provider reported of a complete answer, else what was seen, flagged as estimated.

    An answer that broke off may have been reported on before its end: then neither counts for less than the other.
    """
    reported = seen.reported
    if reported is None:
        return Counted(input_tokens=input_tokens_estimate, output_tokens=seen.output_tokens, estimated=True)
    return Counted(
        input_tokens=reported.input_tokens,
        output_tokens=reported.output_tokens if complete else max(reported.output_tokens, seen.output_tokens),
        estimated=not complete,
        cached_tokens=reported.cached_tokens,
        reasoning_tokens=reported.reasoning_tokens,
        input_audio_tokens=reported.input_audio_tokens,
        output_audio_tokens=reported.output_audio_tokens,
    )


def tokens_of_text(text_bytes: int) -> int:
    """About how many tokens a text has."""
    return -(-text_bytes // BYTES_PER_TOKEN)
