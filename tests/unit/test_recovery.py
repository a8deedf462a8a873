"""`owner.recovery`, `sczctl recover`, `sczctl keygen --recovery-only` and `--recovery-key`: what comes back, what not.

Every refusal also shows that nothing was written. The TPM's part (a grant after a recovery opens) is
tests/integration/test_updates.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from oci_hook.bundle.image import RECOVERY_ANNOTATION, parse_image_manifest, parse_recovery_copy
from oci_hook.bundle.layout import open_layout
from oci_hook.bundle.segments import ContentKey
from oci_hook.documents import canonical, encode_base64url
from oci_hook.errors import (
    BundleInvalid,
    BundleMismatch,
    DecryptionRefused,
    FileUnreadable,
    KeyInvalid,
    OutputExists,
    OwnerUntrusted,
)
from oci_hook.jws import owner_jwk, public_jwk
from oci_hook.owner.keyring import open_keyring, seal_content_key
from oci_hook.owner.records import OwnerRecords
from oci_hook.owner.recovery import Recipient, load_recipient, load_recovery_copy, parse_recipient, recovery_copy
from tests.attestation_vectors import hostile, value_or_ours
from tests.bundles import blob_path
from tests.commands import FILES, Household, crashed, done, flip_bit, misused, refused, sczctl, snapshot

PASSPHRASE = "correct horse battery"


class Vault:
    """An owner's household, and an offline recovery key in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.house = Household(folder / "house")
        self.folder = folder / "vault"
        done(sczctl("keygen", "--recovery-only", "--keys", self.folder, "--name", "vault", "--no-passphrase"))
        self.public, self.private = self.folder / "recovery.json", self.folder / "recovery.key"

    def named(self) -> None:
        """The owner names the key."""
        done(sczctl("keygen", "--keys", self.house.keys, "--recovery-key", self.public))

    def recover(self, bundle: Path, *words: object, key: Path | None = None) -> Any:
        return sczctl("recover", bundle, "--recovery-key", key or self.private, *words)

    def restore(self, bundle: Path, *words: object, key: Path | None = None) -> Any:
        return self.recover(bundle, "--keys", self.house.keys, *words, key=key)

    def decrypt(self, bundle: Path, output: Path, *words: object) -> Any:
        return self.recover(bundle, "--owner", self.house.keys / "owner.json", "-o", output, *words)


@pytest.fixture
def vault() -> Iterator[Vault]:
    """In memory, where syncing costs nothing."""
    with tempfile.TemporaryDirectory(prefix="scz-recovery.", dir="/dev/shm") as folder:
        yield Vault(Path(folder))


@pytest.fixture
def bundle(vault: Vault) -> Path:
    """A bundle that carries a recovery copy."""
    vault.named()
    return vault.house.pack() / "bundle"


def replace_image_manifest(bundle: Path, annotations: dict[str, str] | None) -> None:
    """Another image manifest, as whoever has the registry can make it: nothing but the owner's manifest is signed."""
    index = json.loads((bundle / "index.json").read_text())
    old = bundle / blob_path(index["manifests"][0]["digest"])
    document = json.loads(old.read_bytes())
    document.pop("annotations", None)
    data = canonical({**document, **({} if annotations is None else {"annotations": annotations})})
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    old.unlink()
    (bundle / blob_path(digest)).write_bytes(data)
    index["manifests"][0].update({"digest": digest, "size": len(data)})
    (bundle / "index.json").write_text(json.dumps(index))


def annotations(bundle: Path) -> dict[str, str]:
    with open_layout(bundle) as layout:
        return dict(json.loads((bundle / blob_path(layout.image_digest)).read_bytes()).get("annotations", {}))


# --- keygen -----------------------------------------------------------------------------------------------------------


def test_a_recovery_key_is_a_folder_of_its_own_under_a_passphrase(tmp_path: Path) -> None:
    words, file = ["keygen", "--recovery-only", "--keys", tmp_path / "vault", "--name", "vault"], tmp_path / "phrase"
    file.write_text(PASSPHRASE + "\n")
    made = done(sczctl(*words, "--passphrase-file", file))
    recipient = parse_recipient((tmp_path / "vault" / "recovery.json").read_bytes())
    assert recipient.key.thumbprint in made.out
    assert b"ENCRYPTED PRIVATE KEY" in (tmp_path / "vault" / "recovery.key").read_bytes()
    assert sorted(path.name for path in (tmp_path / "vault").iterdir()) == [
        "passphrase.json",
        "recovery.json",
        "recovery.key",
    ]
    assert stat.S_IMODE((tmp_path / "vault").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "vault" / "recovery.key").stat().st_mode) == 0o600
    refused(sczctl(*words, "--no-passphrase"), OutputExists.code)


