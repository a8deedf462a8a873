"""`owner.packing`, `sczctl pack`: bundle and content key appear together, whenever the work is interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from oci_hook.bundle.model import ModelId
from oci_hook.errors import FileUnreadable, OutputExists, SourceInvalid
from oci_hook.owner import packing
from oci_hook.owner.keyring import open_keyring, seal_content_key
from oci_hook.owner.records import ContentKeyRecord, OwnerRecords
from tests.bundles import POLICY
from tests.commands import FILES, SUBJECT, Household, crashed, done, misused, refused, sczctl, snapshot


@pytest.fixture
def house() -> Iterator[Household]:
    """In memory, where syncing costs nothing."""
    with tempfile.TemporaryDirectory(prefix="scz-packing.", dir="/dev/shm") as folder:
        yield Household(Path(folder))


def is_whole(house: Household, bundle: Path) -> bool:
    """Whether a bundle verifies and decrypts, by its owner's own commands."""
    words = ["verify", bundle, "--owner", house.keys / "owner.json", "--keys", house.keys]
    return bundle.exists() and sczctl(*words).code == 0


def nothing_happened(house: Household, before: dict[str, tuple[int, bytes]]) -> None:
    assert snapshot(house.keys, house.usb, house.source) == before
    assert [path for path in house.usb.iterdir() if path.name != "out"] == []


# --- the command ------------------------------------------------------------------------------------------------------


def test_pack_says_what_it_made(house: Household) -> None:
    packed = done(sczctl(*house.pack_words(house.usb / "bundle"), "--json"))
    assert packed.json["files"] == len(FILES)
    assert packed.json["bytes"] == sum(len(data) for data in FILES.values())
    assert (packed.json["name"], packed.json["version"], packed.json["generation"]) == ("minilm", "1", 1)
    record = json.loads((house.keys / "models" / "minilm" / "1.json").read_text())
    assert (record["manifest"], record["image"]) == (packed.json["manifest"], packed.json["image"])
    assert is_whole(house, house.usb / "bundle")
    told = done(sczctl(*house.pack_words(house.usb / "bundle2", version="2")))
    assert told.out.startswith("packed minilm:2: 2 files, ")
    assert "packing" in told.err


def test_the_options_are_what_is_signed(house: Household) -> None:
    words = [*house.pack_words(house.usb / "b"), "--subject", "other", "--audience", "ours", "--token-age", "120"]
    fields = house.usb / "fields.json"
    fields.write_text('{"framework": "safetensors", "privacy": {"epsilon": 3.0}}')
    done(sczctl(*words, "--generation", "7", "--issuer-key", "A" * 43, "--fields", fields))
    document = done(sczctl("inspect", "--json", house.usb / "b")).json
    assert document["model"] == {"name": "minilm", "version": "1", "generation": 7}
    assert document["fields"] == {"framework": "safetensors", "privacy": {"epsilon": 3.0}}
    (identity,) = document["access"]["identities"]
    assert (identity["audience"], identity["keys"]) == ("ours", ["A" * 43])
    assert identity["subjects"] == sorted([SUBJECT, "other"])
    assert document["access"]["token_age_seconds"] == 120


def test_an_access_policy_from_a_file(house: Household) -> None:
    policy = {
        "identities": [{"issuer": "https://x", "audience": "a", "subjects": ["s"]}],
        "token_age_seconds": 600,
        "runtimes": ["runc"],
        "not_after": 2_000_000_000,
        "share": True,
    }
    (house.usb / "access.json").write_text(json.dumps(policy))
    words = ["pack", house.source, "-o", house.usb / "b", "--keys", house.keys, "--name", "m", "--version", "1"]
    done(sczctl(*words, "--access", house.usb / "access.json"))
    assert done(sczctl("inspect", "--json", house.usb / "b")).json["access"] == policy


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--access", "x.json"], ["--access excludes"]),
        (["--name", "Big"], ["--name", "'Big' is not a name"]),
        (["--name", "a/b"], ["--name"]),
        (["--name", "x" * 65], ["--name"]),
        (["--version", "a:b"], ["--version", "'a:b' is not a version"]),
        (["--version", ".hidden"], ["--version"]),
        (["--version", ""], ["--version"]),
        (["--generation", "0"], ["--generation"]),
        (["--generation", "9223372036854775808"], ["--generation"]),
        (["--token-age", "59"], ["--token-age"]),
        (["--token-age", "x"], ["--token-age"]),
    ],
)
def test_options_that_make_no_sense(house: Household, extra: list[str], words: list[str]) -> None:
    before = snapshot(house.keys, house.usb, house.source)
    misused(sczctl(*house.pack_words(house.usb / "bundle"), *extra), *words)
    nothing_happened(house, before)


