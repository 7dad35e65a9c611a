"""The door to the controller against who may stand behind it: another key, garbage, too much, nothing."""

import asyncio
import socket
import ssl

import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from agent.attest.enrolment import Challenge
from agent.errors import ControllerError, VerificationError
from agent.flows import controller as door
from agent.flows.controller import ca_context, controller_origin, open_link, pinned_context
from tests.support.controller import Ca, FakeController, pem, spki
from tests.support.ek_chains import armoured, of_version

SECRET = b'{"secret":"not for everybody"}'
LIMIT = 1000


@pytest.fixture
def controller():
    with FakeController() as running:
        yield running


def key_of(controller):
    return spki(controller.key.public_key())


async def post(controller, context=None, path="/node/v1/challenge", message=SECRET):
    context = context or ca_context(pem(controller.ca.root).encode())
    async with open_link(controller.url, context) as link:
        return await link.post(path, message, Challenge, LIMIT)


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://c.example", ("https://c.example:443", "c.example", 443)),
        ("https://c.example:8445/", ("https://c.example:8445", "c.example", 8445)),
        ("https://[::1]:8445", ("https://[::1]:8445", "::1", 8445)),
    ],
)
def test_an_address_is_host_and_port(url, origin):
    """With the port of HTTPS, where none is named."""
    assert controller_origin(url) == origin


@pytest.mark.parametrize(
    "url",
    [
        "http://c.example",
        "https://",
        "https://c.example/path",
        "https://c.example?x",
        "https://c.example#x",
        "https://user@c.example",
        "https://user:word@c.example",
        "https://c.example:99999",
        "https://[c.example",
    ],
)
def test_an_address_says_no_more_than_that(url):
    """Anything else in a token's address is refused."""
    with pytest.raises(VerificationError, match="join-token"):
        controller_origin(url)


async def test_the_pinned_certificate_alone_is_trusted(controller):
    """The context that the right key gives speaks to this listener, and to no other one of the same CA."""
    context = await pinned_context(controller.url, key_of(controller))
    controller.answers["/"] = lambda _: _json('{"nonce":"%s","from":3}' % ("0" * 64))
    assert (await post(controller, context)).start == 3
    controller.stop()
    controller.key = ec.generate_private_key(ec.SECP256R1())
    controller.certificate = controller.ca.issue(controller.key.public_key(), "spiffe://fleet.example/controller")
    controller.start()
    heard = len(controller.received)
    with pytest.raises(ControllerError, match="no answer"):
        await post(controller, context)
    assert controller.received[heard:] == []


async def test_who_shows_another_key_hears_nothing(controller):
    """Not one request is made."""
    with pytest.raises(VerificationError, match="controller-key"):
        await pinned_context(controller.url, spki(ec.generate_private_key(ec.SECP256R1()).public_key()))
    assert controller.received == []


class _OfNoVersion:
    """A certificate that OpenSSL serves, and whose version X.509 does not have."""

    def __init__(self, certificate):
        self._der = of_version(7, certificate.public_bytes(Encoding.DER))

    def public_bytes(self, _encoding):
        return armoured(self._der)


async def test_who_shows_what_can_not_be_read_hears_nothing(controller):
    """An odd certificate is a refusal by name, not the end of the agent."""
    controller.stop()
    controller.certificate = _OfNoVersion(controller.certificate)
    controller.start()
    with pytest.raises(VerificationError, match="no certificate that can be read"):
        await pinned_context(controller.url, key_of(controller))
    assert controller.received == []


async def test_the_ca_counts_with_the_hosts_name(controller):
    """A listener of another CA, or of this CA for another name, hears nothing."""
    with pytest.raises(ControllerError, match="no answer"):
        await post(controller, ca_context(pem(Ca().root).encode()))
    controller.stop()
    controller.certificate = controller.ca.issue(controller.key.public_key(), "spiffe://fleet.example/node/n1")
    controller.start()
    with pytest.raises(ControllerError, match="no answer"):
        await post(controller)
    assert controller.received == []


async def test_older_tls_is_not_spoken(controller):
    """TLS 1.3 or nothing, in both contexts."""
    context = await pinned_context(controller.url, key_of(controller))
    for each in (context, ca_context(pem(controller.ca.root).encode())):
        assert each.minimum_version is ssl.TLSVersion.TLSv1_3


async def _json(text, status=200, headers=None):
    return web.Response(text=text, status=status, content_type="application/json", headers=headers)


async def test_garbage_is_no_answer(controller):
    """What is not the message is a VerificationError, however it is wrong."""
    for text in ("", "null", "[]", "{", '{"nonce":"xx","from":0}', '{"nonce":"%s","from":0,"more":1}' % ("0" * 64)):
        controller.answers["/"] = lambda _, text=text: _json(text)
        with pytest.raises(VerificationError, match="encoding"):
            await post(controller)


async def test_an_answer_ends_at_its_limit(controller):
    """A byte too much, and a body without an end: neither is read further."""
    controller.answers["/"] = lambda _: _json(" " * (LIMIT + 1))
    with pytest.raises(ControllerError, match="over 1000 bytes"):
        await post(controller)

    async def endless(request):
        response = web.StreamResponse()
        await response.prepare(request)
        while request.transport is not None and not request.transport.is_closing():
            await response.write(b" " * 65536)
            await asyncio.sleep(0)
        return response

    controller.answers["/"] = endless
    with pytest.raises(ControllerError, match="over 1000 bytes"):
        await post(controller)


