"""Every performance claim, one command each. See README.md."""