@pytest.mark.parametrize("given", [[], ["--issuer", "https://x"], ["--subject", "s"]])
def test_a_model_that_nobody_may_use_is_not_packed(house: Household, given: list[str]) -> None:
    before = snapshot(house.keys, house.usb, house.source)
    words = ["pack", house.source, "-o", house.usb / "b", "--keys", house.keys, "--name", "m", "--version", "1"]
    misused(sczctl(*words, *given), "who may use the model")
    nothing_happened(house, before)


@pytest.mark.parametrize(
    ("option", "contents", "word"),
    [
        ("--access", "{}", "identities"),
        ("--access", "[]", "not a JSON object"),
        ("--access", '{"identities": [], "token_age_seconds": 600, "share": false}', "identities"),
        ("--fields", "[1]", "not a JSON object"),
        ("--fields", '{"a": 1, "a": 2}', "duplicate"),
        ("--fields", '{"a": NaN}', "NaN"),
        ("--fields", '{"a": 1e999}', "fields"),
        ("--fields", '{"a": "' + "x" * (64 << 10) + '"}', "larger than"),
    ],
)
def test_files_that_cannot_be_signed(house: Household, option: str, contents: str, word: str) -> None:
    path = house.usb / "given.json"
    path.write_text(contents)
    words = ["pack", house.source, "-o", house.usb / "b", "--keys", house.keys, "--name", "m", "--version", "1"]
    if option == "--fields":
        words += ["--issuer", "https://x", "--subject", "s"]
    before = snapshot(house.keys, house.usb, house.source)
    refused(sczctl(*words, option, path), SourceInvalid.code, word)
    assert snapshot(house.keys, house.usb, house.source) == before
    assert list(house.usb.iterdir()) == [path]


def test_a_version_is_packed_once(house: Household) -> None:
    house.pack()
    before = snapshot(house.keys, house.usb, house.source)
    again = sczctl(*house.pack_words(house.usb / "again"))
    refused(again, OutputExists.code, "minilm:1 was packed before", "give another version")
    nothing_happened(house, before)
    done(sczctl(*house.pack_words(house.usb / "again", version="2")))


def test_an_output_that_exists_or_has_no_folder(house: Household) -> None:
    (house.usb / "out").write_bytes(b"precious")
    before = snapshot(house.keys, house.usb, house.source)
    refused(sczctl(*house.pack_words(house.usb / "out")), OutputExists.code, "exists")
    nothing_happened(house, before)
    nowhere = house.usb / "absent" / "bundle"
    refused(sczctl(*house.pack_words(nowhere)), FileUnreadable.code, "does not exist", f"mkdir -p {nowhere.parent}")
    nothing_happened(house, before)


def test_a_trailing_slash_is_no_other_output(house: Household) -> None:
    done(sczctl(*house.pack_words(Path("x")), "-o", f"{house.usb}/bundle/"))
    assert is_whole(house, house.usb / "bundle")


@pytest.mark.parametrize("problem", ["model.json", "model.json/x", "link", "fifo", "absent", "file", "empty", "name"])
def test_sources_that_cannot_be_packed(house: Household, problem: str) -> None:
    source = house.source
    if problem.startswith("model.json"):
        (source / problem).parent.mkdir(exist_ok=True)
        (source / problem).write_bytes(b"{}")
    elif problem == "link":
        (source / "weights" / "link").symlink_to("model.bin")
    elif problem == "fifo":
        os.mkfifo(source / "weights" / "fifo")
    elif problem == "name":
        Path(os.fsdecode(os.fsencode(source) + b"/\xff")).write_bytes(b"x")
    else:
        shutil.rmtree(source)
        if problem == "file":
            source.write_bytes(b"x")
        elif problem == "empty":
            (source / "folder").mkdir(parents=True)
    before = snapshot(house.keys, house.usb)
    tried = sczctl(*house.pack_words(house.usb / "bundle"))
    if problem == "file":  # click's own word for it
        misused(tried, "is a file")
    else:
        refused(tried, SourceInvalid.code)
    assert snapshot(house.keys, house.usb) == before
    assert list(house.usb.iterdir()) == []


