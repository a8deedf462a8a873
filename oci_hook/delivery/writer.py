"""The writer: a process in the container's memory control group that decrypts into its memory, and ends.

Whatever ends it early, the start is refused and what it wrote is dropped with the detached mounts. Nothing is made
read-only or visible here. Sources: docs/design.md, "Delivery"; mmap(2) on SIGBUS.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence

from oci_hook.delivery.fill import FillOptions, Target, fill
from oci_hook.delivery.memory import Cgroup, join_cgroup
from oci_hook.errors import WriterFailed
from oci_hook.linux.namespaces import Channel, Child, Report
from oci_hook.linux.processes import lock_memory

Progress = Callable[[int, int], None]
"""Called with the bytes of plaintext done so far, and all of them."""

_PROGRESS_SECONDS = 0.1
_WHAT = "the process that decrypts into memory"
_FULL = "free memory on the node (where vm.overcommit_memory is 2, raise its commit limit), then start it again"


def run_writer(
    targets: Sequence[Target],
    options: FillOptions,
    cgroup: Cgroup | None,
    timeout_seconds: float,
    *,
    first: Callable[[], None],
    left: Callable[[int], None],
    progress: Progress | None,
) -> None:
    """Decrypt models, and wait for it.

    Args:
        targets: The models, and their empty file systems.
        options: How.
        cgroup: The group that is charged; None: there is none.
        timeout_seconds: For each step of the writer.
        first: Called in the child, which may hang in the kernel and is then left behind: gives up what is the parent's.
        left: Called now and then with the bytes of plaintext that are not written yet.
        progress: Called now and then, and at the end.

    Raises:
        WriterFailed: The writer ended early, or stood still for too long.
        SczError: What `fill` raised.
    """
    total = sum(entry.size for target in targets for entry in target.model.manifest.files)

    def body(channel: Channel) -> Report:
        first()
        if cgroup is not None:
            join_cgroup(cgroup)
        lock_memory()
        return {"filled": fill(targets, options, _reporter(channel))}

    with Child(_WHAT, body, gone=WriterFailed) as writer:
        try:
            while "done" not in (report := writer.receive(timeout_seconds)):
                left(max(0, total - report["progress"]))
                if progress is not None:
                    progress(report["progress"], total)
        except WriterFailed as cause:
            if writer.killed_by == signal.SIGBUS:  # a page of a mapped file that the kernel has no memory for
                raise WriterFailed("memory for the model ran out while it was decrypted", remedy=_FULL) from cause
            raise
        writer.join(timeout_seconds)
    if report["done"] != {"filled": total}:
        raise WriterFailed(f"{_WHAT} did not decrypt all")
    if progress is not None:
        progress(total, total)


def _reporter(channel: Channel) -> Callable[[int], None]:
    """Report progress from the writer: often enough to show that it lives, rarely enough to cost nothing."""
    reported = time.monotonic()

    def report(done_bytes: int) -> None:
        nonlocal reported
        now = time.monotonic()
        if now - reported >= _PROGRESS_SECONDS:
            reported = now
            channel.send_lossy({"progress": done_bytes})

    return report
