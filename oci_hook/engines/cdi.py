"""CDI: a file by which any engine that reads the Container Device Interface calls the hook for a model.

CDI cannot set annotations, so the hook's command line carries the request. Source: the CDI specification, SPEC.md;
0.5.0 is the first version in which a device's name may begin with a digit, and podman 4.3 knows it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from oci_hook.engines.plan import HostFiles, strings
from oci_hook.errors import AnnotationInvalid, FileUnreadable
from oci_hook.invocation import ENVIRONMENT, Invocation
from oci_hook.oci.annotations import parse_requests

VERSION = "0.5.0"
KIND = "smm.scz/model"
DEFAULT_FILE = "/etc/cdi/scz-smm.json"
# ValidateDeviceName of the reference implementation; the specification does not name the colon, which it allows.
_DEVICE_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.:-]*[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True)
class Device:
    """One model as a device: its name towards the engine, and the request."""

    name: str
    requests: Mapping[str, str]


def model_device(model: str, *, name: str | None = None, path: str | None = None) -> Device:
    """The device for a model.

    Args:
        model: As the annotation smm.scz/model has it.
        name: Of the device; None: the model's, with its version if there is one.
        path: As the annotation smm.scz/path has it.

    Raises:
        AnnotationInvalid: The model, the path or the name cannot be used.
    """
    requests = {"smm.scz/model": model, **({"smm.scz/path": path} if path is not None else {})}
    reference = parse_requests(requests).models[0].reference
    if name is None:
        name = reference.name if reference.image_digest is not None else str(reference)
    if len(name) > 253 or not _DEVICE_NAME.fullmatch(name):
        raise AnnotationInvalid(
            f"{name!r} is no name for a CDI device", remedy="give --name: letters and digits, with . _ - : between them"
        )
    return Device(name, requests)


def device_file(devices: Sequence[Device], *, config_file: str, engine: str | None, timeout_seconds: int) -> bytes:
    """The file's contents.

    Raises:
        AnnotationInvalid: There is no device, or two of one name.
    """
    if len({device.name for device in devices}) != len(devices) or not devices:
        raise AnnotationInvalid("a CDI file needs devices of different names", remedy="name each model once")
    listed = [
        {
            "name": device.name,
            "containerEdits": {
                "hooks": [
                    _hook(Invocation(stage, config_file=config_file, engine=engine, requests=device.requests))
                    | {"timeout": timeout_seconds}
                    for stage in ("prestart", "poststop")
                ]
            },
        }
        for device in devices
    ]
    return json.dumps({"cdiVersion": VERSION, "kind": KIND, "devices": listed}, indent=2).encode() + b"\n"


def _hook(invocation: Invocation) -> dict[str, object]:
    arguments = invocation.command()
    return {"hookName": invocation.stage, "path": arguments[0], "args": arguments, "env": list(ENVIRONMENT)}


def installed_devices(path: str, files: HostFiles) -> dict[str, list[str]] | None:
    """The devices of a file of ours, each with its hook's command; None if there is no file, or it is another's."""
    try:
        document = json.loads(files.read(path) or b"null")
        if document["kind"] != KIND:
            return None
        return {str(each["name"]): strings(each["containerEdits"]["hooks"][0]["args"]) for each in document["devices"]}
    except (FileUnreadable, ValueError, RecursionError, KeyError, TypeError, IndexError):
        return None
