"""Laws of the `scrip` command: it has all commands, and imports what the one that was asked for needs."""

import subprocess
import sys

import pytest
from typer.main import get_group

from infra.cli import COMMANDS, app_for


@pytest.mark.parametrize("module", COMMANDS)
def test_a_module_has_the_commands_for_which_it_is_imported(module: str) -> None:
    for command in COMMANDS[module]:
        assert list(get_group(app_for((command, "--help"))).commands) == list(COMMANDS[module])


@pytest.mark.parametrize("arguments", [(), ("--help",), ("nonsense",)])
def test_all_are_listed_when_none_is_asked_for(arguments: tuple[str, ...]) -> None:
    assert list(get_group(app_for(arguments)).commands) == [each for some in COMMANDS.values() for each in some]


def test_no_service_is_imported_before_a_command_is_asked_for() -> None:
    """A process of an audit imports as much again."""
    code = "import sys, infra.cli; print([name for name in sys.modules if name.split('.')[0] == 'services'])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
