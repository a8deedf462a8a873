"""`fast_path`: says "nothing of ours" only where the long way does, imports next to nothing, and keeps what it read."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oci_hook import fast_path, hook, invocation
from oci_hook.config import Config
from oci_hook.delivery import host_records
from oci_hook.delivery.bound_folders import bound_directory
from oci_hook.errors import SpecInvalid, StateInvalid
from oci_hook.fast_path import asks_nothing
from oci_hook.host import close_container
from oci_hook.oci import spec, state
from oci_hook.oci.annotations import has_ours

LAUNCH = Path(fast_path.__file__).with_name("launch.py")
FOREIGN = {"io.podman.annotations.x": "<a> & b", "org.opencontainers.image.title": "é \u2028"}
SPEC = {
    "ociVersion": "1.0.2",
    "root": {"path": "rootfs"},
    "process": {"args": ["sh", "-c", "echo <a> && b"]},
    "linux": {"namespaces": [{"type": "mount"}]},
    "annotations": {"a": "b"},
}
NASTY = (
    b"smm.scz/model",
    b'"smm.scz/model":"m:1"',
    rb'"annotations":{"\u0073mm.scz/model":"m:1"}',
    rb'"annotations":{"smm\u002escz/model":"m:1"},',
    rb"\u003c",
    rb"\u003C",
    rb"\u2028",
    rb"\ud800",
    rb"\\u0073",
    rb"\/",
    rb"\u0000",
    b"\0",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[" * 70 + b"]" * 70,
    b',"id":"other"',
    b'"annotations":null,',
    b'"annotations":{},',
    b'"annotations":{"a":1},',
    b'"annotations":[],',
    b'"pid":true,',
    b'"pid":1.0,',
    b'"pid":-1,',
    b'"pid":-0,',
    b'"pid":2147483648,',
    b'"x":123456789012345678901,',
    b'"x":1e999,',
    b'"x":NaN,',
    b'"x":{"y":{"z":[]}},',
    b'"status":7,',
    b'"bundle":"relative",',
    b"\n\t \r",
    b"\x0b",
    b"\x1f",
    b" ",
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a bundle of nobody's; the directory of run-time records is in it and absent."""
    monkeypatch.setattr(fast_path, "RUNTIME_DIRECTORY", f"{tmp_path}/run")
    (tmp_path / "config.toml").write_text("version = 1\n")
    (tmp_path / "config.json").write_text(json.dumps(SPEC))
    return tmp_path


def a_state(place: Path, **changes: Any) -> dict[str, Any]:
    found = {"ociVersion": "1.0.2", "id": "c1", "status": "creating", "pid": 7, "bundle": str(place), **changes}
    return {key: value for key, value in found.items() if value is not ...}


def fast(place: Path, data: object, stage: str = "prestart") -> bool:
    text = data if isinstance(data, bytes) else json.dumps(data, ensure_ascii=False).encode()
    return asks_nothing(stage, str(place / "config.toml"), text)


def verify_long_way(place: Path, data: bytes) -> None:
    """What `hook` does with a state for which the fast path found nothing to do: nothing, by all of its own checks."""
    parsed = state.parse_state(data)
    assert not has_ours(parsed.annotations)
    assert not hook._may_be_ready(parsed, str(place / "config.toml"))
    if parsed.annotations:
        return
    try:
        assert not has_ours(spec.load_spec(parsed.bundle).annotations)
    except SpecInvalid:
        verify_cannot_be_ours(Path(parsed.bundle, "config.json").read_bytes())


def verify_cannot_be_ours(data: bytes) -> None:
    """However leniently a malformed file is read."""
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "latin-1"):
        with suppress(UnicodeDecodeError):
            text = data.decode(encoding)
            plain = re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), text)
            assert "smm.scz" not in text
            assert "smm.scz" not in plain


def test_the_constants_are_those_of_the_long_way() -> None:
    assert Config().runtime_directory == fast_path.RUNTIME_DIRECTORY
    assert bound_directory("/run/x") == f"/run/x/{fast_path.BOUND}"
    assert fast_path.HOST_RECORDS == host_records._FOLDER
    assert (fast_path.MAX_STATE_BYTES, fast_path.MAX_SPEC_BYTES) == (state.MAX_STATE_BYTES, spec.MAX_SPEC_BYTES)
    assert invocation.ENGINES == fast_path._ENGINES
    assert invocation.DEFAULT_CONFIG_FILE == fast_path._DEFAULT_CONFIG_FILE
    assert set(fast_path._STAGES) <= set(invocation.STAGES)
    assert all(re.fullmatch(state.CONTAINER_ID, character + "x") for character in fast_path._ID_CHARACTERS)
    others = {chr(number) for number in range(0x250)} - set(fast_path._ID_CHARACTERS)
    assert not any(re.fullmatch(state.CONTAINER_ID, character + "x") for character in others)


