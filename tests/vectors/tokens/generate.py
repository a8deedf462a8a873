"""Writes the identity-token vectors: one failure a file, named after it, with the class that must be raised.

    .venv/bin/python tests/vectors/tokens/generate.py        makes fresh keys and writes every file beside it anew

Signing is done here with `cryptography` alone, not with the code under test. Private keys are not kept: the vectors
hold public keys and tokens. Each file is complete: `now`, `leeway_seconds`, `issuers` (as trusted), `access` (the
policy), `token`; `append` stands for text that is too long to store. `expected` is an error's class, or "accepted".
"""

from __future__ import annotations

import hmac
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

sys.path.insert(0, str(Path(__file__).parent))

from token_parts import (
    AGE,
    AUDIENCE,
    CLUSTER,
    DOMAIN,
    ISSUER,
    LEEWAY,
    NOW,
    P256_ORDER,
    POD_UID,
    RFC7515_A2_MODULUS,
    RFC7515_A2_SIGNATURE,
    RFC7515_A3_SIGNATURE,
    SUBJECT,
    Key,
    Keys,
    b64,
    claims,
    dumps,
    identity,
    policy,
    raw_claims,
    respelled_es256,
    signature,
    signed,
    trusted,
    unb64,
)


class Builder:
    """Makes vectors from what differs from the good one."""

    def __init__(self) -> None:
        self.keys = Keys()

    def header(self, key: Key | None = None, algorithm: str = "ES256", **changes: object) -> dict[str, Any]:
        base = {"alg": algorithm, "kid": (key or self.keys.ec).kid, "typ": "JWT"}
        return {name: value for name, value in {**base, **changes}.items() if value is not ...}

    def token(
        self,
        payload: dict[str, Any] | bytes | None = None,
        *,
        key: Key | None = None,
        algorithm: str = "ES256",
        header: dict[str, Any] | bytes | None = None,
    ) -> str:
        key = key or self.keys.ec
        header = self.header(key, algorithm) if header is None else header
        payload = claims() if payload is None else payload
        raw_header = header if isinstance(header, bytes) else dumps(header)
        return signed(raw_header, payload if isinstance(payload, bytes) else dumps(payload), key, algorithm)

    def vector(
        self, name: str, expected: str, description: str, token: str | None = None, **changes: Any
    ) -> dict[str, Any]:
        return {
            "name": name,
            "description": description,
            "expected": expected,
            "now": NOW,
            "leeway_seconds": LEEWAY,
            "issuers": [trusted(self.keys.mixed())],
            "access": policy(),
            "token": self.token() if token is None else token,
            **changes,
        }

    # --- accepted -----------------------------------------------------------------------------------------------------

    def accepted(self) -> Iterator[dict[str, Any]]:
        k, v, t = self.keys, self.vector, self.token
        for algorithm, key in (("RS256", k.rsa), ("RS384", k.rsa), ("RS512", k.rsa)):
            yield v(f"{algorithm.lower()}", "accepted", f"{algorithm} in a mixed set", t(key=key, algorithm=algorithm))
        for algorithm, key in (("ES256", k.ec), ("ES384", k.ec384), ("ES512", k.ec521)):
            yield v(f"{algorithm.lower()}", "accepted", f"{algorithm} in a mixed set", t(key=key, algorithm=algorithm))
        no_kid = self.header(kid=...)
        yield v("kid-absent-one-key-fits", "accepted", "without kid, one key of the set fits", t(header=no_kid))
        shared = [Key(k.rsa.private, "one").jwk(), Key(k.ec.private, "one").jwk()]
        yield v(
            "kid-shared-by-two-types",
            "accepted",
            "RFC 7517, 4.5: one kid for keys of two types",
            t(header=self.header(kid="one")),
            issuers=[trusted(shared)],
        )
        yield v("typ-absent", "accepted", "Kubernetes writes no typ", t(header=self.header(typ=...)))
        yield v("typ-lower-case", "accepted", "media types are compared without case", t(header=self.header(typ="jwt")))
        jku = self.header(jku="https://attacker.example/jwks.json", jwk=k.attacker.jwk())
        yield v(
            "jku-and-jwk-ignored", "accepted", "keys that the token names are ignored, its own are right", t(header=jku)
        )
        yield v("aud-list", "accepted", "aud as a list that contains the audience", t(claims(aud=["x", AUDIENCE])))
        yield v(
            "times-fractional", "accepted", "NumericDate may be fractional", t(claims(iat=NOW - 0.5, exp=NOW + 9.25))
        )
        yield v("exp-at-leeway", "accepted", "the last second of the leeway", t(claims(exp=NOW - LEEWAY + 1)))
        yield v("iat-at-leeway", "accepted", "iat ahead by the leeway", t(claims(iat=NOW + LEEWAY)))
        yield v("nbf-at-leeway", "accepted", "nbf ahead by the leeway", t(claims(nbf=NOW + LEEWAY)))
        yield v("lifetime-at-bound", "accepted", "exp − iat = token_age_seconds", t(claims(exp=NOW - 60 + AGE)))
        yield v(
            "claims-unknown", "accepted", "RFC 7519, 4: further claims are ignored", t(claims(jti="1", x={"a": [None]}))
        )
        yield v(
            "header-unknown", "accepted", "RFC 7515, 4: further members are ignored", t(header=self.header(x5t="AA"))
        )
        pinned = policy(identity(keys=[k.other_ec.thumbprint(), k.ec.thumbprint()]))
        yield v("pinned-key", "accepted", "the policy pins this key", access=pinned)
        second = policy(identity(subjects=["x"]), identity(audience="y"), identity(subjects=["x", SUBJECT]))
        yield v("identity-of-several", "accepted", "the third identity of the policy fits", access=second)
        yield v("size-at-limit", "accepted", "16384 bytes", self.sized(16384))
        yield v("es256-signature-respelled", "accepted", "(r, n − s) is as valid as (r, s)", self.respelled())
        yield from self.kubernetes_vector("kubernetes", "accepted", "a bound service account token")
        yield from self.spiffe_vector("spiffe", "accepted", "a JWT-SVID", f"{DOMAIN}/ns/models/sa/reader")
        yield from self.spiffe_vector(
            "spiffe-domain-in-file-name",
            "accepted",
            "an https iss; the issuer file's name is the trust domain",
            f"{DOMAIN}/reader",
            issuer="https://oidc.other.example",
            file_name="example.org",
        )

    def sized(self, size: int) -> str:
        """A good token of exactly `size` bytes."""
        pad = 3 * (size - len(self.token(claims(pad="")))) // 4 - 4
        for extra in range(12):
            token = self.token(claims(pad="x" * (pad + extra)))
            if len(token) == size:
                return token
        raise AssertionError(size)

    def respelled(self) -> str:
        start, _, text = self.token().rpartition(".")
        return f"{start}.{respelled_es256(unb64(text))}"

    # --- form ---------------------------------------------------------------------------------------------------------

    def malformed(self) -> Iterator[dict[str, Any]]:
        v, t = self.vector, self.token
        good = t()
        header, payload, signed_part = good.split(".")
        bad = "TokenMalformed"
        yield v("empty", bad, "no bytes", "")
        yield v("parts-one", bad, "one part", header)
        yield v("parts-two", bad, "two parts: the signature cut off", f"{header}.{payload}")
        yield v("parts-four", bad, "four parts", f"{good}.{signed_part}")
        yield v("parts-five-jwe", bad, "five parts: a JWE", f"{header}.AAAA.{payload}.AAAA.AAAA")
        yield v(
            "json-serialisation",
            bad,
            "RFC 7515, 7.2: not the compact form",
            json.dumps({"payload": payload, "protected": header, "signature": signed_part}),
        )
        yield v("size-over-limit", bad, "16385 bytes", self.sized(16385))
        yield v("size-5-mb", bad, "five megabytes", good, append={"text": "A", "times": 5_000_000})
        yield v("trailing-line-feed", bad, "a line feed after the token", f"{good}\n")
        yield v("trailing-nul", bad, "a NUL after the token", f"{good}\0")
        yield v("leading-space", bad, "a space before the token", f" {good}")
        yield v("space-inside", bad, "a line feed inside the signature", f"{good[:-8]}\n{good[-8:]}")
        yield v("non-ascii", bad, "a character beyond ASCII", f"{good}ä")
        yield v("bearer-prefix", bad, "as in an HTTP header", f"Bearer {good}")
        yield v("base64-padding", bad, "RFC 7515, 2: no padding", f"{good}==")
        yield v("base64-standard-alphabet", bad, "+ and / instead of - and _", self.standard_alphabet())
        for index, part in enumerate(("header", "payload", "signature")):
            yield v(f"base64-non-canonical-{part}", bad, f"unused bits set in the {part}", self.non_canonical(index))
        headers = {
            "header-not-json": (b"{alg:ES256}", "not JSON"),
            "header-array": (b'["ES256"]', "an array"),
            "header-bom": (b"\xef\xbb\xbf" + dumps(self.header()), "a byte order mark"),
            "header-duplicate-alg": (b'{"alg":"none","kid":"ec-1","alg":"ES256"}', "alg twice"),
            "header-duplicate-kid": (b'{"alg":"ES256","kid":"x","kid":"ec-1"}', "kid twice"),
            "header-trailing-bytes": (dumps(self.header()) + b"{}", "a second object"),
            "header-lone-surrogate": (b'{"alg":"ES256","kid":"\\ud800"}', "a lone surrogate"),
            "header-deep-nesting": (b'{"alg":"ES256","x":' + b"[" * 5000 + b"]" * 5000 + b"}", "5000 arrays deep"),
            "crit": (dumps(self.header(crit=["exp"], exp=1)), "RFC 7515, 4.1.11: not understood here"),
            "crit-empty": (dumps(self.header(crit=[])), "RFC 7515, 4.1.11: must not be empty"),
            "b64-false": (dumps(self.header(b64=False)), "RFC 7797 without crit"),
            "b64-false-crit": (dumps(self.header(b64=False, crit=["b64"])), "RFC 7797 as it should be"),
            "kid-number": (dumps(self.header(kid=1)), "kid is a number"),
            "kid-null": (dumps(self.header(kid=None)), "kid is null, not absent"),
            "typ-other": (dumps(self.header(typ="logout+jwt")), "signed for another purpose"),
            "typ-grant": (dumps(self.header(typ="scz-smm-grant+jwt")), "one of our own documents"),
            "typ-number": (dumps(self.header(typ=1)), "typ is a number"),
        }
        for name, (raw, description) in headers.items():
            yield v(name, bad, description, t(header=raw))
        payloads = {
            "claims-not-json": (b"Payload", "not JSON"),
            "claims-array": (dumps([claims()]), "an array"),
            "claims-not-utf8": (dumps(claims())[:-1] + b',"x":"\xff"}', "not UTF-8"),
            "claims-duplicate-sub": (dumps(claims())[:-1] + b',"sub":"workload-b"}', "sub twice"),
            "claims-duplicate-exp": (dumps(claims())[:-1] + b',"exp":1900000000}', "exp twice"),
            "claims-duplicate-nested": (dumps(claims())[:-1] + b',"x":{"a":1,"a":2}}', "a nested member twice"),
            "claims-trailing-bytes": (dumps(claims()) + b"{}", "a second object"),
            "claims-lone-surrogate": (raw_claims(sub='"workload-a\\ud800"'), "a lone surrogate"),
            "claims-deep-nesting": (raw_claims(x="[" * 5000 + "]" * 5000), "5000 arrays deep"),
            "exp-nan": (raw_claims(exp="NaN"), "NaN is not JSON"),
            "exp-infinity": (raw_claims(exp="Infinity"), "Infinity is not JSON"),
            "exp-1e400": (raw_claims(exp="1e400"), "beyond a double"),
            "iat-negative-infinity": (raw_claims(iat="-1e400"), "beyond a double"),
            "nbf-1e400": (raw_claims(nbf="1e400"), "beyond a double"),
            "exp-thousand-digits": (raw_claims(exp="1" * 1000), "a number of 1000 digits"),
        }
        for name, (raw, description) in payloads.items():
            yield v(name, bad, description, t(raw))

    def standard_alphabet(self) -> str:
        for number in range(1000):
            token = self.token(claims(jti=str(number)))
            if {"-", "_"} & set(token.rpartition(".")[2]):
                return token.replace("-", "+").replace("_", "/")
        raise AssertionError

    def non_canonical(self, index: int) -> str:
        """Set an unused bit in the last character of a part that has unused bits."""
        alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
        for pad in range(4):
            token = self.token(claims(jti="x" * pad), header=self.header(x="y" * pad))
            parts = token.split(".")
            if len(parts[index]) % 4 in (2, 3):
                last = alphabet[alphabet.index(parts[index][-1]) | 1]
                parts[index] = parts[index][:-1] + last
                return ".".join(parts)
        raise AssertionError(index)

    # --- algorithm, key, signature ------------------------------------------------------------------------------------

    def algorithms(self) -> Iterator[dict[str, Any]]:
        k, v, t = self.keys, self.vector, self.token
        bad = "TokenAlgorithmRefused"
        none = f"{b64(dumps(self.header(alg='none')))}.{b64(dumps(claims()))}."
        yield v("alg-none", bad, "unsigned", none)
        yield v(
            "alg-none-mixed-case",
            bad,
            "unsigned",
            none.replace(b64(dumps(self.header(alg="none"))), b64(dumps(self.header(alg="nOnE")))),
        )
        yield v("alg-none-with-signature", bad, "a good signature under alg none", t(header=self.header(alg="none")))
        yield v("alg-missing", bad, "no alg", t(header=self.header(alg=...)))
        yield v("alg-empty", bad, "an empty alg", t(header=self.header(alg="")))
        yield v("alg-list", bad, "a list", t(header=self.header(alg=["ES256"])))
        yield v("alg-lower-case", bad, "names are compared with case", t(header=self.header(alg="es256")))
        public = k.rsa.private.public_key()
        for form, secret in (
            ("der", public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)),
            ("pem", public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)),
            ("jwk", dumps(k.rsa.jwk())),
        ):
            start = f"{b64(dumps(self.header(k.rsa, 'HS256')))}.{b64(dumps(claims()))}"
            mac = b64(hmac.digest(secret, start.encode(), "sha256"))
            yield v(
                f"hs256-rsa-public-{form}", bad, f"a MAC with the RSA public key in {form.upper()}", f"{start}.{mac}"
            )
        start = f"{b64(dumps(self.header(k.rsa, 'PS256')))}.{b64(dumps(claims()))}"
        pss = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
        assert isinstance(k.rsa.private, rsa.RSAPrivateKey)
        ps256 = k.rsa.private.sign(start.encode(), pss, hashes.SHA256())
        yield v("ps256", bad, "a good RSASSA-PSS signature: refused by name", f"{start}.{b64(ps256)}")
        start = f"{b64(dumps(self.header(alg='EdDSA')))}.{b64(dumps(claims()))}"
        yield v("eddsa", bad, "Ed25519: refused by name", f"{start}.{b64(k.edwards.sign(start.encode()))}")
        yield v("es256k", bad, "secp256k1: refused by name", t(header=self.header(alg="ES256K")))

    def keys_and_signatures(self) -> Iterator[dict[str, Any]]:
        k, v, t = self.keys, self.vector, self.token
        bad = "TokenSignatureRefused"
        yield v("kid-unknown", bad, "no key of that kid", t(header=self.header(kid="ec-9")))
        yield v("kid-empty", bad, "an empty kid is not an absent one", t(header=self.header(kid="")))
        yield v("kid-path", bad, "a kid is never a path", t(header=self.header(kid="../../dev/null")))
        yield v("kid-of-another-type", bad, "ES256 with the RSA key's kid", t(header=self.header(kid="rsa-1")))
        yield v("kid-of-another-curve", bad, "ES256 with the P-384 key's kid", t(header=self.header(kid="ec-384")))
        two = [trusted([k.ec.jwk(), k.other_ec.jwk()])]
        yield v("kid-absent-two-keys-fit", bad, "which key?", t(header=self.header(kid=...)), issuers=two)
        yield v("kid-of-another-key", bad, "the set's other key", t(header=self.header(kid="ec-2")), issuers=two)
        same = [trusted([k.ec.jwk(), Key(k.other_ec.private, "ec-1").jwk()])]
        yield v(
            "kid-ambiguous", "TrustInvalid", "two keys of one type and kid: the issuer's file is refused", issuers=same
        )
        weak = [trusted([k.weak_rsa.jwk()])]
        yield v(
            "rsa-1024", "TrustInvalid", "an RSA key of 1024 bits", t(key=k.weak_rsa, algorithm="RS256"), issuers=weak
        )
        secret = [trusted([{"kty": "oct", "k": b64(b"x" * 32), "kid": "ec-1"}])]
        yield v("oct-key", "TrustInvalid", "a symmetric key in the set", issuers=secret)
        for name, members in (
            ("key-alg-disagrees", {"alg": "ES384"}),
            ("key-use-enc", {"use": "enc"}),
            ("key-use-x509-svid", {"use": "x509-svid"}),
            ("key-ops-without-verify", {"key_ops": ["sign"]}),
        ):
            yield v(name, bad, f"the key says {json.dumps(members)}", issuers=[trusted([k.ec.jwk(**members)])])
        yield v("signed-by-another-key", bad, "the attacker's key under the issuer's kid", t(key=k.attacker))
        embedded = self.header(jwk=k.attacker.jwk())
        yield v("jwk-embedded", bad, "the attacker's key in the header", t(key=k.attacker, header=embedded))
        jku = self.header(jku="https://attacker.example/jwks.json", x5u="https://attacker.example/c.pem")
        yield v("jku-attacker", bad, "the attacker's set named in the header", t(key=k.attacker, header=jku))
        foreign = [
            trusted([k.ec.jwk()]),
            trusted([Key(k.other_ec.private, "ec-1").jwk()], issuer="https://b.example", name="b"),
        ]
        yield v(
            "key-of-another-issuer",
            bad,
            "issuer b's key, iss of the other",
            t(key=Key(k.other_ec.private, "ec-1")),
            issuers=foreign,
        )
        good = t()
        header, _, signed_part = good.split(".")
        forged = b64(dumps(claims(sub="workload-b")))
        both = policy(identity(subjects=[SUBJECT, "workload-b"]))
        yield v(
            "claims-changed",
            bad,
            "another sub under the same signature",
            f"{header}.{forged}.{signed_part}",
            access=both,
        )
        start = good.rpartition(".")[0]
        raw = unb64(signed_part)
        assert isinstance(k.ec.private, ec.EllipticCurvePrivateKey)
        der = k.ec.private.sign(start.encode(), ec.ECDSA(hashes.SHA256()))
        for name, data, description in (
            ("signature-empty", b"", "no signature under ES256"),
            ("es256-der", der, "the signature in DER instead of r ‖ s"),
            ("es256-zero", bytes(64), "r = s = 0 (CVE-2022-21449)"),
            ("es256-r-zero", bytes(32) + raw[32:], "r = 0"),
            ("es256-r-and-s-order", P256_ORDER.to_bytes(32, "big") * 2, "r = s = n"),
            ("es256-truncated", raw[:-1], "63 bytes"),
            ("es256-extended", raw + b"\0", "65 bytes"),
            ("es256-as-p384", bytes(16) + raw[:32] + bytes(16) + raw[32:], "r and s at the length of P-384"),
            ("es256-swapped", raw[32:] + raw[:32], "s ‖ r"),
        ):
            yield v(name, bad, description, f"{start}.{b64(data)}")
        yield from self.rsa_signatures()

    def rsa_signatures(self) -> Iterator[dict[str, Any]]:
        k, v, bad = self.keys, self.vector, "TokenSignatureRefused"
        start, _, text = self.token(key=k.rsa, algorithm="RS256").rpartition(".")
        raw = unb64(text)
        yield v("rs256-truncated", bad, "255 bytes", f"{start}.{b64(raw[:-1])}")
        yield v("rs256-leading-zero", bad, "257 bytes", f"{start}.{b64(bytes(1) + raw)}")
        yield v("rs256-bit-flipped", bad, "one bit", f"{start}.{b64(raw[:-1] + bytes([raw[-1] ^ 1]))}")
        yield v("rs256-one", bad, "the signature 1", f"{start}.{b64((1).to_bytes(256, 'big'))}")
        other_hash = b64(signature(start.encode(), k.rsa, "RS512"))
        yield v("rs256-signed-with-sha512", bad, "another hash than alg says", f"{start}.{other_hash}")
        yield v("rs256-signed-with-pss", bad, "PSS under RS256", self.pss_under_rs256())
        yield v("rs256-plus-modulus", bad, "s + n: the same value modulo n", self.plus_modulus())

    def pss_under_rs256(self) -> str:
        start = self.token(key=self.keys.rsa, algorithm="RS256").rpartition(".")[0]
        assert isinstance(self.keys.rsa.private, rsa.RSAPrivateKey)
        data = self.keys.rsa.private.sign(
            start.encode(), padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashes.SHA256()
        )
        return f"{start}.{b64(data)}"

    def plus_modulus(self) -> str:
        assert isinstance(self.keys.rsa.private, rsa.RSAPrivateKey)
        modulus = self.keys.rsa.private.public_key().public_numbers().n
        for number in range(10_000):
            token = self.token(claims(jti=str(number)), key=self.keys.rsa, algorithm="RS256")
            start, _, text = token.rpartition(".")
            value = int.from_bytes(unb64(text), "big") + modulus
            if value < 1 << 2048:
                return f"{start}.{b64(value.to_bytes(256, 'big'))}"
        raise AssertionError

    # --- claims -------------------------------------------------------------------------------------------------------

    def claims_refused(self) -> Iterator[dict[str, Any]]:
        v, t = self.vector, self.token
        bad = "TokenClaimsRefused"
        for name in ("iss", "sub", "aud", "exp", "iat"):
            yield v(f"{name}-missing", bad, f"no {name}", t(claims(**{name: ...})))
            yield v(f"{name}-null", bad, f"{name} is null", t(claims(**{name: None})))
        for name, value in (("iss", [ISSUER]), ("sub", [SUBJECT]), ("sub", 7), ("sub", ""), ("aud", {"a": AUDIENCE})):
            kind = "empty" if value == "" else {list: "list", int: "number", dict: "object"}[type(value)]
            yield v(f"{name}-{kind}", bad, f"{name} of the wrong kind", t(claims(**{name: value})))
        yield v("aud-wrong", bad, "another audience", t(claims(aud="https://kubernetes.default.svc")))
        yield v("aud-other-case", bad, "audiences are compared with case", t(claims(aud=AUDIENCE.upper())))
        yield v("aud-list-empty", bad, "an empty list", t(claims(aud=[])))
        yield v("aud-list-without", bad, "a list without the audience", t(claims(aud=["a", "b"])))
        yield v("aud-list-with-number", bad, "not only strings", t(claims(aud=[AUDIENCE, 1])))
        yield v("aud-list-nested", bad, "a list in the list", t(claims(aud=[[AUDIENCE]])))
        yield v("aud-list-too-long", bad, "65 audiences", t(claims(aud=[AUDIENCE, *map(str, range(64))])))
        for name, text, description in (
            ("exp-string", f'"{NOW + 540}"', "a string"),
            ("exp-true", "true", "a boolean"),
            ("exp-list", f"[{NOW + 540}]", "a list"),
            ("exp-negative", "-1", "before 1970"),
            ("exp-1e300", "1e300", "beyond any calendar"),
            ("exp-twenty-digits", "9" * 20, "beyond any calendar"),
            ("exp-year-10000", "253402300800", "beyond our calendar"),
            ("iat-string", f'"{NOW}"', "a string"),
            ("iat-false", "false", "a boolean"),
            ("nbf-string", f'"{NOW}"', "a string"),
            ("nbf-null", "null", "null, not absent"),
            ("nbf-true", "true", "a boolean"),
            ("nbf-negative", "-1", "before 1970"),
        ):
            yield v(name, bad, description, t(raw_claims(**{name[:3]: text})))
        yield v("exp-ten-years", bad, "ten years of lifetime", t(claims(exp=NOW + 315_360_000)))
        yield v("exp-over-token-age", bad, "a second longer than the policy allows", t(claims(exp=NOW - 60 + AGE + 1)))
        yield v("exp-equals-iat", bad, "no lifetime", t(claims(iat=NOW, exp=NOW)))
        yield v("exp-before-iat", bad, "a negative lifetime", t(claims(iat=NOW + 4, exp=NOW + 3)))

    def expired(self) -> Iterator[dict[str, Any]]:
        v, t = self.vector, self.token
        bad = "TokenExpired"
        yield v("exp-past", bad, "expired an hour ago", t(claims(iat=NOW - 3900, exp=NOW - 3600)))
        yield v("exp-past-leeway", bad, "exp + leeway is now", t(claims(exp=NOW - LEEWAY)))
        yield v("exp-now-without-leeway", bad, "RFC 7519, 4.1.4: before, not at", t(claims(exp=NOW)), leeway_seconds=0)
        late = t(claims(iat=NOW - 120, exp=NOW - 60.001))
        yield v("exp-past-leeway-fraction", bad, "a thousandth of a second late", late, leeway_seconds=60)
        yield v("iat-future", bad, "issued in an hour", t(claims(iat=NOW + 3600, exp=NOW + 4200)))
        yield v("iat-past-leeway", bad, "a second beyond the leeway", t(claims(iat=NOW + LEEWAY + 1)))
        yield v("nbf-future", bad, "valid in five minutes", t(claims(nbf=NOW + 300)))
        yield v("nbf-past-leeway", bad, "a second beyond the leeway", t(claims(nbf=NOW + LEEWAY + 1)))
        yield v("clock-in-1970", bad, "the host's clock is not set", now=60)

    # --- issuer and policy --------------------------------------------------------------------------------------------

    def issuers_and_policy(self) -> Iterator[dict[str, Any]]:
        k, v, t = self.keys, self.vector, self.token
        bad = "IssuerUntrusted"
        yield v("iss-unknown", bad, "an issuer that no file names", t(claims(iss="https://attacker.example")))
        yield v("iss-trailing-slash", bad, "issuers are compared exactly", t(claims(iss=ISSUER + "/")))
        yield v("iss-other-case", bad, "issuers are compared exactly", t(claims(iss=ISSUER.upper())))
        yield v("iss-with-space", bad, "issuers are compared exactly", t(claims(iss=ISSUER + " ")))
        twice = [trusted(k.mixed()), trusted([k.other_ec.jwk()], name="again")]
        yield v("iss-in-two-files", bad, "two files name the issuer: whose keys?", issuers=twice)
        yield v(
            "pinned-other-key", bad, "the policy pins another key", access=policy(identity(keys=[k.rsa.thumbprint()]))
        )
        bad = "IdentityRefused"
        yield v("sub-wrong", bad, "another workload", t(claims(sub="workload-b")))
        yield v("sub-prefix", bad, "subjects are compared whole", t(claims(sub=SUBJECT[:-1])))
        yield v("sub-longer", bad, "subjects are compared whole", t(claims(sub=SUBJECT + "/x")))
        yield v("sub-other-case", bad, "subjects are compared with case", t(claims(sub=SUBJECT.upper())))
        yield v("sub-look-alike", bad, "a Cyrillic a", t(claims(sub="workload-а")))
        yield v("sub-trailing-line-feed", bad, "a line feed at the end", t(claims(sub=SUBJECT + "\n")))
        yield v(
            "sub-pattern",
            bad,
            "subjects of the policy are no patterns",
            access=policy(identity(subjects=["workload-."])),
        )
        elsewhere = policy(identity(issuer="https://other.example"))
        yield v("iss-not-in-policy", bad, "trusted here, but the policy names another issuer", access=elsewhere)
        crossed = policy(identity(), identity(audience="y", subjects=["workload-b"]))
        yield v(
            "identities-crossed",
            bad,
            "audience of one identity, subject of another",
            t(claims(sub="workload-b")),
            access=crossed,
        )
        pins = policy(identity(keys=[k.rsa.thumbprint()]), identity(subjects=["workload-b"]))
        yield v("identities-crossed-pin", bad, "the pin of one identity is not lifted by another without", access=pins)

    # --- kinds --------------------------------------------------------------------------------------------------------

    def kubernetes_vector(
        self, name: str, expected: str, description: str, bound: object = None, sub: str | None = None
    ) -> Iterator[dict[str, Any]]:
        default = {
            "namespace": "models",
            "node": {"name": "n1", "uid": "1"},
            "pod": {"name": "reader-0", "uid": POD_UID},
            "serviceaccount": {"name": "reader", "uid": "2"},
        }
        account = "system:serviceaccount:models:reader" if sub is None else sub
        extra = {} if bound is ... else {"kubernetes.io": default if bound is None else bound}
        header = self.header(self.keys.rsa, "RS256", typ=...)
        payload = claims(iss=CLUSTER, sub=account, aud=[AUDIENCE], nbf=NOW - 60, jti="3", **extra)
        yield self.vector(
            name,
            expected,
            description,
            self.token(payload, key=self.keys.rsa, algorithm="RS256", header=header),
            issuers=[
                trusted([self.keys.rsa.jwk(use="sig", alg="RS256")], issuer=CLUSTER, kind="kubernetes", name="cluster")
            ],
            access=policy(identity(issuer=CLUSTER, subjects=[account])),
        )

    def kubernetes(self) -> Iterator[dict[str, Any]]:
        v, bad = self.kubernetes_vector, "TokenClaimsRefused"
        pod, account = {"name": "reader-0", "uid": POD_UID}, {"name": "reader", "uid": "2"}
        yield from v("kubernetes-unbound", bad, "no claim kubernetes.io", ...)
        yield from v("kubernetes-not-object", bad, "a string", "models")
        yield from v("kubernetes-namespace-missing", bad, "", {"pod": pod, "serviceaccount": account})
        yield from v("kubernetes-account-missing", bad, "", {"namespace": "models", "pod": pod})
        yield from v(
            "kubernetes-pod-missing", bad, "bound to nothing", {"namespace": "models", "serviceaccount": account}
        )
        for name, value in (
            ("missing", {"name": "x"}),
            ("number", {"uid": 1}),
            ("path", {"uid": "../x"}),
            ("empty", {"uid": ""}),
        ):
            bound = {"namespace": "models", "pod": value, "serviceaccount": account}
            yield from v(f"kubernetes-pod-uid-{name}", bad, "the pod's uid is not one", bound)
        bound = {"namespace": "default", "pod": pod, "serviceaccount": account}
        yield from v("kubernetes-namespace-disagrees", bad, "sub names another namespace", bound)
        bound = {"namespace": "models", "pod": pod, "serviceaccount": {"name": "writer"}}
        yield from v("kubernetes-account-disagrees", bad, "sub names another account", bound)
        bound = {"namespace": "models:reader", "pod": pod, "serviceaccount": {"name": "x"}}
        yield from v(
            "kubernetes-colon", bad, "a colon that shifts the border", bound, "system:serviceaccount:models:reader:x"
        )
        yield from v("kubernetes-sub-of-node", bad, "a node, not a service account", None, "system:node:n1")

    def spiffe_vector(
        self, name: str, expected: str, description: str, sub: str, *, issuer: str = DOMAIN, file_name: str = "main"
    ) -> Iterator[dict[str, Any]]:
        named = [identity(issuer=issuer, subjects=[sub])] if len(sub) <= 1024 else [identity(issuer=issuer)]
        yield self.vector(
            name,
            expected,
            description,
            self.token(claims(iss=issuer, sub=sub, aud=[AUDIENCE])),
            issuers=[trusted([self.keys.ec.jwk(use="jwt-svid")], issuer=issuer, kind="spiffe", name=file_name)],
            access=policy(*named),
        )

    def spiffe(self) -> Iterator[dict[str, Any]]:
        for name, sub, description in (
            ("no-scheme", "example.org/reader", "not a URI"),
            ("https", "https://example.org/reader", "another scheme"),
            ("scheme-upper-case", "SPIFFE://example.org/reader", "the scheme is lower case here"),
            ("domain-upper-case", "spiffe://Example.org/reader", "the trust domain is lower case"),
            ("domain-empty", "spiffe:///reader", "no trust domain"),
            ("domain-other", "spiffe://example.com/reader", "another trust domain"),
            ("domain-longer", "spiffe://example.org.attacker.example/reader", "another trust domain"),
            ("domain-port", "spiffe://example.org:443/reader", "a port"),
            ("domain-user", "spiffe://example.org@attacker.example/reader", "a user"),
            ("path-empty", "spiffe://example.org", "the trust domain's own id, no workload's"),
            ("path-slash", "spiffe://example.org/", "a trailing slash"),
            ("path-trailing-slash", "spiffe://example.org/reader/", "a trailing slash"),
            ("path-double-slash", "spiffe://example.org//reader", "an empty segment"),
            ("path-dot", "spiffe://example.org/./reader", "a dot segment"),
            ("path-dot-dot", "spiffe://example.org/x/../reader", "a dot segment"),
            ("path-ends-in-dot-dot", "spiffe://example.org/reader/..", "a dot segment"),
            ("path-percent", "spiffe://example.org/read%65r", "percent-encoding"),
            ("query", "spiffe://example.org/reader?x=1", "a query"),
            ("fragment", "spiffe://example.org/reader#x", "a fragment"),
            ("not-ascii", "spiffe://example.org/lesér", "beyond ASCII"),
            ("too-long", "spiffe://example.org/" + "x" * 2028, "2049 characters"),
        ):
            yield from self.spiffe_vector(f"spiffe-{name}", "TokenClaimsRefused", description, sub)

    # --- published ----------------------------------------------------------------------------------------------------

    def published(self) -> Iterator[dict[str, Any]]:
        """RFC 7515, appendices A.2 and A.3: the signature is right, and there is no sub, aud or iat."""
        payload = "eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ"
        for name, token, jwk in (
            (
                "rfc7515-a2",
                f"eyJhbGciOiJSUzI1NiJ9.{payload}.{RFC7515_A2_SIGNATURE}",
                {"kty": "RSA", "n": RFC7515_A2_MODULUS, "e": "AQAB"},
            ),
            (
                "rfc7515-a3",
                f"eyJhbGciOiJFUzI1NiJ9.{payload}.{RFC7515_A3_SIGNATURE}",
                {
                    "kty": "EC",
                    "crv": "P-256",
                    "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
                    "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0",
                },
            ),
        ):
            own = {
                "issuers": [trusted([jwk], issuer="joe")],
                "access": policy(identity(issuer="joe")),
                "now": 1300819379,
            }
            yield self.vector(name, "TokenClaimsRefused", "a good signature; no sub, aud, iat", token, **own)
            start, _, text = token.rpartition(".")
            flipped = f"{start}.{'A' if text[0] != 'A' else 'B'}{text[1:]}"
            yield self.vector(f"{name}-changed", "TokenSignatureRefused", "its signature changed", flipped, **own)

    def vectors(self) -> Iterator[dict[str, Any]]:
        for group in (
            self.accepted,
            self.malformed,
            self.algorithms,
            self.keys_and_signatures,
            self.claims_refused,
            self.expired,
            self.issuers_and_policy,
            self.kubernetes,
            self.spiffe,
            self.published,
        ):
            yield from group()


def main() -> None:
    """Write every vector anew."""
    folder = Path(__file__).parent
    for old in folder.glob("*.json"):
        old.unlink()
    for vector in Builder().vectors():
        path = folder / f"{vector['name']}.json"
        if path.exists():
            raise SystemExit(f"two vectors are named {vector['name']}")
        path.write_text(json.dumps(vector, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
