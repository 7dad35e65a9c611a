"""A node that starts on what a crash, a bad disk or a stranger left in its state directory."""

import fcntl
import shutil
import signal

import pytest

from agent.attest.measurement import parse_entries
from agent.audit.reader import list_segments
from tests.support.chaos import ChaosNode, Client, prepare_template, running
from tests.support.models import write_tiny
from tests.support.swtpm import SwTpm

EXIT_NO, EXIT_ENVIRONMENT = 1, 3
PCR = 14

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return prepare_template(tmp_path_factory.mktemp("template"))


@pytest.fixture(scope="module")
def used(template, tmp_path_factory):
    """A node that served and was killed; its measurement log belongs to a TPM that is gone and is left out."""
    directory = tmp_path_factory.mktemp("used")
    with running(template, directory) as (node, _):
        client = Client(node)
        assert [client.infer().status for _ in range(5)] == [200] * 5
        client.close()
        node.stop(signal.SIGKILL)
    shutil.rmtree(directory / "node" / "state" / "measurements")
    shutil.rmtree(directory / "node" / "run")
    return directory / "node"


def kinds(node):
    return [(record["kind"], record["outcome"]) for record in node.records()]


def segment(node):
    return list_segments(node.root / "state" / "audit")[-1]


def content_end(path):
    return len(path.read_bytes().rstrip(b"\0"))


def test_a_torn_record_is_cut_and_a_record_says_so(used, tmp_path):
    """What a power cut left of the last record goes; the log says where and how much."""
    with running(used, tmp_path, start=False) as (node, _):
        path = segment(node)
        data = bytearray(path.read_bytes())
        end = content_end(path)
        data[end - 3 : end] = b"\0\0\0"
        path.write_bytes(data)
        node.start()
        assert ("log.recovered", "ok") in kinds(node)


