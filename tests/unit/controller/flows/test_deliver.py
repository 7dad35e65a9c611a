"""The signature of a webhook, and the times that must fit each other."""

import base64
import datetime as dt
import importlib.util

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook

from agent.errors import ConfigError
from controller.flows import deliver, jetstream
from controller.flows.deliver import sign
from controller.settings import NatsSettings
from controller.store import database, outbox


def test_published_example() -> None:
    """The signature is that of the example which the Standard Webhooks libraries share."""
    secret = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    signature = sign(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@given(
    secret=st.binary(min_size=32, max_size=32),
    event=st.text("0123456789abcdef", min_size=32, max_size=32),
    timestamp_s=st.integers(0, 4_000_000_000),
    body=st.text(),
)
def test_same_as_the_library(secret: bytes, event: str, timestamp_s: int, body: str) -> None:
    """For any secret, id, time and body the signature is that of the standard's own library."""
    expected = Webhook(secret).sign(event, dt.datetime.fromtimestamp(timestamp_s, dt.UTC), body)
    assert sign(secret, event, timestamp_s, body.encode()) == expected


def test_lease_outlasts_an_attempt() -> None:
    """A lease is longer than the longest attempt with the two transactions around it."""
    attempt_s = max(deliver.TIMEOUT_S, jetstream.TIMEOUT_S)
    assert attempt_s + 2 * database.STATEMENT_TIMEOUT_S < outbox.LEASE_S


def test_stream_remembers_long_enough() -> None:
    """The stream remembers an id for longer than two attempts can be apart, but no longer than its messages."""
    assert outbox.BACKOFF_MAX_S + outbox.LEASE_S < jetstream.DEDUPLICATE_S <= jetstream.KEEP_S


def test_giving_up_comes_before_removal() -> None:
    """A delivery is given up long before its event is removed, so nothing pending is removed unseen."""
    assert outbox.GIVE_UP_S + outbox.BACKOFF_MAX_S < outbox.RETENTION_S


def test_credentials_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials that can't be used are an error of the configuration at the start, not one at each connection."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"nats\.credentials"):
        jetstream.JetStream(NatsSettings(url="nats://127.0.0.1:4222", credentials="/credentials"))
