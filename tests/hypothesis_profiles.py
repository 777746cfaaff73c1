"""How long hypothesis looks: `ci` for every run, `soak` (SCRIP_HYPOTHESIS_PROFILE=soak) for the long forms."""

import os

from hypothesis import HealthCheck, settings

# A deadline measures the machine, not the law. Failures print a blob that reproduces them anywhere.
settings.register_profile("ci", deadline=None, derandomize=False, print_blob=True, max_examples=75)
settings.register_profile(
    "soak",
    parent=settings.get_profile("ci"),
    max_examples=5_000,
    suppress_health_check=[HealthCheck.too_slow],
)


def load() -> None:
    """Use the profile that SCRIP_HYPOTHESIS_PROFILE names, `ci` by default."""
    settings.load_profile(os.environ.get("SCRIP_HYPOTHESIS_PROFILE", "ci"))
