"""A real NATS server with JetStream on a private loopback port: plain, with TLS, and with an operator who signs accounts and users."""

import base64
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nkeys
import pytest

from agent import clock

__all__ = ["NatsOperator", "NatsServer", "require_nats"]

START_TIMEOUT_S = 20
_NO_LIMIT = -1


def require_nats() -> None:
    """Skip the test where there is no nats-server; in CI it fails."""
    if shutil.which("nats-server") is None:
        if os.environ.get("CI"):  # noqa: TID251 -- as for PostgreSQL
            pytest.fail("there is no nats-server: in CI the tests against it must run (Debian's package nats-server)")
        pytest.skip("there is no nats-server; Debian's package nats-server has it")


class NatsServer:
    """Can be stopped and started again; it keeps its port and its streams.

    Args:
        directory: for its streams and its log.
        tls: files of certificate and key; with them it takes encrypted connections alone.
        operator: whose users it lets in; everybody without one.
    """

    def __init__(
        self, directory: Path, tls: tuple[Path, Path] | None = None, operator: "NatsOperator | None" = None
    ) -> None:
        self._directory = directory
        self._tls = tls
        self._operator = operator
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]

    @property
    def url(self) -> str:
        return f"{'tls' if self._tls else 'nats'}://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it and wait until it takes connections."""
        config = self._directory / "nats.conf"
        config.write_text(self._config())
        with (self._directory / "nats.log").open("ab") as log:
            self._process = subprocess.Popen(
                ["nats-server", "-c", config], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        end = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                self.stop()
                raise AssertionError(f"nats-server did not start: {(self._directory / 'nats.log').read_text()[-2000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Kill it, as a crash would."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _config(self) -> str:
        # JSON is a part of the configuration's language.
        document: dict[str, Any] = {
            "listen": f"127.0.0.1:{self.port}",
            "jetstream": {"store_dir": str(self._directory / "jetstream")},
        }
        if self._tls:
            certificate, key = map(str, self._tls)
            document["tls"] = {"cert_file": certificate, "key_file": key}
        if self._operator:
            document |= self._operator.settings()
        return json.dumps(document, indent=2)

    def _answers(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


class NatsOperator:
    """Signs one account with JetStream, and its users, as ``nsc`` would."""

    def __init__(self) -> None:
        self._operator = _new_key(nkeys.PREFIX_BYTE_OPERATOR)
        self._account = _new_key(nkeys.PREFIX_BYTE_ACCOUNT)
        self._system = _new_key(nkeys.PREFIX_BYTE_ACCOUNT)

    def settings(self) -> dict[str, Any]:
        accounts = {
            _public(key): _sign(self._operator, _public(key), name, _account(has_streams=key is self._account))
            for name, key in (("EVENTS", self._account), ("SYS", self._system))
        }
        return {
            "operator": _sign(self._operator, _public(self._operator), "test", {"type": "operator", "version": 2}),
            "system_account": _public(self._system),
            "resolver": "MEMORY",
            "resolver_preload": accounts,
        }

    def write_credentials(
        self, path: Path, *, publish: Sequence[str] = (), subscribe: Sequence[str] = (), expires_s: int | None = None
    ) -> Path:
        """Make a user and write its credentials file.

        Args:
            path: the file.
            publish: subjects that it may publish to; all without any.
            subscribe: subjects that it may subscribe to; all without any.
            expires_s: when it ends, in seconds from now.
        """
        user = _new_key(nkeys.PREFIX_BYTE_USER)
        limits = {"subs": _NO_LIMIT, "data": _NO_LIMIT, "payload": _NO_LIMIT}
        allowed = {name: {"allow": list(to)} if to else {} for name, to in (("pub", publish), ("sub", subscribe))}
        claims = {**allowed, **limits, "type": "user", "version": 2}
        token = _sign(self._account, _public(user), "controller", claims, expires_s=expires_s)
        path.write_text(
            f"-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n"
            "************************* IMPORTANT *************************\nkeep it secret\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{user.seed.decode()}\n------END USER NKEY SEED------\n"
        )
        return path


def _new_key(prefix: int) -> Any:
    return nkeys.from_seed(nkeys.encode_seed(secrets.token_bytes(32), prefix))


def _public(key: Any) -> str:
    return str(key.public_key.decode())


def _account(*, has_streams: bool) -> dict[str, Any]:
    names = ("subs", "data", "payload", "imports", "exports", "conn", "leaf")
    storage = ("mem_storage", "disk_storage", "streams", "consumer")
    limits = dict.fromkeys(names + (storage if has_streams else ()), _NO_LIMIT)
    return {
        "limits": {**limits, "wildcards": True},
        "default_permissions": {"pub": {}, "sub": {}},
        "type": "account",
        "version": 2,
    }


def _sign(issuer: Any, subject: str, name: str, claims: dict[str, Any], *, expires_s: int | None = None) -> str:
    now = int(clock.now())
    body: dict[str, Any] = {"iat": now, "iss": _public(issuer), "name": name, "sub": subject, "nats": claims}
    if expires_s is not None:
        body["exp"] = now + expires_s
    body["jti"] = base64.b32encode(hashlib.sha256(json.dumps(body).encode()).digest()).decode().rstrip("=")
    parts = ({"typ": "JWT", "alg": "ed25519-nkey"}, body)
    text = ".".join(_base64(json.dumps(part).encode()) for part in parts)
    return f"{text}.{_base64(issuer.sign(text.encode()))}"


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
