"""The door to the TPM, against a software TPM and the ways in which a TPM fails."""

import asyncio
import contextlib
import hashlib

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from tpm2_pytss import ESAPI, ESYS_TR, TPM2B_PUBLIC, TPM2B_SENSITIVE_CREATE, TPMT_PUBLIC

from agent.attest.structures import (
    AK_TEMPLATE,
    RSA_AK_TEMPLATE,
    AkKind,
    parse_ak_public,
    parse_quote,
    parse_signature,
    pcr_digest,
)
from agent.attest.tpm import Tpm, TpmClearedError
from agent.attest.tpm_thread import TpmThread
from agent.errors import TpmError
from tests.support.swtpm import SwTpm

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One manufactured TPM for the tests that leave it in order."""
    with SwTpm(tmp_path_factory.mktemp("tpm"), manufactured=True) as tpm:
        yield tpm


@pytest.fixture
def swtpm(tmp_path):
    with SwTpm(tmp_path) as tpm:
        yield tpm


@contextlib.asynccontextmanager
async def _thread(swtpm, **options):
    """A TpmThread that gives up soon, so that tests of a dead TPM are short."""
    thread = TpmThread(swtpm.tcti, **{"call_timeout_s": 1.0, "first_retry_s": 0.05} | options)
    try:
        yield thread
    finally:
        await thread.close()


async def _until_answered(thread, job):
    """Call until the back-off lets a call through; the time limit of the test ends it otherwise."""
    while True:
        try:
            return await thread.call(job)
        except TpmError:
            await asyncio.sleep(0.05)


def test_the_attestation_key_is_the_template_s(shared):
    """The TPM makes the key of the fixed template, the same at each connection, and signs with it in its hierarchy."""
    tpm = Tpm(shared.tcti)
    attest, signature = tpm.quote([0, 14], b"n" * 32)
    values = tpm.read_pcrs([14, 0])
    tpm.close()
    ak = parse_ak_public(tpm.ak_public)
    quote = parse_quote(attest)
    ak.verify(parse_signature(signature), attest)
    assert quote.qualified_signer == ak.qualified_name
    assert quote.extra_data == b"n" * 32
    assert list(values) == [0, 14]
    assert quote.pcr_digest == pcr_digest(values.values())
    again = Tpm(shared.tcti, enrolled_ak=tpm.ak_public)
    again.close()
    assert again.ak_public == tpm.ak_public


def test_an_extend_reaches_every_bank(shared):
    """After one extend no allocated bank is at its old value."""
    tpm = Tpm(shared.tcti)
    with ESAPI(shared.tcti) as other:
        before = [bytes(other.pcr_read(f"{bank}:15")[2][0]) for bank in tpm.banks]
        tpm.extend(15, b"data")
        after = [bytes(other.pcr_read(f"{bank}:15")[2][0]) for bank in tpm.banks]
    tpm.close()
    assert tpm.banks == ("sha1", "sha256")
    assert all(old != new for old, new in zip(before, after, strict=True))


def test_the_endorsement_certificate_is_the_key_s(shared):
    """Each certificate read from the TPM certifies the key that its template makes."""
    tpm = Tpm(shared.tcti)
    found = {endorsement.profile: endorsement for endorsement in tpm.endorsements()}
    tpm.close()
    assert "EK-RSA2048" in found
    for endorsement in found.values():
        key = x509.load_der_x509_certificate(endorsement.certificate).public_key()
        assert isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey)
        numbers = key.public_numbers()
        unique = numbers.n.to_bytes(256) if isinstance(numbers, rsa.RSAPublicNumbers) else numbers.x.to_bytes(48)
        assert unique in endorsement.public


def test_a_tpm_without_certificates_has_no_endorsements(swtpm):
    """A TPM that nobody manufactured shows none, and the TPM goes on working."""
    tpm = Tpm(swtpm.tcti)
    assert tpm.endorsements() == ()
    assert tpm.clock().safe
    tpm.close()


def _make_credential(swtpm, ek_public, ak_public, credential):
    """What a Verifier does with the two public keys alone: TPM2_MakeCredential needs no secret of the TPM."""
    ek, _ = TPMT_PUBLIC.unmarshal(ek_public)
    ak_name = b"\x00\x0b" + hashlib.sha256(ak_public).digest()
    with ESAPI(swtpm.tcti) as verifier:
        handle = verifier.load_external(TPM2B_PUBLIC(publicArea=ek))
        blob, secret = verifier.make_credential(handle, credential, ak_name)
        verifier.flush_context(handle)
        return blob.marshal(), secret.marshal()


def _ak_public(tpm, kind):
    return tpm.ak_public if kind is AkKind.ECC_P256 else tpm.rsa_ak_public()


@pytest.mark.parametrize("profile", ["EK-RSA2048", "EK-ECC256"])
@pytest.mark.parametrize("kind", AkKind)
def test_a_credential_for_this_tpm_is_activated(swtpm, kind, profile):
    """Each attestation key opens what was made for it and an endorsement key of the same TPM, again and again."""
    with contextlib.closing(Tpm(swtpm.tcti)) as tpm:
        public = _ak_public(tpm, kind)
        for number in range(5):  # more often than the TPM has room for sessions or keys that are left behind
            credential = bytes([number]) * 32
            blob, secret = _make_credential(swtpm, tpm.ek_public(profile), public, credential)
            assert tpm.activate_credential(kind, profile, blob, secret) == credential


def test_the_endorsement_certificate_is_of_the_key_that_activates(shared):
    """With a certificate in the TPM the key that activates is the certified one."""
    with contextlib.closing(Tpm(shared.tcti)) as tpm:
        publics = {found.profile: found.public for found in tpm.endorsements()}
        assert tpm.ek_public("EK-RSA2048") == publics["EK-RSA2048"]


def test_a_credential_for_another_key_is_not_activated(swtpm):
    """A credential for the other attestation key stays closed, and nothing is left in the TPM's memory by the attempts."""
    with contextlib.closing(Tpm(swtpm.tcti)) as tpm:
        blob, secret = _make_credential(swtpm, tpm.ek_public("EK-ECC256"), tpm.rsa_ak_public(), b"c" * 32)
        for _ in range(5):
            with pytest.raises(TpmError, match="activate"):
                tpm.activate_credential(AkKind.ECC_P256, "EK-ECC256", blob, secret)
        assert tpm.activate_credential(AkKind.RSA_2048, "EK-ECC256", blob, secret) == b"c" * 32


