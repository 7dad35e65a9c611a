"""The Verifier and fleet controller: its own trust domain, never on a node."""

__version__ = "0.1.0"
