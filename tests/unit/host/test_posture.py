"""Facts of this machine."""

import os
from typing import Any

import psutil
import pytest

from agent.errors import HostError
from agent.host import posture as posture_module
from agent.host.posture import posture
from agent.records import canonical


def facts_of(*arguments, **options) -> dict[str, Any]:
    return posture(*arguments, **options)


def test_the_facts_are_canonical_and_those_of_this_machine(tmp_path):
    """Every value has a canonical form and is what the kernel says; our own process is listed with its memory."""
    facts = facts_of(tmp_path)
    canonical(facts)
    assert facts["kernel"] == os.uname().release
    assert facts["memory_total_bytes"] == psutil.virtual_memory().total
    assert facts["uptime_s"] > 0
    processes = {process["pid"]: process for process in facts["processes"]}
    assert processes[os.getpid()]["pss_bytes"] > 1_000_000


def test_what_can_not_be_read_is_absent(tmp_path):
    """Without firmware variables and lockdown there are no such facts."""
    facts = facts_of(tmp_path, sysfs=tmp_path)
    assert "secure_boot" not in facts
    assert "lockdown" not in facts
    with pytest.raises(HostError):
        facts_of(tmp_path / "missing")


@pytest.mark.parametrize(("value", "expected"), [(b"\x06\0\0\0\x01", True), (b"\x06\0\0\0\0", False), (b"\x01", None)])
def test_secure_boot_is_the_variables_fifth_byte(tmp_path, value, expected):
    """Efivarfs puts four bytes of attributes before the value; anything else is unknown."""
    path = tmp_path / "firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
    path.parent.mkdir(parents=True)
    path.write_bytes(value)
    assert facts_of(tmp_path, sysfs=tmp_path).get("secure_boot") is expected


@pytest.mark.parametrize(("text", "expected"), [("none [integrity] confidentiality\n", "integrity"), ("none\n", None)])
def test_lockdown_is_the_word_in_brackets(tmp_path, text, expected):
    """The kernel marks the mode in force with brackets."""
    path = tmp_path / "kernel/security/lockdown"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert facts_of(tmp_path, sysfs=tmp_path).get("lockdown") == expected


def test_a_process_that_hides_or_ends_has_no_memory_figure(tmp_path, monkeypatch):
    """A sandboxed child that may not be looked into is listed without it; one that ended is not listed."""
    monkeypatch.setattr(posture_module, "_pss_bytes", lambda _: None)
    assert all("pss_bytes" not in process for process in facts_of(tmp_path)["processes"])
    monkeypatch.undo()
    assert posture_module._pss_bytes(2**22 + 1) is None

    def gone(self):
        raise psutil.NoSuchProcess(self.pid)

    monkeypatch.setattr(psutil.Process, "name", gone)
    assert facts_of(tmp_path)["processes"] == []
