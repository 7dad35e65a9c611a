"""``edgewarden attest``: fetch a node's Evidence and appraise it, from anywhere, without a controller.

The appraisal needs no TPM and no TPM library: what it trusts is the attestation key that was enrolled and the operator's
Reference Values. An answer that does not hold is exit code 1.
"""

from __future__ import annotations

import hashlib
import http
import http.client
import json
import secrets
import socket
import ssl
from pathlib import Path
from urllib.parse import urlsplit

import click
import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from agent.attest.appraisal import Appraisal, Check, Expectation, appraise
from agent.attest.evidence import MAX_EVIDENCE_BYTES, NONCE_BYTES
from agent.attest.log_state import LogState
from agent.attest.reference import ReferenceValues
from agent.attest.structures import MAX_PUBLIC_BYTES, parse_ak_public
from agent.cli import enrol, reference
from agent.cli.plugins import PluginGroup
from agent.errors import ConfigError, HostError, VerificationError

__all__ = ["command"]

FETCH_TIMEOUT_S = 60.0
MAX_AK_ANSWER_BYTES = 4096
MAX_ERROR_BYTES = 4096
_PATH = "/attestation/v1"
_EXISTING = click.Path(exists=True, dir_okay=False, path_type=Path)
_NEW = click.Path(dir_okay=False, path_type=Path)


def _hex(value: str) -> bytes:
    """Read hex of 32 bytes; click turns a ValueError into a usage error that names the option."""
    data = bytes.fromhex(value)
    if len(data) != NONCE_BYTES:
        raise ValueError
    return data


@click.group(cls=PluginGroup, plugins="edgewarden.commands.attest")
def command() -> None:
    """Enrol a node; fetch and appraise its Evidence."""


command.add_command(reference.command)
command.add_command(reference.keylime_policy)
for _verb in (enrol.enrol, enrol.status, enrol.leave):
    command.add_command(_verb)


@command.command()
@click.option("--evidence", "evidence_file", type=_EXISTING, required=True, help="Evidence as JSON.")
@click.option(
    "--nonce", type=_hex, metavar="HEX", required=True, help="The nonce that the Evidence was asked for with."
)
@click.option("--ak", "ak_file", type=_EXISTING, required=True, help="The enrolled attestation key (TPMT_PUBLIC).")
@click.option("--reference", "reference_file", type=_EXISTING, required=True, help="Reference Values as JSON.")
@click.option("--control-spki", type=_hex, metavar="HEX", help="SHA-256 of the key that the control listener showed.")
@click.option(
    "--inference-spki", type=_hex, metavar="HEX", multiple=True, help="The same of the inference listener; repeatable."
)
@click.option("--json", "as_json", is_flag=True, help="Print the appraisal as JSON.")
def verify(
    *,
    evidence_file: Path,
    nonce: bytes,
    ak_file: Path,
    reference_file: Path,
    control_spki: bytes | None,
    inference_spki: tuple[bytes, ...],
    as_json: bool,
) -> None:
    """Appraise Evidence against Reference Values; print each check and the state that the log replays to."""
    expect = Expectation(
        nonce=nonce,
        ak_public=_read(ak_file, MAX_PUBLIC_BYTES),
        reference=ReferenceValues.decode(_read(reference_file, None)),
        control_spki_sha256=control_spki.hex() if control_spki else None,
        inference_spki_sha256=frozenset(key.hex() for key in inference_spki) or None,
    )
    appraisal = appraise(_read(evidence_file, MAX_EVIDENCE_BYTES), expect)
    click.echo(_as_json(appraisal) if as_json else _as_text(appraisal))
    appraisal.require()


