"""The shipped units, users and directories, judged by systemd itself."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[2] / "systemd"
MAX_EXPOSURE = 2.0
STARTS = {
    "edgewarden": "ExecStart=/opt/edgewarden/bin/edgewarden run --config /etc/edgewarden/edgewarden.yaml\n",
    "edgewarden-controller": "ExecStart=/opt/edgewarden/bin/edgewarden controller run --config /etc/edgewarden-controller/controller.yaml\n",
}

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"),
]


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", STARTS)
def test_the_unit_has_no_mistake(tmp_path, name):
    """No complaint from systemd about the unit (the program that it starts is replaced by one that is there)."""
    unit = tmp_path / f"{name}.service"
    text = (UNITS / unit.name).read_text()
    assert STARTS[name] in text
    unit.write_text(text.replace("/opt/edgewarden/bin/edgewarden", "/usr/bin/env"))
    result = run("systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(unit))
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


@pytest.mark.parametrize("name", STARTS)
def test_the_units_exposure_stays_low(name):
    """The unit's exposure, as systemd scores it, is at most the bar."""
    result = run("systemd-analyze", "security", "--offline=true", "--no-pager", str(UNITS / f"{name}.service"))
    score = re.search(rf"Overall exposure level for {name}\.service: ([0-9.]+)", result.stdout)
    assert score is not None, result.stdout + result.stderr
    assert float(score[1]) <= MAX_EXPOSURE


def test_the_system_calls_of_the_sandbox_are_allowed():
    """What the agent's children are confined and started with is named in the filter, after the groups that are taken away."""
    lines = [line.partition("=") for line in (UNITS / "edgewarden.service").read_text().splitlines()]
    filters = [value.split() for name, _, value in lines if name == "SystemCallFilter"]
    taken = next(n for n, names in enumerate(filters) if names[0].startswith("~"))
    given = {name for names in filters[taken + 1 :] for name in names}
    assert given >= {
        "landlock_create_ruleset",
        "landlock_add_rule",
        "landlock_restrict_self",
        "seccomp",
        "memfd_create",
        "socketpair",
        "pidfd_open",
        "pidfd_send_signal",
        "prlimit64",
    }


def test_the_controllers_password_is_the_service_managers_to_read():
    """The credential has the name that the settings are told, may be missing, and its file can't be seen from within; nor can an admin's access."""
    unit = (UNITS / "edgewarden-controller.service").read_text().splitlines()
    assert "LoadCredential=database-password:/etc/edgewarden-controller/database.password" in unit
    assert "SetCredential=database-password:\\n" in unit  # no text at all would not be a default for systemd
    hidden = {
        path.lstrip("-")
        for line in unit
        if line.startswith("InaccessiblePaths=")
        for path in line.partition("=")[2].split()
    }
    assert {"/etc/edgewarden-controller/database.password", "/etc/edgewarden-controller/admin", "/root"} <= hidden


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files to the service's user")
def test_the_user_and_its_directories_can_be_made(tmp_path):
    """The user can be made, in the group of the TPM, and so can its directories, private."""
    (tmp_path / "etc").mkdir()
    result = run("systemd-sysusers", f"--root={tmp_path}", str(UNITS / "edgewarden.sysusers"))
    assert result.returncode == 0, result.stderr
    users = {line.split(":")[0]: line.split(":") for line in (tmp_path / "etc/passwd").read_text().splitlines()}
    groups = {line.split(":")[0]: line.split(":") for line in (tmp_path / "etc/group").read_text().splitlines()}
    assert users["edgewarden"][6] == "/usr/sbin/nologin"
    assert groups["tss"][3] == "edgewarden"
    result = run("systemd-tmpfiles", "--create", f"--root={tmp_path}", str(UNITS / "edgewarden.tmpfiles"))
    assert result.returncode == 0, result.stderr
    for name, mode in (("audit", 0o700), ("keys", 0o700), ("models", 0o700), ("", 0o700)):
        stat = (tmp_path / "var/lib/edgewarden" / name).stat()
        assert (stat.st_mode & 0o777, str(stat.st_uid)) == (mode, users["edgewarden"][2])
    assert (tmp_path / "etc/edgewarden").stat().st_mode & 0o777 == 0o750


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files to the service's user")
def test_the_controllers_user_and_its_directories_can_be_made(tmp_path):
    """A user of its own that is in no other group; its state is its own, its settings are root's."""
    (tmp_path / "etc").mkdir()
    result = run("systemd-sysusers", f"--root={tmp_path}", str(UNITS / "edgewarden-controller.sysusers"))
    assert result.returncode == 0, result.stderr
    (user,) = [
        line.split(":") for line in (tmp_path / "etc/passwd").read_text().splitlines() if line.startswith("edgewarden")
    ]
    assert (user[0], user[6]) == ("edgewarden-controller", "/usr/sbin/nologin")
    assert [line.split(":")[3] for line in (tmp_path / "etc/group").read_text().splitlines()] == [""]
    result = run("systemd-tmpfiles", "--create", f"--root={tmp_path}", str(UNITS / "edgewarden-controller.tmpfiles"))
    assert result.returncode == 0, result.stderr
    for name, mode, owner in (("var/lib", 0o700, user[2]), ("etc", 0o750, "0")):
        stat = (tmp_path / name / "edgewarden-controller").stat()
        assert (stat.st_mode & 0o777, str(stat.st_uid), str(stat.st_gid)) == (mode, owner, user[3])
