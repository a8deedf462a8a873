"""A Kata-like guest for the tests: Python, the hook and a stand-in for the agent in one unified kernel image.

The image is what is measured: kernel, command line and an initial ramdisk with the distribution's interpreter and
standard library, this project and its dependencies (the virtual environment's), libtss2, busybox, the trusted owner,
the configuration and the guest hooks of `config/guest`. `/main` takes verbs from the console, so that no program comes
from the host: `log`, `measure`, `run ID`, `end`. Shares: `store` (ciphertext, grants, policies) at /var/lib/scz-smm,
read-only; `containers` (root file systems, config.json, tokens) where Kata has them.

systemd-stub joins kernel, command line and ramdisk and measures them into PCR 11, and a command line that comes from
outside into PCR 12. Bytecode is compiled here and never looked up anew: under emulation that would take minutes.
Needs Debian's systemd-boot-efi and binutils. Specification: UAPI group, "Unified Kernel Image".
"""

from __future__ import annotations

import base64
import gzip
import os
import re
import shutil
import struct
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tests import agent
from tests.guests import SHARE_MODULES, Guest, Kernel, Machine, write_initramfs

ROOT = Path(__file__).parents[1]
SHARED = "/run/kata-containers/shared/containers"
PYTHON = "/usr/bin/python3"
STUB = Path("/usr/lib/systemd/boot/efi/linuxx64.efi.stub")
COMMAND_LINE = "console=ttyS0 quiet loglevel=1 panic=-1 nokaslr no_timer_check mitigations=off random.trust_cpu=on"
_LIBRARIES = "usr/lib/x86_64-linux-gnu"
_UNUSED = {"ensurepip", "idlelib", "lib2to3", "pydoc_data", "tkinter", "turtledemo", "test", "unittest", "distutils"}
_UNUSED |= {"venv", "wsgiref", "xmlrpc", "curses", "dbm", "sqlite3", "asyncio", "multiprocessing", "__pycache__"}
_UNUSED_MODULES = re.compile(r"(_test|_xxtest|_codecs_|_ctypes_test|_sqlite|_curses|_decimal|xx|readline|audioop|nis)")
_PACKAGES = ("cryptography", "tpm2_pytss", "jose", "click", "ecdsa", "rsa", "pyasn1", "six.py", "psutil", "packaging")
_PACKAGES += ("asn1crypto", "pycparser", "cffi")
#: A guest's own words for what was measured; `told` and `told_pcrs` read them.
TELL_THE_BOOT = """
        for pcr in 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do
            echo "guest: pcr $pcr $(cat /sys/class/tpm/tpm0/pcr-sha256/$pcr)"
        done
        echo "guest: log $(base64 -w 0 /sys/kernel/security/tpm0/binary_bios_measurements)"
"""
_MAIN = f"""#!/bin/sh
mount -t tmpfs -o mode=0755 run /run
mkdir -p {SHARED} /var/lib/scz-smm /var/log/scz-smm
mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=262144 store /var/lib/scz-smm || exit 1
mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144 containers {SHARED} || exit 1
echo "guest: ready"
while read -r verb id; do
    case $verb in
    log)
{TELL_THE_BOOT}        ;;
    measure)
        /usr/bin/python3 -I /usr/bin/sczctl boot-policy measure --device guest-1 -o /run/measurement.json &&
            echo "guest: measurement $(base64 -w 0 /run/measurement.json)" ;;
    run)
        mkdir -p /run/kata-containers/$id/rootfs
        mount --bind {SHARED}/$id/rootfs /run/kata-containers/$id/rootfs
        cp {SHARED}/$id/config.json /run/kata-containers/$id/config.json
        start=$(cut -d. -f1 /proc/uptime)
        /usr/bin/kata-agent -I -S /usr/lib/agent.py --bundle /run/kata-containers/$id --id $id \\
            --hooks /usr/share/oci/hooks --hook-seconds 200 2>&1
        echo "guest: container ended $?, in $(($(cut -d. -f1 /proc/uptime) - start)) s"
        echo "guest: audit $(base64 -w 0 /var/log/scz-smm/audit.jsonl)" ;;
    end) break ;;
    esac
    echo "guest: done $verb"
done
"""
_SCZCTL = "import sys\nsys.path.append('/usr/lib/scz-smm')\nfrom oci_hook.cli import main\nsys.exit(main())\n"


def write_root(folder: Path, *, trust: Path, config: str) -> None:
    """The guest's root file system.

    Args:
        folder: A new folder.
        trust: The folder of the owners and issuers that the guest trusts.
        config: The text of its config.toml.
    """
    for name in ("usr/bin", "usr/lib/scz-smm", _LIBRARIES, "lib64", "etc/scz-smm", "var/log", "usr/share/oci"):
        (folder / name).mkdir(parents=True)
    interpreter = agent.copy_interpreter(folder / "usr/bin/kata-agent")
    shutil.copy(interpreter, folder / "usr/bin/python3")
    _copy_python(folder)
    _copy_libraries(folder)
    shutil.copytree(trust, folder / "etc/scz-smm/trust")
    (folder / "etc/scz-smm/config.toml").write_text(config)
    shutil.copytree(ROOT / "config/guest", folder / "usr/share/oci/hooks")
    shutil.copy(agent.__file__, folder / "usr/lib/agent.py")
    (folder / "usr/bin/sczctl").write_text(_SCZCTL)
    (folder / "main").write_text(_MAIN)
    (folder / "main").chmod(0o755)


