"""Enrolment at the controller: who gets in, and what everyone else is told."""

import asyncio
import base64
import datetime as dt
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from agent.attest.enrolment import MAX_CERTIFICATE_BYTES, MAX_EK_CHAIN, JoinToken
from agent.attest.measurement import model_entry
from agent.attest.result import AttestationResult
from agent.identity.token import parse_jwks
from controller.cli.token import command as token_command
from tests.support.attest import Attester, digest
from tests.support.controller_service import controller_home, desk
from tests.support.ek_chains import HOSTILE, ROOT, good
from tests.support.software_node import SoftwareNode, Vendor, _bytes

pytestmark = pytest.mark.integration
VENDOR = Vendor()
replace = msgspec.structs.replace


@pytest.fixture
def config(tmp_path):
    return controller_home(tmp_path, VENDOR.pem())


@pytest.fixture
async def office(config):
    async with desk(config) as running:
        await running.approve()
        yield running


async def _post(office, path, body, expect):
    async with office.anyone.post(office.url + path, data=body.encode()) as answer:
        text = await answer.text()
        assert answer.status == expect, text
        return await answer.json()


async def test_a_genuine_node_is_enrolled_and_affirming(office):
    """It gets a certificate for the key in its Evidence, with its SPIFFE ID, and a result that verifies with the keys that came with it."""
    node = SoftwareNode(vendor=VENDOR)
    grant = await node.enrol(office.anyone, office.url, await office.token(labels={"site": "north"}))
    certificate = x509.load_pem_x509_certificate(grant["certificate"].encode())
    san = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert san.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://edgewarden.internal/node/edge-1"]
    assert certificate.public_key() == node.control.public_key()
    result = AttestationResult.verify(grant["result"], parse_jwks(grant["jwks"].encode()), "edge-1")
    assert (result.status, result.checks) == ("affirming", ())
    shown = await office.node("edge-1")
    assert (shown["status"], shown["reachable"], shown["labels"]) == ("affirming", True, {"site": "north"})
    (record,) = await office.records("node.enrol")
    assert (record["outcome"], record["node"]) == ("ok", "edge-1")


async def test_what_it_shows_may_be_wrong_and_it_is_enrolled_but_not_trusted(office):
    """A node that runs an unlisted model is known, and contraindicated by the name of the entry."""
    node = SoftwareNode(vendor=VENDOR)
    node.entries.append(model_entry("evil", "1", "model.onnx", digest("evil")))
    await node.enrol(office.anyone, office.url, await office.token())
    shown = await office.node("edge-1")
    assert shown["status"] == "contraindicated"
    assert "evil/1/model.onnx" in shown["checks"][0]["words"]


async def test_a_join_token_is_used_once(office):
    """A second node with the same token is refused, and the refusal names it in the audit log."""
    token = await office.token()
    await SoftwareNode(vendor=VENDOR).enrol(office.anyone, office.url, token)
    late = SoftwareNode(id="edge-2", vendor=VENDOR)
    refused = await _post(office, "/node/v1/enrol", late.request(token), 403)
    assert "used already" in refused["error"]
    record = (await office.records("node.enrol"))[-1]
    assert (record["outcome"], record["node"], record["check"]) == ("denied", "edge-2", "join_token")


def _other_secret(token):
    return JoinToken(url=token.url, spki_sha256=token.spki_sha256, id=token.id, secret=b"x" * 32)


REFUSED = {
    "another secret": (lambda node, token: node.request(_other_secret(token)), 403, "join_token"),
    "unknown token": (lambda node, token: node.request(replace(token, id="0" * 16)), 403, "join_token"),
    "another name than the token's": (lambda node, token: node.request(token, node="edge-9"), 403, "join_token"),
    "no certificate, not on the allowlist": (
        lambda node, token: node.request(token, ek_certificate=None),
        422,
        "ek-allowlist",
    ),
    "certificate of another vendor": (
        lambda node, token: node.request(token, ek_certificate=Vendor(name="else").endorse(node.ek.public_key())),
        422,
        "ek-chain",
    ),
    "a vendor's name without its key": (
        lambda node, token: node.request(token, ek_certificate=Vendor().endorse(node.ek.public_key())),
        422,
        "ek-chain",
    ),
    "expired certificate": (
        lambda node, token: node.request(
            token, ek_certificate=VENDOR.endorse(node.ek.public_key(), end=dt.datetime(2021, 1, 1, tzinfo=dt.UTC))
        ),
        422,
        "ek-chain",
    ),
    "a CA's certificate": (
        lambda node, token: node.request(token, ek_certificate=VENDOR.endorse(node.ek.public_key(), ca=True)),
        422,
        "ek-chain",
    ),
    "a certificate for TLS": (
        lambda node, token: node.request(
            token, ek_certificate=VENDOR.endorse(node.ek.public_key(), use=x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH)
        ),
        422,
        "ek-chain",
    ),
    "no certificate at all": (
        lambda node, token: node.request(token, ek_certificate=b"garbage"),
        422,
        "ek-certificate",
    ),
    "another key than the certificate's": (
        lambda node, token: node.request(token, ek_public=SoftwareNode().ek_public),
        422,
        "ek-key",
    ),
    "an EK of another template": (lambda node, token: node.request(token, ek_public=b"\1" * 60), 422, "ek-template"),
    "an AK of another template": (
        lambda node, token: node.request(
            token, ak_public=node.attester.ak_public[:5] + b"\0" + node.attester.ak_public[6:]
        ),
        422,
        "ak-template",
    ),
}


