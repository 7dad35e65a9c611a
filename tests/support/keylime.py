"""Stock Keylime servers in an environment of their own: a registrar, a verifier and the tenant's commands.

Their wheel has no templates of the configuration, so every setting that they read without a default stands here.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent.parent
BIN = ROOT / ".cache" / "keylime" / "bin"
START_TIMEOUT_S = 60.0
TENANT_TIMEOUT_S = 60.0
_SERVERS = ("verifier", "registrar")

_TLS = {
    "server_key": "default",
    "server_key_password": "",
    "server_cert": "default",
    "trusted_client_ca": "default",
    "client_key": "default",
    "client_key_password": "",
    "client_cert": "default",
    "trusted_server_ca": "default",
}
_RETRIES = {"exponential_backoff": "True", "retry_interval": "0.2", "max_retries": "3", "request_timeout": "10"}
_DATABASE = {"database_url": "sqlite", "database_pool_sz_ovfl": "5,10", "auto_migrate_db": "True"}


class Keylime:
    """``with Keylime(folder, vendor_ca) as keylime: keylime.tenant("-c", "add", …)``.

    Args:
        folder: where the servers keep everything.
        tpm_cert_store: directory with the certificates of the TPM vendor's CAs (PEM).
    """

    def __init__(self, folder: Path, tpm_cert_store: Path) -> None:
        self.folder = folder
        self._store = tpm_cert_store
        self.verifier_port, self.registrar_port, self.registrar_tls_port, self._zmq_port = _free_ports(4)
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def ca(self) -> Path:
        """The CA of the verifier's client certificate: what the node is configured with."""
        return self.folder / "cv_ca" / "cacert.crt"

    @property
    def registrar_url(self) -> str:
        return f"http://127.0.0.1:{self.registrar_port}"

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, settings in self._settings().items():
            (self.folder / f"{name}.conf").write_text(_ini(settings))
        try:
            # The verifier first: it makes the CA that the others take.
            self._start("verifier", self.verifier_port)
            self._start("registrar", self.registrar_port)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the servers and their workers; SIGTERM may not."""
        for process in reversed(self._processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its own session: only what it started itself
            process.wait()
        self._processes.clear()

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def tenant(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run ``keylime_tenant`` against these servers."""
        return subprocess.run(
            [BIN / "keylime_tenant", *arguments],
            capture_output=True,
            text=True,
            env=self._environment(),
            cwd=self.folder,
            timeout=TENANT_TIMEOUT_S,
            check=False,
        )

    def status(self, uuid: str) -> dict[str, Any]:
        """Return what the verifier knows of an agent (``keylime_tenant -c cvstatus``)."""
        answer = self.tenant("-c", "cvstatus", "-u", uuid, "-v", "127.0.0.1", "-vp", str(self.verifier_port))
        for line in answer.stdout.splitlines() + answer.stderr.splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                found: dict[str, Any] = json.loads(line)[uuid]
                return found
        raise AssertionError(f"no status of {uuid}:\n{answer.stdout}\n{answer.stderr}")

    def _environment(self) -> dict[str, str]:
        configs = {
            f"KEYLIME_{name.upper()}_CONFIG": str(self.folder / f"{name}.conf")
            for name in ("verifier", "registrar", "tenant", "ca", "logging")
        }
        return {"PATH": "/usr/bin:/bin", "KEYLIME_DIR": str(self.folder), "HOME": str(self.folder), **configs}

    def _start(self, name: str, port: int) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [BIN / f"keylime_{name}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment(),
                cwd=self.folder,
                start_new_session=True,
            )
        self._processes.append(process)
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
            except OSError:
                time.sleep(0.05)
            else:
                return
        raise RuntimeError(f"keylime_{name} does not serve:\n{self.log(name)[-4000:]}")

    def _settings(self) -> dict[str, dict[str, Mapping[str, str]]]:
        verifier = {
            "version": "2.5",
            "uuid": "default",
            "mode": "pull",
            "ip": "127.0.0.1",
            "port": str(self.verifier_port),
            "registrar_ip": "127.0.0.1",
            "registrar_port": str(self.registrar_tls_port),
            "enable_agent_mtls": "True",
            "tls_dir": "generate",
            "num_workers": "1",
            "quote_interval": "1",
            "max_upload_size": "104857600",
            "verification_timeout": "0",
            "measured_boot_policy_name": "accept-all",
            "measured_boot_imports": "[]",
            "measured_boot_evaluate": "once",
            "severity_labels": '["info", "notice", "warning", "error", "critical", "alert", "emergency"]',
            "severity_policy": '[{"event_id": ".*", "severity_label": "emergency"}]',
            "ignore_tomtou_errors": "False",
            **_TLS,
            **_RETRIES,
            **_DATABASE,
        }
        registrar = {
            "version": "2.5",
            "ip": "127.0.0.1",
            "port": str(self.registrar_port),
            "tls_port": str(self.registrar_tls_port),
            "tls_dir": "default",
            "num_workers": "1",
            "malformed_cert_action": "warn",
            "tpm_identity": "default",
            **_TLS,
            **_DATABASE,
        }
        tenant = {
            "version": "2.5",
            "verifier_ip": "127.0.0.1",
            "verifier_port": str(self.verifier_port),
            "registrar_ip": "127.0.0.1",
            "registrar_port": str(self.registrar_tls_port),
            "tls_dir": "default",
            "enable_agent_mtls": "True",
            "tpm_cert_store": str(self._store),
            "max_payload_size": "1048576",
            "accept_tpm_hash_algs": '["sha512", "sha384", "sha256"]',
            "accept_tpm_encryption_algs": '["ecc", "rsa"]',
            "accept_tpm_signing_algs": '["ecschnorr", "rsassa"]',
            "require_ek_cert": "True",
            "ek_check_script": "",
            "mb_refstate": "",
            **_TLS,
            **_RETRIES,
        }
        ca = {
            "version": "2.5",
            "password": "default",
            "cert_country": "US",
            "cert_ca_name": "Keylime Certificate Authority",
            "cert_state": "MA",
            "cert_locality": "Lexington",
            "cert_organization": "Test",
            "cert_org_unit": "53",
            "cert_ca_lifetime": "3650",
            "cert_lifetime": "365",
            "cert_bits": "2048",
            "cert_crl_dist": "http://127.0.0.1:38080/crl",
        }
        revocations = {
            "enabled_revocation_notifications": "['agent']",
            "zmq_ip": "127.0.0.1",
            "zmq_port": str(self._zmq_port),
        }
        return {
            "verifier": {"verifier": verifier, "revocations": revocations},
            "registrar": {"registrar": registrar},
            "tenant": {"tenant": tenant},
            "ca": {"ca": ca},
            "logging": _LOGGING,
        }


_LOGGING: dict[str, Mapping[str, str]] = {
    "logging": {"version": "2.5"},
    "loggers": {"keys": "root,keylime"},
    "handlers": {"keys": "console"},
    "formatters": {"keys": "formatter"},
    "formatter_formatter": {"format": "%(asctime)s %(name)s %(levelname)s %(message)s", "datefmt": ""},
    "logger_root": {"level": "INFO", "handlers": "console"},
    "handler_console": {
        "class": "StreamHandler",
        "level": "INFO",
        "formatter": "formatter",
        "args": "(sys.stdout,)",
    },
    "logger_keylime": {"level": "INFO", "qualname": "keylime", "handlers": ""},
}


def _ini(sections: Mapping[str, Mapping[str, str]]) -> str:
    lines: list[str] = []
    for section, settings in sections.items():
        lines += [f"[{section}]", *(f"{name} = {value}" for name, value in settings.items()), ""]
    return "\n".join(lines)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [int(sock.getsockname()[1]) for sock in sockets]
