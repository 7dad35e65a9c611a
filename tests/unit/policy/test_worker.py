"""Template and worker, run in this process so that every branch is seen; the real processes are integration tests."""

import gc
import os
import socket

import msgspec
import pytest

from agent.isolation.channel import Channel, channel_pair
from agent.isolation.child import Child
from agent.isolation.memfd import seal_bytes
from agent.isolation.sandbox import probe
from agent.policy import worker as rules
from agent.policy.build import sign
from agent.policy.bundle import Bundle
from agent.policy.messages import Stamp, pack_question, stamp_memory, unpack_answer
from agent.policy.opa import check_bundle
from agent.policy.worker import Forked, Loaded, Refused, Report, template
from tests.support.models import CertificateMaker
from tests.support.policy import HOSTILE, bundle, document, keypair


def run(data: bytes, *commands: list[int], sealed: bool = True, **args) -> list[Report]:
    """Run the template's entry on commands that wait already, and return what it reports."""
    ours, theirs = channel_pair()
    if sealed:
        fd = seal_bytes("policy", data).fd
    else:
        fd = os.memfd_create("policy")
        os.write(fd, data)
    channel = Channel(ours)
    for fds in commands:
        channel.send(b"fork", fds)
    ours.shutdown(socket.SHUT_WR)
    entered = []

    def enter():
        entered.append(True)
        return probe()

    template(Child(theirs, args, {"bundle": fd}, enter))
    gc.unfreeze()
    assert entered == [True]
    theirs.close()
    os.close(fd)
    reports: list[Report] = []
    while (frames := channel.receive(5)) is not None:
        reports += [msgspec.json.decode(frame.data, type=Report) for frame in frames]
    channel.close()
    return reports


def refusal(data: bytes, **args) -> Refused:
    (report,) = run(data, **args)
    assert isinstance(report, Refused)
    return report


def test_a_good_bundle_is_loaded() -> None:
    """The template names revision and digest once every package was evaluated."""
    (report,) = run(bundle(HOSTILE))
    assert isinstance(report, Loaded)
    assert report.revision == "test"


def test_a_bad_bundle_is_refused_with_the_blame() -> None:
    """Malformed, unsigned, unparsable, and rules that hide an error: each has its word."""
    assert refusal(b"x").kind == "verification"
    assert refusal(bundle(HOSTILE), trusted_keys=[keypair()[1].decode()]).kind == "verification"
    assert refusal(bundle("package edgewarden\nx := y if { y > 1 }")).kind == "policy"
    assert refusal(bundle("package edgewarden\nx := {")).kind == "policy"


def test_a_signed_bundle_is_loaded_where_keys_are_trusted() -> None:
    """The template itself verifies the signature."""
    (report,) = run(sign(bundle(HOSTILE), keypair()[0]), trusted_keys=[keypair()[1].decode()])
    assert isinstance(report, Loaded)


def test_a_bad_trusted_key_is_the_operators() -> None:
    """Configuration is blamed for a key that cannot be read."""
    assert refusal(sign(bundle(HOSTILE), keypair()[0]), trusted_keys=["no key"]).kind == "config"


def test_a_bundle_that_is_not_sealed_is_refused() -> None:
    """Bytes that could still change are not read."""
    assert refusal(bundle(HOSTILE), sealed=False).kind == "isolation"


def test_opa_is_given_no_bundle_that_reaches_out() -> None:
    """With OPA as engine, a bundle that sends requests or defines who may ask is refused before anything is asked."""
    opa = {"port": 1, "token": "t", "certificate": "c"}
    assert "http.send" in refusal(bundle("package edgewarden\nx := http.send({})"), opa=opa).reason
    assert "system/authz" in refusal(bundle(HOSTILE, manifest={"roots": [""]}), opa=opa).reason
    assert "system/authz" in refusal(bundle(HOSTILE, manifest={"roots": ["system/authz/x"]}), opa=opa).reason


def test_opa_is_given_a_harmless_bundle() -> None:
    """What neither reaches out nor says who may ask passes; where no OPA answers, it is refused all the same."""
    check_bundle(Bundle.from_bytes(bundle(HOSTILE)))
    pem = CertificateMaker.root("opa").pem.decode()
    assert "OPA" in refusal(bundle(HOSTILE), opa={"port": 1, "token": "t", "certificate": pem}).reason


def test_a_fork_command_starts_a_worker(monkeypatch) -> None:
    """Each command gives one worker with the two descriptors that came with it; it answers message by message."""

    def inline(work, *, keep, connect_port):
        # A worker owns copies, for the template closes what came with the command.
        assert connect_port is None
        work.func(*work.args[:2], *(os.dup(fd) for fd in keep))
        return 4711

    monkeypatch.setattr(rules, "fork_worker", inline)
    asker, given = channel_pair()
    memory = stamp_memory()
    channel = Channel(asker)
    channel.send_many(
        [pack_question(7, msgspec.json.encode(document(name))) for name in ("infer", "giant output", "x")]
    )
    asker.shutdown(socket.SHUT_WR)
    reports = run(bundle(HOSTILE), [given.fileno(), memory])
    assert reports[1:] == [Forked(4711)]
    frames = channel.receive(5)
    assert frames is not None
    answers = [unpack_answer(frame.data) for frame in frames]
    assert [answer.question for answer in answers] == [7, 7, 7]
    assert answers[0].value is not None
    assert "over" in (answers[1].error or "")
    assert "undefined" in (answers[2].error or "")
    assert Stamp(memory, write=False).running() is None
    channel.close()
    given.close()
    os.close(memory)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_fork_command_with_other_descriptors_is_refused(count) -> None:
    """A worker has exactly a socket and a stamp."""
    reader, writer = os.pipe()
    reports = run(bundle(HOSTILE), [reader] * count)
    assert isinstance(reports[1], Refused)
    assert reports[1].kind == "isolation"
    os.close(reader)
    os.close(writer)
