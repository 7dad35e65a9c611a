"""A node whose agent does not start leaves its controller, and starts again."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import pytest

from agent.attest.tpm import Tpm
from agent.config import load
from agent.daemon.offline import leave_offline
from agent.errors import HostError
from agent.flows.controller import key_sha256
from controller.trust.endorsement import parse_ek_public
from tests.support.chaos import prepare_template, running
from tests.support.controller import FakeController
from tests.support.controller_service import controller_home, desk
from tools.demo_node import ROOT

EXIT_NO, EXIT_ENVIRONMENT = 1, 3
NOBODY = 65534

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may make a node leave while its agent does not run"),
]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return prepare_template(tmp_path_factory.mktemp("template"))


@pytest.fixture
def controller():
    with FakeController() as found:
        yield found


def attest(*words, token=""):
    command = [sys.executable, "-m", "agent.cli", "attest", *map(str, words)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, input=token, timeout=60)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def socket_of(node):
    return "--socket", node.root / "run" / "admin.sock"


def enrol(node, controller):
    code, _, words = attest("enrol", "--token-file", "-", "--mode", "push", *socket_of(node), token=controller.token())
    assert code == 0, words


def leave(node, *words):
    return attest("leave", "--offline", "--config", node.config, *words)


def kept(node):
    """Return what the node has of its enrolment."""
    return sorted(path.name for path in (node.root / "state" / "controller").glob("*"))


def leavings(node):
    return [record for record in node.records() if record["kind"] == "node.leave"]


def retired(node):
    return sorted(path.name for path in (node.root / "state" / "measurements").glob("retired-*/*"))


def test_a_node_whose_tpm_was_cleared_leaves_and_enrols_again(template, tmp_path, controller):
    """The agent says what to do; root does it without the agent, which then starts, is not enrolled, and can be enrolled anew."""
    with running(template, tmp_path, start=False) as (node, tpm):
        for _ in range(3):
            tpm.reboot()
        node.start()
        enrol(node, controller)
        assert node.stop() == 0
        tpm.clear()
        tpm.reboot()
        status, words = node.fail_to_start()
        assert (status, "attest leave --offline" in words) == (EXIT_ENVIRONMENT, True)

        code, output, words = leave(node)
        assert code == 0, words
        assert output.splitlines()[0].split() == ["left", controller.url]
        assert "the TPM was cleared" in output
        assert "edgewarden node release" in output
        assert kept(node) == []
        (record,) = leavings(node)
        assert (record["outcome"], record["principal"], record["detail"]) == (
            "ok",
            "uid:0",
            {"controller": controller.url, "offline": True, "retired_logs": 1},
        )
        assert len(retired(node)) == 1

        node.start()
        code, output, _ = attest("status", "--json", *socket_of(node))
        assert (code, json.loads(output)["enrolled"]) == (0, False)
        assert node.appraise([node.root / "packages" / "tiny" / "1"])["status"] == "affirming"
        enrol(node, controller)


def test_what_leaves_in_the_same_boot_keeps_its_measurements(template, tmp_path, controller):
    """Where the TPM was not cleared the logs stay, and the agent goes on with them; there is nothing to leave a second time."""
    with running(template, tmp_path) as (node, _):
        enrol(node, controller)
        assert node.stop() == 0
        code, output, words = leave(node, "--json")
        assert (code, json.loads(output)) == (
            0,
            {"enrolled": False, "left": True, "controller": controller.url, "retired": []},
        ), words
        assert (kept(node), retired(node)) == ([], [])
        code, _, words = leave(node)
        assert (code, "this node is not enrolled, and its TPM was not cleared" in words) == (EXIT_NO, True)
        assert len(leavings(node)) == 1
        node.start()
        assert node.fact("attested")


def test_a_damaged_enrolment_can_be_left(template, tmp_path, controller):
    """It keeps the agent from starting; what was wrong with it stands in the record."""
    with running(template, tmp_path) as (node, _):
        enrol(node, controller)
        assert node.stop() == 0
        (node.root / "state" / "controller" / "enrolment.json").write_text("{")
        status, words = node.fail_to_start()
        assert (status, "enrolment" in words) == (EXIT_NO, True)
        code, output, words = leave(node)
        assert (code, "address could not be read" in output) == (0, True), words
        (record,) = leavings(node)
        assert "enrolment.json is damaged" in record["error"]
        node.start()


def test_an_interrupted_leaving_is_done_by_asking_again(template, tmp_path, controller):
    """Where the enrolment is gone already, the logs of the cleared TPM are put aside; so it is for a node that was never enrolled."""
    with running(template, tmp_path, start=False) as (node, tpm):
        for _ in range(3):
            tpm.reboot()
        node.start()
        assert node.stop() == 0
        tpm.clear()
        tpm.reboot()
        code, output, words = leave(node)
        assert (code, output.startswith("put aside")) == (0, True), words
        assert leavings(node)[-1]["detail"]["controller"] == ""
        node.start()
        enrol(node, controller)


def test_logs_that_are_put_aside_in_the_same_boot_load_nothing(template, tmp_path):
    """Leaving is no way to make the node forget what it measured: the PCR remembers."""
    with running(template, tmp_path, start=False) as (node, tpm):
        for _ in range(3):
            tpm.reboot()
        node.start()
        assert node.stop() == 0
        tpm.clear()  # and no reboot
        assert leave(node)[0] == 0
        status, words = node.fail_to_start()
        assert (status, "nothing loads until a reboot" in words) == (EXIT_NO, True)
        tpm.reboot()
        node.start()


def _tree(folder: Path):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "lock"}


def test_nothing_changes_where_it_may_not(template, tmp_path, controller):
    """Not beside a running agent, not without a TPM, not for another user, not with a log that takes no record: each by name."""
    with running(template, tmp_path) as (node, tpm):
        enrol(node, controller)
        code, _, words = leave(node)
        assert (code, "another agent is running" in words) == (EXIT_ENVIRONMENT, True)
        assert node.stop() == 0
        state = node.root / "state"
        before = _tree(state)

        audit = state / "audit"
        audit.rename(state / "elsewhere")
        audit.write_text("no directory")
        code, _, words = leave(node)
        assert (code, "audit" in words) == (EXIT_ENVIRONMENT, True)
        audit.unlink()
        (state / "elsewhere").rename(audit)

        tpm.kill()
        code, _, words = leave(node)
        assert (code, "TPM" in words) == (EXIT_ENVIRONMENT, True)
        assert _tree(state) == before


def test_another_user_is_refused(template, tmp_path):
    """By name, before anything is looked at."""
    with running(template, tmp_path, start=False) as (node, _):
        settings = load(node.config)
        os.seteuid(NOBODY)
        try:
            with pytest.raises(HostError, match="only root"):
                leave_offline(settings)
        finally:
            os.seteuid(0)
        assert not (node.root / "state").exists()


def test_where_there_is_no_state_none_is_made(template, tmp_path):
    """A wrong configuration changes nothing anywhere."""
    with running(template, tmp_path, start=False) as (node, _):
        code, _, words = leave(node)
        assert (code, "state directory" in words) == (EXIT_ENVIRONMENT, True)
        assert not (node.root / "state").exists()


def test_the_agent_s_files_stay_the_agent_s(template, controller):
    """What root does here, it does as the owner of the state directory, and no more than that one may: its agent can go on with the files."""
    with tempfile.TemporaryDirectory() as name, running(template, Path(name), start=False) as (node, tpm):
        for _ in range(3):
            tpm.reboot()
        node.start()
        enrol(node, controller)
        assert node.stop() == 0
        state = node.root / "state"
        for path in (state, *state.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        for folder in (Path(name), node.root):
            folder.chmod(0o711)
        tpm.clear()
        tpm.reboot()
        os.chown(state / "measurements", 0, 0)
        (state / "measurements").chmod(0o755)
        code, _, words = leave(node)
        assert (code, "Permission denied; ask again" in words) == (EXIT_ENVIRONMENT, True), words
        assert (kept(node), retired(node)) == ([], [])
        os.chown(state / "measurements", NOBODY, NOBODY)
        code, _, words = leave(node)
        assert code == 0, words
        assert len(retired(node)) == 1
        owners = {path: path.stat().st_uid for path in (state, *state.rglob("*"))}
        assert set(owners.values()) == {NOBODY}, owners


# --- the whole way, with a real controller


@pytest.fixture
def listed(template, tmp_path):
    """A node whose TPM stands on the allowlist of a controller that does not run yet."""
    with running(template, tmp_path, start=False) as (node, tpm):
        for _ in range(3):
            tpm.reboot()
        with contextlib.closing(Tpm(tpm.tcti)) as door:
            key = parse_ek_public(door.ek_public("EK-RSA2048"))
        config = controller_home(tmp_path, b"", enrolment={"ek_allowlist": "tpms"})
        (config.parent / "tpms").write_text(key_sha256(key) + "  # the node's\n")
        yield node, tpm, config


async def test_a_cleared_node_comes_back_at_a_real_controller(listed):
    """As the guide says: leave, release, enrol; before the release its name and its TPM are taken."""
    node, tpm, config = listed
    name = load(node.config).node.id

    async def enrolled(office):
        token = msgspec.structs.replace(await office.token(), url=office.url).text()
        words = ("enrol", "--token-file", "-", "--mode", "push", *socket_of(node))
        return await asyncio.to_thread(attest, *words, token=token)

    async with desk(config) as office:
        await office.approve()
        node.start()
        assert (await enrolled(office))[0] == 0
        first = await office.node(name)
        assert node.stop() == 0
        tpm.clear()
        tpm.reboot()
        assert leave(node)[0] == 0
        node.start()
        code, _, words = await enrolled(office)
        assert (code, "enrolled already" in words) == (EXIT_ENVIRONMENT, True), words
        await office.call("DELETE", f"/v1/nodes/{name}")
        code, _, words = await enrolled(office)
        assert code == 0, words
        second = await office.node(name)
    assert first["enrolled"] <= second["enrolled"]
    assert second["reachable"]
