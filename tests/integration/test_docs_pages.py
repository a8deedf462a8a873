"""docs/owner.md, docs/operator.md and docs/developer.md, typed: one story, told by the three pages together.

Each reader has a folder and a shell, all of them a link `usb` to one stick. A reader goes on until the next file of
another one is awaited. The commands are the pages' own; in front of `sczctl`, `podman` and `skopeo` stand scripts that
only add where things lie on this machine (--config, --hooks-dir, podman's own folders, a registry without TLS). What
would be below /etc, /var, /srv and /run lies below one folder. The TPMs are swtpm; the registry is docker-registry.
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from oci_hook.cli import cli
from oci_hook.oci.annotations import has_ours, parse_requests
from tests.engines import SYSTEM_PATH, Podman
from tests.pages import Block, Script, Shown, Wait, blocks, load, prints, steps
from tests.registry import Registry
from tests.scene import SCZCTL
from tests.software_tpm import SoftwareTpm

ROOT = Path(__file__).parents[2]
PAGES = ("developer.md", "owner.md", "operator.md")  # whoever can go on goes on, the developer first
PASSPHRASE = b"correct horse battery staple\n"
STEP_SECONDS = 120
#: Blocks that do not run with their page, by their first line, and the test that runs the same.
NOT_RUN = {
    "mkdir -p /etc/scz-smm/tokens.d": "tests/unit/test_units.py",
    "apt remove scz-smm": "tests/packaging/test_debian.py",
    "apt install ./scz-smm_*.deb": "tests/packaging/test_debian.py",
    "docker run --rm --runtime scz-runc -e SMM_SCZ_MODEL=minilm:1 -e SMM_SCZ_PATH=/models/minilm \\": (
        "tests/matrix/test_docker.py"
    ),
    "podman --runtime runsc run --rm --annotation smm.scz/model=minilm:1 \\": "tests/matrix/test_gvisor_podman.py",
    "# wait for usb/requests (operators)": "tests/integration/test_enroll.py",
    "sczctl enroll run --keys acme --ek-roots tpm-makers --device edge-3 -- ssh edge-3 sudo": (
        "tests/integration/test_enroll.py"
    ),
    "sczctl enroll challenge usb/requests --keys acme --ek-roots tpm-makers --ek-list eks.txt -o usb/challenges": (
        "tests/integration/test_enroll.py"
    ),
    "sczctl grant minilm:1 --keys acme --class kiosk -o usb/grants       "
    "# or --all-devices, --devices-from FILE, several --device": "tests/integration/test_fleet.py",
    "sczctl appraise c0ffee-evidence --keys acme --device edge-1 --boot-policy boot-policy.json "
    "--audit-log log/audit.jsonl": "tests/integration/test_evidence.py",
    "sczctl boot-policy log event-log.bin --measurement measured.json --keys acme": (
        "tests/integration/test_boot_state.py"
    ),
}
#: The operator of the second device, who has no page of an own.
SECOND = """```sh
# wait for usb/owner.json
mkdir usb/edge-2
sczctl enroll request --owner usb/owner.json --device edge-2 -o usb/edge-2/request.json
# wait for usb/edge-2/challenge.json
sczctl enroll answer usb/edge-2/challenge.json -o usb/edge-2/answer.json
```
"""
OURS = ("/etc/scz-smm", "/var/lib/scz-smm", "/var/log/scz-smm", "/srv/shop")


class Stage:
    """Where the story plays."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        self.drifted: list[str] = []
        self.usb = folder / "stick"
        self.usb.mkdir()
        self.tpm, other = (stack.enter_context(SoftwareTpm(folder / name)) for name in ("tpm", "tpm-2"))
        for tpm in (self.tpm, other):
            tpm.measure_boot()
        self.hooks = self.machine("edge-1") / "usr/share/containers/oci/hooks.d"
        self.hooks.mkdir(parents=True)
        self.podman = stack.enter_context(Podman(folder / "podman", hooks_directories=[self.hooks]))
        self.podman.busybox_image()
        self.podman.call("tag", "localhost/busybox:test", "localhost/my-application")
        self.registry = stack.enter_context(Registry(folder / "registry"))
        self.programs = {
            name: self.write_programs(name, tpm) for name, tpm in (("edge-1", self.tpm), ("edge-2", other))
        }
        source = self.home("owner.md") / "minilm"
        source.mkdir()
        for name in ("config.json", "model.safetensors", "vocab.txt"):
            (source / name).write_text(f"this is {name}\n" * 1000)
        roots = self.home("owner.md") / "tpm-makers"
        roots.mkdir()
        for number, certificate in enumerate([*self.tpm.ca_certificates, *other.ca_certificates]):
            shutil.copy(certificate, roots / f"{number}.pem")

    def machine(self, name: str) -> Path:
        """What stands for the root directory of a host."""
        return self.folder / name

    def home(self, page: str) -> Path:
        """Where a reader works; the stick is `usb` there."""
        home = self.folder / "homes" / page
        if not home.exists():
            home.mkdir(parents=True)
            (home / "usb").symlink_to(self.usb)
        return home

    def write_programs(self, name: str, tpm: SoftwareTpm) -> Path:
        """A folder of scripts that add where things lie."""
        root, folder = self.machine(name), self.folder / f"bin-{name}"
        folder.mkdir()
        config = root / "etc/scz-smm/config.toml"
        config.parent.mkdir(parents=True)
        config.write_text(
            f'engine = "podman"\n[tpm]\ntcti = "{tpm.tcti}"\ntimeout_seconds = 60\n[paths]\n'
            f'store = "{root}/var/lib/scz-smm"\ntrust = "{root}/etc/scz-smm/trust"\nruntime = "{root}/run/scz-smm"\n'
            f'audit = "{root}/var/log/scz-smm/audit.jsonl"\n'
        )
        hooks = f'case "$1" in install|uninstall) set -- "$@" --hooks-dir {self.hooks};; esac'
        sczctl = f'{hooks}\nexec {shlex.join(SCZCTL)} --config {config} "$@"'
        no_network = 'case "$1" in run) shift; set -- run --network=none "$@";; esac'
        words = self.podman.command()
        at = words.index("podman")
        environment = shlex.join(f"{key}={value}" for key, value in self.podman.environment.items())
        podman = (
            f"{no_network}\nexec env -i {environment} {shlex.join(words[:at])} "
            f'env --chdir="$PWD" {shlex.join(words[at:])} "$@"'
        )
        plain = (
            'case "$1" in copy) shift; set -- copy --src-tls-verify=false --dest-tls-verify=false "$@";;\n'
            'inspect) shift; set -- inspect --tls-verify=false "$@";; esac'
        )
        skopeo = f'{plain}\nexec /usr/bin/skopeo --insecure-policy "$@"'
        for program, text in {"sczctl": sczctl, "podman": podman, "skopeo": skopeo}.items():
            (folder / program).write_text(f"#!/bin/sh\n{text}\n")
            (folder / program).chmod(0o755)
        return folder

    def environment(self, machine: str) -> dict[str, str]:
        path = f"{self.programs[machine]}:{SYSTEM_PATH}"
        return {"PATH": path, "LC_ALL": "C.UTF-8", "HOME": str(self.folder), "TPM2TOOLS_TCTI": self.tpm.tcti}

    def here(self, text: str) -> str:
        """A page's text with this machine's places."""
        for path in OURS:
            text = re.sub(rf"(?<![\w/.-]){path}\b", f"{self.machine('edge-1')}{path}", text)
        return text.replace("registry.example", self.registry.address)

    def there(self, text: str) -> str:
        """What was printed, with the pages' places."""
        return text.replace(str(self.machine("edge-1")), "").replace(self.registry.address, "registry.example")

    def starts(self) -> bool:
        """Whether a container gets the model now; the developer's first command, for what the pages claim."""
        token = self.machine("edge-1") / "srv/shop/token"
        words = ["--rm", "--annotation=smm.scz/model=minilm:1", f"--volume={token}:/var/run/secrets/scz-smm/token:ro"]
        done = self.podman.run([*words, "my-application", "cat", "/models/minilm/vocab.txt"], check=False)
        assert done.stdout.startswith("this is vocab.txt") == (done.returncode == 0)
        return done.returncode == 0


