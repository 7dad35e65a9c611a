"""The mode for a stock Keylime, put together.

Rules:

1. The listener's key is made once, and kept in the state directory with its certificate, readable by the agent alone. The certificate is
   self-signed and does not end: the registrar tells the verifier which one it is.
2. PCR 10 belongs to the kernel. Where the kernel's own list is more than its ``boot_aggregate``, the mode does not start.
3. Everything that is measured goes into the log of PCR 10 first, then into the node's own.
"""

from __future__ import annotations

import datetime as dt
import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from agent.attest.keylime import MAX_KERNEL_LIST_BYTES, KernelList, parse_kernel_list
from agent.attest.log import MeasurementLog
from agent.attest.measurement import KERNEL_PCR
from agent.attest.tpm_thread import TpmThread
from agent.certificate import begin_certificate, key_usage
from agent.config import KeylimeSettings, keylime_contact
from agent.daemon.provision import read_pem
from agent.daemon.tls import server_context
from agent.errors import ConfigError, HostError
from agent.flows.keylime import KeylimeFlow, KeylimeHooks
from agent.records import JsonValue

__all__ = ["KeylimeMode", "prepare_keylime", "read_kernel_list"]

LOG_FOLDER = "measurements-keylime"
IDENTITY_FILE = "keylime-listener.pem"
KEY_BITS = 2048
_BEGIN = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
_NO_END = dt.datetime(9999, 12, 31, 23, 59, 59, tzinfo=dt.UTC)  # RFC 5280, section 4.1.2.5
_SECTION = "attest.keylime"


@dataclass(frozen=True, slots=True)
class KeylimeMode:
    """What the mode needs of its surroundings, read before anything is measured.

    Attributes:
        context: TLS of the listener.
        certificate: the listener's own (PEM).
        public_key: its key (PEM).
        kernel: the kernel's own list.
    """

    settings: KeylimeSettings
    context: ssl.SSLContext
    certificate: bytes
    public_key: bytes
    kernel: KernelList

    async def mirror(self, tpm: TpmThread, state: Path) -> MeasurementLog:
        """Open the log of PCR 10.

        Raises:
            VerificationError: PCR 10 holds something that no list tells.
            TpmError, HostError: as :meth:`MeasurementLog.open`.
        """
        return await MeasurementLog.open(tpm, state / LOG_FOLDER, KERNEL_PCR, self.kernel.value, {KERNEL_PCR})

    def flow(
        self,
        tpm: TpmThread,
        mirror: MeasurementLog,
        hooks: KeylimeHooks,
        report: Callable[[dict[str, JsonValue]], None],
    ) -> KeylimeFlow:
        """Put the flow together."""
        return KeylimeFlow(
            uuid=str(self.settings.uuid),
            registrar=str(self.settings.registrar),
            contact=keylime_contact(self.settings),
            certificate=self.certificate,
            public_key=self.public_key,
            tpm=tpm,
            log=mirror,
            kernel=self.kernel,
            boot_time_s=int(psutil.boot_time()),
            hooks=hooks,
            report=report,
        )


def prepare_keylime(keylime: KeylimeSettings, state: Path) -> KeylimeMode | None:
    """Read what the mode needs; None where it is not enabled. The listener's key and certificate are made where there are none.

    Raises:
        ConfigError: the CA's file is of no use, or the key's file is too open.
        HostError: the kernel measures more than the mode can follow, or the state directory does not do its part.
    """
    if not keylime.enabled:
        return None
    kernel = read_kernel_list(Path(keylime.kernel_list))
    client_ca = read_pem(f"{_SECTION}.verifier_ca", str(keylime.verifier_ca))
    path = state / IDENTITY_FILE
    if not path.exists():
        _write_secret(path, _new_identity(str(keylime.uuid)))
    data = read_pem(f"{_SECTION}.listen", str(path), secret=True)
    try:
        certificate = x509.load_pem_x509_certificate(data)
        key = serialization.load_pem_private_key(data, None)
    except (ValueError, TypeError) as error:
        raise HostError(f"{path}: not a key and its certificate; remove the file, and new ones are made") from error
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    return KeylimeMode(
        keylime, server_context(_SECTION, pem, data, client_ca, ca_setting="verifier_ca"), pem, public, kernel
    )


def _new_identity(name: str) -> bytes:
    key = rsa.generate_private_key(65537, KEY_BITS)
    subject = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, name)])
    certificate = (
        begin_certificate(subject, subject, key.public_key(), _BEGIN, _NO_END)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(key_usage("digital_signature", "key_encipherment"), critical=True)
        .add_extension(x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ) + certificate.public_bytes(serialization.Encoding.PEM)


def _write_secret(path: Path, data: bytes) -> None:
    """Write a file as a whole or not at all, readable by its owner alone."""
    fresh = path.with_suffix(".new")
    try:
        fresh.unlink(missing_ok=True)
        with os.fdopen(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fresh.rename(path)
    except OSError as error:
        raise HostError(f"{path}: {error.strerror}") from error


def read_kernel_list(path: Path) -> KernelList:
    """Read the kernel's own list, empty where the kernel has none.

    Raises:
        ConfigError: the file can't be read.
        HostError: it holds more than the mode can follow.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_KERNEL_LIST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return KernelList()
    except OSError as error:
        raise ConfigError(f"{_SECTION}.kernel_list: {path}: {error.strerror}") from error
    return parse_kernel_list(text)