@pytest.mark.parametrize("how", REFUSED)
async def test_the_first_call_refuses_by_name(office, how):
    """Each way to be no genuine node gets its own check, and no node is written."""
    make, status, check = REFUSED[how]
    node = SoftwareNode(vendor=VENDOR)
    token = await office.token(node="edge-1")
    refused = await _post(office, "/node/v1/enrol", make(node, token), status)
    assert refused["check"] == check
    assert (await office.call("GET", "/v1/nodes"))["nodes"] == []
    assert (await office.records("node.enrol"))[-1]["check"] == check


@pytest.fixture
def strict_config(tmp_path):
    """Trusts one root, and no intermediate."""
    return controller_home(tmp_path, ROOT.pem())


@pytest.fixture
async def strict_office(strict_config):
    async with desk(strict_config) as running:
        await running.approve()
        yield running


@pytest.mark.parametrize("intermediates", [0, 1, MAX_EK_CHAIN])
async def test_intermediates_that_a_node_sends_lead_to_the_operator_s_root(strict_office, intermediates):
    """They are used, and the root alone is trusted."""
    node = SoftwareNode()
    shown = good(node.ek.public_key(), intermediates)
    token = await strict_office.token()
    changes = {"ek_certificate": shown.certificate, "ek_chain": shown.chain}
    await node.enrol(strict_office.anyone, strict_office.url, token, **changes)
    assert (await strict_office.node("edge-1"))["status"] == "affirming"


async def test_a_chain_that_does_not_hold_is_refused_and_recorded(strict_office):
    """Each way: 422 with the name of the check, a record with the node's name, and the token serves the genuine node afterwards."""
    node, token = SoftwareNode(), await strict_office.token()
    for how, make in HOSTILE.items():
        shown = make(node.ek)
        request = node.request(token, ek_certificate=shown.certificate, ek_chain=shown.chain)
        refused = await _post(strict_office, "/node/v1/enrol", request, 422)
        assert refused["check"] == "ek-chain", how
        record = (await strict_office.records("node.enrol"))[-1]
        assert (record["outcome"], record["node"], record["check"]) == ("refused", "edge-1", "ek-chain"), how
        assert record["words"] == refused["error"], how
    assert len(await strict_office.records("node.enrol")) == len(HOSTILE)
    shown = good(node.ek.public_key())
    changes = {"ek_certificate": shown.certificate, "ek_chain": shown.chain}
    await node.enrol(strict_office.anyone, strict_office.url, token, **changes)


OVERSIZED: dict[str, dict[str, Any]] = {
    "a certificate over the limit": {"ek_certificate": ROOT.endorse(SoftwareNode().ek.public_key(), padding=4096)},
    "an intermediate over the limit": {"ek_chain": (bytes(MAX_CERTIFICATE_BYTES + 1),)},
    "more intermediates than the limit": {"ek_chain": (ROOT.der(),) * (MAX_EK_CHAIN + 1)},
    "no bytes for a certificate": {"ek_certificate": b""},
}


@pytest.mark.parametrize("how", OVERSIZED)
async def test_a_request_over_its_limits_is_refused_and_recorded(strict_office, how):
    """Before anything is parsed, with the field's name in the answer and the node's in the record."""
    node = SoftwareNode()
    request = node.request(await strict_office.token(), **OVERSIZED[how])
    refused = await _post(strict_office, "/node/v1/enrol", request, 400)
    assert (refused["check"], next(iter(OVERSIZED[how])) in refused["error"]) == ("encoding", True)
    (record,) = await strict_office.records("node.enrol")
    assert (record["outcome"], record["node"], record["check"]) == ("refused", "edge-1", "encoding")


async def test_the_largest_request_is_read(strict_office):
    """Every field at its limit fits into the body's limit: what it is refused for is what stands in it."""
    token = await strict_office.token()
    largest = bytes(MAX_CERTIFICATE_BYTES)
    request = SoftwareNode().request(token, ek_certificate=largest, ek_chain=(largest,) * MAX_EK_CHAIN)
    assert (await _post(strict_office, "/node/v1/enrol", request, 422))["check"] == "ek-certificate"


