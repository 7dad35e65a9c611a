"""A software TPM for tests: real commands, real keys, and the ways in which a TPM fails."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Self

from tpm2_pytss import ESAPI, ESYS_TR, TPM2_SU

START_TIMEOUT_S = 10.0
_ATTEMPTS = 20


def _free_ports() -> int:
    """Find a port that is free together with the next one: swtpm's control channel stands there for the TSS."""
    for _ in range(_ATTEMPTS):
        with socket.socket() as data, socket.socket() as control:
            data.bind(("127.0.0.1", 0))
            port: int = data.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                control.bind(("127.0.0.1", port + 1))
                return port
    raise RuntimeError("no two free ports in a row")


class SwTpm:
    """``with SwTpm(tmp_path) as tpm: ... tpm.tcti``.

    Args:
        folder: where its state lives (absolute); a second SwTpm on the same folder is the same TPM.
        manufactured: run ``swtpm_setup`` first: EK certificates and only these PCR banks.
        banks: PCR banks of a manufactured TPM.
    """

    def __init__(self, folder: Path, *, manufactured: bool = False, banks: str = "sha1,sha256") -> None:
        self._state = folder.resolve() / "swtpm"
        if not self._state.exists():
            self._state.mkdir(parents=True)
            if manufactured:
                setup = ["swtpm_setup", "--tpm2", "--tpmstate", str(self._state), "--create-ek-cert"]
                subprocess.run([*setup, "--pcr-banks", banks], check=True, capture_output=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0

    @property
    def tcti(self) -> str:
        return f"swtpm:host=127.0.0.1,port={self._port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Power on: TPM2_Startup(CLEAR). The port stays the same from the first start on."""
        for _ in range(_ATTEMPTS):
            self._port = self._port or _free_ports()
            self._process = subprocess.Popen(
                [
                    *("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={self._state}"),
                    *("--server", f"type=tcp,port={self._port},bindaddr=127.0.0.1"),
                    *("--ctrl", f"type=tcp,port={self._port + 1},bindaddr=127.0.0.1"),
                    *("--flags", "startup-clear,not-need-init"),
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            if self._listens():
                return
            self.kill()
            self._port = 0  # another process took it
        raise RuntimeError("swtpm does not start")

    def _listens(self) -> bool:
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self._port + 1)).close()
            except OSError:
                time.sleep(0.01)
            else:
                return True
        return False

    def kill(self) -> None:
        """Power off without a shutdown: the clock is unsafe for some time after the next start."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def reboot(self) -> None:
        """Shut the TPM down in order, as a kernel does, and power it on again."""
        with ESAPI(self.tcti) as esys:
            esys.shutdown(TPM2_SU.CLEAR)
        self.kill()
        self.start()

    def power_cycle(self) -> None:
        """Power off and on without a shutdown."""
        self.kill()
        self.start()

    def clear(self) -> None:
        """TPM2_Clear: another owner, other keys, resetCount from zero."""
        with ESAPI(self.tcti) as esys:
            esys.clear(ESYS_TR.LOCKOUT)

    def stop(self) -> None:
        """Make it hang: it accepts commands and answers none."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """End the hang; what it was sent meanwhile is executed."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)
