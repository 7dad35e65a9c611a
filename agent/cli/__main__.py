"""``python -m agent.cli``: the command line without an installed script."""

from agent.cli.main import main

main()
