"""Stops what a killed supervisor left running on a state directory, and removes the directory.

Needs the standard library only, so that `make clean` works without an environment: `python3 -m infra.leftovers`.
"""

import signal
import sys
from typing import Final

from infra import processes, state
from infra.errors import StackError
from infra.processes import Found
from infra.servers import EmbeddedNats, EmbeddedPostgres
from infra.state import Layout

# In every service's environment, so that it is recognised when nobody remembers its process id.
CHILD_VARIABLE: Final = "SCRIP_CHILD_OF"

SECONDS_EACH: Final = 15.0


def stop(layout: Layout) -> None:
    """Stop services, NATS and Postgres of this directory. The caller holds the directory's lock."""

    def is_service(process: Found) -> bool:
        return processes.environment_holds(process.pid, CHILD_VARIABLE, str(layout.directory))

    processes.stop_leftovers(is_service, signal.SIGTERM, seconds_each=SECONDS_EACH)
    EmbeddedNats(layout.nats).stop_leftovers()
    EmbeddedPostgres(layout.postgres, password="").stop_leftovers()


def clean(layout: Layout) -> None:
    """Stop whatever runs on this directory, the supervisor first; remove it and all that was made outside it."""
    if not layout.directory.exists():
        return
    supervisor = state.holder(layout)

    def is_supervisor(process: Found) -> bool:
        return process.pid == supervisor

    # It has its own children to wait for.
    processes.stop_leftovers(is_supervisor, signal.SIGTERM, seconds_each=4 * SECONDS_EACH)
    with state.locked(layout):
        stop(layout)
        EmbeddedPostgres(layout.postgres, password="").remove()
        state.remove(layout)


if __name__ == "__main__":
    try:
        clean(state.locate())
    except StackError as error:
        sys.exit(str(error))