def _read(path: Path, limit: int | None) -> bytes:
    """Read a file, and one byte more than the limit at most, so that who parses it sees that it is too large."""
    try:
        with path.open("rb") as file:
            return file.read(-1 if limit is None else limit + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def _as_json(appraisal: Appraisal) -> str:
    plain = msgspec.to_builtins(
        {
            "status": appraisal.status,
            "retry": appraisal.retry,
            "checks": appraisal.checks,
            "claims": appraisal.claims,
            "verified": appraisal.verified,
        },
        order="deterministic",
    )
    return json.dumps(plain, indent=2)


def _as_text(appraisal: Appraisal) -> str:
    lines = [_line(check) for check in appraisal.checks]
    if appraisal.verified is not None:
        state = appraisal.verified.state or LogState()
        lines += [
            "",
            f"entries   {appraisal.verified.index}",
            f"config    {state.config or '-'}",
            f"policy    {state.policy or '-'} {state.policy_revision or ''}".rstrip(),
            *(f"model     {digest} {path}" for path, digest in sorted(state.models.items())),
            *(f"refused   {digest} {path}" for path, digest in sorted(state.refused.items())),
        ]
    return "\n".join([*lines, "", f"status    {appraisal.status}"])


def _line(check: Check) -> str:
    outcome = check.outcome.upper() if check.outcome == "failed" else check.outcome
    return f"{check.name:<17} {outcome:<8} {check.words}".rstrip()


@command.command()
@click.option("--url", help="The node's control listener: https://host:port.")
@click.option("--socket", "socket_path", type=click.Path(path_type=Path), help="Or the node's Unix socket.")
@click.option("--cert", type=_EXISTING, help="Client certificate chain (PEM), with --url.")
@click.option("--key", type=_EXISTING, help="Its private key (PEM), with --url.")
@click.option("--ca", type=_EXISTING, help="Who issued the node's certificate (PEM), with --url.")
@click.option("--nonce", type=_hex, metavar="HEX", help="Default: random; printed to standard error.")
@click.option("--from", "start", type=click.IntRange(min=0), default=0, help="First log entry to send.")
@click.option("--out", type=_NEW, help="Where to write the Evidence; default: standard output.")
@click.option(
    "--ak-out", type=_NEW, help="Also fetch the attestation key and write it here; trust it only after enrolment."
)
def evidence(
    *,
    url: str | None,
    socket_path: Path | None,
    cert: Path | None,
    key: Path | None,
    ca: Path | None,
    nonce: bytes | None,
    start: int,
    out: Path | None,
    ak_out: Path | None,
) -> None:
    """Ask a node for Evidence over a fresh nonce."""
    if (url is None) == (socket_path is None):
        raise click.UsageError("give either --url or --socket")
    if url is None:
        assert socket_path is not None  # noqa: S101 -- the line above
        connection: http.client.HTTPConnection = _UnixConnection(socket_path)
    else:
        connection = _https(url, cert, key, ca)
    nonce = nonce or secrets.token_bytes(NONCE_BYTES)
    try:
        connection.connect()
        click.echo(f"nonce         {nonce.hex()}", err=True)
        if isinstance(connection.sock, ssl.SSLSocket):
            click.echo(f"control SPKI  {_peer_spki(connection.sock)}", err=True)
        answer = _get(connection, f"{_PATH}/evidence?nonce={nonce.hex()}&from={start}", MAX_EVIDENCE_BYTES)
        ak = _get(connection, f"{_PATH}/ak", MAX_AK_ANSWER_BYTES) if ak_out else b""
    except (OSError, http.client.HTTPException) as error:
        raise HostError(f"{url or socket_path}: {str(error) or type(error).__name__}") from error
    finally:
        connection.close()
    if ak_out:
        ak_out.write_bytes(_ak_public(ak))
    if out:
        out.write_bytes(answer)
    else:
        click.echo(answer)


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=FETCH_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _https(url: str, cert: Path | None, key: Path | None, ca: Path | None) -> http.client.HTTPSConnection:
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname:
        raise click.UsageError("--url must be https://host[:port]")
    if cert is None or key is None or ca is None:
        raise click.UsageError("--url needs --cert, --key and --ca")
    try:
        context = ssl.create_default_context(cafile=ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(cert, key)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--cert, --key or --ca: {error}") from error
    return http.client.HTTPSConnection(parts.hostname, parts.port or 443, timeout=FETCH_TIMEOUT_S, context=context)


def _peer_spki(sock: ssl.SSLSocket) -> str:
    der = sock.getpeercert(binary_form=True)
    if der is None:
        raise HostError("the node showed no certificate")
    key = x509.load_der_x509_certificate(der).public_key()
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _get(connection: http.client.HTTPConnection, path: str, limit: int) -> bytes:
    connection.request("GET", path)
    response = connection.getresponse()
    body = response.read(limit + 1)
    if response.status != http.HTTPStatus.OK:
        raise HostError(f"the node answered {response.status}: {body[:MAX_ERROR_BYTES].decode(errors='replace')}")
    if len(body) > limit:
        raise HostError(f"the node's answer is over {limit} bytes")
    return body


class _AkAnswer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    ak_public: bytes


def _ak_public(body: bytes) -> bytes:
    try:
        public = msgspec.json.decode(body, type=_AkAnswer).ak_public
    except ValueError as error:
        raise VerificationError("ak-template", f"the node sent no attestation key: {error}") from error
    return parse_ak_public(public).marshaled
