"""A delivery is used in one order; the effects are tested under real runtimes (tests/integration/test_delivery.py)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from oci_hook.delivery.deliver import ContainerView, Delivery, DeliverySettings
from oci_hook.errors import HolderRefused


@pytest.fixture
def delivery(tmp_path: Path) -> Delivery:
    view = ContainerView("c", os.getpid(), str(tmp_path), ".", frozenset(), 0, 0, mount_namespace_joined=False)
    return Delivery(view, DeliverySettings(0, str(tmp_path / "run"), None, 1))


def test_nothing_can_be_done_out_of_order(delivery: Delivery) -> None:
    for step in (
        lambda: delivery.prepare(["/models"]),
        delivery.attach,
        lambda: delivery.runtime,
        lambda: delivery.start_time,
    ):
        with pytest.raises(RuntimeError):
            step()


def test_a_refused_holder_leaves_nothing_open(delivery: Delivery, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(HolderRefused), delivery:
        raise AssertionError("this block is not reached")
    assert len(os.listdir("/proc/self/fd")) == before
    assert not (tmp_path / "run").exists()
