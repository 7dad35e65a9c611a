"""Hooks: their secrets, and the test of one."""

import base64
import json

import pytest
from sqlalchemy import select, update

from agent.errors import PeerError
from controller.store import hooks, outbox
from controller.store.outbox import Outcome
from controller.store.schema import deliveries, events
from controller.store.schema import hooks as rows

NOW_US = 1_800_000_000_000_000
URL = "https://receiver.example/events"


@pytest.mark.parametrize("size", [24, 32, 64])
def test_a_secret_is_read(size):
    """24 to 64 bytes in base64, as Standard Webhooks writes them."""
    secret = bytes(range(size))
    assert hooks.read_secret("whsec_" + base64.b64encode(secret).decode()) == secret


@pytest.mark.parametrize(
    "text",
    [
        "",
        "whsec_",
        base64.b64encode(bytes(32)).decode(),
        "whsec_" + base64.b64encode(bytes(23)).decode(),
        "whsec_" + base64.b64encode(bytes(65)).decode(),
        "whsec_" + "*" * 44,
        "whsec_" + base64.b64encode(bytes(32)).decode().rstrip("="),
        "whsec_" + "é" * 44,
    ],
)
def test_what_is_no_secret_is_refused(text):
    """Too short, too long, not base64 or without its prefix: refused, and not repeated."""
    with pytest.raises(PeerError) as refused:
        hooks.read_secret(text)
    assert (refused.value.status, refused.value.reason) == (400, "hook_secret")
    assert len(text) < 10 or text not in str(refused.value)
    assert refused.value.__cause__ is None


async def test_a_secret_of_the_receiver_s_is_not_told_again(database):
    """It signs what is sent, and the one who brought it gets none back."""
    text = "whsec_" + base64.b64encode(bytes(range(40))).decode()
    async with database.begin() as connection:
        made = await hooks.create_hook(connection, URL, ["*"], "admin", NOW_US, secret=text)
        await hooks.send_test(connection, made.id, "admin", NOW_US)
        (delivery,) = await outbox.claim(connection, made.id, NOW_US, 10)
    assert made.secret == ""
    assert delivery.secret == bytes(range(40))


async def test_a_test_is_for_one_hook_alone(database):
    """Whatever kinds it names, and no other hook, also not one that takes all kinds, and not NATS."""
    async with database.begin() as connection:
        wanted = await hooks.create_hook(connection, URL, ["node.result"], "admin", NOW_US)
        other = await hooks.create_hook(connection, URL, ["*"], "admin", NOW_US)
        event = await hooks.send_test(connection, wanted.id, "ann", NOW_US)
        targets = list(await connection.scalars(select(deliveries.c.target).where(deliveries.c.event == event)))
        body = json.loads((await connection.execute(select(events.c.body))).scalar_one())
        assert await outbox.claim(connection, other.id, NOW_US, 10) == []
    assert targets == [wanted.id]
    assert (body["kind"], body["hook"], body["by"]) == (hooks.HOOK_TEST, wanted.id, "ann")


async def test_what_can_t_be_tested(database):
    """No such hook, or one whose receiver wanted no more."""
    async with database.begin() as connection:
        for call in (hooks.find_hook(connection, "0" * 32), hooks.send_test(connection, "0" * 32, "ann", NOW_US)):
            with pytest.raises(PeerError) as refused:
                await call
            assert refused.value.status == 404
        made = await hooks.create_hook(connection, URL, ["*"], "admin", NOW_US)
        await connection.execute(update(rows).values(enabled=False))
        with pytest.raises(PeerError) as refused:
            await hooks.send_test(connection, made.id, "ann", NOW_US)
        assert (refused.value.status, refused.value.reason) == (409, "hook_disabled")


async def test_deliveries_are_listed(database):
    """The newest event first, up to a limit, or one event alone; those of another hook are not among them."""
    async with database.begin() as connection:
        made = await hooks.create_hook(connection, URL, ["*"], "admin", NOW_US)
        other = await hooks.create_hook(connection, URL, ["*"], "admin", NOW_US)
        sent = [await hooks.send_test(connection, made.id, "ann", NOW_US + number) for number in range(3)]
        await hooks.send_test(connection, other.id, "ann", NOW_US)
        claimed = await outbox.claim(connection, made.id, NOW_US, 1)
        await outbox.settle(connection, [Outcome(claimed[0])], NOW_US)
        listed = await hooks.list_deliveries(connection, made.id, 10)
        assert [row.event for row in listed] == sent[::-1]
        assert [row.delivered_us for row in listed] == [None, None, NOW_US]
        assert [row.event for row in await hooks.list_deliveries(connection, made.id, 2)] == sent[:0:-1]
        assert [row.event for row in await hooks.list_deliveries(connection, made.id, 10, sent[1])] == [sent[1]]
        assert (await hooks.find_hook(connection, made.id)).pending == 2
