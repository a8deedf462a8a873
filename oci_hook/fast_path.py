"""The hook's first look: whether a container asks for nothing of ours. Most do not, and each of them waits for it.

    state ─► clean ─► nothing was made ready ─► has annotations, or config.json is clean too ─► exit 0

Clean are bytes in which no reader of JSON can find `smm.scz`: UTF-8 that does not have it and spells no letter as its
number. It says no to nobody: whatever it does not expect goes the long way (`hook`), with the bytes that it has read.
Its answer is `hook`'s, but that it does not look whether a config.json that cannot be ours is well-formed (ADR 17).
Only what is built into the interpreter is imported, and the C scanner that `json` uses; not even `os` is there under
`python3 -I -S`. OCI runtime specification, "State"; RFC 8259, section 7.
"""

import posix

MAX_STATE_BYTES = 1 << 20  # of `oci.state`, as the next is of `oci.spec`, which cost a parser
MAX_SPEC_BYTES = 4 << 20
RUNTIME_DIRECTORY = "/run/scz-smm"  # of `config`
BOUND, HOST_RECORDS = "bound", "host-mounts"  # of `delivery.bound_folders` and `delivery.host_records`
_RECORDS = ("containers", "tokens", HOST_RECORDS)  # of `records` and `host`: what a container's end takes away
_MAX_CONFIG_BYTES = 64 << 10
_CHUNK_BYTES = 1 << 16

_STAGES = ("prestart", "createRuntime", "poststop")
_ENGINES = ("podman", "cri-o", "containerd", "docker")  # of `invocation`
_DEFAULT_CONFIG_FILE = "/etc/scz-smm/config.toml"

_OURS = b"smm.scz"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_GO_ESCAPES = (rb"\u003c", rb"\u003e", rb"\u0026", rb"\u2028", rb"\u2029")
"""What Go's encoder writes by number, whoever's text it is; none is a letter of ours."""
_ID_CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_+.-"
_MAX_ID_LENGTH, _MAX_PATH_LENGTH, _MAX_INTEGER_DIGITS, _PID_HIGH = 255, 4096, 20, (1 << 31) - 1
_READ = posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NOCTTY
_TYPE, _REGULAR = 0o170000, 0o100000  # S_IFMT, S_IFREG

# The scanner ends in a SystemError where `json.decoder`, which has the class of its error, was not imported (3.11).
_SURPRISES = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ImportError, StopIteration),
    *(RecursionError, MemoryError, SystemError),
)


def first_look(arguments: list[str]) -> tuple[bool, bytes | None]:
    """Look at the command line, the state and what it leads to.

    Args:
        arguments: The hook's.

    Returns:
        Whether there is nothing to do, and what was read of standard input, for `hook.main`: at most `MAX_STATE_BYTES`
        and one byte; None if nothing could or need be read.
    """
    config_file = _config_file(arguments)
    if config_file is None:
        return False, None
    data = bytearray()
    try:
        _fill(data, 0, MAX_STATE_BYTES + 1)
    except OSError:
        return False, bytes(data) or None
    state = bytes(data)
    return asks_nothing(arguments[-1], config_file, state), state


def asks_nothing(stage: str, config_file: str, state: bytes) -> bool:
    """Whether `hook` would find nothing to do for this state; False: not known here.

    Args:
        stage: prestart, createRuntime or poststop.
        config_file: The host's configuration.
        state: All of standard input.
    """
    try:
        if len(state) > MAX_STATE_BYTES or not _is_clean(state):
            return False
        bundle, has_annotations = _read_state(state.decode())
        directory = usual_runtime_directory(config_file)
        if directory is None or may_be_ready(directory):
            return False
        if has_annotations:  # then a runtime passes all of them; Kata 1, which does not, passes none
            return True
        if stage == "poststop":
            return not any(_has_entries(f"{directory}/{name}") for name in _RECORDS)
        return _is_clean(_load_config_json(bundle))
    except _SURPRISES:
        return False


def usual_runtime_directory(config_file: str) -> str | None:
    """The directory of run-time records, without the configuration's parser; None: a line of it may name another."""
    data = bytearray()
    try:
        descriptor = posix.open(config_file, _READ)
        try:
            _fill(data, descriptor, _MAX_CONFIG_BYTES)
        finally:
            posix.close(descriptor)
    except OSError:
        data.clear()
    lines = bytes(data).splitlines()
    if any(b"runtime" in line or b"\\" in line for line in lines if not line.lstrip().startswith(b"#")):
        return None
    return RUNTIME_DIRECTORY


