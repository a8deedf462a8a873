"""What `sczctl revoke` says of a plan, and of what it does not reach."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from oci_hook.bundle.grant import Grant
    from oci_hook.owner.revocation_plan import Plan


def _version(grant: Grant) -> str:
    return f"{grant.model.name}:{grant.model.version}"


def plan_document(plan: Plan) -> dict[str, Any]:
    """What `--json` says of it."""
    return {
        "lines": [
            {"model": line.model, "lowest_generation": line.lowest_generation, "revoked": list(line.revoked)}
            | {"epochs": dict(line.epochs)}
            for line in plan.lines.values()
        ],
        "devices": [
            {
                "device": device.record.device,
                "class": device.record.device_class,
                "revoked": device.record.revoked is not None,
                "counter": device.record.counter_value,
                "locked": [_version(grant) for grant in device.locked],
                "granted": [_version(grant) for grant in device.renewed],
                "not_granted": [_version(grant) for grant in device.not_renewed],
            }
            for device in plan.devices
        ],
        "out_of_reach": list(plan.out_of_reach),
        "without_record": [
            {"model": _version(grant), "device": grant.device_name, "srk": grant.srk_name.hex()}
            | {"counter": f"{grant.counter.index:#x}"}
            for grant in plan.strange
        ],
    }


def show_plan(plan: Plan, output: str | None) -> None:
    """The same for a person."""
    would = "would be " if output is None else ""
    for line in plan.lines.values():
        epochs = "".join(f", epoch {epoch} for class {name}" for name, epoch in sorted(line.epochs.items()))
        revoked = f", without {', '.join(line.revoked)}" if line.revoked else ""
        click.echo(f"{line.model}: generation {line.lowest_generation} and later{revoked}{epochs}")
    for row in plan_document(plan)["devices"]:
        locked = ", ".join(row["locked"]) or "nothing"
        click.echo(f"{row['device']}: {would}locked: {locked}; {would}granted anew: {len(row['granted'])}")
    if not (plan.devices or plan.out_of_reach or plan.strange):
        click.echo("no device has a grant of it: there is nothing to apply", err=True)
    elif plan.devices and output is not None:
        click.echo(f"next, on each device: sczctl add {output}/DEVICE")


def say_what_is_left(plan: Plan, output: str | None) -> bool:
    """Name what the plan does not reach, on standard error.

    Returns:
        Whether something that should be locked is not.
    """
    marked = {record.device for record in plan.marked}
    for device in plan.devices:
        if device.not_renewed:
            versions = ", ".join(_version(grant) for grant in device.not_renewed)
            name = device.record.device
            click.echo(f"{name}: not granted anew, so locked as well: {versions}; `sczctl grant` them later", err=True)
    for name in plan.unread:
        click.echo(f"{name}: its record is damaged; whether it is of the same TPM is not known", err=True)
    for name in plan.out_of_reach:
        is_ = "would be" if output is None else "is"
        said = "marked as revoked, and gets no more grants, but has no list" if name in marked else "left out"
        click.echo(
            f"{name} {is_} {said}: it would have to count too far; `sczctl enroll` it again, then revoke", err=True
        )
    for grant in plan.strange:
        click.echo(
            f"the grant of {_version(grant)} to {grant.device_name} stays open: no record has its TPM and counter "
            f"(SRK {grant.srk_name.hex()}, counter {grant.counter.index:#x}); `sczctl enroll` that TPM under a name of "
            "its own and revoke again, or remove the copy from the owner's folder if the TPM is destroyed",
            err=True,
        )
    return bool(plan.out_of_reach or plan.strange)
