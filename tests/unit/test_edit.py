"""What the shim makes of a config.json: our hooks, the digest that the hook checks, Docker's variables, refusals."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_hook.errors import AnnotationInvalid, SczError, SpecInvalid
from oci_hook.invocation import ENVIRONMENT, NO_DIGEST, Invocation, parse_invocation
from oci_hook.oci.edit import HOOK_SECONDS, add_hooks, parse_document, requested_annotations, verify_unchanged
from oci_hook.oci.spec import verify_spec_digest

CONFIG = "/etc/scz-smm/config.toml"
MODEL = {"smm.scz/model": "small:1"}
SPEC: dict[str, Any] = {
    "ociVersion": "1.0.2",
    "process": {"args": ["sh", "-c", "a && b > c"], "env": ["PATH=/bin", f"ZEROS={NO_DIGEST}"], "umask": 18},
    "annotations": {**MODEL, "other": "ümlaut\u2028"},
    "linux": {"resources": {"memory": {"limit": (1 << 63) - 1}, "cpu": {"shares": 0.5}}},
}


def edit(spec: dict[str, Any], engine: str = "containerd") -> bytes:
    """config.json as the shim leaves it."""
    data = json.dumps(spec).encode()
    document = parse_document(data)
    annotations = requested_annotations(document, engine)
    return add_hooks(data, document, annotations, engine=engine, config_file=CONFIG) if annotations else data


def with_binds(data: bytes, binds: list[dict[str, Any]]) -> bytes:
    """config.json as the shim before a VM sandbox's runtime leaves it."""
    document = parse_document(data)
    annotations = requested_annotations(document, "containerd")
    return add_hooks(data, document, annotations, engine="containerd", config_file=CONFIG, binds=binds)


def test_bind_entries_come_behind_the_mounts_and_under_the_digest() -> None:
    mounts = [{"destination": "/proc", "type": "proc", "source": "proc"}]
    bind = {"destination": "/models/small", "source": "/run/scz-smm/bound/x/0", "options": ["bind", "ro"]}
    data = json.dumps({**SPEC, "mounts": mounts}).encode()
    edited = with_binds(data, [bind])
    assert json.loads(edited)["mounts"] == [*mounts, {**bind, "type": "bind"}]
    verify_spec_digest(edited, digest_of(edited))
    with pytest.raises(SpecInvalid):
        verify_spec_digest(edited.replace(b'"ro"', b'"rw"'), digest_of(edited))
    # Once more for the same container: nothing changes. For another: refused.
    verify_unchanged(edited, parse_document(edited), engine="containerd", config_file=CONFIG)
    assert with_binds(edited, [bind]) == edited
    with pytest.raises(SpecInvalid, match="another container"):
        with_binds(edited, [{**bind, "source": "/run/scz-smm/bound/y/0"}])
    changed = edited.replace(b"/proc", b"/prok")
    with pytest.raises(SpecInvalid):
        verify_unchanged(changed, parse_document(changed), engine="containerd", config_file=CONFIG)
    verify_unchanged(data, parse_document(data), engine="containerd", config_file=CONFIG)
    assert json.loads(with_binds(json.dumps(SPEC).encode(), [bind]))["mounts"] == [{**bind, "type": "bind"}]


@pytest.mark.parametrize("mounts", [{}, "x", {"a": 1}])
def test_mounts_that_are_none(mounts: object) -> None:
    with pytest.raises(SpecInvalid):
        with_binds(json.dumps({**SPEC, "mounts": mounts}).encode(), [{"destination": "/m"}])


def digest_of(edited: bytes) -> str:
    """The digest that the prestart hook carries."""
    arguments = json.loads(edited)["hooks"]["prestart"][-1]["args"]
    return str(arguments[arguments.index("--spec-digest") + 1])


def test_nothing_but_our_hooks_is_added() -> None:
    edited = json.loads(edit(SPEC))
    hooks = edited.pop("hooks")
    assert edited == SPEC
    assert set(hooks) == {"prestart", "poststop"}
    for stage, ((entry,)) in hooks.items():
        assert entry["path"] == entry["args"][0]
        assert (entry["env"], entry["timeout"]) == (list(ENVIRONMENT), HOOK_SECONDS)
        invocation = parse_invocation(entry["args"][4:])
        assert invocation is not None
        assert (invocation.stage, invocation.engine, invocation.config_file) == (stage, "containerd", CONFIG)
        assert (invocation.spec_digest is None) == (stage == "poststop")
        assert invocation.requests == {}


def test_our_hooks_come_behind_those_that_are_there() -> None:
    first = {"path": "/bin/first", "args": ["first", "--spec-digest", "not ours"]}
    hooks = {"prestart": [first], "createRuntime": [first], "poststop": None}
    edited = json.loads(edit({**SPEC, "hooks": hooks}))["hooks"]
    assert (edited["prestart"][0], len(edited["prestart"]), edited["createRuntime"]) == (first, 2, [first])
    assert len(edited["poststop"]) == 1


