"""What can be asked of the sandbox without entering it."""

import threading

import pytest

from agent.errors import IsolationError
from agent.isolation import sandbox
from agent.isolation.sandbox import Limits, Profile, SandboxReport, enter, probe, thread_count

LIMITS = Limits(headroom_bytes=1 << 30, open_files=64)


def test_a_probe_changes_nothing_and_names_what_is_missing():
    """Probing twice gives the same answer, whose missing layers are just those that it lacks."""
    report = probe()
    assert report == probe()
    assert ("landlock" in report.missing) is (report.landlock_abi == 0)
    assert ("seccomp" in report.missing) is not report.seccomp
    assert ("mdwe" in report.missing) is not report.mdwe


@pytest.mark.parametrize(
    ("abi", "missing"),
    [
        (0, ("landlock", "landlock-network", "landlock-scopes")),
        (1, ("landlock-network", "landlock-scopes")),
        (4, ("landlock-scopes",)),
        (6, ()),
        (99, ()),
    ],
)
def test_a_report_names_what_an_older_kernel_lacks(abi, missing):
    """Network rules come with ABI 4 and scopes with ABI 6."""
    assert sandbox._report(abi, seccomp=True, mdwe=True) == SandboxReport(abi, True, True, missing)


@pytest.mark.parametrize(("landlock", "seccomp"), [(False, True), (True, False), (False, False)])
def test_a_required_sandbox_does_not_enter_without_a_layer(landlock, seccomp):
    """A missing layer is refused before anything changes in this process."""
    with pytest.raises(IsolationError, match="requires it"):
        enter(Profile.GATEWAY, LIMITS, required=True, landlock=landlock, seccomp=seccomp)
    assert sandbox._entered == []


def test_a_process_with_threads_does_not_enter():
    """With a second thread, which the sandbox would not bind, entering is refused and nothing changes."""
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        assert thread_count() >= 2
        with pytest.raises(IsolationError, match="threads run"):
            enter(Profile.GATEWAY, LIMITS, required=False)
    finally:
        stop.set()
        thread.join()
    assert sandbox._entered == []
