"""The rpm, installed by rpm below a root of its own.

No Fedora is here: a Debian has the files that the rpm needs, and a stub package provides the names that a Fedora has.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from oci_hook import __version__
from oci_hook.errors import InstallationIncomplete
from tests.fresh_root import FreshRoot
from tests.packaging.conftest import OLDER, TOOLS, Packages, run

PRIVATE = "usr/lib/scz-smm"
LAUNCH = "/usr/bin/python3 -I -S /usr/lib/scz-smm/oci_hook/launch.py prestart"
Rpm = Callable[..., str]


def stub(packages: Packages, folder: Path) -> Path:
    """A package without files that provides what ours requires of the distribution."""
    required = run("rpm", "-qp", "--requires", packages.rpm).splitlines()
    names = {line.split()[0] for line in required if not line.startswith("rpmlib(")}
    document = {
        "name": "distribution",
        "arch": "noarch",
        "version": "1",
        "description": "stands for a distribution's names",
        "maintainer": "nobody <nobody@example.org>",
        "provides": [*sorted(names - {"python3"}), "python3 = 3.13"],
        "contents": [{"dst": "/etc/distribution", "type": "dir"}],
    }
    (folder / "stub.json").write_text(json.dumps(document))
    run(TOOLS / "nfpm", "package", "-f", folder / "stub.json", "-p", "rpm", "-t", folder / "stub.rpm")
    return folder / "stub.rpm"


@pytest.fixture(scope="module")
def rpm(clean: FreshRoot, packages: Packages, tmp_path_factory: pytest.TempPathFactory) -> Rpm:
    """rpm, working below the system's root; the stub is installed, and what it stands for is there."""
    root = clean
    root.call("rm", "-rf", "/var/lib/rpm")
    depends = run("dpkg-deb", "--field", packages.deb, "Depends").strip()
    root.call("apt-get", "satisfy", "-yq", "--no-install-recommends", depends)

    # Debian 12's rpm asks for it, and that of Debian 13 does not know it.
    asked = subprocess.run(["rpm", "--force-debian", "--version"], capture_output=True, check=False).returncode == 0

    def call(*words: str | Path, code: int = 0) -> str:
        options = ["--root", str(root.folder), "--dbpath", "/var/lib/rpm", *(["--force-debian"] if asked else [])]
        done = subprocess.run(
            ["rpm", *options, *map(str, words)], capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    without = call("--install", packages.rpm, code=1)
    assert "libtss2-esys.so.0()(64bit) is needed" in without
    call("--install", stub(packages, tmp_path_factory.mktemp("stub")))
    return call


def test_rpm_installs_it_and_its_scriptlets_run(root: FreshRoot, rpm: Rpm, packages: Packages) -> None:
    rpm("--install", packages.older_rpm)
    assert root.call("sczctl", "--version").stdout.split()[-1] == OLDER
    assert list((root / PRIVATE).rglob("*.pyc"))
    assert not (root / PRIVATE / ".incomplete").exists()
    assert rpm("--verify", "scz-smm") == ""


def test_after_an_upgrade_that_was_cut_off_it_refuses_and_the_remedy_mends_it(
    root: FreshRoot, rpm: Rpm, packages: Packages
) -> None:
    """rpm looks for space before it changes anything; where that is not enough, it undoes nothing and tells nobody."""
    place = root / PRIVATE
    mount = ["mount", "-t", "tmpfs", "-o", "size=40k,mode=0755", "full", str(place / "oci_hook")]
    run(*mount)
    try:
        rpm("--upgrade", "--ignoresize", packages.rpm, code=1)
    finally:
        run("umount", place / "oci_hook")
    assert rpm("--query", "scz-smm").startswith(f"scz-smm-{OLDER}")
    state = '{"ociVersion":"1.0.2","id":"plain","pid":1,"bundle":"/none","annotations":{"other":"1"}}'
    hook = root.call(*LAUNCH.split(), stdin=state, check=False)
    assert (hook.returncode, "`rpm -U --replacepkgs FILE`" in hook.stderr) == (InstallationIncomplete.code, True)
    rpm("--upgrade", "--replacepkgs", packages.older_rpm)
    assert root.call(*LAUNCH.split(), stdin=state).returncode == 0
    assert rpm("--verify", "scz-smm") == ""


def test_an_upgrade_keeps_the_configuration(root: FreshRoot, rpm: Rpm, packages: Packages) -> None:
    config = root / "etc/scz-smm/config.toml"
    config.write_text(config.read_text() + "\n# the administrator's\n")
    rpm("--upgrade", packages.rpm)
    assert root.call("sczctl", "--version").stdout.split()[-1] == __version__
    assert config.read_text().endswith("# the administrator's\n")
    assert not (root / PRIVATE / "oci_hook/gone.py").exists()
    assert not (root / PRIVATE / ".incomplete").exists()
    assert list((root / PRIVATE).rglob("*.pyc"))
    assert rpm("--verify", "scz-smm", code=1).splitlines() == ["S.5....T.  c /etc/scz-smm/config.toml"]


def test_the_hook_of_the_rpm_runs(root: FreshRoot, rpm: Rpm) -> None:
    state = '{"ociVersion":"1.0.2","id":"plain","pid":1,"bundle":"/none","annotations":{"other":"1"}}'
    assert root.call(*LAUNCH.split(), stdin=state).returncode == 0


def test_erasing_it_cleans_the_engines_and_keeps_models_and_keys(root: FreshRoot, rpm: Rpm) -> None:
    root.sh("""mkdir -p /etc/docker && echo '{"log-level": "info"}' >/etc/docker/daemon.json""")
    root.call("sczctl", "install", "--engine", "docker", "--runtime", "/usr/bin/runc")
    root.sh("mkdir -p /var/lib/scz-smm/models && touch /var/lib/scz-smm/models/kept")
    rpm("--erase", "scz-smm")
    assert not (root / PRIVATE).exists()
    assert not (root / "usr/bin/sczctl").exists()
    script = "/usr/local/libexec/scz-smm/docker/scz-runc"  # stays for what was started through it, and starts nothing
    assert root.call(script, "create", "x", check=False).returncode == InstallationIncomplete.code
    assert json.loads((root / "etc/docker/daemon.json").read_text()) == {"log-level": "info"}
    assert (root / "var/lib/scz-smm/models/kept").exists()
    assert (root / "etc/scz-smm/config.toml.rpmsave").read_text().endswith("# the administrator's\n")
