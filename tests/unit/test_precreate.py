"""precreate: config.json as podman passes it, the id in it, hostile ones, and the same bytes again with our mounts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_hook.errors import EngineUnsupported, SczError, SpecInvalid
from oci_hook.invocation import Invocation
from oci_hook.oci.precreate import container_id, own_folder, parse_precreate, with_mounts, with_prestart
from oci_hook.oci.spec import MAX_SPEC_BYTES

ID, OTHER = "8c85f2879375d37e40d06ecc138f2dd3474bfa10e36526e75c3637ccba68ebf5", "ab" * 32
STORE = "/var/lib/containers/storage/overlay-containers"
RUN = "/run/containers/storage/overlay-containers"
CONFIG = "/nowhere/config.toml"
ENTRY = {"destination": "/models/x", "type": "bind", "source": "/run/scz-smm/bound/ä", "options": ["bind", "ro"]}
WRITTEN = '{"destination":"/models/x","type":"bind","source":"/run/scz-smm/bound/ä","options":["bind","ro"]}'


def own(name: str, container: str = ID, folder: str = RUN) -> dict[str, Any]:
    """A mount that podman makes by itself."""
    places = {"shm": "/dev/shm", ".containerenv": "/run/.containerenv"}
    source = f"{folder}/{container}/userdata/{name}"
    return {"destination": places.get(name, f"/etc/{name}"), "type": "bind", "source": source, "options": ["bind"]}


def document(
    cgroup: str | None = f"machine.slice:libpod:{ID}", mounts: list[Any] | None = None, **more: Any
) -> dict[str, Any]:
    """What podman 4.3 passes, shortened."""
    usual = [own("hosts"), own("shm", folder=STORE), own(".containerenv"), own("hostname")]
    return {
        "ociVersion": "1.0.2-dev",
        "process": {"terminal": False, "args": ["true"], "cwd": "/"},
        "root": {"path": "/var/lib/containers/storage/overlay/x/merged"},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}, *(usual if mounts is None else mounts)],
        "hooks": {},
        "annotations": {"io.container.manager": "libpod"},
        "linux": {"namespaces": [{"type": "mount"}], **({} if cgroup is None else {"cgroupsPath": cgroup})},
        **more,
    }


def encoded(value: object) -> bytes:
    return json.dumps(value).encode()


def identify(value: dict[str, Any]) -> str:
    return container_id(parse_precreate(encoded(value)).spec)


# --- the container's id -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cgroup",
    [
        f"/libpod_parent/libpod-{ID}",
        f"machine.slice:libpod:{ID}",
        f"machine-libpod_pod_{OTHER}.slice:libpod:{ID}",
        f"/user.slice/unit.service/libpod-payload-{ID}",
        f"/libpod_parent/{OTHER}/libpod-{ID}",
        f"/libpod-{OTHER}/libpod-{ID}",
        f"libpod-{ID}",
    ],
)
def test_the_id_is_the_last_part_of_the_cgroup(cgroup: str) -> None:
    assert identify(document(cgroup)) == ID


@pytest.mark.parametrize(
    "cgroup",
    [
        None,
        "",
        "/libpod_parent",
        ID,
        f"/x/{ID}",
        f"/libpod-{ID}/",
        f"/libpod-{ID}/container",
        f"/libpod-{ID[:63]}",
        f"/libpod-{ID}0",
        f"/libpod-{ID.upper()}",
        f"/xlibpod-{ID}",
        f"/libpod-{ID}\n",
        f"machine.slice:crio:{ID}",
        f"a:b:libpod:{ID}",
        f"machine.slice:libpod:{ID}:x",
    ],
)
def test_a_container_that_podman_did_not_name_is_refused(cgroup: str | None) -> None:
    with pytest.raises(EngineUnsupported, match="cgroupsPath"):
        identify(document(cgroup))


@pytest.mark.parametrize(
    "mounts",
    [
        [own("hostname")],
        [own(".containerenv")],
        [own("hosts", folder="/srv/a b/vfs-containers")],
        [own("shm", OTHER), own("hosts", OTHER), own("resolv.conf", OTHER), own("hostname")],
        [own("hostname"), {"destination": "/x", "source": f"{RUN}/{OTHER}/userdata/x", "options": ["rbind"]}],
        [own("hostname"), {**own("hosts"), "source": "/srv/hosts"}],
    ],
    ids=["hostname", "containerenv", "hosts", "a pod", "a volume elsewhere", "a volume over hosts"],
)
def test_podmans_own_mounts_name_the_container(mounts: list[Any]) -> None:
    assert identify(document(mounts=mounts)) == ID


def test_podmans_folder_of_the_container() -> None:
    for mounts, folder in (
        ([own("hostname")], f"{RUN}/{ID}/userdata"),
        ([own("hosts", OTHER), own("shm", folder=STORE), own("hostname")], f"{STORE}/{ID}/userdata"),
    ):
        assert own_folder(parse_precreate(encoded(document(mounts=mounts))).spec) == (ID, folder)


@pytest.mark.parametrize(
    "mounts",
    [
        [],
        [own("shm", OTHER), own("hosts", OTHER)],
        [own("hostname", OTHER)],
        [own("hostname", OTHER), own("hosts"), own(".containerenv")],
        [own("hostname"), own(".containerenv", OTHER)],
        [{**own("hostname"), "destination": "/x"}],
        [{**own("hostname"), "source": f"{RUN}/{ID}/userdata/hosts"}],
        [{**own("hostname"), "source": f"{RUN}/{ID}/userdata/x/hostname"}],
        [{**own("hostname"), "source": f"/containers/{ID}/userdata/hostname"}],
        [{**own("hostname"), "type": "tmpfs", "options": []}],
        [own("hostname"), own("hostname", OTHER)],
    ],
)
def test_mounts_that_do_not_name_it_or_another_are_refused(mounts: list[Any]) -> None:
    with pytest.raises(SpecInvalid, match="cgroupsPath names the container"):
        identify(document(mounts=mounts))


# --- hostile documents ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"Mounts": []},
        {"annotation\u017f": {}},
        {"LINUX": {}},
        {"root": {"path": "/x", "Path": "/y"}},
        {"linux": {"cgroupsPath": "/a", "CgroupsPath": "/b"}},
        {"mounts": [{"destination": "/a", "Source": "/b", "source": "/c", "options": ["bind"]}]},
        {"mounts": [{"destination": "/a", "source": "b", "options": ["bind"]}]},
        {"mounts": {}},
        {"mounts": [None]},
        {"root": {"path": "rootfs"}},
        {"root": None},
        {"linux": []},
        {"hooks": []},
        {"hooks": {"prestart": {}}},
        {"hooks": {"prestart": ["x"]}},
        {"hooks": {"prestart": [{"args": [1]}]}},
        {"hooks": {"prestart": [{"args": "x"}]}},
        {"annotations": {"a": 1}},
    ],
)
def test_what_can_be_read_in_two_ways_or_not_at_all_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(SpecInvalid):
        parse_precreate(encoded({**document(), **changed}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'{"mounts":[],"mounts":[]}',
        b'{"root":{"path":"/a","path":"/b"}}',
        b"\xef\xbb\xbf{}",
        encoded(document()) + b"{}",
        encoded(document())[:-1],
        encoded(document(process={"x": 1})).replace(b"1}", b"NaN}"),
        encoded(document(pad="x" * MAX_SPEC_BYTES)),
        b'{"root":{"path":"/a"},"x":' + b"[" * 100 + b"]" * 100 + b"}",
    ],
)
def test_no_strict_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(SpecInvalid):
        parse_precreate(data)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=20,
)
NAMES = st.sampled_from(
    ["root", "path", "linux", "cgroupsPath", "mounts", "destination", "source", "options", "type", "hooks", "prestart"]
)
NEAR = st.recursive(
    st.sampled_from(["bind", "/a", f"/libpod-{ID}", "/etc/hostname", f"{RUN}/{ID}/userdata/hostname"]) | JSON_VALUES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=6),
    max_leaves=30,
)


@given(
    st.binary(max_size=300)
    | NEAR.map(encoded)
    | st.dictionaries(NAMES, NEAR).map(lambda x: encoded({**document(), **x}))
)
def test_whatever_comes_there_is_an_id_or_one_of_our_errors(data: bytes) -> None:
    try:
        found = container_id(parse_precreate(data).spec)
    except SczError:
        return
    assert found in data.decode()


# --- the same bytes again ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('{"mounts":[{"a":1}],"x":2}', '{"mounts":[{"a":1},ENTRY],"x":2}'),
        ('{"mounts":[]}', '{"mounts":[ENTRY]}'),
        ('{"mounts":null,"x":2}', '{"mounts":[ENTRY],"x":2}'),
        ("{}", '{"mounts":[ENTRY]}'),
        (' { "x" : 2 } \n', ' {"mounts":[ENTRY], "x" : 2 } \n'),
        ("{ \n }", '{"mounts":[ENTRY] \n }'),
        ('\t{ "x":{"mounts":[1]} ,\r\n "mounts" : [ {} \n ] , "y":[] }', None),
        ('{"a\\"b,\\u00e4":"\\"mounts\\":[]","mounts":[1]}', '{"a\\"b,\\u00e4":"\\"mounts\\":[]","mounts":[1,ENTRY]}'),
        ('{"n":1.0e+3,"m":-0,"mounts":[]}', '{"n":1.0e+3,"m":-0,"mounts":[ENTRY]}'),
        ('{"\\u006dounts":[7]}', '{"\\u006dounts":[7,ENTRY]}'),
    ],
)
def test_each_byte_but_the_new_mounts_stays(before: str, after: str | None) -> None:
    expected = after or '\t{ "x":{"mounts":[1]} ,\r\n "mounts" : [ {} \n ,ENTRY] , "y":[] }'
    assert with_mounts(before.encode(), [ENTRY]).decode() == expected.replace("ENTRY", WRITTEN)
    assert with_mounts(before.encode(), []) == before.encode()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            '{"hooks":{"createRuntime":[{"a":1}]},"x":1}',
            '{"hooks":{"prestart":[{"p":2}],"createRuntime":[{"a":1}]},"x":1}',
        ),
        (
            '{"x":1, "hooks": { "prestart" : [ {"b":1}\n] } }',
            '{"x":1, "hooks": { "prestart" : [ {"b":1}\n,{"p":2}] } }',
        ),
        ('{"hooks":{"prestart":null}}', '{"hooks":{"prestart":[{"p":2}]}}'),
    ],
)
def test_a_hook_at_prestart_beside_the_others(before: str, after: str) -> None:
    assert with_prestart(before.encode(), {"p": 2}).decode() == after


def common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))


@given(
    st.dictionaries(st.text(max_size=8), JSON_VALUES, max_size=5),
    st.none() | st.lists(JSON_VALUES, max_size=3),
    st.booleans(),
    st.sampled_from([None, 0, 2]),
    st.booleans(),
    st.integers(1, 3),
)
def test_any_document_keeps_its_text(
    members: dict[str, Any], mounts: list[Any] | None, there: bool, indent: int | None, ascii_only: bool, number: int
) -> None:
    value = {**members, **({"mounts": mounts} if there else {})}
    if not there:
        value.pop("mounts", None)
    before = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    after = with_mounts(before.encode(), [ENTRY] * number).decode()
    assert json.loads(after) == {**value, "mounts": [*(value.get("mounts") or []), *[ENTRY] * number]}
    assert common(before, after) + common(before[::-1], after[::-1]) >= len(before) - len("null")


# --- the stage --------------------------------------------------------------------------------------------------------


def filtered(data: bytes, *options: str, config: str = CONFIG) -> subprocess.CompletedProcess[bytes]:
    """The hook as podman starts it."""
    command = [sys.executable, *Invocation("precreate", config_file=config).command()[1:-1], *options, "precreate"]
    return subprocess.run(command, input=data, env={}, capture_output=True, check=False, timeout=60)


@pytest.mark.parametrize(
    "annotations",
    [
        {},
        {"io.container.manager": "libpod"},
        {"smm.scz/model": "x"},
        {"smm.scz/model": "x", "smm.scz/require": "noswap,runtime=runc"},
    ],
)
def test_a_container_that_asks_for_no_vm_gets_its_own_bytes_back(annotations: dict[str, str]) -> None:
    data = json.dumps(document(cgroup=None, mounts=[], annotations=annotations), indent=1).encode() + b"\n"
    done = filtered(data, "--engine", "podman")
    assert (done.returncode, done.stdout, done.stderr) == (0, data, b"")


KATA = {"smm.scz/model": "x", "smm.scz/require": "runtime=kata"}
HOOKS = {
    stage: [{"path": words[0], "args": words}]
    for stage in ("prestart",)
    for words in [Invocation(stage, config_file=CONFIG, engine="podman").command()]
}


def with_words(place: int, word: str) -> dict[str, Any]:
    """Our prestart hook with another word in its command line."""
    hook = HOOKS["prestart"][0]
    words: list[str] = list(hook["args"])
    words[place] = word
    return {**hook, "args": words}


REFUSED = {
    "not JSON": (b"{", "--engine podman", 11, "not JSON"),
    "a misspelt annotation": (
        encoded(document(annotations={**KATA, "smm.scz/modle": "x"}, hooks=HOOKS)),
        "--engine podman",
        12,
        "not known",
    ),
    "another engine": (encoded(document(annotations=KATA, hooks=HOOKS)), "--engine cri-o", 25, "podman's alone"),
    "no engine": (encoded(document(annotations=KATA, hooks=HOOKS)), "", 25, "--before-create"),
    "no cgroup": (encoded(document(None, annotations=KATA, hooks=HOOKS)), "--engine podman", 25, "cgroups=disabled"),
    "another container": (
        encoded(document(f"/libpod-{OTHER}", annotations=KATA, hooks=HOOKS)),
        "--engine podman",
        11,
        f"names the container {OTHER[:12]}",
    ),
    "no prestart": (
        encoded(document(annotations=KATA, hooks={**HOOKS, "prestart": []})),
        "--engine podman",
        25,
        "at prestart",
    ),
    "prestart at another stage": (
        encoded(document(annotations=KATA, hooks={"poststart": HOOKS["prestart"]})),
        "--engine podman",
        25,
        "at prestart",
    ),
    "another interpreter": (
        encoded(document(annotations=KATA, hooks={"prestart": [with_words(0, "/bin/true")]})),
        "--engine podman",
        25,
        "at prestart",
    ),
    "another file than its arguments say": (
        encoded(document(annotations=KATA, hooks={"prestart": [{**HOOKS["prestart"][0], "path": "/bin/true"}]})),
        "--engine podman",
        25,
        "at prestart",
    ),
    "another option of the interpreter": (
        encoded(document(annotations=KATA, hooks={"prestart": [with_words(2, "-i")]})),
        "--engine podman",
        25,
        "at prestart",
    ),
    "hooks of another installation": (
        encoded(document(annotations=KATA, hooks=HOOKS)).replace(CONFIG.encode(), b"/other/config.toml"),
        "--engine podman",
        25,
        "at prestart",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_prints_no_configuration(case: str) -> None:
    data, options, code, said = REFUSED[case]
    done = filtered(data, *options.split())
    assert (done.returncode, done.stdout) == (code, b"")
    assert said in done.stderr.decode()
    assert done.stderr.decode().startswith("scz-hook: ")


def test_without_a_usable_configuration_nothing_is_printed(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("[no such table\n")
    text = encoded(document(annotations=KATA, hooks=HOOKS)).replace(CONFIG.encode(), str(config).encode())
    done = filtered(text, "--engine", "podman", config=str(config))
    assert done.stdout == b""
    assert done.returncode == 13