def _copy_python(folder: Path) -> None:
    """Standard library and packages, as bytecode that is never compared with a source; ours keeps its sources."""
    asked = [PYTHON, "-I", "-c", "import sysconfig; print(sysconfig.get_path('stdlib', 'posix_prefix'))"]
    library = Path(subprocess.run(asked, env={}, capture_output=True, text=True, check=True).stdout.strip())
    stdlib = folder / library.relative_to("/")

    def ignore(place: str, names: list[str]) -> set[str]:
        unused = {name for name in names if name in _UNUSED or name.startswith("config-")}
        return unused | {name for name in names if place.endswith("lib-dynload") and _UNUSED_MODULES.match(name)}

    shutil.copytree(library, stdlib, ignore=ignore)
    packages = folder / "usr/lib/scz-smm"
    site = Path(sysconfig.get_path("purelib"))
    for name in (*_PACKAGES, "oci_hook", *(path.name for path in site.glob("_cffi_backend*"))):
        if (site / name).is_dir():
            shutil.copytree(site / name, packages / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyi", "*.h"))
        elif (site / name).exists():
            shutil.copy(site / name, packages / name)
    for place in (stdlib, packages):
        words = [PYTHON, "-I", "-m", "compileall", "-q", "-b", "-s", folder, "--invalidation-mode", "unchecked-hash"]
        subprocess.run([*words, place], env={}, check=True)
        for source in place.rglob("*.py"):
            if source.with_suffix(".pyc").exists() and source.name != "launch.py":
                source.unlink()


def _copy_libraries(folder: Path) -> None:
    """Every shared library that an executable or module of the guest names, and the TCTI, which is opened by name."""
    wanted = [path for path in folder.rglob("*") if path.suffix == ".so" or path.parent == folder / "usr/bin"]
    tcti = Path(f"/{_LIBRARIES}/libtss2-tcti-device.so.0")
    for path in (*wanted, tcti):
        for library in _needed(path):
            place = folder / ("lib64" if library.name.startswith("ld-linux") else _LIBRARIES)
            shutil.copy(library, place / library.name)
    shutil.copy(tcti, folder / _LIBRARIES)
    libraries = [path for path in folder.rglob("*.so*") if path.is_file()]
    subprocess.run(["strip", "--strip-unneeded", *libraries], check=True)


def _needed(path: Path) -> Iterator[Path]:
    listed = subprocess.run(["ldd", path], env={}, capture_output=True, text=True, check=False).stdout
    for found in re.finditer(r"(?:=> )?(/\S+) \(0x", listed):
        yield Path(found[1])


def write_image(path: Path, folder: Path, kernel: Kernel, *, command_line: str = COMMAND_LINE) -> Path:
    """Join kernel, command line and the ramdisk of a folder into one image that firmware can start.

    Args:
        path: The file to write.
        folder: The guest's root, of `write_root`.
        kernel: The kernel.
        command_line: The image's own.
    """
    parts = path.with_suffix(".parts")
    parts.mkdir()
    plain = write_initramfs(parts / "plain", folder, kernel, SHARE_MODULES)
    (parts / "initrd").write_bytes(gzip.compress(plain.read_bytes(), 6, mtime=0))
    (parts / "cmdline").write_bytes(command_line.encode() + b"\0")
    (parts / "osrel").write_text("ID=scz-smm-tests\nVERSION_ID=1\n")
    shutil.copy(kernel.image, parts / "linux")
    words, place = ["objcopy"], image_end(STUB.read_bytes())
    for name in ("osrel", "cmdline", "linux", "initrd"):
        words += ["--add-section", f".{name}={parts / name}", "--set-section-flags", f".{name}=data,readonly"]
        words += ["--change-section-vma", f".{name}={place:#x}"]
        place += _aligned((parts / name).stat().st_size)
    subprocess.run([*words, STUB, path], check=True)
    shutil.rmtree(parts)
    return path


def _aligned(size: int) -> int:
    return -(-size // 0x10000) * 0x10000


def image_end(image: bytes) -> int:
    """The address behind the last section of a PE32+ image (Microsoft, "PE Format")."""
    (start,) = struct.unpack_from("<I", image, 0x3C)
    sections, optional_bytes = struct.unpack_from("<H12xH", image, start + 6)
    (base,) = struct.unpack_from("<Q", image, start + 24 + 24)
    table = start + 24 + optional_bytes
    ends = [sum(struct.unpack_from("<II", image, table + 40 * number + 8)) for number in range(sections)]
    return _aligned(base + max(ends))


class MeasuredGuest(Guest):
    """A guest that firmware starts from one unified image; the harness's own kernel and ramdisk are left out.

    Args:
        machine: As for `Guest`; its initramfs is not used.
        image: The unified kernel image.
        command_line: A command line from outside, which takes the place of the image's own; None: none.
    """

    def __init__(self, machine: Machine, image: Path, *, command_line: str | None = None) -> None:
        super().__init__(machine)
        self._image, self._command_line = image, command_line

    def _command(self, place: Path) -> list[str]:
        words = super()._command(place)
        for option in ("-kernel", "-initrd", "-append"):
            where = words.index(option)
            del words[where : where + 2]
        outside = [] if self._command_line is None else ["-append", self._command_line]
        return [*words, "-kernel", os.fspath(self._image), *outside]


def told(lines: list[str], what: str) -> bytes:
    """What the guest printed in base64."""
    (found,) = [line.split()[2] for line in lines if line.startswith(f"guest: {what} ")]
    return base64.b64decode(found)


def told_pcrs(lines: list[str]) -> dict[int, bytes]:
    """The PCRs as the guest's kernel shows them."""
    found = [line.split() for line in lines if line.startswith("guest: pcr ")]
    return {int(words[2]): bytes.fromhex(words[3]) for words in found}
