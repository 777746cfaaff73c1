"""`python -m infra.simulators.provider`: the simulated provider as a process, on loopback."""

from pathlib import Path
from typing import Annotated

import typer

from infra.simulators.provider.app import NAME, Settings, build_app
from infra.simulators.provider.directives import Disconnect
from infra.simulators.running import serve

PORT = 8086


def run(
    *,
    port: Annotated[int, typer.Option(envvar="SCRIP_PORT_PROVIDER", help="On 127.0.0.1.")] = PORT,
    key: Annotated[
        list[str], typer.Option(envvar="SCRIP_PROVIDER_KEYS", help="An accepted key; without, any sk-sim-….")
    ] = [],  # noqa: B006 - typer copies it, and knows no other way to say "none"
    disconnect: Annotated[
        Disconnect, typer.Option(envvar="SCRIP_PROVIDER_DISCONNECT", help="What a client's leaving does.")
    ] = "drain",
    token_seconds: Annotated[
        float, typer.Option(envvar="SCRIP_PROVIDER_TOKEN_SECONDS", help="Time to generate one token.")
    ] = 0.002,
    state: Annotated[
        Path | None, typer.Option(envvar="SCRIP_PROVIDER_STATE", help="Keep the count in this file.")
    ] = None,
) -> None:
    """A model provider that speaks OpenAI's shape and keeps its own count."""
    settings = Settings(keys=frozenset(key), disconnect=disconnect, token_seconds=token_seconds, state=state)
    serve(build_app(settings), name=NAME, port=port)


if __name__ == "__main__":
    typer.run(run)
