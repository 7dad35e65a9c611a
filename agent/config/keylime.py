"""The settings of the mode for a stock Keylime.

Rules: where it is enabled, everything that a registration needs must be there, and the address that the registrar is told must be one that
another machine can connect to. What is wrong is a ConfigError that names the setting.
"""

import ipaddress
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from agent.config.marks import security, split_listen
from agent.errors import ConfigError

__all__ = ["KeylimeSettings", "check_keylime", "keylime_contact"]


class KeylimeSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Attestation by a stock Keylime, besides EdgeWarden's own Evidence."""

    enabled: Annotated[
        bool,
        security(
            "Measure into PCR 10 too, and let Keylime's registrar, verifier and tenant enrol and attest the node."
        ),
    ] = False
    uuid: Annotated[
        Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] | None, Meta(description="The node's name in Keylime.")
    ] = None
    listen: Annotated[str, Meta(description="ADDRESS:PORT of the listener for Keylime's verifier and tenant.")] = (
        "127.0.0.1:9002"
    )
    contact: Annotated[
        str | None,
        Meta(description="IPv4 ADDRESS:PORT where they find it, told to the registrar; default: as `listen`."),
    ] = None
    registrar: Annotated[
        Annotated[str, Meta(pattern=r"^http://([A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:]{2,39}\]):[0-9]{1,5}$")] | None,
        Meta(description="URL of Keylime's registrar: http://HOST:PORT."),
    ] = None
    verifier_ca: Annotated[
        str | None,
        Meta(description="PEM file of the CA that signs the verifier's and tenant's certificates (cv_ca/cacert.crt)."),
    ] = None
    kernel_list: Annotated[
        str,
        Meta(
            description="The kernel's own IMA list, which stands before the node's; another file only with a TPM that is not the kernel's."
        ),
    ] = "/sys/kernel/security/ima/ascii_runtime_measurements"


def check_keylime(path: Path, keylime: KeylimeSettings) -> None:
    """Check what the mode needs; ``path`` is the configuration's, for the error.

    Raises:
        ConfigError: something is missing, or is no such thing.
    """
    for name, value in (
        ("uuid", keylime.uuid),
        ("registrar", keylime.registrar),
        ("verifier_ca", keylime.verifier_ca),
    ):
        if value is None:
            raise ConfigError(f"{path}: attest.keylime.{name}: is needed where attest.keylime.enabled is true")
    try:
        keylime_contact(keylime)
    except ValueError as error:
        raise ConfigError(
            f"{path}: attest.keylime.contact: {keylime.contact or keylime.listen!r} is no IPv4 ADDRESS:PORT where a verifier can "
            f"find the node ({error})"
        ) from error


def keylime_contact(keylime: KeylimeSettings) -> tuple[str, int]:
    """Return address and port that the registrar is told.

    Raises:
        ValueError: they are none that another machine could connect to.
    """
    host, port = split_listen(keylime.contact or keylime.listen)
    address = ipaddress.ip_address(host)
    if address.version != 4 or address.is_unspecified:  # noqa: PLR2004 -- Keylime's registrar keeps 15 characters
        raise ValueError("not an IPv4 address of a machine")
    if port == 0:
        raise ValueError("port 0")
    return host, port
