"""The local stack: embedded servers, their configuration, the supervisor and the `scrip` command."""
