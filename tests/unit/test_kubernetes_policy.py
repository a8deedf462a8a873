"""The admission policies of config/kubernetes: one object for each rule, refused for exactly that; and the hook's own
parser beside them, which has to say the same of every set of annotations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from oci_hook.config import Config
from oci_hook.errors import AnnotationInvalid
from oci_hook.oci.annotations import MAX_VALUE_BYTES, PREFIX, RUNTIMES, parse_requests
from tests.kubernetes import Manifest, Policy, Request, manifests, one

ANNOTATIONS = Policy(manifests("policy/annotations.yaml"), "scz-smm-annotations")
MODELS = Policy(manifests("policy/models.yaml"), "scz-smm-models")
INSTALLER = Policy(manifests("base/access.yaml"), "scz-smm-installer")
PARAMETERS = one(manifests("policy/settings.yaml"), "ConfigMap", "scz-smm-models")
PARAMETERS["data"] |= {
    "shop.recommender": "minilm:1\nbert:*\nrootfs:*\n",
    "shop.default": "minilm:1\n",
    "debuggers": "carol\ngroup:oncall\n",
}
EXAMPLE = one(manifests("example/deployment.yaml"), "Deployment", "recommender")
ALLOWED = {"smm.scz/models": "allowed"}
DIGEST = "sha256:" + "0123456789abcdef" * 4
RESOURCES = {
    "Pod": ("", "pods"),
    "ReplicationController": ("", "replicationcontrollers"),
    "Deployment": ("apps", "deployments"),
    "StatefulSet": ("apps", "statefulsets"),
    "DaemonSet": ("apps", "daemonsets"),
    "ReplicaSet": ("apps", "replicasets"),
    "Job": ("batch", "jobs"),
    "CronJob": ("batch", "cronjobs"),
}


def pod(annotations: dict[str, str] | None = None) -> Manifest:
    """The example's pod, as its Deployment makes it; with other annotations if some are given."""
    template = copy.deepcopy(EXAMPLE["spec"]["template"])
    metadata = {**template["metadata"], "name": "recommender-1", "namespace": "shop"}
    if annotations is not None:
        metadata["annotations"] = annotations
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def workload(kind: str, annotations: dict[str, str] | None = None) -> Manifest:
    """A workload whose pods are the example's."""
    whole = pod(annotations)
    template = {"metadata": {key: whole["metadata"][key] for key in ("labels", "annotations")}, "spec": whole["spec"]}
    spec = {"jobTemplate": {"spec": {"template": template}}} if kind == "CronJob" else {"template": template}
    return {"kind": kind, "metadata": {"name": "recommender", "namespace": "shop"}, "spec": spec}


def request(thing: Manifest, **how: Any) -> Request:
    how = {"namespace_labels": ALLOWED, "resource": RESOURCES[thing["kind"]], **how}
    return Request(thing, **how)


def changed(thing: Manifest, change: Callable[[Any], object]) -> Manifest:
    """A copy that was changed in one place."""
    other = copy.deepcopy(thing)
    change(other)
    return other


# --- annotations ------------------------------------------------------------------------------------------------------

M = {"smm.scz/model": "minilm:1"}
SLIP = "an annotation's prefix looks like smm.scz/ and is not; the hook would not see it"
KNOWN = ANNOTATIONS.messages[4]
VALUE = "a value under smm.scz/ is not 1 to 1024 bytes without control characters"
REFERENCE = "smm.scz/model is not name, name:version, name@sha256:<digest> or rootfs:/path"
PATH = "smm.scz/path, smm.scz/token or a model's rootfs:/path is not a normal absolute path below /"
REQUIRE = ANNOTATIONS.messages[13]
NAMES = "smm.scz/containers is not a list of different names, separated by commas only"
NEEDS_PATH = "smm.scz/model names a bundle in the image (rootfs:); smm.scz/path is needed then"
LONE_PATH = "an smm.scz/path has no smm.scz/model of the same slot beside it"
BESIDE = "two models would lie at or below one path; give each an own smm.scz/path"

