"""A proxy on the way to a software TPM: a tap that records the bus, and a TPM that lies, hangs, drips or dies.

tpm2-tss is given the proxy's socket instead of swtpm's. What a response says can be changed field by field: `fields_of`
knows the layouts of the responses that this project reads. Nothing of the project is imported: it is the other side.
Specification: TPM 2.0 Library, Part 1, 18 (structure of responses) and Part 3 (each command's response).
"""

from __future__ import annotations

import contextlib
import itertools
import math
import select
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

HANG = math.inf
_STEP_SECONDS = 0.05
_HEADER_BYTES = 10

Delivery = bytes | Sequence[bytes | float | None]
"""What arrives: bytes; or bytes, pauses in seconds (`HANG`: until the other side gives up) and None, the line's end."""

Change = Callable[[int, bytes], Delivery]
"""From a command's code and the TPM's response to what is delivered instead."""


@dataclass
class Exchange:
    """A command and its response, as they crossed the bus."""

    code: int
    command: bytes
    response: bytes = b""


class Tap:
    """A tap on the bus: a socket before swtpm's that records every byte, and changes responses if it is told to.

    Args:
        target: swtpm's command socket; its control socket carries no TPM command and is reached directly.
        change: What is delivered instead of each response.
        sent: Called with each command once the TPM has it, before its response is read.
    """

    def __init__(
        self,
        target: Path,
        change: Change = lambda _, response: response,
        *,
        sent: Callable[[Exchange], None] = lambda _: None,
    ) -> None:
        self.exchanges: list[Exchange] = []
        self._target = target
        self._change = change
        self._sent = sent
        self._folder = Path(tempfile.mkdtemp(prefix="scz-tap-", dir="/tmp"))
        self._stopped = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._thread = threading.Thread(target=self._serve, daemon=True)

    @property
    def tcti(self) -> str:
        return f"swtpm:path={self._folder}/tpm"

    @property
    def recorded(self) -> bytes:
        return b"".join(each.command + each.response for each in self.exchanges)

    def __enter__(self) -> Tap:
        self._listener.bind(f"{self._folder}/tpm")
        self._listener.listen()
        (self._folder / "tpm.ctrl").symlink_to(f"{self._target}.ctrl")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()
        self._listener.close()
        shutil.rmtree(self._folder)

    def _serve(self) -> None:
        while not self._stopped.is_set():
            if select.select([self._listener], [], [], _STEP_SECONDS)[0]:
                near, _ = self._listener.accept()
                # An OSError: one of the two sides was killed, and so is the line.
                with contextlib.suppress(OSError), near, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as far:
                    far.connect(str(self._target))
                    self._carry(near, far)

    def _carry(self, near: socket.socket, far: socket.socket) -> None:
        while not self._stopped.is_set():
            if not select.select([near], [], [], _STEP_SECONDS)[0]:
                continue
            command = _message(near)
            if not command:
                return
            exchange = Exchange(int.from_bytes(command[6:10], "big"), command)
            self.exchanges.append(exchange)
            far.sendall(command)
            self._sent(exchange)
            exchange.response = _message(far)
            if not exchange.response or not self._deliver(near, self._change(exchange.code, exchange.response)):
                return

    def _deliver(self, near: socket.socket, delivery: Delivery) -> bool:
        """Whether the line goes on."""
        for each in [delivery] if isinstance(delivery, bytes) else delivery:
            if each is None:
                return False
            if isinstance(each, bytes):
                near.sendall(each)
            elif not self._wait(near, each):
                return False
        return True

    def _wait(self, near: socket.socket, seconds: float) -> bool:
        """Do nothing for so long; False: the other side has gone meanwhile, or the test is over."""
        while seconds > 0 and not self._stopped.is_set():
            step = min(seconds, _STEP_SECONDS)
            if select.select([near], [], [], step)[0] and not near.recv(1, socket.MSG_PEEK):
                return False
            seconds -= step
        return not self._stopped.is_set()


