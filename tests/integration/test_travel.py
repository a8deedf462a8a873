"""Bundles travel: skopeo and a registry carry them as they are; 10 GiB take no more memory than a small model does.

A full disk and a damaged entry say what mends them.

What a copy lost or got on the way is refused by `sczctl add`, before anything is in the store.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from oci_hook.bundle.image import CONFIG_TYPE
from oci_hook.errors import BundleInvalid, BundleMismatch, FileUnreadable, ModelUnknown
from tests.demo.__main__ import flip_bit
from tests.integration.conftest import FILES, contents
from tests.integration.test_start import layers, start
from tests.registry import Registry, skopeo
from tests.scene import ISSUER, SCZCTL, SUBJECT, Scene

GIB, MIB = 1 << 30, 1 << 20
READS = "cat /models/small/shards/first.bin"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("registry") / "here") as running:
        yield running


@pytest.fixture
def bundle(scene: Scene) -> Path:
    """The bundle of `small:1`, as its owner packed it."""
    return scene.usb / "small-1" / "bundle"


def blobs(bundle: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (bundle / "blobs" / "sha256").iterdir()}


def image_digest(scene: Scene, bundle: Path) -> str:
    return str(json.loads(scene.sczctl("inspect", bundle, "--json").stdout)["image"])


def to_layout(_registry: Registry, bundle: Path, folder: Path) -> Path:
    skopeo("copy", f"oci:{bundle}:1", f"oci:{folder}/copy:1")
    return folder / "copy"


def through_registry(registry: Registry, bundle: Path, folder: Path) -> Path:
    there = f"docker://{registry.address}/models/small"
    skopeo("copy", "--dest-tls-verify=false", f"oci:{bundle}:1", f"{there}:1")
    skopeo("copy", "--src-tls-verify=false", f"{there}:1", f"oci:{folder}/copy:elsewhere")
    return folder / "copy"


def by_digest(registry: Registry, bundle: Path, folder: Path) -> Path:
    """As somebody fetches it who was told a digest, not a tag."""
    there = f"docker://{registry.address}/by-digest/small"
    digest = folder / "digest"
    skopeo("copy", "--dest-tls-verify=false", "--digestfile", digest, f"oci:{bundle}:1", f"{there}:1")
    skopeo("copy", "--src-tls-verify=false", f"{there}@{digest.read_text()}", f"oci:{folder}/copy:1")
    return folder / "copy"


@pytest.mark.parametrize("way", [to_layout, through_registry, by_digest])
def test_a_bundle_travels_byte_for_byte(
    scene: Scene, registry: Registry, bundle: Path, tmp_path: Path, way: Callable[[Registry, Path, Path], Path]
) -> None:
    copy = way(registry, bundle, tmp_path)
    assert blobs(copy) == blobs(bundle)
    assert len(blobs(copy)) == len(FILES) + 2
    assert image_digest(scene, copy) == image_digest(scene, bundle)
    verified = scene.sczctl("verify", copy, "--owner", scene.owner / "keys" / "owner.json").stdout
    assert f"its {len(FILES)} files are what was signed" in verified
    scene.sczctl("rm", "small:1")
    assert start(scene, scene.token()).why["code"] == ModelUnknown.code
    folder = tmp_path / "arrived"
    folder.mkdir()
    copy.rename(folder / "bundle")
    shutil.copy(scene.usb / "small-1" / "grant.jwt", folder)
    scene.sczctl("add", folder)
    attempt = start(scene, scene.token(), command=READS)
    assert attempt.stdout.encode() == contents("shards/first.bin", FILES["shards/first.bin"])


def test_the_digest_that_skopeo_prints_names_the_model(scene: Scene, registry: Registry, bundle: Path) -> None:
    there = f"docker://{registry.address}/named/small:1"
    skopeo("copy", "--dest-tls-verify=false", f"oci:{bundle}:1", there)
    raw = skopeo("inspect", "--raw", "--tls-verify=false", there)
    printed = "sha256:" + hashlib.sha256(raw.encode()).hexdigest()
    local = scene.host / "raw.json"
    local.write_text(raw)
    assert skopeo("manifest-digest", local).strip() == printed == image_digest(scene, bundle)
    attempt = start(scene, scene.token(), model=f"small@{printed}", command=READS)
    assert attempt.stdout.encode() == contents("shards/first.bin", FILES["shards/first.bin"])
    other = "sha256:" + "0" * 64
    assert start(scene, scene.token(), model=f"small@{other}").why["code"] == ModelUnknown.code


# --- what a bundle loses on the way -----------------------------------------------------------------------------------


def write_blob(bundle: Path, data: bytes) -> dict[str, object]:
    digest = hashlib.sha256(data).hexdigest()
    (bundle / "blobs" / "sha256" / digest).write_bytes(data)
    return {"digest": f"sha256:{digest}", "size": len(data)}


def rewrite_image(bundle: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Change the image manifest and point the index to it, as a tool that understood only half would."""
    index = json.loads((bundle / "index.json").read_text())
    digest = index["manifests"][0]["digest"].removeprefix("sha256:")
    image = json.loads((bundle / "blobs" / "sha256" / digest).read_text())
    change(image)
    index["manifests"][0].update(write_blob(bundle, json.dumps(image).encode()))
    (bundle / "index.json").write_text(json.dumps(index))


