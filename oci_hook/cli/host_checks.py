"""What `sczctl doctor` looks at on the host itself: kernel, memory, TPM, enrolment, trust, models, audit log.

Each check yields lines; none raises an error of ours, none changes anything.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from oci_hook.attestation.boot_policy import BootPolicy, parse_boot_policy, verify_boot_policy
from oci_hook.attestation.host_device import HostDevice
from oci_hook.audit import AuditLog
from oci_hook.bundle.grant import parse_grant, verify_grant
from oci_hook.config import DEFAULT_CONFIG_FILE, Config, load_config
from oci_hook.delivery.memory import load_available_memory
from oci_hook.errors import ClockRefused, DeviceNotEnrolled, SczError
from oci_hook.linux.mounts import MemoryFilesystem, probe_memory_filesystem
from oci_hook.provenance import verified_manifest, verify_device
from oci_hook.store import Store
from oci_hook.trust import Owner
from oci_hook.trust_folder import Trust

_LEAST_KERNEL = (5, 12)  # mount_setattr(2)
_TPM_SECONDS = 30
_PCRS = range(16)
_MIB = 1 << 20

Status = Literal["ok", "warning", "missing"]


@dataclass(frozen=True, slots=True)
class Check:
    """One line: what was looked at, what was seen, and the command or file that mends it (empty if it is ok)."""

    name: str
    status: Status
    message: str
    remedy: str = ""


def failed(name: str, error: SczError) -> Check:
    """The line for what could not be used."""
    return Check(name, "missing", error.message, error.advice)


def check_configuration(config_file: str) -> tuple[Config, list[Check]]:
    """The configuration; the defaults serve the other checks if it cannot be used."""
    try:
        config = load_config(config_file)
    except SczError as error:
        return Config(), [failed("configuration", error)]
    absent = config_file == DEFAULT_CONFIG_FILE and not os.path.lexists(config_file)
    return config, [Check("configuration", "ok", f"{config_file}{' is absent: defaults' if absent else ''}")]


def check_kernel() -> Iterator[Check]:
    """The kernel's release, and what it offers to hold plaintext."""
    release = os.uname().release
    found = re.match(r"([0-9]+)\.([0-9]+)", release)
    if found is None or (int(found[1]), int(found[2])) < _LEAST_KERNEL:
        yield Check("kernel", "missing", f"Linux {release}", "boot Linux 5.12 or later")
    else:
        yield Check("kernel", "ok", f"Linux {release}")
    try:
        kind = probe_memory_filesystem()
    except SczError as error:
        yield failed("plaintext", error)
        return
    is_tmpfs = kind is MemoryFilesystem.TMPFS
    yield Check(
        "plaintext", "ok", "tmpfs without swap" if is_tmpfs else "ramfs: this tmpfs knows no noswap (Linux 6.4)"
    )


def check_memory(config: Config) -> Iterator[Check]:
    """What is free above the node's reserve, and the version of control groups."""
    try:
        free = load_available_memory() - config.memory_reserve_bytes
    except SczError as error:
        yield failed("memory", error)
    else:
        reserve = f"{config.memory_reserve_bytes // _MIB} MiB"
        if free > 0:
            yield Check("memory", "ok", f"{free // _MIB} MiB for models, above a reserve of {reserve}")
        else:
            yield Check("memory", "warning", f"less than the reserve of {reserve} is free", "free memory on this host")
    if os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        yield Check("control groups", "ok", "version 2")
    elif os.path.isdir("/sys/fs/cgroup/memory"):
        yield Check("control groups", "ok", "version 1 for memory")
    else:
        remedy = "mount the cgroup file system: models are then charged to their containers"
        yield Check("control groups", "warning", "none for memory is mounted", remedy)


def load_enrolment(config: Config) -> tuple[HostDevice | None, list[Check]]:
    """This host's enrolment, if it can be read."""
    try:
        device = Store(config.store_directory).load_device()
    except DeviceNotEnrolled as error:
        return None, [Check("enrolment", "missing", "this host is not enrolled", error.advice)]
    except SczError as error:
        return None, [failed("enrolment", error)]
    return device, [Check("enrolment", "ok", f"with {_count(len(device.counters), 'owner')}")]


