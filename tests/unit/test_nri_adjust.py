"""`nri.adjust` and `nri.preparing`: what a container asks for by which way, and what NRI's messages vouch for."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_hook.errors import (
    AnnotationInvalid,
    BootStateRefused,
    InternalError,
    SczError,
    Terminated,
    TokenBoundElsewhere,
)
from oci_hook.invocation import ENVIRONMENT, Invocation, parse_invocation
from oci_hook.key_errors import all_errors
from oci_hook.nri.adjust import adjustment, asking, is_vm, parse_binds, wanted
from oci_hook.nri.messages import Container, Hook, Hooks, Mount, Namespace, PodSandbox
from oci_hook.nri.preparing import refusal_of, run_prepare
from oci_hook.oci.annotations import gather_requests
from oci_hook.oci.engine import read_engine_facts
from oci_hook.oci.spec import parse_spec

MODEL = {"smm.scz/model": "minilm:1"}
POD = PodSandbox("pod-id", name="shop", uid="pod-uid", namespace="shop", annotations=MODEL, pid=77)
CONTAINER = Container("c-id", pod_id="pod-id", name="server")


def hook(**words: object) -> Hook:
    command = Invocation("prestart", engine="containerd", **words).command()  # type: ignore[arg-type]
    return Hook(command[0], tuple(command), ENVIRONMENT, 300)


def with_hooks(*hooks: Hook) -> Container:
    return replace(CONTAINER, hooks=Hooks(prestart=hooks))


DEVICE = hook(requests={"smm.scz/model": "bert:2"})


def models(pod: PodSandbox, container: Container = CONTAINER) -> list[str]:
    return [str(request.reference) for request in wanted(pod, container).requests.models]


def test_the_pods_annotations_and_the_containers_select() -> None:
    plain = replace(POD, annotations={})
    assert models(plain) == []
    assert models(POD) == ["minilm:1"]
    assert models(plain, replace(CONTAINER, annotations=MODEL)) == ["minilm:1"]
    assert models(POD, replace(CONTAINER, annotations=MODEL)) == ["minilm:1"]
    with pytest.raises(AnnotationInvalid, match="differs between the pod and the container"):
        wanted(POD, replace(CONTAINER, annotations={"smm.scz/model": "other"}))
    with pytest.raises(AnnotationInvalid, match=r"smm\.scz/modle"):
        wanted(replace(POD, annotations={"smm.scz/modle": "x"}), CONTAINER)


def test_the_containers_name_is_that_of_the_message() -> None:
    pod = replace(POD, annotations={**MODEL, "smm.scz/containers": "server"})
    said = {"io.kubernetes.cri.container-name": "server", "io.kubernetes.container.name": "server"}
    assert models(pod) == ["minilm:1"]
    assert models(pod, replace(CONTAINER, name="sidecar", annotations=said)) == []


def test_what_is_added_for_a_hook() -> None:
    added = adjustment(wanted(POD, CONTAINER), (), engine="containerd", config_file="/etc/c.toml")
    assert (added.annotations, added.mounts, added.env) == (MODEL, (), ())
    (start,), (stop,) = added.hooks.prestart, added.hooks.poststop
    for one, stage in ((start, "prestart"), (stop, "poststop")):
        assert (one.path, one.env, one.timeout_seconds) == (one.args[0], ENVIRONMENT, 300)
        invocation = parse_invocation(one.args[4:])
        assert invocation is not None
        assert (invocation.stage, invocation.engine, invocation.config_file) == (stage, "containerd", "/etc/c.toml")
    assert added.hooks == Hooks(prestart=(start,), poststop=(stop,))


def test_hooks_that_are_there_are_not_added_again() -> None:
    by_hooks_d = wanted(POD, with_hooks(hook()))
    assert by_hooks_d.has_hooks
    assert adjustment(by_hooks_d, (), engine="cri-o", config_file="/c").hooks == Hooks()
    foreign = wanted(POD, with_hooks(Hook("/bin/other", ("other", "-I", "-S", "x", "prestart"))))
    assert not foreign.has_hooks


def test_beside_a_device_of_cdi() -> None:
    device = with_hooks(DEVICE)
    alone = wanted(replace(POD, annotations={}), device)
    assert (dict(alone.given), alone.annotations, alone.has_hooks) == ({"smm.scz/model": "bert:2"}, {}, True)
    assert models(replace(POD, annotations={}), device) == ["bert:2"]
    # Its own hook reads what holds for the whole container; another hook would refuse requirements without a model.
    wide = wanted(replace(POD, annotations={"smm.scz/require": "noswap"}), device)
    assert (wide.has_hooks, wide.requests.models[0].requirements.noswap) == (True, True)
    both = wanted(POD, device)
    assert not both.has_hooks
    assert sorted(str(request.reference) for request in both.requests.models) == ["bert:2", "minilm:1"]


def test_several_devices_of_cdi() -> None:
    plain, again = replace(POD, annotations={}), hook(requests={"smm.scz/model": "bert:2", "smm.scz/path": "/m"})
    third = hook(requests={"smm.scz/model": "t5", "smm.scz/token": "/t"})
    both = wanted(plain, with_hooks(DEVICE, again, third))
    found = [(str(each.reference), each.destination) for each in both.requests.models]
    assert found == [("bert:2", "/models/bert"), ("bert:2", "/m"), ("t5", "/models/t5")]
    assert (both.requests.token_path, both.has_hooks) == ("/t", True)
    assert models(plain, with_hooks(DEVICE, DEVICE)) == ["bert:2"]
    # `prepare` gets them by its command line.
    (command,) = (Invocation("prepare", requests=both.given).command()[4:],)
    invocation = parse_invocation(command)
    assert invocation is not None
    assert invocation.requests == both.given
    with pytest.raises(AnnotationInvalid, match="differs between two devices"):
        wanted(plain, with_hooks(third, hook(requests={"smm.scz/model": "x", "smm.scz/token": "/other"})))
    with pytest.raises(AnnotationInvalid, match="two models would lie"):
        wanted(plain, with_hooks(DEVICE, hook(requests={"smm.scz/model": "bert:3"})))


@pytest.mark.parametrize("devices", [(DEVICE,), (DEVICE, hook(requests={"smm.scz/model": "t5"}))])
def test_the_hook_of_a_virtual_machine_compares_all(devices: tuple[Hook, ...]) -> None:
    asked = wanted(POD, with_hooks(*devices))
    for binds in ((), (Mount("/models/x", "bind", "/run/x", ("bind",)),)):
        added = adjustment(asked, binds, engine="containerd", config_file="/c")
        invocation = parse_invocation(added.hooks.prestart[0].args[4:])
        assert invocation is not None
        of_hook = gather_requests(asked.annotations, invocation.requests, "server")
        assert of_hook == asked.requests if binds else [str(m.reference) for m in of_hook.models] == ["minilm:1"]


@pytest.mark.parametrize(
    ("handler", "patterns", "expected"),
    [
        ("kata", ("kata*",), True),
        ("kata-qemu-tdx", ("kata*",), True),
        ("", ("kata*",), False),
        ("", ("", "x"), True),
        ("", ("*",), True),
        ("runc", ("kata*",), False),
        ("Kata", ("kata*",), False),
        ("vm1", ("vm?",), True),
        ("vm", (), False),
    ],
)
def test_handlers(handler: str, patterns: tuple[str, ...], expected: bool) -> None:
    assert is_vm(handler, patterns) is expected


@pytest.mark.parametrize("engine", ["containerd", "cri-o"])
def test_what_prepare_is_asked(engine: str) -> None:
    lies = {
        "io.kubernetes.cri.sandbox-uid": "another",
        "io.kubernetes.cri.container-type": "sandbox",
        "io.kubernetes.cri-o.SandboxName": "k8s_a_b_another_0",
        "io.kubernetes.cri-o.Labels": '{"io.kubernetes.pod.uid": "another"}',
        "io.kubernetes.cri-o.ContainerType": "sandbox",
    }
    container = replace(
        CONTAINER,
        annotations=lies,
        mounts=(Mount("/data", "bind", "/srv", ("rbind", "ro")),),
        namespaces=(Namespace("mount"), Namespace("network", "/proc/1/ns/net")),
        cgroups_path="/pods/c",
        memory_limit_bytes=1 << 20,
    )
    pod = replace(POD, annotations={**MODEL, **lies})
    document = json.loads(asking(pod, container, wanted(pod, container), engine, (77, 1234)))
    spec_of = document.pop("spec")
    assert document == {"container_id": "c-id", "bundle": "", "runtime": "kata", "creator": [77, 1234]}
    facts = read_engine_facts(engine, spec_of["annotations"])
    assert (facts.pod_uid, facts.container_name, facts.is_sandbox, facts.in_sandbox) == (
        "pod-uid",
        "server",
        False,
        True,
    )
    spec_of["root"] = {"path": "rootfs"}
    spec = parse_spec(json.dumps(spec_of).encode(), bundle="/b")
    assert [(m.destination, m.source, m.options) for m in spec.mounts] == [("/data", "/srv", ("rbind", "ro"))]
    assert (spec.has_mount_namespace, spec.mount_namespace_path, spec.cgroups_path) == (True, None, "/pods/c")
    assert spec.memory_limit_bytes is None


def test_a_pod_without_a_uid() -> None:
    pod = replace(POD, uid="")
    for engine in ("containerd", "cri-o"):
        document = json.loads(asking(pod, CONTAINER, wanted(pod, CONTAINER), engine, (1, 2)))
        assert read_engine_facts(engine, document["spec"]["annotations"]).pod_uid is None


def test_the_answer_of_prepare() -> None:
    entry = {"destination": "/models/m", "source": "/run/scz-smm/bound/x/0", "options": ["bind", "ro"]}
    assert parse_binds(json.dumps({"binds": [entry]}).encode()) == (
        Mount("/models/m", "bind", "/run/scz-smm/bound/x/0", ("bind", "ro")),
    )


@given(
    st.one_of(
        st.binary(max_size=64),
        st.recursive(
            st.none() | st.integers() | st.text(max_size=8),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["binds", "destination", "source", "options", "x"]), inner, max_size=4
                )
            ),
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_any_other_answer_is_an_error_of_ours(data: bytes) -> None:
    try:
        found = parse_binds(data)
    except InternalError:
        return
    assert all(mount.destination.startswith("/") and mount.source.startswith("/") for mount in found)


def test_the_childs_refusal_keeps_its_class_and_words() -> None:
    line = "scz-hook: TokenBoundElsewhere (41): the token is of another pod; mount the pod's own; and try again\n"
    error = refusal_of(41, "noise\n" + line)
    assert isinstance(error, TokenBoundElsewhere)
    assert (error.message, error.advice) == ("the token is of another pod; mount the pod's own", "and try again")
    silent = refusal_of(35, "")
    assert (type(silent), silent.message, silent.advice) == (
        BootStateRefused,
        BootStateRefused.summary,
        BootStateRefused.remedy,
    )
    assert "signal 9" in refusal_of(-9, line).message
    assert "exit code 1" in refusal_of(1, line).message


@given(st.sampled_from(sorted(all_errors())), st.text(max_size=200))
def test_whatever_the_child_says_it_is_a_refusal(code: int, said: str) -> None:
    assert type(refusal_of(code, said)) is all_errors()[code]


def test_a_child_that_refuses_what_it_is_asked() -> None:
    with pytest.raises(SczError) as caught:
        run_prepare(Invocation("prepare"), b"{}", seconds=60, advice="x")
    assert caught.value.code == 10  # StateInvalid
    with pytest.raises(Terminated, match=r"not ready within 0\.0 s") as ended:
        run_prepare(Invocation("prepare"), b"{}", seconds=0.0, advice="wait longer")
    assert ended.value.advice == "wait longer"
