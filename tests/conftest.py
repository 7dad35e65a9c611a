"""One hypothesis profile for all tests, PostgreSQL, and what happens where there is no OPA."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.postgres import PostgresServer, binaries, postgres_server

OPA = Path(__file__).resolve().parent.parent / ".cache" / "bin" / "opa"
_NAMES_OF_OPA = {"OPA", "opa", "opa_server"}

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # noqa: TID251 -- must stand before any test imports onnxruntime
os.environ["RUST_BACKTRACE"] = "0"  # noqa: TID251 -- as in every child: a back trace with each error of a policy takes minutes in all
# The same examples in each run, and no deadline on a shared machine.
settings.register_profile("edgewarden", deadline=None, derandomize=True)
settings.load_profile("edgewarden")


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Skip the tests of modules that use OPA where it could not be built; never in CI."""
    if OPA.exists():
        return
    if os.environ.get("CI"):  # noqa: TID251 -- as above
        raise pytest.UsageError(f"{OPA} is missing: in CI the tests against OPA must run (make opa)")
    for item in items:
        if _NAMES_OF_OPA & vars(item.module).keys():
            item.add_marker(pytest.mark.skip(reason="there is no OPA; make opa builds it"))


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """Run a private PostgreSQL; whoever stops it starts it again."""
    programs = binaries()
    if programs is None:
        if os.environ.get("CI"):  # noqa: TID251 -- as above
            pytest.fail("there is no PostgreSQL: in CI the tests against it must run (Debian's package postgresql)")
        pytest.skip("there is no PostgreSQL; Debian's package postgresql has it")
    with postgres_server(programs) as server:
        yield server


@pytest.fixture
def postgres_url(postgres: PostgresServer) -> str:
    """Return the SQLAlchemy URL of an empty database of the test's own."""
    return postgres.create_database()
