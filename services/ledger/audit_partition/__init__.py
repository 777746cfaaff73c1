"""The audit of one partition: a pass through its journal, beside all that is recorded of its batches.

Imports little: each process of an audit begins with this package.
"""

from services.ledger.audit_partition.findings import FINDINGS_KEPT_MAX, Finding, Reached, Result, Seen, Task
from services.ledger.audit_partition.partitions import audit_in_turn, audit_partitions, connect

__all__ = [
    "FINDINGS_KEPT_MAX",
    "Finding",
    "Reached",
    "Result",
    "Seen",
    "Task",
    "audit_in_turn",
    "audit_partitions",
    "connect",
]
