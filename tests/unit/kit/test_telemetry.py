"""Laws of logging: one JSON object per line, with time, service and level, and never a secret."""

import json
import subprocess
import sys

SCRIPT = """
import logging
from pydantic import SecretStr
from services.kit.telemetry import configure_logging, get_logger
log = get_logger("before.configuring")
configure_logging(service="ledger", level="info")
log.debug("not wanted")
log.info("started", password=SecretStr("hunter2"), url="postgresql://ledger:hunter2@127.0.0.1/scrip", port=1)
logging.getLogger("some.library").warning("a library said %s", "so", extra={"pool": "reads"})
try:
    raise RuntimeError("line 1\\nline 2")
except RuntimeError:
    log.exception("failed")
"""


def test_every_line_is_one_json_object_without_secrets() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert "hunter2" not in done.stderr
    started, library, failed = map(json.loads, done.stderr.splitlines())
    assert {key: started[key] for key in ("event", "level", "service", "module", "password", "port")} == {
        "event": "started",
        "level": "info",
        "service": "ledger",
        "module": "before.configuring",
        "password": "***",
        "port": 1,
    }
    assert started["url"] == "postgresql://ledger:***@127.0.0.1/scrip"
    assert started["timestamp"].endswith("Z")
    assert (library["event"], library["level"], library["pool"]) == ("a library said so", "warning", "reads")
    assert "RuntimeError: line 1\nline 2" in failed["exception"]
