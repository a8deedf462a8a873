"""The attestation with a real TPM (swtpm): enrolment, provisioning, quotes, releases, and what goes wrong with them.

Nothing is mocked. Wherever there is another witness, it is asked: tpm2-tools check our quote and list what is left in
the TPM, and a tap on the TPM's socket records what an eavesdropper on the bus would see. Each refusal here also shows
that no object and no session is left. Needs swtpm and tpm2-tools 5.4; about half a minute.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from oci_hook.attestation import tpm as tpm_module
from oci_hook.attestation.appraisal import appraise_evidence
from oci_hook.attestation.attest import pcr_digest
from oci_hook.attestation.boot_policy import (
    BootForm,
    BootPolicy,
    parse_boot_policy,
    sign_boot_policy,
    verify_boot_policy,
)
from oci_hook.attestation.deadline import Deadline, with_deadline
from oci_hook.attestation.device_record import DeviceRecord, format_device_record, parse_device_record
from oci_hook.attestation.ek_chain import CaCertificates, parse_ca_certificates
from oci_hook.attestation.enrolment import (
    enrolment_qualifying_data,
    make_challenge,
    proof,
    verify_answer,
    verify_request,
)
from oci_hook.attestation.enrolment_documents import (
    Answer,
    Pending,
    format_answer,
    format_pending,
    format_request,
    parse_answer,
    parse_challenge,
    parse_pending,
    parse_request,
)
from oci_hook.attestation.evidence import Evidence, qualifying_data
from oci_hook.attestation.host_device import AskedAgain, HostDevice, format_host_device, parse_host_device
from oci_hook.attestation.key_checks import COUNTER_ATTRIBUTES, counter_public
from oci_hook.attestation.measurement import MEASURED_PCRS
from oci_hook.attestation.policy import CC_UNSEAL, approved_policy, policy_ref, sealed_object_policy
from oci_hook.attestation.sealed import WrappedSecret
from oci_hook.attestation.structures import (
    Handle,
    NvAttributes,
    NvPublic,
    ObjectAttributes,
    ecdsa_signing_public,
    parse_nv_public,
    parse_public,
    tpm2b,
)
from oci_hook.attestation.tpm import Tpm, make_credential, open_tpm, wrap_secret
from oci_hook.attestation.tpm_lock import tpm_lock
from oci_hook.attestation.unsealing import Unsealing
from oci_hook.errors import (
    BootPolicyRefused,
    BootStateRefused,
    DeviceInvalid,
    DeviceNotEnrolled,
    EnrolmentRefused,
    EvidenceRefused,
    FileUnreadable,
    InternalError,
    KeyRefused,
    Revoked,
    SczError,
    TpmFailed,
    TpmTimeout,
    TpmUnavailable,
)
from oci_hook.lease import Lease
from oci_hook.linux.syscalls import prctl_set_pdeathsig
from oci_hook.owner.keyring import Keyring, create_keyring, open_keyring
from tests.devices import make_device
from tests.software_tpm import SoftwareTpm
from tests.tpm_proxy import Tap

MODEL, CLASS, DEVICE = "small", "default", "edge-1"
GRUB, UKI = (0, 2, 4, 7, 8, 9), (7, 11, 12, 14)
SECRET = bytes(range(0xA0, 0xC0))
LOCK_SECONDS = 10.0
TPM_RC_AUTH_UNAVAILABLE = 0x12F
LEFT_OVERS = ("handles-transient", "handles-loaded-session", "handles-saved-session")


# --- a host with its TPM, and the owners ------------------------------------------------------------------------------


@dataclass
class Host:
    """A software TPM and the lock of its host; `tcti` may lead through a tap."""

    tpm: SoftwareTpm
    lock_file: Path
    known: HostDevice | None = None

    @property
    def device(self) -> HostDevice:
        """What this host remembers, as it would read it from its device.json."""
        assert self.known is not None
        return parse_host_device(format_host_device(self.known))

    @contextmanager
    def transaction(self, tcti: str | None = None) -> Iterator[Tpm]:
        with open_tpm(tcti or self.tpm.tcti, self.lock_file, timeout_seconds=LOCK_SECONDS) as tpm:
            yield tpm

    def provision(self, owner_id: str) -> HostDevice:
        with self.transaction() as tpm:
            self.known = tpm.provision(owner_id, self.known)
        return self.known

    def tool(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A program of tpm2-tools, at this TPM."""
        environment = {"PATH": "/usr/bin:/bin", "TPM2TOOLS_TCTI": self.tpm.tcti, "TSS2_LOG": "all+none"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=check, timeout=20)

    def handles(self, *capabilities: str) -> list[str]:
        """Handles in the TPM, by the word of tpm2_getcap; without arguments those that nobody may leave behind."""
        listed = (self.tool("tpm2_getcap", each).stdout for each in capabilities or LEFT_OVERS)
        return [line.removeprefix("- ") for text in listed for line in text.splitlines()]

    def boot(self, changes: Mapping[int, str] | None = None) -> None:
        """Off and on again, measured."""
        self.tpm.restart()
        self.tpm.measure_boot(changes)

    def pcrs(self, pcrs: Sequence[int]) -> dict[int, bytes]:
        with self.transaction() as tpm:
            return tpm.read_pcrs(pcrs)

    def counter(self, keyring: Keyring) -> NvPublic:
        return self.device.counters[keyring.owner.owner_id]

    def count(self, keyring: Keyring) -> int:
        with self.transaction() as tpm:
            return tpm.read_counter(self.counter(keyring).index)

    @contextmanager
    def refused(self, error: type[SczError], match: str | None = None) -> Iterator[None]:
        """The block raises exactly this error, and leaves nothing in the TPM."""
        with pytest.raises(error, match=match) as raised:
            yield
        assert type(raised.value) is error
        assert self.handles() == []


