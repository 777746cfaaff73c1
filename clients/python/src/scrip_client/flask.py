"""Flask: check the limit before, track after, tell both in headers."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import cast

from flask import Flask, Response, g, request

from scrip_client.admission import (
    PROBLEM,
    Admission,
    Headers,
    IncomingRequest,
    Limits,
    Problem,
    Rules,
    Served,
    away,
    event_naming_hold,
    legs,
    limit_headers,
    not_recorded,
    refusal,
    remaining_after,
    request_headers,
)
from scrip_client.client import Scrip
from scrip_client.errors import Away, LedgerError, NotAccepted, Refused, RequestRejected
from scrip_client.events import new_hold_id
from scrip_client.ledger import Wallet

log = logging.getLogger("scrip_client")

_NAME = "scrip"


class ScripFlask:
    """`ScripFlask(app, scrip=scrip, rules=Rules(...))`; views find `g.scrip`.

    Its hooks run after those that were registered before, so `account` may look at what these left in `g`. The use is
    on disk before the answer is sent; of a stream, when it has ended.
    """

    def __init__(self, app: Flask, *, scrip: Scrip, rules: Rules) -> None:
        self._scrip = scrip
        self._rules = rules
        self._limits = Limits(rules.limits_seconds)
        app.before_request(self._before)
        app.after_request(self._after)
        app.teardown_request(self._teardown)

    def _before(self) -> Response | None:
        incoming = _incoming()
        if not self._rules.apply_to(incoming):
            return None
        account = cast("str | None", self._rules.account(incoming))
        if not account:
            return None
        admitted = self._admit(incoming, account)
        if isinstance(admitted, Problem):
            return _response(admitted)
        setattr(g, _NAME, admitted)
        return None

    def _after(self, response: Response) -> Response:
        admission: Admission | None = g.get(_NAME)
        if admission is None:
            return response
        incoming = _incoming()
        started = admission.started

        def settle() -> bool:
            how = Served(
                status=response.status_code,
                latency_ms=int((time.monotonic() - started) * 1000),
                response_bytes=response.content_length or 0,
                ended="completed",
            )
            return self._settle(incoming, admission, how)

        # Settled, or going to be: nothing is left to do when the request is torn down.
        g.pop(_NAME)
        if response.is_streamed:
            response.call_on_close(settle)
        elif not settle():
            response = _response(not_recorded(admission.id))
        for name, value in self._headers(admission):
            response.headers[name] = value
        return response

    def _teardown(self, _error: BaseException | None) -> None:
        admission: Admission | None = g.pop(_NAME, None)
        if admission is not None:
            self._give_back(admission)

    def _admit(self, incoming: IncomingRequest, account: str) -> Admission | Problem:
        """Place the hold, or say why not."""
        rules = self._rules
        hold_id = new_hold_id(account)
        if rules.when_away == "refuse" and self._scrip.is_full():
            return away("there is no room to record it")
        try:
            hold = self._scrip.ledger.hold(
                account,
                legs(cast("Mapping[str, int]", rules.estimate(incoming))),
                id=hold_id,
                lifetime_seconds=rules.lifetime_seconds,
                overdue=rules.overdue,
            )
        except Refused as refused:
            wallets = self._wallets(refused.limit_source)
            problem, warnings = refusal(refused, wallets=wallets, rules=rules)
            rules.warn(warnings)
            return problem
        except (Away, RequestRejected) as error:
            log.error("a hold cannot be placed: %s", error)
            if rules.when_away == "serve":
                # If it was placed after all, the charge settles it; if not, it never will be.
                return Admission(account=account, hold=None, hold_id=hold_id)
            # One that was placed after all is resolved at its deadline: to ask again now would only wait once more.
            return away("the ledger does not answer" if isinstance(error, Away) else "the ledger does not accept us")
        return Admission(account=account, hold=hold, hold_id=hold_id)

    def _settle(self, incoming: IncomingRequest, admission: Admission, how: Served) -> bool:
        """Report the use, or release the hold. False: the use could not be recorded."""
        event = self._rules.usage(incoming, admission, how)
        if event is None:
            self._give_back(admission)
            return True
        named = event_naming_hold(event, admission)
        try:
            self._scrip.report(named)
        except NotAccepted as error:
            # All there is to make good by hand what is lost.
            log.critical("use not recorded: %s: %r", error, named)
            return self._rules.when_away == "serve"
        return True

    def _give_back(self, admission: Admission) -> None:
        admission.released = True
        if admission.hold is None:
            return
        try:
            self._scrip.ledger.release(admission.hold)
        except LedgerError as error:
            log.warning("hold %s is left to its deadline: %s", admission.hold_id, error)

    def _headers(self, admission: Admission) -> Headers:
        found = request_headers(admission)
        if admission.hold is None:
            return found
        remaining = remaining_after(admission.hold, released=admission.released)
        limits = {account: self._wallets(account) for account in {each.account for each in remaining}}
        more, warnings = limit_headers(remaining, limits, warn_percent=self._rules.warn_percent, now=datetime.now(UTC))
        self._rules.warn(warnings)
        return found + more

    def _wallets(self, account: str | None) -> Sequence[Wallet]:
        """What an account is limited to, as far as it is known."""
        if account is None:
            return ()
        known = self._limits.of(account)
        if known is None:
            try:
                known = self._scrip.ledger.balance(account).wallets
            except LedgerError as error:
                log.warning("limits of %s are not told: %s", account, error)
                known = ()
            self._limits.remember(account, known)
        return known


def _incoming() -> IncomingRequest:
    headers = {name.lower(): value for name, value in request.headers.items()}
    return IncomingRequest(method=request.method, path=request.path, headers=headers, native=request)


def _response(problem: Problem) -> Response:
    response = Response(json.dumps(problem.body()), status=problem.status, content_type=PROBLEM)
    for name, value in problem.headers:
        response.headers[name] = value
    return response
