"""The host around the hook: configuration, whose files they are, memory, enrolment, trust, audit log, timers."""

from __future__ import annotations

import contextlib
import os
import shlex
import stat
import time
from collections.abc import Iterator

from oci_hook.attestation.host_device import HostDevice
from oci_hook.audit import AuditLog
from oci_hook.cli.checks.check import Check, count, failed
from oci_hook.config import DEFAULT_CONFIG_FILE, Config, load_config
from oci_hook.delivery.memory import load_available_memory
from oci_hook.engines.plan import HostFiles
from oci_hook.errors import ClockRefused, DeviceNotEnrolled, FileUnreadable, SczError
from oci_hook.store import Store
from oci_hook.trust import Issuer, Owner, parse_issuer
from oci_hook.trust_folder import Trust
from oci_hook.trusted_file import load_file

JWK_SET_DAYS = 90
"""An issuer's keys older than this are asked about: issuers rotate them, and nothing here fetches new ones."""
_LEAST_ROOM_BYTES = 64 << 20
_CHAIN_SECONDS = 3.0
_MIB = 1 << 20
_LOGROTATE = "/etc/logrotate.d/scz-smm"
_TIMER = "scz-smm-sweep.timer"
_TIMER_LINKS = ("/etc/systemd/system/timers.target.wants", "/usr/lib/systemd/system/timers.target.wants")


def check_configuration(config_file: str) -> tuple[Config, list[Check]]:
    """The configuration; the defaults serve the other checks if it cannot be used."""
    try:
        config = load_config(config_file)
    except SczError as error:
        return Config(), [failed("configuration", error)]
    absent = config_file == DEFAULT_CONFIG_FILE and not os.path.lexists(config_file)
    return config, [Check("configuration", "ok", f"{config_file}{' is absent: defaults' if absent else ''}")]


def check_owners_of_files(config_file: str, config: Config) -> Iterator[Check]:
    """Whether root alone can change what the hook believes: its folders, and every file of the trust folder."""
    folders = [os.path.dirname(config_file), config.trust_directory, config.store_directory, config.runtime_directory]
    below = [os.path.join(config.trust_directory, kind) for kind in ("owners", "issuers")]
    files = [os.path.join(folder, name) for folder in below for name in _names(folder)]
    problems = [problem for path in (*folders, *below, *files) if (problem := _loose(path)) is not None]
    for message, remedy in problems[:10]:
        yield Check("permissions", "fail", message, remedy)
    if not problems:
        there = ", ".join(path for path in folders if os.path.lexists(path))
        yield Check("permissions", "ok", f"root's alone: {there or 'none of the folders is there yet'}")


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))[:512]
    except OSError:
        return []


def _loose(path: str) -> tuple[str, str] | None:
    """Why others than root could change a file or folder, and the command that mends it."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    quoted = shlex.quote(path)
    if found.st_uid != 0:
        return f"{path} belongs to uid {found.st_uid}: it can change what root runs by", f"chown root: {quoted}"
    sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX  # nobody renames root's entries there
    if found.st_mode & 0o022 and not sticky:
        mode = f"{stat.S_IMODE(found.st_mode):04o}"
        return f"{path} is writable by others than root (mode {mode})", f"chmod go-w {quoted}"
    return None


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
            yield Check("memory", "warn", f"less than the reserve of {reserve} is free", "free memory on this host")
    if os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        yield Check("control groups", "ok", "version 2")
    elif os.path.isdir("/sys/fs/cgroup/memory"):
        yield Check("control groups", "ok", "version 1 for memory")
    else:
        remedy = "mount the cgroup file system: models are then charged to their containers"
        yield Check("control groups", "warn", "none for memory is mounted", remedy)


def load_enrolment(config: Config) -> tuple[HostDevice | None, list[Check]]:
    """This host's enrolment, if it can be read."""
    try:
        device = Store(config.store_directory).load_device()
    except DeviceNotEnrolled as error:
        return None, [Check("enrolment", "fail", "this host is not enrolled", error.advice)]
    except SczError as error:
        return None, [failed("enrolment", error)]
    return device, [Check("enrolment", "ok", f"with {count(len(device.counters), 'owner')}")]


# --- trust ------------------------------------------------------------------------------------------------------------


def check_trust(config: Config) -> tuple[tuple[Owner, ...], list[Check]]:
    """The trusted owners and issuers, the age of the issuers' keys, and this host's own issuer."""
    trust, checks = Trust(config.trust_directory), []
    owners: tuple[Owner, ...] = ()
    issuers: tuple[Issuer, ...] = ()
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
    own, own_checks = _own_issuer(config, issuers)
    checks += _ages(trust, issuers, own)
    return owners, [*checks, *own_checks]


def _counted(name: str, number: int, what: str, remedy: str) -> Check:
    if not number:
        return Check(name, "fail", f"no {what} is trusted", remedy)
    return Check(name, "ok", f"{count(number, what)} trusted")


