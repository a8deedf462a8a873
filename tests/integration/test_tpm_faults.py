"""Faults of real TPMs: each has a code and a remedy, leaves no object and no session, and a good start works next.

What is shown elsewhere is not repeated here. `test_attestation`: lockout, a deleted counter, TPM2_Clear, passwords, a
TPM that hangs (SIGSTOP), that is not there, that dies between two commands, transactions that are killed.
`test_endurance`: hooks that are killed. `test_sharing`: sixteen containers at once. `test_malicious_tpm`: responses
that are cut, drip, or never come.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from oci_hook.attestation import tpm as tpm_module
from oci_hook.attestation.appraisal import appraise_evidence
from oci_hook.attestation.attest import Attest, parse_attest
from oci_hook.attestation.deadline import Deadline, Standby, with_deadline
from oci_hook.attestation.key_checks import COUNTER_ATTRIBUTES
from oci_hook.attestation.structures import NvAttributes
from oci_hook.attestation.tpm import Tpm
from oci_hook.attestation.transactions import get_ready, perform, quote_request, read_quote, unseal_request
from oci_hook.errors import (
    BootStateRefused,
    DeviceNotEnrolled,
    EvidenceRefused,
    KeyRefused,
    SczError,
    TpmFailed,
    TpmTimeout,
    TpmUnavailable,
)
from oci_hook.owner.keyring import Keyring
from tests.integration.test_attestation import (
    GRUB,
    SECRET,
    Host,
    Sealing,
    _keyring,
    _machine,
    approve,
    for_this_start,
    forked,
    lock_stays_free,
    seal,
)
from tests.integration.test_endurance import left_overs
from tests.integration.test_start import start
from tests.resource_manager import TCTI, enter, resource_manager
from tests.scene import Scene
from tests.software_tpm import SoftwareTpm
from tests.tpm_proxy import Exchange, Tap, name_of, power_cycle

tss = tpm_module.tss
AT_ONCE = 16
SLOTS = 3  # a TPM has as many for objects, and as many for sessions (Part 1, 37.2; swtpm)


@pytest.fixture(scope="module")
def keyring(tmp_path_factory: pytest.TempPathFactory) -> Keyring:
    return _keyring(tmp_path_factory.mktemp("owner") / "keys", "acme")


@pytest.fixture(scope="module")
def enrolled(keyring: Keyring) -> Iterator[Host]:
    """A host whose TPM is off: only copies of it are used, as most of these tests break theirs."""
    with _machine() as made:
        made.provision(keyring.owner.owner_id)
        made.tool("tpm2_shutdown", "-c")
        made.tpm.stop()
        yield made


@pytest.fixture
def host(enrolled: Host, tmp_path: Path) -> Iterator[Host]:
    """A host with a TPM of its own; nothing may be left in it."""
    shutil.copytree(enrolled.tpm.directory, tmp_path / "tpm")
    with SoftwareTpm(tmp_path / "tpm") as tpm:
        tpm.measure_boot()
        made = Host(tpm, tmp_path / "tpm.lock", enrolled.known)
        yield made
        assert made.handles() == []


@pytest.fixture
def sealing(host: Host, keyring: Keyring) -> Sealing:
    made = seal(host, keyring)
    assert made.open() == SECRET
    return made


@contextmanager
def told(host: Host, error: type[SczError], message: str, remedy: str) -> Iterator[None]:
    """The block ends in this error, whose remedy says that; no handle and no lock is left."""
    with lock_stays_free(host), host.refused(error, message):
        try:
            yield
        except SczError as seen:
            advice = seen.advice
            raise
        finally:
            assert remedy in advice


def quote(sealing: Sealing) -> Attest:
    """A start's first transaction, appraised; returns what the TPM signed."""
    host, extra_data = sealing.host, for_this_start()
    boot_policy = approve(sealing.keyring, sealing.form.pcrs)
    with host.transaction() as tpm:
        evidence = tpm.quote(host.device, GRUB, extra_data)
    appraise_evidence(evidence, ak=host.device.ak, expected_extra_data=extra_data, boot_policy=boot_policy)
    return parse_attest(evidence.attest, error=EvidenceRefused)


# --- slots ------------------------------------------------------------------------------------------------------------


def fill_objects(tpm: Tpm) -> None:
    for _ in range(SLOTS):
        tpm._esys.create_primary(None, "ecc")