def test_a_credential_that_is_none_is_a_tpm_error(swtpm):
    """Bytes that are cut, lengthened or empty, and an endorsement key that is none, never leak another error."""
    with contextlib.closing(Tpm(swtpm.tcti)) as tpm:
        blob, secret = _make_credential(swtpm, tpm.ek_public("EK-ECC256"), tpm.ak_public, b"c" * 32)
        cases = [(blob[:-1], secret), (blob + b"x", secret), (b"", secret), (blob, secret[:-1]), (blob, b"\xff" * 600)]
        for wrong_blob, wrong_secret in cases:
            with pytest.raises(TpmError):
                tpm.activate_credential(AkKind.ECC_P256, "EK-ECC256", wrong_blob, wrong_secret)
        with pytest.raises(TpmError, match="none of the endorsement keys"):
            tpm.activate_credential(AkKind.ECC_P256, "EK-HIGH-RSA2048", blob, secret)


def test_the_second_key_is_the_template_s(shared):
    """The second attestation key is the RSA template's, the same at each connection, and signs when it is asked to."""
    with contextlib.closing(Tpm(shared.tcti)) as tpm:
        public = tpm.rsa_ak_public()
    with contextlib.closing(Tpm(shared.tcti)) as tpm:
        attest, signature = tpm.quote([10], b"nonce", AkKind.RSA_2048)
        assert tpm.rsa_ak_public() == public
    assert public.startswith(RSA_AK_TEMPLATE)
    assert signature[:6] == bytes.fromhex("0014000b0100")
    key = rsa.RSAPublicNumbers(65537, int.from_bytes(public[-256:])).public_key()
    key.verify(signature[6:], attest, padding.PKCS1v15(), hashes.SHA256())


