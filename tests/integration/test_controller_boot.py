"""Boot PCRs: what an approver demands of them, over the API and the command line, and what a node with others is told."""

import asyncio
import contextlib
import json

import click
import pytest
from click.testing import CliRunner

from agent.errors import PolicyError
from controller.cli.reference import command
from tests.support.attest import BOOT_PCRS, digest
from tests.support.controller_service import controller_home, desk
from tests.support.software_node import SoftwareNode, Vendor

pytestmark = pytest.mark.integration
VENDOR = Vendor()
REFERENCES = "/v1/groups/default/references"
NEW = digest("new firmware")


@pytest.fixture
def config(tmp_path):
    return controller_home(tmp_path, VENDOR.pem(), poll={"interval_s": 3600, "timeout_s": 5})


@pytest.fixture
async def office(config):
    async with desk(config) as running:
        await running.approve()
        (config.parent / "admin" / "url").write_text(running.url)
        yield running


@contextlib.asynccontextmanager
async def enrolled(office, name="edge-1", **boot):
    node = SoftwareNode(id=name, vendor=VENDOR)
    if boot:
        node.reboot(**boot)
    runner = await node.serve()
    try:
        await node.enrol(office.anyone, office.url, await office.token())
        yield node
    finally:
        await runner.cleanup()


def _rule(mode, *values):
    return {"mode": mode, "values": [value.hex() for value in values]}


async def _approve(office, **rules):
    boot = {name.removeprefix("pcr"): rule for name, rule in rules.items()}
    return await office.call("POST", REFERENCES, {"boot": boot}, expect=201)


async def _found(office, name="edge-1"):
    result = await office.call("POST", f"/v1/nodes/{name}/poll")
    return result["status"], [check["name"] for check in result["checks"]]


async def _current(office):
    return (await office.call("GET", f"{REFERENCES}/current"))["boot"]


async def test_pinned_pcrs_are_those_of_each_node_s_enrolment(office):
    """Two nodes that booted different things are affirming, each with its own; one that then boots something else is a warning by name."""
    await _approve(office, pcr0=_rule("pinned"), pcr7=_rule("pinned"), pcr11=_rule("pinned"))
    async with enrolled(office) as first, enrolled(office, "edge-2", pcr7=NEW):
        assert await _found(office) == await _found(office, "edge-2") == ("affirming", [])
        first.reboot(pcr7=digest("another"), pcr11=digest("another"))
        result = await office.call("POST", "/v1/nodes/edge-1/poll")
        assert (result["status"], [check["name"] for check in result["checks"]]) == ("warning", ["boot-pcrs"])
        assert "PCRs 7, 11 changed since enrolment" in result["checks"][0]["words"]
        assert await _found(office, "edge-2") == ("affirming", [])
        first.reboot(pcr7=BOOT_PCRS[7], pcr11=BOOT_PCRS[11])
        assert await _found(office) == ("affirming", [])


async def test_a_change_of_a_pinned_pcr_is_approved_for_the_group(office):
    """The approved value stands beside those of the enrolments; it is taken back by itself."""
    await _approve(office, pcr7=_rule("pinned"))
    async with enrolled(office) as node:
        node.reboot(pcr7=NEW)
        assert await _found(office) == ("warning", ["boot-pcrs"])
        await _approve(office, pcr7=_rule("pinned", NEW))
        assert await _found(office) == ("affirming", [])
        node.reboot(pcr7=BOOT_PCRS[7])
        assert await _found(office) == ("affirming", [])
        node.reboot(pcr7=NEW)
        body = {"kind": "boot", "what": f"7={NEW.hex()}", "words": "the firmware has a hole"}
        await office.call("POST", "/v1/groups/default/withdrawals", body, expect=201)
        assert await _found(office) == ("warning", ["boot-pcrs"])


async def test_exact_pcrs_are_what_was_approved_and_nothing_else(office):
    """At enrolment and later: an approved value is affirming, any other contraindicated by name, whatever was pinned."""
    await _approve(office, pcr7=_rule("exact", BOOT_PCRS[7]), pcr0=_rule("pinned"))
    async with enrolled(office) as good, enrolled(office, "edge-2", pcr7=NEW):
        assert await _found(office) == ("affirming", [])
        assert await _found(office, "edge-2") == ("contraindicated", ["boot-pcrs"])
        assert (await office.records("node.result"))[-1]["check"] == "boot-pcrs"
        good.reboot(pcr7=NEW, pcr0=NEW)
        result = await office.call("POST", "/v1/nodes/edge-1/poll")
        assert (result["status"], result["checks"][0]["words"]) == (
            "contraindicated",
            "PCRs 7 are not what was approved",
        )
        await _approve(office, pcr7=_rule("exact", NEW))
        assert await _found(office) == ("warning", ["boot-pcrs"])
        assert await _found(office, "edge-2") == ("affirming", [])
        await office.call(
            "POST", "/v1/groups/default/withdrawals", {"kind": "boot", "what": f"7={NEW.hex()}"}, expect=201
        )
        assert await _found(office, "edge-2") == ("contraindicated", ["boot-pcrs"])


