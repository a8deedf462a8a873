"""A TPM that lies: every field of every response that a start or an enrolment reads is changed on its way.

Whatever it answers, the outcome is what an honest TPM gives or an error of ours; evidence is believed only if it is
true; nothing hangs beyond the deadline; no object and no session is left; and an honest start works next. The proxy
stands between tpm2-tss and swtpm, which is real.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oci_hook.attestation.appraisal import appraise_evidence
from oci_hook.attestation.deadline import with_deadline
from oci_hook.attestation.device_record import DeviceRecord
from oci_hook.attestation.enrolment import verify_answer
from oci_hook.attestation.enrolment_documents import parse_answer
from oci_hook.attestation.host_device import HostDevice
from oci_hook.attestation.tpm import make_credential
from oci_hook.errors import CouldNotTell, DeviceInvalid, InternalError, Refused, SczError, TpmTimeout
from oci_hook.owner.keyring import Keyring
from tests.integration.test_attestation import (
    CLASS,
    GRUB,
    SECRET,
    Host,
    Sealing,
    _keyring,
    _machine,
    answer,
    approve,
    ask,
    authorities,
    challenge,
    for_this_start,
    seal,
    windows,
)
from tests.tpm_proxy import HANG, Delivery, Field, Tap, fields_of, loaded_handles, name_of, resized, wrong_values

#: Bytes after which a reader may wait for more: the line is cut then, but in the tests of hanging.
_HEADER = range(10)


@dataclass(repr=False)
class Liar:
    """What the proxy does to one response, the one with this number since `prepare`."""

    number: int = -1
    change: Callable[[bytes], Delivery] = lambda response: response
    seen: list[int] = field(default_factory=list)
    told: bool = False

    def prepare(self, number: int, change: Callable[[bytes], Delivery]) -> None:
        self.number, self.change, self.told = number, change, False
        self.seen.clear()

    def __call__(self, code: int, response: bytes) -> Delivery:
        self.seen.append(code)
        if len(self.seen) - 1 != self.number:
            return response
        self.told = True
        return self.change(response)


@dataclass(frozen=True, repr=False)
class Scene:
    """An honest host, and the same host behind a liar."""

    host: Host
    keyring: Keyring
    sealing: Sealing
    tap: Tap
    liar: Liar

    def release(self) -> bytes:
        return self.sealing.open(self.tap.tcti)

    def quote(self) -> bytes:
        """What a start does with a quote; the digest of evidence that was accepted."""
        extra_data, boot_policy = for_this_start(), approve(self.keyring, self.sealing.form.pcrs)
        with self.host.transaction(self.tap.tcti) as tpm:
            evidence = tpm.quote(self.host.device, GRUB, extra_data)
        result = appraise_evidence(
            evidence, ak=self.host.device.ak, expected_extra_data=extra_data, boot_policy=boot_policy
        )
        assert evidence.pcrs == result.form.pcrs == self.sealing.form.pcrs
        return b"accepted"

    def nothing_is_left(self) -> None:
        assert loaded_handles(self.host.tpm.socket_path) == []


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    keyring, liar = _keyring(tmp_path_factory.mktemp("owner") / "keys", "acme"), Liar()
    with _machine() as host:
        host.provision(keyring.owner.owner_id)
        with Tap(host.tpm.socket_path, liar) as tap:
            yield Scene(host, keyring, seal(host, keyring), tap, liar)
        assert host.handles() == []


def record(scene: Scene, act: Callable[[], object]) -> list[tuple[int, bytes]]:
    """Codes and responses of an undisturbed run, in their order."""
    scene.liar.prepare(-1, lambda response: response)
    scene.tap.exchanges.clear()
    act()
    return [(each.code, each.response) for each in scene.tap.exchanges]


def ours(act: Callable[[], object]) -> object:
    """What comes of it: a value, or an error of ours that a start may end with; anything else fails the test."""
    try:
        return act()
    except SczError as error:
        outcome = error
    assert isinstance(outcome, Refused | CouldNotTell | DeviceInvalid), outcome
    assert not isinstance(outcome, InternalError), outcome
    assert outcome.message.isprintable()
    assert outcome.advice
    return outcome


def lies(field: Field, response: bytes) -> Iterator[Callable[[bytes], Delivery]]:
    """Ways to change a field of a response; the sizes around it are not mended, as a liar need not."""
    for value in wrong_values(field, response):

        def change(honest: bytes, value: bytes = value) -> Delivery:
            lie = field.put(honest, value)
            return [lie, None] if field.start in _HEADER else lie

        yield change


def attack(scene: Scene, act: Callable[[], object], good: Callable[[object], bool], *, each: int | None = None) -> int:
    """Change every field of every response; returns how often the outcome was an error.

    Args:
        scene: With its liar.
        act: What a host does.
        good: Whether a value that it gave is an honest one.
        each: So many lies a field, chosen at random; None: all.
    """
    chance, refused = random.Random(7), 0
    done: set[tuple[int, bytes]] = set()
    for number, (code, response) in enumerate(record(scene, act)):
        if (code, response) in done:  # TPM2_FlushContext's are all the same
            continue
        done.add((code, response))
        for place in fields_of(code, response):
            changes = list(lies(place, response))
            for change in changes if each is None else chance.sample(changes, min(each, len(changes))):
                scene.liar.prepare(number, change)
                outcome = ours(act)
                assert scene.liar.told, place
                assert isinstance(outcome, SczError) or good(outcome), (place, outcome)
                refused += isinstance(outcome, SczError)
                scene.nothing_is_left()
    scene.liar.prepare(-1, lambda response: response)
    assert good(act())
    return refused


def test_the_layouts_are_those_of_the_responses(scene: Scene) -> None:
    """The control: what the proxy calls fields covers every byte of every response, once."""
    host, behind = scene.host, replace_tcti(scene.host, scene.tap)
    request = ask(host, scene.keyring)
    document, _ = challenge(request, authorities(host))
    for act in (scene.release, scene.quote, lambda: answer(behind, request, document)):
        for code, response in record(scene, act):
            covered = sorted((each.start, each.size) for each in fields_of(code, response))
            place = 0
            for start, size in covered:
                assert start == place, (name_of(code), covered)
                place = start + size
            assert place == len(response)
    names = {name_of(code) for code, _ in record(scene, scene.release)}
    assert {"Import", "Load", "LoadExternal", "VerifySignature", "NV_ReadPublic", "StartAuthSession"} <= names
    assert {"PolicyPCR", "PolicyCommandCode", "PolicyAuthorize", "PolicyNV", "Unseal", "FlushContext"} <= names
    assert loaded_handles(scene.host.tpm.socket_path) == [] == scene.host.handles()


@pytest.mark.parametrize("what", ["release", "quote"])
def test_every_part_of_another_size(scene: Scene, what: str) -> None:
    """A liar who mends the sizes around what he changes: tpm2-tss takes his response apart without a complaint."""
    act, good = {"release": (scene.release, SECRET), "quote": (scene.quote, b"accepted")}[what]
    refused = 0
    for number, (code, response) in enumerate(record(scene, act)):
        for which, (place, _) in enumerate(resized(code, response)):
            scene.liar.prepare(number, lambda honest, code=code, which=which: resized(code, honest)[which][1])
            outcome = ours(act)
            assert scene.liar.told, place
            assert isinstance(outcome, SczError) or outcome == good, (place, outcome)
            refused += isinstance(outcome, SczError)
            scene.nothing_is_left()
    scene.liar.prepare(-1, lambda response: response)
    assert act() == good
    assert refused > 30


def test_every_field_of_a_release(scene: Scene) -> None:
    assert attack(scene, scene.release, lambda value: value == SECRET) > 300


def test_every_field_of_a_quote(scene: Scene) -> None:
    assert attack(scene, scene.quote, lambda value: value == b"accepted") > 100


def test_every_field_of_an_enrolment_s_answer(scene: Scene) -> None:
    """Credential activation, both certifications and the quote; the owner accepts the true device or none."""
    host, keyring = scene.host, scene.keyring
    roots = authorities(host)
    request = ask(host, keyring)
    document, pending = challenge(request, roots)
    behind, now = replace_tcti(host, scene.tap), datetime.now(UTC)

    def accept() -> DeviceRecord:
        answered = parse_answer(answer(behind, request, document))
        return verify_answer(pending, answered, authorities=roots, now=now, device_class=CLASS)

    honest = accept()

    def is_honest(record: object) -> bool:
        """The same but for the TPM's clock, which goes on."""
        assert isinstance(record, DeviceRecord)
        assert (honest.clock_ms or 0) <= (record.clock_ms or 0)
        return replace(record, clock_ms=honest.clock_ms) == honest

    assert attack(scene, accept, is_honest, each=1) > 50


