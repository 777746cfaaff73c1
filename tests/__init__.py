"""Tests, named as laws. `conftest.py` says which fixtures there are."""