def fill_sessions(tpm: Tpm) -> None:
    no_encryption = tss.TPMT_SYM_DEF(algorithm=tss.TPM2_ALG.NULL)
    for _ in range(SLOTS):
        tpm._esys.start_auth_session(
            tss.ESYS_TR.NONE, tss.ESYS_TR.NONE, tss.TPM2_SE.POLICY, no_encryption, tss.TPM2_ALG.SHA256
        )


FILLED: dict[str, tuple[Callable[[Tpm], None], str]] = {
    "objects": (fill_objects, "object slots are full.*0x902"),
    "sessions": (fill_sessions, "session slots are full.*0x903"),
}


@pytest.mark.parametrize("what", FILLED)
def test_slots_that_somebody_fills_during_a_release(sealing: Sealing, what: str) -> None:
    """A program that does not take our lock, at a TPM without a resource manager."""
    fill, message = FILLED[what]
    with told(sealing.host, TpmFailed, message, "/dev/tpmrm0"), sealing.host.transaction() as tpm:
        fill(tpm)
        sealing.open_in(tpm)
    assert sealing.open() == SECRET


def test_slots_that_others_left_full_are_flushed(sealing: Sealing, tmp_path: Path) -> None:
    """Objects, loaded sessions and saved ones, of a program that was killed: nobody is left to flush them."""
    host = sealing.host
    for number in range(SLOTS):
        host.tool("tpm2_createprimary", "-G", "ecc", "-c", f"{tmp_path}/object-{number}")
        host.tool("tpm2_startauthsession", "-S", f"{tmp_path}/session-{number}")
    pid = forked(lambda: leave_sessions(host))
    assert os.waitpid(pid, 0)[0] == pid
    kinds = [set(host.handles(each)) for each in ("handles-transient", "handles-loaded-session")]
    assert [len(each) for each in kinds] == [SLOTS, SLOTS]
    assert len(host.handles("handles-saved-session")) == SLOTS
    assert sealing.open() == SECRET
    assert host.handles() == []


def leave_sessions(host: Host) -> None:
    """Without our `Tpm`, which cleans up."""
    fill_sessions(Tpm(tss.ESAPI(host.tpm.tcti)))


def test_a_resource_manager_keeps_others_apart(sealing: Sealing) -> None:
    """Behind one nothing of others is flushed, ours goes with our connection, and their full slots are not ours."""
    host = sealing.host
    with resource_manager(host.tpm.tcti) as environment:
        ready, ready_fd = os.pipe()
        asked_fd, asks = os.pipe()
        answer, answer_fd = os.pipe()

        def other() -> None:
            """Holds as many objects and sessions as fit, then says whether they are there still."""
            enter(environment)
            tpm = Tpm(tss.ESAPI(TCTI))
            keys = [tpm._esys.create_primary(None, "ecc")[0] for _ in range(SLOTS)]
            fill_sessions(tpm)
            os.write(ready_fd, b"+")
            os.read(asked_fd, 1)
            for key in keys:
                tpm._esys.read_public(key)
            os.write(answer_fd, b"+")

        pid = forked(other)
        try:
            os.close(answer_fd)
            assert os.read(ready, 1) == b"+"

            def behind() -> bytes:
                enter(environment)
                return sealing.open(TCTI)

            for _ in range(SLOTS + 1):
                assert with_deadline(behind, 20) == SECRET
            os.write(asks, b"?")
            assert os.read(answer, 1) == b"+"
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            for fd in (ready, ready_fd, asked_fd, asks, answer):
                os.close(fd)
    assert sealing.open() == SECRET


@pytest.mark.parametrize("what", FILLED)
def test_slots_of_a_resource_manager(sealing: Sealing, what: str) -> None:
    """One connection has its limits there, too: told as such, and the next connection begins anew."""
    host = sealing.host
    with resource_manager(host.tpm.tcti) as environment:

        def overfull() -> bytes:
            enter(environment)
            with host.transaction(TCTI) as tpm, tpm_module.step("fill the slots"):
                for _ in range(40):
                    FILLED[what][0](tpm)
            return b"there was no limit"

        with pytest.raises(TpmFailed, match=FILLED[what][1].partition(".")[0]) as seen:
            with_deadline(overfull, 20)
        assert "tpm2_flushcontext" in seen.value.advice

        def good() -> bytes:
            enter(environment)
            return sealing.open(TCTI)

        assert with_deadline(good, 20) == SECRET
    assert sealing.open() == SECRET


