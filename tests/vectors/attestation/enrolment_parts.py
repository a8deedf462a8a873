"""The enrolment's vectors: a device made in software, and every way in which one part of it is wrong."""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tpm_parts as t
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from owner_parts import CLASS, DEVICE, OwnerKeys, Vector, measured, pcrs_json

BAD = "EnrolmentRefused"
Changes = Callable[["Device"], dict[str, Any]]


class Device:
    """A host with its TPM, made in software; every part may be replaced before `request` and `answer`."""

    def __init__(self, owner_id: str, ek_key: Any, ek_certificate: bytes) -> None:
        self.owner_id, self.name = owner_id, DEVICE
        self.ek_certificate = ek_certificate
        self.ak_key, self.srk_key = t.p256(), t.p256()
        self.ek = self.ek_public(ek_key)
        self.ak = t.ecc_public(self.ak_key, t.AK_ATTRIBUTES, scheme=t.ECDSA_SHA256)
        self.srk = t.ecc_public(self.srk_key, t.SRK_ATTRIBUTES, symmetric=t.AES_128_CFB)
        self.first_index = 0x01800000 + (int.from_bytes(hashlib.sha256(owner_id.encode()).digest()[:3], "big") >> 4)
        self.counter = t.nv_public(self.first_index)
        self.pcrs = measured(range(16))
        self.secret = hashlib.sha256(b"the challenge's secret").digest()

    @staticmethod
    def ek_public(key: Any, attributes: int = t.EK_ATTRIBUTES, **changes: Any) -> bytes:
        make: Any = t.rsa_public if isinstance(key, rsa.RSAPrivateKey) else t.ecc_public
        public: bytes = make(key, attributes, **{"policy": bytes(range(32)), "symmetric": t.AES_128_CFB, **changes})
        return public

    def request(self) -> str:
        index = int.from_bytes(self.counter[:4], "big")
        keys = {f"{key}_public": t.b64(t.tpm2b(getattr(self, key))) for key in ("ek", "ak", "srk")}
        return t.dumps(
            {
                "schema": "scz-smm/enroll-request/v1",
                "device": self.name,
                "owner": self.owner_id,
                "ek_certificate": t.b64(self.ek_certificate),
                "counter": {"index": index, "public": t.b64(t.tpm2b(self.counter))},
                **keys,
            }
        )

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.request().encode()).digest()

    def qualifying(self, kind: str, secret: bytes | None = None) -> bytes:
        label = b"scz-smm/enroll/v1 " + kind.encode() + b"\0"
        return hashlib.sha256(label + (secret or self.secret) + self.digest).digest()

    def proof(self, secret: bytes | None = None) -> bytes:
        return hmac.digest(secret or self.secret, b"scz-smm/enroll/v1 proof" + self.digest, "sha256")

    def attest(self, kind: int, purpose: str, attested: bytes, **changes: Any) -> dict[str, Any]:
        """A signed structure, as the answer carries it."""
        key = changes.pop("key", self.ak_key)
        base = {"signer": t.qualified_name(self.ak), "extra_data": self.qualifying(purpose)}
        made = t.attest(kind, attested, **{**base, **changes})
        return {"attest": t.b64(made), "signature": t.b64(t.signed(key, made))}

    def srk_certify(self, public: bytes | None = None, **changes: Any) -> dict[str, Any]:
        return self.attest(t.ST_CERTIFY, "srk", t.certify_info(public or self.srk), **changes)

    def counter_certify(
        self, name: bytes | None = None, value: bytes = bytes(7) + b"\5", offset: int = 0, **changes: Any
    ) -> dict[str, Any]:
        info = t.nv_certify_info(name or t.nv_name(self.counter), value, offset)
        return self.attest(t.ST_NV, "counter", info, **changes)

    def quote(
        self, pcrs: Mapping[int, bytes] | None = None, selected: bytes | None = None, **changes: Any
    ) -> dict[str, Any]:
        values = self.pcrs if pcrs is None else pcrs
        made = self.attest(t.ST_QUOTE, "quote", t.quote_info(values, selected), **changes)
        return {**made, "pcrs": pcrs_json(values)}

    def answer(self, changes: dict[str, Any]) -> str:
        parts = {
            "schema": "scz-smm/enroll-answer/v1",
            "device": self.name,
            "owner": self.owner_id,
            "proof": t.b64(self.proof()),
            "srk_certify": self.srk_certify(),
            "counter_certify": self.counter_certify(),
            "quote": self.quote(),
        }
        return t.dumps({**parts, **changes})


