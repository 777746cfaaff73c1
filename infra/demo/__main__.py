"""`python -m infra.demo` is `scrip demo`, then `scrip story`: the supervisor plays them as a process of their own."""

import sys

from infra.cli import main

if __name__ == "__main__":
    for command in ("demo", "story"):
        sys.argv[1:] = [command]
        try:
            main()
        except SystemExit as end:
            # Nothing is told on the ground of a bill that differs.
            if end.code:
                raise
