"""`oci.engine`: whose word counts for what a container is in its pod."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_hook.errors import SczError, SpecInvalid
from oci_hook.oci.engine import EngineFacts, read_engine_facts

CONTAINERD = {
    "io.kubernetes.cri.container-type": "container",
    "io.kubernetes.cri.container-name": "app",
    "io.kubernetes.cri.sandbox-uid": "0b61-containerd",
}
LABELS = "io.kubernetes.cri-o.Labels"
CRI_O = {
    "io.kubernetes.cri-o.ContainerType": "container",
    LABELS: json.dumps({"io.kubernetes.container.name": "web", "io.kubernetes.pod.uid": "7f2c-crio", "tier": "x"}),
}
NOTHING = EngineFacts(is_sandbox=False, container_name=None, pod_uid=None)


def test_each_engine_is_read_by_its_own_keys() -> None:
    assert read_engine_facts("containerd", CONTAINERD) == EngineFacts(False, "app", "0b61-containerd", in_sandbox=True)
    assert read_engine_facts("cri-o", CRI_O) == EngineFacts(False, "web", "7f2c-crio", in_sandbox=True)


def test_cri_o_names_container_and_pod_also_where_no_kubelet_sets_labels() -> None:
    said = {
        "io.kubernetes.cri-o.ContainerType": "container",
        "io.kubernetes.cri-o.Metadata": '{"name":"app","attempt":2}',
        "io.kubernetes.cri-o.SandboxName": "k8s_web-7d4_shop_7f2c-crio_0",
        LABELS: "{}",
    }
    assert read_engine_facts("cri-o", said) == EngineFacts(False, "app", "7f2c-crio", in_sandbox=True)
    assert read_engine_facts("cri-o", {**CRI_O, **said, LABELS: CRI_O[LABELS]}).container_name == "app"
    with pytest.raises(SpecInvalid, match="two pods"):
        read_engine_facts("cri-o", {**said, LABELS: json.dumps({"io.kubernetes.pod.uid": "another"})})


@pytest.mark.parametrize("name", ["", "k8s_a_b", "k8s_a_b__0", "x_a_b_c_0", "k8s_a_b_c_x", "k8s_a_b_c_d_0"])
def test_a_sandbox_s_name_of_another_form_names_no_pod(name: str) -> None:
    assert read_engine_facts("cri-o", {"io.kubernetes.cri-o.SandboxName": name}).pod_uid is None


@pytest.mark.parametrize("engine", ["podman", "docker"])
def test_engines_without_pods_are_believed_nothing(engine: str) -> None:
    assert read_engine_facts(engine, {**CONTAINERD, **CRI_O}) == NOTHING


@pytest.mark.parametrize(("engine", "foreign"), [("containerd", CRI_O), ("cri-o", CONTAINERD)])
def test_another_engine_s_keys_are_what_a_user_wrote(engine: str, foreign: dict[str, str]) -> None:
    assert read_engine_facts(engine, foreign) == NOTHING


def test_pause_containers_are_told_apart() -> None:
    sandbox = {**CONTAINERD, "io.kubernetes.cri.container-type": "sandbox"}
    assert read_engine_facts("containerd", sandbox).is_sandbox
    assert read_engine_facts("cri-o", {**CRI_O, "io.kubernetes.cri-o.ContainerType": "sandbox"}).is_sandbox
    assert not read_engine_facts("podman", {**sandbox, "io.kubernetes.cri-o.ContainerType": "sandbox"}).is_sandbox


@pytest.mark.parametrize("kind", ["", "Sandbox", "sandbox ", "SANDBOX"])
def test_only_the_exact_word_makes_a_sandbox(kind: str) -> None:
    # A sandbox passes untouched: a word that is nearly the engine's must not open that way.
    assert not read_engine_facts("containerd", {"io.kubernetes.cri.container-type": kind}).is_sandbox
    assert not read_engine_facts("cri-o", {"io.kubernetes.cri-o.ContainerType": kind}).is_sandbox


def test_an_engine_that_says_nothing() -> None:
    for engine in ("containerd", "cri-o", "podman", "docker"):
        assert read_engine_facts(engine, {}) == NOTHING


@pytest.mark.parametrize(
    "labels",
    [
        "",
        "{",
        "[]",
        "null",
        '"x"',
        '{"a":1,"a":2}',
        '{"a":NaN}',
        '{"a":"\\ud800"}',
        "[" * 5000,
        "{}" + " " * (256 << 10),
    ],
)
def test_labels_that_are_no_object_are_refused(labels: str) -> None:
    with pytest.raises(SpecInvalid, match="Labels"):
        read_engine_facts("cri-o", {LABELS: labels})
    assert read_engine_facts("containerd", {LABELS: labels}) == NOTHING


@pytest.mark.parametrize("value", [1, True, None, ["x"], {"x": "y"}])
def test_labels_of_another_type_are_no_facts(value: object) -> None:
    labels = json.dumps({"io.kubernetes.container.name": value, "io.kubernetes.pod.uid": value})
    assert read_engine_facts("cri-o", {LABELS: labels}) == NOTHING


@given(st.text(max_size=200), st.sampled_from(["cri-o", "containerd"]))
def test_any_text_is_a_value_or_one_of_our_errors(text: str, engine: str) -> None:
    keys = (LABELS, "io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-uid")
    try:
        facts = read_engine_facts(engine, dict.fromkeys(keys, text))
    except SczError as error:
        assert isinstance(error, SpecInvalid)  # noqa: PT017 - either way is right
    else:
        assert isinstance(facts, EngineFacts)
