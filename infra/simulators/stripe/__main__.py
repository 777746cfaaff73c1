"""`python -m infra.simulators.stripe`: the simulated Stripe as a process, on loopback."""

from pathlib import Path
from typing import Annotated

import typer

from infra.simulators.running import serve
from infra.simulators.stripe.app import NAME, Settings, build_app
from infra.simulators.stripe.webhooks import DeliverySettings, Endpoint

PORT = 8087


def run(
    *,
    port: Annotated[int, typer.Option(envvar="SCRIP_PORT_STRIPE", help="On 127.0.0.1.")] = PORT,
    key: Annotated[
        list[str], typer.Option(envvar="SCRIP_STRIPE_KEYS", help="An accepted key; without, any sk_test_….")
    ] = [],  # noqa: B006 - typer copies it, and knows no other way to say "none"
    webhook_url: Annotated[
        list[str], typer.Option(envvar="SCRIP_STRIPE_WEBHOOK_URL", help="Where events go; may be repeated.")
    ] = [],  # noqa: B006 - as above
    webhook_secret: Annotated[
        str, typer.Option(envvar="SCRIP_STRIPE_WEBHOOK_SECRET", help="What events are signed with.")
    ] = "whsec_simulated",
    duplicate: Annotated[
        float, typer.Option(envvar="SCRIP_STRIPE_DUPLICATE", min=0, max=1, help="Share of deliveries sent twice.")
    ] = 0.0,
    reorder: Annotated[
        float, typer.Option(envvar="SCRIP_STRIPE_REORDER", min=0, help="Seconds a delivery may be held back.")
    ] = 0.0,
    delay: Annotated[
        float, typer.Option(envvar="SCRIP_STRIPE_DELAY", min=0, help="Seconds every delivery is held back.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(envvar="SCRIP_STRIPE_SEED", help="Chooses which and how long.")] = 0,
    concurrent: Annotated[
        int, typer.Option(envvar="SCRIP_STRIPE_CONCURRENT", min=1, help="Deliveries at the same time.")
    ] = 1,
    retry_first: Annotated[
        float, typer.Option(envvar="SCRIP_STRIPE_RETRY_FIRST", min=0, help="Seconds before the first retry; doubles.")
    ] = 0.2,
    retry_max: Annotated[
        float, typer.Option(envvar="SCRIP_STRIPE_RETRY_MAX", min=0, help="Seconds between retries at most.")
    ] = 10.0,
    state: Annotated[
        Path | None, typer.Option(envvar="SCRIP_STRIPE_STATE", help="Keep everything in this SQLite file.")
    ] = None,
) -> None:
    """A Stripe for one machine: Checkout, payments, refunds, disputes, webhooks."""
    delivery = DeliverySettings(
        endpoints=tuple(Endpoint(url, webhook_secret) for url in webhook_url),
        duplicate=duplicate,
        reorder_seconds=reorder,
        delay_seconds=delay,
        seed=seed,
        concurrent=concurrent,
        retry_seconds_first=retry_first,
        retry_seconds_max=retry_max,
    )
    serve(build_app(Settings(keys=frozenset(key), state=state, delivery=delivery)), name=NAME, port=port)


if __name__ == "__main__":
    typer.run(run)
