"""The measurement log against a TPM: crash, tampering, reset, and tools that know the format."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys

import pytest

from agent.attest import log as log_module
from agent.attest.log import MeasurementLog, TpmResetError, retire_logs
from agent.attest.measurement import (
    BOOT_AGGREGATE,
    config_entry,
    model_entry,
    parse_entries,
    policy_entry,
    refused_entry,
    replay,
)
from agent.attest.tpm import Tpm, TpmClearedError
from agent.attest.tpm_thread import TpmThread
from agent.errors import ConfigError, HostError, TpmError, VerificationError
from tests.support.attest import CONFIG, MODEL, POLICY
from tests.support.swtpm import SwTpm

pytestmark = pytest.mark.integration
PCR = 14
ENTRY = model_entry("m", "1", "model.onnx", MODEL)


@pytest.fixture
def swtpm(tmp_path):
    with SwTpm(tmp_path) as tpm:
        yield tpm


@contextlib.asynccontextmanager
async def _thread(swtpm, **options):
    thread = TpmThread(swtpm.tcti, **{"first_retry_s": 0.02} | options)
    try:
        yield thread
    finally:
        await thread.close()


async def _pcr(thread, pcr=PCR):
    return (await thread.call(lambda tpm: tpm.read_pcrs([pcr])))[pcr]


def _file(folder):
    return max(folder.glob("boot-*.ima"))


def _entries(folder):
    return list(parse_entries(_file(folder).read_bytes(), PCR))


async def test_the_log_and_the_pcr_agree(swtpm, tmp_path):
    """A new log begins with boot_aggregate; after each entry the PCR is what the file replays to; opening again continues."""
    folder = tmp_path / "log"
    async with _thread(swtpm) as thread:
        log = await MeasurementLog.open(thread, folder, PCR)
        assert log.settled is not None
        assert log.settled.count == 1
        now = log.settled
        for entry in (config_entry(CONFIG), policy_entry("r1", POLICY), ENTRY):
            now = await log.append(entry)
            assert await _pcr(thread) == now.value == replay(_entries(folder))
        again = await MeasurementLog.open(thread, folder, PCR)
        assert again.settled == now
        assert _entries(folder)[0].path == BOOT_AGGREGATE
        assert now.state.models == {"m/1/model.onnx": MODEL.hex()}


@pytest.mark.parametrize("pcr", [0, 7, 10, 16, 23, 24])
async def test_a_pcr_that_cannot_hold_the_log_is_refused(pcr, swtpm, tmp_path):
    """PCRs of the firmware, of the kernel, resettable ones and unknown ones are a ConfigError."""
    async with _thread(swtpm) as thread:
        with pytest.raises(ConfigError):
            await MeasurementLog.open(thread, tmp_path / "log", pcr)


async def test_evmctl_replays_the_log(swtpm, tmp_path):
    """ima-evm-utils reads our file and finds that it matches the PCRs, and that a changed one does not."""
    folder = tmp_path / "log"
    async with _thread(swtpm) as thread:
        log = await MeasurementLog.open(thread, folder, PCR)
        for entry in (config_entry(CONFIG), policy_entry("r1", POLICY), ENTRY, refused_entry("m", "1", "x/y", MODEL)):
            await log.append(entry)
        values = await thread.call(lambda tpm: tpm.read_pcrs(range(24)))
    pcrs = tmp_path / "pcrs"
    pcrs.write_text("".join(f"PCR-{index:02d}: {value.hex()}\n" for index, value in values.items()))

    def evmctl(path):
        return subprocess.run(
            ["evmctl", "ima_measurement", "--pcrs", f"sha256,{pcrs}", path], capture_output=True, text=True, check=False
        )

    ours = evmctl(_file(folder))
    assert ours.returncode == 0, ours.stdout + ours.stderr
    assert "Matched per TPM bank" in ours.stdout + ours.stderr
    forged = tmp_path / "forged"
    forged.write_bytes(b"".join(entry.encode(PCR) for entry in _entries(folder)[:-1]))
    assert evmctl(forged).returncode != 0


def _start_child(swtpm, folder, point):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.measuring_agent", swtpm.tcti, str(folder), point],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.parametrize(
    ("point", "kept"),
    [("before-write", 2), ("torn-write", 2), ("before-fsync", 3), ("before-extend", 3), ("after-extend", 3)],
)
async def test_a_killed_agent_leaves_a_log_that_recovers(point, kept, swtpm, tmp_path):
    """Killed at any step of an append, the log opens again, file and PCR agree, and it takes the next entry."""
    folder = tmp_path / "log"
    child = _start_child(swtpm, folder, point)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    async with _thread(swtpm) as thread:
        log = await MeasurementLog.open(thread, folder, PCR)
        entries = _entries(folder)
        assert len(entries) == kept
        assert await _pcr(thread) == replay(entries)
        await log.append(ENTRY)
        assert await _pcr(thread) == replay([*entries, ENTRY])


async def test_an_agent_killed_again_and_again_loses_nothing(swtpm, tmp_path):
    """Killed at arbitrary moments while it measures, no entry that was in the PCR is lost, and the log always opens."""
    folder = tmp_path / "log"
    for lines in (1, 4, 9):
        child = _start_child(swtpm, folder, "loop")
        assert child.stdout is not None
        for _ in range(lines):
            child.stdout.readline()
        child.kill()
        child.communicate()
        async with _thread(swtpm) as thread:
            log = await MeasurementLog.open(thread, folder, PCR)
            assert log.settled is not None
            assert await _pcr(thread) == log.settled.value == replay(_entries(folder))


def _drop_two(data):
    entries = list(parse_entries(data, PCR))[:-2]
    return b"".join(entry.encode(PCR) for entry in entries)


@pytest.mark.parametrize(
    "change",
    [
        lambda _: b"",
        _drop_two,
        lambda data: data + ENTRY.encode(PCR) * 2,
        lambda data: data.replace(b"model.onnx", b"model.onny"),
        lambda data: data[:-1] + b"x",
    ],
)
async def test_a_log_that_was_changed_stops_everything(change, swtpm, tmp_path):
    """A file that differs from the PCR by more than one pending entry is tampering: it neither opens nor is repaired."""
    folder = tmp_path / "log"
    async with _thread(swtpm) as thread:
        log = await MeasurementLog.open(thread, folder, PCR)
        await log.append(config_entry(CONFIG))
        await log.append(ENTRY)
        value = await _pcr(thread)
        path = _file(folder)
        path.write_bytes(change(path.read_bytes()))
        with pytest.raises(VerificationError):
            await MeasurementLog.open(thread, folder, PCR)
        assert await _pcr(thread) == value


async def test_a_log_that_grew_behind_the_agent_takes_no_entry(swtpm, tmp_path):
    """An append looks at the file's size first: nothing is added after what the agent did not write."""
    folder = tmp_path / "log"
    async with _thread(swtpm) as thread:
        log = await MeasurementLog.open(thread, folder, PCR)
        value = await _pcr(thread)
        with _file(folder).open("ab") as file:
            file.write(ENTRY.encode(PCR) * 2)
        for _ in range(2):
            with pytest.raises(VerificationError) as raised:
                await log.append(ENTRY)
            assert raised.value.check == "measurement-log"
        assert await _pcr(thread) == value


