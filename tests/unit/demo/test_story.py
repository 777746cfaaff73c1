"""When the story is not played, and how it says which step went wrong."""

import pytest
from pydantic import SecretStr

from infra.demo import story_doors
from infra.demo.story import play
from infra.demo.story_doors import Target
from infra.errors import StackError
from infra.servers import free_port
from infra.state import Run

NAMES = ("ledger", "metering", "keyvault", "billing", "gateway", "provider", "stripe")


def target(*running: str) -> Target:
    ports = {name: free_port() for name in NAMES}
    run = Run(supervisor=1, ports=ports, processes=dict.fromkeys(running, 1))
    return Target(run=run, ledger_owner_url=SecretStr("postgresql://"), operator_token="token")


@pytest.mark.parametrize(
    ("missing", "variable"), [("provider", "SCRIP_OPENAI_API_KEY"), ("stripe", "SCRIP_STRIPE_API_KEY")]
)
def test_with_a_real_key_the_story_is_not_played_and_says_so(missing: str, variable: str) -> None:
    lines: list[str] = []
    play(target(*(name for name in NAMES if name != missing)), lines.append)
    (line,) = lines
    assert "not played" in line
    assert variable in line


def test_a_story_that_goes_wrong_names_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(story_doors, "WITHOUT_ANSWER_SECONDS_MAX", 0.2)
    with pytest.raises(StackError, match=r"step 1, 'account and access key': POST .*/v1/access-keys got no answer"):
        play(target(*NAMES), lambda _line: None)
