"""containerd environments of their own for the tests: `ctr` and CRI, with handlers that run programs of the test's.

Each `Containerd` keeps root, state, socket, configuration and the runtimes' state below one directory and reads nothing
of the machine's containerd. The configuration has version 2, which 1.6, 1.7 and 2.x all read. What a host's would have
too is marked in `_configuration`; the rest fits it to a directory of its own and to the machine (see `tests/engines.py`
for what machines need: a mount namespace for crun, overlay or plain directories).

    with Containerd(folder, handlers={"scz-runc": shim}) as containerd:
        containerd.ctr("run", …)
        CriClient(containerd.socket)   # tests/cri.py

Pods have the host's network: no CNI plugin is called. Images are imported from archives, also the one of the sandboxes.
At the end everything goes, also after a failure: containers, shims, mounts, cgroups, sockets, files, found by this
directory and by names made from it. Needs Linux, root, containerd (1.6 of Debian 12, or later), busybox-static.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from tests.engines import (
    BUSYBOX_IMAGE,
    SYSTEM_PATH,
    EngineError,
    RuntimeNamespace,
    remove_cgroups,
    storage_driver,
    unmount_below,
    write_busybox,
)

__all__ = ["PAUSE_IMAGE", "Containerd", "EngineError", "write_shim"]

PAUSE_IMAGE = "localhost/pause:test"
CRI_NAMESPACE = "k8s.io"
_COMMAND_SECONDS = 120
_START_SECONDS = 30
_END_SECONDS = 10
_MARK = "made-by-scz-smm-tests"  # only a directory with this file is ever removed
_LAYER = "application/vnd.oci.image.layer.v1.tar"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"


class Containerd:
    """One containerd; a context manager that takes away all that it made at its end.

    Args:
        directory: Everything is kept here; a new directory with a short path (sockets lie in it), removed by `stop`.
            Left-overs of an environment that died here are taken away first; anything else there is an error.
        handlers: CRI's runtime handlers, each with the program that takes the place of runc (`BinaryName`).
        programs: The folder with `containerd`, `ctr` and `containerd-shim-runc-v2`.
        cdi_directories: Where CDI files are looked for, by the versions that know CDI; none: no CDI.
        pod_annotations: The annotations of a pod that every handler hands on.
        handler_settings: What else a handler has.
        nri: NRI's settings, with its socket at `nri_socket` and no plugins of the machine's; None: no NRI. From 1.7 on.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        handlers: Mapping[str, Path],
        programs: Path = Path("/usr/bin"),
        cdi_directories: Sequence[Path] = (),
        nri: Mapping[str, object] | None = None,
        pod_annotations: Sequence[str] = ("smm.scz/*",),
        handler_settings: Mapping[str, Mapping[str, object]] = {},
    ) -> None:
        self.directory = Path(directory).resolve()
        self.handlers = dict(handlers)
        self.programs = programs
        self.cdi_directories = list(cdi_directories)
        self.nri = None if nri is None else dict(nri)
        self.pod_annotations = list(pod_annotations)
        self.handler_settings = handler_settings
        self.namespace = RuntimeNamespace()
        self.socket, self.nri_socket = self.directory / "sock", self.directory / "nri.sock"
        self.log = self.directory / "containerd.log"
        self.snapshotter = ""
        # From the directory, so that what a dead environment left is found again.
        self.cgroup = f"scz-containerd-{hashlib.sha256(os.fsencode(self.directory)).hexdigest()[:12]}"
        self._process: subprocess.Popen[bytes] | None = None

    # --- what tests ask -----------------------------------------------------------------------------------------------

    @property
    def environment(self) -> dict[str, str]:
        """The environment of containerd and of every `ctr`; containerd finds its shim by PATH."""
        return {"PATH": f"{self.programs}:{SYSTEM_PATH}", "LC_ALL": "C.UTF-8", "HOME": str(self.directory)}

    @property
    def version(self) -> tuple[int, int]:
        """Major and minor version."""
        done = subprocess.run([self.programs / "containerd", "--version"], capture_output=True, text=True, check=True)
        found = re.search(r" v?(\d+)\.(\d+)\.", done.stdout)
        assert found is not None, done.stdout
        return int(found[1]), int(found[2])

    def command(self, *args: str, namespace: str = "default") -> list[str]:
        """The whole command line of `ctr ARGS` in this environment."""
        client = [str(self.programs / "ctr"), "--address", str(self.socket), "--namespace", namespace]
        return [*self.namespace.prefix, *client, *args]

    def ctr(
        self,
        *args: str,
        namespace: str = "default",
        check: bool = True,
        timeout_seconds: float = _COMMAND_SECONDS,
    ) -> subprocess.CompletedProcess[str]:
        """Any `ctr` command.

        Raises:
            EngineError: It failed, and `check` is set, or it took too long.
        """
        try:
            done = subprocess.run(
                self.command(*args, namespace=namespace),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=timeout_seconds,
            )
        except subprocess.TimeoutExpired as cause:
            raise EngineError(f"ctr {' '.join(args)}: no end after {timeout_seconds} s") from cause
        if check and done.returncode != 0:
            raise EngineError(f"ctr {' '.join(args)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def run_options(self, name: str, *, runtime: Path, namespace: str = "default") -> list[str]:
        """The options of `ctr run` that keep a container inside this environment, with `runtime` as its OCI runtime."""
        root, fifos = self.directory / "runc", self.directory / "fifo"
        options = [f"--snapshotter={self.snapshotter}", f"--runc-binary={runtime}", f"--runc-root={root}"]
        return [*options, f"--fifo-dir={fifos}", f"--cgroup=/{self.cgroup}/{namespace}-{name}"]

    def busybox_image(self, namespace: str = "default") -> str:
        """An image of /bin/busybox with its applets and nothing else, in a namespace of containerd's."""
        self._import(BUSYBOX_IMAGE, ["/bin/sh"], namespace)
        return BUSYBOX_IMAGE

    # --- starting and stopping ----------------------------------------------------------------------------------------

    def start(self) -> Containerd:
        """Write the configuration, start containerd and wait until it answers."""
        if self._process is not None:
            return self
        self._take_away()
        self.directory.mkdir(mode=0o711, parents=True)
        (self.directory / _MARK).touch()
        for folder in ("state", "opt", "cni", "fifo", "runc", "temp"):
            (self.directory / folder).mkdir(mode=0o711)
        self.snapshotter = {"overlay": "overlayfs", "vfs": "native"}[storage_driver(self.directory)]
        (self.directory / "config.toml").write_text(self._configuration())
        self.namespace.start()
        atexit.register(self.stop)
        try:
            self._run()
            self._import(PAUSE_IMAGE, ["/bin/sleep", "2147483647"], CRI_NAMESPACE)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Take everything away; harmless when nothing is there."""
        atexit.unregister(self.stop)
        try:
            self._take_away()
        finally:
            self._process = None
            self.namespace.stop()

    def __enter__(self) -> Containerd:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def restart(self) -> None:
        """End containerd and start it again with its settings as they are now; containers and their shims live on."""
        assert self._process is not None
        self._process.terminate()
        self._process.wait(_END_SECONDS)
        (self.directory / "config.toml").write_text(self._configuration())
        self._run()

    def _run(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self.namespace.prefix, self.programs / "containerd", "--config", self.directory / "config.toml"],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _START_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
                client.connect(str(self.socket))
                self.ctr("version", timeout_seconds=_START_SECONDS)
                return
            time.sleep(0.05)
        raise EngineError(f"containerd does not start:\n{self.log.read_text()[-4000:]}")

    def _import(self, tag: str, command: Sequence[str], namespace: str) -> None:
        archive = self.directory / "temp" / "image.tar"
        with archive.open("wb") as stream:
            _write_oci_archive(stream, tag, command)
        # From 1.7 on `ctr` can let the daemon import; this is the client's own way, the one that 1.6 has, too.
        local = ["--local"] if self.version >= (2, 0) else []
        self.ctr("images", "import", *local, f"--snapshotter={self.snapshotter}", str(archive), namespace=namespace)
        archive.unlink()

    def _configuration(self) -> str:
        """config.toml. A host needs the handlers with `BinaryName` and `pod_annotations`, and with 1.7 `enable_cdi`."""
        place = str(self.directory)
        cri: dict[str, object] = {
            "sandbox_image": PAUSE_IMAGE,
            "restrict_oom_score_adj": True,  # a machine without CAP_SYS_RESOURCE cannot lower it
            "disable_apparmor": True,
            "enable_cdi": bool(self.cdi_directories),
            "cdi_spec_dirs": [str(folder) for folder in self.cdi_directories],
        }
        tables: dict[str, Mapping[str, object]] = {
            "grpc": {"address": str(self.socket)},
            'plugins."io.containerd.internal.v1.opt"': {"path": f"{place}/opt"},
            'plugins."io.containerd.nri.v1.nri"': self._nri_settings(),
            'plugins."io.containerd.grpc.v1.cri"': cri,
            'plugins."io.containerd.grpc.v1.cri".cni': {"bin_dir": f"{place}/cni", "conf_dir": f"{place}/cni"},
            'plugins."io.containerd.grpc.v1.cri".containerd': {
                "snapshotter": self.snapshotter,
                "default_runtime_name": next(iter(self.handlers)),
            },
        }
        for name, program in self.handlers.items():
            table = f'plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{name}'
            tables[table] = {"runtime_type": "io.containerd.runc.v2", "pod_annotations": self.pod_annotations}
            tables[table] = {**tables[table], **self.handler_settings.get(name, {})}
            tables[f"{table}.options"] = {"BinaryName": str(program), "Root": f"{place}/runc"}
        top = {"version": 2, "root": f"{place}/root", "state": f"{place}/state", "temp": f"{place}/temp"}
        return _lines(top) + "".join(f"[{name}]\n{_lines(values)}" for name, values in tables.items())

    def _nri_settings(self) -> Mapping[str, object]:
        if self.nri is None:
            return {"disable": True}  # its socket would be the machine's
        paths = {name: f"{self.directory}/nri/{name}" for name in ("plugin_path", "plugin_config_path")}
        return {"disable": False, "socket_path": str(self.nri_socket), **paths, **self.nri}

    # --- taking away --------------------------------------------------------------------------------------------------

    def _take_away(self) -> None:
        """Containers, shims and containerd itself, then mounts, cgroups, sockets and files."""
        if self.directory.exists() and not (self.directory / _MARK).exists():
            raise EngineError(f"{self.directory} is not an environment of these tests")
        sockets = self._shim_sockets()
        if self._process is not None:
            self._process.terminate()  # containers and shims live on, so that nothing starts a new one
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_SECONDS)
        self._end_processes()
        unmount_below(self.directory)
        remove_cgroups(self.cgroup)
        for path in sockets:
            path.unlink(missing_ok=True)
        if self.directory.exists():
            shutil.rmtree(self.directory)

    def _shim_sockets(self) -> list[Path]:
        """The sockets of live shims: they lie in /run/containerd/s, whatever the configuration says."""
        found = set()
        for file in self.directory.glob("state/io.containerd.runtime.v2.task/*/*/*"):
            if file.name in ("address", "bootstrap.json"):
                found |= set(re.findall(r"unix://(/run/containerd/s/[0-9a-f]+)", file.read_text()))
        return [Path(path) for path in found]

    def _owned_processes(self) -> list[int]:
        """All with this directory in their arguments, and all in this environment's cgroups."""
        place, found = os.fsencode(f"{self.directory}/"), []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if place in (folder / "cmdline").read_bytes() or f":/{self.cgroup}/" in (folder / "cgroup").read_text():
                    found.append(int(folder.name))
        return [pid for pid in found if pid != os.getpid()]

    def _end_processes(self) -> None:
        deadline = time.monotonic() + _END_SECONDS
        while left := self._owned_processes():
            if time.monotonic() > deadline:
                raise EngineError(f"processes of {self.directory} do not end: {left}")
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if self._process is not None:
                self._process.poll()
            time.sleep(0.02)


def write_shim(path: Path, runtime: Path, config: Path) -> Path:
    """The installed package's shim in front of a runtime, as `sczctl install` writes it; returns its path."""
    words = {"runtime": str(runtime), "engine": "containerd", "config_file": str(config)}
    code = f"import sys; from oci_hook.shim import shim_script; sys.stdout.buffer.write(shim_script(**{words!r}))"
    # -I: without the folder of the tests, which has the sources, but not what they import.
    path.write_bytes(subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, check=True).stdout)
    path.chmod(0o755)
    return path


