"""A node of Kubernetes as a directory, and the installer's DaemonSet run on it by podman, as a kubelet would.

What is mounted where comes from the rendered DaemonSet alone. The node's /usr holds Debian's own python3, its
standard library, the TSS libraries, runc and containerd, and what they are linked with; its other directories are what
the test puts there. The image is built by the project's Containerfile from a base made of this machine's files in the
place of debian:bookworm-slim, as no registry is asked. The API server is `ApiServer`: HTTPS, one node, and the policy
for the installer's account.
"""

from __future__ import annotations

import datetime
import http.server
import ipaddress
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import sysconfig
import tarfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.engines import SYSTEM_PATH, Podman
from tests.kubernetes import FOLDER, Manifest, Policy, Request, manifests, one, rendered

BASE_IMAGE = "docker.io/library/debian:bookworm-slim"
NODE_NAME = "n1"
ACCOUNT = "system:serviceaccount:scz-smm:scz-smm-installer"
#: Of Debian's essential packages.
_BASE_PROGRAMS = (
    "sh",
    "cp",
    "mv",
    "rm",
    "rmdir",
    "mkdir",
    "ln",
    "cat",
    "chmod",
    "chown",
    "sha256sum",
    "sync",
    "sleep",
    "find",
    "sort",
    "xargs",
    "cut",
    "sed",
    "grep",
    "flock",
    "dpkg-deb",
    "tar",
    "touch",
    "cmp",
    "tail",
    "head",
    "env",
    "chroot",
    "basename",
    "dirname",
    "test",
)
_LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "tkinter",
    "ensurepip",
    "lib2to3",
    "__pycache__",
}
_LINKS = ("bin", "lib", "lib64", "sbin")
_MODULES = (
    "oci_hook",
    "cryptography",
    "cffi",
    "tpm2_pytss",
    "jose",
    "psutil",
    "click",
    "ecdsa",
    "pyasn1",
    "rsa",
    "six.py",
    "packaging",
    "pycparser",
    "typing_extensions.py",
)


# --- directories ------------------------------------------------------------------------------------------------------


def _place(source: Path, root: Path, path: Path | None = None) -> None:
    """The file at its own path below a root; a link where that can be, as nothing writes there."""
    target = root / str(path or source.parent.resolve() / source.name).lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        shutil.copy2(source.resolve(), target)


def _libraries(programs: Iterable[Path]) -> set[Path]:
    listed = subprocess.run(
        ["/usr/bin/ldd", *map(str, programs)], env={"LC_ALL": "C"}, capture_output=True, text=True, check=False
    )
    return {Path(name) for name in re.findall(r"(?:=> |^\s+)(/\S+) \(0x", listed.stdout, re.MULTILINE)}


def _place_programs(root: Path, programs: Iterable[Path]) -> None:
    programs = list(programs)
    for path in [*programs, *_libraries(programs)]:
        _place(path, root)


def _found(name: str) -> Path:
    path = shutil.which(name, path=SYSTEM_PATH)
    assert path is not None, name
    return Path(path)


def make_base(root: Path) -> None:
    """What the installer needs of a slim Debian."""
    for name in (
        "dev",
        "etc",
        "proc",
        "root",
        "run",
        "sys",
        "tmp",
        "opt",
        "usr/bin",
        "usr/lib",
        "usr/lib64",
        "usr/sbin",
    ):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in _LINKS:
        (root / name).symlink_to(f"usr/{name}")
    _place_programs(root, [_found(name) for name in _BASE_PROGRAMS])


def make_usr(usr: Path) -> None:
    """A node's /usr: Python, the TPM's libraries, runc and containerd."""
    root = usr.parent
    python = Path("/usr/bin/python3").resolve()
    library = Path(f"/usr/lib/{python.name}")
    extensions = list((library / "lib-dynload").glob("*.so"))
    tss = [path for path in Path("/usr/lib").glob("*/libtss2-*.so.*") if path.name.count(".") == 2]
    site = Path(sysconfig.get_path("platlib"))
    bundled = [path for name in ("cryptography", "psutil", "tpm2_pytss") for path in (site / name).rglob("*.so")]
    bundled += site.glob("_cffi_backend*.so")
    outside = [path for path in _libraries(bundled) if not path.is_relative_to(sys.prefix)]
    _place_programs(root, [python, _found("runc"), _found("containerd"), *extensions, *tss, *outside])
    (usr / "bin").mkdir(exist_ok=True)
    (usr / "bin/python3").symlink_to(python.name)
    for folder, folders, files in os.walk(library):
        folders[:] = [name for name in folders if name not in _LEFT_OUT and not name.startswith("config-")]
        for name in files:
            if name.endswith(".py"):
                _place(Path(folder) / name, root)