def test_a_damaged_record_in_the_middle_refuses_the_start(used, tmp_path):
    """What was durable must still be there: 3, with the file, the place and what to do."""
    with running(used, tmp_path, start=False) as (node, _):
        path = segment(node)
        data = bytearray(path.read_bytes())
        data[content_end(path) // 2] ^= 1
        path.write_bytes(data)
        status, words = node.fail_to_start()
        assert status == EXIT_ENVIRONMENT
        assert path.name in words
        assert "edgewarden log verify" in words


def test_leftovers_of_a_crash_are_no_obstacle(used, tmp_path):
    """Half-written files beside the real ones, a marker that is no digest, a ballast cut short: the node starts and serves."""
    with running(used, tmp_path, start=False) as (node, _):
        policy = node.root / "state" / "policy"
        (policy / "policy.tar.gz.new").write_bytes(b"\x1f\x8bhalf")
        (policy / "configured.sha256.new").write_bytes(b"")
        (policy / "configured.sha256").write_bytes(b"\xff\xfe not a digest")
        (node.root / "state" / "audit" / "ballast").write_bytes(b"")
        node.start()
        client = Client(node)
        assert client.infer().status == 200
        client.close()


@pytest.mark.parametrize("damage", [b"", b"\x1f\x8b\x08half a bundle", b"no bundle at all" * 1000])
def test_a_damaged_policy_falls_back_to_the_configured_one(used, tmp_path, damage):
    """The kept bundle is refused by name and on record, and the configured one, signed as ever, is put in force."""
    with running(used, tmp_path, start=False) as (node, _):
        kept = node.root / "state" / "policy" / "policy.tar.gz"
        kept.write_bytes(damage)
        node.start()
        (event,) = [event for event in node.events() if event.get("event") == "policy_refused"]
        assert event["path"] == str(kept)
        activations = [entry for entry in kinds(node) if entry[0] == "policy.activate"]
        assert activations[-2:] == [("policy.activate", "refused"), ("policy.activate", "ok")]
        assert kept.read_bytes() == (node.root / "policy.tar.gz").read_bytes()


def test_a_new_bundle_that_is_refused_leaves_the_last_good_one_in_force(used, tmp_path):
    """A broken file in /etc stops no node that has a policy already."""
    with running(used, tmp_path, start=False) as (node, _):
        (node.root / "policy.tar.gz").write_bytes(b"no bundle")
        node.start()
        assert node.local("GET", "/admin/v1/policy")[1]["revision"] == "r1"


def test_without_any_good_policy_the_node_does_not_start(used, tmp_path):
    """1, with the file that was tried last; nothing was opened."""
    with running(used, tmp_path, start=False) as (node, _):
        (node.root / "policy.tar.gz").write_bytes(b"no bundle")
        (node.root / "state" / "policy" / "policy.tar.gz").write_bytes(b"no bundle either")
        status, words = node.fail_to_start()
        assert status == EXIT_NO
        assert "policy.tar.gz: " in words
        assert kinds(node)[-1] == ("node.fail", "failed")


def test_a_directory_in_the_place_of_a_file_is_named(used, tmp_path):
    """3, with the path."""
    with running(used, tmp_path, start=False) as (node, _):
        kept = node.root / "state" / "policy" / "policy.tar.gz"
        kept.unlink()
        kept.mkdir()
        status, words = node.fail_to_start()
        assert (status, str(kept) in words) == (EXIT_ENVIRONMENT, True)


def test_one_agent_a_state_directory(used, tmp_path):
    """A second one ends at once and says why."""
    with running(used, tmp_path, start=False) as (node, _), (node.root / "state" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, words = node.fail_to_start()
        assert (status, "another agent is running" in words) == (EXIT_ENVIRONMENT, True)


@pytest.mark.slow
def test_the_measurement_log_after_a_crash_and_after_a_stranger(template, tmp_path):
    """A torn entry is cut and a pending one extended; one that is missing, or a whole log, is tampering until the TPM is reset."""
    with running(template, tmp_path) as (node, tpm):
        node.stop(signal.SIGKILL)
        log = newest_log(node)
        before = log.read_bytes()
        # 1. Torn: written in part, never extended.
        log.write_bytes(before + before[-40:-10])
        node.start()
        node.stop(signal.SIGKILL)
        # 2. Cut: it was extended, and now it is not there.
        log.write_bytes(log.read_bytes()[:-1])
        refused_as_tampering(node)
        after_reset(node, tpm)
        # 3. One bit of an entry that was extended.
        log = newest_log(node)
        data = bytearray(log.read_bytes())
        data[len(data) // 2] ^= 1
        log.write_bytes(data)
        refused_as_tampering(node)
        after_reset(node, tpm)
        # 4. All of it.
        newest_log(node).unlink()
        refused_as_tampering(node)
        after_reset(node, tpm)
        # 5. A file that is none of ours.
        (node.root / "state" / "measurements" / "boot-later.ima").write_bytes(b"")
        assert "boot-later.ima is not a file of the measurement log" in refused_as_tampering(node)


def newest_log(node: ChaosNode):
    return max((node.root / "state" / "measurements").glob("boot-0*.ima"))


def refused_as_tampering(node: ChaosNode) -> str:
    status, words = node.fail_to_start()
    assert status == EXIT_NO
    assert words.startswith(("edgewarden: measurement-log: ", "edgewarden: log-replay: ")), words
    assert node.records()[-1]["kind"] == "node.fail"
    return words


def after_reset(node: ChaosNode, tpm: SwTpm) -> None:
    tpm.reboot()
    node.start()
    assert node.models() == {"tiny/1": "loaded"}
    node.stop(signal.SIGKILL)


def test_what_changed_while_the_node_was_down_is_measured(template, tmp_path):
    """A package that was removed is out of force in the log, one with a wrong byte is refused in it: no word of an earlier agent stays."""
    with running(template, tmp_path, start=False) as (node, _):
        for name in ("gone", "changed"):
            node.sign_and_install(write_tiny(node.root / "packages" / name / "1", name=name))
        node.start()
        assert set(node.models().values()) == {"loaded"}
        node.stop(signal.SIGKILL)
        shutil.rmtree(node.store / "gone")
        model = node.store / "changed" / "1" / "model.onnx"
        data = bytearray(model.read_bytes())
        data[100] ^= 1
        model.write_bytes(data)
        node.start()
        assert node.models() == {"tiny/1": "loaded", "changed/1": "refused"}
        packages = [node.root / "packages" / name / "1" for name in ("tiny", "gone", "changed")]
        appraisal = node.appraise(packages)
        assert appraisal["status"] == "warning"
        state = appraisal["verified"]["state"]
        assert {path.split("/")[0] for path in state["models"]} == {"tiny"}
        assert set(state["refused"]) == {"changed/1/model.onnx"}
        paths = [entry.path for entry in parse_entries(newest_log(node).read_bytes(), PCR)]
        assert "edgewarden/unload/gone/1" in paths
        assert "edgewarden/unload/changed/1" in paths