def test_killed_behind_a_resource_manager(sealing: Sealing) -> None:
    """What a killed start had loaded is the manager's to flush: more of them than there are slots, then a good one."""
    with resource_manager(sealing.host.tpm.tcti) as environment:

        def held(fd: int) -> None:
            enter(environment)
            with sealing.host.transaction(TCTI) as tpm:
                fill_objects(tpm)
                os.write(fd, b"+")
                time.sleep(60)

        def good() -> bytes:
            enter(environment)
            return sealing.open(TCTI)

        for _ in range(2 * SLOTS):
            read_fd, write_fd = os.pipe()
            pid = forked(lambda fd=write_fd: held(fd))
            assert os.read(read_fd, 1) == b"+"
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(read_fd)
            os.close(write_fd)
            assert with_deadline(good, 20) == SECRET
    assert sealing.open() == SECRET


# --- counters ---------------------------------------------------------------------------------------------------------


def test_an_ordinary_index_in_the_counters_place(sealing: Sealing) -> None:
    """Deleted and written again with any value: it has another Name than a counter, so no policy takes it."""
    host, counter = sealing.host, sealing.host.counter(sealing.keyring)
    attributes = int(COUNTER_ATTRIBUTES & ~NvAttributes.COUNTER)
    index = hex(counter.index)

    def put(value: int) -> bytes:
        host.tool("tpm2_nvundefine", "-C", "o", index)
        host.tool("tpm2_nvdefine", "-C", "o", index, "-s", "8", "-a", hex(attributes))
        written = host.lock_file.with_name("value")
        written.write_bytes(value.to_bytes(8, "big"))
        host.tool("tpm2_nvwrite", "-C", "o", index, "-i", str(written))
        with host.transaction() as tpm:
            found = tpm._find(counter.index)
            assert found is not None
            return tpm._name(found)

    name = put(sealing.maximum)
    assert put(sealing.maximum - 1) == name  # the control: it rolls back, under one Name
    assert name != counter.name
    with host.refused(KeyRefused):
        sealing.open()
    with host.refused(DeviceNotEnrolled, "counter"), host.transaction() as tpm:
        tpm.nv_certify(host.device, counter, bytes(32))
    host.tool("tpm2_nvundefine", "-C", "o", index)
    host.provision(sealing.keyring.owner.owner_id)
    assert host.counter(sealing.keyring) == counter
    renewed = seal(host, sealing.keyring)
    assert renewed.maximum > sealing.maximum  # the counter resumed higher
    assert renewed.open() == SECRET


# --- resets -----------------------------------------------------------------------------------------------------------


def test_an_unclean_shutdown(sealing: Sealing) -> None:
    """Power fails, again and again: each is counted, the release goes on; the clock, which may go back, says so."""
    host = sealing.host
    host.boot()
    before = quote(sealing)
    assert before.safe
    for _ in range(4):
        os.kill(host.tpm.pid, signal.SIGKILL)
        host.tpm.stop()
        host.tpm.start()
        host.tpm.measure_boot()
        after = quote(sealing)
        assert not after.safe
        assert after.reset_count == before.reset_count + 1
        before = after
        assert sealing.open() == SECRET
    host.boot()
    assert sealing.open() == SECRET


def test_before_startup(sealing: Sealing) -> None:
    host = sealing.host
    power_cycle(host.tpm.socket_path)
    try:
        for act in (sealing.open, lambda: quote(sealing)):
            with lock_stays_free(host), pytest.raises(TpmUnavailable, match=r"not started up.*0x100") as seen:
                act()
            assert "tpm2_startup" in seen.value.advice
    finally:
        host.tool("tpm2_startup", "-c")
    with host.refused(BootStateRefused):  # nothing is measured
        sealing.open()
    host.tpm.measure_boot()
    assert sealing.open() == SECRET


def test_a_reset_between_quote_and_unseal(sealing: Sealing) -> None:
    """Into the approved state: the key comes. Into another: the quote of before does not help."""
    host = sealing.host
    first = quote(sealing)
    host.boot()
    assert sealing.open() == SECRET
    assert quote(sealing).reset_count == first.reset_count + 1
    host.boot({9: "another kernel"})
    with host.refused(BootStateRefused):
        sealing.open()


