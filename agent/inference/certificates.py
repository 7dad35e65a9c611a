"""Chains of X.509 certificates that sign models.

Rules:

1. The signing certificate has the code-signing extended key usage and, where it states key usages, digital signature;
   every issuer is a CA that may sign certificates. Path building, signatures, path lengths and name constraints are
   ``cryptography.x509.verification``'s work.
2. Nothing expires into a site visit: a chain holds when every link was in date at the moment when the signing
   certificate became valid. Whether it also is in date *now* is reported beside, for policy to judge; the person who
   installs a package may demand it.
"""

import datetime as dt
from collections.abc import Sequence

from cryptography import x509
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID

from agent import clock
from agent.errors import VerificationError

__all__ = ["MAX_CHAIN", "check_chain"]

MAX_CHAIN = 8  # certificates in a bundle


def _check_basic_constraints(
    _policy: verification.Policy, _certificate: x509.Certificate, extension: x509.BasicConstraints
) -> None:
    if not extension.ca:
        raise ValueError("the issuer is not a CA")


def _check_ca_usage(
    _policy: verification.Policy, _certificate: x509.Certificate, extension: x509.KeyUsage | None
) -> None:
    if extension is not None and not extension.key_cert_sign:
        raise ValueError("the issuer's key may not sign certificates")


def _check_leaf_usage(
    _policy: verification.Policy, _certificate: x509.Certificate, extension: x509.KeyUsage | None
) -> None:
    if extension is not None and not extension.digital_signature:
        raise ValueError("the signing certificate's key may not make signatures")


def _check_code_signing(
    _policy: verification.Policy, _certificate: x509.Certificate, extension: x509.ExtendedKeyUsage
) -> None:
    if ExtendedKeyUsageOID.CODE_SIGNING not in extension:
        raise ValueError("the signing certificate has no code-signing extended key usage")


_EITHER = verification.Criticality.AGNOSTIC
_CA_POLICY = (
    verification.ExtensionPolicy.permit_all()
    .require_present(x509.BasicConstraints, _EITHER, _check_basic_constraints)
    .may_be_present(x509.KeyUsage, _EITHER, _check_ca_usage)
)
_LEAF_POLICY = (
    verification.ExtensionPolicy.permit_all()
    .require_present(x509.ExtendedKeyUsage, _EITHER, _check_code_signing)
    .may_be_present(x509.KeyUsage, _EITHER, _check_leaf_usage)
)


def check_chain(chain: Sequence[x509.Certificate], roots: Sequence[x509.Certificate]) -> bool:
    """Verify that ``chain[0]`` may sign models and leads to a trusted root.

    Args:
        chain: the signing certificate first, then any intermediates.
        roots: trusted certificates.

    Returns:
        Whether the chain is also in date now.

    Raises:
        VerificationError: ``certificate-chain``.
    """
    if not roots:
        raise VerificationError("certificate-chain", "signed with a certificate, but no certificate is trusted")
    _verify(chain, roots, chain[0].not_valid_before_utc)
    try:
        _verify(chain, roots, dt.datetime.fromtimestamp(clock.now(), dt.UTC))
    except VerificationError:
        return False
    return True


def _verify(chain: Sequence[x509.Certificate], roots: Sequence[x509.Certificate], moment: dt.datetime) -> None:
    verifier = (
        verification.PolicyBuilder()
        .store(verification.Store(list(roots)))
        .time(moment)
        .max_chain_depth(MAX_CHAIN)
        .extension_policies(ca_policy=_CA_POLICY, ee_policy=_LEAF_POLICY)
        .build_client_verifier()
    )
    try:
        verifier.verify(chain[0], list(chain[1:]))
    except verification.VerificationError as error:
        raise VerificationError("certificate-chain", " ".join(str(error).split())[:400]) from error
