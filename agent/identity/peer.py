"""A client certificate becomes a Principal.

The TLS library has verified the chain before a certificate comes here; this module reads who it names. Rules:

1. The certificate is DER of at most :data:`MAX_CERTIFICATE_BYTES`.
2. It is inside its validity period, at every use: a connection may outlive the certificate that opened it.
3. It is an end-entity certificate: not a CA, and its key usage, where stated, allows signatures and signs no certificates.
4. Its extended key usage names clientAuth; an absent extension or anyExtendedKeyUsage does not.
5. With a SPIFFE URI it is an X.509-SVID: that URI is the only URI, valid by the SPIFFE ID specification, and the id.
   Without one, the subject's only common name is the id.
6. The subject's organizational units are the roles. One that is no role name refuses the certificate: a typing error
   in a role must be seen when the certificate is first used, not as a strange denial later.

Sources: RFC 5280; the SPIFFE standards "SPIFFE-ID" (section 2) and "X509-SVID" (sections 2, 4 and 5).
"""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from cryptography import x509
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agent import clock
from agent.errors import PeerError
from agent.records import Principal

__all__ = [
    "MAX_CACHED_CERTIFICATES",
    "MAX_CERTIFICATE_BYTES",
    "MAX_ROLES",
    "PeerIdentity",
    "PeerVerifier",
    "read_certificate",
]

MAX_CERTIFICATE_BYTES = 16 * 1024
MAX_CACHED_CERTIFICATES = 1024
MAX_ROLES = 16
MAX_SPIFFE_ID_BYTES = 2048  # SPIFFE-ID, section 2.3

_T = TypeVar("_T", bound=x509.ExtensionType)
_ROLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_COMMON_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._@:+-]{0,127}")
# Dot segments are excluded by the look-ahead; a leaf has a path (X509-SVID, section 2).
_SPIFFE_ID = re.compile(r"spiffe://[a-z0-9._-]{1,255}(?:/(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._-]+)+")