def test_a_new_owner_names_it_at_once(vault: Vault, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    words = ["keygen", "--keys", keys, "--name", "other", "--no-passphrase", "--recovery-key", vault.public]
    assert "can be recovered with vault" in done(sczctl(*words)).out
    keyring = open_keyring(keys, lambda: "")
    assert load_recipient(keys, keyring.owner) == parse_recipient(vault.public.read_bytes())


def test_how_keygen_is_called(vault: Vault, tmp_path: Path) -> None:
    before = snapshot(vault.house.keys)
    keys = tmp_path / "keys"
    misused(sczctl("keygen", "--keys", keys), "Missing option '--name'")
    misused(sczctl("keygen", "--recovery-only", "--keys", keys), "Missing option '--name'")
    misused(sczctl("keygen", "--recovery-only", "--recovery-key", vault.public, "--keys", keys), "exclude each other")
    refused(sczctl("keygen", "--keys", keys, "--recovery-key", vault.public), KeyInvalid.code)
    refused(sczctl("keygen", "--keys", vault.house.keys, "--recovery-key", vault.private), KeyInvalid.code)
    refused(sczctl("keygen", "--keys", vault.house.keys, "--recovery-key", tmp_path / "no"), FileUnreadable.code)
    assert not keys.exists()
    assert snapshot(vault.house.keys) == before


def test_a_key_of_the_owners_own_folder_is_no_recovery_key(vault: Vault, tmp_path: Path) -> None:
    file = tmp_path / "recovery.json"
    file.write_bytes(Recipient("mine", vault.house.owner.recovery_key).document())
    before = snapshot(vault.house.keys)
    refused(sczctl("keygen", "--keys", vault.house.keys, "--recovery-key", file), KeyInvalid.code, "lost with it")
    assert snapshot(vault.house.keys) == before


def test_a_key_that_the_owner_did_not_sign_stops_the_packing(vault: Vault, tmp_path: Path) -> None:
    """Whoever can write the owner's folder, and has no key of it, names nobody."""
    stranger = Household(tmp_path / "stranger", name="evil")
    done(sczctl("keygen", "--keys", stranger.keys, "--recovery-key", vault.public))
    named = vault.house.keys / "recipient.jwt"
    for data in ((stranger.keys / "recipient.jwt").read_bytes(), vault.public.read_bytes(), b"", b"x" * 20_000):
        named.write_bytes(data)
        before = snapshot(vault.house.keys, vault.house.usb)
        words = vault.house.pack_words(vault.house.usb / "bundle")
        refused(sczctl(*words), KeyInvalid.code, "recipient.jwt", "--recovery-key")
        assert snapshot(vault.house.keys, vault.house.usb) == before
    vault.named()  # what mends it
    done(sczctl(*words))


# --- packing ----------------------------------------------------------------------------------------------------------


def test_the_copy_travels_in_the_image_manifest_and_the_host_takes_the_bundle(vault: Vault) -> None:
    vault.named()
    house = vault.house
    house.prepared()
    (text,) = annotations(house.usb / "out" / "bundle").values()
    thumbprint, _, sealed = text.partition(".")
    packed = done(sczctl(*house.pack_words(house.usb / "b2", version="2"), "--json"))
    assert packed.json["recovery_key"] == thumbprint
    assert "with a recovery copy" in done(sczctl(*house.pack_words(house.usb / "b3", version="3"))).out
    assert done(sczctl("inspect", "--json", house.usb / "out" / "bundle")).json["recovery_key"] == thumbprint
    assert (thumbprint, len(sealed)) == (parse_recipient(vault.public.read_bytes()).key.thumbprint, 151)
    done(house.ctl("add", house.usb / "out"))
    assert house.verified_models() == {"minilm:1": True}
    (model,) = house.store.models()
    with house.store.open_model(model) as layout, open_layout(house.usb / "out" / "bundle") as packed:
        assert load_recovery_copy(layout) == load_recovery_copy(packed) is not None


def test_without_a_key_a_bundle_is_as_before(vault: Vault) -> None:
    bundle = vault.house.pack() / "bundle"
    assert annotations(bundle) == {}
    packed = done(sczctl(*vault.house.pack_words(vault.house.usb / "b2", version="2"), "--json"))
    assert "recovery_key" not in packed.json
    shutil.rmtree(vault.house.keys / "models")
    refused(vault.restore(bundle), KeyInvalid.code, "carries no recovery copy")


# --- recovering -------------------------------------------------------------------------------------------------------


def test_lost_records_come_back_and_the_version_can_be_granted_again(vault: Vault, bundle: Path) -> None:
    house, record = vault.house, vault.house.keys / "models" / "minilm" / "1.json"
    before = OwnerRecords(house.keys).load_content_key("minilm", "1")
    refused(vault.restore(bundle), OutputExists.code, "sczctl grant")
    shutil.rmtree(house.keys / "models")
    house.enrolled()
    out = house.usb / "out"
    refused(sczctl("grant", "minilm:1", "--keys", house.keys, "--device", "edge-1", "-o", out / "g"), KeyInvalid.code)
    tried = done(vault.restore(bundle, "--dry-run"))
    assert "nothing was written" in tried.out
    assert not record.exists()
    restored = done(vault.restore(bundle, "--json"))
    assert (restored.json["name"], restored.json["dry_run"]) == ("minilm", False)
    after = OwnerRecords(house.keys).load_content_key("minilm", "1")
    assert (after.model, after.manifest_digest, after.image_digest) == (
        before.model,
        before.manifest_digest,
        before.image_digest,
    )
    assert stat.S_IMODE(record.stat().st_mode) == 0o600
    house.grant(out)
    done(sczctl("verify", bundle, "--owner", house.keys / "owner.json", "--keys", house.keys))


def test_a_lost_folder_leaves_the_plaintext(vault: Vault, bundle: Path) -> None:
    owner = vault.house.usb / "owner.json"
    shutil.copy(vault.house.keys / "owner.json", owner)
    shutil.rmtree(vault.house.keys)
    output = vault.house.usb / "plain"
    words = ("--owner", owner, "-o", output)
    done(vault.recover(bundle, *words, "--dry-run"))
    assert not output.exists()
    told = done(vault.recover(bundle, *words))
    assert "2 files decrypted" in told.out
    assert "decrypting" in told.err
    assert {name: (output / name).read_bytes() for name in FILES} == FILES
    assert sorted(str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()) == sorted(FILES)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (output, output / "weights")} == {0o700}
    assert stat.S_IMODE((output / "config.json").stat().st_mode) == 0o600
    refused(vault.recover(bundle, *words), OutputExists.code)


