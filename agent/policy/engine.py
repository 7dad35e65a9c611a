"""What an engine is to the rest of the product.

Rules, for every engine:

1. A builtin's error is an error of the decision: where it turned into *undefined*, ``not blocked`` would allow.
2. Undefined is an error. An engine never makes up a decision.
3. An engine holds no state between two decisions.
"""

from typing import Protocol

from agent.errors import PolicyError

__all__ = ["DECISION_QUERY", "Engine", "undefined"]

DECISION_QUERY = "data.edgewarden.authz.decision"


class Engine(Protocol):
    """Evaluates one policy bundle.

    Attributes:
        request_reads: see :func:`agent.policy.reads.request_reads`.
    """

    request_reads: tuple[str, ...] | None

    def evaluate(self, input_json: bytes) -> bytes:
        """Return the value of :data:`DECISION_QUERY` for this input, as JSON.

        Raises:
            PolicyError: the input is not JSON, a builtin failed, or the decision is undefined.
        """
        ...

    def check(self) -> None:
        """Evaluate every package once, with an empty input, so that an error that hides until then is found now.

        Raises:
            PolicyError: the first package that cannot be evaluated, by name.
        """
        ...


def undefined(query: str) -> PolicyError:
    """Return the error for a query without a value."""
    return PolicyError(f"{query} is undefined")
