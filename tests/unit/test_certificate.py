"""What all certificates have in common."""

import pytest

from agent.certificate import key_usage


def test_a_key_usage_has_the_uses_that_were_named_and_no_other():
    """RFC 5280's names; one that is none is a programming error."""
    usage = key_usage("key_cert_sign", "crl_sign")
    assert (usage.key_cert_sign, usage.crl_sign, usage.digital_signature) == (True, True, False)
    with pytest.raises(ValueError, match="not all of them"):
        key_usage("sign_everything")
