"""The files of the repository, and their syntax trees."""

import ast
import gc
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SERVICES = tuple(
    sorted(path.parent.name for path in (REPOSITORY / "services").glob("*/__init__.py") if path.parent.name != "kit")
)


@dataclass(frozen=True, slots=True)
class Source:
    """A Python file: its path from the repository's root, its text and its tree."""

    path: Path
    text: str
    tree: ast.Module

    @property
    def name(self) -> str:
        return self.path.as_posix()

    def where(self, node: ast.AST) -> str:
        """`contracts/money.py:12`."""
        return f"{self.name}:{getattr(node, 'lineno', 1)}"


@cache
def files() -> tuple[Path, ...]:
    """What is committed, or would be: everything git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    )
    paths = (Path(name) for name in listed.stdout.split("\0") if name)
    return tuple(sorted(path for path in paths if (REPOSITORY / path).is_file()))


@cache
def sources() -> tuple[Source, ...]:
    """Every Python file of ours."""
    found = []
    # Millions of nodes that stay: the collector would look through them again and again, now and in every later test.
    gc.disable()
    try:
        for path in files():
            if path.suffix == ".py":
                text = (REPOSITORY / path).read_text(encoding="utf-8")
                found.append(Source(path, text, ast.parse(text)))
        gc.freeze()
    finally:
        gc.enable()
    return tuple(found)


def within(*roots: str) -> Iterator[Source]:
    """The Python files under these directories."""
    return (source for source in sources() if source.path.parts[0] in roots)


def pure() -> Iterator[Source]:
    """contracts/ and the domain of every service: what may only compute."""
    for source in within("contracts", "services"):
        if source.path.parts[0] == "contracts" or source.path.parts[2:3] == ("domain",):
            yield source


def dotted(node: ast.AST) -> str:
    """`datetime.now` for the expression that says so; empty for anything but names and attributes."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=attribute):
            before = dotted(value)
            return f"{before}.{attribute}" if before else f"….{attribute}"
        case _:
            return ""


def imported(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """Every imported module or name, dotted: `os`, `datetime.datetime`."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)
