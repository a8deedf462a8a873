"""`placement`: the store is whole at every moment, whenever a command is killed, and whatever fills the disk."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from oci_hook.copying import shares_blocks
from oci_hook.errors import FileUnreadable, ModelUnknown
from oci_hook.incoming import collect
from oci_hook.intake import Intake
from oci_hook.placement import locked, place, remove, staging
from oci_hook.store import StoredModel
from tests.commands import Household, crashed, done, snapshot

CLEAN = {"minilm:1": True}


@pytest.fixture
def house() -> Iterator[Household]:
    """In memory, where syncing costs nothing: these tests do it thousands of times."""
    with tempfile.TemporaryDirectory(prefix="scz-placement.", dir="/dev/shm") as folder:
        yield Household(Path(folder))


def files(house: Household) -> set[str]:
    """What lies in the store, by path; also folders, links and what is hidden."""
    return {str(path.relative_to(house.store_folder)) for path in house.store_folder.rglob("*")}


def every_crash(house: Household, action: Callable[[], object], check: Callable[[], None]) -> int:
    """Crash an action before its every act on the file system, each time from the same beginning; returns how many."""
    beginning = house.store_folder.with_name("beginning")
    shutil.copytree(house.store_folder, beginning, symlinks=True)
    step = 1
    while crashed(action, step):
        check()
        shutil.rmtree(house.store_folder)
        shutil.copytree(beginning, house.store_folder, symlinks=True)
        step += 1
    assert step > 10, "the action hardly touched the file system"
    return step - 1


# --- kill -9 ----------------------------------------------------------------------------------------------------------


def test_add_killed_at_any_step(house: Household) -> None:
    out = house.prepared()
    done(house.ctl("add", out))
    clean = files(house)
    done(house.ctl("rm", "minilm:1"))
    seen = set()

    def check() -> None:
        models = house.verified_models()  # what has a name is whole
        assert models in ({}, CLEAN)
        seen.add(bool(models))
        done(house.ctl("add", out))
        assert house.verified_models() == CLEAN
        assert files(house) == clean

    every_crash(house, lambda: done(house.ctl("add", out)), check)
    assert False in seen


def test_adding_again_killed_at_any_step_never_takes_away_what_is_there(house: Household) -> None:
    out = house.prepared()
    done(house.ctl("add", out))
    clean = files(house)

    def check() -> None:
        assert house.verified_models() == CLEAN
        done(house.ctl("add", out))
        assert (house.verified_models(), files(house)) == (CLEAN, clean)

    every_crash(house, lambda: done(house.ctl("add", out)), check)


def test_mending_killed_at_any_step(house: Household) -> None:
    """Whatever `add` did before it was killed, the next one mends the rest."""
    out = house.prepared()
    done(house.ctl("add", out))
    clean = files(house)
    (folder,) = (house.store_folder / "models").iterdir()
    blobs = sorted((folder / "blobs" / "sha256").iterdir())
    blobs[0].unlink()
    (blobs[0] / "inner").mkdir(parents=True)
    blobs[1].chmod(0o666)
    (folder / "index.json").unlink()
    Path(house.store.name_path("minilm", "1")).write_bytes(b"?")

    def check() -> None:
        done(house.ctl("add", out))
        assert (house.verified_models(), files(house)) == (CLEAN, clean)

    every_crash(house, lambda: done(house.ctl("add", out)), check)


def test_replace_killed_at_any_step(house: Household) -> None:
    out = house.prepared()
    done(house.ctl("add", out))
    (house.keys / "models" / "minilm" / "1.json").unlink()
    (house.source / "config.json").write_bytes(b'{"layers":12}')
    other = house.pack("other")
    house.grant(other)
    images = {house.store.models()[0].image_digest}

    def check() -> None:
        assert house.verified_models().keys() == {"minilm:1"}  # the old or the new one
        images.add(house.store.models()[0].image_digest)
        done(house.ctl("add", "--replace", other))
        assert house.verified_models() == CLEAN
        assert len(list((house.store_folder / "models").iterdir())) == 1

    every_crash(house, lambda: done(house.ctl("add", "--replace", other)), check)
    assert len(images) == 2


def test_rm_killed_at_any_step(house: Household) -> None:
    out = house.prepared()
    two = house.pack("two", version="2")
    done(house.ctl("add", out, two))
    both = house.verified_models()
    assert both == {"minilm:1": True, "minilm:2": False}

    def check() -> None:
        assert house.verified_models() in (both, {"minilm:2": False})
        done(house.ctl("add", out))
        assert house.verified_models() == both
        done(house.ctl("rm", "minilm:1"))
        done(house.ctl("rm", "minilm:2"))
        left = {name for name in files(house) if not name.startswith("boot-policies/")}
        assert left == {".lock", "boot-policies", "device.json", "grants", "models", "names"}

    every_crash(house, lambda: done(house.ctl("rm", "minilm:1")), check)


def test_add_killed_at_random_moments(house: Household) -> None:
    (house.source / "large.bin").write_bytes(os.urandom(24 << 20))
    out = house.prepared()
    began = time.monotonic()
    done(house.ctl("add", out))
    usual, clean = time.monotonic() - began, files(house)
    dice, early = random.Random(7), 0
    for _ in range(12):
        done(house.ctl("rm", "minilm:1"))
        child = os.fork()
        if child == 0:
            house.ctl("add", out)
            os._exit(0)
        time.sleep(dice.uniform(0, usual))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        early += os.WIFSIGNALED(status)
        assert house.verified_models() in ({}, CLEAN)
        done(house.ctl("add", out))
        assert (house.verified_models(), files(house)) == (CLEAN, clean)
    assert early > 0


# --- a full disk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(house: Household) -> Iterator[Callable[[str], None]]:
    """A tmpfs in the store's place; the function that is given sets its limits."""
    house.store_folder.mkdir(mode=0o700)
    target = str(house.store_folder)
    options = ["/bin/mount", "-t", "tmpfs", "-o", "mode=0700,size=4m,nr_inodes=1000", "tmpfs", target]
    subprocess.run(options, check=True, env={})

    def limit(option: str) -> None:
        subprocess.run(["/bin/mount", "-o", f"remount,{option}", target], check=True, env={})

    try:
        yield limit
    finally:
        subprocess.run(["/bin/umount", target], check=True, env={})
        assert not os.path.ismount(target)


