"""`config/systemd`, `sysusers.d`, `tmpfiles.d`: what systemd's own programs say of them, and that their commands work.

No systemd runs here: `systemd-analyze verify` loads the units as it would, in a root of their own; the sandboxing lines
are parsed, not applied.
"""

from __future__ import annotations

import configparser
import grp
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.commands import Household, done

CONFIG = Path(__file__).resolve().parents[2] / "config"
UNITS = sorted(path.name for path in (CONFIG / "systemd").iterdir())
UNMOUNTS = ("scz-smm-sweep.service", "scz-smm-metrics.service", "scz-nri.service")
"""They work in the host's own mount namespace."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root directory with systemd's own units, ours, and something at /usr/bin/sczctl."""
    made = tmp_path / "root"
    shutil.copytree("/lib/systemd/system", made / "usr/lib/systemd/system", symlinks=True)
    for name in UNITS:
        shutil.copy(CONFIG / "systemd" / name, made / "usr/lib/systemd/system")
    (made / "lib").symlink_to("usr/lib")
    (made / "usr/bin").mkdir(parents=True)
    for name in ("sczctl", "scz-nri"):
        shutil.copy("/bin/true", made / "usr/bin" / name)
    (made / "etc").mkdir()
    (made / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\n")
    (made / "etc/group").write_text("root:x:0:\n")
    return made


def run(*words: str | Path) -> tuple[int, str]:
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
    ran = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=60)
    return ran.returncode, ran.stdout + ran.stderr


def verify(root: Path, name: str) -> tuple[int, str]:
    return run("systemd-analyze", "verify", f"--root={root}", "--man=no", name)


@pytest.mark.parametrize("name", UNITS)
def test_systemd_takes_every_unit(root: Path, name: str) -> None:
    code, said = verify(root, name.replace("@.", "@shop."))
    assert (code, [line for line in said.splitlines() if "scz-smm" in line]) == (0, [])


@pytest.mark.parametrize(
    ("old", "new"), [("/usr/bin/sczctl", "/usr/bin/other"), ("NoNewPrivileges=yes", "NoNewPrivilege=yes")]
)
def test_systemd_would_say_what_is_wrong(root: Path, old: str, new: str) -> None:
    unit = root / "usr/lib/systemd/system/scz-smm-sweep.service"
    unit.write_text(unit.read_text().replace(old, new))
    assert "scz-smm-sweep.service" in verify(root, unit.name)[1]


def service(name: str) -> configparser.SectionProxy:
    """Its section, keys as they are written."""
    parser = configparser.RawConfigParser(strict=False, delimiters="=")
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(CONFIG / "systemd" / name)
    return parser["Service"]


@pytest.mark.parametrize("name", UNMOUNTS)
def test_what_works_on_the_hosts_mounts_gets_no_others(name: str) -> None:
    prefixes = ("Private", "Protect", "ReadOnly", "ReadWrite", "Inaccessible", "Bind", "Temporary", "Root", "Dynamic")
    assert [key for key in service(name) if key.startswith((*prefixes, "RestrictNamespaces", "StateDirectory"))] == []


def test_every_command_is_one_that_sczctl_has(tmp_path: Path) -> None:
    house = Household(tmp_path)
    done(house.ctl("token", "init", "--issuer", "https://host.example/scz", "-o", house.host / "issuer.json"))
    (house.host / "log").mkdir(mode=0o700)
    output = house.host / "token"
    values = dict(word.split("=", 1) for word in service("scz-smm-token@.service")["Environment"].split())
    values |= {"SUBJECT": "system:serviceaccount:shop:a b", "OUTPUT": str(output)}
    for name in [name for name in UNITS if name.endswith(".service") and name != "scz-nri.service"]:
        words = shlex.split(service(name)["ExecStart"])
        assert words[0] == "/usr/bin/sczctl"
        for key, value in values.items():
            words = [word.replace(f"${{{key}}}", value) for word in words]  # one argument each, as systemd does
        words = [word.replace("/var/lib/prometheus/node-exporter", str(house.host)) for word in words]
        words = [grp.getgrgid(0).gr_name if word == "scz-smm" and words[1] == "metrics" else word for word in words]
        for _ in range(2):  # a timer comes again
            done(house.ctl(*words[1:]))
    assert output.stat().st_mode & 0o777 == 0o600
    assert (house.host / "scz-smm.prom").is_file()


def test_the_plugins_service() -> None:
    found = service("scz-nri.service")
    assert (found["ExecStart"], found["Restart"]) == ("/usr/bin/scz-nri", "always")
    # The models' memory is charged to it, and its children are to end what they do.
    assert [key for key in found if key.startswith(("Memory", "Tasks", "RuntimeMax"))] == []
    assert found["KillMode"] == "mixed"
    assert found["Type"] == "notify"  # `test_nri_main` has when it is told


def test_the_kubelet_starts_after_the_engine_let_the_plugin_in() -> None:
    parser = configparser.RawConfigParser(strict=False)
    parser.read(CONFIG / "systemd/scz-nri.service")
    assert parser["Unit"]["Before"] == "kubelet.service"
    assert "containerd.service" in parser["Unit"]["After"].split()


def test_the_group(root: Path) -> None:
    assert run("systemd-sysusers", f"--root={root}", CONFIG / "sysusers.d/scz-smm.conf")[0] == 0
    names = [line.split(":")[0] for line in (root / "etc/group").read_text().splitlines()]
    assert names == ["root", "scz-smm"]
    assert [line.split(":")[0] for line in (root / "etc/passwd").read_text().splitlines()] == ["root"]


def test_the_directories(root: Path) -> None:
    for _ in range(2):
        code, said = run("systemd-tmpfiles", f"--root={root}", "--create", CONFIG / "tmpfiles.d/scz-smm.conf")
        assert (code, said) == (0, "")
    modes = {name: (root / name).stat() for name in ("run/scz-smm", "var/lib/scz-smm", "var/log/scz-smm")}
    assert {name: (found.st_mode & 0o777, found.st_uid) for name, found in modes.items()} == dict.fromkeys(
        modes, (0o700, 0)
    )
    kept = root / "run/scz-smm/kept"
    kept.touch()
    os.utime(kept, (1, 1))
    code, _ = run("systemd-tmpfiles", f"--root={root}", "--clean", CONFIG / "tmpfiles.d/scz-smm.conf")
    assert (code, kept.exists()) == (0, True)


def test_a_token_is_renewed_before_it_is_half_gone() -> None:
    timer = (CONFIG / "systemd" / "scz-smm-token@.timer").read_text()
    every = re.search(r"^OnUnitActiveSec=(\S+)$", timer, re.MULTILINE)
    assert every is not None
    code, said = run("systemd-analyze", "timespan", every[1])
    microseconds = re.search(r"[uμ]s: ([0-9]+)", said)
    assert microseconds is not None, (code, said)
    service = (CONFIG / "systemd" / "scz-smm-token@.service").read_text()
    lifetime = re.search(r"^Environment=.*\bTTL=([0-9]+)$", service, re.MULTILINE)
    assert lifetime is not None
    assert 2 * int(microseconds[1]) <= int(lifetime[1]) * 1_000_000
