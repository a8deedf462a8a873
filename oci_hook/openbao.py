"""OpenBao and Vault: a login with a JSON Web Token, and the transit engine, request by request.

Statuses become two errors: the server said no (`BrokerRefused`), or there was no answer that can be used
(`BrokerUnavailable`). What it says is hostile, and may repeat the token that it was sent, so its words choose one of
ours and are never shown. Sources: the HTTP API of OpenBao 2 and Vault 1, "JWT/OIDC auth method" and "Transit secrets
engine"; RFC 4648, section 4 (their base64).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from oci_hook.documents import Fields, parse_object
from oci_hook.errors import SczError
from oci_hook.https_client import Answer, HttpsClient
from oci_hook.key_errors import BrokerRefused, BrokerUnavailable

ANSWER_LIMIT_BYTES: Final = 64 << 10
SHARE_BYTES: Final = 32
BATCH: Final = 100
"""OpenBao takes 1000 strings in a request (`max_request_json_strings`), and an item has four."""
CIPHERTEXT = r"vault:v[1-9][0-9]{0,8}:[A-Za-z0-9+/]{40,1000}={0,2}"
_SEGMENT = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}"
NAME = _SEGMENT
MOUNT = rf"{_SEGMENT}(/{_SEGMENT}){{0,7}}"
AUTH_PATH = rf"({_SEGMENT}/){{0,4}}auth/{_SEGMENT}(/{_SEGMENT}){{0,3}}"
"""Of a JWT auth method, as `auth/jwt`; a namespace stands before it."""
_TOKEN = r"[\x21-\x7e]{1,2048}"  # noqa: S105 - a pattern
_AEADS = frozenset({"aes128-gcm96", "aes256-gcm96", "chacha20-poly1305", "xchacha20-poly1305"})
_NO = frozenset({400, 401, 403, 404})
_STATUSES = {
    429: "is a standby, or has too many requests",
    472: "is a standby of another cluster",
    473: "is a standby",
    501: "is not initialised",
    503: "is sealed, or in maintenance",
}
_REDIRECTS = range(300, 400)
# What is in its answer, in lower case, and what we say then; the first that fits.
_REASONS: Final = (
    ("(too old)", "the grant's share is of a version below min_decryption_version: it is revoked there"),
    ("too new", "its key has no such version: the share was encrypted by another key"),
    ("message authentication failed", "the share was encrypted by another key or for another model or version"),
    ("encryption key not found", "the transit key is gone"),
    ("token is expired", "the container's token is expired by its clock"),
    ("(aud)", "the token's audience is not one of the role's bound audiences"),
    ("(sub)", "the token's subject is not the role's bound subject"),
    ("(iss)", "the token's issuer is not its bound issuer"),
    ("claim", "a claim of the token is not what the role binds"),
    ("signature", "the token's signature is by no key that it knows"),
    ("could not load configuration", "its JWT auth method is not configured"),
    ("could not be found", "it has no such role"),
    ("no handler for route", "it has no secrets engine or auth method at that path"),
    ("unsupported path", "it has no secrets engine or auth method at that path"),
    ("permission denied", "its policy does not allow this"),
    ("context", "the transit key derives in another way"),
)


@dataclass(frozen=True, slots=True)
class Login:
    """A client token, and whether the server lets it be used once alone."""

    token: str = field(repr=False)
    single_use: bool


class OpenBao:
    """Requests over one connection.

    Args:
        client: To the server; its errors are `BrokerUnavailable`.
    """

    def __init__(self, client: HttpsClient) -> None:
        self._client = client

    def login(self, auth: str, role: str, jwt: str) -> Login:
        """Exchange a token for a client token.

        Args:
            auth: Path of the JWT auth method, as `auth/jwt`.
            role: The role's name.
            jwt: In compact form; it is in no message.

        Raises:
            BrokerRefused: The role does not accept the token, or there is no such role.
            BrokerUnavailable: No answer that can be used.
        """
        doing = f"the login with the container's token ({auth}, role {role})"
        fields = self._ask("POST", f"{auth}/login", {"role": role, "jwt": jwt}, None, doing)
        given = fields.fields("auth")
        token = given.string("client_token", pattern=_TOKEN, limit=2048)
        return Login(token, given.has("num_uses") and given.take("num_uses") == 1)

    def decrypt(self, mount: str, key: str, ciphertext: str, context: bytes, token: str) -> bytes:
        """Decrypt a share.

        Args:
            mount: Path of the transit engine.
            key: A key of it that derives.
            ciphertext: `vault:v<version>:<base64>`.
            context: What the key is derived by.
            token: A client token.

        Returns:
            32 bytes.

        Raises:
            BrokerRefused: The server says no.
            BrokerUnavailable: No answer that can be used.
        """
        document = {"ciphertext": ciphertext, "context": base64.b64encode(context).decode()}
        fields = self._ask("POST", f"{mount}/decrypt/{key}", document, token, f"the decryption with {mount}/{key}")
        text = fields.fields("data").string("plaintext", pattern=r"[A-Za-z0-9+/]{43}=", limit=44)
        return base64.b64decode(text, validate=True)

    def encrypt(self, mount: str, key: str, shares: Sequence[bytes], context: bytes, token: str) -> tuple[str, ...]:
        """Encrypt shares, in one request: at most `BATCH` of them.

        Returns:
            The ciphertexts, in the order of the shares.

        Raises:
            BrokerRefused: The server says no.
            BrokerUnavailable: No answer that can be used.
        """
        derived_by = base64.b64encode(context).decode()
        batch = [{"plaintext": base64.b64encode(share).decode(), "context": derived_by} for share in shares]
        doing = f"the encryption with {mount}/{key}"
        fields = self._ask("POST", f"{mount}/encrypt/{key}", {"batch_input": batch}, token, doing)

        def read(item: object) -> str:
            result = Fields(item, what="the broker's answer", error=BrokerUnavailable)
            return result.string("ciphertext", pattern=CIPHERTEXT, limit=1100)

        return fields.fields("data").items("batch_results", read, low=len(shares), high=len(shares))

    def verify_key(self, mount: str, key: str, token: str) -> None:
        """Check that a transit key is fit for shares: it derives, authenticates, and cannot be taken out.

        Raises:
            BrokerRefused: It is not, or may not be looked at.
            BrokerUnavailable: No answer that can be used.
        """
        fields = self._ask("GET", f"{mount}/keys/{key}", None, token, f"the look at the key {mount}/{key}")
        data = fields.fields("data")
        problems = (
            (data.string("type", limit=64) not in _AEADS, "is of a type that does not authenticate, or cannot derive"),
            (not data.boolean("derived"), "does not derive: the share would not be bound to the model and its version"),
            (data.boolean("exportable"), "is exportable: whoever exports it needs the broker no more"),
            (data.boolean("allow_plaintext_backup"), "may be backed up in plaintext"),
        )
        for is_so, text in problems:
            if is_so:
                raise BrokerRefused(
                    f"the broker's key {mount}/{key} {text}",
                    remedy=f"make another: `bao write {mount}/keys/NAME derived=true`",
                )

    def revoke(self, auth: str, token: str) -> None:
        """Give a client token back; best effort, as it ends by itself soon."""
        segments = auth.split("/")  # a name of a namespace may end in `auth`
        namespace = "".join(f"{segment}/" for segment in segments[: segments.index("auth")])
        with suppress(SczError):
            self._client.send(
                "POST", f"/v1/{namespace}auth/token/revoke-self", body=b"{}", headers={"X-Vault-Token": token}
            )

    def health(self) -> int:
        """The status that says how the server is: 200 is active and unsealed.

        Raises:
            BrokerUnavailable: No answer.
        """
        return self._client.send("GET", "/v1/sys/health", headers={}).status

    def _ask(self, method: str, path: str, document: object, token: str | None, doing: str) -> Fields:
        body = json.dumps(document).encode() if document is not None else None
        headers = {"X-Vault-Request": "true", **({"X-Vault-Token": token} if token is not None else {})}
        return _opened(self._client.send(method, f"/v1/{path}", body=body, headers=headers), doing)


def describe_status(status: int) -> str:
    """What a status other than 200 says of the server, as the end of a sentence."""
    if status in _REDIRECTS:
        return f"sends elsewhere (HTTP {status}), which is not followed"
    return f"{_STATUSES.get(status, 'failed')} (HTTP {status})"


def _opened(answer: Answer, doing: str) -> Fields:
    if answer.status not in _NO | {200}:
        raise BrokerUnavailable(f"{doing}: the broker {describe_status(answer.status)}")
    document = parse_object(
        answer.body, limit_bytes=len(answer.body), what=f"{doing}: the broker's answer", error=BrokerUnavailable
    )
    if answer.status != 200:
        raise BrokerRefused(f"{doing}: {_reason(document)} (HTTP {answer.status})")
    return Fields(document, what=f"{doing}: the broker's answer", error=BrokerUnavailable)


def _reason(document: dict[str, object]) -> str:
    said = json.dumps(document).lower()
    return next((words for text, words in _REASONS if text in said), "the broker says no")
