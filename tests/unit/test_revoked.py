"""oci_hook.revoked: which list is in force, which is taken in, and who holds what was revoked; without a TPM."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from oci_hook import intake
from oci_hook.attestation.device_record import format_device_record, parse_device_record
from oci_hook.attestation.host_device import AskedAgain, format_host_device
from oci_hook.attestation.structures import NvPublic
from oci_hook.bundle.model import ModelId
from oci_hook.bundle.revocations import Revocations, sign_revocations
from oci_hook.documents import canonical
from oci_hook.enrolled import newest_grant, remember_granted
from oci_hook.errors import DeviceNotEnrolled, ModelUnknown, OutputExists, OwnerUntrusted, TpmUnavailable
from oci_hook.held import HeldModel
from oci_hook.incoming import collect
from oci_hook.intake import Intake, Taken
from oci_hook.key_errors import GenerationRefused, RevocationsMissing
from oci_hook.owner.keyring import open_keyring
from oci_hook.owner.records import OwnerRecords
from oci_hook.owner.revoking import enrolled_again
from oci_hook.records import ContainerRecord
from oci_hook.revoked import (
    live_holders,
    load_list,
    verify_generation,
    verify_in_force,
)
from oci_hook.store import Store
from oci_hook.trust import Owner
from oci_hook.trust_folder import Trust
from tests.commands import Household, crashed, done, sczctl, snapshot
from tests.devices import SoftwareDevice, make_device

LIST = Revocations("A" * 43, "edge-1", b"\0\x0b" + bytes(32), 0x01800123, b"\0\x0b" + bytes(32), 5, 1, (("m", 3),))


class Counter:
    """A counter in a file, so that it outlives who counts; it goes up only."""

    def __init__(self, path: Path, value: int) -> None:
        self.path, self.away = path, False
        path.write_text(str(value))

    def value(self, _counter: NvPublic) -> int:
        return int(self.path.read_text())

    def raise_to(self, counter: NvPublic, value: int) -> int:
        if self.away:
            raise TpmUnavailable("it was taken out")
        self.path.write_text(str(max(value, self.value(counter))))
        return self.value(counter)


@pytest.mark.parametrize(
    ("counter", "enrolled", "has_list", "in_force"),
    [
        (2, 2, False, True),  # nothing was ever revoked
        (3, 2, False, False),  # it was, and the list is gone
        (1, 2, False, False),  # a counter that went back: not this TPM's
        (3, None, False, True),  # enrolled by an earlier version: the TPM alone knows
        (5, 2, True, True),
        (5, None, True, True),
        (4, 2, True, False),  # not applied to its end
        (4, 4, True, False),
        (6, 2, True, False),  # a later one was applied, and put back
        (6, None, True, False),
        (6, 6, True, True),  # enrolled again since: none is asked for
        (None, 2, True, True),  # the counter is gone: the release says so
    ],
)
def test_which_list_is_in_force(counter: int | None, enrolled: int | None, has_list: bool, in_force: bool) -> None:
    revocations = LIST if has_list else None
    if in_force:
        verify_in_force(revocations, counter, enrolled)
        return
    with pytest.raises(RevocationsMissing):
        verify_in_force(revocations, counter, enrolled)


@pytest.mark.parametrize(("name", "generation", "allowed"), [("m", 2, False), ("m", 3, True), ("n", 1, True)])
def test_a_generation_below_the_lowest(name: str, generation: int, allowed: bool) -> None:
    model = ModelId(name, "1", generation)
    verify_generation(None, model)
    if allowed:
        verify_generation(LIST, model)
        return
    with pytest.raises(GenerationRefused, match="generation 2"):
        verify_generation(LIST, model)


# --- taking a list in -------------------------------------------------------------------------------------------------


class Host:
    """A host with a model, whose owner revokes."""

    def __init__(self, directory: Path) -> None:
        self.house = Household(directory)
        self.out = self.house.prepared()
        self.device: SoftwareDevice = self.house.devices["edge-1"]
        self.counter = Counter(directory / "counter", 1)
        self.take(self.out)

    @property
    def owners(self) -> Sequence[object]:
        return Trust(str(self.house.host / "trust")).owners()

    def take(self, *paths: Path) -> Taken:
        owners = Trust(str(self.house.host / "trust")).owners()
        intake = Intake(self.house.store, owners, self.device.host, counting=self.counter)
        return intake.take(collect([str(path) for path in paths]))

    def revoked(self, name: str = "revoked") -> Path:
        """A device's folder: the boot policy's epoch is raised, so that one grant stays."""
        words = ("revoke", "--keys", self.house.keys, "--boot-policy", "minilm:default", "-o", self.house.usb / name)
        done(sczctl(*words))
        return self.house.usb / name / "edge-1"

    def now(self) -> int:
        return int(self.counter.path.read_text())

    def is_in_force(self) -> bool:
        try:
            verify_in_force(load_list(self.house.store, self.house.owner), self.now(), 1)
        except RevocationsMissing:
            return False
        return True

    def list_with(self, **changes: object) -> Path:
        keyring = open_keyring(self.house.keys, lambda: "")
        made = replace(
            LIST,
            owner_id=self.house.owner.owner_id,
            ak_name=self.device.record.ak.name,
            counter_index=self.device.record.counter.index,
            counter_name=self.device.record.counter.name,
        )
        path = self.house.usb / "made.jwt"
        path.write_bytes(sign_revocations(replace(made, **changes), key=keyring.manifest_key))  # type: ignore[arg-type]
        return path


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_a_list_is_taken_in_and_counted_up(host: Host) -> None:
    folder = host.revoked()
    taken = host.take(folder)
    assert [each.value for each in taken.revocations] == [2]
    assert len(taken.grants) == 1
    assert (host.now(), host.is_in_force()) == (2, True)
    before = snapshot(host.house.store_folder)
    host.take(folder)  # the same again is fine
    assert (host.now(), snapshot(host.house.store_folder)) == (2, before)


def test_an_older_list_is_refused(host: Host) -> None:
    first, second = host.revoked("a"), host.revoked("b")
    host.take(second)
    before = snapshot(host.house.store_folder)
    with pytest.raises(RevocationsMissing, match="older"):
        host.take(first)
    # The counter is not there yet, the list is: a kill in between, or a TPM that was away.
    host.counter.path.write_text("1")
    with pytest.raises(RevocationsMissing, match="newer"):
        host.take(first)
    with pytest.raises(RevocationsMissing, match="another one than the store's"):
        host.take(host.list_with(value=3, created=1))  # of the same value, but made before
    assert (host.now(), snapshot(host.house.store_folder)) == (1, before)


def test_an_owner_whose_records_went_back_is_told(host: Host, tmp_path: Path) -> None:
    """Its next list would be for a value that was reached: what it locks would go on opening."""
    shutil.copytree(host.house.keys, tmp_path / "backup")
    host.take(host.revoked("before"))
    shutil.rmtree(host.house.keys)
    shutil.copytree(tmp_path / "backup", host.house.keys)
    after = host.revoked("after")
    before = snapshot(host.house.store_folder)
    with pytest.raises(RevocationsMissing, match="another one than the store's for the same value 2") as caught:
        host.take(after)
    assert "enrol this device again" in caught.value.advice
    assert (host.now(), snapshot(host.house.store_folder)) == (2, before)
    host.take(host.revoked("next"))  # this one counts further
    assert (host.now(), host.is_in_force()) == (3, True)


def test_a_revocation_that_was_refused_so_is_repeated(host: Host, tmp_path: Path) -> None:
    """The owner no longer keeps the grants that it locks; the device enrols again, and gets a list nevertheless."""
    host.house.pack("more", version="2")
    shutil.copytree(host.house.keys, tmp_path / "backup")
    host.take(host.revoked("before"))
    shutil.rmtree(host.house.keys)
    shutil.copytree(tmp_path / "backup", host.house.keys)
    words = ("revoke", "--keys", host.house.keys, "--model", "minilm:1", "-o")
    done(sczctl(*words, host.house.usb / "refused"))
    with pytest.raises(RevocationsMissing, match="lock nothing more"):
        host.take(host.house.usb / "refused" / "edge-1")
    records = OwnerRecords(host.house.keys)
    known = parse_device_record(records.load_device("edge-1"))
    certified = replace(host.device.record, counter_value=host.now())
    records.save_device("edge-1", format_device_record(enrolled_again(certified, known, forget=False)))
    done(sczctl(*words, host.house.usb / "again"))
    assert [each.value for each in host.take(host.house.usb / "again" / "edge-1").revocations] == [3]
    assert (host.now(), host.is_in_force()) == (3, True)


def test_two_lists_for_one_value_do_not_come_together(host: Host) -> None:
    folder = host.revoked()
    other = host.list_with(value=2, created=1)
    before = snapshot(host.house.store_folder)
    with pytest.raises(RevocationsMissing, match="two different lists"):
        host.take(folder, other)
    assert (host.now(), snapshot(host.house.store_folder)) == (1, before)


def test_a_list_for_the_value_of_the_enrolment_locks_nothing(host: Host) -> None:
    host.device = replace(
        host.device, host=replace(host.device.host, counter_values={host.house.owner.owner_id: host.now()})
    )
    before = snapshot(host.house.store_folder)
    with pytest.raises(RevocationsMissing, match="it would lock nothing"):
        host.take(host.list_with(value=host.now()))
    assert snapshot(host.house.store_folder) == before


def test_a_list_that_was_applied_and_is_gone_comes_back(host: Host) -> None:
    folder = host.revoked()
    host.take(folder)
    Path(host.house.store.revocations_path(host.house.owner.owner_id)).unlink()
    assert not host.is_in_force()
    host.take(folder)
    assert host.is_in_force()


def test_a_list_that_cannot_be_counted_to_is_not_placed(host: Host) -> None:
    before = snapshot(host.house.store_folder)
    with pytest.raises(RevocationsMissing, match="at most 1024") as caught:
        host.take(host.list_with(value=1 + 1025))
    assert "the oldest first" in caught.value.advice
    assert (host.now(), snapshot(host.house.store_folder)) == (1, before)
    for value in (1 + 1024, 1 + 2 * 1024):
        host.take(host.list_with(value=value))
        assert host.is_in_force()


@pytest.mark.parametrize("kind", ["boot policy", "grant"])
def test_another_add_was_faster_with_something_newer(host: Host, kind: str) -> None:
    """The older document is refused although nothing newer was there when it was first looked at."""
    house, old, new = host.house, host.house.usb / "old", host.house.usb / "new"
    soon = int(time.time()) + 10
    for folder, now in ((old, soon), (new, soon + 10)):
        folder.mkdir()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(time, "time", lambda now=now: float(now))
            if kind == "grant":
                house.grant(folder)
            else:
                done(sczctl(*house.sign_words(folder / "policy.json")))
    real, calls = intake.locked, list[Store]()

    @contextlib.contextmanager
    def slower(store: Store) -> Iterator[None]:
        calls.append(store)
        if len(calls) == 1:
            host.take(new)
        with real(store):
            yield

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(intake, "locked", slower)
        with pytest.raises(OutputExists, match="newer"):
            host.take(old)
    (model,) = house.store.models()
    path = house.store.grant_path(model.manifest_digest)
    if kind == "boot policy":
        path = house.store.boot_policy_path(house.owner.owner_id, "minilm", "default")
    assert Path(path).read_bytes() == next(new.iterdir()).read_bytes()


@pytest.mark.parametrize(
    "change",
    [{"ak_name": b"\0\x0b" + bytes(32)}, {"counter_index": 0x01800999}, {"counter_name": b"\0\x0b" + bytes(32)}],
)
def test_another_device_s_list_is_refused(host: Host, change: dict[str, object]) -> None:
    before = snapshot(host.house.store_folder)
    with pytest.raises(RevocationsMissing, match="keys are not this one's"):
        host.take(host.list_with(**change))
    assert (host.now(), snapshot(host.house.store_folder)) == (1, before)


def test_a_list_by_nobody_and_for_nobody(host: Host, tmp_path: Path) -> None:
    stranger = Household(tmp_path / "stranger", name="stranger")
    keyring = open_keyring(stranger.keys, lambda: "")
    path = host.house.usb / "foreign.jwt"
    foreign = replace(LIST, owner_id=stranger.owner.owner_id)
    path.write_bytes(sign_revocations(foreign, key=keyring.manifest_key))
    before = snapshot(host.house.store_folder)
    with pytest.raises(OwnerUntrusted):
        host.take(path)
    owners = Trust(str(host.house.host / "trust")).owners()
    unknown = replace(host.device.host, counters={})
    for device, counting in ((None, host.counter), (host.device.host, None), (unknown, host.counter)):
        with pytest.raises(DeviceNotEnrolled):
            Intake(host.house.store, owners, device, counting=counting).take(collect([str(host.list_with())]))
    assert (host.now(), snapshot(host.house.store_folder)) == (1, before)


def test_a_tpm_that_is_away_leaves_what_refuses_and_the_same_call_ends_it(host: Host) -> None:
    folder = host.revoked()
    host.counter.away = True
    with pytest.raises(TpmUnavailable):
        host.take(folder)
    assert (host.now(), host.is_in_force()) == (1, False)
    host.counter.away = False
    host.take(folder)
    assert (host.now(), host.is_in_force()) == (2, True)


def test_a_kill_at_any_step_leaves_the_old_state_or_one_that_refuses(host: Host) -> None:
    folder, states, step = host.revoked(), list[bool](), 1
    while crashed(lambda: host.take(folder), step):
        states.append(host.is_in_force())
        assert host.now() == 1 or host.is_in_force()
        step += 1
    assert states[0]
    assert False in states
    assert host.now() == 2
    assert host.is_in_force()
    host.take(folder)
    assert host.house.verified_models() == {"minilm:1": True}
    assert [path for path in host.house.store_folder.rglob(".*") if path.is_file() and path.name != ".lock"] == []


def test_a_damaged_list_in_the_store_is_said_and_mended(host: Host) -> None:
    folder = host.revoked()
    host.take(folder)
    path = Path(host.house.store.revocations_path(host.house.owner.owner_id))
    for data in (b"", b"a.b.c", path.read_bytes()[:-1], b"x" * (2 << 20)):
        path.chmod(0o600)
        path.write_bytes(data)
        assert not host.is_in_force()
    host.take(folder)
    assert host.is_in_force()
    path.chmod(0o666)
    assert not host.is_in_force()  # others could have written it


# --- enrolling again --------------------------------------------------------------------------------------------------


def test_asking_for_an_enrolment_does_not_stand_in_for_a_list_that_is_gone(host: Host) -> None:
    """A list was applied and is gone; what was there before asking shows no acceptance, and a later grant does."""
    store, owner = host.house.store, host.house.owner
    assert newest_grant(store, owner) > 0
    folder = host.revoked()
    host.take(folder)
    Path(store.revocations_path(owner.owner_id)).unlink()
    counter = host.device.record.counter
    asked = AskedAgain(host.now(), newest_grant(store, owner))
    store.save_device(format_host_device(host.device.host.with_counter(owner.owner_id, counter, 1, asked)))

    def enrolled() -> int:
        return store.load_device().counter_values[owner.owner_id]

    (again,) = (path for path in folder.iterdir() if path.name.startswith("minilm"))
    remember_granted(store, host.take(again).grants)  # the same grant as before
    assert enrolled() == 1
    with pytest.raises(RevocationsMissing):
        verify_in_force(load_list(store, owner), host.now(), enrolled())
    (grant,) = host.take(again).grants
    later = replace(grant, created=grant.created + 1)
    for other in (
        replace(later, counter=replace(grant.counter, name=bytes(34))),
        replace(later, counter=replace(grant.counter, maximum=1)),
        replace(later, owner_id="B" * 43),
    ):
        remember_granted(store, [other])
        assert enrolled() == 1
    remember_granted(store, [later])
    assert enrolled() == host.now() == 2
    verify_in_force(load_list(store, owner), host.now(), enrolled())


def test_the_newest_grant_is_of_that_owner_and_can_be_read(host: Host, tmp_path: Path) -> None:
    store, stranger = host.house.store, Household(tmp_path / "stranger", name="stranger")
    found = newest_grant(store, host.house.owner)
    assert newest_grant(store, stranger.owner) == 0
    folder = host.house.store_folder / "grants"
    (folder / "x.jwt").write_bytes(b"no grant")
    (folder / ("0" * 64 + ".jwt")).write_bytes(b"a.b.c")
    assert newest_grant(store, host.house.owner) == found
    for path in folder.iterdir():
        path.unlink()
    assert newest_grant(store, host.house.owner) == 0


# --- who holds it still -----------------------------------------------------------------------------------------------


def record(host: Host, manifest: str, *, owner: str | None = None, released: bool = False) -> ContainerRecord:
    held = HeldModel(1, "0:50", 7, 10, owner or host.house.owner.owner_id, released)
    return ContainerRecord(
        "c1", "/b", 1, 1, 1, ("minilm",), ("minilm:1",), (manifest,), ("/models/minilm",), "s", 10, True, held=(held,)
    )


def reasons(host: Host, *records: ContainerRecord) -> list[str]:
    owners = Trust(str(host.house.host / "trust")).owners()
    return [each.reason for each in live_holders(host.house.store, owners, records)]


def test_who_holds_what_was_revoked(host: Host) -> None:
    (model,) = host.house.store.models()
    holder = record(host, model.manifest_digest)
    elsewhere = record(host, "sha256:" + "0" * 64)
    assert reasons(host, holder, elsewhere) == []
    withdrawn = host.revoked()
    host.take(withdrawn)
    assert reasons(host, holder) == ["withdrawn boot policy"]
    assert reasons(host, elsewhere) == ["no grant"]
    assert reasons(host, record(host, model.manifest_digest, released=True)) == []
    assert reasons(host, record(host, model.manifest_digest, owner="B" * 43)) == []
    assert reasons(host, replace(holder, held=())) == []  # of a version that kept no owner
    policy = withdrawn / "boot-policy.json"
    done(sczctl(*host.house.sign_words(policy)))
    host.take(policy)
    assert reasons(host, holder) == []
    words = ("revoke", "--keys", host.house.keys, "--model", "minilm:1", "-o", host.house.usb / "last")
    done(sczctl(*words))
    host.take(host.house.usb / "last" / "edge-1")
    assert reasons(host, holder) == ["revoked grant"]


def test_a_list_of_an_earlier_enrolment_says_nothing_of_who_holds_a_model(host: Host) -> None:
    (model,) = host.house.store.models()
    holder = record(host, model.manifest_digest)
    path = Path(host.house.store.revocations_path(host.house.owner.owner_id))
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.write_bytes(host.list_with(value=9, lines=(("minilm", 7),)).read_bytes())
    path.chmod(0o600)
    assert reasons(host, holder) == ["revoked grant"]
    path.write_bytes(host.list_with(value=9, lines=(("minilm", 7),), counter_index=0x01800999).read_bytes())
    assert reasons(host, holder) == []


def test_a_revocation_is_applied_though_a_model_of_it_is_not_here(host: Host) -> None:
    """The operator may have removed a model that the owner grants anew: that must not keep the revocation out."""
    host.house.pack("more", version="2")
    host.house.grant(host.house.usb, model="minilm:2", file="second.jwt")
    folder = host.revoked()
    assert sorted(path.name for path in folder.iterdir()) == ["minilm@1.jwt", "minilm@2.jwt", "revocations.jwt"]
    taken = host.take(folder)
    assert [grant.model.version for grant in taken.grants] == ["1"]
    assert (host.now(), host.is_in_force()) == (2, True)
    assert host.house.verified_models() == {"minilm:1": True}


# --- what concerns another model keeps no revocation out --------------------------------------------------------------


@pytest.fixture
def two(host: Host) -> Host:
    """A host with two versions, the first of which is revoked; the folder `revoked` is on its way."""
    house = host.house
    more = house.pack("more", version="2")
    house.grant(more, model="minilm:2")
    host.take(more)
    done(sczctl("revoke", "--keys", house.keys, "--model", "minilm:1", "-o", house.usb / "revoked"))
    return host


def at(seconds: int) -> pytest.MonkeyPatch:
    """An owner's clock that is ahead; to be undone."""
    patched, now = pytest.MonkeyPatch(), time.time() + seconds
    patched.setattr(time, "time", lambda: now)
    return patched


