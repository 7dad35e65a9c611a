"""What a peer may send or time so that the controller errs: each on SQLite and on PostgreSQL."""

import asyncio
import dataclasses
import datetime as dt
import ssl
from base64 import b64encode

import msgspec
import pytest

from agent import clock
from agent.attest.enrolment import EnrolChallenge
from agent.attest.evidence import PcrValues
from tests.support.controller_service import controller_home, desk
from tests.support.software_node import SoftwareNode, Vendor, _bytes

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


async def test_one_key_is_one_admin_s(office):
    """A second admin with the key of the first is refused by name, revoked or not."""
    csr = b64encode(SoftwareNode().csr()).decode()
    await office.call("POST", "/v1/admins", {"name": "ada", "role": "viewer", "csr": csr}, expect=201)
    refused = await office.call("POST", "/v1/admins", {"name": "eve", "role": "viewer", "csr": csr}, expect=409)
    assert refused["check"] == "admin_exists"
    await office.call("DELETE", "/v1/admins/ada")
    refused = await office.call("POST", "/v1/admins", {"name": "eve", "role": "viewer", "csr": csr}, expect=409)
    assert refused["check"] == "admin_exists"


async def test_a_refused_approval_makes_no_group(office):
    """What was not approved leaves nothing behind."""
    await office.call("POST", "/v1/groups/new/references", {"policy": "0" * 64}, expect=422)
    assert [group["name"] for group in await office.call("GET", "/v1/groups")] == ["default"]


async def _begin(office, node, token):
    status, answer = await _send(
        office.anyone, "POST", office.url + "/node/v1/enrol", data=node.request(token).encode()
    )
    assert status == 200, answer
    return EnrolChallenge(**_bytes(answer))


async def _complete_at_once(office, *begun):
    """Send all second calls together; returns status and check of each."""
    calls = [
        _send(
            office.anyone,
            "POST",
            f"{office.url}/node/v1/enrol/{challenge.enrolment}",
            data=node.proof(challenge).encode(),
        )
        for node, challenge in begun
    ]
    return sorted((status, answer.get("check", "")) for status, answer in await asyncio.gather(*calls))


async def test_of_one_tpm_that_enrols_twice_at_once_one_wins(office):
    """With two tokens, under two names: the other is refused by name, with a record."""
    for _ in range(5):
        node = SoftwareNode(vendor=VENDOR)
        twin = SoftwareNode(id="edge-2", vendor=VENDOR, ek=node.ek, attester=node.attester, control=node.control)
        begun = [(one, await _begin(office, one, await office.token())) for one in (node, twin)]
        assert await _complete_at_once(office, *begun) == [(200, ""), (409, "enrolled_already")]
        record = (await office.records("node.enrol"))[-1]
        assert (record["outcome"], record["check"]) == ("refused", "enrolled_already")
        (shown,) = (await office.call("GET", "/v1/nodes"))["nodes"]
        await office.call("DELETE", f"/v1/nodes/{shown['id']}")


async def test_of_two_enrolments_with_one_token_one_wins(office):
    """The other is told that the token was used."""
    token = await office.token()
    nodes = [SoftwareNode(id=f"edge-{number}", vendor=VENDOR) for number in range(4)]
    begun = [(node, await _begin(office, node, token)) for node in nodes]
    assert await _complete_at_once(office, *begun) == [(200, ""), *[(403, "join_token")] * 3]


async def test_first_approvals_that_come_together_follow_each_other(office):
    """Of a group that none of them found: each makes a version of its own."""
    approval = {"policy": "1" * 64, "config": "2" * 64, "pcr": 14}
    calls = [office.call("POST", "/v1/groups/new/references", approval, expect=201) for _ in range(4)]
    assert sorted(made["version"] for made in await asyncio.gather(*calls)) == [1, 2, 3, 4]


async def test_of_two_admins_of_one_name_that_are_made_at_once_one_is(office):
    """The other is refused by name."""
    requests = [{"name": "ada", "role": "viewer", "csr": b64encode(SoftwareNode().csr()).decode()} for _ in range(4)]
    calls = [_send(office.admin, "POST", office.url + "/v1/admins", json=body) for body in requests]
    answers = sorted((status, answer.get("check", "")) for status, answer in await asyncio.gather(*calls))
    assert answers == [(201, ""), *[(409, "admin_exists")] * 3]


async def _enrolled(office, name, **changes):
    node = SoftwareNode(id=name, vendor=VENDOR)
    await node.enrol(office.anyone, office.url, await office.token(), **changes)
    return node


