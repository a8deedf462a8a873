"""CDI alone, or beside another way, brings a model: `sczctl cdi generate`, Debian 13's containerd by CRI, and podman.

The runtimes are called as they are where nothing else is said: no shim, no hooks.d. A device carries the request, since
CDI cannot set annotations; containerd vouches for the pod all the same.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from oci_hook.audit import AuditLog
from tests.containerd import Containerd, write_shim
from tests.cri import CriClient, CriError, Pod, bind
from tests.integration.conftest import FILES, contents
from tests.integration.test_start import craft_token
from tests.matrix.test_pods import holders, nothing_left
from tests.runsc_pods import write_runsc
from tests.runtimes import newer_runsc
from tests.scene import TOKEN_PATH, Scene
from tests.suites import program

DIGEST = hashlib.sha256(contents("config.json", FILES["config.json"])).hexdigest()
RUNTIMES = ("runc", "crun", "runsc")
SMALL, OTHER = "smm.scz/model=small", "smm.scz/model=other:1"
_READ = "cd /models && sha256sum */config.json; grep -c '^scz-smm ' /proc/mounts; sleep 1000"
# podman 4.3 looks into /etc/cdi and /run/cdi only: it gets an /etc of its own, with the folder in $1 as /etc/cdi.
_OWN_ETC = """
set -e
mount -t tmpfs scz-test /mnt
mkdir /mnt/upper /mnt/work
mount -t overlay -o lowerdir=/etc,upperdir=/mnt/upper,workdir=/mnt/work scz-test /etc
mkdir -p /etc/cdi
mount --bind "$1" /etc/cdi
shift
exec "$@"
"""


@dataclass
class Cluster:
    """containerd with CDI, and the devices."""

    scene: Scene
    cri: CriClient
    image: str
    devices: Path

    def start(self, pod: Pod, name: str, token: Path, **how: object) -> list[str]:
        """Start a container with a token and wait for what it says: digests, then the number of model mounts."""
        mounts = [bind(token, TOKEN_PATH, readonly=True)]
        container = pod.create(name, self.image, ["sh", "-c", _READ], mounts=mounts, **how)  # type: ignore[arg-type]
        pod.start(container)
        done = self.cri.exec(container, ["sh", "-c", _READ.replace("sleep 1000", "true")])
        return done.stdout.split("\n")[:-1]


def generate(scene: Scene, folder: Path, engine: str) -> None:
    """Two devices, in two files of a folder: one with a name of its own, one with the model's."""
    folder.mkdir()
    words = ("cdi", "generate", "--engine", engine, "-o")
    scene.sczctl(*words, folder / "scz-small.json", "--name", "small", "small:1")
    scene.sczctl(*words, folder / "scz-other.json", "other:1")


@pytest.fixture(scope="module")
def cluster_of_module(scene: Scene) -> Iterator[Cluster]:
    """Debian 13's containerd; handlers without shim, and one with it."""
    devices = scene.host / "cdi"
    generate(scene, devices, "containerd")
    handlers = {name: program("trixie", name) for name in ("runc", "crun")}
    handlers["runsc"] = write_runsc(scene.host / "gvisor", newer_runsc())
    handlers["scz-runc"] = write_shim(scene.host / "scz-runc", handlers["runc"], scene.config)
    programs = program("trixie", "containerd").parent
    folder = scene.directory / "ctd"
    with ExitStack() as stack:
        containerd = stack.enter_context(
            Containerd(folder, handlers=handlers, programs=programs, cdi_directories=[devices])
        )
        parent = f"/{containerd.cgroup}"
        cri = stack.enter_context(CriClient(containerd.socket, scene.host / "logs", cgroup_parent=parent))
        yield Cluster(scene, cri, cri.wait_for_image(containerd.busybox_image("k8s.io")), devices)


@pytest.fixture
def cluster(cluster_of_module: Cluster) -> Iterator[Cluster]:
    """The same, with nothing left of another test."""
    cluster_of_module.scene.forget_refusals()
    yield cluster_of_module
    assert cluster_of_module.cri.pods() == []
    nothing_left(cluster_of_module.scene)


def said(*models: str) -> list[str]:
    """What a container with these models reads."""
    return [f"{DIGEST}  {model}/config.json" for model in sorted(models)]


