"""The settings of a node: one YAML file, parsed once into frozen values; and the only reader of the environment.

Rules:

1. An unknown key, a duplicate key, a wrong type or a value out of range is a :class:`agent.errors.ConfigError` that names the
   setting; nothing is guessed.
2. Relative paths are relative to the file that holds them.
3. A setting marked ``security`` decides what the node enforces. Those alone are measured (:meth:`Settings.measured`), so that a
   Verifier sees a change of enforcement and sees nothing of a node's name or addresses.
4. Numbers are integers with the unit in the name, because what is measured has one canonical encoding.
"""

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import msgspec
from msgspec import Meta

from agent import strict_yaml
from agent.config.keylime import KeylimeSettings, check_keylime, keylime_contact
from agent.config.marks import SECURITY, security, split_listen
from agent.errors import ConfigError
from agent.records import canonical

__all__ = [
    "DEFAULT_CONFIG",
    "AttestSettings",
    "AuditSettings",
    "ControlSettings",
    "Environment",
    "InferenceSettings",
    "KeylimeSettings",
    "MetricsSettings",
    "ModelSettings",
    "NodeSettings",
    "PolicySettings",
    "SandboxSettings",
    "Settings",
    "TokenSettings",
    "TpmSettings",
    "json_schema",
    "keylime_contact",
    "load",
    "quiet_libraries",
    "read_environment",
    "split_listen",
]

DEFAULT_CONFIG = Path("/etc/edgewarden/edgewarden.yaml")


class NodeSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Who this node is and where it keeps things."""

    id: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}$", description="Name of the node in logs and Evidence.")]
    state_dir: Annotated[str, Meta(description="Directory for logs and the last known good policy.")] = (
        "/var/lib/edgewarden"
    )
    runtime_dir: Annotated[str, Meta(description="Directory for the Unix sockets.")] = "/run/edgewarden"
    child_user: Annotated[
        str | None, Meta(description="User that children become when the agent is started as root; default nobody.")
    ] = None
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="Least level that is logged.")
    ] = "info"


class TpmSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The TPM that measures and quotes."""

    tcti: Annotated[str, Meta(description="TCTI string of the TPM2 software stack.")] = "device:/dev/tpmrm0"
    pcr: Annotated[int, security("PCR that model measurements extend: 8, 9 or 11 to 15.", ge=8, le=15)] = 14
    start_value: Annotated[
        Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")] | None,
        security("Value of the PCR before the first entry, where an operator approved one that is not zero."),
    ] = None
    timeout_ms: Annotated[int, Meta(ge=100, le=120_000, description="Time for one TPM command.")] = 5_000


class ModelSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where model packages come from and whose signature counts."""

    store: Annotated[str, Meta(description="Directory <name>/<version>/ of installed packages.")] = (
        "/var/lib/edgewarden/models"
    )
    trusted_keys: Annotated[list[str], Meta(description="PEM files of EC P-256 keys whose packages are trusted.")] = []
    trusted_roots: Annotated[list[str], Meta(description="PEM files of CA certificates for signing certificates.")] = []
    max_package_bytes: Annotated[int, security("Largest package in bytes.", ge=1, le=1 << 40)] = 8 << 30
    inspect_timeout_ms: Annotated[int, security("Time for the inspection of one package.", ge=1_000, le=600_000)] = (
        60_000
    )


class PolicySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The Rego policy and the engine that decides."""

    bundle: Annotated[str, Meta(description="OPA bundle (.tar.gz) that is activated at the first start.")] = (
        "/etc/edgewarden/policy.tar.gz"
    )
    trusted_keys: Annotated[
        list[str], Meta(description="PEM files of EC P-256 keys that sign bundles; a bundle must then be signed.")
    ] = []
    require_signature: Annotated[bool, security("Refuse bundles without a valid signature.")] = True
    engine: Annotated[Literal["embedded", "opa"], security("Engine that evaluates the policy.")] = "embedded"
    opa_binary: Annotated[str, Meta(description="OPA executable, for the engine `opa`.")] = "/usr/bin/opa"
    evaluation_deadline_ms: Annotated[int, security("Time for one evaluation.", ge=1, le=10_000)] = 50
    total_deadline_ms: Annotated[int, security("Time for a decision, waiting included.", ge=10, le=60_000)] = 1_000
    remember_decisions: Annotated[
        bool, Meta(description="Answer a question that is like an earlier one from memory, where the policy allows it.")
    ] = True
    worker_memory_bytes: Annotated[int, security("Memory a policy worker may add.", ge=8 << 20, le=8 << 30)] = 256 << 20


class TokenSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Bearer tokens (ES256 JWT) as a second way to identify a client."""

    jwks: Annotated[str, Meta(description="JWKS file with the issuer's EC P-256 keys.")]
    audience: Annotated[str, security("Value that a token's `aud` must hold.", min_length=1, max_length=256)]
    issuer: Annotated[str | None, security("Value that a token's `iss` must have.")] = None
    roles_claim: Annotated[str, security("Claim that lists roles.", min_length=1, max_length=64)] = "roles"


class InferenceSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The data plane's listener and its limits."""

    listen: Annotated[str, Meta(description="ADDRESS:PORT of the inference API; port 0 takes a free one.")] = (
        "127.0.0.1:8443"
    )
    certificate: Annotated[str, Meta(description="PEM chain of the server's certificate.")]
    key: Annotated[str, Meta(description="PEM key of the server's certificate.")]
    client_ca: Annotated[str, Meta(description="PEM file of the CAs that sign client certificates.")]
    tokens: Annotated[TokenSettings | None, Meta(description="Accept bearer tokens; certificates become optional.")] = (
        None
    )
    threads: Annotated[int, Meta(ge=1, le=64, description="Threads of one onnxruntime session.")] = 1
    max_body_bytes: Annotated[int, security("Largest request body.", ge=1024, le=1 << 30)] = 32 << 20
    max_inflight_bytes: Annotated[int, security("Memory for bodies on their way, of all clients.", ge=1 << 20)] = (
        512 << 20
    )
    header_timeout_ms: Annotated[int, security("Time until a request's headers are complete.", ge=100, le=120_000)] = (
        10_000
    )
    body_timeout_ms: Annotated[int, security("Time until a request's body is complete.", ge=100, le=600_000)] = 30_000
    idle_timeout_ms: Annotated[int, Meta(ge=1_000, le=3_600_000, description="Time an idle connection is kept.")] = (
        75_000
    )
    max_connections: Annotated[int, security("Open connections at a time.", ge=1, le=65_536)] = 1_024
    max_connections_per_source: Annotated[int, security("Open connections of one address.", ge=1, le=65_536)] = 256
    max_concurrent: Annotated[int, security("Requests in work at a time.", ge=1, le=65_536)] = 256
    memory_bytes: Annotated[int, security("Memory the gateway may add for models and requests.", ge=64 << 20)] = (
        16 << 30
    )
    drain_timeout_ms: Annotated[int, Meta(ge=0, le=600_000, description="Time for requests in work at a stop.")] = (
        10_000
    )


class ControlSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The listener that controllers poll for Evidence."""

    listen: Annotated[str, Meta(description="ADDRESS:PORT; port 0 takes a free one.")] = "127.0.0.1:8444"
    certificate: Annotated[
        str | None, Meta(description="PEM chain of the server's certificate; without it, key and CA come by enrolment.")
    ] = None
    key: Annotated[str | None, Meta(description="PEM key of the server's certificate.")] = None
    client_ca: Annotated[str | None, Meta(description="PEM file of the CAs that sign controllers' certificates.")] = (
        None
    )


class AttestSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Other Verifiers than EdgeWarden's own."""

    keylime: KeylimeSettings = KeylimeSettings()


class AuditSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The audit log."""

    durability: Annotated[
        Literal["strict", "buffered"], security("`strict`: an answer waits until its record is on the disk.")
    ] = "strict"
    max_bytes: Annotated[int, Meta(ge=16 << 20, description="Disk space of the log; then whole old segments go.")] = (
        1 << 30
    )


class SandboxSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Confinement of the child processes."""

    required: Annotated[bool, security("Refuse to start where Landlock or seccomp is missing.")] = True


class MetricsSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where health and metrics are served besides the Unix socket."""

    listen: Annotated[str | None, Meta(description="Loopback ADDRESS:PORT for Prometheus, or nothing.")] = None


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole file."""

    node: NodeSettings
    inference: InferenceSettings
    tpm: TpmSettings = TpmSettings()
    models: ModelSettings = ModelSettings()
    policy: PolicySettings = PolicySettings()
    control: ControlSettings | None = None
    attest: AttestSettings = AttestSettings()
    audit: AuditSettings = AuditSettings()
    sandbox: SandboxSettings = SandboxSettings()
    metrics: MetricsSettings = MetricsSettings()

    def measured(self) -> bytes:
        """Return the canonical JSON of the settings that are marked ``security``."""
        return canonical(_selectsecurity(type(self), self))


class Environment(msgspec.Struct, frozen=True):
    """What the process was told by its surroundings."""

    notify_socket: str | None
    watchdog_usec: int | None
    path: str
    python_path: str | None


