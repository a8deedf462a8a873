"""The TPM itself: the only module that imports `tpm2_pytss`.

One `open_tpm` is one transaction under one lock. The commands are here, the flows that they make up in `tpm_release`,
`tpm_evidence` and `provisioning`. What comes back is bytes or our own frozen values; every response code becomes an
error of ours (`tpm_codes`). Calls block in C without limit: the hook runs them in a `deadline`.

The bus between this host and the TPM is not trusted: the session that unseals is salted to the SRK as it was serialised
at the enrolment, and its response is encrypted. Specification: TPM 2.0 Library, Part 3; TCG TSS 2.0 ESAPI;
docs/specification.md, "TPM policy" and "Enrolment".
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Final, Literal

os.environ["TSS2_LOG"] = "all+none"  # tpm2-tss writes to stderr otherwise; it reads this when it is loaded

import tpm2_pytss as tss
from tpm2_pytss import utils

from oci_hook.attestation import tpm_codes
from oci_hook.attestation.attest import pcr_digest
from oci_hook.attestation.ek_chain import without_padding
from oci_hook.attestation.host_device import HostDevice
from oci_hook.attestation.key_checks import COUNTER_BYTES, counter_public
from oci_hook.attestation.policy import pcr_selection
from oci_hook.attestation.provisioning import ProvisioningCommands
from oci_hook.attestation.sealed import SealedBlob, WrappedSecret
from oci_hook.attestation.structures import Handle, NvPublic, ObjectAttributes, Public, parse_nv_public, parse_public
from oci_hook.attestation.tpm_codes import Refusals, error_for
from oci_hook.attestation.tpm_evidence import EvidenceCommands
from oci_hook.attestation.tpm_lock import tpm_lock
from oci_hook.attestation.tpm_properties import PropertyCommands
from oci_hook.attestation.tpm_release import ReleaseCommands
from oci_hook.errors import DeviceInvalid, KeyRefused, TpmFailed, TpmUnavailable

_EK_TEMPLATES: Final = ("EK-RSA2048", "EK-ECC256", "EK-HIGH-ECC384")  # TCG EK Credential Profile: L-1, L-2, H-3
_LEFT_OVER: Final = (0x80000000, 0x02000000, 0x03000000)  # transient objects, loaded sessions, saved sessions
_FLUSH_CONTEXT: Final = bytes.fromhex("80010000000e00000165")
_MANAGED: Final = ("device:/dev/tpmrm", "tabrmd")
_NONE: Final = tss.ESYS_TR.NONE
_OWN_SCHEME: Final = tss.TPMT_SIG_SCHEME(scheme=tss.TPM2_ALG.NULL)
_OWN: Final = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|restricted|"
_PRIMARIES: Final[Mapping[str, tuple[Any, str, str]]] = {
    "srk": (tss.ESYS_TR.OWNER, "ecc256:aes128cfb", _OWN + "decrypt"),
    "ak": (tss.ESYS_TR.ENDORSEMENT, "ecc256:ecdsa-sha256:null", _OWN + "sign"),
}


@contextmanager
def _step(step: str, refusals: Refusals | None = None) -> Iterator[None]:
    """Turn a response code inside the block into an error of ours; `refusals` says what codes mean at this step."""
    try:
        yield
    except tss.TSS2_Exception as cause:
        raise error_for(int(cause.rc), step, refusals) from cause


def _unmarshal(kind: Any, data: bytes, what: str, error: type[KeyRefused | DeviceInvalid]) -> Any:
    try:
        value, _ = kind.unmarshal(data)
        if bytes(value.marshal()) == data:
            return value
    except tss.TSS2_Exception as cause:
        raise error(f"{what} is malformed") from cause
    raise error(f"{what} has bytes after its end, or a wrong size")  # tpm2-tss overlooks both


def _selection(pcrs: Sequence[int] | Mapping[int, bytes]) -> Any:
    return tss.TPML_PCR_SELECTION.unmarshal(pcr_selection(pcrs))[0]


# --- the owner's side: no TPM -----------------------------------------------------------------------------------------


def make_credential(ek: Public, secret: bytes, ak_name: bytes) -> tuple[bytes, bytes]:
    """TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET: a secret of 32 bytes for the TPM that holds this EK and this AK."""
    public, _ = tss.TPM2B_PUBLIC.unmarshal(ek.marshalled)
    id_object, encrypted_secret = utils.make_credential(public=public, credential=secret, name=ak_name)
    return bytes(id_object.marshal()), bytes(encrypted_secret.marshal())


def wrap_secret(srk: Public, secret: bytes, policy: bytes) -> WrappedSecret:
    """Seal a secret of 32 bytes to a device from afar: for TPM2_Import under its SRK; only `policy` opens it."""
    sensitive, public = tss.TPM2B_SENSITIVE.keyedhash_from_secret(secret, objectAttributes=tss.TPMA_OBJECT.NODA)
    public.publicArea.authPolicy = policy
    parent, _ = tss.TPM2B_PUBLIC.unmarshal(srk.marshalled)
    _, duplicate, seed = utils.wrap(newparent=parent.publicArea, public=public, sensitive=sensitive)
    return WrappedSecret(bytes(public.marshal()), bytes(duplicate.marshal()), bytes(seed.marshal()))


# --- the host's side --------------------------------------------------------------------------------------------------


@contextmanager
def open_tpm(tcti: str, lock_file: str | os.PathLike[str], *, timeout_seconds: float) -> Iterator[Tpm]:
    """One transaction with the TPM, under the lock; nothing of it stays in the TPM afterwards.

    Args:
        tcti: As tpm2-tools write it: `device:/dev/tpmrm0`, `swtpm:path=…`.
        lock_file: In a directory that only root can write.
        timeout_seconds: How long to wait for the lock. For the TPM itself see `deadline`.

    Raises:
        TpmTimeout: Others held the lock for too long.
        TpmUnavailable: There is no TPM there.
    """
    managed = tcti == "device" or tcti.startswith(_MANAGED)
    with tpm_lock(lock_file, timeout_seconds=timeout_seconds):
        try:
            with _connected(tcti) as tpm:
                if not managed:  # what a killed process left: three of them would block the TPM for good
                    tpm.flush_left_overs()
                yield tpm
        except BaseException:
            if not managed:
                _sweep(tcti)
            raise


@contextmanager
def _connected(tcti: str) -> Iterator[Tpm]:
    try:
        esys = tss.ESAPI(tcti)
    except tss.TSS2_Exception as cause:
        raise TpmUnavailable(f"no TPM answers at {tcti} (response code {int(cause.rc):#x})") from cause
    try:
        yield Tpm(esys)
    finally:
        esys.close()


def _sweep(tcti: str) -> None:
    """Flush by a new connection: after some failures a context accepts no command any more."""
    with suppress(TpmUnavailable, TpmFailed), _connected(tcti) as tpm:  # the first failure is the one to report
        tpm.flush_left_overs()


class Tpm(ReleaseCommands, EvidenceCommands, ProvisioningCommands, PropertyCommands):
    """An open TPM; made by `open_tpm` alone."""

    def __init__(self, esys: Any) -> None:
        self._esys = esys

    def flush_left_overs(self) -> None:
        """Flush every transient object and session; only under the lock, and never behind a resource manager."""
        with _step("flush what is loaded in the TPM"):
            for first in _LEFT_OVER:
                _, capability = self._esys.get_capability(tss.TPM2_CAP.HANDLES, first, 64)
                for handle in capability.data.handles:
                    # ESAPI has no object for a handle that it did not make itself: TPM2_FlushContext by hand.
                    self._esys.get_tcti().transmit(_FLUSH_CONTEXT + int(handle).to_bytes(4, "big"))
                    self._esys.get_tcti().receive()

    def _flush_later(self, handles: ExitStack, handle: Handle) -> Handle:
        handles.callback(self._flush, handle)
        return handle

    def _flush(self, handle: Handle) -> None:
        with suppress(tss.TSS2_Exception):  # after a broken response nothing works here; open_tpm sweeps later
            self._esys.flush_context(handle)

    def _find(self, handle: int) -> Handle | None:
        try:
            return Handle(self._esys.tr_from_tpmpublic(handle))
        except tss.TSS2_Exception as cause:
            if tpm_codes.base_code(int(cause.rc)) == tpm_codes.RC_HANDLE:
                return None
            raise error_for(int(cause.rc), f"look at {handle:#x}") from cause

    def _name(self, handle: Handle) -> bytes:
        with _step("compute a Name"):
            return bytes(self._esys.tr_get_name(handle))

    def _read_properties(self, first: int, count: int) -> dict[int, int]:
        with _step("read the TPM's properties"):
            _, found = self._esys.get_capability(tss.TPM2_CAP.TPM_PROPERTIES, first, count)
        return {int(each.property): int(each.value) for each in found.data.tpmProperties}

    # --- for evidence -------------------------------------------------------------------------------------------------

    def _pcr_read(self, pcrs: Sequence[int]) -> list[bytes]:
        with _step("read PCRs"):
            _, _, digests = self._esys.pcr_read(_selection(pcrs))
        return [bytes(digest) for digest in digests]

    def _quote(self, ak: Handle, pcrs: Sequence[int], qualifying_data: bytes) -> tuple[bytes, bytes]:
        with _step("quote PCRs"):
            attest, signature = self._esys.quote(ak, _selection(pcrs), qualifying_data)
        return bytes(attest), bytes(signature.marshal())

    def _certify(self, ak: Handle, key: Handle, qualifying_data: bytes) -> tuple[bytes, bytes]:
        with _step("certify a key"):
            attest, signature = self._esys.certify(key, ak, qualifying_data, _OWN_SCHEME)
        return bytes(attest), bytes(signature.marshal())

    def _nv_certify(self, ak: Handle, index: Handle, qualifying_data: bytes) -> tuple[bytes, bytes]:
        with _step("certify the counter"):
            attest, signature = self._esys.nv_certify(ak, index, qualifying_data, _OWN_SCHEME, size=COUNTER_BYTES)
        return bytes(attest), bytes(signature.marshal())

    # --- for a release ------------------------------------------------------------------------------------------------

    def _deserialise(self, serialised: bytes) -> Handle:
        try:
            return Handle(self._esys.tr_deserialize(serialised))
        except tss.TSS2_Exception as cause:
            raise DeviceInvalid("device.json: the serialised SRK is malformed") from cause

    def _import_sealed(self, srk: Handle, sealed: SealedBlob, handles: ExitStack) -> Handle:
        public = _unmarshal(tss.TPM2B_PUBLIC, sealed.public, "the sealed object's public area", KeyRefused)
        duplicate = _unmarshal(tss.TPM2B_PRIVATE, sealed.duplicate, "the sealed object", KeyRefused)
        seed = _unmarshal(tss.TPM2B_ENCRYPTED_SECRET, sealed.seed, "the sealed object's seed", KeyRefused)
        no_inner = tss.TPMT_SYM_DEF_OBJECT(algorithm=tss.TPM2_ALG.NULL)
        with _step("import the sealed object: it is not for this TPM, or was changed", tpm_codes.IMPORT):
            private = self._esys.import_(srk, tss.TPM2B_DATA(), public, duplicate, seed, no_inner)
            return self._flush_later(handles, self._esys.load(srk, private, public))

    def _verify_signature(self, public: bytes, digest: bytes, signature: bytes, handles: ExitStack) -> object:
        key_public, _ = tss.TPM2B_PUBLIC.unmarshal(public)
        parsed, _ = tss.TPMT_SIGNATURE.unmarshal(signature)
        with _step("verify the owner's signature on the boot policy", tpm_codes.VERIFY_SIGNATURE):
            key = self._flush_later(handles, self._esys.load_external(key_public, hierarchy=tss.ESYS_TR.OWNER))
            return self._esys.verify_signature(key, digest, parsed)

    def _session(self, salt_key: Handle, symmetric: Any, handles: ExitStack) -> Handle:
        with _step("begin a session"):
            session = self._esys.start_auth_session(salt_key, _NONE, tss.TPM2_SE.POLICY, symmetric, tss.TPM2_ALG.SHA256)
        return self._flush_later(handles, session)

    def _pinned_session(self, srk: Handle, handles: ExitStack) -> Handle:
        symmetric = tss.TPMT_SYM_DEF(algorithm=tss.TPM2_ALG.AES)
        symmetric.keyBits.sym, symmetric.mode.sym = 128, tss.TPM2_ALG.CFB
        session = self._session(srk, symmetric, handles)
        with _step("let the session encrypt responses"):
            self._esys.trsess_set_attributes(session, tss.TPMA_SESSION.CONTINUESESSION | tss.TPMA_SESSION.ENCRYPT)
        return session

    def _policy_pcr(self, session: Handle, pcrs: Mapping[int, bytes]) -> None:
        with _step("compare the PCRs with the approved boot state: they differ", tpm_codes.POLICY_PCR):
            self._esys.policy_pcr(session, pcr_digest(pcrs), _selection(pcrs))

    def _policy_unseal_only(self, session: Handle) -> None:
        with _step("bind the policy to unsealing"):
            self._esys.policy_command_code(session, tss.TPM2_CC.Unseal)

    def _policy_authorize(self, session: Handle, policy: bytes, ref: bytes, key_name: bytes, ticket: object) -> None:
        with _step("match the policy with what the owner signed", tpm_codes.POLICY_AUTHORIZE):
            self._esys.policy_authorize(session, policy, key_name, ticket, policy_ref=ref)

    def _policy_nv(self, session: Handle, counter: Handle, maximum: int) -> None:
        operand = tss.TPM2B_OPERAND(maximum.to_bytes(COUNTER_BYTES, "big"))
        with _step("compare the owner's counter with the grant's maximum", tpm_codes.POLICY_NV):
            self._esys.policy_nv(counter, counter, session, operand, tss.TPM2_EO.UNSIGNED_LE)

    def _policy_restart(self, session: Handle) -> None:
        with _step("begin the policy again"):
            self._esys.policy_restart(session)

    def _unseal(self, session: Handle, item: Handle) -> bytes:
        with _step("unseal: the object is sealed to another policy", tpm_codes.UNSEAL):
            return bytes(self._esys.unseal(item, session1=session))

    # --- for an enrolment ---------------------------------------------------------------------------------------------

    def ek(self) -> tuple[bytes, Public]:
        """The EK certificate (DER) and the EK's public area; TpmFailed if the TPM holds no certificate."""
        with ExitStack() as handles:
            certificate, _, public = self._create_ek(handles)
            return certificate, public

    def activate_credential(self, device: HostDevice, id_object: bytes, encrypted_secret: bytes) -> bytes:
        """Open an owner's challenge; EnrolmentRefused: for another TPM or another AK; DeviceInvalid: malformed."""
        blob = _unmarshal(tss.TPM2B_ID_OBJECT, id_object, "the challenge", DeviceInvalid)
        secret = _unmarshal(tss.TPM2B_ENCRYPTED_SECRET, encrypted_secret, "the challenge's secret", DeviceInvalid)
        ak = self._enrolled_key(device.ak_handle, device.ak.name, "attestation key")
        with ExitStack() as handles:
            _, ek, public = self._create_ek(handles)
            session = tss.ESYS_TR.PASSWORD
            if not public.attributes & ObjectAttributes.USER_WITH_AUTH:  # the templates L-1 and L-2: by a policy
                session = self._session(_NONE, tss.TPMT_SYM_DEF(algorithm=tss.TPM2_ALG.NULL), handles)
                with _step("authorise the use of the endorsement key"):
                    self._esys.policy_secret(tss.ESYS_TR.ENDORSEMENT, session, expiration=0)
            with _step("open the challenge: it is for another TPM", tpm_codes.ACTIVATE):
                return bytes(self._esys.activate_credential(ak, ek, blob, secret, session2=session))

    def _create_ek(self, handles: ExitStack) -> tuple[bytes, Handle, Public]:
        with _step("create the endorsement key"):
            reader = utils.NVReadEK(self._esys)
            for name in _EK_TEMPLATES:
                with suppress(ValueError):  # no certificate of this kind
                    certificate, template = utils.create_ek_template(name, reader)
                    if certificate:
                        ek, public, *_ = self._esys.create_primary(None, template, tss.ESYS_TR.ENDORSEMENT)
                        return without_padding(certificate), self._flush_later(handles, ek), _parsed(public)
        raise TpmFailed(
            "the TPM holds no EK certificate for RSA-2048, P-256 or P-384",
            remedy="ask its maker; a virtual TPM gets one from `swtpm_setup --create-ek-cert`",
        )

    def _create_primary(self, kind: Literal["srk", "ak"], handles: ExitStack) -> tuple[Handle, Public]:
        hierarchy, algorithms, attributes = _PRIMARIES[kind]
        template = tss.TPM2B_PUBLIC.parse(algorithms, objectAttributes=attributes)
        template.publicArea.unique.ecc.x = template.publicArea.unique.ecc.y = bytes(32)  # as TCG's SRK template
        with _step("create a primary key"):
            primary, public, *_ = self._esys.create_primary(None, template, hierarchy)
        return self._flush_later(handles, primary), _parsed(public)

    def _make_persistent(self, primary: Handle, place: int) -> None:
        with _step(f"make a key persistent at {place:#x}"):
            self._esys.evict_control(tss.ESYS_TR.OWNER, primary, place)

    def _read_public(self, handle: Handle) -> Public:
        with _step("read a public area"):
            return _parsed(self._esys.read_public(handle)[0])

    def _serialise(self, handle: Handle) -> bytes:
        with _step("serialise the storage root key"):
            return bytes(self._esys.tr_serialize(handle))

    # --- counters -----------------------------------------------------------------------------------------------------

    def _nv_read_public(self, index: Handle) -> NvPublic:
        with _step("read an NV public area"):
            public, _ = self._esys.nv_read_public(index)
        return parse_nv_public(bytes(public.marshal()), what="the TPM's NV public area", error=DeviceInvalid)

    def _nv_define_counter(self, index: int) -> None:
        public, _ = tss.TPM2B_NV_PUBLIC.unmarshal(counter_public(index))
        with _step(f"define a counter at {index:#x}"):
            self._esys.nv_define_space(None, public)

    def increment_counter(self, index: int) -> int:
        """Add one, which revokes every grant whose maximum is now passed; returns the new value."""
        with _step(f"increment the counter at {index:#x}"):
            self._esys.nv_increment(self._esys.tr_from_tpmpublic(index))
        return self.read_counter(index)

    def read_counter(self, index: int) -> int:
        """A counter's value, as the bus delivers it."""
        with _step(f"read the counter at {index:#x}"):
            data = self._esys.nv_read(self._esys.tr_from_tpmpublic(index), COUNTER_BYTES)
        return int.from_bytes(bytes(data), "big")


def _parsed(public: Any) -> Public:
    return parse_public(bytes(public.marshal()), what="the TPM's public area", error=DeviceInvalid)
