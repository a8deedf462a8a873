"""`sczctl` in this process, as its users type it; and a household of an owner, a host and a device without a TPM.

Everything lies below one folder, also what would be below /etc and /var on a host. What a command does to the disk is
told from a `snapshot` before and after.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oci_hook.attestation.device_record import format_device_record
from oci_hook.attestation.host_device import format_host_device
from oci_hook.bundle.layout import verify_digests
from oci_hook.cli import main
from oci_hook.owner.keyring import load_owner
from oci_hook.owner.records import OwnerRecords
from oci_hook.provenance import verified_manifest
from oci_hook.store import Store
from oci_hook.trust import Owner
from oci_hook.trust_folder import Trust
from tests.devices import SoftwareDevice, make_device

ISSUER, SUBJECT = "https://issuer.example", "system:serviceaccount:shop:recommender"
FILES = {"config.json": b'{"layers":6}', "weights/model.bin": bytes(range(256)) * 64}
PCRS = "4,7,8,9"


@dataclass(frozen=True)
class Done:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its standard output as JSON."""
        return json.loads(self.out)


def sczctl(*words: object) -> Done:
    """Run one command in this process, standard input being no terminal."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(word) for word in words])
        except SystemExit as leaving:
            return Done(leaving.code if isinstance(leaving.code, int) else 1, out.getvalue(), err.getvalue())
    raise AssertionError("main returned")


def refused(done: Done, code: int, *words: str) -> None:
    """Check that a command was refused as it should be: its code, one line and its remedy, on standard error alone."""
    assert done.code == code, (done.code, done.err)
    assert done.out == ""
    lines = [line for line in done.err.splitlines() if not line.startswith(("verifying", "packing", "decrypting"))]
    assert len(lines) == 2, done.err
    assert lines[0].startswith("sczctl: ")
    assert f" ({code}): " in lines[0]
    assert lines[1].startswith("  remedy: ")
    assert len(lines[1]) > len("  remedy: ")
    assert "Traceback" not in done.err
    for word in words:
        assert word in done.err


def misused(done: Done, *words: str) -> None:
    """Check that a command was refused for how it was called: code 2, on standard error alone."""
    assert done.code == 2, (done.code, done.err)
    assert done.out == ""
    assert "Error: " in done.err
    assert "Traceback" not in done.err
    for word in words:
        assert word in done.err


def snapshot(*folders: Path) -> dict[str, tuple[int, bytes]]:
    """Every file and link below some folders, with its mode and contents; a lock, which holds nothing, is left out."""
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_symlink():
                found[str(path)] = (0, os.readlink(path).encode())
            elif path.is_file() and path.name != ".lock":
                found[str(path)] = (path.stat().st_mode, path.read_bytes())
    return found


def flip_bit(path: Path) -> None:
    """Flip one bit in the middle of a file, whatever its mode."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    """A folder with these files."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


class Household:
    """An owner and a host below one empty folder of root's; nobody trusts anybody yet, nothing is packed.

    Args:
        directory: Empty, or to be made.
        name: The owner's.
    """

    def __init__(self, directory: Path, *, name: str = "acme") -> None:
        self.keys, self.host, self.usb = (directory / part for part in ("keys", "host", "usb"))
        self.store_folder, self.config = self.host / "store", self.host / "config.toml"
        self.store = Store(str(self.store_folder))
        for folder in (directory, self.host, self.usb):
            folder.mkdir(exist_ok=True)
        paths = {"store": "store", "trust": "trust", "runtime": "run", "audit": "log/audit.jsonl"}
        lines = [f'{key} = "{self.host / value}"' for key, value in paths.items()]
        self.config.write_text("[paths]\n" + "\n".join(lines) + "\n")
        self.source = write_files(directory / "source", FILES)
        done(sczctl("keygen", "--keys", self.keys, "--name", name, "--no-passphrase"))
        self.owner: Owner = load_owner(self.keys)
        self.devices: dict[str, SoftwareDevice] = {}

    def enrolled(self, name: str = "edge-1", **how: Any) -> SoftwareDevice:
        """Put the record of a device without a TPM into the owner's folder."""
        device = self.devices[name] = make_device(self.owner.owner_id, name, **how)
        OwnerRecords(self.keys).save_device(name, format_device_record(device.record))
        return device

    def is_device(self, device: SoftwareDevice) -> None:
        """Let the host be that device."""
        self.store.save_device(format_host_device(device.host))

    def ctl(self, *words: object) -> Done:
        """A command with the host's configuration."""
        return sczctl("--config", self.config, *words)

    def trust(self) -> None:
        """The host trusts the owner."""
        done(self.ctl("trust", "add", "owner", self.keys / "owner.json"))

    def pack_words(self, output: Path, *, name: str = "minilm", version: str = "1") -> list[str | Path]:
        """The words of `sczctl pack`."""
        words: list[str | Path] = ["pack", self.source, "-o", output, "--keys", self.keys]
        return [*words, "--name", name, "--version", version, "--issuer", ISSUER, "--subject", SUBJECT]

    def pack(self, folder: str = "out", *, name: str = "minilm", version: str = "1") -> Path:
        """Pack the source; returns the folder that the bundle lies in."""
        out = self.usb / folder
        out.mkdir(exist_ok=True)
        done(sczctl(*self.pack_words(out / "bundle", name=name, version=version)))
        return out

    def grant(self, out: Path, *, model: str = "minilm:1", device: str = "edge-1", file: str = "grant.jwt") -> Path:
        """Grant a version to a device."""
        done(sczctl("grant", model, "--keys", self.keys, "--device", device, "-o", out / file))
        return out / file

    def sign_words(self, output: Path, *, model: str = "minilm", device: str = "edge-1") -> list[str | Path]:
        """The words of `sczctl boot-policy sign`."""
        words: list[str | Path] = ["boot-policy", "sign", "--keys", self.keys, "--model", model]
        return [*words, "--device", device, "--pcr", PCRS, "-o", output]

    def prepared(self) -> Path:
        """All that comes before `sczctl add`; returns the folder that travelled."""
        self.is_device(self.enrolled())
        self.trust()
        out = self.pack()
        self.grant(out)
        done(sczctl(*self.sign_words(out / "boot-policy.json")))
        return out

    def verified_models(self) -> dict[str, bool]:
        """Each model that has a name in the store, verified to its last byte; the value says whether it is granted."""
        found = {}
        owners = Trust(str(self.host / "trust")).owners()
        for model in self.store.models():
            with self.store.open_model(model) as layout:
                manifest, _ = verified_manifest(layout, owners)
                verify_digests(layout, manifest, lambda _done: None)
            found[f"{model.name}:{model.version}"] = self.store.has_grant(model.manifest_digest)
        return found


def done(result: Done) -> Done:
    """Check that a command succeeded."""
    assert result.code == 0, result.err
    return result


def crashed(action: Callable[[], object], step: int) -> bool:
    """Let a child do something and end it, as `kill -9` would, before its `step`-th act on the file system.

    Returns:
        Whether it came that far; False: it was done before.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _crash_before(step)
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, 9)
    return os.waitstatus_to_exitcode(status) == 9


def _crash_before(step: int) -> None:
    """Audit hooks (sys.addaudithook) cannot be removed again: call it in a child only."""
    changing = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate", "os.chmod"}
    acts = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal acts
        opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
        if event in changing or opens:
            acts += 1
            if acts == step:
                os._exit(9)

    sys.addaudithook(count)
