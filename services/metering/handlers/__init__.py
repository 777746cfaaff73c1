"""What happens to use: logged once, charged once. Each handler is one transaction on a whole batch.

An answer is given (a message acknowledged) after the commit only: whoever dies before it is asked again, and finds
in `seen` what it did. All numbering happens under the lock of the partition's head, which also holds the directory and
the aliases still: an account is either found open by the batch that logs its use, or finds that use set aside when it
is opened; and likewise an alias.
"""

from services.metering.handlers.aliases import AliasTaken, NamesAnAccount, add_alias, charge_mapped, delete_alias
from services.metering.handlers.batches import Batch, Ingested, Known, Reading
from services.metering.handlers.ingesting import ingest, put_aside
from services.metering.handlers.waiting import charge_unpriced, open_account

__all__ = [
    "AliasTaken",
    "Batch",
    "Ingested",
    "Known",
    "NamesAnAccount",
    "Reading",
    "add_alias",
    "charge_mapped",
    "charge_unpriced",
    "delete_alias",
    "ingest",
    "open_account",
    "put_aside",
]
