"""One decrypted copy for the containers of a node: who has one in common, and for how long.

A copy is told by its superblock: its number and the random `f_fsid`. That it is gone is the kernel's word (IN_UNMOUNT).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from oci_hook.delivery.share import SharingGroup
from oci_hook.delivery.share_lock import GroupLocks
from oci_hook.owner.keyring import open_content_key, open_keyring
from oci_hook.owner.records import OwnerRecords
from tests.integration.conftest import FILES, contents
from tests.integration.test_endurance import lifetime_of_a_hook, start_in_background, wait_for_hook
from tests.integration.test_release import CAN_MOUNT, USERNS, Shell, events, is_gone, ps, shell, watching
from tests.integration.test_start import hook_processes, model_mounts
from tests.process_memory import copies
from tests.runtimes import Runsc, newer_runsc, own_runsc
from tests.scene import TOKEN_PATH, Scene
from tests.workshop import is_dead, wait_until

MODEL = "/models/small"
AT_ONCE, KILLS = 16, 20


@pytest.fixture(scope="module")
def scene(model_source: Path) -> Iterator[Scene]:
    """A scene whose models may be shared, `small:1` and `other:1`, and one that may not, `lonely:1`."""
    folder = Path(tempfile.mkdtemp(prefix="scz-test.", dir="/var/tmp"))
    folder.chmod(0o711)  # root of a user namespace has to get through to its root file system
    try:
        with Scene(folder) as made:
            made.prepare(model_source, name="small", extra=("--share",))
            for name, extra in (("other", ("--share",)), ("lonely", ())):
                out = made.pack(model_source, name=name, extra=extra)
                made.grant(out, name=name)
                made.add(out)
            made.image = made.podman.busybox_image()
            yield made
    finally:
        shutil.rmtree(folder)


def copy_of(container: Shell, path: str = MODEL) -> tuple[int, int]:
    """The superblock behind a path of a container: its number and `f_fsid`."""
    seen = f"/proc/{container.pid}/root{path}"
    return os.stat(seen).st_dev, os.statvfs(seen).f_fsid


def shared(scene: Scene, container: Shell) -> int:
    """How many models the start took from others, by the audit log."""
    (outcome,) = [each for each in events(scene, container.id) if each["event"] == "outcome"]
    return int(outcome["shared"])


def reads_all(container: Shell, path: str = MODEL) -> bool:
    """Whether the container reads exactly what was packed."""
    sums = container.do(f"cd {path} && find . -type f ! -name model.json -exec sha256sum {{}} + ; cd /")
    return set(sums.splitlines()) == {
        f"{hashlib.sha256(contents(name, size)).hexdigest()}  ./{name}" for name, size in FILES.items()
    }


def for_podman(runsc: Runsc) -> str:
    """As `tests.engines` takes a runtime with flags."""
    return " ".join([str(runsc.program), *(flag.removeprefix("--") for flag in runsc.flags)])


RUNSC = {"runsc": lambda: for_podman(own_runsc()), "newer runsc": lambda: for_podman(newer_runsc())}


@contextlib.contextmanager
def shells(scene: Scene, *kinds: tuple[str, tuple[str, ...]]) -> Iterator[list[Shell]]:
    """Containers one after another: runtime and options of each; a test may end some of them itself."""
    with contextlib.ExitStack() as stack:
        found = []
        for number, (name, options) in enumerate(kinds):
            runtime = RUNSC[name]() if name in RUNSC else name
            found.append(stack.enter_context(shell(scene, *options, runtime=runtime, token=f"token-{number}")))
        yield found


def end(container: Shell) -> None:
    """End a container as its init would; its engine cleans up."""
    os.kill(container.pid, signal.SIGKILL)
    container.process.wait(timeout=60)


PLAIN: tuple[str, ...] = ()
OTHER_USERNS = ("--uidmap", "0:300000:65536", "--gidmap", "0:300000:65536")
PRIVATE = ("--annotation", "smm.scz/require=private")
PRIVILEGED = ("--privileged",)
SYS_ADMIN = ("--cap-add", "SYS_ADMIN")
HOST_PROCESSES = ("--pid", "host")


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_a_copy_lives_as_long_as_its_last_container(scene: Scene, order: tuple[int, ...]) -> None:
    with shells(scene, ("runc", PLAIN), ("crun", PLAIN), ("runc", PLAIN)) as containers:
        assert [shared(scene, each) for each in containers] == [0, 1, 1]
        assert len({copy_of(each) for each in containers}) == 1
        rows = {row["container_id"]: row["holds"][0] for row in ps(scene)}
        assert all(row["charged_to"] == containers[0].id and row["charged_to_lives"] for row in rows.values())
        assert {len(row["shared_with"]) for row in rows.values()} == {2}
        with watching(containers[0].pid) as watch:
            for number, place in enumerate(order):
                assert all(reads_all(containers[left]) for left in order[number:])
                assert not is_gone(watch)
                end(containers[place])
            wait_until(lambda: is_gone(watch))
    assert ps(scene) == []
    assert model_mounts(scene) == []


SAME = {
    "runc and crun": (("runc", PLAIN), ("crun", PLAIN)),
    "user namespaces with one map": (("runc", USERNS), ("crun", USERNS)),
    "gVisor": (("runsc", PLAIN), ("runsc", PLAIN)),
    "gVisor, newer": (("newer runsc", PLAIN), ("newer runsc", PLAIN)),
    "gVisor and runc": (("runsc", PLAIN), ("runc", PLAIN)),
    "crun and gVisor, newer": (("crun", PLAIN), ("newer runsc", PLAIN)),
    # Harmless to a superblock that belongs to the initial user namespace.
    "capable in a user namespace of its own": (("runc", (*USERNS, *SYS_ADMIN)), ("crun", USERNS)),
}
OWN = {
    "a private one": (("runc", PLAIN), ("runc", PRIVATE)),
    "one after a private one": (("crun", PRIVATE), ("crun", PLAIN)),
    "with CAP_SYS_ADMIN": (("runc", PLAIN), ("crun", SYS_ADMIN)),
    "after one with CAP_SYS_ADMIN": (("crun", SYS_ADMIN), ("runc", PLAIN)),
    "privileged": (("runc", PLAIN), ("runc", PRIVILEGED)),
    "with the host's processes": (("runc", PLAIN), ("crun", HOST_PROCESSES)),
    "after one with the host's processes": (("runc", HOST_PROCESSES), ("crun", PLAIN)),
    "of another map": (("runc", USERNS), ("runc", OTHER_USERNS)),
    "with a map and without": (("crun", PLAIN), ("crun", USERNS)),
}


@pytest.mark.parametrize("kinds", SAME.values(), ids=SAME)
def test_who_shares(scene: Scene, kinds: tuple[tuple[str, tuple[str, ...]], ...]) -> None:
    with shells(scene, *kinds) as (one, two):
        assert (shared(scene, one), shared(scene, two)) == (0, 1)
        held = [row["holds"][0] for row in ps(scene)]
        assert len({each["charged_to"] for each in held}) == 1
        assert reads_all(one)
        assert reads_all(two)
        end(one)
        assert reads_all(two)
        (row,) = ps(scene)
        assert (row["holds"][0]["charged_to"], row["holds"][0]["charged_to_lives"]) == (one.id, False)


@pytest.mark.parametrize("kinds", OWN.values(), ids=OWN)
def test_who_gets_a_copy_of_its_own(scene: Scene, kinds: tuple[tuple[str, tuple[str, ...]], ...]) -> None:
    with shells(scene, *kinds) as (one, two):
        assert (shared(scene, one), shared(scene, two)) == (0, 0)
        assert copy_of(one) != copy_of(two)
        assert reads_all(one)
        assert reads_all(two)


def test_one_among_the_processes_of_another(scene: Scene) -> None:
    """With CAP_SYS_ADMIN a third one there would get into its mount namespace."""
    with (
        shells(scene, ("runc", PLAIN)) as (one,),
        shell(scene, "--pid", f"container:{one.id}", runtime="crun", token="token-1") as two,
    ):
        assert (shared(scene, one), shared(scene, two)) == (0, 0)
        assert copy_of(one) != copy_of(two)
        assert reads_all(two)


def test_an_owner_who_does_not_allow_it(scene: Scene) -> None:
    with shells(scene, *[("runc", ("--annotation", "smm.scz/model.b=lonely:1"))] * 2) as (one, two):
        assert (shared(scene, one), shared(scene, two)) == (0, 1)
        assert copy_of(one) == copy_of(two)
        assert copy_of(one, "/models/lonely") != copy_of(two, "/models/lonely")
        assert reads_all(two, "/models/lonely")


def test_several_models_some_of_them_there(scene: Scene) -> None:
    both = ("--annotation", "smm.scz/model.b=other:1")
    with shells(scene, ("runc", PLAIN), ("crun", both), ("runc", both)) as (one, two, three):
        assert [shared(scene, each) for each in (one, two, three)] == [0, 1, 2]
        assert copy_of(one) == copy_of(two) == copy_of(three)
        assert copy_of(two, "/models/other") == copy_of(three, "/models/other")
        assert reads_all(three, "/models/other")


def test_release_of_a_shared_copy(scene: Scene) -> None:
    with shells(scene, ("runc", PLAIN), ("crun", PLAIN)) as (one, two):
        two.do(f"exec 3< {MODEL}/config.json")
        assert one.release("--dry-run")[1]["state"] == "would-unshare"
        code, model = one.release()
        assert (code, model["state"], model["uses"], model["shared_with"]) == (4, "shared", [], [two.id])
        assert not one.mounted()
        assert reads_all(two)
        assert [row["container_id"] for row in ps(scene)] == [two.id]
        assert two.release()[1]["state"] == "busy"
        two.do("exec 3<&-")
        with watching(two.pid) as watch:
            assert two.release()[:1] == (0,)
            assert is_gone(watch)


def test_metrics_and_the_table_count_a_copy_once(scene: Scene) -> None:
    with shells(scene, ("runc", PLAIN), ("runc", PLAIN), ("runc", PRIVATE)) as (one, _, _):
        lines = scene.sczctl("metrics").stdout.splitlines()
        assert "scz_smm_models_resident 2" in lines
        (size,) = [line for line in lines if line.startswith('scz_smm_resident_bytes{model="small:1"}')]
        assert int(size.split()[1]) < 3 * sum(FILES.values())
        table = [line.split() for line in scene.sczctl("ps").stdout.splitlines()]
        assert table[0][6:8] == ["SHARED", "CHARGED"]
        assert [row[6] for row in table[1:]] == ["2", "2", "1"]
        assert [row[7] for row in table[1:3]] == [one.id[:12]] * 2


def test_sixteen_at_once_make_one_copy(scene: Scene) -> None:
    with contextlib.ExitStack() as stack:
        for number in range(AT_ONCE):
            scene.token(f"token-{number}")

        def started(number: int) -> subprocess.Popen[str]:
            words = ["--rm", "--interactive", "--annotation", "smm.scz/model=small:1"]
            words += ["--volume", f"{scene.host}/token-{number}:{TOKEN_PATH}:ro", scene.image, "sh"]
            process = scene.podman.spawn(words, runtime=("runc", "crun")[number % 2])
            stack.callback(process.communicate, timeout=120)
            return process

        containers = [Shell(scene, started(number), 0, "") for number in range(AT_ONCE)]
        assert all(reads_all(each) for each in containers)
        rows = ps(scene)
        assert len(rows) == AT_ONCE
        pids = [Shell(scene, containers[0].process, row["pid"], row["container_id"]) for row in rows]
        assert len({copy_of(each) for each in pids}) == 1
        assert sorted(shared(scene, each) for each in pids) == [0] + [1] * (AT_ONCE - 1)


def content_key(scene: Scene) -> bytes:
    """The key of `small:1`, as its owner has it."""
    keyring = open_keyring(scene.owner / "keys", lambda: "")
    record = OwnerRecords(keyring.folder).load_content_key("small", "1")
    sealed, digest = record.sealed_key, record.manifest_digest
    return open_content_key(sealed, manifest_digest=digest, recovery_key=keyring.recovery_key).value


def children(pid: int) -> list[int]:
    """Of a process with one thread."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_no_child_that_goes_to_other_containers_has_a_key(scene: Scene) -> None:
    """A start that has its key and waits for another's decryption: also the first of many, when no container lives."""
    key = content_key(scene)
    with contextlib.ExitStack() as stack:
        with shells(scene, ("runc", PLAIN)):
            (path,) = (scene.runtime_directory / "containers").glob("*.json")
            record = json.loads(path.read_text())
        (manifest,), (held,) = record["manifests"], record["held"]
        locks = stack.enter_context(GroupLocks())
        group = SharingGroup(manifest, held["owner"], held["uid"], held["gid"])
        locks.lock(str(scene.runtime_directory), [group.lock_name])
        words = ["--rm", "--interactive", "--annotation", "smm.scz/model=small:1"]
        token = scene.token("first")
        words += ["--volume", f"{token}:{TOKEN_PATH}:ro", scene.image, "sh"]
        process = scene.podman.spawn(words, runtime="runc")
        stack.callback(process.communicate, timeout=120)
        stack.callback(locks.leave_to_parent)
        hook = wait_for_hook(scene, process)
        assert hook is not None
        wait_until(lambda: copies(hook, key) > 0)
        # The one that holds the destinations, and two that look; what spoke with the TPM has ended.
        wait_until(lambda: sum(not is_dead(pid) for pid in children(hook)) == 3)
        waiting = [pid for pid in children(hook) if not is_dead(pid)]
        assert [copies(pid, key) for pid in waiting] == [0, 0, 0]
        secret = token.read_bytes().strip()
        assert copies(hook, secret) > 0
        assert [copies(pid, secret) for pid in waiting] == [0, 0, 0]
        locks.leave_to_parent()
        assert reads_all(Shell(scene, process, 0, ""))