# What cryptography raises while it parses a hostile certificate, at loading and lazily at first access.
_PARSE_ERRORS = (
    ValueError,
    TypeError,
    CryptographyDeprecationWarning,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """A certificate's principal and validity period, in seconds since the epoch."""

    principal: Principal
    not_before: float
    not_after: float


class PeerVerifier:
    """Turns certificates into principals and remembers the last ones.

    Args:
        wall_clock: seconds since the Unix epoch.
        capacity: how many certificates are remembered.
    """

    def __init__(self, *, wall_clock: Callable[[], float] = clock.now, capacity: int = MAX_CACHED_CERTIFICATES) -> None:
        self._clock = wall_clock
        self._capacity = capacity
        self._known: OrderedDict[bytes, PeerIdentity] = OrderedDict()

    def principal(self, der: bytes) -> Principal:
        """Return whom a verified certificate names (``ssl.SSLObject.getpeercert(True)``).

        Raises:
            PeerError: 401, with the rule that the certificate breaks.
        """
        if len(der) > MAX_CERTIFICATE_BYTES:  # 1, before anything is computed over it
            raise _refuse("certificate_too_large", f"the certificate has more than {MAX_CERTIFICATE_BYTES} bytes")
        identity = self._known.get(der)
        if identity is None:
            identity = read_certificate(der)
            self._known[der] = identity
            if len(self._known) > self._capacity:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(der)
        now = self._clock()
        if now < identity.not_before:  # 2
            raise _refuse("certificate_not_yet_valid", "the client certificate is not valid yet")
        if now > identity.not_after:
            raise _refuse("certificate_expired", "the client certificate has expired")
        return identity.principal


def read_certificate(der: bytes) -> PeerIdentity:
    """Read whom a certificate names; every rule of the module but its period, which depends on the time of use.

    Raises:
        PeerError: 401.
    """
    # 1. Size and encoding.
    if len(der) > MAX_CERTIFICATE_BYTES:
        raise _refuse("certificate_too_large", f"the certificate has more than {MAX_CERTIFICATE_BYTES} bytes")
    try:
        with warnings.catch_warnings():
            # What the library still parses and RFC 5280 forbids, for example a serial number of zero.
            warnings.simplefilter("error", CryptographyDeprecationWarning)
            certificate = x509.load_der_x509_certificate(der)
            extensions = certificate.extensions
            subject = certificate.subject
            not_before = certificate.not_valid_before_utc.timestamp()
            not_after = certificate.not_valid_after_utc.timestamp()
    except _PARSE_ERRORS as error:
        raise _refuse("certificate_malformed", "the client certificate cannot be parsed") from error
    _check_end_entity(extensions)  # 3
    _check_client_auth(extensions)  # 4
    spiffe_id = _spiffe_id(extensions)  # 5
    roles = _roles(subject)  # 6
    if spiffe_id is not None:
        principal = Principal(id=spiffe_id, kind="spiffe", roles=roles)
    else:
        principal = Principal(id=_common_name(subject), kind="mtls", roles=roles)
    return PeerIdentity(principal, not_before, not_after)


def _check_end_entity(extensions: x509.Extensions) -> None:
    constraints = _find(extensions, x509.BasicConstraints)
    if constraints is not None and constraints.ca:
        raise _refuse("certificate_is_ca", "a CA certificate is no client certificate")
    usage = _find(extensions, x509.KeyUsage)
    if usage is not None and usage.key_cert_sign:
        raise _refuse("certificate_is_ca", "a certificate that may sign certificates is no client certificate")
    if usage is not None and not usage.digital_signature:
        raise _refuse("certificate_usage", "the certificate's key usage does not allow digital signatures")


def _check_client_auth(extensions: x509.Extensions) -> None:
    usages = _find(extensions, x509.ExtendedKeyUsage)
    if usages is None or ExtendedKeyUsageOID.CLIENT_AUTH not in usages:
        raise _refuse("certificate_usage", "the certificate's extended key usage does not name clientAuth")


def _spiffe_id(extensions: x509.Extensions) -> str | None:
    names = _find(extensions, x509.SubjectAlternativeName)
    uris = [] if names is None else names.get_values_for_type(x509.UniformResourceIdentifier)
    if not any(uri.lower().startswith("spiffe:") for uri in uris):
        return None
    if len(uris) != 1:
        raise _refuse("certificate_spiffe_id", "a certificate with a SPIFFE ID must have no other URI")
    (uri,) = uris
    if len(uri) > MAX_SPIFFE_ID_BYTES or _SPIFFE_ID.fullmatch(uri) is None:
        raise _refuse("certificate_spiffe_id", "the certificate's SPIFFE ID is not valid")
    return uri


def _common_name(subject: x509.Name) -> str:
    names = [attribute.value for attribute in subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if len(names) != 1:
        raise _refuse("certificate_subject", f"the certificate's subject has {len(names)} common names, not one")
    (name,) = names
    if not isinstance(name, str) or _COMMON_NAME.fullmatch(name) is None:
        raise _refuse("certificate_subject", "the certificate's common name holds characters that an id may not have")
    return name


def _roles(subject: x509.Name) -> tuple[str, ...]:
    units = [attribute.value for attribute in subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)]
    if len(units) > MAX_ROLES:
        raise _refuse("certificate_roles", f"the certificate names more than {MAX_ROLES} organizational units")
    roles = [unit for unit in units if isinstance(unit, str) and _ROLE.fullmatch(unit)]
    if len(roles) != len(units):
        raise _refuse("certificate_roles", "an organizational unit of the certificate is no role name")
    return tuple(sorted(set(roles)))


def _find(extensions: x509.Extensions, kind: type[_T]) -> _T | None:
    try:
        return extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _refuse(reason: str, message: str) -> PeerError:
    return PeerError(401, reason, message)
