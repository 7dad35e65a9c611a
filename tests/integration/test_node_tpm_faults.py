"""A node whose TPM is absent, hangs, is reset, was cleared, or was extended by someone else."""

import os

import pytest
from tpm2_pytss import ESAPI, ESYS_TR, TPM2_ALG, TPML_DIGEST_VALUES, TPMT_HA, TPMU_HA

from tests.support.chaos import Client, prepare_template, running, wait_until
from tests.support.models import write_tiny

QUICK = {"tpm": {"timeout_ms": 500}}
EXIT_NO, EXIT_ENVIRONMENT = 1, 3

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return prepare_template(tmp_path_factory.mktemp("template"))


def evidence(node):
    return node.local("GET", f"/attestation/v1/evidence?nonce={os.urandom(32).hex()}&from=0")


def failures(node):
    return [record["error"] for record in node.records() if record["kind"] == "node.fail"]


def extend_as_someone_else(tpm):
    with ESAPI(tpm.tcti) as esys:
        digest = TPMT_HA(hashAlg=TPM2_ALG.SHA256, digest=TPMU_HA(sha256=b"x" * 32))
        esys.pcr_extend(ESYS_TR.PCR14, TPML_DIGEST_VALUES([digest]))


def test_without_a_tpm_the_node_does_not_start(template, tmp_path):
    """It ends with 3, says what it could not reach and what to do, and records it; no port was opened."""
    with running(template, tmp_path, start=False) as (node, tpm):
        tpm.kill()
        status, words = node.fail_to_start()
        assert status == EXIT_ENVIRONMENT
        assert "TPM: no connection over 'swtpm:host=127.0.0.1" in words
        assert "edgewarden doctor" in words
        assert failures(node) == [words.removeprefix("edgewarden: ")]
        assert "serving" not in {event.get("event") for event in node.events()}


@pytest.mark.slow
def test_a_tpm_that_hangs_stops_what_needs_it_and_nothing_else(template, tmp_path):
    """Evidence and new models are refused with 503 and the health says why; inference goes on; all of it recovers."""
    with running(template, tmp_path, QUICK) as (node, tpm):
        client = Client(node)
        tpm.stop()
        status, answer = evidence(node)
        assert (status, node.fact("attested")) == (503, False)
        assert "TPM" in answer["error"]
        assert "TPM" in node.health()["attested"]["why"]
        # A new package is not loaded while it can't be measured.
        node.sign_and_install(write_tiny(node.root / "packages" / "new" / "1", name="new"))
        assert node.local("POST", "/admin/v1/models/rescan")[0] == 503
        assert client.infer("new").status == 404
        # One that was in force and is not what it was leaves at once, measured or not.
        model = node.store / "tiny" / "1" / "model.onnx"
        good = model.read_bytes()
        assert [client.infer().status for _ in range(20)] == [200] * 20
        model.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        wait_until("unloaded", lambda: client.infer().status == 404)
        model.write_bytes(good)
        tpm.resume()
        wait_until("attested again", lambda: evidence(node)[0] == 200)
        assert node.fact("attested")
        wait_until("loaded by itself", lambda: client.infer("new").status == 200 and client.infer().status == 200)
        client.close()
        packages = [node.root / "packages" / name / "1" for name in ("tiny", "new")]
        assert node.appraise(packages)["status"] in {"affirming", "warning"}


def test_a_reset_under_the_agent_ends_it(template, tmp_path):
    """What is loaded is in no log any more: the process ends with a named error, and the next start measures anew."""
    with running(template, tmp_path, QUICK) as (node, tpm):
        tpm.reboot()
        model = node.store / "tiny" / "1" / "model.yaml"
        good = model.read_bytes()
        model.write_bytes(good + b"#")
        assert node.process is not None
        status = node.process.wait(60)
        node.process = None
        assert status == EXIT_ENVIRONMENT
        (error,) = failures(node)
        assert "the TPM was reset under the running agent" in error
        model.write_bytes(good)
        node.start()
        assert node.models() == {"tiny/1": "loaded"}
        assert len(list((node.root / "state" / "measurements").glob("boot-*.ima"))) == 2
        assert node.appraise([node.root / "packages" / "tiny" / "1"])["status"] == "affirming"


def test_a_cleared_tpm_asks_for_enrolment(template, tmp_path):
    """A resetCount that falls is another TPM to the world: the node says so and does not start."""
    with running(template, tmp_path, QUICK, start=False) as (node, tpm):
        for _ in range(3):
            tpm.reboot()
        node.start()
        assert node.stop() == 0
        tpm.clear()
        status, words = node.fail_to_start()
        assert status == EXIT_ENVIRONMENT
        assert "it was cleared; enrol this node again" in words
        assert words.removeprefix("edgewarden: ") in failures(node)


@pytest.mark.parametrize("when", ["before the first start", "between two starts"])
def test_a_pcr_that_someone_else_extended_loads_nothing(template, tmp_path, when):
    """The log does not replay to it: tampering, named with the PCR, recorded, and no port is opened."""
    with running(template, tmp_path, QUICK, start=False) as (node, tpm):
        if when == "between two starts":
            node.start()
            assert node.stop() == 0
        extend_as_someone_else(tpm)
        status, words = node.fail_to_start()
        assert status == EXIT_NO
        assert words.startswith("edgewarden: measurement-log: PCR 14 holds")
        assert failures(node) == [words.removeprefix("edgewarden: ")]


def test_a_pcr_that_someone_else_extends_meanwhile_is_noticed(template, tmp_path):
    """Evidence is refused from then on, the health says why, and no model is taken up."""
    with running(template, tmp_path, QUICK) as (node, tpm):
        extend_as_someone_else(tpm)
        status, answer = evidence(node)
        assert (status, node.fact("attested")) == (422, False)
        assert "someone else extended it" in answer["error"]
        node.sign_and_install(write_tiny(node.root / "packages" / "new" / "1", name="new"))
        status, answer = node.local("POST", "/admin/v1/models/rescan")
        assert (status, answer["error"].split(":")[0]) == (422, "measurement-log")
        client = Client(node)
        assert (client.infer("new").status, client.infer().status) == (404, 200)
        client.close()