TRICKS = {
    # What it does in its own user namespace, and whether its copy is still found.
    "something over it": (f"mount -t tmpfs scz-smm {MODEL} && echo bait > {MODEL}/model.json", 0),
    "something in its place": (f"umount {MODEL} && mount -t tmpfs -o ro scz-smm {MODEL}", 0),
    "elsewhere": ("mv /models /elsewhere && mkdir -p /models/small", 1),
    "propagating": (f"mount --make-shared {MODEL} && mount -t tmpfs bait {MODEL}/shards", 1),
}


@pytest.mark.parametrize(("command", "expected"), TRICKS.values(), ids=TRICKS)
def test_a_holder_that_rules_its_own_namespaces(scene: Scene, command: str, expected: int) -> None:
    with shells(scene, ("runc", (*USERNS, *CAN_MOUNT))) as (one,):
        assert one.do(command) == ""
        with shell(scene, *USERNS, runtime="crun", token="token-9") as two:
            assert shared(scene, two) == expected
            assert reads_all(two)
            one.do(f"mount -t tmpfs bait {MODEL}/shards; mount --bind /etc/hosts {MODEL}/config.json")
            assert reads_all(two)


def test_records_that_lie_lead_to_no_other_model(scene: Scene) -> None:
    """Records are root's alone; one that lies all the same costs a copy and nothing else."""
    both = ("--annotation", "smm.scz/model.b=other:1")
    with shells(scene, ("runc", both)) as (one,):
        (path,) = (scene.runtime_directory / "containers").glob("*.json")
        true = json.loads(path.read_text())
        first, second = true["held"]
        lies = [
            {"held": [second, first]},  # the other model's mount, of the same container and owner
            {"held": [first | {"root_inode": first["root_inode"] + 1}, second]},
            {"held": [first | {"fsid": first["fsid"] ^ 1}, second]},
            {"keeper": [os.getpid(), 1]},
        ]
        for number, lie in enumerate(lies):
            path.write_text(json.dumps(true | lie))
            with shell(scene, token=f"token-{number + 1}") as two:
                assert shared(scene, two) == 0
                assert reads_all(two)
        path.write_text(json.dumps(true))
        with shell(scene, token="token-9") as two:
            assert shared(scene, two) == 1
        assert reads_all(one)


