"""The TPM: whether it answers in time and is the one that was enrolled, what it is, and who else may open it."""

from __future__ import annotations

import contextlib
import dataclasses
import grp
import json
import os
import pwd
import stat
import tempfile
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from oci_hook.attestation.host_device import HostDevice
from oci_hook.cli.checks.check import Check, failed
from oci_hook.config import Config
from oci_hook.errors import SczError, TpmFailed, TpmLockout

if TYPE_CHECKING:
    from oci_hook.attestation.tpm_properties import TpmProperties

_TPM_SECONDS = 30
_PCRS = range(16)
_DEVICES = ("tpm0", "tpmrm0")
_EXPECTED_USERS, _EXPECTED_GROUPS = ("root", "tss"), ("root", "tss")


@dataclasses.dataclass(frozen=True, slots=True)
class Counted:
    """What the enrolled TPM counts: resets, milliseconds with power, and the owners' counters by their NV index.

    A counter that was deleted is None.
    """

    resets: int
    clock_ms: int
    counters: dict[int, int | None]


@dataclasses.dataclass(frozen=True, slots=True)
class TpmAnswer:
    """What a TPM that answered said: its PCRs 0 to 15, its properties and, if it is the enrolled one, its counts."""

    pcrs: dict[int, bytes]
    properties: TpmProperties
    counted: Counted | None = None


def ask_tpm(config: Config, device: HostDevice | None) -> tuple[TpmAnswer | None, list[Check]]:
    """Whether the TPM answers in time, and is the one that was enrolled; what it said, if it answers."""
    try:
        from oci_hook.attestation.deadline import with_deadline
        from oci_hook.attestation.tpm_properties import TpmProperties

        seconds = min(config.tpm_timeout_seconds, _TPM_SECONDS)
        with tempfile.TemporaryDirectory(prefix="scz-doctor.") as made:
            lock = os.path.join(config.runtime_directory, "tpm.lock")
            lock = lock if os.path.exists(lock) else os.path.join(made, "lock")  # nobody uses the TPM yet: make none
            data = with_deadline(_asking(config, device, lock, seconds), seconds)
    except SczError as error:
        return None, [failed("TPM", error)]
    except ImportError as error:
        remedy = "install the package scz-smm again (`apt install --reinstall scz-smm`), and libtss2"
        return None, [Check("TPM", "fail", f"tpm2-pytss cannot be loaded: {error}", remedy)]
    except OSError as error:
        return None, [Check("TPM", "fail", f"{error.filename}: {error.strerror}", "mend the temporary directory")]
    pcrs = {number: data[32 * number : 32 * number + 32] for number in _PCRS}
    said = json.loads(data[32 * len(_PCRS) :])
    properties = TpmProperties(**said["properties"])
    proven = ", and is the one that was enrolled" if device else ""
    checks = [Check("TPM", "ok", f"{config.tpm_tcti} answers{proven}"), *check_properties(properties)]
    if config.tpm_tcti.startswith("device:/dev/tpm0"):
        message = "tpm.tcti is /dev/tpm0, without the kernel's resource manager: others are kept from the TPM meanwhile"
        checks.append(Check("TPM manager", "warn", message, 'set tcti = "device:/dev/tpmrm0" in config.toml'))
    return TpmAnswer(pcrs, properties, _counted(said["counted"])), checks


def _asking(config: Config, device: HostDevice | None, lock: str, seconds: float) -> Callable[[], bytes]:
    def ask() -> bytes:
        from oci_hook.attestation.attest import parse_attest
        from oci_hook.attestation.tpm import open_tpm

        counted = None
        with open_tpm(config.tpm_tcti, lock, timeout_seconds=seconds) as tpm:
            if device is not None:
                attest = parse_attest(tpm.quote(device, [0], os.urandom(32)).attest, error=TpmFailed)
                counters = {each.index: tpm.counter_if_any(each.index) for each in device.counters.values()}
                counted = Counted(attest.reset_count, attest.clock, counters)
            values = tpm.read_pcrs(_PCRS)
            properties = tpm.properties()
        said = {"properties": properties, "counted": counted}
        told = {name: each and dataclasses.asdict(each) for name, each in said.items()}
        return b"".join(values[number] for number in _PCRS) + json.dumps(told).encode()

    return ask