def _lines(values: Mapping[str, object]) -> str:
    """Keys and values of TOML; JSON's strings, numbers, truth values and lists of strings are TOML's."""
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def _write_oci_archive(stream: IO[bytes], tag: str, command: Sequence[str]) -> None:
    """An OCI image layout in a tar archive: busybox, as one layer (image-spec, "Image Layout")."""
    layer = io.BytesIO()
    write_busybox(layer)
    blobs: dict[str, bytes] = {}

    def add(data: bytes, media_type: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = data
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    tar = add(layer.getvalue(), _LAYER)
    config = {
        "architecture": "amd64" if os.uname().machine == "x86_64" else "arm64",
        "os": "linux",
        "config": {"Cmd": list(command), "Env": [f"PATH={SYSTEM_PATH}"]},
        "rootfs": {"type": "layers", "diff_ids": [tar["digest"]]},
    }
    image = add(json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json")
    manifest = {"schemaVersion": 2, "mediaType": _MANIFEST, "config": image, "layers": [tar]}
    entry = add(json.dumps(manifest).encode(), _MANIFEST)
    entry["annotations"] = {"io.containerd.image.name": tag, "org.opencontainers.image.ref.name": tag}
    index = {"schemaVersion": 2, "manifests": [entry]}
    blobs |= {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": json.dumps(index).encode()}
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in blobs.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
