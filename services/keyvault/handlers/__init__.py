"""What happens to secrets, access keys and policies: load, decide, write, stage the fact, one transaction each.

Each docstring lists the refusals. A change that others remember (a key, a policy, an own secret) is told through the
outbox; every change is in the audit trail, in the same transaction.
"""

from services.keyvault.handlers.access_keys import (
    CreateAccessKey,
    CreatedAccessKey,
    create_access_key,
    disable_access_key,
)
from services.keyvault.handlers.leasing import flush_uses, lease_secret, verify_key
from services.keyvault.handlers.policies import set_policy
from services.keyvault.handlers.rewrapping import rewrap_all
from services.keyvault.handlers.secrets import SecretPlace, delete_expired, delete_secret, store_secret
from services.keyvault.handlers.vault import Vault

__all__ = [
    "CreateAccessKey",
    "CreatedAccessKey",
    "SecretPlace",
    "Vault",
    "create_access_key",
    "delete_expired",
    "delete_secret",
    "disable_access_key",
    "flush_uses",
    "lease_secret",
    "rewrap_all",
    "set_policy",
    "store_secret",
    "verify_key",
]
