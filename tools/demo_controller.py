"""A controller beside the demo's node: made, started and stopped as an operator does it."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from tools.demo_node import ROOT, edgewarden
from tools.software_tpm import free_port

__all__ = ["DemoController"]

START_TIMEOUT_S = 60.0


@dataclass(slots=True)
class DemoController:
    """One controller on SQLite.

    Attributes:
        root: everything lies below it; ``admin`` in it is the first admin's access.
        vendor: directory with the CA certificates of the TPM's vendor.
    """

    root: Path
    vendor: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def config(self) -> Path:
        """The settings."""
        return self.root / "controller.yaml"

    @property
    def admin(self) -> Path:
        """The first admin's access, for ``--admin``."""
        return self.root / "admin"

    def prepare(self, interval_s: int = 1) -> None:
        """Make keys, database and settings; trust the software TPM's vendor."""
        listen = f"127.0.0.1:{free_port()}"
        url = f"https://localhost:{listen.rpartition(':')[2]}"
        edgewarden("controller", "init", self.root, "--url", url, "--listen", listen)
        settings = yaml.safe_load(self.config.read_text())
        certificates = "".join(path.read_text() for path in sorted(self.vendor.glob("*cert.pem")))
        (self.root / "vendor.pem").write_text(certificates)
        settings |= {"enrolment": {"ek_roots": ["vendor.pem"]}, "poll": {"interval_s": interval_s, "timeout_s": 5}}
        self.config.write_text(yaml.safe_dump(settings, sort_keys=False))

    def start(self) -> None:
        """Run it and wait until it serves."""
        path = self.root / "controller.log"
        with path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "agent.cli", "controller", "run", "--config", str(self.config)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while '"serving"' not in path.read_text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"the controller does not serve:\n{path.read_text()[-4000:]}")
            time.sleep(0.02)

    def stop(self) -> None:
        """End it."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(30)
            self.process = None
