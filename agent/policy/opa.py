"""The ``opa`` engine, a worker's side: asks the OPA server that the agent runs for this policy. The only door to its client.

Rules:

1. The connection is TLS to a loopback port, trusting one certificate that was made for this server, with a bearer token; nothing
   is read from the environment, a ``.netrc`` or a trust store.
2. No retry, no redirect, a timeout; builtin errors are strict in each query.
3. A module that could reach the network is refused: OPA itself is not in the worker's sandbox.
4. The bundle may not define ``system.authz``: that is who may ask, and the agent's to say.

OPA compiles the whole bundle when it starts, so no error hides until a decision gets there.
"""

import json
import ssl
import time
from typing import Any

import requests
from opa_client.opa import OpaClient
from requests.adapters import HTTPAdapter

from agent.errors import PolicyError
from agent.policy.bundle import Bundle, covers
from agent.policy.engine import DECISION_QUERY, undefined
from agent.policy.source import calls_out
from agent.policy.template import AUTHZ_ROOT, LOOPBACK, OpaAccess

__all__ = ["AUTHZ_ROOT", "LOOPBACK", "OpaAccess", "OpaEngine", "check_bundle"]

_TIMEOUT_S = 5.0  # an overrun ends the worker long before; this ends a wait for a dead server
_READY_TIMEOUT_S = 10.0
_READY_PAUSE_S = 0.02
_STRICT = {"strict-builtin-errors": "true"}
_PACKAGE, _, _RULE = DECISION_QUERY.removeprefix("data.").rpartition(".")
_MAX_ERROR_CHARS = 400


class _Pinned(HTTPAdapter):
    """Trusts the one certificate, and asks no file for another."""

    def __init__(self, certificate: str) -> None:
        self._context = ssl.create_default_context(cadata=certificate)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_3
        super().__init__(max_retries=0)

    def cert_verify(self, conn: Any, url: str, verify: object, cert: object) -> None:  # noqa: ANN401 -- as in requests
        """Leave the connection as it is: its context demands the certificate."""

    def build_connection_pool_key_attributes(
        self, request: requests.PreparedRequest, *_: object
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Use the context for every connection, whatever the session's settings say."""
        host: dict[str, Any] = super().build_connection_pool_key_attributes(request, True)[0]
        return host, {"ssl_context": self._context, "cert_reqs": "CERT_REQUIRED"}


class OpaEngine:
    """Asks one OPA server. Not to be shared by two processes: each makes its own.

    Args:
        access: where the server is.
    """

    # What a policy reads is told by the embedded engine's syntax tree, and not every policy for OPA has one there.
    request_reads: tuple[str, ...] | None = None

    def __init__(self, access: OpaAccess) -> None:
        self._client = OpaClient(
            host=LOOPBACK, port=access.port, ssl=True, token=access.token, retries=0, timeout=_TIMEOUT_S
        )
        self._session: requests.Session = self._client._session  # noqa: SLF001 -- it offers no other way to pin
        self._session.trust_env = False
        self._session.max_redirects = 0
        self._session.mount("https://", _Pinned(access.certificate))

    def evaluate(self, input_json: bytes) -> bytes:
        """See :meth:`agent.policy.engine.Engine.evaluate`."""
        try:
            answer = self._client.query_rule(json.loads(input_json), _PACKAGE, _RULE, _STRICT)
        except requests.HTTPError as error:
            raise PolicyError(f"OPA: {_words(error.response)}") from error
        except (requests.RequestException, ValueError) as error:
            raise PolicyError(f"OPA does not answer: {type(error).__name__}") from error
        if "result" not in answer:
            raise undefined(DECISION_QUERY)
        return json.dumps(answer["result"], separators=(",", ":")).encode()

    def check(self) -> None:
        """Wait until the server is ready: it has compiled the bundle then.

        Raises:
            PolicyError: it is not, in time.
        """
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while not self._client.check_health():
            if time.monotonic() > deadline:
                raise PolicyError(f"OPA is not ready within {_READY_TIMEOUT_S:g} s")
            time.sleep(_READY_PAUSE_S)


def check_bundle(bundle: Bundle) -> None:
    """Refuse a bundle that this engine must not load (rules 3 and 4).

    Raises:
        PolicyError: with module and reason.
    """
    for path, source in bundle.modules.items():
        if (name := calls_out(source)) is not None:
            raise PolicyError(f"{path}: {name}: a policy opens no connection")
    if any(covers(root, AUTHZ_ROOT) or covers(AUTHZ_ROOT, root) for root in bundle.roots):
        raise PolicyError(
            f"the roots {list(bundle.roots)} cover {AUTHZ_ROOT}, which is the agent's; name narrower ones"
        )


def _words(response: requests.Response | None) -> str:
    """Return OPA's own words for an error."""
    if response is None:
        return "no response"
    try:
        body = response.json()
        first = (body.get("errors") or [body])[0]
        place = first.get("location") or {}
        where = f"{place.get('file', '')}:{place.get('row', '')}: " if place else ""
        return f"{where}{first.get('message', response.status_code)}"[:_MAX_ERROR_CHARS]
    except (ValueError, AttributeError, KeyError, IndexError, TypeError):
        return f"HTTP {response.status_code}"
