"""The grant: a model version's content key, wrapped for one device and signed by the owner.

Pure. The secret that unwraps the key comes out of the TPM only; its policy, and whether the grant is for the device at
hand, are `attestation`'s and `release`'s. Specification: docs/specification.md, "Grant"; RFC 5869 (HKDF).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from oci_hook.access_policy import TIME_HIGH
from oci_hook.bundle.broker_share import BrokerShare, parse_broker_share
from oci_hook.bundle.manifest import Manifest, sign_owned
from oci_hook.bundle.model import ModelId, parse_model_id
from oci_hook.bundle.segments import KEY_BYTES, TAG_BYTES, ContentKey
from oci_hook.documents import Fields, canonical, encode_base64url, parse_object, shown
from oci_hook.errors import DeviceInvalid, GrantInvalid, GrantRefused, KeyRefused, SczError
from oci_hook.jws import UnverifiedJws, parse_document, verify_compact
from oci_hook.key_errors import BrokerRefused
from oci_hook.lease import Lease, parse_lease
from oci_hook.openbao import SHARE_BYTES
from oci_hook.trust import NAME, NAME_LIMIT, Owner

GRANT_TYP = "scz-smm-grant+jwt"
GRANT_LIMIT_BYTES = 64 * 1024
SECRET_BYTES, NONCE_BYTES = 32, 12
WRAPPED_BYTES = NONCE_BYTES + KEY_BYTES + TAG_BYTES
NAME_BYTES = 34  # a TPM Name: 0x000b (SHA-256) and the digest
_SCHEMA = "scz-smm/grant/v1"
_WRAP_LABEL, _WRAP_LABEL_BROKER = b"scz-smm/grant/v1 tpm", b"scz-smm/grant/v1 tpm+broker"
_TPM_LIMIT_BYTES = 2048


@dataclass(frozen=True, slots=True)
class SealedKey:
    """What TPM2_Import takes: TPM2B_PUBLIC, TPM2B_PRIVATE and TPM2B_ENCRYPTED_SECRET, each with its length prefix."""

    public: bytes
    duplicate: bytes
    seed: bytes


@dataclass(frozen=True, slots=True)
class Counter:
    """The device's NV counter, its Name (34 bytes) and the highest value at which the grant still opens."""

    index: int
    name: bytes
    maximum: int


@dataclass(frozen=True, slots=True)
class Grant:
    """A grant. TPM Names are 34 bytes, `policy_ref` 32, `wrapped_key` 60 (nonce, key, tag).

    `broker`: the other share of the wrapping key; None: the TPM's alone opens it.
    """

    model: ModelId
    manifest_digest: str
    owner_id: str
    created: int
    device_name: str
    device_class: str
    ak_name: bytes
    srk_name: bytes
    boot_policy_key_name: bytes
    policy_ref: bytes
    counter: Counter
    sealed: SealedKey
    wrapped_key: bytes = field(repr=False)
    broker: BrokerShare | None = None
    lease: Lease | None = None


@dataclass(frozen=True, slots=True)
class UnverifiedGrant:
    """A grant whose signature was not looked at: only the owner id that it claims can be read."""

    owner_id: str
    _jws: UnverifiedJws


def parse_grant(compact: bytes) -> UnverifiedGrant:
    """Take a grant's compact bytes, at most 64 KiB, apart.

    Raises:
        GrantInvalid: Not a JWS with the grant's header.
    """
    jws = parse_document(compact, typ=GRANT_TYP, limit_bytes=GRANT_LIMIT_BYTES, what="grant", error=GrantInvalid)
    return UnverifiedGrant(owner_id=str(jws.unverified_header["kid"]), _jws=jws)


