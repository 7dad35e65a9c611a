"""A whole node whose enrolment is denied, refused, damaged, killed or out of date: named words, the right exit code, the old state or the new."""

import asyncio
import base64
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys

import msgspec
import pytest
from aiohttp import web

from agent.attest.enrolment import ENROL_PATH
from agent.config import load
from tests.support.chaos import Client, prepare_template, running, wait_until
from tests.support.controller import FakeController, pem
from tests.support.controller_service import controller_home, desk
from tests.support.node import build_policy
from tests.support.node_terminal import attest, enrol, enrolled, kept, status
from tools.demo_node import ROOT, edgewarden
from tools.software_tpm import free_port

EXIT_NO, EXIT_USAGE, EXIT_ENVIRONMENT = 1, 2, 3

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return prepare_template(tmp_path_factory.mktemp("template"))


@pytest.fixture
def controller():
    with FakeController() as found:
        yield found


def serves(node):
    client = Client(node)
    try:
        return client.infer().status == 200
    finally:
        client.close()


# --- what the operator's own policy says


def test_policy_denies_each_call_by_name_and_on_record(template, tmp_path, controller):
    """The reason reaches the terminal, nobody is spoken to, and nothing changes; the node goes on to push."""
    with running(template, tmp_path) as (node, _):
        enrolled(node, controller)
        suspended = {"roles": {"suspended": {"unix": {f"uid:{os.getuid()}": "left the company"}}}}
        bundle = tmp_path / "suspended.tar.gz"
        bundle.write_bytes(build_policy(node, "r2", suspended))
        assert node.local("PUT", "/admin/v1/policy", bundle.read_bytes())[0] == 200
        before = kept(node)["enrolment.json"]
        controller.received.clear()
        for verb, (code, output, words) in {
            "status": attest(node, "status"),
            "enrol": enrol(node, controller),
            "leave": attest(node, "leave"),
        }.items():
            assert (code, output) == (EXIT_NO, "")
            assert f"admin.{verb} is denied to uid:{os.getuid()}: subject_suspended" in words
            record = [found for found in node.records() if found.get("action") == f"admin.{verb}"][-1]
            assert (record["kind"], record["outcome"], record["reasons"]) == ("admin", "denied", ["subject_suspended"])
        assert kept(node)["enrolment.json"] == before
        wait_until("it pushes", lambda: len(controller.received) > 3)
        assert not [path for path, _, _ in controller.received if path.startswith(ENROL_PATH)]


def test_what_an_operator_asks_for_at_the_wrong_time_is_refused(template, tmp_path, controller):
    """Leaving twice, enrolling twice, pull without a listener, a damaged token: each in words, and nothing of the token."""
    with running(template, tmp_path) as (node, _):
        code, _, words = attest(node, "leave")
        assert (code, "this node is not enrolled" in words) == (EXIT_NO, True)
        code, _, words = enrol(node, controller, "--mode", "pull", "--address", "127.0.0.1:1")
        assert (code, "a section control: in the configuration" in words) == (EXIT_ENVIRONMENT, True)
        token = controller.token()
        code, _, words = attest(node, "enrol", "--token-file", "-", text=token[:-9])
        assert (code, "join-token: it is damaged: copy it again" in words) == (EXIT_NO, True)
        assert token[4:40] not in words + node.log.read_text()
        assert controller.received == []
        enrolled(node, controller)
        code, _, words = enrol(node, controller)
        assert (code, f"this node is enrolled at {controller.url}: leave first" in words) == (EXIT_NO, True)
        assert attest(node, "leave")[0] == 0
        assert kept(node) == {}


# --- what a real controller says


@pytest.fixture
def real_controller(tmp_path):
    """Settings of a controller whose allowlist of TPMs is empty."""
    config = controller_home(tmp_path, b"", enrolment={"ek_allowlist": "tpms", "per_minute": 1000})
    (config.parent / "tpms").write_text("")
    return config


async def test_each_refusal_of_a_real_controller_reaches_the_terminal(template, tmp_path, real_controller):
    """Its words, its status and exit code 3, a record with both, and the node as it was; the last try is as good as the first."""
    config = real_controller
    with running(template, tmp_path) as (node, _):
        name = load(node.config).node.id

        async def asks(token):
            words = ("enrol", "--token-file", "-", "--mode", "push")
            return await asyncio.to_thread(attest, node, *words, text=token.text())

        async def made(office, **changes):
            return msgspec.structs.replace(await office.token(**changes), url=office.url)

        async def refused(token, status, words):
            code, output, complaint = await asks(token)
            assert (code, output) == (EXIT_ENVIRONMENT, ""), complaint
            assert f"refused with {status}: " in complaint
            assert words in complaint
            record = [found for found in node.records() if found["kind"] == "node.enrol"][-1]
            assert (record["outcome"], words in record["error"]) == ("failed", True)
            return complaint

        async with desk(config) as office:
            await office.approve()
            good = await made(office)
            unknown = msgspec.structs.replace(good, id="0" * 16)
            guessed = msgspec.structs.replace(good, secret=bytes(32))
            await refused(unknown, 403, "join token")
            await refused(guessed, 403, "join token")
            await refused(await made(office, node="edge-9"), 403, "join token")
            complaint = await refused(good, 422, "ek-")
            code, output, _ = await asyncio.to_thread(attest, node, "status", "--json")
            assert (code, json.loads(output)["enrolled"]) == (0, False)
        digest = next(word for word in complaint.replace(",", " ").split() if len(word) == 64)
        (config.parent / "tpms").write_text(digest + "\n")
        async with desk(config) as office:
            good = await made(office)
            assert (await asks(good))[0] == 0
            assert (await asyncio.to_thread(attest, node, "leave"))[0] == 0
            await refused(good, 403, "was used already")
            await refused(await made(office), 409, "release that node first")
            await office.call("DELETE", f"/v1/nodes/{name}")
            assert (await asks(await made(office)))[0] == 0


