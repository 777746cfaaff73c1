"""Laws of what a stack runs: a ledger that only answers stands beside the owner if it is asked for."""

from pathlib import Path

import pytest

from infra import services, state
from infra.services import LEDGER_READER, LEDGER_READER_VARIABLE, SERVICES, SIGNING_KEY_VARIABLE, chosen_services
from infra.state import Credentials, Layout
from infra.supervisor import Stack


def test_a_reading_ledger_runs_only_if_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LEDGER_READER_VARIABLE, raising=False)
    assert chosen_services() == SERVICES
    monkeypatch.setenv(LEDGER_READER_VARIABLE, "0")
    assert chosen_services() == SERVICES
    monkeypatch.setenv(LEDGER_READER_VARIABLE, "1")
    assert chosen_services() == (*SERVICES, LEDGER_READER)
    assert len({service.name for service in chosen_services()}) == len(chosen_services())


def test_a_reading_ledger_is_told_what_the_ledger_is_told_but_its_port_and_that_it_owns_nothing(tmp_path: Path) -> None:
    ledger = next(service for service in SERVICES if service.name == "ledger")
    passwords = {"ledger": "secret", "ledger_owner": "secret"}
    stack = Stack(
        layout=Layout(tmp_path),
        ports=dict(state.PORTS),
        credentials=Credentials(nats=passwords, postgres=passwords),
        services=(ledger, LEDGER_READER),
    )
    owner, reader = stack.service_environment(ledger), stack.service_environment(LEDGER_READER)
    changed = {name for name in owner.keys() | reader.keys() if owner.get(name) != reader.get(name)}
    assert changed == {"SCRIP_HTTP_PORT", "SCRIP_LEDGER_OWNS", "SCRIP_LEDGER_SIGNING_KEY_FILE"}
    assert reader["SCRIP_LEDGER_OWNS"] == "false"
    # What signs is for the owner alone.
    assert "SCRIP_LEDGER_SIGNING_KEY_FILE" not in reader
    assert services.LEDGER_READER.role == "ledger"


def test_a_signing_key_in_the_environment_is_told_to_the_owner_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SIGNING_KEY_VARIABLE, "a private key")
    passwords = {service.role: "secret" for service in SERVICES}
    stack = Stack(
        layout=Layout(tmp_path),
        ports=dict(state.PORTS),
        credentials=Credentials(nats=passwords, postgres=passwords, tokens=passwords, webhook_secret="secret"),
        services=(*SERVICES, LEDGER_READER),
    )
    knowing = [each.name for each in stack.services if SIGNING_KEY_VARIABLE in stack.service_environment(each)]
    assert knowing == ["ledger"]
    assert SIGNING_KEY_VARIABLE not in stack.child_environment()
