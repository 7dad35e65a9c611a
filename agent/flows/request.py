"""One inference request, from its headers to its recorded answer.

The steps, in this order; none is left out for anyone, and whatever fails at a step ends there, recorded:

1. identify: the TLS peer's certificate, or a bearer token, becomes a Principal.
2. admit: the announced size; then the body is read, within its size, its time and its memory; the principal's rate and concurrency.
3. decode: the body becomes tensors, within the wire format's limits.
4. authorize: the policy decides on subject, action, resource, request and node. No answer is a deny. The limit that it names counts
   besides the one of step 2.
5. sanitize: the profile that the decision names, else the manifest's.
6. infer: the session that was built from the measured bytes.
7. egress: the output profile that the decision names, else the manifest's.
8. audit: the record, with salted digests of inputs and outputs. In strict mode the answer waits for it (invariant 2).

The order of 1 and 2 differs from a plain reading of *admit, identify*: connections are admitted before (``gateway/connections.py``); here a
principal must be known before its own bucket can be charged.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import msgspec
import numpy as np

from agent import clock
from agent.errors import AuditError, PeerError, PolicyError, VerificationError
from agent.flows.counters import Counters
from agent.flows.policy_data import PolicyData
from agent.flows.recording import AuditClient
from agent.flows.refusals import Refusals
from agent.flows.running import Runner
from agent.flows.sanitizing import sanitize_inputs
from agent.flows.trace import Trace
from agent.guard.admission import Admission, check_batch, check_size
from agent.guard.bodies import BodyBudget
from agent.guard.egress import OutputProfile
from agent.identity.peer import PeerVerifier
from agent.identity.token import TokenVerifier, bearer_token
from agent.inference.registry import LoadedModel, Registry
from agent.inference.tensors import SALT_BYTES, InferRequest, InferResponse, Tensor, salted_digest
from agent.messages import NodeFacts
from agent.policy.client import PolicyClient
from agent.policy.question import Question
from agent.records import AuditEvent, PolicyAnswer, Principal

__all__ = ["Answer", "Caller", "RequestFlow", "Wire"]

DEFERRED_BYTES = 1 << 14  # of inputs whose record may be made a moment later
_SALT_BATCH = 64
_json = msgspec.json.Encoder().encode


class Caller(msgspec.Struct, frozen=True):
    """What the connection and the headers say of who asks; nothing of it is believed yet."""

    certificate: bytes | None
    authorization: str | None
    source_ip: str


class Wire(Protocol):
    """The request as the wire format's side holds it."""

    @property
    def announced_bytes(self) -> int | None:
        """Content-Length, when there is one."""

    @property
    def complete(self) -> bool:
        """Whether the whole body is here."""

    async def read(self, max_bytes: int) -> bytes:
        """Wait for the body and return it; ``PeerError`` 413, 408 or 400."""

    def body(self, max_bytes: int) -> bytes:
        """Return the body that is complete; ``PeerError`` 413."""

    def decode(self, body: bytes, model: LoadedModel) -> InferRequest:
        """Decode it; ``PeerError`` 400."""

    def encode(self, request: InferRequest, response: InferResponse) -> tuple[bytes, int | None]:
        """Encode the answer, with the size of its JSON part when binary parts follow; ``PeerError`` 400."""


class Answer(msgspec.Struct, frozen=True):
    """What the caller gets, with what goes into the headers."""

    body: bytes
    header_length: int | None
    decision_id: str
    salt: bytes
    latency_us: Mapping[str, int]


def _salts() -> Iterator[bytes]:
    """Yield random salts; one system call gives a batch of them."""
    while True:
        batch = secrets.token_bytes(SALT_BYTES * _SALT_BATCH)
        for start in range(0, len(batch), SALT_BYTES):
            yield batch[start : start + SALT_BYTES]


