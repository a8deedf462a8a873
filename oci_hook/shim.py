"""`scz-runtime`: the shim, an OCI runtime that adds our hooks to config.json and then becomes the real runtime.

For engines that have no hooks (containerd, Docker). A script that `sczctl install` writes names runtime, engine and
configuration; nothing of that comes from a container. The call is looked at only as far as needed: a container without
an annotation of ours reaches the runtime with config.json untouched. Arguments, descriptors, working directory and
signal mask pass as they are, the exit code is the runtime's own, since it is exec. Only the environment is thinned.
Before kata-runtime, whose guest sees nothing that a hook mounts, the models are made ready first (`shim_binds`), and
their bind entries go into config.json, too.
Any problem ends the call with a code of `errors.py`, and the runtime does not run. Only while the package is replaced,
damaged or gone does the script itself pass on what creates no container. This module has the one broad
`except` of this entry point. Until something of ours is seen, `os` and `_signal` are all that is imported, as `json`,
`typing` and `signal` take longer than the interpreter's own start.
OCI runtime specification, "POSIX-platform Hooks"; the command line that engines use: runc's.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` without its enumerations
import os

from oci_hook.oci.command_line import CREATING, NAMES, Command, kind_of, read_command

_LIMIT_BYTES = 4 << 20
_MAX_FIRST_LINE_BYTES = 255  # BINPRM_BUF_SIZE of Linux (include/uapi/linux/binfmts.h), less the end of the line
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
_KEPT = frozenset(
    (
        b"PATH",
        b"HOME",
        b"TMPDIR",
        b"LANG",
        b"XDG_RUNTIME_DIR",
        b"NOTIFY_SOCKET",
        b"DBUS_SESSION_BUS_ADDRESS",
        b"GOMAXPROCS",
    )
)
"""What runtimes read (go through their sources for getenv), and nothing that loads code or turns on debugging."""
_KEPT_FAMILIES = (b"LC_", b"LISTEN_", b"_OCI_", b"_CONTAINERS_")
_COERCED = b"LC_CTYPE"  # Python adds it itself (PEP 538); runtimes do not look at it
_MARKS = (b"smm.scz", b"SMM_SCZ")
# JSON may write any letter as its number. Whoever finds one of these parses the file before deciding.
_ESCAPES = tuple(rb"\u00" + b"%02x" % letter for letter in sorted(set(b"smm.scz/SMM_SCZ")))


def main(arguments: list[str], *, runtime: str, engine: str, config_file: str) -> int:
    """One call of the runtime; does not return if the runtime is executed.

    Args:
        arguments: The runtime's, without the program's name.
        runtime: Absolute path of the real one.
        engine: Who calls, one of `invocation.ENGINES`.
        config_file: Path of the host's configuration, for the hook.

    Returns:
        The exit code of a refusal.
    """
    command = Command()
    try:
        if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
            _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
        command = read_command(arguments, kind_of(os.path.realpath(runtime)) or kind_of(runtime))
        if command.creates:
            _prepare(command, engine, config_file)
        _become(runtime, arguments)
    except BaseException as error:
        return _refuse(command, config_file, error)
    return 0


def _become(runtime: str, arguments: list[str]) -> None:
    """Exec. Python ignores two signals from its start on, which would stay ignored."""
    for number in (_signal.SIGPIPE, _signal.SIGXFSZ):
        _signal.signal(number, _signal.SIG_DFL)
    try:
        os.execve(runtime, [runtime, *arguments], _environment())  # noqa: S606 - to become it is what we are for
    except OSError as cause:
        from oci_hook.errors import FileUnreadable

        remedy = "install it, or `sczctl install` again with --runtime and the runtime's path"
        raise FileUnreadable(f"the runtime {runtime} cannot be started: {cause.strerror}", remedy=remedy) from cause


def _environment() -> dict[bytes, bytes]:
    return {
        name: value
        for name, value in os.environb.items()
        if name in _KEPT or (name.startswith(_KEPT_FAMILIES) and name != _COERCED)
    }


# --- config.json ------------------------------------------------------------------------------------------------------


def _prepare(command: Command, engine: str, config_file: str) -> None:
    """Add our hooks to the bundle's config.json if it asks for a model; leave it alone if not."""
    try:
        directory = os.open(command.bundle or ".", _READ | os.O_DIRECTORY)
    except OSError as cause:
        if command.doubt:
            return
        raise _unusable(command, cause.strerror) from cause
    try:
        data, found = _read(command, directory)
        if not _may_be_ours(data):
            return
        edited = _edited(command, data, found, engine, config_file)
        if edited != data:
            _replace(command, directory, edited, found)
    finally:
        os.close(directory)