@pytest.mark.parametrize("mode", ["pull", "push"])
async def test_another_node_s_push_says_nothing_about_a_node(office, mode):
    """Whoever has a certificate of the fleet, and neither the node's nor its TPM, is refused by name and recorded; the node's result stands."""
    await _enrolled(office, "edge-1", mode=mode)
    other = await _enrolled(office, "edge-2")
    async with other.session() as session:
        status, answer = await other.push(session, office.url, about="edge-1")
        assert (status, answer["check"]) == (422, "signer")
    shown = await office.node("edge-1")
    assert shown["status"] == "affirming"
    record = (await office.records("node.push"))[-1]
    assert (record["node"], record["check"]) == ("edge-1", "signer")


async def test_a_node_s_own_push_that_is_not_authentic_costs_its_trust(office):
    """Whether or not it asks for a certificate with it: the connection is the node's."""
    node = await _enrolled(office, "edge-1", mode="push")
    node.attester = SoftwareNode().attester
    async with node.session() as session:
        status, answer = await node.push(session, office.url, csr=node.csr())
        assert (status, answer["check"]) == (422, "signer")
        assert (await office.node("edge-1"))["status"] == "none"


async def test_a_push_under_an_unsafe_clock_is_to_come_again(office):
    """It is refused as such, and neither good nor bad news."""
    node = await _enrolled(office, "edge-1", mode="push")
    node.attester.clock = dataclasses.replace(node.attester.clock, safe=False)
    async with node.session() as session:
        status, answer = await node.push(session, office.url)
    assert (status, answer["check"]) == (422, "clock")
    shown = await office.node("edge-1")
    assert (shown["status"], shown["reachable"]) == ("affirming", True)
    assert [record["kind"] for record in await office.records("node.result")] == ["node.result"]


ADDRESSES = {
    "none, to be polled at": None,
    "no port": "192.0.2.7",
    "a path, to be asked for in the controller's name": "192.0.2.7:8444/admin?x=",
    "a user": "root:secret@192.0.2.7:8444",
    "a fragment": "192.0.2.7:8444#",
    "a character that ends a line": "192.0.2.7:8444\r\nX: y",
    "a character that ends a text": "192.0.2.7\0:8444",
    "a port that is none": "192.0.2.7:99999",
    "the address of a cloud's metadata": "169.254.169.254:443",
    "the same, as IPv6": "[::ffff:169.254.169.254]:443",
    "a link-local address": "[fe80::1]:443",
    "everybody": "224.0.0.1:443",
    "nobody": "0.0.0.0:443",
    "an address in another notation": "0xa9.254.169.254:443",
    "the same, as one number": "2852039166:443",
}


@pytest.mark.parametrize("how", ADDRESSES)
async def test_an_address_that_no_node_has_is_refused(office, how):
    """At the first call, by name, with a record."""
    request = SoftwareNode(vendor=VENDOR).request(await office.token(), address=ADDRESSES[how])
    status, answer = await _send(office.anyone, "POST", office.url + "/node/v1/enrol", data=request.encode())
    assert (status, answer["check"]) == (422, "address")
    record = (await office.records("node.enrol"))[-1]
    assert (record["outcome"], record["node"], record["check"]) == ("refused", "edge-1", "address")


@pytest.mark.parametrize(
    "address", ["192.0.2.7:8444", "[2001:db8::7]:8444", "edge-1.example.:1", "127.0.0.1:8444", "10.1.2.3:65535"]
)
async def test_an_address_in_each_form_is_taken(office, address):
    """IPv4, IPv6 in brackets, a name."""
    request = SoftwareNode(vendor=VENDOR).request(await office.token(), address=address)
    status, answer = await _send(office.anyone, "POST", office.url + "/node/v1/enrol", data=request.encode())
    assert status == 200, answer


async def _due_s(office, name):
    due = dt.datetime.fromisoformat((await office.node(name))["due"])
    return due.timestamp() - clock.now()


async def test_a_node_that_pushes_is_late_after_two_of_its_intervals_and_not_before(office):
    """Neither its enrolment, nor an approval, nor another interval makes it late sooner; one that is polled is asked soon."""
    await _enrolled(office, "edge-1", mode="push", address=None)
    await _enrolled(office, "edge-2")
    assert 7100 < await _due_s(office, "edge-1") <= 7200
    await office.approve(config="3" * 64)
    assert 7100 < await _due_s(office, "edge-1") <= 7200
    assert await _due_s(office, "edge-2") <= 361
    await office.call("PUT", "/v1/nodes/edge-1/interval", {"interval_s": 4000})
    assert 7900 < await _due_s(office, "edge-1") <= 8000
    await office.call("PUT", "/v1/nodes/edge-1/interval", {"interval_s": None})
    await office.call("PUT", "/v1/groups/default/interval", {"interval_s": 10})
    # It has not heard of it yet.
    assert 7900 < await _due_s(office, "edge-1") <= 8000
    assert await _due_s(office, "edge-2") <= 10


