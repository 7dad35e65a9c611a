"""The control plane's process: composition root, what it needs from the disk, and the node that joins the flows."""

from agent.daemon.main import run

__all__ = ["run"]