def _read(command: Command, directory: int) -> tuple[bytes, os.stat_result]:
    """The file and what it was when it was read: a regular file, no link, at most 4 MiB."""
    try:
        # crun looks for another file than the usual one before it goes into the bundle.
        where = directory if command.config == "config.json" else None
        descriptor = os.open(command.config, _READ | os.O_NOFOLLOW, dir_fd=where)
    except OSError as cause:
        if command.doubt:
            return b"", os.fstat(directory)
        raise _unusable(command, cause.strerror) from cause
    try:
        found = os.fstat(descriptor)
        if found.st_mode & 0o170000 != 0o100000:
            raise _unusable(command, "not a regular file")
        data = b""
        while len(data) <= _LIMIT_BYTES and (chunk := os.read(descriptor, _LIMIT_BYTES + 1 - len(data))):
            data += chunk
    finally:
        os.close(descriptor)
    if len(data) > _LIMIT_BYTES:
        raise _unusable(command, "larger than 4 MiB")
    return data, found


def _may_be_ours(data: bytes) -> bool:
    """Whether our name can be anywhere in it."""
    if any(mark in data for mark in _MARKS):
        return True
    if rb"\u00" not in data:
        return False
    lower = data.lower()
    return any(escape in lower for escape in _ESCAPES)


def _edited(command: Command, data: bytes, found: os.stat_result, engine: str, config_file: str) -> bytes:
    """config.json as the runtime shall read it; the same bytes if it asks for nothing."""
    from oci_hook.errors import EngineUnsupported
    from oci_hook.oci.edit import add_hooks, parse_document, requested_annotations, verify_unchanged

    document = parse_document(data)
    annotations = requested_annotations(document, engine)
    if not annotations:
        return data
    if found.st_uid not in (0, os.geteuid()):
        raise _unusable(command, f"not root's: it belongs to uid {found.st_uid}")
    if command.verb == "restore":
        raise EngineUnsupported("a container with a model cannot be restored: no hook runs then")
    if command.config != "config.json":
        raise EngineUnsupported("--config names another file than config.json for a container with a model")
    if command.doubt:
        raise EngineUnsupported(
            f"the shim does not know the runtime's option {command.doubt}",
            remedy=f"write {command.doubt}=VALUE, in one word, where the engine names the runtime's options",
        )
    binds: list[dict[str, object]] = []
    if command.kind == "kata-runtime":
        from oci_hook.shim_binds import bind_entries

        verify_unchanged(data, document, engine=engine, config_file=config_file)
        asked = {**document, "annotations": {**(document.get("annotations") or {}), **annotations}}
        command.prepared = True
        binds = bind_entries(asked, command.container_id, command.bundle, engine=engine, config_file=config_file)
    return add_hooks(data, document, annotations, engine=engine, config_file=config_file, binds=binds)


