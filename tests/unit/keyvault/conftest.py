"""Loads the hypothesis profile."""

from tests import hypothesis_profiles

hypothesis_profiles.load()
