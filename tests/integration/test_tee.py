"""A container's start in a confidential guest: podman, hook and TPM are real, the guest's hardware is tests/tsm.py.

What a model's owner asks of a trusted execution environment is in the manifest; the report is made over this start's
quote, refused for each reason with its code, and told of in the audit log.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_start import refused, start
from tests.scene import AUDIENCE, ISSUER, SUBJECT, Scene
from tests.sev_snp import Maker, policy_document, table
from tests.tsm import behaviour_of, stand_in
from tests.workshop import wait_until

MILAN = Maker()


def add_model(scene: Scene, source: Path, name: str, tee: Mapping[str, Any]) -> None:
    """Pack a model whose access policy asks for a TEE, grant and add it."""
    out, access = scene.usb / f"{name}-1", scene.owner / f"{name}.json"
    out.mkdir()
    identity = {"issuer": ISSUER, "audience": AUDIENCE, "subjects": [SUBJECT]}
    policy = {"identities": [identity], "token_age_seconds": 3600, "share": False, "tee": tee}
    access.write_text(json.dumps(policy))
    words = ("--keys", scene.owner / "keys", "--name", name, "--version", "1", "--access", access)
    scene.sczctl("pack", source, "-o", out / "bundle", *words)
    scene.grant(out, name=name)
    scene.add(out)


@pytest.fixture(scope="module")
def guarded(scene: Scene, model_source: Path) -> Scene:
    """The scene with `guarded:1`, which asks for a guest of our own chip's, and `cloud:1`, for one of a cloud's."""
    add_model(scene, model_source, "guarded", policy_document(MILAN, minimum_tcb={"milan": {"snp": 22}}))
    add_model(scene, model_source, "cloud", policy_document(replace(MILAN, kind="vlek")))
    return scene


@contextmanager
def in_guest(scene: Scene, maker: Maker = MILAN, *, seconds: int = 60, **changes: Any) -> Iterator[Any]:
    """The host is a guest of a maker's chip; `changes` are the stand-in's."""
    base = scene.host / "tsm"
    base.mkdir(exist_ok=True)
    behaviour = {**behaviour_of(maker, **changes.pop("report", {})), "auxblob": table(maker.chain()).hex(), **changes}
    scene.write_config(tsm=f'tsm = "{base}"')
    scene.config.write_text(scene.config.read_text().replace("timeout_seconds = 60", f"timeout_seconds = {seconds}"))
    try:
        with stand_in(base, behaviour, prefix=scene.podman.namespace.prefix) as names:
            yield names
    finally:
        scene.write_config()


def last_grant(scene: Scene) -> dict[str, Any]:
    records = [json.loads(line) for line in scene.audit.read_text().splitlines()]
    return [record for record in records if record["event"] == "grant"][-1]


def test_a_model_that_asks_for_a_guest_starts_there(guarded: Scene) -> None:
    with in_guest(guarded) as names:
        attempt = start(guarded, guarded.token(), model="guarded:1", command="cat /models/guarded/model.json")
        assert attempt.returncode == 0, attempt.stderr
        assert json.loads(attempt.stdout)["model"]["name"] == "guarded"
        assert names() == []
    record = last_grant(guarded)
    assert (record["model"], record["tee"], len(bytes.fromhex(record["evidence"]))) == ("guarded", "sev-snp", 32)
    assert guarded.sczctl("audit", "verify").returncode == 0


def test_two_models_of_one_container_have_a_report_each(guarded: Scene) -> None:
    vlek = replace(MILAN, kind="vlek")
    more = {"smm.scz/model.second": "guarded:1", "smm.scz/path.second": "/opt/second"}
    with in_guest(guarded) as names:
        attempt = start(
            guarded, guarded.token(), model="guarded:1", annotations=more, command="cat /opt/second/model.json"
        )
        assert attempt.returncode == 0, attempt.stderr
        assert names() == []
    records = [json.loads(line) for line in guarded.audit.read_text().splitlines()]
    first, second = [record for record in records if record["event"] == "grant"][-2:]
    assert first["evidence"] != second["evidence"]
    with in_guest(guarded, vlek):
        assert start(guarded, guarded.token(), model="cloud:1").returncode == 0


def test_without_hardware_it_is_refused(guarded: Scene) -> None:
    attempt = refused(guarded, "TeeUnavailable", guarded.token(), model="guarded:1")
    assert "gives no report of a TEE" in str(attempt.why["message"])
    assert "/sys/kernel/config" in str(attempt.why["remedy"])


@pytest.mark.parametrize(
    ("reason", "changes", "says"),
    [
        ("TeeUnavailable", {"mkdir": 6}, "no report can be asked for"),
        ("TeeUnavailable", {"provider": "tdx_guest"}, "reports here are of tdx_guest"),
        ("TeeUnavailable", {"auxblob": ""}, "has the certificates ark, ask, vcek"),
        ("TeeUnavailable", {"interfere": "outblob"}, "writes to the report's directory"),
        ("TeeRefused", {"report": {"measurement": b"\1" * 48}}, "measurement 0101"),
        ("TeeRefused", {"report": {"policy": 0xB0000}}, "permits its host debug"),
        ("TeeRefused", {"report": {"vmpl": 1}}, "VMPL 1"),
        ("TeeRefused", {"report": {"launch": bytes(8)}}, "launch patch levels"),
        ("TeeRefused", {"outblob": MILAN.report().hex()}, "another occasion"),
        ("TeeRefused", {"outblob": "00" * 1184}, "version 0"),
        ("TeeRefused", {"auxblob": "01" * 100}, "certificate table"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_refused_with_its_reason(guarded: Scene, reason: str, changes: dict[str, Any], says: str) -> None:
    with in_guest(guarded, **changes) as names:
        attempt = refused(guarded, reason, guarded.token(), model="guarded:1")
        assert says in str(attempt.why["message"])
        assert names() == []


def test_a_cloud_s_key_for_a_model_that_asks_for_the_chip_s(guarded: Scene) -> None:
    with in_guest(guarded, replace(MILAN, kind="vlek")):
        refused(guarded, "TeeRefused", guarded.token(), model="guarded:1")


def test_certificates_that_root_keeps(guarded: Scene) -> None:
    folder = guarded.store / "tee"
    folder.mkdir()
    for role, der in MILAN.chain().items():
        (folder / f"{role}.der").write_bytes(der)
    try:
        with in_guest(guarded, auxblob=None):
            assert start(guarded, guarded.token(), model="guarded:1").returncode == 0
            (folder / "vcek.der").chmod(0o666)
            refused(guarded, "TeeUnavailable", guarded.token(), model="guarded:1")
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def test_a_model_that_does_not_ask_has_the_report_in_its_evidence(guarded: Scene) -> None:
    with in_guest(guarded, report={"policy": 0xB0000}):
        assert start(guarded, guarded.token()).returncode == 0
    assert last_grant(guarded)["tee"] == "sev_guest (not appraised)"
    for changes in ({"mkdir": 6}, {"deaf": True}):
        with in_guest(guarded, **changes):
            assert start(guarded, guarded.token()).returncode == 0
        assert "tee" not in last_grant(guarded)


def test_hardware_that_never_answers(guarded: Scene) -> None:
    """What hangs in the kernel is conmon's child in the end, and conmon 2.1.12 waits for it: so podman does, too."""
    trace = guarded.host / "trace" / "ran"
    with ThreadPoolExecutor(1) as podman:
        trace.unlink(missing_ok=True)
        with in_guest(guarded, hang="outblob", seconds=8):
            started = podman.submit(start, guarded, guarded.token())
            wait_until(lambda: trace.exists() or started.done(), 60)
            assert trace.exists()
            assert "tee" not in last_grant(guarded)
        assert started.result().returncode == 0
        guarded.forget_refusals()
        with in_guest(guarded, hang="outblob", seconds=8):
            started = podman.submit(start, guarded, guarded.token(), model="guarded:1")
            wait_until(lambda: "reason" in guarded.why() or started.done(), 60)
            assert guarded.why()["reason"] == "TeeUnavailable"
        attempt = started.result()
        assert (attempt.ran, attempt.why["reason"]) == (False, "TeeUnavailable")
        assert "within 8 s" in str(attempt.why["message"])
