"""Provider secrets (sealed), access keys (hashed), key policies, and their audit trail."""
