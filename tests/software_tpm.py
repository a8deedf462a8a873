"""A software TPM (swtpm) with a certificate authority of its own, for the tests and the demo; it protects nothing.

The TPM is real as far as commands, EK certificate and resets go: what stands in for a chip. Its state, its CA and its
sockets belong to this object: nothing is read from or written to /var/lib/swtpm-localca. PCRs are extended through the
TPM, by raw commands on its socket, so that this module needs neither tpm2_pytss nor tpm2-tools.

A software TPM has not booted anything: call `measure_boot` first, or every PCR is zero and every boot policy refuses.
Needs swtpm and swtpm-tools (0.7.1 of Debian 12, or later) and setpriv of util-linux.
Specification: TPM 2.0 Library, Part 3, 9.4 (Shutdown) and 22.2 (PCR_Extend).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

# What a host with GRUB and one with a unified kernel image would have measured; each name is hashed, then extended.
BOOT_MEASUREMENTS: Mapping[int, str] = {
    0: "firmware 1.0",
    1: "firmware settings",
    2: "option ROMs",
    3: "option ROM settings",
    4: "boot loader 2.06",
    5: "partition table",
    6: "platform resume",
    7: "secure boot on, keys of the distribution",
    8: "GRUB commands and kernel command line",
    9: "kernel 6.1.0-25 and initrd",
    11: "unified kernel image 6.1.0-25",
    12: "kernel command line of the stub",
    14: "shim's keys",
}

_START_SECONDS = 10
_STOP_SECONDS = 5
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}


class SoftwareTpmError(RuntimeError):
    """swtpm could not be made, started or spoken to."""


class SoftwareTpm:
    """One swtpm; a context manager that starts it and, also on failure, stops it.

    Args:
        directory: Where state and CA live; made with mode 0700 if absent. A directory that this class made before is
            used again: the same TPM, restarted (a copy of such a directory is a TPM with the same keys).
        certified: Whether a new TPM has EK certificates.
        banks: The PCR banks of a new TPM, which firmware measures into, with commas between.
    """

    def __init__(self, directory: str | os.PathLike[str], *, certified: bool = True, banks: str = "sha256") -> None:
        self._certified, self._banks = certified, banks
        self.directory = Path(directory).resolve()
        self._state = self.directory / "state"
        self._ca = self.directory / "ca"
        self._sockets: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    # --- what tests and the demo ask ----------------------------------------------------------------------------------

    @property
    def tcti(self) -> str:
        """The TCTI configuration string for tpm2-tss and tpm2-tools."""
        return f"swtpm:path={self.socket_path}"

    @property
    def socket_path(self) -> Path:
        """The command socket; the control socket is the same with ``.ctrl``."""
        if self._sockets is None:
            raise SoftwareTpmError("the software TPM is not running")
        return self._sockets / "tpm"

    @property
    def pid(self) -> int:
        """The pid of the swtpm that this object started."""
        if self._process is None:
            raise SoftwareTpmError("the software TPM is not running")
        return self._process.pid

    @property
    def ca_certificates(self) -> tuple[Path, Path]:
        """The PEM files of its CA: the self-signed root and the intermediate that signed the EK certificate."""
        return self._ca / "swtpm-localca-rootca-cert.pem", self._ca / "issuercert.pem"

    def extend(self, pcr: int, data: bytes | str) -> bytes:
        """Measure `data` into a PCR of the SHA-256 bank; returns the digest that was extended."""
        return self.extend_digest(pcr, hashlib.sha256(data.encode() if isinstance(data, str) else data).digest())

    def extend_digest(self, pcr: int, digest: bytes) -> bytes:
        """Extend a PCR of the SHA-256 bank with a digest that an event log has; returns it."""
        password = bytes.fromhex("400000090000010000")  # empty password, continueSession
        body = pcr.to_bytes(4, "big") + len(password).to_bytes(4, "big") + password
        body += (1).to_bytes(4, "big") + bytes.fromhex("000b") + digest
        self._command(0x8002, 0x182, body)
        return digest

    def measure_boot(self, changes: Mapping[int, str] | None = None) -> None:
        """Extend the PCRs as a boot would: `BOOT_MEASUREMENTS`, with `changes` by PCR; once after each start."""
        for pcr, name in {**BOOT_MEASUREMENTS, **(changes or {})}.items():
            self.extend(pcr, name)

    def restart(self, *, locality: int = 0) -> None:
        """Turn the machine off in order and on again: PCRs are reset, persistent objects and NV stay.

        Args:
            locality: Where TPM2_Startup comes from: 0, or 3, with which PCR 0 begins.
        """
        self._command(0x8001, 0x145, bytes(2))  # TPM2_Shutdown(CLEAR)
        self._stop_process()
        self._start_process(locality)

    def pause(self) -> None:
        """Let the TPM hang (SIGSTOP) until `resume`."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """End what `pause` began."""
        os.kill(self.pid, signal.SIGCONT)

    @contextlib.contextmanager
    def lent(self) -> Iterator[Path]:
        """Lend the TPM to a virtual machine, which resets it when it starts; the value is swtpm's control socket.

        Meanwhile nobody else can speak to it; afterwards it has been turned off and on again.
        """
        self._command(0x8001, 0x145, bytes(2))  # TPM2_Shutdown(CLEAR)
        control = f"{self.socket_path}.vm"
        self._stop_process()
        self._spawn("--ctrl", f"type=unixio,path={control}")
        try:
            yield Path(control)
        finally:
            self._stop_process()
            Path(control).unlink(missing_ok=True)
            self._start_process()

    # --- making, starting and stopping --------------------------------------------------------------------------------

    def start(self) -> SoftwareTpm:
        """Make the TPM if this directory has none, then start it."""
        if not (self.directory / "made").exists():
            self._make()
        # A socket's path holds at most 107 bytes, and a test's own directory is often longer.
        self._sockets = Path(tempfile.mkdtemp(prefix="scz-tpm-", dir="/tmp"))
        try:
            self._start_process()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Stop the swtpm that this object started and remove its sockets; harmless when it is not running."""
        self._stop_process()
        if self._sockets is not None:
            shutil.rmtree(self._sockets, ignore_errors=True)
            self._sockets = None

    def __enter__(self) -> SoftwareTpm:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _make(self) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (self._state, self._ca):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o700)
        (self.directory / "localca.conf").write_text(
            f"statedir = {self._ca}\n"
            f"signingkey = {self._ca}/signkey.pem\n"
            f"issuercert = {self._ca}/issuercert.pem\n"
            f"certserial = {self._ca}/certserial\n"
        )
        (self.directory / "localca.options").write_text(
            "--platform-manufacturer scz-smm\n--platform-version 1\n--platform-model software-tpm\n"
        )
        (self.directory / "setup.conf").write_text(
            "create_certs_tool = /usr/bin/swtpm_localca\n"
            f"create_certs_tool_config = {self.directory}/localca.conf\n"
            f"create_certs_tool_options = {self.directory}/localca.options\n"
            f"active_pcr_banks = {self._banks}\n"
        )
        command = ["/usr/bin/swtpm_setup", "--tpm2", "--tpm-state", str(self._state)]
        command += ["--create-ek-cert"] if self._certified else []
        command += ["--config", str(self.directory / "setup.conf"), "--pcr-banks", self._banks, "--overwrite"]
        if os.geteuid() == 0:
            command += ["--runas", "root"]  # as root it would turn into user tss, who may not enter this directory
        environment = {**_ENVIRONMENT, "HOME": str(self.directory), "XDG_CONFIG_HOME": str(self.directory)}
        made = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
        )
        if made.returncode != 0:
            raise SoftwareTpmError(f"swtpm_setup failed:\n{(made.stdout + made.stderr).decode(errors='replace')}")
        (self.directory / "made").touch()

    def _start_process(self, locality: int = 0) -> None:
        path = str(self.socket_path)
        for old in (path, f"{path}.ctrl"):
            Path(old).unlink(missing_ok=True)
        words = ["--server", f"type=unixio,path={path}", "--ctrl", f"type=unixio,path={path}.ctrl"]
        self._spawn(*words, "--flags", "not-need-init" if locality else "not-need-init,startup-clear")
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                if locality:
                    self._set_locality(locality)
                    self._command(0x8001, 0x144, bytes(2))  # TPM2_Startup(CLEAR)
                    self._set_locality(0)
                self._command(0x8001, 0x17B, (8).to_bytes(2, "big"))  # TPM2_GetRandom: it has started up
                return
            except OSError as cause:
                if self._process is None or self._process.poll() is not None or time.monotonic() > deadline:
                    log_text = (self.directory / "swtpm.log").read_text(errors="replace")[-2000:]
                    raise SoftwareTpmError(f"swtpm did not start: {cause}\n{log_text}") from cause
                time.sleep(0.01)

    def _spawn(self, *words: str) -> None:
        command = ["/usr/bin/setpriv", "--pdeathsig", "KILL", "/usr/bin/swtpm", "socket", "--tpm2"]
        command += ["--tpmstate", f"dir={self._state}", *words]
        with (self.directory / "swtpm.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=_ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _stop_process(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for number in (signal.SIGTERM, signal.SIGCONT):
            process.send_signal(number)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _set_locality(self, number: int) -> None:
        """CMD_SET_LOCALITY of swtpm's control channel (man 8 swtpm, swtpm_ioctls(3))."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_START_SECONDS)
            connection.connect(f"{self.socket_path}.ctrl")
            connection.sendall((5).to_bytes(4, "big") + bytes([number]))
            if connection.recv(4) != bytes(4):
                raise SoftwareTpmError(f"the TPM does not take commands from locality {number}")

    def _command(self, tag: int, code: int, body: bytes) -> None:
        command = tag.to_bytes(2, "big") + (10 + len(body)).to_bytes(4, "big") + code.to_bytes(4, "big") + body
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_START_SECONDS)
            connection.connect(str(self.socket_path))
            connection.sendall(command)
            response = connection.recv(4096)  # one read of swtpm is one response
        answer = int.from_bytes(response[6:10], "big")
        if len(response) < 10 or answer != 0:
            raise SoftwareTpmError(f"the TPM answered {answer:#x} to command {code:#x}")