MALFORMED: list[tuple[dict[str, str], str]] = [
    ({**M, "smm.scz/modle": "minilm:1"}, KNOWN),
    ({**M, "smm.scz/": "x"}, KNOWN),
    ({**M, "smm.scz/Model": "minilm:1"}, KNOWN),
    ({**M, "smm.scz/token.b": "/run/token"}, KNOWN),
    ({**M, "smm.scz/model/b": "bert"}, KNOWN),
    ({**M, "smm.scz/model.B": "bert"}, KNOWN),
    ({**M, "smm.scz/model.-b": "bert"}, KNOWN),
    ({**M, f"smm.scz/model.{'b' * 33}": "bert"}, KNOWN),
    ({**M, "smm.scz/token": ""}, VALUE),
    ({**M, "smm.scz/path": "/a\nb"}, VALUE),
    ({**M, "smm.scz/path": "/a\x85"}, VALUE),
    ({**M, "smm.scz/path": "/é" * 342}, VALUE),
    ({"smm.scz/containers": "main"}, "there are annotations under smm.scz/ but no smm.scz/model"),
    ({f"smm.scz/model.{n}": f"m{n}" for n in range(17)}, "more than 16 models are asked for"),
    ({**M, "smm.scz/path.b": "/b"}, LONE_PATH),
    ({"smm.scz/model.b": "bert", "smm.scz/path": "/b"}, LONE_PATH),
    *(({"smm.scz/model": bad}, REFERENCE) for bad in ("MiniLM", "a:", "a:1:2", "a@sha256:0", f"a:1@{DIGEST}", "a b")),
    *(({"smm.scz/model": bad}, REFERENCE) for bad in ("a" * 65, "a..b", "-a", "a:-1", "a:" + "1" * 65, f"a@{DIGEST}0")),
    *(({**M, "smm.scz/path": bad}, PATH) for bad in ("models", "/", "/a/", "/a//b", "/a/../b", "/./a", "//a", "/..")),
    *(({**M, "smm.scz/path": bad}, PATH) for bad in ("/" + "a" * 256, "/" + "é" * 128)),
    ({**M, "smm.scz/token": "token"}, PATH),
    ({"smm.scz/model": "rootfs:/a/../b", "smm.scz/path": "/b"}, PATH),
    ({"smm.scz/model": "rootfs:/opt/bundle"}, NEEDS_PATH),
    ({"smm.scz/model.b": "rootfs:/opt/bundle", "smm.scz/model": "a", "smm.scz/path": "/a"}, NEEDS_PATH),
    ({**M, "smm.scz/model.b": "minilm:2"}, BESIDE),
    ({**M, "smm.scz/path": "/m", "smm.scz/model.b": "bert", "smm.scz/path.b": "/m/b"}, BESIDE),
    *(
        ({**M, "smm.scz/require": bad}, REQUIRE)
        for bad in ("noswap,noswap", "swap", "noswap,", "runtime=", "private=1")
    ),
    *(({**M, "smm.scz/require": bad}, REQUIRE) for bad in ("runtime=runc,runtime=crun", "noswap, private", "Noswap")),
    *(({**M, "smm.scz/containers": bad}, NAMES) for bad in ("main,main", "main,", "main, side", "-main", "a" * 129)),
]

GOOD: list[dict[str, str]] = [
    {},
    M,
    {"smm.scz/model": "minilm"},
    {"smm.scz/model": f"minilm@{DIGEST}", "smm.scz/path": "/m"},
    {"smm.scz/model": "a" * 64 + ":" + "1" * 64},
    {"smm.scz/model": "rootfs:/opt/a:b@c", "smm.scz/path": "/b"},
    {"smm.scz/model.b": "bert:2", "smm.scz/model": "bert", "smm.scz/path": "/models/bert-2"},
    {f"smm.scz/model.{'b' * 32}": "bert", f"smm.scz/path.{'b' * 32}": "/" + "é" * 127},
    {f"smm.scz/model.s{n}": f"m{n}" for n in range(16)},
    {**M, "smm.scz/token": "/run/...", "smm.scz/containers": "main", "smm.scz/require": "private,runtime=runsc,noswap"},
    {**M, "smm.scz/path": ("/" + "a" * 255) * 4},
    *({**M, "smm.scz/require": f"runtime={runtime}"} for runtime in RUNTIMES),
]


def with_containers(annotations: dict[str, str]) -> Manifest:
    """A pod that has the containers which the annotations name."""
    made = pod(annotations)
    names = annotations.get("smm.scz/containers", "main").split(",")
    made["spec"]["containers"] = [{"name": name} for name in names]
    return made


def hook_accepts(annotations: dict[str, str]) -> bool:
    try:
        parse_requests(annotations)
    except AnnotationInvalid:
        return False
    return True


@pytest.mark.parametrize(("annotations", "message"), MALFORMED)
def test_what_the_hook_refuses_is_refused_for_that_reason(annotations: dict[str, str], message: str) -> None:
    asked = request(with_containers(annotations))
    assert ANNOTATIONS.refusals(asked) == [message]
    assert not ANNOTATIONS.failing(asked)
    assert not hook_accepts(annotations)


@pytest.mark.parametrize("annotations", GOOD)
def test_what_the_hook_accepts_is_let_in(annotations: dict[str, str]) -> None:
    asked = request(with_containers(annotations))
    assert (ANNOTATIONS.refusals(asked), ANNOTATIONS.failing(asked)) == ([], [])
    assert hook_accepts(annotations)


