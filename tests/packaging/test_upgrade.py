"""The distribution is upgraded below the package: Debian 12 with it becomes Debian 13. A system's last act here."""

from __future__ import annotations

import shutil

from oci_hook import __version__
from tests.fresh_root import FreshRoot
from tests.packaging.conftest import Packages

NEXT = {"bookworm": "trixie"}


def test_the_package_outlives_an_upgrade_of_the_distribution(clean: FreshRoot, packages: Packages) -> None:
    """On trixie, which has no successor yet, it says that the package works there after all that was done to it."""
    root = clean
    shutil.copy(packages.deb, root / "root/new.deb")
    root.apt("install", "/root/new.deb")
    before = root.call("python3", "--version").stdout
    if root.suite in NEXT:
        root.sh(f"sed -i s/{root.suite}/{NEXT[root.suite]}/ /etc/apt/sources.list")
        root.apt("update")
        root.apt("install", "python3")
        assert root.call("python3", "--version").stdout != before
    assert root.call("sczctl", "--version").stdout.split()[-1] == __version__
    tag = root.call("python3", "-c", "import sys; print(sys.implementation.cache_tag)").stdout.strip()
    assert {path.name.split(".")[-2] for path in (root / "usr/lib/scz-smm").rglob("*.pyc")} == {tag}
    script = "import sys; sys.path.append('/usr/lib/scz-smm'); import oci_hook.attestation.tpm, oci_hook.jws"
    root.call("/usr/bin/python3", "-I", "-S", "-c", script)
    assert root.call("dpkg", "--verify", "scz-smm").stdout == ""
