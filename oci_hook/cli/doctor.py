"""`sczctl doctor`: what this host has, which way each engine takes, what fails and the command that mends it.

What is looked at is in `checks`, a module for each part of the host. They are imported one by one when their turn
comes, so that an installation of which a part is missing is told as that.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click

from oci_hook.cli import print_json, printable
from oci_hook.cli.checks.check import Check, grouped, guarded
from oci_hook.cli.checks.package import MEND, check_package
from oci_hook.config import Config

if TYPE_CHECKING:
    from oci_hook.attestation.host_device import HostDevice
    from oci_hook.cli.checks.containers import GradedContainer
    from oci_hook.cli.checks.kernel import KernelState
    from oci_hook.cli.checks.models import StoredSize
    from oci_hook.cli.checks.tpm import TpmAnswer
    from oci_hook.engines.plan import HostFiles
    from oci_hook.trust import Owner

_PRIVATE = ("TPM", "store", "trust", "audit")  # of which others than root see nothing, or not all
_UNSURE = " (without root's rights this may be wrong)"


class _Examination:
    """One run: what a part of the host told is used by later parts."""

    def __init__(self, config_file: str, root: str, *, deep: bool) -> None:
        self._config_file, self._root, self._deep = config_file, root, deep
        self._config = Config()
        self._kernel: KernelState | None = None
        self._device: HostDevice | None = None
        self._tpm: TpmAnswer | None = None
        self._owners: tuple[Owner, ...] = ()
        self._sizes: list[StoredSize] = []
        self.containers: list[GradedContainer] = []

    def checks(self) -> Iterator[Check]:
        """Every line, in the order in which a host is made ready."""
        parts: tuple[tuple[str, Callable[[], Iterable[Check]]], ...] = (
            ("package", check_package),
            ("configuration", self._configuration),
            ("kernel", self._of_kernel),
            ("memory", self._memory),
            ("TPM", self._of_tpm),
            ("trust", self._trust),
            ("broker", self._broker),
            ("store", self._store),
            ("audit", self._audit),
            ("engines", self._engines),
            ("containers", self._containers),
        )
        if os.geteuid() != 0:
            message = "not root: the TPM, the store, the audit log and the containers cannot be seen, or only in part"
            yield Check("user", "fail", message, "sudo sczctl doctor", "user")
        for group, look in parts:
            for check in grouped(group, guarded(group, _importing(group, look))):
                yield _without_rights(check)

    def _files(self) -> HostFiles:
        from oci_hook.engines.plan import HostFiles

        return HostFiles(self._root)

    def _configuration(self) -> Iterator[Check]:
        from oci_hook.cli.checks.host import check_configuration, check_owners_of_files

        self._config, checks = check_configuration(self._config_file)
        yield from checks
        yield from check_owners_of_files(self._config_file, self._config)

    def _of_kernel(self) -> Iterator[Check]:
        from oci_hook.cli.checks.kernel import check_clock, check_kernel, check_leaks, load_kernel_state

        self._kernel = load_kernel_state()
        yield from check_kernel(self._kernel)
        yield from check_leaks(self._kernel)
        yield from check_clock()

    def _memory(self) -> Iterator[Check]:
        from oci_hook.cli.checks.host import check_memory

        return check_memory(self._config)

    def _of_tpm(self) -> Iterator[Check]:
        from oci_hook.cli.checks.host import load_enrolment
        from oci_hook.cli.checks.tpm import ask_tpm, check_openers

        self._device, checks = load_enrolment(self._config)
        yield from checks
        self._tpm, checks = ask_tpm(self._config, self._device)
        yield from checks
        yield from check_openers()

    def _trust(self) -> Iterator[Check]:
        from oci_hook.cli.checks.host import check_trust

        self._owners, checks = check_trust(self._config)
        yield from checks

    def _broker(self) -> Iterator[Check]:
        from oci_hook.cli.checks.broker import check_broker

        return check_broker(self._config)

    def _store(self) -> Iterator[Check]:
        from oci_hook.cli.checks.models import check_models, check_room

        yield from check_models(self._config, self._owners, self._device, self._tpm, self._sizes, deep=self._deep)
        yield from check_room(self._config, self._sizes)

    def _audit(self) -> Iterator[Check]:
        from oci_hook.cli.checks.host import check_audit, check_rotation, check_timer

        yield from check_audit(self._config)
        yield from check_rotation(self._config, self._files())
        yield from check_timer(self._files())

    def _engines(self) -> Iterator[Check]:
        from oci_hook.cli.checks.engines import check_cdi_models, check_engines, check_runtimes

        yield from check_runtimes(self._files())
        largest = max(self._sizes, key=lambda model: model.size_bytes, default=None)
        yield from check_engines(self._config_file, self._files(), largest)
        yield from check_cdi_models(self._config.store_directory, self._files())

    def _containers(self) -> Iterator[Check]:
        from oci_hook.cli.checks.containers import MOST_CONTAINERS, grade_containers
        from oci_hook.cli.checks.grade import HostFacts
        from oci_hook.cli.checks.kernel import load_kernel_state

        kernel = self._kernel or load_kernel_state()
        software = self._tpm.properties.is_software if self._tpm is not None else None
        host = HostFacts.of(kernel, software)
        self.containers += grade_containers(self._config.runtime_directory, self._config.token_path, host)
        if len(self.containers) >= MOST_CONTAINERS:
            yield Check("containers", "warn", f"only the {MOST_CONTAINERS} oldest were graded", "`sczctl ps` has all")


def _importing(group: str, look: Callable[[], Iterable[Check]]) -> Callable[[], Iterator[Check]]:
    """A part of the installation that cannot be imported is a line, and the other parts are looked at."""

    def looked() -> Iterator[Check]:
        try:
            yield from look()
        except (ImportError, SyntaxError) as error:
            yield Check(group, "fail", f"cannot be looked at: {type(error).__name__}: {error}", MEND)

    return looked


def _without_rights(check: Check) -> Check:
    """What others than root see of root's private folders does not prove that something is missing."""
    if os.geteuid() == 0 or check.status != "fail" or check.group not in _PRIVATE:
        return check
    return dataclasses.replace(check, status="warn", message=check.message + _UNSURE, remedy="sudo sczctl doctor")


