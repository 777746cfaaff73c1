"""What the ledger is asked to do, and what it answers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from services.ledger.domain.commands import (
    CatchUp,
    ChargeLine,
    Command,
    ResolveHold,
    ReverseCharge,
)
from services.ledger.translate import (
    Bundle,
)

# A command by itself is read, answered, recorded and told of by itself (bench/README.md: 350 µs for 40).
COMMAND_COST: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandItem:
    """A command, who sent it, under which key, and the hash of what was sent. A dry run changes nothing.

    `look_up`: whether its key, and what else it may repeat, is known; else it is taken for new, until that shows.
    """

    partition: int
    principal: str
    key: str
    body_hash: bytes
    command: Command
    dry_run: bool = False
    look_up: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ListItem:
    """Commands on one tree, in order. One that is all or nothing has a key and a hash; its commands' do not count."""

    partition: int
    principal: str
    commands: tuple[CommandItem, ...]
    key: str | None = None
    body_hash: bytes = b""
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class SweepItem:
    """What nobody asked for but time: no command is recorded, and nothing at all if nothing is due any more."""

    partition: int
    command: CatchUp | ResolveHold


@dataclass(frozen=True, slots=True)
class BundleItem:
    """A bundle of charges, and where in its stream it stood."""

    bundle: Bundle
    stream: str
    stream_sequence: int
    subject: str
    # By the places of lines whose charging somebody wants to see.
    traceparents: Mapping[int, str] = field(default_factory=dict)

    @property
    def partition(self) -> int:
        """The partition of all its lines."""
        return self.bundle.partition


Item = CommandItem | ListItem | BundleItem | SweepItem


@dataclass(frozen=True, slots=True)
class Replied:
    """A command was answered: contracts.ledger.Reply, or ListReply, as JSON."""

    body: bytes


@dataclass(frozen=True, slots=True)
class NotLookedUp:
    """A command that was taken for new would be refused: it may be a repeat. To be asked again with `look_up`."""


@dataclass(frozen=True, slots=True)
class TracedCharge:
    """Where in the journal the charge of a traced line begins, or the code of why it is not there."""

    line: ChargeLine
    traceparent: str
    outcome: str
    transaction: str = ""
    batch: int = 0
    position: int = 0


@dataclass(frozen=True, slots=True)
class Taken:
    """A bundle's charges are in the journal; `repeated`: they had been before."""

    repeated: bool
    traced: Sequence[TracedCharge] = ()


@dataclass(frozen=True, slots=True)
class OutOfOrder:
    """A bundle came before the one with the number `expected`."""

    expected: int


@dataclass(frozen=True, slots=True)
class Conflicting:
    """A bundle has the number of one that was taken, and other contents: the two services disagree about the past."""


@dataclass(frozen=True, slots=True)
class Swept:
    """What was due was done; `entries` is how many that took."""

    entries: int


@dataclass(frozen=True, slots=True)
class NotOwner:
    """The partition is not, or no longer, owned here."""


Result = Replied | NotLookedUp | Taken | OutOfOrder | Conflicting | Swept | NotOwner


def cost_of(item: Item) -> int:
    """What deciding and writing it takes, in lines of a bundle."""
    match item:
        case BundleItem(bundle=bundle):
            return len(bundle.lines) + len(bundle.reversals)
        case ListItem(commands=commands):
            return COMMAND_COST * len(commands)
        case _:
            return COMMAND_COST


def lines_of(item: Item) -> Iterator[ChargeLine]:
    """The lines to charge."""
    match item:
        case BundleItem(bundle=bundle):
            yield from (line for line in bundle.lines if isinstance(line, ChargeLine))
        case CommandItem(command=ChargeLine() as line):
            yield line
        case ListItem(commands=commands):
            yield from (each.command for each in commands if isinstance(each.command, ChargeLine))
        case _:
            pass


def commands_of(item: Item) -> Iterator[Command]:
    """All that is to be decided."""
    match item:
        case ListItem(commands=commands):
            yield from (each.command for each in commands)
        case BundleItem(bundle=bundle):
            yield from reversals_of(bundle)
            yield from lines_of(item)
        case _:
            yield item.command


def reversals_of(bundle: Bundle) -> Iterator[ReverseCharge]:
    """What a bundle gives back, but for what cannot be read."""
    return (each for each in bundle.reversals if isinstance(each, ReverseCharge))