def test_an_output_inside_the_source(house: Household) -> None:
    before = snapshot(house.keys, house.source)
    refused(sczctl(*house.pack_words(house.source / "bundle")), SourceInvalid.code, "inside the source")
    assert snapshot(house.keys, house.source) == before
    assert sorted(path.name for path in house.source.iterdir()) == ["config.json", "weights"]


def test_a_folder_that_is_no_owner_s(house: Household) -> None:
    words = [*house.pack_words(house.usb / "b"), "--keys", house.source]
    before = snapshot(house.source)
    refused(sczctl(*words), 24, "owner.json")
    assert snapshot(house.source) == before
    assert list(house.usb.iterdir()) == []


# --- interrupted ------------------------------------------------------------------------------------------------------


def test_pack_killed_at_any_step(house: Household) -> None:
    bundle = house.usb / "bundle"
    words = house.pack_words(bundle)
    between = step = 0
    while crashed(lambda: done(sczctl(*words)), step + 1):
        step += 1
        has_key = (house.keys / "models" / "minilm" / "1.json").exists()
        if bundle.exists():
            assert is_whole(house, bundle)
            shutil.rmtree(bundle)
            (house.keys / "models" / "minilm" / "1.json").unlink()
        elif has_key:
            between += 1  # between two renames; the next attempt says what to do
            refused(sczctl(*words), OutputExists.code, "was packed before", "remove that file")
            (house.keys / "models" / "minilm" / "1.json").unlink()
        done(sczctl(*words))
        assert is_whole(house, bundle)
        for left in house.usb.iterdir():
            assert left == bundle or (left.name.startswith(".bundle.partial-") and left.stat().st_mode & 0o777 == 0o700)
            shutil.rmtree(left)
        (house.keys / "models" / "minilm" / "1.json").unlink()
    assert step > 10
    assert between <= 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_pack_interrupted_at_random_moments(house: Household, number: signal.Signals) -> None:
    (house.source / "large.bin").write_bytes(os.urandom(48 << 20))
    bundle, words = house.usb / "bundle", house.pack_words(house.usb / "bundle")
    began = time.monotonic()
    done(sczctl(*words))
    usual, dice, early = time.monotonic() - began, random.Random(3), 0
    for _ in range(8):
        shutil.rmtree(bundle)
        (house.keys / "models" / "minilm" / "1.json").unlink()
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os._exit(sczctl(*words).code)
        time.sleep(dice.uniform(0.1, 0.9) * usual)
        os.kill(child, number)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, -9 if number == signal.SIGKILL else 130)
        if code != 0 and not bundle.exists():
            early += 1
            if number == signal.SIGINT:
                assert list(house.usb.iterdir()) == []
            done(sczctl(*words))
        assert is_whole(house, bundle)
    assert early > 0


