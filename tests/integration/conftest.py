"""Fixtures that several integration tests share."""

from tests.support.node import node_home, running_node

__all__ = ["node_home", "running_node"]