def test_second_starts_killed_anywhere_leave_the_first_its_copy(scene: Scene) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    moments, token = random.Random(seed), scene.token("second", ttl_seconds=3600)
    (scene.host / "trace").mkdir(exist_ok=True)
    with shells(scene, ("runc", PLAIN)) as (one,):
        lifetime = max(lifetime_of_a_hook(scene, token, runtime) for runtime in ("runc", "crun"))
        before, killed = model_mounts(scene), 0
        for number in range(6 * KILLS):
            if killed == KILLS:
                break
            process = start_in_background(scene, token, ("runc", "crun")[number % 2])
            pid, moment = wait_for_hook(scene, process), moments.uniform(0, lifetime)
            assert pid is not None
            time.sleep(moment)
            with contextlib.suppress(ProcessLookupError):  # it was done before
                os.kill(pid, signal.SIGKILL)
            process.communicate(timeout=60)
            killed += process.returncode != 0
            wait_until(lambda: hook_processes(scene) == [])
            wait_until(lambda: model_mounts(scene) == before)
        assert killed == KILLS
        assert reads_all(one)
        with shell(scene, token="token-9") as two:
            assert shared(scene, two) == 1
            assert copy_of(one) == copy_of(two)


def test_a_holder_killed_anywhere_in_the_second_start(scene: Scene) -> None:
    """The second container starts and reads everything, whether it found the copy or came too late."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    moments, seen = random.Random(seed), set()
    (scene.host / "trace").mkdir(exist_ok=True)
    lifetime = lifetime_of_a_hook(scene, scene.token("second"), "runc")
    for number in range(KILLS):
        with shells(scene, ("runc", PLAIN)) as (one,):
            token = scene.token("token-8")
            words = ["--rm", "--interactive", "--annotation", "smm.scz/model=small:1"]
            words += ["--volume", f"{token}:{TOKEN_PATH}:ro", scene.image, "sh"]
            process = scene.podman.spawn(words, runtime=("runc", "crun")[number % 2])
            try:
                two = Shell(scene, process, 0, "")
                hook = wait_for_hook(scene, process)
                if number == KILLS - 1:
                    wait_until(lambda hook=hook: not Path(f"/proc/{hook}").exists())
                elif number:
                    time.sleep(moments.uniform(0, lifetime))
                end(one)
                assert reads_all(two), f"seed {seed}"
                (row,) = ps(scene)
                two.id = row["container_id"]
                seen.add(shared(scene, two))
            finally:
                process.communicate(timeout=60)
    assert seen == {0, 1}, f"seed {seed}"
    assert model_mounts(scene) == []
