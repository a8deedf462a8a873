"""The broker's shares of wrapping keys: the owner's side, which encrypts a fresh one for each grant.

OpenBao or Vault sees each share, now and whenever it decrypts one; what it never sees is the TPM's secret, without
which a share opens nothing. All shares of a command go over one connection. Before that the key is looked at: one that
does not derive, or that can be exported, would promise what it does not keep. Specification: docs/specification.md,
"Share of a broker".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from oci_hook.attestation.deadline import with_deadline
from oci_hook.bundle.broker_share import BrokerShare, share_context
from oci_hook.errors import GrantInvalid, InternalError, TpmTimeout
from oci_hook.https_client import Endpoint, HttpsClient
from oci_hook.key_errors import BrokerUnavailable
from oci_hook.openbao import ANSWER_LIMIT_BYTES, BATCH, SHARE_BYTES, OpenBao
from oci_hook.owner.records import ContentKeyRecord
from oci_hook.trust import Owner

_ALL_OPTIONS = "--broker-key, --broker-mount, --broker-auth and --broker-role"
SHARES_LIMIT = 4096
"""Of one command: its result has to fit into a deadline's 1 MiB."""


@dataclass(frozen=True, slots=True)
class EncryptedShare:
    """One grant's share: 32 bytes that are wrapped with and then forgotten, and the grant's member that stays."""

    value: bytes = field(repr=False)
    member: BrokerShare


@dataclass(frozen=True, slots=True)
class OwnersBroker:
    """A broker as its model owner uses it.

    Attributes:
        endpoint: Where it is.
        token: A client token that may read the key and encrypt with it.
        key, mount: The transit key and its engine.
        auth, role: With what the hosts' containers will log in.
        seconds: For all of an exchange.
    """

    endpoint: Endpoint
    token: str = field(repr=False)
    key: str
    mount: str
    auth: str
    role: str
    seconds: int

    def encrypt_shares(
        self, owner: Owner, content: ContentKeyRecord, count: int, random: Callable[[int], bytes]
    ) -> list[EncryptedShare]:
        """Make shares for grants of one model version and have them encrypted.

        Args:
            owner: Who grants.
            content: The version.
            count: 1 to 4096.
            random: Gives so many random bytes, as `os.urandom` does.

        Raises:
            BrokerRefused: The broker says no, or its key is not fit for this.
            BrokerUnavailable: It gave no answer that can be used, or none in time.
        """
        if not 0 < count <= SHARES_LIMIT:
            raise InternalError(f"{count} shares in one request")
        values = [random(SHARE_BYTES) for _ in range(count)]
        context = share_context(owner.owner_id, content.model)

        def exchange() -> bytes:
            with HttpsClient(
                self.endpoint,
                what="the key broker",
                seconds=self.seconds,
                limit_bytes=ANSWER_LIMIT_BYTES,
                error=BrokerUnavailable,
            ) as client:
                bao = OpenBao(client)
                bao.verify_key(self.mount, self.key, self.token)
                batches = [values[first : first + BATCH] for first in range(0, count, BATCH)]
                found = [bao.encrypt(self.mount, self.key, batch, context, self.token) for batch in batches]
                return json.dumps([text for batch in found for text in batch]).encode()

        try:
            ciphertexts = json.loads(with_deadline(exchange, self.seconds))
        except TpmTimeout as cause:
            said = f"the key broker at {self.endpoint.address} did not answer within {self.seconds} s"
            raise BrokerUnavailable(said) from cause
        except InternalError as cause:
            raise BrokerUnavailable("the process that asks the key broker ended early") from cause
        return [
            EncryptedShare(value, BrokerShare(text, self.key, self.mount, self.auth, self.role))
            for value, text in zip(values, ciphertexts, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class RenewingBroker:
    """A broker for grants that take the place of older ones: each goes on with its own key and role.

    Attributes:
        endpoint, token, seconds: As an `OwnersBroker` has them.
        key, mount, auth, role: For all of them, whatever they had; None: as each had it.
    """

    endpoint: Endpoint
    token: str = field(repr=False)
    seconds: int
    key: str | None = None
    mount: str | None = None
    auth: str | None = None
    role: str | None = None

    def like(self, old: BrokerShare | None) -> OwnersBroker:
        """The broker for the grant that takes the place of one with this share.

        Raises:
            GrantInvalid: It had none, and not all of key, mount, auth and role are given.
        """
        given = {"key": self.key, "mount": self.mount, "auth": self.auth, "role": self.role}
        had = {name: getattr(old, name, None) for name in given}
        names = {name: value or had[name] for name, value in given.items()}
        found = {name: value for name, value in names.items() if isinstance(value, str)}
        if len(found) < len(given):
            raise GrantInvalid(
                f"the grant before names no {min(set(given) - set(found))} of a broker", remedy=f"give {_ALL_OPTIONS}"
            )
        return OwnersBroker(self.endpoint, self.token, seconds=self.seconds, **found)


def shares_for(
    brokers: Sequence[OwnersBroker | None],
    owner: Owner,
    contents: Sequence[ContentKeyRecord],
    random: Callable[[int], bytes],
) -> list[EncryptedShare | None]:
    """A share for each grant of a list, in its order; None for versions that need none.

    Args:
        brokers: For each grant; None: there is none.
        owner: Who grants.
        contents: The version of each grant.
        random: Gives so many random bytes, as `os.urandom` does.

    Raises:
        GrantInvalid: One needs a share, and there is no broker.
        BrokerRefused, BrokerUnavailable: As by `encrypt_shares`.
    """
    places: dict[tuple[str, OwnersBroker], list[int]] = {}
    found: list[EncryptedShare | None] = [None] * len(contents)
    for place, (content, broker) in enumerate(zip(contents, brokers, strict=True)):
        if content.broker:
            verify_share_wanted(content, given=broker is not None)
            if broker is not None:
                places.setdefault((content.manifest_digest, broker), []).append(place)
    for (_, broker), of_one in places.items():
        for first in range(0, len(of_one), SHARES_LIMIT):
            some = of_one[first : first + SHARES_LIMIT]
            made = broker.encrypt_shares(owner, contents[some[0]], len(some), random)
            for place, share in zip(some, made, strict=True):
                found[place] = share
    return found


def verify_share_wanted(content: ContentKeyRecord, *, given: bool) -> None:
    """Check that a grant has a broker's share exactly if the version's access policy asks for one.

    Raises:
        GrantInvalid: It has not.
    """
    name = f"{content.model.name}:{content.model.version}"
    if content.broker and not given:
        raise GrantInvalid(
            f"the access policy of {name} asks for a broker's share, and none is given",
            remedy="give --broker and --broker-ca; and to `sczctl grant` --broker-key and --broker-role",
        )
    if given and not content.broker:
        raise GrantInvalid(
            f"the access policy of {name} asks for no broker's share",
            remedy="leave --broker away, or pack a version with `sczctl pack --broker`",
        )
