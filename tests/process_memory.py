"""What is in the memory of a process, as root may read it in /proc."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def copies(pid: int, what: bytes) -> int:
    """How often something is in a process's memory."""
    found = 0
    with Path(f"/proc/{pid}/maps").open() as maps, Path(f"/proc/{pid}/mem").open("rb") as memory:
        for line in maps:
            place, permissions = line.split()[:2]
            if "r" in permissions and "[v" not in line:  # of vvar and vsyscall nothing can be read
                low, high = (int(number, 16) for number in place.split("-"))
                with suppress(OSError):  # a thread's, that has ended meanwhile
                    memory.seek(low)
                    found += memory.read(high - low).count(what)
    return found
