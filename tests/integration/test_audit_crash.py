"""The audit log against what really happens: a killed process and a full disk."""

import json
import os
import random  # noqa: TID251 -- seeded below
import shutil
import signal
import subprocess
import sys
import time

import pytest

from agent.audit.reader import list_segments, tail, verify_log
from tests.support.audit import head_of

KILLS = 120
SEED = 20_241

pytestmark = pytest.mark.integration


def test_kill_nine_loses_no_acknowledged_record(tmp_path):
    """Killed at any moment, over and over: each acknowledged record is there, under its number, once, and the tree verifies."""
    print("seed", SEED)  # noqa: T201 -- a simulation prints its seed
    chance = random.Random(SEED)  # noqa: S311 -- moments of a kill, nothing secret
    writer = subprocess.Popen(
        [sys.executable, "-m", "tests.support.audit_writer", str(tmp_path / "log")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    assert writer.stdin is not None
    assert writer.stdout is not None
    acknowledged: dict[int, int] = {}
    for _ in range(KILLS):
        writer.stdin.write("\n")
        pid = int(writer.stdout.readline().split()[1])
        time.sleep(chance.uniform(0, 0.025))
        os.kill(pid, signal.SIGKILL)
        while (line := writer.stdout.readline()) != "end\n":
            seq, number = map(int, line.split())
            assert seq not in acknowledged
            acknowledged[seq] = number
    writer.stdin.close()
    assert writer.wait() == 0
    writer.stdout.close()

    report = verify_log(tmp_path / "log")
    torn = [finding for finding in report.findings if finding.check == "torn-end"]
    assert list(report.findings) == torn
    heads = [head_of(record) for record in tail(tmp_path / "log", 10**7)]
    assert [head.seq for head in heads] == list(range(report.size))
    numbers = {head.seq: head.detail["number"] for head in heads if head.kind == "infer"}
    assert len(set(numbers.values())) == len(numbers)
    assert {seq: numbers.get(seq) for seq in acknowledged} == acknowledged
    assert len(acknowledged) > KILLS
    assert len(list_segments(tmp_path / "log")) > 2


def test_a_full_disk_fails_closed_and_recovers(tmp_path):
    """On a real full disk: what was acknowledged is there, the last record says so, appends fail, and freed space ends it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = 'mount -t tmpfs -o size=4m none "$0"'
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, mount, str(disk)], check=False).returncode:
        pytest.skip("no user namespace to mount a small tmpfs in; the RLIMIT_FSIZE test covers the path")
    script = f'{mount} && exec "$1" -m tests.support.audit_full_disk "$0"'
    done = subprocess.run([*unshare, script, str(disk), sys.executable], check=True, stdout=subprocess.PIPE)
    result = json.loads(done.stdout)
    assert result.pop("acknowledged") > 40
    assert result.pop("refused") > 0
    assert result == {
        "all_present": True,
        "full": {"durable": False, "failure": "No space left on device (ENOSPC)", "last": "log.full"},
        "verified_full": True,
        "after": True,
        "kinds": ["log.full", "log.resumed", "infer"],
        "verified": True,
    }