def verify_grant(unverified: UnverifiedGrant, *, owner: Owner, manifest: Manifest) -> Grant:
    """Verify a grant as this owner's, for this manifest.

    That it is for this device, and that `boot_policy` names the owner's boot-policy key, is left to the caller: the TPM
    enforces both.

    Raises:
        GrantRefused: Another owner's, another model's or another manifest's; or it has a broker's share though the
            access policy asks for none, or none though it does.
        GrantInvalid: The owner signed what the specification forbids.
    """
    # 1. The grant is this owner's.
    grant = verify_grant_signature(unverified, owner=owner)
    # 2. So is the manifest.
    if manifest.owner_id != owner.owner_id:
        raise GrantRefused(f"the manifest is by {shown(manifest.owner_id)}, not by the grant's owner {owner.name}")
    # 3. The grant is for this model, version and generation, and for exactly these signed bytes.
    if grant.model != manifest.model or grant.manifest_digest != manifest.digest:
        raise GrantRefused(
            f"the grant is for {grant.model.name}:{grant.model.version}, manifest {grant.manifest_digest}"
        )
    # 4. It opens with the shares that the access policy asks for, no fewer and no others.
    if (grant.broker is not None) != manifest.access.broker:
        has, asks = ("a", "none") if grant.broker is not None else ("no", "one")
        raise GrantRefused(f"the grant has {has} share of a broker, and the manifest's access policy asks for {asks}")
    return grant


def verify_grant_signature(unverified: UnverifiedGrant, *, owner: Owner) -> Grant:
    """Verify that a grant is this owner's, whatever it is for: the owner's own list of grants.

    Raises:
        GrantRefused: Another owner's.
        GrantInvalid: The owner signed what the specification forbids.
    """
    if unverified.owner_id != owner.owner_id:
        raise GrantRefused(f"the grant is by {shown(unverified.owner_id)}, not by the model's owner {owner.name}")
    payload = verify_compact(unverified._jws, owner.manifest_key, "ES256", error=GrantRefused)
    return _parse_payload(payload, owner_id=owner.owner_id, error=GrantInvalid)


def _tpm_name(fields: Fields, name: str, error: type[SczError]) -> bytes:
    value = fields.hexadecimal(name, low=NAME_BYTES, high=NAME_BYTES)
    if value[:2] != b"\x00\x0b":
        raise error(f"grant: {name!r} is not a Name with SHA-256")
    return value


def _parse_payload(payload: bytes, *, owner_id: str, error: type[SczError]) -> Grant:
    fields = Fields(
        parse_object(payload, limit_bytes=GRANT_LIMIT_BYTES, what="grant", error=error), what="grant", error=error
    )
    fields.literal("schema", _SCHEMA)
    model = parse_model_id(fields.fields("model"))
    manifest_digest = fields.digest("manifest")
    created = fields.integer("created", low=0, high=TIME_HIGH)
    device, policy = fields.fields("device"), fields.fields("boot_policy")
    counter, sealed = fields.fields("counter"), fields.fields("sealed")
    grant = Grant(
        model=model,
        manifest_digest=manifest_digest,
        owner_id=owner_id,
        created=created,
        device_name=device.string("name", pattern=NAME, limit=NAME_LIMIT),
        device_class=device.string("class", pattern=NAME, limit=NAME_LIMIT),
        ak_name=_tpm_name(device, "ak_name", error),
        srk_name=_tpm_name(device, "srk_name", error),
        boot_policy_key_name=_tpm_name(policy, "key_name", error),
        policy_ref=policy.hexadecimal("policy_ref", low=32, high=32),
        counter=Counter(
            index=counter.integer("index", low=0x01000000, high=0x01FFFFFF),  # TPM 2.0 Part 2, section 7.2: NV
            name=_tpm_name(counter, "name", error),
            maximum=counter.integer("maximum", low=0, high=2**64 - 1),
        ),
        sealed=SealedKey(
            public=sealed.base64url("public", low=1, high=_TPM_LIMIT_BYTES),
            duplicate=sealed.base64url("duplicate", low=1, high=_TPM_LIMIT_BYTES),
            seed=sealed.base64url("seed", low=1, high=_TPM_LIMIT_BYTES),
        ),
        wrapped_key=fields.base64url("wrapped_key", low=WRAPPED_BYTES, high=WRAPPED_BYTES),
        broker=parse_broker_share(fields.fields("broker")) if fields.has("broker") else None,
        lease=parse_lease(fields, "lease", error=error),
    )
    for part in (device, policy, counter, sealed, fields):
        part.finish()
    return grant