# --- what it answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", fast_path._STAGES)
@pytest.mark.parametrize(
    "changes",
    [
        {"annotations": FOREIGN},
        {"annotations": {}},
        {"annotations": None},
        {},
        {"pid": 0},
        {"pid": -1},
        {"pid": ...},
        {"status": "", "ociVersion": ""},
        {"root": "/rootfs", "owner": "root"},
        {"id": "a" * 255},
    ],
)
def test_what_runtimes_send_for_a_container_of_nobodys_is_answered(
    place: Path, changes: dict[str, Any], stage: str
) -> None:
    document = a_state(place, **changes)
    for data in (
        json.dumps(document, ensure_ascii=False).encode(),
        json.dumps(document, ensure_ascii=False, indent=1).encode() + b"\n",
        json.dumps(document, ensure_ascii=False).replace("<", r"\u003c").replace("&", r"\u0026").encode(),
        json.dumps(document, ensure_ascii=False).replace("\u2028", r"\u2028").encode(),
    ):
        assert fast(place, data, stage)
        verify_long_way(place, data)


@pytest.mark.parametrize(
    "changes",
    [
        {"annotations": {"smm.scz/model": "m:1"}},
        {"annotations": {"a": "smm.scz"}},
        {"annotations": {"a": 1}},
        {"annotations": {"a": None}},
        {"annotations": ["a"]},
        {"annotations": "a"},
        {"id": ""},
        {"id": ".."},
        {"id": "."},
        {"id": "a/b"},
        {"id": "a b"},
        {"id": "c\n"},
        {"id": "é"},
        {"id": "a" * 256},
        {"id": 7},
        {"id": ...},
        {"bundle": ...},
        {"bundle": ""},
        {"bundle": "b"},
        {"bundle": 1},
        {"bundle": "/" + "b" * 4096},
        {"bundle": "/absent"},
        {"pid": True},
        {"pid": None},
        {"pid": "7"},
        {"pid": 7.0},
        {"pid": -2},
        {"pid": 1 << 31},
        {"x": {}},
        {"x": 10**20},
        {"x": 1.5},
        {"x": float("nan")},
    ],
)
def test_what_is_ours_malformed_or_not_expected_goes_the_long_way(place: Path, changes: dict[str, Any]) -> None:
    assert not fast(place, a_state(place, **changes))


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"null", b"7", b'"x"', b"{", b"x" * (1 << 20), b"[" * 100_000])
def test_what_is_no_state_goes_the_long_way(place: Path, data: bytes) -> None:
    assert not fast(place, data)
    with pytest.raises(StateInvalid):
        state.parse_state(data)


def test_a_duplicate_key_goes_the_long_way(place: Path) -> None:
    data = json.dumps(a_state(place, annotations=FOREIGN)).encode()
    assert not fast(place, data.replace(b'"pid": 7', b'"pid": 7, "pid": 7'))
    assert not fast(place, data.replace(b'"annotations": {', b'"annotations": {"io.podman.annotations.x": "", '))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_another_encoding_goes_the_long_way(place: Path, encoding: str) -> None:
    document = a_state(place, annotations={"a": "ö"})
    assert not fast(place, json.dumps(document, ensure_ascii=False).encode(encoding))
    assert not fast(place, json.dumps(document, ensure_ascii=True).encode())  # é may be written so, by whom is unknown
    (place / "config.json").write_bytes(json.dumps({**SPEC, "x": "ö"}, ensure_ascii=False).encode(encoding))
    assert not fast(place, a_state(place))


def test_the_largest_state_and_one_that_is_larger(place: Path) -> None:
    data = json.dumps(a_state(place, annotations=FOREIGN), ensure_ascii=False).encode()
    full = data + b" " * (fast_path.MAX_STATE_BYTES - len(data))
    assert fast(place, full)
    verify_long_way(place, full)
    assert not fast(place, full + b" ")


# --- what it looks at -------------------------------------------------------------------------------------------------


def as_link(path: Path) -> None:
    path.rename(path.with_name("real.json"))
    path.symlink_to("real.json")


def as_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_larger(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" " * fast_path.MAX_SPEC_BYTES)


def as_ours(path: Path) -> None:
    path.write_text(json.dumps({**SPEC, "annotations": {"smm.scz/model": "m:1"}}))


def as_ours_by_number(path: Path) -> None:
    path.write_text(json.dumps(SPEC).replace('{"a"', '{"\\u0073mm.scz/model"'))


@pytest.mark.parametrize("change", [Path.unlink, as_link, as_fifo, as_directory, as_larger, as_ours, as_ours_by_number])
def test_config_json_is_a_clean_file_where_the_state_has_no_annotations(
    place: Path, change: Callable[[Path], None]
) -> None:
    change(place / "config.json")
    assert not fast(place, a_state(place))
    assert not fast(place, a_state(place, annotations={}))
    assert fast(place, a_state(place, annotations=FOREIGN))  # as on the long way
    assert fast(place, a_state(place), "poststop")


