"""A runtime's command line: what engines really pass, every shape that the three parsers allow, and arbitrary words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_hook.oci.command_line import CREATING, NAMES, kind_of, read_command

# What containerd-shim-runc-v2, dockerd (through it) and conmon pass.
CONTAINERD = [
    "--root",
    "/run/containerd/runc/k8s.io",
    "--log",
    "/b/log.json",
    "--log-format",
    "json",
    "--systemd-cgroup",
]
CONMON = ["--root=/run/runc", "--log-format=json", "--log=/b/oci-log"]


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize(
    ("arguments", "verb", "bundle", "name"),
    [
        ([*CONTAINERD, "create", "--bundle", "/b", "--pid-file", "/b/init.pid", "id"], "create", "/b", "id"),
        ([*CONTAINERD, "create", "--bundle", "/b", "--no-pivot", "--preserve-fds", "2", "i"], "create", "/b", "i"),
        ([*CONTAINERD, "create", "--console-socket", "/create", "--bundle", "/b", "i"], "create", "/b", "i"),
        ([*CONTAINERD, "start", "create"], "start", "", ""),
        ([*CONTAINERD, "delete", "--force", "run"], "delete", "", ""),
        ([*CONTAINERD, "exec", "--process", "/create", "--detach", "create"], "exec", "", ""),
        ([*CONTAINERD, "restore", "--image-path", "/x", "--bundle", "/b", "i"], "restore", "/b", "i"),
        ([*CONMON, "create", "--bundle", "/b", "--pid-file", "/p", "id"], "create", "/b", "id"),
        (["run", "id"], "run", "", "id"),
        (["run", "-b", "/b", "id"], "run", "/b", "id"),
        (["run", "--bundle=/b", "id"], "run", "/b", "id"),
        (["run", "--bundle=", "id"], "run", "", "id"),
        (["run", "--bundle", "/a", "--bundle", "/b", "id"], "run", "/b", "id"),
        (["run", "--detach", "--pid-file", "create", "-b", "run", "id"], "run", "run", "id"),
        (["run", "--unheard-of", "-b", "/b", "id"], "run", "/b", "id"),
        (["run", "--unheard-of=x", "--bundle", "/b", "id"], "run", "/b", "id"),
        (["--root", "create", "--log", "run", "state", "x"], "state", "", ""),
        (["--root=create", "run", "-b", "b", "--", "-x"], "run", "b", "-x"),
        (["--debug", "create", "create"], "create", "", "create"),
        (["--version"], "", "", ""),
        (["--root"], "", "", ""),
        (["run", "--bundle"], "run", "", ""),
        (["--unheard-of=run", "state", "x"], "state", "", ""),
        ([], "", "", ""),
    ],
)
def test_every_parser(kind: str, arguments: list[str], verb: str, bundle: str, name: str) -> None:
    command = read_command(arguments, kind)
    assert (command.verb, command.bundle, command.container_id, command.doubt) == (verb, bundle, name, "")
    assert command.config == "config.json"
    assert command.creates == (verb in CREATING)


@pytest.mark.parametrize(
    ("kind", "arguments", "verb", "bundle"),
    [
        # Go's flag: one dash or two.
        ("runc", ["-root", "create", "-log=x", "run", "-bundle", "/b", "i"], "run", "/b"),
        ("runc", ["create", "-b=/b", "i"], "create", "/b"),
        ("runc", ["create", "--b", "/b", "i"], "create", "/b"),
        ("runsc", ["-platform", "create", "-network=none", "create", "-bundle", "/b", "i"], "create", "/b"),
        # urfave/cli reads options behind the id, runsc does not.
        ("runc", ["create", "i", "--bundle", "/b"], "create", "/b"),
        ("runsc", ["create", "i", "--bundle", "/b"], "create", ""),
        # `--rootless` has a value under runc and crun, none under runsc.
        ("runc", ["--rootless", "run", "state", "i"], "state", ""),
        ("crun", ["--rootless", "run", "state", "i"], "state", ""),
        ("runsc", ["--rootless", "run", "-bundle", "state", "i"], "run", "state"),
        # getopt: abbreviations, values in the same word, several letters in one.
        ("crun", ["--cgroup-m", "create", "create", "--bun", "/b", "i"], "create", "/b"),
        ("crun", ["--roo", "create", "--b=/b", "i"], "", ""),
        ("crun", ["create", "-b/b", "i"], "create", "/b"),
        ("crun", ["run", "-db", "/b", "i"], "run", "/b"),
        ("crun", ["run", "-d", "-b", "/b", "i"], "run", "/b"),
        ("crun", ["run", "-bundle", "x"], "run", "undle"),
        # A name that we do not know is read like runc's.
        ("", ["--root", "create", "run", "--bundle", "/b", "i"], "run", "/b"),
    ],
)
def test_what_is_different(kind: str, arguments: list[str], verb: str, bundle: str) -> None:
    command = read_command(arguments, kind)
    if verb:
        assert (command.verb, command.bundle, command.doubt) == (verb, bundle, "")
    else:
        assert not command.creates or command.doubt


@pytest.mark.parametrize("option", ["--config", "-f", "--conf"])
def test_another_file_than_config_json_is_named_under_crun(option: str) -> None:
    assert read_command(["run", option, "other.json", "i"], "crun").config == "other.json"
    assert read_command(["run", "-fother.json", "i"], "crun").config == "other.json"


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize(
    ("arguments", "verb"),
    [
        (["--unheard-of", "value", "create", "-b", "/b", "i"], "create"),  # its value, or a verb of tomorrow
        (["--unheard-of", "create", "state", "i"], "create"),  # a container named "state", or the state of "i"
        (["--unheard-of", "state", "create", "-b", "/b", "i"], "create"),
    ],
)
def test_what_can_be_read_in_two_ways_is_read_as_the_one_that_matters_and_doubted(
    kind: str, arguments: list[str], verb: str
) -> None:
    command = read_command(arguments, kind)
    assert (command.verb, command.doubt) == (verb, "--unheard-of")


@pytest.mark.parametrize("kind", NAMES)
def test_an_unknown_option_before_a_verb_is_no_doubt(kind: str) -> None:
    command = read_command(["--unheard-of", "create", "--bundle", "/b", "i"], kind)
    assert (command.verb, command.bundle, command.doubt) == ("create", "/b", "")


@pytest.mark.parametrize("kind", NAMES)
def test_the_log(kind: str) -> None:
    assert (read_command(CONTAINERD, kind).log, read_command(CONTAINERD, kind).log_format) == ("/b/log.json", "json")
    assert (read_command(CONMON, kind).log, read_command(CONMON, kind).log_format) == ("/b/oci-log", "json")
    assert (read_command(["run", "i"], kind).log, read_command(["run", "i"], kind).log_format) == ("", "text")


def test_runtimes_are_told_by_name() -> None:
    assert [kind_of(path) for path in ("/usr/bin/runc", "crun-1.28", "/opt/runsc", "/runc/youki", "")] == [
        "runc",
        "crun",
        "runsc",
        "",
        "",
    ]
    assert [kind_of(path) for path in ("/opt/kata/bin/kata-runtime", "kata-runtime-1.12", "/k/kata-qemu")] == [
        "kata-runtime",
        "kata-runtime",
        "",
    ]


@pytest.mark.parametrize(
    ("arguments", "verb", "bundle"),
    [
        (["--kata-config", "create", "state", "i"], "state", ""),
        (["--config=/k.toml", "--rootless", "run", "create", "-b", "/b", "i"], "create", "/b"),
        (["--kata-show-default-config-paths", "create", "i"], "create", ""),
        (["create", "--console", "/dev/pts/1", "--bundle", "/b", "i"], "create", "/b"),
        (["kata-env", "run"], "kata-env", ""),
    ],
)
def test_katas_own_options(arguments: list[str], verb: str, bundle: str) -> None:
    command = read_command(arguments, "kata-runtime")
    assert (command.verb, command.bundle, command.doubt) == (verb, bundle, "")


WORDS = st.sampled_from(
    [
        *sorted(CREATING),
        *("state", "start", "kill", "--", "-", "--root", "--root=x", "--log", "--log-format", "-b", "--bundle"),
        *("--bundle=b", "-d", "-db", "-f", "--x", "--x=y", "x"),
    ]
) | st.text(max_size=8)


@given(st.lists(WORDS, max_size=12), st.sampled_from((*NAMES, "")))
def test_arbitrary_words_give_a_value(arguments: list[str], kind: str) -> None:
    before = list(arguments)
    command = read_command(arguments, kind)
    assert arguments == before
    assert command.verb == "" or command.verb in arguments
    assert command.container_id == "" or command.container_id in arguments
    if not command.creates and not CREATING & set(arguments):
        assert command.bundle == ""


VALUES = st.sampled_from(["create", "run", "state", "/b", "x", "-1"])
OPTION = {
    "runc": (["root", "log", "criu", "rootless"], ["debug", "systemd-cgroup"]),
    "crun": (["root", "log", "cgroup-manager", "rootless"], ["debug", "systemd-cgroup"]),
    "runsc": (["root", "log", "platform", "network"], ["debug", "strace", "rootless"]),
    "kata-runtime": (["root", "log", "kata-config", "rootless"], ["systemd-cgroup", "help"]),
}
VERB_OPTION = (["pid-file", "console-socket", "preserve-fds"], ["no-pivot", "detach"])


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[str, list[str], str, str, str]:
    """A command line that the runtime accepts, put together from what it says: kind, words, verb, bundle, id."""
    kind = draw(st.sampled_from(NAMES))

    def options(values: list[str], flags: list[str]) -> list[str]:
        words = []
        for name in draw(st.lists(st.sampled_from(values + flags), max_size=4)):
            dashes = "--" if kind == "crun" else draw(st.sampled_from(["-", "--"]))
            if name in flags:
                words.append(dashes + name)
            elif draw(st.booleans()):
                words += [dashes + name, draw(VALUES)]
            else:
                words.append(f"{dashes}{name}={draw(VALUES)}")
        return words

    verb, bundle = draw(st.sampled_from(sorted(CREATING))), draw(VALUES)
    given_bundle = draw(st.sampled_from([["--bundle", bundle], [f"--bundle={bundle}"], ["-b", bundle], []]))
    words = [*options(*OPTION[kind]), verb, *options(*VERB_OPTION), *given_bundle, *options(*VERB_OPTION)]
    name = draw(st.sampled_from(["create", "run", "i", "state"]))
    return kind, [*words, name], verb, bundle if given_bundle else "", name


@given(command_lines())
def test_whatever_a_runtime_accepts_is_read_as_it_was_meant(line: tuple[str, list[str], str, str, str]) -> None:
    kind, arguments, verb, bundle, name = line
    command = read_command(arguments, kind)
    assert (command.verb, command.bundle, command.container_id, command.doubt) == (verb, bundle, name, "")
