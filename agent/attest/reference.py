"""Reference Values (RFC 9334): what an operator approved, against which Evidence is appraised.

Rules: what is not listed is not approved; an unknown field, a digest that is not 64 lower-case hex digits or a PCR that
can't hold the log is a ConfigError. The start value of the measurement PCR stands here because it is never the node's word.
Values never change; what a Verifier of many nodes derives from them is derived once.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from agent.attest.evidence import HexDigest
from agent.attest.measurement import ALLOWED_PCRS, ZERO_PCR, KnownEntry, known_models
from agent.errors import ConfigError
from agent.records import JsonValue, canonical

__all__ = ["MAX_REFERENCE_BYTES", "BootRule", "Measurement", "PolicyReference", "ReferenceValues"]

MAX_REFERENCE_BYTES = 16 * 1024 * 1024


class Measurement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the node's log is held, and what that PCR held before it."""

    pcr: int
    start: HexDigest = ZERO_PCR.hex()


class PolicyReference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Policy bundles by digest: ``assigned``; ``previous`` during a rollout; ``retired`` ones may have been in force earlier."""

    assigned: HexDigest
    previous: HexDigest | None = None
    retired: frozenset[HexDigest] = frozenset()

    @property
    def in_force(self) -> frozenset[str]:
        """The bundles that may be in force now."""
        return frozenset({self.assigned} | ({self.previous} if self.previous else set()))


class BootRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one boot PCR is appraised: ``pinned`` at enrolment (a change warns until approved) or ``exact``."""

    mode: Literal["ignored", "pinned", "exact"]
    values: frozenset[HexDigest] = frozenset()


class ReferenceValues(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """All Reference Values for a node.

    Attributes:
        measurement: PCR and start value of the log.
        policy: policy bundles.
        configs: digests of approved settings.
        retired_configs: settings approved once: fine earlier in this boot, not in force.
        models: approved digests by ``name/version/file``.
        withdrawn: digests once approved, by ``name/version/file``: fine in the past, not in force.
        boot: rules for PCRs 0-9 and 11; one without a rule is ignored.
    """

    measurement: Measurement
    policy: PolicyReference
    configs: frozenset[HexDigest]
    models: dict[str, frozenset[HexDigest]] = {}
    withdrawn: dict[str, frozenset[HexDigest]] = {}
    boot: dict[Annotated[int, msgspec.Meta(ge=0, le=11)], BootRule] = {}
    retired_configs: frozenset[HexDigest] = frozenset()
    version: Literal[1] = 1

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of :meth:`encode`, in hex: says which values an appraisal was made with."""
        return hashlib.sha256(self.encode()).hexdigest()

    @functools.cached_property
    def withdrawn_digests(self) -> frozenset[str]:
        """Digests of model files that must not be loaded any more."""
        return frozenset(digest for digests in self.withdrawn.values() for digest in digests)

    @functools.cached_property
    def known(self) -> Mapping[bytes, KnownEntry]:
        """The log's entries of approved model files by their bytes."""
        return known_models(self.models, self.measurement.pcr)

    def encode(self) -> bytes:
        """Return them as canonical JSON with sorted sets."""
        plain: JsonValue = msgspec.to_builtins(self, str_keys=True, order="deterministic")
        return canonical(plain)

    @classmethod
    def decode(cls, data: bytes) -> ReferenceValues:
        """Read them from JSON.

        Raises:
            ConfigError: they are not Reference Values.
        """
        if len(data) > MAX_REFERENCE_BYTES:
            raise ConfigError(f"Reference Values: {len(data)} bytes are over {MAX_REFERENCE_BYTES}")
        try:
            values = msgspec.json.decode(data, type=cls)
        except ValueError as error:
            raise ConfigError(f"Reference Values: {error}") from error
        if values.measurement.pcr not in ALLOWED_PCRS:
            raise ConfigError(f"Reference Values: the log can only be held in one of PCRs {sorted(ALLOWED_PCRS)}")
        if values.boot.keys() & {10, values.measurement.pcr}:
            raise ConfigError(
                "Reference Values: a boot rule names PCR 10 or the measurement PCR; neither is a boot PCR"
            )
        return values
