"""A stand-in for configfs-tsm: a file system that behaves as the kernel's does, with a guest's hardware of our own.

A FUSE server in a process of its own (linux/fuse.h; no package is needed). mkdir(2) makes a report's directory with its
attributes, rmdir(2) removes it with them; nothing else can be made, removed or renamed. A write to `inblob` counts when
the file is closed; every write counts in `generation`; `outblob` and `auxblob` give EINVAL before there is an `inblob`.
It shows that our reader keeps to Documentation/ABI/testing/configfs-tsm-report as these lines read it, and what it does
when the other end does not; not that a kernel or a chip does.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
)

from tests.sev_snp import Maker, ec_key, signature
from tests.stuck import _HEADER_BYTES, _INIT, _open_device

LOOKUP, FORGET, GETATTR, SETATTR, MKDIR, RMDIR, OPEN, READ, WRITE = 1, 2, 3, 4, 9, 11, 14, 15, 16
RELEASE, FLUSH, OPENDIR, READDIR, RELEASEDIR, INTERRUPT, BATCH_FORGET = 18, 25, 27, 28, 29, 36, 42
_SILENT = (FORGET, INTERRUPT, BATCH_FORGET)
READABLE = ("provider", "generation", "privlevel_floor", "outblob", "auxblob")
WRITABLE = ("privlevel", "inblob")


def behaviour_of(maker: Maker, **changes: Any) -> dict[str, Any]:
    """The hardware of a maker's chip; `changes` are fields of its reports."""
    key = ec_key("chip").private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    return {"key": key.hex(), "body": maker.report(sign=False, **changes)[:0x2A0].hex()}