@dataclass(frozen=True)
class Sealing:
    """A secret sealed by an owner to a host, with what an opening needs; by `replace`, with anything else instead."""

    host: Host
    keyring: Keyring
    form: BootForm
    blob: WrappedSecret
    maximum: int
    reference: bytes = field(default_factory=lambda: policy_ref(MODEL, CLASS))
    device: HostDevice | None = None
    counter_index: int | None = None
    lease: Lease | None = None

    @property
    def asked(self) -> Unsealing:
        """What the hook asks the TPM for."""
        index = self.host.counter(self.keyring).index if self.counter_index is None else self.counter_index
        return Unsealing(
            sealed=self.blob,
            form=self.form,
            boot_policy_key=self.keyring.owner.boot_policy_key,
            policy_ref=self.reference,
            counter_index=index,
            counter_maximum=self.maximum,
            lease=self.lease,
        )

    def open_in(self, tpm: Tpm) -> bytes:
        return tpm.unseal(self.device or self.host.device, self.asked)

    def open(self, tcti: str | None = None) -> bytes:
        with self.host.transaction(tcti) as tpm:
            return self.open_in(tpm)


def approve(
    keyring: Keyring,
    *states: Mapping[int, bytes],
    model: str = MODEL,
    device_class: str = CLASS,
    epoch: int = 0,
) -> BootPolicy:
    """A boot policy that the owner signed and that was verified, as a host has it."""
    owner = keyring.owner
    document = sign_boot_policy(
        states,
        owner_id=owner.owner_id,
        model_name=model,
        device_class=device_class,
        created=1_767_225_600,
        key=keyring.boot_policy_key,
        epoch=epoch,
    )
    return verify_boot_policy(parse_boot_policy(document), owner=owner, model_name=model, device_class=device_class)


def wrapped(
    host: Host, keyring: Keyring, maximum: int, *, model: str = MODEL, lease: Lease | None = None, epoch: int = 0
) -> WrappedSecret:
    """The owner's side, which sees public areas only."""
    key = parse_public(
        tpm2b(ecdsa_signing_public(keyring.boot_policy_key.public_key())), what="key", error=DeviceInvalid
    )
    reference = policy_ref(model, CLASS, epoch)
    policy = sealed_object_policy(key.name, reference, host.counter(keyring).name, maximum, lease)
    return wrap_secret(host.device.srk, SECRET, policy)


def seal(host: Host, keyring: Keyring, pcrs: Sequence[int] = GRUB) -> Sealing:
    """Approve the running system and seal the secret to the counter as it stands."""
    maximum = host.count(keyring)
    form = approve(keyring, host.pcrs(pcrs)).forms[0]
    return Sealing(host, keyring, form, wrapped(host, keyring, maximum), maximum)


@contextmanager
def _machine() -> Iterator[Host]:
    folder = Path(tempfile.mkdtemp(prefix="scz-test.", dir="/var/tmp"))
    try:
        with SoftwareTpm(folder / "tpm") as tpm:
            tpm.measure_boot()
            yield Host(tpm, folder / "tpm.lock")
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def keyring(tmp_path_factory: pytest.TempPathFactory) -> Keyring:
    return _keyring(tmp_path_factory.mktemp("owner") / "keys", "acme")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Keyring:
    """Another owner."""
    return _keyring(tmp_path_factory.mktemp("stranger") / "keys", "stranger")


def _keyring(folder: Path, name: str) -> Keyring:
    create_keyring(folder, name, None)
    return open_keyring(folder, lambda: "")


@pytest.fixture(scope="module")
def _first(keyring: Keyring) -> Iterator[Host]:
    with _machine() as host:
        host.provision(keyring.owner.owner_id)
        yield host


@pytest.fixture(scope="module")
def _second(keyring: Keyring) -> Iterator[Host]:
    with _machine() as host:
        host.provision(keyring.owner.owner_id)
        yield host


@pytest.fixture
def host(_first: Host) -> Iterator[Host]:
    """The host, freshly booted; nothing may be left in its TPM after any test."""
    _first.boot()
    yield _first
    assert _first.handles() == []


@pytest.fixture
def other_host(_second: Host) -> Iterator[Host]:
    """Another machine, enrolled with the same owner, that booted the same system."""
    yield _second
    assert _second.handles() == []


@pytest.fixture
def sealing(host: Host, keyring: Keyring) -> Sealing:
    made = seal(host, keyring)
    assert made.open() == SECRET
    return made


# --- enrolment by its four documents ----------------------------------------------------------------------------------


def authorities(host: Host) -> CaCertificates:
    return parse_ca_certificates([path.read_bytes() for path in host.tpm.ca_certificates])


def ask(host: Host, keyring: Keyring) -> bytes:
    """Document 1, by the host."""
    owner_id = keyring.owner.owner_id
    device = host.provision(owner_id)
    with host.transaction() as tpm:
        certificate, ek = tpm.ek()
    return format_request(
        device=DEVICE,
        owner_id=owner_id,
        ek_certificate=certificate,
        ek=ek,
        ak=device.ak,
        srk=device.srk,
        counter=device.counters[owner_id],
    )


def challenge(request: bytes, roots: CaCertificates) -> tuple[bytes, Pending]:
    """Document 2, by the owner, and what the owner keeps."""
    verified = verify_request(parse_request(request), authorities=roots, now=datetime.now(UTC))
    document, pending = make_challenge(verified, secret=os.urandom(32), make_credential=make_credential)
    return document, parse_pending(format_pending(pending))


