"""The store watcher, on a real file system with real inotify."""

import asyncio
import contextlib
import os

import pytest

from agent.errors import HostError
from agent.host import watch as watch_module
from agent.host.watch import StoreWatcher


@contextlib.asynccontextmanager
async def watching(root, **options):
    """Yield a queue of reports."""
    reports: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
    watcher = StoreWatcher(
        root, lambda name, version: reports.put_nowait((name, version)), **({"settle_s": 0.02} | options)
    )
    task = asyncio.create_task(watcher.run())
    try:
        yield reports, watcher
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def package(root, name="cat", version="1", **files):
    directory = root / name / version
    directory.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (directory / file).write_text(content)
    return directory


async def settled(reports):
    """Wait for a first report, and take all that have come by the time it did."""
    found = {await reports.get()}
    while not reports.empty():
        found.add(reports.get_nowait())
    return found


@pytest.fixture
def store(tmp_path):
    package(tmp_path, "cat", "1", a="1", b="2")
    package(tmp_path, "dog", "7", a="1")
    (tmp_path / "dog" / "7" / "parts").mkdir()
    (tmp_path / "dog" / "7" / "parts" / "weights").write_text("1")
    (tmp_path / "loose").write_text("not a package")
    (tmp_path / "cat" / "loose").write_text("not a package")
    return tmp_path


async def test_each_kind_of_change_names_its_package(store):
    """A file changed, added, removed, renamed, or a whole package that comes or goes: its name and version, and no other's."""
    async with watching(store) as (reports, _):
        (store / "cat/1/a").write_text("other")
        assert await settled(reports) == {("cat", "1")}
        (store / "dog/7/new").write_text("x")
        assert await settled(reports) == {("dog", "7")}
        (store / "cat/1/b").unlink()
        assert await settled(reports) == {("cat", "1")}
        (store / "dog/7/new").rename(store / "dog/7/newer")
        assert await settled(reports) == {("dog", "7")}
        package(store, "fox", "2", a="1")
        assert await settled(reports) == {("fox", "2")}
        (store / "dog/7/parts/weights").write_text("other")
        assert await settled(reports) == {("dog", "7")}
        (store / "fox/2/a").unlink()
        (store / "fox/2").rmdir()
        assert ("fox", "2") in await settled(reports)
        (store / "cat").rename(store / "lynx")
        assert await settled(reports) == {("cat", "1"), ("lynx", "1")}


async def test_a_change_that_keeps_size_and_mtime_is_seen(store):
    """Content swapped for as many bytes, with the old time put back, still has another ctime."""
    async with watching(store) as (reports, _):
        path = store / "cat/1/a"
        before = path.stat()
        path.write_text("9")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert await settled(reports) == {("cat", "1")}


async def test_many_writes_are_one_report(store):
    """A file that is written piece by piece is reported once it is quiet."""
    async with watching(store, settle_s=0.2) as (reports, _):
        for n in range(10):
            (store / "cat/1/a").write_text("x" * n)
            await asyncio.sleep(0.01)
        await reports.get()
        await asyncio.sleep(0.3)
        assert reports.qsize() < 5


async def test_a_store_that_never_rests_is_reported_all_the_same(store, monkeypatch):
    """Someone who writes for ever can't keep a change from being seen."""
    monkeypatch.setattr(watch_module, "MAX_SETTLE_S", 0.05)
    async with watching(store, settle_s=0.04) as (reports, _):
        while reports.empty():
            (store / "cat/1/a").write_text("x")
            await asyncio.sleep(0.005)


async def test_without_a_single_event_the_rescan_finds_the_change(store, monkeypatch):
    """Events may all be lost, as after an overflow: the comparison finds what changed."""
    monkeypatch.setattr(watch_module._Hint, "on_any_event", lambda *_: None)
    async with watching(store, rescan_s=0.05) as (reports, _):
        for content in ("other", "another"):
            (store / "cat/1/a").write_text(content)
            (store / "dog/7/a").write_text(content)
            assert await settled(reports) == {("cat", "1"), ("dog", "7")}


async def test_a_change_before_the_start_is_reported(store):
    """What changes between making the watcher and running it is not missed."""
    reports: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
    watcher = StoreWatcher(store, lambda name, version: reports.put_nowait((name, version)))
    (store / "dog/7/a").write_text("other")
    task = asyncio.create_task(watcher.run())
    assert await reports.get() == ("dog", "7")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_reading_a_package_reports_nothing(store):
    """The agent's own reading of the store is no change."""
    async with watching(store) as (reports, _):
        (store / "cat/1/a").read_text()
        (store / "dog/7/a").write_text("other")
        assert await settled(reports) == {("dog", "7")}


async def test_a_store_that_is_not_there_is_an_error(tmp_path):
    """A missing store has no packages when the watcher is made, and can't be watched; a file in its place can't be read."""
    watcher = StoreWatcher(tmp_path / "missing", lambda *_: None)
    with pytest.raises(HostError, match="can't watch"):
        await watcher.run()
    (tmp_path / "file").write_text("x")
    with pytest.raises(HostError, match="can't read"):
        StoreWatcher(tmp_path / "file", lambda *_: None)


async def test_a_store_beyond_the_limits_is_an_error(store, monkeypatch):
    """Too many files end in an error and not in an endless scan."""
    monkeypatch.setattr(watch_module, "MAX_STORE_FILES", 3)
    with pytest.raises(HostError, match="more than 3 files"):
        StoreWatcher(store, lambda *_: None)


async def test_what_can_not_be_looked_at_is_no_reason_to_stop(store, monkeypatch):
    """A package nested without end, a crowd of files, a closed folder and a store beyond its limit: the others are reported."""
    async with watching(store, rescan_s=0.05) as (reports, _):
        (store / "deep/1" / "/".join("d" * 20)).mkdir(parents=True)
        (store / "deep/1/a").write_text("1")
        assert await settled(reports) == {("deep", "1")}
        real = watch_module._entries

        def closed(directory):
            if directory.name == "9":
                raise PermissionError(13, "Permission denied", "9")
            return real(directory)

        monkeypatch.setattr(watch_module, "_entries", closed)
        package(store, "closed", "9", a="1")
        assert await settled(reports) == {("closed", "9")}
        monkeypatch.setattr(watch_module, "MAX_STORE_FILES", 1)
        await asyncio.sleep(0.2)
        monkeypatch.undo()
        (store / "dog/7/a").write_text("other")
        assert ("dog", "7") in await settled(reports)


async def test_a_file_that_vanishes_during_the_scan_is_just_gone(store, monkeypatch):
    """Between listing and looking a file may go away."""
    real = watch_module._entries

    def vanishing(directory):
        entries = real(directory)
        (store / "cat/1/b").unlink(missing_ok=True)
        return entries

    listing = real(store / "cat/1")
    monkeypatch.setattr(
        watch_module, "_entries", lambda directory: listing if directory.name == "1" else vanishing(directory)
    )
    StoreWatcher(store, lambda *_: None)
