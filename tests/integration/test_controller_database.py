"""The controller's way to PostgreSQL over a network: verified TLS, and no right but what the rows need."""

import asyncio
import os
import socket

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric import ec

from agent.errors import ConfigError
from controller.cli import service
from controller.settings import DatabaseSettings
from controller.store.database import Database, StoreError
from tests.support.controller import Ca, key_pem, pem
from tests.support.controller_service import controller_home, desk
from tests.support.postgres import binaries, postgres_server
from tests.support.software_node import SoftwareNode, Vendor

pytestmark = pytest.mark.integration
VENDOR = Vendor()


@pytest.fixture(scope="module")
def ca():
    return Ca("Database CA")


@pytest.fixture(scope="module")
def server(ca):
    """A PostgreSQL on a port of loopback, with a certificate for localhost and a role that has a password."""
    programs = binaries()
    if programs is None:
        pytest.skip("there is no PostgreSQL; Debian's package postgresql has it")
    with postgres_server(programs) as running:
        key = ec.generate_private_key(ec.SECP256R1())
        files = {
            "server.pem": pem(ca.issue(key.public_key(), "spiffe://x/controller")).encode(),
            "server.key": key_pem(key),
        }
        for name, data in files.items():
            path = running.directory / name
            path.write_bytes(data)
            path.chmod(0o600)
            if os.geteuid() == 0:
                owner = running.directory.stat()
                os.chown(path, owner.st_uid, owner.st_gid)
        with socket.create_server(("127.0.0.1", 0)) as free:
            running.port = free.getsockname()[1]
        yield running


def _start(server, *, tls):
    server.stop()
    server.options = ("-c", "listen_addresses=127.0.0.1", "-c", f"ssl={'on' if tls else 'off'}")
    server.options += (
        "-c",
        f"ssl_cert_file={server.directory}/server.pem",
        "-c",
        f"ssl_key_file={server.directory}/server.key",
    )
    server.start()


def _settings(server, ca_file, host="localhost"):
    return DatabaseSettings(url=f"postgresql+asyncpg://edgewarden@{host}:{server.port}/postgres", ca=ca_file)


@pytest.fixture
def ca_file(ca, tmp_path):
    path = tmp_path / "ca.pem"
    path.write_text(pem(ca.root))
    return str(path)


async def test_a_verified_server_is_used(server, ca_file):
    """By its name and the operator's CA; the connection is encrypted."""
    _start(server, tls=True)
    database = await Database.open(_settings(server, ca_file))
    async with database.begin() as connection:
        found = await connection.exec_driver_sql("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
        assert found.scalar_one() is True
    await database.close()


async def test_another_server_is_not_spoken_to(server, ca_file, tmp_path):
    """A certificate of another CA, or for another name, ends the connection before anything is sent over it."""
    _start(server, tls=True)
    other = tmp_path / "other.pem"
    other.write_text(pem(Ca("Somebody's CA").root))
    for settings in (_settings(server, str(other)), _settings(server, ca_file, host="127.0.0.1")):
        with pytest.raises(StoreError, match="certificate verify failed"):
            await Database.open(settings)


async def test_a_server_without_tls_is_not_spoken_to(server, ca_file):
    """Where a CA is named, there is no way back to plain text."""
    _start(server, tls=False)
    with pytest.raises(StoreError, match="rejected SSL"):
        await Database.open(_settings(server, ca_file))


async def test_a_ca_that_is_none_is_a_clear_error(server, tmp_path):
    """A file that is missing or holds no certificate is named with its setting."""
    (tmp_path / "empty.pem").write_text("no certificate\n")
    for name in ("none.pem", "empty.pem"):
        with pytest.raises(ConfigError, match=r"database\.ca: .*" + name):
            await Database.open(_settings(server, str(tmp_path / name)))


async def test_a_role_that_may_change_rows_alone_is_enough(postgres, tmp_path):
    """A role without any right to the tables' form runs the controller, once their owner has made them; before that it is refused."""
    url = postgres.create_database()
    name = f"rows_{url.rpartition('/test_')[2].partition('?')[0]}"
    rows = url.replace("edgewarden@", f"{name}@")
    owner = await Database.open(DatabaseSettings(url=url))
    async with owner.begin() as connection:
        await connection.exec_driver_sql(f"CREATE ROLE {name} LOGIN")
    with pytest.raises(StoreError, match="permission denied"):
        await Database.open(DatabaseSettings(url=rows))
    async with owner.begin() as connection:
        await connection.exec_driver_sql(
            f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {name}"
        )
        await connection.exec_driver_sql(f"REVOKE UPDATE, DELETE ON audit, audit_nodes FROM {name}")
        await connection.exec_driver_sql(f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {name}")
    await owner.close()
    config = await asyncio.to_thread(controller_home, tmp_path, VENDOR.pem(), "--database", rows)
    async with desk(config) as office:
        await office.approve()
        await SoftwareNode(vendor=VENDOR).enrol(office.anyone, office.url, await office.token())
        assert (await office.node("edge-1"))["status"] == "affirming"
        assert len(await office.records("node.enrol")) == 1
    database = await Database.open(DatabaseSettings(url=rows))
    for statement, words in (
        ("DROP TABLE audit", "must be owner"),
        ("DELETE FROM audit", "permission denied"),
        ("UPDATE audit SET record = 'x'", "permission denied"),
        ("UPDATE audit_nodes SET hash = 'x'", "permission denied"),
        ("CREATE TABLE more (id int)", "permission denied"),
    ):
        with pytest.raises(StoreError, match=words):
            async with database.begin() as connection:
                await connection.exec_driver_sql(statement)
    await database.close()


def test_the_tables_can_be_brought_up_to_date_by_themselves(tmp_path):
    """`controller migrate` makes what is missing and changes nothing the second time."""
    config = controller_home(tmp_path, VENDOR.pem())
    (config.parent / "controller.db").unlink()
    for _ in range(2):
        outcome = CliRunner().invoke(service.command, ["migrate", "--config", str(config)], catch_exceptions=False)
        assert (outcome.exit_code, outcome.output) == (0, "the tables are those of this version\n")
