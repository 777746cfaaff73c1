"""What is committed says nothing of the machine it was made on, and installs exactly what it names."""

import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.architecture.sources import REPOSITORY, files

LOCKS = ("requirements.lock", "requirements-dev.lock")

# Written in parts, so that this file does not find itself.
MACHINE = re.compile(
    r"(?<![\w./~-])/(?:home|Users|root|work|private/var|mnt|workspace)/[\w.-]+"
    r"|\b[A-Za-z]:\\Users\\"
)
REGISTRY = re.compile(
    r"--(?:extra-)?index" + "-url|--trusted" + "-host|--find" + "-links|index" + "_url"
    r"|https?://[^\s\"'<>)]*(?:/simple\b|/api/pypi|artifactory|nexus|/-/npm)"
    r"|(?:files\.pythonhosted|registry\.npmjs|pypi\.python)" + r"\.org"
)


def text_of(path: Path) -> str:
    return (REPOSITORY / path).read_text(encoding="utf-8")


@cache
def texts() -> dict[Path, str]:
    """Every committed text file."""
    found = {}
    for path in files():
        try:
            found[path] = text_of(path)
        except UnicodeDecodeError:
            continue
    return found


@cache
def locked(lock: str) -> dict[str, list[Requirement]]:
    """The pinned requirements of a lock, by name: a universal lock may pin one per platform."""
    joined = re.sub(r"\\\n\s*", " ", text_of(Path(lock)))
    found: dict[str, list[Requirement]] = {}
    for line in joined.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            requirement = Requirement(re.sub(r"\s--hash=\S+", "", line).strip())
            found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def wanted() -> tuple[list[str], list[str]]:
    """What pyproject.toml asks for: at run time, and for development besides."""
    project = tomllib.loads(text_of(Path("pyproject.toml")))
    build = project["build-system"]["requires"]
    return project["project"]["dependencies"] + build, project["project"]["optional-dependencies"]["dev"]


def test_no_path_of_a_machine_is_committed() -> None:
    for path, text in texts().items():
        found = MACHINE.search(text)
        assert found is None, f"{path}: {found}"
        assert str(REPOSITORY) not in text or len(REPOSITORY.parts) < 3, f"{path} names {REPOSITORY}"


def test_no_registry_is_committed() -> None:
    for path, text in texts().items():
        found = REGISTRY.search(text)
        assert found is None, f"{path}: {found}"


@pytest.mark.parametrize("lock", LOCKS)
def test_each_lock_pins_with_hashes_and_names_no_address(lock: str) -> None:
    text = text_of(Path(lock))
    assert "://" not in text
    assert not re.search(r"^\s*-(?!-hash)", text, re.MULTILINE)
    assert " @ " not in text
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in joined.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            assert re.search(r"\s--hash=sha256:[0-9a-f]{64}\b", line), line
            assert re.match(r"[A-Za-z0-9._-]+(\[[\w,-]+\])?==[\w.!+]+", line), line


@pytest.mark.parametrize("lock", LOCKS)
def test_what_pyproject_asks_for_is_locked(lock: str) -> None:
    runtime, development = wanted()
    for text in runtime + (development if lock == "requirements-dev.lock" else []):
        asked = Requirement(text)
        pinned = locked(lock).get(canonicalize_name(asked.name))
        assert pinned, f"{lock} lacks {asked.name}"
        for each in pinned:
            (version,) = (specifier.version for specifier in each.specifier)
            assert asked.specifier.contains(Version(version)), f"{lock} has {each}, pyproject.toml wants {asked}"


def test_development_runs_on_what_is_installed() -> None:
    runtime, development = (locked(lock) for lock in LOCKS)
    for name, pinned in runtime.items():
        assert [str(each.specifier) for each in pinned] == [str(each.specifier) for each in development[name]], name
