"""A private PostgreSQL server: Debian's binaries, a Unix socket in a directory of its own, no port.

PostgreSQL refuses to run as root, so there it runs as ``postgres`` or ``nobody``. Its data is thrown away, hence no fsync, unless somebody measures.
"""

import contextlib
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["PostgresServer", "binaries", "postgres_server"]

SUPERUSER = "edgewarden"
START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 30
_PACKAGES = Path("/usr/lib/postgresql")


def binaries() -> Path | None:
    """Return the directory of the newest installed server's programs, if there is one."""
    found = sorted(_PACKAGES.glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


class PostgresServer:
    """A server that can be stopped and started again; it keeps its data meanwhile. ``options`` and ``port`` hold from the next start."""

    def __init__(self, programs: Path, directory: Path) -> None:
        self.programs = programs
        self.directory = directory
        self.options: tuple[str, ...] = ()
        self.port = 5432
        self._names = (f"test_{number}" for number in itertools.count())
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the running server, the parent of the others."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until it takes connections."""
        with (self.directory / "server.log").open("ab") as log:
            # fmt: off
            self._process = subprocess.Popen(
                [self.programs / "postgres", "-D", self.directory / "data", "-k", self.directory, "-c", "listen_addresses=", "-p", str(self.port), "-F", *self.options],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.directory, **_unprivileged(),
            )
            # fmt: on
        end = time.monotonic() + START_TIMEOUT_S
        while self._program("pg_isready", "-q", check=False).returncode != 0:
            if self._process.poll() is not None or time.monotonic() > end:
                log_text = (self.directory / "server.log").read_text()
                self.stop()
                raise AssertionError(f"PostgreSQL did not start: {log_text[-2000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """End it at once, as a crash would; connections break."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(STOP_TIMEOUT_S)
            self._process = None

    def create_database(self) -> str:
        """Make an empty database and return its SQLAlchemy URL."""
        name = next(self._names)
        self._program("createdb", name)
        return f"postgresql+asyncpg://{SUPERUSER}@/{name}?host={self.directory}"

    def _program(self, name: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [self.programs / name, "-h", self.directory, "-p", str(self.port), "-U", SUPERUSER, *arguments],
            check=check,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=START_TIMEOUT_S,
            cwd=self.directory,
        )


@contextlib.contextmanager
def postgres_server(programs: Path, *, durable: bool = False) -> Iterator[PostgresServer]:
    """Make a cluster in a new directory, run it, and remove everything at the end."""
    # Not pytest's directory: another user can't enter that, and a socket's path must be short.
    directory = Path(tempfile.mkdtemp(prefix="edgewarden-postgres-"))
    try:
        if os.geteuid() == 0:
            user = _user()
            os.chown(directory, user.pw_uid, user.pw_gid)
        # fmt: off
        subprocess.run(
            [programs / "initdb", "-D", directory / "data", "-U", SUPERUSER, "-A", "trust", "-E", "UTF8", "--locale=C", "-N"],
            check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=START_TIMEOUT_S, cwd=directory, **_unprivileged(),
        )
        # fmt: on
        server = PostgresServer(programs, directory)
        if durable:
            server.options = ("-c", "fsync=on")
        try:
            server.start()
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(directory)


def _unprivileged() -> dict[str, Any]:
    if os.geteuid() != 0:
        return {}
    user = _user()
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _user() -> pwd.struct_passwd:
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")
