"""Rego engines end in the thread that made them: a reference cycle must not carry one into another module's threads."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def engines_end_here() -> Iterator[None]:
    """Collect a module's engines, which caught errors keep alive in cycles."""
    yield
    gc.collect()