async def test_an_exact_rule_keeps_a_value(office):
    """The last one can't be withdrawn: every node of the group would be contraindicated by an oversight."""
    await _approve(office, pcr7=_rule("exact", NEW))
    body = {"kind": "boot", "what": f"7={NEW.hex()}"}
    refused = await office.call("POST", "/v1/groups/default/withdrawals", body, expect=422)
    assert "no value" in refused["error"]
    assert await _current(office) == {"7": _rule("exact", NEW)}


async def test_a_rule_of_another_kind_takes_the_place_of_the_one_before(office):
    """With its values: what was approved for ``exact`` is no change that was approved for ``pinned``."""
    await _approve(office, pcr7=_rule("exact", NEW))
    await _approve(office, pcr7=_rule("exact", BOOT_PCRS[7]))
    assert set((await _current(office))["7"]["values"]) == {NEW.hex(), BOOT_PCRS[7].hex()}
    await _approve(office, pcr7=_rule("pinned"))
    assert await _current(office) == {"7": _rule("pinned")}
    async with enrolled(office) as node:
        node.reboot(pcr7=NEW)
        assert await _found(office) == ("warning", ["boot-pcrs"])
        await _approve(office, pcr7=_rule("ignored"))
        assert await _found(office) == ("affirming", [])


async def test_a_boot_pcr_that_changed_under_a_running_node_is_named_twice(office):
    """Without a reboot the log's first entry does not fit either."""
    await _approve(office, pcr7=_rule("pinned"))
    async with enrolled(office) as node:
        node.boot[7] = NEW
        assert await _found(office) == ("warning", ["boot-aggregate", "boot-pcrs"])


# --- the command line


def _invoke(*words):
    return CliRunner().invoke(command, [str(word) for word in words], catch_exceptions=False, standalone_mode=False)


async def _cli(config, *words):
    return await asyncio.to_thread(_invoke, *words, "--admin", config.parent / "admin")


async def test_an_operator_approves_boot_pcrs_on_the_command_line(office, config):
    """Rules, values and withdrawals as the API takes them; what is approved is listed."""
    old = BOOT_PCRS[7].hex()
    said = await _cli(config, "approve", "--boot", "0=pinned", "--boot", f"7={old}", "--boot", f"7={NEW.hex()}")
    assert said.output == "default version 2: approved boot PCR 0 pinned, boot PCR 7 exact\n"
    async with enrolled(office, pcr7=NEW) as node:
        assert await _found(office) == ("affirming", [])
        node.reboot(pcr0=NEW)
        assert await _found(office) == ("warning", ["boot-pcrs"])
        await _cli(config, "approve", "--boot", f"0=pinned:{NEW.hex()}", "-m", "update of May")
        assert await _found(office) == ("affirming", [])
        await _cli(config, "withdraw", "boot", f"7={NEW.hex()}", "-m", "it has a hole")
        assert await _found(office) == ("contraindicated", ["boot-pcrs"])
    listed = (await _cli(config, "list")).output
    assert f"boot     0 pinned {NEW.hex()}\nboot     7 exact {old}\n" in listed
    assert "approved boot PCR 0 pinned: update of May" in listed
    versions = json.loads((await _cli(config, "list", "--json")).output)
    assert versions["current"]["boot"] == {"0": _rule("pinned", NEW), "7": _rule("exact", BOOT_PCRS[7])}


@pytest.mark.parametrize(
    "rules",
    [
        ["7"],
        ["7="],
        ["=pinned"],
        ["x=pinned"],
        ["7=exact"],
        ["7=ab"],
        ["7=" + "AB" * 32],
        ["7=ignored:" + "ab" * 32],
        ["7=pinned:"],
    ],
)
async def test_a_rule_that_is_none_is_a_wrong_usage(office, config, rules):
    """And nothing is approved."""
    words = [word for rule in rules for word in ("--boot", rule)]
    with pytest.raises(click.BadParameter, match="PCR=ignored"):
        await _cli(config, "approve", *words)
    assert len(await office.call("GET", REFERENCES)) == 1


@pytest.mark.usefixtures("office")
async def test_one_pcr_has_one_rule(config):
    """Two kinds for the same PCR are a wrong usage; a PCR that can't be a boot PCR is the controller's refusal."""
    with pytest.raises(click.BadParameter, match="PCR 7 can't be pinned and exact"):
        await _cli(config, "approve", "--boot", "7=pinned", "--boot", "7=" + "ab" * 32)
    for index in (10, 14, 16):
        with pytest.raises(PolicyError, match="boot rules are for PCRs"):
            await _cli(config, "approve", "--boot", f"{index}=pinned")
