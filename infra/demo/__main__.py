"""`python -m infra.demo` is `scrip demo`: the supervisor plays it as a process of its own."""

import sys

from infra.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["demo"]
    main()
