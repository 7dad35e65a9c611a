"""Reference Values that are held ready."""

import contextlib

import pytest

from agent.errors import PeerError
from controller.flows import appraising
from controller.flows.appraising import Appraiser
from controller.flows.approving import Approval, approve
from controller.metrics import Figures
from controller.trust.authority import Authority

DIGEST = "3" * 64


@pytest.fixture
def appraiser(tmp_path):
    Authority.create(tmp_path / "keys", "edgewarden.internal", ["localhost"])
    return Appraiser(Authority.load(tmp_path / "keys", "edgewarden.internal"), Figures())


async def test_versions_are_held_within_a_limit(database, appraiser, monkeypatch):
    """The one that was not used for longest goes first, and is read again when it is asked for."""
    monkeypatch.setattr(appraising, "MAX_CACHED_FILES", 250)
    for version in range(1, 4):
        models = {f"m/{version}/model.onnx": DIGEST}
        await approve(
            database,
            "g",
            Approval(policy=DIGEST, config=DIGEST, pcr=14 if version == 1 else None, models=models),
            "a",
            60,
        )
    reads = []

    @contextlib.asynccontextmanager
    async def connect():
        async with database.begin() as connection:
            reads.append(connection)
            yield connection

    asked = [1, 2, 1, 3, 1, 2]  # 2 gave way to 3
    found = [await appraiser.reference(connect, "g", version) for version in asked]
    assert [len(values.models) for values in found] == asked
    assert len(reads) == 4


async def test_a_version_that_is_not_there_is_named(database, appraiser):
    """And where nothing was approved yet, nothing is."""
    assert (await appraiser.reference(database.begin, "g", 0)).models == {}
    with pytest.raises(PeerError, match="version 7"):
        await appraiser.reference(database.begin, "g", 7)
