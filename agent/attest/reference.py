"""Reference Values (RFC 9334): what an operator approved, against which Evidence is appraised.

Rules: what is not listed is not approved; an unknown field, a digest that is not 64 lower-case hex digits or a PCR that
can't hold the log is a ConfigError. The start value of the measurement PCR stands here because it is never the node's word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from agent.attest.evidence import HexDigest
from agent.attest.measurement import ALLOWED_PCRS, ZERO_PCR
from agent.errors import ConfigError
from agent.records import JsonValue, canonical

__all__ = ["MAX_REFERENCE_BYTES", "BootRule", "Measurement", "PolicyReference", "ReferenceValues", "pinned"]

MAX_REFERENCE_BYTES = 16 * 1024 * 1024
_DIGEST = re.compile(r"[0-9a-f]{64}")


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


class ReferenceValues(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
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


def pinned(reference: ReferenceValues, pcrs: Mapping[int, str]) -> ReferenceValues:
    """Add a node's boot PCR values from its enrolment to the rules of mode ``pinned``.

    Values that an operator approved since stay beside them. A pinned PCR without a value here keeps its rule, so that it warns.

    Args:
        reference: of the node's group.
        pcrs: SHA-256 bank by index, lower-case hex.

    Raises:
        ConfigError: a value is not 64 lower-case hex digits.
    """
    for index, value in pcrs.items():
        if not _DIGEST.fullmatch(value):
            raise ConfigError(f"the value of PCR {index} at enrolment is not a SHA-256 digest")
    boot = {
        index: BootRule(rule.mode, rule.values | {pcrs[index]}) if rule.mode == "pinned" and index in pcrs else rule
        for index, rule in reference.boot.items()
    }
    return msgspec.structs.replace(reference, boot=boot)
