"""config/kubernetes: what kustomize renders, by Kubernetes' own schemas; and the installer, run on a node.

The installer runs as its DaemonSet says (mounts, capabilities, user, read-only root), by podman on a node that is a
directory (`tests/nodes.py`). No kubelet, no API server and no engine of a cluster ran.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import kubernetes_validate
import pytest

from tests.containerd import Containerd
from tests.cri import CriClient
from tests.engines import Podman
from tests.kubernetes import CUSTOMIZATIONS, FOLDER, Policy, Request, one, rendered
from tests.nodes import ApiServer, Node, build_images, make_usr

SHIM = "/usr/local/libexec/scz-smm/containerd/scz-runc"
DROP_IN = "/etc/containerd/conf.d/50-scz-smm.toml"
READY = {"smm.scz/scz-runc": "ready"}
MAIN = 'version = 2\nimports = ["/etc/containerd/conf.d/*.toml"]\n'


# --- manifests --------------------------------------------------------------------------------------------------------


def test_manifests_are_what_kubernetes_knows() -> None:
    newest = kubernetes_validate.latest_version()
    assert tuple(map(int, newest.split(".")[:2])) >= (1, 37)
    different = {json.dumps(each, sort_keys=True): each for name in CUSTOMIZATIONS for each in rendered(name)}
    assert {each["kind"] for each in different.values()} > {"ValidatingAdmissionPolicy", "RuntimeClass", "Deployment"}
    for manifest in different.values():
        kubernetes_validate.validate(manifest, newest, strict=True)


def test_the_validation_is_strict() -> None:
    manifest = one(rendered("containerd"), "DaemonSet", "scz-smm-installer")
    manifest["spec"]["template"]["spec"]["hostPidd"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize(("engine", "prefix"), [("containerd", "scz-"), ("cri-o", "")])
def test_runtime_classes_are_the_engines_handlers(engine: str, prefix: str) -> None:
    classes = [each for each in rendered(engine) if each["kind"] == "RuntimeClass"]
    found = {each["metadata"]["name"]: (each["handler"], each["scheduling"]["nodeSelector"]) for each in classes}
    kinds = ("runc", "crun", "runsc")
    assert found == {f"scz-{kind}": (f"{prefix}{kind}", {f"smm.scz/scz-{kind}": "ready"}) for kind in kinds}


def test_what_is_rendered_passes_the_policies_that_are_rendered() -> None:
    found = (*rendered("containerd"), *rendered("example"))
    labels = {each["metadata"]["name"]: each["metadata"]["labels"] for each in found if each["kind"] == "Namespace"}
    settings = one(found, "ConfigMap", "scz-smm-models")
    refused = {}
    for kind, name in (("DaemonSet", "scz-smm-installer"), ("Deployment", "recommender")):
        thing = one(found, kind, name)
        asked = Request(
            thing, namespace_labels=labels[thing["metadata"]["namespace"]], resource=("apps", f"{kind.lower()}s")
        )
        policies = [Policy(found, each) for each in ("scz-smm-annotations", "scz-smm-models")]
        refused[kind] = [message for policy in policies for message in policy.refusals(asked, settings)]
        settings["data"]["shop.recommender"] = "minilm:1"
        assert not [message for policy in policies for message in policy.refusals(asked, settings)]
        del settings["data"]["shop.recommender"]
    assert refused["DaemonSet"] == []
    (who,) = refused["Deployment"]  # until the administrator allows it, as docs/kubernetes.md says
    assert who.startswith("no line <namespace>.<service account>")


@pytest.mark.parametrize("engine", ["containerd", "cri-o"])
def test_uninstalling_differs_in_one_word(engine: str) -> None:
    name = "scz-smm-installer"
    pods = [one(rendered(each), "DaemonSet", name)["spec"]["template"] for each in (engine, f"uninstall/{engine}")]
    assert [each["spec"]["containers"][0].pop("args") for each in pods] == [["install"], ["remove"]]
    assert pods[0] == pods[1]


def test_the_installer_s_paths_on_the_node_are_few() -> None:
    spec = one(rendered("containerd"), "DaemonSet", "scz-smm-installer")["spec"]["template"]["spec"]
    paths = {each["name"]: each["hostPath"]["path"] for each in spec["volumes"] if "hostPath" in each}
    written = {
        paths[m["name"]] for m in spec["containers"][0]["volumeMounts"] if m["name"] in paths and not m.get("readOnly")
    }
    assert written == {"/opt/scz-smm", "/usr/local/libexec/scz-smm", "/etc/containerd", "/dev/null"}


def test_the_script_is_clean() -> None:
    done = subprocess.run(
        ["shellcheck", "--shell=sh", FOLDER / "base/scz-node"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


# --- the installer ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    with Podman(tmp_path_factory.mktemp("kube") / "podman") as made:
        yield made


@pytest.fixture(scope="module")
def images(podman: Podman, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("images")
    return build_images(podman, folder, ["1.0", "1.1"])


@pytest.fixture(scope="module")
def usr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("node") / "usr"
    make_usr(made)
    return made


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ApiServer]:
    with ApiServer(tmp_path) as made:
        yield made


@pytest.fixture
def node(tmp_path: Path, usr: Path, api: ApiServer, podman: Podman) -> Node:
    return make_node(tmp_path, usr, api, podman)


def make_node(tmp_path: Path, usr: Path, api: ApiServer, podman: Podman, engine: str = "containerd") -> Node:
    root = tmp_path / "n"
    root.mkdir()
    subprocess.run(["cp", "--archive", "--link", usr, root / "usr"], check=True)
    node = Node(root, api, podman, engine=engine)
    if engine == "containerd":
        (root / "etc/containerd").mkdir()
        (root / "etc/containerd/config.toml").write_text(MAIN)
        node.restart_engine()
    return node


class Told:
    """How a pass ended: whether the pod is ready, its status, and its log."""

    def __init__(self, ready: bool, status: str, log: str) -> None:
        self.ready, self.status, self.log = ready, status, log


def one_pass(node: Node, image: str, *, uninstall: bool = False) -> Told:
    state = node.root.parent / "state"
    shutil.rmtree(state, ignore_errors=True)
    state.mkdir()
    options, words = node.arguments(state, uninstall=uninstall)
    done = node.podman.run(["--rm", *options, image, *words, "once"], check=False, network="host")
    status = (state / "status").read_text().strip() if (state / "status").exists() else ""
    ready = (state / "ready").exists()
    assert ready == (done.returncode == 0), done.stdout + done.stderr
    return Told(ready, status, done.stdout + done.stderr)


def installed(node: Node, image: str) -> None:
    """Two passes and a restart of the engine between them, as the first one asks for."""
    told = one_pass(node, image)
    assert f"has not been started since {DROP_IN} changed: on this node, `systemctl restart containerd`" in told.status
    assert node.api.labels == {}
    node.restart_engine()
    told = one_pass(node, image)
    assert told.ready, told.log
    assert node.api.labels == READY


def only_version(node: Node) -> str:
    (version,) = os.listdir(node.root / "opt/scz-smm/versions")
    return version


def test_install_again_upgrade_and_remove(node: Node, images: Sequence[str]) -> None:
    before = node.files()
    installed(node, images[0])
    placed, first = node.files(), only_version(node)
    assert set(placed) > {SHIM, DROP_IN, "/opt/scz-smm/sczctl"}
    assert f"/opt/scz-smm/versions/{first}'" in placed[SHIM].decode()
    assert placed[SHIM].startswith(b"#!/usr/bin/python3")

    # Again: nothing is written.
    times = {path: (node.root / path[1:]).stat().st_mtime_ns for path in placed}
    assert one_pass(node, images[0]).ready
    assert node.files() == placed
    assert {path: (node.root / path[1:]).stat().st_mtime_ns for path in placed} == times

    # What was damaged is mended.
    hook = f"opt/scz-smm/versions/{first}/oci_hook/hook.py"
    (node.root / hook).write_text("raise SystemExit(0)\n")
    (node.root / f"opt/scz-smm/versions/{first}/oci_hook/shim.py").unlink()
    (node.root / SHIM[1:]).unlink()
    assert one_pass(node, images[0]).ready
    assert node.files() == placed

    # Upgrade: containerd need not be started anew, and a running container keeps the version that it was started with.
    bundle = node.root / "run/containerd/io.containerd.runtime.v2.task/k8s.io/c1"
    bundle.mkdir(parents=True)
    (bundle / "config.json").write_text(f'{{"hooks": "/opt/scz-smm/versions/{first}/oci_hook/launch.py"}}')
    (bundle / "options.json").write_text(f'{{"binary_name": "{SHIM}"}}')
    assert one_pass(node, images[1]).ready
    versions = set(os.listdir(node.root / "opt/scz-smm/versions"))
    (second,) = versions - {first}
    assert len(versions) == 2
    assert f"/opt/scz-smm/versions/{second}'" in node.files()[SHIM].decode()

    # Removal waits for that container, and takes exactly our files then.
    told = one_pass(node, images[1], uninstall=True)
    assert not told.ready
    assert "containers of this node still need the files" in told.status
    assert "c1/options.json" in told.status
    assert node.api.labels == {}
    assert SHIM in node.files()
    shutil.rmtree(bundle)
    told = one_pass(node, images[1], uninstall=True)
    assert told.ready, told.log
    assert "systemctl restart containerd" in told.log
    assert node.files() == before
    made_by_kubelet = {"/opt/scz-smm", "/etc/scz-smm", "/usr/local/libexec", "/usr/local/libexec/scz-smm"}
    assert node.folders() == {"/etc/containerd"} | made_by_kubelet
    assert one_pass(node, images[1], uninstall=True).ready
    assert node.api.node["metadata"]["labels"] == {"zone": "a"}


def test_containerd_says_which_script_runs_a_container(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the removal looks for: a real containerd and a real pod; the place is the installer's but for its root."""
    folder = tmp_path_factory.mktemp("cd")
    script = folder / "scz-runc"
    script.write_text('#!/bin/sh\nexec runc "$@"\n')
    script.chmod(0o755)
    with Containerd(folder / "c", handlers={"scz-runc": script}) as engine:
        client = CriClient(engine.socket, folder / "logs", cgroup_parent=f"/{engine.cgroup}")
        with client as cri, cri.pod("shop", handler="scz-runc") as pod:
            (bundle,) = folder.glob(f"c/state/io.containerd.runtime.v2.task/k8s.io/{pod.id}")
            named = [name for name in ("config.json", "options.json", "runtime") if (bundle / name).exists()]
            assert any(str(script) in (bundle / name).read_text() for name in named)


