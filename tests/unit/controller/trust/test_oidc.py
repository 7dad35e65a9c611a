"""Tokens of an OpenID provider: who is believed, and as what."""

import asyncio
import base64
import contextlib
import json
import ssl

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from agent import clock
from agent.errors import HostError, PeerError
from controller.settings import OidcSettings
from controller.trust import oidc
from controller.trust.oidc import MAX_JWKS_BYTES, OidcReader
from tests.support.controller import Ca, key_pem, pem

EC = ec.generate_private_key(ec.SECP256R1())
RSA = rsa.generate_private_key(65537, 2048)
OTHER = ec.generate_private_key(ec.SECP256R1())


def _jwks():
    members = [
        {**json.loads(ECAlgorithm.to_jwk(EC.public_key())), "kid": "e", "alg": "ES256"},
        {**json.loads(RSAAlgorithm.to_jwk(RSA.public_key())), "kid": "r", "alg": "RS256"},
        {"kty": "oct", "k": "c2VjcmV0", "kid": "s", "alg": "HS256"},
    ]
    return json.dumps({"keys": members})


@pytest.fixture
def reader(tmp_path):
    (tmp_path / "jwks.json").write_text(_jwks())
    return OidcReader(
        OidcSettings(issuer="https://id.example", audience="edgewarden", jwks=str(tmp_path / "jwks.json"))
    )


def _token(key=EC, kid="e", algorithm="ES256", **changes):
    now = int(clock.now())
    claims = {"iss": "https://id.example", "aud": "edgewarden", "sub": "ada", "iat": now, "exp": now + 60}
    claims |= {"roles": ["approver", "else"]} | changes
    claims = {name: value for name, value in claims.items() if value is not None}
    return "Bearer " + jwt.encode(claims, key, algorithm=algorithm, headers={"kid": kid})


@pytest.mark.parametrize(("key", "kid", "algorithm"), [(EC, "e", "ES256"), (RSA, "r", "RS256")])
async def test_a_token_of_the_provider_names_an_admin_with_its_known_roles(reader, key, kid, algorithm):
    """Elliptic curves and RSA; a role that means nothing here is left out."""
    principal = await reader.read(_token(key, kid, algorithm))
    assert (principal.id, principal.kind, principal.roles) == ("oidc/ada", "jwt", ("approver",))


@pytest.mark.parametrize("roles", ["approver", None, [], [1]])
async def test_roles_that_are_no_list_of_names_are_none(reader, roles):
    """Nobody gets a role by its shape."""
    assert (await reader.read(_token(roles=roles))).roles == ()


@pytest.mark.parametrize(
    "token",
    [
        "Basic YWRhOng=",
        "Bearer",
        "Bearer " + "x" * 9000,
        "Bearer a.b.c",
        _token(OTHER),
        _token(kid="unknown"),
        _token("c2VjcmV0" * 8, "s", "HS256"),
        _token(RSA, "e", "RS256"),
        _token(iss="https://else.example"),
        _token(aud="another"),
        _token(exp=1),
        _token(exp=None),
        _token(sub=None),
        _token(sub=""),
        _token(sub="a\nb"),
        _token(sub="a" * 251),
        "Bearer \udcff.\udcff.\udcff",
        "Bearer \xe4.\xe4.\xe4",
        "Bearer " + base64.urlsafe_b64encode(b'{"alg":"ES256","kid":' + b"[" * 5000).decode() + ".e30.AAAA",
        "Bearer " + base64.urlsafe_b64encode(b'{"alg":"ES256","kid":["e"]}').decode() + ".e30.AAAA",
    ],
    ids=range(20),
)
async def test_what_is_no_token_for_this_controller_is_refused(reader, token):
    """Another scheme, size, key, algorithm, issuer, audience, time or subject: 401."""
    with pytest.raises(PeerError) as refusal:
        await reader.read(token)
    assert refusal.value.status == 401


@pytest.mark.parametrize("text", ["{", '{"keys": 1}', '{"keys": []}', " " * (MAX_JWKS_BYTES + 1)])
async def test_keys_that_can_t_be_read_are_the_host_s_fault(reader, tmp_path, text):
    """503, not 401: the token may well be good."""
    (tmp_path / "jwks.json").write_text(text)
    with pytest.raises(HostError, match=r"oidc\.jwks"):
        await reader.read(_token())


async def test_a_missing_file_and_a_silent_provider_are_the_host_s_fault(tmp_path):
    """As above."""
    for jwks in (str(tmp_path / "none.json"), "https://127.0.0.1:1/jwks.json"):
        reader = OidcReader(OidcSettings(issuer="i", audience="a", jwks=jwks))
        with pytest.raises(HostError, match=r"oidc\.jwks"):
            await reader.read(_token())


class Provider:
    """Serves its keys over TLS, in two pieces; counts who asks."""

    def __init__(self, folder):
        self.ca, self.folder = Ca(), folder
        self.status, self.document, self.asked = 200, _jwks().encode(), 0

    @contextlib.asynccontextmanager
    async def reader(self):
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self.ca.issue(key.public_key(), "spiffe://id.example/controller")  # names localhost
        (self.folder / "ca.pem").write_text(pem(self.ca.root))
        (self.folder / "both.pem").write_bytes(pem(certificate).encode() + key_pem(key))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.folder / "both.pem")
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0, ssl=context)
        async with server:
            jwks = f"https://localhost:{server.sockets[0].getsockname()[1]}/jwks.json"
            ca = str(self.folder / "ca.pem")
            yield OidcReader(OidcSettings(issuer="https://id.example", audience="edgewarden", jwks=jwks, ca=ca))

    async def _answer(self, reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        self.asked += 1
        head = f"HTTP/1.1 {self.status} Fine\r\nContent-Length: {len(self.document)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + self.document[:10])
        await writer.drain()
        await asyncio.sleep(0.2)
        writer.write(self.document[10:])
        writer.close()


async def test_keys_that_come_in_pieces_are_read_to_their_end(tmp_path):
    """However the network cuts the document."""
    async with Provider(tmp_path).reader() as reader:
        assert (await reader.read(_token())).id == "oidc/ada"


async def test_nobody_makes_the_controller_ask_the_provider_at_will(tmp_path, monkeypatch):
    """Unknown keys cost one question in ten seconds, also while the provider fails; keys that are known hold meanwhile."""
    provider = Provider(tmp_path)
    async with provider.reader() as reader:
        await reader.read(_token())
        for _ in range(3):
            with pytest.raises(PeerError, match="no key"):
                await reader.read(_token(kid="unknown"))
        assert provider.asked == 1
        monkeypatch.setattr(oidc, "FETCH_S", 0)
        provider.status = 500
        with pytest.raises(HostError, match="500"):
            await reader.read(_token(kid="unknown"))
        monkeypatch.setattr(oidc, "FETCH_S", 3600)
        for _ in range(3):
            with pytest.raises(HostError, match="500"):
                await reader.read(_token(kid="unknown"))
        assert provider.asked == 2
        assert (await reader.read(_token())).id == "oidc/ada"
        monkeypatch.setattr(oidc, "KEEP_S", 0)
        with pytest.raises(HostError, match="500"):  # what is too old holds no more
            await reader.read(_token())
