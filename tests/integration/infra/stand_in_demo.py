"""A demo that fails with an exit code of its own."""

import sys

if __name__ == "__main__":
    sys.exit(7)
