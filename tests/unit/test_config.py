"""`config` and `trusted_file`: unknown keys, foreign owners, links and loose modes are refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_hook import config
from oci_hook.config import Config, load_config, parse_config
from oci_hook.errors import ConfigInvalid, FileUnreadable
from oci_hook.trusted_file import load_file, load_root_file, replace_file

EXAMPLE = Path(__file__).parents[2] / "config" / "config.toml"


def test_an_empty_configuration_is_the_default() -> None:
    assert parse_config(b"") == Config()


def test_the_commented_example_is_the_default() -> None:
    assert parse_config(EXAMPLE.read_bytes()) == Config()


@pytest.mark.parametrize(
    "text",
    [
        'engin = "podman"',
        'engine = "lxc"',
        "engine = 1",
        '[tpm]\ntcti = "cmd:rm -rf /"',
        '[tpm]\ntimeout_seconds = "60"',
        "[tpm]\ntimeout_seconds = 0",
        "[tpm]\nskip_attestation = true",
        '[paths]\nstore = "relative"',
        "[memory]\nreserve_bytes = -1",
        "[token]\nleeway_seconds = 61",
        '[guest]\nagent = "kata-agent"',
        "[guest]\ntimeout_seconds = 0",
        "[guest]\ntimeout_seconds = 601",
        "[guest]\nmode = true",
        "[broken",
        "tpm = 1",
        '[nri]\nengine = "podman"',
        '[nri]\nsocket = "nri.sock"',
        '[nri]\nvm_handlers = "kata"',
        "[nri]\nvm_handlers = [1]",
        '[nri]\nvm_handlers = ["a/b"]',
        '[broker]\naddress = "http://broker"',
        '[broker]\naddress = "https://broker/v1"',
        '[broker]\naddress = "https://user@broker"',
        '[broker]\nca_file = "ca.pem"',
        "[broker]\ntimeout_seconds = 0",
        "[broker]\ntimeout_seconds = 601",
        "[broker]\nverify = false",
        "[broker]\naddress = 1",
        f"[nri]\nvm_handlers = {[f'h{number}' for number in range(33)]}",
        f"[nri]\nvm_handlers = ['{64 * 'x'}']",
    ],
)
def test_a_wrong_configuration_is_refused(text: str) -> None:
    with pytest.raises(ConfigInvalid):
        parse_config(text.encode())


def test_the_plugins_section() -> None:
    text = '[nri]\nengine = "cri-o"\nsocket = "/run/other.sock"\nvm_handlers = ["", "kata-qemu", "vm?"]'
    found = parse_config(text.encode())
    assert (found.nri_engine, found.nri_socket) == ("cri-o", "/run/other.sock")
    assert found.nri_vm_handlers == ("", "kata-qemu", "vm?")
    assert parse_config(b"[nri]\nvm_handlers = []").nri_vm_handlers == ()


def test_the_broker_s_section() -> None:
    text = '[broker]\naddress = "https://broker.example:8200"\nca_file = "/etc/ca.pem"\ntimeout_seconds = 5'
    found = parse_config(text.encode())
    assert (found.broker_address, found.broker_ca_file) == ("https://broker.example:8200", "/etc/ca.pem")
    assert found.broker_timeout_seconds == 5
    assert parse_config(b'[broker]\naddress = ""\nca_file = ""') == Config()


def test_a_configuration_of_a_newer_version_is_refused_before_its_keys_are_read() -> None:
    with pytest.raises(ConfigInvalid, match="of version 2; this scz-smm reads version 1") as caught:
        parse_config(b'version = 2\nunheard_of = "x"\nengine = 7')
    assert "upgrade the package" in caught.value.advice
    assert parse_config(b"version = 1") == Config()
    for text in (b"version = 0", b"version = '1'", b"version = true", b"version = -1"):
        with pytest.raises(ConfigInvalid, match="whole number"):
            parse_config(text)


@pytest.mark.parametrize("text", ["unheard_of = 1", "[tpm]\nunheard_of = 1"])
def test_an_unknown_key_may_be_a_newer_versions(text: str) -> None:
    with pytest.raises(ConfigInvalid, match="'unheard_of' is not known here; a newer scz-smm may know it"):
        parse_config(text.encode())


@given(st.binary(max_size=100))
def test_arbitrary_bytes_give_a_configuration_or_our_error(data: bytes) -> None:
    try:
        assert isinstance(parse_config(data), Config)
    except ConfigInvalid:
        return


def test_only_roots_own_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('engine = "docker"')
    assert load_config(str(path)).engine == "docker"
    path.chmod(0o664)
    with pytest.raises(ConfigInvalid, match="writable by others") as caught:
        load_config(str(path))
    assert f"chmod go-w {path}" in caught.value.advice
    path.chmod(0o644)
    os.chown(path, 1000, 0)
    with pytest.raises(ConfigInvalid, match="uid 1000") as caught:
        load_config(str(path))
    assert f"chown root: {path}" in caught.value.advice


def test_a_folder_that_others_can_write_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "loose"
    folder.mkdir()
    path = folder / "config.toml"
    path.write_text("")
    folder.chmod(0o777)
    with pytest.raises(ConfigInvalid, match="writable by others"):
        load_config(str(path))
    folder.chmod(0o755)
    os.chown(folder, 1000, 1000)
    with pytest.raises(ConfigInvalid, match="uid 1000"):
        load_config(str(path))


def test_only_the_file_at_the_default_place_may_be_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "config.toml")
    with pytest.raises(FileUnreadable):
        load_config(path)
    monkeypatch.setattr(config, "DEFAULT_CONFIG_FILE", path)
    assert load_config(path) == Config()
    (tmp_path / "config.toml").symlink_to("nowhere")
    with pytest.raises(FileUnreadable):
        load_config(path)


def test_a_link_is_judged_by_where_it_leads(tmp_path: Path) -> None:
    real = tmp_path / "theirs"
    real.write_text("")
    os.chown(real, 1000, 1000)
    link = tmp_path / "config.toml"
    link.symlink_to(real)
    with pytest.raises(ConfigInvalid, match="uid 1000"):
        load_config(str(link))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileUnreadable):
        load_config(str(tmp_path / "absent"))
    with pytest.raises(ConfigInvalid, match="absolute"):
        load_config("config.toml")
    with pytest.raises(ConfigInvalid, match="regular"):
        load_config(str(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigInvalid, match="regular"):
        load_file(str(tmp_path / "pipe"), limit_bytes=10, error=ConfigInvalid)


def test_a_file_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(b"x" * 11)
    with pytest.raises(ConfigInvalid, match="larger"):
        load_root_file(str(path), limit_bytes=10, error=ConfigInvalid)
    assert load_root_file(str(path), limit_bytes=11, error=ConfigInvalid) == b"x" * 11


def test_replace_file_leaves_the_old_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    replace_file(str(path), b"old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileUnreadable, match="space"):
        replace_file(str(path), b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