def test_the_recovery_keys_passphrase(vault: Vault, bundle: Path, tmp_path: Path) -> None:
    right, wrong, empty = (tmp_path / name for name in ("right", "wrong", "empty"))
    right.write_text(PASSPHRASE)
    wrong.write_text("incorrect horse")
    empty.write_text("")
    folder = tmp_path / "locked"
    words = ["keygen", "--recovery-only", "--keys", folder, "--name", "locked"]
    done(sczctl(*words, "--passphrase-file", right))
    done(sczctl("keygen", "--keys", vault.house.keys, "--recovery-key", folder / "recovery.json"))
    bundle = vault.house.pack("second", version="2") / "bundle"
    shutil.rmtree(vault.house.keys / "models")
    before = snapshot(vault.house.keys)
    for file in (wrong, empty):
        refused(vault.restore(bundle, "--passphrase-file", file, key=folder / "recovery.key"), KeyInvalid.code)
    refused(vault.restore(bundle, key=folder / "recovery.key"), KeyInvalid.code, "no terminal")
    (folder / "recovery.key").chmod(0o644)
    refused(vault.restore(bundle, "--passphrase-file", right, key=folder / "recovery.key"), KeyInvalid.code, "0644")
    (folder / "recovery.key").chmod(0o600)
    assert snapshot(vault.house.keys) == before
    done(vault.restore(bundle, "--passphrase-file", right, key=folder / "recovery.key"))