async def test_a_foreign_extend_stops_everything(swtpm, tmp_path):
    """An extend of our PCR by someone else is tampering, found at the next recovery."""
    folder = tmp_path / "log"
    async with _thread(swtpm) as thread:
        await MeasurementLog.open(thread, folder, PCR)
        await thread.call(lambda tpm: tpm.extend(PCR, b"foreign"))
        with pytest.raises(VerificationError) as raised:
            await MeasurementLog.open(thread, folder, PCR)
        assert raised.value.check == "measurement-log"


async def test_an_empty_log_needs_the_approved_start_value(swtpm, tmp_path):
    """A PCR that someone extended before the log is refused, unless an operator approved just that value."""
    async with _thread(swtpm) as thread:
        await thread.call(lambda tpm: tpm.extend(PCR, b"shim"))
        with pytest.raises(VerificationError) as raised:
            await MeasurementLog.open(thread, tmp_path / "a", PCR)
        assert raised.value.check == "measurement-log"
        start = await _pcr(thread)
        log = await MeasurementLog.open(thread, tmp_path / "b", PCR, start)
        assert log.settled is not None
        assert await _pcr(thread) == log.settled.value


class _Contended(Tpm):
    """A TPM where someone else extends the PCR just after it was recovered."""

    def extend(self, pcr, data):
        super().extend(pcr, b"foreign")
        super().extend(pcr, data)