@dataclass
class Reader:
    """Somebody who types what a page says."""

    stage: Stage
    page: str
    blocks: list[Block]
    machine: str = "edge-1"

    def types(self) -> Iterator[Wait | None]:
        """Go through the page; yields what is awaited, or None after a block."""
        for block in self.blocks:
            if block.kind == "yaml" or block.run_by is not None:
                continue
            where, code = f"{block.page}:{block.line}", 0
            for step in steps(block):
                if isinstance(step, Wait):
                    yield step
                elif isinstance(step, Script):
                    before, after = event(EVENTS, step.text)
                    before(self.stage)
                    self.run_script(step.text, where)
                    after(self.stage)
                else:
                    code = self.run_shown(step, code, where)
            yield None

    def run_script(self, text: str, where: str) -> None:
        """On a terminal, as a passphrase is asked for."""
        code, printed = on_a_terminal(self.stage.here(text), self.stage.home(self.page), self.environment)
        assert code == 0, f"{where}: ended with {code}:\n{text}\n{printed}"

    def run_shown(self, step: Shown, code: int, where: str) -> int:
        done = subprocess.run(
            ["/bin/bash", "-c", f"(exit {code})\n{self.stage.here(step.command)}"],
            cwd=self.stage.home(self.page),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=STEP_SECONDS,
        )
        printed = self.stage.there(done.stdout)
        assert done.returncode == 0 or step.may_fail, f"{where}: {step.command} ended with {done.returncode}: {printed}"
        if not prints(step.output, printed):  # told at the end, all of them
            self.stage.drifted.append(f"{where}: {step.command} printed\n{printed}\ninstead of\n{step.output}")
        return done.returncode

    @property
    def environment(self) -> dict[str, str]:
        return self.stage.environment(self.machine)