def used(house: Household) -> tuple[int, int]:
    """Blocks of 4 KiB and inodes that the store takes."""
    found = os.statvfs(house.store_folder)
    return found.f_blocks - found.f_bfree, found.f_files - found.f_ffree


@pytest.mark.parametrize("kind", ["size", "nr_inodes"])
def test_a_disk_that_fills_up_at_any_point(house: Household, small_disk: Callable[[str], None], kind: str) -> None:
    out = house.prepared()
    house.pack("first", version="0")
    done(house.ctl("add", house.usb / "first"))
    before, free = snapshot(house.store_folder), used(house)
    refusals = 0
    for more in range(1, 60):
        blocks, inodes = free[0] + more, free[1] + more
        small_disk(f"size={blocks * 4}k" if kind == "size" else f"nr_inodes={inodes}")
        tried = house.ctl("add", out)
        if tried.code == 0:
            break
        refusals += 1
        assert tried.code == FileUnreadable.code, tried.err
        assert "No space left on device" in tried.err
        assert "Traceback" not in tried.err
        assert snapshot(house.store_folder) == before
        assert house.verified_models() == {"minilm:0": False}
    assert tried.code == 0
    assert refusals > 5
    assert house.verified_models() == {"minilm:0": False, "minilm:1": True}


def test_a_disk_that_fills_up_while_a_bundle_is_copied(house: Household, small_disk: Callable[[str], None]) -> None:
    (house.source / "large").write_bytes(bytes(6 << 20))
    out = house.prepared()
    small_disk("size=9m")
    before, filler = snapshot(house.store_folder), house.store_folder / "other"

    def fill(_done: int) -> None:
        """Somebody else writes to that disk."""
        with contextlib.suppress(OSError), filler.open("ab") as other:
            while True:
                other.write(bytes(1 << 16))
                other.flush()

    intake = Intake(house.store, [house.owner], house.devices["edge-1"].host, progress=fill)
    with pytest.raises(FileUnreadable) as caught:
        intake.take(collect([str(out)]))
    filler.unlink()
    assert "No space left on device: " in caught.value.message
    assert f"are needed, and the file system on {house.store_folder} has " in caught.value.message
    assert "`sczctl rm NAME:VERSION`" in caught.value.advice
    assert snapshot(house.store_folder) == before
    done(house.ctl("add", out))
    assert house.verified_models() == CLEAN


def test_what_shares_its_blocks_takes_no_room(tmp_path: Path) -> None:
    """Asked of the file system itself, and undone: a memory file system never shares."""
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.write(b"x")
        file.flush()
        assert not shares_blocks(file.fileno(), str(tmp_path))
        assert list(tmp_path.iterdir()) == []


# --- the lock, staging and sweeping -----------------------------------------------------------------------------------


