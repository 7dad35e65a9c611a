"""A node with a TPM enrols at a real controller that trusts one root, and nothing between it and the TPM's certificate."""

import contextlib
from pathlib import Path

import msgspec
import pytest
import structlog

from agent.attest.collect import NodeFacts, collect_evidence
from agent.attest.enrolment import MAX_EK_CHAIN
from agent.attest.log import MeasurementLog
from agent.attest.measurement import config_entry, model_entry, policy_entry
from agent.attest.tpm import Tpm
from agent.attest.tpm_thread import TpmThread
from agent.errors import ControllerError
from agent.flows.enrolled import EnrolmentStore
from agent.flows.enrolment import EnrolmentFlow
from controller.trust.endorsement import parse_ek_public
from tests.support.attest import CONFIG, MODEL, PCR, POLICY
from tests.support.controller_service import controller_home, desk
from tests.support.ek_chains import PAST, ROOT, Ca, line, under
from tests.support.swtpm import SwTpm

pytestmark = pytest.mark.integration
CERTIFICATES = {"EK-RSA2048": 0x01C00002, "EK-ECC256": 0x01C0000A}
CHAIN = 0x01C00100
ENTRIES = (config_entry(CONFIG), policy_entry("r1", POLICY), model_entry("m", "1", "model.onnx", MODEL))


@pytest.fixture
def swtpm(tmp_path):
    with SwTpm(tmp_path) as running:
        yield running


@pytest.fixture
def config(tmp_path):
    return controller_home(tmp_path, ROOT.pem())


@pytest.fixture
async def office(config):
    async with desk(config) as running:
        await running.approve()
        yield running


def _made(swtpm, profile, *below, size=700):
    """Do what a maker does: certify the endorsement key, and leave the certificate and those above it in NV."""
    with contextlib.closing(Tpm(swtpm.tcti)) as tpm:
        shown = under(parse_ek_public(tpm.ek_public(profile)), *below)
    swtpm.write_nv(CERTIFICATES[profile], shown.certificate)
    chain = b"".join(shown.chain)
    for number, at in enumerate(range(0, len(chain), size)):
        swtpm.write_nv(CHAIN + number, chain[at : at + size])
    return shown


async def _enrol(office, swtpm, folder: Path, name="edge-1"):
    tpm = TpmThread(swtpm.tcti)
    try:
        log = await MeasurementLog.open(tpm, folder / "log", PCR)
        for entry in ENTRIES:
            await log.append(entry)

        async def evidence(nonce, start, spki):
            facts = NodeFacts(name, "boot", None, spki, None, {})
            return await collect_evidence(tpm, log, nonce, start, lambda: facts)

        token = msgspec.structs.replace(await office.token(), url=office.url)
        flow = EnrolmentFlow(name, tpm, EnrolmentStore(folder / "controller"), evidence)
        return await flow.run(token, "push", None)
    finally:
        await tpm.close()


@pytest.mark.parametrize("profile", CERTIFICATES)
@pytest.mark.parametrize("intermediates", [1, 3])
async def test_intermediates_out_of_the_tpm_lead_to_the_operator_s_root(
    office, swtpm, tmp_path, profile, intermediates
):
    """RSA and ECC: the node reads them, sends them, and the controller, which trusts the root alone, believes the TPM."""
    _made(swtpm, profile, *line(intermediates))
    enrolled = await _enrol(office, swtpm, tmp_path / "n")
    assert enrolled.result.status == "affirming"
    assert (await office.node("edge-1"))["status"] == "affirming"


async def _refused(office, swtpm, tmp_path):
    with structlog.testing.capture_logs() as logs, pytest.raises(ControllerError, match="ek-chain"):
        await _enrol(office, swtpm, tmp_path / "n")
    (record,) = await office.records("node.enrol")
    assert (record["outcome"], record["node"], record["check"]) == ("refused", "edge-1", "ek-chain")
    assert (await office.call("GET", "/v1/nodes"))["nodes"] == []
    assert EnrolmentStore(tmp_path / "n" / "controller").load("edge-1") is None
    return [log for log in logs if log["event"] == "ek_chain_left_out"]


async def test_intermediates_in_nv_are_not_trusted(office, swtpm, tmp_path):
    """Whoever can write NV can put a CA of its own there, also one with the vendor's name, and a certificate by it: refused, and on record."""
    _made(swtpm, "EK-ECC256", impostor := Ca(ROOT.name), Ca("Intermediate", impostor))
    assert await _refused(office, swtpm, tmp_path) == []


async def test_an_intermediate_in_nv_that_expired_is_refused(office, swtpm, tmp_path):
    """The dates of what the TPM holds count."""
    _made(swtpm, "EK-ECC256", Ca("Old", ROOT, end=PAST))
    assert await _refused(office, swtpm, tmp_path) == []


@pytest.mark.parametrize("data", [b"\x30garbage", line(1)[0].der() * (MAX_EK_CHAIN + 1)], ids=["garbage", "too many"])
async def test_what_can_not_be_read_out_of_nv_is_left_out_and_named(office, swtpm, tmp_path, data):
    """The node's log says so; the controller misses what it needs."""
    _made(swtpm, "EK-ECC256", *line(1), size=2048)
    for number, at in enumerate(range(0, len(data), 2048)):
        swtpm.write_nv(CHAIN + number, data[at : at + 2048])
    (log,) = await _refused(office, swtpm, tmp_path)
    assert log["log_level"] == "warning"
    assert "ek-chain" in log["error"]


async def test_garbage_in_nv_costs_nothing_where_no_intermediate_is_needed(office, swtpm, tmp_path):
    """Where the root itself has signed the certificate, the node is enrolled all the same."""
    with contextlib.closing(Tpm(swtpm.tcti)) as tpm:
        certificate = ROOT.endorse(parse_ek_public(tpm.ek_public("EK-ECC256")))
    swtpm.write_nv(CERTIFICATES["EK-ECC256"], certificate)
    swtpm.write_nv(CHAIN, b"\x30garbage")
    assert (await _enrol(office, swtpm, tmp_path / "n")).result.status == "affirming"
