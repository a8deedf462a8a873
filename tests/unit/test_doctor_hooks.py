"""`cli.checks.hooks` and `shims`: what each engine really reads, a second copy, files that lead nowhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from oci_hook.cli.checks.hooks import our_hooks, read_directories
from oci_hook.cli.checks.shims import check_shims
from oci_hook.engines.crio import OWN_DIRECTORY
from oci_hook.engines.hooks_directory import DEFAULT_DIRECTORY
from oci_hook.engines.plan import HostFiles
from tests.commands import done, sczctl
from tests.unit.test_cli_doctor import Host, make_host

OVERRIDE = "/etc/containers/oci/hooks.d"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    made = make_host(tmp_path)
    made.has("podman", "runc", "crun")
    return made


def write(host: Host, path: str, text: str) -> Path:
    real = host.root / path.lstrip("/")
    real.parent.mkdir(parents=True, exist_ok=True)
    real.write_text(text)
    return real


def changed(file: Path, **members: Any) -> None:
    """Change members of a hook file's `hook`."""
    document = json.loads(file.read_text())
    document["hook"].update(members)
    file.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("files", "podman"),
    [
        ({}, [DEFAULT_DIRECTORY]),
        ({"/etc/containers/containers.conf": '[engine]\nhooks_dir = ["/a"]'}, ["/a"]),
        (
            {
                "/usr/share/containers/containers.conf": '[engine]\nhooks_dir = ["/u"]',
                "/etc/containers/containers.conf.d/10.conf": '[engine]\nhooks_dir = ["/a", "/b/"]',
                "/etc/containers/containers.conf.d/20.toml": '[engine]\nhooks_dir = ["/no"]',
            },
            ["/a", "/b"],
        ),
        (
            {"/etc/containers/containers.conf.d/10.conf": '[engine]\nhooks_dir = ["/a", {append=true}]'},
            [DEFAULT_DIRECTORY, "/a"],
        ),
        ({"/etc/containers/containers.conf": "[engine]\nhooks_dir = []"}, []),
    ],
)
def test_what_podman_reads(host: Host, files: dict[str, str], podman: list[str]) -> None:
    for path, text in files.items():
        write(host, path, text)
    assert read_directories("podman", HostFiles(str(host.root))) == podman
    assert read_directories("cri-o", HostFiles(str(host.root))) == [DEFAULT_DIRECTORY]
    assert f"reads {', '.join(podman) or 'no directory at all'}: " in host.lines("hooks podman", "ok")[0][0]


def test_what_cri_o_reads(host: Host) -> None:
    write(host, "/etc/crio/crio.conf", '[crio.runtime]\nhooks_dir = ["/a"]')
    assert read_directories("cri-o", HostFiles(str(host.root))) == ["/a"]
    write(host, "/etc/crio/crio.conf.d/10-x", '[crio.runtime]\nhooks_dir = ["/b", "/c"]')
    assert read_directories("cri-o", HostFiles(str(host.root))) == ["/b", "/c"]


def test_a_second_copy_of_another_name_runs_twice(host: Host) -> None:
    host.install("podman")
    assert host.lines("hooks podman", "warn") == []
    own = host.root / DEFAULT_DIRECTORY.lstrip("/") / "scz-smm-prestart.json"
    write(host, f"{DEFAULT_DIRECTORY}/a-copy.json", own.read_text())
    ((message, remedy),) = host.lines("hooks podman", "warn")
    assert "runs twice" in message
    assert remedy == f"rm {DEFAULT_DIRECTORY}/a-copy.json"


def test_a_second_copy_in_another_directory(host: Host) -> None:
    host.install("podman")
    own = host.root / DEFAULT_DIRECTORY.lstrip("/") / "scz-smm-prestart.json"
    write(host, "/etc/containers/containers.conf", f'[engine]\nhooks_dir = ["{DEFAULT_DIRECTORY}", "/more"]')
    copy = write(host, "/more/scz-smm-prestart.json", own.read_text())
    assert host.lines("hooks podman", "warn") == []  # of one name and the same: one hook
    changed(copy, timeout=20)
    ((message, remedy),) = host.lines("hooks podman", "warn")
    assert "is hidden by /more/scz-smm-prestart.json" in message
    assert remedy == f"rm {DEFAULT_DIRECTORY}/scz-smm-prestart.json"
    assert "20 s" in host.lines("hook timeout podman", "ok")[0][0]  # the last directory's is the hook


