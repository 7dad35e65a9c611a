"""``edgewarden attest``, run as an operator runs it."""

import base64
import contextlib
import datetime as dt
import hashlib
import http.server
import ipaddress
import json
import socketserver
import ssl
import subprocess
import sys
import threading
from typing import ClassVar

import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

from agent.attest.measurement import refused_entry
from agent.cli import attest as attest_cli
from agent.cli.main import EXIT_NO, _edgewarden, main
from agent.errors import ConfigError, HostError, VerificationError
from tests.support.attest import (
    CONTROL_SPKI,
    ENTRIES,
    INFERENCE_SPKI,
    MODEL,
    NONCE,
    REFERENCE,
    Attester,
)

HONEST = Attester()
EVIDENCE = HONEST.evidence().encode()


def _run(*args):
    return CliRunner().invoke(_edgewarden, ["attest", *map(str, args)])


@pytest.fixture
def files(tmp_path):
    """The arguments of a verification that holds."""
    (tmp_path / "evidence").write_bytes(EVIDENCE)
    (tmp_path / "ak").write_bytes(HONEST.ak_public)
    (tmp_path / "reference").write_bytes(REFERENCE.encode())
    named = {name: tmp_path / name for name in ("evidence", "ak", "reference")}
    return {"evidence": named["evidence"], "nonce": NONCE.hex(), "ak": named["ak"], "reference": named["reference"]}


def _options(files):
    return [word for name, value in files.items() for word in (f"--{name}", value)]


def test_evidence_that_holds_is_exit_0(files):
    """Each check is printed by its name, then the replayed state."""
    result = _run(
        "verify",
        *_options(files),
        "--control-spki",
        CONTROL_SPKI,
        "--inference-spki",
        "dd" * 32,
        "--inference-spki",
        INFERENCE_SPKI,
    )  # fmt: skip -- pairs
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines()]
    assert ["pcr-digest", "ok"] in lines
    assert ["spki", "ok"] in lines
    assert ["model", MODEL.hex(), "m/1/model.onnx"] in lines
    assert lines[-1] == ["status", "affirming"]


def test_evidence_that_is_forged_names_its_check(files):
    """The failed check is shown in capitals and is the error."""
    result = _run("verify", *_options(files | {"nonce": "00" * 32}))
    assert isinstance(result.exception, VerificationError)
    assert result.exception.check == "extra-data"
    assert "extra-data        FAILED" in result.output
    assert "model " not in result.output


def test_the_exit_code_is_1(files, monkeypatch, capsys):
    """The process of a verification that does not hold ends with 1 and says why on standard error."""
    monkeypatch.setattr(
        "sys.argv", ["edgewarden", "attest", "verify", *map(str, _options(files | {"nonce": "00" * 32}))]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == EXIT_NO
    assert "extra-data" in capsys.readouterr().err


def test_a_warning_is_shown_and_holds(files):
    """A refused file is listed; a warning is not an error."""
    files["evidence"].write_bytes(HONEST.evidence((*ENTRIES, refused_entry("m", "2", "f", MODEL))).encode())
    result = _run("verify", *_options(files))
    assert result.exit_code == 0
    assert f"refused   {MODEL.hex()} m/2/f" in result.output


def test_the_appraisal_can_be_read_by_programs(files):
    """With --json everything is in one document."""
    document = json.loads(_run("verify", *_options(files), "--json").output)
    assert document["status"] == "affirming"
    assert document["checks"][0] == {"name": "encoding", "outcome": "ok", "words": "", "entries": []}
    assert document["verified"]["state"]["models"] == {"m/1/model.onnx": MODEL.hex()}


@pytest.mark.parametrize("nonce", ["00", "zz" * 32, ""])
def test_a_bad_nonce_is_wrong_usage(files, nonce):
    """A nonce that is not 32 bytes of hex is exit code 2."""
    assert _run("verify", *_options(files | {"nonce": nonce})).exit_code == 2


def test_bad_reference_values_are_the_operator_s_fault(files):
    """They are a ConfigError, not a verdict on the node."""
    files["reference"].write_text("{}")
    assert isinstance(_run("verify", *_options(files)).exception, ConfigError)


def test_a_file_that_cannot_be_read_is_a_config_error(tmp_path):
    """The error names the file."""
    with pytest.raises(ConfigError, match="missing"):
        attest_cli._read(tmp_path / "missing", 1)


class _Handler(http.server.BaseHTTPRequestHandler):
    """A node that answers what the test gave it."""

    protocol_version = "HTTP/1.1"
    answers: ClassVar[dict[str, tuple[int, bytes]]]
    asked: ClassVar[list[str]]

    def do_GET(self):
        path, _, query = self.path.partition("?")
        self.asked.append(query)
        status, body = self.answers[path]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args):
        """Keep quiet."""


