"""TPM2_MakeCredential in software: a secret that one TPM opens, for one of its keys.

Source: TCG "Trusted Platform Module 2.0 Library", Part 1, "Credential Protection" and annexes B.10.3 and C.6.1. Rules:

1. The endorsement key is one of the TCG's default templates for RSA 2048 and ECC P-256 (EK Credential Profile 2.5, L-1 and L-2): name algorithm SHA-256,
   AES-128 in CFB mode. Another key is refused by name.
2. The key that is encrypted to is the certificate's, never one that the node names.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from typing import TypeAlias

from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from cryptography.hazmat.primitives.kdf.kbkdf import KBKDFHMAC, CounterLocation, Mode

from agent.errors import VerificationError

__all__ = ["EkKey", "make_credential"]

EkKey: TypeAlias = "rsa.RSAPublicKey | ec.EllipticCurvePublicKey"

_SEED_BYTES = 32
_AES_BITS = 128
_RSA_BITS = 2048
_P256_BYTES = 32


def make_credential(ek: EkKey, ak_name: bytes, secret: bytes) -> tuple[bytes, bytes]:
    """Encrypt a secret to an endorsement key, bound to an attestation key.

    Args:
        ek: public key of the EK certificate.
        ak_name: TPM name of the attestation key: the TPM opens the credential only where that key is loaded.
        secret: at most 32 bytes.

    Returns:
        TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET.

    Raises:
        VerificationError: ``ek-key``: not a key of the two templates.
    """
    seed, encrypted = _seed(ek)
    cipher = Cipher(algorithms.AES(_kdf_a(seed, b"STORAGE", ak_name, _AES_BITS)), CFB(bytes(16))).encryptor()
    identity = cipher.update(_sized(secret)) + cipher.finalize()
    outer = hmac.digest(_kdf_a(seed, b"INTEGRITY", b"", 256), identity + ak_name, hashlib.sha256)
    return _sized(_sized(outer) + identity), _sized(encrypted)


def _seed(ek: EkKey) -> tuple[bytes, bytes]:
    """Return a fresh seed and what the TPM recovers it from."""
    match ek:
        case rsa.RSAPublicKey() if ek.key_size == _RSA_BITS:
            seed = secrets.token_bytes(_SEED_BYTES)
            oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), label=b"IDENTITY\0")
            return seed, ek.encrypt(seed, oaep)
        case ec.EllipticCurvePublicKey() if isinstance(ek.curve, ec.SECP256R1):
            mine = ec.generate_private_key(ec.SECP256R1())
            point = mine.public_key().public_numbers()
            x = point.x.to_bytes(_P256_BYTES)
            info = b"IDENTITY\0" + x + ek.public_numbers().x.to_bytes(_P256_BYTES)
            seed = ConcatKDFHash(hashes.SHA256(), _SEED_BYTES, info).derive(mine.exchange(ec.ECDH(), ek))
            return seed, _sized(x) + _sized(point.y.to_bytes(_P256_BYTES))
        case _:
            raise VerificationError("ek-key", "the endorsement key is neither RSA 2048 nor ECC P-256")


def _kdf_a(key: bytes, label: bytes, context: bytes, bits: int) -> bytes:
    """KDFa of Part 1, 11.4.10.2: SP 800-108 in counter mode over HMAC-SHA256."""
    return KBKDFHMAC(
        hashes.SHA256(), Mode.CounterMode, bits // 8, 4, 4, CounterLocation.BeforeFixed, label, context, None
    ).derive(key)


def _sized(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data
