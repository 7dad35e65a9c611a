"""A node whose state directory is on a disk that is full: nothing is acknowledged that is not kept, and space heals it."""

import contextlib
import os
import subprocess
import time
from collections import Counter

import pytest

from agent.audit.journal import Journal
from agent.daemon.provision import audit_space
from tests.support.audit import event
from tests.support.chaos import Client, prepare_template, running, wait_until
from tests.support.models import write_tiny

DISK_BYTES = 24 << 20
AUDIT_BYTES = 16 << 20
ENOUGH_REQUESTS = 4000

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        os.geteuid() != 0, reason="a small disk must be mounted; the audit log's own test needs no root"
    ),
]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return prepare_template(tmp_path_factory.mktemp("template"))


@contextlib.contextmanager
def small_disk(directory):
    directory.mkdir(parents=True)
    size = f"size={DISK_BYTES},mode=0700"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "none", str(directory)], check=False, capture_output=True
    )
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


@contextlib.contextmanager
def node_on_small_disk(template, tmp_path, *, start=True):
    """Give a node whose state is on a disk of its own; the log is kept by the disk until the end."""
    overrides: dict[str, dict[str, object]] = {
        "node": {"id": "edge-0001", "state_dir": "disk/state", "runtime_dir": "run"},
        "audit": {"max_bytes": AUDIT_BYTES},
    }
    with (
        small_disk(tmp_path / "disk"),
        running(template, tmp_path, overrides, start=False) as (node, _),
    ):
        (node.root / "disk").symlink_to(tmp_path / "disk")
        (node.root / "state").symlink_to(tmp_path / "disk" / "state")
        if start:
            node.start()
        yield node


def fill(node, leave=0):
    """Take all the space that is left but ``leave`` bytes."""
    filler = node.root / "disk" / "filler"
    with filler.open("ab") as file:
        seen = os.statvfs(filler)
        with contextlib.suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, seen.f_bavail * seen.f_frsize - leave)
    return filler


def nearly_full_segment(node):
    """Write a log whose newest segment has room for some hundred records more."""
    space = audit_space(AUDIT_BYTES)
    journal = Journal.open(node.root / "disk" / "state" / "audit", "edge-0001", space, strict=True)
    for number in range((space.segment_bytes - 300_000) // 51_000):
        assert journal.commit([event(number, pad=50_000)])
    journal.close()


def test_requests_are_refused_until_there_is_space_again(template, tmp_path):
    """503 with Retry-After, health says why, what was answered is on record; the freed space ends it without a restart."""
    with node_on_small_disk(template, tmp_path, start=False) as node:
        (node.root / "disk" / "state").mkdir(mode=0o700)
        nearly_full_segment(node)
        node.start()
        filler = fill(node)
        client = Client(node)
        answered = []
        refused = None
        for _ in range(ENOUGH_REQUESTS):
            reply = client.infer()
            if reply.status == 503:
                refused = reply
                break
            if reply.status == 429:
                time.sleep(0.01)
            else:
                assert reply.status == 200, reply
                answered.append(reply.decision_id)
        assert refused is not None
        assert "audit log" in refused.error
        assert int(refused.headers["Retry-After"]) > 0
        assert not node.fact("log_durable")
        assert "No space left" in node.health()["log_durable"]["why"]
        assert node.fact("live")
        assert node.alive()
        assert node.local("GET", "/admin/v1/status")[0] == 503  # an operator's call is recorded too, or does not happen
        filler.unlink()
        wait_until("durable again", lambda: node.fact("log_durable"))
        reply = wait_until("answered again", lambda: (got := client.infer()).status == 200 and got)
        client.close()
        answered.append(reply.decision_id)
        assert node.stop() == 0
        records = node.records()
        kinds = [record["kind"] for record in records]
        assert "log.full" in kinds
        assert "log.resumed" in kinds
        recorded = Counter(record.get("decision_id") for record in records if record["kind"] == "infer")
        assert [decision for decision in answered if recorded[decision] != 1] == []
        assert len(answered) > 10


@pytest.mark.slow
def test_what_cannot_be_measured_is_not_loaded(template, tmp_path):
    """With no room for the measurement log a package stays out, with the reason, and comes in by itself once there is room."""
    with node_on_small_disk(template, tmp_path) as node:
        log = next((node.root / "state" / "measurements").glob("boot-*.ima"))
        filler = fill(node)
        number = 0
        # The last page of the log has room for a few entries yet.
        while node.local("POST", "/admin/v1/models/rescan")[0] == 200:
            number += 1
            assert number < 60
            name = f"new{number}"
            package = write_tiny(node.root / "packages" / name / "1", name=name, seed=number)
            node.sign_and_install(package)
        status, answer = node.local("POST", "/admin/v1/models/rescan")
        assert status == 503
        assert log.name in answer["error"]
        assert "the disk is full" in answer["error"] or "No space left" in answer["error"]
        client = Client(node)
        assert client.infer(f"new{number}").status == 404
        assert client.infer().status == 200
        filler.unlink()
        wait_until("loaded by itself", lambda: client.infer(f"new{number}").status == 200)
        client.close()
        names = ["tiny", *(f"new{n}" for n in range(1, number + 1))]
        packages = [node.root / "packages" / name / "1" for name in names]
        assert node.appraise(packages)["status"] == "affirming"


def test_a_policy_that_cannot_be_kept_is_not_put_in_force(template, tmp_path):
    """503 with the file; the old one stays in force, in the log of measurements too, and over a restart."""
    with node_on_small_disk(template, tmp_path) as node:
        before = (node.root / "policy.tar.gz").read_bytes()
        after = node.build_policy(revision="r2").read_bytes()
        (node.root / "policy.tar.gz").write_bytes(before)
        filler = fill(node)
        status, answer = node.local("PUT", "/admin/v1/policy", after)
        assert (status, "policy.tar.gz.new" in answer["error"]) == (503, True), answer
        assert node.local("GET", "/admin/v1/policy")[1]["revision"] == "r1"
        assert node.appraise([node.root / "packages" / "tiny" / "1"])["status"] == "affirming"
        filler.unlink()
        assert node.stop() == 0
        node.start()
        assert node.local("GET", "/admin/v1/policy")[1]["revision"] == "r1"
        assert node.local("PUT", "/admin/v1/policy", after)[0] == 200
        assert node.stop() == 0
        failed = [record["outcome"] for record in node.records() if record["kind"] == "policy.activate"]
        assert failed == ["ok", "failed", "ok", "ok"]


def test_a_disk_that_is_full_at_the_start_refuses_and_says_so(template, tmp_path):
    """The agent ends with 3 and names what it could not write."""
    with node_on_small_disk(template, tmp_path, start=False) as node:
        (node.root / "disk" / "state").mkdir(mode=0o700)
        fill(node)
        status, words = node.fail_to_start()
        assert status == 3
        assert "No space left on device" in words
