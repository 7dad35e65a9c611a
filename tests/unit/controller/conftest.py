"""What the tests of the controller's rooms share."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from controller.settings import DatabaseSettings
from controller.store.database import Database


@pytest.fixture(params=["sqlite", "postgresql"])
async def database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    """An empty database of each kind."""
    if request.param == "sqlite":
        settings = DatabaseSettings(url=f"sqlite+aiosqlite:///{tmp_path / 'controller.db'}")
    else:
        settings = DatabaseSettings(url=request.getfixturevalue("postgres_url"))
    opened = await Database.open(settings)
    yield opened
    await opened.close()
