"""Notices changes in the model store and names the package that changed.

Rules:

1. inotify (through ``watchdog``) only says *that* something happened; *what* happened is found by comparing the store with what
   was last seen: device, inode, size, mtime and ctime of every file. So a lost event, an overflown queue or a file system without
   inotify can delay a report, never lose one: a full comparison also runs every :data:`RESCAN_INTERVAL_S`.
2. A change is reported when the store has been quiet for :data:`SETTLE_S`, or after :data:`MAX_SETTLE_S` at the latest.
3. What can't be looked at (a package nested without end, a folder that is closed, a crowd of files) is no reason to stop watching the rest:
   who reads the package refuses it. A store that can't be read as a whole is said in the log and tried again.
4. This is a hint to load, never a reason to trust: what is loaded is read once, measured and verified then.
"""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import structlog
from watchdog.events import (
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileAttribEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer

from agent.clock import monotonic_us
from agent.errors import HostError

__all__ = ["MAX_STORE_FILES", "RESCAN_INTERVAL_S", "SETTLE_S", "StoreWatcher"]

SETTLE_S = 0.1
MAX_SETTLE_S = 2.0  # a store that never gets quiet
RESCAN_INTERVAL_S = 60.0
MAX_STORE_FILES = 100_000
MAX_PACKAGE_FILES = 4_096  # far more than a package may have: what comes after them decides nothing
MAX_DEPTH = 16  # directories below a package's version
_EVENTS: list[type[FileSystemEvent]] = [  # without those that reading causes
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileAttribEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
]

_log = structlog.get_logger(__name__)
_Package: TypeAlias = tuple[str, str]
_Prints: TypeAlias = dict[_Package, frozenset[tuple[str, int, int, int, int, int]]]


class _Hint(FileSystemEventHandler):
    def __init__(self, wake: Callable[[], object]) -> None:
        self._wake = wake

    def on_any_event(self, event: FileSystemEvent) -> None:
        del event  # what it says is found out by comparing
        self._wake()


class StoreWatcher:
    """Watches ``root/<name>/<version>/``.

    What the store looks like is taken when the watcher is made: make it before the packages are read, so that no change is missed
    in between.

    Args:
        root: the model store.
        on_change: called in the event loop with name and version of each package of which a file was added, removed or changed.
        settle_s: quiet time before a report.
        rescan_s: longest time between two comparisons.

    Raises:
        HostError: the store can't be read.
    """

    def __init__(
        self,
        root: Path,
        on_change: Callable[[str, str], None],
        *,
        settle_s: float = SETTLE_S,
        rescan_s: float = RESCAN_INTERVAL_S,
    ) -> None:
        self._root = root
        self._on_change = on_change
        self._settle_s = settle_s
        self._rescan_s = rescan_s
        self._hint = asyncio.Event()
        self._seen = _scan(root)

    async def run(self) -> None:
        """Watch until cancelled.

        Raises:
            HostError: the store can't be watched.
        """
        # watchdog warns when the kernel announces a directory that it has just found by itself; harmless, and as an error it would
        # end watchdog's thread.
        warnings.filterwarnings("ignore", "Callback with id", RuntimeWarning)
        loop = asyncio.get_running_loop()
        observer = Observer()
        try:
            observer.schedule(
                _Hint(lambda: loop.call_soon_threadsafe(self._hint.set)),
                str(self._root),
                recursive=True,
                event_filter=_EVENTS,
            )
            observer.start()
        except OSError as error:
            raise HostError(f"store: can't watch {self._root}: {error.strerror}") from error
        try:
            self._hint.set()  # the store may have changed since the watcher was made
            while True:
                await self._wait()
                await self._compare()
        finally:
            observer.stop()
            await asyncio.shield(asyncio.to_thread(observer.join))

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(self._rescan_s):
                await self._hint.wait()
        except TimeoutError:
            return
        latest_us = monotonic_us() + int(MAX_SETTLE_S * 1_000_000)
        while self._hint.is_set() and monotonic_us() < latest_us:
            self._hint.clear()
            await asyncio.sleep(self._settle_s)

    async def _compare(self) -> None:
        self._hint.clear()
        try:
            found = await asyncio.to_thread(_scan, self._root)
        except HostError as error:
            _log.error("store_unreadable", error=str(error))
            return
        before, self._seen = self._seen, found
        for name, version in _differences(before, found):
            self._on_change(name, version)


def _differences(before: Mapping[_Package, object], after: Mapping[_Package, object]) -> list[_Package]:
    return sorted(package for package in before.keys() | after.keys() if before.get(package) != after.get(package))


def _scan(root: Path) -> _Prints:
    prints: _Prints = {}
    count = 0
    try:
        for name in _entries(root):
            for version in _versions(name):
                if version.is_dir(follow_symlinks=False):
                    prints[name.name, version.name] = files = _fingerprint(version)
                    count += len(files)
                    if count > MAX_STORE_FILES:
                        raise HostError(f"store: more than {MAX_STORE_FILES} files")
    except OSError as error:
        raise HostError(f"store: can't read {error.filename}: {error.strerror}") from error
    return prints


def _entries(directory: Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
    """List a directory; one that went away meanwhile is empty."""
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except FileNotFoundError:
        return []


def _versions(name: os.DirEntry[str]) -> list[os.DirEntry[str]]:
    """List what may be versions; none where that is closed to this process, which then loads nothing of it either."""
    try:
        return _entries(name) if name.is_dir(follow_symlinks=False) else []
    except OSError as error:
        _log.warning("store_folder_unreadable", path=ascii(name.path), error=error.strerror)
        return []


def _fingerprint(version: os.DirEntry[str]) -> frozenset[tuple[str, int, int, int, int, int]]:
    """Return what tells a package from another state of itself; where it can't be read, that it can't."""
    try:
        return frozenset(islice(_files(version), MAX_PACKAGE_FILES))
    except OSError as error:
        return frozenset({(str(error.filename), error.errno or 0, 0, 0, 0, 0)})


def _files(directory: os.DirEntry[str], depth: int = 0) -> Iterator[tuple[str, int, int, int, int, int]]:
    """Yield what tells each file of a package from another state of itself, as deep as a package can be."""
    if depth > MAX_DEPTH:
        return
    for entry in _entries(directory):
        if entry.is_dir(follow_symlinks=False):
            yield from _files(entry, depth + 1)
            continue
        try:
            stat = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
        yield entry.path, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
