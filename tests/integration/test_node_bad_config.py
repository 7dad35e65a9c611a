"""A node whose configuration, certificates or key sets are wrong: it says what and where, ends with 3, and records it."""

import datetime as dt
import ssl

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.support.chaos import Client, prepare_template, running
from tools.pki import Authority

EXIT_NO, EXIT_ENVIRONMENT = 1, 3
TOKENS = {"inference": {"tokens": {"jwks": "jwks.json", "audience": "edge"}}}

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return prepare_template(tmp_path_factory.mktemp("template"))


def another_key(node):
    Authority.open(node.root / "pki").server("other")
    (node.root / "pki" / "node.key").write_bytes((node.root / "pki" / "other.key").read_bytes())


def encrypted_key(node):
    path = node.root / "pki" / "node.key"
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    protected = serialization.BestAvailableEncryption(b"secret")
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protected)
    path.write_bytes(pem)


def write(path, data=b"junk"):
    return lambda node: (node.root / path).write_bytes(data)


def open_to_all(path):
    return lambda node: (node.root / path).chmod(0o666)


def without(path):
    return lambda node: (node.root / path).unlink()


def setting(section, name, value):
    def change(node):
        document = yaml.safe_load(node.config.read_text())
        document.setdefault(section, {})[name] = value
        node.config.write_text(yaml.safe_dump(document))

    return change


# Each: what is wrong, what the one line must name, whether the agent was far enough to have an audit log.
CASES = {
    "key of another certificate": (another_key, "inference.key: they do not load together: key values mismatch", True),
    "encrypted key": (encrypted_key, "inference.certificate, inference.key", True),
    "junk for a certificate": (write("pki/node.pem"), "inference.certificate", True),
    "junk for the clients' CA": (write("pki/ca.pem"), "inference.client_ca", True),
    "binary for the clients' CA": (write("pki/ca.pem", b"\xff\x00"), "inference.client_ca", True),
    "no key": (without("pki/node.key"), "inference.key", True),
    "a key that all may read": (open_to_all("pki/node.key"), "inference.key", True),
    "junk for a model key": (write("keys/models.pub"), "trusted", True),
    "junk for a policy key": (write("keys/policy.pub"), "policy", True),
    "no policy at all": (without("policy.tar.gz"), "policy.bundle", True),
    "unknown setting": (setting("node", "nonsense", 1), "nonsense", False),
    "wrong type": (setting("audit", "max_bytes", "many"), "audit.max_bytes", False),
    "address in use nowhere": (setting("inference", "listen", "192.0.2.1:0"), "inference.listen", False),
    "PCR of the kernel": (setting("tpm", "pcr", 10), "tpm.pcr", False),
    "nonsense for a TCTI": (setting("tpm", "tcti", "nonsense:x=y"), "nonsense:x=y", True),
    "broken YAML": (write("edgewarden.yaml", b"node: [\n"), "edgewarden.yaml", False),
    "binary": (write("edgewarden.yaml", b"\x00\xff\xfe"), "edgewarden.yaml", False),
    "empty": (write("edgewarden.yaml", b""), "edgewarden.yaml", False),
    "nesting without end": (write("edgewarden.yaml", b"[" * 60_000), "edgewarden.yaml", False),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_named(template, tmp_path, case):
    """One line with the place, an exit status that says whose fault it is, no traceback, no port, and a record where there is a log."""
    change, place, has_log = CASES[case]
    with running(template, tmp_path, start=False) as (node, _):
        change(node)
        status, words = node.fail_to_start()
        assert status in {EXIT_NO, EXIT_ENVIRONMENT}
        assert place in words
        if has_log:
            failure = node.records()[-1]
            assert (failure["kind"], failure["outcome"]) == ("node.fail", "failed")
            assert place in failure["error"]


@pytest.mark.parametrize(
    "jwks", [b"", b"{}", b'{"keys": []}', b"[" * 10_000, b"\xff", b'{"keys": [{"kty": "oct", "k": "eA"}]}']
)
def test_a_key_set_of_no_use_is_named(template, tmp_path, jwks):
    """The agent finds it itself: no gateway dies of it, over and over."""
    with running(template, tmp_path, TOKENS, start=False) as (node, _):
        (node.root / "jwks.json").write_bytes(jwks)
        status, words = node.fail_to_start()
        assert (status, "inference.tokens.jwks" in words) == (EXIT_ENVIRONMENT, True)


def test_an_expired_certificate_does_not_stop_the_node(template, tmp_path):
    """It may be renewed over the network: the node starts, says so in its log and its health; clients decide for themselves."""
    with running(template, tmp_path, start=False) as (node, _):
        expire(node.root / "pki")
        node.start()
        assert [event["setting"] for event in node.events() if event.get("event") == "certificate_expired"] == [
            "inference.certificate"
        ]
        assert node.health()["details"]["inference_certificate_until"].startswith("2021-")
        client = Client(node)
        with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
            client.infer()


def expire(pki):
    """Issue the server's certificate again, for a time that is over."""
    authority = Authority.open(pki)
    old = x509.load_pem_x509_certificate((pki / "node.pem").read_bytes())
    assert isinstance(authority.key, ec.EllipticCurvePrivateKey)
    start = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
    builder = x509.CertificateBuilder().subject_name(old.subject).issuer_name(old.issuer).public_key(old.public_key())
    builder = builder.serial_number(old.serial_number).not_valid_before(start)
    builder = builder.not_valid_after(start + dt.timedelta(days=400))
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    fresh = builder.sign(authority.key, hashes.SHA256())
    (pki / "node.pem").write_bytes(fresh.public_bytes(serialization.Encoding.PEM))
