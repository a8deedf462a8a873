"""`bundle.pack`: every file comes back, hostile and changing sources are refused, and nothing half-made stays."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from oci_hook.bundle.layout import open_layout
from oci_hook.bundle.model import ModelId
from oci_hook.bundle.pack import pack, scan_source
from oci_hook.bundle.segments import SEGMENT_BYTES, ContentKey
from oci_hook.errors import BundleInvalid, FileUnreadable, KeyInvalid, OutputExists, SczError, SourceInvalid
from tests.bundles import CREATED, FIELDS, FILES, MODEL, POLICY, make_owner, pack_files, read_bundle, write_source

KEYS = make_owner()
KEY = ContentKey(os.urandom(32))
ROOT = Path(__file__).parents[2]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source", FILES)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_file_comes_back(source: Path, tmp_path: Path) -> None:
    big = os.urandom(2 * SEGMENT_BYTES + 77)
    more = {"empty": b"", "a/b/c/deep.bin": big, "ünï": b"x", ".hidden": b"y", "a-b": b"1", "a.b": b"2"}
    write_source(source, more)
    (source / "folder without files").mkdir()
    seen: list[int] = []
    packed = pack_files(KEYS, KEY, source, tmp_path / "out", progress=seen.append)
    manifest, files = read_bundle(tmp_path / "out", KEYS.owner, KEY)
    assert files == {**FILES, **more}
    assert (manifest.model, manifest.access, dict(manifest.fields), manifest.created) == (
        MODEL,
        POLICY,
        FIELDS,
        CREATED,
    )
    assert (packed.manifest_digest, packed.files) == (manifest.digest, len(files))
    with open_layout(tmp_path / "out") as layout:
        assert layout.image_digest == packed.image_digest
    total = sum(len(data) for data in files.values())
    assert packed.bytes == total == sum(file.size for file in scan_source(source))
    assert seen == sorted(seen)
    assert seen[-1] == total
    assert left_in(tmp_path) == ["out", "source"]


def test_the_plaintext_is_not_in_the_bundle(source: Path, tmp_path: Path) -> None:
    secret = b"the weights of the model, nobody else's"
    write_source(source, {"weights.bin": secret * 1000})
    pack_files(KEYS, KEY, source, tmp_path / "out")
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or secret not in path.read_bytes()


def test_two_packings_share_no_layer(source: Path, tmp_path: Path) -> None:
    first = pack_files(KEYS, KEY, source, tmp_path / "one")
    second = pack_files(KEYS, KEY, source, tmp_path / "two")
    assert first.image_digest != second.image_digest
    blobs = [set(os.listdir(tmp_path / name / "blobs" / "sha256")) for name in ("one", "two")]
    assert not blobs[0] & blobs[1]


def test_one_random_source_is_asked_for_every_file(source: Path, tmp_path: Path) -> None:
    asked: list[int] = []

    def random(size: int) -> bytes:
        asked.append(size)
        return os.urandom(size)

    pack_files(KEYS, KEY, source, tmp_path / "out", random=random)
    assert asked == [32, 7] * len(FILES)


def test_a_source_named_through_a_link(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("source")
    assert pack_files(KEYS, KEY, tmp_path / "link", tmp_path / "out").files == len(FILES)


# --- sources that cannot be packed ------------------------------------------------------------------------------------


def link_to_file(source: Path) -> None:
    (source / "link").symlink_to("config.json")


def link_to_folder(source: Path) -> None:
    (source / "link").symlink_to("weights")


def link_outside(source: Path) -> None:
    (source / "weights" / "passwd").symlink_to("/etc/passwd")


def link_to_nothing(source: Path) -> None:
    (source / "link").symlink_to("nowhere")


def fifo(source: Path) -> None:
    os.mkfifo(source / "fifo")


def unix_socket(source: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(source / "socket"))


def device(source: Path) -> None:
    os.mknod(source / "null", 0o600 | 0o020000, os.makedev(1, 3))


def not_utf8(source: Path) -> None:
    Path(os.fsdecode(bytes(source) + b"/\xff")).write_bytes(b"")


def control_character(source: Path) -> None:
    (source / "a\nb").write_bytes(b"")


def too_deep(source: Path) -> None:
    write_source(source, {"/".join("abcdefghijklmnopq"): b""})


def model_json(source: Path) -> None:
    (source / "model.json").write_bytes(b"{}")


def below_model_json(source: Path) -> None:
    write_source(source, {"model.json/a": b""})


def too_many(source: Path) -> None:
    for number in range(10_001):
        (source / f"{number}").touch()


def nothing(source: Path) -> None:
    for name in FILES:
        (source / name).unlink()


def gone(source: Path) -> None:
    nothing(source)
    (source / "weights").rmdir()
    source.rmdir()


def a_file(source: Path) -> None:
    gone(source)
    source.write_bytes(b"")


REFUSED = [
    link_to_file,
    link_to_folder,
    link_outside,
    link_to_nothing,
    fifo,
    unix_socket,
    device,
    not_utf8,
    control_character,
    too_deep,
    model_json,
    below_model_json,
    too_many,
    nothing,
    gone,
    a_file,
]


@pytest.mark.parametrize("change", REFUSED)
def test_refused_sources(change: Callable[[Path], None], source: Path, tmp_path: Path) -> None:
    change(source)
    before = left_in(tmp_path)
    with pytest.raises(SourceInvalid):
        pack_files(KEYS, KEY, source, tmp_path / "out")
    assert left_in(tmp_path) == before
    with pytest.raises(SourceInvalid):
        scan_source(source)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def rewrite(path: Path) -> None:
    """The same size, another time."""
    time.sleep(0.02)
    path.write_bytes(bytes(path.stat().st_size))


def replace_by_link(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def replace_by_copy(path: Path) -> None:
    """Another file with the same size and time."""
    times = path.stat()
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace(copy, path)


def add_sibling(path: Path) -> None:
    path.with_name("late").write_bytes(b"")


def truncate(path: Path) -> None:
    os.truncate(path, 1)


@pytest.mark.parametrize(
    "change", [grow, rewrite, replace_by_link, replace_by_copy, add_sibling, truncate, Path.unlink]
)
@pytest.mark.parametrize("name", ["LICENSE", "weights/model.safetensors"])
def test_a_source_that_changes_meanwhile(
    change: Callable[[Path], None], name: str, source: Path, tmp_path: Path
) -> None:
    """The change comes after the first file was read; the file that changes was read before, or is still to come."""
    changed = False

    def progress(done: int) -> None:
        nonlocal changed
        if not changed:
            changed = True
            change(source / name)

    with pytest.raises(SourceInvalid):
        pack_files(KEYS, KEY, source, tmp_path / "out", progress=progress)
    assert changed
    assert left_in(tmp_path) == ["source"]


# --- outputs ----------------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(source: Path, tmp_path: Path) -> None:
    pack_files(KEYS, KEY, source, tmp_path / "out")
    before = (tmp_path / "out" / "index.json").read_bytes()
    with pytest.raises(OutputExists):
        pack_files(KEYS, KEY, source, tmp_path / "out")
    assert (tmp_path / "out" / "index.json").read_bytes() == before
    assert left_in(tmp_path) == ["out", "source"]


@pytest.mark.parametrize("output", ["source/out", "source", "source/weights/out", "link/out"])
def test_an_output_inside_the_source(output: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("source")
    with pytest.raises(SourceInvalid):
        pack_files(KEYS, KEY, source, tmp_path / output)
    assert left_in(source) == ["LICENSE", "config.json", "weights"]


def test_an_output_without_a_parent(source: Path, tmp_path: Path) -> None:
    with pytest.raises(FileUnreadable, match="nowhere"):
        pack_files(KEYS, KEY, source, tmp_path / "nowhere" / "out")


def test_what_cannot_be_signed_is_refused_before_the_work(source: Path, tmp_path: Path) -> None:
    other = make_owner("other")
    wrong_key = type(KEYS)(KEYS.owner, other.manifest_key, other.boot_policy_key, other.recovery_key)
    seen: list[int] = []
    with pytest.raises(KeyInvalid):
        pack_files(wrong_key, KEY, source, tmp_path / "out", progress=seen.append)
    with pytest.raises(SourceInvalid):
        pack_files(KEYS, KEY, source, tmp_path / "out", model=ModelId("Demo", "v1", 1), progress=seen.append)
    with pytest.raises(SourceInvalid):
        pack(
            source,
            tmp_path / "out",
            model=MODEL,
            access=POLICY,
            fields={"a": "b" * 70_000},
            created=CREATED,
            owner_id=KEYS.owner.owner_id,
            key=KEYS.manifest_key,
            content_key=KEY,
            random=os.urandom,
            progress=seen.append,
        )
    assert seen == []
    assert left_in(tmp_path) == ["source"]


# --- interruption -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, RuntimeError, OSError(28, "No space left on device")])
def test_an_exception_leaves_nothing(kind: type[BaseException] | BaseException, source: Path, tmp_path: Path) -> None:
    def interrupt(done: int) -> None:
        if done > 10:
            raise kind

    expected = FileUnreadable if isinstance(kind, OSError) else kind
    assert isinstance(expected, type)
    with pytest.raises(expected):
        pack_files(KEYS, KEY, source, tmp_path / "out", progress=interrupt)
    assert left_in(tmp_path) == ["source"]


def test_a_full_disk_is_said_as_such(source: Path, tmp_path: Path) -> None:
    """A real refusal of the kernel's: no file may grow beyond 64 KiB in this process."""
    write_source(source, {"big.bin": bytes(200_000)})
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, old[1]))
    try:
        with pytest.raises(FileUnreadable, match="too large"):
            pack_files(KEYS, KEY, source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert left_in(tmp_path) == ["source"]


CHILD = """
import os, sys, time
from pathlib import Path
from oci_hook.bundle.segments import ContentKey
from tests.bundles import make_owner, pack_files
def progress(done):
    print(done, flush=True)
    time.sleep(0.05)
pack_files(make_owner(), ContentKey(bytes(32)), Path(sys.argv[1]), Path(sys.argv[2]), progress=progress)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_process_leaves_no_bundle(number: signal.Signals, source: Path, tmp_path: Path) -> None:
    write_source(source, {"big.bin": bytes(20 * SEGMENT_BYTES)})
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(source), str(tmp_path / "out")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout is not None
    with child.stdout:
        for _ in range(4):
            child.stdout.readline()
        child.send_signal(number)
        child.stdout.read()
    assert child.wait(timeout=20) != 0
    assert not (tmp_path / "out").exists()
    left = [path for path in tmp_path.iterdir() if path.name != "source"]
    if number == signal.SIGINT:
        assert left == []
        return
    (partial,) = left
    assert partial.name.startswith(".out.partial-")
    assert not (partial / "index.json").exists()
    with pytest.raises(BundleInvalid):
        open_layout(partial)
    assert pack_files(KEYS, KEY, source, tmp_path / "out").files == len(FILES) + 1  # the next one works


MEASURED = """
import resource, sys
from pathlib import Path
from oci_hook.bundle.segments import ContentKey
from tests.bundles import make_owner, pack_files
keys = make_owner()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pack_files(keys, ContentKey(bytes(32)), Path(sys.argv[1]), Path(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_flat(tmp_path: Path) -> None:
    """128 MiB packed in a process whose peak grows by less than 24 MiB."""
    source, output = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    with (source / "big.bin").open("wb") as file:
        file.truncate(128 * 2**20)
    command = [sys.executable, "-c", MEASURED, str(source), str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    shutil.rmtree(output)  # pytest keeps the folders of its last runs
    assert int(done.stdout) < 24 * 1024


def test_no_descriptor_is_left(source: Path, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    pack_files(KEYS, KEY, source, tmp_path / "out")
    with pytest.raises(SczError):
        pack_files(KEYS, KEY, source, tmp_path / "out")
    link_outside(source)
    with pytest.raises(SczError):
        pack_files(KEYS, KEY, source, tmp_path / "other")
    assert len(os.listdir("/proc/self/fd")) == before
