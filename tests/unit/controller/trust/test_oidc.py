"""Tokens of an OpenID provider: who is believed, and as what."""

import json

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from agent import clock
from agent.errors import HostError, PeerError
from controller.settings import OidcSettings
from controller.trust.oidc import MAX_JWKS_BYTES, OidcReader

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
    ],
    ids=range(15),
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
