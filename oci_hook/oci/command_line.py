"""A runtime's command line, read as far as the shim needs it: which verb, whose bundle, where errors are logged.

runc and runsc parse with Go's `flag` (`-name` and `--name` are the same, a value follows or stands behind `=`; runc,
by urfave/cli, takes a verb's options behind the container's id too), crun with getopt (abbreviated long options, short
ones in one word with their value). Only options whose value could be taken for a verb need to be known. A word that
can be read in two ways is reported as `doubt`, never guessed. Nothing is imported: this is the shim's fast path.
Sources: `runc --help`, `crun --help`, `runsc flags`, of the versions that docs/runtimes.md names; kata-runtime's
of 1.12 (cli/main.go, create.go), read as runc's are.
"""

from __future__ import annotations

CREATING = frozenset({"create", "run", "restore"})
"""The verbs that read a config.json."""
NAMES = ("runsc", "crun", "runc", "kata-runtime")
"""A runtime is told by one of these in its file's name."""

_WORDS = {
    "verbs": """
        boot check checkpoint cpu-features debug delete direct-volume do env events exec export-metrics factory
        features flags gofer help init install kata-check kata-env kata-network kata-overhead kill list metric-metadata
        metric-server mitigate mounts nvproxy pause platforms port-forward portforward ps read-control resume spec
        start state statefile symbolize syscalls tar trace umount uninstall update usage wait write-control
    """,
    "runc's options with a value": "criu log log-format root rootless",
    "runc's options without": "debug h help systemd-cgroup v version",
    "kata-runtime's options with a value": "config kata-config log log-format root rootless",
    "kata-runtime's options without": """
        debug h help kata-show-default-config-paths show-default-config-paths systemd-cgroup v version
    """,
    "crun's options with a value": "cgroup-manager log log-format log-level root rootless",
    "crun's options without": "debug help systemd-cgroup usage version",
    "runsc's options with a value": """
        EXPERIMENTAL-xdp TESTONLY-autosave-image-path TESTONLY-test-name-env coverage-fd coverage-report dcache
        debug-command debug-log debug-log-fd debug-log-format fdlimit file-access file-access-mounts final-metrics-log
        gvisor-gro host-fifo host-uds log log-fd log-format metric-server network network-processors-per-channel
        num-network-channels nvproxy-allowed-driver-capabilities nvproxy-driver-version overlay2 panic-log panic-log-fd
        panic-signal pcap-log platform platform_device_path pod-init-config profile-block profile-cpu profile-heap
        profile-mutex profiling-metrics profiling-metrics-log profiling-metrics-rate-us qdisc ref-leak-mode root
        strace-log-size strace-syscalls trace traceback watchdog-action
    """,
    "runsc's options without": "alsologtostderr cgroupfs debug directfs ignore-cgroups rootless strace systemd-cgroup",
    "a verb's options with a value": """
        bundle config console console-socket empty-ns exec-fd image-path lsm-mount-context lsm-profile
        manage-cgroups-mode pass-fd pid-file pidfd-socket preserve-fds user-log work-path
    """,
}


def _set(name: str) -> frozenset[str]:
    return frozenset(_WORDS[name].split())


_VERBS = CREATING | _set("verbs")
_VERB_VALUES = _set("a verb's options with a value")
_NONE: frozenset[str] = frozenset()
_SHORT = {"b": "bundle", "f": "config"}


class Command:
    """One call of a runtime.

    Attributes:
        verb: The first word that is neither an option nor an option's value; empty if there is none.
        bundle: As given; empty: the working directory.
        config: config.json, in the bundle; under crun's `--config` another file, seen from the working directory.
        container_id: Empty if none is given.
        log: The runtime's log file, empty if none.
        log_format: `text` or `json`.
        kind: Of the runtime, as `read_command` was told.
        prepared: Models were made ready on the host for this call.
        doubt: An option before the verb that the word behind may or may not belong to; empty if there is none.
    """

    __slots__ = ("bundle", "config", "container_id", "doubt", "kind", "log", "log_format", "prepared", "verb")

    def __init__(self) -> None:
        self.verb = self.bundle = self.container_id = self.log = self.doubt = self.kind = ""
        self.prepared = False
        self.config = "config.json"
        self.log_format = "text"

    @property
    def creates(self) -> bool:
        """Whether the runtime will read a config.json."""
        return self.verb in CREATING


