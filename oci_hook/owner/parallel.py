"""Work on many small things by all processors, for what needs no secret: in workers that share nothing with the caller.

A worker is a program of its own, no fork: the caller's keys are not in its memory, and a lock that the caller holds is
not open in it. It ends with the caller, however that ends, so that a kill leaves nobody behind. Two thousand things
or fewer are done here: starting workers would take longer. Source: PR_SET_PDEATHSIG(2const).
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from oci_hook.errors import SczError
from oci_hook.linux.syscalls import prctl_set_pdeathsig

T = TypeVar("T")
R = TypeVar("R")

_ALONE = 2000
_WORKERS = 8
# -I, and the caller's path without the working directory: nothing is imported from where the caller happens to stand.
_START = "import sys; sys.path[:] = sys.argv[2:]; from oci_hook.owner.parallel import serve; serve(int(sys.argv[1]))"


def map_chunks(work: Callable[[Sequence[T]], list[R]], items: Sequence[T]) -> list[R]:
    """The results of `work` on `items`, in their order.

    Args:
        work: Gives one result for each item; a function of a module, or a `partial` of one, with what pickle takes.
        items: What to work on.

    Raises:
        SczError: What `work` raised first.
        RuntimeError: A worker ended without an answer.
    """
    count = min(os.cpu_count() or 1, _WORKERS)
    if len(items) <= _ALONE or count == 1:
        return work(items)
    share = -(-len(items) // count)
    results: list[R] = []
    with ExitStack() as running:
        tasks = [(work, items[start : start + share]) for start in range(0, len(items), share)]
        for worker in [running.enter_context(_worker(pickle.dumps(task))) for task in tasks]:
            results += _answer(worker)
    return results


@contextmanager
def _worker(task: bytes) -> Iterator[subprocess.Popen[bytes]]:
    """A worker on a task; killed at the end of the block, if it has not ended."""
    words = [sys.executable, "-I", "-c", _START, str(os.getpid()), *(entry for entry in sys.path if entry)]
    # Of the environment only what says how names of files are encoded.
    environment = {name: value for name, value in os.environ.items() if name == "LANG" or name.startswith("LC_")}
    with open(os.memfd_create("task"), "w+b") as given:
        given.write(task)
        given.seek(0)
        # A group of its own: an interrupt at the terminal is for the caller, who then ends the workers.
        worker = subprocess.Popen(words, stdin=given, stdout=subprocess.PIPE, env=environment, process_group=0)
    with worker:
        try:
            yield worker
        finally:
            worker.kill()


def _answer(worker: subprocess.Popen[bytes]) -> list[Any]:
    data, _ = worker.communicate()
    if worker.returncode:
        raise RuntimeError(f"a worker ended with {worker.returncode}")
    results, error = pickle.loads(data)  # noqa: S301 - by a program of ours, over a pipe that nobody else has
    if error is not None:
        raise error
    return list(results)


def serve(caller: int) -> None:
    """A worker's part: one task from standard input, its answer to standard output.

    Args:
        caller: The pid of who started it, and with whom it ends.
    """
    prctl_set_pdeathsig(signal.SIGKILL)
    if os.getppid() != caller:  # it ended before the line above, and no signal will come
        return
    work, items = pickle.load(sys.stdin.buffer)  # noqa: S301 - by our caller, in memory that nobody else has
    answer: tuple[list[Any], SczError | None]
    try:
        answer = work(items), None
    except SczError as error:
        answer = [], error
    sys.stdout.buffer.write(pickle.dumps(answer))
