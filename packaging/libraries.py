"""What the compiled modules need of a host, read from them, and what Debian and rpm call it."""

from __future__ import annotations

import re
from pathlib import Path

from dependencies import BEFORE_PYTHON, PYTHONS
from programs import PackageError, run

#: Debian's names of the libraries that compiled modules of ours name: bookworm's, and since trixie the other.
DEB_LIBRARIES = {
    "libtss2-esys.so.0": "libtss2-esys-3.0.2-0t64 | libtss2-esys-3.0.2-0",
    "libtss2-fapi.so.1": "libtss2-fapi1t64 | libtss2-fapi1",
    "libtss2-mu.so.0": "libtss2-mu-4.0.1-0t64 | libtss2-mu0",
    "libtss2-policy.so.0": "libtss2-policy0t64",
    "libtss2-rc.so.0": "libtss2-rc0t64 | libtss2-rc0",
    "libtss2-tcti-spi-helper.so.0": "libtss2-tcti-spi-helper0t64",
    "libtss2-tctildr.so.0": "libtss2-tctildr0t64 | libtss2-tctildr0",
    "libgcc_s.so.1": "libgcc-s1",
    "libstdc++.so.6": "libstdc++6",
}
#: No module names these: libtss2-tctildr loads them by name, for a TPM of the kernel and for swtpm.
DLOPENED = {
    "libtss2-tcti-device.so.0": "libtss2-tcti-device0t64 | libtss2-tcti-device0",
    "libtss2-tcti-swtpm.so.0": "libtss2-tcti-swtpm0t64 | libtss2-tcti-swtpm0",
}
LIBC = re.compile(r"lib(c|m|dl|rt|util|pthread)\.so\.\d+|ld-linux.*")


def library_needs(root: Path) -> tuple[dict[str, set[str]], str]:
    """The shared libraries that modules below the folder name, with the versions of symbols, and the newest of glibc.

    Raises:
        PackageError: A module needs a library that nobody named here.
    """
    needs: dict[str, set[str]] = {}
    for path in sorted(root.rglob("*.so")):
        text = run(["/usr/bin/objdump", "--private-headers", str(path)])
        for name in re.findall(r"^\s+NEEDED\s+(\S+)$", text, re.MULTILINE):
            if name not in DEB_LIBRARIES and not LIBC.fullmatch(name):
                raise PackageError(f"{path}: nothing says which package has {name}")
            needs.setdefault(name, set())
        for name, versions in re.findall(r"^  required from (\S+):\n((?:    .*\n)+)", text, re.MULTILINE):
            needs.setdefault(name, set()).update(line.split()[-1] for line in versions.splitlines())
    glibc = [version for versions in needs.values() for version in versions if version.startswith("GLIBC_2.")]
    newest = max(([int(part) for part in version[6:].split(".")] for version in glibc), default=[2, 34])
    return needs, ".".join(str(part) for part in newest)


def deb_dependencies(needs: dict[str, set[str]], glibc: str) -> list[str]:
    """Depends, in Debian's words."""
    named = {DEB_LIBRARIES[name] for name in needs if name in DEB_LIBRARIES} | set(DLOPENED.values())
    return [f"python3 (>= {PYTHONS[0]})", f"python3 (<< {BEFORE_PYTHON})", f"libc6 (>= {glibc})", *sorted(named)]


def rpm_dependencies(needs: dict[str, set[str]]) -> list[str]:
    """Requires, as rpm itself names libraries and the versions of their symbols."""
    symbols = [f"{name}({version})(64bit)" for name, versions in needs.items() for version in versions]
    libraries = [f"{name}()(64bit)" for name in (*needs, *DLOPENED)]
    return [
        f"python3 >= {PYTHONS[0]}",
        f"python3 < {BEFORE_PYTHON}",
        "/bin/sh",
        *sorted(word for word in (*libraries, *symbols) if not word.startswith("ld-linux")),
    ]