# --- kill -9


@pytest.mark.parametrize("moment", ["first call", "second call", "grant made", "grant on its way", "record"])
def test_a_node_that_is_killed_while_it_enrols_is_enrolled_or_not(template, tmp_path, controller, moment):
    """It starts in the old state or in the new, never in between, and can be enrolled in the end."""
    with running(template, tmp_path) as (node, _):
        agent = node.process
        assert agent is not None

        def end():
            os.kill(agent.pid, signal.SIGKILL)

        async def handler(request):
            second = request.path != ENROL_PATH
            if moment == ("second call" if second else "first call"):
                end()
            answer = controller._route(request.path, await request.read())
            if second and moment == "grant made":
                end()
            elif second and moment == "grant on its way":
                asyncio.get_running_loop().call_later(0.005, end)
            return web.Response(body=answer.encode(), content_type="application/json")

        controller.answers = {ENROL_PATH: handler}
        asking = subprocess.Popen(
            [
                *(sys.executable, "-m", "agent.cli", "attest", "enrol", "--token-file", "-", "--mode", "push"),
                *("--socket", node.root / "run" / "admin.sock"),
            ],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert asking.stdin is not None
        asking.stdin.write(controller.token())
        asking.stdin.close()
        asking.stdin = None
        if moment == "record":
            wait_until("it is enrolled", (node.root / "state" / "controller" / "enrolment.json").exists)
            end()
        agent.wait(30)
        node.process = None
        _, complaint = asking.communicate(timeout=60)
        assert "Traceback" not in complaint

        controller.answers = {}
        node.start()
        now = status(node)
        assert now["enrolled"] is ("enrolment.json" in kept(node))
        if moment in {"first call", "second call", "grant made"}:
            assert now["enrolled"] is False
        if moment == "record":
            assert now["enrolled"] is True
        if not now["enrolled"]:
            assert now["trust"] == "unknown"
            enrolled(node, controller)
        wait_until("it is appraised", lambda: status(node)["connected"])
        assert status(node)["trust"] == "affirming"


# --- what was damaged


def test_a_damaged_enrolment_is_no_start(template, tmp_path, controller):
    """One line that names the file and the way out, exit code 1, a record; never "not enrolled". Whole again, it starts."""
    with running(template, tmp_path) as (node, _):
        enrolled(node, controller)
        assert node.stop() == 0
        folder = node.root / "state" / "controller"
        shutil.copytree(folder, tmp_path / "whole")
        damages = {
            "enrolment.json": lambda path: path.write_bytes(path.read_bytes()[:-20]),
            "key.pem": lambda path: path.chmod(0o644),
            "the node's key": lambda _: (folder / "key.pem").write_bytes(b""),
            "certificate": lambda _: (folder / "certificate.pem").write_bytes(b"-----BEGIN"),
            "ca.pem": lambda path: path.unlink(),
        }
        for named, damage in damages.items():
            damage(folder / named)
            code, words = node.fail_to_start()
            assert (code, named in words) == (EXIT_NO, True), words
            assert "edgewarden attest leave --offline" in words
            assert node.records()[-1]["kind"] == "node.fail"
            shutil.rmtree(folder)
            shutil.copytree(tmp_path / "whole", folder)
        node.start()
        assert status(node)["enrolled"] is True


def test_a_node_with_another_name_does_not_take_the_enrolment_over(template, tmp_path, controller):
    """Both names are in the words; with its old name it goes on."""
    with running(template, tmp_path) as (node, _):
        enrolled(node, controller)
        assert node.stop() == 0
        name = load(node.config).node.id
        whole = node.config.read_text()
        node.config.write_text(whole.replace(name, "edge-other"))
        code, words = node.fail_to_start()
        assert (code, name in words, "edge-other" in words) == (EXIT_NO, True, True)
        node.config.write_text(whole)
        node.start()
        assert status(node)["enrolled"] is True


@pytest.mark.parametrize("damage", ["missing", "cut", "another node's", "nested"])
def test_a_node_that_lost_its_result_loads_nothing_until_the_next(template, tmp_path, controller, damage):
    """It can't know what was withdrawn; it starts, says so, and the next result mends it."""
    with running(template, tmp_path) as (node, _):
        enrolled(node, controller)
        wait_until("it serves", lambda: serves(node))
        other = controller.result("ab" * 32, node="edge-other")
        assert node.stop() == 0
        controller.stop()
        path = node.root / "state" / "controller" / "result.jwt"
        deep = base64.urlsafe_b64encode(b'{"alg":"ES256","kid":"k1","x":' + b"[" * 100_000).decode().rstrip("=")
        if damage == "missing":
            path.unlink()
        else:
            path.write_text(
                {"cut": path.read_text()[:-30], "another node's": other, "nested": f"{deep}.e30.AA"}[damage]
            )
        node.start()
        assert status(node)["trust"] == "none"
        assert not serves(node)
        controller.start()
        wait_until("it serves again", lambda: serves(node))


def test_an_enrolment_at_a_controller_of_another_ca_says_so(template, tmp_path, controller):
    """A kept CA that is not this controller's: the node starts, is never connected, tells nothing, and says why."""
    with running(template, tmp_path) as (node, _), FakeController() as other:
        enrolled(node, controller)
        assert node.stop() == 0
        (node.root / "state" / "controller" / "ca.pem").write_text(pem(other.ca.root))
        controller.received.clear()
        node.start()
        wait_until("it tried", lambda: "certificate verify failed" in status(node)["push_failure"])
        assert status(node)["connected"] is False
        assert controller.received == []


# --- trust in time


def test_policy_decides_how_long_a_result_is_good_for(template, tmp_path, controller):
    """A controller that is silent does not stop the node; a result that is too old does, by name; the next one mends it."""
    with running(template, tmp_path) as (node, _):
        limits = dict.fromkeys(("public", "internal", "confidential", "restricted"), 12)
        bundle = build_policy(node, "r2", {"node": {"max_attested_age_s": limits}})
        assert node.local("PUT", "/admin/v1/policy", bundle)[0] == 200
        enrolled(node, controller)
        wait_until("it serves", lambda: serves(node))
        controller.stop()
        wait_until("it is not connected", lambda: not node.fact("connected"))
        wait_until("its result is too old", lambda: not serves(node))
        denied = [record for record in node.records() if record.get("action") == "infer" and record["outcome"] != "ok"]
        assert denied[-1]["reasons"] == ["attestation_too_old"], denied
        assert status(node)["trust"] == "affirming"
        controller.start()
        wait_until("it serves again", lambda: serves(node))
        assert node.fact("connected")


def test_a_result_from_before_a_restart_raises_no_trust(template, tmp_path, controller):
    """In mode pull: neither one that was taken nor one that was kept back; and the node that left and enrolled again listens again."""
    address = f"127.0.0.1:{free_port()}"
    with running(template, tmp_path, {"control": {"listen": address}}) as (node, _):
        enrolled(node, controller, "--mode", "pull", "--address", address)
        assert controller.poll()[0] == 200
        taken = controller.member.results[-1]
        nonce = "cd" * 32
        assert controller.ask("GET", f"/attestation/v1/evidence?nonce={nonce}")[0] == 200
        kept_back = controller.result(nonce)
        assert controller.poll(status="contraindicated")[0] == 200
        assert node.stop() == 0
        node.start()
        for jwt in (taken, kept_back):
            code, body = controller.ask("PUT", "/attestation/v1/result", jwt.encode())
            assert (code, b"nonce" in body) == (422, True)
        assert status(node)["trust"] == "contraindicated"
        assert not serves(node)
        assert controller.poll()[0] == 200
        wait_until("it serves", lambda: serves(node))
        assert attest(node, "leave")[0] == 0
        enrolled(node, controller, "--mode", "pull", "--address", address)
        assert controller.poll(status="warning")[0] == 200
        assert status(node)["trust"] == "warning"


def test_a_withdrawn_file_loads_nowhere_although_policy_allows(template, tmp_path, controller):
    """Not after a scan, a restart, or a policy that allows everything; the record says by whom."""
    with running(template, tmp_path) as (node, _):
        enrolled(node, controller)
        wait_until("it serves", lambda: serves(node))
        manifest = (node.store / "tiny" / "1" / "model.onnx").read_bytes()
        controller.withdrawn = frozenset({hashlib.sha256(manifest).hexdigest()})
        wait_until("it is dropped", lambda: not serves(node))
        allowing = (
            'package edgewarden.authz\n\ndecision := {\n\t"allow": true,\n\t"reasons": [],\n\t"obligations": {},\n}\n'
        )
        bundle = build_policy(node, "r2", rego={"edgewarden/authz.rego": allowing})
        activated = node.local("PUT", "/admin/v1/policy", bundle)
        assert activated[0] == 200, activated
        assert node.models()["tiny/1"] != "loaded"
        assert not serves(node)
        controller.stop()
        assert node.stop() == 0
        node.start()
        assert not serves(node)
        words = [record for record in node.records() if "withdrawn by the controller" in json.dumps(record)]
        assert words


def test_the_command_line_refuses_what_is_no_token(tmp_path):
    """Wrong usage is 2, before an agent is asked."""
    done = edgewarden("attest", "enrol", "--token-file", "/dev/null", "--socket", tmp_path / "none", check=False)
    assert (done.returncode, "no join token" in done.stderr) == (EXIT_USAGE, True)
