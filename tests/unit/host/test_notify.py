"""The sd_notify protocol against a real socket."""

import socket

import pytest

from agent.errors import HostError
from agent.host.notify import Notifier


@pytest.mark.parametrize("abstract", [False, True])
def test_each_message_is_what_systemd_reads(tmp_path, abstract):
    """Ready, watchdog, stopping and status arrive as one datagram each, by path and by abstract name."""
    address = f"@edgewarden-{tmp_path.name}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + address[1:] if abstract else address)
        notifier = Notifier(address)
        notifier.ready()
        notifier.watchdog()
        notifier.status("3 models\nMAINPID=1\tready " + "x" * 2000)
        notifier.stopping()
        received = [manager.recv(4096).decode() for _ in range(4)]
    assert received[:2] == ["READY=1", "WATCHDOG=1"]
    assert received[2].startswith("STATUS=3 models MAINPID=1 ready xxx")
    assert len(received[2]) == len("STATUS=") + 512
    assert received[3] == "STOPPING=1"


@pytest.mark.parametrize("address", [None, ""])
def test_without_systemd_nothing_is_sent(address):
    """Outside a unit the same calls do nothing."""
    Notifier(address).ready()


def test_a_manager_that_is_gone_is_a_host_error(tmp_path):
    """An address of another kind, or without a listener, is told in our own words."""
    with pytest.raises(HostError, match="no Unix socket"):
        Notifier("vsock:2:1234")
    with pytest.raises(HostError, match="can't be reached"):
        Notifier(str(tmp_path / "missing")).ready()
