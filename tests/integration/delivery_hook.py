"""A hook that drives `Delivery` alone: the key comes from a file instead of the TPM. Not part of the project.

    python -I delivery_hook.py INSTRUCTIONS.json [poststop] < state

It writes what happened to the instructions' `result` and ends with the error's exit code. `pause` names a point at
which it writes `<result>.<point>` and waits to be killed, or for `<result>.go`. `kill` names a function
("after oci_hook.delivery.host_records HostRecords.write", or before) at which the hook kills itself. `in_sandbox` and
`memory_volumes` stand for what an engine vouches for.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from oci_hook.bundle.layout import open_layout, verify_bundle
from oci_hook.bundle.manifest import model_document, parse_manifest, verify_manifest
from oci_hook.bundle.segments import ContentKey
from oci_hook.delivery import host_mounts
from oci_hook.delivery.deliver import ContainerView, Delivery, DeliverySettings, ModelDelivery
from oci_hook.errors import SczError
from oci_hook.linux.mounts import MemoryFilesystem
from oci_hook.linux.processes import harden_process
from oci_hook.trust import parse_owner


def container_view(state: dict[str, Any], instructions: dict[str, Any]) -> ContainerView:
    """What the project's own parsers of state and config.json will give."""
    spec = json.loads((Path(state["bundle"]) / "config.json").read_text())
    linux = spec["linux"]
    return ContainerView(
        container_id=state["id"],
        pid=state["pid"],
        bundle=state["bundle"],
        root_path=spec["root"]["path"],
        tmpfs_destinations=frozenset(each["destination"] for each in spec["mounts"] if each.get("type") == "tmpfs"),
        uid_offset=linux.get("uidMappings", [{"hostID": 0}])[0]["hostID"],
        gid_offset=linux.get("gidMappings", [{"hostID": 0}])[0]["hostID"],
        mount_namespace_joined=any(each["type"] == "mount" and "path" in each for each in linux["namespaces"]),
        in_sandbox=instructions.get("in_sandbox", False),
        mount_destinations=tuple(each["destination"] for each in spec["mounts"]),
        memory_volumes=frozenset(instructions.get("memory_volumes", ())),
        annotations=spec["annotations"],
    )


def kill_at(moment: str, module: str, place: str) -> None:
    """Have this process kill itself before or after a function of the project's runs in it."""
    name, _, method = place.partition(".")
    owner: Any = importlib.import_module(module)
    if method:
        owner, name = getattr(owner, name), method
    function, own = getattr(owner, name), os.getpid()

    def deadly(*arguments: Any, **options: Any) -> Any:
        value = function(*arguments, **options) if moment == "after" else None
        if os.getpid() == own:
            os.kill(own, signal.SIGKILL)
        return value if moment == "after" else function(*arguments, **options)

    setattr(owner, name, deadly)


def main() -> int:
    """Deliver as instructed."""
    instructions = json.loads(Path(sys.argv[1]).read_text())
    result = Path(instructions["result"])

    def pause(point: str) -> None:
        Path(f"{result}.{point}").write_text(str(os.getpid()))
        while instructions.get("pause") == point and not Path(f"{result}.go").exists():
            time.sleep(0.05)

    def write(report: str) -> None:
        new = Path(f"{result}.{os.getpid()}.new")  # two containers of one bundle may run at once
        new.write_text(report)
        new.rename(result)

    state = json.load(sys.stdin)
    if sys.argv[2:] == ["poststop"]:
        host_mounts.close(instructions["runtime_directory"], state["id"], state["bundle"])
        return 0
    Path(f"{result}.state").write_text(json.dumps(state))
    if "kill" in instructions:
        kill_at(*instructions["kill"].split())
    harden_process()
    settings = DeliverySettings(
        memory_reserve_bytes=instructions.get("reserve", 1 << 20),
        runtime_directory=instructions["runtime_directory"],
        workers=instructions.get("workers"),
        timeout_seconds=10,
    )
    kind = MemoryFilesystem(instructions["file_system"]) if "file_system" in instructions else None
    owner = parse_owner(Path(instructions["owner"]).read_bytes())
    try:
        with contextlib.ExitStack() as stack:
            delivery = stack.enter_context(Delivery(container_view(state, instructions), settings, file_system=kind))
            delivery.prepare([each["destination"] for each in instructions["models"]])
            pause("prepared")
            models = []
            for each in instructions["models"]:
                layout = stack.enter_context(open_layout(each["bundle"]))
                manifest = verify_manifest(parse_manifest(layout.config_blob), owner)
                verify_bundle(layout, manifest)
                key = ContentKey(bytes.fromhex(each["key"]))
                models.append(
                    ModelDelivery(each["slot"], each["destination"], manifest, layout, key, model_document(manifest))
                )
            seen: list[tuple[int, int]] = []
            delivery.fill(models, lambda done, total: seen.append((done, total)))
            pause("filled")
            attached = delivery.attach()
            pause("attached")
            write(
                json.dumps(
                    {
                        "pid": state["pid"],
                        "runtime": delivery.runtime,
                        "start_time": delivery.start_time,
                        "attached": [[one.slot, one.destination, one.fsid, one.size_bytes] for one in attached],
                        "progress": seen[-1],
                        "descriptors": len(os.listdir("/proc/self/fd")),
                    }
                )
            )
        return 0
    except SczError as refusal:
        write(json.dumps({"error": refusal.reason, "message": refusal.message}))
        print(refusal.message, file=sys.stderr)
        return refusal.code


if __name__ == "__main__":
    sys.exit(main())
