"""The TEE's part of the evidence as the hook gets it: a report, with a deadline, and the certificates kept here.

A read in configfs waits for the hardware, and its driver for the hypervisor, which may never answer: so a process of
its own reads, which has nothing else. What it all proves is for `tee` to say.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Final

from oci_hook.attestation.deadline import with_deadline
from oci_hook.attestation.evidence import TeeReport
from oci_hook.attestation.sev_snp_chain import CERTIFICATE_LIMIT_BYTES, Role
from oci_hook.documents import canonical
from oci_hook.errors import InternalError, SystemCallFailed, TpmTimeout
from oci_hook.key_errors import TeeUnavailable
from oci_hook.linux.tsm import TsmReport, read_report, report_directory, sweep_reports
from oci_hook.trusted_file import load_root_file

_ROLES: Final[tuple[Role, ...]] = ("ark", "ask", "vcek", "vlek")


def collect_report(base: str, data: bytes, seconds: float) -> bytes:
    """Have a report made; for a process with one thread.

    Args:
        base: `/sys/kernel/config/tsm/report`.
        data: `evidence.tee_report_data`, 64 bytes.
        seconds: After so long it is given up.

    Returns:
        For `read_tee_report`.

    Raises:
        TeeUnavailable: There is none, or not in time.
    """

    def read() -> bytes:
        with report_directory(base) as directory:
            return _document(read_report(directory, data))

    try:
        return with_deadline(read, seconds)
    except TpmTimeout as cause:
        raise TeeUnavailable(f"the hardware gave no report within {seconds:g} s") from cause
    finally:
        sweep_reports(base)  # of a process that was killed, this or an earlier one


def report_if_soon(base: str, data: bytes, seconds: float, let_go: Callable[[], object]) -> TeeReport | None:
    """A report that nobody insists on; None: there is none, or not soon. For a process with one thread.

    A child of its own waits for it, and keeps nothing of its parent's open: one that hangs in the kernel would hold
    locks for good.

    Args:
        base: As for `collect_report`.
        data: As for `collect_report`.
        seconds: After so long it is given up; the reader itself after half of that, so that it leaves no directory.
        let_go: Called in the child: gives up its copies of pipes, which are not closed otherwise.
    """

    def collect() -> bytes:
        let_go()
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):  # of the listing itself
                if int(name) > 2 and not stat.S_ISFIFO(os.fstat(int(name)).st_mode):
                    os.close(int(name))
        return collect_report(base, data, seconds / 2)

    with suppress(TeeUnavailable, TpmTimeout, InternalError, SystemCallFailed):
        return read_tee_report(with_deadline(collect, seconds))
    return None


def _document(report: TsmReport) -> bytes:
    parts = {"report": report.report.hex(), "auxiliary": report.auxiliary.hex()}
    return canonical({"provider": report.provider, **parts})


def read_tee_report(data: bytes) -> TeeReport:
    """The answer of `collect_report`."""
    parts = json.loads(data)
    return TeeReport(parts["provider"], bytes.fromhex(parts["report"]), bytes.fromhex(parts["auxiliary"]))


def load_certificates(directory: str) -> Mapping[Role, bytes]:
    """The certificates that root keeps for a hypervisor that hands over none: `ark.der`, `ask.der`, `vcek.der`, …

    They are believed no more than a hypervisor's: the owner's pin of the root's key decides.

    Args:
        directory: Of the host's store; it may be absent.

    Raises:
        TeeUnavailable: A file is not root's alone, too large or cannot be read.
    """
    paths = {role: os.path.join(directory, f"{role}.der") for role in _ROLES}
    return {
        role: load_root_file(path, limit_bytes=CERTIFICATE_LIMIT_BYTES, error=TeeUnavailable)
        for role, path in paths.items()
        if os.path.lexists(path)
    }
