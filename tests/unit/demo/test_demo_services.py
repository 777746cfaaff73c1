"""Laws of how the demo asks the services that run."""

import asyncio
import gc
from datetime import UTC, datetime
from typing import Any

import httpx2
import pytest

from infra.demo.services import Ledger, NewAccount
from infra.errors import StackError

pytestmark = pytest.mark.anyio


async def test_of_many_accounts_that_are_refused_one_refusal_is_told_and_no_other_is_left_over() -> None:
    untold: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: untold.append(context))
    refusing = httpx2.MockTransport(lambda _request: httpx2.Response(401, json={"detail": "the token is not known"}))
    accounts = [
        NewAccount(account=f"demo-{number}", dollars="1", granted_at=datetime(2026, 1, 1, tzinfo=UTC), key=str(number))
        for number in range(20)
    ]
    async with Ledger("http://ledger", "wrong") as ledger:
        ledger._client = httpx2.AsyncClient(transport=refusing, base_url="http://ledger")
        opening = ledger.open_and_grant(accounts)
        with pytest.raises(StackError, match="was refused: 401"):
            async for _ in opening:
                pass
    del opening
    gc.collect()
    await asyncio.sleep(0)
    assert untold == []
