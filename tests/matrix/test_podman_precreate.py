"""podman's `precreate`, end to end: real podman, runc under Kata's name, and a runtime that treats hooks as Kata does.

Kata itself is in no registry; `tests.kata` says what stands in for it and what that does not show. podman runs in the
host's mount namespace here, as it does where no test is: what is mounted before `create` lies there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from oci_hook.engines.podman import OWN_DIRECTORY
from oci_hook.key_errors import all_errors
from oci_hook.oci.precreate import container_id, parse_precreate
from tests.engines import RuntimeNamespace
from tests.integration.conftest import FILES, contents
from tests.kata import KataLike, runc_named_kata
from tests.scene import TOKEN_PATH, Scene

CODES = {cls.__name__: code for code, cls in all_errors().items()}
KATA = {"smm.scz/require": "runtime=kata"}
DEFAULT = "usr/share/containers/oci/hooks.d"
SUMS = {name: hashlib.sha256(contents(name, size)).hexdigest() for name, size in FILES.items()}
WAIT_SECONDS = 60


@dataclass
class House:
    """The scene, podman's directories as `--before-create` writes them, and the runtimes."""

    scene: Scene
    root: Path
    recordings: Path
    runc: str
    like: KataLike

    @property
    def precreate(self) -> Path:
        return self.root / OWN_DIRECTORY.lstrip("/") / "scz-smm-precreate.json"

    def words(self, *, model: str = "small:1", token: str | None = None, **annotations: str) -> list[str]:
        """Options of `podman run`: annotations and a token of its own."""
        found = ["--annotation", f"smm.scz/model={model}"]
        for key, value in {**KATA, **{f"smm.scz/{name}": text for name, text in annotations.items()}}.items():
            found += ["--annotation", f"{key}={value}"]
        if token is not None:
            found += ["--volume", f"{self.scene.token(token)}:{TOKEN_PATH}:ro"]
        return found

    def run(self, *words: str, runtime: str | None = None, check: bool = False) -> subprocess.CompletedProcess[str]:
        return self.scene.podman.run(list(words), runtime=runtime or self.runc, check=check)

    def left(self) -> list[str]:
        """Whatever is left of models before `create`: mounts, folders, records."""
        runtime = self.scene.runtime_directory
        mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f"{runtime}/" in line]
        # mountinfo of anybody: a mount that propagated would outlive its container there
        for path in Path("/proc").glob("[0-9]*/mountinfo"):
            with contextlib.suppress(OSError):
                mounts += [line for line in path.read_text().splitlines() if f"{runtime}/bound/" in line]
        bound = runtime / "bound"
        folders = [str(path) for path in bound.iterdir()] if bound.is_dir() else []
        records = [str(path) for name in ("containers", "host-mounts") for path in (runtime / name).glob("*.json")]
        return [*mounts, *folders, *records, *self.like.left()]

    def audit(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.scene.audit.read_text().splitlines()]


@pytest.fixture(scope="module")
def house(scene: Scene) -> House:
    """podman in the host's mount namespace, with the directories that `--before-create` names."""
    root, recordings = scene.directory / "root", scene.directory / "recordings"
    recordings.mkdir()
    scene.podman.namespace.stop()
    scene.podman.namespace = RuntimeNamespace()
    scene.sczctl("install", "--engine", "podman", "--before-create", "--root", root)
    house = House(scene, root, recordings, runc_named_kata(scene.directory), KataLike(scene.directory / "like"))
    record(house, "a-before")
    record(house, "z-after")
    return house


@pytest.fixture(autouse=True)
def hooks(house: House) -> Iterator[None]:
    """The directories of `install`, and at the end nothing of a model is left."""
    directories = [house.root / DEFAULT, house.root / OWN_DIRECTORY.lstrip("/"), house.root / "recorders"]
    house.scene.podman.hooks_directories = directories
    house.scene.forget_refusals()
    for path in house.recordings.iterdir():
        path.unlink()
    yield
    house.scene.podman.call("rm", "--all", "--force", "--time=0", check=False)
    if house.left():
        wait_until(lambda: not swept(house))


def swept(house: House) -> list[str]:
    house.scene.sczctl("sweep", check=False)
    return house.left()


