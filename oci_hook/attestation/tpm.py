"""The TPM itself: transactions, and the commands of evidence and release.

One `open_tpm` is one transaction under one lock. The commands are here, in `esapi` and in `tpm_enrolment`, the flows
that they make up in `tpm_release`, `tpm_evidence` and `provisioning`. What comes back is bytes or our own frozen
values. Calls block in C without limit: the hook runs them in a `deadline`.

The bus between this host and the TPM is not trusted: the session that unseals is salted to the SRK as it was serialised
at the enrolment, and its response is encrypted. Specification: TPM 2.0 Library, Part 3; TCG TSS 2.0 ESAPI;
docs/specification.md, "TPM policy" and "Enrolment".
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Final

import tpm2_pytss as tss
from tpm2_pytss import utils

from oci_hook.attestation import tpm_codes
from oci_hook.attestation.attest import pcr_digest
from oci_hook.attestation.esapi import NONE, selection, step, unmarshal
from oci_hook.attestation.host_device import HostDevice
from oci_hook.attestation.key_checks import COUNTER_BYTES
from oci_hook.attestation.policy import RESETS_PLACE
from oci_hook.attestation.provisioning import ProvisioningCommands
from oci_hook.attestation.sealed import SealedBlob, WrappedSecret
from oci_hook.attestation.structures import Handle, ObjectAttributes, Public
from oci_hook.attestation.tpm_codes import PcrChangedError
from oci_hook.attestation.tpm_enrolment import EnrolmentCalls
from oci_hook.attestation.tpm_evidence import EvidenceCommands
from oci_hook.attestation.tpm_lock import tpm_lock
from oci_hook.attestation.tpm_properties import PropertyCommands
from oci_hook.attestation.tpm_release import ReleaseCommands
from oci_hook.errors import DeviceInvalid, KeyRefused, SczError, TpmFailed, TpmUnavailable

_LEFT_OVER: Final = (0x80000000, 0x02000000, 0x03000000)  # transient objects, loaded sessions, saved sessions
_FLUSH_CONTEXT: Final = bytes.fromhex("80010000000e00000165")
_MANAGED: Final = ("device:/dev/tpmrm", "tabrmd")
_OWN_SCHEME: Final = tss.TPMT_SIG_SCHEME(scheme=tss.TPM2_ALG.NULL)


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
    managed, swept = tcti == "device" or tcti.startswith(_MANAGED), False
    with tpm_lock(lock_file, timeout_seconds=timeout_seconds):
        try:
            with _connected(tcti) as tpm:
                if not managed:  # what a killed process left: three of them would block the TPM for good
                    tpm.flush_left_overs()
                yield tpm
                swept = not tpm.left_something
        except PcrChangedError as cause:  # whoever asks for PCRs has taken it already
            raise TpmFailed(f"the TPM says that PCRs changed, where none matter: {cause}") from cause
        finally:
            if not managed and not swept:
                _sweep(tcti)


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
    with suppress(SczError, PcrChangedError), _connected(tcti) as tpm:  # the first failure is the one to report
        tpm.flush_left_overs()


class Tpm(EnrolmentCalls, ReleaseCommands, EvidenceCommands, ProvisioningCommands, PropertyCommands):
    """An open TPM; made by `open_tpm` alone."""

    def flush_left_overs(self) -> None:
        """Flush every transient object and session; only under the lock, and never behind a resource manager."""
        with step("flush what is loaded in the TPM"):
            for first in _LEFT_OVER:
                _, capability = self._esys.get_capability(tss.TPM2_CAP.HANDLES, first, 64)
                for handle in capability.data.handles:
                    # ESAPI has no object for a handle that it did not make itself: TPM2_FlushContext by hand.
                    self._esys.get_tcti().transmit(_FLUSH_CONTEXT + int(handle).to_bytes(4, "big"))
                    self._esys.get_tcti().receive()

    # --- for evidence -------------------------------------------------------------------------------------------------

    def _pcr_read(self, pcrs: Sequence[int]) -> list[bytes]:
        with step("read PCRs"):
            _, _, digests = self._esys.pcr_read(selection(pcrs))
        return [bytes(digest) for digest in digests]

    def _quote(self, ak: Handle, pcrs: Sequence[int], qualifying_data: bytes) -> tuple[bytes, bytes]:
        with step("quote PCRs"):
            attest, signature = self._esys.quote(ak, selection(pcrs), qualifying_data)
        return bytes(attest), bytes(signature.marshal())

    def _certify(self, ak: Handle, key: Handle, qualifying_data: bytes) -> tuple[bytes, bytes]:
        with step("certify a key"):
            attest, signature = self._esys.certify(key, ak, qualifying_data, _OWN_SCHEME)
        return bytes(attest), bytes(signature.marshal())

    def _nv_certify(self, ak: Handle, index: Handle, qualifying_data: bytes) -> tuple[bytes, bytes]:
        with step("certify the counter"):
            attest, signature = self._esys.nv_certify(ak, index, qualifying_data, _OWN_SCHEME, size=COUNTER_BYTES)
        return bytes(attest), bytes(signature.marshal())

    # --- for a release ------------------------------------------------------------------------------------------------

    def _deserialise(self, serialised: bytes) -> Handle:
        try:
            return Handle(self._esys.tr_deserialize(serialised))
        except tss.TSS2_Exception as cause:
            raise DeviceInvalid("device.json: the serialised SRK is malformed") from cause

    def _import_sealed(self, srk: Handle, sealed: SealedBlob, handles: ExitStack) -> Handle:
        public = unmarshal(tss.TPM2B_PUBLIC, sealed.public, "the sealed object's public area", KeyRefused)
        duplicate = unmarshal(tss.TPM2B_PRIVATE, sealed.duplicate, "the sealed object", KeyRefused)
        seed = unmarshal(tss.TPM2B_ENCRYPTED_SECRET, sealed.seed, "the sealed object's seed", KeyRefused)
        no_inner = tss.TPMT_SYM_DEF_OBJECT(algorithm=tss.TPM2_ALG.NULL)
        with step("import the sealed object: it is not for this TPM, or was changed", tpm_codes.IMPORT):
            private = self._esys.import_(srk, tss.TPM2B_DATA(), public, duplicate, seed, no_inner)
            return self._flush_later(handles, self._esys.load(srk, private, public))

    def _verify_signature(self, public: bytes, digest: bytes, signature: bytes, handles: ExitStack) -> object:
        key_public, _ = tss.TPM2B_PUBLIC.unmarshal(public)
        parsed, _ = tss.TPMT_SIGNATURE.unmarshal(signature)
        with step("verify the owner's signature on the boot policy", tpm_codes.VERIFY_SIGNATURE):
            key = self._flush_later(handles, self._esys.load_external(key_public, hierarchy=tss.ESYS_TR.OWNER))
            return self._esys.verify_signature(key, digest, parsed)

    def _pinned_session(self, srk: Handle, handles: ExitStack) -> Handle:
        symmetric = tss.TPMT_SYM_DEF(algorithm=tss.TPM2_ALG.AES)
        symmetric.keyBits.sym, symmetric.mode.sym = 128, tss.TPM2_ALG.CFB
        session = self._session(srk, symmetric, handles)
        with step("let the session encrypt responses"):
            self._esys.trsess_set_attributes(session, tss.TPMA_SESSION.CONTINUESESSION | tss.TPMA_SESSION.ENCRYPT)
        return session

    def _policy_pcr(self, session: Handle, pcrs: Mapping[int, bytes]) -> None:
        with step("compare the PCRs with the approved boot state: they differ", tpm_codes.POLICY_PCR):
            self._esys.policy_pcr(session, pcr_digest(pcrs), selection(pcrs))

    def _policy_unseal_only(self, session: Handle) -> None:
        with step("bind the policy to unsealing"):
            self._esys.policy_command_code(session, tss.TPM2_CC.Unseal)

    def _policy_authorize(self, session: Handle, policy: bytes, ref: bytes, key_name: bytes, ticket: object) -> None:
        with step("match the policy with what the owner signed", tpm_codes.POLICY_AUTHORIZE):
            self._esys.policy_authorize(session, policy, key_name, ticket, policy_ref=ref)

    def _policy_nv(self, session: Handle, counter: Handle, maximum: int) -> None:
        operand = tss.TPM2B_OPERAND(maximum.to_bytes(COUNTER_BYTES, "big"))
        with step("compare the owner's counter with the grant's maximum", tpm_codes.POLICY_NV):
            self._esys.policy_nv(counter, counter, session, operand, tss.TPM2_EO.UNSIGNED_LE)

    def _policy_counter_timer(self, session: Handle, place: tuple[int, int], maximum: int) -> None:
        offset, size = place
        operand = tss.TPM2B_OPERAND(maximum.to_bytes(size, "big"))
        what = "boots" if place == RESETS_PLACE else "powered-on time"
        with step(f"compare the TPM's {what} with the grant's lease", tpm_codes.POLICY_COUNTER_TIMER):
            self._esys.policy_counter_timer(session, operand, tss.TPM2_EO.UNSIGNED_LE, offset=offset)

    def _policy_restart(self, session: Handle) -> None:
        with step("begin the policy again"):
            self._esys.policy_restart(session)

    def _unseal(self, session: Handle, item: Handle) -> bytes:
        with step("unseal: the object is sealed to another policy", tpm_codes.UNSEAL):
            return bytes(self._esys.unseal(item, session1=session))

    # --- for an enrolment ---------------------------------------------------------------------------------------------

    def activate_credential(self, device: HostDevice, id_object: bytes, encrypted_secret: bytes) -> bytes:
        """Open an owner's challenge; EnrolmentRefused: for another TPM or another AK; DeviceInvalid: malformed."""
        blob = unmarshal(tss.TPM2B_ID_OBJECT, id_object, "the challenge", DeviceInvalid)
        secret = unmarshal(tss.TPM2B_ENCRYPTED_SECRET, encrypted_secret, "the challenge's secret", DeviceInvalid)
        ak = self._enrolled_key(device.ak_handle, device.ak.name, "attestation key")
        with ExitStack() as handles:
            _, ek, public = self._create_ek(handles)
            session = tss.ESYS_TR.PASSWORD
            if not public.attributes & ObjectAttributes.USER_WITH_AUTH:  # the templates L-1 and L-2: by a policy
                session = self._session(NONE, tss.TPMT_SYM_DEF(algorithm=tss.TPM2_ALG.NULL), handles)
                with step("authorise the use of the endorsement key"):
                    self._esys.policy_secret(tss.ESYS_TR.ENDORSEMENT, session, expiration=0)
            with step("open the challenge: it is for another TPM", tpm_codes.ACTIVATE):
                return bytes(self._esys.activate_credential(ak, ek, blob, secret, session2=session))