def on_a_terminal(script: str, folder: Path, environment: Mapping[str, str]) -> tuple[int, str]:
    """Run a script on a terminal of its own; whoever asks for a passphrase gets it."""
    pid, terminal = pty.fork()
    if pid == 0:
        try:
            os.chdir(folder)
            os.execve("/bin/bash", ["bash", "-euo", "pipefail", "-c", script], dict(environment))
        finally:
            os._exit(127)
    shown, waiting = b"", b""
    deadline = time.monotonic() + STEP_SECONDS
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 1)[0]:
            continue
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # EIO: the other side has gone
            break
        shown, waiting = shown + piece, waiting + piece
        if waiting.endswith((b"Passphrase: ", b"Repeat for confirmation: ")):
            os.write(terminal, PASSPHRASE)
            waiting = b""
    else:
        os.kill(pid, 9)
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), shown.decode(errors="replace")


# --- what happens beside the pages, and what they claim ---------------------------------------------------------------


def nothing(_stage: Stage) -> None:
    pass


def boots_another_kernel(stage: Stage) -> None:
    assert stage.starts()
    stage.tpm.extend(9, "another kernel and initrd")
    assert not stage.starts()


def must_start(stage: Stage) -> None:
    assert stage.starts()


def must_not_start(stage: Stage) -> None:
    assert not stage.starts()


Event = tuple[Callable[[Stage], None], Callable[[Stage], None]]
#: Before and after the script that has these words.
EVENTS: dict[str, Event] = {
    "sczctl boot-policy measure": (boots_another_kernel, nothing),
    "sczctl add usb/boot-policy-2.json": (must_not_start, must_start),
    "sczctl add usb/revoked/edge-1": (must_start, must_start),
    "sczctl add usb/renewed.jwt": (must_start, must_start),
    "sczctl uninstall --engine podman": (must_start, must_not_start),
}


def event(events: Mapping[str, Event], script: str) -> Event:
    found = [pair for words, pair in events.items() if words in script]
    assert len(found) <= 1, script
    return found[0] if found else (nothing, nothing)


# --- the tests --------------------------------------------------------------------------------------------------------


