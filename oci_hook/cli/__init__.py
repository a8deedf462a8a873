"""`sczctl`: one command for the model's owner, the host's operator and whoever asks why a container did not start.

The commands live in modules by role; this one holds what they share at the top: the group, and how an error leaves.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys

import click

from oci_hook import __version__
from oci_hook.config import DEFAULT_CONFIG_FILE
from oci_hook.errors import InstallationIncomplete, InternalError, SczError

# What a terminal would obey instead of showing: control characters, and those that turn the direction of writing.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")

_MODULES = {
    "keygen": "owner",
    "pack": "packing",
    "grant": "granting",
    "lease": "lease",
    "revoke": "revoke",
    "inspect": "owner",
    "verify": "owner",
    "recover": "recover",
    "boot-policy": "boot_policy",
    "enroll": "enroll",
    "add": "host",
    "list": "host",
    "rm": "host",
    "trust": "trust",
    "token": "token",
    "install": "engines",
    "uninstall": "engines",
    "cdi": "cdi",
    "sweep": "sweep",
    "doctor": "doctor",
    "tee": "tee",
    "ps": "containers",
    "release": "release",
    "evidence": "evidence",
    "appraise": "appraise",
    "metrics": "metrics",
    "why": "diagnose",
    "audit": "audit_log",
}


class LazyGroup(click.Group):
    """Imports a command's module when it is called, so that `sczctl why` does not load a TPM library."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """All commands, in the order of a person's work."""
        return list(_MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import the module that has the command, and take it from there."""
        if cmd_name not in _MODULES:
            return None
        module = __import__(f"oci_hook.cli.{_MODULES[cmd_name]}", fromlist=["COMMANDS"])
        command = module.COMMANDS[cmd_name]
        if not isinstance(command, click.Command):
            raise TypeError(f"{cmd_name} is not a command")
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="sczctl")
@click.option(
    "--config",
    "config_file",
    type=click.Path(dir_okay=False),
    default=DEFAULT_CONFIG_FILE,
    show_default=True,
    help="The host's configuration, for the commands that read it; stands before the command.",
)
@click.pass_context
def cli(context: click.Context, config_file: str) -> None:
    """Guard AI models in use.

    The model's OWNER packs, grants and signs boot policies. The host's OPERATOR enrols the host, adds models and
    installs the hook. `sczctl why` tells anybody why a container did not start.

    Exit codes: 0 done, 1 something is missing, left over or not known, 2 wrong usage, 10 to 79 an error
    (`sczctl why CODE` explains it), 130 interrupted.
    """
    context.obj = os.path.abspath(config_file)


def main(arguments: list[str] | None = None) -> None:
    """The command's entry point: an error leaves as one line with its remedy and its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show must not undo what was done
            stream.reconfigure(errors="backslashreplace")
    try:
        result = cli.main(args=arguments, prog_name="sczctl", standalone_mode=False)
    except click.exceptions.Exit as leaving:
        sys.exit(leaving.exit_code)
    except click.Abort:
        click.echo("sczctl: aborted", err=True)
        sys.exit(130)
    except click.ClickException as wrong:
        wrong.show()
        sys.exit(wrong.exit_code)
    except SczError as error:
        sys.exit(_show(error))
    except ImportError as error:
        sys.exit(_show(InstallationIncomplete(f"{type(error).__name__}: {error}")))
    except Exception as error:
        sys.exit(_show(InternalError(f"{type(error).__name__}: {error}")))
    sys.exit(result if isinstance(result, int) else 0)


def printable(text: str) -> str:
    """A hostile text, fit for one line of a terminal."""
    return _UNPRINTABLE.sub("?", text)


def _show(error: SczError) -> int:
    message = printable(f"sczctl: {error.reason} ({error.code}): {error.message}")
    click.echo(f"{message}\n  remedy: {printable(error.advice)}", err=True)
    return error.code


def print_json(document: object) -> None:
    """One JSON document on standard output, for `--json`; in ASCII, whatever strings it has."""
    click.echo(json.dumps(document, indent=2, sort_keys=True))
