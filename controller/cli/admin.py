"""``edgewarden admin``: who may steer the controller."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import click
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from controller.cli.client import Client, admin_option, json_option, show_json, write_admin

__all__ = ["command"]

_DAY_S = 86_400


@click.group()
def command() -> None:
    """Admins of the controller: viewers see, operators enrol and release, approvers approve."""


@command.command()
@click.argument("name")
@click.option("--role", type=click.Choice(["viewer", "operator", "approver"]), required=True)
@click.option("--days", type=click.IntRange(1, 1096), default=90, show_default=True, help="Validity.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Directory to make.")
@admin_option
def create(*, name: str, role: str, days: int, out: Path, client: Client) -> None:
    """Make an admin; the key is made here and never leaves the directory."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    csr = base64.b64encode(request.public_bytes(serialization.Encoding.DER)).decode()
    body = {"name": name, "role": role, "csr": csr, "valid_s": days * _DAY_S}
    answer = client.call("POST", "/v1/admins", json.dumps(body).encode())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    url = (client.directory / "url").read_text().strip()
    write_admin(out, url=url, ca=answer["ca"], certificate=answer["certificate"], key=pem)
    click.echo(f"{out}: {name}, {role}, until {answer['expires']}")


@command.command("list")
@admin_option
@json_option
def list_(*, client: Client, as_json: bool) -> None:
    """List the admins."""
    rows = client.call("GET", "/v1/admins")
    if as_json:
        show_json(rows)
        return
    for row in rows:
        click.echo(f"{row['name']:<24} {row['role']:<10} {'revoked' if row['revoked'] else 'until ' + row['expires']}")


@command.command()
@click.argument("name")
@admin_option
def revoke(*, name: str, client: Client) -> None:
    """Take an admin's access away, at once."""
    client.call("DELETE", f"/v1/admins/{name}")
    click.echo(f"{name}: revoked")
