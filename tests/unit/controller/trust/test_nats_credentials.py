"""Credentials files of NATS: what is read, and that nothing of them is told."""

import base64

import nkeys
import pytest

from agent.errors import ConfigError
from controller.trust.nats_credentials import MAX_CREDENTIALS_BYTES, load_credentials

RAW = bytes(range(32))
SEED = nkeys.encode_seed(RAW, nkeys.PREFIX_BYTE_USER).decode()
FRAMED_JWT = "-----BEGIN NATS USER JWT-----\neyJ0.eyJ1.c2ln\n------END NATS USER JWT------\n"


def framed(seed=SEED):
    return f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"


@pytest.mark.parametrize(
    "text", [FRAMED_JWT + framed(), (FRAMED_JWT + "\nKeep it.\n" + framed()).replace("\n", "\r\n")]
)
def test_a_file_of_nsc_is_read(tmp_path, text):
    """Token and key are taken out of their frames; the key signs a nonce so that its public half verifies it."""
    path = tmp_path / "user.creds"
    path.write_bytes(text.encode())
    credentials = load_credentials(str(path))
    assert credentials.jwt == b"eyJ0.eyJ1.c2ln"
    assert nkeys.from_seed(SEED.encode()).verify(b"nonce", base64.b64decode(credentials.sign("nonce")))
    assert SEED not in repr(credentials)


@pytest.mark.parametrize(
    "text",
    [
        "",
        FRAMED_JWT,
        framed(),
        FRAMED_JWT + FRAMED_JWT + framed(),
        FRAMED_JWT + framed() + framed(),
        FRAMED_JWT.replace("END NATS", "END") + framed(),
        FRAMED_JWT + framed("!"),
        FRAMED_JWT + framed("SUABC"),
        FRAMED_JWT + framed(SEED[:-8]),
        FRAMED_JWT + framed(SEED[:-1] + ("A" if SEED[-1] != "A" else "B")),
        FRAMED_JWT + framed(SEED[:20] + ("A" if SEED[20] != "A" else "B") + SEED[21:]),
        FRAMED_JWT + framed(nkeys.encode_seed(RAW, nkeys.PREFIX_BYTE_ACCOUNT).decode()),
        FRAMED_JWT + framed() + " " * MAX_CREDENTIALS_BYTES,
    ],
)
def test_what_is_no_credentials_file_is_refused(tmp_path, text):
    """Missing, doubled, cut, mistyped, of another role or too large: the file is named, and nothing of it is told."""
    path = tmp_path / "user.creds"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_credentials(str(path))
    assert str(refused.value).startswith(f"nats.credentials: {path}: ")
    assert SEED[:16] not in str(refused.value)
    assert refused.value.__cause__ is None
