"""Decisions: what a command does to a partition's state, as moves, or why not. Nothing here changes the state."""

from typing import assert_never

from services.ledger.domain.alerts import decide_alerts
from services.ledger.domain.charging import decide_charge
from services.ledger.domain.claiming import decide_claim_payment
from services.ledger.domain.commands import (
    Adjust,
    CatchUp,
    ChangePlan,
    ChargeLine,
    ClaimPayment,
    Command,
    EndRule,
    ExtendHold,
    Grant,
    OpenAccount,
    PlaceHold,
    ReleaseHold,
    ResolveHold,
    ReverseCharge,
    SetRule,
    SetWallet,
    Transfer,
    Units,
    VoidGrant,
)
from services.ledger.domain.concerned import Place
from services.ledger.domain.entries import Move
from services.ledger.domain.errors import Refusal
from services.ledger.domain.granting import decide_adjust, decide_grant, decide_void_grant
from services.ledger.domain.holding import (
    decide_extend_hold,
    decide_place_hold,
    decide_release_hold,
    decide_resolve_hold,
)
from services.ledger.domain.opening import decide_open_account, decide_set_wallet
from services.ledger.domain.reversing import decide_reverse_charge
from services.ledger.domain.rules import decide_change_plan, decide_end_rule, decide_set_rule
from services.ledger.domain.state import PartitionState
from services.ledger.domain.transferring import decide_transfer


def decide(  # noqa: PLR0911, PLR0912 - one case for each command
    state: PartitionState, command: Command, *, units: Units, place: Place
) -> list[Move] | Refusal:
    """What `command` does: moves in order, or a refusal. No moves: it is so already.

    What is due on the wallets it concerns has been done before (`due.py`).
    """
    match command:
        case OpenAccount():
            return decide_open_account(state, command, units=units, place=place)
        case SetWallet():
            return decide_set_wallet(state, command, units=units, place=place)
        case Grant():
            return decide_grant(state, command, units=units, place=place)
        case VoidGrant():
            return decide_void_grant(state, command, units=units, place=place)
        case Adjust():
            return decide_adjust(state, command, units=units, place=place)
        case PlaceHold():
            return decide_place_hold(state, command, units=units, place=place)
        case ExtendHold():
            return decide_extend_hold(state, command, units=units, place=place)
        case ReleaseHold():
            return decide_release_hold(state, command, units=units, place=place)
        case ResolveHold():
            return decide_resolve_hold(state, command, units=units, place=place)
        case ChargeLine():
            return decide_charge(state, command, units=units, place=place)
        case ReverseCharge():
            return decide_reverse_charge(state, command, units=units, place=place)
        case Transfer():
            return decide_transfer(state, command, units=units, place=place)
        case ClaimPayment():
            return decide_claim_payment(state, command, units=units, place=place)
        case SetRule():
            return decide_set_rule(state, command, units=units, place=place)
        case EndRule():
            return decide_end_rule(state, command, units=units, place=place)
        case ChangePlan():
            return decide_change_plan(state, command, units=units, place=place)
        case CatchUp(account=account):
            # Time alone may have raised a balance: what was granted for later has begun.
            found = state.accounts.get(account)
            return [] if found is None else decide_alerts(found.wallets.values(), place=place)
        case _:
            assert_never(command)