def _ages(trust: Trust, issuers: tuple[Issuer, ...], own: Issuer | None) -> Iterator[Check]:
    """When each issuer's file was written; that of this host's own issuer does not age."""
    for issuer in issuers:
        if own is not None and _thumbprints(own) == _thumbprints(issuer):
            continue
        path = trust.path("issuers", issuer.name)
        try:
            days = int((time.time() - os.stat(path).st_mtime) // 86400)
        except OSError:  # a file whose name is not the issuer's; the keys were read, so its age alone is unknown
            continue
        name, text = f"issuer {issuer.name}", f"{count(len(issuer.keys), 'key')}, added {count(days, 'day')} ago"
        if days > JWK_SET_DAYS:
            message = f"{text}: more than {JWK_SET_DAYS}; tokens by a newer key of the issuer's are refused (37)"
            yield Check(name, "warn", message, "get its JWK set again, then `sczctl trust add issuer FILE`")
        else:
            yield Check(name, "ok", text)


def _thumbprints(issuer: Issuer) -> set[str]:
    return {key.thumbprint for key in issuer.keys}


def _own_issuer(config: Config, issuers: tuple[Issuer, ...]) -> tuple[Issuer | None, list[Check]]:
    """This host's own issuer of tokens, if it has one: key and public file there, root's alone, and trusted."""
    folder = os.path.join(config.store_directory, "issuer")
    key, document = os.path.join(folder, "issuer.key"), os.path.join(folder, "issuer.json")
    if not os.path.lexists(document) and not os.path.lexists(key):
        return None, []
    try:
        own = parse_issuer(load_file(document, limit_bytes=256 << 10, error=FileUnreadable))
        found = os.lstat(key)
    except SczError as error:
        return None, [failed("own issuer", error)]
    except OSError as error:
        remedy = f"remove {document}, make an issuer anew (`sczctl token init`) and trust it"
        return None, [Check("own issuer", "fail", f"{key}: {error.strerror}", remedy)]
    if found.st_uid != 0 or found.st_mode & 0o077:
        message = f"{key} is not root's alone (mode {stat.S_IMODE(found.st_mode):04o}): others may issue tokens"
        remedy = (
            f"chown root: {shlex.quote(key)} && chmod 600 {shlex.quote(key)}, and make a new issuer if others read it"
        )
        return own, [Check("own issuer", "fail", message, remedy)]
    if not any(_thumbprints(own) == _thumbprints(issuer) for issuer in issuers):
        remedy = f"`sczctl trust add issuer {shlex.quote(document)}`"
        return own, [Check("own issuer", "warn", f"{own.issuer} is not trusted: its tokens are refused (42)", remedy)]
    return own, [Check("own issuer", "ok", f"{own.issuer}, trusted")]


# --- audit log, rotation, timer ---------------------------------------------------------------------------------------


def check_audit(config: Config) -> Iterator[Check]:
    """Whether a record could be written (none is), there is room, and the chain holds so far as was looked at."""
    path = config.audit_file
    place = path
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    try:
        room = os.statvfs(place)
        log = AuditLog(path)
        head = log.peek()
        looked = f", {_verify_chain(log)}" if head.sequence else " (not yet begun)"
    except SczError as error:
        yield failed("audit log", error)
        return
    except OSError as error:
        yield Check("audit log", "fail", f"{place}: {error.strerror}", f"mend {place}")
        return
    behind = head.seconds - config.token_leeway_seconds - time.time()
    left = room.f_bavail * room.f_frsize
    if behind > 0:
        yield Check("audit log", "fail", f"the clock is {behind:.0f} s behind the last record", ClockRefused.remedy)
    elif not os.access(place, os.W_OK) or not left:
        yield Check("audit log", "fail", f"{place} cannot be written", "free space, and check the owner")
    elif left < _LEAST_ROOM_BYTES:
        message = f"{left // _MIB} MiB are left for {path}; a log that cannot be written refuses every start"
        yield Check("audit log", "warn", message, f"free space on the file system of {place} (`df {place}`)")
    else:
        yield Check("audit log", "ok", path + looked)


def _verify_chain(log: AuditLog) -> str:
    """Follow the chain from its beginning, for a few seconds.

    Raises:
        AuditRefused: It is broken.
        AuditFailed: It cannot be read.
    """
    until, number = time.monotonic() + _CHAIN_SECONDS, 0
    for _ in log.records():
        number += 1
        if time.monotonic() > until:
            return f"chained as far as was looked at ({count(number, 'record')}; `sczctl audit verify` looks at all)"
    return f"{count(number, 'record')}, chained"


def check_rotation(config: Config, files: HostFiles) -> Iterator[Check]:
    """Whether logrotate knows the log: one that fills its disk refuses every start."""
    with contextlib.suppress(SczError):
        data = files.read(_LOGROTATE)
        if data is not None and config.audit_file.encode() in data:
            yield Check("log rotation", "ok", _LOGROTATE)
            return
    message = f"{_LOGROTATE} does not name {config.audit_file}: the log grows until its disk is full"
    yield Check("log rotation", "warn", message, f"name it in {_LOGROTATE}, as the package's own file does")


def check_timer(files: HostFiles) -> Iterator[Check]:
    """Where systemd runs: whether the sweep's timer is enabled."""
    try:
        if not files.exists("/run/systemd/system"):
            return
        enabled = any(files.exists(os.path.join(folder, _TIMER)) for folder in _TIMER_LINKS)
    except SczError as error:
        yield failed("sweep timer", error)
        return
    if enabled:
        yield Check("sweep timer", "ok", f"{_TIMER} is enabled")
    else:
        message = f"{_TIMER} is not enabled: what containers that were killed leave mounted stays until the next start"
        yield Check("sweep timer", "warn", message, f"systemctl enable --now {_TIMER}")