def test_podmans_file_where_cri_o_reads_it(host: Host) -> None:
    host.has("crio")
    host.install("podman")
    messages = host.lines("hooks cri-o", "warn")
    assert len(messages) == 2
    assert all("calls as podman, and cri-o reads it" in message for message, _ in messages)
    assert {remedy for _, remedy in messages} == {"sczctl install --engine cri-o"}
    host.install("cri-o")
    assert host.lines("hooks cri-o", "warn") == []  # its own files of the same names go before
    ok = [host.lines(f"hooks {engine}", "ok")[0][0] for engine in ("podman", "cri-o")]
    assert OWN_DIRECTORY not in ok[0]
    assert f"reads {DEFAULT_DIRECTORY}, {OWN_DIRECTORY}: " in ok[1]


def test_cri_os_file_where_podman_reads_it(host: Host) -> None:
    host.has("crio")
    host.install("cri-o")
    write(host, "/etc/containers/containers.conf", f'[engine]\nhooks_dir = ["{OWN_DIRECTORY}"]')
    messages = host.lines("hooks podman", "fail")
    assert len(messages) == 2
    assert all("podman's users can write its annotations" in message for message, _ in messages)


def test_two_engines_with_different_directories(host: Host) -> None:
    host.has("crio")
    host.install("podman", "--hooks-dir", OVERRIDE)
    write(host, "/etc/crio/crio.conf", f'[crio.runtime]\nhooks_dir = ["{OVERRIDE}"]')
    messages = host.lines("hooks podman", "fail")
    assert len(messages) == 2
    for message, remedy in messages:
        assert f"meant for podman, which does not read {OVERRIDE}" in message
        assert f"podman reads {DEFAULT_DIRECTORY}; cri-o reads {OVERRIDE}" in message
        assert "sczctl install --engine podman" in remedy


def test_a_directory_of_the_administrators_choice(host: Host) -> None:
    host.install("podman", "--hooks-dir", OVERRIDE)
    assert host.check("engine podman")[0] == "warn"
    write(host, "/etc/containers/containers.conf.d/50.conf", f'[engine]\nhooks_dir = ["{OVERRIDE}"]')
    assert host.check("engine podman")[0] == "ok"
    assert "engines" not in host.doctor()


def test_a_file_that_leads_nowhere_or_elsewhere(host: Host, tmp_path: Path) -> None:
    host.install("podman")
    path = f"{DEFAULT_DIRECTORY}/scz-smm-prestart.json"
    own, name = host.root / path.lstrip("/"), f"hook {path}"
    document = own.read_text()
    assert name not in host.doctor()
    changed(own, path="/usr/bin/python9")
    assert "its interpreter /usr/bin/python9 is not there" in host.check(name)[1]
    arguments = json.loads(document)["hook"]["args"]
    gone = ["/usr/bin/python3", "-I", "-S", "/usr/lib/scz-smm/oci_hook/launch.py", *arguments[4:]]
    own.write_text(document)
    changed(own, args=gone)
    status, message, remedy = host.check(name)
    assert (status, "launch.py is not there" in message, "scz-smm again" in remedy) == ("fail", True, True)
    write(host, "/usr/lib/scz-smm/oci_hook/launch.py", "")
    write(host, "/usr/lib/scz-smm/oci_hook/__init__.py", '"""x"""\n\n__version__ = "99.1"\n')
    status, message, _ = host.check(name)
    assert (status, "it starts version 99.1" in message) == ("fail", True)


def test_a_file_that_others_can_write(host: Host) -> None:
    host.install("podman")
    path = f"{DEFAULT_DIRECTORY}/scz-smm-prestart.json"
    (host.root / path.lstrip("/")).chmod(0o666)
    status, message, remedy = host.check(f"hook {path}")
    assert (status, "others than root" in message) == ("fail", True)
    assert remedy == f"chown root: {path} && chmod go-w {path}"
    (host.root / path.lstrip("/")).chmod(0o644)
    os.chown(host.root / DEFAULT_DIRECTORY.lstrip("/"), 1000, 1000)
    assert host.doctor()[f"hook {path}"][0]["message"].startswith(f"{DEFAULT_DIRECTORY} can be changed")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"hook": 1}', "\xff", "[" * 100_000])
