"""What keyvault decides, as pure functions: sealing, the key ring, formats, policies. Randomness is handed in."""
