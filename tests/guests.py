"""Small virtual machines for the tests: QEMU without KVM, Debian's own kernel, an initramfs of busybox.

A `Guest` boots in some seconds under software emulation, so it needs no /dev/kvm, and says on its serial console what
its script found. The script is `/main` of the folder that `write_initramfs` is given; its last line on the console is
``guest: ended N``, with the script's exit code.

The kernel is that of Debian's `linux-image-amd64` (the cloud flavour has no 9p), of the suite that the machine runs;
it is downloaded and unpacked, not installed. Modules come with those they depend on, which their own `.modinfo` tells.

What it does not do: networks, disks, KVM, more than one processor.
Needs qemu-system-x86, busybox-static, apt and a Debian mirror, dpkg, tar, util-linux; for firmware ovmf; for virtio-fs
the virtiofsd of qemu-system-common (Debian 12) or of the package virtiofsd (13).
Specification: Linux Documentation/driver-api/early-userspace/buffer-format.rst ("newc"), man 5 modules.dep.
"""

from __future__ import annotations

import contextlib
import lzma
import os
import re
import selectors
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

#: What a guest needs to see 9p and virtio-fs shares.
SHARE_MODULES = ("virtio_pci", "9pnet_virtio", "9p", "virtiofs")
#: The last line of a guest's console.
ENDED = re.compile(r"^guest: ended (\d+)$")

_PACKAGE = "linux-image-amd64"
_BUSYBOX = Path("/bin/busybox")
_VIRTIOFSD = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd")
_FIRMWARE, _VARIABLES = Path("/usr/share/OVMF/OVMF_CODE_4M.fd"), Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
_APT_SECONDS = 600
_APT_DOWNLOAD = ("apt-get", "-o", "APT::Sandbox::User=root", "-qq", "download")
_XZ = b"\xfd7zXZ\0"
#: A boot takes about five seconds on an idle machine, and the tests' machines are not idle.
GUEST_SECONDS = 300
_SOCKET_SECONDS = 30
# Without no_timer_check a kernel looks whether its timer ticks, and panics where other work keeps QEMU from it.
_QUIET = (
    "console=ttyS0 quiet loglevel=1 panic=-1 nokaslr no_timer_check mitigations=off random.trust_cpu=on "
    "selinux=0 apparmor=0"
)
# The parts of the kernel's package that a guest may want modules of; the rest is 300 MB of drivers.
_UNPACKED = ("fs", "net/9p", "lib", "crypto", "arch", "drivers/virtio", "drivers/char", "drivers/block", "mm")

# busybox's own names are all there is; a script of the test takes over.
_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin HOME=/
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t securityfs securityfs /sys/kernel/security
for module in $(cat /lib/modules/order); do insmod "/lib/modules/$module" || echo "guest: no module $module"; done
/main
echo "guest: ended $?"
poweroff -f
"""


class GuestError(RuntimeError):
    """A guest could not be made, did not say what was awaited, or ended too early; the message has its console."""


# --- the kernel -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel of Debian's, unpacked.

    Attributes:
        release: What `uname -r` will say in the guest.
        image: The file for QEMU's ``-kernel``; it is a PE image for firmware, too.
        modules: Module files by name, with ``_`` for ``-``.
        builtin: The names of those that the kernel has in itself: which they are differs from suite to suite.
        plain: The kernel itself, out of `image`: without firmware it starts in half the time, as nothing is unpacked.
    """

    release: str
    image: Path
    modules: Mapping[str, Path]
    builtin: frozenset[str] = frozenset()
    plain: Path | None = None

    def closure(self, names: Sequence[str]) -> list[Path]:
        """The files of the modules and of what they depend on, in an order in which they can be loaded."""
        found: dict[str, Path] = {}

        def add(name: str) -> None:
            if name not in found and name not in self.builtin:
                if name not in self.modules:
                    raise GuestError(f"{self.release} has no module {name}, or not among those that are unpacked")
                for other in _depends(module_bytes(self.modules[name])):
                    add(other)
                found[name] = self.modules[name]

        for name in names:
            add(name.replace("-", "_"))
        return list(found.values())