def _make_tree(tree: Path) -> None:
    """The one directory of the package that the Containerfile takes, from the virtual environment that runs this."""
    private, site = tree / "usr/lib/scz-smm", Path(sysconfig.get_path("platlib"))
    private.mkdir(parents=True)
    (tree / "DEBIAN").mkdir()
    for name in [*_MODULES, *(path.name for path in site.glob("_cffi_backend*.so"))]:
        source = site / name
        if source.is_dir():
            shutil.copytree(source, private / name, ignore=shutil.ignore_patterns("__pycache__", "tests"))
        elif source.exists():
            shutil.copy2(source, private / name)


def _make_deb(tree: Path, version: str, deb: Path) -> None:
    """A package of it, with bytecode; every version has one line of its own."""
    module = tree / "usr/lib/scz-smm/oci_hook/__init__.py"
    module.write_text(module.read_text() + f"# built as {version}\n")
    compiles = ["/usr/bin/python3", "-I", "-m", "compileall", "-q", tree / "usr/lib/scz-smm"]
    subprocess.run(compiles, check=True, capture_output=True)
    fields = {"Package": "scz-smm", "Version": version, "Architecture": "all", "Description": "for tests"}
    control = "".join(f"{key}: {text}\n" for key, text in {**fields, "Maintainer": "Tests <tests@localhost>"}.items())
    (tree / "DEBIAN/control").write_text(control)
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Znone", "--build", tree, deb], check=True, capture_output=True)


def build_images(podman: Podman, folder: Path, versions: Sequence[str]) -> list[str]:
    """The installer's image of each version, by the project's Containerfile. Returns the tags."""
    base, tree, context = (folder / name for name in ("base", "tree", "context"))
    make_base(base)

    def write(stream: IO[bytes]) -> None:
        with tarfile.open(fileobj=stream, mode="w|") as archive:
            archive.add(base, arcname=".")

    podman.import_image(write, BASE_IMAGE, changes=[f"ENV PATH={SYSTEM_PATH}"])
    _make_tree(tree)
    tags = []
    for version in versions:
        context.mkdir()
        deb = context / f"scz-smm_{version}.deb"
        _make_deb(tree, version, deb)
        tags.append(f"localhost/scz-smm-installer:{version}")
        policy = f"--signature-policy={podman.directory}/policy.json"
        words = ["--isolation=chroot", "--pull=never", policy, f"--build-arg=DEB={deb.name}"]
        podman.call("build", *words, f"--file={FOLDER / 'Containerfile'}", f"--tag={tags[-1]}", str(context))
        shutil.rmtree(context)
    return tags


# --- the API server ---------------------------------------------------------------------------------------------------