@pytest.mark.parametrize("kind", sorted(set(RESOURCES) - {"Pod"}))
def test_a_template_is_judged_like_its_pod(kind: str) -> None:
    assert ANNOTATIONS.refusals(request(workload(kind))) == []
    assert MODELS.refusals(request(workload(kind)), PARAMETERS) == []
    bad = workload(kind, {**M, "smm.scz/modle": "x"})
    assert ANNOTATIONS.refusals(request(bad)) == [KNOWN]
    assert ANNOTATIONS.refusals(request(bad, old=workload(kind), operation="UPDATE")) == [KNOWN]
    # What was there before the policy can still be deleted, which may take an update of its finalizers.
    without_finalizer = changed(bad, lambda each: each["metadata"].update(finalizers=[]))
    assert ANNOTATIONS.refusals(request(without_finalizer, old=bad, operation="UPDATE")) == []


# Values near the edges of every rule, so that chance meets them.
_PART = st.sampled_from(["a", "..", ".", "", "é", "x" * 255, "é" * 128, "m", "b c"])
_PATH = st.lists(_PART, max_size=4).map(lambda parts: "/" + "/".join(parts)) | st.sampled_from(["/m", "/m/b", "m", ""])
_NAME = st.sampled_from(["a", "minilm", "a.b", "a..b", "A", "a" * 64, "a" * 65, "rootfs", "a-b_c", "-a", ""])
_VERSION = st.sampled_from(
    ["", ":1", ":", ":v_1.0-x", ":-1", f"@{DIGEST}", "@sha256:0", f":1@{DIGEST}", ":" + "1" * 65]
)
_ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(["x" * 1024, "x" * 1025])
_MODEL = st.builds(str.__add__, _NAME, _VERSION) | _PATH.map("rootfs:".__add__) | _ANY
_LIST = st.lists(
    st.sampled_from(["noswap", "private", "runtime=runc", "runtime=x", "main", "side", " ", ""]), max_size=4
)
_SLOT = st.sampled_from(["", ".b", ".b", ".c-1", ".B", ".", ".-b", "." + "b" * 32, "." + "b" * 33, "/x"])
_PAIR = st.one_of(
    st.tuples(st.builds("smm.scz/model{}".format, _SLOT), _MODEL),
    st.tuples(st.builds("smm.scz/path{}".format, _SLOT), _PATH | _ANY),
    st.tuples(st.sampled_from(["smm.scz/require", "smm.scz/containers"]), _LIST.map(",".join) | _ANY),
    st.tuples(st.just("smm.scz/token"), _PATH | _ANY),
    st.tuples(st.text("modelpathrquicn./", max_size=8).map("smm.scz/".__add__), _ANY),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(_PAIR, min_size=1, max_size=5).map(dict))
@example({"smm.scz/model": "a" * 1024})
@example({"smm.scz/model": "rootfs:", "smm.scz/path": "/a"})
@example({**M, "smm.scz/path": "/a\u2028b"})
@example({**M, "smm.scz/path": "/\U0001f600" * 204})
@example({**M, "smm.scz/path": "/\U0001f600" * 205})
def test_policy_and_hook_agree(annotations: dict[str, str]) -> None:
    asked = request(with_containers(annotations))
    assert (ANNOTATIONS.refusals(asked) == []) == hook_accepts(annotations)
    assert not ANNOTATIONS.failing(asked)


# --- where the policy is stricter than the hook -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        "SMM.scz/model",
        "Smm.Scz/model",
        "smm-scz/model",
        "smm_scz/path",
        "smmscz/model",
        "scz-smm/model",
        "scz.smm/model",
        "smm.scz",
        "smm.scz.model",
        "smm.scz.io/model",
        "smm.scz-model",
        "SCZ-SMM",
        "smm.SCZ/require",
        "ssm.scz/model",
        "smm.szc/path",
        "sm.scz/token",
        "smm.sczz/model",
        "smm..scz/model.second",
        "smmscz/containers",
    ],
)
def test_slips_that_the_hook_never_sees(key: str) -> None:
    assert hook_accepts({key: "minilm:1"})
    assert ANNOTATIONS.refusals(request(pod({key: "minilm:1"}))) == [SLIP]


@pytest.mark.parametrize(
    "key", ["smm.sczz/x", "ysmm.scz/model", "example.com/smm.scz", "model", "sczsmm2/x", "smm/x", "example.com/model"]
)
def test_other_peoples_annotations_are_let_in(key: str) -> None:
    assert ANNOTATIONS.refusals(request(pod({key: "minilm:1"}))) == []