def test_the_hook_accepts_the_digest_and_any_change_ends_that() -> None:
    edited = edit(SPEC)
    digest = digest_of(edited)
    verify_spec_digest(edited, digest)
    assert edited.count(digest.encode()) == 1
    for place in range(0, len(edited), 7):
        changed = bytearray(edited)
        changed[place] ^= 1
        with pytest.raises(SpecInvalid):
            verify_spec_digest(bytes(changed), digest)
    with pytest.raises(SpecInvalid):
        verify_spec_digest(edited, NO_DIGEST)


@given(st.dictionaries(st.text(max_size=8), st.text(max_size=8) | st.integers(-(1 << 63), 1 << 63) | st.none()))
def test_the_digest_holds_for_arbitrary_members(members: dict[str, Any]) -> None:
    spec = {**{f"x{name}": value for name, value in members.items()}, **SPEC}
    edited = edit(spec)
    verify_spec_digest(edited, digest_of(edited))
    assert {**json.loads(edited), "hooks": None} == {**spec, "hooks": None}


def test_a_file_that_the_shim_prepared_already_stays_as_it_is() -> None:
    edited = edit(SPEC)
    assert edit(SPEC) == edited
    document = parse_document(edited)
    annotations = requested_annotations(document, "containerd")
    assert add_hooks(edited, document, annotations, engine="containerd", config_file=CONFIG) == edited


@pytest.mark.parametrize("forgery", ["digest", "member", "twice", "engine", "no digest"])
def test_a_marker_that_does_not_fit_is_refused(forgery: str) -> None:
    document = json.loads(edit(SPEC))
    entry = document["hooks"]["prestart"][0]
    place = entry["args"].index("--spec-digest") + 1
    if forgery == "digest":
        entry["args"][place] = "ab" * 32
    elif forgery == "member":
        document["process"]["args"] = ["sh", "-c", "something else"]
    elif forgery == "twice":
        document["hooks"]["createRuntime"] = [copy.deepcopy(entry)]
    elif forgery == "no digest":
        del entry["args"][place:]
    data = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    engine = "cri-o" if forgery == "engine" else "containerd"
    parsed = parse_document(data)
    with pytest.raises(SpecInvalid):
        add_hooks(data, parsed, requested_annotations(parsed, engine), engine=engine, config_file=CONFIG)


@pytest.mark.parametrize(
    ("engine", "annotations"),
    [
        ("containerd", {}),
        ("containerd", {"smm.sczz/model": "x"}),
        ("containerd", {**MODEL, "io.kubernetes.cri.container-type": "sandbox"}),
        ("cri-o", {**MODEL, "io.kubernetes.cri-o.ContainerType": "sandbox"}),
    ],
)
def test_a_container_that_no_model_concerns_is_left_alone(engine: str, annotations: dict[str, str]) -> None:
    spec = {**SPEC, "annotations": annotations, "hooks": {"prestart": "whatever"}}
    assert edit(spec, engine) == json.dumps(spec).encode()


@pytest.mark.parametrize("engine", ["docker", "podman", "cri-o"])
def test_nobody_becomes_a_sandbox_under_an_engine_that_does_not_say_so(engine: str) -> None:
    spec = {**SPEC, "annotations": {**MODEL, "io.kubernetes.cri.container-type": "sandbox"}}
    assert "hooks" in json.loads(edit(spec, engine))


@pytest.mark.parametrize(
    "annotations", [{"smm.scz/shim": "1", **MODEL}, {"smm.scz/modl": "x"}, {"smm.scz/model": ""}, {"smm.scz/path": "/"}]
)
def test_what_the_hook_would_refuse_is_refused_here(annotations: dict[str, str]) -> None:
    with pytest.raises(AnnotationInvalid):
        edit({**SPEC, "annotations": annotations})


@pytest.mark.parametrize(
    "change",
    [
        {"annotations": ["smm.scz/model"]},
        {"annotations": {"smm.scz/model": 1}},
        {"hooks": []},
        {"hooks": {"prestart": {}}},
        {"hooks": {"prestart": [{"args": "words"}]}},
        {"Annotations": {}},
        {"HOOKS": {}},
        {"annotation\u017f": {}},
        {"hoo\u212as": {}},
    ],
)
def test_a_malformed_file_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(SpecInvalid):
        edit({**SPEC, **change})


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b'{"a":1,"a":2}', b"\xff{}", b'{"a":NaN}', b"[" * 9999])
def test_what_is_no_strict_json_is_refused(data: bytes) -> None:
    with pytest.raises(SpecInvalid):
        parse_document(data)


# --- Docker's variables -----------------------------------------------------------------------------------------------


def with_variables(*variables: str, annotations: dict[str, str] | None = None) -> dict[str, Any]:
    """A spec with these in the workload's environment."""
    return {**SPEC, "process": {"env": ["PATH=/bin", *variables]}, "annotations": annotations}