def test_the_lock_is_for_one_at_a_time(house: Household) -> None:
    order = []

    def other() -> None:
        with locked(house.store):
            order.append("other")

    with locked(house.store):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        order.append("first")
    thread.join(10)
    assert order == ["first", "other"]


def test_staging_is_private_and_gone_afterwards(house: Household) -> None:
    with staging(house.store) as folder:
        assert Path(folder).stat().st_mode & 0o777 == 0o700
        assert Path(folder).parent == house.store_folder / "models"
        (Path(folder) / "x").write_bytes(b"x")
    assert files(house) == {".lock", "models"}
    with pytest.raises(RuntimeError), staging(house.store) as folder:
        raise RuntimeError
    assert files(house) == {".lock", "models"}


def test_staging_of_the_living_stays_and_that_of_the_dead_goes(house: Household) -> None:
    with staging(house.store) as mine:
        dead = house.store_folder / "models" / ".staging.0123456789abcdef"
        (dead / "0").mkdir(parents=True)
        with staging(house.store) as second:
            assert not dead.exists()
            assert Path(mine).exists()
            assert Path(second).exists()
        assert Path(mine).exists()


def test_bundles_and_grants_without_a_name_are_swept_and_policies_stay(house: Household) -> None:
    done(house.ctl("add", house.prepared()))
    clean = files(house)
    (house.store_folder / "models" / ("0" * 64)).mkdir()
    (house.store_folder / "grants" / ("0" * 64 + ".jwt")).write_bytes(b"x")
    (house.store_folder / "names" / "minilm" / ".0123").write_bytes(b"x")
    (house.store_folder / "names" / "empty").mkdir()
    with staging(house.store):
        pass
    assert files(house) == clean
    assert any(name.endswith("minilm@default.json") for name in clean)


def test_nothing_is_swept_while_an_entry_is_damaged(house: Household) -> None:
    done(house.ctl("add", house.prepared()))
    Path(house.store.name_path("minilm", "1")).write_bytes(b"?")
    before = files(house)
    with staging(house.store):
        pass
    assert files(house) == before
    remove(house.store, "minilm", "1")
    assert [path for kind in ("models", "grants", "names") for path in (house.store_folder / kind).iterdir()] == []


def test_removing_what_is_not_there_changes_nothing(house: Household) -> None:
    with pytest.raises(ModelUnknown):
        remove(house.store, "minilm", "1")
    assert not house.store_folder.exists()


def test_a_bundle_that_two_names_mean_stays_for_the_other(house: Household) -> None:
    done(house.ctl("add", house.prepared()))
    (model,) = house.store.models()
    twin = StoredModel("twin", "1", model.image_digest, model.manifest_digest, model.owner_id)
    with locked(house.store):
        place(house.store, [], [house.store.name_entry(twin)])
    remove(house.store, "minilm", "1")
    assert house.store.models() == [twin]
    assert house.store.has_grant(model.manifest_digest)
    assert (house.store_folder / "models" / model.image_digest.removeprefix("sha256:")).is_dir()


def test_a_damaged_bundle_is_mended_by_adding_it_again(house: Household) -> None:
    out = house.prepared()
    done(house.ctl("add", out))
    whole = snapshot(house.store_folder)
    (folder,) = (house.store_folder / "models").iterdir()
    blobs = sorted((folder / "blobs" / "sha256").iterdir())
    blobs[0].write_bytes(b"damaged")
    blobs[1].unlink()
    (folder / "index.json").unlink()
    done(house.ctl("add", out))
    assert snapshot(house.store_folder) == whole
    assert house.verified_models() == CLEAN


def test_a_document_that_cannot_be_written_leaves_the_others_unwritten(house: Household) -> None:
    house.store_folder.mkdir(mode=0o700)
    (house.store_folder / "grants").mkdir(mode=0o700)
    (house.store_folder / "names").write_bytes(b"in the way")
    before = snapshot(house.store_folder)
    documents = [(house.store.grant_path("sha256:" + "a" * 64), b"grant"), (house.store.name_path("m", "1"), b"{}")]
    with locked(house.store), pytest.raises(FileUnreadable):
        place(house.store, [], documents)
    assert snapshot(house.store_folder) == before


def test_threads_and_processes_that_add_at_once(house: Household) -> None:
    out = house.prepared()
    more = [house.pack(f"v{number}", version=f"v{number}") for number in range(3)]
    children = []
    for folder in (out, out, *more):
        child = os.fork()
        if child == 0:
            os._exit(house.ctl("add", folder).code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 5
    assert house.verified_models() == {"minilm:1": True, "minilm:v0": False, "minilm:v1": False, "minilm:v2": False}
    assert not [name for name in files(house) if "/." in name]