def test_an_interrupted_command_says_so_and_ends_with_130(house: Household) -> None:
    (house.source / "large.bin").write_bytes(bytes(192 << 20))
    words = [str(word) for word in house.pack_words(house.usb / "bundle")]
    process = subprocess.Popen(
        [sys.executable, "-c", "from oci_hook.cli import main; main()", *words], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    while not list(house.usb.iterdir()) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "sczctl: aborted" in err
    assert "Traceback" not in err
    assert list(house.usb.iterdir()) == []


# --- what goes wrong at the end ---------------------------------------------------------------------------------------


def attempt(
    house: Household, *, output: Path | None = None, progress: Callable[[int], object] = lambda done: None
) -> object:
    def nobody_is_asked() -> str:
        raise AssertionError("the keys have no passphrase")

    return packing.pack_version(
        open_keyring(house.keys, nobody_is_asked),
        house.source,
        output or house.usb / "bundle",
        model=ModelId("minilm", "1", 1),
        access=POLICY,
        fields={},
        created=0,
        random=os.urandom,
        progress=progress,
    )


def test_a_key_that_cannot_be_kept_takes_the_bundle_with_it(house: Household) -> None:
    (house.keys / "models").write_bytes(b"in the way")
    with pytest.raises(FileUnreadable):
        attempt(house)
    assert list(house.usb.iterdir()) == []
    (house.keys / "models").unlink()
    attempt(house)
    assert is_whole(house, house.usb / "bundle")


def test_an_output_that_appears_meanwhile_takes_the_key_with_it(
    house: Household, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = OwnerRecords.save_content_key

    def slower(records: OwnerRecords, record: ContentKeyRecord) -> None:
        save(records, record)
        (house.usb / "bundle").mkdir()

    monkeypatch.setattr(OwnerRecords, "save_content_key", slower)
    with pytest.raises(OutputExists, match="meanwhile"):
        attempt(house)
    monkeypatch.undo()
    assert list(house.usb.iterdir()) == [house.usb / "bundle"]
    assert list((house.usb / "bundle").iterdir()) == []
    (house.usb / "bundle").rmdir()
    attempt(house)
    assert is_whole(house, house.usb / "bundle")


def test_a_version_that_is_packed_meanwhile_keeps_its_own_key(
    house: Household, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slower(*arguments: object, **named: object) -> bytes:
        monkeypatch.undo()
        house.pack("other")
        return seal_content_key(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(packing, "seal_content_key", slower)
    with pytest.raises(OutputExists):
        attempt(house)
    assert not (house.usb / "bundle").exists()
    assert is_whole(house, house.usb / "other" / "bundle")


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    subprocess.run(["/bin/mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True, env={})
    try:
        yield folder
    finally:
        subprocess.run(["/bin/umount", str(folder)], check=True, env={})
        assert not os.path.ismount(folder)


def test_a_full_disk(house: Household) -> None:
    before = snapshot(house.keys)
    with small_disk(house.usb / "disk", "12k") as target:
        words = (
            "No space left on device",
            f"the file system on {target} has 12 KiB free",
            "or give -o on another disk",
        )
        refused(sczctl(*house.pack_words(target / "bundle")), FileUnreadable.code, *words)
        assert list(target.iterdir()) == []
        assert snapshot(house.keys) == before
    done(sczctl(*house.pack_words(target / "bundle")))


def test_a_disk_that_fills_up_while_packing(house: Household) -> None:
    (house.source / "large").write_bytes(bytes(3 << 20))
    before = snapshot(house.keys)
    with small_disk(house.usb / "disk", "8m") as target:

        def fill(_done: int) -> None:
            """Somebody else copies something large to that disk."""
            with contextlib.suppress(OSError), (target / "other").open("ab") as other:
                while True:
                    other.write(bytes(1 << 16))
                    other.flush()

        with pytest.raises(FileUnreadable) as caught:
            attempt(house, output=target / "bundle", progress=fill)
        assert "No space left on device: " in caught.value.message
        assert f"are needed, and the file system on {target} has " in caught.value.message
        assert caught.value.advice.startswith(f"free 4 MiB on {target}")
        assert [path.name for path in target.iterdir()] == ["other"]
        assert snapshot(house.keys) == before
        (target / "other").unlink()
        attempt(house, output=target / "bundle")


def test_the_disk_of_the_keys_is_full(house: Household) -> None:
    keys = house.keys
    kept = keys.rename(keys.with_name("kept"))
    with small_disk(keys, "64k"):
        shutil.copytree(kept, keys, dirs_exist_ok=True)
        with contextlib.suppress(OSError), (keys / "other").open("wb") as other:
            other.write(bytes(1 << 20))
        before = snapshot(keys)
        words = ("where the folder of --keys is", str(keys), "KiB are needed")
        refused(sczctl(*house.pack_words(house.usb / "bundle")), FileUnreadable.code, *words)
        assert snapshot(keys) == before
        assert list(house.usb.iterdir()) == []


def test_signals_are_let_through_again_afterwards(house: Household) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    attempt(house)
    with pytest.raises(OutputExists):
        attempt(house)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
