"""`nri.schema` and `nri.encoding`: what engines say, from bytes of another hand, and what they are told."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_hook.errors import EngineUnsupported
from oci_hook.nri import encoding
from oci_hook.nri.messages import (
    Adjustment,
    Container,
    ContainerState,
    Event,
    Hook,
    Hooks,
    Mount,
    Namespace,
    PodSandbox,
    Settings,
)
from oci_hook.nri.schema import Schema
from tests.nri_engine import field, fields

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def mount(later: bytes = b"") -> bytes:
    return field(1, "/data") + field(2, "bind") + field(3, "/srv") + field(4, "rbind") + field(4, "ro") + later


def hook(later: bytes = b"") -> bytes:
    limit = field(4, field(1, 7) + later)
    return field(1, "/bin/hook") + field(2, "hook") + field(2, "prestart") + field(3, "A=b") + limit + later


def pod(later: bytes = b"") -> bytes:
    return (
        field(1, "p1")
        + field(2, "shop")
        + field(3, "uid-1")
        + field(4, "default")
        + field(5, {"app": "shop"})
        + field(6, {"smm.scz/model": "demo:1"})
        + field(7, "kata-qemu")
        + field(8, field(3, "/kubepods/pod1") + field(4, "/kubepods/pod1/p1") + later)
        + field(9, 4711)
        + field(10, "10.0.0.1")
        + later
    )


def linux(later: bytes = b"") -> bytes:
    memory = field(1, field(1, 1 << 30) + later) + later
    return (
        field(1, field(1, "mount") + later)
        + field(1, field(1, "network") + field(2, "/proc/9/ns/net"))
        + field(2, field(1, "/dev/null"))
        + field(3, field(1, memory) + field(2, field(6, "0-3")) + later)
        + field(5, "/kubepods/pod1/c1")
        + later
    )


def container(later: bytes = b"") -> bytes:
    return (
        field(1, "c1")
        + field(2, "p1")
        + field(3, "server")
        + field(4, 3)
        + field(5, {"l": "1"})
        + field(6, {"a": "b", "c": ""})
        + field(7, "sh")
        + field(7, "-c")
        + field(8, "PATH=/bin")
        + field(9, mount(later))
        + field(10, field(1, hook(later)) + field(6, field(1, "/bin/last")) + later)
        + field(11, linux(later))
        + field(12, 815)
        + field(14, 1_700_000_000)
        + field(20, field(1, "vendor.com/device=all") + later)
        + field(21, field(1, 1000) + field(2, 1001) + field(3, 5) + field(3, 6) + later)
        + field(22, field(1, "image"))
        + later
    )


POD, CONTAINER = pod(), container()
EXPECTED_POD = PodSandbox(
    "p1",
    "shop",
    "uid-1",
    "default",
    {"smm.scz/model": "demo:1"},
    "kata-qemu",
    4711,
    "/kubepods/pod1",
)
EXPECTED_CONTAINER = Container(
    id="c1",
    pod_id="p1",
    name="server",
    state=ContainerState.RUNNING,
    annotations={"a": "b", "c": ""},
    mounts=(Mount("/data", "bind", "/srv", ("rbind", "ro")),),
    hooks=Hooks(prestart=(Hook("/bin/hook", ("hook", "prestart"), ("A=b",), 7),), poststop=(Hook("/bin/last"),)),
    namespaces=(Namespace("mount"), Namespace("network", "/proc/9/ns/net")),
    cgroups_path="/kubepods/pod1/c1",
    memory_limit_bytes=1 << 30,
    pid=815,
    cdi_devices=("vendor.com/device=all",),
    user=(1000, 1001, (5, 6)),
)


# --- the engine's -----------------------------------------------------------------------------------------------------


def test_a_pod_and_a_container_have_all_that_we_read() -> None:
    assert encoding.parse_event(field(1, POD) + field(2, CONTAINER)) == (EXPECTED_POD, EXPECTED_CONTAINER)


def test_what_is_absent_is_empty_and_told_apart_from_zero() -> None:
    assert encoding.parse_event(b"") == (PodSandbox(""), Container(""))
    nothing = field(11, field(3, field(1, field(1, b"")))) + field(21, b"")
    container = encoding.parse_event(field(2, nothing))[1]
    assert (container.memory_limit_bytes, container.user) == (0, (0, 0, ()))
    hooks = field(10, field(1, field(1, "/bin/hook") + field(4, b"")))
    assert encoding.parse_event(field(2, hooks))[1].hooks.prestart == (Hook("/bin/hook", timeout_seconds=0),)


def test_a_state_change_names_its_event_by_number() -> None:
    data = field(1, 11) + field(2, POD) + field(3, CONTAINER)
    assert encoding.parse_state_change(data) == (Event.REMOVE_CONTAINER, EXPECTED_POD, EXPECTED_CONTAINER)
    assert encoding.parse_state_change(field(1, 99))[0] == 99


def test_synchronize_has_lists_and_says_whether_more_follow() -> None:
    data = field(1, POD) + field(1, field(1, "p2")) + field(2, CONTAINER)
    assert encoding.parse_synchronize(data) == ((EXPECTED_POD, PodSandbox("p2")), (EXPECTED_CONTAINER,), False)
    assert encoding.parse_synchronize(field(3, 1)) == ((), (), True)


def test_more_than_any_node_runs_is_refused_before_it_takes_memory() -> None:
    half = encoding.MAX_OBJECTS // 2
    pods, containers, _ = encoding.parse_synchronize(field(1, b"") * half + field(2, b"") * half)
    assert (len(pods), len(containers)) == (half, half)
    with pytest.raises(EngineUnsupported, match="the engine lists 65537 pods and containers"):
        encoding.parse_synchronize(field(1, b"") * half + field(2, b"") * (half + 1))


def test_settings_are_in_seconds_and_may_be_absent() -> None:
    data = field(1, "x") + field(2, "containerd") + field(3, "2.2") + field(4, 5000) + field(5, 1500) + field(6, "0.12")
    assert encoding.parse_settings(data) == Settings("x", "containerd", "2.2", 5.0, 1.5, "0.12")
    assert encoding.parse_settings(field(5, -1)) == Settings("", "", "", 0.0, 0.0, "")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(field(2, field(1, b"\xff")), id="text that is no UTF-8"),
        pytest.param(field(2, CONTAINER)[:-1], id="cut off"),
        pytest.param(b"\x0b", id="a group that nobody ends"),
        pytest.param(b"\xff" * 11, id="a number without an end"),
    ],
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(EngineUnsupported, match=r"the engine's Event is malformed"):
        encoding.parse_event(data)


@pytest.mark.parametrize(
    "later",
    [field(77, "new"), field(1000, 5), field(77, field(1, "deep") + field(2, {"a": "b"})), b"\xe9\x04" + bytes(8)],
    ids=["text", "number", "message", "eight bytes"],
)
def test_fields_that_are_not_known_are_skipped_on_every_level(later: bytes) -> None:
    found = encoding.parse_event(field(1, pod(later)) + field(2, container(later)) + later)
    assert found == (EXPECTED_POD, EXPECTED_CONTAINER)


PARSERS: list[Callable[[bytes], object]] = [
    encoding.parse_event,
    encoding.parse_settings,
    encoding.parse_state_change,
    encoding.parse_synchronize,
    encoding.parse_validation,
]


@given(st.binary(max_size=300))
def test_any_bytes_are_a_value_or_refused(data: bytes) -> None:
    for parse in PARSERS:
        with contextlib.suppress(EngineUnsupported):
            parse(data)


@given(st.integers(0, len(CONTAINER) - 1), st.binary(min_size=1, max_size=4))
def test_a_damaged_container_is_a_value_or_refused(place: int, damage: bytes) -> None:
    data = CONTAINER[:place] + damage + CONTAINER[place + len(damage) :]
    with contextlib.suppress(EngineUnsupported):
        encoding.parse_event(field(2, data))


# --- ours -------------------------------------------------------------------------------------------------------------


def test_a_registration_has_name_index_and_version() -> None:
    assert encoding.registration("scz-smm", "10", "1") == field(1, "scz-smm") + field(2, "10") + field(3, "1")


def test_a_subscription_has_a_bit_for_each_event() -> None:
    chosen = [Event.CREATE_CONTAINER, Event.STOP_CONTAINER, Event.CREATE_CONTAINER]
    assert encoding.configured(chosen) == field(2, 1 << 3 | 1 << 9)
    assert encoding.configured(Event) == field(2, (1 << 11) - 1 | 1 << 13)


def test_more_is_answered_with_more() -> None:
    assert encoding.synchronized(more=True) == field(2, 1)
    assert encoding.synchronized(more=False) == b""


def test_nothing_to_add_is_an_empty_answer() -> None:
    assert encoding.created(None) == b""


def test_an_adjustment_has_all_that_we_add() -> None:
    hooks = Hooks(prestart=(Hook("/bin/hook", ("hook", "prestart"), ("A=b",), 7),), poststop=(Hook("/bin/last"),))
    data = encoding.created(
        Adjustment({"a": "b"}, (Mount("/data", "bind", "/srv", ("rbind", "ro")),), ("X=y=z", "E="), hooks)
    )
    expected = (
        field(2, {"a": "b"})
        + field(3, mount())
        + field(4, field(1, "X") + field(2, "y=z"))
        + field(4, field(1, "E"))
        + field(5, field(1, hook()) + field(6, field(1, "/bin/last")))
    )
    assert data == field(1, expected)


@given(st.dictionaries(TEXT, TEXT, max_size=4), st.lists(TEXT, max_size=4), st.none() | st.integers(0, 600))
def test_any_adjustment_can_be_said(annotations: dict[str, str], words: list[str], seconds: int | None) -> None:
    mounts = tuple(Mount(word, "bind", word, (word,)) for word in words)
    hooks = Hooks(create_runtime=tuple(Hook(word, tuple(words), (), seconds) for word in words))
    data = encoding.created(Adjustment(annotations, mounts, tuple(words), hooks))
    (adjust,) = fields(data)[1]
    assert isinstance(adjust, bytes)
    found = fields(adjust)
    assert len(found.get(2, [])) == len(annotations)
    assert len(found.get(3, [])) == len(found.get(4, [])) == len(words)


def test_a_validation_is_read_and_answered() -> None:
    adjust = field(2, {"a": "b"}) + field(3, mount()) + field(4, field(1, "X") + field(2, "y")) + field(5, b"")
    data = field(1, pod()) + field(2, container()) + field(3, adjust) + field(5, field(1, b"")) + field(6, b"")
    added = Adjustment(mounts=EXPECTED_CONTAINER.mounts)
    assert encoding.parse_validation(data) == ("c1", added)
    assert encoding.parse_validation(b"") == ("", Adjustment())
    assert encoding.validated("") == b""
    assert encoding.validated("no") == field(1, 1) + field(2, "no")


@pytest.mark.parametrize("parse", [encoding.parse_event, encoding.parse_synchronize, encoding.parse_validation])
def test_what_others_keep_secret_is_kept_nowhere(parse: Callable[[bytes], object]) -> None:
    """A container's arguments, environment and labels, and those that plugins add."""
    secret = "s3cret"
    other = container() + field(5, {"l": secret}) + field(7, secret) + field(8, f"PASSWORD={secret}")
    adjust = field(4, field(1, "PASSWORD") + field(2, secret))
    sandbox = pod() + field(5, {"l": secret})
    assert secret not in repr(parse(field(1, sandbox) + field(2, other) + field(3, adjust)))


def test_fields_that_are_not_read_are_not_kept() -> None:
    schema = Schema("unread", {"One": "a=1 b=2:Two", "Two": "c=1"})
    found = schema.parse("One", field(1, "x") + field(7, "s3cret") + field(2, field(1, "y") + field(9, "s3cret")))
    assert found.SerializeToString() == field(1, "x") + field(2, field(1, "y"))


# --- the table --------------------------------------------------------------------------------------------------------


def test_a_table_that_is_mistyped_is_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="does not describe a field"):
        Schema("mistyped", {"One": "name:1"})


def test_two_schemas_of_one_package_do_not_meet() -> None:
    first, second = Schema("same", {"One": "a=1"}), Schema("same", {"One": "b=1:int32"})
    assert first.parse("One", field(1, "x")).a == "x"
    assert second.parse("One", field(1, 5)).b == 5
