"""The doctor's checks, on real files and on the values that other machines would give."""

import os
import resource
import stat
from pathlib import Path

import pytest

from agent.errors import TpmError
from agent.host import doctor
from agent.host.doctor import Sandbox, Setup, examine

ZERO, USED = "0" * 64, "0" * 63 + "1"


def level(finding):
    """Whatever is not ok says how to mend it, and what is ok needs no advice."""
    assert bool(finding.fix) == (finding.level != "ok")
    return finding.level


def levels(findings):
    return [(finding.check, level(finding)) for finding in findings]


@pytest.mark.parametrize(
    ("release", "expected"),
    [("6.1.0-18-amd64", "ok"), ("5.13.0", "ok"), ("5.4.0-rc1", "fail"), ("4.19", "fail"), ("strange", "warn")],
)
def test_the_kernel_must_know_landlock(release, expected):
    """Kernels before 5.13 fail; one that can't be read is a warning."""
    assert level(doctor.check_kernel(release)) == expected


@pytest.mark.parametrize(
    ("sandbox", "expected"),
    [
        (None, [("sandbox", "warn")]),
        (Sandbox(4, True, True), [("landlock", "ok"), ("seccomp", "ok"), ("mdwe", "ok")]),
        (Sandbox(0, False, False), [("landlock", "fail"), ("seccomp", "fail"), ("mdwe", "warn")]),
    ],
)
def test_the_sandbox_report_is_read(sandbox, expected):
    """Landlock and seccomp are needed, MDWE is wanted, and a probe that did not run is not taken for a good one."""
    assert levels(doctor.check_sandbox(sandbox)) == expected


def test_the_tpm_device_is_looked_at(tmp_path):
    """No TPM, a simulator, a missing device, a plain file, the raw device: each gets its own word."""
    (tmp_path / "file").write_text("x")
    assert level(doctor.check_tpm_device(None)) == "fail"
    assert level(doctor.check_tpm_device("swtpm:host=127.0.0.1,port=2321")) == "warn"
    assert "does not exist" in doctor.check_tpm_device(f"device:{tmp_path}/none").found
    assert "is no device" in doctor.check_tpm_device(f"device:{tmp_path}/file").found
    assert level(doctor.check_tpm_device("device:/dev/null")) == "ok"


