"""`host`: what the delivery is told of a container, and what of its requests is still to be delivered."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from oci_hook.bundle.layout import open_layout
from oci_hook.config import load_config
from oci_hook.host import close_ended, container_view, may_share, not_delivered
from oci_hook.oci.annotations import parse_requests
from oci_hook.oci.engine import EngineFacts
from oci_hook.oci.spec import parse_spec
from oci_hook.oci.state import State
from oci_hook.records import ContainerRecord, ContainerRecords
from oci_hook.store import Store
from tests.commands import Household
from tests.models import TestOwner

POD = EngineFacts(container_name="app", pod_uid="0b61", in_sandbox=True)
KUBELET = "/var/lib/kubelet/pods/0b61/volumes/kubernetes.io~empty-dir/models"


def view(source: str, facts: EngineFacts = POD, kind: str = "bind") -> frozenset[str]:
    mount = {"destination": "/models", "type": kind, "source": source, "options": ["rbind"] if kind == "bind" else []}
    spec = {"root": {"path": "rootfs"}, "mounts": [{"destination": "/proc", "type": "proc"}, mount]}
    found = container_view(State("c", 7, "/b", "", {}), parse_spec(json.dumps(spec).encode(), bundle="/b"), facts)
    assert found.mount_destinations == ("/proc", "/models")
    assert found.in_sandbox == facts.in_sandbox
    return found.memory_volumes


def test_an_empty_dir_of_the_container_s_own_pod() -> None:
    assert view(KUBELET) == {"/models"}


@pytest.mark.parametrize(
    "source",
    [
        "/var/lib/kubelet/pods/another/volumes/kubernetes.io~empty-dir/models",
        "/var/lib/kubelet/pods/0b61/volumes/kubernetes.io~empty-dir",
        "/var/lib/kubelet/pods/0b61/volumes/kubernetes.io~empty-dir/models/below",
        "/var/lib/kubelet/pods/0b61/volumes/kubernetes.io~host-path/models",
        "/var/lib/kubelet/pods/0b61/volumes/kubernetes.io~empty-dir/..",
        "/var/lib/kubelet/pods/0b61/volumes/kubernetes.io~empty-dir/../kubernetes.io~empty-dir/x",
        "/dev/shm/models",
    ],
)
def test_what_is_no_empty_dir_of_the_pod(source: str) -> None:
    assert view(source) == frozenset()


def test_without_an_engine_that_vouches_for_a_pod_there_is_none() -> None:
    assert view(KUBELET, EngineFacts()) == frozenset()
    assert view(KUBELET, kind="tmpfs") == frozenset()


def test_whether_a_model_may_be_shared(tmp_path: Path) -> None:
    for name in ("theirs", "ours"):
        (tmp_path / name).mkdir()
    owner, stranger = TestOwner(tmp_path / "ours"), TestOwner(tmp_path / "theirs")
    (source := tmp_path / "source").mkdir()
    (source / "weights").write_bytes(b"1")
    yes, no = (owner.pack_folder(f"m{share}".lower(), source, share=share).bundle for share in (True, False))
    asked, private = (
        parse_requests({"smm.scz/model": "m", **more}).models[0] for more in ({}, {"smm.scz/require": "private"})
    )
    with open_layout(yes) as shared, open_layout(no) as alone:
        assert may_share([asked], [shared], [owner.owner])
        assert may_share([asked, asked], [alone, shared], [stranger.owner, owner.owner])
        assert not may_share([asked], [alone], [owner.owner])
        assert not may_share([private], [shared], [owner.owner])
        assert not may_share([private, asked], [shared, alone], [owner.owner])
        assert not may_share([asked], [shared], [stranger.owner])  # which the admission refuses
        assert not may_share([], [], [owner.owner])


def record(*triples: tuple[str, str, str]) -> ContainerRecord:
    destinations, references, models = zip(*triples, strict=True)
    digests = ("sha256:" + "0" * 64,) * len(triples)
    return ContainerRecord("c", "/b", 7, 1, 1, references, models, digests, destinations, "s", 1, True)


GOT = record(("/models/minilm", "minilm:1", "minilm:1"), ("/carried", "rootfs:/opt/b", "carried:3"))


@pytest.mark.parametrize(
    ("annotations", "left"),
    [
        ({"model": "minilm:1"}, []),
        ({"model": "minilm"}, []),  # the only version that is here
        ({"model": "rootfs:/opt/b", "path": "/carried"}, []),
        ({"model": "minilm:1", "path": "/elsewhere"}, ["/elsewhere"]),
        ({"model": "minilm:2"}, ["/models/minilm"]),  # the destination is taken: attaching there is refused
        ({"model": "rootfs:/opt/other", "path": "/carried"}, ["/carried"]),
        ({"model": "carried:3", "path": "/carried"}, ["/carried"]),
        ({"model": "minilm:1", "model.b": "minilm:1", "path.b": "/b"}, ["/b"]),
    ],
)
def test_what_was_delivered_is_not_delivered_again(
    tmp_path: Path, annotations: dict[str, str], left: list[str]
) -> None:
    house = Household(tmp_path)
    house.trust()
    house.prepared()
    house.ctl("add", house.usb / "out")
    requests = parse_requests({f"smm.scz/{key}": text for key, text in annotations.items()}).models
    assert [request.destination for request in not_delivered(requests, GOT, house.store)] == left
    assert not_delivered(requests, None, house.store) == requests


def test_a_name_that_means_nothing_any_more_was_not_delivered(tmp_path: Path) -> None:
    requests = parse_requests({"smm.scz/model": "minilm"}).models
    assert not_delivered(requests, GOT, Store(str(tmp_path))) == requests


def test_what_ended_untold_is_closed_once_and_audited(tmp_path: Path) -> None:
    house = Household(tmp_path)
    config = load_config(str(house.config))
    ended = record(("/models/minilm", "minilm", "minilm:1"))  # its pid 7 began at another time
    ContainerRecords(config.runtime_directory).write(ended)
    with ThreadPoolExecutor(4) as pool:
        closed = [each for found in pool.map(close_ended, [config] * 4) for each in found]
    assert closed == [ended]
    (line,) = [json.loads(line) for line in Path(config.audit_file).read_text().splitlines()]
    assert (line["event"], line["container"], line["model"]) == ("closed", "c", "minilm:1")