def test_the_placed_files_run(node: Node, images: Sequence[str]) -> None:
    installed(node, images[0])
    for name in ("bin", "lib", "lib64", "sbin"):
        (node.root / name).symlink_to(f"usr/{name}")

    def on_node(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["/usr/sbin/chroot", str(node.root), *words]
        return subprocess.run(command, env={}, capture_output=True, text=True, check=False, timeout=60)

    assert on_node("/opt/scz-smm/sczctl", "--help").returncode == 0
    version = on_node(SHIM, "--version")  # the shim becomes runc
    assert version.stdout.startswith("runc version"), version.stderr


def test_old_versions_go_when_nothing_names_them(node: Node, images: Sequence[str]) -> None:
    installed(node, images[0])
    assert one_pass(node, images[1]).ready
    assert len(os.listdir(node.root / "opt/scz-smm/versions")) == 2
    state = node.root.parent / "loop"
    state.mkdir()
    options, words = node.arguments(state)
    name = ["--name=loop", "--env=INTERVAL_SECONDS=1"]
    node.podman.run(["--detach", *name, *options, images[1], *words], network="host")
    wait_for(lambda: len(os.listdir(node.root / "opt/scz-smm/versions")) == 1)
    # SIGTERM, as when a node is drained: it ends by itself, and nothing is removed.
    placed = node.files()
    node.podman.call("stop", "--time=20", "loop")
    assert node.podman.inspect("loop")["State"]["ExitCode"] == 0
    assert node.files() == placed
    assert node.api.labels == READY
    node.podman.rm("loop")


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.1)


