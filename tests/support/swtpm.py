"""A software TPM for tests: real commands, real keys, and the ways in which a TPM fails."""

import os
import signal
from pathlib import Path
from typing import Self

from tpm2_pytss import ESAPI, ESYS_TR, TPM2_ALG, TPM2_CAP, TPM2_SU, TPM2B_NV_PUBLIC, TPMA_NV, TPMS_NV_PUBLIC

from tools.software_tpm import SoftwareTpm

_NV_PLAIN = (
    TPMA_NV.PPWRITE | TPMA_NV.AUTHREAD | TPMA_NV.OWNERREAD | TPMA_NV.PPREAD | TPMA_NV.NO_DA | TPMA_NV.PLATFORMCREATE
)
_NV_PART_BYTES = 512  # of one NV_Write


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

    def write_nv(
        self, index: int, data: bytes, attributes: TPMA_NV | int = _NV_PLAIN, *, size: int | None = None
    ) -> None:
        """Define an NV index, as a maker does, in place of one that is there; without data it stays unwritten."""
        with ESAPI(self.tcti) as esys:
            _, found = esys.get_capability(TPM2_CAP.HANDLES, index, 1)
            if list(found.data.handles) == [index]:
                esys.nv_undefine_space(esys.tr_from_tpmpublic(index), ESYS_TR.PLATFORM)
            public = TPMS_NV_PUBLIC(
                nvIndex=index,
                nameAlg=TPM2_ALG.SHA256,
                attributes=attributes,
                dataSize=len(data) if size is None else size,
            )
            handle = esys.nv_define_space(b"", TPM2B_NV_PUBLIC(nvPublic=public), ESYS_TR.PLATFORM)
            for at in range(0, len(data), _NV_PART_BYTES):
                esys.nv_write(handle, data[at : at + _NV_PART_BYTES], at, ESYS_TR.PLATFORM)

    def stop(self) -> None:
        """Make it hang: it accepts commands and answers none."""
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        """End the hang; what it was sent meanwhile is executed."""
        self._send(signal.SIGCONT)

    def _send(self, number: signal.Signals) -> None:
        assert self._tpm.process is not None
        os.kill(self._tpm.process.pid, number)
