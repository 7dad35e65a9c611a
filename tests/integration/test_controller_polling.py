"""Polling: what the controller finds, tells and keeps, and what a hostile or absent node can't do."""

import asyncio
import contextlib
import dataclasses

import pytest
from aiohttp import web
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric import ec

from agent.attest.measurement import model_entry, policy_entry, refused_entry, unload_entry
from agent.attest.result import AttestationResult
from agent.attest.structures import ClockInfo
from agent.identity.token import parse_jwks
from controller.cli.node import command
from controller.flows.polling import Poller
from tests.support.attest import MODEL, Attester, digest
from tests.support.controller_service import controller_home, desk, eventually
from tests.support.software_node import SoftwareNode, Vendor

pytestmark = pytest.mark.integration
VENDOR = Vendor()


@pytest.fixture
def config(tmp_path):
    return controller_home(
        tmp_path, VENDOR.pem(), poll={"interval_s": 3600, "timeout_s": 5, "max_evidence_bytes": 65536}
    )


@pytest.fixture
async def office(config):
    async with desk(config) as running:
        await running.approve()
        yield running


@pytest.fixture
async def node(office):
    node = SoftwareNode(vendor=VENDOR)
    async with serving(node):
        await node.enrol(office.anyone, office.url, await office.token())
        yield node


@contextlib.asynccontextmanager
async def serving(node, application=None):
    runner = await node.serve(application)
    try:
        yield
    finally:
        await runner.cleanup()


async def _poll(office, expect=200):
    return await office.call("POST", "/v1/nodes/edge-1/poll", expect=expect)


def _reason(result):
    return result["status"], [check["name"] for check in result["checks"]]


async def test_a_steady_poll_asks_for_nothing_twice_and_tells_the_node(office, node):
    """The log is asked for from where it was verified; the node gets a signed result over the nonce that it quoted."""
    assert _reason(await _poll(office)) == ("affirming", [])
    assert node.asked == [len(node.entries)]
    result = AttestationResult.verify(node.results[-1], parse_jwks(node.grant["jwks"].encode()), "edge-1")
    assert result.status == "affirming"


async def test_a_refused_file_is_a_warning_until_it_is_repaired(office, node):
    """The entry is named; once the same path is handed over with an approved digest the node is affirming again."""
    node.entries.append(refused_entry("m", "1", "model.onnx", digest("other")))
    found = await _poll(office)
    assert _reason(found) == ("warning", ["refused"])
    assert "m/1/model.onnx" in found["checks"][0]["words"]
    node.entries.append(model_entry("m", "1", "model.onnx", MODEL))
    assert _reason(await _poll(office)) == ("affirming", [])
    history = await office.call("GET", "/v1/nodes/edge-1/results")
    assert [row["status"] for row in history] == ["affirming", "warning", "affirming"]


async def test_a_new_approved_version_raises_no_alarm(office, node):
    """Approved first and loaded then: affirming all the way."""
    await office.call(
        "POST",
        "/v1/groups/default/references",
        {"models": {"m/2/model.onnx": digest("two").hex()}},
        expect=201,
    )
    node.entries.append(model_entry("m", "2", "model.onnx", digest("two")))
    assert _reason(await _poll(office)) == ("affirming", [])


async def test_a_withdrawn_version_that_is_loaded_is_contraindicated_until_it_is_gone(office, node):
    """At its next poll, with its digest in the result, so that the node does not load it again; unloaded it is the past."""
    await office.call("POST", "/v1/groups/default/withdrawals", {"kind": "model", "what": "m/1"}, expect=201)
    assert _reason(await _poll(office)) == ("contraindicated", ["models"])
    result = AttestationResult.verify(node.results[-1], parse_jwks(node.grant["jwks"].encode()), "edge-1")
    assert (result.status, result.withdrawn) == ("contraindicated", frozenset({MODEL.hex()}))
    node.entries.append(unload_entry("m", "1"))
    assert _reason(await _poll(office)) == ("affirming", [])
    (record, *_) = [one for one in await office.records("node.result") if one["outcome"] == "refused"]
    assert (record["node"], record["check"]) == ("edge-1", "models")


async def test_a_policy_rollout_passes_with_both_bundles(office, node):
    """The previous policy is fine until it is withdrawn, the assigned one always; a withdrawn one in force is not."""
    new = digest("policy 2")
    await office.call("POST", "/v1/groups/default/references", {"policy": new.hex()}, expect=201)
    assert _reason(await _poll(office)) == ("affirming", [])
    node.entries.append(policy_entry("r2", new))
    node.policy = new.hex()
    assert _reason(await _poll(office)) == ("affirming", [])
    old = (await office.call("GET", "/v1/groups/default/references/current"))["policy"]["previous"]
    await office.call("POST", "/v1/groups/default/withdrawals", {"kind": "policy", "what": old}, expect=201)
    assert _reason(await _poll(office)) == ("affirming", [])