def _replace(command: Command, directory: int, data: bytes, found: os.stat_result) -> None:
    """Put the new file in the place of the one that was read, with its owner and mode; whole, or not at all."""
    temporary = f".config.json.{os.urandom(6).hex()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        descriptor = os.open(temporary, flags, 0o600, dir_fd=directory)
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fchown(descriptor, found.st_uid, found.st_gid)
                os.fchmod(descriptor, found.st_mode & 0o7777)
            now = os.stat(command.config, dir_fd=directory, follow_symlinks=False)
            if _identity(now) != _identity(found):
                raise _unusable(command, "changed while it was read")
            os.rename(temporary, command.config, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            os.unlink(temporary, dir_fd=directory)
            raise
    except OSError as cause:
        from oci_hook.errors import FileUnreadable

        raise FileUnreadable(f"{_shown(command)} cannot be written: {cause.strerror}") from cause


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode, found.st_uid


# --- refusals ---------------------------------------------------------------------------------------------------------


def _shown(command: Command) -> str:
    from oci_hook.documents import shown

    usual = command.config == "config.json"
    return shown(os.path.join(command.bundle, command.config) if usual else command.config, 200)


def _unusable(command: Command, problem: str | None) -> Exception:
    from oci_hook.errors import SpecInvalid

    return SpecInvalid(f"{_shown(command)}: {problem}")


def _refuse(command: Command, config_file: str, error: BaseException) -> int:
    """Say it where the engine looks, the runtime's log, and everywhere else where a refusal is looked for."""
    import re
    import sys

    from oci_hook.errors import InstallationIncomplete, InternalError, SczError
    from oci_hook.oci.state import CONTAINER_ID, State
    from oci_hook.report import report_refusal

    if command.prepared:
        from oci_hook.shim_binds import Told, take_back

        take_back(command.container_id, command.bundle, config_file)
        if isinstance(error, Told):
            _log(command, error.line)
            print(error.line, file=sys.stderr)
            return error.code
    if not isinstance(error, SczError):
        kind = InstallationIncomplete if isinstance(error, ImportError) else InternalError
        error = kind(f"{type(error).__name__}: {error}")
    _log(command, f"scz-runtime: {error.reason} ({error.code}): {error.message}; {error.advice}")
    if not command.creates:
        return report_refusal(config_file, None, error, program="scz-runtime")
    name = command.container_id if re.fullmatch(CONTAINER_ID, command.container_id) else "unknown"
    state = State(name, os.getpid(), os.path.abspath(command.bundle), "creating", {})
    return report_refusal(config_file, state, error, program="scz-runtime")


def _log(command: Command, message: str) -> None:
    """A line in the runtime's own log, as it would write it; engines show their users the last error of it."""
    import json
    import time

    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if command.log_format == "json":
        line = json.dumps({"level": "error", "msg": message, "time": now})
    else:
        line = f'time="{now}" level=error msg={json.dumps(message, ensure_ascii=False)}'
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
    try:
        descriptor = os.open(command.log.removeprefix("file:"), flags, 0o644)  # crun's word for a file
    except OSError:
        return  # stderr, journal and `sczctl why` have it, too
    try:
        os.write(descriptor, line.encode("utf-8", "replace") + b"\n")
    except OSError:
        pass
    finally:
        os.close(descriptor)


# --- the script -------------------------------------------------------------------------------------------------------


def shim_script(*, runtime: str, engine: str, config_file: str) -> bytes:
    """The executable that an engine is given as its runtime.

    Args:
        runtime: Absolute path of the real one; runc, crun, runsc or kata-runtime is part of its file's name.
        engine: One of `invocation.ENGINES`.
        config_file: Absolute path of the host's configuration.

    Raises:
        EngineUnsupported: Nothing that the shim knows, or a path that a script's first line cannot have.
    """
    from oci_hook.errors import EngineUnsupported, InstallationIncomplete
    from oci_hook.invocation import ENGINES, interpreter

    if not os.path.isabs(runtime) or not kind_of(runtime):
        raise EngineUnsupported(f"the shim needs the absolute path of one of {', '.join(NAMES)}, not {runtime!r}")
    if engine not in ENGINES or not os.path.isabs(config_file):
        raise EngineUnsupported(f"the engine {engine!r} or the configuration {config_file!r} cannot be used")
    python = os.fsencode(interpreter())
    first_line = b"#!" + python + b" -IS"
    if len(first_line) > _MAX_FIRST_LINE_BYTES or len(python.split()) != 1:
        raise EngineUnsupported(f"{os.fsdecode(python)!r} cannot stand in the first line of a script")
    packages = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    lines = (
        "import os, sys",
        "sys.dont_write_bytecode = True",
        f"sys.path.append({packages!a})",
        "try:",
        f"    if os.path.exists({packages + '/.incomplete'!a}):",
        "        raise ImportError('the package is being installed or upgraded, or that was cut off')",
        "    from oci_hook.shim import main",
        "except Exception as error:",  # as in launch.py
        *("    " + line for line in _without_us(runtime)),
        f"    print(f'scz-runtime: InstallationIncomplete (72): {{error}}; remedy: '{InstallationIncomplete.remedy!a},",
        "        file=sys.stderr)",
        "    sys.exit(72)",
        f"sys.exit(main(sys.argv[1:], runtime={runtime!a}, engine={engine!a}, config_file={config_file!a}))",
    )
    return first_line + b"\n" + "\n".join(lines).encode() + b"\n"


def _without_us(runtime: str) -> tuple[str, ...]:
    """What the script does while we are replaced, damaged or gone: what runs can be stopped and entered.

    A word anywhere that is a creating verb, or begins one, ends in the refusal: nothing starts without the check.
    """
    return (
        f"if not any(word and verb.startswith(word) for word in sys.argv[1:] for verb in {tuple(sorted(CREATING))!a}):",
        "    import _signal",
        "    for number in (_signal.SIGPIPE, _signal.SIGXFSZ):",
        "        _signal.signal(number, _signal.SIG_DFL)",
        f"    kept, families = {tuple(sorted(_KEPT))!a}, {_KEPT_FAMILIES!a}",
        "    environment = {name: value for name, value in os.environb.items()",
        f"        if name in kept or (name.startswith(families) and name != {_COERCED!a})}}",
        "    try:",
        f"        os.execve({runtime!a}, [{runtime!a}, *sys.argv[1:]], environment)",
        "    except OSError as problem:",
        "        error = f'{error}; and the runtime cannot be started: {problem}'",
    )
