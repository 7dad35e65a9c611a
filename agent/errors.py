"""Every error that EdgeWarden raises on purpose, split by blame.

One root, so that a boundary can catch what is ours and let a programming error end the process. An error's text says
what is wrong, where, and what to do; it never holds key material, tokens or a client's payload.
"""

__all__ = [
    "AuditError",
    "ConfigError",
    "ControllerError",
    "EdgeWardenError",
    "HostError",
    "IsolationError",
    "PeerError",
    "PolicyError",
    "TpmError",
    "VerificationError",
]


class EdgeWardenError(Exception):
    """Root of all deliberate errors."""


class ConfigError(EdgeWardenError):
    """The operator's configuration is wrong; the text names the setting."""


class PeerError(EdgeWardenError):
    """A client sent something that is refused.

    Attributes:
        status: HTTP status to answer with (4xx or 503).
        reason: short machine-readable word for metrics and the audit log, for example ``too_large``.
        retry_after_s: seconds for ``Retry-After``, where waiting helps.
    """

    def __init__(self, status: int, reason: str, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.retry_after_s = retry_after_s


class ControllerError(EdgeWardenError):
    """The controller can't be reached, refuses, or does not speak the protocol.

    Attributes:
        status: HTTP status of a refusal; None where no answer came.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class VerificationError(EdgeWardenError):
    """A digest, signature, log or piece of Evidence is not what it must be.

    Attributes:
        check: name of the first check that failed, for example ``pcr-digest``.
    """

    def __init__(self, check: str, message: str) -> None:
        super().__init__(f"{check}: {message}")
        self.check = check
        self.message = message


class PolicyError(EdgeWardenError):
    """A policy bundle is refused, or a decision could not be made; both mean deny."""


class HostError(EdgeWardenError):
    """The machine does not give what is needed: disk, permission, kernel feature."""


class TpmError(HostError):
    """The TPM is absent, does not answer in time, was cleared, or refuses a command."""


class IsolationError(HostError):
    """A child process could not be started or confined, or it died."""


class AuditError(HostError):
    """The audit log cannot take a record or cannot be read."""