def test_what_is_no_hook_breaks_the_directory(host: Host, text: str) -> None:
    write(host, f"{DEFAULT_DIRECTORY}/x.json", "")
    (host.root / DEFAULT_DIRECTORY.lstrip("/") / "x.json").write_bytes(text.encode("latin-1"))
    status, message, remedy = host.check(f"hook {DEFAULT_DIRECTORY}/x.json")
    assert (status, "reads no hook" in message, "x.json" in remedy) == ("warn", True, True)


def test_other_peoples_hooks_are_left_alone(host: Host) -> None:
    write(host, f"{DEFAULT_DIRECTORY}/x.json", json.dumps({"version": "1.0.0", "hook": {"path": "/x"}, "stages": []}))
    write(host, f"{DEFAULT_DIRECTORY}/README", "?")
    assert our_hooks(DEFAULT_DIRECTORY, HostFiles(str(host.root))) == ([], [])


def test_the_time_for_the_largest_model(host: Host) -> None:
    done(host.ctl("add", host.prepared()))
    host.install("podman", "--timeout", "10")
    (found,) = host.doctor()["hook timeout podman"]
    assert (found["status"], "may need 11 s" in found["message"]) == ("warn", True)
    assert found["remedy"] == "`sczctl install --engine podman --timeout 11`"
    host.install("podman", "--timeout", "11")
    assert host.doctor()["hook timeout podman"][0]["status"] == "ok"
    own = host.root / DEFAULT_DIRECTORY.lstrip("/") / "scz-smm-prestart.json"
    changed(own, timeout=None)
    assert "for ever" in host.lines("hook timeout podman", "warn")[0][0]


def test_the_time_of_devices_and_of_the_shim(host: Host) -> None:
    host.has("dockerd")
    host.install("docker")
    done(host.ctl("add", host.prepared()))
    assert host.check("hook timeout docker")[1].startswith("300 s; minilm:1 may need 11 s")
    done(host.ctl("cdi", "generate", "--all", "--timeout", "10", "-o", host.root / "etc/cdi/scz-smm.json"))
    status, message, remedy = host.check("hook timeout CDI")
    assert (status, message[:5], remedy) == ("warn", "10 s;", "`sczctl cdi generate --all --timeout 11`")


# --- the shim and NRI -------------------------------------------------------------------------------------------------


def test_a_script_whose_runtime_has_gone(host: Host) -> None:
    host.has("dockerd", "containerd")
    host.install("docker")
    assert [each["status"] for each in host.doctor()["shim docker"]] == ["ok"]
    (host.root / "usr/bin/crun").unlink()
    status, message, remedy = host.check("shim docker")
    assert (status, "scz-crun: its runtime /usr/bin/crun has gone" in message) == ("fail", True)
    assert remedy == "`sczctl install --engine docker`"
    script = host.root / "usr/local/libexec/scz-smm/docker/scz-runc"
    script.write_text(script.read_text().replace("#!/", "#!/gone/", 1))
    assert "its interpreter /gone/" in host.check("shim docker")[1]


@pytest.mark.parametrize("text", ["", "#!/x\nruntime='", "sys.path.append(1)", "sys.path.append([[)\nruntime='/x'"])
def test_a_script_that_is_none(host: Host, text: str) -> None:
    write(host, "/usr/local/libexec/scz-smm/containerd/scz-runc", text)
    (found,) = check_shims(HostFiles(str(host.root)))
    assert (found.status, "it names no" in found.message) == ("fail", True)


def test_hostile_names_stay_one_line(host: Host) -> None:
    write(host, f"{DEFAULT_DIRECTORY}/a\x1b[2J\nx.json", "{")
    told = sczctl("--config", host.config, "doctor", "--root", host.root)
    assert "\x1b" not in told.out
    assert not [line for line in told.out.splitlines() if line.startswith("x.json")]