@pytest.mark.usefixtures("node")
async def test_a_withdrawn_configuration_is_contraindicated(office):
    """A configuration that is in force and approved no more."""
    (approved,) = (await office.call("GET", "/v1/groups/default/references/current"))["configs"]
    await office.call("POST", "/v1/groups/default/withdrawals", {"kind": "config", "what": approved}, expect=201)
    assert _reason(await _poll(office)) == ("contraindicated", ["config"])


async def test_a_reboot_is_followed_from_the_log_s_beginning(office, node):
    """A shorter log of a new boot is asked for anew, and so is one that has grown past the old one."""
    node.attester.clock = ClockInfo(2000, 4, 0, safe=True)
    assert _reason(await _poll(office)) == ("affirming", [])
    node.entries.append(refused_entry("m", "1", "model.onnx", digest("other")))
    node.attester.clock = ClockInfo(3000, 5, 0, safe=True)
    assert _reason(await _poll(office)) == ("warning", ["refused"])


async def test_a_cleared_tpm_and_a_clock_that_went_back_are_no_result(office, node):
    """Nothing is known about such a node; the check says why, and what to do."""
    node.attester.clock = ClockInfo(500, 3, 0, safe=True)
    assert _reason(await _poll(office)) == ("none", ["clock"])
    node.attester.clock = ClockInfo(5000, 2, 0, safe=True)
    found = await _poll(office)
    assert _reason(found) == ("none", ["clock"])
    assert "enrol again" in found["checks"][0]["words"]


async def test_an_unsafe_clock_changes_nothing(office, node):
    """It is nobody's fault: the last result stays, and ages."""
    node.attester.clock = ClockInfo(2000, 3, 0, safe=False)
    before = await office.node("edge-1")
    assert _reason(await _poll(office)) == ("none", ["clock"])
    after = await office.node("edge-1")
    assert (after["status"], after["appraised"]) == ("affirming", before["appraised"])


async def test_another_machine_at_the_address_is_no_result(office, node):
    """Evidence that is relayed comes over another key than the one in its claims."""
    node.control = ec.generate_private_key(ec.SECP256R1())
    relayed = node.spki_sha256
    original = node.evidence
    node.evidence = lambda nonce, start=0: original(nonce, start, control_spki_sha256="ab" * 32)
    assert relayed != "ab" * 32
    assert _reason(await _poll(office)) == ("none", ["spki"])


async def test_another_tpm_is_no_result(office, node):
    """Good Evidence by a key that was not enrolled."""
    node.attester = Attester(key=ec.generate_private_key(ec.SECP256R1()))
    assert _reason(await _poll(office)) == ("none", ["signer"])


async def _bomb(_request):
    async def flood():
        for _ in range(1024):
            yield b"x" * (1 << 20)

    return web.Response(body=flood())


async def _garbage(_request):
    return web.Response(body=b"\0" * 100)


async def _refusal(_request):
    return web.Response(status=503)


async def _redirect(_request):
    raise web.HTTPFound("https://127.0.0.1:1/")


@pytest.mark.parametrize(
    ("handler", "words"),
    [(_bomb, "over 65536 bytes"), (_refusal, "answers 503"), (_redirect, "answers 302")],
)
async def test_a_node_that_gives_no_evidence_is_unreachable_and_keeps_its_result(office, handler, words):
    """A bomb of a gigabyte is cut off at the limit; a refusal and a redirection are not followed."""
    node = SoftwareNode(vendor=VENDOR)
    application = web.Application()
    application.add_routes([web.get("/attestation/v1/evidence", handler)])
    async with serving(node, application):
        await node.enrol(office.anyone, office.url, await office.token())
        refused = await _poll(office, expect=502)
    assert words in refused["error"]
    shown = await office.node("edge-1")
    assert (shown["status"], shown["reachable"]) == ("affirming", False)
    assert words in shown["error"]
    assert [record["node"] for record in await office.records("node.unreachable")] == ["edge-1"]


async def test_garbage_is_no_result(office):
    """What is no Evidence is appraised as such."""
    node = SoftwareNode(vendor=VENDOR)
    application = web.Application()
    application.add_routes([web.get("/attestation/v1/evidence", _garbage)])
    async with serving(node, application):
        await node.enrol(office.anyone, office.url, await office.token())
        assert _reason(await _poll(office)) == ("none", ["encoding"])


async def test_nodes_are_polled_without_being_asked_for(config):
    """The schedule does it: the first poll comes within an interval of the enrolment."""
    config.write_text(config.read_text().replace("interval_s: 3600", "interval_s: 1"))
    async with desk(config) as office:
        await office.approve()
        node = SoftwareNode(vendor=VENDOR)
        async with serving(node):
            await node.enrol(office.anyone, office.url, await office.token())

            async def told():
                return len(node.results) >= 2

            await eventually(told)
        silent = await eventually(lambda: _unreachable(office))
        assert silent["status"] == "affirming"