@pytest.mark.parametrize(
    ("text", "usual"),
    [
        ('[paths]\nruntime = "/a"\n', False),
        ('"runtim\\u0065" = "/a"\n', False),
        ("# runtime\n", True),
        ("\xff\x00", True),
    ],
)
def test_a_configuration_with_records_elsewhere_goes_the_long_way(place: Path, text: str, usual: bool) -> None:
    (place / "config.toml").write_bytes(text.encode("latin-1"))
    assert fast(place, a_state(place, annotations=FOREIGN)) is usual


@pytest.mark.parametrize("annotations", [FOREIGN, {}])
@pytest.mark.parametrize("stage", fast_path._STAGES)
def test_where_models_came_before_create_every_container_goes_the_long_way(
    place: Path, stage: str, annotations: dict[str, str]
) -> None:
    document = a_state(place, annotations=annotations)
    (place / "run/bound").mkdir(parents=True)
    assert fast(place, document, stage)  # none is left
    (place / "run/host-mounts").mkdir()
    assert fast(place, document, stage)
    (place / "run/host-mounts/x.json").touch()
    assert not fast(place, document, stage)


@pytest.mark.parametrize("folder", ["containers", "tokens", "host-mounts"])
def test_poststop_without_annotations_is_answered_while_nothing_is_recorded(place: Path, folder: str) -> None:
    (place / "run").mkdir(0o700)
    (place / "run/last").mkdir()
    (place / "run" / folder).mkdir()
    assert fast(place, a_state(place), "poststop")
    before = sorted(place.rglob("*"))
    close_container("c1", str(place), Config(runtime_directory=f"{place}/run", audit_file=f"{place}/audit"))
    assert [path for path in sorted(place.rglob("*")) if "lock" not in path.name] == before
    (place / "run" / folder / "x").touch()
    assert not fast(place, a_state(place), "poststop")


@pytest.mark.parametrize(
    ("words", "looks"),
    [
        (["prestart"], True),
        (["createRuntime"], True),
        (["--engine", "podman", "poststop"], True),
        (["--engine", "lxc", "prestart"], False),
        (["--engine", "podman", "--engine", "podman", "prestart"], False),
        (["--request", "smm.scz/model=m:1", "prestart"], False),
        (["--spec-digest", "0" * 64, "prestart"], False),
        (["precreate"], False),
        (["prepare"], False),
        (["guest-prestart"], False),
        (["guest-poststop"], False),
        (["--config", "prestart"], False),
        (["x", "prestart"], False),
        (["--help"], False),
        ([], False),
    ],
)
def test_only_a_plain_command_line_is_looked_at(place: Path, words: list[str], looks: bool) -> None:
    if looks:
        assert fast_path._config_file(words) == invocation.DEFAULT_CONFIG_FILE
    else:
        assert fast_path.first_look(words) == (False, None)


# --- the same for whatever is sent ------------------------------------------------------------------------------------

TEXTS = st.text(max_size=8) | st.sampled_from(
    ["smm.scz", "smm.scz/model", "<&>", "\u2028", "\0", "\x1f", "/", "\\u0073"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = st.recursive(SCALARS, lambda deeper: st.lists(deeper, max_size=3) | st.dictionaries(TEXTS, deeper, max_size=3))
STATES = st.fixed_dictionaries(
    {},
    optional={
        "id": TEXTS | st.just("c1") | SCALARS,
        "pid": st.integers(-3, 1 << 32) | SCALARS,
        "status": SCALARS,
        "root": VALUES,
        "annotations": st.dictionaries(TEXTS, TEXTS, max_size=3) | VALUES,
        "ociVersion": SCALARS,
    },
)
MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["insert", "replace", "delete", "at a member"]), st.integers(0, 400), st.sampled_from(NASTY)
    ),
    max_size=3,
)


