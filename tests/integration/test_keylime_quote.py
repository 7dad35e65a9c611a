"""Quotes for Keylime against a software TPM: what is bound, what is sent, what another process can do to it."""

import base64
import contextlib
import hashlib

import pytest

from agent.attest.keylime import KernelList, parse_kernel_list, pcr_blob
from agent.attest.keylime_quote import MAX_QUOTE_ATTEMPTS, collect_keylime_quote
from agent.attest.log import MeasurementLog
from agent.attest.measurement import boot_aggregate, config_entry, parse_entries, replay
from agent.attest.structures import AkKind, parse_quote
from agent.attest.tpm import Tpm
from agent.attest.tpm_thread import TpmThread
from agent.errors import ConfigError, TpmError, VerificationError
from tests.support.attest import CONFIG
from tests.support.swtpm import SwTpm

pytestmark = pytest.mark.integration
KEY = b"-----BEGIN PUBLIC KEY-----\n"


@pytest.fixture
def swtpm(tmp_path):
    with SwTpm(tmp_path) as tpm:
        yield tpm


@contextlib.asynccontextmanager
async def _thread(swtpm):
    thread = TpmThread(swtpm.tcti, first_retry_s=0.02)
    try:
        yield thread
    finally:
        await thread.close()


async def _log(thread, tmp_path, kernel=KernelList()):  # noqa: B008 -- a frozen value
    return await MeasurementLog.open(thread, tmp_path / "keylime", 10, kernel.value, {10})


async def _quote(thread, log, kernel=KernelList(), *, pcrs=(10,), start=0):  # noqa: B008 -- as above
    return await collect_keylime_quote(thread, log, kernel, nonce="nonce1", pcrs=pcrs, bound=KEY, start=start)


async def test_a_quote_binds_the_key_and_the_list(swtpm, tmp_path):
    """PCR 16 is what the key makes of zero, PCR 10 what the list replays to, and the nonce is there as text; again and again."""
    async with _thread(swtpm) as thread:
        log = await _log(thread, tmp_path)
        await log.append(config_entry(CONFIG))
        for _ in range(2):  # PCR 16 is reset each time
            made = await _quote(thread, log)
            attest, _, blob = (base64.b64decode(part) for part in made.quote[1:].split(":"))
            entries = list(parse_entries(made.entries, 10))
            assert [entry.path for entry in entries] == ["boot_aggregate", "edgewarden/config"]
            bound = hashlib.sha256(bytes(32) + hashlib.sha256(KEY).digest()).digest()
            assert blob == pcr_blob({10: replay(entries), 16: bound})
            assert parse_quote(attest).extra_data == b"nonce1"
            assert parse_quote(attest).selections[0].indices == {10, 16}


@pytest.mark.parametrize(
    ("start", "sent"), [(0, (0, 1, 2)), (1, (1, 0, 2)), (2, (2, 0, 1)), (3, (3, 0, 0)), (4, (0, 1, 2))]
)
async def test_the_list_is_sent_from_the_wanted_entry(start, sent, swtpm, tmp_path):
    """The kernel's line counts as an entry; past the end everything is sent again, and the index says so."""
    kernel = parse_kernel_list(boot_aggregate([bytes(32)]).ascii(10).encode())
    async with _thread(swtpm) as thread:
        aggregate = boot_aggregate([bytes(32)])
        await thread.call(lambda tpm: tpm.extend(10, aggregate.template_data()))
        log = await _log(thread, tmp_path, kernel)
        await log.append(config_entry(CONFIG))
        made = await _quote(thread, log, kernel, start=start)
    assert (made.start, len(made.kernel), len(list(parse_entries(made.entries, 10)))) == sent


async def test_a_pcr_that_holds_something_else_keeps_the_mode_off(swtpm, tmp_path):
    """PCR 10 that someone extended without a list is tampering, and no other PCR can stand for it."""
    async with _thread(swtpm) as thread:
        await thread.call(lambda tpm: tpm.extend(10, b"another"))
        with pytest.raises(VerificationError, match="PCR 10"):
            await _log(thread, tmp_path)
        with pytest.raises(ConfigError, match=r"choose one of \[10\]"):
            await MeasurementLog.open(thread, tmp_path / "x", 14, allowed={10})


@pytest.mark.parametrize("times", [MAX_QUOTE_ATTEMPTS - 1, MAX_QUOTE_ATTEMPTS])
async def test_another_extender_is_outlasted_for_a_while(times, swtpm, tmp_path, monkeypatch):
    """A quote that does not match what was read is repeated up to the number of attempts, then there is none."""
    left = [times]
    quote = Tpm.quote

    def contended(self, indices, extra_data, ak=AkKind.ECC_P256):
        if left[0]:
            left[0] -= 1
            self.extend(5, b"another process")
        return quote(self, indices, extra_data, ak)

    monkeypatch.setattr(Tpm, "quote", contended)
    async with _thread(swtpm) as thread:
        log = await _log(thread, tmp_path)
        if times < MAX_QUOTE_ATTEMPTS:
            assert (await _quote(thread, log, pcrs=(5, 10))).start == 0
        else:
            with pytest.raises(TpmError, match="another process extends"):
                await _quote(thread, log, pcrs=(5, 10))


async def test_an_entry_is_measured_when_it_is_in_both_logs(swtpm, tmp_path):
    """An entry goes to both logs, in their own PCRs; where the mirror can't take it, nothing is measured."""
    async with _thread(swtpm) as thread:
        mirror = await _log(thread, tmp_path)
        log = await MeasurementLog.open(thread, tmp_path / "own", 14)
        log.mirror_to(mirror)
        await log.append(config_entry(CONFIG))
        values = await thread.call(lambda tpm: tpm.read_pcrs([10, 14]))
        for found, pcr in ((mirror, 10), (log, 14)):
            assert found.settled is not None
            assert found.settled.count == 2
            assert values[pcr] == found.settled.value
        await thread.call(lambda tpm: tpm.extend(10, b"another"))
        with pytest.raises(VerificationError, match="PCR 10"):
            await mirror.check()
        with pytest.raises(VerificationError, match="PCR 10"):
            await log.append(config_entry(CONFIG))
        assert log.settled is not None
        assert log.settled.count == 2
        await log.check()  # the node's own Evidence goes on


@pytest.mark.parametrize("pcr", [10, 14])
async def test_a_failure_between_the_logs_is_recovered(pcr, swtpm, tmp_path, monkeypatch):
    """An extend that fails in one of the logs measures nothing; both recover by themselves, and the mirror claims no less than the other."""
    extend = Tpm.extend

    def failing(self, index, data):
        if index == pcr:
            raise TpmError("TPM: refused")
        extend(self, index, data)

    async with _thread(swtpm) as thread:
        mirror = await _log(thread, tmp_path)
        log = await MeasurementLog.open(thread, tmp_path / "own", 14)
        log.mirror_to(mirror)
        monkeypatch.setattr(Tpm, "extend", failing)
        with pytest.raises(TpmError, match="refused"):
            await log.append(config_entry(CONFIG))
        monkeypatch.setattr(Tpm, "extend", extend)
    async with _thread(swtpm) as thread:  # another agent finds what this one left
        mirror = await _log(thread, tmp_path)
        log = await MeasurementLog.open(thread, tmp_path / "own", 14)
        await mirror.check()
        await log.check()
        assert mirror.settled is not None
        assert log.settled is not None
        assert (mirror.settled.count, log.settled.count) == ((2, 1) if pcr == 10 else (2, 2))