def test_our_prefix_as_a_label() -> None:
    labelled = changed(pod(), lambda each: each["metadata"]["labels"].update({"smm.scz/model": "minilm"}))
    assert ANNOTATIONS.refusals(request(labelled)) == ["smm.scz/ is for annotations; as a label it does nothing"]


@pytest.mark.parametrize("kind", sorted(set(RESOURCES) - {"Pod"}))
def test_annotations_at_the_workload_itself(kind: str) -> None:
    message = "annotations under smm.scz/ belong to the pod template (spec.template.metadata), not to the workload"
    misplaced = changed(workload(kind, {}), lambda each: each["metadata"].update(annotations=dict(M)))
    assert ANNOTATIONS.refusals(request(misplaced)) == [message]
    assert ANNOTATIONS.refusals(request(misplaced, old=workload(kind, {}), operation="UPDATE")) == [message]
    assert ANNOTATIONS.refusals(request(misplaced, old=misplaced, operation="UPDATE")) == []


def test_a_device_of_cdi_asked_for_by_annotation() -> None:
    asked = pod({"cdi.k8s.io/model": "smm.scz/model=minilm:1"})
    message = "a device of CDI with a model is asked for by its own engine's means, not by a pod's annotation"
    assert ANNOTATIONS.refusals(request(asked)) == [message]
    assert ANNOTATIONS.refusals(request(pod({"cdi.k8s.io/gpu": "nvidia.com/gpu=0"}))) == []


def test_a_container_that_the_pod_does_not_have() -> None:
    message = "smm.scz/containers names a container that the pod does not have"
    assert ANNOTATIONS.refusals(request(pod({**M, "smm.scz/containers": "mian"}))) == [message]
    assert ANNOTATIONS.refusals(request(pod({**M, "smm.scz/containers": "main"}))) == []
    first = changed(
        pod({**M, "smm.scz/containers": "first"}), lambda p: p["spec"].update(initContainers=[{"name": "first"}])
    )
    assert ANNOTATIONS.refusals(request(first)) == []
    many = with_containers({**M, "smm.scz/containers": ",".join(f"c{n}" for n in range(129))})
    assert ANNOTATIONS.refusals(request(many)) == [message]


@pytest.mark.parametrize("labels", [{}, {"smm.scz/models": "yes"}, {"smm.scz/model": "allowed"}, None])
def test_a_namespace_that_may_have_no_models(labels: dict[str, str] | None) -> None:
    message = "this namespace may have no models; a cluster administrator gives it the label smm.scz/models=allowed"
    assert ANNOTATIONS.refusals(request(pod(), namespace_labels=labels)) == [message]
    assert ANNOTATIONS.refusals(request(pod({}), namespace_labels=labels)) == []


@pytest.mark.parametrize("now", [{}, {**M, "smm.scz/path": "/m"}, {"smm.scz/model": "bert"}])
def test_annotations_of_a_pod_that_is_there(now: dict[str, str]) -> None:
    message = "annotations under smm.scz/ cannot be changed in a pod that is there; make a new pod"
    assert ANNOTATIONS.refusals(request(pod(now), old=pod(dict(M)), operation="UPDATE")) == [message]
    assert ANNOTATIONS.refusals(request(pod(dict(M)), old=pod(now), operation="UPDATE")) == [message]
    other = pod({**M, "example.com/x": "1"})
    assert ANNOTATIONS.refusals(request(other, old=pod(dict(M)), operation="UPDATE")) == []


def test_a_pod_older_than_the_policy_can_end() -> None:
    old = changed(
        pod({"smm.scz/modle": "x"}), lambda each: each["metadata"].update(finalizers=["batch.kubernetes.io/x"])
    )
    now = changed(old, lambda each: each["metadata"].pop("finalizers"))
    assert ANNOTATIONS.refusals(request(now, old=old, operation="UPDATE")) == []


def test_each_rule_of_the_annotations_has_its_object() -> None:
    tested = {message for _, message in MALFORMED}
    others = set(ANNOTATIONS.messages) - tested
    assert len(others) == 8  # those of the tests above, each by its text
    assert len(ANNOTATIONS.messages) == len(set(ANNOTATIONS.messages))


def test_the_numbers_are_the_hooks() -> None:
    assert MAX_VALUE_BYTES == 1024
    assert PREFIX == "smm.scz/"
    assert PARAMETERS["data"]["token-path"] == Config().token_path


# --- who may ask ------------------------------------------------------------------------------------------------------

WHO, VOLUME, MOUNT, CLASS, PLUGIN, HOST, PRIVILEGED, HOST_PATH, EPHEMERAL, EXEC = MODELS.messages[1:]


def spec(**members: Any) -> Callable[[Any], object]:
    return lambda each: each["spec"].update(members)


