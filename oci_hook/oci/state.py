"""The OCI state that a runtime gives a hook on standard input.

Only what the hook needs is read; further keys are allowed (crun adds `root`) and missing ones too where runtimes leave
them out (Kata sends an empty `status` and `ociVersion`). Nothing here decides by `status`, `ociVersion`, the working
directory or the environment. Standard library only, as it is read before it is known whether anything is ours
(`fast_path` answers for most containers without it). OCI runtime specification, "State".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from oci_hook.documents import Fields, parse_object
from oci_hook.errors import StateInvalid
from oci_hook.oci.annotations import parse_annotations

MAX_STATE_BYTES = 1 << 20
CONTAINER_ID = r"(?!\.\.?\Z)[A-Za-z0-9_+.-]{1,255}"  # runc's; a runtime makes a directory of that name, as we do files
ABSOLUTE_PATH = r"/[^\x00]*"
PATH_LIMIT = 4096
_PID_HIGH = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class State:
    """What a runtime says of a container.

    Attributes:
        container_id: 1 to 255 of `[A-Za-z0-9_+.-]`; neither `.` nor `..`, so it is fit for a file's name.
        pid: The runtime's process for the container (not always its init); 0 where there is none, as in poststop.
        bundle: Absolute path of the directory that holds config.json.
        status: For messages only.
        annotations: As the runtime passes them; Kata 1 passes none.
    """

    container_id: str
    pid: int
    bundle: str
    status: str
    annotations: Mapping[str, str]


def parse_state(data: bytes) -> State:
    """Parse the state.

    Args:
        data: All of standard input, at most 1 MiB of JSON.

    Raises:
        StateInvalid: Too large, not one strict JSON object, or a field that we read is missing or malformed.
    """
    what = "state"
    document = parse_object(data, limit_bytes=MAX_STATE_BYTES, what=what, error=StateInvalid)
    fields = Fields(document, what=what, error=StateInvalid)
    status = document.get("status")
    state = State(
        container_id=fields.string("id", pattern=CONTAINER_ID, limit=255),
        # runsc writes -1 for a container without a process, in poststop.
        pid=max(0, fields.integer("pid", low=-1, high=_PID_HIGH)) if fields.has("pid") else 0,
        bundle=fields.string("bundle", pattern=ABSOLUTE_PATH, limit=PATH_LIMIT),
        status=status if isinstance(status, str) else "",
        annotations=parse_annotations(document.get("annotations"), what=what, error=StateInvalid),
    )
    fields.rest()
    return state