class ApiServer:
    """One node, which the installer's account may patch as its policy says; a context manager."""

    def __init__(self, folder: Path) -> None:
        self.node: Manifest = {"kind": "Node", "metadata": {"name": NODE_NAME, "labels": {"zone": "a"}}, "spec": {}}
        self.account = folder / "account"
        self.refuses = False
        self._policy = Policy(manifests("base/access.yaml"), "scz-smm-installer")
        self._key = folder / "key.pem"
        self.account.mkdir()
        (self.account / "token").write_text("the-installer's-token\n")
        self._make_certificate()

    def _make_certificate(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "api")])
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        builder = builder.serial_number(1).not_valid_before(now - datetime.timedelta(days=1))
        builder = builder.not_valid_after(now + datetime.timedelta(days=1))
        place = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        certificate = builder.add_extension(place, critical=False).sign(key, hashes.SHA256())
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        form, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        (self.account / "ca.crt").write_bytes(pem)
        self._key.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, none) + pem)

    @property
    def labels(self) -> dict[str, str]:
        """Ours, of the node."""
        return {key: text for key, text in self.node["metadata"]["labels"].items() if key.startswith("smm.scz/")}

    def patch(self, path: str, headers: Mapping[str, str], body: bytes) -> int:
        """The HTTP status of a merge patch."""
        if headers.get("Authorization") != "Bearer the-installer's-token":
            return 401
        if path != f"/api/v1/nodes/{NODE_NAME}" or headers.get("Content-Type") != "application/merge-patch+json":
            return 404
        extra = {"authentication.kubernetes.io/node-name": [NODE_NAME]}
        node = _merged(self.node, json.loads(body))
        asked = Request(node, self.node, "UPDATE", user=ACCOUNT, extra=extra, resource=("", "nodes"))
        if self.refuses or self._policy.refusals(asked):
            return 403
        self.node = node
        return 200

    def __enter__(self) -> ApiServer:
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_PATCH(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(outer.patch(self.path, dict(self.headers), body))
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_words: object) -> None:
                """Nothing: the test looks at the node."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._key)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _merged(old: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merged(merged.get(key), value)
    return merged


# --- the node ---------------------------------------------------------------------------------------------------------


class Node:
    """A node below a directory.

    Args:
        root: Its root; `usr` is there already.
        api: Its API server.
        podman: What runs the installer.
        engine: `containerd` or `cri-o`: also the folder below config/kubernetes.
    """

    def __init__(self, root: Path, api: ApiServer, podman: Podman, *, engine: str = "containerd") -> None:
        self.root, self.api, self.podman, self.engine = root, api, podman, engine
        self.socket = root / ("run/containerd/containerd.sock" if engine == "containerd" else "run/crio/crio.sock")
        for name in ("etc", "opt", "run", "dev", "run/containers/storage/overlay-containers"):
            (root / name).mkdir(parents=True, exist_ok=True)
        os.mknod(root / "dev/null", 0o20666, os.makedev(1, 3))
        self.socket.parent.mkdir()
        self.restart_engine()

    def restart_engine(self) -> None:
        """As far as the installer sees it: the engine makes its socket anew."""
        self.socket.unlink(missing_ok=True)
        here = os.open(self.socket.parent, os.O_PATH)
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(f"/proc/self/fd/{here}/{self.socket.name}")  # a short path for a long one
        finally:
            os.close(here)

    def files(self) -> dict[str, bytes]:
        """Every file of the node that an installer may change, by its path."""
        found = {}
        for top in ("etc", "opt", "usr/local"):
            for path in sorted((self.root / top).rglob("*")):
                if path.is_file() and "__pycache__" not in path.parts:
                    found["/" + str(path.relative_to(self.root))] = path.read_bytes()
        return found

    def folders(self) -> set[str]:
        """Every directory there."""
        tops = [self.root / top for top in ("etc", "opt", "usr/local")]
        return {"/" + str(path.relative_to(self.root)) for top in tops for path in top.rglob("*") if path.is_dir()}

    def arguments(self, state: Path, *, uninstall: bool = False) -> tuple[list[str], list[str]]:
        """podman's options, and the container's command, for the DaemonSet's pod."""
        found = rendered(f"uninstall/{self.engine}" if uninstall else self.engine)
        spec = one(found, "DaemonSet", "scz-smm-installer")["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        volumes = {each["name"]: each for each in spec["volumes"]}
        options = [word for mount in container["volumeMounts"] for word in self._mount(mount, volumes, found, state)]
        environment = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(self.api.port)}
        for each in container["env"]:
            if "value" not in each:
                assert each["valueFrom"] == {"fieldRef": {"fieldPath": "spec.nodeName"}}
            environment[each["name"]] = each.get("value", NODE_NAME)
        options += [f"--env={name}={value}" for name, value in environment.items()]
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"]
        assert not context["privileged"]
        assert not context["allowPrivilegeEscalation"]
        options += ["--read-only", "--read-only-tmpfs=false", "--security-opt=no-new-privileges"]
        options += [f"--user={context['runAsUser']}:{context['runAsGroup']}"]
        options += [f"--cap-drop={name}" for name in context["capabilities"]["drop"]]
        options += [f"--cap-add={name}" for name in context["capabilities"]["add"]]
        program, *words = [*container["command"], *container["args"]]
        return [*options, f"--entrypoint={program}"], words

    def _mount(self, mount: Manifest, volumes: Manifest, found: Sequence[Manifest], state: Path) -> list[str]:
        volume = volumes[mount["name"]]
        if "hostPath" in volume:
            source, kind = self.root / volume["hostPath"]["path"].lstrip("/"), volume["hostPath"]["type"]
            if kind == "DirectoryOrCreate":
                source.mkdir(mode=0o755, parents=True, exist_ok=True)
            assert source.is_char_device() if kind == "CharDevice" else source.is_dir(), f"{source}: no {kind}"
        elif "configMap" in volume:
            source = state.parent / "scripts"
            source.mkdir(exist_ok=True)
            for name, text in one(found, "ConfigMap", volume["configMap"]["name"])["data"].items():
                (source / name).write_text(text)
        elif "emptyDir" in volume:
            source = state
        else:
            named = {key for each in volume["projected"]["sources"] for key in each}
            assert named == {"serviceAccountToken", "configMap"}
            source = self.api.account
        return ["--volume", f"{source}:{mount['mountPath']}{':ro' if mount.get('readOnly') else ''}"]
