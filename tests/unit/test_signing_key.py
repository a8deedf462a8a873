"""`signing_key`: made once, private, its public half beside it; public keys in both spellings."""

from __future__ import annotations

import json
import stat
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from oci_hook.errors import FileUnreadable, KeyInvalid
from oci_hook.jws import public_jwk
from oci_hook.signing_key import parse_public_key, signing_key


def numbers(key: ec.EllipticCurvePrivateKey) -> int:
    return key.private_numbers().private_value


def test_it_is_made_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "k"
    made = signing_key(str(path), only_root=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert numbers(signing_key(str(path), only_root=True)) == numbers(made)
    public = (tmp_path / "k.jwk").read_bytes()
    assert json.loads(public) == public_jwk(made.public_key())
    assert parse_public_key(public) == parse_public_key(
        made.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )


def test_the_public_half_is_always_that_of_the_key(tmp_path: Path) -> None:
    path, public = tmp_path / "k", tmp_path / "k.jwk"
    signing_key(str(path))
    path.unlink()
    renewed = signing_key(str(path))
    assert json.loads(public.read_bytes()) == public_jwk(renewed.public_key())
    for damage in (b"", b"{}", b"x" * (1 << 20)):
        public.write_bytes(damage)
        signing_key(str(path), only_root=True)
        assert json.loads(public.read_bytes()) == public_jwk(renewed.public_key())
    public.unlink()
    public.symlink_to(tmp_path / "elsewhere")
    signing_key(str(path))
    assert not public.is_symlink()
    assert not (tmp_path / "elsewhere").exists()
    before = public.stat()
    signing_key(str(path))
    assert public.stat().st_ino == before.st_ino  # it fits: nothing is written


@pytest.mark.parametrize("mode", [0o640, 0o620, 0o604, 0o602])
@pytest.mark.parametrize("only_root", [False, True])
def test_a_key_that_others_may_know_or_change_signs_nothing(tmp_path: Path, mode: int, only_root: bool) -> None:
    path = tmp_path / "k"
    signing_key(str(path))
    public = (tmp_path / "k.jwk").read_bytes()
    path.chmod(mode)
    with pytest.raises(KeyInvalid, match="by others"):
        signing_key(str(path), only_root=only_root)
    assert (tmp_path / "k.jwk").read_bytes() == public
    path.chmod(0o400)
    signing_key(str(path), only_root=only_root)


def test_many_at_once_make_one(tmp_path: Path) -> None:
    path, found = str(tmp_path / "k"), list[int]()
    threads = [threading.Thread(target=lambda: found.append(numbers(signing_key(path)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["k", "k.jwk"]


def test_another_s_file_is_no_key(tmp_path: Path) -> None:
    path = tmp_path / "k"
    path.write_text("none")
    path.chmod(0o600)
    with pytest.raises(KeyInvalid, match="not a private key"):
        signing_key(str(path))
    larger = ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(larger.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(KeyInvalid, match="P-256"):
        signing_key(str(path))
    path.chmod(0o666)
    with pytest.raises(KeyInvalid, match="writable by others"):
        signing_key(str(path), only_root=True)
    with pytest.raises(FileUnreadable):
        signing_key(str(tmp_path / "absent" / "k"))


def test_what_is_no_public_key_is_refused() -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    scalar = private.private_numbers().private_value.to_bytes(32, "big").hex()
    rsa_key = rsa.generate_private_key(65537, 2048).public_key()
    for data in (
        b"",
        b"none",
        json.dumps({**public_jwk(private.public_key()), "d": scalar}).encode(),
        private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        rsa_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    ):
        with pytest.raises(KeyInvalid):
            parse_public_key(data)