def loses_config_type(bundle: Path) -> None:
    def change(image: dict[str, object]) -> None:
        config = image["config"]
        assert isinstance(config, dict)
        assert config["mediaType"] == CONFIG_TYPE
        config["mediaType"] = "application/vnd.oci.image.config.v1+json"

    rewrite_image(bundle, change)


def loses_layer_types(bundle: Path) -> None:
    def change(image: dict[str, object]) -> None:
        assert isinstance(image["layers"], list)
        for layer in image["layers"]:
            layer["mediaType"] = "application/vnd.oci.image.layer.v1.tar"

    rewrite_image(bundle, change)


def gets_another_layer(bundle: Path) -> None:
    """A whole image manifest of its own for a blob that nobody signed."""

    def change(image: dict[str, object]) -> None:
        assert isinstance(image["layers"], list)
        image["layers"][0].update(write_blob(bundle, b"x" * int(image["layers"][0]["size"])))

    rewrite_image(bundle, change)


def replaces_blob(bundle: Path) -> None:
    path = max((bundle / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    path.write_bytes(bytes(path.stat().st_size))


def truncates_blob(bundle: Path) -> None:
    path = max((bundle / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (loses_config_type, BundleInvalid.code),
        (loses_layer_types, BundleInvalid.code),
        (gets_another_layer, BundleMismatch.code),
        (replaces_blob, BundleMismatch.code),
        (truncates_blob, BundleMismatch.code),
    ],
)
def test_a_copy_that_was_changed_on_the_way(
    scene: Scene, bundle: Path, tmp_path: Path, change: Callable[[Path], None], code: int
) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    change(copy)
    before = scene.sczctl("list", "--json").stdout
    tried = scene.sczctl("add", copy, check=False)
    assert tried.returncode == code, tried.stderr
    assert "  remedy: copy the bundle again" in tried.stderr
    assert scene.sczctl("list", "--json").stdout == before
    assert [path for path in (scene.store / "models").iterdir() if path.name.startswith(".")] == []
    scene.sczctl("verify", "small:1")


# --- memory -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What a command took: the kernel's own count of its peak, in bytes, and seconds."""

    peak_bytes: int
    seconds: float


# A process begins with the peak of what it was forked from: so from a small Python, not from this pytest.
_MEASURE = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=2)
_, status, usage = os.wait4(process.pid, 0)
print(os.waitstatus_to_exitcode(status), usage.ru_maxrss)
"""


def measure(*words: str | Path) -> Measured:
    """Run `sczctl`, alone, and ask the kernel for the most memory that it ever had."""
    began = time.monotonic()
    command = [sys.executable, "-I", "-S", "-c", _MEASURE, *SCZCTL, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    code, peak_kib = map(int, done.stdout.split())
    assert code == 0, done.stderr
    return Measured(peak_kib * 1024, time.monotonic() - began)


def size_that_fits(folder: Path) -> int:
    """10 GiB, or a third of what is free where that is less."""
    size = min(10 * GIB, shutil.disk_usage(folder).free // 3)
    assert size >= GIB, "this test needs 3 GiB free in /var/tmp"
    return size


def test_memory_is_flat_up_to_10_gib(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    """Peak of a process of its own, told by the kernel; the source is sparse, the bundle and the copy are not."""
    found: dict[int, tuple[Measured, Measured]] = {}
    with tempfile.TemporaryDirectory(prefix="scz-large.", dir=scene.directory) as name:
        folder = Path(name)
        config = folder / "config.toml"
        paths = "\n".join(f'{key} = "{folder}/{key}"' for key in ("store", "runtime"))
        config.write_text(f'[paths]\n{paths}\ntrust = "{scene.host}/trust"\naudit = "{folder}/audit.jsonl"\n')
        sizes = (64 * MIB, size_that_fits(folder))
        for number, size in enumerate(sizes, 1):
            source = folder / f"source-{number}"
            source.mkdir()
            with (source / "weights.bin").open("wb") as file:
                file.truncate(size)
            words = ["--keys", scene.owner / "keys", "--name", "large", "--version", str(number)]
            bundle = folder / f"bundle-{number}"
            packed = measure("pack", source, "-o", bundle, *words, "--issuer", ISSUER, "--subject", SUBJECT)
            added = measure("--config", config, "add", bundle)
            found[size] = packed, added
            assert (
                f"large:{number}"
                in subprocess.run(
                    [*SCZCTL, "--config", str(config), "list"], capture_output=True, text=True, check=True
                ).stdout
            )
            shutil.rmtree(bundle)
    with capsys.disabled():
        for size, (packed, added) in found.items():
            print(
                f"\n  {size / GIB:.2f} GiB: pack {packed.peak_bytes // MIB} MiB, {packed.seconds:.1f} s; "
                f"add {added.peak_bytes // MIB} MiB, {added.seconds:.1f} s",
                end="",
            )
    for small, large in zip(*found.values(), strict=True):
        assert large.peak_bytes < 200 * MIB
        assert large.peak_bytes < small.peak_bytes + 32 * MIB


# --- a full disk ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    subprocess.run(["/bin/mount", "-t", "tmpfs", "-o", f"mode=0700,size={size}", "tmpfs", folder], check=True, env={})
    try:
        yield folder
    finally:
        subprocess.run(["/bin/umount", folder], check=True, env={})
        assert not os.path.ismount(folder)


def test_a_full_disk_while_packing(scene: Scene, model_source: Path, tmp_path: Path) -> None:
    words = ["--keys", scene.owner / "keys", "--name", "full", "--version", "1", "--issuer", ISSUER]
    with small_disk(tmp_path / "stick", "1m") as stick:
        tried = scene.sczctl("pack", model_source, "-o", stick / "b", *words, "--subject", SUBJECT, check=False)
        assert tried.returncode == FileUnreadable.code
        assert f"5 MiB are needed, and the file system on {stick} has 1 MiB free" in tried.stderr
        assert f"  remedy: free 5 MiB on {stick} (`df -h {stick}`), or give -o on another disk" in tried.stderr
        assert list(stick.iterdir()) == []
    assert not (scene.owner / "keys" / "models" / "full").exists()
    scene.sczctl("pack", model_source, "-o", tmp_path / "b", *words, "--subject", SUBJECT)  # the version is free still


def test_a_full_disk_while_adding(scene: Scene, bundle: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "store", "7m") as store:
        config = tmp_path / "config.toml"
        config.write_text(scene.config.read_text().replace(f'store = "{scene.store}"', f'store = "{store}"'))

        def ctl(*words: str | Path) -> subprocess.CompletedProcess[str]:
            command = [*SCZCTL, "--config", str(config), *map(str, words)]
            return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

        assert ctl("add", bundle).returncode == 0
        before = sorted(store.rglob("*"))
        tried = ctl("add", scene.usb / "other-1" / "bundle")
        assert tried.returncode == FileUnreadable.code, tried.stderr
        assert f"5 MiB are needed, and the file system on {store} has 3 MiB free" in tried.stderr
        assert "`sczctl rm NAME:VERSION`" in tried.stderr
        assert sorted(store.rglob("*")) == before
        assert "what was signed" in ctl("verify", "small:1").stdout
        assert ctl("rm", "small:1").returncode == 0  # what the remedy says
        assert ctl("add", scene.usb / "other-1" / "bundle").returncode == 0


# --- a damaged entry --------------------------------------------------------------------------------------------------


def removes_index(scene: Scene) -> None:
    layers(scene)[0].parents[2].joinpath("index.json").unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda scene: os.truncate(layers(scene)[0], 1000), "BundleMismatch"),
        (lambda scene: flip_bit(layers(scene)[0]), "DecryptionRefused"),
        (lambda scene: layers(scene)[0].unlink(), "BundleInvalid"),
        (removes_index, "BundleInvalid"),
        (lambda scene: os.chown(layers(scene)[0], 1000, 1000), "StoreInvalid"),
        (lambda scene: layers(scene)[0].chmod(0o666), "StoreInvalid"),
        (lambda scene: os.truncate(scene.store / "names" / "small" / "1", 3), "StoreInvalid"),
    ],
    ids=["truncated", "flipped", "missing", "no-index", "owner", "mode", "name"],
)
def test_a_damaged_entry_starts_nothing_until_it_is_added_again(
    scene: Scene, damage: Callable[[Scene], None], reason: str
) -> None:
    podman, token = scene.podman, scene.token("running-token")
    words = ["--annotation", "smm.scz/model=small:1", "--volume", f"{token}:/var/run/secrets/scz-smm/token:ro"]
    podman.create(["--name", "running", *words, scene.image, "sleep", "1000"])
    try:
        podman.start_container("running")
        damage(scene)
        try:
            attempt = start(scene, scene.token())
            assert (attempt.why["reason"], attempt.ran) == (reason, False)
            assert "`sczctl add FOLDER` again" in str(attempt.why["remedy"])
        finally:
            scene.sczctl("add", scene.usb / "small-1")
        expected = contents("shards/first.bin", FILES["shards/first.bin"])
        assert start(scene, scene.token(), command=READS).stdout.encode() == expected
        running = podman.call("exec", "running", "sh", "-c", READS)  # it never noticed
        assert running.stdout.encode() == expected
    finally:
        podman.rm("running")


def test_a_full_disk_while_installing(scene: Scene, tmp_path: Path) -> None:
    with small_disk(tmp_path / "etc", "64k") as disk:
        filler = disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        words = ("install", "--engine", "podman", "--hooks-dir", disk / "hooks.d")
        tried = scene.sczctl(*words, check=False)
        assert tried.returncode == FileUnreadable.code
        assert f"4 KiB are needed, and the file system on {disk} has 0 KiB free" in tried.stderr
        assert f"  remedy: free 4 KiB on {disk} (`df -h {disk}`), then run it again" in tried.stderr
        assert [path for path in disk.rglob("*") if path.is_file()] == [filler]
        filler.unlink()
        scene.sczctl(*words)
        assert len(list((disk / "hooks.d").iterdir())) == 2
