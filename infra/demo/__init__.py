"""The main job: a public trace of real requests becomes usage, charges and balances, checked to the nano-dollar."""
