"""What metering decides: which use is new, what it costs, what is charged now and what must wait. Pure."""
