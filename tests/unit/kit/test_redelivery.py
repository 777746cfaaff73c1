"""Laws of reading a delivery's place."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client
from nats.aio.msg import Msg

from services.kit.redelivery import RETRY_SECONDS_MAX, Place, place_of, retry_delay_seconds


@pytest.mark.parametrize(
    "reply",
    [
        "$JS.ACK.USAGE.metering.3.17.21.1700000000000000000.5",
        "$JS.ACK.hub.A1B2.USAGE.metering.3.17.21.1700000000000000000.5",
        "$JS.ACK._.A1B2.USAGE.metering.3.17.21.1700000000000000000.5.random",
    ],
)
def test_a_place_is_read_with_and_without_a_domain(reply: str) -> None:
    assert place_of(Msg(Client(), reply=reply)) == Place(
        stream="USAGE",
        consumer="metering",
        deliveries=3,
        stream_sequence=17,
        stored_at_ns=1700000000000000000,
        pending=5,
    )


@pytest.mark.parametrize("reply", ["", "_INBOX.a.b", "$JS.ACK.USAGE"])
def test_a_message_that_is_no_delivery_has_no_place(reply: str) -> None:
    with pytest.raises(ValueError, match="not a delivery"):
        place_of(Msg(Client(), reply=reply))


@given(deliveries=st.integers(0, 10**9))
def test_the_delay_grows_to_a_cap(deliveries: int) -> None:
    assert 1 <= retry_delay_seconds(deliveries) <= retry_delay_seconds(deliveries + 1) <= RETRY_SECONDS_MAX