async def test_an_extend_during_recovery_is_noticed(swtpm, tmp_path):
    """Recovery reads the PCR again after the pending entry."""
    folder = tmp_path / "log"
    async with _thread(swtpm) as thread:
        await MeasurementLog.open(thread, folder, PCR)
    with _file(folder).open("ab") as file:
        file.write(ENTRY.encode(PCR))
    async with _thread(swtpm) as thread:
        thread._connect = lambda: _Contended(swtpm.tcti)
        with pytest.raises(VerificationError, match="while it was recovered"):
            await MeasurementLog.open(thread, folder, PCR)


async def test_a_hung_tpm_does_not_extend_twice(swtpm, tmp_path):
    """An extend that ran out of time and takes effect later is recognised, not repeated."""
    folder = tmp_path / "log"
    async with _thread(swtpm, call_timeout_s=0.5, connect_timeout_s=0.5) as thread:
        log = await MeasurementLog.open(thread, folder, PCR)
        swtpm.stop()
        with pytest.raises(TpmError):
            await log.append(ENTRY)
        assert log.settled is None
        with pytest.raises(TpmError, match="may still take effect"):
            await log.append(config_entry(CONFIG))
        swtpm.resume()
        now = await _settled(log, config_entry(CONFIG))
        assert await _pcr(thread) == now.value == replay(_entries(folder))


async def _settled(log, entry):
    while True:
        try:
            return await log.append(entry)
        except TpmError:
            await asyncio.sleep(0.02)


async def test_a_reboot_starts_a_new_log_and_keeps_the_old(swtpm, tmp_path):
    """A greater resetCount has its own file; the running log refuses to go on until it is opened again."""
    folder = tmp_path / "log"
    async with _thread(swtpm) as thread:
        log = await MeasurementLog.open(thread, folder, PCR)
        await log.append(ENTRY)
        old = _file(folder)
        kept = old.read_bytes()
        swtpm.reboot()
        with pytest.raises(TpmResetError):
            await log.append(config_entry(CONFIG))
        with pytest.raises(TpmResetError):
            await log.append(config_entry(CONFIG))
        again = await MeasurementLog.open(thread, folder, PCR)
        await again.append(config_entry(CONFIG))
        assert old.read_bytes() == kept
        assert _file(folder) != old
        assert again.settled is not None
        assert again.settled.count == 2


async def test_a_reset_count_that_falls_means_cleared(swtpm, tmp_path):
    """After TPM2_Clear the log does not open until its old files are put aside."""
    folder = tmp_path / "log"
    swtpm.reboot()
    async with _thread(swtpm) as thread:
        await MeasurementLog.open(thread, folder, PCR)
    swtpm.clear()
    swtpm.reboot()
    async with _thread(swtpm) as thread:
        with pytest.raises(TpmClearedError, match="enrol"):
            await MeasurementLog.open(thread, folder, PCR)
        retire_logs(folder, 1)
        log = await MeasurementLog.open(thread, folder, PCR)
        assert log.settled is not None
        assert [path.parent.name for path in folder.glob("*/*.ima")] == ["retired-1"]


async def test_old_logs_are_kept_up_to_a_number(swtpm, tmp_path, monkeypatch):
    """Of the logs of earlier boots the newest are kept."""
    monkeypatch.setattr(log_module, "KEPT_BOOTS", 2)
    folder = tmp_path / "log"
    for _ in range(4):
        async with _thread(swtpm) as thread:
            await MeasurementLog.open(thread, folder, PCR)
        swtpm.reboot()
    assert [path.name for path in sorted(folder.iterdir())] == [f"boot-{at:010d}.ima" for at in (2, 3, 4)]