def fetch_kernel(folder: Path) -> Kernel:
    """Download the kernel that `linux-image-amd64` of the machine's own suite depends on, and unpack it.

    Args:
        folder: Where to; a new folder, the caller's to remove.
    """
    folder.mkdir(parents=True)
    try:
        _download_kernel(folder)
    except GuestError:  # the machine has no package lists, or they are older than the mirror
        _run(folder, "apt-get", "-qq", "update")
        _download_kernel(folder)
    (archive,) = folder.glob("linux-image-*.deb")
    wanted = ["./boot/vmlinuz-*", "*/modules.builtin", *(f"*/kernel/{part}/*" for part in _UNPACKED)]
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE, env=_ENVIRONMENT) as data:
        tar = ["tar", "--extract", "--no-same-owner", "--wildcards", f"--directory={folder}", *wanted]
        done = subprocess.run(tar, stdin=data.stdout, env=_ENVIRONMENT, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0 or data.returncode != 0:
        raise GuestError(f"{archive.name} cannot be unpacked: {done.stderr}")
    archive.unlink()
    (image,) = folder.glob("boot/vmlinuz-*")
    files = folder.glob("**/kernel/**/*.ko*")
    modules = {path.name.partition(".ko")[0].replace("-", "_"): path for path in files}
    (names,) = folder.glob("**/modules.builtin")
    builtin = frozenset(Path(line).stem.replace("-", "_") for line in names.read_text().splitlines())
    return Kernel(image.name.removeprefix("vmlinuz-"), image, modules, builtin, _unpack(image, folder / "vmlinux"))


def _download_kernel(folder: Path) -> None:
    found = re.search(r"Depends: (linux-image-\S+)", _run(folder, "apt-cache", "depends", "--important", _PACKAGE))
    if found is None:
        raise GuestError(f"{_PACKAGE} depends on no kernel")
    _run(folder, *_APT_DOWNLOAD, found[1])


def fetch_packages(folder: Path, *names: str) -> Path:
    """Download packages of the machine's own suite and unpack them, without what they depend on.

    Args:
        folder: Where to; a new folder, the caller's to remove.

    Returns:
        `folder`, with the packages' files below it.
    """
    folder.mkdir(parents=True)
    try:
        _run(folder, *_APT_DOWNLOAD, *names)
    except GuestError:
        _run(folder, "apt-get", "-qq", "update")
        _run(folder, *_APT_DOWNLOAD, *names)
    for archive in sorted(folder.glob("*.deb")):
        _run(folder, "dpkg-deb", "--extract", str(archive), str(folder))
        archive.unlink()
    return folder


def _unpack(image: Path, plain: Path) -> Path | None:
    """Write the ELF file that an image has in it, compressed by xz (x86/boot.rst, "payload"); None if it is another."""
    _, found, data = image.read_bytes().partition(_XZ)
    with contextlib.suppress(lzma.LZMAError):
        kernel = lzma.LZMADecompressor().decompress(found + data)
        if kernel.startswith(b"\x7fELF"):
            plain.write_bytes(kernel)
            return plain
    return None


def module_bytes(path: Path) -> bytes:
    """A module as the kernel loads it; Debian 13's files are compressed."""
    data = path.read_bytes()
    return lzma.decompress(data) if path.name.endswith(".xz") else data


def _depends(module: bytes) -> list[str]:
    """The names in the module's own `depends=`."""
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    return [name.replace("-", "_") for name in found[1].decode().split(",") if name] if found else []


def _run(folder: Path, *command: str) -> str:
    """A program's standard output; the machine's proxies are its only other environment."""
    proxies = {key: value for key, value in os.environ.items() if key.lower().endswith("_proxy")}
    done = subprocess.run(
        command,
        cwd=folder,
        env=_ENVIRONMENT | proxies,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=_APT_SECONDS,
    )
    if done.returncode != 0:
        raise GuestError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


# --- the initramfs ----------------------------------------------------------------------------------------------------


def write_initramfs(path: Path, folder: Path, kernel: Kernel, modules: Sequence[str] = SHARE_MODULES) -> Path:
    """Write an initramfs: busybox, modules, and a folder with the guest's script `/main`; the same bytes each time.

    Args:
        path: The file to write.
        folder: Its files, with their modes, go to the guest's root. A file `init` there takes the place of ours.
        kernel: What the modules are for.
        modules: Names; what they depend on is added.

    Returns:
        `path`.
    """
    with path.open("wb") as stream:
        archive = _Archive(stream)
        for name in ("bin", "dev", "lib", "lib/modules", "proc", "run", "sys", "tmp"):
            if not (folder / name).exists():
                archive.add(name, stat.S_IFDIR | 0o755)
        archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
        archive.add("bin/busybox", stat.S_IFREG | 0o755, _BUSYBOX.read_bytes())
        files = kernel.closure(modules)
        order = [file.name.partition(".ko")[0] + ".ko" for file in files]
        for file, name in zip(files, order, strict=True):
            archive.add(f"lib/modules/{name}", stat.S_IFREG | 0o644, module_bytes(file))
        archive.add("lib/modules/order", stat.S_IFREG | 0o644, "".join(f"{name}\n" for name in order).encode())
        archive.add("init", stat.S_IFREG | 0o755, _INIT.encode())
        archive.add_folder(folder)
        archive.end()
    return path


class _Archive:
    """A cpio archive in the format "newc"; a later entry takes the place of an earlier one of its name."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._inode = stream, 0

    def add(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        """One file, folder, link (`data` is where to) or device; root's, of the year 1970."""
        self._inode += 1
        encoded = os.fsencode(name) + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
        self._padded(b"070701" + b"".join(b"%08X" % field for field in fields) + encoded)
        self._padded(data)

    def add_folder(self, folder: Path) -> None:
        """All that lies below a folder."""
        for path in sorted(folder.rglob("*")):
            name, mode = str(path.relative_to(folder)), path.lstat().st_mode
            if stat.S_ISLNK(mode):
                self.add(name, mode, os.fsencode(os.readlink(path)))
            elif stat.S_ISREG(mode):
                self.add(name, mode, path.read_bytes())
            elif stat.S_ISDIR(mode):
                self.add(name, mode)

    def end(self) -> None:
        self.add("TRAILER!!!", 0)

    def _padded(self, data: bytes) -> None:
        self._stream.write(data + bytes(-len(data) % 4))


# --- shares -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Share:
    """A folder of the host that the guest can mount.

    Attributes:
        tag: What the guest calls it: ``mount -t 9p -o trans=virtio,version=9p2000.L TAG /place`` or
            ``mount -t virtiofs TAG /place``.
        folder: The folder.
        kind: ``9p`` or ``virtiofs``.
        options: More words for virtiofsd, or more options of QEMU's ``-fsdev``.
    """

    tag: str
    folder: Path
    kind: str
    options: tuple[str, ...] = ()


def virtiofsd() -> Path:
    """The machine's virtiofsd.

    Raises:
        GuestError: There is none.
    """
    for path in _VIRTIOFSD:
        if os.access(path, os.X_OK):
            return Path(path)
    raise GuestError(f"there is no virtiofsd: none of {', '.join(_VIRTIOFSD)}")


# --- the guest --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Machine:
    """What a guest is made of.

    Attributes:
        kernel: The kernel.
        initramfs: The file of `write_initramfs`.
        command_line: Words for the kernel, behind those that make it quiet.
        memory_mib: Its memory in MiB.
        shares: Folders of the host.
        firmware: Whether OVMF starts the kernel (and measures it, where there is a TPM), with variables of its own.
        tpm: The control socket of a swtpm that listens on no other one; none: no TPM.
        tpm_device: ``tpm-crb`` or ``tpm-tis``.
        options: More words for QEMU.
    """

    kernel: Kernel
    initramfs: Path
    command_line: str = ""
    memory_mib: int = 256
    shares: tuple[Share, ...] = ()
    firmware: bool = False
    tpm: Path | None = None
    tpm_device: str = "tpm-crb"
    options: tuple[str, ...] = ()


class Guest:
    """One running guest; a context manager that ends it, and its virtiofsd, also on failure.

    Args:
        machine: What it is made of.
        prefix: What goes in front of QEMU's and virtiofsd's command lines: `nsenter …`.
    """

    def __init__(self, machine: Machine, prefix: Sequence[str] = ()) -> None:
        self.machine, self._prefix = machine, tuple(prefix)
        self.console: list[str] = []
        self._stack = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self._pending = b""

    @property
    def pid(self) -> int:
        """QEMU's pid."""
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Guest:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def say(self, line: str) -> None:
        """Type a line on the guest's console; its script reads it with `read`."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def wait_for(self, pattern: str | re.Pattern[str], seconds: float = GUEST_SECONDS) -> re.Match[str]:
        """Read the console up to a line in which the pattern is found.

        Raises:
            GuestError: QEMU ended before, or it took too long.
        """
        for line in self._lines(time.monotonic() + seconds):
            if found := re.search(pattern, line):
                return found
        raise GuestError(f"the guest ended without a line like {pattern!r}\n{self._tail()}")

    def finish(self, seconds: float = GUEST_SECONDS) -> list[str]:
        """Wait until the guest has turned itself off; returns all lines of its console.

        Raises:
            GuestError: It did not, or its script failed.
        """
        for _ in self._lines(time.monotonic() + seconds):
            pass
        endings = [found[1] for line in self.console if (found := ENDED.match(line))]
        if endings != ["0"]:
            raise GuestError(f"the guest's script ended with {endings}\n{self._tail()}")
        return self.console

    # --- starting -----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        # A socket's path holds at most 107 bytes, and a test's own directory is often longer.
        place = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="scz-guest-", dir="/tmp")))
        self._errors = self._stack.enter_context((place / "errors").open("w+b"))
        self._process = self._spawn(self._command(place), pipes=True)

    def _command(self, place: Path) -> list[str]:
        machine = self.machine
        words = ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", f"{machine.memory_mib}M"]
        words += ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"]
        image = None if machine.firmware else machine.kernel.plain
        words += ["-kernel", str(image or machine.kernel.image), "-initrd", str(machine.initramfs)]
        words += ["-append", f"{_QUIET} {machine.command_line}".strip()]
        backed = ""
        for number, share in enumerate(machine.shares):
            if share.kind == "9p":
                options = ",".join(["security_model=none", "multidevs=remap", *share.options])
                words += ["-fsdev", f"local,id=share{number},path={share.folder},{options}"]
                words += ["-device", f"virtio-9p-pci,fsdev=share{number},mount_tag={share.tag}"]
            elif share.kind == "virtiofs":
                backed = ",memory-backend=memory"  # virtiofsd works in the guest's memory
                words += ["-chardev", f"socket,id=share{number},path={self._serve(share, place / f'share{number}')}"]
                words += ["-device", f"vhost-user-fs-pci,chardev=share{number},tag={share.tag}"]
            else:
                raise ValueError(f"there is no share of the kind {share.kind}")
        if backed:
            words += ["-object", f"memory-backend-memfd,id=memory,size={machine.memory_mib}M,share=on"]
        words += ["-machine", f"q35{backed}"]
        if machine.firmware:
            shutil.copy(_VARIABLES, place / "variables")
            words += ["-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={_FIRMWARE}"]
            words += ["-drive", f"if=pflash,format=raw,unit=1,file={place}/variables"]
        if machine.tpm is not None:
            words += ["-chardev", f"socket,id=tpm,path={machine.tpm}", "-tpmdev", "emulator,id=tpm0,chardev=tpm"]
            words += ["-device", f"{machine.tpm_device},tpmdev=tpm0"]
        return [*words, *machine.options]

    def _serve(self, share: Share, path: Path) -> Path:
        """Start a virtiofsd and wait for its socket."""
        program = virtiofsd()
        source = f"--shared-dir={share.folder}" if program.parent.name == "libexec" else f"-osource={share.folder}"
        server = self._spawn([str(program), f"--socket-path={path}", source, *share.options])
        deadline = time.monotonic() + _SOCKET_SECONDS
        while not path.exists():
            if server.poll() is not None or time.monotonic() > deadline:
                raise GuestError(f"virtiofsd does not start\n{self._tail()}")
            time.sleep(0.02)
        return path

    def _spawn(self, command: Sequence[str], *, pipes: bool = False) -> subprocess.Popen[bytes]:
        """Start a process that ends with this one, and with this guest."""
        pipe = subprocess.PIPE if pipes else subprocess.DEVNULL
        words = [*self._prefix, "setpriv", "--pdeathsig=KILL", "--", *command]
        process = subprocess.Popen(words, env=_ENVIRONMENT, stdin=pipe, stdout=pipe, stderr=self._errors)
        self._stack.callback(_end, process)
        return process

    # --- the console --------------------------------------------------------------------------------------------------

    def _lines(self, deadline: float) -> Iterator[str]:
        """The console's next lines, until QEMU ends."""
        assert self._process is not None
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while True:
                while b"\n" in self._pending:
                    line, _, self._pending = self._pending.partition(b"\n")
                    self.console.append(line.decode(errors="replace").rstrip("\r"))
                    yield self.console[-1]
                if not selector.select(max(0, deadline - time.monotonic())):
                    raise GuestError(f"the guest did not say in time what was awaited\n{self._tail()}")
                data = os.read(self._process.stdout.fileno(), 65536)
                if not data:
                    return
                self._pending += data

    def _tail(self) -> str:
        """The end of the console, and what QEMU and virtiofsd complained of."""
        self._errors.seek(0)
        errors = self._errors.read()[-4000:].decode(errors="replace")
        return "\n".join([*self.console[-60:], self._pending.decode(errors="replace"), errors])


def _end(process: subprocess.Popen[bytes]) -> None:
    with process:  # closes its pipes
        process.kill()
        process.wait()