# A program of the image that stops for ever when it is called like $STOP_AT, to be killed there. A copy
# is half done then.
STOPPER = """#!/bin/sh
case "${0##*/} $*" in
$STOP_AT)
    if [ "${0##*/}" = cp ]; then /usr/bin/mkdir "$3" && /usr/bin/cp -Rp "$2/oci_hook" "$3/"; fi
    echo "${0##*/} $*" >/stopper/reached
    exec /usr/bin/sleep 600
    ;;
esac
exec "/usr/bin/${0##*/}" "$@"
"""
INSTALL_STOPS = (
    "cp -Rp*",
    "mv -T*",
    "mv -f*/sczctl.new*",
    "mv -f*/made.new*",
    "env*/sczctl install --engine containerd",
)
REMOVE_STOPS = ("env*/sczctl uninstall*", "rmdir*", "rm -f*/sczctl", "rm -rf*/versions /host*")


def kill_at(node: Node, image: str, call: str, *, uninstall: bool = False) -> None:
    """Kill the pod with SIGKILL where it would call a program so."""
    stopper, state = node.root.parent / "stopper", node.root.parent / "state"
    for folder in (stopper, state):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    for name in ("cp", "mv", "rm", "rmdir", "env"):
        program = stopper / name
        program.write_text(STOPPER)
        program.chmod(0o755)
    options, words = node.arguments(state, uninstall=uninstall)
    path = "--env=PATH=/stopper:/usr/sbin:/usr/bin"
    more = ["--name=killed", "--volume", f"{stopper}:/stopper", path, f"--env=STOP_AT={call}"]
    node.podman.run(["--detach", *more, *options, image, *words, "once"], network="host")
    reached = stopper / "reached"
    wait_for(lambda: reached.exists() or not node.podman.inspect("killed")["State"]["Running"])
    node.podman.call("kill", "--signal=KILL", "killed", check=False)
    node.podman.rm("killed")
    assert reached.exists(), f"it did not call {call}"