def mutated(data: bytes, mutations: list[tuple[str, int, bytes]]) -> bytes:
    for kind, where, piece in mutations:
        place = where % (len(data) + 1)
        if kind == "at a member":
            members = [match.end() for match in re.finditer(rb"[{,]\s*", data)] or [0]
            place = members[where % len(members)]
        end = {"replace": place + len(piece), "delete": place + 1}.get(kind, place)
        data = data[:place] + (b"" if kind == "delete" else piece) + data[end:]
    return data


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """As `place`, for all examples of a property."""
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("bundle")
        patch.setattr(fast_path, "RUNTIME_DIRECTORY", f"{place}/run")
        (place / "config.toml").touch()
        yield place


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_no_state_is_answered_that_the_long_way_answers_otherwise(shared: Path, data: st.DataObject) -> None:
    (shared / "config.json").write_text(json.dumps(SPEC))
    document = {**a_state(shared), **data.draw(STATES)}
    text = json.dumps(
        document, ensure_ascii=data.draw(st.booleans()), indent=data.draw(st.sampled_from([None, 0, 2]))
    ).encode("utf-8", "surrogatepass")
    state_bytes = mutated(text, data.draw(MUTATIONS))
    if fast(shared, state_bytes):
        verify_long_way(shared, state_bytes)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_no_config_json_is_answered_that_asks_for_something(shared: Path, data: st.DataObject) -> None:
    document = {**SPEC, "annotations": data.draw(st.dictionaries(TEXTS, TEXTS, max_size=3) | VALUES)}
    text = json.dumps(document, ensure_ascii=data.draw(st.booleans()))
    encoded = text.encode(data.draw(st.sampled_from(["utf-8"] * 4 + ["utf-8-sig", "utf-16"])), "surrogatepass")
    (shared / "config.json").write_bytes(mutated(encoded, data.draw(MUTATIONS)))
    state_bytes = json.dumps(a_state(shared)).encode()
    if fast(shared, state_bytes):
        verify_long_way(shared, state_bytes)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200))
def test_whatever_bytes_come_there_is_an_answer(shared: Path, data: bytes) -> None:
    assert fast(shared, data) is False  # no binary of that length names this folder


# --- as a process -----------------------------------------------------------------------------------------------------


def launch(place: Path, data: bytes, *words: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-I", "-S", *options, LAUNCH, *words], input=data, env={}, capture_output=True, check=False
    )


def imported(stderr: bytes) -> set[str]:
    return {line.rpartition("|")[2].strip() for line in stderr.decode().splitlines() if line.startswith("import time:")}


def test_what_it_imports_is_built_into_the_interpreter_but_for_one_scanner(place: Path) -> None:
    bare = subprocess.run(
        [sys.executable, "-I", "-S", "-X", "importtime", "-c", "pass"], env={}, capture_output=True, check=True
    )
    (place / "config.toml").write_text("# nothing\n")
    # Wherever this machine has its records: a configuration that names none of them is all that is needed here.
    code = f"import sys; sys.path.insert(0, {str(LAUNCH.parents[1])!r}); import oci_hook.fast_path as f; "
    code += f"f.RUNTIME_DIRECTORY = {str(place / 'run')!r}; "
    code += f"assert f.first_look(['--config', {str(place / 'config.toml')!r}, 'prestart'])[0]"
    looked = subprocess.run(
        [sys.executable, "-I", "-S", "-X", "importtime", "-c", code],
        input=json.dumps(a_state(place)).encode(),
        env={},
        capture_output=True,
        check=True,
    )
    assert imported(looked.stderr) - imported(bare.stderr) <= {"oci_hook", "oci_hook.fast_path", "_json"}


@pytest.mark.parametrize(
    "data", [b"", b"{", b'{"id":', b'{"id":"c","bundle":"/x"', b'{"id":"c" "bundle"}', b"[" * 100_000]
)
def test_a_malformed_state_goes_the_long_way_where_json_was_never_imported(place: Path, data: bytes) -> None:
    (place / "config.toml").write_text(f'[paths]\nruntime = "{place}/run"\n')
    done = launch(place, data, "--config", str(place / "config.toml"), "prestart")
    assert (done.returncode, done.stdout) == (StateInvalid.code, b"")
    assert b"StateInvalid (10)" in done.stderr


@pytest.mark.parametrize("annotations", [FOREIGN, {}, {"smm.scz": "x"}])
def test_the_long_way_gets_what_was_read(place: Path, annotations: dict[str, str]) -> None:
    """A configuration that names its records' directory is nothing for the fast path; the state came by a pipe."""
    (place / "config.toml").write_text(f'[paths]\nruntime = "{place}/run"\n')
    data = json.dumps(a_state(place, annotations=annotations)).encode()
    done = launch(place, data, "--config", str(place / "config.toml"), "prestart")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    done = launch(place, data[:-1], "--config", str(place / "config.toml"), "prestart")
    assert (done.returncode, done.stdout) == (StateInvalid.code, b"")
    assert b"not JSON" in done.stderr


def test_more_than_a_mebibyte_is_refused(place: Path) -> None:
    (place / "config.toml").write_text(f'[paths]\nruntime = "{place}/run"\n')
    data = json.dumps(a_state(place, annotations=FOREIGN)).encode().ljust(fast_path.MAX_STATE_BYTES + 1)
    done = launch(place, data, "--config", str(place / "config.toml"), "prestart")
    assert (done.returncode, done.stdout) == (StateInvalid.code, b"")
    assert b"larger than 1048576 bytes" in done.stderr
