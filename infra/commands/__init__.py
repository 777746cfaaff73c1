"""The commands of `scrip`, one module per subject; each adds its own to the app in `register(app)`."""
