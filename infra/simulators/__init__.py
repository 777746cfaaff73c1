"""Stand-ins that behave, for the demo and the tests: a model provider and Stripe. See README.md."""