def sign_grant(grant: Grant, *, key: ec.EllipticCurvePrivateKey) -> bytes:
    """Sign a grant with the owner's manifest key; its compact bytes.

    Raises:
        DeviceInvalid: Something that a reader would refuse.
        KeyInvalid: The key is not that of `grant.owner_id`.
    """
    payload = canonical(
        {
            "schema": _SCHEMA,
            "model": grant.model.document(),
            "manifest": grant.manifest_digest,
            "created": grant.created,
            "device": {
                "name": grant.device_name,
                "class": grant.device_class,
                "ak_name": grant.ak_name.hex(),
                "srk_name": grant.srk_name.hex(),
            },
            "boot_policy": {"key_name": grant.boot_policy_key_name.hex(), "policy_ref": grant.policy_ref.hex()},
            "counter": {
                "index": grant.counter.index,
                "name": grant.counter.name.hex(),
                "maximum": grant.counter.maximum,
            },
            "sealed": {
                "public": encode_base64url(grant.sealed.public),
                "duplicate": encode_base64url(grant.sealed.duplicate),
                "seed": encode_base64url(grant.sealed.seed),
            },
            "wrapped_key": encode_base64url(grant.wrapped_key),
            **({"broker": grant.broker.document()} if grant.broker is not None else {}),
            **({"lease": grant.lease.document()} if grant.lease else {}),
        }
    )
    _parse_payload(payload, owner_id=grant.owner_id, error=DeviceInvalid)
    return sign_owned(payload, typ=GRANT_TYP, owner_id=grant.owner_id, key=key)


def _wrapping_key(secret: bytes, share: bytes | None, manifest_digest: str) -> AESGCM:
    label = _WRAP_LABEL if share is None else _WRAP_LABEL_BROKER
    info = label + b"\0" + manifest_digest.encode()
    material = secret if share is None else secret + share
    return AESGCM(HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(material))


def wrap_content_key(
    content_key: ContentKey, secret: bytes, manifest_digest: str, nonce: bytes, share: bytes | None = None
) -> bytes:
    """Wrap a content key under the secret that the TPM will unseal, and the broker's share if there is one.

    Args:
        content_key: The model version's key.
        secret: 32 random bytes, one grant's own.
        manifest_digest: `sha256:` and 64 digits.
        nonce: 12 random bytes.
        share: 32 random bytes, one grant's own, that the broker will decrypt; None: the TPM's secret alone.

    Returns:
        60 bytes: nonce, ciphertext, tag.

    Raises:
        ValueError: A secret, nonce or share of another length.
    """
    if len(secret) != SECRET_BYTES or len(nonce) != NONCE_BYTES or (share is not None and len(share) != SHARE_BYTES):
        raise ValueError("secret, nonce or share of the wrong length")
    return nonce + _wrapping_key(secret, share, manifest_digest).encrypt(nonce, content_key.value, None)


def unwrap_content_key(wrapped: bytes, secret: bytes, manifest_digest: str, share: bytes | None = None) -> ContentKey:
    """Unwrap a content key.

    Args:
        wrapped: 60 bytes of the grant.
        secret: What the TPM unsealed.
        manifest_digest: Of the verified manifest.
        share: What the broker decrypted; None: the grant has no share there.

    Raises:
        KeyRefused: The secret is not this grant's, or the manifest is not the one that the key was wrapped for.
        BrokerRefused: With a broker's share: it is not this grant's, or the secret or the manifest is not.
    """
    lengths = (len(wrapped), len(secret), SHARE_BYTES if share is None else len(share))
    if lengths != (WRAPPED_BYTES, SECRET_BYTES, SHARE_BYTES):
        raise KeyRefused("the wrapped key, the unsealed secret or the broker's share has the wrong length")
    try:
        opener = _wrapping_key(secret, share, manifest_digest)
        value = opener.decrypt(wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:], None)
    except InvalidTag as cause:
        if share is not None:  # nothing vouches for what a broker answers; for the secret, the TPM and the owner do
            raise BrokerRefused(
                "the broker's share and the unsealed secret do not open the grant's key: the share is another one",
                remedy="look whether [broker] names the right broker, and whether its key was restored or replaced",
            ) from cause
        raise KeyRefused("the unsealed secret does not open the grant's key") from cause
    return ContentKey(value)