def test_a_tpm_device_without_permission_fails(monkeypatch):
    """A device that this user may not open fails and the advice names the group; the raw device is a warning."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    finding = doctor.check_tpm_device("device:/dev/null")
    assert level(finding) == "fail"
    assert "group tss" in finding.fix
    monkeypatch.undo()
    monkeypatch.setattr(Path, "exists", lambda _: True)
    monkeypatch.setattr(Path, "is_char_device", lambda _: True)
    monkeypatch.setattr(os, "access", lambda *_: True)
    assert level(doctor.check_tpm_device("device:/dev/tpm0")) == "warn"
    assert level(doctor.check_tpm_device("device")) == "ok"


def bank(**used):
    return {index: USED if f"p{index}" in used else ZERO for index in range(24)}


@pytest.mark.parametrize(
    ("banks", "pcr", "expected"),
    [
        ({"sha256": bank()}, 12, [("pcr banks", "ok"), ("measurement pcr", "ok")]),
        ({"sha256": bank(p12=1), "sha1": {}}, 12, [("pcr banks", "warn"), ("measurement pcr", "warn")]),
        ({"sha256": bank()}, 16, [("pcr banks", "ok"), ("measurement pcr", "fail")]),
        ({"sha256": {}}, 12, [("pcr banks", "ok"), ("measurement pcr", "warn")]),
        ({"sha384": bank()}, 12, [("pcr banks", "fail")]),
        ({}, 12, [("pcr banks", "fail")]),
    ],
)
def test_the_pcrs_are_looked_at(banks, pcr, expected):
    """SHA-256 must be allocated, and the measurement PCR must be allowed and should be zero."""
    assert levels(doctor.check_pcrs(lambda: banks, pcr)) == expected


def test_a_pcr_that_is_zero_is_proposed():
    """The advice names only PCRs that are allowed and zero now."""
    used = {f"p{index}": 1 for index in (8, 9, 11, 12, 14)}
    *_, finding = doctor.check_pcrs(lambda: {"sha256": bank(**used)}, 12)
    assert finding.fix.endswith("13, 15")


def test_a_tpm_that_is_silent_fails():
    """A TPM that was not asked is a warning, one that does not answer a failure."""

    def silent():
        raise TpmError("timeout")

    assert levels(doctor.check_pcrs(None, 12)) == [("pcr banks", "warn")]
    assert levels(doctor.check_pcrs(silent, 12)) == [("pcr banks", "fail")]


def test_entropy_and_clock(monkeypatch):
    """A generator without a seed fails; a clock that nobody synchronises is a warning; the real ones can be asked."""
    assert level(doctor.check_entropy()) == "ok"
    assert level(doctor.check_clock()) in {"ok", "warn"}
    assert level(doctor.check_clock(lambda: 0)) == "ok"
    assert level(doctor.check_clock(lambda: 5)) == "warn"
    assert level(doctor.check_clock(lambda: -1)) == "warn"

    def unseeded(*_):
        raise BlockingIOError

    monkeypatch.setattr(os, "getrandom", unseeded)
    assert level(doctor.check_entropy()) == "fail"


def test_the_state_directory_must_be_there_private_and_roomy(tmp_path):
    """Missing, open to others, or on a disk that is too full: each fails with the command that mends it."""
    directory = tmp_path / "state"
    assert levels(doctor.check_directory(directory, 1)) == [("state directory", "fail")]
    directory.mkdir(mode=0o700)
    assert levels(doctor.check_directory(directory, 1)) == [("permissions", "ok"), ("disk", "ok")]
    assert levels(doctor.check_directory(directory, 2**60)) == [("permissions", "ok"), ("disk", "fail")]
    directory.chmod(0o750)
    assert levels(doctor.check_directory(directory, 1))[0] == ("permissions", "fail")


def test_keys_must_be_private(tmp_path):
    """A key that others may read fails, in the open or in an open directory; in a private one nobody can reach it."""
    key = tmp_path / "keys" / "tls.key"
    key.parent.mkdir(mode=0o755)
    key.write_text("key")
    key.chmod(0o640)
    assert [finding.fix for finding in doctor.check_private(key)] == [f"chmod go= {key}"]
    [both] = doctor.check_private(key.parent)
    assert both.found.endswith("(mode 0755), and 1 below it")
    assert both.fix == f"chmod -R go= {key.parent}"
    key.parent.chmod(stat.S_IRWXU)
    assert levels(doctor.check_private(key.parent)) == [("permissions", "ok")]
    key.chmod(0o600)
    assert levels(doctor.check_private(key)) == [("permissions", "ok")]
    assert levels(doctor.check_private(tmp_path / "none")) == [("permissions", "fail")]


@pytest.mark.parametrize(("limit", "expected"), [(1024, "warn"), (4096, "ok"), (resource.RLIM_INFINITY, "ok")])
def test_open_files(limit, expected):
    """A hard limit below what the gateways need is a warning."""
    assert level(doctor.check_open_files(limit)) == expected


def test_opa_is_looked_for_where_it_is_wanted(tmp_path):
    """The embedded engine needs no binary; the other one a binary that tells its version."""
    assert list(doctor.check_engine("embedded", "nowhere")) == []
    assert levels(doctor.check_engine("opa", str(tmp_path / "nowhere"))) == [("opa", "fail")]
    binary = tmp_path / "opa"
    for script, expected in (("echo Version: 1.22.2", "ok"), ("echo hello", "fail"), ("exit 1", "fail")):
        binary.write_text(f"#!/bin/sh\n{script}\n")
        binary.chmod(0o755)
        assert levels(doctor.check_engine("opa", str(binary))) == [("opa", expected)]


@pytest.mark.parametrize(
    ("text", "expected"), [("systemd 252 (252.39)\n+PAM", "ok"), ("systemd 245 (245.4)", "warn"), ("", "warn")]
)
def test_systemd(text, expected):
    """A version that lacks what the unit uses, or none at all, is a warning."""
    assert level(doctor.check_systemd(text)) == expected


def test_root_is_told_that_its_view_is_not_the_services():
    """Root sees everything as permitted."""
    assert level(doctor.check_user(0)) == "warn"
    assert level(doctor.check_user(1000)) == "ok"


def test_a_program_that_can_not_be_run_prints_nothing(tmp_path, monkeypatch):
    """A missing program and one that hangs are the same to the doctor."""
    assert doctor._output(str(tmp_path / "none")) == ""
    monkeypatch.setattr(doctor, "COMMAND_TIMEOUT_S", 0.05)
    assert doctor._output("sleep", "5") == ""


def test_the_whole_examination_runs_on_this_host(tmp_path):
    """Every check gives a finding, and the private files that were named are among them."""
    (tmp_path / "key").touch(mode=0o600)
    findings = examine(Setup(state_directory=tmp_path, private_files=(tmp_path / "key",), engine="opa", opa="/none"))
    checks = [check for check, _ in levels(findings)]
    for check in (
        "kernel",
        "sandbox",
        "tpm device",
        "pcr banks",
        "entropy",
        "clock",
        "disk",
        "open files",
        "opa",
        "user",
        "systemd",
    ):
        assert check in checks
    assert any(str(tmp_path / "key") in finding.found for finding in findings)
