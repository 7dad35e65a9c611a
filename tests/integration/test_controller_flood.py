"""What a peer can make the controller keep, read or work at: each on SQLite and on PostgreSQL."""

import pytest

from controller.api import refusals
from tests.support.controller_service import controller_home, desk, eventually
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


async def test_nobody_fills_the_audit_log_by_being_refused(office):
    """Of an address some refusals stand in it by themselves; the others are counted, in one record, and none is lost."""
    calls = refusals.SOURCE_PER_MINUTE + 80
    for _ in range(calls):
        async with office.anyone.get(office.url + "/v1/nodes") as answer:
            assert answer.status == 401

    alone = len(await office.records("node.list"))
    assert refusals.SOURCE_PER_MINUTE <= alone < calls

    async def told():
        details = [record["detail"] for record in await office.records("refusals")]
        assert all(detail["checks"] == {"no_certificate": detail["count"]} for detail in details)
        return sum(detail["count"] for detail in details) == calls - alone

    await eventually(told)


async def test_an_admin_s_refusals_are_all_recorded(office):
    """However many."""
    calls = refusals.ALL_PER_MINUTE + 20
    for _ in range(calls):
        await office.call("GET", "/v1/nodes/nobody", expect=404)
    assert len(await office.records("node.show")) == calls