def test_every_field_of_a_provisioning(scene: Scene) -> None:
    """On a TPM of its own, as a host that is lied to may make a key or a counter once more; what it had works on."""
    with _machine() as host:
        host.provision(scene.keyring.owner.owner_id)
        sealing, owner_id = seal(host, scene.keyring), scene.keyring.owner.owner_id
        with Tap(host.tpm.socket_path, scene.liar) as tap:
            lied_to = Scene(host, scene.keyring, sealing, tap, scene.liar)

            def provision() -> object:
                with host.transaction(tap.tcti) as tpm:
                    return tpm.provision(owner_id, host.device)

            assert attack(lied_to, provision, lambda device: isinstance(device, HostDevice), each=1) > 5
        assert sealing.open() == SECRET
        assert host.handles() == []


def replace_tcti(host: Host, tap: Tap) -> Host:
    """The host, whose every transaction goes through the tap."""

    class Behind(Host):
        def transaction(self, tcti: str | None = None):  # type: ignore[no-untyped-def,override]
            return super().transaction(tcti or tap.tcti)

    return Behind(host.tpm, host.lock_file, host.known)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_bits_of_a_release(scene: Scene, data: st.DataObject) -> None:
    """Several responses of one start, at any places, cut and stuffed, too."""
    responses = record(scene, scene.release)
    number = data.draw(st.integers(0, 40)) % len(responses)
    kind = data.draw(st.sampled_from(["flip", "cut", "stuff", "another's"]))
    places = data.draw(st.lists(st.integers(0, 4095), min_size=1, max_size=4))
    other = responses[data.draw(st.integers(0, 40)) % len(responses)][1]

    def change(honest: bytes) -> Delivery:
        lie = bytearray(honest)
        if kind == "flip":
            for place in places:
                lie[place // 8 % len(lie)] ^= 1 << place % 8
        elif kind == "cut":
            del lie[places[0] % len(lie) :]
        elif kind == "stuff":
            lie[places[0] % len(lie) : 0] = other
        else:
            lie[:] = other
        return [bytes(lie), None]

    scene.liar.prepare(number, change)
    outcome = ours(scene.release)
    assert isinstance(outcome, SczError) or outcome == SECRET
    scene.nothing_is_left()
    scene.liar.prepare(-1, lambda response: response)
    assert scene.release() == SECRET


def test_an_earlier_answer_is_no_answer(scene: Scene) -> None:
    """Responses of an earlier release, played back: to the same question, in the same order."""
    earlier = record(scene, scene.release)
    for number, (code, response) in enumerate(earlier):
        scene.liar.prepare(number, lambda _, response=response: response)
        outcome = ours(scene.release)
        assert isinstance(outcome, SczError) or outcome == SECRET
        if name_of(code) in ("StartAuthSession", "Unseal"):
            assert isinstance(outcome, SczError), name_of(code)
        scene.nothing_is_left()


def test_whoever_has_all_of_it_recorded_cannot_play_the_tpm(scene: Scene) -> None:
    """Every response of an earlier release, to a host that asks again: without the salt there is no session."""
    earlier = [response for _, response in record(scene, scene.release)]
    numbers = iter(range(len(earlier)))

    def play(code: int, response: bytes) -> Delivery:
        return earlier[number] if (number := next(numbers, None)) is not None else response

    with Tap(scene.host.tpm.socket_path, play) as tap:
        outcome = ours(lambda: scene.sealing.open(tap.tcti))
    assert isinstance(outcome, SczError)
    assert scene.sealing.open() == SECRET
    scene.nothing_is_left()


# --- time -------------------------------------------------------------------------------------------------------------

SLOW: dict[str, Callable[[bytes], Delivery]] = {
    "none": lambda response: [HANG],
    "half a header": lambda response: [response[:5], HANG],
    "half a response": lambda response: [response[: max(11, len(response) // 2)][: len(response) - 1], HANG],
    "drips": lambda response: [part for byte in response * 100 for part in (bytes([byte]), 0.05)],
    "says that more comes": lambda response: [Field("size", 2, 4).put(response, b"\0\0\x0f\xff"), HANG],
    "floods": lambda response: [response * 5000, HANG],
}


@pytest.mark.parametrize("way", SLOW)
def test_a_tpm_that_stops_in_the_middle_of_an_answer(scene: Scene, way: str) -> None:
    """At each command of a release: told in time, and the next honest start works, whatever was left."""
    responses = record(scene, scene.release)
    names = [name_of(code) for code, _ in responses]
    for name in ("GetCapability", "Import", "StartAuthSession", "PolicyNV", "Unseal", "FlushContext"):
        scene.liar.prepare(names.index(name), SLOW[way])
        try:
            outcome = ours(lambda: with_deadline(scene.release, 0.5))
        finally:
            scene.liar.prepare(-1, lambda response: response)
        short = len(responses[names.index(name)][1]) == 10
        if way == "floods" or (way == "drips" and short):  # whole, and what follows it is not asked for
            assert isinstance(outcome, SczError) or outcome == SECRET, name
        else:
            assert isinstance(outcome, TpmTimeout), (name, outcome)
        assert scene.sealing.open() == SECRET
        scene.nothing_is_left()


# --- the bus ----------------------------------------------------------------------------------------------------------


def test_no_secret_crosses_the_bus_in_clear_whatever_the_tpm_answers(scene: Scene) -> None:
    """Nor does a liar get it: all that crosses, with each response of a release changed once, without the secret."""
    responses = record(scene, scene.release)
    for number, (code, response) in enumerate(responses):
        for place in fields_of(code, response)[2:4]:
            scene.liar.prepare(number, next(iter(lies(place, response))))
            scene.tap.exchanges.clear()
            with suppress(SczError):
                scene.release()
            recorded = scene.tap.recorded
            assert not [part for part in windows(SECRET, 4) if part in recorded], (name_of(code), place)
    scene.liar.prepare(-1, lambda response: response)


def test_a_liar_with_a_key_of_his_own_gets_no_session(scene: Scene) -> None:
    """He answers TPM2_ReadPublic with another key: the pinned SRK is never asked for, the AK's Name is compared."""
    with _machine() as other:
        other.provision(scene.keyring.owner.owner_id)
        with other.transaction() as tpm:
            foreign = tpm._read_public(tpm._find(other.device.ak_handle)).marshalled  # type: ignore[arg-type]
            _, ek = tpm.ek()

    def lie(honest: bytes) -> Delivery:
        rest = honest[12 + int.from_bytes(honest[10:12], "big") :]
        made = foreign + rest
        return honest[:2] + (10 + len(made)).to_bytes(4, "big") + honest[6:10] + made

    for number, (code, _) in enumerate(record(scene, scene.quote)):
        if name_of(code) == "ReadPublic":
            scene.liar.prepare(number, lie)
            assert isinstance(ours(scene.quote), SczError)
            assert scene.liar.told
    id_object, secret = make_credential(ek, bytes(32), scene.host.device.ak.name)
    scene.liar.prepare(-1, lambda response: response)

    def activate() -> object:
        with scene.host.transaction(scene.tap.tcti) as tpm:
            return tpm.activate_credential(scene.host.device, id_object, secret)

    assert isinstance(ours(activate), SczError)
    scene.nothing_is_left()