class _UnixServer(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True

    def get_request(self):
        connection, _ = super().get_request()
        return connection, ("local", 0)


AK_ANSWER = json.dumps({"ak_public": base64.b64encode(HONEST.ak_public).decode()}).encode()


@contextlib.contextmanager
def _serving(server, **answers):
    _Handler.asked = []
    _Handler.answers = {"/attestation/v1/evidence": (200, EVIDENCE), "/attestation/v1/ak": (200, AK_ANSWER)} | {
        f"/attestation/v1/{name}": answer for name, answer in answers.items()
    }
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield _Handler.asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_evidence_comes_over_a_unix_socket(tmp_path):
    """The nonce and the index are asked for; Evidence and key are written as the node sent them."""
    path = tmp_path / "s"
    out, ak = tmp_path / "out", tmp_path / "ak"
    with _serving(_UnixServer(str(path), _Handler)) as asked:
        result = _run(
            "evidence", "--socket", path, "--nonce", NONCE.hex(), "--from", 3, "--out", out, "--ak-out", ak
        )  # fmt: skip -- pairs
    assert result.exit_code == 0, result.output
    assert asked[0] == f"nonce={NONCE.hex()}&from=3"
    assert (out.read_bytes(), ak.read_bytes()) == (EVIDENCE, HONEST.ak_public)


def test_a_random_nonce_is_shown(tmp_path):
    """Without --nonce a fresh one is taken each time, told on standard error; Evidence goes to standard output."""
    path = tmp_path / "s"
    with _serving(_UnixServer(str(path), _Handler)) as asked:
        results = [_run("evidence", "--socket", path) for _ in range(2)]
    nonces = [result.stderr.split()[1] for result in results]
    assert [f"nonce={nonce}&from=0" for nonce in nonces] == asked
    assert nonces[0] != nonces[1]
    assert results[0].stdout_bytes.rstrip(b"\n") == EVIDENCE


@pytest.mark.parametrize(
    ("answers", "error", "words"),
    [
        ({"evidence": (503, b'{"error":"the TPM does not answer"}')}, HostError, "503.*TPM does not answer"),
        ({"evidence": (200, bytes(200))}, HostError, "over 100 bytes"),
        ({"ak": (200, b"{}")}, VerificationError, "no attestation key"),
        ({"ak": (200, b'{"ak_public":"AAAA"}')}, VerificationError, "ak-template"),
    ],
)
def test_a_bad_answer_is_refused(tmp_path, monkeypatch, answers, error, words):
    """An error, an answer over the limit or a key that is none is an error, and nothing is written."""
    monkeypatch.setattr(attest_cli, "MAX_EVIDENCE_BYTES", 100 if "over" in words else len(EVIDENCE))
    path, ak = tmp_path / "s", tmp_path / "ak"
    with _serving(_UnixServer(str(path), _Handler), **answers):
        result = _run("evidence", "--socket", path, "--ak-out", ak, "--out", tmp_path / "out")
    assert isinstance(result.exception, error)
    assert result.exception is not None
    with pytest.raises(error, match=words):
        raise result.exception
    assert not ak.exists()
    assert not (tmp_path / "out").exists()


def test_a_node_that_is_not_there_is_a_host_error(tmp_path):
    """The error names what was called."""
    result = _run("evidence", "--socket", tmp_path / "none")
    assert isinstance(result.exception, HostError)
    assert "none" in str(result.exception)


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--url", "https://n", "--socket", "s"],
        ["--url", "http://n"],
        ["--url", "https://n"],
        ["--url", "https://"],
    ],
)
def test_a_half_given_address_is_wrong_usage(args):
    """One address, https, and all that mutual TLS needs."""
    assert _run("evidence", *args).exit_code == 2


def _certificate(folder, name, issuer=None):
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer_key, issuer_name = issuer or (key, subject)
    start = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer_name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + dt.timedelta(days=36500))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
    )
    (folder / f"{name}.crt").write_bytes(builder.sign(issuer_key, hashes.SHA256()).public_bytes(Encoding.PEM))
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / f"{name}.key").write_bytes(private)
    return key, subject


def test_evidence_comes_over_mutual_tls(tmp_path):
    """The node's key is shown for --control-spki; another CA, or no client certificate that the node takes, is an error."""
    authority = _certificate(tmp_path, "ca")
    node_key, _ = _certificate(tmp_path, "node", authority)
    _certificate(tmp_path, "client", authority)
    _certificate(tmp_path, "stranger")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=tmp_path / "ca.crt")
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(tmp_path / "node.crt", tmp_path / "node.key")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    url = f"https://127.0.0.1:{server.server_address[1]}"

    def fetch(client, ca):
        names = (
            "--cert",
            tmp_path / f"{client}.crt",
            "--key",
            tmp_path / f"{client}.key",
            "--ca",
            tmp_path / f"{ca}.crt",
        )
        return _run("evidence", "--url", url, *names)

    with _serving(server):
        good = fetch("client", "ca")
        bad = [fetch("client", "stranger"), fetch("stranger", "ca")]
    assert good.exit_code == 0, good.output
    spki = node_key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert hashlib.sha256(spki).hexdigest() in good.stderr
    assert all(isinstance(result.exception, HostError) for result in bad)


def test_a_bad_client_key_is_a_config_error(tmp_path):
    """What is no certificate or no key is the operator's fault."""
    (tmp_path / "x").write_text("x")
    options = [word for name in ("--cert", "--key", "--ca") for word in (name, tmp_path / "x")]
    assert isinstance(_run("evidence", "--url", "https://127.0.0.1:1", *options).exception, ConfigError)


def test_an_appraisal_needs_no_tpm_library():
    """The command loads where tpm2_pytss can't be imported: a Verifier has no TPM."""
    code = "import sys; sys.modules['tpm2_pytss'] = None; import agent.cli.attest"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