def check_tpm(config: Config, device: HostDevice | None) -> tuple[dict[int, bytes], list[Check]]:
    """Whether the TPM answers in time, and is the one that was enrolled; its PCRs 0 to 15 if it answers."""
    try:
        from oci_hook.attestation.deadline import with_deadline

        seconds = min(config.tpm_timeout_seconds, _TPM_SECONDS)
        with tempfile.TemporaryDirectory(prefix="scz-doctor.") as made:
            lock = os.path.join(config.runtime_directory, "tpm.lock")
            lock = lock if os.path.exists(lock) else os.path.join(made, "lock")  # nobody uses the TPM yet: make none
            data = with_deadline(_tpm_answer(config, device, lock, seconds), seconds)
    except SczError as error:
        return {}, [failed("TPM", error)]
    except ImportError as error:
        return {}, [Check("TPM", "missing", f"tpm2-pytss cannot be loaded: {error}", "install this project again")]
    except OSError as error:
        return {}, [Check("TPM", "missing", f"{error.filename}: {error.strerror}", "mend the temporary directory")]
    pcrs = {number: data[32 * number : 32 * number + 32] for number in _PCRS}
    proven = ", and is the one that was enrolled" if device else ""
    return pcrs, [Check("TPM", "ok", f"{config.tpm_tcti} answers{proven}")]


def _tpm_answer(config: Config, device: HostDevice | None, lock: str, seconds: float) -> Callable[[], bytes]:
    def ask() -> bytes:
        from oci_hook.attestation.tpm import open_tpm

        with open_tpm(config.tpm_tcti, lock, timeout_seconds=seconds) as tpm:
            if device is not None:
                tpm.quote(device, [0], os.urandom(32))
            values = tpm.read_pcrs(_PCRS)
        return b"".join(values[number] for number in _PCRS)

    return ask


def check_trust(config: Config) -> tuple[tuple[Owner, ...], list[Check]]:
    """The trusted owners and issuers."""
    trust, checks = Trust(config.trust_directory), []
    owners: tuple[Owner, ...] = ()
    try:
        owners = trust.owners()
    except SczError as error:
        checks.append(failed("owners", error))
    else:
        checks.append(_counted("owners", len(owners), "owner", "`sczctl trust add owner FILE`"))
    try:
        issuers = trust.issuers()
    except SczError as error:
        checks.append(failed("issuers", error))
    else:
        remedy = "`sczctl trust add issuer FILE`, or `sczctl token init` on a host without Kubernetes"
        checks.append(_counted("issuers", len(issuers), "token issuer", remedy))
    return owners, checks


def _counted(name: str, count: int, what: str, remedy: str) -> Check:
    if not count:
        return Check(name, "missing", f"no {what} is trusted", remedy)
    return Check(name, "ok", f"{_count(count, what)} trusted")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def check_models(
    config: Config, owners: Sequence[Owner], device: HostDevice | None, pcrs: dict[int, bytes]
) -> Iterator[Check]:
    """Each model: whether this device could open it now, so far as can be told without its key."""
    store = Store(config.store_directory)
    try:
        names = store.names()
    except SczError as error:
        yield failed("models", error)
        return
    if not names:
        yield Check("models", "missing", "no model is in the store", "`sczctl add FOLDER`, as its owner sent it")
    for name, version in names:
        what = f"model {name}:{version}"
        try:
            policy = _verified_boot_policy(store, name, version, owners, device)
        except SczError as error:
            yield failed(what, error)
            continue
        if pcrs and not any(all(pcrs.get(n) == v for n, v in form.pcrs.items()) for form in policy.forms if form.pcrs):
            remedy = "boot an approved state, or send `sczctl boot-policy measure` to the owner"
            yield Check(what, "missing", "the machine's boot state is none that its owner approved", remedy)
        else:
            yield Check(what, "ok", "granted, with a boot policy" + (" that this boot state meets" if pcrs else ""))


def _verified_boot_policy(
    store: Store, name: str, version: str, owners: Sequence[Owner], device: HostDevice | None
) -> BootPolicy:
    with store.open_model(store.load_model(name, version)) as layout:
        manifest, owner = verified_manifest(layout, owners)
    grant = verify_grant(parse_grant(store.load_grant(manifest.digest)), owner=owner, manifest=manifest)
    if device is not None:
        verify_device(grant, device)
    data = store.load_boot_policy(owner.owner_id, manifest.model.name, grant.device_class)
    return verify_boot_policy(
        parse_boot_policy(data), owner=owner, model_name=manifest.model.name, device_class=grant.device_class
    )


def check_audit(config: Config) -> Iterator[Check]:
    """Whether a record could be written; none is."""
    path = config.audit_file
    place = path
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    try:
        room = os.statvfs(place)
        head = AuditLog(path).head() if place == path else None
    except SczError as error:
        yield failed("audit log", error)
        return
    except OSError as error:
        yield Check("audit log", "missing", f"{place}: {error.strerror}", f"mend {place}")
        return
    behind = head.seconds - config.token_leeway_seconds - time.time() if head is not None else 0.0
    if behind > 0:
        yield Check("audit log", "missing", f"the clock is {behind:.0f} s behind the last record", ClockRefused.remedy)
    elif not os.access(place, os.W_OK) or not room.f_bavail:
        yield Check("audit log", "missing", f"{place} cannot be written", "free space, and check the owner")
    else:
        yield Check("audit log", "ok", path + ("" if head is not None else " (not yet begun)"))
