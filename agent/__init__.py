"""EdgeWarden: the security agent for edge nodes that run AI models."""

__version__ = "0.1.0"
__all__ = ["__version__"]
