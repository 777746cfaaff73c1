"""The rules of the code, checked on the code."""
