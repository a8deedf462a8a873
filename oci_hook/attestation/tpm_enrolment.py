"""The TPM's commands for an enrolment: endorsement key, primary keys, NV counters.

The hook never comes here. What is made, and where, is for `provisioning` to say. Specification: TPM 2.0 Library, Part
3; TCG EK Credential Profile; docs/specification.md, "Enrolment".
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any, Final, Literal

import tpm2_pytss as tss
from tpm2_pytss import utils

from oci_hook.attestation import tpm_codes
from oci_hook.attestation.device_record import COUNT_LIMIT
from oci_hook.attestation.ek_chain import is_certificate, split_certificates, without_padding
from oci_hook.attestation.esapi import Esapi, parsed, step
from oci_hook.attestation.key_checks import COUNTER_BYTES, counter_public
from oci_hook.attestation.structures import Handle, NvPublic, Public, parse_nv_public
from oci_hook.errors import DeviceInvalid, DeviceNotEnrolled, TpmFailed

_EK_TEMPLATES: Final = ("EK-RSA2048", "EK-ECC256", "EK-HIGH-ECC384")  # TCG EK Credential Profile: L-1, L-2, H-3
_WITHOUT_CERTIFICATE: Final = ((tss.TPM2_ALG.RSA, "EK-RSA2048"), (tss.TPM2_ALG.ECC, "EK-ECC256"))
_EK_CHAIN: Final = range(0x01C00100, 0x01C00200)  # TCG EK Credential Profile 2.5, 2.2.1.5
_NV_UNINITIALIZED: Final = 0x14A
_OWN: Final = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|restricted|"
_PRIMARIES: Final[Mapping[str, tuple[Any, str, str]]] = {
    "srk": (tss.ESYS_TR.OWNER, "ecc256:aes128cfb", _OWN + "decrypt"),
    "ak": (tss.ESYS_TR.ENDORSEMENT, "ecc256:ecdsa-sha256:null", _OWN + "sign"),
}


class EnrolmentCalls(Esapi):
    """What an enrolment does with a TPM."""

    def ek(self) -> tuple[bytes | None, Public]:
        """The EK certificate (DER; None: the TPM holds none) and the EK's public area.

        Raises:
            TpmFailed: No certificate, and neither RSA nor ECC; or a command failed.
        """
        with ExitStack() as handles:
            certificate, _, public = self._create_ek(handles)
            return certificate, public

    def ek_chain(self) -> tuple[bytes, ...]:
        """The certificates of the EK's authorities that the TPM holds (DER), of platforms that are authorities' own."""
        data = b""
        with step("read the EK certificate's chain"):
            _, found = self._esys.get_capability(tss.TPM2_CAP.HANDLES, _EK_CHAIN[0], len(_EK_CHAIN))
            for index in sorted(int(each) for each in found.data.handles if int(each) in _EK_CHAIN):
                with suppress(utils.NoSuchIndex):
                    data += self._read_reserved(index)
        return split_certificates(data)

    def _read_reserved(self, index: int) -> bytes:
        try:
            return bytes(utils.NVReadEK(self._esys)(index))
        except tss.TSS2_Exception as cause:
            if int(cause.rc) != _NV_UNINITIALIZED:
                raise
            raise utils.NoSuchIndex(index) from cause  # reserved by the maker, and never written

    def _create_ek(self, handles: ExitStack) -> tuple[bytes | None, Handle, Public]:
        """The EK that has a certificate, or else the one by TCG's template in the low range: always the same one."""
        with step("create the endorsement key"):
            certificate, template = self._ek_template()
            ek, public, *_ = self._esys.create_primary(None, template, tss.ESYS_TR.ENDORSEMENT)
            return certificate, self._flush_later(handles, ek), parsed(public)

    def _ek_template(self) -> tuple[bytes | None, Any]:
        for name in _EK_TEMPLATES:
            with suppress(ValueError):  # no certificate of this kind
                certificate, template = utils.create_ek_template(name, self._read_reserved)
                if certificate and is_certificate(certificate):  # some makers fill an index that they leave empty
                    return without_padding(certificate), template
        for algorithm, name in _WITHOUT_CERTIFICATE:
            if self._implements(algorithm):
                return None, utils.create_ek_template(name, self._read_reserved)[1]
        raise TpmFailed("the TPM makes neither RSA nor ECC keys", remedy="use another TPM")

    def _implements(self, algorithm: int) -> bool:
        _, found = self._esys.get_capability(tss.TPM2_CAP.ALGS, algorithm, 1)
        return any(int(each.alg) == algorithm for each in found.data.algorithms)

    def _create_primary(self, kind: Literal["srk", "ak"], handles: ExitStack) -> tuple[Handle, Public]:
        hierarchy, algorithms, attributes = _PRIMARIES[kind]
        template = tss.TPM2B_PUBLIC.parse(algorithms, objectAttributes=attributes)
        template.publicArea.unique.ecc.x = template.publicArea.unique.ecc.y = bytes(32)  # as TCG's SRK template
        with step("create a primary key"):
            primary, public, *_ = self._esys.create_primary(None, template, hierarchy)
        return self._flush_later(handles, primary), parsed(public)

    def _make_persistent(self, primary: Handle, place: int) -> None:
        with step(f"make a key persistent at {place:#x}"):
            self._esys.evict_control(tss.ESYS_TR.OWNER, primary, place)

    def _read_public(self, handle: Handle) -> Public:
        with step("read a public area"):
            return parsed(self._esys.read_public(handle)[0])

    def _serialise(self, handle: Handle) -> bytes:
        with step("serialise the storage root key"):
            return bytes(self._esys.tr_serialize(handle))

    # --- counters -----------------------------------------------------------------------------------------------------

    def _nv_read_public(self, index: Handle) -> NvPublic:
        with step("read an NV public area"):
            public, _ = self._esys.nv_read_public(index)
        return parse_nv_public(bytes(public.marshal()), what="the TPM's NV public area", error=DeviceInvalid)

    def _nv_define_counter(self, index: int) -> None:
        public, _ = tss.TPM2B_NV_PUBLIC.unmarshal(counter_public(index))
        with step(f"define a counter at {index:#x}"):
            self._esys.nv_define_space(None, public)

    def increment_counter(self, index: int) -> int:
        """Add one, which revokes every grant whose maximum is now passed; returns the new value."""
        with step(f"increment the counter at {index:#x}"):
            self._esys.nv_increment(self._esys.tr_from_tpmpublic(index))
        return self.read_counter(index)

    def counter_if_any(self, index: int) -> int | None:
        """A counter's value, as the bus delivers it; None if there is none, or it was never written."""
        found = self._find(index)
        if found is None:
            return None
        try:
            return int.from_bytes(bytes(self._esys.nv_read(found, COUNTER_BYTES)), "big")
        except tss.TSS2_Exception as cause:
            if int(cause.rc) == tpm_codes.RC_NV_UNINITIALIZED:
                return None
            raise tpm_codes.error_for(int(cause.rc), f"read the counter at {index:#x}") from cause

    def raise_counter(self, counter: NvPublic, value: int) -> int:
        """Count an owner's counter up to a value; nothing happens if it is there already.

        Args:
            counter: As enrolled.
            value: At most `COUNT_LIMIT` above what it is.

        Returns:
            Its value afterwards, which is at least `value`.

        Raises:
            DeviceNotEnrolled: It was deleted, or another index lies there.
            DeviceInvalid: `value` is too far above.
        """
        found = self._find(counter.index)
        if found is None or self._name(found) != counter.name:
            raise DeviceNotEnrolled(f"the TPM no longer holds the enrolled counter at {counter.index:#x}")
        now = self.read_counter(counter.index)
        if value - now > COUNT_LIMIT:
            raise DeviceInvalid(
                f"the counter is at {now}: more than {COUNT_LIMIT} steps below {value}",
                remedy="enrol again (`sczctl enroll request`), then ask the model's owner for new grants",
            )
        while now < value:
            now = self.increment_counter(counter.index)
        return now

    def read_counter(self, index: int) -> int:
        """A counter's value, as the bus delivers it."""
        with step(f"read the counter at {index:#x}"):
            data = self._esys.nv_read(self._esys.tr_from_tpmpublic(index), COUNTER_BYTES)
        return int.from_bytes(bytes(data), "big")
