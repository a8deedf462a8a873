"""The TPM itself: the only module that imports `tpm2_pytss`.

One `open_tpm` is one transaction under one lock. Everything that comes back from the TPM is bytes or our own frozen
values; every response code becomes an error of ours (`tpm_codes`). It decides nothing: what is sealed to what is the
owner's, and the TPM enforces it. Calls block in C without limit: the hook runs them `with_deadline`.

The bus between this host and the TPM is not trusted: the session that unseals is salted to the SRK as it was serialised
at the enrolment, and its response is encrypted. Specification: TPM 2.0 Library, Part 3; TCG TSS 2.0 ESAPI;
docs/specification.md, "TPM policy" and "Enrolment".
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

os.environ["TSS2_LOG"] = "all+none"  # tpm2-tss writes to stderr otherwise; it reads this when it is loaded

import tpm2_pytss as tss
from tpm2_pytss.utils import NVReadEK, create_ek_template
from tpm2_pytss.utils import make_credential as _make_credential
from tpm2_pytss.utils import wrap as _wrap

from oci_hook.attestation import tpm_codes
from oci_hook.attestation.attest import pcr_digest
from oci_hook.attestation.boot_policy import BootForm
from oci_hook.attestation.ek_chain import without_padding
from oci_hook.attestation.enrolment_documents import Certification
from oci_hook.attestation.evidence import Evidence
from oci_hook.attestation.host_device import HostDevice
from oci_hook.attestation.key_checks import COUNTER_ATTRIBUTES, COUNTER_BYTES
from oci_hook.attestation.policy import pcr_selection
from oci_hook.attestation.provisioning import provision
from oci_hook.attestation.sealed import SealedBlob, WrappedSecret
from oci_hook.attestation.structures import (
    ALG_ECDSA,
    ALG_SHA256,
    NvPublic,
    ObjectAttributes,
    Public,
    ecdsa_signing_public,
    parse_nv_public,
    parse_public,
    tpm2b,
)
from oci_hook.attestation.tpm_codes import ANY_PARAMETER, Refusals, base_code, error_for
from oci_hook.attestation.tpm_lock import tpm_lock
from oci_hook.errors import (
    BootPolicyRefused,
    BootStateRefused,
    DeviceInvalid,
    DeviceNotEnrolled,
    EnrolmentRefused,
    KeyRefused,
    Revoked,
    TpmFailed,
    TpmUnavailable,
)
from oci_hook.jws import PublicJwk, ec_public_key

_UNSEAL_ATTEMPTS: Final = 5
_QUOTE_ATTEMPTS: Final = 5
_PCRS_PER_READ: Final = 8  # Part 3, 22.4: as many digests as a TPML_DIGEST holds
_EK_TEMPLATES: Final = ("EK-RSA2048", "EK-ECC256", "EK-HIGH-ECC384")  # TCG EK Credential Profile: L-1, L-2, H-3
_LEFT_OVER: Final = (0x80000000, 0x02000000, 0x03000000)  # transient objects, loaded sessions, saved sessions
_MANAGED: Final = ("device:/dev/tpmrm", "tabrmd")

_PRIMARY: Final = (
    tss.TPMA_OBJECT.FIXEDTPM
    | tss.TPMA_OBJECT.FIXEDPARENT
    | tss.TPMA_OBJECT.SENSITIVEDATAORIGIN
    | tss.TPMA_OBJECT.USERWITHAUTH
    | tss.TPMA_OBJECT.NODA
    | tss.TPMA_OBJECT.RESTRICTED
)


class _PcrChangedError(Exception):
    """A PCR was extended between PolicyPCR and a later command: the policy has to be walked again."""


@contextmanager
def _step(step: str, refusals: Refusals | None = None) -> Iterator[None]:
    """Turn a response code inside the block into an error of ours; `refusals` says what codes mean at this step."""
    try:
        yield
    except tss.TSS2_Exception as cause:
        if cause.rc == tpm_codes.RC_PCR_CHANGED:
            raise _PcrChangedError from cause
        raise error_for(int(cause.rc), step, refusals) from cause


def _unmarshal(kind: Any, data: bytes, what: str, error: type[KeyRefused | DeviceInvalid]) -> Any:
    try:
        value, used = kind.unmarshal(data)
    except tss.TSS2_Exception as cause:
        raise error(f"{what} is malformed") from cause
    if used != len(data):
        raise error(f"{what} has bytes after its end")
    return value


def _null_symmetric() -> tss.TPMT_SYM_DEF_OBJECT:
    return tss.TPMT_SYM_DEF_OBJECT(algorithm=tss.TPM2_ALG.NULL)


# --- the owner's side: no TPM -----------------------------------------------------------------------------------------


def make_credential(ek: Public, secret: bytes, ak_name: bytes) -> tuple[bytes, bytes]:
    """Encrypt a secret so that only the TPM with this EK opens it, and only if it holds the named AK.

    Args:
        ek: The endorsement key, checked.
        secret: At most as long as the EK's Name algorithm's digest.
        ak_name: The attestation key's Name.

    Returns:
        TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET.
    """
    public, _ = tss.TPM2B_PUBLIC.unmarshal(ek.marshalled)
    id_object, encrypted_secret = _make_credential(public=public, credential=secret, name=ak_name)
    return bytes(id_object.marshal()), bytes(encrypted_secret.marshal())


def wrap_secret(srk: Public, secret: bytes, policy: bytes) -> WrappedSecret:
    """Seal a secret to a device from afar: an object for TPM2_Import under its SRK, which only `policy` opens.

    Args:
        srk: The storage root key of the device's record.
        secret: 32 bytes.
        policy: `sealed_object_policy`, 32 bytes.

    Returns:
        The blob; its inner parts are encrypted to the SRK.
    """
    sensitive, public = tss.TPM2B_SENSITIVE.keyedhash_from_secret(secret, objectAttributes=tss.TPMA_OBJECT.NODA)
    public.publicArea.authPolicy = policy
    parent, _ = tss.TPM2B_PUBLIC.unmarshal(srk.marshalled)
    _, duplicate, seed = _wrap(newparent=parent.publicArea, public=public, sensitive=sensitive)
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
                if not managed:  # what a killed process left, else three of them would block the TPM for good
                    tpm.flush_left_overs()
                yield tpm
        except BaseException:
            if not managed:  # by a new connection: after some failures a context accepts no command any more
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
    try:
        with _connected(tcti) as tpm:
            tpm.flush_left_overs()
    except (TpmUnavailable, TpmFailed):
        return  # the failure that brought us here is the one to report; the next transaction sweeps again


class Tpm:
    """An open TPM; made by `open_tpm` alone."""

    def __init__(self, esys: tss.ESAPI) -> None:
        self._esys = esys

    def flush_left_overs(self) -> None:
        """Flush every transient object and session; only under the lock, and never behind a resource manager."""
        with _step("list what is loaded in the TPM"):
            for first in _LEFT_OVER:
                _, capability = self._esys.get_capability(tss.TPM2_CAP.HANDLES, first, 64)
                for handle in capability.data.handles:
                    # tss.ESAPI has no object for a handle that it did not make itself: TPM2_FlushContext by hand.
                    tcti = self._esys.get_tcti()
                    tcti.transmit(bytes.fromhex("80010000000e00000165") + int(handle).to_bytes(4, "big"))
                    tcti.receive()

    def _flush_later(self, handles: ExitStack, handle: tss.ESYS_TR) -> tss.ESYS_TR:
        handles.callback(self._flush, handle)
        return handle

    def _flush(self, handle: tss.ESYS_TR) -> None:
        try:
            self._esys.flush_context(handle)
        except tss.TSS2_Exception:
            return  # after a broken response nothing works on this context; open_tpm sweeps with another

    # --- evidence -----------------------------------------------------------------------------------------------------

    def read_pcrs(self, pcrs: Iterable[int]) -> dict[int, bytes]:
        """Values of the SHA-256 bank, as the bus delivers them; only a quote proves them.

        Raises:
            TpmFailed: The bank is not active.
        """
        wanted, values = sorted(set(pcrs)), dict[int, bytes]()
        for start in range(0, len(wanted), _PCRS_PER_READ):
            part = wanted[start : start + _PCRS_PER_READ]
            selection, _ = tss.TPML_PCR_SELECTION.unmarshal(pcr_selection(part))
            with _step("read PCRs"):
                _, _, digests = self._esys.pcr_read(selection)
            values.update(zip(part, (bytes(digest) for digest in digests), strict=False))
        if len(values) != len(wanted):
            raise TpmFailed(
                "the TPM has no values for these PCRs in its SHA-256 bank",
                remedy="activate the bank: `tpm2_pcrallocate sha256:all`, then restart",
            )
        return values

    def quote(self, device: HostDevice, pcrs: Sequence[int], qualifying_data: bytes) -> Evidence:
        """Let the AK quote PCRs of the SHA-256 bank.

        Args:
            device: This host's enrolment.
            pcrs: Their numbers.
            qualifying_data: What makes the quote fresh, at most 64 bytes.

        Returns:
            The quote with values read beside it; `evidence.verify_quote` tells whether they agree.
        """
        selection, _ = tss.TPML_PCR_SELECTION.unmarshal(pcr_selection(pcrs))
        ak = self._key(device.ak_handle, device.ak.name, "attestation key")
        for _ in range(_QUOTE_ATTEMPTS):
            before = self.read_pcrs(pcrs)
            with _step("quote PCRs"):
                attest, signature = self._esys.quote(ak, selection, qualifying_data)
            if self.read_pcrs(pcrs) == before:  # else one was extended meanwhile: the values would not fit the quote
                break
        return Evidence(bytes(attest), bytes(signature.marshal()), before)

    def certify(self, device: HostDevice, qualifying_data: bytes) -> Certification:
        """Let the AK certify the Name of the SRK."""
        ak = self._key(device.ak_handle, device.ak.name, "attestation key")
        srk = self._key(device.srk_handle, device.srk.name, "storage root key")
        with _step("certify the storage root key"):
            attest, signature = self._esys.certify(
                srk, ak, qualifying_data, tss.TPMT_SIG_SCHEME(scheme=tss.TPM2_ALG.NULL)
            )
        return Certification(bytes(attest), bytes(signature.marshal()))

    def nv_certify(self, device: HostDevice, counter: NvPublic, qualifying_data: bytes) -> Certification:
        """Let the AK certify the Name and value of a counter."""
        ak = self._key(device.ak_handle, device.ak.name, "attestation key")
        with _step("certify the counter"):
            attest, signature = self._esys.nv_certify(
                sign_handle=ak,
                nv_index=self._esys.tr_from_tpmpublic(counter.index),
                qualifying_data=qualifying_data,
                in_scheme=tss.TPMT_SIG_SCHEME(scheme=tss.TPM2_ALG.NULL),
                size=COUNTER_BYTES,
            )
        return Certification(bytes(attest), bytes(signature.marshal()))

    def _key(self, handle: int, name: bytes, what: str) -> tss.ESYS_TR:
        with _step(f"find the {what} at {handle:#x}"):
            key = self._esys.tr_from_tpmpublic(handle)
            found = bytes(self._esys.tr_get_name(key))
        if found != name:
            raise DeviceNotEnrolled(
                f"the {what} at {handle:#x} is not the enrolled one: the TPM was cleared or replaced"
            )
        return key

    # --- release of a key ---------------------------------------------------------------------------------------------

    def unseal(
        self,
        device: HostDevice,
        *,
        sealed: SealedBlob,
        form: BootForm,
        boot_policy_key: PublicJwk,
        policy_ref: bytes,
        counter_index: int,
        counter_maximum: int,
    ) -> bytes:
        """Import a sealed secret, satisfy its policy and unseal it. The TPM decides.

        Args:
            device: This host's enrolment; the session is salted to its SRK.
            sealed: From the grant.
            form: The approved boot state that the machine is in.
            boot_policy_key: The owner's.
            policy_ref: Of the model line and the device class, 32 bytes.
            counter_index: NV index of the owner's counter.
            counter_maximum: The highest value at which the object opens.

        Returns:
            The secret. It crossed the bus encrypted.

        Raises:
            BootStateRefused: The PCRs are not that form's.
            BootPolicyRefused: The owner did not sign that form's policy for this model line and device class.
            Revoked: The counter has passed the maximum.
            KeyRefused: The blob is not for this TPM, or is sealed to another policy than this.
        """
        with ExitStack() as handles:
            srk = self._pinned_srk(device, handles)
            item = self._import_sealed(srk, sealed, handles)
            # What does not depend on PCRs comes before PolicyPCR: every extend in between costs another attempt.
            ticket, key_name = self._policy_ticket(form, boot_policy_key, policy_ref, handles)
            with _step("find the owner's counter", {tpm_codes.RC_HANDLE: KeyRefused}):
                counter = self._esys.tr_from_tpmpublic(counter_index)
            session = self._pinned_session(srk, handles)
            for _ in range(_UNSEAL_ATTEMPTS):
                try:
                    self._authorise_boot_state(session, form, policy_ref, key_name, ticket)
                    self._bound_counter(session, counter, counter_maximum)
                    return self._unseal(session, item)
                except _PcrChangedError:
                    with _step("begin the policy again"):
                        self._esys.policy_restart(session)
        raise TpmFailed("PCRs kept changing while the key was being released")

    def _pinned_srk(self, device: HostDevice, handles: ExitStack) -> tss.ESYS_TR:
        """The SRK as enrolled: its public area comes from device.json, nothing is asked of the bus."""
        try:
            srk = self._esys.tr_deserialize(device.srk_serialised)
            handles.callback(self._esys.tr_close, srk)
            name = bytes(self._esys.tr_get_name(srk))
        except tss.TSS2_Exception as cause:
            raise DeviceInvalid("device.json: the serialised SRK is malformed") from cause
        if name != device.srk.name:
            raise DeviceInvalid("device.json: the serialised SRK is another key than its public area")
        return srk

    def _import_sealed(self, srk: tss.ESYS_TR, sealed: SealedBlob, handles: ExitStack) -> tss.ESYS_TR:
        public = _unmarshal(tss.TPM2B_PUBLIC, sealed.public, "the sealed object's public area", KeyRefused)
        duplicate = _unmarshal(tss.TPM2B_PRIVATE, sealed.duplicate, "the sealed object", KeyRefused)
        seed = _unmarshal(tss.TPM2B_ENCRYPTED_SECRET, sealed.seed, "the sealed object's seed", KeyRefused)
        with _step("import the sealed object, which is not for this TPM", {ANY_PARAMETER: KeyRefused}):
            private = self._esys.import_(srk, tss.TPM2B_DATA(), public, duplicate, seed, _null_symmetric())
            return self._flush_later(handles, self._esys.load(srk, private, public))

    def _policy_ticket(
        self, form: BootForm, boot_policy_key: PublicJwk, policy_ref: bytes, handles: ExitStack
    ) -> tuple[Any, bytes]:
        """The TPM's own proof to itself that the owner signed the form's policy; and the key's Name."""
        raw = ecdsa_signing_public(ec_public_key(boot_policy_key, error=BootPolicyRefused))
        name = parse_public(tpm2b(raw), what="the boot-policy key", error=BootPolicyRefused).name
        public, _ = tss.TPM2B_PUBLIC.unmarshal(tpm2b(raw))
        algorithms = ALG_ECDSA.to_bytes(2, "big") + ALG_SHA256.to_bytes(2, "big")
        signature, _ = tss.TPMT_SIGNATURE.unmarshal(algorithms + tpm2b(form.signature_r) + tpm2b(form.signature_s))
        digest = hashlib.sha256(form.policy + policy_ref).digest()
        with _step("verify the owner's signature on the boot policy", {ANY_PARAMETER: BootPolicyRefused}):
            key = self._flush_later(handles, self._esys.load_external(public, hierarchy=tss.ESYS_TR.OWNER))
            return self._esys.verify_signature(key, digest, signature), name

    def _pinned_session(self, srk: tss.ESYS_TR, handles: ExitStack) -> tss.ESYS_TR:
        symmetric = tss.TPMT_SYM_DEF(algorithm=tss.TPM2_ALG.AES)
        symmetric.keyBits.sym, symmetric.mode.sym = 128, tss.TPM2_ALG.CFB
        with _step("begin a session"):
            session = self._esys.start_auth_session(
                tpm_key=srk,
                bind=tss.ESYS_TR.NONE,
                session_type=tss.TPM2_SE.POLICY,
                symmetric=symmetric,
                auth_hash=tss.TPM2_ALG.SHA256,
            )
            self._flush_later(handles, session)
            self._esys.trsess_set_attributes(session, tss.TPMA_SESSION.CONTINUESESSION | tss.TPMA_SESSION.ENCRYPT)
        return session

    def _authorise_boot_state(
        self, session: tss.ESYS_TR, form: BootForm, policy_ref: bytes, key_name: bytes, ticket: Any
    ) -> None:
        selection, _ = tss.TPML_PCR_SELECTION.unmarshal(pcr_selection(form.pcrs))
        with _step("compare the PCRs with the approved boot state", {tpm_codes.RC_VALUE: BootStateRefused}):
            self._esys.policy_pcr(session, pcr_digest(form.pcrs), selection)
        with _step("bind the release to unsealing"):
            self._esys.policy_command_code(session, tss.TPM2_CC.Unseal)
        with _step("match the boot state with the owner's signature", {ANY_PARAMETER: BootPolicyRefused}):
            self._esys.policy_authorize(
                policy_session=session,
                approved_policy=form.policy,
                key_sign=key_name,
                check_ticket=ticket,
                policy_ref=policy_ref,
            )

    def _bound_counter(self, session: tss.ESYS_TR, counter: tss.ESYS_TR, maximum: int) -> None:
        refusals = {tpm_codes.RC_POLICY: Revoked, tpm_codes.RC_NV_UNINITIALIZED: Revoked}
        with _step("compare the owner's counter with the grant", refusals):
            self._esys.policy_nv(
                auth_handle=counter,
                nv_index=counter,
                policy_session=session,
                operand_b=tss.TPM2B_OPERAND(maximum.to_bytes(COUNTER_BYTES, "big")),
                operation=tss.TPM2_EO.UNSIGNED_LE,
            )

    def _unseal(self, session: tss.ESYS_TR, item: tss.ESYS_TR) -> bytes:
        refusals = {
            tpm_codes.RC_POLICY_FAIL: KeyRefused,  # sealed to another key, policyRef, counter or maximum
            tpm_codes.RC_AUTH_FAIL: KeyRefused,  # the session was salted to a key that this TPM does not hold
            tpm_codes.RC_BAD_AUTH: KeyRefused,
        }
        with _step("unseal, as the object is sealed to another policy than this", refusals):
            return bytes(self._esys.unseal(item, session1=session))

    # --- enrolment ----------------------------------------------------------------------------------------------------

    def provision(self, owner_id: str, known: HostDevice | None) -> HostDevice:
        """Make, or find again, SRK, AK and the owner's counter; see `provisioning.provision`."""
        return provision(self, owner_id, known)

    def ek(self) -> tuple[bytes, Public]:
        """The EK certificate (DER) and the EK's public area.

        Raises:
            TpmFailed: The TPM holds no EK certificate.
        """
        with ExitStack() as handles:
            certificate, _, public = self._create_ek(handles)
            return certificate, public

    def activate_credential(self, device: HostDevice, id_object: bytes, encrypted_secret: bytes) -> bytes:
        """Open an owner's challenge.

        Args:
            device: This host's enrolment.
            id_object: TPM2B_ID_OBJECT.
            encrypted_secret: TPM2B_ENCRYPTED_SECRET.

        Raises:
            EnrolmentRefused: It was made for another TPM or another AK.
            DeviceInvalid: Malformed.
        """
        blob = _unmarshal(tss.TPM2B_ID_OBJECT, id_object, "the challenge", DeviceInvalid)
        secret = _unmarshal(tss.TPM2B_ENCRYPTED_SECRET, encrypted_secret, "the challenge's secret", DeviceInvalid)
        ak = self._key(device.ak_handle, device.ak.name, "attestation key")
        with ExitStack() as handles:
            _, ek, public = self._create_ek(handles)
            authorisation = tss.ESYS_TR.PASSWORD
            if not public.attributes & ObjectAttributes.USER_WITH_AUTH:
                authorisation = self._endorsement_session(handles)
            with _step("open the challenge, which is for another TPM", {ANY_PARAMETER: EnrolmentRefused}):
                return bytes(
                    self._esys.activate_credential(
                        activate_handle=ak,
                        key_handle=ek,
                        credential_blob=blob,
                        secret=secret,
                        session1=tss.ESYS_TR.PASSWORD,
                        session2=authorisation,
                    )
                )

    def _endorsement_session(self, handles: ExitStack) -> tss.ESYS_TR:
        """The default EK templates open by PolicySecret with the endorsement hierarchy's authorisation, SHA-256."""
        with _step("authorise the use of the endorsement key"):
            session = self._esys.start_auth_session(
                tpm_key=tss.ESYS_TR.NONE,
                bind=tss.ESYS_TR.NONE,
                session_type=tss.TPM2_SE.POLICY,
                symmetric=tss.TPMT_SYM_DEF(algorithm=tss.TPM2_ALG.NULL),
                auth_hash=tss.TPM2_ALG.SHA256,
            )
            self._flush_later(handles, session)
            self._esys.policy_secret(tss.ESYS_TR.ENDORSEMENT, session, expiration=0)
        return session

    def _create_ek(self, handles: ExitStack) -> tuple[bytes, tss.ESYS_TR, Public]:
        with _step("create the endorsement key"):
            reader = NVReadEK(self._esys)
            for name in _EK_TEMPLATES:
                try:
                    certificate, template = create_ek_template(name, reader)
                except ValueError:  # no certificate of this kind
                    continue
                if certificate:
                    ek, public, *_ = self._esys.create_primary(None, template, tss.ESYS_TR.ENDORSEMENT)
                    self._flush_later(handles, ek)
                    return without_padding(certificate), ek, self._parsed(public)
        raise TpmFailed(
            "the TPM holds no EK certificate for RSA-2048, P-256 or P-384",
            remedy="ask its maker; a virtual TPM gets one from `swtpm_setup --create-ek-cert`",
        )

    def _parsed(self, public: tss.TPM2B_PUBLIC) -> Public:
        return parse_public(bytes(public.marshal()), what="the TPM's public area", error=DeviceInvalid)

    def persistent_name(self, handle: int) -> bytes | None:
        """The Name of what lies at a persistent handle; None if nothing does."""
        key = self._find(handle)
        return None if key is None else bytes(self._esys.tr_get_name(key))

    def _find(self, handle: int) -> tss.ESYS_TR | None:
        try:
            return self._esys.tr_from_tpmpublic(handle)
        except tss.TSS2_Exception as cause:
            if base_code(int(cause.rc)) == tpm_codes.RC_HANDLE:
                return None
            raise error_for(int(cause.rc), f"look at {handle:#x}") from cause

    def read_public(self, handle: int) -> Public:
        """The public area at a persistent handle (DeviceInvalid if it is of an unknown kind)."""
        with _step(f"read the key at {handle:#x}"):
            public, _, _ = self._esys.read_public(self._esys.tr_from_tpmpublic(handle))
        return self._parsed(public)

    def create_srk(self, handles: Iterable[int]) -> tuple[int, Public]:
        """Create the storage primary by TCG's template and persist it at the first free handle, or find it at one."""
        template = tss.TPM2B_PUBLIC.parse("ecc256:aes128cfb", objectAttributes=_PRIMARY | tss.TPMA_OBJECT.DECRYPT)
        template.publicArea.unique.ecc.x = template.publicArea.unique.ecc.y = bytes(32)
        return self._persist(tss.ESYS_TR.OWNER, template, handles)

    def create_ak(self, handles: Iterable[int]) -> tuple[int, Public]:
        """Create the attestation primary in the endorsement hierarchy and persist it, or find it at a handle."""
        attributes = _PRIMARY | tss.TPMA_OBJECT.SIGN_ENCRYPT
        template = tss.TPM2B_PUBLIC.parse("ecc256:ecdsa-sha256:null", objectAttributes=attributes)
        return self._persist(tss.ESYS_TR.ENDORSEMENT, template, handles)

    def _persist(self, hierarchy: tss.ESYS_TR, template: tss.TPM2B_PUBLIC, places: Iterable[int]) -> tuple[int, Public]:
        with ExitStack() as handles:
            with _step("create a primary key"):
                primary, marshalled, *_ = self._esys.create_primary(tss.TPM2B_SENSITIVE_CREATE(), template, hierarchy)
                self._flush_later(handles, primary)
            public = self._parsed(marshalled)
            for place in places:
                name = self.persistent_name(place)
                if name == public.name:
                    return place, public
                if name is None:
                    with _step(f"make a key persistent at {place:#x}"):
                        self._esys.evict_control(tss.ESYS_TR.OWNER, primary, place)
                    return place, public
        raise TpmFailed(
            "no persistent handle is free", remedy="`tpm2_getcap handles-persistent` shows them; remove one of no use"
        )

    def serialise(self, handle: int, expected_name: bytes) -> bytes:
        """A persistent key's handle, Name and public area in tpm2-tss's form, to pin sessions to it later."""
        key = self._key(handle, expected_name, "storage root key")
        with _step("serialise the storage root key"):
            return bytes(self._esys.tr_serialize(key))

    # --- counters -----------------------------------------------------------------------------------------------------

    def nv_public(self, index: int) -> NvPublic | None:
        """The public area of an NV index (DeviceInvalid if it is of an unknown kind); None if there is none."""
        found = self._find(index)
        if found is None:
            return None
        with _step(f"look at NV index {index:#x}"):
            public, _ = self._esys.nv_read_public(found)
        return parse_nv_public(bytes(public.marshal()), what="the TPM's NV public area", error=DeviceInvalid)

    def define_counter(self, index: int) -> None:
        """Define a counter with the attributes of an enrolment; it has no value before it is written."""
        fixed = index.to_bytes(4, "big") + ALG_SHA256.to_bytes(2, "big") + int(COUNTER_ATTRIBUTES).to_bytes(4, "big")
        public, _ = tss.TPM2B_NV_PUBLIC.unmarshal(tpm2b(fixed + tpm2b(b"") + COUNTER_BYTES.to_bytes(2, "big")))
        with _step(f"define a counter at {index:#x}"):
            self._esys.nv_define_space(auth=None, public_info=public)

    def write_counter(self, index: int) -> NvPublic:
        """Increment a counter for the first time, which sets its value and its final Name."""
        self.increment_counter(index)
        written = self.nv_public(index)
        if written is None:
            raise TpmFailed(f"the counter at {index:#x} is gone as soon as it was written")
        return written

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