def newer_grant(host: Host, *, maximum: int | None = None) -> Path:
    clock = at(60)
    words = () if maximum is None else ("--maximum", maximum)
    path = host.house.usb / "renewed.jwt"
    done(sczctl("grant", "minilm:2", "--keys", host.house.keys, "--device", "edge-1", *words, "-o", path))
    clock.undo()
    return path


def stored_grant(host: Host) -> bytes:
    return host.house.store.load_grant(host.house.store.load_model("minilm", "2").manifest_digest)


@pytest.mark.parametrize("together", [False, True])
def test_a_newer_grant_of_another_model_stays_and_the_list_is_applied(two: Host, together: bool) -> None:
    folder, newer = two.house.usb / "revoked" / "edge-1", newer_grant(two)
    two.take(newer)
    taken = two.take(folder, newer) if together else two.take(folder)
    assert (two.now(), two.is_in_force()) == (2, True)
    assert stored_grant(two) == newer.read_bytes()
    assert [(left.what, left.reason) for left in taken.left_out] == [("grant for minilm:2 to edge-1", "OutputExists")]
    assert len(taken.grants) == int(together)
    with pytest.raises(OutputExists, match="newer"):
        two.take(folder / "minilm@2.jwt")  # alone, it is refused as ever


def test_a_newer_grant_that_the_list_locks_makes_way(two: Host) -> None:
    """Made by an owner's folder that was restored: it would not open again, the older one does."""
    folder = two.house.usb / "revoked" / "edge-1"
    records = OwnerRecords(two.house.keys)
    records.save_device("edge-1", format_device_record(two.device.record))
    newer = newer_grant(two)
    two.take(newer)
    taken = two.take(folder, newer)
    assert (two.now(), taken.left_out) == (2, ())
    assert stored_grant(two) == (folder / "minilm@2.jwt").read_bytes()


