"""What models lately produced for whom: the estimate of a call that names no limit."""

from collections import OrderedDict, deque
from typing import Final

SAMPLES_MIN: Final = 20
SAMPLES_MAX: Final = 200
PAIRS_MAX: Final = 10_000
_PERCENT: Final = 95


class OutputLately:
    """Output tokens per choice of the last calls, by account root and model. What is not seen for long is forgotten."""

    def __init__(self) -> None:
        self._samples: OrderedDict[tuple[str, str], deque[int]] = OrderedDict()

    def add(self, root: str, model: str, output_tokens: int) -> None:
        """A call produced this many tokens per choice."""
        pair = (root, model)
        self._samples.setdefault(pair, deque(maxlen=SAMPLES_MAX)).append(output_tokens)
        self._samples.move_to_end(pair)
        if len(self._samples) > PAIRS_MAX:
            self._samples.popitem(last=False)

    def percentile(self, root: str, model: str) -> int | None:
        """What 95 of 100 calls stay within; None while too few were seen."""
        found = self._samples.get((root, model))
        if found is None or len(found) < SAMPLES_MIN:
            return None
        return sorted(found)[-(-len(found) * _PERCENT // 100) - 1]
