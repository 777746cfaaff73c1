"""Where a delivered JetStream message stands in its stream, and how long to wait before it is delivered again."""

from dataclasses import dataclass
from typing import Final

from nats.aio.msg import Msg

RETRY_SECONDS_MAX: Final = 30.0

_TOKENS_PLAIN: Final = 9


@dataclass(frozen=True, slots=True)
class Place:
    """A delivery's place. `deliveries` counts this one; `stored_at_ns` is when the stream took it, in Unix time.

    `pending` is what the stream had for the consumer behind it, when it sent this.
    """

    stream: str
    consumer: str
    deliveries: int
    stream_sequence: int
    stored_at_ns: int
    pending: int


def place_of(message: Msg) -> Place:
    """Read the acknowledgement subject of a delivery. ValueError if the message did not come from a consumer."""
    # $JS.ACK[.<domain>.<account>].<stream>.<consumer>.<deliveries>.<stream sequence>.<consumer sequence>.<time>
    # .<pending>[.<random>]
    tokens = message.reply.split(".")
    if tokens[:2] != ["$JS", "ACK"] or len(tokens) < _TOKENS_PLAIN:
        raise ValueError(f"not a delivery of a JetStream consumer: its reply subject is {message.reply!r}")
    first = 2 if len(tokens) == _TOKENS_PLAIN else 4
    stream, consumer, deliveries, sequence, _, time_ns, pending = tokens[first : first + 7]
    return Place(
        stream=stream,
        consumer=consumer,
        deliveries=int(deliveries),
        stream_sequence=int(sequence),
        stored_at_ns=int(time_ns),
        pending=int(pending),
    )


def retry_delay_seconds(deliveries: int) -> float:
    """1, 2, 4, … up to 30 seconds, by how often the message has been delivered."""
    return min(2.0 ** min(max(deliveries, 1) - 1, 10), RETRY_SECONDS_MAX)
