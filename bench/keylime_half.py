"""The Keylime half of ``bench/appraisal.py``: runs in Keylime's own environment, imports nothing of this project.

Reads cases as JSON from the file that it is given, then lines of ``case calls`` from standard input; answers each with the mean seconds a
call. What is timed is what its verifier does with an agent's answer: JSON, quote string, signature, nonce, PCR digest, clock, replay of the
list, runtime policy. The policy is held decoded and logging is at its quietest, which is kinder to it than its own servers are.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from keylime import config
from keylime.agentstates import AgentAttestState, TPMClockInfo
from keylime.common.algorithms import Hash
from keylime.ima import ima
from keylime.mba import mba
from keylime.tpm.tpm_main import Tpm

PLENTY = ima.RUNTIME_POLICY_GENERATOR.LegacyAllowList  # 2: below it the list is not checked at all


def _policy(digests: dict[str, list[str]]) -> dict[str, Any]:
    policy: dict[str, Any] = ima.empty_policy()
    policy["meta"]["generator"] = int(PLENTY)
    policy["digests"] = digests
    ima.validate_runtime_policy(policy)
    return policy


class Case:
    """One answer of an agent, and the state that the verifier holds before it."""

    def __init__(self, case: dict[str, Any], policies: dict[str, Any]) -> None:
        self._body = json.dumps({"quote": case["quote"], "ima_measurement_list": case["list"]})
        self._nonce, self._key = case["nonce"], case["key"]
        self._policy = policies[case["policy"]]
        self._verified = bytes.fromhex(case["verified"]) if case["verified"] else None
        self._count = case["count"]

    def call(self) -> float:
        """Appraise once; returns seconds."""
        state = AgentAttestState("node-1")
        state.set_tpm_clockinfo(TPMClockInfo(clock=1, resetcount=3, restartcount=0, safe=1))
        if self._verified is not None:
            state.update_ima_attestation(config.IMA_PCR, self._verified, self._count)
        begin = time.perf_counter()
        sent = json.loads(self._body)
        failure = Tpm().check_quote(
            state,
            self._nonce,
            None,
            sent["quote"],
            self._key,
            {},
            sent["ima_measurement_list"],
            self._policy,
            hash_alg=Hash.SHA256,
        )
        taken = time.perf_counter() - begin
        if failure:
            raise RuntimeError([event.event_id for event in failure.events])
        return taken


def main() -> None:
    """Answer until standard input ends."""
    logging.disable(logging.CRITICAL)
    mba.load_imports(skip_custom_policies=True)
    asked = json.loads(Path(sys.argv[1]).read_text())
    config.IMA_PCR = asked["pcr"]
    policies = {name: _policy(digests) for name, digests in asked["policies"].items()}
    cases = {name: Case(case, policies) for name, case in asked["cases"].items()}
    for line in sys.stdin:
        name, calls = line.split()
        print(sum(cases[name].call() for _ in range(int(calls))) / int(calls), flush=True)


if __name__ == "__main__":
    main()
