"""A zygote for tests, and what several of them need around it."""

import datetime as dt

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from agent.isolation.sandbox import Limits, Profile
from agent.isolation.supervisor import ChildSpec

ENTRIES = "tests.support.isolation_entries"
LIMITS = Limits(headroom_bytes=2 << 30, open_files=64)
NOBODY = 65534
POLICY = """
package authz
default allow := false
allow if input.n > 1
"""


def spec(entry: str, profile: Profile = Profile.GATEWAY, **more) -> ChildSpec:
    """Return the spec of an entry of ``tests.support.isolation_entries``."""
    return ChildSpec(profile, f"{ENTRIES}:{entry}", more.pop("limits", LIMITS), **more)


def certificate() -> tuple[bytes, bytes]:
    """Return a self-signed certificate for 127.0.0.1 and its key, both PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    start = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(start)
        .not_valid_after(start + dt.timedelta(days=36500))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return built.public_bytes(pem), secret
