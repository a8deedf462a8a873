"""A real verifier of Keylime (PyPI), on loopback, with TLS by a test's CA; what it needs is pinned by hash.

The package declares no dependencies, ships no configuration and imports `gpg`, which is Debian's and not on the index:
an empty module stands in for that, as nothing here checks a GPG signature. The verifier runs in process and mount
namespaces of its own, so that its sockets below /run and all its workers are gone with it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from oci_hook.https_request import Server
from tests.tls_servers import Authority

LOCK = Path(__file__).with_name("requirements-keylime.lock")
KEPT = Path(__file__).parents[1] / "build" / "keylime"
_INSTALL_SECONDS, _START_SECONDS = 600, 120

_VERIFIER = """[verifier]
version = 2.5
uuid = default
mode = pull
ip = 127.0.0.1
port = {port}
registrar_ip = 127.0.0.1
registrar_port = 1
enable_agent_mtls = True
tls_dir = {tls}
server_cert = {server_cert}
server_key = {server_key}
server_key_password =
trusted_client_ca = ["{ca}"]
client_cert = {server_cert}
client_key = {server_key}
client_key_password =
trusted_server_ca = ["{ca}"]
database_url = sqlite
database_pool_sz_ovfl = 5,10
auto_migrate_db = True
num_workers = 1
exponential_backoff = True
retry_interval = 2
max_retries = 5
request_timeout = 60.0
quote_interval = 2
max_upload_size = 104857600
require_allow_list_signatures = False
measured_boot_policy_name = accept-all
measured_boot_imports = []
measured_boot_evaluate = once
severity_labels = ["info", "notice", "warning", "error", "critical", "alert", "emergency"]
severity_policy = [{{"event_id": ".*", "severity_label": "emergency"}}]
ignore_tomtou_errors = False
durable_attestation_import =

[revocations]
enabled_revocation_notifications = []
zmq_ip = 127.0.0.1
zmq_port = 1
webhook_url =
"""
_LOGGING = """[loggers]
keys = root
[handlers]
keys = console
[formatters]
keys = plain
[formatter_plain]
format = %(name)s %(levelname)s %(message)s
[logger_root]
level = INFO
handlers = console
[handler_console]
class = StreamHandler
level = INFO
formatter = plain
args = (sys.stdout,)
"""


def installed() -> Path:
    """The folder with Keylime and what it imports; downloaded the first time, complete or not there at all."""
    if not KEPT.exists():
        KEPT.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".keylime-", dir=KEPT.parent))
        try:
            command = [sys.executable, "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "--requirement", str(LOCK)]
            command += ["--target", str(unfinished)]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=_INSTALL_SECONDS)
            (unfinished / "gpg.py").touch()
            with contextlib.suppress(OSError):  # another test was faster
                unfinished.rename(KEPT)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return KEPT


@contextlib.contextmanager
def keylime_verifier(folder: Path, authority: Authority) -> Iterator[Server]:
    """Start one with its state below `folder`; the value is how to ask it."""
    issued = authority.issue("127.0.0.1", file="keylime")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    files = {"tls": authority.folder, "ca": authority.file.name}
    names = {"server_cert": issued.certificate.name, "server_key": issued.key.name}
    (folder / "verifier.conf").write_text(_VERIFIER.format(port=port, **files, **names))
    (folder / "logging.conf").write_text(_LOGGING)
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(installed()),
        "PYTHONDONTWRITEBYTECODE": "1",
        "KEYLIME_DIR": str(folder),
        "KEYLIME_VERIFIER_CONFIG": str(folder / "verifier.conf"),
        "KEYLIME_LOGGING_CONFIG": str(folder / "logging.conf"),
    }
    script = f"mount -t tmpfs tmpfs /run && exec {sys.executable} -s -m keylime.cmd.verifier"
    command = ["/usr/bin/setpriv", "--pdeathsig", "KILL", "/usr/bin/unshare", "--mount", "--pid", "--fork"]
    command += ["--kill-child", "--mount-proc", "/bin/sh", "-c", script]
    log = folder / "verifier.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        _wait(process, port, log)
        yield Server(f"https://127.0.0.1:{port}", authority.pem)
    finally:
        process.kill()
        process.wait()


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until = time.monotonic() + _START_SECONDS
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"Keylime's verifier did not start:\n{log.read_text(errors='replace')[-4000:]}")
        time.sleep(0.1)