def _message(connection: socket.socket) -> bytes:
    """One command or response: its size stands in its header."""
    data = b""
    while len(data) < _HEADER_BYTES or len(data) < int.from_bytes(data[2:6], "big"):
        part = connection.recv(4096)
        if not part:
            return b""
        data += part
    return data


def loaded_handles(socket_path: Path) -> list[int]:
    """Transient objects and sessions in a TPM, asked on its socket (TPM2_GetCapability); what tpm2_getcap lists."""
    found: list[int] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(socket_path))
        for first in (0x80000000, 0x02000000, 0x03000000):
            body = (1).to_bytes(4, "big") + first.to_bytes(4, "big") + (64).to_bytes(4, "big")
            connection.sendall(bytes.fromhex("8001000000160000017a") + body)
            listed = _message(connection)[_HEADER_BYTES + 9 :]  # moreData, capability, count
            found += [int.from_bytes(listed[place : place + 4], "big") for place in range(0, len(listed), 4)]
    return found


def power_cycle(socket_path: Path) -> None:
    """Reset a TPM without turning swtpm off (CMD_INIT of its control channel): nothing has started it up afterwards."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
        control.connect(f"{socket_path}.ctrl")
        control.sendall((2).to_bytes(4, "big") + bytes(4))
        answer = control.recv(4)
    if answer != bytes(4):
        raise RuntimeError(f"swtpm answered {answer.hex()} to CMD_INIT")


# --- what a response says ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Field:
    """A field of a response: its name, where it begins, and its length in bytes."""

    name: str
    start: int
    size: int

    def put(self, response: bytes, value: bytes) -> bytes:
        """The response with something else there; the sizes around it are as they were."""
        return response[: self.start] + value + response[self.start + self.size :]


# By command code: what follows the header, then the parameters. A number is a field of so many bytes, "2b" a size of
# two bytes and as many bytes, "2b(…)" the same with fields inside, "list(…)" a count of four bytes and as many items.
_PCRS = "list(2 1b)"
_SIGNATURE = "2 2 2b 2b"
_LAYOUTS: dict[int, tuple[str, bool, str]] = {
    0x12E: ("Clear", False, ""),
    0x131: ("CreatePrimary", True, "2b 2b 2b 2 4 2b 2b"),
    0x134: ("NV_Increment", False, ""),
    0x147: ("ActivateCredential", False, "2b"),
    0x148: ("Certify", False, f"2b {_SIGNATURE}"),
    0x14E: ("NV_Read", False, "2b"),
    0x151: ("PolicySecret", False, "2b 2 4 2b"),
    0x156: ("Import", False, "2b"),
    0x157: ("Load", True, "2b"),
    0x158: ("Quote", False, f"2b {_SIGNATURE}"),
    0x15E: ("Unseal", False, "2b"),
    0x165: ("FlushContext", False, ""),
    0x167: ("LoadExternal", True, "2b"),
    0x169: ("NV_ReadPublic", False, "2b(4 2 4 2b 2) 2b"),
    0x16A: ("PolicyAuthorize", False, ""),
    0x16C: ("PolicyCommandCode", False, ""),
    0x149: ("PolicyNV", False, ""),
    0x173: ("ReadPublic", False, "2b(2 2 4 2b) 2b 2b"),
    0x176: ("StartAuthSession", True, "2b"),
    0x177: ("VerifySignature", False, "2 4 2b"),
    0x17A: ("GetCapability", False, "1 4 list(4)"),
    0x17E: ("PCR_Read", False, f"4 {_PCRS} list(2b)"),
    0x17F: ("PolicyPCR", False, ""),
    0x180: ("PolicyRestart", False, ""),
    0x184: ("NV_Certify", False, f"2b {_SIGNATURE}"),
}


def name_of(code: int) -> str:
    """What the specification calls a command."""
    return _LAYOUTS[code][0] if code in _LAYOUTS else f"{code:#x}"


def fields_of(code: int, response: bytes) -> list[Field]:
    """The fields of a response to a command: header, handle, parameters, authorisation.

    What a layout does not describe to its end (a union) is one field more, "rest".
    """
    name, has_handle, layout = _LAYOUTS[code]
    found = [Field(f"{name}.tag", 0, 2), Field(f"{name}.size", 2, 4), Field(f"{name}.code", 6, 4)]
    if len(response) == _HEADER_BYTES:
        return found
    place, end = _HEADER_BYTES, len(response)
    if has_handle:
        found.append(Field(f"{name}.handle", place, 4))
        place += 4
    if response[:2] == b"\x80\x02":
        found.append(Field(f"{name}.parameterSize", place, 4))
        end = place + 4 + int.from_bytes(response[place : place + 4], "big")
        place += 4
    place = _walk(layout, response, place, name, found)
    if place < end:
        found.append(Field(f"{name}.rest", place, end - place))
    if end < len(response):
        while end < len(response):  # one for each session: nonce, attributes, HMAC
            end = _walk("2b 1 2b", response, end, f"{name}.auth", found)
    assert end == len(response), name
    return found


def _walk(layout: str, data: bytes, place: int, name: str, found: list[Field]) -> int:
    for number, (kind, inner) in enumerate(_words(layout)):
        here = f"{name}.{number}"
        if kind in ("2b", "1b", "list"):
            width = {"2b": 2, "1b": 1, "list": 4}[kind]
            count = int.from_bytes(data[place : place + width], "big")
            found.append(Field(f"{here}.size", place, width))
            place += width
            if kind == "list":
                for item in range(count):
                    place = _walk(inner, data, place, f"{here}.{item}", found)
                continue
            known = _walk(inner, data, place, here, found) if inner and count else place
            place += count
            if known < place:
                found.append(Field(here, known, place - known))
        else:
            found.append(Field(here, place, int(kind)))
            place += int(kind)
    return place


def _words(layout: str) -> Iterator[tuple[str, str]]:
    """The words of a layout, each with what its brackets hold."""
    depth, word = 0, ""
    for letter in f"{layout} ":
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter != " " or depth:
            word += letter
        elif word:
            kind, _, inner = word.partition("(")
            yield kind, inner.removesuffix(")")
            word = ""


def wrong_values(field: Field, response: bytes) -> list[bytes]:
    """Values for a field that are not its own: a bit flipped at either end or amid, none, all, one less, one more."""
    good = response[field.start : field.start + field.size]
    number, limit = int.from_bytes(good, "big"), 1 << 8 * field.size
    flipped = bytes([good[0] ^ 0x80]) + good[1:], good[:-1] + bytes([good[-1] ^ 1])
    middle = field.size // 2
    values = [*flipped, good[:middle] + bytes([good[middle] ^ 0x10]) + good[middle + 1 :]]
    values += [bytes(field.size), b"\xff" * field.size]
    if field.size <= 4:
        values += [((number + step) % limit).to_bytes(field.size, "big") for step in (-1, 1)]
    return [value for value in dict.fromkeys(values) if value != good]


def resized(code: int, response: bytes) -> list[tuple[Field, bytes]]:
    """The response with each variable part empty, shorter, longer or far too long, and every size around it mended."""
    fields, made = fields_of(code, response), []
    parameters = [each for each in fields if each.name.endswith(".parameterSize")]
    for size, content in itertools.pairwise(fields):
        if size.name != f"{content.name}.size":
            continue
        good = response[content.start : content.start + content.size]
        for value in (b"", good[:-1], good + b"\0", bytes(200), bytes(1000)):
            lie = content.put(response, value)
            lie = size.put(lie, len(value).to_bytes(size.size, "big")) if len(value) < 1 << 8 * size.size else lie
            grown = len(value) - len(good)
            for each in parameters if ".auth." not in content.name else ():
                number = int.from_bytes(response[each.start : each.start + each.size], "big") + grown
                lie = each.put(lie, number.to_bytes(each.size, "big"))
            made.append((content, lie[:2] + len(lie).to_bytes(4, "big") + lie[6:]))
    return made
