"""Laws of the state directory: private, kept, held by one."""

import errno
import hashlib
import json
import os
import stat
from pathlib import Path

import pytest

from infra import state
from infra.errors import AlreadyRunning, DiskFull, NotWritable, StackError, from_os_error
from infra.state import Layout


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path / ".scrip")
    state.prepare(made)
    return made


def generate(layout: Layout) -> state.Credentials:
    return state.ensure_credentials(layout, nats_users=["operator", "ledger"], postgres_roles=["postgres", "ledger"])


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_everything_in_the_directory_is_private(layout: Layout) -> None:
    generate(layout)
    with state.locked(layout):
        pass
    assert mode(layout.directory) == 0o700
    files = [path for path in layout.directory.iterdir() if path.is_file()]
    assert {path.name for path in files} == {"credentials.json", "service-tokens.json", "lock"}
    assert {mode(path) for path in files} == {0o600}


def test_a_directory_that_was_open_is_closed(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "open")
    layout.directory.mkdir(mode=0o755)
    state.prepare(layout)
    assert mode(layout.directory) == 0o700


def test_existing_credentials_are_kept_and_missing_ones_added(layout: Layout) -> None:
    first = generate(layout)
    second = state.ensure_credentials(layout, nats_users=["operator", "metering"], postgres_roles=["metering"])
    assert second.nats == first.nats | {"metering": second.nats["metering"]}
    assert second.postgres == first.postgres | {"metering": second.postgres["metering"]}
    assert second.tokens == first.tokens
    assert state.load_credentials(layout) == second


def test_no_two_secrets_are_alike_and_all_fit_into_a_url(layout: Layout) -> None:
    made = generate(layout)
    secrets = [*made.nats.values(), *made.postgres.values(), *made.tokens.values()]
    assert len(set(secrets)) == len(secrets)
    assert all(len(secret) >= 32 and secret.replace("-", "").replace("_", "").isalnum() for secret in secrets)


def test_services_get_hashes_and_scopes_but_no_token(layout: Layout) -> None:
    made = generate(layout)
    text = layout.tokens_file.read_text()
    assert not any(token in text for token in made.tokens.values())
    by_principal = {entry["principal"]: entry for entry in json.loads(text)}
    assert by_principal["demo"]["sha256"] == hashlib.sha256(made.tokens["demo"].encode()).hexdigest()
    assert by_principal["demo"]["scopes"] == ["usage:write"]
    assert "operate" in by_principal["operator"]["scopes"]


def test_credentials_do_not_show_in_their_repr(layout: Layout) -> None:
    made = generate(layout)
    assert not any(secret in repr(made) for secret in [*made.nats.values(), *made.tokens.values()])


def test_damaged_credentials_are_refused_with_one_sentence(layout: Layout) -> None:
    layout.credentials_file.write_text("{")
    with pytest.raises(StackError, match="damaged"):
        generate(layout)


def test_a_directory_is_held_by_one_supervisor(layout: Layout) -> None:
    assert state.holder(layout) is None
    with state.locked(layout):
        assert state.holder(layout) == os.getpid()
        with pytest.raises(AlreadyRunning, match=str(os.getpid())), state.locked(layout):
            pass
    assert state.holder(layout) is None
    with state.locked(layout):
        pass


def test_what_runs_is_believed_only_while_the_directory_is_held(layout: Layout) -> None:
    run = state.Run(supervisor=os.getpid(), ports={"nats": 1}, processes={"NATS": 2})
    state.write_run(layout, run)
    assert state.current_run(layout) is None
    with state.locked(layout):
        assert state.current_run(layout) == run
        assert state.current_ports(layout) == {"nats": 1}


def test_ports_are_moved_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRIP_PORT_NATS_MONITOR", "9191")
    assert state.ports() == {**state.PORTS, "nats_monitor": 9191}


@pytest.mark.parametrize("text", ["", "0", "65536", "-1", "http", "8080.0"])
def test_a_port_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRIP_PORT_LEDGER", text)
    with pytest.raises(StackError, match="SCRIP_PORT_LEDGER"):
        state.ports()


def test_a_port_given_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRIP_PORT_LEDGER", "8090")
    with pytest.raises(StackError, match="ledger and nats"):
        state.ports()


def test_the_state_directory_is_chosen_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SCRIP_STATE", raising=False)
    assert state.locate().directory == tmp_path / ".scrip"
    monkeypatch.setenv("SCRIP_STATE", "elsewhere")
    assert state.locate().directory == tmp_path / "elsewhere"


def test_a_full_disk_is_refused_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "DISK_FREE_BYTES_MIN", 1 << 62)
    with pytest.raises(DiskFull):
        state.prepare(Layout(tmp_path / ".scrip"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(NotWritable):
        state.prepare(Layout(tmp_path / ".scrip"))


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.EACCES, NotWritable), (errno.EROFS, NotWritable), (errno.ENOSPC, DiskFull), (errno.EDQUOT, DiskFull)],
)
def test_a_refusal_of_the_system_becomes_a_sentence(number: int, kind: type[StackError]) -> None:
    assert isinstance(from_os_error(OSError(number, "no"), Path("/x")), kind)


def test_an_unknown_refusal_of_the_system_stays_what_it_is() -> None:
    assert from_os_error(OSError(errno.EIO, "no"), Path("/x")) is None