def test_suspend_and_resume_between_quote_and_unseal(sealing: Sealing) -> None:
    """TPM2_Shutdown(STATE), power off, TPM2_Startup(STATE): the PCRs are as they were."""
    host = sealing.host
    before = quote(sealing)
    host.tool("tpm2_shutdown")
    power_cycle(host.tpm.socket_path)
    host.tool("tpm2_startup")
    assert sealing.open() == SECRET
    after = quote(sealing)
    assert (after.reset_count, after.restart_count) == (before.reset_count, before.restart_count + 1)
    host.tool("tpm2_shutdown")
    power_cycle(host.tpm.socket_path)
    host.tool("tpm2_startup", "-c")  # a restart instead: nothing is measured
    with host.refused(BootStateRefused):
        sealing.open()
    host.tpm.measure_boot()
    assert sealing.open() == SECRET


@pytest.mark.parametrize("started", [True, False], ids=["started-up", "not-started-up"])
@pytest.mark.parametrize("step", ["_verify_signature", "_pinned_session", "_policy_pcr", "_policy_nv", "_unseal"])
def test_a_reset_in_the_middle_of_a_release(sealing: Sealing, step: str, started: bool) -> None:
    """Before one of its steps: objects and sessions are gone, which is no refusal of the grant."""
    host = sealing.host

    def reset_first(tpm: Tpm) -> bytes:
        go_on = getattr(tpm, step)

        def reset_then(*arguments: object) -> object:
            power_cycle(host.tpm.socket_path)
            if started:
                tpm._esys.startup(tss.TPM2_SU.CLEAR)
            return go_on(*arguments)

        setattr(tpm, step, reset_then)
        return sealing.open_in(tpm)

    with lock_stays_free(host), pytest.raises(SczError) as seen, host.transaction() as tpm:
        reset_first(tpm)
    wanted = (TpmFailed, BootStateRefused) if started else (TpmUnavailable,)
    assert isinstance(seen.value, wanted), seen.value
    assert seen.value.advice
    if not started:
        host.tool("tpm2_startup", "-c")
    assert host.handles() == []
    host.tpm.measure_boot()
    assert sealing.open() == SECRET


def test_failure_mode(sealing: Sealing) -> None:
    """Its memory cannot be written any more: it fails, and answers nothing else until it is off and on again."""
    host = sealing.host
    state, away = host.tpm.directory / "state", host.tpm.directory / "away"
    state.rename(away)
    try:
        with lock_stays_free(host), pytest.raises(TpmFailed), host.transaction() as tpm:
            tpm.increment_counter(host.counter(sealing.keyring).index)
        for act in (sealing.open, lambda: quote(sealing)):
            with lock_stays_free(host), pytest.raises(TpmFailed, match=r"failure mode.*0x101") as seen:
                act()
            assert "off and on" in seen.value.advice
    finally:
        away.rename(state)
    host.tpm.stop()
    host.tpm.start()
    host.tpm.measure_boot()
    assert seal(host, sealing.keyring).open() == SECRET


def test_killed_in_the_middle_of_each_command(sealing: Sealing) -> None:
    """swtpm, while it works on a command: told as a TPM that cannot be reached; it is itself again afterwards."""
    host = sealing.host
    with Tap(host.tpm.socket_path) as tap:
        assert sealing.open(tap.tcti) == SECRET
    commands = [name_of(each.code) for each in tap.exchanges]
    for number, name in enumerate(commands):
        if name in commands[:number]:
            continue
        seen: list[Exchange] = []

        def kill(exchange: Exchange, seen: list[Exchange] = seen, number: int = number) -> None:
            seen.append(exchange)
            if len(seen) - 1 == number:
                os.kill(host.tpm.pid, signal.SIGKILL)

        with Tap(host.tpm.socket_path, sent=kill) as tap, lock_stays_free(host):
            try:
                assert sealing.open(tap.tcti) == SECRET
                assert name in ("Unseal", "FlushContext")  # the secret was there already
            except TpmUnavailable as error:
                advice = error.advice
                assert "tpm.tcti" in advice, name
        host.tpm.stop()
        host.tpm.start()
        host.tpm.measure_boot()
        assert sealing.open() == SECRET, name
        assert host.handles() == []


def test_a_cleared_tpm_says_what_to_do(sealing: Sealing) -> None:
    host = sealing.host
    host.tool("tpm2_clear", "-c", "l")
    with told(host, DeviceNotEnrolled, "enrolled", "sczctl enroll"):
        quote(sealing)
    with told(host, DeviceNotEnrolled, "enrolled", "sczctl enroll"):
        sealing.open()
    host.provision(sealing.keyring.owner.owner_id)
    with told(host, KeyRefused, "import", "sczctl grant"):
        sealing.open()
    assert seal(host, sealing.keyring).open() == SECRET