def answer(host: Host, request: bytes, challenge_document: bytes) -> bytes:
    """Document 3, by the host."""
    asked, digest = parse_challenge(challenge_document), parse_request(request).digest
    device = host.device
    with host.transaction() as tpm:
        secret = tpm.activate_credential(device, asked.id_object, asked.encrypted_secret)
        srk, counter, quote = (enrolment_qualifying_data(k, secret, digest) for k in ("srk", "counter", "quote"))
        made = Answer(
            device=asked.device,
            owner_id=asked.owner_id,
            proof=proof(secret, digest),
            srk_certify=tpm.certify(device, srk),
            counter_certify=tpm.nv_certify(device, device.counters[asked.owner_id], counter),
            quote=tpm.quote(device, sorted(MEASURED_PCRS), quote),
        )
    return format_answer(made)


def accept(pending: Pending, document: bytes, roots: CaCertificates) -> DeviceRecord:
    """Document 4, by the owner."""
    now = datetime.now(UTC)
    return verify_answer(pending, parse_answer(document), authorities=roots, now=now, device_class=CLASS)


def test_an_enrolment_by_its_four_documents(host: Host, keyring: Keyring) -> None:
    roots = authorities(host)
    request = ask(host, keyring)
    document, pending = challenge(request, roots)
    record = accept(pending, answer(host, request, document), roots)
    assert parse_device_record(format_device_record(record)) == record
    assert (record.device, record.device_class) == (DEVICE, CLASS)
    assert (record.srk.name, record.ak.name) == (host.device.srk.name, host.device.ak.name)
    assert record.counter == host.counter(keyring)
    assert record.counter_value == host.count(keyring)
    assert record.pcrs == host.pcrs(sorted(MEASURED_PCRS))
    assert host.handles() == []


def test_an_ek_of_another_authority_is_refused(host: Host, other_host: Host, keyring: Keyring) -> None:
    request = ask(host, keyring)
    with host.refused(EnrolmentRefused, "check 1"):
        challenge(request, authorities(other_host))
    _, pending = challenge(request, authorities(host))
    early = datetime.now(UTC) - timedelta(days=365)  # swtpm's certificates are never too old
    with host.refused(EnrolmentRefused, "check 1"):
        verify_request(pending.request, authorities=authorities(host), now=early)


def test_the_authorities_are_asked_again_when_the_answer_comes(host: Host, other_host: Host, keyring: Keyring) -> None:
    request = ask(host, keyring)
    document, pending = challenge(request, authorities(host))
    answered = answer(host, request, document)
    with host.refused(EnrolmentRefused, "check 1"):
        accept(pending, answered, authorities(other_host))


def test_a_replayed_answer_is_refused(host: Host, keyring: Keyring) -> None:
    roots = authorities(host)
    request = ask(host, keyring)
    earlier, _ = challenge(request, roots)
    replayed = answer(host, request, earlier)
    document, pending = challenge(request, roots)
    with host.refused(EnrolmentRefused, "check 6"):
        accept(pending, replayed, roots)
    old, new = parse_answer(replayed), parse_answer(answer(host, request, document))
    parts = {"srk_certify": 7, "counter_certify": 8, "quote": 9}
    for part, check in parts.items():  # each part of the earlier answer, in an otherwise good one
        mixed = replace(new, **{part: getattr(old, part)})
        with host.refused(EnrolmentRefused, f"check {check}"):
            accept(pending, format_answer(mixed), roots)
    accept(pending, format_answer(new), roots)


def test_a_second_tpm_cannot_answer(host: Host, other_host: Host, keyring: Keyring) -> None:
    roots = authorities(host)
    request = ask(host, keyring)
    document, pending = challenge(request, roots)
    with other_host.refused(EnrolmentRefused):  # it cannot open the challenge
        answer(other_host, request, document)
    # It answers a challenge of its own, under the same name.
    other_request = ask(other_host, keyring)
    other_document, _ = challenge(other_request, authorities(other_host))
    foreign = parse_answer(answer(other_host, other_request, other_document))
    with host.refused(EnrolmentRefused, "check 6"):
        accept(pending, format_answer(foreign), roots)
    # The first TPM opened the challenge, the second vouches: another attestation key's signatures.
    asked = parse_challenge(document)
    with host.transaction() as tpm:
        secret = tpm.activate_credential(host.device, asked.id_object, asked.encrypted_secret)
    digest = parse_request(request).digest
    mixed = replace(parse_answer(answer(host, request, document)), proof=proof(secret, digest))
    device = other_host.device
    with other_host.transaction() as tpm:
        srk = tpm.certify(device, enrolment_qualifying_data("srk", secret, digest))
        counter = tpm.nv_certify(
            device, other_host.counter(keyring), enrolment_qualifying_data("counter", secret, digest)
        )
        quote = tpm.quote(device, sorted(MEASURED_PCRS), enrolment_qualifying_data("quote", secret, digest))
    for number, change in ((7, {"srk_certify": srk}), (8, {"counter_certify": counter}), (9, {"quote": quote})):
        with host.refused(EnrolmentRefused, f"check {number}"):
            accept(pending, format_answer(replace(mixed, **change)), roots)
    assert accept(pending, format_answer(mixed), roots).ak == host.device.ak  # the control


def test_keys_that_the_tpm_does_not_hold_are_refused(host: Host, keyring: Keyring) -> None:
    """A request whose attributes are all in order, but its SRK, or its counter, lies outside of the TPM."""
    roots = authorities(host)
    request = parse_request(ask(host, keyring))
    software = make_device(keyring.owner.owner_id).record
    unwritten = counter_public(request.counter.index + 1)
    attributes = COUNTER_ATTRIBUTES.to_bytes(4, "big")
    written = unwritten.replace(attributes, (COUNTER_ATTRIBUTES | NvAttributes.WRITTEN).to_bytes(4, "big"))
    counters = [parse_nv_public(each, what="a counter", error=DeviceInvalid) for each in (unwritten, written)]
    unheld = (
        (3, replace(request, ak=request.srk)),
        (4, replace(request, srk=request.ak)),
        (5, replace(request, counter=counters[0])),
        (7, replace(request, srk=software.srk)),
        (8, replace(request, counter=counters[1])),
    )
    for check, asked in unheld:
        forged = format_request(
            device=asked.device,
            owner_id=asked.owner_id,
            ek_certificate=asked.ek_certificate,
            ek=asked.ek,
            ak=asked.ak,
            srk=asked.srk,
            counter=asked.counter,
        )
        with host.refused(EnrolmentRefused, f"check {check}"):
            document, pending = challenge(forged, roots)
            accept(pending, answer(host, forged, document), roots)