def kind_of(runtime: str) -> str:
    """`runc`, `crun`, `runsc` or `kata-runtime`, by the last part of a path; empty if it is none of them."""
    name = runtime.rpartition("/")[2]
    return next((kind for kind in NAMES if kind in name), "")


def read_command(arguments: list[str], kind: str) -> Command:
    """Read a runtime's arguments.

    Args:
        arguments: Without the program's own name.
        kind: As `kind_of` tells it; empty is read like `runc`.
    """
    command = Command()
    command.kind = kind
    place = _read_globals(command, arguments, kind or "runc")
    if command.creates:
        _read_verb(command, arguments[place:], kind)
    return command


def _read_globals(command: Command, arguments: list[str], kind: str) -> int:
    """Everything up to the verb; returns the place behind it."""
    values, flags = _set(f"{kind}'s options with a value"), _set(f"{kind}'s options without")
    place = 0
    while place < len(arguments):
        word = arguments[place]
        place += 1
        if word == "--":
            continue
        if not _is_option(word):
            command.verb = word
            break
        name, equals, value = _split(word, values if kind == "crun" else _NONE)
        following = arguments[place : place + 2]
        if equals or name in flags:
            pass
        elif name in values:
            value = "".join(following[:1])
            place += 1
        elif _may_be_value(following):
            command.doubt = word
            place += following[0] not in _VERBS or (following[0] not in CREATING and following[1] in CREATING)
        if name == "log":
            command.log = value
        elif name == "log-format":
            command.log_format = value
    return place


def _may_be_value(words: list[str]) -> bool:
    """Whether what stands behind an unknown option may be its value: no verb, or a verb that another one follows."""
    if not words or _is_option(words[0]):
        return False
    return words[0] not in _VERBS or (len(words) == 2 and words[1] in _VERBS)


def _read_verb(command: Command, arguments: list[str], kind: str) -> None:
    """A verb's options and the container's id."""
    place = 0
    while place < len(arguments):
        word = arguments[place]
        place += 1
        if word == "--":
            command.container_id = command.container_id or next(iter(arguments[place:]), "")
            return
        if not _is_option(word):
            command.container_id = command.container_id or word
            if kind == "runsc":  # reads nothing behind it
                return
            continue
        if kind == "crun" and word[1] != "-":
            name, equals, value = _cluster(word)
        else:
            name, equals, value = _split(word, _VERB_VALUES if kind == "crun" else _NONE)
            name = _SHORT.get(name, name)
        if not equals and name in _VERB_VALUES:
            value = "".join(arguments[place : place + 1])
            place += 1
        if name == "bundle":
            command.bundle = value
        elif name == "config" and kind == "crun":
            command.config = value


def _is_option(word: str) -> bool:
    return word.startswith("-") and word != "-"


def _split(word: str, completions: frozenset[str]) -> tuple[str, str, str]:
    """An option's name, its `=` if it has one, and the value behind that; getopt completes an abbreviated name."""
    name, equals, value = word.removeprefix("-").removeprefix("-").partition("=")
    if name and name not in completions:
        name = min((full for full in completions if full.startswith(name)), default=name)
    return name, equals, value


def _cluster(word: str) -> tuple[str, str, str]:
    """crun's short options in one word: the first that takes a value, with what of the word is left for it."""
    for place, letter in enumerate(word[1:], 2):
        if letter in _SHORT:
            return _SHORT[letter], word[place:], word[place:]
    return "", "", ""
