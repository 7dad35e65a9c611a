"""A software TPM as a process: swtpm with its state below a directory; the same directory is the same TPM.

Rule: it counts as started only when *this* process listens on both of its ports. A port that another process took in between answers, too,
and whoever waited for no more than that was refused later.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from pathlib import Path

import psutil

__all__ = ["SoftwareTpm", "free_port"]

START_TIMEOUT_S = 30.0
_ATTEMPTS = 20


class SoftwareTpm:
    """One TPM.

    Args:
        directory: where its state lies.
        vendor: where the CA of its vendor lies, if it shall have endorsement certificates; made where there is none.
        banks: PCR banks of a TPM with a vendor.
    """

    def __init__(self, directory: Path, *, vendor: Path | None = None, banks: str = "sha1,sha256") -> None:
        self._state = directory.resolve()
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None
        if vendor is not None and not self._state.exists():
            _manufacture(self._state, vendor.resolve(), banks)

    @property
    def tcti(self) -> str:
        """How the TPM software stack reaches it."""
        return f"swtpm:host=127.0.0.1,port={self.port}"

    def start(self) -> None:
        """Power on. The port stays the same from the first start on, unless another process takes it."""
        self._state.mkdir(parents=True, exist_ok=True)
        for _ in range(_ATTEMPTS):
            self.port = self.port or _two_free_ports()
            self.process = subprocess.Popen(
                [
                    *("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={self._state}"),
                    *("--server", f"type=tcp,port={self.port},bindaddr=127.0.0.1"),
                    *("--ctrl", f"type=tcp,port={self.port + 1},bindaddr=127.0.0.1"),
                    *("--flags", "startup-clear,not-need-init"),
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            if self._listens(self.process):
                return
            self.stop()
            self.port = 0
        raise RuntimeError("swtpm does not start")

    def _listens(self, process: subprocess.Popen[bytes]) -> bool:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                found = psutil.Process(process.pid).net_connections("tcp4")
                if {one.laddr.port for one in found if one.status == psutil.CONN_LISTEN} >= {self.port, self.port + 1}:
                    return True
            time.sleep(0.01)
        return False

    def stop(self) -> None:
        """Power off without a shutdown: the clock is unsafe for some time after the next start."""
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None


def _manufacture(state: Path, vendor: Path, banks: str) -> None:
    """Make endorsement keys and their certificates, as a vendor does."""
    state.mkdir(parents=True)
    vendor.mkdir(parents=True, exist_ok=True)
    files = {
        "localca.conf": [
            f"statedir = {vendor}",
            f"signingkey = {vendor / 'signkey.pem'}",
            f"issuercert = {vendor / 'issuercert.pem'}",
            f"certserial = {vendor / 'certserial'}",
        ],
        "localca.options": ["--platform-manufacturer EdgeWarden", "--platform-version 1", "--platform-model software"],
        "setup.conf": [
            "create_certs_tool = /usr/bin/swtpm_localca",
            f"create_certs_tool_config = {vendor / 'localca.conf'}",
            f"create_certs_tool_options = {vendor / 'localca.options'}",
            f"active_pcr_banks = {banks}",
        ],
    }
    for name, lines in files.items():
        (vendor / name).write_text("\n".join([*lines, ""]))
    setup = ["swtpm_setup", "--tpm2", "--tpmstate", str(state), "--create-ek-cert"]
    subprocess.run(
        [*setup, "--pcr-banks", banks, "--config", str(vendor / "setup.conf")], check=True, capture_output=True
    )


def _two_free_ports() -> int:
    """Return a free port whose successor is free too: swtpm's control channel stands there."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            with contextlib.suppress(OSError, OverflowError):
                second.bind(("127.0.0.1", port + 1))
                return port


def free_port() -> int:
    """Return a port of loopback that nobody uses now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
