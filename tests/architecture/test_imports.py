"""Who may import whom, by import-linter; and that importing a service's composition root does nothing."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.architecture.sources import REPOSITORY, SERVICES, sources
from tests.architecture.test_code import LAYERS

CONFIGURATION: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
    "importlinter"
]
CONTRACTS: dict[str, dict[str, Any]] = {contract["id"]: contract for contract in CONFIGURATION["contracts"]}

# Runs in a process of its own: notes whatever importing does beside reading code.
WATCH = """
import importlib, os, sys, threading

allowed = tuple({os.path.realpath(path) + os.sep for path in (sys.prefix, sys.base_prefix, *sys.argv[2:])})
done = []

def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        path, mode = os.fsdecode(arguments[0]), arguments[1] or ""
        reads_code = os.path.realpath(path).startswith(allowed) and not path.endswith((".toml", ".env"))
        system = path.startswith(("/proc/", "/sys/", "/usr/", "/lib", "/etc/ld.", "/etc/localtime", "/dev/null"))
        if any(flag in mode for flag in "wax+") and not path.endswith((".pyc",)) and "__pycache__" not in path:
            done.append(f"writes {path}")
        # An editable install is found under a path that does not exist.
        elif not (reads_code or system or path.endswith(".__path_hook__")):
            done.append(f"reads {path}")
    elif event.startswith(("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostby", "socket.sendto")):
        done.append(f"{event} {arguments[1:]}")
    elif event in ("subprocess.Popen", "os.system", "os.fork", "os.posix_spawn", "os.exec", "os.remove", "os.mkdir"):
        done.append(f"{event} {arguments[:1]}")

sys.addaudithook(watch)
importlib.import_module(sys.argv[1])
done += [f"starts thread {thread.name}" for thread in threading.enumerate() if thread is not threading.main_thread()]
sys.stderr.write("\\n".join(done))
sys.exit(1 if done else 0)
"""


def lint(directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--config", "pyproject.toml", "--no-cache"],
        cwd=directory,
        env={"PYTHONPATH": str(directory), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_import_rules_are_kept() -> None:
    linted = lint(REPOSITORY)
    assert linted.returncode == 0, linted.stdout + linted.stderr


def test_the_import_rules_are_about_every_service_and_layer() -> None:
    layers = CONTRACTS["whole"]["layers"]
    assert layers == ["infra", " | ".join(f"services.{service}" for service in SERVICES), "services.kit", "contracts"]
    assert CONTRACTS["service"]["containers"] == [f"services.{service}" for service in SERVICES]
    listed = " ".join(CONTRACTS["service"]["layers"]).translate(str.maketrans("()|:", "    ")).split()
    assert sorted(listed) == sorted([*LAYERS, "domain"])


def test_a_forbidden_import_breaks_each_rule(tmp_path: Path) -> None:
    for source in sources():
        if source.path.parts[0] in CONFIGURATION["root_packages"]:
            (tmp_path / source.path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / source.path).write_text(source.text, encoding="utf-8")
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    assert lint(tmp_path).returncode == 0
    service, other = SERVICES[0], SERVICES[-1]
    # A layer that is a package: each of its modules is of that layer.
    inside = next(
        source.path
        for source in sources()
        if len(source.path.parts) == 4 and source.path.parts[2] in LAYERS and source.path.stem != "__init__"
    )
    app = f"services.{inside.parts[1]}.app"
    for name, line in {
        "contracts/money.py": "import services.kit.clock",
        f"services/{service}/domain/__init__.py": "import asyncio",
        f"services/{service}/tables.py": f"import services.{service}.handlers",
        f"services/{other}/handlers.py": f"import services.{service}.tables",
        "services/kit/clock.py": f"import services.{other}.tables",
        inside.as_posix(): f"import {app}",
    }.items():
        with (tmp_path / name).open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")
    (tmp_path / f"services/{other}/miscellany.py").write_text('"""No layer."""\n', encoding="utf-8")
    linted = lint(tmp_path)
    said = " ".join(linted.stdout.split())
    assert linted.returncode == 1
    for contract in CONTRACTS.values():
        assert f"{contract['name']} BROKEN" in said, linted.stdout
    assert "miscellany" in said
    assert f"{'.'.join(inside.with_suffix('').parts)} -> {app}" in said


def watch(module: str, directory: Path, *, path: Path) -> subprocess.CompletedProcess[str]:
    """Import a module somewhere with nothing in its environment, and note what that does."""
    return subprocess.run(
        [sys.executable, "-c", WATCH, module, *(str(REPOSITORY / root) for root in ("services", "contracts"))],
        cwd=directory,
        env={"PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("service", SERVICES)
def test_importing_a_composition_root_does_no_io(service: str, tmp_path: Path) -> None:
    watched = watch(f"services.{service}.app", tmp_path, path=REPOSITORY)
    assert watched.returncode == 0, watched.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import socket\nsocket.create_server(('127.0.0.1', 0))",
        "import socket\nsocket.getaddrinfo('localhost', 80)",
        "open('settings.env')",
        "open('state', 'w')",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.mkdir('state')",
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()",
        "import os\nos.environ['SCRIP_NATS_URL']",
    ],
)
def test_io_at_import_would_be_noticed(code: str, tmp_path: Path) -> None:
    (tmp_path / "settings.env").touch()
    (tmp_path / "eager.py").write_text(code)
    watched = watch("eager", tmp_path, path=tmp_path)
    assert watched.returncode == 1, watched.stderr
