"""Runs the supervisor with stand-ins for the services. An argument names a demo: play it, then end."""

import sys

from rich.console import Console

from infra.errors import StackError
from infra.services import Service
from infra.supervisor import up

SERVICES = tuple(Service(name=name, module="tests.integration.infra.stand_in") for name in ("ledger", "metering"))

if __name__ == "__main__":
    demo_module = sys.argv[1] if len(sys.argv) > 1 else None
    try:
        sys.exit(up(demo_module=demo_module, stay=demo_module is None, console=Console(), services=SERVICES))
    except StackError as error:
        sys.exit(str(error))
