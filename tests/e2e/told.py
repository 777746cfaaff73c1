"""The story as README.md shows it, and as a run tells it: equal once the name of its account is masked."""

import re
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).resolve().parents[2]
FIRST_LINE: Final = "The story, on a simulated provider and a simulated Stripe"


def told(output: str) -> list[str]:
    """The story's lines in what was printed."""
    lines = output.splitlines()
    assert FIRST_LINE in lines, output
    start = lines.index(FIRST_LINE)
    steps = [line for line in lines[start + 1 :] if re.match(r"\d+\. ", line)]
    return [masked(line) for line in (FIRST_LINE, *steps)]


def shown_in_readme() -> list[str]:
    """The story's lines between the markers in README.md."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- story -->\n(.*?)<!-- /story -->", text, re.DOTALL)
    assert found is not None, "README.md has no story between its markers"
    return [masked(line) for line in found[1].splitlines() if line.strip("`\n")]


def masked(line: str) -> str:
    """A line without what differs from run to run: the account's name."""
    return re.sub(r"\bstory-[0-9a-f]{6}\b", "story-<name>", line)