def may_be_ready(directory: str) -> bool:
    """Whether any models may have come before a `create`: one look at a folder where that never happened."""
    return posix.access(f"{directory}/{BOUND}", posix.F_OK) and _has_entries(f"{directory}/{HOST_RECORDS}")


def _config_file(arguments: list[str]) -> str | None:
    """The configuration that the command line names; None: it says more than that and the engine."""
    if not arguments or arguments[-1] not in _STAGES or not len(arguments) % 2:
        return None
    given: dict[str, str] = {}
    for option, value in zip(arguments[:-1:2], arguments[1:-1:2], strict=True):
        if option in given or not (option == "--config" or (option == "--engine" and value in _ENGINES)):
            return None
        given[option] = value
    return given.get("--config", _DEFAULT_CONFIG_FILE)


def _fill(data: bytearray, descriptor: int, limit_bytes: int) -> None:
    while len(data) < limit_bytes and (chunk := posix.read(descriptor, min(_CHUNK_BYTES, limit_bytes - len(data)))):
        data += chunk


def _has_entries(path: str) -> bool:
    try:
        return bool(posix.listdir(path))
    except FileNotFoundError:
        return False
    except OSError:
        return True  # let the long way say what is wrong


# --- JSON -------------------------------------------------------------------------------------------------------------


def _is_clean(data: bytes) -> bool:
    """Whether no reader of JSON can find our name in it.

    Raises:
        UnicodeDecodeError: It is not UTF-8.
    """
    if _OURS in data or b"\0" in data or data.startswith(_BYTE_ORDER_MARK):
        return False
    data.decode()
    escapes = data.count(rb"\u")
    return not escapes or escapes == sum(data.count(escape) for escape in _GO_ESCAPES)


class _Strict:
    """What the C scanner asks its decoder for; it refuses more than `documents.parse_object` does, never less."""

    strict = True
    object_hook = None

    @staticmethod
    def object_pairs_hook(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError
        return found

    @staticmethod
    def parse_int(digits: str) -> int:
        if len(digits) > _MAX_INTEGER_DIGITS:
            raise ValueError
        return int(digits)

    @staticmethod
    def parse_float(_digits: str) -> object:
        raise ValueError

    parse_constant = parse_float


def _read_state(text: str) -> tuple[str, bool]:
    """The bundle of a state that `oci.state` takes, too, and whether it has annotations.

    Raises:
        One of `_SURPRISES`: It is not one, or not one that is expected here.
    """
    from _json import make_scanner  # of `json`, which imports `re`

    text = text.strip(" \t\n\r")
    state, end = make_scanner(_Strict)(text, 0)  # type: ignore[arg-type]  # any object with these attributes
    if end != len(text) or type(state) is not dict:
        raise ValueError
    annotations = state.pop("annotations", None)
    if annotations is not None and type(annotations) is not dict:
        raise TypeError
    texts = [] if annotations is None else list(annotations.values())
    container_id, bundle, pid = state["id"], state["bundle"], state.get("pid", 0)
    if not all(type(value) is str for value in (container_id, bundle, *texts)) or type(pid) is not int:
        raise TypeError
    if any(type(value) in (dict, list) for value in state.values()):  # how deep is looked at elsewhere
        raise TypeError
    if not 0 < len(container_id) <= _MAX_ID_LENGTH or container_id.strip(_ID_CHARACTERS) or container_id in (".", ".."):
        raise ValueError
    if not bundle.startswith("/") or len(bundle) > _MAX_PATH_LENGTH or not -1 <= pid <= _PID_HIGH:
        raise ValueError
    return bundle, bool(annotations)


def _load_config_json(bundle: str) -> bytes:
    """`<bundle>/config.json`, a regular file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is something else, or larger than `MAX_SPEC_BYTES`.
    """
    data = bytearray()
    descriptor = posix.open(f"{bundle}/config.json", _READ | posix.O_NOFOLLOW | posix.O_NONBLOCK)
    try:
        if posix.fstat(descriptor).st_mode & _TYPE != _REGULAR:
            raise ValueError
        _fill(data, descriptor, MAX_SPEC_BYTES + 1)
    finally:
        posix.close(descriptor)
    if len(data) > MAX_SPEC_BYTES:
        raise ValueError
    return bytes(data)