def test_the_three_pages_tell_one_story_and_every_command_runs() -> None:
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="scz-pages.", dir="/var/tmp"))
        stack.callback(shutil.rmtree, folder)
        stage = Stage(folder, stack)
        readers = [Reader(stage, page, load(ROOT / "docs" / page)) for page in PAGES]
        readers.append(Reader(stage, "second", blocks("second", SECOND), "edge-2"))
        scripts = "".join(block.text for reader in readers for block in reader.blocks)
        assert all(words in scripts for words in EVENTS)
        play(stage, readers)
        assert not stage.drifted, "\n\n".join(stage.drifted)
        assert list(stage.hooks.iterdir()) == []


def play(stage: Stage, readers: list[Reader]) -> None:
    """Let the first reader who can go on finish a block, again and again, until all pages are at their end."""
    going = {reader.page: reader.types() for reader in readers}
    waiting: dict[str, Path] = {}
    while going:
        ready = [page for page in going if page not in waiting or waiting[page].exists()]
        assert ready, f"nobody can go on: {waiting}"
        page = ready[0]
        waiting.pop(page, None)
        try:
            awaited = next(going[page])
        except StopIteration:
            del going[page]
            continue
        if awaited is not None:
            waiting[page] = stage.home(page) / stage.here(awaited.path)


@pytest.mark.parametrize("page", PAGES)
def test_a_block_that_does_not_run_says_so_and_names_a_test_that_is_there(page: str) -> None:
    found = {b.text.splitlines()[0]: b.run_by for b in load(ROOT / "docs" / page) if b.run_by is not None}
    assert found.items() <= NOT_RUN.items()
    assert all((ROOT / test).is_file() for test in found.values())


def test_every_block_that_does_not_run_is_known_here() -> None:
    noted = [b.text.splitlines()[0] for page in PAGES for b in load(ROOT / "docs" / page) if b.run_by is not None]
    assert sorted(noted) == sorted(NOT_RUN)


def test_commands_in_the_text_exist() -> None:
    texts = "".join((ROOT / "docs" / page).read_text() for page in PAGES)
    named = re.findall(r"`sczctl ([^`]+)`", re.sub(r"^```.*?^```$", "", texts, flags=re.MULTILINE | re.DOTALL))
    assert len(named) >= 15
    for words in map(str.split, named):
        command: click.Command = cli
        while isinstance(command, click.Group):
            found = command.get_command(click.Context(command), words.pop(0))
            assert found is not None, named
            command = found
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= options, (command.name, words)


def test_the_annotations_of_the_deployment_are_ours() -> None:
    (text,) = [block.text for block in load(ROOT / "docs" / "developer.md") if block.kind == "yaml"]
    annotations = dict(re.findall(r"^ +(smm\.scz/\S+): (\S+)$", text, re.MULTILINE))
    assert has_ours(annotations)
    (model,) = parse_requests(annotations).models
    assert (str(model.reference), model.destination) == ("minilm:1", "/models/minilm")


# --- what would let a page drift --------------------------------------------------------------------------------------


def test_what_is_printed_is_compared_line_by_line() -> None:
    assert prints("a … c\n…\nend", "a b c\nx\ny\nend\n")
    assert prints("a … c\n…\nend", "a b c\nend\n")
    assert not prints("a … c\nend", "a b c\nx\nend\n")
    assert not prints("a", "a\nmore\n")
    assert not prints("a\nb", "a\n")
    assert not prints("a.c", "abc\n")


def test_a_page_that_cannot_be_read_is_no_page() -> None:
    for text in ("```python\nx\n```\n", "```sh\nx\n", " ```sh\nx\n```\n"):
        with pytest.raises(ValueError, match="page"):
            blocks("page", text)
    with pytest.raises(ValueError, match="begins with its command"):
        steps(blocks("page", "```console\nprinted\n```\n")[0])


def test_a_note_belongs_to_the_block_before_it() -> None:
    text = "```sh\na\n```\n\n*(Not run with this page, but so: `tests/x.py`.)*\n\n```sh\nb\n```\n"
    assert [block.run_by for block in blocks("page", text)] == ["tests/x.py", None]


def test_a_reader_waits_where_the_page_says() -> None:
    text = "```sh\n# wait for usb/a (owner)\nb \\\n  c\n# wait for d\n```\n"
    assert steps(blocks("page", text)[0]) == [Wait("usb/a"), Script("b \\\n  c"), Wait("d")]