def _counted(said: dict[str, Any] | None) -> Counted | None:
    if said is None:
        return None
    counters = {int(index): value for index, value in said["counters"].items()}
    return Counted(said["resets"], said["clock_ms"], counters)


def check_properties(properties: TpmProperties) -> Iterator[Check]:
    """Who made it, and whether it is locked."""
    named = " ".join(each for each in (properties.manufacturer or "unnamed", properties.model) if each)
    text = f"{named}, firmware {properties.firmware}"
    if properties.is_software:
        message = f"software TPM ({text}): it protects nothing against whoever reads its files"
        remedy = "use a hardware TPM; in a virtual machine, one whose files the hypervisor's host alone can read"
        yield Check("TPM kind", "warn", message, remedy)
    else:
        yield Check("TPM kind", "ok", text)
    failures = f"{properties.lockout_counter} of {properties.max_auth_fail} failures"
    if properties.in_lockout:
        message = f"in dictionary-attack lockout ({failures}); one is forgotten in {_interval(properties)}"
        yield Check("TPM lockout", "warn", message, TpmLockout.remedy)
    elif properties.lockout_counter:
        message = f"{failures} counted towards the lockout: somebody guesses, or the machine lost power with it in use"
        yield Check("TPM lockout", "warn", message, "tpm2_dictionarylockout --clear-lockout")
    else:
        yield Check("TPM lockout", "ok", f"none: {failures}")


def _interval(properties: TpmProperties) -> str:
    return f"{properties.lockout_interval_seconds} s"


def check_openers(directory: str = "/dev") -> Iterator[Check]:
    """Who else than root and tss may open the TPM; whoever does can ask it for a quote, and keep it busy."""
    for name in _DEVICES:
        path = os.path.join(directory, name)
        try:
            found = os.stat(path)
        except OSError:
            continue
        problem, remedy = _openers(path, found)
        if problem:
            yield Check(f"TPM access {name}", "warn", f"{path}: {problem}", remedy)
        else:
            yield Check(f"TPM access {name}", "ok", f"{path}: root and tss alone (mode {_mode(found)})")


def _mode(found: os.stat_result) -> str:
    return f"{stat.S_IMODE(found.st_mode):04o}"


def _openers(path: str, found: os.stat_result) -> tuple[str, str]:
    user, group = _user(found.st_uid), _group(found.st_gid)
    if found.st_mode & 0o006:
        return f"everybody may open it (mode {_mode(found)})", f"chmod o-rw {path}"
    if user not in _EXPECTED_USERS:
        return f"the user {user} may open it", f"chown root {path}"
    if not found.st_mode & 0o060:
        return "", ""
    if group not in _EXPECTED_GROUPS:
        return f"the group {group} may open it", f"chgrp tss {path}, and look for the udev rule that changed it"
    members = [name for name in _members(found.st_gid) if name not in _EXPECTED_USERS]
    if members:
        listed = ", ".join(members)
        return f"{listed}, in the group {group}, may open it", f"gpasswd -d {members[0]} {group}"
    return "", ""


def _user(number: int) -> str:
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(number).pw_name
    return str(number)


def _group(number: int) -> str:
    with contextlib.suppress(KeyError):
        return grp.getgrgid(number).gr_name
    return str(number)


def _members(number: int) -> list[str]:
    with contextlib.suppress(KeyError):
        primary = [each.pw_name for each in pwd.getpwall() if each.pw_gid == number]
        return sorted({*grp.getgrgid(number).gr_mem, *primary})
    return []