@pytest.mark.parametrize("name", ["", "no such\nname", "x" * 65, 7, None, ["edge-1"]])
async def test_a_body_that_names_no_node_is_recorded_without_one(strict_office, name):
    """What stands in the record is a node's name or nothing."""
    async with strict_office.anyone.post(strict_office.url + "/node/v1/enrol", json={"node": name}) as answer:
        assert (answer.status, (await answer.json())["check"]) == (400, "encoding")
    (record,) = await strict_office.records("node.enrol")
    assert "node" not in record


async def test_damaged_certificates_are_refusals(strict_office):
    """Every third byte of an EK certificate and of its intermediate, one after the other: 422, never a 500."""
    node, token = SoftwareNode(), await strict_office.token()
    shown = good(node.ek.public_key())
    (middle,) = shown.chain
    path, checks = strict_office.url + "/node/v1/enrol", set()
    for at in range(0, len(middle), 3):
        for leaf, chain in ((_flipped(shown.certificate, at), middle), (shown.certificate, _flipped(middle, at))):
            if at in {_padding_at(shown.certificate), _padding_at(middle)}:
                continue
            request = node.request(token, ek_certificate=leaf, ek_chain=(chain,))
            async with strict_office.anyone.post(path, data=request.encode()) as answer:
                assert answer.status == 422, (at, await answer.text())
                checks.add((await answer.json())["check"])
    assert checks == {"ek-certificate", "ek-chain"}


async def test_a_revoked_token_enrols_nobody(office, config):
    """Neither anew nor by an enrolment that has begun with it; a used or unknown one can't be revoked; each is on record."""
    token, node = await office.token(), SoftwareNode(vendor=VENDOR)
    challenge = await _challenge(office, node, token)
    (config.parent / "admin" / "url").write_text(office.url)
    arguments = ["revoke", token.id, "--admin", str(config.parent / "admin")]
    revoked = await asyncio.to_thread(CliRunner().invoke, token_command, arguments)
    assert (revoked.exit_code, revoked.output) == (0, f"{token.id}: revoked\n")
    refused = await _post(office, f"/node/v1/enrol/{challenge.enrolment}", node.proof(challenge), 404)
    assert refused["check"] == "no_enrolment"
    refused = await _post(office, "/node/v1/enrol", node.request(token), 403)
    assert refused["check"] == "join_token"
    assert (await office.call("DELETE", f"/v1/tokens/{token.id}", expect=409))["check"] == "token_ended"
    assert (await office.call("DELETE", "/v1/tokens/none", expect=404))["check"] == "no_token"
    used = await office.token()
    await node.enrol(office.anyone, office.url, used)
    await office.call("DELETE", f"/v1/tokens/{used.id}", expect=409)
    (record, *refusals) = await office.records("token.revoke")
    assert (record["outcome"], record["detail"]["token"]) == ("ok", token.id)
    assert [refusal["check"] for refusal in refusals] == ["token_ended", "no_token", "token_ended"]


def _padding_at(der):
    """Return where the number of the signature's unused bits stands: it is signed by nobody, and changes nothing."""
    return len(der) - len(x509.load_der_x509_certificate(der).signature) - 1


def _flipped(data, at):
    return data[:at] + bytes([data[at] ^ 0x01]) + data[at + 1 :]


async def _challenge(office, node, token):
    from agent.attest.enrolment import EnrolChallenge  # noqa: PLC0415 -- a helper of one function

    return EnrolChallenge(**_bytes(await _post(office, "/node/v1/enrol", node.request(token), 200)))


def _relayed(node, challenge):
    return replace(node.proof(challenge), evidence=Attester(key=ec.generate_private_key(ec.SECP256R1())).evidence())


PROOFS = {
    "a guessed secret": (lambda node, challenge: replace(node.proof(challenge), secret=b"g" * 32), "credential"),
    "Evidence by another key": (_relayed, "signer"),
    "Evidence over another nonce": (
        lambda node, challenge: replace(node.proof(challenge), evidence=node.evidence(bytes(32))),
        "extra-data",
    ),
    "a request for another key than the Evidence's": (
        lambda node, challenge: replace(node.proof(challenge), csr=node.csr(ec.generate_private_key(ec.SECP256R1()))),
        "spki",
    ),
    "no certificate request": (lambda node, challenge: replace(node.proof(challenge), csr=b"garbage"), "csr"),
    "another node's name in the Evidence": (
        lambda node, challenge: replace(
            node.proof(challenge), evidence=node.evidence(bytes.fromhex(challenge.nonce), node="edge-7")
        ),
        "node",
    ),
}


