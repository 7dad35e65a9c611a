"""What nodes call, and what is for everybody: health, keys, the API's description."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web

from agent.attest.enrolment import (
    CHALLENGE_PATH,
    ENROL_PATH,
    EVIDENCE_PATH,
    Challenge,
    ChallengeRequest,
    EnrolChallenge,
    EnrolGrant,
    EnrolProof,
    EnrolRequest,
    PushAnswer,
    PushedEvidence,
)
from agent.attest.evidence import MAX_EVIDENCE_BYTES
from controller.api.limiter import Limiter
from controller.api.routing import Call, Route
from controller.flows.joining import Joining
from controller.trust.authority import Authority

__all__ = ["node_routes", "readiness_route"]

MAX_ENROL_BYTES = 64 * 1024
MEMBER_PER_MINUTE = (
    240  # challenges and pushes with one certificate; a node makes two each interval, which is a second at least
)
_OVERHEAD_BYTES = 64 * 1024  # around the Evidence


def node_routes(joining: Joining, authority: Authority, per_minute: int, evidence_bytes: int) -> list[Route]:
    """Return the table's rows for nodes.

    Args:
        joining: does the work.
        authority: the controller's keys.
        per_minute: enrolment calls that are taken from an address, and as many pushes and challenges without a certificate.
        evidence_bytes: limit of Evidence.
    """
    limit = min(MAX_EVIDENCE_BYTES, evidence_bytes) + _OVERHEAD_BYTES
    enrolments, strangers, members = Limiter(per_minute), Limiter(per_minute), Limiter(MEMBER_PER_MINUTE)

    def admit_enrolment(source: str, _spki: str | None) -> None:
        enrolments.admit(source)

    def admit_push(source: str, spki: str | None) -> None:
        if spki is None:
            strangers.admit(source)
        else:
            members.admit(spki)

    async def begin(call: Call) -> EnrolChallenge:
        return await joining.begin(call.body)

    async def complete(call: Call) -> EnrolGrant:
        enrolment = await joining.take(call.request.match_info["enrolment"])
        call.concerns(enrolment.node)
        return await joining.complete(enrolment, call.body)

    async def challenge(call: Call) -> Challenge:
        return await joining.challenge(call.body.node, call.peer_spki_sha256)

    async def evidence(call: Call) -> PushAnswer:
        return await joining.pushed(call.body, call.peer_spki_sha256)

    async def jwks(_call: Call) -> web.Response:
        return web.Response(text=authority.jwks(), content_type="application/json")

    return [
        Route(
            "POST", ENROL_PATH, "Show a TPM's keys; get a credential for it", begin,
            body=EnrolRequest, answer=EnrolChallenge, limit_bytes=MAX_ENROL_BYTES, kind="node.enrol", refusals=(403, 409, 422, 429), admit=admit_enrolment,
        ),
        Route(
            "POST", ENROL_PATH + "/{enrolment}", "Show the opened credential and the first Evidence", complete,
            body=EnrolProof, answer=EnrolGrant, limit_bytes=limit, kind="node.enrol", refusals=(403, 409, 422, 429), admit=admit_enrolment,
        ),
        Route(
            "POST", CHALLENGE_PATH, "Get a nonce for pushed Evidence", challenge,
            body=ChallengeRequest, answer=Challenge, limit_bytes=1024, kind="node.push", refusals=(404, 429), admit=admit_push,
        ),
        Route(
            "POST", EVIDENCE_PATH, "Push Evidence; renew a certificate", evidence,
            body=PushedEvidence, answer=PushAnswer, limit_bytes=limit, kind="node.push", refusals=(404, 409, 422, 429), admit=admit_push,
        ),
        Route("GET", "/.well-known/jwks.json", "Keys that verify Attestation Results", jwks, answer=dict[str, list[dict[str, str]]]),
    ]  # fmt: skip


def readiness_route(why_not: Callable[[], str]) -> Route:
    """Return the row by which a balancer learns whether this replica works. Why it does not is for its own machine alone.

    Args:
        why_not: words; none when it works.
    """

    async def ready(_call: Call) -> web.Response:
        if why_not():  # no refusal, which would be logged each time that a balancer asks
            words = "this replica can't do its work now: ask another, or come again"
            return web.json_response({"error": words, "check": "not_ready"}, status=503)
        return web.json_response({"ready": True})

    return Route("GET", "/readyz", "Whether this replica can do its work", ready, answer=dict[str, bool])