async def test_a_slow_answer_ends(controller, monkeypatch):
    """Silence is cut off."""
    monkeypatch.setattr(door, "CALL_TIMEOUT_S", 0.2)

    async def silent(_):
        await asyncio.sleep(30)
        return web.Response()

    controller.answers["/"] = silent
    with pytest.raises(ControllerError, match="no answer"):
        await post(controller)


async def test_a_listener_that_does_not_greet_is_left(monkeypatch):
    """Who accepts and says nothing is no listener."""
    monkeypatch.setattr(door, "CONNECT_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as deaf, pytest.raises(ControllerError, match="no connection"):
        await pinned_context(f"https://127.0.0.1:{deaf.getsockname()[1]}", "0" * 64)


async def test_where_nobody_listens_there_is_no_controller(controller):
    """The error names the address."""
    controller.stop()
    with pytest.raises(ControllerError, match="localhost"):
        await pinned_context(controller.url, key_of(controller))
    with pytest.raises(ControllerError, match="localhost"):
        await post(controller)


async def test_a_redirect_is_not_followed(controller):
    """It is a refusal, and nobody else hears of it."""
    with FakeController() as other:
        controller.answers["/"] = lambda _: _json("", 307, {"Location": other.url + "/x"})
        with pytest.raises(ControllerError, match="307") as caught:
            await post(controller)
        assert caught.value.status == 307
        assert other.received == []


async def test_a_proxy_of_the_environment_is_not_asked(controller, monkeypatch):
    """Whatever the variables say."""
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    controller.answers["/"] = lambda _: _json('{"nonce":"%s","from":0}' % ("0" * 64))
    assert (await post(controller)).start == 0


async def test_a_refusal_has_its_words(controller):
    """Cut and without what could move a terminal; where there are none it says so."""
    cases = {
        '{"error":"the token was used"}': "the token was used",
        '{"error":"a\\u001b[2Jb"}': r"a\?\[2Jb",
        '{"error":"%s"}' % ("x" * 3000): "x" * 300 + "$",
        "<html>": "no reason given",
        '{"error":""}': "no reason given",
    }
    for text, words in cases.items():
        controller.answers["/"] = lambda _, text=text: _json(text, 403)
        with pytest.raises(ControllerError, match=words) as caught:
            await post(controller)
        assert caught.value.status == 403


async def test_no_error_repeats_what_was_sent(controller):
    """A secret is in no error's text, nor in its cause's."""
    for status in (403, 500):
        controller.answers["/"] = lambda _, status=status: _json("{", status)
        with pytest.raises(ControllerError) as caught:
            await post(controller)
        assert "everybody" not in f"{caught.value!r} {caught.value.__cause__!r}"


@pytest.mark.parametrize("material", [(b"",), (b"\xff",), (b"garbage",)])
def test_certificates_that_do_not_load_are_refused(material):
    """A CA that is none is a VerificationError."""
    with pytest.raises(VerificationError, match="enrolment"):
        ca_context(*material)


HEADS = {
    "a negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
    "a length without end": b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 4000 + b"\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
    "length and chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\nzz\r\n",
    "chunks of no size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n{}\r\n0\r\n\r\n",
    "a head without end": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    "heads without end": b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 100_000 + b"\r\n",
    "no version": b"HTTP/9.9 200 OK\r\n\r\n",
    "no status": b"HTTP/1.1 abc OK\r\n\r\n",
    "a status out of range": b"HTTP/1.1 99999 OK\r\n\r\n",
    "another protocol": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
    "words that are no text": b"HTTP/1.1 403 \xff\xfe\r\nX: \xff\r\nContent-Length: 2\r\n\r\n\xff\xff",
    "a zero in a head": b"HTTP/1.1 200 OK\r\nX: a\0b\r\nContent-Length: 0\r\n\r\n",
    "a cookie that is none": b"HTTP/1.1 200 OK\r\nSet-Cookie: \x01=\x02;;=;\r\nContent-Length: 0\r\n\r\n",
    "a coding that nobody asked for": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
    "a charset that does not exist": b"HTTP/1.1 200 OK\r\nContent-Type: a/b; charset=zz\r\nContent-Length: 2\r\n\r\n[]",
    "a redirection to nowhere": b"HTTP/1.1 302 Found\r\nLocation: http://[::\r\nContent-Length: 0\r\n\r\n",
    "provisional answers": b"HTTP/1.1 100 Continue\r\n\r\n" * 1000,
    "nothing": b"",
}


@pytest.mark.parametrize("how", HEADS)
async def test_nothing_but_an_error_by_name_comes_out(controller, how):
    """Whatever is sent in HTTP's place: the agent's rounds end by these two errors alone."""

    async def hostile(request):
        request.transport.write(HEADS[how])
        request.transport.close()
        return web.Response()

    controller.answers["/"] = hostile
    with pytest.raises((ControllerError, VerificationError)) as caught:
        await post(controller)
    assert "everybody" not in str(caught.value)


async def test_a_refusal_that_nests_without_end_has_no_words(controller):
    """A parser that gives up is no end of the agent."""
    for text in ('{"x":' + "[" * 4000, '{"error":' + '{"a":' * 700, "[" * 4090):
        controller.answers["/"] = lambda _, text=text: _json(text, 500)
        with pytest.raises(ControllerError, match="500: no reason given"):
            await post(controller)