def test_killed_half_way(node: Node, images: Sequence[str]) -> None:
    before = node.files()
    for call in INSTALL_STOPS:
        kill_at(node, images[0], call)
        assert node.api.labels == {}
        assert not {SHIM, DROP_IN} & set(node.files())  # what starts containers comes last
    installed(node, images[0])
    assert not [path for path in node.files() if ".new" in path]
    for call in REMOVE_STOPS:
        kill_at(node, images[0], call, uninstall=True)
        assert node.api.labels == {}
    assert one_pass(node, images[0], uninstall=True).ready
    assert node.files() == before


def test_nodes_that_are_refused(node: Node, images: Sequence[str]) -> None:
    before = node.files()

    def refused(reason: str) -> None:
        told = one_pass(node, images[0])
        assert not told.ready
        assert reason in told.status
        assert "NOT READY" in told.log
        assert node.api.labels == {}
        assert node.files() == before

    python = node.root / "usr/bin/python3"
    python.unlink()
    refused("this node's /usr/bin/python3: none. Nodes need /usr/bin/python3, version 3.11 or later")
    python.write_text("#!/usr/bin/busybox sh\necho 3.9\n")
    python.chmod(0o755)
    shutil.copy("/bin/busybox", node.root / "usr/bin/busybox")
    refused("this node's /usr/bin/python3: 3.9.")
    python.unlink()
    python.symlink_to(Path(os.path.realpath("/usr/bin/python3")).name)
    for path in (node.root / "usr/lib").glob("*/libtss2-esys*"):
        path.unlink()
    refused("the modules do not load with this node's Python")
    (node.root / "usr/lib/scz-smm/oci_hook").mkdir(parents=True)
    refused("the package scz-smm is installed on this node")


def test_what_a_person_has_to_do_is_said(node: Node, images: Sequence[str]) -> None:
    (node.root / "etc/containerd/config.toml").write_text("version = 2\n")
    told = one_pass(node, images[0])
    assert "to be done by hand on this node: add at the top of /etc/containerd/config.toml: imports" in told.status
    assert node.api.labels == {}


def test_an_api_server_that_refuses(node: Node, images: Sequence[str], api: ApiServer) -> None:
    installed(node, images[0])
    api.refuses = True
    told = one_pass(node, images[0])
    assert not told.ready
    assert "the node's labels cannot be set: the API server answered 403" in told.status


def test_cri_o(tmp_path: Path, usr: Path, api: ApiServer, podman: Podman, images: Sequence[str]) -> None:
    node = make_node(tmp_path, usr, api, podman, "cri-o")
    told = one_pass(node, images[0])
    assert "`systemctl restart crio`" in told.status
    node.restart_engine()
    told = one_pass(node, images[0])
    assert told.ready, told.log
    assert api.labels == READY
    files = node.files()
    launcher = f"/opt/scz-smm/versions/{only_version(node)}/oci_hook/launch.py"
    assert launcher in files["/etc/scz-smm/hooks.d-cri-o/scz-smm-prestart.json"].decode()
    assert b"/etc/scz-smm/hooks.d-cri-o" in files["/etc/crio/crio.conf.d/50-scz-smm.conf"]
    bundle = node.root / "run/containers/storage/overlay-containers/c1/userdata"
    bundle.mkdir(parents=True)
    (bundle / "config.json").write_text(launcher)
    assert "still need the files" in one_pass(node, images[0], uninstall=True).status
    shutil.rmtree(bundle)
    assert one_pass(node, images[0], uninstall=True).ready
    assert node.files() == {}
    assert node.folders() == {"/opt/scz-smm", "/etc/scz-smm", "/etc/crio"}
