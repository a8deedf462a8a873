"""Two keys to open, whole: a container under podman whose model needs the TPM's share and a real OpenBao's.

The set-up is what docs/broker.md says. Each refusal ends the container before its first act and leaves nothing.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from oci_hook.audit import AuditLog
from tests.integration.conftest import FILES
from tests.integration.test_start import craft_token, hook_processes, model_mounts, refused, start, tpm_handles
from tests.openbao import OPEN, OpenBaoServer, bao_program
from tests.pages import load
from tests.rogue_broker import RogueBroker, answer
from tests.scene import AUDIENCE, ISSUER, SCZCTL, SUBJECT, TOKEN_PATH, Scene
from tests.tls import TestAuthority

KEY, ROLE = "models", "recommender"
MODEL = "guarded"


class Guarded:
    """A scene with a model that needs a broker, and the broker."""

    def __init__(self, scene: Scene, server: OpenBaoServer) -> None:
        self.scene, self.server = scene, server
        self.configure()

    def configure(self, address: str = "", ca_file: Path | None = None, seconds: int = 20) -> None:
        """Write the host's configuration, with the server as its broker if no other is named."""
        address, ca_file = address or self.server.address, ca_file or self.server.ca_file
        lines = f'address = "{address}"\nca_file = "{ca_file}"\ntimeout_seconds = {seconds}'
        self.scene.write_config(broker=f"[broker]\n{lines}")

    def grant_words(self, output: Path) -> list[str | Path]:
        """The words of the owner's grant."""
        broker: list[str | Path] = ["--broker", self.server.address, "--broker-ca", self.server.ca_file]
        broker += ["--broker-key", KEY, "--broker-role", ROLE]
        keys = self.scene.owner / "keys"
        return ["grant", f"{MODEL}:1", "--keys", keys, "--device", "edge-1", *broker, "-o", output]

    def grant(self, words: Sequence[str | Path], token: str | None = None) -> subprocess.CompletedProcess[str]:
        """Grant as the owner does: the token is in the environment."""
        environment = {**self.server.environment(token or self.server.owner_token()), "PATH": os.environ["PATH"]}
        command = [*SCZCTL, "--config", str(self.scene.config), *map(str, words)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    def refused(self, reason: str, *words: str, token: Path | None = None) -> None:
        """Check a refusal, that it is told, and that neither token nor share is."""
        own = token or self.scene.token()
        attempt = refused(self.scene, reason, own, model=f"{MODEL}:1")
        said = json.dumps(attempt.why) + attempt.stderr + self.scene.audit.read_text()
        for word in words:
            assert word in said, (word, attempt)
        for secret in (own.read_text().strip(), own.read_text().strip().split(".")[2], "vault:v"):
            assert secret not in said
        assert len(str(attempt.why["remedy"])) > 20

    def opens(self) -> None:
        """Check that a container reads the model."""
        token = self.scene.token()
        attempt = start(self.scene, token, model=f"{MODEL}:1", command=f"cd /models/{MODEL} && cat config.json | wc -c")
        assert (attempt.returncode, attempt.stdout.strip()) == (0, str(FILES["config.json"])), attempt


@pytest.fixture(scope="module")
def guarded(model_source: Path) -> Iterator[Guarded]:
    folder = Path(tempfile.mkdtemp(prefix="scz-test.", dir="/var/tmp"))
    folder.chmod(0o711)
    try:
        (folder / "bao").mkdir()
        with OpenBaoServer(folder / "bao") as server, Scene(folder) as scene:
            made = Guarded(scene, server)
            scene.tpm.measure_boot()
            scene.keygen()
            scene.enrol()
            out = scene.pack(model_source, name=MODEL, extra=("--broker",))
            scene.trust()
            issuer_key = scene.store / "issuer" / "issuer.key"
            public = ["openssl", "pkey", "-in", str(issuer_key), "-pubout"]
            pem = subprocess.run(public, capture_output=True, text=True, check=True).stdout
            server.set_up(pem, issuer=ISSUER, subject=SUBJECT, audience=AUDIENCE, key=KEY, role=ROLE)
            done = made.grant(made.grant_words(out / "grant.jwt"))
            assert done.returncode == 0, done.stderr
            sign = ["boot-policy", "sign", "--keys", scene.owner / "keys", "--model", MODEL, "--device", "edge-1"]
            scene.sczctl(*sign, "--pcr", "4,7,8,9", "-o", out / "boot-policy.json")
            scene.add(out)
            scene.install()
            scene.image = scene.podman.busybox_image()
            yield made
    finally:
        shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def as_configured(guarded: Guarded) -> Iterator[None]:
    guarded.configure()
    yield
    guarded.configure()


def test_both_shares_open_the_model(guarded: Guarded) -> None:
    accessors = guarded.server.accessors()
    guarded.opens()
    assert guarded.server.accessors() <= accessors
    assert tpm_handles(guarded.scene) == ""
    assert [each["event"] for each in AuditLog(str(guarded.scene.audit)).records()][-1] == "closed"


def test_a_policy_that_the_broker_takes_away(guarded: Guarded) -> None:
    guarded.server.bao("policy", "delete", "models-open")
    guarded.refused("BrokerRefused", "policy does not allow", "docs/broker.md")
    guarded.server.bao("policy", "write", "models-open", "-", data=OPEN.replace("KEY", KEY))
    guarded.opens()


def test_a_broker_that_is_sealed_hangs_or_is_down(guarded: Guarded) -> None:
    guarded.server.seal()
    guarded.refused("BrokerUnavailable", "is sealed")
    checks = json.loads(guarded.scene.sczctl("doctor", "--json", check=False).stdout)["checks"]
    assert [each["status"] for each in checks if each["name"] == "broker"] == ["fail"]
    guarded.server.unseal()
    guarded.configure(seconds=1)
    guarded.server.pause()
    try:
        guarded.refused("BrokerUnavailable", "did not answer")
    finally:
        guarded.server.resume()
    guarded.configure(address="https://127.0.0.1:1")
    guarded.refused("BrokerUnavailable", "cannot be reached")
    guarded.configure()
    guarded.opens()


def test_a_workload_that_the_role_does_not_name(guarded: Guarded) -> None:
    """Its token satisfies the owner's access policy, and not the broker's role."""
    guarded.server.write_role(ROLE, subject="system:serviceaccount:shop:other")
    guarded.refused("BrokerRefused", "bound subject")
    guarded.server.write_role(ROLE, subject=SUBJECT)
    guarded.opens()


def test_an_expired_token_does_not_reach_the_broker(guarded: Guarded) -> None:
    guarded.refused("TokenExpired", token=craft_token(guarded.scene, iat=1_700_000_000, exp=1_700_000_600))


def test_no_fallback_to_one_share(guarded: Guarded) -> None:
    """Without [broker], or with a share that is another one, the TPM's alone opens nothing."""
    guarded.scene.write_config()
    guarded.refused("ConfigInvalid", "names no broker")
    login = answer(b'{"auth": {"client_token": "abcdef", "num_uses": 1}}')
    wrong = answer(b'{"data": {"plaintext": "' + b"A" * 43 + b'="}}')
    authority = TestAuthority()
    folder = guarded.scene.host / "rogue"
    folder.mkdir()
    (folder / "ca.pem").write_bytes(authority.certificate)
    with RogueBroker(
        folder, lambda path, _body: [login if path.endswith("/login") else wrong], authority=authority
    ) as rogue:
        guarded.configure(rogue.address, folder / "ca.pem")
        guarded.refused("BrokerRefused", "another one")
    with RogueBroker(folder, lambda _path, _body: [answer(b" " * 99999)], authority=authority) as rogue:
        guarded.configure(rogue.address, folder / "ca.pem")
        guarded.refused("BrokerUnavailable", "more than")


def test_a_hook_that_is_killed_while_the_broker_hangs(guarded: Guarded) -> None:
    scene, authority = guarded.scene, TestAuthority()
    folder = scene.host / "hanging"
    folder.mkdir()
    (folder / "ca.pem").write_bytes(authority.certificate)

    def silent(_path: str, _body: bytes) -> Iterator[bytes]:
        time.sleep(600)
        yield b""

    with RogueBroker(folder, silent, authority=authority) as rogue:
        guarded.configure(rogue.address, folder / "ca.pem", seconds=300)
        words = ["--rm", "--annotation", f"smm.scz/model={MODEL}:1", "--volume", f"{scene.token()}:{TOKEN_PATH}:ro"]
        process = scene.podman.spawn([*words, scene.image, "echo", "it runs"])
        try:
            until = time.monotonic() + 60
            while not rogue.requests and time.monotonic() < until:
                time.sleep(0.05)
            assert len(rogue.requests) == 1  # the token is there, and the hook waits
            os.kill(min(hook_processes(scene)), signal.SIGKILL)
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
            process.wait()
        assert process.returncode != 0
        assert "it runs" not in output
        until = time.monotonic() + 20
        while hook_processes(scene) and time.monotonic() < until:
            time.sleep(0.05)
        assert hook_processes(scene) == []
    assert model_mounts(scene) == []
    assert tpm_handles(scene) == ""
    guarded.configure()
    guarded.opens()


# --- the owner's command ----------------------------------------------------------------------------------------------


def test_what_grant_says(guarded: Guarded, tmp_path: Path) -> None:
    done = guarded.grant([*guarded.grant_words(tmp_path / "g.jwt"), "--json"])
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)["broker"]
    assert (said["key"], said["mount"], said["auth"], said["role"]) == (KEY, "transit", "auth/jwt", ROLE)
    shown = guarded.scene.sczctl("inspect", tmp_path / "g.jwt", "--json")
    assert json.loads(shown.stdout)["broker"]["share"].startswith("vault:v1:")


