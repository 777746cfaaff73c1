"""Metering: the permanent usage log, and the only service that says what use costs."""