def record(house: House, name: str) -> None:
    """A precreate hook that keeps what it is given; podman calls them in the order of their names."""
    folder = house.root / "recorders"
    folder.mkdir(exist_ok=True)
    script = folder / name
    script.write_text(f'#!/bin/sh\nexec tee -a "{house.recordings}/{name}"\n')
    script.chmod(0o755)
    hook = {"path": str(script), "args": [str(script)], "env": ["PATH=/usr/bin:/bin"], "timeout": 60}
    when = {"annotations": {"^smm\\.scz/require$": "kata"}}
    document = {"version": "1.0.0", "hook": hook, "when": when, "stages": ["precreate"]}
    (folder / f"{name}.json").write_text(json.dumps(document))


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not is_so():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.1)


def gone(house: House) -> None:
    """Nothing is left, without a sweep; conmon's clean-up comes after what podman answers."""
    wait_until(lambda: house.left() == [])


def checksums(place: str = "/models/small") -> str:
    return f"cd {place} && find . -type f ! -name model.json | sort | xargs sha256sum"


def read_sums(text: str) -> dict[str, str]:
    return {line.split("  ./")[1]: line.split()[0] for line in text.splitlines() if "  ./" in line}


def refused(house: House, reason: str, *words: str, runtime: str | None = None) -> subprocess.CompletedProcess[str]:
    """A start that fails for that reason, whose workload does not run and of which nothing is left."""
    trace = house.scene.directory / "trace"
    trace.mkdir(exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        (trace / "ran").unlink()
    seen = set((house.like.folder / "seen").iterdir())
    done = house.run(
        "--rm", *words, "--volume", f"{trace}:/trace", house.scene.image, "touch", "/trace/ran", runtime=runtime
    )
    assert done.returncode != 0
    assert not (trace / "ran").exists()
    assert set((house.like.folder / "seen").iterdir()) == seen
    assert house.scene.why().get("reason") == reason, (done, house.scene.why())
    gone(house)
    return done


# --- what is read -----------------------------------------------------------------------------------------------------


def test_the_model_is_there_before_create_and_gone_afterwards(house: House) -> None:
    words = house.words(token="t1")
    script = f"{checksums()}; grep ' /models/small ' /proc/self/mountinfo; touch /models/small/x"
    done = house.run("--rm", *words, house.scene.image, "sh", "-c", script)
    assert read_sums(done.stdout) == SUMS, done.stderr
    (mount,) = [line for line in done.stdout.splitlines() if " /models/small " in line]
    assert {"ro", "nosuid", "nodev", "noexec"} <= set(mount.split()[5].split(","))
    assert "shared:" not in mount
    assert "Read-only file system" in done.stderr
    gone(house)
    events = [each["event"] for each in house.audit()][-3:]
    assert events == ["grant", "outcome", "closed"]


def test_config_json_is_the_same_but_for_the_entry(house: House) -> None:
    done = house.run("--rm", *house.words(token="t2"), house.scene.image, "true")
    assert done.returncode == 0, done.stderr
    before, after = ((house.recordings / name).read_bytes() for name in ("a-before", "z-after"))
    (entry,) = [mount for mount in json.loads(after)["mounts"] if mount not in json.loads(before)["mounts"]]
    assert entry["destination"] == "/models/small"
    assert entry["source"].startswith(f"{house.scene.runtime_directory}/bound/")
    assert entry["type"] == "bind"
    assert entry["options"] == ["bind", "ro", "nosuid", "nodev", "noexec"]
    written = json.dumps(entry, separators=(",", ":")).encode()
    members = re.compile(rb',\{"destination":"/models/small"[^}]*\}')
    (added,) = members.findall(after)
    assert json.loads(added[1:]) == json.loads(written)
    rest = after.replace(added, b"")
    hooks = json.loads(before)["hooks"]
    if "prestart" not in hooks:  # podman 5 calls it createRuntime, which Kata 1 does not know
        (hook,) = hooks["createRuntime"]
        assert json.loads(rest)["hooks"] == {"prestart": [hook], "createRuntime": [hook]}
        (added,) = re.findall(rb'"prestart":\[.*?\}\],', rest)
        rest = rest.replace(added, b"")
    assert rest == before


def test_two_models_of_one_container(house: House) -> None:
    words = house.words(token="t3", **{"model.second": "other:1", "path.second": "/srv/other"})
    script = f"{checksums()}; {checksums('/srv/other')}"
    done = house.run("--rm", *words, house.scene.image, "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    assert read_sums(done.stdout) == SUMS
    assert len([line for line in done.stdout.splitlines() if "  ./" in line]) == 2 * len(FILES)


def test_what_treats_hooks_as_kata_does_reads_the_model(house: House) -> None:
    podman = house.scene.podman
    name = podman.create([*house.words(token="t4"), house.scene.image, "sleep", "600"], runtime=house.like.runtime)
    podman.start_container(name)
    wait_until(lambda: bool(house.like.seen(name)))
    seen = house.like.seen(name)["/models/small"]
    assert {path: value for path, value in seen.items() if path != "model.json"} == SUMS
    (shown,) = json.loads(house.scene.sczctl("ps", "--json").stdout)
    assert shown["container_id"] == name
    podman.rm(name)
    gone(house)


def test_two_containers_of_a_pod(house: House) -> None:
    podman = house.scene.podman
    infra = ("--infra-command=/bin/sleep 1000", f"--infra-image={house.scene.image}")
    podman.call("pod", "create", "--name=two", *infra, "--network=none", f"--cgroup-parent=/{podman._name}")
    try:
        names = []
        for number, runtime in enumerate((house.runc, house.like.runtime)):
            words = ["--pod=two", *house.words(token=f"pod{number}"), house.scene.image]
            if runtime == house.runc:
                words += ["sh", "-c", f"{checksums()}; sleep 600"]
            else:
                words += ["sleep", "600"]
            names.append(podman.call("create", *words, runtime=runtime).stdout.strip())
            podman.start_container(names[-1])
        first, second = names
        wait_until(lambda: bool(house.like.seen(second)) and len(podman.call("logs", first).stdout.splitlines()) >= 5)
        assert SUMS.items() <= house.like.seen(second)["/models/small"].items()
        assert read_sums(podman.call("logs", first).stdout) == SUMS
        podman.rm(second)
        (shown,) = json.loads(house.scene.sczctl("ps", "--json").stdout)
        assert shown["container_id"] == first
        assert read_sums(podman.call("exec", first, "sh", "-c", checksums()).stdout) == SUMS
    finally:
        podman.call("pod", "rm", "--force", "--time=0", "two")
    gone(house)


def test_a_container_that_does_not_ask_for_a_vm_goes_the_ordinary_way(house: House) -> None:
    words = ["--annotation", "smm.scz/model=small:1"]
    words += ["--volume", f"{house.scene.token('t5')}:{TOKEN_PATH}:ro"]
    done = house.run("--rm", *words, house.scene.image, "sh", "-c", checksums(), runtime="runc")
    assert read_sums(done.stdout) == SUMS, done.stderr
    assert list(house.recordings.iterdir()) == []


@pytest.mark.parametrize("requirement", ["", "noswap"])
def test_under_kata_the_ordinary_way_is_refused(house: House, requirement: str) -> None:
    words = ["--annotation", "smm.scz/model=small:1"]
    words += ["--annotation", f"smm.scz/require={requirement}"] if requirement else []
    words += ["--volume", f"{house.scene.token('t6')}:{TOKEN_PATH}:ro"]
    runtimes = [house.runc]
    if int(house.scene.podman.call("--version").stdout.split()[-1].split(".")[0]) < 5:
        runtimes.append(house.like.runtime)
    for runtime in runtimes:
        done = refused(house, "HolderRefused", *words, runtime=runtime)
        assert "--before-create" in done.stderr + str(house.scene.why())
    if len(runtimes) == 1:  # podman 5 gives Kata 1 no hook that it knows: it starts, and there is no model
        name = house.scene.podman.create([*words, house.scene.image, "true"], runtime=house.like.runtime)
        house.scene.podman.start_container(name)
        wait_until(lambda: bool(house.like.seen(name)))
        assert "/models/small" not in house.like.seen(name)
        house.scene.podman.rm(name)
        gone(house)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_another_runtime_than_a_vm_is_refused(house: House) -> None:
    refused(house, "RequirementRefused", *house.words(token="t7"), runtime="runc")


def test_podman_shows_the_number_and_why_the_reason(house: House) -> None:
    done = refused(house, "TokenMissing", *house.words())
    assert f"exit status {CODES['TokenMissing']}" in done.stderr
    named = container_id(parse_precreate((house.recordings / "a-before").read_bytes()).spec)
    assert house.scene.why()["container_id"] == named
    assert not (house.recordings / "z-after").exists()


def test_a_destination_below_a_volume_is_refused(house: House) -> None:
    volume = house.scene.directory / "volume"
    volume.mkdir(exist_ok=True)
    words = [*house.words(token="t8"), "--volume", f"{volume}:/models"]
    refused(house, "DestinationRefused", *words)
    assert list(volume.iterdir()) == []


def test_without_podmans_name_of_the_container(house: House) -> None:
    # podman lets only crun have no cgroup, and ends before it calls it
    words = [*house.words(token="t9"), "--cgroups=disabled"]
    done = house.scene.podman.call("run", "--rm", "--network=none", *words, house.scene.image, "true",
                                   runtime="crun", check=False)  # fmt: skip
    assert f"exit status {CODES['EngineUnsupported']}" in done.stderr
    gone(house)


def test_without_the_hook_that_checks_the_runtime(house: House) -> None:
    file = house.root / DEFAULT / "scz-smm-prestart.json"
    text = file.read_text()
    file.unlink()
    try:
        done = refused(house, "EngineUnsupported", *house.words(token="t10"))
        assert f"exit status {CODES['EngineUnsupported']}" in done.stderr
    finally:
        file.write_text(text)


def test_a_hook_that_comes_after_ours_and_changes_the_entry(house: House) -> None:
    folder = house.root / "recorders"
    script = folder / "y-change"
    script.write_text('#!/bin/sh\nexec sed "s#,.ro.,.nosuid.#,\\"rw\\",\\"nosuid\\"#"\n')
    script.chmod(0o755)
    hook = {"path": str(script), "args": [str(script)], "env": ["PATH=/usr/bin:/bin"]}
    document = {"version": "1.0.0", "hook": hook, "when": {"always": True}, "stages": ["precreate"]}
    try:
        (folder / "y-change.json").write_text(json.dumps(document))
        refused(house, "DestinationRefused", *house.words(token="t11"))
        assert b'"rw","nosuid"' in (house.recordings / "z-after").read_bytes()
    finally:
        (folder / "y-change.json").unlink()


def test_without_the_hook_that_removes_the_model_a_sweep_does(house: House) -> None:
    file = house.root / DEFAULT / "scz-smm-poststop.json"
    text = file.read_text()
    file.unlink()
    try:
        done = house.run("--rm", *house.words(token="t19"), house.scene.image, "true")
    finally:
        file.write_text(text)
    assert done.returncode == 0, done.stderr
    assert swept(house) == []


# --- a container's life -----------------------------------------------------------------------------------------------


def test_a_container_starts_again_and_again(house: House) -> None:
    podman = house.scene.podman
    name = podman.create([*house.words(token="t12"), house.scene.image, "sh", "-c", checksums()], runtime=house.runc)
    sources = []
    for _ in range(3):
        started = podman.call("start", "--attach", name, check=False)
        assert read_sums(started.stdout) == SUMS, started.stderr
        gone(house)
        (last,) = re.findall(rb'"source":"([^"]*/bound/[^"]*)"', (house.recordings / "z-after").read_bytes())
        sources.append(last)
        (house.recordings / "z-after").unlink()
    assert len(set(sources)) == 1


def test_restart_of_a_container_that_runs(house: House) -> None:
    podman = house.scene.podman
    script = f"{checksums()}; sleep 600"
    name = podman.create([*house.words(token="t13"), house.scene.image, "sh", "-c", script], runtime=house.runc)
    podman.start_container(name)
    for number in range(1, 4):
        written = number * len(FILES)
        wait_until(lambda: len(podman.call("logs", name).stdout.splitlines()) >= written)  # noqa: B023 - called at once
        if number < 3:
            podman.call("restart", "--time=0", name)
    assert read_sums(podman.call("logs", name).stdout) == SUMS
    podman.rm(name)
    gone(house)


@pytest.mark.parametrize("runtime", ["runc", "like"])
def test_removal_by_force(house: House, runtime: str) -> None:
    podman = house.scene.podman
    path = house.runc if runtime == "runc" else house.like.runtime
    name = podman.create([*house.words(token="t14"), house.scene.image, "sleep", "600"], runtime=path)
    podman.start_container(name)
    assert house.left() != []
    podman.rm(name)
    gone(house)


@pytest.mark.parametrize("runtime", ["runc", "like"])
def test_a_create_that_fails_after_it(house: House, runtime: str) -> None:
    path = house.runc if runtime == "runc" else house.like.runtime
    done = house.run("--rm", *house.words(token="t15"), house.scene.image, "/no-such-program", runtime=path)
    assert done.returncode != 0
    assert (house.recordings / "z-after").exists()
    # podman has ended, and with it what held the record: the next start, or the timer's sweep, removes it
    assert swept(house) == []


@pytest.mark.parametrize("victim", ["container", "conmon"])
def test_killed(house: House, victim: str) -> None:
    podman = house.scene.podman
    name = podman.create([*house.words(token="t16"), house.scene.image, "sleep", "600"], runtime=house.runc)
    podman.start_container(name)
    state = podman.inspect(name)["State"]
    os.kill(state["ConmonPid" if victim == "conmon" else "Pid"], signal.SIGKILL)
    if victim == "conmon":
        os.kill(state["Pid"], signal.SIGKILL)
    wait_until(lambda: not swept(house))


def test_podman_is_killed_while_its_hook_runs(house: House) -> None:
    words = ["--rm", *house.words(token="t17"), house.scene.image, "true"]
    with frozen_tpm(house.scene), house.scene.podman.spawn(words, runtime=house.runc) as started:
        wait_until(lambda: bool(hooks_that_run(house)))
        started.kill()
    wait_until(lambda: not hooks_that_run(house))
    assert swept(house) == []
    assert not (house.recordings / "z-after").exists()


def test_a_hook_that_takes_too_long_is_ended_and_leaves_nothing(house: House) -> None:
    text = house.precreate.read_text()
    house.precreate.write_text(text.replace('"timeout": 300', '"timeout": 2'))
    try:
        words = ["--rm", *house.words(token="t18"), house.scene.image, "true"]
        with frozen_tpm(house.scene):
            done = house.run(*words)
        assert done.returncode != 0
        assert "deadline exceeded" in done.stderr
        wait_until(lambda: not hooks_that_run(house))
        assert swept(house) == []
    finally:
        house.precreate.write_text(text)
    assert house.run(*words).returncode == 0  # its token is free again, too


def test_each_start_by_the_api_service_is_admitted_anew(house: House) -> None:
    """The service outlives a creation that fails, so nothing shows that it failed."""
    podman = house.scene.podman
    socket = house.scene.directory / "api.sock"
    words = [*house.words(token="t20"), house.scene.image, "/no-such-program"]
    name = podman.create(words, runtime=house.like.runtime)
    service = subprocess.Popen(
        podman.command("system", "service", "--time=0", f"unix://{socket}"), env=podman.environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until(socket.exists)
        remote = [*podman.namespace.prefix, "podman", "--remote", f"--url=unix://{socket}", "start", name]

        def start() -> str:
            house.scene.forget_refusals()
            done = subprocess.run(remote, env=podman.environment, capture_output=True, text=True, check=False)
            assert done.returncode != 0
            return done.stderr

        assert "the stand-in refuses" in start()
        assert house.left() != []
        (house.scene.host / "t20").write_text("no token any more")
        assert f"exit status {CODES['TokenMalformed']}" in start()
        assert house.scene.why()["reason"] == "TokenMalformed"
        gone(house)
    finally:
        service.terminate()
        service.wait(timeout=WAIT_SECONDS)


def test_what_the_api_service_could_not_create_goes_with_the_container(house: House) -> None:
    podman = house.scene.podman
    socket = house.scene.directory / "api.sock"
    words = [*house.words(token="t21"), house.scene.image, "/no-such-program"]
    name = podman.create(words, runtime=house.like.runtime)
    service = subprocess.Popen(
        podman.command("system", "service", "--time=0", f"unix://{socket}"), env=podman.environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until(socket.exists)
        remote = [*podman.namespace.prefix, "podman", "--remote", f"--url=unix://{socket}"]

        def call(*words: str) -> int:
            done = subprocess.run(
                [*remote, *words], env=podman.environment, capture_output=True, text=True, check=False,
                timeout=WAIT_SECONDS,
            )  # fmt: skip
            return done.returncode

        assert call("start", name) != 0
        assert swept(house) != []  # it may be started again: podman has it still
        assert call("rm", "--force", name) == 0
        assert service.poll() is None
        assert swept(house) == []
    finally:
        service.terminate()
        service.wait(timeout=WAIT_SECONDS)


@contextlib.contextmanager
def frozen_tpm(scene: Scene) -> Iterator[None]:
    """The TPM does not answer for a while."""
    scene.tpm.pause()
    try:
        yield
    finally:
        scene.tpm.resume()


def hooks_that_run(house: House) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"precreate" in words and os.fsencode(house.scene.config) in words:
                found.append(int(path.parent.name))
    return found


# --- what podman passes -----------------------------------------------------------------------------------------------


def passed(house: House, words: Sequence[str]) -> str | None:
    """The id that is read from what podman passes for a container; None if it is refused."""
    house.scene.podman.hooks_directories = [house.root / "recorders"]
    for path in house.recordings.iterdir():
        path.unlink()
    podman = house.scene.podman
    options = [word.format(parent=f"/{podman._name}") for word in words]
    name = podman.create(["--annotation", "smm.scz/require=runtime=kata", *options, house.scene.image, "true"])
    podman.start_container(name, check=False)
    data = (house.recordings / "a-before").read_bytes()
    assert data == (house.recordings / "z-after").read_bytes()
    assert container_id(parse_precreate(data).spec) == name
    return name


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--read-only",),
        ("--ipc=host", "--uts=host", "--pid=host"),
        ("--uidmap=0:100000:65536",),
        ("--volume", "/etc/hosts:/etc/hosts:ro"),
        ("--hostname=x", "--tmpfs=/t", "--volume=/etc:/x/etc:ro"),
        ("--systemd=always",),
        ("--cgroup-parent={parent}/libpod-other",),
    ],
    ids=lambda words: " ".join(words) or "plain",
)
def test_podman_names_the_container_in_both_places(house: House, words: tuple[str, ...]) -> None:
    assert passed(house, words)


def test_also_in_a_pod_and_with_another_containers_namespaces(house: House) -> None:
    podman = house.scene.podman
    infra = ("--infra-command=/bin/sleep 1000", f"--infra-image={house.scene.image}")
    podman.call("pod", "create", "--name=pod", *infra, "--network=none", f"--cgroup-parent=/{podman._name}")
    try:
        assert passed(house, ("--pod=pod",))
    finally:
        podman.call("pod", "rm", "--force", "--time=0", "pod")
    other = podman.create([house.scene.image, "sleep", "1000"])
    podman.start_container(other)
    assert passed(house, (f"--ipc=container:{other}", f"--uts=container:{other}"))


def test_and_with_systemd_as_the_manager_of_cgroups(house: House) -> None:
    podman = house.scene.podman
    podman.hooks_directories = [house.root / "recorders"]
    words = ["run", "--network=none", "--annotation", "smm.scz/require=runtime=kata", house.scene.image, "true"]
    command = [word.replace("--cgroup-manager=cgroupfs", "--cgroup-manager=systemd") for word in podman.command(*words)]
    # Without systemd the container does not start after that; with it, it does.
    subprocess.run(command, env=podman.environment, capture_output=True, check=False, timeout=120)
    spec = parse_precreate((house.recordings / "a-before").read_bytes()).spec
    assert re.fullmatch(r"[^/:]+\.slice:libpod:[0-9a-f]{64}", spec.cgroups_path or "")
    assert container_id(spec) == (spec.cgroups_path or "")[-64:]
