"""The gateway's composition root: constructs everything and reads the settings. Importing it does no I/O.

Run as `python -m services.gateway.app`.
"""

import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

from fastapi import FastAPI

from services.gateway.domain.lately import OutputLately
from services.gateway.engine import KeyVerifier, Outside, PriceReader, Providers, Recorder, Services
from services.gateway.handlers import Gateway, Running
from services.gateway.projections import CurrentPrices, VerifiedKeys
from services.gateway.routes import PATHS, SECURITY, routers
from services.gateway.settings import GatewaySettings
from services.gateway.store import Spool
from services.gateway.subscribers import subscribe_keys
from services.kit.broker import connect_nats, nats_check
from services.kit.http import Readiness, serve
from services.kit.running import essential_task, finish_tasks, service_app
from services.kit.telemetry import configure_logging
from services.kit.tracing import configure_tracing

SERVICE: Final = "gateway"


def build(settings: GatewaySettings) -> FastAPI:
    """The application. Everything is connected when its lifespan begins, and finished when it ends."""
    app = service_app(
        SERVICE,
        settings,
        running=_running,
        routers=routers,
        # The routes have a limit of their own, and tell it in their own shape.
        body_bytes_max=sys.maxsize,
    )
    schema_of_kit = app.openapi

    def openapi() -> dict[str, Any]:
        # Plain ASGI routes are not described by themselves.
        schema = schema_of_kit()
        schema["paths"].update(PATHS)
        schema.setdefault("components", {})["securitySchemes"] = SECURITY
        return schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI documents it as the way to extend a schema
    return app


@asynccontextmanager
async def _running(settings: GatewaySettings, readiness: Readiness) -> AsyncIterator[Gateway]:
    async with AsyncExitStack() as stack:
        spool = Spool(settings.spool_file, bytes_max=settings.spool_bytes_max)
        await spool.open()
        stack.push_async_callback(spool.close)
        client = await connect_nats(settings)
        stack.push_async_callback(client.close)
        providers = Providers(settings)
        stack.push_async_callback(providers.close)

        keys = VerifiedKeys(seconds=settings.key_cache_seconds)
        await subscribe_keys(client, keys)
        prices = CurrentPrices()
        services = Services(client, seconds=settings.ask_seconds)
        recorder = Recorder(client, services=services, spool=spool, publish_seconds=settings.publish_seconds)
        price_reader = PriceReader(settings, prices)
        readiness.add("nats", nats_check(client))
        readiness.add("price_book", prices.check)
        readiness.add("spool", spool.check)

        running = Running(count_max=settings.calls_max)
        tasks = [
            essential_task(recorder.run(), name="recorder"),
            essential_task(price_reader.run(), name="price-reader"),
        ]
        try:
            yield Gateway(
                settings=settings,
                outside=Outside(
                    services=services,
                    keys=KeyVerifier(services, keys),
                    providers=providers,
                    recorder=recorder,
                    spool=spool,
                    prices=prices,
                ),
                lately=OutputLately(),
                running=running,
            )
        finally:
            # Calls that were cut off by the end of the process report what was produced.
            await running.ended(seconds=settings.publish_seconds + 1)
            price_reader.stop()
            recorder.stop()
            await finish_tasks(tasks, deadline_seconds=settings.publish_seconds)


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    settings = GatewaySettings()
    configure_logging(service=SERVICE, level=settings.log_level)
    configure_tracing(SERVICE, settings)
    serve(build(settings), settings)


if __name__ == "__main__":
    main()
