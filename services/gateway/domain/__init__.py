"""What the gateway decides: quotes, counts, which secret. Pure: no I/O, clock, random."""