async def test_the_controller_s_own_faults_are_for_its_log(config):
    """A caller learns that it is not to blame, and neither a path nor an address."""
    with config.open("a") as file:
        file.write("oidc: {issuer: i, audience: a, jwks: nowhere.json}\n")
    token = {"Authorization": "Bearer eyJhbGciOiJFUzI1NiIsImtpZCI6ImUifQ.e30.AAAA"}
    async with desk(config) as office:
        status, answer = await _send(office.anyone, "GET", office.url + "/v1/nodes", headers=token)
    assert (status, answer["check"]) == (503, "")
    assert "nowhere" not in answer["error"]


@pytest.mark.parametrize(
    "path", [b"/v1/nodes/\xff", b"/v1/nodes/%FF", b"/v1/nodes/%00", b"/v1/nodes/%ED%A0%80", b"/\xff"]
)
async def test_a_path_that_is_no_text_is_a_refusal(office, path):
    """Whatever its bytes, an answer of the 400s."""
    port = int(office.url.rpartition(":")[2])
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    reader, writer = await asyncio.open_connection("localhost", port, ssl=context)
    writer.write(b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
    status = (await reader.readline()).split()[1]
    writer.close()
    assert status in {b"400", b"401", b"404"}


async def test_a_revocation_holds_for_a_call_whose_body_is_on_its_way(office):
    """Who was allowed when the call began, and is not when its body is there, changes nothing."""
    node = SoftwareNode(id="eve")
    made = {"name": "eve", "role": "approver", "csr": b64encode(node.csr()).decode()}
    granted = await office.call("POST", "/v1/admins", made, expect=201)
    node.grant = {"ca": granted["ca"], "certificate": granted["certificate"]}
    before = len(await office.call("GET", "/v1/groups/default/references"))
    is_revoked = asyncio.Event()

    async def body():
        yield b'{"config":'
        await is_revoked.wait()
        yield b'"' + b"3" * 64 + b'"}'

    async with node.session() as eve:
        call = asyncio.create_task(_send(eve, "POST", office.url + "/v1/groups/default/references", data=body()))
        await asyncio.sleep(0.5)  # it is on its way
        await office.call("DELETE", "/v1/admins/eve")
        is_revoked.set()
        status, answer = await call
    assert (status, answer["check"]) == (403, "no_admin")
    assert len(await office.call("GET", "/v1/groups/default/references")) == before


@pytest.mark.parametrize("mode", ["pull", "push"])
async def test_a_clock_that_no_database_holds_costs_the_node_its_trust(office, mode):
    """Root on a node may set its TPM's clock far ahead; that neither keeps its last result nor ends the controller."""
    node = SoftwareNode(vendor=VENDOR)
    runner = await node.serve()
    try:
        await node.enrol(office.anyone, office.url, await office.token(), mode=mode)
        node.attester.clock = dataclasses.replace(node.attester.clock, clock=2**63)
        if mode == "pull":
            await office.call("POST", "/v1/nodes/edge-1/poll")
        else:
            async with node.session() as session:
                assert (await node.push(session, office.url))[0] == 200
    finally:
        await runner.cleanup()
    shown = await office.node("edge-1")
    assert (shown["status"], [check["name"] for check in shown["checks"]]) == ("none", ["clock"])


async def test_boot_pcrs_that_no_quote_holds_enrol_nobody(office):
    """What later boots are held against is what the TPM has signed, and not what was written beside it."""
    node = SoftwareNode(vendor=VENDOR)
    challenge = await _begin(office, node, await office.token())
    proof = node.proof(challenge)
    values = proof.evidence.pcrs.sha256 | {7: "7" * 64}
    evidence = msgspec.structs.replace(proof.evidence, pcrs=PcrValues(values))
    forged = msgspec.structs.replace(proof, evidence=evidence).encode()
    status, answer = await _send(
        office.anyone, "POST", f"{office.url}/node/v1/enrol/{challenge.enrolment}", data=forged
    )
    assert (status, answer["check"]) == (422, "pcr-digest")
    assert (await office.call("GET", "/v1/nodes"))["nodes"] == []
