"""Sequences of polls: a node whose log grows, and a Verifier whose Reference Values change meanwhile."""

import msgspec
import pytest

from agent.attest.measurement import config_entry, model_entry, policy_entry, refused_entry, unload_entry
from agent.attest.reference import PolicyReference
from tests.support.attest import CONFIG, MODEL, POLICY, REFERENCE, PolledNode, digest

NEW, BAD = digest("new"), digest("bad")
FILE = "m/1/model.onnx"


def _approved(**changes):
    return msgspec.structs.replace(REFERENCE, **changes)


def _said(found):
    assert found.failed is not None
    return found.status, found.failed.name


@pytest.fixture
def node():
    """A node that was polled once and is affirming."""
    polled = PolledNode()
    assert polled.poll().status == "affirming"
    return polled


def test_a_new_version_of_a_model_raises_no_alarm(node):
    """Approved, loaded, the old one unloaded, then withdrawn: affirming at each poll, also for who asks anew."""
    both = _approved(models=REFERENCE.models | {"m/2/model.onnx": frozenset({NEW.hex()})})
    assert node.poll(reference=both).status == "affirming"
    assert node.poll(model_entry("m", "2", "model.onnx", NEW), reference=both).status == "affirming"
    assert node.poll(unload_entry("m", "1"), reference=both).status == "affirming"
    after = _approved(models={"m/2/model.onnx": frozenset({NEW.hex()})}, withdrawn=REFERENCE.models)
    assert node.poll(reference=after).status == "affirming"
    assert node.poll_anew(reference=after).status == "affirming"


def test_a_withdrawn_model_that_is_still_loaded_shows_at_the_next_poll(node):
    """Contraindicated without any new entry; affirming again as soon as it is unloaded."""
    withdrawn = _approved(models={}, withdrawn=REFERENCE.models)
    found = node.poll(reference=withdrawn)
    assert (*_said(found), found.failed.entries) == (
        "contraindicated",
        "models",
        (f"edgewarden/models/{FILE}",),
    )
    assert node.poll(reference=withdrawn).status == "contraindicated"
    assert node.poll(unload_entry("m", "1"), reference=withdrawn).status == "affirming"


def test_a_model_taken_off_the_list_without_being_withdrawn_stays_an_alarm(node):
    """What is on no list was never approved, whether it is loaded or not."""
    forgotten = _approved(models={})
    assert node.poll(reference=forgotten).status == "contraindicated"
    assert node.poll(unload_entry("m", "1"), reference=forgotten).status == "contraindicated"


def test_a_new_policy_raises_no_alarm(node):
    """Assigned, arrived, the old one retired: affirming at each poll; the node that keeps the retired one is not."""
    rollout = _approved(policy=PolicyReference(NEW.hex(), previous=POLICY.hex()))
    late = PolledNode()
    assert node.poll(reference=rollout).status == late.poll(reference=rollout).status == "affirming"
    assert node.poll(policy_entry("r2", NEW), reference=rollout).status == "affirming"
    done = _approved(policy=PolicyReference(NEW.hex(), retired=frozenset({POLICY.hex()})))
    assert node.poll(reference=done).status == "affirming"
    found = late.poll(reference=done)
    assert _said(found) == ("contraindicated", "policy")
    assert late.poll(policy_entry("r2", NEW), reference=done).status == "affirming"


def test_new_settings_raise_no_alarm(node):
    """Approved beside the old, taken up, the old ones retired: affirming at each poll; retired ones in force are not."""
    both = _approved(configs=frozenset({CONFIG.hex(), NEW.hex()}))
    late = PolledNode()
    assert node.poll(reference=both).status == late.poll(reference=both).status == "affirming"
    assert node.poll(config_entry(NEW), reference=both).status == "affirming"
    done = _approved(configs=frozenset({NEW.hex()}), retired_configs=frozenset({CONFIG.hex()}))
    assert node.poll(reference=done).status == "affirming"
    found = late.poll(reference=done)
    assert _said(found) == ("contraindicated", "config")
    assert late.poll(config_entry(NEW), reference=done).status == "affirming"


@pytest.mark.parametrize(
    ("entry", "check"),
    [
        (model_entry("m", "1", "model.onnx", BAD), "models"),
        (config_entry(BAD), "config"),
        (policy_entry("r9", BAD), "policy"),
    ],
)
def test_what_was_never_approved_stays_an_alarm_until_the_reset(node, entry, check):
    """Put back at once, it still shows at each poll; after a reset the new log is judged alone."""
    back = (config_entry(CONFIG), policy_entry("r1", POLICY), model_entry("m", "1", "model.onnx", MODEL))
    for new in ((entry, *back), (), ()):
        found = node.poll(*new)
        assert _said(found) == ("contraindicated", check)
    node.reset()
    assert node.poll().status == "affirming"


def test_an_alarm_ends_when_an_operator_approves_what_caused_it(node):
    """A digest approved late passes from the next poll on."""
    entry = model_entry("m", "2", "model.onnx", NEW)
    assert node.poll(entry).status == "contraindicated"
    approved = _approved(models=REFERENCE.models | {"m/2/model.onnx": frozenset({NEW.hex()})})
    assert node.poll(reference=approved).status == "affirming"


def test_a_refused_file_warns_until_it_is_repaired(node):
    """A warning at each poll, named, until an approved digest is handed over at the same path."""
    path = ("edgewarden/refused/m/1/model.onnx",)
    for new in ((refused_entry("m", "1", "model.onnx", BAD),), (), (refused_entry("m", "1", "model.onnx", NEW),)):
        found = node.poll(*new)
        assert found.status == "warning"
        assert [check.entries for check in found.checks if check.outcome == "warning"] == [path]
    assert node.poll(model_entry("m", "1", "model.onnx", MODEL)).status == "affirming"


def test_a_repair_with_an_unapproved_digest_is_no_repair(node):
    """What is handed over in the refused one's place must be approved itself."""
    node.poll(refused_entry("m", "1", "model.onnx", BAD))
    assert node.poll(model_entry("m", "1", "model.onnx", NEW)).status == "contraindicated"
