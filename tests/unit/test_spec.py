"""oci.spec: config.json as engines write it, relative paths, namespaces, and hostile ones."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oci_hook.errors import SpecInvalid
from oci_hook.invocation import NO_DIGEST
from oci_hook.oci.spec import MAX_SPEC_BYTES, IdMapping, Mount, Spec, load_spec, parse_spec

BUNDLE = "/run/bundle"

# As podman 4.3 writes it for runc, shortened.
PODMAN: dict[str, Any] = {
    "ociVersion": "1.0.2-dev",
    "process": {
        "terminal": False,
        "args": ["python3", "workload.py"],
        "cwd": "/",
        "capabilities": {
            "bounding": ["CAP_CHOWN", "CAP_KILL"],
            "effective": ["CAP_CHOWN", "CAP_KILL"],
            "permitted": ["CAP_CHOWN", "CAP_KILL"],
        },
    },
    "root": {"path": "/var/lib/containers/storage/overlay/x/merged"},
    "hostname": "b7c1",
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
        {"destination": "/run/secrets/token", "type": "bind", "source": "/srv/token", "options": ["rprivate", "rbind"]},
    ],
    "annotations": {"io.container.manager": "libpod", "smm.scz/model": "minilm"},
    "linux": {
        "uidMappings": [{"containerID": 0, "hostID": 100000, "size": 65536}],
        "gidMappings": [
            {"containerID": 1, "hostID": 300000, "size": 65535},
            {"containerID": 0, "hostID": 200000, "size": 1},
        ],
        "resources": {"memory": {"limit": 536870912}, "pids": {"limit": 2048}},
        "cgroupsPath": "machine.slice:libpod:b7c1",
        "namespaces": [
            {"type": "pid"},
            {"type": "network", "path": "/run/netns/x"},
            {"type": "mount"},
            {"type": "user"},
            {"type": "cgroup"},
        ],
    },
}


def parsed(bundle: str = BUNDLE, **changes: Any) -> Spec:
    document = {name: value for name, value in {**PODMAN, **changes}.items() if value is not ...}
    return parse_spec(json.dumps(document).encode(), bundle=bundle)


def with_linux(**changes: Any) -> Spec:
    return parsed(linux={name: value for name, value in {**PODMAN["linux"], **changes}.items() if value is not ...})


def test_spec_of_podman() -> None:
    spec = parsed()
    assert spec.annotations == PODMAN["annotations"]
    assert (spec.root_path, spec.root_readonly) == ("/var/lib/containers/storage/overlay/x/merged", False)
    assert spec.mounts[2] == Mount("/run/secrets/token", "bind", "/srv/token", ("rprivate", "rbind"))
    assert [mount.is_bind for mount in spec.mounts] == [False, False, True]
    assert (spec.root_uid, spec.root_gid) == (100000, 200000)
    assert spec.uid_mappings == (IdMapping(0, 100000, 65536),)
    assert (spec.has_mount_namespace, spec.mount_namespace_path) == (True, None)
    assert (spec.user_namespace, spec.user_namespace_path) == (True, None)
    assert spec.memory_limit_bytes == 512 << 20
    assert spec.capabilities == frozenset({"CAP_CHOWN", "CAP_KILL"})
    assert not spec.has_sys_admin
    assert spec.cgroups_path == "machine.slice:libpod:b7c1"


def test_least_spec() -> None:
    spec = parse_spec(b'{"root": {"path": "rootfs"}}', bundle="/b")
    assert (spec.root_path, spec.root_readonly, spec.mounts, dict(spec.annotations)) == ("/b/rootfs", False, (), {})
    assert (spec.root_uid, spec.root_gid, spec.user_namespace) == (0, 0, False)
    assert (spec.has_mount_namespace, spec.mount_namespace_path, spec.memory_limit_bytes) == (False, None, None)
    assert (spec.capabilities, spec.cgroups_path) == (None, None)
    assert spec.has_sys_admin  # what the file does not say may be


def test_null_members_are_absent_ones() -> None:
    spec = parsed(annotations=None, mounts=None, linux=None, process=None)
    assert (dict(spec.annotations), spec.mounts, spec.has_mount_namespace, spec.capabilities) == ({}, (), False, None)
    spec = with_linux(resources=None, namespaces=None, cgroupsPath=None)
    assert (spec.memory_limit_bytes, spec.has_mount_namespace, spec.cgroups_path) == (None, False, None)


@pytest.mark.parametrize(
    ("bundle", "path", "expected"),
    [
        ("/b", "rootfs", "/b/rootfs"),
        ("/b/", "./rootfs/", "/b/rootfs"),
        ("/b/c", "../rootfs", "/b/rootfs"),
        ("/b", "../../../rootfs", "/rootfs"),
        ("/b", "/r//s/../t", "/r/t"),
        ("//b", "rootfs", "/b/rootfs"),
        ("/b", "//r", "/r"),
    ],
)
def test_root_path_is_resolved_against_the_bundle(bundle: str, path: str, expected: str) -> None:
    assert parsed(bundle, root={"path": path, "readonly": True}).root_path == expected


@pytest.mark.parametrize(
    ("mount", "expected"),
    [
        ({"destination": "data"}, Mount("/data", "", "", ())),
        ({"destination": "/a/../b/"}, Mount("/b", "", "", ())),
        ({"destination": "/"}, Mount("/", "", "", ())),
        ({"destination": "/a", "type": "tmpfs", "source": "shm", "options": None}, Mount("/a", "tmpfs", "shm", ())),
        ({"destination": "/a", "type": "bind", "source": "s"}, Mount("/a", "bind", "/run/bundle/s", ())),
        (
            {"destination": "/a", "source": "/l/../s", "options": ["bind"]},
            Mount("/a", "", "/l/../s", ("bind",)),  # behind a link, `..` is not what it looks like
        ),
    ],
)
def test_mount(mount: dict[str, Any], expected: Mount) -> None:
    assert parsed(mounts=[mount]).mounts == (expected,)


@pytest.mark.parametrize(
    ("type_", "options", "is_bind", "is_recursive"),
    [
        ("bind", (), True, False),
        ("none", ("rbind", "ro"), True, True),
        ("", ("bind",), True, False),
        ("none", (), False, False),
        ("tmpfs", ("size=1m",), False, False),
    ],
)
def test_kind_of_mount(type_: str, options: tuple[str, ...], is_bind: bool, is_recursive: bool) -> None:
    mount = Mount("/a", type_, "/s", options)
    assert (mount.is_bind, mount.is_recursive) == (is_bind, is_recursive)


def test_joined_namespaces() -> None:
    joined = [{"type": "mount", "path": "/proc/7/ns/mnt"}, {"type": "user", "path": "/proc/7/ns/user"}]
    spec = with_linux(namespaces=joined, uidMappings=..., gidMappings=...)
    assert (spec.has_mount_namespace, spec.mount_namespace_path) == (True, "/proc/7/ns/mnt")
    assert (spec.user_namespace, spec.user_namespace_path) == (True, "/proc/7/ns/user")
    assert (spec.root_uid, spec.root_gid) == (0, 0)


def test_mapping_of_nothing_does_not_count() -> None:
    empty, real = {"containerID": 0, "hostID": 7, "size": 0}, {"containerID": 0, "hostID": 8, "size": 1}
    assert with_linux(uidMappings=[empty, real]).root_uid == 8


def test_mappings_without_a_user_namespace_do_not_count() -> None:
    spec = with_linux(namespaces=[{"type": "mount"}])
    assert (spec.uid_mappings, spec.root_uid) == ((), 0)


@pytest.mark.parametrize(
    ("limit", "expected"), [(-1, None), (0, None), (None, None), (1, 1), ((1 << 63) - 1, (1 << 63) - 1)]
)
def test_memory_limit(limit: int | None, expected: int | None) -> None:
    assert with_linux(resources={"memory": {"limit": limit}}).memory_limit_bytes == expected


@pytest.mark.parametrize("kind", ["bounding", "effective", "permitted", "inheritable", "ambient"])
@pytest.mark.parametrize("name", ["CAP_SYS_ADMIN", "cap_sys_admin", "sys_admin"])
def test_sys_admin_in_any_set_and_spelling(kind: str, name: str) -> None:
    assert parsed(process={"capabilities": {kind: ["CAP_CHOWN", name]}}).has_sys_admin


@pytest.mark.parametrize("name", ["21", "0x15", "CAP_21", " cap_sys_admin", "ALL=ep", "", "sys admin", "cap_ſys_admin"])
def test_what_is_no_name_of_a_capability_may_be_any(name: str) -> None:
    """crun asks libcap, which takes "21" for CAP_SYS_ADMIN."""
    assert parsed(process={"capabilities": {"effective": ["CAP_CHOWN", name]}}).has_sys_admin


MAPS = {
    "uidMappings": [{"containerID": 0, "hostID": 1, "size": 9}],
    "gidMappings": [{"containerID": 0, "hostID": 1, "size": 9}],
}
PID = {"type": "pid"}
NO_CAPABILITIES = {"capabilities": {"bounding": ["CAP_CHOWN"]}}
CAPABLE = {"capabilities": {"ambient": ["CAP_SYS_ADMIN"]}}


@pytest.mark.parametrize(
    ("process", "linux", "expected"),
    [
        (NO_CAPABILITIES, {"namespaces": [PID]}, True),
        (NO_CAPABILITIES, {"namespaces": [{"type": "pid", "path": ""}]}, True),
        (CAPABLE, {"namespaces": [PID]}, False),
        ({}, {"namespaces": [PID]}, False),
        (None, {"namespaces": [PID]}, False),
        (CAPABLE, {"namespaces": [PID, {"type": "user"}], **MAPS}, True),
        ({}, {"namespaces": [PID, {"type": "user"}], **MAPS}, True),
        (NO_CAPABILITIES, {"namespaces": [PID, {"type": "user", "path": "/proc/7/ns/user"}], **MAPS}, False),
        (NO_CAPABILITIES, {"namespaces": [PID, {"type": "user"}]}, False),
        (NO_CAPABILITIES, {"namespaces": [PID, {"type": "user"}], "uidMappings": MAPS["uidMappings"]}, False),
        (CAPABLE, {"namespaces": [PID, {"type": "mount"}], **MAPS}, False),  # mappings without a namespace mean nothing
        # Whoever has a process there, and CAP_SYS_ADMIN, gets into this one's mount namespace.
        (NO_CAPABILITIES, {"namespaces": []}, False),
        (NO_CAPABILITIES, {}, False),
        (NO_CAPABILITIES, {"namespaces": [{"type": "pid", "path": "/proc/7/ns/pid"}]}, False),
        (NO_CAPABILITIES, {"namespaces": [{"type": "user"}], **MAPS}, False),
        (NO_CAPABILITIES, {"namespaces": [{"type": "pid", "path": "/proc/7/ns/pid"}, {"type": "user"}], **MAPS}, False),
    ],
)
def test_who_can_share(process: object, linux: dict[str, object], expected: bool) -> None:
    assert parsed(process=process, linux=linux).can_share == expected


def test_no_capabilities() -> None:
    assert parsed(process={"capabilities": {"bounding": [], "ambient": None}}).capabilities == frozenset()


@pytest.mark.parametrize(
    "changes",
    [
        {"root": ...},
        {"root": None},
        {"root": {}},
        {"root": {"path": ""}},
        {"root": {"path": 7}},
        {"root": {"path": "a\0b"}},
        {"root": {"path": "rootfs", "readonly": "yes"}},
        {"annotations": {"a": 1}},
        {"annotations": ["a"]},
        {"mounts": {}},
        {"mounts": [7]},
        {"mounts": [{}]},
        {"mounts": [{"destination": ""}]},
        {"mounts": [{"destination": "/a\0"}]},
        {"mounts": [{"destination": "/a", "options": "rbind"}]},
        {"mounts": [{"destination": "/a", "options": [1]}]},
        {"mounts": [{"destination": "/a", "type": 1}]},
        {"mounts": [{"destination": "/a", "source": {}}]},
        {"mounts": [{"destination": "/a", "source": "/s\0", "options": ["bind"]}]},
        {"mounts": [{"destination": "/a", "type": "bind"}]},
        {"mounts": [{"destination": "/a"}] * 4097},
        {"linux": []},
        {"process": "x"},
        {"process": {"capabilities": []}},
        {"process": {"capabilities": {"bounding": "CAP_SYS_ADMIN"}}},
        {"process": {"capabilities": {"bounding": [7]}}},
    ],
)
def test_malformed_spec(changes: dict[str, Any]) -> None:
    with pytest.raises(SpecInvalid):
        parsed(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"namespaces": {}},
        {"namespaces": [{}]},
        {"namespaces": [{"type": 1}]},
        {"namespaces": [{"type": "mount", "path": 1}]},
        {"namespaces": [{"type": "mount"}, {"type": "mount", "path": "/proc/1/ns/mnt"}]},
        {"namespaces": [{"type": "user"}] * 65},
        {"uidMappings": {}},
        {"uidMappings": [{"containerID": 0, "hostID": 1}]},
        {"uidMappings": [{"containerID": 0, "hostID": -1, "size": 1}]},
        {"uidMappings": [{"containerID": 0, "hostID": 1 << 32, "size": 1}]},
        {"uidMappings": [{"containerID": 0, "hostID": True, "size": 1}]},
        {"uidMappings": [{"containerID": 1, "hostID": 1, "size": 1}]},
        {"uidMappings": [{"containerID": 0, "hostID": 1, "size": 0}, {"containerID": 1, "hostID": 1, "size": 1}]},
        {"gidMappings": [{"containerID": 0, "hostID": 1, "size": 1}, {"containerID": 0, "hostID": 2, "size": 1}]},
        {"resources": 7},
        {"resources": {"memory": 7}},
        {"resources": {"memory": {"limit": "1g"}}},
        {"resources": {"memory": {"limit": 1.5}}},
        {"resources": {"memory": {"limit": True}}},
        {"resources": {"memory": {"limit": -2}}},
        {"cgroupsPath": 7},
    ],
)
def test_malformed_linux(changes: dict[str, Any]) -> None:
    with pytest.raises(SpecInvalid):
        with_linux(**changes)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b'{"root": {"path": "a"}, "root": {"path": "b"}}',
        b'{"root": {"path": "a", "path": "b"}}',
        b'{"root": {"path": "\\udc00"}}',
        b'{"root": {"path": "a"}, "x": ' + b"[" * 100_000,
        b" " * (MAX_SPEC_BYTES + 1),
    ],
)
def test_not_a_spec(data: bytes) -> None:
    with pytest.raises(SpecInvalid):
        parse_spec(data, bundle=BUNDLE)


def test_bundle_must_be_absolute() -> None:
    with pytest.raises(SpecInvalid):
        parsed("bundle")


# --- loading ----------------------------------------------------------------------------------------------------------


def test_load_spec_by_path_and_by_descriptor(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PODMAN))
    assert load_spec(str(tmp_path)) == parsed(str(tmp_path))
    descriptor = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert load_spec("/elsewhere", directory=descriptor) == parsed("/elsewhere")
        os.fstat(descriptor)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("kind", ["absent", "link", "fifo", "directory", "too large", "no bundle"])
def test_config_json_that_cannot_be_used(tmp_path: Path, kind: str) -> None:
    bundle, path = tmp_path, tmp_path / "config.json"
    if kind == "link":
        (tmp_path / "real.json").write_text(json.dumps(PODMAN))
        path.symlink_to("real.json")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "too large":
        path.write_bytes(json.dumps(PODMAN).encode() + b" " * MAX_SPEC_BYTES)
    elif kind == "no bundle":
        bundle = tmp_path / "absent"
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SpecInvalid):
        load_spec(str(bundle))
    assert len(os.listdir("/proc/self/fd")) == before


# --- fuzz -------------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["path", "type", "destination", "options", "source", "limit", "memory", "x"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
LINUX = st.sampled_from(["namespaces", "uidMappings", "gidMappings", "resources", "cgroupsPath"])


def value_or_ours(document: dict[str, Any]) -> None:
    try:
        spec = parse_spec(json.dumps(document).encode(), bundle=BUNDLE)
    except SpecInvalid:
        return
    assert spec.root_path.startswith("/")
    assert ".." not in spec.root_path.split("/")
    for mount in spec.mounts:
        assert mount.destination.startswith("/")
        assert mount.source.startswith("/") or not mount.is_bind


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes(data: bytes) -> None:
    with pytest.raises(SpecInvalid):
        parse_spec(data, bundle=BUNDLE)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(["root", "mounts", "process", "annotations", "linux"]), JSON, max_size=2))
def test_arbitrary_members(changes: dict[str, Any]) -> None:
    value_or_ours({**PODMAN, **changes})


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(LINUX, JSON, max_size=2), st.lists(JSON, max_size=3), st.text(max_size=12))
def test_arbitrary_parts(linux: dict[str, Any], mounts: list[Any], path: str) -> None:
    value_or_ours(
        {**PODMAN, "linux": {**PODMAN["linux"], **linux}, "mounts": mounts, "root": {"path": path}, "process": {}}
    )


# --- what the shim wrote ----------------------------------------------------------------------------------------------


def hooked(tmp_path: Path, change: Callable[[bytes], bytes] = lambda data: data) -> str:
    """A config.json as the shim leaves it, changed afterwards; returns the digest that the hook is told."""
    plain = json.dumps(
        {"root": {"path": "r"}, "hooks": {"prestart": [{"args": ["--spec-digest", NO_DIGEST]}]}}
    ).encode()
    digest = hashlib.sha256(plain).hexdigest()
    (tmp_path / "config.json").write_bytes(change(plain.replace(NO_DIGEST.encode(), digest.encode())))
    return digest


def test_the_file_that_the_shim_wrote(tmp_path: Path) -> None:
    assert load_spec(str(tmp_path), digest=hooked(tmp_path)).root_path == f"{tmp_path}/r"


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.replace(b'"r"', b'"/"'),
        lambda data: data + b" ",
        lambda data: re.sub(rb"[0-9a-f]{64}", b"1" * 64, data),
    ],
)
def test_a_file_that_was_changed_since(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    digest = hooked(tmp_path, change)
    for told in (digest, "", "0", NO_DIGEST, "f" * 64, "root"):
        with pytest.raises(SpecInvalid, match="shim"):
            load_spec(str(tmp_path), digest=told)


def test_a_bundle_that_is_not_known_yet() -> None:
    def unknown(**changes: Any) -> Spec:
        return parse_spec(json.dumps({"root": {"path": "rootfs"}, **changes}).encode(), bundle="")

    assert unknown().root_path == ""
    assert unknown(root=None).root_path == ""
    assert unknown(root={"path": "/srv/rootfs"}).root_path == "/srv/rootfs"
    bind = {"destination": "/a", "type": "bind", "source": "/s", "options": ["bind"]}
    assert unknown(mounts=[bind]).mounts[0].source == "/s"
    with pytest.raises(SpecInvalid, match="no bundle"):
        unknown(mounts=[{**bind, "source": "s"}])
    with pytest.raises(SpecInvalid):
        parse_spec(b"{}", bundle="/b")
