"""What the ledger decides, and how its state follows from its journal. Pure: no I/O, clock, randomness."""
