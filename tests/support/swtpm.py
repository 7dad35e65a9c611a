"""A software TPM for tests: real commands, real keys, and the ways in which a TPM fails."""

import os
import signal
from pathlib import Path
from typing import Self

from tpm2_pytss import ESAPI, ESYS_TR, TPM2_SU

from tools.software_tpm import SoftwareTpm


class SwTpm:
    """``with SwTpm(tmp_path) as tpm: ... tpm.tcti``.

    Args:
        folder: where its state lives; a second SwTpm on the same folder is the same TPM.
        manufactured: with EK certificates, by the vendor whose CA lies in ``folder / "vendor"``, and only these PCR banks.
        banks: PCR banks of a manufactured TPM.
    """

    def __init__(self, folder: Path, *, manufactured: bool = False, banks: str = "sha1,sha256") -> None:
        self.vendor = folder / "vendor"
        self._tpm = SoftwareTpm(folder / "swtpm", vendor=self.vendor if manufactured else None, banks=banks)

    @property
    def tcti(self) -> str:
        return self._tpm.tcti

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Power on: TPM2_Startup(CLEAR)."""
        self._tpm.start()

    def kill(self) -> None:
        """Power off without a shutdown."""
        self._tpm.stop()

    def reboot(self) -> None:
        """Shut the TPM down in order, as a kernel does, and power it on again."""
        with ESAPI(self.tcti) as esys:
            esys.shutdown(TPM2_SU.CLEAR)
        self.power_cycle()

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
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        """End the hang; what it was sent meanwhile is executed."""
        self._send(signal.SIGCONT)

    def _send(self, number: signal.Signals) -> None:
        assert self._tpm.process is not None
        os.kill(self._tpm.process.pid, number)
