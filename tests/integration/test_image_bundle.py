"""`smm.scz/model: rootfs:/path`: the image itself carries the encrypted bundle, the host only a grant.

The image is hostile: what it says is checked, where it leads to is not followed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from oci_hook.key_errors import all_errors
from tests.integration.conftest import FILES, contents
from tests.integration.test_start import CODES, refused, start
from tests.scene import Scene

RUNTIMES = ("runc", "crun")
ROOTFS = "/opt/carried"


@pytest.fixture(scope="module")
def carried(scene: Scene, model_source: Path) -> Path:
    """A bundle that is not in the store, with its grant and boot policy there."""
    out = scene.pack(model_source, name="carried")
    scene.grant(out, name="carried")
    done = scene.sczctl("add", out / "grant.jwt", out / "boot-policy.json", check=False)
    assert done.returncode == CODES["ModelUnknown"]
    assert "--without-bundle" in done.stderr
    scene.sczctl("add", "--without-bundle", out / "grant.jwt", out / "boot-policy.json")
    (row,) = [row for row in json.loads(scene.sczctl("list", "--json").stdout) if row["name"] == "carried"]
    assert (row["image"], row["granted"]) == (None, True)
    return out / "bundle"


@pytest.fixture
def image(scene: Scene, carried: Path, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Makes `localhost/carrier:1` by a shell script that runs in its root folder; the scene's image meanwhile."""
    plain, tag = scene.image, "localhost/carrier:1"

    def make(script: str = "true") -> None:
        folder = tmp_path / "root"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(carried, folder / ROOTFS.lstrip("/"))
        (folder / "bin").mkdir()
        shutil.copy("/bin/busybox", folder / "bin/busybox")
        for applet in ("sh", "true", "cat", "find", "sha256sum", "ls"):
            (folder / "bin" / applet).symlink_to("busybox")
        subprocess.run(["sh", "-euc", script], cwd=folder, check=True)
        archive = subprocess.run(["tar", "-C", folder, "-c", "."], capture_output=True, check=True).stdout
        scene.podman.import_image(lambda stream: stream.write(archive), tag, changes=["ENV PATH=/bin"])
        scene.image = tag

    yield make
    scene.image = plain
    scene.podman.call("rmi", "--force", tag, check=False)


WHERE = {"smm.scz/path": "/models/carried"}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_image_carries_the_bundle(scene: Scene, image: Callable[[str], None], runtime: str) -> None:
    image("true")
    command = "for name in weights.safetensors shards/first.bin config.json; do cat /models/carried/$name; done"
    attempt = start(scene, scene.token(), model=f"rootfs:{ROOTFS}", annotations=WHERE, runtime=runtime, command=command)
    assert attempt.returncode == 0, attempt.stderr
    names = ("weights.safetensors", "shards/first.bin", "config.json")
    assert attempt.stdout == "".join(contents(name, FILES[name]).decode() for name in names)


def test_beside_a_model_of_the_store(scene: Scene, image: Callable[[str], None]) -> None:
    image("true")
    both = {**WHERE, "smm.scz/model.b": "small:1", "smm.scz/path.b": "/models/b"}
    attempt = start(
        scene,
        scene.token(),
        model=f"rootfs:{ROOTFS}",
        annotations=both,
        command="cat /models/carried/config.json /models/b/config.json",
    )
    assert attempt.stdout.encode() == contents("config.json", FILES["config.json"]) * 2


BLOB = f"$(ls -S .{ROOTFS}/blobs/sha256/* | head -n 1)"


@pytest.mark.parametrize(
    ("reason", "script"),
    [
        ("BundleInvalid", f"rm -r .{ROOTFS}"),
        ("BundleInvalid", f"mv .{ROOTFS} real; ln -s ../real .{ROOTFS}"),
        ("BundleInvalid", f"mv .{ROOTFS} real; ln -s hop1 .{ROOTFS}; ln -s hop2 opt/hop1; ln -s /../../../ opt/hop2"),
        ("BundleInvalid", "mv opt real; ln -s real opt"),
        ("BundleInvalid", f"rm -r .{ROOTFS}; echo file > .{ROOTFS}"),
        ("BundleInvalid", f"rm .{ROOTFS}/index.json; ln -s /etc/passwd .{ROOTFS}/index.json"),
        ("BundleInvalid", f"rm .{ROOTFS}/index.json; mkfifo .{ROOTFS}/index.json"),
        ("BundleInvalid", f"f={BLOB}; cp $f copy; ln -sf /copy $f"),
        # The same size, one byte other than its digest says: in the last block, which decryption would only find late.
        (
            "BundleMismatch",
            f"f={BLOB}; printf x | dd of=$f bs=1 seek=$(($(stat -c %s $f) - 1)) conv=notrunc 2>/dev/null",
        ),
        ("BundleMismatch", f"printf x >> {BLOB}"),
        ("BundleMismatch", f"truncate -s -1 {BLOB}"),
    ],
)
def test_a_hostile_image(scene: Scene, image: Callable[[str], None], reason: str, script: str) -> None:
    image(script)
    refused(scene, reason, scene.token(), model=f"rootfs:{ROOTFS}", annotations=WHERE)


def test_a_bundle_in_a_volume_is_not_the_image_s(scene: Scene, image: Callable[[str], None], carried: Path) -> None:
    image(f"rm -r .{ROOTFS}")
    options = ("--volume", f"{carried}:{ROOTFS}")
    refused(scene, "BundleInvalid", scene.token(), model=f"rootfs:{ROOTFS}", annotations=WHERE, options=options)


def test_the_store_s_name_is_not_the_image_s(scene: Scene, image: Callable[[str], None]) -> None:
    image("true")
    refused(scene, "ModelUnknown", scene.token(), model="carried:1")


def test_a_bundle_without_a_grant(scene: Scene, image: Callable[[str], None], model_source: Path) -> None:
    out = scene.pack(model_source, name="ungranted")
    image(f"rm -r .{ROOTFS}; cp -r {out}/bundle .{ROOTFS}")
    refused(scene, "GrantMissing", scene.token(), model=f"rootfs:{ROOTFS}", annotations=WHERE)


def test_the_reason_is_told(scene: Scene, image: Callable[[str], None]) -> None:
    image(f"rm -r .{ROOTFS}")
    attempt = start(scene, scene.token(), model=f"rootfs:{ROOTFS}", annotations=WHERE)
    assert all_errors()[int(str(attempt.why["code"]))].__name__ == "BundleInvalid"
    assert ROOTFS in json.dumps(attempt.why)