def read_environment() -> Environment:
    """Read the variables that EdgeWarden knows; nothing else of it looks at the environment."""
    env = os.environ  # noqa: TID251 -- this module is the one door to the environment
    usec = env.get("WATCHDOG_USEC", "")
    return Environment(
        notify_socket=env.get("NOTIFY_SOCKET"),
        watchdog_usec=int(usec) if usec.isdigit() else None,
        path=env.get("PATH", "/usr/bin:/bin"),
        python_path=env.get("PYTHONPATH"),
    )


def quiet_libraries() -> None:
    """Keep libraries from writing to standard error by themselves; before they are imported."""
    os.environ.setdefault("TSS2_LOG", "all+none")  # noqa: TID251 -- as above


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the file, for editors and the operator guide."""
    return msgspec.json.schema(Settings)


def load(path: Path) -> Settings:
    """Read and validate the configuration.

    Raises:
        ConfigError: unreadable, not YAML, or not the schema; the text names the place.
    """
    settings = strict_yaml.read_settings(path, Settings)
    _check_listeners(path, settings)
    return _absolute(settings, path.resolve().parent)


def _check_listeners(path: Path, settings: Settings) -> None:
    listeners = {
        "inference.listen": settings.inference.listen,
        "control.listen": settings.control.listen if settings.control else None,
        "metrics.listen": settings.metrics.listen,
        "attest.keylime.listen": settings.attest.keylime.listen,
    }
    for name, listen in listeners.items():
        if listen is None:
            continue
        try:
            host, _ = split_listen(listen)
        except ValueError as error:
            raise ConfigError(f"{path}: {name}: {listen!r} is not ADDRESS:PORT ({error})") from error
        if name == "metrics.listen" and not ipaddress.ip_address(host).is_loopback:
            raise ConfigError(f"{path}: metrics.listen: {host} is not a loopback address")
    control = settings.control
    if control and len({part is None for part in (control.certificate, control.key, control.client_ca)}) > 1:
        raise ConfigError(
            f"{path}: control: name certificate, key and client_ca, or none of them: then they come by enrolment"
        )
    if settings.policy.require_signature and not settings.policy.trusted_keys:
        raise ConfigError(
            f"{path}: policy.trusted_keys: name a key, or set policy.require_signature to false and rely on measurement"
        )
    if not settings.models.trusted_keys and not settings.models.trusted_roots:
        raise ConfigError(f"{path}: models.trusted_keys: name a key or a root, else no package can be verified")
    if settings.tpm.pcr == 10:  # noqa: PLR2004 -- the kernel's own measurement PCR
        raise ConfigError(f"{path}: tpm.pcr: 10 belongs to the kernel's IMA; take 8, 9 or 11 to 15")
    if settings.attest.keylime.enabled:
        check_keylime(path, settings.attest.keylime)


_PATHS: dict[str, tuple[str, ...]] = {
    "node": ("state_dir", "runtime_dir"),
    "models": ("store", "trusted_keys", "trusted_roots"),
    "policy": ("bundle", "trusted_keys", "opa_binary"),
    "inference": ("certificate", "key", "client_ca"),
    "control": ("certificate", "key", "client_ca"),
}


def _absolute(settings: Settings, base: Path) -> Settings:
    changes: dict[str, Any] = {}
    for section, names in _PATHS.items():
        value = getattr(settings, section)
        if value is None:
            continue
        changed = {name: _against(base, getattr(value, name)) for name in names}
        changes[section] = msgspec.structs.replace(value, **changed)
    keylime = settings.attest.keylime
    changes["attest"] = AttestSettings(
        keylime=msgspec.structs.replace(
            keylime,
            verifier_ca=keylime.verifier_ca and str(base / keylime.verifier_ca),
            kernel_list=str(base / keylime.kernel_list),
        )
    )
    inference: InferenceSettings = changes["inference"]
    if inference.tokens:
        tokens = msgspec.structs.replace(inference.tokens, jwks=str(base / inference.tokens.jwks))
        changes["inference"] = msgspec.structs.replace(inference, tokens=tokens)
    return msgspec.structs.replace(settings, **changes)


def _against(base: Path, value: str | list[str] | None) -> str | list[str] | None:
    if value is None:
        return None
    return [str(base / item) for item in value] if isinstance(value, list) else str(base / value)


def _selectsecurity(struct: type[msgspec.Struct], value: msgspec.Struct) -> dict[str, Any]:
    """Walk the types: nested sections are entered, fields marked ``security`` are taken."""
    selected: dict[str, Any] = {}
    for name, hint in get_type_hints(struct, include_extras=True).items():
        member = getattr(value, name)
        if isinstance(member, msgspec.Struct):
            selected[name] = _selectsecurity(type(member), member)
        elif any(
            isinstance(meta, Meta) and meta.extra_json_schema == SECURITY for meta in getattr(hint, "__metadata__", ())
        ):
            selected[name] = member
    return selected