def test_a_challenge_for_another_attestation_key_does_not_open(host: Host, other_host: Host) -> None:
    with host.transaction() as tpm:
        _, ek = tpm.ek()
    id_object, encrypted_secret = make_credential(ek, bytes(32), other_host.device.ak.name)
    with host.refused(EnrolmentRefused), host.transaction() as tpm:
        tpm.activate_credential(host.device, id_object, encrypted_secret)
    with host.refused(DeviceInvalid), host.transaction() as tpm:
        tpm.activate_credential(host.device, id_object + b"\0", encrypted_secret)


# --- provisioning -----------------------------------------------------------------------------------------------------


def test_provisioning_twice_changes_nothing(host: Host, keyring: Keyring) -> None:
    owner_id = keyring.owner.owner_id
    before, value = host.device, host.count(keyring)
    persistent = host.handles("handles-persistent", "handles-nv-index")
    for known in (host.device, None):  # None: device.json was lost
        with host.transaction() as tpm:
            again = tpm.provision(owner_id, known)
        assert again.counters[owner_id] == before.counters[owner_id]
        assert (again.srk_handle, again.srk, again.srk_serialised) == (
            before.srk_handle,
            before.srk,
            before.srk_serialised,
        )
        assert (again.ak_handle, again.ak) == (before.ak_handle, before.ak)
        assert host.handles() == []
    assert host.handles("handles-persistent", "handles-nv-index") == persistent
    assert host.count(keyring) == value


def test_asking_again_keeps_the_counter_s_value_of_the_enrolment(own_host: Host, keyring: Keyring) -> None:
    """A host that asks is not enrolled yet: what a revocation counted up since is still missing its list."""
    host, owner_id = own_host, keyring.owner.owner_id
    before, value = host.device, host.count(keyring)
    assert before.counter_values[owner_id] == value
    with host.transaction() as tpm:
        tpm.increment_counter(host.counter(keyring).index)
        again = tpm.provision(owner_id, before, newest_grant=7)
    assert again == before.with_counter(owner_id, before.counters[owner_id], value, AskedAgain(value + 1, 7))
    with host.transaction() as tpm:
        assert tpm.provision(owner_id, again, newest_grant=8).asked_again[owner_id] == AskedAgain(value + 1, 8)
        # Nothing is known of an enrolment, or it was with other keys: it is the value now.
        for known in (None, replace(before, counter_values={}), replace(before, srk=before.ak)):
            made = tpm.provision(owner_id, known)
            assert (dict(made.counter_values), dict(made.asked_again)) == ({owner_id: value + 1}, {})


def test_each_owner_has_a_counter_of_its_own(host: Host, keyring: Keyring, stranger: Keyring) -> None:
    before = host.device
    after = host.provision(stranger.owner.owner_id)
    assert replace(after, counters={}, counter_values={}) == replace(before, counters={}, counter_values={})
    assert host.counter(stranger).index != host.counter(keyring).index
    assert host.counter(keyring) == before.counters[keyring.owner.owner_id]
    value = host.count(keyring)
    with host.transaction() as tpm:
        tpm.increment_counter(host.counter(stranger).index)
    assert host.count(keyring) == value
    assert host.handles() == []


# --- quotes, and a second opinion on them -----------------------------------------------------------------------------


def quoted(host: Host, boot_policy: BootPolicy, extra_data: bytes) -> Evidence:
    with host.transaction() as tpm:
        return tpm.quote(host.device, sorted(boot_policy.forms[0].pcrs), extra_data)


def for_this_start(nonce: bytes = bytes(32)) -> bytes:
    return qualifying_data(nonce, b"t" * 32, "c0ffee", f"sha256:{'ab' * 32}", b"h" * 32)


def test_a_quote_is_appraised(host: Host, other_host: Host, keyring: Keyring) -> None:
    boot_policy = approve(keyring, host.pcrs(GRUB))
    extra_data, ak = for_this_start(), host.device.ak
    evidence = quoted(host, boot_policy, extra_data)
    result = appraise_evidence(evidence, ak=ak, expected_extra_data=extra_data, boot_policy=boot_policy)
    assert result.form == boot_policy.forms[0]
    assert result.evidence_digest == evidence.digest

    def appraise(evidence: Evidence, extra_data: bytes = extra_data) -> None:
        appraise_evidence(evidence, ak=ak, expected_extra_data=extra_data, boot_policy=boot_policy)

    with host.refused(EvidenceRefused, "another occasion"):
        appraise(evidence, for_this_start(b"n" * 32))
    with host.refused(EvidenceRefused, "not by the enrolled"):
        appraise(quoted(other_host, boot_policy, extra_data))
    with host.refused(EvidenceRefused, "other PCRs"):
        appraise(quoted(host, approve(keyring, host.pcrs(UKI)), extra_data))
    with host.refused(EvidenceRefused, "digest"):
        appraise(replace(evidence, pcrs={**evidence.pcrs, 4: bytes(32)}))
    host.tpm.extend(4, "another boot loader")
    with host.refused(BootStateRefused, r"PCR 4 \(boot loader\)"):
        appraise(quoted(host, boot_policy, extra_data))