def test_variables_select_like_annotations() -> None:
    variables = (
        "SMM_SCZ_MODEL=small:1",
        "SMM_SCZ_PATH=/m",
        "SMM_SCZ_MODEL_SECOND_ONE=other@sha256:" + "0" * 64,
        "SMM_SCZ_PATH_SECOND_ONE=/o=o",
        "SMM_SCZ_TOKEN=/t",
        "SMM_SCZ_REQUIRE=noswap",
    )
    edited = edit(with_variables(*variables, annotations={"other": "x"}), "docker")
    assert json.loads(edited)["annotations"] == {
        "other": "x",
        "smm.scz/model": "small:1",
        "smm.scz/path": "/m",
        "smm.scz/model.second-one": "other@sha256:" + "0" * 64,
        "smm.scz/path.second-one": "/o=o",
        "smm.scz/token": "/t",
        "smm.scz/require": "noswap",
    }
    assert json.loads(edited)["process"]["env"] == ["PATH=/bin", *variables]
    verify_spec_digest(edited, digest_of(edited))


@pytest.mark.parametrize("engine", ["containerd", "podman", "cri-o"])
def test_variables_mean_nothing_under_another_engine(engine: str) -> None:
    spec = with_variables("SMM_SCZ_MODEL=small:1", "SMM_SCZ_WHATEVER=1")
    assert edit(spec, engine) == json.dumps(spec).encode()


def test_an_annotation_comes_before_all_variables() -> None:
    edited = edit(with_variables("SMM_SCZ_MODEL=image:1", "SMM_SCZ_WHATEVER=1", annotations=dict(MODEL)), "docker")
    assert json.loads(edited)["annotations"] == MODEL


@pytest.mark.parametrize(
    "variables",
    [
        ("SMM_SCZ_MODEL=small:1", "SMM_SCZ_MODEL=other:1"),
        ("SMM_SCZ_MODEL=small:1", "SMM_SCZ_MODEL=small:1"),
        ("SMM_SCZ_MODEL=small:1", "SMM_SCZ_MODE=x"),
        ("SMM_SCZ_MODEL=small:1", "SMM_SCZ_CONTAINERS=x"),
        ("SMM_SCZ_MODEL=small:1", "SMM_SCZ_"),
        ("SMM_SCZ_MODEL=small:1", "SMM_SCZ_TOKEN_X=/t"),
        ("SMM_SCZ_MODEL_=small:1",),
        ("SMM_SCZ_MODEL_-=small:1",),
        ("SMM_SCZ_MODEL_small=small:1",),
        ("SMM_SCZ_MODEL",),
        ("SMM_SCZ_MODEL=",),
        ("SMM_SCZ_PATH=/m",),
        ("SMM_SCZ_MODEL=small:1\n",),
        ("SMM_SCZ_MODEL=small:1", "SMM_SCZ_PATH=relative"),
    ],
)
def test_other_variables_of_ours_are_refused_like_unknown_annotations(variables: tuple[str, ...]) -> None:
    with pytest.raises(AnnotationInvalid):
        edit(with_variables(*variables), "docker")


def test_variables_that_narrow_a_device_are_not_dropped_in_silence() -> None:
    """The device's own hook reads annotations, and the shim adds none for it."""
    command = Invocation("prestart", requests=MODEL).command()
    hooks = {"prestart": [{"path": command[0], "args": command}]}
    with pytest.raises(AnnotationInvalid, match="variables"):
        edit({**with_variables("SMM_SCZ_REQUIRE=runtime=runsc"), "hooks": hooks}, "docker")
    for annotated, variables in ((None, ()), ({"smm.scz/require": "runtime=runsc"}, ("SMM_SCZ_REQUIRE=noswap",))):
        spec = {**with_variables(*variables, annotations=annotated), "hooks": hooks}
        assert edit(spec, "docker") == json.dumps(spec).encode()


@pytest.mark.parametrize("process", [[], {"env": "SMM_SCZ_MODEL=x"}, {"env": [1]}, {"env": None}, None])
def test_an_environment_that_is_none(process: object) -> None:
    spec = {**SPEC, "annotations": {}, "process": process}
    if process is None or process in ([], {"env": None}):
        assert edit(spec, "docker") == json.dumps(spec).encode()
    else:
        with pytest.raises(SpecInvalid):
            edit(spec, "docker")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(JSON, JSON, JSON, st.sampled_from(["docker", "containerd", "cri-o"]))
def test_arbitrary_members_give_bytes_or_one_of_our_errors(a: object, b: object, c: object, engine: str) -> None:
    for asked in (a, MODEL):
        try:
            edited = edit({"annotations": asked, "hooks": b, "process": c}, engine)
        except SczError:
            continue
        assert isinstance(json.loads(edited), dict)