def test_a_newer_grant_of_an_earlier_enrolment_makes_way(two: Host) -> None:
    other = make_device(two.house.owner.owner_id)
    OwnerRecords(two.house.keys).save_device("edge-1", format_device_record(other.record))
    path = Path(two.house.store.grant_path(two.house.store.load_model("minilm", "2").manifest_digest))
    path.write_bytes(newer_grant(two, maximum=9).read_bytes())
    taken = two.take(two.house.usb / "revoked" / "edge-1")
    assert (two.now(), taken.left_out) == (2, ())
    assert path.read_bytes() == (two.house.usb / "revoked" / "edge-1" / "minilm@2.jwt").read_bytes()


@pytest.mark.parametrize("damage", ["index", "name"])
def test_a_damaged_model_keeps_no_revocation_of_another_out(two: Host, damage: str) -> None:
    house, folder = two.house, two.house.usb / "revoked" / "edge-1"
    model = house.store.load_model("minilm", "2")
    assert model.image_digest is not None
    name, index = Path(house.store.name_path("minilm", "2")), Path(house.store.bundle_path(model.image_digest))
    path = index / "index.json" if damage == "index" else name
    whole = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(whole[:10])
    before = stored_bytes(house, model.manifest_digest)
    tried = Intake(house.store, two_owners(two), two.device.host, counting=two.counter).verify(collect([str(folder)]))
    assert (two.now(), len(tried.left_out), len(tried.revocations)) == (1, 1, 1)
    taken = two.take(folder)
    assert (two.now(), two.is_in_force()) == (2, True)
    assert taken.left_out == tried.left_out
    assert taken.left_out[0].what == "grant for minilm:2 to edge-1"
    assert "again, for the grant" in taken.left_out[0].remedy
    assert (taken.grants, stored_bytes(house, model.manifest_digest)) == ((), before)
    path.write_bytes(whole)
    taken = two.take(folder)  # as the remedy says
    assert (taken.left_out, len(taken.grants)) == ((), 1)
    assert house.verified_models() == {"minilm:1": True, "minilm:2": True}


