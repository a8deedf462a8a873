"""Other programs that decrypt files, from their Debian packages: the same plaintext into the same kind of tmpfs.

It is one file: of a model of several shards, as much as one of them. Each encrypts the plaintext once, untimed, and
then takes turns with ours. Options are those of its manual for a large file that does not compress. One that is not
installed is a line that says so. `packaging/prepare-host bench` installs all of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oci_hook.linux import mounts
from tests.bench.hot_path import Work, memory, run_into
from tests.bench.rows import Row, failed, make_row, sized
from tests.bench.timing import take_turns
from tests.bench.workspace import Workspace, touch_memory, warm

PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_PASSWORD = "correct horse battery staple"
_SPARE_BYTES = 64 << 20
_MOUNT_SECONDS = 20


@dataclass(frozen=True, slots=True)
class Peer:
    """A program.

    Attributes:
        name: As its package's.
        programs: What has to be there.
        checks: Whether it authenticates what it writes, and by what.
        prepare: Encrypts a file below a folder; its value is the command that decrypts, `{}` being the destination.
        note: What a reader has to know.
    """

    name: str
    programs: tuple[str, ...]
    checks: str
    prepare: Callable[[Path, Path, ExitStack], list[str]]
    note: str = ""

    @property
    def key(self) -> str:
        """Of its row."""
        return "peers." + self.name.split(",")[0].replace(" ", "-")


def _run(*words: str | Path, cwd: Path | None = None, given: str | None = None) -> str:
    environment = {"PATH": PATH, "LC_ALL": "C.UTF-8", "HOME": str(cwd or "/nonexistent")}
    done = subprocess.run(
        [str(word) for word in words],
        env=environment,
        cwd=cwd,
        input=given,
        stdin=subprocess.DEVNULL if given is None else None,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{words[0]} ended with {done.returncode}: {done.stderr[-800:]}")
    return done.stdout


def _openssl(plain: Path, folder: Path, _stack: ExitStack) -> list[str]:
    (folder / "password").write_text(_PASSWORD)
    common = ["-aes-256-ctr", "-pbkdf2", "-pass", f"file:{folder / 'password'}"]
    _run("openssl", "enc", *common, "-in", plain, "-out", folder / "sealed")
    return ["openssl", "enc", "-d", *common, "-in", str(folder / "sealed"), "-out", "{}/out"]


def _gpg(plain: Path, folder: Path, stack: ExitStack) -> list[str]:
    home = folder / "home"
    home.mkdir(mode=0o700)
    (folder / "password").write_text(_PASSWORD)
    common = ["gpg", "--homedir", str(home), "--batch", "--no-tty", "--quiet", "--pinentry-mode", "loopback"]
    common += ["--passphrase-file", str(folder / "password")]
    stack.callback(_run, "gpgconf", "--homedir", home, "--kill", "gpg-agent")
    sealing = ["--symmetric", "--cipher-algo", "AES256", "--compress-algo", "none"]
    _run(*common, *sealing, "--output", folder / "sealed", plain)
    return [*common, "--output", "{}/out", "--decrypt", str(folder / "sealed")]


def _age(plain: Path, folder: Path, _stack: ExitStack) -> list[str]:
    _run("age-keygen", "-o", folder / "key")
    recipient = _run("age-keygen", "-y", folder / "key").strip()
    _run("age", "--recipient", recipient, "--output", folder / "sealed", plain)
    return ["age", "--decrypt", "--identity", str(folder / "key"), "--output", "{}/out", str(folder / "sealed")]


def _seven_zip(plain: Path, folder: Path, _stack: ExitStack) -> list[str]:
    program = "7zz" if shutil.which("7zz", path=PATH) else "7z"
    _run(program, "a", "-mx=0", f"-p{_PASSWORD}", "-bd", folder / "sealed.7z", plain)
    return [program, "x", f"-p{_PASSWORD}", "-bd", "-y", "-o{}", str(folder / "sealed.7z")]


def _gocryptfs(plain: Path, folder: Path, stack: ExitStack) -> list[str]:
    """Read through its FUSE mount, which is in a mount namespace of its own and ends with its process."""
    sealed, shown, password = folder / "sealed", folder / "shown", folder / "password"
    for directory in (sealed, shown):
        directory.mkdir()
    password.write_text(_PASSWORD)
    common = ["gocryptfs", "-quiet", "-passfile", str(password)]
    _run(*common, "-init", sealed, cwd=folder)
    command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private", "--"]
    environment = {"PATH": PATH, "HOME": str(folder)}
    command += [*common, "-fg", str(sealed), str(shown)]
    daemon = stack.enter_context(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL))
    stack.callback(daemon.kill)
    entering = ["nsenter", f"--mount=/proc/{daemon.pid}/ns/mnt", "--"]
    deadline = time.monotonic() + _MOUNT_SECONDS
    while subprocess.run([*entering, "mountpoint", "-q", str(shown)], check=False).returncode != 0:
        if daemon.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("gocryptfs did not mount")
        time.sleep(0.05)
    _run(*entering, "cp", plain, shown / "file")
    return [*entering, "cp", str(shown / "file"), "{}/out"]


def _skopeo(plain: Path, folder: Path, _stack: ExitStack) -> list[str]:
    """A layer of an image, encrypted by ocicrypt; without compression on either way."""
    key, public = folder / "key.pem", folder / "public.pem"
    _run("openssl", "genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", key)
    _run("openssl", "pkey", "-in", key, "-pubout", "-out", public)
    root = folder / "image"
    root.mkdir()
    _run("tar", "--create", "--file", root / "layer.tar", "--directory", plain.parent, plain.name)
    _write_image(root)
    common = ["skopeo", "--insecure-policy", "--tmpdir", str(folder), "copy", "--quiet"]
    common += ["--dest-oci-accept-uncompressed-layers"]
    _run(*common, "--encryption-key", f"jwe:{public}", f"oci:{root}:m", f"oci:{folder / 'sealed'}:m", cwd=folder)
    shutil.rmtree(root)
    return [*common, "--decryption-key", str(key), f"oci:{folder / 'sealed'}:m", "oci:{}/out:m"]


def _write_image(root: Path) -> None:
    """An OCI layout of the one layer `layer.tar`."""
    blobs = root / "blobs/sha256"
    blobs.mkdir(parents=True)
    with (root / "layer.tar").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    size = (root / "layer.tar").stat().st_size
    (root / "layer.tar").rename(blobs / digest)

    def blob(document: object, media_type: str) -> dict[str, object]:
        data = json.dumps(document).encode()
        name = hashlib.sha256(data).hexdigest()
        (blobs / name).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{name}", "size": len(data)}

    kinds = "application/vnd.oci.image."
    layer = {"mediaType": f"{kinds}layer.v1.tar", "digest": f"sha256:{digest}", "size": size}
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]}}
    manifest = {"schemaVersion": 2, "config": blob(config, f"{kinds}config.v1+json"), "layers": [layer]}
    index = blob(manifest, f"{kinds}manifest.v1+json") | {"annotations": {"org.opencontainers.image.ref.name": "m"}}
    (root / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [index]}))
    (root / "oci-layout").write_text(json.dumps({"imageLayoutVersion": "1.0.0"}))


PEERS = (
    Peer("openssl enc", ("openssl",), "no (AES-256-CTR)", _openssl, "it has no authenticated mode"),
    Peer("gpg", ("gpg", "gpgconf"), "SHA-1 (MDC), at the end", _gpg, "it writes before it knows"),
    Peer("age", ("age", "age-keygen"), "ChaCha20-Poly1305, every 64 KiB", _age),
    Peer("gocryptfs", ("gocryptfs", "nsenter"), "AES-256-GCM, every 4 KiB", _gocryptfs, "cp from its FUSE mount"),
    Peer("7z", ("7zz", "7z"), "CRC-32 (AES-256-CBC): no authentication", _seven_zip),
    Peer("skopeo, ocicrypt", ("skopeo", "openssl", "tar"), "HMAC-SHA-256 and digests", _skopeo, "one layer, a tar"),
)


def _missing(peer: Peer) -> str:
    found = [program for program in peer.programs if shutil.which(program, path=PATH)]
    if set(peer.programs) == {"7zz", "7z"}:  # either
        return "" if found else "not installed: 7zip"
    lacking = sorted(set(peer.programs) - set(found))
    return f"not installed: {', '.join(lacking)}" if lacking else ""


def measure(space: Workspace) -> list[Row]:
    """Row 11: the peers, each as many times ours, on the bytes of one file."""
    size = min(space.size, space.file_bytes)
    prefix = f"peers, {sized(size)}: "
    reasons = {peer.name: _missing(peer) for peer in PEERS}
    lacking = space.lacking(memory_bytes=4 * size, disk_bytes=10 * size)
    work = Work(space, size)
    with ExitStack() as stack:
        actions: dict[str, Callable[[], float]] = {}
        for peer in PEERS if not lacking else ():
            if not reasons[peer.name]:
                space.say(f"{peer.name}: encrypting {sized(size)}")
                try:
                    actions[peer.name] = stack.enter_context(_action(space, peer, size))
                except Exception as error:  # another version, a kernel without FUSE: said, not invented
                    reasons[peer.name] = failed(error)
        if actions:
            work.verify()
        os.sync()
        found = take_turns({"ours": work.decrypt, **actions}, space.rounds, space.say) if actions else {}
    if size != space.size:
        space.forget(size)
    rows = []
    for peer in PEERS:
        name, left_out = prefix + peer.name, lacking or reasons[peer.name]
        more: dict[str, Any] = {"size": size, "series": "peers", "checks": peer.checks, "note": peer.note}
        if left_out:
            rows.append(Row(peer.key, name, left_out=left_out, **more))
        else:
            against = "ours (AES-256-GCM, every segment)"
            rows.append(make_row(peer.key, name, found[peer.name], found["ours"], against=against, **more))
    return rows


@contextmanager
def _action(space: Workspace, peer: Peer, size: int) -> Iterator[Callable[[], float]]:
    """What times one decryption; it is tried once, and its result compared."""
    (plain,) = space.plain_folder(size).iterdir()  # ours decrypts all that is in there
    folder = space.folder / keyed(peer.name)
    folder.mkdir()
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        command = peer.prepare(plain, folder, stack)
        environment = {"PATH": PATH, "LC_ALL": "C.UTF-8", "HOME": str(folder)}

        def decrypt(*, compare: bool = False) -> float:
            warm(folder / "sealed")
            touch_memory(size)
            with memory(size + _SPARE_BYTES, 64, "within_size") as mount:
                took = run_into(mount, command, env=environment)
                if compare:
                    _compare(plain, mount)
                return took

        decrypt(compare=True)
        yield decrypt


def keyed(name: str) -> str:
    """A folder's name."""
    return name.replace(" ", "-").replace(",", "")


def _compare(plain: Path, mount: mounts.DetachedMount) -> None:
    """The plaintext lies in the file system, as it was or in a tar."""
    top = Path(f"/proc/self/fd/{mount.fd}")
    large = [path for path in top.rglob("*") if path.is_file() and path.stat().st_size >= plain.stat().st_size]
    if len(large) != 1:
        raise RuntimeError("it did not write the file")
    same = ["cmp", str(plain), "-"]
    if large[0].stat().st_size == plain.stat().st_size:
        same = ["cmp", str(plain), str(large[0])]
        done = subprocess.run(same, pass_fds=[mount.fd], capture_output=True, check=False)
    else:
        with subprocess.Popen(
            ["tar", "--extract", "--to-stdout", "--file", str(large[0])], pass_fds=[mount.fd], stdout=subprocess.PIPE
        ) as tar:
            done = subprocess.run(same, stdin=tar.stdout, capture_output=True, check=False)
    if done.returncode != 0:
        raise RuntimeError("it wrote something else")
