"""What the trace costs, computed without Scrip: csv and Decimal, prices as literals, an account rule of its own.

Imports nothing of ours, on purpose: a mistake shared with the code under test would not show.
"""

import csv
import gzip
import sys
from dataclasses import dataclass
from decimal import Context, Decimal, Inexact, localcontext
from itertools import islice
from pathlib import Path
from zlib import crc32

DOLLARS_PER_MILLION_INPUT_TOKENS = Decimal("0.15")
DOLLARS_PER_MILLION_OUTPUT_TOKENS = Decimal("0.60")
MILLION = Decimal(1_000_000)
TRACE = Path(__file__).parent / "azure_llm_conversation_2023.csv.gz"
# A product of two u has 64 decimals.
EXACT = Context(prec=100, traps=[Inexact])


@dataclass(frozen=True, slots=True)
class Bill:
    """Dollars per account, exact, and from how many requests."""

    amounts: dict[str, Decimal]
    requests: int

    @property
    def total(self) -> Decimal:
        return sum(self.amounts.values(), Decimal(0))


def bill(*, rows_max: int | None = None) -> Bill:
    """The bill of the first `rows_max` rows, or of all. Raises decimal.Inexact rather than round anything."""
    amounts: dict[str, Decimal] = {}
    count = 0
    with localcontext(EXACT), gzip.open(TRACE, "rt", newline="") as file:
        rows = csv.reader(file)
        next(rows)
        for count, (_, input_tokens, output_tokens) in enumerate(islice(rows, rows_max), start=1):
            dollars = (
                Decimal(input_tokens) * DOLLARS_PER_MILLION_INPUT_TOKENS
                + Decimal(output_tokens) * DOLLARS_PER_MILLION_OUTPUT_TOKENS
            ) / MILLION
            payer = account(count)
            amounts[payer] = amounts.get(payer, Decimal(0)) + dollars
    return Bill(amounts=amounts, requests=count)


def account(number: int) -> str:
    """The account of row `number`: `demo-<floor(200 u^2)>` with u = crc32(str(number)) / 2^32."""
    with localcontext(EXACT):
        u = Decimal(crc32(b"%d" % number)) / Decimal(2**32)
        return "demo-" + str(int(200 * u**2))


if __name__ == "__main__":
    whole = bill()
    for name in sorted(whole.amounts, key=lambda name: -whole.amounts[name]):
        sys.stdout.write(f"{name:10} {whole.amounts[name]:f}\n")
    sys.stdout.write(f"{'total':10} {whole.total:f}  ({whole.requests} requests)\n")
