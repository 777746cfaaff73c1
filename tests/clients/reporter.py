"""A process that reports uses of a model and says which were accepted: `reporter URL TOKEN SPOOL NAME COUNT [fork]`.

With `fork` its client was used by a parent, which forks, reports half of the uses, and ends, while a child reports
the other half.
"""

import os
import sys

from scrip_client import Scrip, UsageEvent, model_used

ACCOUNT = "acme"


def use(name: str, number: int) -> UsageEvent:
    """A use that costs 0.00015 usd."""
    made = model_used(
        account=ACCOUNT, provider="openai", model="gpt-4o-mini", input_tokens=1_000, output_tokens=0, attributes={}
    )
    return UsageEvent(account=made.account, type=made.type, data=made.data, id=f"{name}-{number}")


def report(client: Scrip, name: str, count: int) -> None:
    """Report, and write each id once it is accepted."""
    for number in range(count):
        accepted = client.report(use(name, number))
        os.write(1, f"{accepted}\n".encode())


def main() -> None:
    """Report, and leave without closing: what was accepted is delivered all the same."""
    url, token, spool, name, count, *more = sys.argv[1:]
    client = Scrip(url, source="demo", token=token, spool=spool)
    if more != ["fork"]:
        report(client, name, int(count))
        return
    half = int(count) // 2
    report(client, f"{name}-before", half // 2)
    if os.fork():
        report(client, f"{name}-after", half - half // 2)
        client.close(0)
    else:
        # To be killed by it.
        os.write(1, f"{os.getpid()}\n".encode())
        report(client, f"{name}-child", half)


if __name__ == "__main__":
    main()