def test_another_key_opens_nothing_and_an_earlier_bundle_keeps_its_own(vault: Vault, bundle: Path) -> None:
    house, other = vault.house, vault.folder.parent / "other"
    done(sczctl("keygen", "--recovery-only", "--keys", other, "--name", "other", "--no-passphrase"))
    done(sczctl("keygen", "--keys", house.keys, "--recovery-key", other / "recovery.json"))
    second = house.pack("second", version="2") / "bundle"
    shutil.rmtree(house.keys / "models")
    before = snapshot(house.keys)
    for key in (other / "recovery.key", house.keys / "recovery.key", house.keys / "manifest.key"):
        refused(vault.restore(bundle, key=key), KeyInvalid.code, "sealed to another key")
    refused(vault.restore(second), KeyInvalid.code, "sealed to another key")
    for key in (vault.public, house.source / "config.json", house.keys / "absent"):
        refused(vault.restore(bundle, key=key), KeyInvalid.code)
    assert snapshot(house.keys) == before
    done(vault.restore(second, key=other / "recovery.key"))
    done(vault.restore(bundle))


def test_a_bundle_of_another_owner_is_refused(vault: Vault, bundle: Path, tmp_path: Path) -> None:
    other = Household(tmp_path / "other", name="evil")
    before = snapshot(other.keys)
    refused(vault.recover(bundle, "--keys", other.keys), OwnerUntrusted.code)
    refused(vault.recover(bundle, "--owner", other.keys / "owner.json", "-o", tmp_path / "p"), OwnerUntrusted.code)
    assert snapshot(other.keys) == before
    assert not (tmp_path / "p").exists()


def test_how_recover_is_called(vault: Vault, bundle: Path) -> None:
    owner, output = vault.house.keys / "owner.json", vault.house.usb / "plain"
    misused(vault.recover(bundle), "say what for")
    misused(vault.recover(bundle, "--keys", vault.house.keys, "-o", output), "say what for")
    misused(vault.recover(bundle, "-o", output), "belong together")
    misused(vault.restore(bundle, "--owner", owner), "belong together")
    refused(vault.restore(bundle.parent / "absent"), BundleInvalid.code)
    refused(vault.decrypt(bundle, vault.house.usb / "no" / "plain"), FileUnreadable.code)


# --- attacks on the copy ----------------------------------------------------------------------------------------------


def test_a_copy_that_was_changed_exchanged_or_taken_away_gives_nothing(vault: Vault, bundle: Path) -> None:
    """The image manifest is not signed: an attacker writes what they like there, with the public recovery key."""
    house = vault.house
    with open_layout(bundle) as layout:
        manifest_digest = layout.manifest_digest
    own = annotations(bundle)[RECOVERY_ANNOTATION]
    thumbprint, _, sealed = own.partition(".")
    recipient = parse_recipient(vault.public.read_bytes())
    second = annotations(house.pack("second", version="2") / "bundle")[RECOVERY_ANNOTATION]
    keyring = open_keyring(house.keys, lambda: "")
    chosen = ContentKey(b"\x07" * 32)
    other_use = seal_content_key(chosen, manifest_digest=manifest_digest, owner=keyring.owner)
    attacks = {
        "another version's": (second, KeyInvalid),
        "flipped": (f"{thumbprint}.{('B' if sealed[0] != 'B' else 'C') + sealed[1:]}", KeyInvalid),
        "another thumbprint": (f"{'A' * 43}.{sealed}", KeyInvalid),
        "sealed for another use": (f"{thumbprint}.{encode_base64url(other_use)}", KeyInvalid),
        "a chosen content key": (
            recovery_copy(chosen, manifest_digest, recipient)[RECOVERY_ANNOTATION],
            DecryptionRefused,
        ),
        "short": (own[:-4], BundleInvalid),
        "long": (own + "AAAA", BundleInvalid),
        "line feed": (own + "\n", BundleInvalid),
        "empty": ("", BundleInvalid),
    }
    shutil.rmtree(house.keys / "models")
    before = snapshot(house.keys)
    for text, error in attacks.values():
        replace_image_manifest(bundle, {RECOVERY_ANNOTATION: text})
        refused(vault.restore(bundle), error.code)
        refused(vault.decrypt(bundle, house.usb / "plain"), error.code)
        assert not (house.usb / "plain").exists()
    replace_image_manifest(bundle, None)
    refused(vault.restore(bundle), KeyInvalid.code, "carries no recovery copy")
    replace_image_manifest(bundle, {RECOVERY_ANNOTATION: own, "more": "x"})
    refused(vault.restore(bundle), BundleInvalid.code)
    assert snapshot(house.keys) == before
    replace_image_manifest(bundle, {RECOVERY_ANNOTATION: own})
    done(vault.restore(bundle))