def test_grants_that_are_not_made(guarded: Guarded, tmp_path: Path) -> None:
    output = tmp_path / "g.jwt"
    words = guarded.grant_words(output)
    without = [*words[: words.index("--broker")], "-o", output]
    for how, token, code, said in (
        (without, None, 16, "asks for a broker's share"),
        (words, "s.bogus", 57, "policy does not allow"),
        ([*words, "--broker-timeout", "1", "--broker-mount", "none"], None, 57, "HTTP 40"),
        ([*words, "--broker-mount", "../x"], None, 2, "--broker-mount"),
        ([*words, "--broker-token-file", tmp_path / "none"], None, 68, "none"),
    ):
        done = guarded.grant(how, token)
        assert done.returncode == code, done.stderr
        assert said in done.stderr
        assert not output.exists()
    assert "s.bogus" not in done.stderr


def test_a_version_without_a_broker_takes_no_share(guarded: Guarded, model_source: Path, tmp_path: Path) -> None:
    guarded.scene.pack(model_source, name="plain")
    words = ["plain:1" if word == f"{MODEL}:1" else word for word in guarded.grant_words(tmp_path / "g.jwt")]
    done = guarded.grant(words)
    assert (done.returncode, "asks for no broker" in done.stderr) == (16, True)


# --- docs/broker.md, typed --------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "broker.md"


