"""`sczctl boot-policy predict`: the PCR values of the next boot."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import click

from oci_hook.cli import print_json, printable
from oci_hook.cli.boot_state import KEYS_OR_HOST, load_log, verified_state
from oci_hook.cli.completion import complete_devices, complete_files
from oci_hook.cli.options import JSON, name_of, verify_new_output, write_output
from oci_hook.key_errors import EventLogInvalid
from oci_hook.trusted_file import load_file

if TYPE_CHECKING:
    from oci_hook.attestation.boot_draft import Draft
    from oci_hook.attestation.prediction import Prediction

_COMPONENT_BYTES: Final = 1 << 30


def _numbered(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> list[tuple[int, str]]:
    pairs = [value.partition("=") for value in values]
    if not all(re.fullmatch("[0-9]{1,6}", number) and path for number, _, path in pairs):
        raise click.BadParameter("give it as EVENT=FILE, the event by its number in `boot-policy log`")
    return [(int(number), path) for number, _, path in pairs]


def _in_utf8(_context: click.Context, _parameter: click.Parameter, value: Any) -> Any:
    """Check texts that a log has in UTF-8; an argument's other bytes come as lone surrogates."""
    texts = [value] if isinstance(value, str) else [text for pair in value or () for text in pair]
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as cause:
        raise click.BadParameter("it is not UTF-8") from cause
    return value


def _component(name: str, words: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    path = click.Path(dir_okay=False)
    return click.option(f"--{name}", name.replace("-", "_"), type=path, help=words)


@click.command()
@click.argument("log_file", metavar="[LOG]", required=False, shell_complete=complete_files)
@click.option(
    "--measurement",
    type=click.Path(dir_okay=False),
    help="The device's measurement of the boot of LOG: what does not change keeps its values.",
)
@KEYS_OR_HOST
@click.option(
    "--device",
    metavar="NAME",
    callback=name_of,
    shell_complete=complete_devices,
    help="The device's name; default: that of --measurement.",
)
@_component("uki", "The next unified kernel image: PCR 11, and its part of 4 and 9.")
@_component("boot-loader", "The next boot loader: PCR 4.")
@_component("shim", "The next shim: PCR 4.")
@_component("kernel", "The next kernel, without a unified image: PCR 4, and 9 under GRUB.")
@_component("initrd", "The next initial RAM disk: PCR 9.")
@click.option(
    "--cmdline",
    metavar="TEXT",
    callback=_in_utf8,
    help="The next command line, without the kernel's path: PCR 8 or 12.",
)
@click.option(
    "--text",
    "texts",
    metavar="OLD NEW",
    nargs=2,
    multiple=True,
    callback=_in_utf8,
    help="A text in all of GRUB's commands, such as a kernel's version: PCR 8; repeat it for more.",
)
@click.option(
    "--replace",
    "replaced",
    metavar="EVENT=FILE",
    multiple=True,
    callback=_numbered,
    help="Any event of `boot-policy log`, by its number: a program, a file that GRUB reads, or a variable of Secure "
    "Boot as efivarfs has it; repeat it for more.",
)
@click.option("-o", "--output", metavar="FILE", shell_complete=complete_files, help="File for the predicted state.")
@JSON
@click.pass_obj
def predict(
    config_file: str,
    /,
    log_file: str | None,
    measurement: str | None,
    keys: str | None,
    device: str | None,
    output: str | None,
    as_json: bool,
    **components: Any,
) -> None:
    """HOST or OWNER: the PCR values of the next boot, when components are replaced.

    LOG is the boot that runs now; without it: this host's own log. -o writes the predicted state for
    `boot-policy sign --predicted` and `boot-policy diff`. It is signed by nobody: an owner makes it, from a
    device's log and --measurement, and from components that are known. PCRs that cannot be told are named.
    """
    from oci_hook.attestation.boot_draft import Draft
    from oci_hook.attestation.prediction import format_prediction, predict

    if not any(components.values()):
        raise click.UsageError("say what will be replaced, such as --uki FILE")
    if output is not None:
        verify_new_output(output)
    name, quoted = verified_state(config_file, keys, measurement) if measurement else (device, None)
    if device is not None and name != device:
        raise click.UsageError(f"the measurement is of the device {name}")
    if output is not None and name is None:
        raise click.UsageError("say whose state it is: --device NAME, or --measurement FILE")
    draft = Draft(load_log(config_file, log_file))
    _apply(draft, components)
    prediction = predict(draft, quoted)
    if output is not None and name is not None:
        write_output(output, format_prediction(name, int(time.time()), prediction))
    _show_prediction(prediction, name, as_json)


def _apply(draft: Draft, components: dict[str, Any]) -> None:
    def contents(path: str) -> bytes:
        return load_file(path, limit_bytes=_COMPONENT_BYTES, error=EventLogInvalid)

    if components["uki"]:
        draft.replace_unified_image(contents(components["uki"]))
    if components["boot_loader"]:
        draft.replace_boot_loader(contents(components["boot_loader"]))
    if components["shim"]:
        draft.replace_boot_loader(contents(components["shim"]), is_shim=True)
    if components["kernel"]:
        draft.replace_kernel(contents(components["kernel"]))
    if components["initrd"]:
        draft.replace_initrd(contents(components["initrd"]))
    if components["cmdline"] is not None:
        draft.replace_command_line(components["cmdline"])
    for old, new in components["texts"]:
        draft.replace_text(old, new)
    for number, path in components["replaced"]:
        draft.replace_event(number, contents(path))


def _show_prediction(prediction: Prediction, device: str | None, as_json: bool) -> None:
    from oci_hook.attestation.appraisal import pcrs_in_words

    replaced = [
        {
            "event": each.event,
            "pcr": each.pcr,
            "words": each.words,
            "before": each.before.hex() if each.before else None,
            "after": each.after.hex() if each.after else None,
        }
        for each in prediction.replacements
    ]
    unknown = {str(pcr): why for pcr, why in prediction.unknown.items()}
    if as_json:
        pcrs = {str(pcr): value.hex() for pcr, value in prediction.pcrs.items()}
        document = {"device": device, "pcrs": pcrs, "changed": list(prediction.changed)}
        print_json({**document, "unknown": unknown, "replaced": replaced})
        return
    for item in replaced:
        click.echo(printable(f"PCR {item['pcr']:<2} event {item['event']}: {item['words']}"))
        click.echo(f"    {item['before'] or 'nothing'} -> {item['after'] or 'nothing'}")
    for pcr in prediction.changed:
        click.echo(f"PCR {pcr:<2} will be {prediction.pcrs[pcr].hex()}")
    click.echo(f"changed: {pcrs_in_words(prediction.changed) or 'none'}")
    for pcr, why in prediction.unknown.items():
        click.echo(f"PCR {pcr:<2} cannot be told: {why}")


COMMANDS = {"predict": predict}