@contextmanager
def stand_in(
    directory: Path, behaviour: Mapping[str, Any], *, prefix: Sequence[str] = ()
) -> Iterator[Callable[[], list[str]]]:
    """Mount one at a directory.

    Args:
        directory: An empty one.
        behaviour: `key` (PKCS#8 DER, hex) and `body` (what the report says but REPORT_DATA, hex) make the reports;
            `outblob` or `auxblob` (hex) are given as they are; `provider`, `floor` (None: no levels); `hang` names an
            attribute whose reading never ends; `error` is [attribute, errno]; `interfere` is one that writes, as
            another process would, when it is read; `deaf` forgets what is written to `inblob`; `mkdir` is an errno.
        prefix: A command that enters the mount namespace in which it is to be seen.

    Yields:
        What reads the names of the reports that are there.
    """
    with subprocess.Popen(
        [*prefix, sys.executable, "-m", "tests.tsm", str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            server.stdin.write(json.dumps(dict(behaviour)).encode())
            server.stdin.close()
            assert server.stdout.readline() == b"ready\n"
            yield lambda: sorted(os.listdir(f"/proc/{server.pid}/root{directory}"))
        finally:
            server.kill()  # closes the device: the kernel ends every request
            server.wait()
            subprocess.run([*prefix, "/usr/bin/umount", "--lazy", str(directory)], check=True)


class Node:
    """A directory of a report, or one of its attributes."""

    def __init__(self, name: str, parent: Node | None) -> None:
        self.name, self.parent = name, parent
        self.children: dict[str, Node] = {}
        self.generation, self.inblob, self.pending = 0, b"", b""

    @property
    def mode(self) -> int:
        if self.parent is None or self.parent.parent is None:
            return stat.S_IFDIR | 0o755
        return stat.S_IFREG | (0o444 if self.name in READABLE else 0o200)


class Server:
    """The file system's state; one thread for each request that may hang."""

    def __init__(self, fd: int, behaviour: dict[str, Any]) -> None:
        self.fd, self.behaviour = fd, behaviour
        self.root = Node("", None)
        self.nodes: dict[int, Node] = {1: self.root}
        self.calls = {
            LOOKUP: self.lookup,
            GETATTR: lambda node, _body: struct.pack("=QII", 0, 0, 0) + self.attributes(node),
            SETATTR: lambda node, _body: struct.pack("=QII", 0, 0, 0) + self.attributes(node),
            MKDIR: self.mkdir,
            RMDIR: self.rmdir,
            OPEN: self.open,
            OPENDIR: lambda _node, _body: bytes(16),
            READ: self.read,
            WRITE: self.write,
            FLUSH: self.flush,
            READDIR: self.readdir,
            RELEASE: lambda _node, _body: b"",
            RELEASEDIR: lambda _node, _body: b"",
        }

    def number(self, node: Node) -> int:
        for number, known in self.nodes.items():
            if known is node:
                return number
        self.nodes[len(self.nodes) + 1] = node
        return len(self.nodes)

    def attributes(self, node: Node) -> bytes:
        """struct fuse_attr: 88 bytes."""
        times = (0,) * 6
        return struct.pack("=QQQ", self.number(node), 4096, 8) + struct.pack(
            "=QQQIIIIIIIIII", *times, node.mode, 1, 0, 0, 0, 4096, 0
        )

    def found(self, node: Node) -> bytes:
        """struct fuse_entry_out, without times for which it may be kept."""
        return struct.pack("=QQQQII", self.number(node), 0, 0, 0, 0, 0) + self.attributes(node)

    def lookup(self, node: Node, body: bytes) -> bytes | int:
        child = node.children.get(body.rstrip(b"\0").decode())
        return self.found(child) if child is not None else errno.ENOENT

    def mkdir(self, node: Node, body: bytes) -> bytes | int:
        if node is not self.root:
            return errno.EPERM
        if "mkdir" in self.behaviour:
            return int(self.behaviour["mkdir"])
        name = body[8:].rstrip(b"\0").decode()
        if name in node.children:
            return errno.EEXIST
        child = node.children[name] = Node(name, node)
        hidden = {"privlevel", "privlevel_floor"} if self.behaviour.get("floor", 0) is None else set()
        hidden |= {"auxblob"} if self.behaviour.get("auxblob", "") is None else set()
        child.children = {name: Node(name, child) for name in (*READABLE, *WRITABLE) if name not in hidden}
        return self.found(child)

    def rmdir(self, node: Node, body: bytes) -> bytes | int:
        if node is not self.root:
            return errno.EPERM
        return b"" if node.children.pop(body.rstrip(b"\0").decode(), None) else errno.ENOENT

    def open(self, node: Node, _body: bytes) -> bytes:
        return struct.pack("=QII", 0, 1, 0)  # FOPEN_DIRECT_IO: each read comes here, and sizes mean nothing

    def read(self, node: Node, body: bytes) -> bytes | int:
        _, offset, size = struct.unpack_from("=QQI", body)
        report, behaviour = node.parent, self.behaviour
        assert report is not None
        if behaviour.get("hang") == node.name:
            time.sleep(3600)
        if behaviour.get("error", [""])[0] == node.name:
            return int(behaviour["error"][1])
        if behaviour.get("interfere") == node.name and offset == 0:
            report.generation += 1
        if node.name in ("outblob", "auxblob") and not report.inblob:
            return errno.EINVAL
        texts = {
            "provider": behaviour.get("provider", "sev_guest") + "\n",
            "generation": f"{report.generation}\n",
            "privlevel_floor": f"{behaviour.get('floor', 0)}\n",
        }
        data = texts[node.name].encode() if node.name in texts else self.blob(node.name, report.inblob)
        return data[offset : offset + size]

    def blob(self, name: str, inblob: bytes) -> bytes:
        if name in self.behaviour:
            return bytes.fromhex(self.behaviour[name])
        if name == "auxblob":
            return b""
        body = bytearray(bytes.fromhex(self.behaviour["body"]))
        body[0x50 : 0x50 + len(inblob)] = inblob
        key: Any = load_der_private_key(bytes.fromhex(self.behaviour["key"]), None)
        report = self.behaviour.setdefault("made", {})
        return report.setdefault(inblob, bytes(body) + signature(key, bytes(body)))

    def write(self, node: Node, body: bytes) -> bytes | int:
        _, offset, size = struct.unpack_from("=QQI", body)
        data, report = body[40 : 40 + size], node.parent
        assert report is not None
        if node.name == "privlevel":
            if not re.fullmatch(rb"[0-3]\n?", data) or int(data) < self.behaviour.get("floor", 0):
                return errno.EINVAL
            report.generation += 1
        elif node.name == "inblob":
            if offset != len(node.pending) or offset + size > 64:
                return errno.EINVAL
            node.pending += data
        else:
            return errno.EACCES
        return struct.pack("=II", size, 0)

    def flush(self, node: Node, _body: bytes) -> bytes:
        """close(2): a binary attribute takes what was written."""
        if node.pending and node.parent is not None and not self.behaviour.get("deaf"):
            node.parent.inblob, node.pending = node.pending, b""
            node.parent.generation += 1
        return b""

    def readdir(self, node: Node, body: bytes) -> bytes:
        _, offset, size = struct.unpack_from("=QQI", body)
        data = b""
        for place, (name, child) in enumerate(list(node.children.items())[offset:], offset + 1):
            raw = name.encode()
            line = struct.pack("=QQII", self.number(child), place, len(raw), child.mode >> 12) + raw
            line += bytes(-len(line) % 8)
            if len(data) + len(line) > size:
                break
            data += line
        return data

    def answer(self, opcode: int, unique: int, node: Node | None, body: bytes) -> None:
        call = self.calls.get(opcode)
        result = errno.ENOSYS if call is None else errno.ENOENT if node is None else call(node, body)
        number, data = (-result, b"") if isinstance(result, int) else (0, result)
        os.write(self.fd, struct.pack("=IiQ", 16 + len(data), number, unique) + data)

    def serve(self) -> None:
        while data := os.read(self.fd, 1 << 20):
            _, opcode, unique, node = struct.unpack_from("=IIQQ", data)
            body = data[_HEADER_BYTES:]
            if opcode == _INIT:
                major, minor, readahead, _ = struct.unpack_from("=IIII", body)
                sent = struct.pack("=IIIIHHII", major, min(minor, 31), readahead, 0, 12, 9, 1 << 16, 1).ljust(64, b"\0")
                os.write(self.fd, struct.pack("=IiQ", 16 + len(sent), 0, unique) + sent)
                print("ready", flush=True)
            elif opcode not in _SILENT:
                arguments = (opcode, unique, self.nodes.get(node), body)
                if opcode == READ:  # may hang, and the others go on
                    threading.Thread(target=self.answer, args=arguments, daemon=True).start()
                else:
                    self.answer(*arguments)


def _main(directory: str, behaviour: dict[str, Any]) -> None:
    fd = _open_device()
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other"
    mount = ["/usr/bin/mount", "-i", "-t", "fuse", "-o", options, "tsm", directory]
    subprocess.run(mount, pass_fds=[fd], check=True)
    Server(fd, behaviour).serve()


if __name__ == "__main__":
    _main(sys.argv[1], json.load(sys.stdin))
