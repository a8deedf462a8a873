"""identity.sources: which mount carries the token, and what may lie beneath its source."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oci_hook.documents import canonical
from oci_hook.errors import SczError, TokenMalformed, TokenMissing
from oci_hook.identity.sources import TokenFile, load_token
from oci_hook.oci.spec import Mount, parse_spec

TOKEN = b"header.payload.signature"
PATH = "/var/run/secrets/scz-smm/token"


def bind(destination: str, source: Path | str, *options: str) -> Mount:
    return Mount(destination, "bind", str(source), options or ("rbind", "ro"))


def tmpfs(destination: str) -> Mount:
    return Mount(destination, "tmpfs", "tmpfs", ("nosuid",))


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A projected volume as the kubelet writes it."""
    folder = tmp_path / "volume"
    (folder / "..2026_01_01").mkdir(parents=True)
    (folder / "..2026_01_01" / "token").write_bytes(TOKEN)
    (folder / "..data").symlink_to("..2026_01_01")
    (folder / "token").symlink_to("..data/token")
    return folder


def test_file_source(tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(TOKEN)
    found = load_token([bind(PATH, tmp_path / "token")], PATH)
    assert found == TokenFile(TOKEN, str(tmp_path / "token"))


def test_projected_volume_resolves_its_own_links(volume: Path) -> None:
    found = load_token([tmpfs("/var/run"), bind("/var/run/secrets/scz-smm", volume)], PATH)
    assert found == TokenFile(TOKEN, str(volume / "..2026_01_01" / "token"))


def test_link_as_the_source_is_followed_as_the_runtime_does(tmp_path: Path, volume: Path) -> None:
    (tmp_path / "link").symlink_to(volume)
    found = load_token([bind("/var/run/secrets/scz-smm", tmp_path / "link")], PATH)
    assert found.host_path == str(volume / "..2026_01_01" / "token")


def test_mounts_of_a_real_config_json(tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(TOKEN + b"\n")
    mounts = [
        {"destination": "/run", "type": "tmpfs", "source": "tmpfs"},
        {"destination": "/run//secrets/../secrets/t", "type": "none", "source": "token", "options": ["bind", "ro"]},
    ]
    spec = parse_spec(canonical({"root": {"path": "rootfs"}, "mounts": mounts}), bundle=str(tmp_path))
    assert load_token(spec.mounts, "/run/secrets/t").data == TOKEN


@pytest.mark.parametrize(("content", "data"), [(TOKEN + b"\n", TOKEN), (TOKEN + b"\n\n", TOKEN + b"\n"), (b"x", b"x")])
def test_one_line_feed_at_the_end_is_stripped(tmp_path: Path, content: bytes, data: bytes) -> None:
    (tmp_path / "token").write_bytes(content)
    assert load_token([bind(PATH, tmp_path / "token")], PATH).data == data


@pytest.mark.parametrize("content", [b"x" * 16384, b"x" * 16384 + b"\n"])
def test_size_at_the_limit(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "token").write_bytes(content)
    assert len(load_token([bind(PATH, tmp_path / "token")], PATH).data) == 16384


@pytest.mark.parametrize("content", [b"x" * 16385, b"x" * 16385 + b"\n", b"x" * (1 << 20)])
def test_size_over_the_limit(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(TokenMalformed):
        load_token([bind(PATH, tmp_path / "token")], PATH)


@pytest.mark.parametrize("content", [b"", b"\n"])
def test_empty_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(TokenMissing):
        load_token([bind(PATH, tmp_path / "token")], PATH)


def test_token_is_not_in_the_repr() -> None:
    assert "header" not in repr(TokenFile(TOKEN, "/x"))


# --- which mount ------------------------------------------------------------------------------------------------------


def test_no_mount_covers_the_path(volume: Path) -> None:
    for destination in ("/var/run/secrets/scz-smm/token/x", "/var/run/secrets/scz", "/var/run/secrets/scz-smm/tok"):
        with pytest.raises(TokenMissing):
            load_token([bind(destination, volume)], PATH)
    with pytest.raises(TokenMissing):
        load_token([], PATH)


def test_longest_destination_wins(tmp_path: Path, volume: Path) -> None:
    (tmp_path / "secrets" / "scz-smm").mkdir(parents=True)
    (tmp_path / "secrets" / "scz-smm" / "token").write_bytes(b"other")
    mounts = [bind("/var/run/secrets", tmp_path / "secrets"), bind("/var/run/secrets/scz-smm", volume)]
    assert load_token(mounts, PATH).data == TOKEN


def test_last_of_two_mounts_on_one_destination_wins(tmp_path: Path, volume: Path) -> None:
    (tmp_path / "token").write_bytes(b"other")
    assert load_token([bind(PATH, volume / "token"), bind(PATH, tmp_path / "token")], PATH).data == b"other"


def test_token_hidden_by_a_later_mount(volume: Path) -> None:
    (volume / "secrets" / "scz-smm").mkdir(parents=True)
    (volume / "secrets" / "scz-smm" / "token").write_bytes(b"other")
    for later in (tmpfs("/var/run"), bind("/", volume), bind("/var/run", volume)):
        with pytest.raises(TokenMissing):
            load_token([bind("/var/run/secrets/scz-smm", volume), later], PATH)


def test_token_in_a_tmpfs_or_the_image_is_none(volume: Path) -> None:
    with pytest.raises(TokenMissing):
        load_token([bind("/var/run/secrets", volume), tmpfs("/var/run/secrets/scz-smm")], PATH)


def test_type_none_without_the_option_is_no_bind_mount(volume: Path) -> None:
    with pytest.raises(TokenMissing):
        load_token([Mount("/var/run/secrets/scz-smm", "none", str(volume), ("ro",))], PATH)


@pytest.mark.parametrize(
    "path", ["token", "", "./token", "var/run/secrets/scz-smm/token", "/var/run/secrets/scz-smm/token\0x"]
)
def test_path_that_is_not_absolute(volume: Path, path: str) -> None:
    with pytest.raises(TokenMissing):
        load_token([bind("/var/run/secrets/scz-smm", volume)], path)


def test_source_that_is_not_absolute(volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(volume)
    with pytest.raises(TokenMissing):
        load_token([bind(PATH, "token")], PATH)


def test_path_is_normalised_as_text(volume: Path) -> None:
    assert load_token([bind("/run/secrets", volume)], "//run/./x/../secrets//token").data == TOKEN


def test_linked_directories_of_the_image_are_not_guessed(volume: Path) -> None:
    with pytest.raises(TokenMissing):
        load_token([bind("/var/run/secrets", volume)], "/run/secrets/token")


# --- what lies beneath ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["../outside", "/etc/hostname", "sub/../../outside", "/proc/self/environ"])
def test_link_that_leads_out_of_the_volume(tmp_path: Path, volume: Path, target: str) -> None:
    (tmp_path / "outside").write_bytes(b"another's token")
    (volume / "sub").mkdir()
    (volume / "token").unlink()
    (volume / "token").symlink_to(target)
    with pytest.raises(TokenMissing):
        load_token([bind("/var/run/secrets/scz-smm", volume)], PATH)


def test_dot_dot_in_the_path_does_not_leave_the_mount(tmp_path: Path, volume: Path) -> None:
    (tmp_path / "outside").write_bytes(b"another's token")
    with pytest.raises(TokenMissing):
        load_token([bind("/run/secrets", volume)], "/run/secrets/../outside")


def test_magic_links(tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(TOKEN)
    with (tmp_path / "token").open("rb") as file:
        with pytest.raises(TokenMissing):
            load_token([bind("/run/fd", "/proc/self/fd")], f"/run/fd/{file.fileno()}")
        with pytest.raises(TokenMissing):
            load_token([bind(PATH, f"/proc/self/fd/{file.fileno()}")], PATH)


def test_mount_below_the_source_is_seen_only_where_the_container_sees_it() -> None:
    assert load_token([bind("/host", "/", "rbind")], "/host/proc/version").data.startswith(b"Linux")
    with pytest.raises(TokenMissing):
        load_token([bind("/host", "/", "bind")], "/host/proc/version")


def test_loop_of_links(volume: Path) -> None:
    (volume / "token").unlink()
    (volume / "token").symlink_to("token")
    with pytest.raises(TokenMissing):
        load_token([bind("/var/run/secrets/scz-smm", volume)], PATH)


@pytest.mark.parametrize("kind", ["directory", "fifo", "socket", "device", "absent", "below a file"])
def test_what_is_not_a_regular_file(tmp_path: Path, kind: str) -> None:
    source, below = tmp_path / "s", ""
    if kind == "directory":
        source.mkdir()
    elif kind == "fifo":
        os.mkfifo(source)  # nobody writes: opening it for reading would wait for ever
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(source))
    elif kind == "device":
        source = Path("/dev/null")
    elif kind == "below a file":
        source.write_bytes(TOKEN)
        below = "/x"
    before = os.listdir("/proc/self/fd")
    with pytest.raises(TokenMissing):
        load_token([bind("/run/token", source)], f"/run/token{below}")
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_volume_that_the_kubelet_renews_meanwhile(volume: Path) -> None:
    done = threading.Event()

    def renew() -> None:
        generation = 0
        while not done.is_set():
            generation += 1
            (volume / f"..{generation}").mkdir()
            (volume / f"..{generation}" / "token").write_bytes(TOKEN)
            old = (volume / "..data").readlink()
            (volume / "..data_tmp").symlink_to(f"..{generation}")
            (volume / "..data_tmp").rename(volume / "..data")
            shutil.rmtree(volume / old)
            done.wait(0.002)

    renewer = threading.Thread(target=renew)
    renewer.start()
    try:
        found = {load_token([bind("/var/run/secrets/scz-smm", volume)], PATH).data for _ in range(300)}
    finally:
        done.set()
        renewer.join()
    assert found == {TOKEN}


# --- fuzz -------------------------------------------------------------------------------------------------------------

PATHS = st.text(alphabet="/.abé\0", max_size=12).map(lambda text: f"/{text}") | st.text(max_size=12)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.builds(
            Mount,
            destination=st.sampled_from(["/", "/a", "/a/b", "/b"]),
            type=st.sampled_from(["bind", "none", "tmpfs", ""]),
            source=st.sampled_from(["/nowhere", "/etc", "/dev", "/dev/null", "", "etc"]),
            options=st.lists(st.sampled_from(["bind", "rbind", "ro"]), max_size=2).map(tuple),
        ),
        max_size=4,
    ),
    PATHS,
)
def test_arbitrary_mounts_and_paths(mounts: list[Mount], path: str) -> None:
    try:
        found = load_token(mounts, path)
    except SczError:
        return
    assert found.host_path.startswith("/etc/")
