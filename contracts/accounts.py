"""Account ids. An account's id is its path: 1 to 4 percent-encoded segments, `acme/ml/ana/key_7f3`."""

import re
from functools import lru_cache
from typing import Annotated
from urllib.parse import unquote_to_bytes

from pydantic import AfterValidator, Field

DEPTH_MAX = 4
SEGMENT_LENGTH_MAX = 128
ACCOUNT_LENGTH_MAX = 400

# Unreserved characters of RFC 3986, or a percent-encoded byte in upper case.
_SEGMENT = re.compile(r"(?:[A-Za-z0-9\-._~]|%[0-9A-F]{2})+")
# Encoding an unreserved character would give one account two ids.
_NEEDLESS_ENCODING = re.compile(r"%(?:2D|2E|5F|7E|3[0-9]|4[1-9A-F]|5[0-9A]|6[1-9A-F]|7[0-9A])")


def check_account(account: str) -> str:
    """Return `account` unchanged if it is a canonical account id; ValueError says what is wrong otherwise."""
    if not account:
        raise ValueError("an account id is empty")
    if len(account) > ACCOUNT_LENGTH_MAX:
        raise ValueError(f"an account id has at most {ACCOUNT_LENGTH_MAX} characters, this one has {len(account)}")
    segments = account.split("/")
    if len(segments) > DEPTH_MAX:
        raise ValueError(f"an account id has at most {DEPTH_MAX} segments, {account!r} has {len(segments)}")
    for segment in segments:
        if not segment:
            raise ValueError(f"an account id has no empty segments: {account!r}")
        if len(segment) > SEGMENT_LENGTH_MAX:
            raise ValueError(f"a segment of an account id has at most {SEGMENT_LENGTH_MAX} characters: {account!r}")
        if segment in (".", ".."):
            raise ValueError(f"a segment of an account id is not '.' or '..': {account!r}")
        if _SEGMENT.fullmatch(segment) is None:
            raise ValueError(
                f"the segment {segment!r} of an account id is not percent-encoded (letters, digits, -._~, %XX)"
            )
        if _NEEDLESS_ENCODING.search(segment) is not None:
            raise ValueError(f"the segment {segment!r} of an account id encodes a character that needs no encoding")
        if "%" in segment and not _is_text(unquote_to_bytes(segment)):
            raise ValueError(f"the segment {segment!r} of an account id is not percent-encoded UTF-8 text")
    return account


def _is_text(encoded: bytes) -> bool:
    try:
        encoded.decode()
    except UnicodeDecodeError:
        return False
    return True


AccountId = Annotated[
    str,
    Field(
        min_length=1,
        max_length=ACCOUNT_LENGTH_MAX,
        description="Account path: 1 to 4 percent-encoded segments joined by '/'.",
        examples=["acme/ml/ana/key_7f3"],
        json_schema_extra={"pattern": rf"^{_SEGMENT.pattern}(?:/{_SEGMENT.pattern}){{0,{DEPTH_MAX - 1}}}$"},
    ),
    AfterValidator(check_account),
]


def root(account: str) -> str:
    """The first segment: the organisation at the top of the account's tree."""
    return account.partition("/")[0]


@lru_cache(maxsize=65_536)
def path(account: str) -> tuple[str, ...]:
    """The account and all above it, nearest first: `a/b/c` gives `('a/b/c', 'a/b', 'a')`."""
    found = [account]
    cut = account.rfind("/")
    while cut != -1:
        account = account[:cut]
        found.append(account)
        cut = account.rfind("/")
    return tuple(found)
