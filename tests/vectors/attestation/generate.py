"""Writes the attestation vectors: one failure a file, named after it, with the class that must be raised.

    .venv/bin/python tests/vectors/attestation/generate.py     makes fresh keys and writes every file beside it anew

What a TPM would sign is marshalled by hand and signed with `cryptography` alone, not with the code under test. Private
keys are not kept. Each file is complete: `area`, `expected` (an error's class, or "accepted"), `check` (its number in
docs/specification.md, null where there is none), `owner`, and by area:

    appraisal    ak_public, extra_data, boot_policy, evidence; `words` stand in the message
    enrolment    request and answer as texts, secret, authorities (PEM), now, device_class (`enrolment_parts`)
    boot-policy  document as a text, model, class; check 0 is the form, 1 to 3 are those of `verify_boot_policy`
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import tpm_parts as t
from enrolment_parts import Device, Enrolments
from owner_parts import CLASS, GRUB, MODEL, UKI, OwnerKeys, Vector, measured, pcrs_json

__all__ = ["Builder", "Device"]


class Appraisals:
    """Evidence of a start, against a boot policy with a GRUB form and one of a unified kernel image."""

    def __init__(self, owner: OwnerKeys) -> None:
        self.owner = owner
        self.key, self.other_key = t.p256(), t.p256()
        self.ak = t.ecc_public(self.key, t.AK_ATTRIBUTES, scheme=t.ECDSA_SHA256)
        self.other_ak = t.ecc_public(self.other_key, t.AK_ATTRIBUTES, scheme=t.ECDSA_SHA256)
        self.extra_data = hashlib.sha256(b"this start").digest()
        self.policy = owner.policy(owner.form(measured(GRUB)), owner.form(measured(UKI)))

    def quote(self, pcrs: Mapping[int, bytes] | None = None, **changes: Any) -> bytes:
        values = measured(GRUB) if pcrs is None else pcrs
        selected = changes.pop("selected", None)
        kind, attested = changes.pop("kind", t.ST_QUOTE), changes.pop("attested", t.quote_info(values, selected))
        base = {"signer": t.qualified_name(self.ak), "extra_data": self.extra_data}
        return t.attest(kind, attested, **{**base, **changes})

    def vector(
        self,
        name: str,
        expected: str,
        check: int | None,
        description: str,
        attest: bytes | None = None,
        *,
        signature: bytes | None = None,
        pcrs: Mapping[int, bytes] | None = None,
        words: tuple[str, ...] = (),
    ) -> Vector:
        attest = self.quote() if attest is None else attest
        signature = t.signed(self.key, attest) if signature is None else signature
        return {
            "name": f"appraisal-{name}",
            "area": "appraisal",
            "description": description,
            "expected": expected,
            "check": check,
            "words": list(words),
            "owner": self.owner.document,
            "ak_public": t.b64(t.tpm2b(self.ak)),
            "extra_data": self.extra_data.hex(),
            "boot_policy": self.policy,
            "evidence": {
                "attest": t.b64(attest),
                "signature": t.b64(signature),
                "pcrs": pcrs_json(measured(GRUB) if pcrs is None else pcrs),
            },
        }

    def accepted(self) -> Iterator[Vector]:
        v, good = self.vector, "accepted"
        yield v("good", good, None, "the state of the GRUB form")
        uki = measured(UKI)
        yield v("good-unified-kernel-image", good, None, "the second form", self.quote(uki), pcrs=uki)
        wide = t.selections(t.selection(GRUB, size=4))
        yield v("good-four-byte-selection", good, None, "a TPM with 32 PCRs", self.quote(selected=wide))
        yield v("good-clock-not-safe", good, None, "after a crash; the clock is not used", self.quote(safe=0))

    def structure(self) -> Iterator[Vector]:
        v, bad = self.vector, "EvidenceRefused"
        yield v("magic-zero", bad, 1, "data that a restricted key would not sign", self.quote(magic=0))
        yield v("magic-one-off", bad, 1, "one bit", self.quote(magic=t.GENERATED ^ 1))
        certified = self.quote(kind=t.ST_CERTIFY, attested=t.certify_info(self.other_ak))
        yield v("type-certify", bad, 1, "a genuine certification instead of a quote", certified)
        nv = self.quote(kind=t.ST_NV, attested=t.nv_certify_info(bytes(34), bytes(8)))
        yield v("type-nv-certify", bad, 1, "a genuine certification of an NV index", nv)
        yield v("type-time", bad, 1, "TPM2_GetTime's structure", self.quote(kind=t.ST_TIME))
        yield v("type-certify-body-quote", bad, 1, "the body is a quote's", self.quote(kind=t.ST_CERTIFY))
        quote = self.quote()
        yield v("attest-truncated", bad, 1, "the last byte is missing", quote[:-1])
        yield v("attest-trailing", bad, 1, "a byte after the end", quote + b"\0")
        yield v("attest-magic-alone", bad, 1, "four bytes", quote[:4])
        yield v("attest-too-long", "DeviceInvalid", None, "4097 bytes", quote + bytes(4097 - len(quote)))
        yield v("attest-safe-two", bad, 1, "TPMI_YES_NO is 0 or 1", self.quote(safe=2))
        banks = t.selections(*[t.selection(GRUB)] * 17)
        yield v("attest-17-banks", bad, 1, "more banks than there are hash algorithms", self.quote(selected=banks))
        promised = struct.pack(">I", 0xFFFFFFFF) + t.selection(GRUB)
        yield v("attest-count-beyond-end", bad, 1, "four billion banks promised", self.quote(selected=promised))

    def signatures(self) -> Iterator[Vector]:
        quote = self.quote()
        good = t.signed(self.key, quote)
        r, s = (int.from_bytes(part, "big") for part in (good[6:38], good[40:72]))
        changed = t.flipped(quote, quote.index(struct.pack(">Q", 123_456)) + 7)
        yield self.vector("attest-bit-flipped", "EvidenceRefused", 2, "a bit of the clock", changed, signature=good)
        for name, description, signature in (
            ("signed-by-another-key", "another key, else right", t.signed(self.other_key, quote)),
            ("signature-bit-flipped", "the last bit", t.flipped(good)),
            ("signature-rsassa", "another scheme's number", t.signature(r, s, scheme=t.RSASSA)),
            ("signature-sha384", "another hash's number", t.signature(r, s, digest=t.SHA384)),
            ("signature-zero", "r = s = 0", t.signature(0, 0)),
            ("signature-empty-parts", "r and s of no bytes", t.signature(0, 0, size=0)),
            ("signature-33-bytes", "r and s longer than the curve", t.signature(r, s, size=33)),
            ("signature-swapped", "s before r", t.signature(s, r)),
            ("signature-trailing", "a byte after the end", good + b"\0"),
            ("signature-truncated", "the last byte is missing", good[:-1]),
            ("signature-of-another-quote", "a good one of another quote", t.signed(self.key, self.quote(safe=0))),
        ):
            yield self.vector(name, "EvidenceRefused", 2, description, quote, signature=signature)

    def occasion(self) -> Iterator[Vector]:
        v, bad = self.vector, "EvidenceRefused"
        other = hashlib.sha256(b"another start").digest()
        yield v("extra-data-other", bad, 3, "replayed from another start", self.quote(extra_data=other))
        yield v("extra-data-empty", bad, 3, "no qualifying data", self.quote(extra_data=b""))
        yield v("extra-data-prefix", bad, 3, "31 bytes of it", self.quote(extra_data=self.extra_data[:31]))
        yield v("extra-data-longer", bad, 3, "a byte more", self.quote(extra_data=self.extra_data + b"\0"))
        names = {
            "other-key": (t.qualified_name(self.other_ak), "another AK's"),
            "owner-hierarchy": (t.qualified_name(self.ak, t.OWNER_HIERARCHY), "the key as a primary of the owner's"),
            "name": (t.object_name(self.ak), "the Name, not the Qualified Name"),
            "empty": (b"", "no name at all"),
        }
        for name, (signer, description) in names.items():
            yield v(f"qualified-signer-{name}", bad, 4, description, self.quote(signer=signer))

    def selected(self) -> Iterator[Vector]:
        v, bad = self.vector, "EvidenceRefused"
        less, more = measured(GRUB[1:]), measured((*GRUB, 10))
        yield v("selection-less", bad, 5, "PCR 4 is left out", self.quote(less), pcrs=less)
        yield v("selection-more", bad, 5, "PCR 10 as well", self.quote(more), pcrs=more)
        both = measured(sorted({*GRUB, *UKI}))
        yield v("selection-of-both-forms", bad, 5, "the PCRs of two forms at once", self.quote(both), pcrs=both)
        for name, banks in {
            "sha1-bank": [t.selection(GRUB, t.SHA1)],
            "sha384-bank": [t.selection(GRUB, t.SHA384)],
            "two-banks": [t.selection(GRUB), t.selection(GRUB, t.SHA1)],
            "two-of-one-bank": [t.selection(GRUB[:2]), t.selection(GRUB[2:])],
            "none": [],
        }.items():
            quote = self.quote(selected=t.selections(*banks))
            yield v(f"selection-{name}", bad, 5, "another bank, or not one alone", quote)
        empty = t.selections(t.selection(()))
        yield v("selection-empty", bad, 5, "no PCR of the bank", self.quote({}, selected=empty))
        yield v("values-less", bad, 5, "PCR 9 is not at hand", pcrs=measured(GRUB[:-1]))
        yield v("values-more", bad, 5, "PCR 10 is at hand as well", pcrs=more)
        yield v("values-of-other-form", bad, 5, "those of the other form", pcrs=measured(UKI))

    def values(self) -> Iterator[Vector]:
        v, bad = self.vector, "EvidenceRefused"
        other = measured(GRUB, "another boot")
        yield v("values-not-quoted", bad, 6, "the approved values beside a quote of others", self.quote(other))
        one = {**measured(GRUB), 9: other[9]}
        yield v("values-one-not-quoted", bad, 6, "one value of another boot at hand", pcrs=one)
        swapped = {**measured(GRUB), 8: measured(GRUB)[9], 9: measured(GRUB)[8]}
        yield v("values-swapped", bad, 6, "PCR 8 and 9 changed places", pcrs=swapped)
        info = t.selections(t.selection(GRUB)) + t.tpm2b(b"")
        yield v("values-digest-empty", bad, 6, "a digest of no bytes", self.quote(attested=info))
        uki = {**measured(UKI), 12: other[9]}
        image = ("PCR 12 (kernel command line and credentials given to the unified kernel image)",)
        for name, description, values, words in (
            ("other-kernel", "another kernel", one, ("PCR 9 (kernel and initrd, as GRUB read them)",)),
            ("nothing", "nothing as approved", other, ("PCR 4 (boot loader)", "PCR 7 (secure boot and its keys)")),
            ("other-command-line", "of the second form", uki, image),
            ("swapped", "approved values, elsewhere", swapped, ("PCR 8 (GRUB commands and kernel command line)",)),
        ):
            quote = self.quote(values)
            yield v(f"state-{name}", "BootStateRefused", 7, description, quote, pcrs=values, words=words)

    def vectors(self) -> Iterator[Vector]:
        for group in (self.accepted, self.structure, self.signatures, self.occasion, self.selected, self.values):
            yield from group()


class BootPolicies:
    """Boot policies, signed by hand."""

    def __init__(self, owner: OwnerKeys) -> None:
        self.owner, self.other = owner, OwnerKeys("other")

    def vector(self, name: str, expected: str, check: int | None, description: str, document: Any = None) -> Vector:
        document = self.owner.policy(self.owner.form(measured(GRUB))) if document is None else document
        return {
            "name": f"boot-policy-{name}",
            "area": "boot-policy",
            "description": description,
            "expected": expected,
            "check": check,
            "owner": self.owner.document,
            "model": MODEL,
            "class": CLASS,
            "document": document if isinstance(document, str) else t.dumps(document),
        }

    def accepted(self) -> Iterator[Vector]:
        v, o, good = self.vector, self.owner, "accepted"
        yield v("good", good, None, "GRUB")
        yield v("good-unified-kernel-image", good, None, "11 and 12", o.policy(o.form(measured((11, 12)))))
        every = [pcr for pcr in range(24) if pcr not in (16, 23)]
        yield v("good-every-pcr", good, None, "all but 16 and 23", o.policy(o.form(measured(every))))
        forms = [o.form(measured(GRUB, f"kernel {number}")) for number in range(32)]
        yield v("good-32-forms", good, None, "as many as there may be", o.policy(*forms))

    def coverage(self) -> Iterator[Vector]:
        v, o, bad = self.vector, self.owner, "BootPolicyInvalid"
        for pcrs in ((7,), (4, 8), (4, 9), (7, 8, 9), (11,), (7, 12, 14), (0, 1, 2, 3, 5, 6, 7)):
            name = "-".join(map(str, pcrs))
            yield v(f"coverage-{name}", bad, 0, "covers too little", o.policy(o.form(measured(pcrs))))
        for pcr in (16, 23):
            form = o.form(measured((*GRUB, pcr)))
            yield v(f"pcr-{pcr}", bad, 0, "root can reset it", o.policy(form))
        yield v("pcr-24", bad, 0, "there is none", o.policy(o.form(measured((*GRUB, 24)))))
        zeros, ones = {**measured(GRUB), 9: bytes(32)}, {**measured(GRUB), 17: b"\xff" * 32}
        yield v("value-zeros", bad, 0, "PCR 9 was never extended", o.policy(o.form(zeros)))
        yield v("value-ones", bad, 0, "PCR 17 without a dynamic launch", o.policy(o.form(ones)))

    def malformed(self) -> Iterator[Vector]:
        v, o, bad = self.vector, self.owner, "BootPolicyInvalid"
        good = o.form(measured(GRUB))
        text, pcrs = t.dumps(o.policy(good)), good["pcrs"]
        yield v("value-20-bytes", bad, 0, "a SHA-1 value", o.policy(o.form({**measured(GRUB), 4: b"\x11" * 20})))
        yield v(
            "value-upper-case", bad, 0, "one spelling", o.policy({**good, "pcrs": {**pcrs, "4": pcrs["4"].upper()}})
        )
        for name, spelled in (("leading-zero", "04"), ("plus", "+4"), ("space", " 4"), ("other-digits", "\\u0664")):
            yield v(f"pcr-{name}", bad, 0, "one spelling only", text.replace('"4":', f'"{spelled}":'))
        twice = f'"4":"{pcrs["4"]}","4":'
        yield v("pcr-twice", bad, 0, "a duplicate key", text.replace('"4":', twice))
        yield v("pcrs-empty", bad, 0, "no PCR", o.policy({**good, "pcrs": {}}))
        yield v("pcrs-list", bad, 0, "a list", o.policy({**good, "pcrs": []}))
        yield v("forms-0", bad, 0, "no form", o.policy())
        forms = [o.form(measured(GRUB, f"kernel {number}")) for number in range(33)]
        yield v("forms-33", bad, 0, "one form too many", o.policy(*forms))
        yield v("type-unknown", bad, 0, "a form of another type", o.policy(good, {**good, "type": "event-log"}))
        yield v("bank-sha1", bad, 0, "another bank", o.policy({**good, "bank": "sha1"}))
        unnamed = {key: value for key, value in good.items() if key != "bank"}
        yield v("bank-missing", bad, 0, "no bank", o.policy(unnamed))
        yield v("form-extra-field", bad, 0, "a field that nobody knows", o.policy({**good, "optional": True}))
        long = {"r": "00" + good["signature"]["r"], "s": good["signature"]["s"]}
        yield v("signature-33-bytes", bad, 0, "r too long", o.policy({**good, "signature": long}))
        yield v("schema-other", bad, 0, "another schema", o.policy(good, schema="scz-smm/boot-policy/v2"))
        yield v("created-true", bad, 0, "a boolean", o.policy(good, created=True))
        yield v("model-path", bad, 0, "a path", o.policy(good, model="../resnet"))
        yield v("trailing", bad, 0, "a second object", text + "{}")
        yield v("not-json", bad, 0, "cut off", text[:-1])

    def refused(self) -> Iterator[Vector]:
        v, o, bad = self.vector, self.owner, "BootPolicyRefused"
        good, other = o.form(measured(GRUB)), o.form(measured(GRUB, "another boot"))
        yield v("owner-other", bad, 1, "says it is another owner's", o.policy(good, owner=self.other.owner_id))
        yield v("model-other", bad, 1, "says it is for another model", o.policy(good, model="bert"))
        yield v("class-other", bad, 1, "says it is for another class", o.policy(good, **{"class": "lax"}))
        flipped = t.flipped(bytes.fromhex(good["policy"])).hex()
        for name, description, forms in (
            ("not-of-values", "signed, with the values of another boot", [{**good, "pcrs": other["pcrs"]}]),
            ("of-fewer-pcrs", "a PCR the TPM would not enforce", [{**good, "pcrs": {**good["pcrs"], "14": "11" * 32}}]),
            ("bit-flipped", "the last bit", [{**good, "policy": flipped}]),
            ("of-second-form-not-of-values", "the first is good", [good, {**good, "pcrs": other["pcrs"]}]),
        ):
            yield v(f"policy-{name}", bad, 2, description, o.policy(*forms))
        swapped = {"r": good["signature"]["s"], "s": good["signature"]["r"]}
        for name, forms in {
            "other-owner": [o.form(measured(GRUB), key=self.other.boot_policy)],
            "manifest-key": [o.form(measured(GRUB), key=o.manifest)],
            "other-model": [o.form(measured(GRUB), model="bert")],
            "other-class": [o.form(measured(GRUB), device_class="lax")],
            "other-form": [{**good, "signature": other["signature"]}],
            "zero": [{**good, "signature": {"r": "00" * 32, "s": "00" * 32}}],
            "swapped": [{**good, "signature": swapped}],
            "second-form": [good, {**other, "signature": good["signature"]}],
        }.items():
            description = "not signed by the owner for this model and class"
            yield v(f"signature-{name}", bad, 3, description, o.policy(*forms))

    def vectors(self) -> Iterator[Vector]:
        for group in (self.accepted, self.coverage, self.malformed, self.refused):
            yield from group()


class Builder:
    """All areas, with one owner."""

    def __init__(self) -> None:
        self.owner = OwnerKeys()
        self.appraisals = Appraisals(self.owner)
        self.boot_policies = BootPolicies(self.owner)
        self.enrolments = Enrolments(self.owner)

    def vectors(self) -> Iterator[Vector]:
        for area in (self.appraisals, self.boot_policies, self.enrolments):
            yield from area.vectors()


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
