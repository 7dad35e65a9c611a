"""What a peer may send or time so that the controller errs: each on SQLite and on PostgreSQL."""

import pytest

from tests.support.controller_service import controller_home, desk
from tests.support.software_node import Vendor

pytestmark = pytest.mark.integration
VENDOR = Vendor()


@pytest.fixture(params=["sqlite", "postgresql"])
def config(request, tmp_path):
    options = ("--database", request.getfixturevalue("postgres_url")) if request.param == "postgresql" else ()
    return controller_home(tmp_path, VENDOR.pem(), *options, poll={"interval_s": 3600, "timeout_s": 5})


@pytest.fixture
async def office(config):
    async with desk(config) as running:
        await running.approve()
        yield running


async def _send(session, method, url, **content):
    async with session.request(method, url, **content) as answer:
        return answer.status, await answer.json()


@pytest.mark.parametrize(
    "body", [b'{"node":"edge-1","x":' + b"[" * 20_000, b"[" * 20_000], ids=["a member", "the body"]
)
async def test_a_body_of_brackets_is_a_refusal(office, body):
    """Nesting that no parser follows is 400, and recorded as what it is."""
    status, answer = await _send(office.anyone, "POST", office.url + "/node/v1/enrol", data=body)
    assert (status, answer["check"]) == (400, "encoding")
    assert (await office.records("node.enrol"))[-1]["check"] == "encoding"
