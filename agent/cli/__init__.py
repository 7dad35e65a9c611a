"""The command line. One module a verb; each exports a click command called ``command``.

Exit codes: 0 it holds; 1 a verification, appraisal or decision says no; 2 wrong usage; 3 the host, the configuration or a peer
stands in the way.
"""

from agent.cli.main import main

__all__ = ["main"]
