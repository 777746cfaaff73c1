"""What the ledger is told beyond what every service is told."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr

from contracts.ledger import LIST_MAX
from services.kit.settings import ServiceSettings


class LedgerSettings(ServiceSettings):
    """Environment variables with the prefix `SCRIP_`.

    Heads are signed with `ledger_signing_key`, a private key in PEM form, or else with the one in the file.
    """

    service: str = "ledger"
    # A process that owns no partitions only answers: it reads from the database, and hands commands to the owners.
    ledger_owns: bool = True
    # How much is decided at once, and of commands and of charges each may wait to be, in charge lines; a command counts
    # as eight. More commands are refused as busy.
    batch_cost_max: Annotated[int, Field(gt=0)] = 4_000
    queue_cost_max: Annotated[int, Field(gt=0)] = 20_000
    # A body, over HTTP and over request/reply, and the commands of a list.
    body_bytes_max: Annotated[int, Field(gt=0)] = 1 << 20
    list_commands_max: Annotated[int, Field(gt=0, le=LIST_MAX)] = LIST_MAX
    # How often what is due is looked for where nobody asks, and how much of it is done at once.
    sweep_seconds: Annotated[float, Field(gt=0)] = 1.0
    sweep_cost_max: Annotated[int, Field(gt=0)] = 256
    ledger_signing_key: SecretStr | None = None
    ledger_signing_key_file: Path | None = None
    outbox_keep_seconds: Annotated[float, Field(gt=0)] = 7 * 86_400.0