def container(**members: Any) -> Callable[[Any], object]:
    return lambda each: each["spec"]["containers"][0].update(members)


def annotated(**ours: str) -> Callable[[Any], object]:
    return lambda each: each["metadata"]["annotations"].update({f"smm.scz/{key}": text for key, text in ours.items()})


def token_source(**members: Any) -> Callable[[Any], object]:
    return lambda each: each["spec"]["volumes"][0]["projected"]["sources"][0]["serviceAccountToken"].update(members)


def side_car(each: Any) -> None:
    each["spec"]["containers"].append({"name": "side"})


NOT_ADMITTED: list[tuple[Callable[[Any], object], str]] = [
    (annotated(model="minilm:2"), WHO),
    (annotated(model="minilm"), WHO),
    (annotated(model=f"minilm@{DIGEST}"), WHO),
    (spec(serviceAccountName="other"), WHO),
    (lambda each: each["metadata"].update(namespace="shop2"), WHO),
    (lambda each: each["metadata"]["annotations"].update({"smm.scz/model.b": "secret:1"}), WHO),
    (spec(volumes=[]), VOLUME),
    (lambda each: each["spec"].pop("volumes"), VOLUME),
    (token_source(audience="https://kubernetes.default.svc"), VOLUME),
    (spec(volumes=[{"name": "scz-token", "secret": {"secretName": "token"}}]), VOLUME),
    (lambda each: each["spec"]["volumes"][0]["projected"]["sources"][0]["serviceAccountToken"].pop("audience"), VOLUME),
    (container(volumeMounts=[]), MOUNT),
    (lambda each: each["spec"]["containers"][0].pop("volumeMounts"), MOUNT),
    (container(volumeMounts=[{"name": "scz-token", "mountPath": "/run/elsewhere"}]), MOUNT),
    (container(volumeMounts=[{"name": "other", "mountPath": "/var/run/secrets/scz-smm"}]), MOUNT),
    (
        container(volumeMounts=[{"name": "scz-token", "mountPath": "/var/run/secrets/scz-smm", "subPath": "token"}]),
        MOUNT,
    ),
    (token_source(path="jwt"), MOUNT),
    (annotated(token="/run/token"), MOUNT),
    (side_car, MOUNT),
    (spec(initContainers=[{"name": "first"}]), MOUNT),
    (lambda each: each["spec"].pop("runtimeClassName"), CLASS),
    (spec(runtimeClassName="runc"), CLASS),
    (spec(hostPID=True), HOST),
    (spec(hostIPC=True), HOST),
    (spec(shareProcessNamespace=True), HOST),
    (container(securityContext={"privileged": True}), PRIVILEGED),
    (container(securityContext={"capabilities": {"add": ["SYS_ADMIN"]}}), PRIVILEGED),
    (container(securityContext={"capabilities": {"add": ["CAP_DAC_READ_SEARCH"]}}), PRIVILEGED),
    (container(securityContext={"capabilities": {"add": ["NET_RAW", "CAP_SYS_PTRACE"]}}), PRIVILEGED),
    (container(securityContext={"capabilities": {"add": ["all"]}}), PRIVILEGED),
]

ADMITTED: list[Callable[[Any], object]] = [
    lambda each: None,
    annotated(model="bert:7", path="/models/bert"),
    annotated(model=f"bert@{DIGEST}"),
    annotated(model="rootfs:/opt/bundle"),
    lambda each: each["spec"].pop("serviceAccountName"),  # default
    lambda each: (
        annotated(token="/run/scz/token")(each),
        container(volumeMounts=[{"name": "scz-token", "mountPath": "/run/scz"}])(each),
    ),
    lambda each: (annotated(containers="main")(each), side_car(each)),
    lambda each: (annotated(containers="main")(each), spec(initContainers=[{"name": "first"}])(each)),
    spec(hostPID=False, runtimeClassName="scz-runsc"),
    container(securityContext={"privileged": False, "capabilities": {"add": ["NET_BIND_SERVICE"], "drop": ["ALL"]}}),
]


@pytest.mark.parametrize(("change", "message"), NOT_ADMITTED)
def test_a_pod_that_is_not_admitted_for_one_reason(change: Callable[[Any], object], message: str) -> None:
    asked = request(changed(pod(), change))
    assert MODELS.refusals(asked, PARAMETERS) == [message]
    assert not MODELS.failing(asked, PARAMETERS)


@pytest.mark.parametrize("change", ADMITTED)
def test_a_pod_that_is_admitted(change: Callable[[Any], object]) -> None:
    asked = request(changed(pod(), change))
    assert MODELS.refusals(asked, PARAMETERS) == []
    assert not MODELS.failing(asked, PARAMETERS)


