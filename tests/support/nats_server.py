"""A real NATS server with JetStream on a private loopback port."""

import signal
import socket
import subprocess
import time
from pathlib import Path

__all__ = ["NatsServer"]

START_TIMEOUT_S = 20


class NatsServer:
    """Can be stopped and started again; it keeps its port and its streams."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it and wait until it takes connections."""
        with (self._directory / "nats.log").open("ab") as log:
            # fmt: off
            self._process = subprocess.Popen(
                ["nats-server", "-a", "127.0.0.1", "-p", str(self.port), "-js", "-sd", self._directory / "jetstream"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )
            # fmt: on
        end = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                self.stop()
                raise AssertionError(f"nats-server did not start: {(self._directory / 'nats.log').read_text()[-2000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Kill it, as a crash would."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex(("127.0.0.1", self.port)) == 0
