"""A secret as a value that nothing shows by accident: not repr, str, format, pickle or a JSON encoder."""

import hmac
from typing import Final, NoReturn

SHOWN: Final = "***"


class Secret:
    """Text that only `reveal` gives out. Compared in constant time; not hashable, so that it is never a key."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The text itself. Whoever calls it keeps it out of logs, errors, metrics and tables."""
        return self._text

    def __len__(self) -> int:
        return len(self._text)

    # Constant time helps nothing if hashes can be compared instead.
    def __hash__(self) -> NoReturn:
        raise TypeError("a secret is not hashed, so that it is no key of a dictionary")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(
            self._text.encode("utf-8", "surrogatepass"), other._text.encode("utf-8", "surrogatepass")
        )

    def __repr__(self) -> str:
        return SHOWN

    def __str__(self) -> str:
        return SHOWN

    def __format__(self, _specification: str) -> str:
        return SHOWN

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not written anywhere")