async def test_a_foreign_file_in_the_folder_is_refused(swtpm, tmp_path):
    """A name that only looks like ours is not skipped in silence."""
    (tmp_path / "boot-x.ima").touch()
    async with _thread(swtpm) as thread:
        with pytest.raises(VerificationError):
            await MeasurementLog.open(thread, tmp_path, PCR)


async def test_a_check_finds_what_happened_behind_the_agent(swtpm, tmp_path):
    """A log that agrees passes; after a stranger's extend it is settled no more, and takes no entry."""
    async with _thread(swtpm) as thread:
        log = await MeasurementLog.open(thread, tmp_path, PCR)
        await log.check()
        assert log.settled is not None
        await thread.call(lambda tpm: tpm.extend(PCR, bytes(32)))
        with pytest.raises(VerificationError, match="someone else extended it"):
            await log.check()
        assert log.settled is None
        with pytest.raises(VerificationError, match="measurement-log"):
            await log.append(ENTRY)


async def test_a_check_finds_a_reset_under_the_agent(swtpm, tmp_path):
    """A TPM that was reset is named as such, not as a stranger's extend."""
    async with _thread(swtpm) as thread:
        log = await MeasurementLog.open(thread, tmp_path, PCR)
        swtpm.reboot()
        with pytest.raises(TpmResetError, match="reset under"):
            await log.check()


async def test_a_full_log_takes_no_entry(swtpm, tmp_path, monkeypatch):
    """At the limit of a boot nothing more is measured, so nothing more loads; a larger file is not read."""
    folder = tmp_path / "log"
    async with _thread(swtpm) as thread:
        log = await MeasurementLog.open(thread, folder, PCR)
        with monkeypatch.context() as limited:
            limited.setattr(log_module, "MAX_LOG_ENTRIES", 1)
            with pytest.raises(HostError, match="full"):
                await log.append(ENTRY)
        await log.append(ENTRY)
        monkeypatch.setattr(log_module, "MAX_LOG_BYTES", 10)
        with pytest.raises(HostError, match="full"):
            await log.append(ENTRY)
        with pytest.raises(VerificationError, match="over"):
            await MeasurementLog.open(thread, folder, PCR)


async def test_a_disk_that_fails_measures_nothing(swtpm, tmp_path):
    """A file that can't be written, read or made is a HostError, and the PCR stays as it was."""
    folder = tmp_path / "log"
    async with _thread(swtpm) as thread:
        log = await MeasurementLog.open(thread, folder, PCR)
        assert log.settled is not None
        now = log.settled
        path = _file(folder)
        path.rename(tmp_path / "away")
        with pytest.raises(HostError, match="No such file"):
            await log.append(ENTRY)
        with pytest.raises(HostError, match="No such file"):
            log.read(now, 0)
        assert await _pcr(thread) == now.value
        (tmp_path / "file").touch()
        with pytest.raises(HostError, match=r"Not a directory|exists"):
            await MeasurementLog.open(thread, tmp_path / "file", PCR)


async def test_a_full_disk_is_survived(swtpm, tmp_path, monkeypatch):
    """A write that fits only in part fails the measurement; the rest is cut off and the log goes on."""
    folder = tmp_path / "log"
    real = os.write
    async with _thread(swtpm) as thread:
        log = await MeasurementLog.open(thread, folder, PCR)
        with monkeypatch.context() as full:
            full.setattr(os, "write", lambda fd, data: real(fd, data[:40]) if len(data) > 100 else real(fd, data))
            with pytest.raises(HostError, match="full"):
                await log.append(ENTRY)
        now = await log.append(ENTRY)
        assert await _pcr(thread) == now.value == replay(_entries(folder))


async def test_a_cancelled_append_leaves_a_log_that_goes_on(swtpm, tmp_path):
    """Who is cancelled in the middle of a measurement leaves file and PCR in agreement for the next."""
    folder = tmp_path / "log"
    async with _thread(swtpm) as thread:
        log = await MeasurementLog.open(thread, folder, PCR)
        for turns in range(6):
            task = asyncio.create_task(log.append(ENTRY))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        now = await log.append(config_entry(CONFIG))
        assert await _pcr(thread) == now.value == replay(_entries(folder))
