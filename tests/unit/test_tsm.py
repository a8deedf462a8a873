"""linux.tsm and attestation.tee_collection, against the stand-in of tests/tsm.py: nothing stays."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from oci_hook.attestation.deadline import Standby
from oci_hook.attestation.evidence import Evidence, tee_report_data
from oci_hook.attestation.tee import TeeExpectation, appraise_tee
from oci_hook.attestation.tee_collection import collect_report, load_certificates, read_tee_report
from oci_hook.attestation.transactions import perform, tee_request
from oci_hook.config import Config
from oci_hook.errors import BundleInvalid
from oci_hook.key_errors import TeeUnavailable
from oci_hook.linux.tsm import BLOB_LIMIT_BYTES, read_report, report_directory, sweep_reports
from oci_hook.release import HostTpm, Patience
from oci_hook.tee_policy import parse_tee_policy
from tests.devices import make_device
from tests.sev_snp import NOW, Maker, policy_document, table
from tests.tsm import behaviour_of, stand_in

MILAN = Maker()
DATA = bytes(range(64))
SECONDS = 30.0


@contextmanager
def hardware(tmp_path: Path, **changes: Any) -> Iterator[tuple[str, Callable[[], list[str]]]]:
    base = tmp_path / "report"
    base.mkdir(exist_ok=True)
    with stand_in(base, {**behaviour_of(MILAN), **changes}) as names:
        yield str(base), names


def refused(tmp_path: Path, match: str, **changes: Any) -> None:
    with hardware(tmp_path, **changes) as (base, names):
        with pytest.raises(TeeUnavailable, match=match):
            collect_report(base, DATA, SECONDS)
        assert names() == []


def test_a_report_that_the_appraisal_accepts(tmp_path: Path) -> None:
    with hardware(tmp_path, auxblob=table(MILAN.chain()).hex()) as (base, names):
        found = read_tee_report(collect_report(base, DATA, SECONDS))
        again = read_tee_report(perform(tee_request(base, DATA, SECONDS), tcti="", lock_file="", timeout_seconds=1))
        assert names() == []
    assert found.provider == "sev_guest"
    policy = parse_tee_policy(policy_document(MILAN), error=BundleInvalid)
    for report in (found, again):
        assert appraise_tee(report, expected_data=DATA, expectation=TeeExpectation(policy, {}, NOW)).product == "milan"


def test_what_is_there_meanwhile_is_one_directory(tmp_path: Path) -> None:
    with hardware(tmp_path) as (base, names):
        with report_directory(base) as path:
            assert names() == [os.path.basename(path)]
            assert read_report(path, DATA).report[0x50:0x90] == DATA
            # The same directory once more: the generation goes on, and so does the report.
            assert read_report(path, DATA[::-1]).report[0x50:0x90] == DATA[::-1]
        assert names() == []
        with pytest.raises(KeyError), report_directory(base):
            raise KeyError
        assert names() == []


@pytest.mark.parametrize("floor", [None, 0, 1, 2, 3])
def test_levels_of_privilege(tmp_path: Path, floor: int | None) -> None:
    with hardware(tmp_path, floor=floor) as (base, names):
        assert read_tee_report(collect_report(base, DATA, SECONDS)).report[0x50:0x90] == DATA
        assert names() == []


@pytest.mark.parametrize("auxiliary", [None, "", "ab" * 100])
def test_certificates_that_may_be_absent(tmp_path: Path, auxiliary: str | None) -> None:
    with hardware(tmp_path, auxblob=auxiliary) as (base, _names):
        assert read_tee_report(collect_report(base, DATA, SECONDS)).certificates == bytes.fromhex(auxiliary or "")


def test_a_largest_report(tmp_path: Path) -> None:
    with hardware(tmp_path, outblob="ab" * BLOB_LIMIT_BYTES) as (base, _names):
        assert len(read_tee_report(collect_report(base, DATA, SECONDS)).report) == BLOB_LIMIT_BYTES


def test_other_providers_names_are_passed_on(tmp_path: Path) -> None:
    with hardware(tmp_path, provider="tdx_guest") as (base, _names):
        assert read_tee_report(collect_report(base, DATA, SECONDS)).provider == "tdx_guest"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"mkdir": errno.ENXIO}, "no report can be asked for: No such device or address"),
        ({"mkdir": errno.EACCES}, "Permission denied"),
        ({"outblob": ""}, "the report is empty"),
        ({"outblob": "ab" * (BLOB_LIMIT_BYTES + 1)}, "outblob is larger than"),
        ({"auxblob": "ab" * (BLOB_LIMIT_BYTES + 1)}, "auxblob is larger than"),
        ({"provider": ""}, "provider is ''"),
        ({"provider": "x" * 33}, "provider is 'xxx"),
        ({"provider": "../\x1b[31m"}, "provider is"),
        ({"provider": "x" * 5000}, "provider is larger than"),
        ({"floor": -1}, "privlevel_floor is '-1'"),
        ({"floor": 4}, "configfs-tsm: .*Invalid argument"),
        ({"deaf": True}, "Invalid argument"),
        ({"interfere": "outblob"}, "3 writes to the report's directory, 2 are ours"),
        ({"interfere": "auxblob", "floor": None}, "2 writes to the report's directory, 1 are ours"),
        *[({"error": [name, errno.EIO]}, "error") for name in ("provider", "generation", "outblob", "auxblob")],
        ({"error": ["outblob", errno.EFBIG]}, "File too large"),
        ({"error": ["outblob", errno.ENXIO]}, "No such device"),
    ],
)
def test_what_the_other_end_does_wrong(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    refused(tmp_path, match, **changes)


@pytest.mark.parametrize("attribute", ["provider", "outblob", "auxblob"])
def test_hardware_that_never_answers(tmp_path: Path, attribute: str) -> None:
    with hardware(tmp_path, hang=attribute) as (base, names):
        with pytest.raises(TeeUnavailable, match="no report within"):
            collect_report(base, DATA, 0.5)
        # Who hangs in the kernel is left to it, and what it holds: rmdir(2) would hang there, too.
        (left,) = names()
        with pytest.raises(TeeUnavailable, match="no report within"):
            collect_report(base, DATA, 0.5)
        pids = [int(name.split("-")[3]) for name in names()]
        assert left in names()
        assert len(pids) == 2
    for pid in pids:  # the stand-in has gone, and so have they
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


# --- a report that no owner asks for ----------------------------------------------------------------------------------

EVIDENCE = Evidence(b"attest", b"signature", {})
NEVER = 3600.0


def children() -> set[int]:
    pid = os.getpid()
    return {int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def unasked(base: str, standby: Standby | None = None, patience: Patience | None = None) -> Evidence:
    """What the hook does for a model that asks for no TEE, on a host whose TPM may take an hour."""
    config, device = Config(tsm_directory=base, tpm_timeout_seconds=NEVER), make_device("A" * 43).host
    return HostTpm(config, device, standby, patience or Patience()).add_tee_report(EVIDENCE, bytes(32), required=False)


def test_a_report_that_nobody_asks_for_joins_if_it_can_be_had(tmp_path: Path) -> None:
    with hardware(tmp_path) as (base, names):
        found = unasked(base)
        assert found.tee is not None
        assert found.tee.report[0x50:0x90] == tee_report_data(bytes(32), EVIDENCE.quote_digest)
        assert names() == []
    assert unasked(str(tmp_path / "absent")) == EVIDENCE
    with hardware(tmp_path, error=["outblob", errno.EIO]) as (base, names):
        assert unasked(base) == EVIDENCE
        assert names() == []


def test_hardware_that_hangs_keeps_no_start_nor_its_locks(tmp_path: Path) -> None:
    """Without the short deadline this test takes an hour."""
    lock = tmp_path / "lock"
    with hardware(tmp_path, hang="outblob") as (base, names):
        before = children()
        with Standby(lambda: None, lambda request: b"done " + request) as standby:
            with lock.open("w") as held:
                fcntl.flock(held, fcntl.LOCK_EX)
                patience = Patience()
                assert unasked(base, standby, patience) == EVIDENCE
            assert len(names()) == 1  # it hangs there still
            assert unasked(base, standby, patience) == EVIDENCE  # another model of the same start asks no more
            assert len(names()) == 1
            with lock.open("w") as other:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            assert standby.ask(b"1", 30) == b"done 1"  # of what the start cannot do without nothing is lost
            (pid,) = children() - before
            standby.end()
            # Nobody else holds the ends of its pipes: it sees that there is no more to do, and ends by itself.
            pidfd = os.pidfd_open(pid)
            assert select.select([pidfd], [], [], 60)[0]
            os.close(pidfd)


KILLED = """
import sys, time
from oci_hook.linux.tsm import report_directory
with report_directory(sys.argv[1]) as path:
    print(path, flush=True)
    time.sleep(3600)
