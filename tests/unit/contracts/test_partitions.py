"""Laws of partitions: a published formula that every publisher computes for itself."""

import pytest
from hypothesis import given

from contracts.accounts import path
from contracts.partition import PARTITION_COUNT, partition_of, token
from tests.unit.contracts.strategies import accounts


def crc32_bit_by_bit(data: bytes) -> int:
    """CRC-32 (IEEE 802.3) from its definition, sharing no code with zlib."""
    remainder = 0xFFFFFFFF
    for byte in data:
        remainder ^= byte
        for _ in range(8):
            remainder = remainder >> 1 ^ (0xEDB88320 if remainder & 1 else 0)
    return remainder ^ 0xFFFFFFFF


# The check value of the CRC-32 standard, and published values of the same algorithm.
@pytest.mark.parametrize(
    ("root", "crc32"),
    [
        ("123456789", 0xCBF43926),
        ("a", 0xE8B7BE43),
        ("abc", 0x352441C2),
        ("abcdefghijklmnopqrstuvwxyz", 0x4C2750BD),
    ],
)
def test_the_partition_is_the_standard_crc32_of_the_root(root: str, crc32: int) -> None:
    assert partition_of(root) == partition_of(f"{root}/ana/key_1") == crc32 % 64


@given(accounts)
def test_the_partition_follows_the_definition_of_crc32(account: str) -> None:
    assert partition_of(account) == crc32_bit_by_bit(account.split("/", maxsplit=1)[0].encode("ascii")) % 64


@given(accounts)
def test_a_whole_tree_shares_a_partition(account: str) -> None:
    assert {partition_of(each) for each in path(account)} == {partition_of(account)}


def test_tokens_are_two_digits_and_sort_as_their_numbers() -> None:
    tokens = [token(partition) for partition in range(PARTITION_COUNT)]
    assert tokens == sorted(tokens)
    assert len(set(tokens)) == PARTITION_COUNT == 64
    assert all(len(each) == 2 and each.isdecimal() for each in tokens)
    assert (tokens[0], tokens[7], tokens[63]) == ("00", "07", "63")