def without(attributes: int, wanted: str, wanted_bit: int, unwanted: str, unwanted_bit: int) -> dict[str, int]:
    """Attributes without each that is wanted, and with the one that is not."""
    return {
        "without-fixed-tpm": attributes & ~t.FIXED_TPM,
        "without-fixed-parent": attributes & ~t.FIXED_PARENT,
        "without-sensitive-data-origin": attributes & ~t.SENSITIVE_DATA_ORIGIN,
        "without-restricted": attributes & ~t.RESTRICTED,
        f"without-{wanted}": attributes & ~wanted_bit,
        f"with-{unwanted}": attributes | unwanted_bit,
    }


class Enrolments:
    """Requests and answers; each is right but for one thing."""

    def __init__(self, owner: OwnerKeys) -> None:
        self.owner = owner
        self.rsa_key = rsa.generate_private_key(65537, 2048)
        self.ecc_key, self.other_ecc_key = t.p256(), t.p256()
        self.root = t.Authority("EK root")
        self.link = t.Authority("EK issuing", self.root)
        self.folder = [self.root, self.link]

    def device(self, key: Any = None, certificate: bytes | None = None, **parts: bytes) -> Device:
        key = key or self.ecc_key
        made = Device(self.owner.owner_id, key, certificate or self.link.ek_certificate(key))
        for name, value in parts.items():
            setattr(made, name, value)
        return made

    def vector(
        self,
        name: str,
        expected: str,
        check: int | None,
        description: str,
        device: Device | None = None,
        folder: list[t.Authority] | None = None,
        answer: Changes | None = None,
    ) -> Vector:
        device = device or self.device()
        return {
            "name": f"enrolment-{name}",
            "area": "enrolment",
            "description": description,
            "expected": expected,
            "check": check,
            "owner": self.owner.document,
            "now": t.NOW,
            "device_class": CLASS,
            "authorities": [authority.pem for authority in folder or self.folder],
            "request": device.request(),
            "secret": device.secret.hex(),
            "answer": device.answer(answer(device) if answer else {}),
        }

    # --- accepted -----------------------------------------------------------------------------------------------------

    def accepted(self) -> Iterator[Vector]:
        def v(name: str, description: str, device: Device | None = None, *folder: t.Authority) -> Vector:
            return self.vector(name, "accepted", None, description, device, list(folder) or self.folder)

        yield v("good", "a P-256 EK under an intermediate")
        yield v("good-rsa", "an RSA-2048 EK", self.device(self.rsa_key))
        direct = self.device(self.rsa_key, self.root.ek_certificate(self.rsa_key, subject="EK of a TPM"))
        yield v("good-under-root", "issued by the root itself", direct, self.root)
        chain = self.chain(7)
        yield v("good-eight-issuers", "as deep as may be", self.under(chain[-1]), *chain)
        renewed = t.Authority("EK issuing", self.root)
        yield v("good-two-of-one-name", "a renewed issuer of the same name", None, renewed, *self.folder)
        for name, description, link in (
            ("issuer-without-key-usage", "RFC 5280, 4.2.1.3", t.Authority("EK issuing", self.root, cert_sign=None)),
            ("path-length", "0 suffices for the last issuer", t.Authority("EK issuing", self.root, path_length=0)),
        ):
            yield v(f"good-{name}", description, self.under(link), self.root, link)
        odd = t.Authority("Odd", self.root, ca=None, more=[(self.broken_constraints(), True)])
        yield v("good-beside-a-broken-authority", "one that issued nothing here", None, odd, *self.folder)
        yield v("good-first-second", "the first second of its dates", self.date(begins=t.NOW))
        yield v("good-last-second", "the last second of its dates", self.date(ends=t.NOW))
        aes_256 = t.ecc_public(t.p256(), t.SRK_ATTRIBUTES, symmetric=(t.AES, 256, t.CFB))
        yield v("good-srk-aes-256", "AES-256", self.device(srk=aes_256))
        rsa_srk = t.rsa_public(self.rsa_key, t.SRK_ATTRIBUTES, symmetric=t.AES_128_CFB)
        yield v("good-srk-rsa", "the distribution made an RSA SRK", self.device(srk=rsa_srk))
        last = t.nv_public(self.device().first_index + 15)
        yield v("good-counter-last-index", "the last index of the range", self.device(counter=last))
        yield self.answered(
            "good-counter-highest",
            "accepted",
            None,
            "2^63 - 1",
            lambda d: {"counter_certify": d.counter_certify(value=b"\x7f" + b"\xff" * 7)},
        )

    @staticmethod
    def broken_constraints() -> x509.UnrecognizedExtension:
        return x509.UnrecognizedExtension(x509.ObjectIdentifier("2.5.29.19"), b"\x30\x05\x01")

    def chain(self, links: int) -> list[t.Authority]:
        made = [self.root]
        for number in range(links):
            made.append(t.Authority(f"EK link {number}", made[-1]))
        return made

    def under(self, authority: t.Authority) -> Device:
        return self.device(None, authority.ek_certificate(self.ecc_key))

    def date(self, **dates: int) -> Device:
        return self.device(None, self.link.ek_certificate(self.ecc_key, **dates))

    # --- 1. certificate -----------------------------------------------------------------------------------------------

    def chains(self) -> Iterator[Vector]:
        def v(name: str, description: str, device: Device | None, *folder: t.Authority) -> Vector:
            return self.vector(f"chain-{name}", BAD, 1, description, device, list(folder) or self.folder)

        r, day = self.root, t.DAY
        yield v("unknown-root", "another maker's root in the folder", None, t.Authority("Other root"))
        yield v("root-of-same-name", "the name, another key", None, t.Authority("EK root"), self.link)
        impostor = t.Authority("EK issuing", t.Authority("EK root"))
        yield v("issuer-of-same-name", "the issuer's name, another key", None, r, impostor)
        yield v("link-missing", "the intermediate is not in the folder", None, r)
        yield v("expired", "yesterday", self.date(ends=t.NOW - day))
        yield v("expired-a-second-ago", "a second ago", self.date(ends=t.NOW - 1))
        yield v("not-yet-valid", "tomorrow", self.date(begins=t.NOW + day))
        for name, dates in (("expired", {"ends": t.NOW - day}), ("not-yet-valid", {"begins": t.NOW + day})):
            link = t.Authority("EK issuing", r, **dates)
            yield v(f"issuer-{name}", "the intermediate", self.under(link), r, link)
            root = t.Authority("EK root", **dates)
            link = t.Authority("EK issuing", root)
            yield v(f"root-{name}", "the root", self.under(link), root, link)
        for name, link in {
            "not-ca": t.Authority("EK issuing", r, ca=False),
            "without-constraints": t.Authority("EK issuing", r, ca=None),
            "without-cert-sign": t.Authority("EK issuing", r, cert_sign=False),
            "constraints-malformed": t.Authority("EK issuing", r, ca=None, more=[(self.broken_constraints(), True)]),
        }.items():
            yield v(f"issuer-{name}", "the intermediate may not issue", self.under(link), r, link)
        root = t.Authority("EK root", ca=False)
        yield v("root-not-ca", "a self-signed certificate that may not issue", self.under(root), root)
        root = t.Authority("EK root", path_length=0)
        link = t.Authority("EK issuing", root)
        yield v("path-length-of-root", "the root allows no intermediate", self.under(link), root, link)
        upper = t.Authority("EK upper", r, path_length=0)
        link = t.Authority("EK issuing", upper)
        yield v("path-length-of-link", "the upper allows no further one", self.under(link), r, upper, link)
        chain = self.chain(8)
        yield v("too-deep", "nine issuers", self.under(chain[-1]), *chain)
        own = t.Authority("EK", key=self.ecc_key)
        yield v("self-made", "self-signed", self.device(None, own.ek_certificate(self.ecc_key, subject="EK")))
        yield v("forged-issuer", "a key of one's own in the issuer's name", self.under(t.Authority("EK issuing")))
        other_ek = t.Authority("EK of another TPM", self.link, ca=False, cert_sign=False)
        yield v("issued-by-an-ek", "another TPM's EK issued it", self.under(other_ek), *self.folder, other_ek)
        authority = self.link.ek_certificate(self.ecc_key, ca=True)
        yield v("ek-is-ca", "the EK's certificate is an authority's", self.device(None, authority))
        ed25519_key = ed25519.Ed25519PrivateKey.generate()
        yield v("ed25519", "no TPM's key", self.device(None, self.link.ek_certificate(ed25519_key)))

    def ders(self) -> Iterator[Vector]:
        good = self.link.ek_certificate(self.ecc_key)
        for name, description, der in (
            ("signature-bit-flipped", "a bit of its signature", t.flipped(good)),
            ("serial-changed", "a bit of its serial number", t.flipped(good, 20)),
            ("garbage", "no DER", b"garbage " * 40),
            ("truncated", "the last byte is missing", good[:-1]),
            ("trailing", "a byte after the end", good + b"\0"),
            ("one-byte", "one byte", b"\x30"),
            ("pem", "PEM", self.link.pem.encode()),
        ):
            yield self.vector(f"der-{name}", BAD, 1, description, self.device(None, der))
        long = self.device(None, good + bytes(16 * 1024))
        yield self.vector("der-too-long", "DeviceInvalid", None, "above 16 KiB", long)

    # --- 2 to 4. keys -------------------------------------------------------------------------------------------------

    def eks(self) -> Iterator[Vector]:
        def v(name: str, description: str, device: Device) -> Vector:
            return self.vector(f"ek-{name}", BAD, 2, description, device)

        for kind, key in (("rsa", self.rsa_key), ("p256", self.ecc_key)):
            for name, attributes in without(t.EK_ATTRIBUTES, "decrypt", t.DECRYPT, "sign", t.SIGN).items():
                device = self.device(key, ek=Device.ek_public(key, attributes))
                yield v(f"{kind}-{name}", "one attribute is not the template's", device)
        other = Device.ek_public(self.other_ecc_key)
        yield v("other-key", "another key than the certificate's", self.device(ek=other))
        other = Device.ek_public(self.rsa_key)
        yield v("other-kind-of-key", "RSA, the certificate is a P-256 key's", self.device(ek=other))
        for name, symmetric in (("none", None), ("ctr", (t.AES, 128, t.CTR)), ("192", (t.AES, 192, t.CFB))):
            ek = Device.ek_public(self.ecc_key, symmetric=symmetric)
            yield v(f"symmetric-{name}", "not AES in CFB mode, 128 or 256 bits", self.device(ek=ek))

    def aks(self) -> Iterator[Vector]:
        def v(name: str, description: str, key: Any = None, attributes: int = t.AK_ATTRIBUTES, **parts: Any) -> Vector:
            device = self.device()
            device.ak_key = key or device.ak_key
            device.ak = t.ecc_public(device.ak_key, attributes, **{"scheme": t.ECDSA_SHA256, **parts})
            return self.vector(f"ak-{name}", BAD, 3, description, device)

        for name, attributes in without(t.AK_ATTRIBUTES, "sign", t.SIGN, "decrypt", t.DECRYPT).items():
            yield v(name, "one attribute is not an AK's", attributes=attributes)
        yield v("p384", "another curve", ec.generate_private_key(ec.SECP384R1()))
        for name, scheme in (("sha384", (t.ECDSA, t.SHA384)), ("null", None), ("ecschnorr", (0x001C, t.SHA256))):
            yield v(f"scheme-{name}", "another scheme", scheme=scheme)
        yield v("name-sha384", "another Name algorithm", name_alg=t.SHA384)
        device = self.device(ak=t.rsa_public(self.rsa_key, t.AK_ATTRIBUTES))
        yield self.vector("ak-rsa", BAD, 3, "an RSA key", device)

    def srks(self) -> Iterator[Vector]:
        def v(name: str, description: str, attributes: int = t.SRK_ATTRIBUTES, **parts: Any) -> Vector:
            srk = t.ecc_public(t.p256(), attributes, **{"symmetric": t.AES_128_CFB, **parts})
            return self.vector(f"srk-{name}", BAD, 4, description, self.device(srk=srk))

        for name, attributes in without(t.SRK_ATTRIBUTES, "decrypt", t.DECRYPT, "sign", t.SIGN).items():
            yield v(name, "one attribute is not a storage key's", attributes)
        imported = t.USER_WITH_AUTH | t.RESTRICTED | t.DECRYPT
        yield v("imported", "made with openssl, imported, certified by the genuine AK", imported)
        yield v("symmetric-none", "not AES in CFB mode", symmetric=None)
        yield v("symmetric-ctr", "not AES in CFB mode", symmetric=(t.AES, 128, t.CTR))
        yield v("name-sha384", "another Name algorithm", name_alg=t.SHA384)
        keyed_hash = struct.pack(">HHIHHH", t.KEYEDHASH, t.SHA256, t.SRK_ATTRIBUTES, 0, t.NULL, 32) + bytes(32)
        yield self.vector("srk-keyed-hash", BAD, 4, "a derivation parent", self.device(srk=keyed_hash))

    # --- 5. counter ---------------------------------------------------------------------------------------------------

    def counters(self) -> Iterator[Vector]:
        good, rest, first = t.COUNTER_ATTRIBUTES, t.NV_WITHOUT_TYPE, self.device().first_index
        for name, (description, public) in {
            "ordinary": ("rolls back: undefine, define, write", t.nv_public(first, rest | t.NV_ORDINARY)),
            "bits": ("a bit field", t.nv_public(first, rest | t.NV_BITS)),
            "extend": ("an extended digest", t.nv_public(first, rest | t.NV_EXTEND)),
            "pin-fail": ("a PIN counter", t.nv_public(first, rest | t.NV_PIN_FAIL)),
            "type-unknown": ("two types' bits", t.nv_public(first, rest | t.NV_COUNTER | t.NV_BITS)),
            "without-no-da": ("a lockout would stop it", t.nv_public(first, good & ~t.NV_NO_DA)),
            "not-written": ("its Name would change", t.nv_public(first, good & ~t.NV_WRITTEN)),
            "policy-delete": ("deleted by a policy", t.nv_public(first, good | t.NV_POLICY_DELETE)),
            "platform-create": ("the platform's", t.nv_public(first, good | t.NV_PLATFORMCREATE)),
            "write-locked": ("it cannot be incremented", t.nv_public(first, good | t.NV_WRITELOCKED)),
            "without-auth-write": ("it cannot be incremented", t.nv_public(first, good & ~t.NV_AUTHWRITE)),
            "with-policy": ("a policy of its own", t.nv_public(first, policy=bytes(range(32)))),
            "size-4": ("four bytes", t.nv_public(first, size=4)),
            "size-16": ("sixteen bytes", t.nv_public(first, size=16)),
            "name-sha384": ("another Name algorithm", t.nv_public(first, name_alg=t.SHA384)),
            "index-before-range": ("another owner's", t.nv_public(first - 1)),
            "index-after-range": ("another owner's", t.nv_public(first + 16)),
            "index-of-tcg": ("the EK certificate's", t.nv_public(0x01C00002)),
        }.items():
            yield self.vector(f"counter-{name}", BAD, 5, description, self.device(counter=public))
        vector = self.vector(
            "counter-index-disagrees", "DeviceInvalid", None, "the index is not that of the public area"
        )
        document = json.loads(vector["request"])
        document["counter"]["index"] += 1
        yield {**vector, "request": t.dumps(document)}

    # --- 6 to 9. answer -----------------------------------------------------------------------------------------------

    def answered(self, name: str, expected: str, check: int | None, description: str, changes: Changes) -> Vector:
        return self.vector(name, expected, check, description, answer=changes)

    def proofs(self) -> Iterator[Vector]:
        v, invalid = self.answered, "DeviceInvalid"
        yield v("proof-wrong", BAD, 6, "32 other bytes", lambda d: {"proof": t.b64(bytes(32))})
        another: Changes = lambda d: {"proof": t.b64(d.proof(bytes(32)))}  # noqa: E731
        yield v("proof-of-another-secret", BAD, 6, "another challenge's answer", another)
        yield v("proof-bit-flipped", BAD, 6, "the last bit", lambda d: {"proof": t.b64(t.flipped(d.proof()))})
        yield v("proof-is-the-secret", BAD, 6, "the secret itself", lambda d: {"proof": t.b64(d.secret)})
        yield v("proof-short", invalid, None, "31 bytes", lambda d: {"proof": t.b64(d.proof()[:31])})
        yield v("answer-of-another-device", BAD, None, "another device's name", lambda d: {"device": "edge-2"})
        yield v("answer-to-another-owner", BAD, None, "another owner's id", lambda d: {"owner": "A" * 43})
        yield v("answer-extra-field", invalid, None, "a field that nobody knows", lambda d: {"force": True})

    def common(self, field: str, check: int, make: Callable[..., dict[str, Any]]) -> Iterator[Vector]:
        """What each of the three signed structures must not be; `make` makes it anew with changes."""
        kind = field.removesuffix("_certify")
        other = t.ecc_public(self.other_ecc_key, t.AK_ATTRIBUTES, scheme=t.ECDSA_SHA256)
        cases: tuple[tuple[str, str, Changes], ...] = (
            ("stale", "of an earlier challenge", lambda d: {"extra_data": d.qualifying(kind, bytes(32))}),
            ("of-another-purpose", "another purpose's data", lambda d: {"extra_data": d.qualifying("proof")}),
            ("without-extra-data", "no qualifying data", lambda d: {"extra_data": b""}),
            ("by-another-key", "signed by another key", lambda d: {"key": self.other_ecc_key}),
            ("of-another-signer", "another key's Qualified Name", lambda d: {"signer": t.qualified_name(other)}),
            (
                "by-an-owner-primary",
                "the key in another hierarchy",
                lambda d: {"signer": t.qualified_name(d.ak, t.OWNER_HIERARCHY)},
            ),
            ("magic-zero", "not made by a TPM", lambda d: {"magic": 0}),
        )
        for name, description, changes in cases:
            device = self.device()
            part = {field: make(device, **changes(device))}
            full_name = f"{field.replace('_', '-')}-{name}"
            yield self.vector(full_name, BAD, check, description, device, answer=lambda _, part=part: part)

    def certifications(self) -> Iterator[Vector]:
        other = t.ecc_public(self.other_ecc_key, t.SRK_ATTRIBUTES, symmetric=t.AES_128_CFB)
        yield from self.common("srk_certify", 7, Device.srk_certify)
        cases: tuple[tuple[str, str, Callable[[Device], dict[str, Any]]], ...] = (
            ("other-key", "another storage key", lambda d: d.srk_certify(other)),
            ("ak", "the AK itself", lambda d: d.srk_certify(d.ak)),
            ("is-a-quote", "with the same data", lambda d: d.attest(t.ST_QUOTE, "srk", t.quote_info(d.pcrs))),
            ("is-the-counters", "the other certification", lambda d: d.counter_certify()),
        )
        for name, description, make in cases:
            changes: Changes = lambda d, make=make: {"srk_certify": make(d)}  # noqa: E731
            yield self.answered(f"srk-certify-{name}", BAD, 7, description, changes)

    def counter_certifications(self) -> Iterator[Vector]:
        yield from self.common("counter_certify", 8, Device.counter_certify)
        unwritten = t.COUNTER_ATTRIBUTES & ~t.NV_WRITTEN

        def index(d: Device, step: int, attributes: int = t.COUNTER_ATTRIBUTES) -> dict[str, Any]:
            return d.counter_certify(t.nv_name(t.nv_public(d.first_index + step, attributes)))

        def as_object(d: Device) -> dict[str, Any]:
            return d.attest(t.ST_CERTIFY, "counter", t.tpm2b(t.nv_name(d.counter)) * 2)

        cases: dict[str, tuple[str, Callable[[Device], dict[str, Any]]]] = {
            "other-index": ("another counter", lambda d: index(d, 1)),
            "unwritten-name": ("its Name before the first write", lambda d: index(d, 0, unwritten)),
            "offset": ("from another offset", lambda d: d.counter_certify(offset=1)),
            "too-high": ("2^63", lambda d: d.counter_certify(value=b"\x80" + bytes(7))),
            "is-a-certify": ("the certification of an object with the counter's Name", as_object),
        }
        for size in (0, 4, 7, 9, 16):
            cases[f"{size}-bytes"] = ("not its whole value", lambda d, size=size: d.counter_certify(value=bytes(size)))
        for name, (description, make) in cases.items():
            changes: Changes = lambda d, make=make: {"counter_certify": make(d)}  # noqa: E731
            yield self.answered(f"counter-certify-{name}", BAD, 8, description, changes)

    def quotes(self) -> Iterator[Vector]:
        yield from self.common("quote", 9, Device.quote)
        sha256, sha1 = t.selection(range(16)), t.selection(range(16), t.SHA1)
        fewer, other = measured(range(15)), measured(range(16), "another boot")
        cases: dict[str, tuple[str, Callable[[Device], dict[str, Any]]]] = {
            "other-values": ("values of another boot beside it", lambda d: {**d.quote(), "pcrs": pcrs_json(other)}),
            "one-other-value": ("PCR 7", lambda d: {**d.quote(), "pcrs": pcrs_json({**d.pcrs, 7: bytes(32)})}),
            "fewer-pcrs": ("0 to 14", lambda d: d.quote(fewer)),
            "more-pcrs": ("0 to 16", lambda d: d.quote(measured(range(17)))),
            "fewer-values": ("PCR 15 is not at hand", lambda d: {**d.quote(), "pcrs": pcrs_json(fewer)}),
            "sha1-bank": ("another bank", lambda d: d.quote(selected=t.selections(sha1))),
            "two-banks": ("two banks", lambda d: d.quote(selected=t.selections(sha256, sha1))),
        }
        for name, (description, make) in cases.items():
            changes: Changes = lambda d, make=make: {"quote": make(d)}  # noqa: E731
            yield self.answered(f"quote-{name}", BAD, 9, description, changes)

    def vectors(self) -> Iterator[Vector]:
        for group in (
            self.accepted,
            self.chains,
            self.ders,
            self.eks,
            self.aks,
            self.srks,
            self.counters,
            self.proofs,
            self.certifications,
            self.counter_certifications,
            self.quotes,
        ):
            yield from group()