def test_another_key_at_the_enrolled_handle_does_not_sign(host: Host) -> None:
    device = host.device
    elsewhere = replace(device, ak_handle=device.srk_handle)
    with host.refused(DeviceNotEnrolled), host.transaction() as tpm:
        tpm.quote(elsewhere, GRUB, bytes(32))
    with host.refused(DeviceNotEnrolled), host.transaction() as tpm:
        tpm.certify(elsewhere, bytes(32))
    with host.refused(DeviceNotEnrolled), host.transaction() as tpm:
        tpm.certify(replace(device, srk_handle=device.ak_handle), bytes(32))


def test_tpm2_checkquote_agrees(host: Host, keyring: Keyring, tmp_path: Path) -> None:
    boot_policy = approve(keyring, host.pcrs(GRUB))
    extra_data, ak = for_this_start(), host.device.ak
    evidence = quoted(host, boot_policy, extra_data)
    (tmp_path / "ak.pem").write_bytes(ak.public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    (tmp_path / "signature").write_bytes(evidence.signature)

    def theirs(attest: bytes, pcrs: Mapping[int, bytes] = evidence.pcrs, extra: bytes = extra_data) -> bool:
        (tmp_path / "attest").write_bytes(attest)
        (tmp_path / "pcrs").write_bytes(b"".join(pcrs[pcr] for pcr in sorted(pcrs)))  # --pcrs_format=values
        command = ["tpm2_checkquote", "-u", f"{tmp_path}/ak.pem", "-m", f"{tmp_path}/attest"]
        command += ["-s", f"{tmp_path}/signature", "-f", f"{tmp_path}/pcrs", "-g", "sha256", "-q", extra.hex()]
        command += ["-l", "sha256:" + ",".join(map(str, sorted(pcrs)))]
        return host.tool(*command, check=False).returncode == 0

    def ours(attest: bytes) -> bool:
        try:
            appraise_evidence(
                replace(evidence, attest=attest), ak=ak, expected_extra_data=extra_data, boot_policy=boot_policy
            )
        except EvidenceRefused:
            return False
        return True

    assert ours(evidence.attest)
    assert theirs(evidence.attest)
    assert not theirs(evidence.attest, extra=for_this_start(b"n" * 32))
    assert not theirs(evidence.attest, {**evidence.pcrs, 4: bytes(32)})
    for place in range(len(evidence.attest)):  # one bit of each byte
        flipped = bytearray(evidence.attest)
        flipped[place] ^= 1 << place % 8
        assert not ours(bytes(flipped)), place
        assert not theirs(bytes(flipped)), place


# --- release ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pcrs", [GRUB, UKI], ids=["grub", "uki"])
def test_a_secret_is_released_in_the_approved_state(host: Host, keyring: Keyring, pcrs: tuple[int, ...]) -> None:
    sealing = seal(host, keyring, pcrs)
    for _ in range(2):
        assert sealing.open() == SECRET
        assert host.handles() == []


def test_another_boot_state_is_refused_and_a_newly_signed_policy_opens(sealing: Sealing) -> None:
    host, keyring = sealing.host, sealing.keyring
    host.tpm.extend(16, "what nobody selected")
    assert sealing.open() == SECRET  # the control: it is these PCRs that count
    host.tpm.extend(9, "another kernel")
    with host.refused(BootStateRefused):
        sealing.open()
    updated = replace(sealing, form=approve(keyring, host.pcrs(GRUB)).forms[0])
    assert updated.blob == sealing.blob  # the same blob, in another state that the owner approved
    assert updated.open() == SECRET


def test_an_old_signature_does_not_fit_another_state(sealing: Sealing) -> None:
    host = sealing.host
    host.tpm.extend(9, "another kernel")
    now = host.pcrs(GRUB)
    with host.refused(BootPolicyRefused):  # the state's values, beside what the owner signed for the earlier state
        replace(sealing, form=replace(sealing.form, pcrs=now)).open()
    with host.refused(BootPolicyRefused):  # the state's own policy, with the old signature
        replace(sealing, form=replace(sealing.form, pcrs=now, policy=approved_policy(now))).open()


def test_another_boot(sealing: Sealing) -> None:
    host = sealing.host
    host.tpm.restart()
    with host.refused(BootStateRefused):  # nothing measured
        sealing.open()
    host.tpm.measure_boot()
    assert sealing.open() == SECRET
    host.boot({8: "GRUB commands and kernel command line init=/bin/sh"})
    with host.refused(BootStateRefused):
        sealing.open()


def test_an_incremented_counter_revokes(sealing: Sealing) -> None:
    host, keyring = sealing.host, sealing.keyring
    with host.transaction() as tpm:
        assert tpm.increment_counter(host.counter(keyring).index) == sealing.maximum + 1
    with host.refused(Revoked):
        sealing.open()
    with host.refused(KeyRefused):  # a higher maximum than the blob's is another policy
        replace(sealing, maximum=sealing.maximum + 1).open()
    renewed = wrapped(host, keyring, sealing.maximum + 1)
    assert replace(sealing, blob=renewed, maximum=sealing.maximum + 1).open() == SECRET
    host.boot()
    with host.refused(Revoked):
        sealing.open()


def test_a_deleted_counter_comes_back_higher(host: Host, tmp_path: Path) -> None:
    keyring = _keyring(tmp_path / "keys", "brief")
    host.provision(keyring.owner.owner_id)
    sealing, counter = seal(host, keyring), host.counter(keyring)
    assert sealing.open() == SECRET
    host.tool("tpm2_nvundefine", "-C", "o", hex(counter.index))
    with host.refused(KeyRefused, "deleted"):
        sealing.open()
    host.provision(keyring.owner.owner_id)
    assert host.counter(keyring) == counter  # the same Name
    assert host.count(keyring) > sealing.maximum
    with host.refused(Revoked):
        sealing.open()


def test_another_owners_counter_does_not_open(sealing: Sealing, stranger: Keyring) -> None:
    host = sealing.host
    host.provision(stranger.owner.owner_id)
    with host.refused(KeyRefused):
        replace(sealing, counter_index=host.counter(stranger).index, maximum=1 << 40).open()


def test_a_policy_by_another_owner_is_refused(sealing: Sealing, stranger: Keyring) -> None:
    host = sealing.host
    foreign = approve(stranger, host.pcrs(GRUB)).forms[0]
    with host.refused(BootPolicyRefused):  # the signature is not by the owner's key
        replace(sealing, form=foreign).open()
    counter = host.counter(sealing.keyring).index
    with host.refused(KeyRefused):  # it is by the key that the host was told, but the blob names the owner's
        replace(sealing, form=foreign, keyring=stranger, counter_index=counter).open()


def test_a_policy_for_another_model_line_or_class_is_refused(sealing: Sealing) -> None:
    host, keyring = sealing.host, sealing.keyring
    for model, device_class in (("other", CLASS), (MODEL, "lab")):
        lax = approve(keyring, host.pcrs(GRUB), model=model, device_class=device_class)
        with host.refused(BootPolicyRefused):  # signed for another policyRef
            replace(sealing, form=lax.forms[0]).open()
        with host.refused(KeyRefused):  # both of the other line: the blob is of this one
            replace(sealing, form=lax.forms[0], reference=lax.policy_ref).open()


def test_a_blob_for_another_tpm_is_refused(sealing: Sealing, other_host: Host) -> None:
    host, keyring = sealing.host, sealing.keyring
    for_other = wrapped(other_host, keyring, sealing.maximum)
    with host.refused(KeyRefused):
        replace(sealing, blob=for_other).open()
    with other_host.refused(KeyRefused):
        replace(sealing, host=other_host).open()


def test_the_session_is_pinned_to_the_enrolled_srk(sealing: Sealing, other_host: Host) -> None:
    """Who answers on the bus with an SRK of his own, at the right handle, does not get a session."""
    host, pinned = sealing.host, other_host.device
    assert pinned.srk_handle == host.device.srk_handle
    with host.refused(KeyRefused):
        replace(sealing, device=replace(pinned, counters=host.device.counters)).open()
    with host.refused(DeviceInvalid):
        replace(sealing, device=replace(host.device, srk_serialised=pinned.srk_serialised)).open()
    with host.refused(DeviceInvalid):
        replace(sealing, device=replace(host.device, srk_serialised=b"\xff" * 40)).open()


@pytest.mark.parametrize("part", ["public", "duplicate", "seed"])
def test_a_changed_blob_is_refused(sealing: Sealing, part: str) -> None:
    host, good = sealing.host, getattr(sealing.blob, part)
    changed = [good[:-1], good + b"\0", b"", bytes(len(good))]
    for place in range(len(good)):  # one bit of each byte
        flipped = bytearray(good)
        flipped[place] ^= 1 << place % 8
        changed.append(bytes(flipped))
    for value in changed:
        with host.refused(KeyRefused):
            replace(sealing, blob=replace(sealing.blob, **{part: value})).open()
    assert sealing.open() == SECRET


def test_no_password_opens_the_blob(sealing: Sealing) -> None:
    public = parse_public(sealing.blob.public, what="the sealed object", error=DeviceInvalid)
    assert public.attributes == ObjectAttributes.NO_DA
    host = sealing.host
    with host.transaction() as tpm, ExitStack() as handles:
        item = tpm._import_sealed(tpm._pinned_srk(host.device), sealing.blob, handles)
        with pytest.raises(tpm_module.tss.TSS2_Exception) as refused:
            tpm._esys.unseal(item)
        assert int(refused.value.rc) == TPM_RC_AUTH_UNAVAILABLE
        session = tpm._pinned_session(tpm._pinned_srk(host.device), handles)
        with pytest.raises(KeyRefused):  # a session that satisfied no policy
            tpm._unseal(session, item)
    assert host.handles() == []


def test_a_password_would_open_a_blob_that_allows_one(sealing: Sealing) -> None:
    """The control of the test above: what it tries works, with an object that has userWithAuth."""
    host, tss = sealing.host, tpm_module.tss
    lax = tss.TPMA_OBJECT.NODA | tss.TPMA_OBJECT.USERWITHAUTH
    sensitive, public = tss.TPM2B_SENSITIVE.keyedhash_from_secret(SECRET, objectAttributes=lax)
    parent, _ = tss.TPM2B_PUBLIC.unmarshal(host.device.srk.marshalled)
    _, duplicate, seed = tpm_module.utils.wrap(newparent=parent.publicArea, public=public, sensitive=sensitive)
    blob = WrappedSecret(public.marshal(), duplicate.marshal(), seed.marshal())
    with host.transaction() as tpm, ExitStack() as handles:
        item = tpm._import_sealed(tpm._pinned_srk(host.device), blob, handles)
        assert bytes(tpm._esys.unseal(item)) == SECRET


def test_pcrs_that_change_during_a_release(sealing: Sealing) -> None:
    """An extend between PolicyPCR and TPM2_Unseal: the policy is walked again, but not for ever."""
    host, tss = sealing.host, tpm_module.tss

    def open_while(pcr: int, times: int) -> bytes:
        left = times
        with host.transaction() as tpm:
            walk_on = tpm._policy_unseal_only

            def extended_first(session: Handle) -> None:
                nonlocal left
                if left:
                    left -= 1
                    tpm._esys.pcr_event(tss.ESYS_TR(pcr), b"measured late")
                walk_on(session)

            tpm._policy_unseal_only = extended_first
            opened = sealing.open_in(tpm)
        assert left == 0
        return opened

    assert 10 not in sealing.form.pcrs
    assert open_while(10, times=0) == open_while(10, times=1) == open_while(10, times=4) == SECRET
    with host.refused(TpmFailed, "kept changing"):
        open_while(10, times=99)
    with host.refused(BootStateRefused):  # a PCR that counts: the state is no longer the approved one
        open_while(9, times=1)


def test_a_tpm_in_lockout_still_releases(sealing: Sealing) -> None:
    """Somebody guessed at another program's password until the TPM locked: ours has none to guess."""
    host, index = sealing.host, "0x1500016"
    host.tool("tpm2_nvdefine", index, "-C", "o", "-s", "8", "-p", "right", "-a", "authread|authwrite")
    try:
        for _ in range(40):
            host.tool("tpm2_nvread", index, "-C", index, "-P", "wrong", check=False)
            state = host.tool("tpm2_getcap", "properties-variable").stdout
            if re.search(r"inLockout: +1", state):
                break
        assert re.search(r"inLockout: +1", state)
        assert sealing.open() == SECRET
        with host.transaction() as tpm:
            assert tpm.quote(host.device, GRUB, bytes(32)).pcrs == sealing.form.pcrs
            assert tpm.increment_counter(host.counter(sealing.keyring).index) == sealing.maximum + 1
        with host.refused(Revoked):
            sealing.open()
    finally:
        host.tool("tpm2_dictionarylockout", "--clear-lockout")
        host.tool("tpm2_nvundefine", index, "-C", "o")


# --- processes that are killed, come at once, or wait for a TPM that hangs --------------------------------------------


def forked(action: Callable[[], object]) -> int:
    """Run `action` in a child that dies with this process; returns its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            prctl_set_pdeathsig(signal.SIGKILL)
            action()
        finally:
            os._exit(0)
    return pid


def kill_in_mid_transaction(sealing: Sealing, delay_seconds: float) -> None:
    """SIGKILL a child that opens the secret again and again, so long after it did so for the first time."""
    read_fd, write_fd = os.pipe()

    def again_and_again() -> None:
        while True:
            sealing.open()
            os.write(write_fd, b"+")

    pid = forked(again_and_again)
    try:
        os.close(write_fd)
        assert os.read(read_fd, 1) == b"+"
        time.sleep(delay_seconds)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read_fd)


def test_killed_processes_leave_a_usable_tpm(sealing: Sealing) -> None:
    chance = random.Random(20)
    left = 0
    for number in range(40):
        kill_in_mid_transaction(sealing, chance.uniform(0, 0.03))
        left += bool(sealing.host.handles())
        assert sealing.open() == SECRET, number
        assert sealing.host.handles() == [], number
        if number >= 9 and left >= 3:
            break
    assert left >= 3  # the control: these kills were in mid-transaction


def test_eight_processes_at_once(sealing: Sealing) -> None:
    def three_times() -> bytes:
        return b"".join(sealing.open() for _ in range(3))

    with ExitStack() as running:
        children = [running.enter_context(Deadline(three_times, 30)) for _ in range(8)]
        assert [child.result() for child in children] == [3 * SECRET] * 8
    assert sealing.host.handles() == []


@contextmanager
def lock_stays_free(host: Host) -> Iterator[None]:
    yield
    with tpm_lock(host.lock_file, timeout_seconds=0):
        pass


@pytest.mark.parametrize("moment", ["before", "amid"])
def test_a_tpm_that_hangs_costs_no_more_than_the_deadline(sealing: Sealing, moment: str) -> None:
    host = sealing.host

    def release() -> bytes:
        with host.transaction() as tpm, ExitStack() as handles:
            tpm._pinned_session(tpm._pinned_srk(host.device), handles)
            host.tpm.pause()
            return sealing.open_in(tpm)

    began = time.monotonic()
    try:
        if moment == "before":
            host.tpm.pause()
        with lock_stays_free(host), pytest.raises(TpmTimeout):
            with_deadline(sealing.open if moment == "before" else release, 0.7)
        assert 0.6 < time.monotonic() - began < 2
    finally:
        host.tpm.resume()
    assert sealing.open() == SECRET
    assert host.handles() == []


def test_a_lock_that_others_hold_costs_no_more_than_its_time(sealing: Sealing) -> None:
    host = sealing.host
    with host.transaction() as tpm:
        began = time.monotonic()
        with (
            pytest.raises(TpmTimeout),
            open_tpm(host.tpm.tcti, host.lock_file, timeout_seconds=0.3),
        ):
            pytest.fail("two transactions at once")
        assert 0.2 < time.monotonic() - began < 1
        assert sealing.open_in(tpm) == SECRET  # the holder is not disturbed
    assert host.handles() == []


def test_refusals_cross_the_deadline(sealing: Sealing) -> None:
    host = sealing.host
    assert with_deadline(sealing.open, 10) == SECRET
    host.tpm.extend(9, "another kernel")
    with host.refused(BootStateRefused, "PCRs"):
        with_deadline(sealing.open, 10)
    with host.refused(InternalError, "ZeroDivisionError"):
        with_deadline(lambda: bytes(1 // 0), 10)


def test_no_tpm(host: Host, tmp_path: Path) -> None:
    for tcti in (f"swtpm:path={tmp_path}/none", "device:/dev/null/none", "nonsense:", "", "swtpm"):
        with host.refused(TpmUnavailable), lock_stays_free(host), host.transaction(tcti or "none"):
            pytest.fail("a TPM was found")
    with host.refused(TpmUnavailable):
        with_deadline(lambda: _read_pcr(host, f"swtpm:path={tmp_path}/none"), 5)
    with host.refused(FileUnreadable), open_tpm(host.tpm.tcti, tmp_path / "no" / "lock", timeout_seconds=1):
        pytest.fail("no lock was taken")


def _read_pcr(host: Host, tcti: str) -> bytes:
    with host.transaction(tcti) as tpm:
        return tpm.read_pcrs([0])[0]


# --- the bus ----------------------------------------------------------------------------------------------------------


def windows(secret: bytes, size: int) -> Iterator[bytes]:
    return (secret[place : place + size] for place in range(len(secret) - size + 1))


def test_the_secret_is_never_on_the_bus_in_clear(sealing: Sealing) -> None:
    host = sealing.host
    with Tap(host.tpm.socket_path) as tap:
        assert sealing.open(tap.tcti) == SECRET
    assert [each.code for each in tap.exchanges].count(CC_UNSEAL) == 1
    assert not [part for part in windows(SECRET, 4) if part in tap.recorded]
    # The control: the tap hears everything, so what is not secret is there.
    for plain in (pcr_digest(sealing.form.pcrs), host.counter(sealing.keyring).name, sealing.blob.duplicate):
        assert plain in tap.recorded


def test_without_the_encrypted_session_the_tap_would_hear_the_secret(sealing: Sealing) -> None:
    """The control of the test above: the same release by a session that is neither salted nor encrypted."""
    tss = tpm_module.tss
    with Tap(sealing.host.tpm.socket_path) as tap, sealing.host.transaction(tap.tcti) as tpm:
        no_encryption = tss.TPMT_SYM_DEF(algorithm=tss.TPM2_ALG.NULL)
        tpm._pinned_session = lambda _, handles: tpm._session(tss.ESYS_TR.NONE, no_encryption, handles)
        assert sealing.open_in(tpm) == SECRET
    assert SECRET in tap.recorded


def test_a_response_that_was_changed_on_the_bus_is_noticed(sealing: Sealing) -> None:
    def flip(code: int, response: bytes) -> bytes:
        changed = bytearray(response)
        if code == CC_UNSEAL:
            changed[20] ^= 1  # header, size of the parameters, size of the secret, then the encrypted secret
        return bytes(changed)

    with Tap(sealing.host.tpm.socket_path, flip) as tap, sealing.host.refused(TpmFailed, "changed between"):
        sealing.open(tap.tcti)
    assert CC_UNSEAL in [each.code for each in tap.exchanges]
    assert sealing.open() == SECRET


# --- a TPM that was cleared, or dies; each with a TPM of its own ------------------------------------------------------


@pytest.fixture
def own_host(keyring: Keyring) -> Iterator[Host]:
    with _machine() as host:
        host.provision(keyring.owner.owner_id)
        yield host
        assert host.handles() == []


def test_a_cleared_tpm_is_enrolled_again(own_host: Host, keyring: Keyring) -> None:
    host, sealing = own_host, seal(own_host, keyring)
    assert sealing.open() == SECRET
    old = host.device
    host.tool("tpm2_clear", "-c", "l")
    with host.refused(DeviceNotEnrolled):
        sealing.open()
    with host.refused(DeviceNotEnrolled), host.transaction() as tpm:
        tpm.quote(old, GRUB, bytes(32))
    with host.refused(DeviceNotEnrolled), host.transaction() as tpm:
        tpm.certify(old, bytes(32))
    with host.refused(DeviceNotEnrolled), host.transaction() as tpm:
        tpm.nv_certify(old, old.counters[keyring.owner.owner_id], bytes(32))
    with host.refused(DeviceNotEnrolled), host.transaction() as tpm:
        tpm.activate_credential(old, b"\0\0", b"\0\0")
    # Enrolled again: another SRK at the same handle, the same AK; what was sealed before is lost.
    new = host.provision(keyring.owner.owner_id)
    assert new.srk.name != old.srk.name
    assert new.ak.name == old.ak.name
    with host.refused(KeyRefused):
        sealing.open()
    with host.refused(KeyRefused):  # an old device.json beside the new SRK
        replace(sealing, device=old).open()
    renewed = seal(host, keyring)
    assert renewed.open() == SECRET
    with host.refused(KeyRefused):  # the same, with a blob that would open
        replace(renewed, device=old).open()
    roots, request = authorities(host), ask(host, keyring)
    document, pending = challenge(request, roots)
    assert accept(pending, answer(host, request, document), roots).srk == new.srk


def test_passwords_on_the_hierarchies(own_host: Host, keyring: Keyring, stranger: Keyring) -> None:
    """Another administrator set them: what was enrolled works; what needs them says so."""
    host, sealing = own_host, seal(own_host, keyring)
    request = ask(host, keyring)
    document, _ = challenge(request, authorities(host))
    host.tool("tpm2_changeauth", "-c", "owner", "of-the-owner")
    host.tool("tpm2_changeauth", "-c", "endorsement", "of-the-ek")
    assert sealing.open() == SECRET
    with host.transaction() as tpm:
        assert tpm.quote(host.device, GRUB, bytes(32)).pcrs == sealing.form.pcrs
    assert host.provision(keyring.owner.owner_id) == sealing.host.device  # nothing is to be made
    with host.refused(TpmFailed, "password"):
        host.provision(stranger.owner.owner_id)
    with host.refused(TpmFailed, "password"):
        answer(host, request, document)
    with host.transaction() as tpm:  # the counter's own authorisation is empty: a revocation needs no password
        tpm.increment_counter(host.counter(keyring).index)
    with host.refused(Revoked):
        sealing.open()


def test_a_tpm_that_dies_in_mid_transaction(own_host: Host, keyring: Keyring) -> None:
    sealing = seal(own_host, keyring)
    with pytest.raises(TpmUnavailable), lock_stays_free(own_host), own_host.transaction() as tpm:
        os.kill(own_host.tpm.pid, signal.SIGKILL)
        sealing.open_in(tpm)
    own_host.tpm.stop()
    own_host.tpm.start()
    own_host.tpm.measure_boot()
    assert sealing.open() == SECRET
