"""`prepare` as a child: the process in which a container's keys live and end, and its answer.

The plugin serves for as long as its engine does, so no key ever is in it. The child is killed when the engine's time is
up; what it left then, `before_create.discard` and the sweep take away. A child that no signal ends, since it waits for
a file system that does not answer (a token in a hung FUSE or NFS), is not waited for.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import threading

from oci_hook.errors import InternalError, SczError, Terminated
from oci_hook.invocation import ENVIRONMENT, Invocation
from oci_hook.key_errors import all_errors
from oci_hook.nri.adjust import parse_binds
from oci_hook.nri.messages import Mount

_LINE = re.compile(r"[^:\n]{1,32}: [A-Za-z]{1,64} \(\d{1,3}\): ([^\n]*)")
_MAX_LINE = 8192
_END_SECONDS, _KILLED_SECONDS = 0.4, 0.05  # together less than what the plugin keeps of the engine's time
_LONGEST_SECONDS = 600.0

_running: set[subprocess.Popen[bytes]] = set()
_changing = threading.Lock()


def run_prepare(invocation: Invocation, asked: bytes, *, seconds: float, advice: str) -> tuple[Mount, ...]:
    """Prepare a container.

    Args:
        invocation: Of the stage `prepare`.
        asked: Its standard input, of `adjust.asking`.
        seconds: It is ended after these, and killed if it does not end.
        advice: What to do if they were too few.

    Raises:
        SczError: What the child was refused for, under its own class.
        Terminated: It took too long.
        InternalError: It could not be started, or its answer is none.
    """
    environment = dict(variable.split("=", 1) for variable in ENVIRONMENT)
    pipe = subprocess.PIPE
    try:
        child = subprocess.Popen(invocation.command(), stdin=pipe, stdout=pipe, stderr=pipe, env=environment, cwd="/")
    except OSError as cause:
        raise InternalError(f"{invocation.command()[0]} cannot be started: {cause.strerror}") from cause
    with _changing:
        _running.add(child)
    try:
        out, said = child.communicate(asked, timeout=min(max(seconds, 0.0), _LONGEST_SECONDS))
    except subprocess.TimeoutExpired as cause:
        raise Terminated(
            f"the model was not ready within {seconds:.1f} s; longer the engine does not wait for a plugin",
            remedy=advice,
        ) from cause
    finally:
        _end(child, min(_END_SECONDS, seconds / 8))
    if child.returncode != 0:
        raise refusal_of(child.returncode, said.decode("utf-8", "replace"))
    return parse_binds(out)


def end_children() -> None:
    """Tell all children to end; `run_prepare` raises in the threads that wait for them."""
    with _changing:
        children = tuple(_running)
    for child in children:
        child.terminate()


def _end(child: subprocess.Popen[bytes], seconds: float) -> None:
    """By SIGTERM it takes away what it made; if it does not, a sweep does. Returns soon, whatever the child does."""
    if child.returncode is None:
        child.terminate()
        if not _has_ended(child, seconds):
            child.kill()
            if not _has_ended(child, _KILLED_SECONDS):
                threading.Thread(target=child.wait, name="reaper", daemon=True).start()
        for pipe in (child.stdin, child.stdout, child.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what could not be written any more
                    pipe.close()
    with _changing:
        _running.discard(child)


def _has_ended(child: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        child.wait(max(seconds, 0.0))
    except subprocess.TimeoutExpired:
        return False
    return True


def refusal_of(code: int, said: str) -> SczError:
    """The error that a stage ended with, by its exit code and its line on standard error.

    Args:
        code: Its exit code, negative for a signal.
        said: All of its standard error; the last line of our form counts.
    """
    cls = all_errors().get(code)
    if cls is None:
        why = f"signal {-code}" if code < 0 else f"exit code {code}"
        return InternalError(f"the process that prepares the model ended by {why}")
    found = _LINE.findall(said[-_MAX_LINE:])
    message, separator, advice = (found[-1] if found else cls.summary).rpartition("; ")
    return cls(message, remedy=advice) if separator else cls(advice)