def grants(scene: Scene) -> int:
    """How many models were ever granted here."""
    return sum(record["event"] == "grant" for record in AuditLog(str(scene.audit)).records())


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("way", ["annotation", "field"])
def test_a_device_of_a_pod_s_container(cluster: Cluster, runtime: str, way: str) -> None:
    scene = cluster.scene
    how: dict[str, object] = {"cdi_devices": [SMALL]} if way == "field" else {"annotations": {"cdi.k8s.io/x": SMALL}}
    with cluster.cri.pod("shop", handler=runtime) as pod:
        lines = cluster.start(pod, "server", craft_token(scene), **how)
        assert lines[:1] == said("small")
        assert lines[1:] == ["0" if runtime == "runsc" else "1"]  # gVisor shows mounts of its own making
        plain = cluster.start(pod, "sidecar", craft_token(scene, "another"))
        assert plain == ["0"]
        (record,) = holders(scene)
        assert record.models == ("small:1",)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_two_devices_give_two_models(cluster: Cluster, runtime: str) -> None:
    with cluster.cri.pod("shop", handler=runtime) as pod:
        lines = cluster.start(pod, "server", craft_token(cluster.scene), cdi_devices=[SMALL, OTHER])
        assert lines[:2] == said("small", "other")
        (record,) = holders(cluster.scene)
        assert sorted(record.models) == ["other:1", "small:1"]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_device_without_a_token_is_refused(cluster: Cluster, runtime: str) -> None:
    with cluster.cri.pod("shop", handler=runtime) as pod:
        with pytest.raises(CriError):
            pod.run("server", cluster.image, ["sleep", "1000"], cdi_devices=[SMALL])
        assert cluster.scene.why()["reason"] == "TokenMissing"


@pytest.mark.parametrize(("asked", "models"), [("small:1", ["small"]), ("other:1", ["small", "other"])])
def test_shim_and_device(cluster: Cluster, asked: str, models: list[str]) -> None:
    before = grants(cluster.scene)
    with cluster.cri.pod("shop", handler="scz-runc", annotations={"smm.scz/model": asked}) as pod:
        lines = cluster.start(pod, "server", craft_token(cluster.scene), cdi_devices=[SMALL])
        assert lines == [*said(*models), str(len(models))]
        assert grants(cluster.scene) - before == len(models)


# --- podman -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def podman_devices(scene: Scene) -> Path:
    """The folder that podman sees as /etc/cdi."""
    folder = scene.host / "podman-cdi"
    generate(scene, folder, "podman")
    return folder


def podman_run(
    scene: Scene, devices: Path, words: list[str], *, runtime: str, annotations: Mapping[str, str] = {}
) -> subprocess.CompletedProcess[str]:
    """`podman run --rm WORDS` with a token, in a mount namespace whose /etc/cdi is `devices`."""
    podman, prefix = scene.podman, scene.podman.namespace.prefix
    options = [f"--annotation={key}={text}" for key, text in annotations.items()]
    options.append(f"--volume={craft_token(scene)}:{TOKEN_PATH}:ro")
    script = _READ.replace("sleep 1000", "true")
    run = podman.command("run", "--rm", "--network=none", *options, *words, scene.image, "sh", "-c", script,
                         runtime=runtime)  # fmt: skip
    own_etc = ["unshare", "--mount", "--propagation", "slave", "--", "sh", "-c", _OWN_ETC, "sh", str(devices)]
    command = [*prefix, *own_etc, *run[len(prefix) :]]
    return subprocess.run(
        command,
        env=podman.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("runtime", ["runc", "crun"])
@pytest.mark.parametrize(
    ("devices", "annotations", "models"),
    [
        ([SMALL], {}, ["small"]),
        ([SMALL, OTHER], {}, ["other", "small"]),
        ([SMALL], {"smm.scz/model": "small:1"}, ["small"]),  # hooks.d, too
        ([SMALL], {"smm.scz/model": "other:1"}, ["other", "small"]),
    ],
    ids=["one", "two", "and hooks.d", "another by hooks.d"],
)
def test_podman_devices(
    scene: Scene, podman_devices: Path, runtime: str, devices: list[str], annotations: dict[str, str], models: list[str]
) -> None:
    before = grants(scene)
    words = [f"--device={device}" for device in devices]
    done = podman_run(scene, podman_devices, words, runtime=runtime, annotations=annotations)
    assert done.returncode == 0, done
    assert done.stdout.splitlines() == [*said(*models), str(len(models))]
    assert grants(scene) - before == len(models)
    nothing_left(scene)