@dataclass(slots=True)
class RequestFlow:
    """The collaborators of the flow; one for the life of a gateway."""

    node: str
    peers: PeerVerifier
    tokens: TokenVerifier | None
    admission: Admission
    bodies: BodyBudget
    policy: PolicyClient
    registry: Registry
    audit: AuditClient
    counters: Counters
    max_body_bytes: int
    runner: Runner
    generator: np.random.Generator
    data: PolicyData = field(default_factory=PolicyData)
    earlier_data: PolicyData = field(default_factory=PolicyData)
    refusals: Refusals = field(default_factory=Refusals)
    salts: Iterator[bytes] = field(default_factory=_salts)
    node_json: bytes = b""

    def __post_init__(self) -> None:
        self.take_facts(NodeFacts(trust="unknown"))

    def take_facts(self, facts: NodeFacts) -> None:
        """Tell the policy this of the node from now on."""
        node: dict[str, Any] = {"id": self.node, "trust": facts.trust, "posture": facts.posture}
        if facts.attested_age_s is not None:
            node["attested_age_s"] = facts.attested_age_s
        self.node_json = _json(node)

    async def infer(self, caller: Caller, model: str, version: str, wire: Wire) -> Answer:
        """Answer one request.

        Raises:
            PeerError: whatever the caller gets instead; it is recorded already.
        """
        trace = Trace("infer", caller.source_ip)
        try:
            return await self._infer(trace, caller, model, version, wire)
        except PeerError as error:
            await self._refuse(trace, error)
            raise
        except (VerificationError, PolicyError) as error:
            # The model broke its own manifest, or the policy's data does not fit: our side's fault, and no news for the caller.
            refusal = PeerError(503, "node", "the node can't answer this request; its log says why")
            await self._refuse(trace, refusal, str(error))
            raise refusal from error

    async def _infer(self, trace: Trace, caller: Caller, model: str, version: str, wire: Wire) -> Answer:
        mark, clock_ns = trace.marks.append, time.perf_counter_ns
        # 1. identify
        trace.identified(self._identify(caller))
        mark(clock_ns())
        # 2. admit
        name = self.data.limit_for(trace.principal, model)
        limit = self.admission.limit(name)
        most = min(limit.max_bytes, self.max_body_bytes)
        check_size(wire.announced_bytes, most)
        if wire.complete:
            body = wire.body(most)
        else:
            with self.bodies.reserve(trace.account, most if wire.announced_bytes is None else wire.announced_bytes):
                body = await wire.read(most)
        mark(clock_ns())
        now = clock.monotonic_us()
        rate = self.admission.observe(trace.account, now)
        with await self.admission.enter(trace.account, name, now):
            loaded = self._find(trace, model, version)
            mark(clock_ns())
            # 3. decode
            request = wire.decode(body, loaded)
            batch = loaded.session.batch(request.inputs)
            check_batch(batch, limit)
            mark(clock_ns())
            # 4. authorize
            asked = {"bytes": len(body), "batch": batch, "rate": rate}
            answer = await self._authorize(trace, loaded, asked)
            decided = answer.decision.obligations.limit
            if decided is not None and decided != name:
                self.admission.narrow(trace.account, decided, now)
            mark(clock_ns())
            # 5. sanitize
            data = self._data_of(answer)
            profile = data.sanitizer(answer.decision.obligations.sanitize, loaded.manifest)
            trace.sanitizer = profile.name
            inputs = sanitize_inputs(
                profile, loaded.manifest, request.inputs, generator=self.generator, latency_us=trace.steps_us
            )
            mark(clock_ns())
            # 6. infer
            outputs = self.runner.run_here(loaded, inputs)
            if outputs is None:
                outputs = await self.runner.run(loaded, inputs)
            mark(clock_ns())
            # 7. egress
            response = _egress(
                data.output(answer.decision.obligations.output, loaded.manifest), loaded, request, outputs
            )
            encoded = wire.encode(request, response)
            mark(clock_ns())
            # 8. audit
            salt, latency_us = await self._record(trace, request, response)
            return Answer(*encoded, answer.decision_id, salt, latency_us)

    async def metadata(self, caller: Caller, model: str = "", version: str = "") -> LoadedModel | None:
        """Authorize a look at the server's (no ``model``) or at a model's metadata.

        Raises:
            PeerError: as :meth:`infer`.
        """
        trace = Trace("metadata", caller.source_ip)
        try:
            trace.identified(self._identify(caller))
            now = clock.monotonic_us()
            rate = self.admission.observe(trace.account, now)
            with await self.admission.enter(trace.account, self.data.limit_for(trace.principal), now):
                loaded = self._find(trace, model, version) if model else None
                await self._authorize(trace, loaded, {"rate": rate})
                await self._kept(trace.event("metadata", "ok", latency_us=trace.latency_us()))
        except PeerError as error:
            await self._refuse(trace, error)
            raise
        except PolicyError as error:
            refusal = PeerError(503, "node", "the node can't answer this request; its log says why")
            await self._refuse(trace, refusal, str(error))
            raise refusal from error
        return loaded

    async def refuse(self, caller: Caller, call: str, error: PeerError) -> PeerError:
        """Record a call that nobody may make, with who made it where that is known; returns what to answer.

        Args:
            caller: who.
            call: method and path, in ASCII.
            error: what to answer a caller that is known.
        """
        trace = Trace(call, caller.source_ip)
        try:
            trace.identified(self._identify(caller))
        except PeerError as unknown:
            error = unknown
        await self._refuse(trace, error)
        return error

    def _identify(self, caller: Caller) -> Principal:
        if caller.authorization is not None and self.tokens is not None:
            return self.tokens.principal(bearer_token(caller.authorization))
        if caller.certificate is not None:
            return self.peers.principal(caller.certificate)
        raise PeerError(401, "no_identity", "a client certificate or a bearer token is required")

    def _find(self, trace: Trace, model: str, version: str) -> LoadedModel:
        loaded = self.registry.get(model, version)
        trace.loaded, trace.model, trace.version = loaded, loaded.manifest.name, loaded.manifest.version
        return loaded

    async def _authorize(self, trace: Trace, loaded: LoadedModel | None, asked: dict[str, Any]) -> PolicyAnswer:
        """Ask the policy; what is unknown is absent from its input, version 1."""
        request = {**asked, "source_ip": trace.source_ip, "time": clock.rfc3339_seconds(trace.began_us)}
        question = Question(
            subject=_json(trace.principal),
            action=trace.action,
            resource=b"" if loaded is None else loaded.resource,
            node=self.node_json,
            request=request,
        )
        answer = trace.answer = self.policy.recall(question) or await self.policy.decide(question)
        if not answer.decision.allow:
            words = "denied by policy"
            if self.data.explain_denials and answer.decision.reasons:
                words += ": " + ", ".join(answer.decision.reasons)
            raise PeerError(403, "policy", words)
        return answer

    def _data_of(self, answer: PolicyAnswer) -> PolicyData:
        """Return the data of the policy that decided: around an activation the one before may still answer."""
        for data in (self.data, self.earlier_data):
            if data.policy_sha256 == answer.policy_sha256:
                return data
        raise PolicyError("the policy that decided is no longer in force")

    async def _record(
        self, trace: Trace, request: InferRequest, response: InferResponse
    ) -> tuple[bytes, Mapping[str, int]]:
        """Record an answer; returns the salt of its digests, which only the caller gets, and the whole latency split."""
        salt = next(self.salts)
        latency_us = trace.latency_us()

        def event() -> AuditEvent:
            return trace.event(
                "infer",
                "ok",
                latency_us=latency_us,
                input_digest=salted_digest(salt, request.inputs),
                output_digest=salted_digest(salt, response.outputs),
            )

        # Made later, it holds the tensors until then: only small ones, whose digests take no time that others would notice.
        small = sum(tensor.nbytes for tensor in request.inputs.values()) <= DEFERRED_BYTES
        await self._kept(event if small else event())
        trace.marks.append(time.perf_counter_ns())
        whole = {**latency_us, "audit": (trace.marks[-1] - trace.marks[-2]) // 1000}
        self.counters.count(f"requests_total|model={trace.model}|outcome=ok")
        self.counters.observe(whole)
        return salt, whole

    async def _kept(self, event: AuditEvent | Callable[[], AuditEvent]) -> None:
        """Record, and in strict mode wait until the record is durable."""
        try:
            waiting = self.audit.append(event)
            if waiting is not None:
                await waiting
        except AuditError as error:
            raise PeerError(503, "audit", "the audit log can't take a record", retry_after_s=5.0) from error

    async def _refuse(self, trace: Trace, error: PeerError, cause: str = "") -> None:
        """Record a refusal. A refusal that can't be recorded stays a refusal."""
        denied = error.reason == "policy"
        failure = trace.answer.error if trace.answer and trace.answer.error else ""
        words = cause or failure or (str(error) if not denied else "")
        self.counters.count(f"refusals_total|reason={error.reason}")
        if not denied and not self.refusals.has_record(trace.principal.id, error.reason, clock.monotonic_us()):
            return
        outcome: Literal["denied", "refused"] = "denied" if denied else "refused"
        await self._note(
            trace.event("refusal", outcome, error=words, detail={"reason": error.reason}, latency_us=trace.latency_us())
        )

    async def note_refusals(self) -> None:
        """Record what was only counted since the last call; to be called once a second and at the end."""
        summary = self.refusals.summary()
        if summary is not None:
            await self._note(summary)

    async def _note(self, refusal: AuditEvent) -> None:
        try:
            waiting = self.audit.append(refusal)
            if waiting is not None:
                await waiting
        except AuditError:
            self.counters.count("unrecorded_refusals_total")


def _egress(
    profile: OutputProfile, loaded: LoadedModel, request: InferRequest, outputs: Mapping[str, Tensor]
) -> InferResponse:
    wanted = [output.name for output in request.outputs] or list(outputs)
    for name in wanted:
        if name not in outputs:
            raise PeerError(400, "output", f"outputs[{name[:64]}]: the model has {', '.join(outputs)}")
    shaped = profile.apply({name: outputs[name] for name in wanted}, loaded.labels)
    return InferResponse(loaded.manifest.name, loaded.manifest.version, request.id, shaped)
