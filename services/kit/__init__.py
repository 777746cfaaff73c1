"""Plumbing that knows no service: broker, database, outbox, leases, batching, HTTP, tokens, telemetry, settings."""