@pytest.mark.parametrize(("change", "message"), NOT_ADMITTED[6:])
def test_pods_without_a_model_are_not_judged(change: Callable[[Any], object], message: str) -> None:
    plain = changed(pod(), change)
    plain["metadata"]["annotations"] = {}
    assert MODELS.refusals(request(plain), PARAMETERS) == []


def host_path(path: str) -> Callable[[Any], object]:
    return lambda each: each["spec"]["volumes"].append({"name": "host", "hostPath": {"path": path}})


@pytest.mark.parametrize("model", [True, False])
@pytest.mark.parametrize(
    "path",
    [
        "/",
        "//",
        "/.",
        "/run",
        "/run/",
        "//run",
        "/./run/.",
        "run",
        "/var/run",
        "/var//run/",
        "/run/scz-smm",
        "/run/scz-smm/",
        "/run/./scz-smm",
        "/var/run/scz-smm",
        "/run/scz-smm/bound",
        "/run/scz-smm/a\nb",
    ],
)
def test_a_hostpath_to_the_models_of_others(path: str, model: bool) -> None:
    asking = changed(pod(), host_path(path))
    if not model:
        asking["metadata"]["annotations"] = {}
    assert MODELS.refusals(request(asking), PARAMETERS) == [HOST_PATH]
    assert not MODELS.failing(request(asking), PARAMETERS)
    assert MODELS.refusals(request(asking), parameters(forbid_privileged="false")) == []
    finished = changed(asking, lambda each: each["metadata"].update(finalizers=["x"]))
    assert MODELS.refusals(request(asking, old=finished, operation="UPDATE"), PARAMETERS) == []


@pytest.mark.parametrize("path", ["/run/scz-smm-x", "/run/containerd", "/var", "/var/lib", "/srv/run", "/runs", "/x.y"])
def test_a_hostpath_elsewhere(path: str) -> None:
    assert MODELS.refusals(request(changed(pod(), host_path(path))), PARAMETERS) == []


def parameters(**changes: str | None) -> Manifest:
    data = {**PARAMETERS["data"], **{key.replace("_", "-"): text for key, text in changes.items()}}
    return {**PARAMETERS, "data": {key: text for key, text in data.items() if text is not None}}


def test_rules_that_the_parameters_lift() -> None:
    without_class = request(changed(pod(), lambda each: each["spec"].pop("runtimeClassName")))
    assert MODELS.refusals(without_class, parameters(runtime_classes="any")) == []
    privileged = request(changed(changed(pod(), spec(hostPID=True)), container(securityContext={"privileged": True})))
    assert MODELS.refusals(privileged, PARAMETERS) == [HOST, PRIVILEGED]
    assert MODELS.refusals(privileged, parameters(forbid_privileged="false")) == []


@pytest.mark.parametrize(
    "changes",
    [
        {key: None}
        for key in ("audience", "token_path", "runtime_classes", "debuggers", "forbid_privileged", "guard_exec")
    ]
    + [{"forbid_privileged": "yes"}, {"guard_exec": ""}],
)
def test_parameters_that_cannot_be_used_refuse(changes: dict[str, str | None]) -> None:
    assert MODELS.messages[0] in MODELS.refusals(request(pod()), parameters(**changes))


def test_without_parameters_only_these_namespaces_are_closed() -> None:
    assert MODELS.refusals(request(pod()), None) == ["no params found"]
    assert MODELS.refusals(request(pod({}), namespace_labels={}), None) == []
    assert MODELS.messages[0] in MODELS.refusals(request(pod()), {"kind": "ConfigMap"})


# --- models by NRI alone ----------------------------------------------------------------------------------------------

REQUIRED = "required-plugins.noderesource.dev"


def naming(**annotations: str) -> Callable[[Any], object]:
    """Annotations of the pod: `plugins` for all, `pod` and `main` for the narrower keys."""
    keys = {"plugins": REQUIRED, "pod": f"{REQUIRED}/pod", "main": f"{REQUIRED}/container.main"}
    found = {keys[name]: text for name, text in annotations.items()}
    return lambda each: (
        each["metadata"]["annotations"].update(found),
        each["spec"].update(runtimeClassName="kata-qemu"),
    )


