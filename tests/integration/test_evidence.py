"""From a software TPM to an appraisal, over the whole way that Evidence takes."""

import asyncio
import contextlib
import os

import msgspec
import pytest

from agent.attest.appraisal import Expectation, appraise
from agent.attest.collect import MAX_QUOTE_ATTEMPTS, NodeFacts, collect_evidence
from agent.attest.evidence import AuditHead
from agent.attest.log import MeasurementLog
from agent.attest.measurement import config_entry, model_entry, policy_entry, refused_entry
from agent.attest.structures import AkKind
from agent.attest.tpm import Tpm
from agent.attest.tpm_thread import TpmThread
from agent.errors import PeerError, TpmError
from tests.support.attest import CONFIG, CONTROL_SPKI, INFERENCE_SPKI, MODEL, POLICY, REFERENCE
from tests.support.swtpm import SwTpm

pytestmark = pytest.mark.integration
PCR = 14
FACTS = NodeFacts("node-1", "boot", AuditHead(0, "00" * 32), CONTROL_SPKI, INFERENCE_SPKI, {"secure_boot": True})
ENTRIES = (config_entry(CONFIG), policy_entry("r1", POLICY), model_entry("m", "1", "model.onnx", MODEL))


@pytest.fixture
def swtpm(tmp_path):
    with SwTpm(tmp_path) as tpm:
        yield tpm


@contextlib.asynccontextmanager
async def _node(swtpm, folder, connect=Tpm):
    tpm = TpmThread(swtpm.tcti, first_retry_s=0.02)
    tpm._connect = lambda: connect(swtpm.tcti)
    try:
        yield tpm, await MeasurementLog.open(tpm, folder / "log", PCR)
    finally:
        await tpm.close()


async def _appraised(tpm, log, verified=None, start=0):
    nonce = os.urandom(32)
    evidence = await collect_evidence(tpm, log, nonce, start, lambda: FACTS)
    ak = await tpm.call(lambda door: door.ak_public)
    spki = frozenset({INFERENCE_SPKI})
    return appraise(evidence.encode(), Expectation(nonce, ak, REFERENCE, CONTROL_SPKI, spki, verified))


async def test_evidence_of_a_node_in_order_is_affirming(swtpm, tmp_path):
    """Measure, quote, send, appraise: every check is ok, and further polls continue from the last index."""
    async with _node(swtpm, tmp_path) as (tpm, log):
        for entry in ENTRIES:
            await log.append(entry)
        first = await _appraised(tpm, log)
        assert first.status == "affirming"
        assert {check.outcome for check in first.checks} == {"ok"}
        await log.append(refused_entry("m", "2", "model.onnx", MODEL))
        second = await _appraised(tpm, log, first.require(), start=4)
        assert (second.status, second.require().index) == ("warning", 5)
        await log.append(model_entry("m", "2", "model.onnx", MODEL))
        third = await _appraised(tpm, log, second.require(), start=5)
        assert (third.status, third.failed and third.failed.name) == ("contraindicated", "models")


async def test_polls_continue_across_a_reboot_in_order(swtpm, tmp_path):
    """After a reboot the log is asked from 0 and appraised against the last one's clock."""
    async with _node(swtpm, tmp_path) as (tpm, log):
        for entry in ENTRIES:
            await log.append(entry)
        before = (await _appraised(tpm, log)).require()
    swtpm.reboot()
    async with _node(swtpm, tmp_path) as (tpm, log):
        for entry in ENTRIES:
            await log.append(entry)
        after = await _appraised(tpm, log, before)
        assert (after.status, after.require().reset_count) == ("affirming", before.reset_count + 1)


async def test_a_loss_of_power_is_a_retry(swtpm, tmp_path):
    """After a power cut the TPM says itself that its clock is not safe: the Verifier asks again later."""
    Tpm(swtpm.tcti).close()
    swtpm.power_cycle()
    async with _node(swtpm, tmp_path) as (tpm, log):
        result = await _appraised(tpm, log)
        assert (result.status, result.retry) == ("none", True)


async def test_a_cleared_tpm_is_not_the_enrolled_one(swtpm, tmp_path):
    """A resetCount that fell is named by the Verifier too, whatever the node says."""
    swtpm.reboot()
    async with _node(swtpm, tmp_path) as (tpm, log):
        for entry in ENTRIES:
            await log.append(entry)
        before = (await _appraised(tpm, log)).require()
    swtpm.clear()
    swtpm.reboot()
    async with _node(swtpm, tmp_path / "new") as (tpm, log):
        result = await _appraised(tpm, log, before)
        assert result.failed is not None
        assert (result.status, result.failed.name) == ("none", "clock")
        assert "enrol again" in result.failed.words


@pytest.mark.parametrize(("nonce", "start"), [(b"short", 0), (bytes(33), 0), (bytes(32), 2), (bytes(32), -1)])
async def test_a_bad_question_is_the_peer_s_fault(nonce, start, swtpm, tmp_path):
    """A nonce of another length or an index past the log is refused with 400."""
    async with _node(swtpm, tmp_path) as (tpm, log):
        with pytest.raises(PeerError) as raised:
            await collect_evidence(tpm, log, nonce, start, lambda: FACTS)
        assert raised.value.status == 400


async def test_what_a_node_does_not_know_is_absent(swtpm, tmp_path):
    """Unknown facts do not appear in the claims, and Evidence of them is still authentic."""
    async with _node(swtpm, tmp_path) as (tpm, log):
        facts = NodeFacts("node-1", "boot", None, None, None, {})
        evidence = await collect_evidence(tpm, log, bytes(32), 0, lambda: facts)
        ak = await tpm.call(lambda door: door.ak_public)
    plain = msgspec.to_builtins(evidence.claims)
    assert set(plain) == {"version", "node", "boot_id", "from", "count", "posture"}
    result = appraise(evidence.encode(), Expectation(bytes(32), ak, REFERENCE))
    assert result.verified is not None


async def test_appends_and_quotes_do_not_mix(swtpm, tmp_path):
    """Evidence that is collected while entries are appended always replays."""
    async with _node(swtpm, tmp_path) as (tpm, log):
        for entry in ENTRIES:
            await log.append(entry)
        appends = [log.append(model_entry("m", "1", "model.onnx", MODEL)) for _ in range(20)]
        polls = [_appraised(tpm, log) for _ in range(10)]
        mixed = [task for pair in zip(appends[:10], polls, strict=True) for task in pair]
        results = await asyncio.gather(*mixed, *appends[10:])
        assert {result.status for result in results[1:20:2]} == {"affirming"}


class _Contended(Tpm):
    """Another process extends a quoted PCR between PCR_Read and the quote, some times."""

    times = 0

    def quote(self, indices, extra_data, ak=AkKind.ECC_P256):
        if self.times:
            self.times -= 1
            self.extend(5, b"another process")
        return super().quote(indices, extra_data, ak)


@pytest.mark.parametrize("times", [MAX_QUOTE_ATTEMPTS - 1, MAX_QUOTE_ATTEMPTS])
async def test_a_quote_that_does_not_match_is_repeated(times, swtpm, tmp_path):
    """Another extender is outlasted up to the number of attempts, then there is no Evidence."""

    def connect(tcti):
        tpm = _Contended(tcti)
        tpm.times = times
        return tpm

    async with _node(swtpm, tmp_path, connect) as (tpm, log):
        if times < MAX_QUOTE_ATTEMPTS:
            assert (await _appraised(tpm, log)).verified is not None
        else:
            with pytest.raises(TpmError, match="another process"):
                await _appraised(tpm, log)