def stored_bytes(house: Household, manifest_digest: str) -> bytes:
    return Path(house.store.grant_path(manifest_digest)).read_bytes()


def two_owners(host: Host) -> Sequence[Owner]:
    return Trust(str(host.house.host / "trust")).owners()


def test_a_grant_of_another_owner_s_is_refused_beside_a_list(two: Host, tmp_path: Path) -> None:
    """The list is of one owner; what another one sent is judged as if it came alone."""
    stranger = Household(tmp_path / "stranger", name="stranger")
    done(two.house.ctl("trust", "add", "owner", stranger.keys / "owner.json"))
    OwnerRecords(stranger.keys).save_device("edge-1", format_device_record(two.device.record))
    foreign = stranger.grant(stranger.pack("o", name="other"), model="other:1")
    before = snapshot(two.house.store_folder)
    with pytest.raises(ModelUnknown):
        two.take(two.house.usb / "revoked" / "edge-1", foreign)
    assert (two.now(), snapshot(two.house.store_folder)) == (1, before)


def test_a_newer_boot_policy_stays_and_one_of_an_epoch_before_makes_way(host: Host) -> None:
    house, folder = host.house, host.revoked()
    done(sczctl(*house.sign_words(folder / "policy.json")))
    clock = at(60)
    done(sczctl(*house.sign_words(house.usb / "newer.json")))
    clock.undo()
    host.take(house.usb / "newer.json")
    (left,) = host.take(folder).left_out
    assert left.what == "boot policy for minilm, device class default"
    path = Path(house.store.boot_policy_path(house.owner.owner_id, "minilm", "default"))
    assert path.read_bytes() == (house.usb / "newer.json").read_bytes()
    assert host.now() == 2
    first = json.loads((host.out / "boot-policy.json").read_bytes())  # of the epoch before, by a clock that was ahead
    path.write_bytes(canonical({**first, "created": first["created"] + 60}))
    assert host.take(folder).left_out == ()
    assert path.read_bytes() == (folder / "policy.json").read_bytes()


def test_add_names_what_it_left_out(two: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    from oci_hook import revoked

    monkeypatch.setattr(revoked, "TpmCounting", lambda _config: two.counter)
    two.take(newer_grant(two))
    folder = two.house.usb / "revoked" / "edge-1"
    said = {
        "what": "grant for minilm:2 to edge-1",
        "reason": "OutputExists",
        "message": f"{Path(two.house.store.grant_path(two.house.store.load_model('minilm', '2').manifest_digest)).name}"
        " in the store is newer than what is to be added",
        "remedy": "none is needed: the newer one stays",
    }
    assert done(two.house.ctl("add", "--dry-run", "--json", folder)).json["left_out"] == [said]
    assert "left out: grant for minilm:2" in done(two.house.ctl("add", "--dry-run", folder)).out
    assert two.now() == 1
    out = done(two.house.ctl("add", folder)).out
    assert f"left out: grant for minilm:2 to edge-1: {said['message']}\n  remedy: none is needed" in out
    assert "applied the revocations" in out
    assert two.now() == 2
