"""What is known of a request while it goes through its flow: for its record, and for the answer's latency split."""

from __future__ import annotations

import time
from typing import Any, Literal

from agent import clock
from agent.inference.registry import LoadedModel
from agent.records import AuditEvent, PolicyAnswer, Principal

__all__ = ["STAGES", "Trace"]

_ANONYMOUS = Principal(id="", kind="mtls")
STAGES = ("identity", "read", "admit", "decode", "policy", "sanitize", "infer", "egress", "audit")


class Trace:
    """What is known of a request so far, for its record.

    Attributes:
        account: whom limits are charged to: an id is unique only among principals that were proved the same way.
        steps_us: time of each step of the sanitizer.
        marks: when the request began, and when each stage of :data:`STAGES` ended.
    """

    __slots__ = (
        "account", "action", "answer", "began_us", "loaded", "marks", "model", "principal", "sanitizer", "source_ip", "steps_us", "version",
    )  # fmt: skip

    def __init__(self, action: str, source_ip: str) -> None:
        self.action = action
        self.source_ip = source_ip
        self.began_us = clock.now_us()
        self.principal = _ANONYMOUS
        self.account = ""
        self.model = self.version = self.sanitizer = ""
        self.loaded: LoadedModel | None = None
        self.answer: PolicyAnswer | None = None
        self.steps_us: dict[str, int] = {}
        self.marks = [time.perf_counter_ns()]

    def identified(self, principal: Principal) -> None:
        """Note who asks."""
        self.principal = principal
        self.account = f"{principal.kind}:{principal.id}"

    def latency_us(self) -> dict[str, int]:
        """Return the latency split, as far as the request came."""
        marks = self.marks
        split = {stage: (end - begin) // 1000 for stage, begin, end in zip(STAGES, marks, marks[1:], strict=False)}
        split.update(self.steps_us)
        return split

    def event(self, kind: str, outcome: Literal["ok", "denied", "refused", "failed"], **more: Any) -> AuditEvent:  # noqa: ANN401
        """Build the record."""
        answer = self.answer
        return AuditEvent(
            kind=kind,
            time_us=self.began_us,
            outcome=outcome,
            principal=self.principal.id,
            principal_kind=self.principal.kind if self.principal.id else "",
            action=self.action,
            source_ip=self.source_ip,
            model=self.model,
            version=self.version,
            model_sha256=self.loaded.sha256 if self.loaded else "",
            sanitizer=self.sanitizer,
            policy_sha256=answer.policy_sha256 if answer else "",
            policy_revision=answer.revision if answer else "",
            decision_id=answer.decision_id if answer else "",
            reasons=answer.decision.reasons if answer else (),
            **more,
        )