def test_a_tpm_without_sha256_is_refused(tmp_path):
    """Without a SHA-256 bank there is nothing that counts."""
    with SwTpm(tmp_path, manufactured=True, banks="sha1") as swtpm, pytest.raises(TpmError, match="SHA-256 bank"):
        Tpm(swtpm.tcti)


def test_a_pcr_that_does_not_exist_is_an_error(shared):
    """A short answer to PCR_Read is not taken for the values asked for."""
    tpm = Tpm(shared.tcti)
    with pytest.raises(TpmError):
        tpm.read_pcrs([14, 30])
    tpm.close()


def test_what_a_killed_agent_left_is_flushed(swtpm):
    """Object memory that a dead agent filled does not keep the next one from starting."""
    template, _ = TPMT_PUBLIC.unmarshal(AK_TEMPLATE + bytes(4))
    with ESAPI(swtpm.tcti) as dead:
        for _ in range(3):
            dead.create_primary(TPM2B_SENSITIVE_CREATE(), TPM2B_PUBLIC(publicArea=template), ESYS_TR.ENDORSEMENT)
    for _ in range(4):
        tpm = Tpm(swtpm.tcti)
        tpm.close()


@pytest.mark.parametrize("tcti", ["swtpm:host=127.0.0.1,port=1", "device:/dev/null/x", "no-such-tcti", ""])
def test_an_absent_tpm_is_a_tpm_error(tcti):
    """Nothing at the other end of the TCTI is a TpmError, whatever is wrong."""
    with pytest.raises(TpmError, match="no connection"):
        Tpm(tcti)


def test_a_cleared_tpm_is_named(swtpm):
    """A TPM that makes another key than the enrolled one was cleared; the operator is told."""
    tpm = Tpm(swtpm.tcti)
    tpm.close()
    with ESAPI(swtpm.tcti) as esys:
        esys.change_eps(ESYS_TR.PLATFORM)
    with pytest.raises(TpmClearedError, match="enrol again"):
        Tpm(swtpm.tcti, enrolled_ak=tpm.ak_public)


def test_a_tpm_that_goes_away_breaks_the_connection(swtpm):
    """Every command then fails with a TpmError, and closing does not raise."""
    tpm = Tpm(swtpm.tcti)
    swtpm.kill()
    for command in (tpm.clock, tpm.endorsements, lambda: tpm.quote([0], b""), lambda: tpm.extend(14, b"")):
        with pytest.raises(TpmError):
            command()
    assert tpm.broken
    tpm.close()


async def test_calls_run_in_their_order(shared):
    """Calls from many tasks run one after the other, in the order in which they came."""
    order = []
    async with _thread(shared) as thread:
        await asyncio.gather(*(thread.call(lambda _, at=at: order.append(at)) for at in range(20)))
    assert order == list(range(20))


async def test_another_client_does_not_disturb(shared):
    """A TPM that is busy with another client answers both."""

    def other():
        with ESAPI(shared.tcti) as esys:
            for _ in range(20):
                esys.read_clock()

    async with _thread(shared, call_timeout_s=20.0) as thread:
        busy = asyncio.create_task(asyncio.to_thread(other))
        for _ in range(20):
            assert (await thread.call(lambda tpm: tpm.clock())).safe
        await busy


async def test_an_error_of_the_tpm_keeps_the_connection(shared):
    """A command that the TPM refuses fails alone: the next is answered at once."""
    async with _thread(shared) as thread:
        with pytest.raises(TpmError):
            await thread.call(lambda tpm: tpm.read_pcrs([30]))
        assert thread.answering
        assert (await thread.call(lambda tpm: tpm.clock())).safe