@pytest.mark.parametrize(
    "annotations",
    [
        {},
        {"plugins": ""},
        {"plugins": "[]"},
        {"plugins": '["other"]'},
        {"plugins": "scz-smm"},
        {"plugins": '["xscz-smm"]'},
        {"plugins": '["scz-smm"] #'},
        {"plugins": '["scz-smm"]', "pod": '["other"]'},
        {"plugins": '["scz-smm"]', "main": "[]"},
        {"pod": '["scz-smm"]', "main": '["other"]'},
    ],
)
def test_a_pod_that_does_not_require_the_plugin(annotations: dict[str, str]) -> None:
    asked = request(changed(pod(), naming(**annotations)))
    classes = {"runtime_classes": "scz-runc\nkata-qemu\n"}
    assert MODELS.refusals(asked, parameters(**classes, plugin_classes="kata-qemu\n")) == [PLUGIN]
    assert MODELS.refusals(asked, parameters(runtime_classes="any", plugin_classes="any")) == [PLUGIN]
    for others in ("", "kata-fc\n", None):
        assert MODELS.refusals(asked, parameters(**classes, plugin_classes=others)) == []


@pytest.mark.parametrize(
    "annotations",
    [
        {"plugins": '["scz-smm"]'},
        {"plugins": '[ "other" , "scz-smm","more" ]'},
        {"plugins": "[]", "pod": '["scz-smm"]'},
        {"plugins": '["scz-smm"]', "main": '["scz-smm","other"]'},
    ],
)
def test_a_pod_that_requires_the_plugin(annotations: dict[str, str]) -> None:
    asked = request(changed(pod(), naming(**annotations)))
    allowed = parameters(runtime_classes="kata-qemu", plugin_classes="kata-qemu")
    assert MODELS.refusals(asked, allowed) == []
    assert not MODELS.failing(asked, allowed)


@pytest.mark.parametrize("classes", ["any\n", "kata-fc\nany", "kata-fc\n\nkata-qemu"])
def test_classes_as_a_block_of_lines(classes: str) -> None:
    found = parameters(runtime_classes="any", plugin_classes=classes)
    assert MODELS.refusals(request(changed(pod(), naming())), found) == [PLUGIN]
    assert MODELS.refusals(request(changed(pod(), naming(plugins='["scz-smm"]'))), found) == []


@pytest.mark.parametrize(
    "classes", ["any ", " any", "kata-qemu \n", "kata-qemu,kata-fc", "|\nkata", "| kata", "Any", "a\r\n"]
)
def test_classes_that_are_none_refuse(classes: str) -> None:
    found = parameters(runtime_classes="any", plugin_classes=classes)
    assert MODELS.messages[0] in MODELS.refusals(request(changed(pod(), naming(plugins='["scz-smm"]'))), found)


@pytest.mark.parametrize("now", [{}, {"plugins": "[]"}, {"plugins": '["scz-smm"]', "main": "[]"}])
def test_what_a_pod_that_is_there_requires(now: dict[str, str]) -> None:
    message = "required-plugins.noderesource.dev cannot be changed in a pod with a model that is there; make a new pod"
    requiring = changed(pod(), naming(plugins='["scz-smm"]'))
    asked = request(changed(pod(), naming(**now)), old=requiring, operation="UPDATE")
    assert (ANNOTATIONS.refusals(asked), ANNOTATIONS.failing(asked)) == ([message], [])
    same = changed(requiring, lambda each: each["metadata"]["annotations"].update({"example.com/x": "1"}))
    assert ANNOTATIONS.refusals(request(same, old=requiring, operation="UPDATE")) == []
    plain = changed(pod({}), naming(plugins='["scz-smm"]'))
    assert ANNOTATIONS.refusals(request(pod({}), old=plain, operation="UPDATE")) == []


# --- exec and debugging -----------------------------------------------------------------------------------------------


def debugging(**who: Any) -> Request:
    debugged = changed(pod(), spec(ephemeralContainers=[{"name": "debug", "image": "busybox"}]))
    return request(debugged, old=pod(), operation="UPDATE", subresource="ephemeralcontainers", **who)


def test_ephemeral_containers() -> None:
    assert MODELS.refusals(debugging(), PARAMETERS) == [EPHEMERAL]
    assert MODELS.refusals(debugging(user="carol"), PARAMETERS) == []
    assert MODELS.refusals(debugging(groups=("oncall",)), PARAMETERS) == []
    assert MODELS.refusals(debugging(user="group:oncall"), PARAMETERS) == [EPHEMERAL]  # a user of that very name
    assert MODELS.refusals(debugging(user="", groups=()), PARAMETERS) == [EPHEMERAL]
    assert ANNOTATIONS.refusals(debugging()) == []


def test_an_ephemeral_container_without_limits() -> None:
    asked = debugging(user="carol")
    assert asked.object is not None
    asked.object["spec"]["ephemeralContainers"][0]["securityContext"] = {"privileged": True}
    assert MODELS.refusals(asked, PARAMETERS) == [PRIVILEGED]


def test_an_ephemeral_container_in_a_pod_without_a_model() -> None:
    debugged = changed(pod({}), spec(ephemeralContainers=[{"name": "debug"}]))
    asked = request(debugged, old=pod({}), operation="UPDATE", subresource="ephemeralcontainers")
    assert MODELS.refusals(asked, PARAMETERS) == []


