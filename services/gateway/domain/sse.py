"""Server-sent events: where one ends, and the data in it. The bytes of an event are kept as they came."""

import re
from typing import Final

EVENT_BYTES_MAX: Final = 4 << 20

# A blank line ends an event.
_END: Final = re.compile(rb"\r\n\r\n|\n\n|\r\r(?!\n)")
_LINE: Final = re.compile(rb"\r\n|\n|\r")


class EventTooLarge(ValueError):
    """No event ends where one must have."""


class EventSplitter:
    """Cuts a stream of bytes into whole events."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, received: bytes) -> list[bytes]:
        """The events that are whole now, each with the blank line that ends it. Raises EventTooLarge."""
        whole = self._rest + received if self._rest else received
        events = []
        start = 0
        for end in _END.finditer(whole):
            events.append(whole[start : end.end()])
            start = end.end()
        self._rest = whole[start:]
        if len(self._rest) > EVENT_BYTES_MAX:
            raise EventTooLarge(f"an event of the provider has more than {EVENT_BYTES_MAX} bytes")
        return events

    def rest(self) -> bytes:
        """What came after the last whole event."""
        return self._rest


def data_of(event: bytes) -> bytes:
    """The data of an event; empty for a comment."""
    if event.startswith(b"data: ") and event.endswith(b"\n\n") and event.count(b"\n") == 2 and b"\r" not in event:
        return event[6:-2]
    lines = _LINE.split(event)
    return b"\n".join(line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:"))
