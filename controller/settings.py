"""The settings of a controller: one YAML file, parsed once into frozen values.

Rules:

1. An unknown key, a wrong type or a value out of range is a :class:`agent.errors.ConfigError` that names the setting.
2. Relative paths are relative to the file that holds them.
3. Secrets stand in files, never in the settings; the database's password in a file that ``database.password_file`` names.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from agent import strict_yaml
from agent.errors import ConfigError

__all__ = [
    "DEFAULT_CONFIG",
    "DatabaseSettings",
    "EnrolmentSettings",
    "MetricsSettings",
    "NatsSettings",
    "OidcSettings",
    "PollSettings",
    "Settings",
    "database_url",
    "json_schema",
    "load",
    "split_listen",
]

DEFAULT_CONFIG = Path("/etc/edgewarden-controller/controller.yaml")
MAX_PORT = 65_535
_SQLITE = "sqlite+aiosqlite"
_POSTGRESQL = "postgresql+asyncpg"


class DatabaseSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where the state lives."""

    url: Annotated[str, Meta(description="sqlite+aiosqlite:///PATH, or postgresql+asyncpg://USER@HOST/NAME.")] = (
        "sqlite+aiosqlite:///controller.db"
    )
    password_file: Annotated[str | None, Meta(description="File that holds PostgreSQL's password.")] = None
    ca: Annotated[
        str | None,
        Meta(
            description="PEM file of the CAs that PostgreSQL's certificate is verified with; without it, no TLS is asked for."
        ),
    ] = None
    connections: Annotated[int, Meta(ge=2, le=100, description="Connections of this replica to PostgreSQL.")] = 10

    @property
    def is_sqlite(self) -> bool:
        """Whether it is one file, and so for one replica."""
        return self.url.startswith(_SQLITE)


class EnrolmentSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Whose TPMs are genuine, and how fast nodes may come."""

    ek_roots: Annotated[list[str], Meta(description="PEM files of TPM vendors' CAs, intermediates too.")] = []
    ek_allowlist: Annotated[
        str | None, Meta(description="File of SHA-256 digests of EK public keys (SubjectPublicKeyInfo), one a line.")
    ] = None
    certificate_s: Annotated[int, Meta(ge=60, le=31_536_000, description="Validity of a node's certificate.")] = 604_800
    per_minute: Annotated[
        int,
        Meta(
            ge=1,
            le=100_000,
            description="Enrolment calls that are taken from an address; also pushes and challenges without a certificate.",
        ),
    ] = 30


class PollSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How nodes are polled."""

    interval_s: Annotated[int, Meta(ge=1, le=86_400, description="Default for a new group.")] = 60
    timeout_s: Annotated[int, Meta(ge=1, le=600, description="Time for one poll; an interval at most.")] = 20
    concurrency: Annotated[int, Meta(ge=1, le=4096, description="Polls at a time.")] = 64
    max_evidence_bytes: Annotated[int, Meta(ge=65_536, le=64 << 20, description="Largest Evidence.")] = 46 << 20


class OidcSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Admins that an OpenID provider vouches for."""

    issuer: Annotated[str, Meta(description="`iss` of the tokens.", max_length=512)]
    audience: Annotated[str, Meta(description="`aud` that a token must name.", min_length=1, max_length=256)]
    jwks: Annotated[str, Meta(description="JWKS of the issuer: an https:// address, or a file.")]
    ca: Annotated[str | None, Meta(description="PEM file of the CAs that the address is verified with.")] = None
    roles_claim: Annotated[str, Meta(description="Claim that lists roles.", min_length=1, max_length=64)] = "roles"


class NatsSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Events to NATS JetStream."""

    url: Annotated[
        str,
        Meta(description="nats://HOST:PORT, or tls://HOST:PORT; no user in it.", pattern=r"^(nats|tls)://[^@]{1,255}$"),
    ]
    stream: Annotated[str, Meta(pattern=r"^[A-Z0-9_-]{1,64}$", description="Stream; made if it is not there.")] = (
        "EDGEWARDEN"
    )
    subject: Annotated[str, Meta(pattern=r"^[a-z0-9_.-]{1,128}$", description="Prefix of the subjects.")] = "edgewarden"
    ca: Annotated[str | None, Meta(description="PEM file of the CAs that tls:// is verified with.")] = None
    credentials: Annotated[
        str | None, Meta(description="NATS credentials file; for tls://, or a server at a loopback address.")
    ] = None


class MetricsSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where health and metrics are served."""

    listen: Annotated[str | None, Meta(description="Loopback ADDRESS:PORT for Prometheus, or nothing.")] = None


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole file."""

    listen: Annotated[str, Meta(description="ADDRESS:PORT for nodes and operators.")] = "127.0.0.1:8445"
    url: Annotated[
        str, Meta(description="How nodes and operators reach it: https://NAME:PORT.", pattern=r"^https://")
    ] = "https://localhost:8445"
    trust_domain: Annotated[str, Meta(pattern=r"^[a-z0-9._-]{1,255}$", description="Of the SPIFFE IDs.")] = (
        "edgewarden.internal"
    )
    keys: Annotated[str, Meta(description="Directory that `edgewarden controller init` made.")] = "keys"
    database: DatabaseSettings = DatabaseSettings()
    enrolment: EnrolmentSettings = EnrolmentSettings()
    poll: PollSettings = PollSettings()
    oidc: OidcSettings | None = None
    nats: NatsSettings | None = None
    metrics: MetricsSettings = MetricsSettings()
    log_level: Literal["debug", "info", "warning", "error"] = "info"


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the file."""
    return msgspec.json.schema(Settings)


def load(path: Path) -> Settings:
    """Read and validate the settings.

    Raises:
        ConfigError: unreadable, not YAML, or not the schema; the text names the place.
    """
    settings = strict_yaml.read_settings(path, Settings, hint="; `edgewarden controller init` makes one")
    if settings.metrics.listen is not None:
        split_listen(f"{path}: metrics.listen", settings.metrics.listen)
    _check_nats(settings.nats)
    return _absolute(settings, path.resolve().parent)


def split_listen(name: str, listen: str) -> tuple[str, int]:
    """Split a loopback ``ADDRESS:PORT`` (an IPv6 address in brackets).

    Args:
        name: of the setting, for the error.
        listen: its value.

    Raises:
        ConfigError: it is not of that form, or others than this machine could reach it.
    """
    host, _, port = listen.rpartition(":")
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        raise ConfigError(f"{name}: {listen!r} is not ADDRESS:PORT") from None
    if not (port.isascii() and port.isdigit() and len(port) < 6 and int(port) <= MAX_PORT):  # noqa: PLR2004 -- digits
        raise ConfigError(f"{name}: {port!r} is no port")
    if not address.is_loopback:
        raise ConfigError(f"{name}: {host} is not a loopback address: there is neither TLS nor a login there")
    return str(address), int(port)


def database_url(settings: DatabaseSettings) -> URL:
    """Return the database's URL with its password.

    Raises:
        ConfigError: it is not one of the two kinds, or the password can't be read.
    """
    try:
        url = make_url(settings.url)
    except ArgumentError as error:
        raise ConfigError(f"database.url: {error}") from error
    if url.drivername not in {_SQLITE, _POSTGRESQL}:
        raise ConfigError(f"database.url: it begins with {_SQLITE}:// or {_POSTGRESQL}://, not {url.drivername}://")
    if url.password is not None:
        raise ConfigError("database.url: put the password into a file and name it as database.password_file")
    if settings.password_file:
        try:
            url = url.set(password=Path(settings.password_file).read_text().strip())
        except OSError as error:
            raise ConfigError(f"database.password_file: {settings.password_file}: {error.strerror}") from error
    return url


def _check_nats(nats: NatsSettings | None) -> None:
    """Refuse an address that is none, and to show credentials to whoever is on the way: what they sign in the clear could be used by another."""
    if nats is None:
        return
    try:
        parts = urlsplit(nats.url)
        host, _port = parts.hostname or "", parts.port
    except ValueError:
        host = ""
    if not host:
        raise ConfigError("nats.url: nats://HOST:PORT or tls://HOST:PORT")
    if nats.credentials is not None and not nats.url.startswith("tls://") and not _is_loopback(host):
        raise ConfigError("nats.credentials: only for tls://, or for a server at a loopback address")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may come to mean another host
        return False


def _absolute(settings: Settings, base: Path) -> Settings:
    def against(value: str | None) -> str | None:
        return None if value is None else str(base / value)

    replace = msgspec.structs.replace
    database = settings.database
    prefix = f"{_SQLITE}:///"
    if database.url.startswith(prefix):
        database = replace(database, url=prefix + str(base / database.url.removeprefix(prefix)))
    database = replace(database, password_file=against(database.password_file), ca=against(database.ca))
    enrolment = replace(
        settings.enrolment,
        ek_roots=[str(base / root) for root in settings.enrolment.ek_roots],
        ek_allowlist=against(settings.enrolment.ek_allowlist),
    )
    oidc = settings.oidc
    if oidc is not None:
        jwks = oidc.jwks if oidc.jwks.startswith("https://") else str(base / oidc.jwks)
        oidc = replace(oidc, jwks=jwks, ca=against(oidc.ca))
    nats = settings.nats
    if nats is not None:
        nats = replace(nats, ca=against(nats.ca), credentials=against(nats.credentials))
    return replace(
        settings, keys=str(base / settings.keys), database=database, enrolment=enrolment, oidc=oidc, nats=nats
    )