@click.command()
@click.option(
    "--root",
    type=click.Path(file_okay=False),
    default="/",
    callback=lambda _context, _parameter, value: os.path.abspath(value),
    help="Look for runtimes and engines below this directory, that of an image being built: one whose programs you "
    "would run, as each is asked for its version.",
)
@click.option("--deep", is_flag=True, help="Hash every file of every model: tells damage that left its size as it was.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def doctor(config_file: str, root: str, deep: bool, as_json: bool) -> int:
    """Look whether this host can start containers with models, and say what mends it.

    Each check is ok, warn (it works, with less protection or for now) or fail; the command that mends it follows.
    Each running container with a model is graded secure, weak or insecure, with the reasons. The hook's timeout must
    be at least 10 s + the largest model's size at 100 MB/s. Nothing is changed.

    The exit code is 0 if nothing fails, else 1; warnings and grades alone do not count.
    """
    examination = _Examination(config_file, root, deep=deep)
    checks: list[Check] = []
    group = ""
    for check in examination.checks():
        checks.append(check)
        if not as_json:
            if check.group != group:
                click.echo(check.group)
            group = check.group
            _show(check)
    totals = {status: sum(check.status == status for check in checks) for status in ("ok", "warn", "fail")}
    grades = [container.grade for container in examination.containers]
    if as_json:
        document = {
            "ok": not totals["fail"],
            "summary": totals,
            "checks": [dataclasses.asdict(each) for each in checks],
        }
        print_json({**document, "containers": [dataclasses.asdict(each) for each in examination.containers]})
        return 1 if totals["fail"] else 0
    if examination.containers:
        click.echo("containers")
    for container in examination.containers:
        _show_container(container)
    parts = [f"{number} {status}" for status, number in totals.items()]
    parts += [f"{grades.count(each)} {each}" for each in ("secure", "weak", "insecure") if each in grades]
    click.echo(", ".join(parts) + ("" if totals["fail"] else ": nothing fails"))
    return 1 if totals["fail"] else 0


def _show(check: Check) -> None:
    _line(check.status, f"{check.name}: {check.message}", check.remedy)


def _line(head: str, text: str, remedy: str) -> None:
    click.echo(f"  {head:<5}{printable(text)}")
    if remedy:
        click.echo(f"       mend: {printable(remedy)}")


def _show_container(container: GradedContainer) -> None:
    models = ", ".join(container.models)
    click.echo(f"  {container.grade or '?':<9}{printable(f'{container.container_id[:12]} ({models})')}")
    for reason in container.reasons:
        _line(reason.weight[:4] if reason.weight == "weak" else "!", f"{reason.name}: {reason.message}", reason.remedy)
    for each in container.unseen:
        _line("?", f"not seen: {each}", "")


COMMANDS: dict[str, Any] = {"doctor": doctor}