# --- many at once -----------------------------------------------------------------------------------------------------


def requests_of(sealing: Sealing) -> tuple[bytes, bytes]:
    """What a hook asks of the child that stands by."""
    device = sealing.host.device
    return quote_request(device, [sealing.form], bytes(32)), unseal_request(device, sealing.asked)


def whole_start(sealing: Sealing, seconds: float) -> bytes:
    """Quote and release, as the hook's own processes do them, in one process of 16."""
    quote_asked, unseal_asked = requests_of(sealing)

    def act(request: bytes) -> bytes:
        return perform(
            request,
            tcti=sealing.host.tpm.tcti,
            lock_file=str(sealing.host.lock_file),
            timeout_seconds=seconds,
        )

    with Standby(get_ready, act) as standby:
        assert read_quote(standby.ask(quote_asked, seconds)).pcrs == sealing.form.pcrs
        return standby.ask(unseal_asked, seconds)


def test_sixteen_starts_at_once(sealing: Sealing) -> None:
    with ExitStack() as running:
        children = [running.enter_context(Deadline(lambda: whole_start(sealing, 60), 90)) for _ in range(AT_ONCE)]
        assert [child.result() for child in children] == [SECRET] * AT_ONCE
    assert sealing.host.handles() == []


def test_sixteen_starts_that_cannot_wait(sealing: Sealing) -> None:
    """With a TPM that stands still for longer than they may wait: each is told, and the next start works."""
    host = sealing.host
    host.tpm.pause()
    try:
        with ExitStack() as running:
            children = [running.enter_context(Deadline(lambda: whole_start(sealing, 0.5), 60)) for _ in range(AT_ONCE)]
            for child in children:
                with pytest.raises(TpmTimeout) as seen:
                    child.result()
                assert "tpm.timeout_seconds" in seen.value.advice
    finally:
        host.tpm.resume()
    with lock_stays_free(host):
        assert whole_start(sealing, 60) == SECRET
    assert host.handles() == []


# --- through podman and the hook --------------------------------------------------------------------------------------


def why_after(scene: Scene, token: Path) -> Mapping[str, object]:
    attempt = start(scene, token)
    assert attempt.returncode != 0
    assert not attempt.ran
    return attempt.why


def test_a_container_is_told_of_each_fault(scene: Scene) -> None:
    """The exit code, and `sczctl why`, of faults that a whole start meets; after each the next start works."""
    token = scene.token("faults", ttl_seconds=3600)
    assert start(scene, token).returncode == 0
    before = left_overs(scene)
    power_cycle(scene.tpm.socket_path)
    said = why_after(scene, token)
    assert (said["code"], said["reason"]) == (60, "TpmUnavailable")
    assert "tpm2_startup" in str(said["remedy"])
    environment = {"PATH": "/usr/bin:/bin", "TPM2TOOLS_TCTI": scene.tpm.tcti}
    subprocess.run(["tpm2_startup", "-c"], env=environment, check=True)
    said = why_after(scene, token)
    assert (said["code"], said["reason"]) == (35, "BootStateRefused")
    scene.tpm.measure_boot()
    assert start(scene, token).returncode == 0
    with Tap(scene.tpm.socket_path, lambda code, response: [response[:7], None]) as tap:
        good = scene.config.read_text()
        scene.config.write_text(good.replace(scene.tpm.tcti, tap.tcti))
        try:
            said = why_after(scene, token)
        finally:
            scene.config.write_text(good)
    assert (said["code"], said["reason"]) == (60, "TpmUnavailable")
    assert start(scene, token).returncode == 0
    after = left_overs(scene)
    assert {key: after[key] for key in ("mounts", "hooks", "tpm", "host mounts")} == {
        key: before[key] for key in ("mounts", "hooks", "tpm", "host mounts")
    }


def test_the_grant_of_another_value_is_not_mistaken_for_a_fault(sealing: Sealing) -> None:
    """The control of all of the above: what is refused is refused, with a family of its own."""
    with pytest.raises(KeyRefused) as seen:
        replace(sealing, maximum=sealing.maximum + 1).open()
    assert seen.value.family == "refused"