class Typist:
    """Types the page's commands in one folder, with this machine's places."""

    def __init__(self, guarded: Guarded, server: OpenBaoServer, folder: Path, model_source: Path) -> None:
        scene, self._folder, self._server = guarded.scene, folder, server
        (folder / "acme").symlink_to(scene.owner / "keys")
        (folder / "minilm").symlink_to(model_source)
        shutil.copy(server.ca_file, folder / "broker-ca.pem")
        (folder / "usb").mkdir()
        programs = folder / "bin"
        programs.mkdir()
        lines = {
            "sczctl": f'exec {shlex.join(SCZCTL)} --config {scene.config} "$@"',
            "bao": f'exec {shlex.quote(str(bao_program()))} "$@"',
        }
        for name, line in lines.items():
            (programs / name).write_text(f"#!/bin/sh\n{line}\n")
            (programs / name).chmod(0o755)
        self._places = {
            "https://broker.example:8200": server.address,
            "/etc/scz-smm/config.toml": str(scene.config),
            "/etc/scz-smm": str(scene.host),
            "/var/lib/scz-smm": str(scene.store),
        }

    def type(self, script: str) -> None:
        """Run one block."""
        for place, here in self._places.items():
            script = script.replace(place, here)
        environment = {**self._server.environment(), "PATH": f"{self._folder / 'bin'}:/usr/bin:/bin"}
        done = subprocess.run(
            ["/bin/bash", "-euo", "pipefail", "-c", script],
            cwd=self._folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"


def test_the_page_typed(guarded: Guarded, model_source: Path, tmp_path: Path) -> None:
    scene, bao_folder = guarded.scene, tmp_path / "bao"
    bao_folder.mkdir()
    scene.write_config()
    with OpenBaoServer(bao_folder) as server:
        typist = Typist(guarded, server, tmp_path, model_source)
        blocks = [block.text for block in load(PAGE)]
        after = {
            "sczctl add usb\n": True,
            "min_decryption_version=2": False,
            "sczctl add usb/grant-2.jwt": True,
            "allowed_parameters": True,
        }
        seen = []
        for block in blocks:
            typist.type(block)
            for words, opens in after.items():
                if words in block:
                    seen.append(words)
                    if opens:
                        assert start(scene, scene.token(), model="minilm:1").returncode == 0
                    else:
                        refused(scene, "BrokerRefused", scene.token(), model="minilm:1")
        assert seen == list(after)
        checks = json.loads(scene.sczctl("doctor", "--json", check=False).stdout)["checks"]
        assert [each["status"] for each in checks if each["name"] == "broker"] == ["ok"]


# --- last, as the device's counter stays raised -----------------------------------------------------------------------


def test_a_tpm_that_refuses_sends_no_token(guarded: Guarded, model_source: Path) -> None:
    """The TPM's share comes first: a revoked device is no login at the broker."""
    scene = guarded.scene
    authority, folder = TestAuthority(), scene.host / "watching"
    folder.mkdir()
    (folder / "ca.pem").write_bytes(authority.certificate)
    ((_, counter),) = json.loads((scene.store / "device.json").read_text())["counters"].items()
    environment = {"PATH": "/usr/bin:/bin", "TPM2TOOLS_TCTI": scene.tpm.tcti}
    subprocess.run(["tpm2_nvincrement", hex(counter["index"])], env=environment, check=True, capture_output=True)
    for name in ("request.json", "challenge.json", "answer.json"):
        (scene.usb / name).unlink()
    scene.enrol()
    out = scene.pack(model_source, name="other")
    scene.grant(out, name="other")
    scene.add(
        out
    )  # the first grant of an enrolment says that it was accepted: the counter, counted by hand, began there
    with RogueBroker(folder, lambda _path, _body: [answer(b"{}")], authority=authority) as rogue:
        guarded.configure(rogue.address, folder / "ca.pem")
        guarded.refused("Revoked")
        assert rogue.requests == []
    guarded.configure()
    out = scene.usb / "again.jwt"
    done = guarded.grant(guarded.grant_words(out))
    assert done.returncode == 0, done.stderr
    scene.sczctl("add", out)
    guarded.opens()