def test_a_layer_that_was_changed_leaves_no_plaintext(vault: Vault, bundle: Path) -> None:
    output = vault.house.usb / "plain"
    with open_layout(bundle) as layout:
        layers = [bundle / blob_path(layer.digest) for layer in layout.layers]
    for layer in layers:
        flip_bit(layer)
        refused(vault.decrypt(bundle, output), DecryptionRefused.code)
        flip_bit(layer)
        whole = layer.read_bytes()
        layer.write_bytes(whole[:-1])
        refused(vault.decrypt(bundle, output), BundleMismatch.code)
        assert [path.name for path in vault.house.usb.iterdir()] == ["out"]
        layer.write_bytes(whole)
    done(vault.decrypt(bundle, output))


def decrypt_until(vault: Vault, bundle: Path, output: Path, number: signal.Signals) -> int:
    """Decrypt in a child that a signal ends when its second file is on the disk; returns how it ended."""
    child = os.fork()
    if child == 0:
        try:
            if number != signal.SIGKILL:
                signal.signal(number, signal.SIG_DFL)
            real, synced = os.fsync, list[int]()

            def fsync(descriptor: int) -> None:
                real(descriptor)
                synced.append(descriptor)
                if len(synced) == 2:
                    os.kill(os.getpid(), number)

            os.fsync = fsync
            os._exit(vault.decrypt(bundle, output).code)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_ends_a_decryption_leaves_no_plaintext(vault: Vault, bundle: Path, number: signal.Signals) -> None:
    output, before = vault.house.usb / "plain", signal.signal(number, signal.SIG_DFL)  # below nohup it is ignored
    try:
        assert decrypt_until(vault, bundle, output, number) == 128 + number
        assert [path.name for path in vault.house.usb.iterdir()] == ["out"]
        done(vault.decrypt(bundle, output))
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_what_a_kill_leaves_is_named_by_the_next_run(vault: Vault, bundle: Path) -> None:
    output = vault.house.usb / "plain"
    assert decrypt_until(vault, bundle, output, signal.SIGKILL) == -signal.SIGKILL
    (left,) = vault.house.usb.glob(".plain.partial-*")
    assert b"".join(path.read_bytes() for path in left.rglob("*") if path.is_file())
    for words in (("--dry-run",), ()):
        assert f"rm -r {left}" in done(vault.decrypt(bundle, output, *words)).err
    assert left.exists()  # another run may be at it
    shutil.rmtree(left)
    shutil.rmtree(output)
    assert "rm -r" not in done(vault.decrypt(bundle, output)).err


def test_a_kill_at_any_step_of_a_restore_leaves_the_record_whole_or_absent(vault: Vault, bundle: Path) -> None:
    record, step = vault.house.keys / "models" / "minilm" / "1.json", 1
    shutil.rmtree(vault.house.keys / "models")
    while crashed(lambda: vault.restore(bundle), step):
        if record.exists():
            OwnerRecords(vault.house.keys).load_content_key("minilm", "1")
            record.unlink()
        step += 1
    assert step > 3
    assert OwnerRecords(vault.house.keys).load_content_key("minilm", "1").model.version == "1"


@settings(max_examples=150)
@given(st.data())
def test_any_image_manifest_and_public_file_is_a_value_or_refused(data: st.DataObject) -> None:
    key = owner_jwk(public_jwk(ec.generate_private_key(ec.SECP256R1()).public_key()), error=KeyInvalid)
    good = Recipient("vault", key)
    value_or_ours(parse_recipient, data.draw(hostile(good.document())))
    image = canonical(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "annotations": {RECOVERY_ANNOTATION: f"{key.thumbprint}.{'A' * 151}"},
        }
    )
    changed = data.draw(hostile(image))
    found = value_or_ours(parse_recovery_copy, changed)
    assert found is None or len(found[1]) == 113
    value_or_ours(parse_image_manifest, changed)
