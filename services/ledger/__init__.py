"""The ledger: accounts, wallets, lots, holds and the journal they are summed from. It decides every balance."""
