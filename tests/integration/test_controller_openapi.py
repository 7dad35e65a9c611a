"""The API as it describes itself: each call of the document, with generated input, by an admin who may do everything."""

import asyncio
import json
import subprocess
import sys
import time

import aiohttp
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.support.controller_service import APPROVAL, controller_home
from tests.support.software_node import SoftwareNode, Vendor

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(300)]
VENDOR = Vendor()
EXAMPLES = 25  # for each call and kind of input
START_S = 30.0
ANSWER_S = 30.0
POLL = "POST /v1/nodes/{node}/poll"
# What no generator makes: a node's proofs, a certificate request, an address, a name that may be removed.
HARD_TO_REACH = {
    "POST /node/v1/enrol",
    "POST /node/v1/enrol/{enrolment}",
    "POST /node/v1/challenge",
    "POST /node/v1/evidence",
    POLL,
    "POST /v1/groups/{group}/withdrawals",
    "POST /v1/admins",
    "POST /v1/hooks",
    "DELETE /v1/nodes/{node}",
    "DELETE /v1/admins/{name}",
    "DELETE /v1/hooks/{hook}",
    "DELETE /v1/tokens/{token}",
}
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


class Office:
    """A controller as a process of its own, an admin's session, and things that calls may name."""

    def __init__(self, home, url):
        self.url = url
        self.session = requests.Session()
        self.session.verify = str(home / "keys" / "ca.pem")
        self.session.cert = (str(home / "admin" / "certificate.pem"), str(home / "admin" / "key.pem"))
        self.session.trust_env = False
        self.known = {"node": "edge-1", "group": "default", "version": "current", "sequence": "0"}

    def post(self, path, body):
        answer = self.session.post(self.url + path, json=body, timeout=ANSWER_S)
        assert answer.status_code == 201, answer.text
        return answer.json()


@pytest.fixture(params=["sqlite", "postgresql"])
def office(request, tmp_path):
    options = ("--database", request.getfixturevalue("postgres_url")) if request.param == "postgresql" else ()
    config = controller_home(tmp_path, VENDOR.pem(), *options, poll={"interval_s": 3600, "timeout_s": 1})
    log = tmp_path / "log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "agent.cli", "controller", "run", "--config", config],
            stdin=subprocess.DEVNULL,
            stderr=errors,
        )
    try:
        office = Office(config.parent, f"https://localhost:{_port(process, log)}")
        office.post("/v1/groups/default/references", APPROVAL)
        office.known["hook"] = office.post("/v1/hooks", {"url": "https://127.0.0.1:9/", "kinds": ["none"]})["id"]
        asyncio.run(_enrol(config, office))
        with office.session:
            yield office
        assert process.poll() is None, log.read_text()[-2000:]
        assert "Traceback" not in log.read_text()
    finally:
        process.terminate()
        process.wait(START_S)


def _port(process, log):
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        for line in log.read_text().splitlines():
            if '"event": "serving"' in line:
                return json.loads(line)["port"]
        time.sleep(0.05)
    raise AssertionError(log.read_text())


async def _enrol(config, office):
    """One node that is there by name and answers nobody."""
    import ssl  # noqa: PLC0415 -- a helper of one function

    from agent.attest.enrolment import JoinToken  # noqa: PLC0415 -- as above

    context = ssl.create_default_context(cafile=str(config.parent / "keys" / "ca.pem"))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session:
        token = JoinToken.parse(office.post("/v1/tokens", {"group": "default"})["token"])
        await SoftwareNode(id="edge-1", vendor=VENDOR).enrol(session, office.url, token)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_no_generated_call_breaks_it(office, mode):
    """Whatever is sent, in the document's form or against it: no 5xx, a status that the document names, and an answer of the form that it says."""
    answer = office.session.get(office.url + "/openapi.json", timeout=ANSWER_S)
    schema = schemathesis.openapi.from_dict(answer.json())
    statuses = {}
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    described = [call for calls in answer.json()["paths"].values() for call in calls]
    assert len(operations) == len(described) > 25
    if mode is GenerationMode.NEGATIVE:  # where nothing can be said, nothing can be said wrongly
        operations = [one for one in operations if one.path_parameters or one.query or one.body]
    for operation in operations:
        statuses[operation.label] = _try(office, operation, mode)
    assert not [label for label, seen in statuses.items() if not seen]
    if mode is GenerationMode.POSITIVE:  # what fits the form reaches the work itself
        unreached = {label for label, seen in statuses.items() if not seen & {200, 201}}
        assert unreached <= HARD_TO_REACH, unreached
        assert statuses["GET /v1/audit"] == {200}


def _try(office, operation, mode):
    seen = set()

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), familiar=st.booleans())
    def try_one(case, familiar):
        if familiar and operation.method != "delete":  # what exists is reached by its name alone
            for name in office.known.keys() & case.path_parameters.keys():
                case.path_parameters[name] = office.known[name]
        # Said anew at each call: what a session says of TLS does not reach its requests here.
        response = case.call(
            base_url=office.url,
            session=office.session,
            timeout=ANSWER_S,
            verify=office.session.verify,
            cert=office.session.cert,
        )
        seen.add(response.status_code)
        # That a node does not answer is a fact about the node, and an answer of the controller's.
        away = response.status_code == 502 and operation.label == POLL and response.json()["check"] == "unreachable"
        case.validate_response(response, checks=CHECKS, excluded_checks=[not_a_server_error] if away else [])

    try_one()
    return seen