@pytest.mark.parametrize("way", ["exec", "attach"])
def test_exec_and_attach(way: str) -> None:
    options = {"kind": "PodExecOptions", "metadata": {"namespace": "shop"}, "command": ["sh"]}

    def asked(**who: Any) -> Request:
        how = {"operation": "CONNECT", "subresource": way, "namespace_labels": ALLOWED, **who}
        return Request(options, **how)

    assert MODELS.refusals(asked(), PARAMETERS) == [EXEC]
    assert not MODELS.failing(asked(), PARAMETERS)
    assert MODELS.refusals(asked(user="carol"), PARAMETERS) == []
    assert MODELS.refusals(asked(), parameters(guard_exec="false")) == []
    assert MODELS.refusals(asked(namespace_labels={}), PARAMETERS) == []
    assert ANNOTATIONS.refusals(asked()) == []


def test_the_kubelet_s_and_controllers_updates_pass() -> None:
    running = changed(pod(), lambda each: each["metadata"].update(finalizers=["x"]))
    asked = request(pod(), old=running, operation="UPDATE", user="system:serviceaccount:kube-system:job-controller")
    assert (ANNOTATIONS.refusals(asked), MODELS.refusals(asked, parameters(shop_recommender=None))) == ([], [])
    status = request(pod(), old=running, operation="UPDATE", subresource="status", user="system:node:n1")
    assert not ANNOTATIONS.matches(status)
    assert not MODELS.matches(status)


# --- the installer's own account --------------------------------------------------------------------------------------

ACCOUNT = "system:serviceaccount:scz-smm:scz-smm-installer"
ONLY_PATCH, OWN_NODE, OWN_LABELS, NOTHING_ELSE = INSTALLER.messages
NODE = {
    "kind": "Node",
    "metadata": {"name": "n1", "labels": {"zone": "a"}, "annotations": {"x": "1"}},
    "spec": {"podCIDR": "10.0.0.0/24"},
}


def of_installer(now: Manifest, **how: Any) -> list[str]:
    extra = {"authentication.kubernetes.io/node-name": ["n1"]}
    how = {"old": NODE, "operation": "UPDATE", "user": ACCOUNT, "extra": extra, "resource": ("", "nodes"), **how}
    return INSTALLER.refusals(Request(now, **how))


def test_the_installer_labels_its_node() -> None:
    ready = changed(NODE, lambda each: each["metadata"]["labels"].update({"smm.scz/scz-runc": "ready"}))
    assert of_installer(ready) == []
    assert of_installer(NODE, old=ready) == []
    assert of_installer(NODE) == []


@pytest.mark.parametrize(
    "extra",
    [None, {}, {"authentication.kubernetes.io/node-name": ["n2"]}, {"authentication.kubernetes.io/node-name": []}],
)
def test_the_installer_leaves_other_nodes_alone(extra: dict[str, list[str]] | None) -> None:
    assert of_installer(NODE, extra=extra) == [OWN_NODE]


@pytest.mark.parametrize(
    "change",
    [
        lambda each: each["metadata"]["labels"].update({"node-role.kubernetes.io/control-plane": ""}),
        lambda each: each["metadata"]["labels"].update(zone="b"),
        lambda each: each["metadata"]["labels"].pop("zone"),
        lambda each: each["metadata"]["labels"].update({"smm.scz/models": "allowed"}),
    ],
)
def test_the_installer_leaves_other_labels_alone(change: Callable[[Any], object]) -> None:
    assert of_installer(changed(NODE, change)) == [OWN_LABELS]


@pytest.mark.parametrize(
    "change",
    [
        lambda each: each["spec"].update(unschedulable=True),
        lambda each: each["metadata"]["annotations"].update(x="2"),
        lambda each: each["metadata"].pop("annotations"),
        lambda each: each["metadata"].update(finalizers=["x"]),
        lambda each: each["metadata"].update(ownerReferences=[{"uid": "x"}]),
    ],
)
def test_the_installer_changes_nothing_else(change: Callable[[Any], object]) -> None:
    assert of_installer(changed(NODE, change)) == [NOTHING_ELSE]


def test_the_installer_does_nothing_else_with_nodes() -> None:
    assert ONLY_PATCH in of_installer(NODE, subresource="status")
    assert ONLY_PATCH in of_installer(NODE, operation="CREATE", old=None)
    assert ONLY_PATCH in INSTALLER.refusals(
        Request(None, old=NODE, operation="DELETE", user=ACCOUNT, resource=("", "nodes"))
    )
    assert of_installer(changed(NODE, spec(unschedulable=True)), user="system:node:n1", extra=None) == []
