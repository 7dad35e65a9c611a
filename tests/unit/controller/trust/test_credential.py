"""For which keys a credential is made; that a TPM opens it is held against one in the integration tests."""

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from agent.errors import VerificationError
from controller.trust.credential import make_credential

NAME = b"\x00\x0b" + bytes(32)


@pytest.mark.parametrize(
    "key",
    [
        rsa.generate_private_key(65537, 3072),
        ec.generate_private_key(ec.SECP384R1()),
        ec.generate_private_key(ec.SECP256K1()),
    ],
    ids=["rsa 3072", "p-384", "another curve of 256 bits"],
)
def test_a_key_of_no_default_template_is_refused_by_name(key):
    """The TPM's default templates are RSA 2048 and ECC P-256."""
    with pytest.raises(VerificationError) as refused:
        make_credential(key.public_key(), NAME, bytes(32))
    assert refused.value.check == "ek-key"


def test_a_credential_has_the_sizes_of_its_structures():
    """TPM2B_ID_OBJECT is HMAC and encrypted secret, each with its size; TPM2B_ENCRYPTED_SECRET is a point, or an RSA block."""
    blob, point = make_credential(ec.generate_private_key(ec.SECP256R1()).public_key(), NAME, bytes(32))
    assert (len(blob), blob[:4].hex()) == (2 + 2 + 32 + 2 + 32, "00440020")
    assert (len(point), point[:4].hex(), point[36:38].hex()) == (2 + 2 * 34, "00440020", "0020")
    _, block = make_credential(rsa.generate_private_key(65537, 2048).public_key(), NAME, bytes(32))
    assert (len(block), block[:2].hex()) == (2 + 256, "0100")
