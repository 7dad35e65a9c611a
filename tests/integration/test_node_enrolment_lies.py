"""A controller that shows the token's key and then lies: a node that is not enrolled stays so, says why, and enrols at an honest answer."""

import json
import secrets

import msgspec
import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from agent.attest.enrolment import ENROL_PATH, EnrolGrant, EnrolProof, read_message
from tests.support.chaos import prepare_template, running, wait_until
from tests.support.controller import MAX_REQUEST_BYTES, TRUST_DOMAIN, Ca, FakeController, jwks, pem
from tests.support.node_terminal import enrol, enrolled, kept, status

EXIT_NO, EXIT_ENVIRONMENT = 1, 3
STRANGER = ec.generate_private_key(ec.SECP256R1())

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """One node that is not enrolled, and a controller for all tests; each leaves both as they were."""
    folder = tmp_path_factory.mktemp("lies")
    with FakeController() as controller, running(prepare_template(folder / "template"), folder) as (node, _):
        yield node, controller


@pytest.fixture
def node(pair):
    return pair[0]


@pytest.fixture
def controller(pair):
    found = pair[1]
    yield found
    found.answers = {}


def _certificate(controller, proof, name="edge-0001", key=None):
    own = x509.load_der_x509_csr(proof.csr).public_key()
    assert isinstance(own, ec.EllipticCurvePublicKey)
    return pem(controller.ca.issue(key or own, f"spiffe://{TRUST_DOMAIN}/node/{name}"))


GRANTS = {
    "for another node": (lambda _c, _p: {"node": "edge-9"}, "the grant is for another node"),
    "with a certificate for another key": (
        lambda c, p: {"certificate": _certificate(c, p, key=STRANGER.public_key())},
        "the node's key is not the one in its certificate",
    ),
    "with another node's certificate": (
        lambda c, p: {"certificate": _certificate(c, p, "edge-9")},
        "the certificate is not for this node",
    ),
    "with a certificate of the controller's": (
        lambda c, _p: {"certificate": pem(c.certificate)},
        "the certificate is not for this node",
    ),
    "with no certificate": (lambda _c, _p: {"certificate": "none"}, "the node's certificate"),
    "with no CA": (lambda _c, _p: {"ca": ""}, "the controller's CA"),
    "with no keys": (lambda _c, _p: {"jwks": "{}"}, "the controller's keys"),
    "with other keys": (lambda _c, _p: {"jwks": jwks(STRANGER)}, "not an Attestation Result"),
    "with a result by another key": (
        lambda c, _p: {"result": c.result(c.member.nonce, key=STRANGER)},
        "not an Attestation Result",
    ),
    "with a result for another node": (
        lambda c, _p: {"result": c.result(c.member.nonce, node="edge-9")},
        "it speaks of another node",
    ),
    "with a result about other Evidence": (
        lambda c, _p: {"result": c.result(secrets.token_hex(32))},
        "not about this enrolment's Evidence",
    ),
    "with a result that is cut": (lambda c, _p: {"result": c.result(c.member.nonce)[:-40]}, "result: "),
    "of another fleet": (lambda _c, _p: {"trust_domain": "other.example"}, "the certificate is not for this node"),
    "with no pause": (lambda _c, _p: {"interval_s": 0}, "encoding: "),
    "with a pause for ever": (lambda _c, _p: {"interval_s": 10**9}, "encoding: "),
}


@pytest.mark.parametrize("how", GRANTS)
def test_a_grant_that_does_not_hold_enrols_nobody(node, controller, how):
    """The reason is in words and on record; nothing but a key that nobody knows is kept."""
    changes, words = GRANTS[how]

    async def lie(request):
        body = await request.read()
        answer = controller._route(request.path, body)
        if isinstance(answer, EnrolGrant):
            answer = msgspec.structs.replace(
                answer, **changes(controller, read_message(body, EnrolProof, MAX_REQUEST_BYTES))
            )
        return web.Response(body=answer.encode(), content_type="application/json")

    controller.answers = {ENROL_PATH: lie}
    code, _, complaint = enrol(node, controller)
    assert (code, words in complaint) == (EXIT_NO, True), complaint
    assert set(kept(node)) == {"key.pem"}
    assert (status(node)["enrolled"], status(node)["trust"]) == (False, "unknown")
    record = [found for found in node.records() if found["kind"] == "node.enrol"][-1]
    assert (record["outcome"], words in record["error"]) == ("failed", True)


BROKEN = {
    "500": (lambda: web.Response(status=500, text="<html>"), EXIT_ENVIRONMENT, "refused with 500: no reason given"),
    "a redirect": (
        lambda: web.Response(status=307, headers={"Location": "https://127.0.0.1:1/"}),
        EXIT_ENVIRONMENT,
        "refused with 307",
    ),
    "too much": (lambda: web.Response(body=b" " * (4 << 20)), EXIT_ENVIRONMENT, "an answer of over"),
    "garbage": (lambda: web.Response(body=b"\0"), EXIT_NO, "encoding: "),
    "a refusal that nests without end": (
        lambda: web.Response(status=403, text='{"x":' + "[" * 4000),
        EXIT_ENVIRONMENT,
        "refused with 403: no reason given",
    ),
    "a refusal that would move the terminal": (
        lambda: web.Response(status=403, text=json.dumps({"error": "no\x1b[2J"})),
        EXIT_ENVIRONMENT,
        "refused with 403: no?[2J",
    ),
}


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_answer_enrols_nobody(node, controller, how, second):
    """In the first call as in the second."""
    answer, expected, words = BROKEN[how]

    async def broken(request):
        body = await request.read()
        if second is (request.path == ENROL_PATH):
            return web.Response(body=controller._route(request.path, body).encode(), content_type="application/json")
        return answer()

    controller.answers = {ENROL_PATH: broken}
    code, _, complaint = enrol(node, controller)
    assert (code, words in complaint) == (expected, True), complaint
    assert set(kept(node)) == {"key.pem"}
    assert status(node)["enrolled"] is False


def test_a_ca_of_another_key_than_the_listeners_is_noticed(node, controller):
    """A grant that names a CA which the controller's own listener is not of: enrolled, never connected, and leaving works."""

    async def lie(request):
        answer = controller._route(request.path, await request.read())
        if isinstance(answer, EnrolGrant):
            answer = msgspec.structs.replace(answer, ca=pem(Ca().root))
        return web.Response(body=answer.encode(), content_type="application/json")

    controller.answers = {ENROL_PATH: lie}
    enrolled(node, controller)
    wait_until("it tried", lambda: "certificate verify failed" in status(node)["push_failure"])
    assert node.local("DELETE", "/admin/v1/enrolment")[0] == 200


def test_after_all_lies_an_honest_answer_enrols(node, controller):
    """And leaving leaves nothing behind."""
    enrolled(node, controller)
    wait_until("it is appraised", lambda: len(controller.member.results) > 2)
    assert status(node)["trust"] == "affirming"
    assert node.local("DELETE", "/admin/v1/enrolment")[0] == 200
    assert kept(node) == {}
