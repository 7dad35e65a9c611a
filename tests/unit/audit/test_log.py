"""The log in the event loop: what strict and buffered promise, and what failure means."""

import asyncio
import errno
import os

import pytest

from agent.audit import committer as committer_module
from agent.audit import log as log_module
from agent.audit.journal import Journal
from agent.audit.log import AuditLog
from agent.audit.merkle import leaf_hash, tree_root
from agent.audit.reader import tail, verify_log
from agent.audit.record import encode_event
from agent.errors import AuditError, ConfigError
from tests.support.audit import SMALL, event, head_of


@pytest.fixture
def faulty(monkeypatch):
    """Return a dict; while it has ``error``, the disk answers every sync with it."""
    plan: dict[str, int] = {}
    real = os.fdatasync

    def fdatasync(fd):
        if "error" in plan:
            raise OSError(plan["error"], os.strerror(plan["error"]))
        real(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    monkeypatch.setattr(committer_module, "RETRY_INTERVAL_S", 0.02)
    return plan


async def opened(directory, **options):
    return await AuditLog.open(directory / "log", "node-1", **({"space": SMALL} | options))


def kinds(directory):
    return [head_of(record).kind for record in tail(directory / "log", 10**6)]


async def until(condition):
    while not condition():  # noqa: ASYNC110 -- the condition is a fact of the log, not an event
        await asyncio.sleep(0.005)


async def test_strict_acknowledges_what_is_durable(tmp_path):
    """Each future gives its record's number, in order; when it is done, a reader finds the record, and the head covers it."""
    log = await opened(tmp_path)
    assert await log.append(event(0)) == 0
    assert [head_of(record).seq for record in tail(tmp_path / "log", 9)] == [0]
    assert await asyncio.gather(*[log.append_encoded(encode_event(event(n))) for n in range(1, 300)]) == list(
        range(1, 300)
    )
    assert log.size() == log.head().size == 300
    assert log.root() == log.head().root == tree_root(map(leaf_hash, tail(tmp_path / "log", 300)))
    assert log.durable
    await log.close()
    assert verify_log(tmp_path / "log").size == 300


async def test_one_commit_takes_what_came_meanwhile(tmp_path, monkeypatch):
    """While one commit waits for the disk, all further records gather for a single next one."""
    log = await opened(tmp_path)
    sizes = []
    real = Journal.commit

    def counting(journal, events):
        sizes.append(len(events))
        return real(journal, events)

    monkeypatch.setattr(Journal, "commit", counting)
    await asyncio.gather(*[log.append(event(n)) for n in range(100)])
    assert max(sizes) == 100
    await log.close()


async def test_buffered_does_not_wait_and_syncs_in_its_interval(tmp_path):
    """A buffered append is done at once and has no number; the sync follows by itself, and a flush does not wait for it."""
    log = await opened(tmp_path, durability="buffered", sync_interval_s=0.05)
    done = log.append(event(0))
    assert done.done()
    assert done.result() is None
    assert log.size() == 0
    await until(lambda: log.size() == 1)
    log.append(event(1))
    log.append(event(2))
    assert (await log.flush()).size == 3
    log.append(event(3))
    await log.close()
    assert verify_log(tmp_path / "log").size == 4


async def test_buffered_writes_long_before_it_syncs(tmp_path):
    """Records reach the kernel, and so a reader, turn by turn, while the sync is still far away."""
    log = await opened(tmp_path, durability="buffered", sync_interval_s=600)
    for n in range(3):
        log.append(event(n))
        await until(lambda n=n: len(kinds(tmp_path)) == n + 1)
    assert log.size() == 0
    await log.close()
    assert verify_log(tmp_path / "log").size == 3


async def test_strict_fails_closed_and_recovers(tmp_path, faulty, monkeypatch):
    """While the disk fails, waiting records fail, new ones are refused at once and health says so; then all is well again."""
    attempts = []
    real = Journal.resume

    def counting(journal):
        attempts.append(real(journal))
        return attempts[-1]

    monkeypatch.setattr(Journal, "resume", counting)
    log = await opened(tmp_path)
    assert await log.append(event(0)) == 0
    faulty["error"] = errno.EIO
    waiting = [log.append(event(n)) for n in (1, 2)]
    waiting[1].cancel()
    with pytest.raises(AuditError, match="EIO"):
        await waiting[0]
    assert not log.durable
    with pytest.raises(AuditError, match="EIO"):
        log.append(event(3))
    for _ in range(2):
        with pytest.raises(AuditError, match="EIO"):
            await log.flush()
    await until(lambda: attempts == [False])
    del faulty["error"]
    await until(lambda: log.durable)
    assert await log.append(event(4)) == 2
    await log.close()
    assert kinds(tmp_path) == ["infer", "log.resumed", "infer"]


async def test_buffered_counts_what_it_loses(tmp_path, faulty):
    """While the disk fails, buffered appends go on; afterwards a record names exactly how many are missing."""
    log = await opened(tmp_path, durability="buffered", sync_interval_s=0.02)
    log.append(event(0))
    await log.flush()
    faulty["error"] = errno.EIO
    for n in range(1, 6):
        log.append(event(n))
    await until(lambda: not log.durable)
    for n in range(6, 9):
        log.append(event(n))
    del faulty["error"]
    await until(lambda: log.durable)
    await log.flush()
    log.append(event(9))
    await log.close()
    assert kinds(tmp_path) == ["infer", "log.resumed", "log.dropped", "infer"]
    dropped = head_of(next(tail(tmp_path / "log", 2)))
    assert dropped.detail == {"count": 8}
    assert verify_log(tmp_path / "log").ok


async def test_a_queue_that_is_full_refuses(tmp_path, monkeypatch):
    """When the disk does not keep up, strict refuses the next record and buffered counts it."""
    monkeypatch.setattr(log_module, "MAX_QUEUED_RECORDS", 2)
    log = await opened(tmp_path)
    waiting = [log.append(event(n)) for n in range(2)]
    with pytest.raises(AuditError, match="does not keep up"):
        log.append(event(2))
    assert await asyncio.gather(*waiting) == [0, 1]
    await log.close()
    log = await opened(tmp_path, durability="buffered")
    for n in range(4):
        log.append(event(n))
    await log.flush()
    await log.close()
    assert kinds(tmp_path) == ["infer"] * 4 + ["log.dropped"]


async def test_a_bad_event_is_refused_at_once(tmp_path):
    """An event that is not one never reaches the queue."""
    log = await opened(tmp_path)
    with pytest.raises(AuditError, match="refused"):
        log.append_encoded(b"{}")
    await log.close()
    assert verify_log(tmp_path / "log").size == 0


async def test_close_writes_what_is_queued_and_ends_everything(tmp_path):
    """Records and flushes under way are settled by a close; afterwards nothing is taken; closing twice is harmless."""
    log = await opened(tmp_path)
    running = asyncio.create_task(log.run())
    waiting = [log.append(event(n)) for n in range(5)]
    flushing = asyncio.create_task(log.flush())
    cancelled = asyncio.create_task(log.flush())
    await asyncio.sleep(0)
    cancelled.cancel()
    await log.close()
    await log.close()
    await running
    assert await asyncio.gather(*waiting) == list(range(5))
    assert (await flushing).size == 5
    assert not log.durable
    with pytest.raises(AuditError, match="closed"):
        log.append(event())
    with pytest.raises(AuditError, match="closed"):
        await log.flush()


async def test_an_error_in_the_thread_reaches_everybody(tmp_path, monkeypatch):
    """A programming error ends the thread: run() raises it, whoever waits gets an AuditError, nobody hangs."""
    log = await opened(tmp_path)

    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(Journal, "commit", broken)
    waiting = log.append(event())
    with pytest.raises(AuditError, match="ended"):
        await waiting
    with pytest.raises(ZeroDivisionError):
        await log.run()
    with pytest.raises(AuditError, match="closed"):
        log.append(event())
    with pytest.raises(ZeroDivisionError):
        await log.close()


@pytest.mark.parametrize("node", ["", "n" * 257])
async def test_a_node_needs_a_name(tmp_path, node):
    """A node without a name, or with an endless one, is a configuration error."""
    with pytest.raises(ConfigError):
        await AuditLog.open(tmp_path / "log", node)


async def test_the_defaults_open(tmp_path):
    """Without sizes the documented defaults hold: 16 MiB segments and strict."""
    log = await AuditLog.open(tmp_path / "log", "node-1")
    assert await log.append(event()) == 0
    assert (tmp_path / "log" / "00000000000000000000.seg").stat().st_size == 16 * 1024 * 1024
    await log.close()
