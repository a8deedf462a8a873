"""What of a key is where, measured from outside: in the memory of every process of a start, and everywhere it writes.

The start is held at its last step before the model becomes visible (the audit log is locked by the test): by then the
TPM's part has ended, the writer has ended, and the hook has all that it will ever have. docs/threat-model.md, "What
Python cannot promise", states these numbers.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from oci_hook.attestation.boot_policy import parse_boot_policy, verify_boot_policy
from oci_hook.attestation.sealed import WrappedSecret
from oci_hook.attestation.tpm import open_tpm
from oci_hook.attestation.unsealing import Unsealing
from oci_hook.bundle.grant import unwrap_content_key
from oci_hook.config import load_config
from oci_hook.host import load_host
from oci_hook.owner.keyring import open_content_key, open_keyring
from oci_hook.owner.records import OwnerRecords
from tests.engines import RuntimeNamespace, root_is_closed
from tests.integration.test_endurance import start_in_background, wait_for_hook
from tests.integration.test_start import hook_processes, start
from tests.process_memory import copies
from tests.scene import Scene
from tests.tpm_proxy import Exchange, Tap, name_of
from tests.workshop import is_dead, wait_until

#: The most that the hook may have of each when all is decrypted: what docs/threat-model.md says.
KEY_COPIES, SECRET_COPIES = 2, 2


@dataclass(frozen=True, repr=False)
class Keys:
    """What a start is not to leave anywhere."""

    content_key: bytes
    tpm_secret: bytes


@pytest.fixture(scope="module")
def keys(scene: Scene) -> Keys:
    """As the owner has the content key, and as the TPM gives the secret that opens it."""
    keyring = open_keyring(scene.owner / "keys", lambda: "")
    record = OwnerRecords(keyring.folder).load_content_key("small", "1")
    digest = record.manifest_digest
    key = open_content_key(record.sealed_key, manifest_digest=digest, recovery_key=keyring.recovery_key)
    config = load_config(str(scene.config))
    host = load_host(config)
    payload = host.store.load_grant(digest).split(b".")[1]
    grant = json.loads(base64.urlsafe_b64decode(payload + b"=="))
    sealed = {name: base64.urlsafe_b64decode(text + "==") for name, text in grant["sealed"].items()}
    owner, device_class = keyring.owner, grant["device"]["class"]
    policy = parse_boot_policy(host.store.load_boot_policy(owner.owner_id, "small", device_class))
    form = verify_boot_policy(policy, owner=owner, model_name="small", device_class=device_class).forms[0]
    with open_tpm(config.tpm_tcti, scene.runtime_directory / "tpm.lock", timeout_seconds=20) as tpm:
        asked = Unsealing(
            sealed=WrappedSecret(**sealed),
            form=form,
            boot_policy_key=owner.boot_policy_key,
            policy_ref=bytes.fromhex(grant["boot_policy"]["policy_ref"]),
            counter_index=grant["counter"]["index"],
            counter_maximum=grant["counter"]["maximum"],
        )
        secret = tpm.unseal(host.device, asked)
    wrapped = base64.urlsafe_b64decode(grant["wrapped_key"] + "==")
    assert unwrap_content_key(wrapped, secret, digest).value == key.value
    return Keys(key.value, secret)


@dataclass(frozen=True)
class Held:
    """A start that has decrypted all, and waits to write its record."""

    hook: int
    children: list[int]
    exchanges: list[Exchange]


@contextmanager
def held_start(scene: Scene, keys: Keys) -> Iterator[Held]:
    """Hold a start there; at the end of the block it goes on, and its container runs."""
    locks: list[int] = []

    def sent(exchange: Exchange) -> None:
        if name_of(exchange.code) == "Quote" and not locks:  # the log's head was read before
            locks.append(os.open(scene.audit, os.O_RDWR | os.O_CLOEXEC))
            fcntl.flock(locks[0], fcntl.LOCK_EX)

    token, good = scene.token("hygiene"), scene.config.read_text()
    assert start(scene, token).returncode == 0
    with Tap(scene.tpm.socket_path, sent=sent) as tap:
        scene.config.write_text(good.replace(scene.tpm.tcti, tap.tcti))
        process = start_in_background(scene, token, "runc")
        try:
            hook = wait_for_hook(scene, process)
            assert hook is not None
            wait_until(lambda: copies(hook, keys.content_key) > 0)
            wait_until(lambda: waits_for_lock(hook, scene.audit))  # for ten seconds at most
            yield Held(hook, children(hook), tap.exchanges)
        finally:
            scene.config.write_text(good)
            for fd in locks:
                os.close(fd)
            process.communicate(timeout=60)
    assert process.returncode == 0
    assert (scene.host / "trace" / "ran").exists()


def waits_for_lock(pid: int, path: Path) -> bool:
    """Whether a process has a file open: the hook has the audit log, to lock it, right before the model is visible."""
    links = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            links.append(os.readlink(fd))
    return str(path) in links


def children(pid: int) -> list[int]:
    """Of a process with one thread, and theirs."""
    try:
        own = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [each for child in own for each in (child, *children(child)) if not is_dead(each)]


def count(pid: int, what: bytes) -> int:
    try:
        return copies(pid, what)
    except OSError:  # it has ended
        return 0


def test_where_a_key_is_when_all_is_decrypted(scene: Scene, keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    with held_start(scene, keys) as held:
        found = copies(held.hook, keys.content_key), copies(held.hook, keys.tpm_secret)
        with capsys.disabled():
            print(f"\n  in the hook: content key {found[0]} times, TPM secret {found[1]} times")
        assert 0 < found[0] <= KEY_COPIES
        assert found[1] <= SECRET_COPIES
        # The writer has ended; what holds the destinations was forked before any key was here, as what looks.
        assert [(count(pid, keys.content_key), count(pid, keys.tpm_secret)) for pid in held.children] == [
            (0, 0) for _ in held.children
        ]
        assert "Unseal" in [name_of(each.code) for each in held.exchanges]
        recorded = b"".join(each.command + each.response for each in held.exchanges)
        assert keys.tpm_secret not in recorded
        assert keys.content_key not in recorded
        pid = held.hook
    assert not hook_processes(scene)
    assert is_dead(pid)


def test_what_may_read_a_process_that_has_keys(scene: Scene, keys: Keys) -> None:
    with held_start(scene, keys) as held:
        for pid in (held.hook, *held.children):
            limits = Path(f"/proc/{pid}/limits").read_text()
            (core,) = [line.split()[-3:-1] for line in limits.splitlines() if line.startswith("Max core file size")]
            assert core == ["0", "0"]
        status = dict(line.split(":\t") for line in Path(f"/proc/{held.hook}/status").read_text().splitlines())
        assert int(status["VmLck"].split()[0]) > 0
        # Another user runs nothing where only root may enter the root directory.
        with RuntimeNamespace(hide=False) if root_is_closed() else nullcontext() as namespace:
            prefix = namespace.prefix if namespace is not None else ()
            for who in READERS.values():
                words = [*prefix, "/usr/bin/setpriv", *who]
                assert [reads_memory_map(words, place) for place in (str(held.hook), "self")] == [False, True]


READERS = {
    "another user": ["--reuid", "65534", "--regid", "65534", "--clear-groups"],
    "root without capabilities": ["--bounding-set", "-all", "--inh-caps", "-all"],
}


def reads_memory_map(who: list[str], place: str) -> bool:
    """Whether somebody may look at a process's memory in /proc; at the reader's own is the control."""
    command = [*who, "/bin/cat", f"/proc/{place}/maps"]
    environment = {"PATH": "/usr/bin:/bin"}
    return subprocess.run(command, capture_output=True, check=False, env=environment).returncode == 0


def test_no_key_is_written_anywhere(scene: Scene, keys: Keys) -> None:
    """Command lines, environments, records, log, what is told: raw, hexadecimal and base64."""
    spellings = [
        spelt
        for key in (keys.content_key, keys.tpm_secret)
        for spelt in (key, key.hex().encode(), base64.b64encode(key)[:42], base64.urlsafe_b64encode(key)[:42])
    ]
    with held_start(scene, keys) as held:
        seen = b"".join(
            Path(f"/proc/{pid}/{name}").read_bytes()
            for pid in (held.hook, *held.children)
            for name in ("cmdline", "environ")
        )
    files = [path for folder in (scene.host, scene.usb) for path in folder.rglob("*") if path.is_file()]
    assert scene.audit in files
    assert not [spelt for spelt in spellings if spelt in seen]
    assert not [(path, spelt) for path in files for spelt in spellings if spelt in path.read_bytes()]