async def _unreachable(office):
    shown = await office.node("edge-1")
    return None if shown["reachable"] else shown


async def test_nothing_that_was_acknowledged_is_lost_by_a_stop(config):
    """What a controller said before it ended is what the next one says."""
    node = SoftwareNode(vendor=VENDOR)
    async with serving(node):
        async with desk(config) as office:
            await office.approve()
            await node.enrol(office.anyone, office.url, await office.token())
            node.entries.append(refused_entry("m", "1", "model.onnx", digest("other")))
            assert _reason(await _poll(office)) == ("warning", ["refused"])
        async with desk(config) as office:
            assert (await office.node("edge-1"))["status"] == "warning"
            node.entries.append(model_entry("m", "1", "model.onnx", MODEL))
            assert _reason(await _poll(office)) == ("affirming", [])
            assert node.asked[-1] == len(node.entries) - 1


async def test_an_appraisal_that_was_overtaken_is_not_kept(office):
    """Two polls cross: the older quote comes later, is refused by name, and the newer result and log stand."""
    node = SoftwareNode(vendor=VENDOR)
    asked, go_on = asyncio.Event(), asyncio.Event()

    @web.middleware
    async def hold(request, handler):
        answer = await handler(request)  # the quote is made, and waits
        if "hold" in waiting and request.method == "GET":
            waiting.clear()
            asked.set()
            await go_on.wait()
        return answer

    waiting: set[str] = set()
    application = node.application()
    application.middlewares.append(hold)
    async with serving(node, application):
        await node.enrol(office.anyone, office.url, await office.token())
        waiting.add("hold")
        older = asyncio.create_task(_poll(office, expect=409))
        await asyncio.wait_for(asked.wait(), 30)
        node.attester.clock = dataclasses.replace(node.attester.clock, clock=node.attester.clock.clock + 1)
        node.entries.append(refused_entry("m", "1", "model.onnx", digest("other")))
        assert _reason(await _poll(office)) == ("warning", ["refused"])
        go_on.set()
        assert (await older)["check"] == "overtaken"
        assert (await office.node("edge-1"))["log_entries"] == len(node.entries)
        node.attester.clock = dataclasses.replace(node.attester.clock, clock=node.attester.clock.clock + 1)
        assert _reason(await _poll(office)) == ("warning", ["refused"])


async def test_a_node_is_polled_in_its_own_interval_or_its_group_s(office, node):
    """A change holds at once, is told to the node, and goes back; each is on record."""

    async def asked_twice_more():
        return len(node.asked) >= before + 2

    async def say(kind, name, seconds):
        await office.call("PUT", f"/v1/{kind}/{name}/interval", {"interval_s": seconds})
        return (await office.node("edge-1"))["interval_s"]

    before = len(node.asked)
    assert await say("nodes", "edge-1", 1) == 1
    await eventually(asked_twice_more)
    result = AttestationResult.verify(node.results[-1], parse_jwks(node.grant["jwks"].encode()), "edge-1")
    assert result.interval_s == 1
    assert await say("groups", "default", 900) == 1
    assert await say("nodes", "edge-1", None) == 900
    before = len(node.asked)
    assert await say("groups", "default", 1) == 1
    await eventually(asked_twice_more)
    records = await office.records("node.interval")
    assert [record["detail"]["interval_s"] for record in records] == [1, 900, None, 1]


@pytest.mark.usefixtures("node")
async def test_the_command_line_sets_intervals(office, config):
    """Of a node, of a group, and back; what is no number is a usage error."""
    (config.parent / "admin" / "url").write_text(office.url)

    async def cli(*arguments):
        options = ["--admin", str(config.parent / "admin")]
        return await asyncio.to_thread(CliRunner().invoke, command, ["interval", *arguments, *options])

    assert "every 30 s" in (await cli("edge-1", "30")).output
    assert "every 600 s" in (await cli("--group", "default", "600")).output
    assert (await office.node("edge-1"))["interval_s"] == 30
    assert "as its group" in (await cli("edge-1", "group")).output
    assert (await office.node("edge-1"))["interval_s"] == 600
    assert (await cli("edge-1", "often")).exit_code == 2
    assert (await cli("--group", "default", "group")).exit_code == 2


async def test_an_error_of_the_program_s_own_ends_the_replica(config, monkeypatch):
    """It is not lost in a task: the process ends, and the service manager starts it again."""

    async def broken(_self, _node):
        raise ZeroDivisionError

    async def one_life():
        node = SoftwareNode(vendor=VENDOR)
        async with desk(config) as office, serving(node):
            await office.approve()
            await node.enrol(office.anyone, office.url, await office.token())
            monkeypatch.setattr(Poller, "poll", broken)
            await office.call("PUT", "/v1/nodes/edge-1/interval", {"interval_s": 1})
            await asyncio.sleep(60)

    with pytest.raises(BaseExceptionGroup) as raised:
        await one_life()
    assert raised.group_contains(ZeroDivisionError)
