"""postrm's purge in a mount namespace: what is mounted or linked from elsewhere neither fails it nor is followed."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Nothing of this machine's is seen at the places that it empties.
_SCENE = """
set -eu
for place in /var/lib /var/log /run /etc /usr/local; do mount -t tmpfs scene $place; done
mkdir -p /var/lib/scz-smm/models/m /etc/scz-smm/trust /var/log/scz-smm /run/scz-smm/containers
mkdir -p /usr/local/libexec/scz-smm/docker /usr/local/libexec/scz-smm/containerd /var/elsewhere
touch /var/lib/scz-smm/models/m/file '/etc/scz-smm/trust/a b' /usr/local/libexec/scz-smm/docker/scz-runc
"""


def purge(tmp_path: Path, before: str, after: str) -> subprocess.CompletedProcess[str]:
    """Purge with something at the places; stdout is what `after` prints."""
    scene = f"{_SCENE.replace('/var/elsewhere', str(tmp_path))}\nelsewhere={tmp_path}\n{before}\n"
    script = f"{scene}DPKG_MAINTSCRIPT_PACKAGE=scz-smm sh {ROOT}/packaging/deb/postrm purge\n{after}"
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, check=False, timeout=60
    )


LEFT = "find /var/lib/scz-smm /etc/scz-smm /var/log/scz-smm /run/scz-smm /usr/local/libexec -mindepth 1 2>&- || true"
GONE = "for place in /var/lib /etc /var/log /run; do test ! -e $place/scz-smm; done"


def test_everything_goes(tmp_path: Path) -> None:
    done = purge(tmp_path, "", f"{LEFT}; {GONE}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_store_on_a_disk_of_its_own_is_emptied(tmp_path: Path) -> None:
    before = "mount -t tmpfs disk /var/lib/scz-smm; mkdir /var/lib/scz-smm/models; touch /var/lib/scz-smm/models/file"
    done = purge(tmp_path, before, f"{LEFT}; ls -d /var/lib/scz-smm")
    assert (done.returncode, done.stdout) == (0, "/var/lib/scz-smm\n")
    place = "/var/lib/scz-smm"
    assert done.stderr == f"scz-smm: {place} stays; to remove it: umount {place}; rm -r {place}\n"


def test_what_is_mounted_below_is_neither_entered_nor_fatal(tmp_path: Path) -> None:
    """Also a bind mount, whose files are on the same file system, and names with blanks and patterns."""
    before = """
    mkdir -p '/run/kept *' '/run/scz-smm/host mounts/a[b]*' /run/scz-smm/other; touch '/run/kept */file'
    mount --bind '/run/kept *' '/run/scz-smm/host mounts/a[b]*'
    mount -t tmpfs more /run/scz-smm/other; touch /run/scz-smm/other/file
    """
    done = purge(tmp_path, before, f"{LEFT}; ls '/run/kept *'")
    assert done.returncode == 0
    assert set(done.stdout.splitlines()) == {
        "/run/scz-smm/host mounts",
        "/run/scz-smm/host mounts/a[b]*",
        "/run/scz-smm/host mounts/a[b]*/file",
        "/run/scz-smm/other",
        "/run/scz-smm/other/file",
        "file",
    }
    assert "scz-smm: /run/scz-smm/other is mounted and stays; to remove it: umount /run/scz-smm/other" in done.stderr
    assert "scz-smm: /run/scz-smm/host mounts/a[b]* is mounted" in done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_links_go_and_what_they_lead_to_stays_and_is_named(tmp_path: Path) -> None:
    before = """
    mkdir $elsewhere/store $elsewhere/trust; touch $elsewhere/store/model $elsewhere/trust/key
    rm -r /var/lib/scz-smm; ln -s $elsewhere/store /var/lib/scz-smm; ln -s $elsewhere/trust /etc/scz-smm/trust/owners
    """
    done = purge(tmp_path, before, f"{LEFT}; {GONE}; test ! -L /var/lib/scz-smm")
    assert (done.returncode, done.stdout) == (0, "")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["key", "model", "store", "trust"]
    assert done.stderr.splitlines() == [
        f"scz-smm: /var/lib/scz-smm led to {tmp_path}/store, which stays; remove it yourself",
        f"scz-smm: /etc/scz-smm/trust/owners led to {tmp_path}/trust; if that is elsewhere, it stays",
    ]


def test_a_base_specification_that_containerd_names_stays(tmp_path: Path) -> None:
    """Without it containerd would load no handler."""
    guard = "/etc/scz-smm/containerd-base-spec.json"
    before = f"mkdir -p /etc/containerd/conf.d; echo content >{guard}"
    named = f"{before}; echo 'base_runtime_spec = \"{guard}\"' >/etc/containerd/conf.d/kata.toml"
    done = purge(tmp_path, named, f"{LEFT}; cat {guard}; ls -A /etc/containerd")
    assert (done.returncode, done.stdout) == (0, f"{guard}\ncontent\nconf.d\n")
    assert f"WARNING: {guard} stays, as containerd's configuration names it" in done.stderr
    done = purge(tmp_path, before, f"{LEFT}; {GONE}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