"""


def test_what_a_killed_process_left_goes_with_the_next_one(tmp_path: Path) -> None:
    with hardware(tmp_path) as (base, names):
        with subprocess.Popen([sys.executable, "-c", KILLED, base], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            path = process.stdout.readline().strip()
            sweep_reports(base)
            assert names() == [os.path.basename(path)]  # it lives
            process.send_signal(signal.SIGKILL)
        assert names() == [os.path.basename(path)]
        (Path(base) / "another-s").mkdir()
        (Path(base) / f"scz-smm-1-{process.pid}-{'0' * 16}").mkdir()  # of another namespace of processes
        collect_report(base, DATA, SECONDS)
        assert names() == ["another-s", f"scz-smm-1-{process.pid}-{'0' * 16}"]


def test_many_at_once_get_each_their_own(tmp_path: Path) -> None:
    script = (
        "import sys; from oci_hook.attestation.tee_collection import collect_report, read_tee_report; "
        "data = bytes.fromhex(sys.argv[2]); "
        "sys.exit(read_tee_report(collect_report(sys.argv[1], data, 60)).report[0x50:0x90] != data)"
    )

    def run(number: int) -> int:
        words = [sys.executable, "-c", script, base, (bytes([number]) * 64).hex()]
        return subprocess.run(words, check=False, timeout=120).returncode

    with hardware(tmp_path) as (base, names):
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(run, range(12))) == [0] * 12
        assert names() == []


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(TeeUnavailable, match="no report can be asked for"):
        collect_report(str(tmp_path / "absent"), DATA, SECONDS)


def test_an_ordinary_directory_is_none(tmp_path: Path) -> None:
    with pytest.raises(TeeUnavailable, match="provider"):
        collect_report(str(tmp_path), DATA, SECONDS)
    assert list(tmp_path.iterdir()) == []


def test_certificates_that_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "tee"
    assert load_certificates(str(folder)) == {}
    folder.mkdir()
    assert load_certificates(str(folder)) == {}
    for role in ("ark", "ask"):
        (folder / f"{role}.der").write_bytes(role.encode())
    (folder / "other.der").write_bytes(b"x")
    assert load_certificates(str(folder)) == {"ark": b"ark", "ask": b"ask"}
    (folder / "vcek.der").write_bytes(b"x" * ((16 << 10) + 1))
    with pytest.raises(TeeUnavailable):
        load_certificates(str(folder))
    (folder / "vcek.der").write_bytes(b"x")
    (folder / "vcek.der").chmod(0o666)
    assert stat.S_IMODE((folder / "vcek.der").stat().st_mode) == 0o666
    with pytest.raises(TeeUnavailable):
        load_certificates(str(folder))