async def test_a_programming_error_in_a_job_is_not_hidden(shared):
    """Another exception than a TpmError comes out where the call is awaited."""
    async with _thread(shared) as thread:
        with pytest.raises(ZeroDivisionError):
            await thread.call(lambda _: 1 // 0)
        assert (await thread.call(lambda tpm: tpm.clock())).safe


async def test_a_hung_tpm_fails_closed_and_recovers(swtpm):
    """A TPM that stops answering fails this call and all that follow; when it answers again, so does the thread."""
    async with _thread(swtpm, first_retry_s=0.5) as thread:
        await thread.call(lambda tpm: tpm.clock())
        swtpm.stop()
        calls = [thread.call(lambda tpm: tpm.clock()) for _ in range(5)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(result, TpmError) for result in results)
        assert not thread.answering
        assert thread.outstanding == 1  # the four behind it were never sent
        swtpm.resume()
        assert (await _until_answered(thread, lambda tpm: tpm.clock())).safe
        assert thread.answering
        for left_behind in thread._left_behind:
            await asyncio.to_thread(left_behind.join, None)
        assert thread.outstanding == 0


async def test_a_tpm_that_hangs_from_the_start_fails_closed(swtpm):
    """The connection too has a time limit, and a later one succeeds."""
    swtpm.stop()
    async with _thread(swtpm, connect_timeout_s=0.3) as thread:
        with pytest.raises(TpmError, match="no answer"):
            await thread.call(lambda tpm: tpm.clock())
        swtpm.resume()
        assert (await _until_answered(thread, lambda tpm: tpm.clock())).safe


async def test_the_retry_delay_grows(swtpm):
    """Each failed attempt doubles the time in which calls fail at once, up to a limit."""
    swtpm.kill()
    async with _thread(swtpm, first_retry_s=10.0) as thread:
        with pytest.raises(TpmError, match="no connection"):
            await thread.call(lambda tpm: tpm.clock())
        with pytest.raises(TpmError, match="at once until the next attempt"):
            await thread.call(lambda tpm: tpm.clock())
        first = thread._next_attempt
        thread._next_attempt = 0.0
        with pytest.raises(TpmError, match="no connection"):
            await thread.call(lambda tpm: tpm.clock())
        assert thread._next_attempt - first >= 10.0


async def test_a_tpm_that_restarts_is_found_again(swtpm):
    """After a restart of the TPM quotes work again, by the same key, under a greater resetCount."""
    async with _thread(swtpm) as thread:
        ak = await thread.call(lambda tpm: tpm.ak_public)
        before = await thread.call(lambda tpm: tpm.clock())
        swtpm.reboot()
        attest, _ = await _until_answered(thread, lambda tpm: tpm.quote([14], b""))
        assert parse_quote(attest).clock.reset_count == before.reset_count + 1
        assert parse_quote(attest).qualified_signer == parse_ak_public(ak).qualified_name


async def test_a_cancelled_call_does_not_disturb_the_next(shared):
    """Who is cancelled gets no answer, who comes next gets his own."""
    async with _thread(shared, call_timeout_s=20.0) as thread:
        await thread.call(lambda tpm: tpm.clock())
        with pytest.raises(TimeoutError):  # cancels the call inside
            async with asyncio.timeout(0):
                await thread.call(lambda tpm: [tpm.clock() for _ in range(50)])
        assert await thread.call(lambda _: "mine") == "mine"


async def test_a_closed_thread_answers_nothing(shared):
    """After close every call is a TpmError, and closing again is harmless."""
    thread = TpmThread(shared.tcti)
    await thread.call(lambda tpm: tpm.clock())
    await thread.close()
    await thread.close()
    with pytest.raises(TpmError, match="closed"):
        await thread.call(lambda tpm: tpm.clock())
