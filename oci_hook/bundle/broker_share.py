"""A grant's member `broker`: the share of the wrapping key that OpenBao or Vault decrypts, and for whom.

Pure. Specification: docs/specification.md, "Grant" and "Share of a broker".
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from oci_hook.bundle.model import ModelId
from oci_hook.documents import Fields
from oci_hook.openbao import AUTH_PATH, CIPHERTEXT, MOUNT, NAME

_KIND = "transit"
_CONTEXT_LABEL = b"scz-smm/broker/v1"


@dataclass(frozen=True, slots=True)
class BrokerShare:
    """Where a share is decrypted, and the ciphertext.

    Attributes:
        ciphertext: `vault:v<version>:<base64>`; worth nothing without the broker.
        key: Name of the transit key, which derives.
        mount: Path of the transit engine.
        auth: Path of the JWT auth method, as `auth/jwt`.
        role: The role to log in with.
    """

    ciphertext: str = field(repr=False)
    key: str
    mount: str
    auth: str
    role: str

    def document(self) -> dict[str, Any]:
        """The JSON value; `parse_broker_share` gives the same share again."""
        named = {"key": self.key, "mount": self.mount, "auth": self.auth, "role": self.role}
        return {"kind": _KIND, "share": self.ciphertext, **named}


def parse_broker_share(fields: Fields) -> BrokerShare:
    """Read the member.

    Raises:
        SczError: The class that `fields` raises: an unknown kind or key, a path with another meaning.
    """
    fields.literal("kind", _KIND)
    share = BrokerShare(
        ciphertext=fields.string("share", pattern=CIPHERTEXT, limit=1100),
        key=fields.string("key", pattern=NAME, limit=64),
        mount=fields.string("mount", pattern=MOUNT, limit=256),
        auth=fields.string("auth", pattern=AUTH_PATH, limit=256),
        role=fields.string("role", pattern=NAME, limit=64),
    )
    fields.finish()
    return share


def share_context(owner_id: str, model: ModelId) -> bytes:
    """The 32 bytes by which the transit key is derived: a share opens for this owner's model and version alone.

    A broker's policy can name them (`allowed_parameters`), and so allow or withdraw one version.
    """
    parts = (_CONTEXT_LABEL, owner_id.encode(), model.name.encode(), model.version.encode())
    return hashlib.sha256(b"\0".join(parts)).digest()
