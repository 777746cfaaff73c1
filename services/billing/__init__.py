"""Billing: Stripe's payments become facts for the ledger, each once; packages and plans are data."""