@pytest.mark.parametrize("how", PROOFS)
async def test_the_second_call_refuses_by_name(office, how):
    """What is not proven by one TPM about one key ends the enrolment, which can't be tried again; the token is not used up."""
    make, check = PROOFS[how]
    node, token = SoftwareNode(vendor=VENDOR), await office.token()
    challenge = await _challenge(office, node, token)
    path = f"/node/v1/enrol/{challenge.enrolment}"
    assert (await _post(office, path, make(node, challenge), 422))["check"] == check
    record = (await office.records("node.enrol"))[-1]
    assert (record["outcome"], record["node"], record["check"]) == ("refused", "edge-1", check)
    assert (await _post(office, path, node.proof(challenge), 404))["check"] == "no_enrolment"
    await node.enrol(office.anyone, office.url, token)


async def test_a_name_and_a_tpm_are_bound_until_an_operator_releases_them(office):
    """Another TPM can't take the name, the TPM can't take another name; after a release both are free."""
    node = SoftwareNode(vendor=VENDOR)
    await node.enrol(office.anyone, office.url, await office.token())
    thief = SoftwareNode(vendor=VENDOR)
    assert (await _post(office, "/node/v1/enrol", thief.request(await office.token()), 409))[
        "check"
    ] == "enrolled_already"
    renamed = node.request(await office.token(), node="edge-2")
    assert (await _post(office, "/node/v1/enrol", renamed, 409))["check"] == "enrolled_already"
    await office.call("DELETE", "/v1/nodes/edge-1")
    await office.call("GET", "/v1/nodes/edge-1", expect=404)
    await node.enrol(office.anyone, office.url, await office.token())


async def test_a_push_is_appraised_and_renews(office):
    """A node behind NAT asks for a nonce, pushes, and gets its result and, with a request, a new certificate; a nonce serves once."""
    node = SoftwareNode(vendor=VENDOR)
    await node.enrol(office.anyone, office.url, await office.token(), mode="push", address=None)
    asked = await office.anyone.post(office.url + "/node/v1/challenge", json={"node": "edge-1"})
    challenge = await asked.json()
    assert challenge["from"] == len(node.entries)
    evidence = node.evidence(bytes.fromhex(challenge["nonce"]), challenge["from"])
    push = {
        "node": "edge-1",
        "nonce": challenge["nonce"],
        "evidence": msgspec.json.decode(evidence.encode()),
        "csr": base64.b64encode(node.csr()).decode(),
    }
    answer = await office.anyone.post(office.url + "/node/v1/evidence", json=push)
    assert answer.status == 200, await answer.text()
    body = await answer.json()
    assert (
        AttestationResult.verify(body["result"], parse_jwks(node.grant["jwks"].encode()), "edge-1").status
        == "affirming"
    )
    assert x509.load_pem_x509_certificate(body["certificate"].encode()).public_key() == node.control.public_key()
    again = await office.anyone.post(office.url + "/node/v1/evidence", json=push)
    assert (again.status, (await again.json())["check"]) == (409, "nonce")


async def test_a_push_without_certificate_and_request_is_refused(office):
    """Somebody must be at the other end whose key can be compared."""
    node = SoftwareNode(vendor=VENDOR)
    await node.enrol(office.anyone, office.url, await office.token(), mode="push", address=None)
    challenge = await (await office.anyone.post(office.url + "/node/v1/challenge", json={"node": "edge-1"})).json()
    evidence = msgspec.json.decode(node.evidence(bytes.fromhex(challenge["nonce"]), challenge["from"]).encode())
    push = {"node": "edge-1", "nonce": challenge["nonce"], "evidence": evidence}
    answer = await office.anyone.post(office.url + "/node/v1/evidence", json=push)
    assert (answer.status, (await answer.json())["check"]) == (422, "spki")


async def test_enrolment_calls_are_limited_by_address(config):
    """A flood of guesses gets 429 with the time to wait."""
    config.write_text(config.read_text().replace("per_minute: 1000", "per_minute: 2"))
    async with desk(config) as office:
        await office.approve()
        node, token = SoftwareNode(vendor=VENDOR), await office.token()
        guess = node.request(_other_secret(token)).encode()
        answers = [await office.anyone.post(office.url + "/node/v1/enrol", data=guess) for _ in range(3)]
        assert [answer.status for answer in answers] == [403, 403, 429]
        assert int(answers[-1].headers["Retry-After"]) >= 1


async def test_an_oversized_body_is_cut_off(office):
    """More than an enrolment needs is not read."""
    answer = await office.anyone.post(office.url + "/node/v1/enrol", data=b"x" * 100_000)
    assert (answer.status, (await answer.json())["check"]) == (413, "too_large")
